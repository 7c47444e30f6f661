"""Everything that a machine with an NVIDIA GPU has to prove, in stages that end within nine minutes each.

    make gpu                                   all stages
    STAGES=build,test make gpu                 some of them: build test graph bench ncu sanitize report
    OUT=folder make gpu                        results elsewhere than benchmarks/results/<device>
    python benchmarks/gpu_gate.py --rehearse   the same code on a CPU, on tiny inputs, to find typos before a GPU does

Results: gate.json, gate.log, <family>.json, plots. A stage that runs out of time keeps what it has; `bench` continues
where it stopped when it is run again. Exit code 0 means that every requested stage passed. ALLOW_MISSING=ncu,sanitize
lets a stage be absent where the machine has no such tool, or no access to the counters.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

import gate_parsers as parsers  # noqa: E402
import guard  # noqa: E402
import report  # noqa: E402
import timing  # noqa: E402

STAGES = ("build", "test", "graph", "bench", "ncu", "sanitize", "report")
STAGE_S = 530
SAMPLES = ROOT / "tests" / "benchmark_samples"
PASSED, FAILED, MISSING = "passed", "FAILED", "missing"
Outcome = tuple[str, str, Any]  # status, one line, data


class Gate:
    """One run: where results go, the log, the deadline of the current stage."""

    def __init__(self, out: Path, rehearse: bool, limit: int) -> None:
        self.out, self.rehearse, self.limit = out, rehearse, limit
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.log = out / "gate.json", (out / "gate.log").open("a")
        self.deadline = 0.0
        self.scratch = Path(tempfile.mkdtemp(prefix="dlkernels-gate-"))
        try:
            self.stages: dict[str, Any] = json.loads(self.path.read_text())["stages"]
        except (OSError, ValueError, KeyError):
            self.stages = {}

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def run(self, command: list[str], env: dict[str, str] | None = None, spare: float = 0) -> tuple[int, str]:
        """Run to the end of the stage's time at most: (exit code, output). 124 when time ran out; children end too."""
        self.say("$ " + " ".join(command))
        full = dict(os.environ, PYTHONUNBUFFERED="1", **(env or {}))
        full["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        lines: list[str] = []
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=full,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

        def read() -> None:
            for line in process.stdout or ():
                lines.append(line)
                self.say("  " + line.rstrip()[:400])

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            code = process.wait(max(1.0, self.deadline - time.monotonic() - spare))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = 124
        reader.join(5)
        return code, "".join(lines)

    def worker(
        self, task: str, out: Path, wrapper: list[str] | None = None, env: dict[str, str] | None = None
    ) -> tuple[int, str]:
        command = [*(wrapper or []), sys.executable, str(HERE / "gate_worker.py"), task, "--out", str(out)]
        command += ["--limit", str(self.limit)] + (["--rehearse"] if self.rehearse else [])
        if task == "bench":
            command += ["--seconds", str(int(self.deadline - time.monotonic() - 45))]
        return self.run(command, env)

    def stage(self, name: str, function: Callable[[Gate], Outcome]) -> None:
        self.say(f"\n== {name} " + "=" * (70 - len(name)))
        started, self.deadline = time.monotonic(), time.monotonic() + STAGE_S
        try:
            status, line, data = function(self)
        except Exception as error:
            status, line, data = FAILED, f"{type(error).__name__}: {error}", None
        seconds = round(time.monotonic() - started, 1)
        self.stages[name] = {"status": status, "summary": line, "seconds": seconds, "data": data}
        doc = {"rehearsal": self.rehearse, "machine": machine(self.rehearse), "stages": self.stages}
        self.path.write_text(json.dumps(doc, indent=1, default=str) + "\n")
        self.say(f"{name}: {status}, {seconds} s: {line}")


def machine(rehearse: bool) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0], "commit": report.commit()}
    if not rehearse:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "sms": properties.multi_processor_count,
            "l2": properties.L2_cache_size,
            "capability": list(torch.cuda.get_device_capability()),
            "cuda": torch.version.cuda,
        }
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return []


