"""The CPU loops as plain C++: under AddressSanitizer and UndefinedBehaviorSanitizer, and their symbols.

The kernel files hold no torch, so that a small program can call them on arrays of exactly the right size.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CXX = os.environ.get("CXX", "c++")
KERNELS = sorted((ROOT / "csrc" / "cpu").glob("*_kernel.cpp"))
ON_X86 = platform.machine() in ("x86_64", "AMD64")
FLAGS = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
}
pytestmark = [pytest.mark.needs("compiler"), pytest.mark.slow]


def instruction_sets() -> list[str]:
    return list(FLAGS) if ON_X86 else ["DEFAULT"]


def runs_here(name: str) -> bool:
    words = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return {"DEFAULT": True, "AVX2": " avx2" in words, "AVX512": " avx512bw" in words}[name]


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda p: p.stem)
def test_sanitized(kernel: Path, instruction_set: str, tmp_path: Path):
    if not runs_here(instruction_set):
        pytest.skip(f"this machine does not run {instruction_set}")
    family = kernel.stem.removesuffix("_kernel")
    driver = Path(__file__).with_name(f"{family}_sanitized.cpp")
    assert driver.exists(), f"{family} has no sanitizer driver"
    program = tmp_path / "sanitized"
    flags = ["-std=c++17", "-O0", "-g1", "-fno-math-errno", "-Wno-maybe-uninitialized", "-fsanitize=address,undefined"]
    flags += ["-fno-sanitize-recover=all", f"-DCPU_CAPABILITY={instruction_set}", *FLAGS[instruction_set]]
    table = f"-DDL_TABLE={family}_kernels_{instruction_set}"
    built = run([CXX, *flags, table, str(driver), str(kernel), "-o", str(program)])
    assert built.returncode == 0, built.stderr[-3000:]
    done = run([str(program)], env={**os.environ, "ASAN_OPTIONS": "detect_leaks=1"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.strip().endswith("ok")


def object_of(kernel: Path, folder: Path) -> Path:
    """The AVX2 object of the build in this folder, if it is newer than all sources, else one made now."""
    newest = max(p.stat().st_mtime for p in (ROOT / "csrc").rglob("*.*"))
    for found in ROOT.glob(f"build/temp*/kernels/{kernel.stem}.AVX2.o"):
        if found.stat().st_mtime > newest:
            return found
    built = folder / "kernel.o"
    flags = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-DCPU_CAPABILITY=AVX2"]
    assert run([CXX, *flags, *FLAGS["AVX2"], "-c", str(kernel), "-o", str(built)]).returncode == 0
    return built


@pytest.mark.skipif(not ON_X86, reason="one instruction set only")
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda p: p.stem)
def test_no_weak_symbol_outside_its_instruction_set(kernel: Path, tmp_path: Path):
    """A weak std:: symbol compiled for AVX-512 and picked by the linker would crash machines without it."""
    built = object_of(kernel, tmp_path)
    symbols = run(["nm", "-C", str(built)]).stdout.splitlines()
    weak = [line for line in symbols if (line.split()[-2:-1] != ["U"] and " W " in f" {line} ") or " V " in f" {line} "]
    assert weak, "no weak symbol at all: the check looks at nothing"
    assert [line for line in weak if "dlkernels::AVX2::" not in line] == []


@pytest.mark.needs("cpp")
def test_extension_holds_every_instruction_set():
    path = importlib.util.find_spec("dlkernels._C").origin
    symbols = run(["nm", "-C", path]).stdout
    for name in instruction_sets():
        assert f"dlkernels::{name}::" in symbols, name
