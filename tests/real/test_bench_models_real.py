"""`bench --model` on models of real libraries: a short run, by the command and by the benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import _libraries  # noqa: F401
import pytest

for _name in ("timm", "diffusers", "monai"):
    pytest.importorskip(_name, reason=f"needs real: {_name} is not installed")

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "bench_models.py"


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    full = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):  # of the run that this test is part of
        full.pop(name, None)
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=full, capture_output=True, text=True, timeout=300)


def test_command(tmp_path: Path) -> None:
    path = tmp_path / "net.json"
    options = ("--rounds", "2", "--size", "32", "--batch", "4", "--no-compile", "--device", "cpu", "--share")
    done = run(str(SCRIPT), "--model", "regnety_008", *options, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 squeeze_excite" in done.stdout and "One training step" in done.stdout
    (record,) = json.loads(path.read_text())["records"]
    assert list(record["candidates"]) == ["eager", "eager-fused-adamw", "swapped", "swapped-adamw"]
    assert record["swap"]["counts"] == {"squeeze_excite": 14} and record["library"].startswith("timm ")
    assert 0.005 < record["share"]["modules"] < 0.5 and 0.005 < record["share"]["optimizer"] < 0.6


def test_benchmark(tmp_path: Path) -> None:
    options = ("--no-compile", "--model-rounds", "1", "--model-size", "32", "-p", "no:cacheprovider")
    done = run("-m", "pytest", str(SCRIPT), "-k", "segresnet", *options, OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    doc = json.loads((tmp_path / "models.json").read_text())
    (record,) = doc["records"]
    assert doc["family"] == "models" and record["name"] == "segresnet" and record["swap"]["counts"]["group_norm"] == 25
    assert "1 models" in done.stdout
