"""Fixtures of the tests that run CUDA kernels on the host: machines to plan for, counted bytes, launches, barriers.

Run by `make test-cuda-host`, or by hand in the environment that `python tests/cuda_host/_twin.py --env` prints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _machines import MACHINES, SEED
from torch import Tensor

import dlkernels as dk
from dlkernels import _backend
from dlkernels.testing import poisoned_empty


def pytest_report_header() -> str:
    return f"order of threads: DLKERNELS_HOST_SEED={SEED}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cuda_host" in item.path.parts:
            item.add_marker(pytest.mark.needs("twin"))


@dataclasses.dataclass
class Bytes:
    """Of one tensor: bytes loaded and stored, and those of the loads that came again."""

    loaded: int
    stored: int
    again: int


class Twin:
    """The host twin, for one test."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def machine(self, name: str) -> None:
        self.module.machine(*MACHINES[name])

    def launches(self) -> list[dict[str, Any]]:
        """Since the last call: op, grid, block, shared, cluster, overlap."""
        return self.module.take_launches()

    @contextlib.contextmanager
    def traffic(self, **tensors: Tensor) -> Iterator[dict[str, Bytes]]:
        """Bytes of global memory that kernels move inside the block; filled in at its end. `all` is of all memory."""
        counted: dict[str, Bytes] = {}
        self.module.count_bytes([(t.data_ptr(), t.numel() * t.element_size()) for t in tensors.values()])
        try:
            yield counted
        finally:
            loaded, stored, *rest = self.module.counted_bytes()
            counted["all"] = Bytes(loaded, stored, 0)
            for i, name in enumerate(tensors):
                counted[name] = Bytes(*rest[3 * i : 3 * i + 3])

    def unnoticed_barriers(self, check: Callable[[], None], seeds: int = 3, *, forked: bool = False) -> list[str]:
        """The barriers that `check`, a test that passes, does not miss: each is left out in turn, for several seeds.

        forked: in a process of its own each, because a kernel may go astray without it; that counts as noticed.
        """
        self.module.take_barriers()
        check()
        found = []
        for barrier in self.module.take_barriers():
            self.module.leave_out(barrier)
            try:
                for seed in range(seeds):
                    self.module.seed(seed)
                    self.module.forget_counters()
                    run_forked(check) if forked else check()
            except Exception:
                continue
            finally:
                self.module.leave_out("")
            found.append(barrier)
        return found


def run_forked(check: Callable[[], None]) -> None:
    """Raises when the check fails in a child process, or ends it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            faulthandler.disable()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            check()
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError("the check failed")


@pytest.fixture
def twin() -> Iterator[Twin]:
    """The twin as an H200, threads in an order of the session's seed, memory of outputs poisoned, "cuda" forced."""
    module = _backend.TWIN
    module.seed(SEED)
    module.machine(*MACHINES["h200"])
    module.take_launches()
    module.forget_counters()
    with poisoned_empty(), dk.backend("cuda"):
        yield Twin(module)
    module.machine(*MACHINES["h200"])


@pytest.fixture(autouse=True)
def _no_gradients_left() -> Iterator[None]:
    yield
    assert torch.is_grad_enabled()
