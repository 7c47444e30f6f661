"""The GPU gate, rehearsed on a CPU: its budget, what it keeps and continues, and what it survives."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
SAMPLES = Path(__file__).parent / "benchmark_samples"
sys.path.insert(0, str(BENCHMARKS))

import gate_bench  # noqa: E402
import gate_run  # noqa: E402
import gate_state  # noqa: E402
import gate_worker  # noqa: E402
import gpu_gate  # noqa: E402
import harness  # noqa: E402
import outcomes  # noqa: E402
import report  # noqa: E402
import timing  # noqa: E402

FAMILIES = gate_worker.FAMILIES


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    full = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{BENCHMARKS}", **env}
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "BUDGET", "OUT"):  # of the run that this test is part of
        if name not in env:
            full.pop(name, None)
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=full, capture_output=True, text=True, timeout=300)


# The whole of it ------------------------------------------------------------------------------------------------------


def test_gate_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    done = run("benchmarks/gpu_gate.py")
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stdout and len(done.stdout.strip().splitlines()) == 1


def test_gate_refuses_unknown_stages() -> None:
    done = run("benchmarks/gpu_gate.py", "--rehearse", STAGES="build,bnech")
    assert done.returncode == 2 and "bnech" in done.stdout


@pytest.mark.slow
def test_the_whole_test_folder_is_collected(tmp_path: Path) -> None:
    """As the `test` stage runs it: a name that two conftest.py fight for would end all of it."""
    done = run("benchmarks/gpu_gate.py", "--rehearse", "--state", str(tmp_path), STAGES="test")
    assert done.returncode == 0, done.stdout[-3000:]
    for path in ("tests/ops", "tests/optim", "tests/compile", gpu_gate.ALONE, *gpu_gate.ELSEWHERE):
        assert (ROOT / path).exists()
    collected = re.search(r"(\d+) tests collected", done.stdout)
    assert collected and int(collected.group(1)) > 5000
    both = run(
        "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests/test_layout.py", "tests/cuda_host"
    )
    assert both.returncode == 0, both.stdout[-2000:]


@pytest.mark.slow
def test_on_a_gpu_only_what_touches_it_runs() -> None:
    command = ("-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "tests/ops/test_weight_norm.py")
    cpu, gpu, every = (
        {line for line in run(*command, *more).stdout.splitlines() if "::" in line}
        for more in ((), ("--device", "cuda"), ("--device", "cuda", "--all-tests"))
    )
    assert gpu and gpu < cpu and every == cpu


TESTS = """
import os, time
import pytest, outcomes

def test_passes(): pass
@pytest.mark.skip
def test_skipped(): pass
def test_fails(): assert 1 == 2
@pytest.mark.parametrize("i", range(4))
def test_others(i): pass
"""
CONFTEST = """
import os, outcomes
def pytest_addoption(parser): parser.addoption("--device")
def pytest_runtest_logreport(report):
    if report.failed: gone.append(report)
