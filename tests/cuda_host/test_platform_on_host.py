"""What all CUDA kernels are written with, and what their host twin must notice: platform_driver.cpp, check by check."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import _twin
import pytest
from _machines import SEED

CHECKS = (
    "alignment",
    "block_sum",
    "cluster_sum",
    "clusters_memory",
    "copies",
    "counted_bytes",
    "deadlocks",
    "exchanges",
    "half_precision",
    "last_block",
    "missing_barriers",
    "overlap",
    "refused_launches",
    "unwritten_shared_memory",
    "warp_sum",
)
# name -> what the sanitizer says
FAULTS = {
    "fault_global_memory": "heap-buffer-overflow",
    "fault_local_memory": "stack-buffer-overflow|out of bounds",
    "fault_overflow": "signed integer overflow",
    "fault_shared_memory": "heap-buffer-overflow",
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver under sanitizers, with nothing of Python or torch in it."""
    program = tmp_path_factory.mktemp("platform") / "driver"
    compiler = os.environ.get("CXX", "c++").split()
    sources = [_twin.HERE / "platform_driver.cpp", _twin.HERE / "shim.cpp"]
    # Without optimisation, so that no fault is optimised away.
    flags = [flag for flag in _twin.FLAGS if flag not in ("-O1", "-fPIC")]
    _twin.run([*compiler, *flags, *_twin.SANITIZERS, f"-I{_twin.HERE}", *map(str, sources), "-o", str(program)])
    return program


def run(driver: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in _twin.plain().items() if not name.endswith("SAN_OPTIONS")}
    env["ASAN_OPTIONS"] = "detect_leaks=0"
    return subprocess.run([str(driver), *arguments], capture_output=True, text=True, env=env, timeout=120)


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str, driver: Path) -> None:
    done = run(driver, name, str(SEED))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_noticed(name: str, driver: Path) -> None:
    done = run(driver, name, str(SEED))
    assert done.returncode not in (0, 2)
    assert any(words in done.stderr for words in FAULTS[name].split("|")), done.stderr[-3000:]


@pytest.mark.parametrize("source", sorted((_twin.ROOT / "csrc" / "cuda").glob("*.cpp")), ids=lambda path: path.stem)
def test_what_stays_is_not_of_the_allocator(source: Path) -> None:
    """A tensor that outlives a call would lie in the memory pool in force, which others are given later."""
    of_device = source.read_text().split("#else\n\nnamespace {", 1)[-1]  # behind what the twin has in its place
    assert re.findall(r"static [^;(]*\bat::Tensor\b[^;]*;", of_device) == []


def test_no_check_is_forgotten(driver: Path) -> None:
    assert set(run(driver, "--list").stdout.split()) == {*CHECKS, *FAULTS}
