"""No speed is reported for an op whose tests fail: runs its test file once per state of the sources."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "benchmarks" / "results" / "local" / "tests.json"
WATCHED = ("dlkernels/**/*.py", "dlkernels/_C*", "csrc/**/*", "tests/conftest.py", "tests/needs.py")
FOLDERS = ("ops", "optim")  # of tests/
TIMEOUT_S = 1500


def test_files() -> dict[str, Path]:
    """By family."""
    paths = (path for folder in FOLDERS for path in (ROOT / "tests" / folder).glob("test_*.py"))
    return {path.stem.removeprefix("test_"): path for path in paths}


def test_file(family: str) -> Path:
    return test_files().get(family, ROOT / "tests" / FOLDERS[0] / f"test_{family}.py")


def fingerprint(family: str, device: str) -> str:
    """Hash of the device, the interpreter, and of all that can change the outcome of the tests."""
    import torch

    return digest(f"{device} {sys.version} {torch.__version__}", WATCHED, {test_file(family)})


def digest(words: str, patterns: tuple[str, ...], more: Iterable[Path] = ()) -> str:
    """Hash of some words, and of the files that patterns name in the project, and more."""
    found = hashlib.sha256(words.encode())
    paths = {p for pattern in patterns for p in ROOT.glob(pattern) if p.is_file() and "__pycache__" not in p.parts}
    for path in sorted(paths | set(more)):
        found.update(str(path.relative_to(ROOT)).encode())
        found.update(path.read_bytes() if path.exists() else b"missing")
    return found.hexdigest()


def _remembered() -> dict[str, str]:
    try:
        return json.loads(CACHE.read_text())
    except (OSError, ValueError):
        return {}


def why_not_built(device: str) -> str:
    """Empty when kernels serve this device, else the reason: the reference is no thing to time."""
    from dlkernels import _backend

    if _backend.state.forced is not None or _backend.default_for(device) != "reference":
        return ""
    return f"not built: {_backend.C_MISSING if device == 'cpu' else _backend.triton_missing()}"


def remember(family: str, device: str) -> None:
    """The family's tests have passed on the sources as they are now."""
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    CACHE.write_text(json.dumps(_remembered() | {f"{family} {device}": fingerprint(family, device)}, indent=1))


def passed_before(family: str, device: str) -> bool:
    return _remembered().get(f"{family} {device}") == fingerprint(family, device)


def why_tests_fail(family: str, device: str = "cpu") -> str:
    """Empty when the family's tests pass on this device, else the reason in one line. A pass is remembered."""
    if why := why_not_built(device):
        return why
    if not test_file(family).exists():
        return f"{test_file(family).relative_to(ROOT)} does not exist"
    now = fingerprint(family, device)
    if _remembered().get(f"{family} {device}") == now:
        return ""
    print(f"running {test_file(family).relative_to(ROOT)} on {device} before timing", flush=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(test_file(family)),
        "--device",
        device,
    ]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])))
    env.pop("PYTEST_ADDOPTS", None)
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"tests ran past {TIMEOUT_S} s"
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-1:] or ["no output"]
        return f"tests fail: {failed[0][:200]}"
    if fingerprint(family, device) != now:
        return "the sources changed while the tests ran: run again"
    remember(family, device)
    return ""
