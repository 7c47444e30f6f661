"""What the stages of gpu_gate.py run in processes of their own; `--rehearse` runs the same lines on a CPU."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_adamw
import bench_center_loss
import bench_focal_loss
import bench_gccs_loss
import bench_group_norm
import bench_region_biased_loss
import bench_sgdw
import bench_squeeze_excite
import bench_stochastic_depth
import bench_weight_norm
import guard
import report
import timing
import torch
from harness import Case, Family, make_call, make_inputs, run_case
from parity import as_tuple, evaluate
from torch import Tensor

FAMILIES: list[Family] = [
    bench.FAMILY
    for bench in (
        bench_focal_loss, bench_center_loss, bench_gccs_loss, bench_region_biased_loss, bench_group_norm,
        bench_squeeze_excite, bench_weight_norm, bench_stochastic_depth, bench_adamw, bench_sgdw,
    )
]  # fmt: skip


@contextlib.contextmanager
def no_sync(device: str) -> Iterator[None]:
    """Any operation that waits for the device raises."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def save(path: Path, data: Any) -> None:
    """Whole or not at all: a stage may be killed at any time."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1, default=str) + "\n")
    part.replace(path)


# graph ----------------------------------------------------------------------------------------------------------------


def graph_case(family: Family, case: Case, gpu: timing.Cuda) -> dict[str, Any]:
    """No synchronisation; a captured step, replayed on other inputs, gives the eager results of these inputs."""
    if case.steps:
        return graph_step(family, case, gpu)
    function = family.ours(case)
    static, other = (make_inputs(family, case, gpu.device, seed) for seed in (1, 2))
    expected, again = ([t for part in evaluate(case, function, other) for t in part] for _ in range(2))
    call = make_call(case, function, [static])
    with torch.set_grad_enabled(case.backward):
        gpu.warm(lambda: call(0))
        gpu.synchronize()
        with no_sync(gpu.device):
            call(0)
        graph = gpu.capture(lambda: call(0))
        with torch.no_grad():
            for target, source in zip(static, other, strict=True):
                target.copy_(source)
        graph.replay()
        gpu.synchronize()
    return _compared(case, list(as_tuple(graph.kept)), expected, again)


@torch.no_grad()
def graph_step(family: Family, case: Case, gpu: timing.Cuda) -> dict[str, Any]:
    """The same of an optimizer: parameters, gradients and state of another step, written over those of the captured."""
    function = family.ours(case)
    static, other = (make_inputs(family, case, gpu.device, seed) for seed in (1, 2))
    captured, expected, again = (function(*tensors) for tensors in (static, other, other))
    gpu.warm(lambda: [step.run() for step in (captured, expected, again)])
    with no_sync(gpu.device):
        captured.run()
    graph = gpu.capture(captured.run)
    captured.become(expected)
    graph.replay()
    expected.run()
    again.run()
    gpu.synchronize()
    return _compared(case, *(step.tensors() for step in (captured, expected, again)))


def _compared(case: Case, replayed: list[Tensor], expected: list[Tensor], again: list[Tensor]) -> dict[str, Any]:
    pairs = list(zip(replayed, expected, strict=True))
    error = max(_difference(a, b) for a, b in pairs)
    repeatable = all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    return {"case": case.name, "error": error, "bitwise": all(torch.equal(a, b) for a, b in pairs),
            "repeatable": repeatable, "passed": error <= 1e-6 and repeatable}  # fmt: skip


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-300))


def run_each(
    run: Callable[[Family, Case], dict[str, Any]], cases: Callable[[Family], Any], out: Path, limit: int
) -> int:
    """`run` on each case; a case that raises is a failure, not the end. Results are saved as they come."""
    rows: list[dict[str, Any]] = []
    for family in FAMILIES:
        for case in list(cases(family))[:limit]:
            try:
                rows.append(run(family, case))
            except Exception as error:
                rows.append(
                    {
                        "case": case.name,
                        "passed": False,
                        "why": f"{type(error).__name__}: {error}".splitlines()[0][:300],
                    }
                )
            print(("ok    " if rows[-1]["passed"] else "FAIL  ") + str(rows[-1]), flush=True)
            save(out, rows)
    return 0 if rows and all(r["passed"] for r in rows) else 1


# bench ----------------------------------------------------------------------------------------------------------------


def bench(gpu: timing.Cuda, out: Path, limit: int, rehearse: bool, seconds: float) -> int:
    """Measure until done or out of time, continuing what an earlier run on the same sources left."""
    status = 0
    deadline = time.monotonic() + seconds
    for family in FAMILIES:
        path = out / f"{family.name}.json"
        why = "" if rehearse else guard.why_tests_fail(family.name, "cuda")
        cases = list(family.gate_cases)[:limit] if rehearse else sorted(
            family.selected("cuda"), key=lambda case: case not in family.gpu_cases)  # fmt: skip
        key = "" if rehearse else guard.fingerprint(family.name, "cuda")
        done = _continued(path, key)
        curve = done["copy"]["curve"] if done else timing.copy_curve(gpu.device, (1 << 20) if rehearse else None)
        records = done["records"] if done else []
        names = {r["name"] for r in records}
        for case in cases:
            if case.name in names:
                continue
            if time.monotonic() > deadline:
                print(f"out of time: {len(records)} of {len(cases)} cases; run the stage again to continue", flush=True)
                status = 3
                break
            record = _one(family, case, gpu, curve, why, rehearse)
            records.append(record)
            status = status or int(bool(record["refused"]))
            doc = report.document(family.name, gpu.device, records, curve, "failed" if why else "passed")
            save(path, doc | {"fingerprint": key})
            print(" | ".join(report.row(record)), flush=True)
    return status


def _one(family, case, gpu, curve, why, rehearse) -> dict[str, Any]:
    if why:
        return {"name": case.name, "op": case.op, "refused": why, "candidates": {}}
    try:
        record, _ = run_case(family, case, gpu.device, curve, compile=not rehearse, gpu=gpu)
        return record
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return {"name": case.name, "op": case.op, "refused": f"did not run: {reason}", "candidates": {}}


def _continued(path: Path, key: str) -> dict[str, Any] | None:
    try:
        doc = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return doc if key and doc.get("fingerprint") == key else None


# ncu, sanitize --------------------------------------------------------------------------------------------------------


def traffic(gpu: timing.Cuda, out: Path, limit: int, rehearse: bool) -> int:
    """One large case per kernel, each after a marker kernel, for the profiler around this process."""

    def run(family: Family, case: Case) -> dict[str, Any]:
        call = make_call(case, family.ours(case), [make_inputs(family, case, gpu.device)])
        with torch.set_grad_enabled(case.backward):
            call(0)  # compiles
            gpu.synchronize()
            if not rehearse:
                torch.cuda.cudart().cudaProfilerStart()
                torch.cuda._sleep(1)
            call(0)
            gpu.synchronize()
            if not rehearse:
                torch.cuda.cudart().cudaProfilerStop()
                torch.cuda.empty_cache()
        return {"case": case.name, "declared": family.bytes(case), "passed": True}

    return run_each(run, lambda family: family.gate_cases if rehearse else family.traffic_cases, out, limit)


def small(gpu: timing.Cuda, out: Path, limit: int) -> int:
    """Every op and way of giving targets, small and ragged, for the sanitizer around this process."""

    def run(family: Family, case: Case) -> dict[str, Any]:
        evaluate(case, family.ours(case), make_inputs(family, case, gpu.device))
        gpu.synchronize()
        return {"case": case.name, "passed": True}

    return run_each(run, lambda family: family.gate_cases, out, limit)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=("graph", "bench", "traffic", "small"))
    parser.add_argument("--out", type=Path, required=True, help="a JSON file; for bench a folder")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--limit", type=int, default=10**6)
    parser.add_argument("--seconds", type=float, default=480)
    options = parser.parse_args()
    gpu = timing.Rehearsal() if options.rehearse else timing.Cuda()
    if options.rehearse:
        torch.set_num_threads(1)
        FAMILIES[:] = [dataclasses.replace(family, peers=()) for family in FAMILIES]  # they take seconds to import
    if options.task == "graph":
        return run_each(lambda f, c: graph_case(f, c, gpu), lambda f: f.gate_cases, options.out, options.limit)
    if options.task == "bench":
        return bench(gpu, options.out, options.limit, options.rehearse, options.seconds)
    if options.task == "traffic":
        return traffic(gpu, options.out, options.limit, options.rehearse)
    return small(gpu, options.out, options.limit)


if __name__ == "__main__":
    sys.exit(main())
