"""Everything that a machine with an NVIDIA GPU has to prove, in the minutes that one has it.

    make gpu                                   all stages, each within nine minutes
    BUDGET=540 make gpu                        all of it within so many seconds
    STAGES=build,test make gpu                 some of them: build test bench graph ncu sanitize report
    OUT=folder make gpu                        results.json, gate.log and plots.tar.gz, no other file, into this folder
    python benchmarks/gpu_gate.py --unpack folder/results.json     what they hold, into benchmarks/results/<device>
    python benchmarks/gpu_gate.py --rehearse   the same code on a CPU, on tiny inputs, to find typos before a GPU does

A run that is cut short keeps what it has. The next one on the same sources goes on: stages that passed are not repeated
(unless --again), tests that passed neither, and `bench` continues where it stopped, its most telling rows first. State
is kept in benchmarks/results/local; where that is gone, it comes from OUT/results.json or benchmarks/results/<device>.

Exit code 0 means that every requested stage passed. ALLOW_MISSING=ncu,sanitize lets a stage be absent where the machine
has no such tool, or no access to the counters.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

import gate_parsers as parsers  # noqa: E402
import gate_state  # noqa: E402
import guard  # noqa: E402
import outcomes  # noqa: E402
import report  # noqa: E402
import timing  # noqa: E402
from gate_run import FAILED, MISSING, NOT_REACHED, PARTIAL, PASSED, STAGES, WORKER, Gate, Outcome, cores  # noqa: E402
from gate_state import DONE, LOST, OUT_OF_TIME, SOME_FAILED  # noqa: E402

SAMPLES = ROOT / "tests" / "benchmark_samples"
ELSEWHERE = ("tests/cuda_host", "tests/real", "tests/triton_kernels")  # tests of the host twin, of models, of no GPU
ALONE = "tests/test_cuda_large.py"  # needs the memory that others hold
TEST_S = 150  # a test that takes longer hangs
HEADLINE_S = 60  # for which the timing waits, so that what it measures first is compiled


def verdict(code: int, rows: list[dict[str, Any]]) -> Outcome:
    good, bad = sum(r["passed"] for r in rows), [r["case"] for r in rows if not r["passed"]]
    short = code in (OUT_OF_TIME, 124)
    ended = ", out of time" if short else "" if code in (DONE, SOME_FAILED) else f", exit code {code}"
    line = f"{good} of {len(rows)} cases passed{ended}" + (f"; failed: {', '.join(bad)[:300]}" if bad else "")
    return status_of(bool(bad), code != DONE, short, len(rows)), line, rows


def status_of(bad: bool, ended_badly: bool, short: bool, count: int) -> str:
    """Out of time is no failure, and no pass."""
    return FAILED if bad else PARTIAL if short else FAILED if ended_badly or not count else PASSED


# Stages ---------------------------------------------------------------------------------------------------------------


def build(gate: Gate) -> Outcome:
    if gate.rehearse:
        code, _ = gate.run([sys.executable, "setup.py", "--name"])
        return (PASSED if code == 0 else FAILED), f"setup.py answers with exit code {code}", {}
    import torch

    major, minor = torch.cuda.get_device_capability()
    sources = list((ROOT / "csrc" / "cuda").glob("*.cu"))
    env = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", "DLKERNELS_CUDA": "1" if sources else "auto"}
    code, _ = gate.run([sys.executable, "setup.py", "build_ext", "--inplace"], env)
    if code != 0:
        return FAILED, f"the build ended with exit code {code}", None
    code, text = gate.run(
        [sys.executable, "-c", "import dlkernels, json; print(json.dumps(dlkernels.build_info(), default=str))"]
    )
    if code != 0:
        return FAILED, "dlkernels does not import after the build", None
    info = json.loads(text.strip().splitlines()[-1])
    slow = [op for op, by_device in info["ops"].items() if by_device["cuda"]["backend"] == "reference"]
    bad = bool(slow) or info["cpp"] is None
    cpp = "built" if info["cpp"] else info["cpp_missing"]
    in_cuda = sum(by_device["cuda"]["backend"] == "cuda" for by_device in info["ops"].values())
    bad = bad or (bool(sources) and in_cuda == 0)
    line = f"CUDA C++ serves {in_cuda} of {len(info['ops'])} ops; C++: {cpp}; Triton {info['triton']}"
    return (
        (FAILED if bad else PASSED),
        line + (f"; served by the reference: {', '.join(slow)}" if slow else ""),
        info | {"built": gate_state.built()},
    )


def test(gate: Gate) -> Outcome:
    """The tests that touch the device, in many processes; torch.compile of the benchmarks beside them."""
    target = os.environ.get("TESTS", "tests").split()
    whole, device = target == ["tests"], "cpu" if gate.rehearse else "cuda"
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "--device", device]
    command += [word for path in ELSEWHERE if whole for word in ("--ignore", path)]
    if whole and gate.rehearse:
        code, text = gate.run([*command, *target, "--collect-only", "-q"])
        count = sum(int(line.rpartition(": ")[2]) for line in text.splitlines() if "::" not in line and ".py: " in line)
        return (PASSED if code == 0 and count else FAILED), f"{count} tests collected", None
    seen, before = gate.state / "outcomes.jsonl", gate.scratch / "before.jsonl"
    mark = json.dumps({"sources": gate.tests_key})
    held = seen.read_text().splitlines() if seen.exists() else []
    held = [line for line in held if '"outcome": "failed"' not in line] if mark in held[:1] else [mark]
    seen.write_text("".join(line + "\n" for line in held))  # what failed is tried again
    command += ["-p", "outcomes", "--outcomes", str(seen), "--seen-before", str(before)]
    command += ["--test-seconds", str(int(min(TEST_S, max(20, gate.left() / 2))))]
    command += ["--continue-on-collection-errors"]
    warmers = start_warming(gate, max(1, min(8, cores() // 3))) if "bench" in gate.todo else 0
    many = min(12, max(1, cores() - warmers)) if importlib.util.find_spec("xdist") else 1
    code = _pytest(gate, command, [*target, *(["--ignore", ALONE] if whole else [])], many, seen, before)
    if whole:
        code = (_pytest(gate, command, [ALONE], 1, seen, before) if gate.left() > 20 else 124) or code
    files = outcomes.by_file(seen)
    paths = {family: str(guard.test_file(family).relative_to(ROOT)) for family in gate_state.families()}
    by_family = {family: outcomes.verdict(files.get(path)) for family, path in paths.items()}
    for family, said in by_family.items():
        if said == "passed" and not gate.rehearse:
            guard.remember(family, "cuda")
    total = {key: sum(counts[key] for counts in files.values()) for key in ("passed", "failed", "skipped", "not_run")}
    line = ", ".join(f"{count} {key.replace('_', ' ')}" for key, count in total.items() if count) or "no tests ran"
    bad = [counts["first"] for counts in files.values() if counts["failed"]]
    line += f"; first of {len(bad)} files: {bad[0][:200]}" if bad else ""
    short = code == 124 or total["not_run"]
    status = status_of(bool(bad), code != 0, bool(short), total["passed"])
    return status, ("out of time; " if code == 124 else "") + line, {"files": files, "families": by_family}


def _pytest(gate: Gate, command: list[str], target: list[str], many: int, seen: Path, before: Path) -> int:
    """Until every test has an outcome: a process whose GPU is lost ends early, and the next one goes on."""
    spread = ["-n", str(many), "--dist", "worksteal"] if many > 1 else ["-p", "no:xdist"]
    for _ in range(20):
        before.write_text(seen.read_text() if seen.exists() else "")
        code, _ = gate.run([*command, *spread, *target])
        if many > 1 or code not in (outcomes.LOST, 1) or not _ended_early(seen, code) or gate.left() < 10:
            break
    return 0 if code == 5 else code  # 5: nothing was left to run


def _ended_early(seen: Path, code: int) -> bool:
    lines = seen.read_text().splitlines() if seen.exists() else []
    return code == outcomes.LOST or (bool(lines) and '"finished"' not in lines[-1])


def start_warming(gate: Gate, many: int) -> int:
    """Compile, in processes of their own, what `bench` will time; it takes several seconds a row."""
    gate.stop()
    for path in gate.state.glob("warm_*.json"):
        path.unlink()
    flags = ["--rehearse"] if gate.rehearse else []
    env = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    for i in range(many):
        part = ["--part", f"{i}/{many}", "--limit", str(gate.limit), "--key", gate.key]
        gate.start([sys.executable, str(WORKER), "warm", "--out", str(gate.state), *part, *flags], env)
    return many


def wait_for_headline(gate: Gate, seconds: float) -> None:
    """Until what is timed first has been compiled: about fifty rows."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(process.poll() is None for process in gate.background):
        warmed = sum(len(gate_state.load(path, [])) for path in gate.state.glob("warm_*.json"))
        if warmed >= 50:
            break
        time.sleep(0.5)