gone = []
outcomes.lost = lambda: bool(gone) and "LOSE" in os.environ
"""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_gccs_loss.py").write_text(TESTS)
    (folder / "test_sgdw.py").write_text("def test_one(): pass\n")
    (folder / "test_broken.py").write_text("import nothing_of_that_name\n")
    return folder


def rehearsed(tmp_path: Path, target: Path, *more: str, **env: str) -> tuple[str, dict[str, Any]]:
    done = run("benchmarks/gpu_gate.py", "--rehearse", "--limit", "1", "--state", str(tmp_path / "state"), *more,
               TESTS=str(target), **env)  # fmt: skip
    gate = json.loads((tmp_path / "state" / "gate.json").read_text())
    return done.stdout + done.stderr[-2000:], gate["stages"]


@pytest.mark.parametrize("lose", [False, True])
@pytest.mark.parametrize("many", [False, True])
def test_outcomes_survive(tmp_path: Path, target: Path, many: bool, lose: bool) -> None:
    """With and without pytest-xdist; where a failure takes the GPU with it, the tests behind it run all the same."""
    if many:
        pytest.importorskip("xdist")
    seen, before = tmp_path / "seen.jsonl", tmp_path / "before.jsonl"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "outcomes", "--continue-on-collection-errors"]
    command += ["--outcomes", str(seen), "--seen-before", str(before), str(target)]
    command += ["-n", "2", "--dist", "worksteal"] if many else ["-p", "no:xdist"]
    codes = []
    for _ in range(1 if many else 3):
        before.write_text(seen.read_text() if seen.exists() else "")
        codes.append(run(*command, **({"LOSE": "1"} if lose else {})).returncode)
    assert many or (codes[0] == outcomes.LOST) == lose
    files = outcomes.by_file(seen)
    gccs = files["test_gccs_loss.py"]
    assert (gccs["passed"], gccs["failed"], gccs["skipped"], gccs["not_run"]) == (5, 1, 1, 0)
    assert "test_fails: assert 1 == 2" in gccs["first"]
    assert "nothing_of_that_name" in files["test_broken.py"]["first"]
    assert outcomes.verdict(gccs).startswith("failed: ") and outcomes.verdict(files["test_sgdw.py"]) == "passed"
    assert outcomes.verdict(None) == "not finished"


def test_tests_are_spread() -> None:
    """Every worker begins with first cases of other functions, and no test is lost."""
    tests = [f"{name}[{i}]" for name in "abc" for i in range(3)] + ["d"]
    assert outcomes.spread(tests) == ["a[0]", "b[0]", "c[0]", "d", "a[1]", "b[1]", "c[1]", "a[2]", "b[2]", "c[2]"]
    two = outcomes.spread(tests, 2)
    assert two[:2] == ["a[0]", "c[0]"] and two[5:7] == ["b[0]", "d"] and sorted(two) == sorted(tests)


def test_outcomes_of_a_run_that_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "seen.jsonl"
    path.write_text('{"collected": ["a.py::x", "a.py::y"]}\n{"test": "a.py::x", "outcome": "passed"}\n{"test": "a.p')
    files = outcomes.by_file(path)
    assert files["a.py"]["not_run"] == 1 and outcomes.verdict(files["a.py"]) == "not finished"


@pytest.mark.slow
def test_gate_rehearses(tmp_path: Path, target: Path) -> None:
    """Within a budget, then once more: what passed is not repeated, what was measured stays, the bundle holds all."""
    out, state = tmp_path / "out", tmp_path / "state"
    started = time.monotonic()
    said, stages = rehearsed(tmp_path, target, OUT=str(out), BUDGET="200")
    assert time.monotonic() - started < 200
    assert {name: entry["status"] for name, entry in stages.items()} == dict.fromkeys(gate_run.STAGES, "passed") | {
        "test": "FAILED"
    }, said[-4000:]
    families = {family.name for family in FAMILIES}
    benches = {path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py")}
    assert families == benches - {"models"} == set(gate_state.families())
    assert {p.name for p in out.iterdir()} <= {"results.json", "gate.log", "plots.tar.gz"}
    docs = {family: json.loads((state / f"{family}.json").read_text()) for family in families}
    assert all(len(doc["records"]) == 1 and doc["copy"]["curve"] for doc in docs.values())
    assert {doc["tests"] for doc in docs.values()} == {"not finished"}, "of another folder than these tests"

    written = gate_state.unpack(out / "results.json", tmp_path / "elsewhere")
    assert json.loads((tmp_path / "elsewhere" / "sgdw.json").read_text()) == docs["sgdw"]
    assert {"gate.json", "copy.json"} <= {path.name for path in written}

    (target / "test_gccs_loss.py").write_text("def test_passes(): pass\n")  # no source: its state is another one's
    (target / "test_broken.py").unlink()
    (tmp_path / "state").rename(tmp_path / "lost")  # a fresh machine goes on from the bundle
    said, stages = rehearsed(tmp_path, target, OUT=str(out))
    assert "== bench: passed before" in said and "== graph: passed before" in said
    assert stages["test"]["status"] == "passed", said[-3000:]
    assert json.loads((state / "sgdw.json").read_text())["records"] == docs["sgdw"]["records"]


def test_unpacking_no_results(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds no"):
        gpu_gate.main(["--unpack", str(tmp_path / "x.json")])
    doc = {"device": {"slug": "amd-epyc-1-thread"}}
    (tmp_path / "x.json").write_text(json.dumps({"families": {"sgdw": doc}, "gate.json": {"rehearsal": True}}))
    with pytest.raises(SystemExit, match="rehearsal"):
        gpu_gate.main(["--unpack", str(tmp_path / "x.json")])


# Time -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gate(tmp_path: Path) -> gate_run.Gate:
    made = gate_run.Gate(tmp_path / "state", rehearse=True, limit=1, out=tmp_path / "out")
    made.key, made.deadline, made.todo = "sources", time.monotonic() + 100, list(gate_run.STAGES)
    return made


def test_a_budget_is_shared(tmp_path: Path) -> None:
    gate = gate_run.Gate(tmp_path, budget=540)
    gate.todo = list(gate_run.STAGES)
    assert gate.seconds("build") == pytest.approx(515, abs=1)
    assert gate.seconds("test") == pytest.approx(0.35 * 515, abs=1)
    gate.todo = ["bench"]
    assert gate.seconds("bench") == pytest.approx(515, abs=1), "all of it where nothing else is wanted"
    assert gate_run.Gate(tmp_path).seconds("bench") == gate_run.STAGE_S


def test_what_is_not_reached_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(gate_run, "machine", lambda rehearse: {})
    gate = gate_run.Gate(tmp_path, budget=20)
    gate.stage("ncu", lambda g: pytest.fail("started"))
    entry = json.loads((tmp_path / "gate.json").read_text())["stages"]["ncu"]
    assert entry["status"] == "not reached" and "were left" in entry["summary"]


def test_gate_keeps_partial_results_and_kills_what_hangs(gate: gate_run.Gate) -> None:
    gate.deadline = time.monotonic() + 1.5
    code, text = gate.run([sys.executable, "-c", "import time; print('partial', flush=True); time.sleep(60)"])
    assert code == 124 and "partial" in text
    gate.stage("graph", lambda g: (_ for _ in ()).throw(RuntimeError("boom")))
    assert json.loads((gate.state / "gate.json").read_text())["stages"]["graph"]["status"] == "FAILED"
    assert json.loads((gate.out / "results.json").read_text())["gate.json"]["stages"]["graph"]


def test_out_of_time_is_no_failure() -> None:
    good, bad = {"case": "a", "passed": True}, {"case": "b", "passed": False}
    assert gpu_gate.verdict(gate_state.OUT_OF_TIME, [good])[0] == "partial"
    assert gpu_gate.verdict(124, [good, bad])[0] == "FAILED"
    assert gpu_gate.verdict(0, [good])[0] == "passed"
    assert gpu_gate.verdict(0, [])[0] == "FAILED" and gpu_gate.verdict(124, [])[0] == "partial"
    assert gpu_gate.verdict(1, [good])[0] == "FAILED"


# What it survives -----------------------------------------------------------------------------------------------------

POISONED = """
import os, sys
sys.path.insert(0, {benchmarks!r})
import gate_bench, gate_worker, timing

