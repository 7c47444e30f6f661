"""The timing process of gpu_gate.py, and the processes that compile ahead of it."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gate_state as state
import guard
import report
import timing
import torch
from harness import OURS, TRITON, Case, Family, candidates_for, make_draws, make_inputs, refused, run_case
from parity import evaluate

ROW_S = 100  # a row that takes longer hangs: the process ends, and the next one goes on behind it
Pair = tuple[Family, Case]


def queue(families: Sequence[Family], rehearse: bool = False, limit: int = 10**6) -> list[Pair]:
    """All rows by their value: the headline ones, then those that fill a GPU, then the rest."""
    if rehearse:
        return state.in_turn([(family, case) for case in family.gate_cases[:limit]] for family in families)
    head = state.in_turn([(family, case) for case in family.headline()] for family in families)
    names = {case.name for _, case in head}
    rest = []
    for family in families:
        cases = sorted(family.selected("cuda"), key=lambda case, family=family: case not in family.gpu_cases)
        rest.append([(family, case) for case in cases if case.name not in names])
    return (head + state.in_turn(rest))[:limit]


class Results:
    """The documents in a folder, by family: those that an earlier process left on the same sources, and more."""

    def __init__(self, folder: Path, families: Sequence[Family], device: str, key: str) -> None:
        self.folder, self.device, self.key = folder, device, key
        self.tests: dict[str, str] = state.load(folder / "tests.json", {})
        self.order = {f.name: [c.name for c in [*f.selected("cuda"), *f.gate_cases]] for f in families}
        docs = state.documents(folder)
        self.records: dict[str, list[dict[str, Any]]] = {
            f.name: docs[f.name]["records"] if docs.get(f.name, {}).get("fingerprint") == key else [] for f in families
        }
        self.curve = self._curve()

    def _curve(self) -> list[tuple[int, float]]:
        """Once for a device: it has nothing to do with the sources."""
        name = f"{report.device_name(self.device)}, torch {torch.__version__}"
        held = state.load(self.folder / "copy.json", {})
        if held.get("of") != name:
            held = {"of": name, "curve": timing.copy_curve(self.device, (1 << 20) if self.device == "cpu" else None)}
            state.save(self.folder / "copy.json", held)
        return held["curve"]

    def has(self, family: Family, case: Case) -> bool:
        return any(record["name"] == case.name for record in self.records[family.name])

    def add(self, family: str, record: dict[str, Any]) -> None:
        records, order = self.records[family], self.order[family]
        records.append(record)
        records.sort(key=lambda r: order.index(r["name"]) if r["name"] in order else len(order))
        tests, _, why = self.tests.get(family, "not run").partition(": ")
        doc = report.document(family, self.device, records, self.curve, tests)
        state.save(self.folder / f"{family}.json", doc | {"tests_why": why, "fingerprint": self.key})
        print(" | ".join(report.row(record)), flush=True)


def bench(
    gpu: timing.Cuda, folder: Path, families: Sequence[Family], rehearse: bool, limit: int, seconds: float,
    key: str, crashed: str = "",
) -> int:  # fmt: skip
    """Measure until done or out of time, continuing what an earlier process left.

    crashed: how the process before this one ended in the middle of a row, which is not tried again.
    """
    deadline = time.monotonic() + seconds
    results = Results(folder, families, gpu.device, key)
    running = folder / "running.json"
    if crashed and (row := state.load(running)):
        results.add(row["family"], refused(row["case"], row["op"], f"did not run: {crashed}"))
    todo = [pair for pair in queue(families, rehearse, limit) if not results.has(*pair)]
    # Behind the headline what is compiled already comes first.
    warmed = {name for path in folder.glob("warm_*.json") for name in state.load(path, [])}
    first = {case.name for family in families for case in family.headline()}
    todo.sort(key=lambda pair: pair[1].name not in first and pair[1].name not in warmed)
    for done, (family, case) in enumerate(todo):
        if time.monotonic() > deadline:
            print(f"out of time: {len(todo) - done} rows are left; run the stage again to continue", flush=True)
            return state.OUT_OF_TIME
        state.save(running, {"family": family.name, "case": case.name, "op": case.op})
        with watched(ROW_S):
            record = _one(family, case, gpu, results.curve, rehearse)
            alive = gpu.alive()
        if not alive and not record["refused"]:
            record["refused"] = "did not run: the GPU was lost behind it"
        results.add(family.name, record)
        running.unlink()
        if not alive or gpu.doubtful:
            print(f"a new process: {gpu.doubtful or 'nothing runs on the GPU in this one'}", flush=True)
            return state.LOST
        gpu.release()
    return state.DONE


@contextlib.contextmanager
def watched(seconds: float) -> Iterator[None]:
    faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _one(family: Family, case: Case, gpu: timing.Cuda, curve: Any, rehearse: bool) -> dict[str, Any]:
    if not rehearse and (why := guard.why_not_built("cuda")):
        return refused(case.name, case.op, why)
    try:
        return run_case(family, case, gpu.device, curve, compile=not rehearse, gpu=gpu)[0]
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return refused(case.name, case.op, f"did not run: {reason}")


# Ahead of it ----------------------------------------------------------------------------------------------------------


def warm(
    gpu: timing.Cuda, folder: Path, families: Sequence[Family], rehearse: bool, limit: int, part: tuple[int, int],
    key: str,
) -> int:  # fmt: skip
    """Compile into the caches on disk what the timing process will compile. Nothing is timed, failures are its affair.

    part: (i, n), for every n-th row from the i-th on.
    """
    index, count = part
    with contextlib.suppress(OSError):
        os.nice(5)
    torch.set_num_threads(1)
    docs = state.documents(folder)
    measured = {
        record["name"] for doc in docs.values() if doc.get("fingerprint") == key for record in doc["records"]
    }  # fmt: skip
    done: list[str] = []
    todo = [pair for pair in queue(families, rehearse, limit) if pair[1].name not in measured]
    for family, case in todo[index::count]:
        with watched(ROW_S), contextlib.suppress(Exception):
            functions, _ = candidates_for(family, case, gpu.device, compile=not rehearse)
            tensors, drawn = make_inputs(family, case, gpu.device), make_draws(family, case, gpu.device)
            for function in (functions[name] for name in ("compile", OURS, TRITON) if name in functions):
                with contextlib.suppress(Exception):
                    evaluate(case, function, tensors)
                    if drawn:
                        evaluate(case, function, (*tensors, *drawn))
            del functions, tensors, drawn
        if not gpu.alive():
            return state.LOST
        done.append(case.name)
        state.save(folder / f"warm_{index}.json", done)
        gpu.release()
    return state.DONE