def bench(gate: Gate) -> Outcome:
    if not gate.background and not gate.rehearse:
        start_warming(gate, max(1, min(12, cores() - 1)))
    if gate.background:
        wait_for_headline(gate, min(HEADLINE_S, gate.left() / 4))
        gate.stop()
        gate_state.forget_choices(gate.cache)
    gate_state.save(gate.state / "tests.json", verdicts(gate))
    running, crashed, code = gate.state / "running.json", "", LOST
    env = {"TORCHINDUCTOR_COMPILE_THREADS": "4"}  # for what was not compiled ahead; more would still start up beside it
    running.unlink(missing_ok=True)
    for _ in range(50):
        code, _ = gate.worker("bench", gate.state, None, env, spare=12, more=("--key", gate.key, "--crashed", crashed))
        if code in (DONE, OUT_OF_TIME, 124) or (code != LOST and not running.exists()) or gate.left() < 15:
            break
        # 1: by itself, after ROW_S seconds in one row
        crashed = "" if code == LOST else f"it took its process along, or too long: exit code {code}"
    docs = mine(gate)
    bad = sum(bool(r["refused"]) for doc in docs.values() for r in doc["records"])
    rows = sum(len(doc["records"]) for doc in docs.values())
    line = f"{rows} rows" + (f", {bad} REFUSED" if bad else "")
    line += {DONE: "", OUT_OF_TIME: "; out of time: run it again", 124: "; out of time: run it again"}.get(
        code, f"; exit code {code}"
    )
    line += ". " + " ".join(f"{name}: {report.conclusion(doc)}." for name, doc in docs.items())
    short = code in (OUT_OF_TIME, 124, LOST)
    return status_of(bad > 0, code != DONE, short, rows), line, None


