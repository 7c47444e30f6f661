"""The benchmarks: cases declare their bytes, results become tables, failing ops are refused."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dlkernels import _backend

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
SAMPLES = Path(__file__).parent / "benchmark_samples"
sys.path.insert(0, str(BENCHMARKS))

import bench_adamw  # noqa: E402
import bench_center_loss  # noqa: E402
import bench_focal_loss  # noqa: E402
import bench_gccs_loss  # noqa: E402
import bench_group_norm  # noqa: E402
import bench_region_biased_loss  # noqa: E402
import bench_sgdw  # noqa: E402
import bench_squeeze_excite  # noqa: E402
import bench_stochastic_depth  # noqa: E402
import bench_weight_norm  # noqa: E402
import guard  # noqa: E402
import harness  # noqa: E402
import parity  # noqa: E402
import report  # noqa: E402
import timing  # noqa: E402

FAMILY = bench_focal_loss.FAMILY
DECLARED = [*FAMILY.cases, *FAMILY.full_cases, *FAMILY.gpu_cases, *FAMILY.gate_cases, *FAMILY.traffic_cases]
LAYERS = [bench.FAMILY for bench in (bench_group_norm, bench_squeeze_excite, bench_weight_norm, bench_stochastic_depth)]
CENTERS, GCCS = bench_center_loss.FAMILY, bench_gccs_loss.FAMILY
REGIONS = bench_region_biased_loss.FAMILY
FAMILIES = [FAMILY, CENTERS, GCCS, REGIONS, *LAYERS, bench_adamw.FAMILY, bench_sgdw.FAMILY]
GROUPS = ("cases", "full_cases", "gpu_cases", "gate_cases", "traffic_cases")
needs_plots = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    full = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):  # of the run that this test is part of
        full.pop(name, None)
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=full, capture_output=True, text=True, timeout=300)


# Declarations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", DECLARED, ids=lambda case: case.name)
def test_cases_declare_bytes(case: harness.Case) -> None:
    logits = case.numel * case.itemsize
    assert FAMILY.bytes_fwd(case) > logits, "logits and targets are read"
    assert FAMILY.bytes_bwd(case) >= logits, "the gradient is written"
    assert FAMILY.bytes(case) == FAMILY.bytes_fwd(case) + case.backward * FAMILY.bytes_bwd(case)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_names_tell_cases_apart(family: harness.Family, group: str) -> None:
    names = [case.name for case in getattr(family, group)]
    assert names and len(names) == len(set(names))


def test_names_are_those_of_the_committed_results() -> None:
    """A renamed case could not be compared with what was measured before."""
    for path in (BENCHMARKS / "results").glob("*/*.json"):
        bench = {family.name: family for family in FAMILIES}.get(path.stem)
        if bench is not None and path.parent.name != "local":
            measured = {record["name"] for record in json.loads(path.read_text())["records"]}
            assert measured <= {case.name for case in bench.selected("cuda", full=True)}, path


def test_minimal_bytes_of_known_cases() -> None:
    case = harness.Case("cross_entropy", (4096, 1000))
    assert FAMILY.bytes(case) == 2 * 4096 * 1000 * 4 + 4096 * 8 + 4, "logits read, gradient written, labels read, loss"
    sigmoid = harness.Case("sigmoid_focal_loss", (10, 10), torch.bfloat16, targets="float", reduction="none")
    assert FAMILY.bytes(sigmoid) == 400 + 400 + (400 + 400 + 200), "loss in fp32; backward reads all again"


def test_minimal_bytes_of_region_biased_losses() -> None:
    region = bench_region_biased_loss.region
    assert REGIONS.bytes(region((10, 6), mask=True)) == 2 * 240 + 60 + 4, "weights, gradient, mask, loss"
    assert REGIONS.bytes(region((10, 6), torch.bfloat16, "none")) == 120 + 40 + (120 + 40 + 120), "all read again"
    for case in REGIONS.gate_cases:
        x, *mask = harness.make_inputs(REGIONS, case, "cpu")
        assert x.dtype == case.dtype and x.requires_grad and all(len(set(row.tolist())) == len(row) for row in x)
        assert len(mask) == bool(case.option("mask")) and all(0 < m.float().mean() < 1 for m in mask)


def test_minimal_bytes_of_gccs_losses() -> None:
    gccs = bench_gccs_loss.gccs
    assert GCCS.bytes(gccs((20, 5))) == 2 * 400 + 160 + 4, "features, gradient, labels, loss"
    assert GCCS.bytes(gccs((20, 5), torch.bfloat16, "none")) == 360 + 20 + (360 + 20 + 200), "all read again"
    for case in GCCS.gate_cases:
        x, y = harness.make_inputs(GCCS, case, "cpu")
        assert x.dtype == case.dtype and x.requires_grad and set(y.tolist()) <= set(range(case.shape[1]))


def test_minimal_bytes_of_center_losses() -> None:
    """Features, their gradient, labels, the centers of the classes that can be present, the loss."""
    case, x = bench_center_loss.case, 4 * 10 * 6
    assert CENTERS.bytes(case("center_loss", (10, 6), 4)) == 2 * x + 80 + 4 * 24 + 4
    assert CENTERS.bytes(case("center_loss", (10, 6), 400, update=True)) == 2 * x + 80 + 2 * x + 4, "ten of them move"
    assert CENTERS.bytes(case("sparse_center_loss", (10, 6), 4)) == 4 * x + 80 + 4 * 24 + 4
    pairs = case("island_loss", (10, 6), 400)
    assert CENTERS.bytes(pairs) == 2 * x + 2 * (80 + 4 * 2400 + 4) + x + 4 * 2400, "all read twice, a gradient in all"
    for case in CENTERS.gate_cases:
        tensors = harness.make_inputs(CENTERS, case, "cpu")
        learning = [t for t in tensors if t.requires_grad]
        assert len(learning) == CENTERS.grads(case) and learning[0] is tensors[0] and tensors[0].dtype == case.dtype


@pytest.mark.parametrize("family", LAYERS, ids=lambda family: family.name)
def test_layers_declare_bytes(family: harness.Family) -> None:
    """Every tensor that must be read or written at least once; the name says what kind of case it is."""
    for case in (case for group in GROUPS for case in getattr(family, group)):
        size = case.numel * case.itemsize
        passes = 1 if family.name == "stochastic_depth" else 2  # a dropped row is not read
        assert passes * size < family.bytes_fwd(case) < 6 * size + 4096 * 4096, case.name
        assert passes * size < family.bytes_bwd(case), case.name
        words = case.name.split()
        assert words[:2] == [family.name, "x".join(map(str, case.shape))] and "None" not in words, case.name


def test_minimal_bytes_of_known_layers() -> None:
    layer, groups, squeeze, weight, depth = harness.layer, *LAYERS
    x = 2 * 6 * 35 * 4
    case = layer("group_norm", (2, 6, 5, 7), groups=3)
    assert groups.bytes(case) == 5 * x + 3 * (2 * 6 * 4 + 8 * 2 * 3), "2 + 3 passes; weight, bias, statistics"
    case = layer("group_norm", (2, 6, 5, 7), groups=3, activation="relu", residual=True, affine=False)
    assert groups.bytes(case) == 8 * x + 3 * 8 * 2 * 3, "x, r -> y; dy, x, r -> dx, dr"
    case = layer("squeeze_excite", (2, 6, 5, 7), hidden=2)
    assert squeeze.bytes(case) == 7 * x + 3 * (4 * (2 * 6 * 2 + 8) + 4 * 2 * (2 * 6 + 2)), "3 + 4 passes"
    case = layer("weight_norm", (7, 33))
    assert weight.bytes(case) == 5 * 7 * 33 * 4 + 7 * (4 + 4 + 8 + 4), "2 + 3 passes; g, norms"
    case = layer("stochastic_depth", (8, 10), p=0.5, residual=True)
    assert depth.bytes(case) == 4 * 80 * 2.5 + 4 * 80 * 1.5, "half of x, r -> y; half of dy -> dx"


@pytest.mark.parametrize("family", LAYERS, ids=lambda family: family.name)
def test_layer_inputs(family: harness.Family) -> None:
    for case in family.gate_cases:
        tensors = harness.make_inputs(family, case, "cpu")
        assert all(t.dtype == case.dtype and (t.numel() == 1 or t.double().std() > 0) for t in tensors), case.name
        assert [t.requires_grad for t in tensors] == [i < (family.grads(case) or 99) for i in range(len(tensors))]
        if case.layout == "channels_last":
            like = [t for t in tensors if t.shape == case.shape]
            assert all(t.is_contiguous(memory_format=harness.FORMATS[t.dim()]) for t in like), case.name


@pytest.mark.parametrize("case", FAMILY.gate_cases, ids=lambda case: case.name)
def test_inputs_are_not_trivial(case: harness.Case) -> None:
    x, target, *_ = harness.make_inputs(FAMILY, case, "cpu")
    assert x.requires_grad == case.backward
    assert x.dtype == case.dtype and x.shape == case.shape
    assert x.std() > 1 and target.double().std() > 0
    assert x.is_contiguous(memory_format=torch.channels_last) == (case.layout == "channels_last") or x.dim() != 4


# Checking and measuring -----------------------------------------------------------------------------------------------

CURVE = [(1 << 14, 10.0), (1 << 20, 80.0), (1 << 28, 20.0)]


def test_run_case_measures_and_checks() -> None:
    case = harness.Case("sigmoid_focal_loss", (64, 64), targets="float")
    record, samples = harness.run_case(FAMILY, case, "cpu", CURVE, budget_s=0.05, compile=False)
    assert record["refused"] == ""
    ours = record["candidates"]["dlkernels"]
    assert ours["time_us"] == pytest.approx(min(samples["dlkernels"]) * 1e6)
    assert ours["gbps"] == pytest.approx(record["bytes"] / ours["time_us"] / 1e3)
    assert ours["peak_bytes"] >= 64 * 64 * 4, "at least the gradient"
    assert ours["x_eager"] == pytest.approx(record["candidates"]["eager"]["time_us"] / ours["time_us"])
    assert {"median_us", "spread", "rounds"} <= ours.keys()


def test_a_wrong_result_is_refused() -> None:
    wrong = harness.Family(
        **{f: getattr(FAMILY, f) for f in FAMILY.__dataclass_fields__}
        | {"ours": lambda case: lambda x, t: FAMILY.ours(case)(x, t) * (1 if x.dtype == torch.float64 else 1.001)}
    )
    case = harness.Case("sigmoid_focal_loss", (64, 64), targets="float")
    record, samples = harness.run_case(wrong, case, "cpu", CURVE, budget_s=0.05, compile=False)
    assert "loss error" in record["refused"] and "gradient error" in record["refused"]
    assert not samples and not record["candidates"]


def test_a_candidate_that_computes_something_else_is_not_compared() -> None:
    peer = harness.Peer("other", "torch", lambda case: lambda x, t: FAMILY.eager(case)(x, t) * 2)
    family = harness.Family(**{f: getattr(FAMILY, f) for f in FAMILY.__dataclass_fields__} | {"peers": (peer,)})
    case = harness.Case("sigmoid_focal_loss", (64, 64), targets="float")
    record, _ = harness.run_case(family, case, "cpu", CURVE, budget_s=0.05, compile=False)
    assert "other" not in record["candidates"] and "differs" in record["dropped"]["other"]


def _with(family: harness.Family, **changes: Any) -> harness.Family:
    return harness.Family(**{f: getattr(family, f) for f in family.__dataclass_fields__} | changes)


def test_a_layer_is_measured_with_all_its_gradients() -> None:
    family, case = LAYERS[0], harness.layer("group_norm", (2, 6, 5, 7), groups=3, residual=True, film=True)
    record, samples = harness.run_case(_with(family, peers=()), case, "cpu", CURVE, budget_s=0.02, compile=False)
    assert record["refused"] == "" and samples.keys() == {"eager", "dlkernels"}
    assert record["correct"]["errors"]["dlkernels"].keys() == {"output", "grad"}
    tensors = harness.make_inputs(family, case, "cpu")
    out, *grads = harness.make_call(case, family.ours(case), [tensors])(0)
    assert out.shape == case.shape and [g.shape for g in grads] == [t.shape for t in tensors] and len(grads) == 6


def test_several_outputs() -> None:
    """What weight_norm's case of a whole network is made of: pairs of tensors in, a list of tensors out."""
    case = harness.layer("pairs", (6,))
    pairs = _with(
        LAYERS[2], peers=(), bytes_fwd=lambda c: 96, bytes_bwd=lambda c: 96,
        inputs=lambda c, device, g: tuple(torch.rand(3, generator=g) for _ in range(4)),
        ours=lambda c: lambda a, b, c, d: [a * b, c / d], eager=lambda c: lambda a, b, c, d: [a * b, c / d],
    )  # fmt: skip
    record, _ = harness.run_case(pairs, case, "cpu", CURVE, budget_s=0.02, compile=False)
    assert record["refused"] == ""
    off = _with(pairs, ours=lambda c: lambda a, b, c, d: [a * b, c / d * (1 if d.dtype == torch.float64 else 1.001)])
    record, _ = harness.run_case(off, case, "cpu", CURVE, budget_s=0.02, compile=False)
    for what in ("output 1 error", "gradient 2 error", "gradient 3 error"):
        assert what in record["refused"]
    assert "output error" not in record["refused"] and "gradient 1 error" not in record["refused"]