def verdict(code: int, rows: list[dict[str, Any]]) -> Outcome:
    good, bad = sum(r["passed"] for r in rows), [r["case"] for r in rows if not r["passed"]]
    ended = {0: "", 1: "", 124: ", out of time"}.get(code, f", exit code {code}")
    line = f"{good} of {len(rows)} cases passed{ended}" + (f"; failed: {', '.join(bad)[:300]}" if bad else "")
    return (PASSED if code == 0 and rows and not bad else FAILED), line, rows


# Stages ---------------------------------------------------------------------------------------------------------------


def build(gate: Gate) -> Outcome:
    if gate.rehearse:
        code, _ = gate.run([sys.executable, "setup.py", "--name"])
        return (PASSED if code == 0 else FAILED), f"setup.py answers with exit code {code}", None
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
    return (FAILED if bad else PASSED), line + (f"; served by the reference: {', '.join(slow)}" if slow else ""), info


def test(gate: Gate) -> Outcome:
    target = os.environ.get("TESTS", "tests").split()
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", *target]
    if gate.rehearse:
        code, text = gate.run([*command, "--collect-only", "--device", "cpu"])
    else:
        code, text = gate.run([*command, "--device", "cuda", "--durations=10"])
    last = next((line for line in reversed(text.splitlines()) if " in " in line or "collected" in line), "no summary")
    if code == 0 and not gate.rehearse and target == ["tests"]:
        for family in guard.test_files():
            guard.remember(family, "cuda")
    why = "out of time; " if code == 124 else ""
    return (PASSED if code == 0 else FAILED), why + last.strip("= "), None


def graph(gate: Gate) -> Outcome:
    part = gate.scratch / "graph.json"
    code, _ = gate.worker("graph", part)
    return verdict(code, read_rows(part))


def bench(gate: Gate) -> Outcome:
    code, _ = gate.worker("bench", gate.out)
    lines = []
    for path in documents(gate):
        lines.append(report.conclusion(json.loads(path.read_text())))
    ended = {0: "", 1: "; some cases were refused", 3: "; out of time: run it again", 124: "; killed at its limit"}
    return (PASSED if code == 0 and lines else FAILED), " ".join(lines) + ended.get(code, f"; exit code {code}"), None


def documents(gate: Gate) -> list[Path]:
    families = {p.stem.removeprefix("bench_") for p in HERE.glob("bench_*.py")}
    return [p for p in sorted(gate.out.glob("*.json")) if p.stem in families]


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
    code, _ = gate.worker("traffic", part, wrapper)
    text = csv_path.read_text(errors="replace") if csv_path.exists() else ""
    if "ERR_NVGPUCTRPERM" in text or "LibraryNotLoaded" in text or "Failed to initialize the profiler" in text:
        return MISSING, "ncu has no access to the counters here", text[-2000:]
    if text:
        shutil.copy(csv_path, gate.out / "ncu.csv")
    ran = [r for r in read_rows(part) if r["passed"]]
    groups = parsers.by_case(parsers.ncu_launches(text), [r["case"] for r in ran])
    rows = parsers.traffic_rows(groups, {r["case"]: r["declared"] for r in ran})
    for r in rows:
        gate.say(
            f"{'ok  ' if r['passed'] else 'FAIL'} {r['ratio']:.3f} of declared {r['declared'] / 1e9:.2f} GB, "
            f"{r['time_us']:.0f} us, {r['registers']:.0f} registers, {r['local_bytes']:.0f} B local, "
            f"{r['launches']} launches: {r['case']}"
        )
    failed_runs = len(read_rows(part)) - len(ran)
    status, line, _ = verdict(code, rows)
    line += " within 5 % of the declared bytes" + (f"; {failed_runs} did not run" if failed_runs else "")
    return (FAILED if failed_runs else status), line, rows