def verdicts(gate: Gate) -> dict[str, str]:
    """What the tests of each family said on these sources, in this run or in one before; no entry: they did not run."""
    if (data := gate.before("test")) is not None:
        return data["families"]
    return {f: "passed" for f in gate_state.families() if not gate.rehearse and guard.passed_before(f, "cuda")}


def mine(gate: Gate) -> dict[str, Any]:
    """The documents of these sources."""
    return {name: doc for name, doc in gate_state.documents(gate.state).items() if doc.get("fingerprint") == gate.key}


def graph(gate: Gate) -> Outcome:
    part = gate.scratch / "graph.json"
    while True:
        code, _ = gate.worker("graph", part, spare=3)
        if code != LOST or gate.left() < 10:
            break
    return verdict(code, gate_state.load(part, []))


def ncu(gate: Gate) -> Outcome:
    part, csv_path = gate.scratch / "traffic.json", gate.scratch / "ncu.csv"
    if gate.rehearse:
        code, _ = gate.worker("traffic", part)
        launches = parsers.ncu_launches((SAMPLES / "ncu_raw.csv").read_text())
        names = ["sample a", "sample b"]
        rows = parsers.traffic_rows(parsers.by_case(launches, names), dict.fromkeys(names, 3 << 30))
        return (
            (PASSED if code == 0 and rows else FAILED),
            f"the workload ran; {len(launches)} sample launches read",
            rows,
        )
    tool = parsers.find_tool("ncu")
    if tool is None:
        return MISSING, "ncu is not on this machine", None
    wrapper = [
        tool,
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--target-processes",
        "application-only",
        "--csv",
        "--page",
        "raw",
        "--print-units",
        "base",
        "--log-file",
        str(csv_path),
        "--metrics",
        ",".join(parsers.METRICS),
    ]
    earlier = [row for row in gate.before("ncu") or () if row["passed"]]
    rows_before = [{"case": r["case"], "declared": r["declared"], "passed": True, "marked": False} for r in earlier]
    gate_state.save(part, rows_before)
    code, _ = gate.worker("traffic", part, wrapper, spare=15)  # ncu prints when the process ends
    text = csv_path.read_text(errors="replace") if csv_path.exists() else ""
    if "ERR_NVGPUCTRPERM" in text or "LibraryNotLoaded" in text or "Failed to initialize the profiler" in text:
        return MISSING, "ncu has no access to the counters here", None
    if text:
        shutil.copy(csv_path, gate.state / "ncu.csv")
    ran = [r for r in gate_state.load(part, []) if r.get("marked")]
    groups = parsers.by_case(parsers.ncu_launches(text), [r["case"] for r in ran])
    good = {r["case"]: r["declared"] for r in ran if r["passed"]}
    rows = parsers.traffic_rows({name: group for name, group in groups.items() if name in good}, good)
    for r in rows:
        gate.say(
            f"{'ok  ' if r['passed'] else 'FAIL'} {r['ratio']:.3f} of declared {r['declared'] / 1e9:.2f} GB, "
            f"{r['time_us']:.0f} us, {r['registers']:.0f} registers, {r['local_bytes']:.0f} B local, "
            f"{r['launches']} launches: {r['case']}"
        )
    failed_runs = sum(not r["passed"] for r in gate_state.load(part, []))
    rows = [*earlier, *rows]
    status, line, _ = verdict(DONE if code == SOME_FAILED else code, rows)
    line += " within 5 % of the declared bytes" + (f"; {failed_runs} did not run" if failed_runs else "")
    return (FAILED if failed_runs else status), line, rows