gate_worker.FAMILIES[:] = [f for f in gate_worker.FAMILIES if f.name in {names}]
run, dead = gate_bench.run_case, []

def run_case(family, case, *args, **kwargs):
    if dead or case.op == "gccs_loss":
        dead.append(case)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if case.op == "region_biased_loss":
        os._exit(134)
    return run(family, case, *args, **kwargs)

gate_bench.run_case = run_case
timing.Rehearsal.alive = lambda self: not dead
sys.exit(gate_worker.main())
"""


@pytest.mark.slow
def test_a_lost_gpu_costs_one_row(gate: gate_run.Gate, tmp_path: Path, monkeypatch: Any) -> None:
    """A row that ends the context, or the process: refused, and a new process goes on behind it."""
    names = ("gccs_loss", "region_biased_loss", "group_norm", "weight_norm")
    script = tmp_path / "worker.py"
    script.write_text(POISONED.format(benchmarks=str(BENCHMARKS), names=names))
    monkeypatch.setattr(gate_run, "WORKER", script)
    status, line, _ = gpu_gate.bench(gate)
    rows = {doc["family"]: doc["records"] for doc in gpu_gate.mine(gate).values()}
    assert rows.keys() == set(names) and all(len(records) == 1 for records in rows.values())
    refused = {family: records[0]["refused"] for family, records in rows.items()}
    assert "illegal memory access" in refused["gccs_loss"] and "exit code 134" in refused["region_biased_loss"]
    assert refused["group_norm"] == refused["weight_norm"] == ""
    assert status == "FAILED" and "2 REFUSED" in line


def test_what_tests_said_is_known_without_another_run(gate: gate_run.Gate) -> None:
    said = {"sgdw": "failed: tests/optim/test_sgdw.py::test_x: assert", "adamw": "passed"}
    gate.stages["test"] = {"fingerprint": gate.key_of("test"), "data": {"families": said}}
    assert gpu_gate.verdicts(gate) == said
    gate.tests_key = "other tests"
    assert gpu_gate.verdicts(gate) == {}
    family = next(f for f in FAMILIES if f.name == "sgdw")
    gate_state.save(gate.state / "tests.json", said)
    results = gate_bench.Results(gate.state, FAMILIES, "cpu", gate.key)
    results.add("sgdw", gate_bench.refused(family.gate_cases[0].name, "sgdw", "did not run"))
    doc = gpu_gate.mine(gate)["sgdw"]
    assert doc["tests"] == "failed" and "test_x" in doc["tests_why"]


def test_a_failing_case_does_not_end_a_stage(tmp_path: Path) -> None:
    first = FAMILIES[0].gate_cases[0]

    def fail_first(family: harness.Family, case: harness.Case) -> dict[str, Any]:
        if case is first:
            raise RuntimeError("boom")
        return {"case": case.name, "passed": True}

    path = tmp_path / "rows.json"
    assert gate_worker.run_each(fail_first, lambda family: family.gate_cases, path, 3) == gate_state.SOME_FAILED
    rows = json.loads(path.read_text())
    assert [r["passed"] for r in rows] == [False] + [True] * (3 * len(FAMILIES) - 1)
    assert "boom" in rows[0]["why"]


def test_a_stage_goes_on_behind_a_lost_gpu(tmp_path: Path) -> None:
    gpu, path, tried = timing.Rehearsal(), tmp_path / "rows.json", []

    def lose(family: harness.Family, case: harness.Case) -> dict[str, Any]:
        tried.append(case.name)
        gpu.alive = lambda: len(tried) != 2  # type: ignore[method-assign]
        return {"case": case.name, "passed": True}

    assert gate_worker.run_each(lose, lambda family: family.gate_cases, path, 1, gpu) == gate_state.LOST
    assert gate_worker.run_each(lose, lambda family: family.gate_cases, path, 1, gpu) == gate_state.DONE
    assert len(tried) == len(set(tried)) == len(FAMILIES)
    assert gate_worker.run_each(lose, lambda f: f.gate_cases, path, 2, gpu, -1) == gate_state.OUT_OF_TIME


def test_a_candidate_that_waits_is_not_captured() -> None:
    """A capture that fails half way would leave its mark on the whole process."""

    waiting: list[int] = []

    class Strict(timing.Rehearsal):
        @contextlib.contextmanager
        def no_sync(self) -> Any:
            waiting.clear()
            yield
            if waiting:
                raise RuntimeError("called a synchronizing CUDA operation")

    gpu = Strict()
    samples, failed = timing.device_time(gpu, {"a": lambda i: i, "b": waiting.append}, 1)
    assert samples.keys() == {"a"} and "synchronizing" in failed["b"] and not gpu.doubtful

    def broken(function: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    gpu.capture = broken  # type: ignore[method-assign]
    samples, failed = timing.device_time(gpu, {"a": lambda i: i}, 1)
    assert not samples and "a failed" in gpu.doubtful.replace("capture of ", "")


def test_slow_calls_are_called_less() -> None:
    gpu = timing.Rehearsal()
    entry = timing.call_latency(gpu, {"slow": lambda i: time.sleep(4e-3), "fast": lambda i: i}, 1, repeats=1)
    assert entry["slow"]["latency_calls"] == 10 and entry["fast"]["latency_calls"] == timing.LATENCY_CALLS


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_small_case_replays(family: harness.Family) -> None:
    """On a CPU what is replayed is the call itself; some move their inputs."""
    for case in family.gate_cases:
        row = gate_worker.graph_case(family, case, timing.Rehearsal())
        assert row["passed"], row


# What is measured -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_inputs_and_eager_stay_on_their_device(family: harness.Family) -> None:
    """A tensor made without a device is one on the CPU, which a GPU would not mix with its own."""
    for case in family.gate_cases:
        if case.option("update"):  # unique and bincount have no meta kernels
            continue
        tensors = [*family.inputs(case, "meta", None), *family.draws(case, "meta", None)]  # type: ignore[arg-type]
        made = family.eager(case)(*tensors)
        tensors += made.tensors() if case.steps else [made] if isinstance(made, torch.Tensor) else made
        assert {t.device.type for t in tensors} == {"meta"}, case.name


def test_the_headline_comes_first() -> None:
    rows = gate_bench.queue(FAMILIES)
    names = [case.name for _, case in rows]
    assert len(names) == len(set(names)) == sum(len(family.selected("cuda")) for family in FAMILIES)
    assert {family.name for family, _ in rows[: len(FAMILIES)]} == {family.name for family in FAMILIES}
    for family in FAMILIES:
        headline = family.headline()
        assert set(headline) <= set(family.gpu_cases) and {c.op for c in headline} == {c.op for c in family.gpu_cases}
        assert all(sum(c.direction == d for c in headline) <= 4 for d in ("fwd", "fwd+bwd", "step"))
    head = sum(len(family.headline()) for family in FAMILIES)
    assert {case.name for _, case in rows[:head]} == {c.name for f in FAMILIES for c in f.headline()}


def test_a_family_whose_tests_fail_has_no_results(tmp_path: Path) -> None:
    """Its numbers are in the document; no table, no plot, no mean shows them."""
    doc = json.loads((SAMPLES / "focal_loss.json").read_text())
    doc |= {"tests": "failed", "tests_why": "tests/ops/test_focal_loss.py::test_x: assert"}
    text = report.markdown(doc)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "fp32" in line]
    assert rows and all("REFUSED" in line for line in rows)
    assert "0 cases" in report.conclusion(doc) and "tests failed" in report.conclusion(doc) and "eager (geo" not in text
    assert [path.name for path in report.write(doc, tmp_path)] == ["focal_loss.json"]
    kept = json.loads((tmp_path / "focal_loss.json").read_text())["records"]
    assert any(r["candidates"] and not r["refused"] for r in kept)


def test_choices_made_beside_other_work_are_forgotten(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    for name in ("x.best_config", "x.py"):
        (tmp_path / "ab" / name).write_text("")
    gate_state.forget_choices(tmp_path)
    assert [path.name for path in (tmp_path / "ab").iterdir()] == ["x.py"]
