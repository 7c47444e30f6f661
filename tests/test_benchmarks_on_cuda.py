"""The benchmarks' own code on a CUDA device: inputs, candidates, capture, clocks. `make gpu` does this at full size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gate_worker
import harness
import timing

pytestmark = pytest.mark.gpu
CURVE = [(1 << 10, 10.0), (1 << 30, 100.0)]
EACH = [pytest.param(f, case, id=case.name) for f in gate_worker.FAMILIES for case in f.gate_cases]
FIRST = [pytest.param(f, case, id=case.name) for f in gate_worker.FAMILIES for case in f.gate_cases[:2]]


@pytest.fixture(autouse=True)
def _runs_there(request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["case"].steps and torch.cuda.get_device_name() == "pretended":
        pytest.skip("by design: optimizers launch their kernels themselves, and this device is pretended")


@pytest.mark.parametrize(("family", "case"), EACH)
def test_capture(family: harness.Family, case: harness.Case) -> None:
    row = gate_worker.graph_case(family, case, timing.Cuda())
    assert row["passed"], row


@pytest.mark.parametrize(("family", "case"), FIRST)
def test_measured(family: harness.Family, case: harness.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every candidate but torch.compile is right there, is captured and timed."""
    monkeypatch.setattr(timing, "REPLAYS", 3)
    monkeypatch.setattr(timing, "LATENCY_CALLS", 10)
    monkeypatch.setattr(timing.Cuda, "l2_bytes", lambda self: 1 << 12)
    record, _ = harness.run_case(family, case, "cuda", CURVE, compile=False, gpu=timing.Cuda())
    assert record["refused"] == ""
    assert {"eager", harness.OURS} <= record["candidates"].keys()
    for name, entry in record["candidates"].items():
        assert "median_us" in entry and entry["latency_us"] > 0, (name, entry)