def sanitize(gate: Gate) -> Outcome:
    ours = parsers.kernel_names()
    if gate.rehearse:
        results: list[dict[str, Any]] = []
        code, _ = gate.worker("small", gate.scratch / "small.json", spare=0)
        for path in sorted(SAMPLES.glob("sanitizer_*.log")):
            found = parsers.sanitizer_log(path.read_text(), path.stem.split("_")[1])
            results.append(
                {"sample": path.name, "complete": found.complete, "count": found.count, "findings": found.findings}
            )
        line = f"the workload ran; {len(results)} sample logs read; {len(ours)} kernels known"
        return (PASSED if code == 0 and results else FAILED), line, results
    tool = parsers.find_tool("compute-sanitizer")
    if tool is None:
        return MISSING, "compute-sanitizer is not on this machine", None
    results = [r for r in gate.before("sanitize") or () if r["passed"]]
    end, waiting = gate.deadline, [c for c in CHECKS if c not in {r["tool"] for r in results}]
    for check in list(waiting):
        left = end - time.monotonic()
        if left < MIN_CHECK_S:
            break
        # The first ones say most: each gets what it can use, the last ones what is left.
        gate.deadline = time.monotonic() + max(MIN_CHECK_S, left / len(waiting))
        result = _sanitizer(gate, tool, check, ours)
        if result is None:
            return MISSING, "compute-sanitizer does not support this device", results
        results.append(result)
        waiting.remove(check)
    gate.deadline = end
    good = [r["tool"] for r in results if r["passed"]]
    short = [f"{r['tool']} ({r['cases']} cases, clean)" for r in results if not r["passed"] and r["clean"]]
    bad = [f"{r['tool']} ({r['count']} findings, exit code {r['exit_code']})" for r in results if not r["clean"]]
    line = f"clean: {', '.join(good) or 'none'}"
    line += f"; partly: {', '.join(short)}" if short else ""
    line += f"; NOT clean: {', '.join(bad)}" if bad else ""
    line += f"; not reached: {', '.join(waiting)}" if waiting else ""
    status = FAILED if bad else PARTIAL if short or (waiting and results) else NOT_REACHED if waiting else PASSED
    return status, line, results