def sanitize(gate: Gate) -> Outcome:
    ours, results = parsers.kernel_names(), []
    if gate.rehearse:
        code, _ = gate.worker("small", gate.scratch / "small.json")
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
    for check in ("memcheck", "racecheck", "initcheck", "synccheck"):
        log = gate.scratch / f"{check}.log"
        wrapper = [tool, "--tool", check, "--target-processes", "application-only", "--log-file", str(log)]
        wrapper += ["--report-api-errors", "no"] if check == "memcheck" else []
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if check in ("memcheck", "initcheck") else {}
        code, _ = gate.worker("small", gate.scratch / f"{check}.json", wrapper, env)
        text = log.read_text(errors="replace") if log.exists() else ""
        gate.say(text[-4000:])
        if "Device not supported" in text:
            return MISSING, "compute-sanitizer does not support this device", results
        found = parsers.sanitizer_log(text, check)
        # initcheck sees uninitialised reads inside torch's own kernels too: there only ours count.
        bad = (
            found.in_kernels(ours)
            if check == "initcheck"
            else found.findings or ([str(found.count)] if found.count else [])
        )
        ran = code == 0 and found.complete
        results.append(
            {
                "tool": check,
                "passed": ran and not bad,
                "exit_code": code,
                "complete": found.complete,
                "count": found.count,
                "findings": found.findings[:20],
            }
        )
    good = [r["tool"] for r in results if r["passed"]]
    bad_tools = [f"{r['tool']} ({r['count']} findings, exit code {r['exit_code']})" for r in results if not r["passed"]]
    line = f"clean: {', '.join(good) or 'none'}" + (f"; NOT clean: {', '.join(bad_tools)}" if bad_tools else "")
    return (PASSED if not bad_tools else FAILED), line, results


def summarise(gate: Gate) -> Outcome:
    paths = documents(gate)
    for path in paths:
        doc = json.loads(path.read_text())
        written = report.write(doc, gate.out)
        report.show(doc)
        gate.log.write(report.markdown(doc) + "\n")
        gate.say("written: " + ", ".join(p.name for p in written))
    return (PASSED if paths else FAILED), f"{len(paths)} result documents in {gate.out}", None


FUNCTIONS = {
    "build": build,
    "test": test,
    "graph": graph,
    "bench": bench,
    "ncu": ncu,
    "sanitize": sanitize,
    "report": summarise,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="run what can be run without a GPU, on tiny inputs")
    parser.add_argument("--stages", default=os.environ.get("STAGES"), help="comma-separated; default: $STAGES, or all")
    parser.add_argument("--limit", type=int, default=10**6, help="cases per stage")
    parser.add_argument("--out", type=Path, help="default: $OUT, or benchmarks/results/<device>")
    options = parser.parse_args(arguments)
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        print("make gpu needs an NVIDIA GPU, and torch sees none here (--rehearse runs what a CPU can)")
        return 2
    chosen = [s.strip() for s in (options.stages or ",".join(STAGES)).split(",") if s.strip()]
    if unknown := [s for s in chosen if s not in STAGES]:
        print(f"STAGES must name some of {', '.join(STAGES)}, got {', '.join(unknown)}")
        return 2
    default = (
        Path(tempfile.mkdtemp(prefix="dlkernels-rehearsal-"))
        if options.rehearse
        else report.RESULTS / report.slug("cuda")
    )
    gate = Gate(
        options.out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else default), options.rehearse, options.limit
    )
    absent = [name for name in timing.CUDA_NAMES if not hasattr(torch.cuda, name)]
    if absent:
        gate.say(f"this torch has no torch.cuda.{', torch.cuda.'.join(absent)}")
    for name in [s for s in STAGES if s in chosen]:
        gate.stage(name, FUNCTIONS[name])
    allowed = set(os.environ.get("ALLOW_MISSING", "").split(","))
    gate.say("\nstage      status    seconds  summary")
    for name in [s for s in STAGES if s in chosen]:
        entry = gate.stages[name]
        gate.say(f"{name:<10} {entry['status']:<9} {entry['seconds']:>7}  {entry['summary'][:200]}")
    gate.say(f"results: {gate.out}")
    shutil.rmtree(gate.scratch, ignore_errors=True)
    fine = [
        gate.stages[n]["status"] == PASSED or (gate.stages[n]["status"] == MISSING and n in allowed) for n in chosen
    ]
    return 0 if all(fine) and not absent else 1


if __name__ == "__main__":
    sys.exit(main())
