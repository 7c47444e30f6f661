"""The twin's tests can fail: kernels with a fault put in are built, and the named test has to notice."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import _twin
import pytest

ROOT = _twin.ROOT
FOUND = [
    (module, *mutation)
    for module in sorted(p.stem for p in Path(__file__).parent.glob("mutations_*.py"))
    for mutation in importlib.import_module(module).MUTATIONS
]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "mutation", FOUND, ids=[f"{m.removeprefix('mutations_')}-{i}" for i, (m, *_) in enumerate(FOUND)]
)
def test_a_fault_is_noticed(mutation: tuple[Any, ...], tmp_path: Path) -> None:
    _, file, text, instead, test = mutation
    source = ROOT / file
    original = source.read_text()
    assert original.count(text) == 1, f"{file} must have this once: {text}"
    library = _twin.build(changed={source: original.replace(text, instead)}, jobs=1)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", test],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, **_twin.environment(library, report=tmp_path / "report"), "PYTHONPATH": str(ROOT)},
        )
    finally:
        library.unlink()
    said = "".join([done.stdout, done.stderr, *(p.read_text() for p in tmp_path.glob("report.*"))])
    noticed = re.search(r"\d+ failed|AddressSanitizer|runtime error:", said)
    assert done.returncode != 0 and noticed, f"{test} does not notice this fault:\n{said[-3000:]}"