CHECKS = ("memcheck", "racecheck", "initcheck", "synccheck")
MIN_CHECK_S = 40  # torch alone takes most of that to import


def _sanitizer(gate: Gate, tool: str, check: str, ours: set[str]) -> dict[str, Any] | None:
    """One tool around the small cases; None where it does not know the device. It ends by itself, and says so."""
    log, part = gate.scratch / f"{check}.log", gate.scratch / f"{check}.json"
    wrapper = [tool, "--tool", check, "--target-processes", "application-only", "--log-file", str(log)]
    wrapper += ["--report-api-errors", "no"] if check == "memcheck" else []
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if check in ("memcheck", "initcheck") else {}
    code, _ = gate.worker("small", part, wrapper, env, spare=8)
    text = log.read_text(errors="replace") if log.exists() else ""
    gate.say(text[-4000:])
    if "Device not supported" in text:
        return None
    found = parsers.sanitizer_log(text, check)
    # initcheck sees uninitialised reads inside torch's own kernels too: there only ours count.
    bad = found.findings or ([str(found.count)] if found.count else [])
    bad = found.in_kernels(ours) if check == "initcheck" else bad
    rows = gate_state.load(part, [])
    clean = not bad and bool(rows) and all(r["passed"] for r in rows) and code in (DONE, OUT_OF_TIME, 124)
    return {
        "tool": check,
        "passed": clean and code == DONE and found.complete,
        "clean": clean,
        "cases": len(rows),
        "exit_code": code,
        "complete": found.complete,
        "count": found.count,
        "findings": found.findings[:20],
    }


def summarise(gate: Gate) -> Outcome:
    """Tables first; plots, which take seconds, as long as there is time."""
    docs = mine(gate)
    said = verdicts(gate)
    for name, doc in docs.items():
        doc["tests"], _, doc["tests_why"] = said.get(name, "not run").partition(": ")
        gate_state.save(gate.state / f"{name}.json", doc)
        report.show(doc)
        gate.log.write(report.markdown(doc) + "\n")
    gate.publish(force=True)
    drawn = 0
    for doc in docs.values():
        if gate.left() > 8:
            drawn += bool(report.write(doc, gate.state)[1:])
    return (PASSED if docs else NOT_REACHED), f"{len(docs)} families, plots of {drawn}", None


