"""One run of gpu_gate.py: its time, its log, its children, and what it keeps."""

from __future__ import annotations

import contextlib
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

import gate_state
import report

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STAGES = ("build", "test", "bench", "graph", "ncu", "sanitize", "report")
STAGE_S = 530  # without a budget
# With one: shares of what is left when a stage starts, of the stages that are still to come; the build takes what it
# needs. Below LEAST seconds a stage has nothing to show, and leaves its time to the next one.
WEIGHT = {"build": 100, "test": 35, "bench": 40, "graph": 7, "ncu": 8, "sanitize": 10}
LEAST = {"build": 20, "test": 25, "bench": 25, "graph": 20, "ncu": 40, "sanitize": 45}
PUBLISH_S = 15
PASSED, FAILED, MISSING, PARTIAL, NOT_REACHED = "passed", "FAILED", "missing", "partial", "not reached"
WORKER = HERE / "gate_worker.py"
Outcome = tuple[str, str, Any]  # status, one line, data


class Gate:
    """Where things are kept, until when, and what runs.

    Args:
        state: a folder that a later run continues from.
        out: where results.json, gate.log and plots.tar.gz go; None: nowhere.
        budget: seconds for everything, counted from `started`.
    """

    def __init__(
        self, state: Path, rehearse: bool = False, limit: int = 10**6, out: Path | None = None,
        budget: float | None = None, started: float | None = None,
    ) -> None:  # fmt: skip
        self.state, self.out, self.rehearse, self.limit = state, out, rehearse, limit
        state.mkdir(parents=True, exist_ok=True)
        self.path, self.log = state / "gate.json", (state / "gate.log").open("a")
        self.scratch = Path(tempfile.mkdtemp(prefix="dlkernels-gate-"))
        self.cache = state / "cache"
        # Plots and tables come last; half of the time for them where there is little.
        self.last = 20.0 if budget is None else min(25.0, budget / 4)
        self.end = None if budget is None else (started or time.monotonic()) + budget - self.last
        self.deadline = 0.0
        self.key = self.tests_key = ""
        self.todo: list[str] = []
        self.stages: dict[str, Any] = (gate_state.load(self.path) or {}).get("stages", {})
        self.background: list[subprocess.Popen[bytes]] = []
        self.published = 0.0

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    # Time -------------------------------------------------------------------------------------------------------------

    def seconds(self, name: str) -> float:
        """Until when a stage that starts now may run."""
        if self.end is None:
            return STAGE_S
        left = self.end - time.monotonic()
        if name == "report":
            return max(left, 0) + 0.8 * self.last
        if name == "build":
            return left
        coming = [WEIGHT[s] for s in self.todo[self.todo.index(name) :] if s in WEIGHT] if name in self.todo else []
        return left * WEIGHT[name] / (sum(coming) or WEIGHT[name])

    def left(self) -> float:
        return self.deadline - time.monotonic()

    # Children ---------------------------------------------------------------------------------------------------------

    def environment(self, env: dict[str, str] | None = None) -> dict[str, str]:
        """Every process of the gate finds what another one has compiled."""
        full = dict(os.environ, PYTHONUNBUFFERED="1")
        full["TORCHINDUCTOR_CACHE_DIR"] = str(self.cache / "inductor")
        full["TRITON_CACHE_DIR"] = str(self.cache / "triton")
        full["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]))
        for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
            full.pop(name, None)
        return full | (env or {})

    def run(self, command: list[str], env: dict[str, str] | None = None) -> tuple[int, str]:
        """Run to the end of the stage's time at most: (exit code, output). 124 when time ran out; children end too."""
        self.say("$ " + " ".join(command))
        lines: list[str] = []
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment(env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip

        def read() -> None:
            for line in process.stdout or ():
                lines.append(line)
                self.say("  " + line.rstrip()[:400])

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            code = self._wait(process)
        finally:
            kill(process)
        reader.join(5)
        return code, "".join(lines)

    def _wait(self, process: subprocess.Popen[str]) -> int:
        while True:
            try:
                return process.wait(max(0.2, min(PUBLISH_S, self.left())))
            except subprocess.TimeoutExpired:
                if self.left() <= 0.2:
                    return 124
                self.publish()

    def worker(
        self, task: str, out: Path, wrapper: list[str] | None = None, env: dict[str, str] | None = None,
        spare: float = 10, more: tuple[str, ...] = (),
    ) -> tuple[int, str]:  # fmt: skip
        """gate_worker.py, which stops by itself `spare` seconds before it would be killed."""
        command = [*(wrapper or []), sys.executable, str(WORKER), task, "--out", str(out), *more]
        command += ["--limit", str(self.limit)] + (["--rehearse"] if self.rehearse else [])
        return self.run([*command, "--seconds", str(int(max(0, self.left() - spare)))], env)

    def start(self, command: list[str], env: dict[str, str] | None = None) -> None:
        """Beside the stages, silently, until `stop`."""
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
        self.background.append(subprocess.Popen(command, cwd=ROOT, env=self.environment(env), **silent))

    def stop(self) -> None:
        for process in self.background:
            kill(process)
        self.background.clear()

    # Stages -----------------------------------------------------------------------------------------------------------

    def stage(self, name: str, function: Callable[[Gate], Outcome]) -> None:
        self.say(f"\n== {name} " + "=" * (70 - len(name)))
        started, seconds = time.monotonic(), self.seconds(name)
        self.deadline = started + seconds
        if name not in ("test", "bench"):
            self.stop()
        if self.end is not None and not self.rehearse and seconds < LEAST.get(name, 0):
            status, line = NOT_REACHED, f"{max(seconds, 0):.0f} s were left of the budget"
            data = self.before(name)
        else:
            try:
                status, line, data = function(self)
            except Exception as error:
                status, line, data = FAILED, f"{type(error).__name__}: {error}", self.before(name)
        entry = {"status": status, "summary": line, "seconds": round(time.monotonic() - started, 1), "data": data}
        self.stages[name] = entry | {"fingerprint": self.key_of(name)}
        doc = {"rehearsal": self.rehearse, "machine": machine(self.rehearse), "stages": self.stages}
        gate_state.save(self.path, doc)
        self.say(f"{name}: {status}, {entry['seconds']} s: {line}")
        self.publish(force=True)

    def key_of(self, name: str) -> str:
        """What a stage's outcome hangs on: a test that is mended takes no measured row with it."""
        return f"{self.tests_key} {os.environ.get('TESTS', 'tests')}" if name == "test" else self.key

    def before(self, name: str) -> Any:
        """What a stage left on the same sources, or None."""
        entry = self.stages.get(name, {})
        return entry.get("data") if entry.get("fingerprint") == self.key_of(name) else None

    def passed(self, name: str) -> bool:
        entry = self.stages.get(name, {})
        same = entry.get("status") == PASSED and entry.get("fingerprint") == self.key_of(name)
        return same and (name != "build" or self.rehearse or entry["data"].get("built") == gate_state.built())

    def forget(self, name: str) -> None:
        """What would be continued."""
        self.stages.pop(name, None)
        files = {"test": ["outcomes.jsonl"], "bench": [f"{family}.json" for family in gate_state.families()]}
        for file in files.get(name, ()):
            (self.state / file).unlink(missing_ok=True)

    def publish(self, force: bool = False) -> None:
        """What has been measured so far, for whoever ends the run from outside."""
        if self.out and (force or time.monotonic() - self.published > PUBLISH_S):
            self.published = time.monotonic()
            with contextlib.suppress(OSError):
                gate_state.publish(self.state, self.out, plots=force)

    def close(self) -> None:
        self.stop()
        self.publish(force=True)
        shutil.rmtree(self.scratch, ignore_errors=True)


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def kill(process: subprocess.Popen[Any]) -> None:
    """The process and its children."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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
