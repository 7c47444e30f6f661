"""Checks that several processes of one machine make together, over gloo: started by a test, imported once, then forked.

A test file gives its checks and calls `assert_all_pass`; run as a program, it calls `fork` with its `run_checks`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dlkernels as dk
from dlkernels import _backend

LIMIT = timedelta(seconds=30)
Checks = dict[str, Callable[[], Any]]


def backends() -> list[str]:
    return ["reference"] if _backend._why_not("cpp", "cpu") else ["reference", "cpp"]


def join(rank: int, world: int, folder: Path) -> None:
    """Become a rank of the group."""
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=LIMIT)


def run_checks(rank: int, folder: Path, checks: Checks) -> None:
    """Run every check on each backend; stop at the first failure, after which the ranks may be apart."""
    said = (folder / f"rank{rank}").open("w")
    for backend, (name, run) in itertools.product(backends(), checks.items()):
        try:
            with dk.backend(backend):
                run()
                dist.barrier()
        except BaseException:
            print(backend, name, "failed\n", traceback.format_exc(), file=said, flush=True)
            os._exit(1)  # its peers' collectives fail at once
        print(backend, name, "passed", file=said, flush=True)
    dist.barrier()


def fork(world: int, rank_main: Callable[[int], None]) -> None:
    """One child per rank; what they need is imported before: importing torch takes longer than most checks."""
    torch.set_num_threads(1)
    children = []
    for rank in range(world):
        if not (child := os.fork()):
            try:
                rank_main(rank)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def assert_all_pass(script: str, folder: Path, world: int, checks: Checks) -> None:
    """Every check passes on every rank and backend, within a time that a hang exceeds."""
    root = Path(dk.__file__).parents[1]
    path = os.pathsep.join(filter(None, (str(root), str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", script, str(folder)]
    started = subprocess.Popen(
        command, env=env, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        printed = started.communicate(timeout=200)[0]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    files = [folder / f"rank{rank}" for rank in range(world)]
    said = [file.read_text() if file.exists() else printed[-2000:] for file in files]
    expected = "".join(f"{backend} {name} passed\n" for backend, name in itertools.product(backends(), checks))
    assert said == [expected] * world, "\n".join(text.removeprefix(expected)[-3000:] for text in said)
    if "cpp" not in backends():
        pytest.skip(f"needs cpp: passed on the reference only; {_backend.C_MISSING}")