FUNCTIONS = {
    "build": build,
    "test": test,
    "bench": bench,
    "graph": graph,
    "ncu": ncu,
    "sanitize": sanitize,
    "report": summarise,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="run what can be run without a GPU, on tiny inputs")
    parser.add_argument("--stages", default=os.environ.get("STAGES"), help="comma-separated; default: $STAGES, or all")
    parser.add_argument("--budget", type=float, default=float(os.environ.get("BUDGET") or 0), help="seconds in all")
    parser.add_argument("--again", action="store_true", help="also what has passed on these sources")
    parser.add_argument("--limit", type=int, default=10**6, help="cases per stage")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or None, help="default: $OUT")
    parser.add_argument("--state", type=Path, help="what is continued; default: a folder in benchmarks/results/local")
    parser.add_argument("--unpack", type=Path, metavar="results.json", help="into benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    if options.unpack:
        folder = options.out or gate_state.unpack_to(options.unpack)
        print(f"{len(gate_state.unpack(options.unpack, Path(folder)))} files in {folder}")
        return 0
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print("make gpu needs an NVIDIA GPU, and torch sees none here (--rehearse runs what a CPU can)")
        return 2
    chosen = [s.strip() for s in (options.stages or ",".join(STAGES)).split(",") if s.strip()]
    if unknown := [s for s in chosen if s not in STAGES]:
        print(f"STAGES must name some of {', '.join(STAGES)}, got {', '.join(unknown)}")
        return 2
    slug = "cpu" if options.rehearse else report.slug("cuda")
    folder = options.state
    if folder is None and options.rehearse:
        folder = Path(tempfile.mkdtemp(prefix="dlkernels-rehearsal-"))
    elif folder is None:
        folder = report.RESULTS / "local" / f"gate-{slug}"
    out = Path(options.out) if options.out else None
    seed(folder, out, report.RESULTS / slug)
    gate = Gate(folder, options.rehearse, options.limit, out, options.budget or None, STARTED)
    gate.key = gate_state.fingerprint(slug, torch.__version__)
    gate.tests_key = gate_state.fingerprint(slug, torch.__version__, gate_state.PACKAGE + gate_state.TESTS)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children end and results are written
    try:
        return run(gate, [s for s in STAGES if s in chosen], options.again)
    finally:
        gate.close()
        if out is None and not options.rehearse:
            hand_over(gate, report.RESULTS / slug)
            gate.say(f"results: {report.RESULTS / slug}")


def seed(folder: Path, out: Path | None, committed: Path) -> None:
    """A machine that has no state takes it from results that came from another."""
    if (folder / "gate.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    if out and (out / "results.json").exists():
        gate_state.unpack(out / "results.json", folder, over=False)
    for name in [*gate_state.FILES, *(f"{family}.json" for family in gate_state.families())]:
        if (committed / name).exists() and not (folder / name).exists():
            shutil.copy(committed / name, folder / name)


def hand_over(gate: Gate, folder: Path) -> None:
    """What is to be looked at, and kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [gate.state / name for name in (*gate_state.FILES, "gate.log", *(f"{name}.json" for name in mine(gate)))]
    for path in [*paths, *gate.state.glob("*.png")]:
        if path.exists():
            shutil.copy(path, folder / path.name)


def run(gate: Gate, chosen: list[str], again: bool) -> int:
    import torch

    absent = [name for name in timing.CUDA_NAMES if not hasattr(torch.cuda, name)]
    if absent:
        gate.say(f"this torch has no torch.cuda.{', torch.cuda.'.join(absent)}")
    gate.todo = [s for s in chosen if again or s == "report" or not gate.passed(s)]
    for name in chosen:
        if name not in gate.todo:
            gate.say(f"\n== {name}: passed before on these sources, not repeated (--again repeats it)")
            continue
        if again:
            gate.forget(name)
        gate.stage(name, FUNCTIONS[name])
        if name == "build" and gate.stages[name]["status"] != PASSED:
            gate.say("the build failed: Triton and PyTorch serve what it would")
    allowed = set(os.environ.get("ALLOW_MISSING", "").split(","))
    gate.say("\nstage      status       seconds  summary")
    for name in chosen:
        entry = gate.stages[name]
        gate.say(f"{name:<10} {entry['status']:<12} {entry['seconds']:>7}  {entry['summary'][:200]}")
    if gate.out:
        gate.say(f"results: {gate.out / 'results.json'}")
    fine = [
        gate.stages[n]["status"] == PASSED or (gate.stages[n]["status"] == MISSING and n in allowed) for n in chosen
    ]
    return 0 if all(fine) and not absent else 1


if __name__ == "__main__":
    sys.exit(main())
