"""The CUDA C++ kernels compiled for every architecture, no GPU needed: nothing spills, and registers stay below the
limits in cuda_limits.json.

    pytest tests/test_cuda_compiled.py
    python tests/test_cuda_compiled.py --update      raise the limits to what the installed nvcc needs, after a change
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIMITS = Path(__file__).with_name("cuda_limits.json")
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*_kernel.cu"))
CAPABILITIES = (75, 80, 90, 100)

pytestmark = [pytest.mark.needs("nvcc"), pytest.mark.slow]


class Used(NamedTuple):
    """What one kernel needs."""

    registers: int
    stack: int  # bytes of local memory: arrays indexed at run time, and spills
    spilled: int


def compile_and_read(source: Path, capability: int) -> dict[str, Used]:
    """What each kernel of a file needs, by name and template arguments."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++17", "-O3", "-c", f"-arch=sm_{capability}", "-Xptxas", "-v"]
        done = subprocess.run(
            [*command, str(source), "-o", str(Path(folder, "kernels.o"))], capture_output=True, text=True
        )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "warning" not in done.stderr, done.stderr[-4000:]
    return read(done.stderr)


def read(log: str) -> dict[str, Used]:
    """The report of `ptxas -v`."""
    blocks = re.split(r"Compiling entry function '", log)[1:]
    names = demangled([block.split("'", 1)[0] for block in blocks])
    used = {}
    for name, block in zip(names, blocks, strict=True):
        stack, stores, loads = map(
            int,
            re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block).groups(),
        )
        registers = int(re.search(r"Used (\d+) registers", block).group(1))
        assert name not in used, f"two kernels of one name: {name}"
        used[name] = Used(registers, stack, stores + loads)
    return used


def demangled(names: list[str]) -> list[str]:
    """Readable and the same in every build: without namespaces, whose anonymous ones have a hash for a name."""
    if not names:
        return []
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    short = []
    for line in done.stdout.splitlines():
        text = re.sub(r"(dlkernels|CUDA|\(anonymous namespace\))::", "", line).removeprefix("void ")
        text = text.replace("(int)", "").replace("(bool)", "")
        depth = 0
        for i, letter in enumerate(text):  # up to the parenthesis of the parameters
            depth += {"<": 1, ">": -1}.get(letter, 0)
            if letter == "(" and depth == 0:
                text = text[:i]
                break
        short.append(text)
    return short


def limits() -> dict[str, dict[str, dict[str, int]]]:
    """file -> kernel -> architecture -> registers."""
    return json.loads(LIMITS.read_text())


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_nothing_spills_and_registers_stay_below_their_limits(source: Path, capability: int) -> None:
    allowed = limits().get(source.stem, {})
    used = compile_and_read(source, capability)
    assert used, "no kernel was compiled"
    local = {name: u for name, u in used.items() if u.spilled or u.stack}
    assert not local, f"local memory: {local}"
    unknown = used.keys() - allowed.keys()
    assert not unknown, f"no limit in {LIMITS.name}, update it: {sorted(unknown)}"
    above = {
        n: (u.registers, allowed[n][str(capability)])
        for n, u in used.items()
        if u.registers > allowed[n][str(capability)]
    }
    assert not above, f"registers (used, allowed): {above}"


def test_limits_name_kernels_that_exist() -> None:
    files = {p.stem for p in SOURCES}
    assert limits().keys() <= files, f"limits of files that are gone: {limits().keys() - files}"


def test_the_report_is_read() -> None:
    log = (
        "ptxas info    : Compiling entry function '_Z3fooIfLi4EEv4Args' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z3fooIfLi4EEv4Args\n"
        "    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 43 registers, used 1 barriers\n"
    )
    assert read(log) == {"foo<float, 4>": Used(43, 16, 20)}


def update() -> None:
    found: dict[str, dict[str, dict[str, int]]] = {}
    for source in SOURCES:
        for capability in CAPABILITIES:
            for name, used in compile_and_read(source, capability).items():
                rounded = -(-used.registers // 8) * 8
                found.setdefault(source.stem, {}).setdefault(name, {})[str(capability)] = rounded
                if used.spilled or used.stack:
                    print(f"{source.stem}, sm_{capability}: {name} has {used.stack} bytes of local memory")
    files = []
    for file, kernels in found.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(kernels[name])}" for name in sorted(kernels))
        files.append(f" {json.dumps(file)}: {{\n{lines}\n }}")
    LIMITS.write_text("{\n" + ",\n".join(files) + "\n}\n")


if __name__ == "__main__":
    if "--update" not in sys.argv:
        sys.exit(__doc__)
    update()
