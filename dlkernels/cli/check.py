"""`python -m dlkernels check`: every op on this machine against float64."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import _backend
from . import available_devices, print_table, quiet
from ._budget import Parity, compare
from ._cases import CASES as LOSS_CASES
from ._cases import Case
from ._center_cases import CASES as CENTER_CASES
from ._center_cases import CenterCase
from ._layer_cases import CASES as LAYER_CASES
from ._layer_cases import LayerCase
from ._optimizer_cases import CASES as OPTIMIZER_CASES
from ._optimizer_cases import OptimizerCase
from ._region_cases import CASES as REGION_CASES
from ._region_cases import RegionCase

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SEEDS = (0, 1, 2)
AnyCase = Case | CenterCase | RegionCase | LayerCase | OptimizerCase
CASES: list[AnyCase] = [*LOSS_CASES, *CENTER_CASES, *REGION_CASES, *LAYER_CASES, *OPTIMIZER_CASES]
OPS = tuple(dict.fromkeys(case.op for case in CASES))
EXAMPLES = """\
examples:
  python -m dlkernels check
  python -m dlkernels check --op cross_entropy --dtype bfloat16 --verbose
  DLKERNELS_BACKEND=reference python -m dlkernels check

The budget of a result (dlkernels.testing.error_budget): its relative error against float64, in the 2-norm, may be
twice that of plain PyTorch in the same dtype plus 4 eps of the result's dtype; 8 eps for scalar losses. Of a layer, the
gradients of the input and of every parameter are held to it; the table shows the one that uses most of its budget.
An update in place has no gradients: its value is the tensor that it leaves; an optimizer's, after five steps with given
gradients, all its parameters as one vector, or their float32 master copies.
"""


@dataclass
class Result:
    """One case in one dtype: parity of the value and of its gradients, or the exception that it raised."""

    case: AnyCase
    value: Parity = field(default_factory=Parity)
    grad: Parity = field(default_factory=Parity)
    problem: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.problem) or max(self.value.ratio, self.grad.ratio) > 1

    def explain(self) -> str:
        parts = (
            f"{name} error {p.error:.2e}, allowed {p.allowed:.2e} (eager's own {p.eager_error:.2e})"
            for name, p in (("value", self.value), ("gradient", self.grad))
            if p.ratio > 1
        )
        return self.problem or "; ".join(parts)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="run every op on this machine and compare it with float64; exit code 1 on a failure",
        description="Runs every op forward and backward on this machine and compares it with plain PyTorch in float64.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", action="append", choices=OPS, help="only this op (may be given several times)")
    parser.add_argument("--dtype", action="append", choices=list(DTYPES), help="only this dtype (several times)")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: the CPU, and CUDA when it is visible"
    )
    parser.add_argument("--verbose", action="store_true", help="one row per case instead of one per op and dtype")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    quiet()
    start = time.perf_counter()
    rows, failures, total = [], [], 0
    for device in available_devices(args.device):
        for op in args.op or OPS:
            for dtype_name in args.dtype or DTYPES:
                results = [run_case(case, dtype_name, device) for case in CASES if case.op == op]
                total += len(results)
                groups = [[r] for r in results] if args.verbose else [results]
                rows += [_row(group, op, device, dtype_name, args.verbose) for group in groups]
                failures += [(device, dtype_name, r) for r in results if r.failed]
    columns = ["op", "device", "backend", "dtype", "case" if args.verbose else ">cases"]
    columns += [">value error", ">of budget", ">grad error", ">of budget", "result"]
    print_table(f"Against float64, seeds {', '.join(map(str, SEEDS))}", columns, rows)
    for device, dtype_name, result in failures:
        print(f"FAIL {result.case.op} on {device}, {dtype_name}: {result.case.name}: {result.explain()}")
    seconds = time.perf_counter() - start
    print(f"{'FAIL' if failures else 'PASS'}: {total} cases, {len(failures)} failures, {seconds:.1f} s")
    return 1 if failures else 0


def run_case(case: AnyCase, dtype_name: str, device: str) -> Result:
    try:
        return Result(case, *compare(case.sample(DTYPES[dtype_name], device, seed) for seed in SEEDS))
    except Exception as error:  # a broken op must not hide the others
        return Result(case, problem=f"{type(error).__name__}: {error}".splitlines()[0])


def _row(group: list[Result], op: str, device: str, dtype_name: str, verbose: bool) -> tuple[Any, ...]:
    backend = _backend.state.forced or _backend.default_for(device)
    value = max((r.value for r in group), key=lambda parity: parity.ratio)
    grad = max((r.grad for r in group), key=lambda parity: parity.ratio)
    numbers = (f"{value.error:.1e}", f"{value.ratio:.2f}", f"{grad.error:.1e}", f"{grad.ratio:.2f}")
    if grad == Parity():  # none, or none with an element
        numbers = (*numbers[:2], "-", "-")
    if all(r.problem for r in group):
        numbers = ("-",) * 4
    result = "FAIL" if any(r.failed for r in group) else "PASS"
    return (op, device, backend, dtype_name, group[0].case.name if verbose else len(group), *numbers, result)
