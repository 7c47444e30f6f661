"""What the stages of gpu_gate.py run in processes of their own; `--rehearse` runs the same lines on a CPU."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable
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
import gate_bench
import gate_state as state
import timing
import torch
from harness import Case, Family, Function, make_call, make_inputs
from parity import as_tuple, evaluate
from torch import Tensor

FAMILIES: list[Family] = [
    bench.FAMILY
    for bench in (
        bench_focal_loss, bench_center_loss, bench_gccs_loss, bench_region_biased_loss, bench_group_norm,
        bench_squeeze_excite, bench_weight_norm, bench_stochastic_depth, bench_adamw, bench_sgdw,
    )
]  # fmt: skip


# graph ----------------------------------------------------------------------------------------------------------------


def graph_case(family: Family, case: Case, gpu: timing.Cuda) -> dict[str, Any]:
    """No synchronisation; a captured step, replayed on other inputs, gives the eager results of these inputs."""
    if case.steps:
        return graph_step(family, case, gpu)
    function = family.ours(case)
    static, other = (make_inputs(family, case, gpu.device, seed) for seed in (1, 2))
    expected, again = (_evaluated(case, function, other) for _ in range(2))
    call = make_call(case, function, [static])
    with torch.set_grad_enabled(case.backward):
        gpu.warm(lambda: call(0))
        gpu.synchronize()
        with gpu.no_sync():
            call(0)
        graph = gpu.capture(lambda: call(0))
        with torch.no_grad():
            for target, source in zip(static, other, strict=True):
                target.copy_(source)
        graph.replay()
        gpu.synchronize()
    return _compared(case, [*as_tuple(graph.kept), *_floating(static)], expected, again)


def _evaluated(case: Case, function: Function, tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, gradients, and the inputs, some of which an op moves: on copies, for the next call to find the same."""
    copies = tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)
    return [t for part in (*evaluate(case, function, copies), _floating(copies)) for t in part]


def _floating(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.detach() for t in tensors if t.is_floating_point()]


@torch.no_grad()
def graph_step(family: Family, case: Case, gpu: timing.Cuda) -> dict[str, Any]:
    """The same of an optimizer: parameters, gradients and state of another step, written over those of the captured."""
    function = family.ours(case)
    static, other = (make_inputs(family, case, gpu.device, seed) for seed in (1, 2))
    captured, expected, again = (function(*tensors) for tensors in (static, other, other))
    gpu.warm(lambda: [step.run() for step in (captured, expected, again)])
    with gpu.no_sync():
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
    run: Callable[[Family, Case], dict[str, Any]], cases: Callable[[Family], Any], out: Path, limit: int,
    gpu: timing.Cuda | None = None, seconds: float = math.inf,
) -> int:  # fmt: skip
    """`run` on each case, families in turn; a case that raises is a failure, not the end. Rows are saved as they come.

    Rows that an earlier process left in `out` are kept: it had lost its GPU.
    """
    deadline = time.monotonic() + seconds
    rows: list[dict[str, Any]] = state.load(out, [])
    names = {row["case"] for row in rows}
    todo = state.in_turn([(family, case) for case in list(cases(family))[:limit]] for family in FAMILIES)
    for family, case in (pair for pair in todo if pair[1].name not in names):
        if time.monotonic() > deadline:
            print(f"out of time: {len(rows)} of {len(todo)} cases", flush=True)
            return state.OUT_OF_TIME
        try:
            rows.append(run(family, case))
        except Exception as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            rows.append({"case": case.name, "passed": False, "why": why, "marked": getattr(error, "marked", False)})
        print(("ok    " if rows[-1]["passed"] else "FAIL  ") + str(rows[-1]), flush=True)
        state.save(out, rows)
        if gpu is not None and not gpu.alive():
            return state.LOST
    return state.DONE if rows and all(r["passed"] for r in rows) else state.SOME_FAILED


# ncu, sanitize --------------------------------------------------------------------------------------------------------


def traffic(gpu: timing.Cuda, out: Path, limit: int, rehearse: bool, seconds: float) -> int:
    """One large case per kernel, each after a marker kernel, for the profiler around this process.

    It ends by itself in time: a profiler that is killed prints nothing.
    """

    def run(family: Family, case: Case) -> dict[str, Any]:
        call = make_call(case, family.ours(case), [make_inputs(family, case, gpu.device)])
        with torch.set_grad_enabled(case.backward):
            call(0)  # compiles
            gpu.synchronize()
            try:
                if not rehearse:
                    torch.cuda.cudart().cudaProfilerStart()
                    torch.cuda._sleep(1)
                call(0)
                gpu.synchronize()
                if not rehearse:
                    torch.cuda.cudart().cudaProfilerStop()
            except Exception as error:
                error.marked = True  # its marker is among the launches, which are counted off
                raise
        del call
        gpu.release()
        return {"case": case.name, "declared": family.bytes(case), "passed": True, "marked": True}

    cases = lambda family: family.gate_cases if rehearse else family.traffic_cases  # noqa: E731
    return run_each(run, cases, out, limit, gpu, seconds)


def small(gpu: timing.Cuda, out: Path, limit: int, seconds: float) -> int:
    """Every op and way of giving targets, small and ragged, for the sanitizer around this process."""

    def run(family: Family, case: Case) -> dict[str, Any]:
        evaluate(case, family.ours(case), make_inputs(family, case, gpu.device))
        gpu.synchronize()
        return {"case": case.name, "passed": True}

    return run_each(run, lambda family: family.gate_cases, out, limit, gpu, seconds)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("task", choices=("graph", "bench", "warm", "traffic", "small"))
    parser.add_argument("--out", type=Path, required=True, help="a JSON file; for bench and warm a folder")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--limit", type=int, default=10**6)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--key", default="", help="bench: of the sources; rows of others are not continued")
    parser.add_argument("--crashed", default="", help="bench: how the process before this one ended")
    parser.add_argument("--part", default="0/1", help="warm: i/n, every n-th row from the i-th on")
    options = parser.parse_args()
    gpu = timing.Rehearsal() if options.rehearse else timing.Cuda()
    if options.rehearse:
        torch.set_num_threads(1)
        FAMILIES[:] = [dataclasses.replace(family, peers=()) for family in FAMILIES]  # they take seconds to import
    out, limit, seconds = options.out, options.limit, options.seconds
    if options.task == "graph":
        return run_each(lambda f, c: graph_case(f, c, gpu), lambda f: f.gate_cases, out, limit, gpu, seconds)
    if options.task == "bench":
        return gate_bench.bench(gpu, out, FAMILIES, options.rehearse, limit, seconds, options.key, options.crashed)
    if options.task == "warm":
        index, count = map(int, options.part.split("/"))
        return gate_bench.warm(gpu, out, FAMILIES, options.rehearse, limit, (index, count), options.key)
    if options.task == "traffic":
        return traffic(gpu, out, limit, options.rehearse, seconds)
    return small(gpu, out, limit, seconds)


if __name__ == "__main__":
    sys.exit(main())