def test_a_random_layer_is_checked_on_one_draw() -> None:
    """Given to all candidates in the check, drawn by each in the timing."""
    given = []

    def drop(case: harness.Case) -> Any:
        def function(x: torch.Tensor, residual: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
            given.append(noise is not None)
            return residual + x * (torch.bernoulli(torch.full((4, 1), 0.5)) * 2 if noise is None else noise)

        return function

    case = harness.layer("stochastic_depth", (4, 8), p=0.5, residual=True)
    family = _with(LAYERS[3], peers=(), ours=drop, eager=drop)
    record, samples = harness.run_case(family, case, "cpu", CURVE, budget_s=0.02, compile=False)
    assert record["refused"] == "" and samples
    assert given[:4] == [True] * 4 and not any(given[4:])


def test_absent_peers_are_listed() -> None:
    peer = harness.Peer("nobody", "a_package_nobody_has", lambda case: None)
    assert peer.missing("cpu") == "not installed"
    assert harness.Peer("gpu", "torch", lambda case: None, gpu_only=True).missing("cpu") == "needs a GPU"


def test_copy_curve_interpolates() -> None:
    assert timing.copy_gbps_at(CURVE, 1 << 20) == pytest.approx(80)
    assert timing.copy_gbps_at(CURVE, 1 << 24) == pytest.approx(50)
    assert timing.copy_gbps_at(CURVE, 1 << 40) == 20
    assert timing.copy_gbps_at(CURVE, 1 << 13) == pytest.approx(5), "below, a copy takes constant time"


def test_gpu_clock_rehearsed() -> None:
    case = harness.Case("cross_entropy", (16, 10))
    record, _ = harness.run_case(FAMILY, case, "cpu", CURVE, compile=False, gpu=timing.Rehearsal())
    assert record["refused"] == "" and record["l2"] in ("hot", "cold")
    entry = record["candidates"]["dlkernels"]
    assert entry["time_us"] == entry["median_us"] and entry["latency_us"] >= entry["host_us"] > 0
    assert entry["rounds"] == timing.REPLAYS


def test_a_candidate_on_a_forced_backend(monkeypatch: Any) -> None:
    """On a GPU, rows that CUDA C++ serves show Triton too: forward and backward on it, and nothing left forced."""
    seen = []

    def ours(x: Tensor) -> Tensor:
        seen.append(_backend.state.forced)
        y = x * 2
        y.register_hook(lambda g: seen.append(_backend.state.forced))
        return y.sum()

    case = harness.Case("group_norm", (3,))
    x = torch.ones(3, requires_grad=True)
    for call in (
        lambda: harness.make_call(case, parity.forced("reference", ours), [(x,)])(0),
        lambda: parity.evaluate(case, parity.forced("reference", ours), (x,)),
    ):
        seen.clear()
        call()
        assert seen and set(seen[-2:]) == {"reference"}
        assert _backend.state.forced is None
    monkeypatch.setattr(_backend, "default_for", lambda device, op=None: "cuda" if op == "group_norm_fwd" else "triton")
    assert harness.served_by_cuda("group_norm") and not harness.served_by_cuda("gccs_loss")


# Report ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def doc() -> dict[str, Any]:
    return json.loads((SAMPLES / "focal_loss.json").read_text())


def test_rows_and_losing_rows(doc: dict[str, Any]) -> None:
    rows = {r["name"]: report.row(r) for r in doc["records"]}
    assert all(len(cells) == len(report.HEADER) for cells in rows.values())
    assert any(cells[-1] == "slower than compile" for cells in rows.values()), "losing rows are shown, and marked"
    assert any(cells[-1].startswith("REFUSED: tests fail") for cells in rows.values())
    assert "1 REFUSED" in report.conclusion(doc)


def test_the_reference_is_refused_and_said_to_be(doc: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(_backend, "default_for", lambda device, op=None: "reference")
    monkeypatch.setattr(_backend.state, "forced", None)
    assert guard.why_tests_fail("focal_loss").startswith("not built")
    environment = doc["environment"] | {"backend": {"cross_entropy_fwd": "reference"}}
    assert "REFERENCE" in report.conclusion(doc | {"environment": environment})
    assert "REFERENCE" not in report.conclusion(doc)


def test_a_busy_machine_is_said_to_be(doc: dict[str, Any]) -> None:
    assert "BUSY" not in report.conclusion(doc | {"environment": doc["environment"] | {"load": 0.9, "cores": 2}})
    assert "BUSY" in report.conclusion(doc | {"environment": doc["environment"] | {"load": 5.0, "cores": 2}})


def test_markdown_is_a_table(doc: dict[str, Any]) -> None:
    table = [line for line in report.markdown(doc).splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(doc["records"])
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize("rich", [True, False])
def test_table_prints(doc: dict[str, Any], rich: bool, capsys: Any, monkeypatch: Any) -> None:
    if not rich:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report.show(doc)
    printed = capsys.readouterr().out
    assert "x compile" in printed and "slower than compile" in printed and "kornia: not installed" in printed


@needs_plots
def test_plots(doc: dict[str, Any], tmp_path: Path) -> None:
    paths = report.write(doc, tmp_path)
    assert [p.name for p in paths] == ["focal_loss.json", "focal_loss_speed.png", "focal_loss_bandwidth.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 10_000 for p in paths[1:])


def test_readme_section(doc: dict[str, Any], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    with pytest.raises(SystemExit, match="refused"):
        report.rewrite_readme(readme, [(tmp_path / "focal_loss.json", doc)])
    doc["records"] = [r for r in doc["records"] if not r["refused"]]
    report.rewrite_readme(readme, [(tmp_path / "focal_loss.json", doc)])
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "| case |" in text
    assert "### focal_loss\n" in text, "several families share a device"
    readme.write_text("no markers")
    with pytest.raises(SystemExit, match="must have one"):
        report.rewrite_readme(readme, [])


# Refusal --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def failing_tests(tmp_path: Path, monkeypatch: Any) -> Path:
    path = tmp_path / "test_focal_loss.py"
    path.write_text("def test_it():\n    assert False\n")
    monkeypatch.setattr(guard, "test_file", lambda family: path)
    monkeypatch.setattr(guard, "ROOT", tmp_path)
    monkeypatch.setattr(guard, "why_not_built", lambda device: "")
    monkeypatch.setattr(guard, "CACHE", tmp_path / "tests.json")
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser):\n    parser.addoption('--device')\n")
    return path


def test_guard_runs_tests_and_remembers_a_pass_only(failing_tests: Path, monkeypatch: Any) -> None:
    assert "tests fail: FAILED" in guard.why_tests_fail("focal_loss")
    assert not guard.CACHE.exists()
    failing_tests.write_text("def test_it():\n    pass\n")
    assert guard.why_tests_fail("focal_loss") == ""
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("a remembered pass ran again"))
    assert guard.why_tests_fail("focal_loss") == ""
    failing_tests.write_text("def test_it():\n    pass  # changed\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stdout="ERROR new", stderr=""))
    assert "ERROR new" in guard.why_tests_fail("focal_loss")
    failing_tests.unlink()
    assert guard.why_tests_fail("focal_loss").endswith("does not exist")


def test_bench_refuses_failing_ops(tmp_path: Path) -> None:
    """The whole command, with a test file that fails: rows REFUSED, exit code not zero, nothing timed."""
    plugin = tmp_path / "fail_guard.py"
    plugin.write_text(
        "import sys\nsys.path.insert(0, 'benchmarks')\n"
        "import guard\nguard.why_tests_fail = lambda *a: 'tests fail: x'\n"
    )
    done = run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "fail_guard",
        "-p",
        "no:cacheprovider",
        "benchmarks/bench_focal_loss.py",
        "-k",
        "64x64",
        PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}",
        OUT=str(tmp_path / "out"),
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "REFUSED: tests fail: x" in done.stdout and "2 REFUSED" in done.stdout
    records = json.loads((tmp_path / "out" / "focal_loss.json").read_text())["records"]
    assert len(records) == 2 and not any(r["candidates"] for r in records)


def test_bench_writes_pytest_benchmark_json(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    done = run(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "benchmarks/bench_focal_loss.py",
        "-k",
        "64x64-fp32-mean-float-targets-fwd+bwd",
        "--skip-tests",
        "--no-compile",
        "--bench-seconds=0.05",
        "--roof-bytes=1000000",
        f"--benchmark-json={tmp_path}/pb.json",
        OUT=str(tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (entry,) = json.loads((tmp_path / "pb.json").read_text())["benchmarks"]
    ours = json.loads((tmp_path / "focal_loss.json").read_text())
    assert ours["tests"] == "skipped" and "tests skipped" in done.stdout
    measured = ours["records"][0]["candidates"]["dlkernels"]
    assert entry["stats"]["min"] * 1e6 == pytest.approx(measured["min_us"])
    assert entry["stats"]["rounds"] == measured["rounds"]
    assert {"bytes", "gbps", "copy_share", "x_eager", "peak_bytes"} <= entry["extra_info"].keys()
