"""What the GPU gate reads from Nsight Compute and compute-sanitizer, and how it runs them in little time."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SAMPLES = Path(__file__).parent / "benchmark_samples"
sys.path.insert(0, str(ROOT / "benchmarks"))

import gate_parsers  # noqa: E402
import gate_run  # noqa: E402
import gpu_gate  # noqa: E402

# Profilers ------------------------------------------------------------------------------------------------------------


def test_ncu_raw_page() -> None:
    launches = gate_parsers.ncu_launches((SAMPLES / "ncu_raw.csv").read_text())
    groups = gate_parsers.by_case(launches, ["sigmoid", "softmax"])
    assert [len(g) for g in groups.values()] == [2, 2]
    sigmoid, softmax = gate_parsers.traffic_rows(groups, {"sigmoid": 3 << 30, "softmax": 3 << 30})
    assert sigmoid["counted"] == 2_148_532_224 + 1_040_187_392 + 4_096 + 128
    assert sigmoid["passed"] and sigmoid["kernel"] == "_sigmoid_focal_loss_fwd_kernel" and sigmoid["registers"] == 40
    assert not softmax["passed"] and softmax["ratio"] == pytest.approx(5 / 3, abs=0.01), "a kernel that reads twice"
    assert softmax["local_bytes"] == 16_384, "spills show"


def test_ncu_details_page_and_units() -> None:
    marker, launch = gate_parsers.ncu_launches((SAMPLES / "ncu_details.csv").read_text())
    assert gate_parsers.MARKER in marker.kernel
    assert launch.dram_bytes == pytest.approx(3.19e9) and launch.metrics["gpu__time_duration.sum"] == pytest.approx(
        786430
    )


def test_ncu_without_results() -> None:
    with pytest.raises(ValueError, match="LibraryNotLoaded"):
        gate_parsers.ncu_launches("==ERROR== Failed to initialize the profiler: LibraryNotLoaded\n")
    launches = gate_parsers.ncu_launches((SAMPLES / "ncu_raw.csv").read_text())
    with pytest.raises(ValueError, match="2 of 3 cases"):
        gate_parsers.by_case(launches, ["a", "b", "c"])


@pytest.mark.parametrize(
    ("name", "complete", "count", "ours"),
    [
        ("memcheck_clean", True, 0, 0),
        ("memcheck_bad", True, 2, 1),
        ("racecheck_bad", True, 1, 1),
        ("initcheck_torch", True, 1, 0),
        ("memcheck_killed", False, 0, 0),
    ],
)
def test_sanitizer_logs(name: str, complete: bool, count: int, ours: int) -> None:
    found = gate_parsers.sanitizer_log((SAMPLES / f"sanitizer_{name}.log").read_text())
    assert (found.complete, found.count) == (complete, count)
    assert len(found.findings) == count, found.findings
    assert len(found.in_kernels({"_softmax_focal_loss_fwd_kernel"})) == ours


def test_kernel_names_are_found() -> None:
    names = gate_parsers.kernel_names()
    assert {"softmax_focal_kernel", "scale_stored_grad_kernel"} <= names, (
        "the sanitizer stage must know Triton's and ours"
    )
    for path in (ROOT / "csrc" / "cuda").glob("*_kernel.cu"):
        text = path.read_text()
        launched = set(re.findall(r"\b(\w+_kernel)(?=<|,)", text))
        assert launched <= names, f"{path.name}: {launched - names}"


# Around the tools -----------------------------------------------------------------------------------------------------

TOOL = """#!{python}
import pathlib, subprocess, sys
words = sys.argv[1:]
code = subprocess.call(words[words.index({python!r}):])
name = words[words.index("--tool") + 1] if "--tool" in words else "ncu"
text = {{"racecheck": "========= COMPUTE-SANITIZER\\n", "ncu": pathlib.Path({csv!r}).read_text()}}
summary = "========= ERROR SUMMARY: 0 errors\\n"
pathlib.Path(words[words.index("--log-file") + 1]).write_text(text.get(name, summary))
sys.exit(code)
"""
TOOL_WORKER = """
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
rows = json.loads(out.read_text()) if out.exists() else []
seen = [row["case"] for row in rows]
rows += [dict(case=c, passed=True, marked=True, declared=3 << 30) for c in "ab" if c not in seen]
out.write_text(json.dumps(rows))
time.sleep(0.5)
sys.exit(3 if "racecheck" in str(out) or {short} else 0)
"""


def with_tools(tmp_path: Path, monkeypatch: Any, short: bool) -> gate_run.Gate:
    tool, worker = tmp_path / "tool", tmp_path / "worker.py"
    tool.write_text(TOOL.format(python=sys.executable, csv=str(SAMPLES / "ncu_raw.csv")))
    tool.chmod(0o755)
    worker.write_text(TOOL_WORKER.format(short=short))
    monkeypatch.setattr(gate_run, "WORKER", worker)
    monkeypatch.setattr(gate_parsers, "find_tool", lambda name: str(tool))
    gate = gate_run.Gate(tmp_path / "state")
    gate.key, gate.deadline = "sources", time.monotonic() + 130
    return gate


def test_sanitizers_in_little_time(tmp_path: Path, monkeypatch: Any) -> None:
    """The first tools first; what is clean as far as it came is partial, and not repeated where it was complete."""
    gate = with_tools(tmp_path, monkeypatch, short=False)
    gate.deadline = time.monotonic() + gpu_gate.MIN_CHECK_S + 0.3
    monkeypatch.setattr(gpu_gate, "CHECKS", ("memcheck", "racecheck", "synccheck"))
    status, line, rows = gpu_gate.sanitize(gate)
    assert status == "partial" and line.startswith("clean: memcheck"), line
    assert "not reached: racecheck, synccheck" in line
    gate.stages["sanitize"] = {"fingerprint": "sources", "data": rows}
    gate.deadline = time.monotonic() + 300
    status, line, rows = gpu_gate.sanitize(gate)
    assert [row["tool"] for row in rows] == ["memcheck", "racecheck", "synccheck"]
    assert status == "partial" and "partly: racecheck (2 cases, clean)" in line, line
    assert rows[2]["passed"] and not rows[1]["passed"]


def test_counted_traffic_is_kept(tmp_path: Path, monkeypatch: Any) -> None:
    gate = with_tools(tmp_path, monkeypatch, short=True)
    status, line, rows = gpu_gate.ncu(gate)
    assert [row["case"] for row in rows] == ["a", "b"] and [row["passed"] for row in rows] == [True, False]
    assert status == "FAILED" and "out of time" in line
    gate.stages["ncu"] = {"fingerprint": "sources", "data": rows}
    (gate.scratch / "traffic.json").unlink()
    worker = gate_run.WORKER
    worker.write_text(worker.read_text().replace('"ab"', '"abc"').replace("or True", ""))
    status, line, rows = gpu_gate.ncu(gate)
    assert [row["case"] for row in rows] == ["a", "b", "c"], "what was within its bytes is not counted again"
