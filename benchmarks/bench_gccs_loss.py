"""GCCS loss: features of as many columns as classes, from ten to a thousand.

    pytest benchmarks/bench_gccs_loss.py                     the quick set, table at the end
    FULL=1 pytest benchmarks/bench_gccs_loss.py -k bf16      more sizes, selected by name

Bytes are minimal: features and labels read once, the gradient written once. A sum or a mean with a backward pass writes
its gradient while the features are at hand; reduction="none" has to read them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from harness import Case, Family, Function
from torch import Tensor

import dlkernels as dk

BF16, FP16 = torch.bfloat16, torch.float16
OP = "gccs_loss"


# Inputs and minimal bytes ---------------------------------------------------------------------------------------------


def inputs(case: Case, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    """(features, labels): a network half trained, its classes between 0 and their vertices."""
    n, classes = case.shape
    labels = torch.randint(classes, (n,), device=device, generator=generator)
    x = torch.randn(case.shape, device=device, generator=generator).mul_(1.5)
    x.scatter_add_(1, labels.unsqueeze(1), x.new_full((n, 1), 25.0))
    return x.to(case.dtype), labels


def _read(case: Case) -> int:
    return case.numel * case.itemsize + 8 * case.shape[0]


def bytes_fwd(case: Case) -> int:
    """Read features and labels; write the loss in fp32."""
    return _read(case) + 4 * (case.shape[1] if case.reduction == "none" else 1)


def bytes_bwd(case: Case) -> int:
    """Write the gradient; with reduction="none" also read the upstream gradient, features and labels again."""
    again = _read(case) + 4 * case.shape[1] if case.reduction == "none" else 0
    return case.numel * case.itemsize + again


# Candidates -----------------------------------------------------------------------------------------------------------


def ours(case: Case) -> Function:
    reduction, weight = case.reduction, case.option("kurtosis_weight", 0.0)
    return lambda x, y: dk.gccs_loss(x, y, kurtosis_weight=weight, reduction=reduction)


def eager(case: Case) -> Function:
    """Moments of the classes by index_add, gathered back to the rows; in fp32, as nothing else is exact enough."""
    reduction, weight = case.reduction, case.option("kurtosis_weight", 0.0)

    def function(x: Tensor, y: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        classes = x.shape[1]
        count = x.new_zeros(classes, 1).index_add(0, y, x.new_ones(len(y), 1))
        n = count.clamp(min=1)
        mean = x.new_zeros(classes, classes).index_add(0, y, x) / n
        d = x - mean[y]
        u = x.new_zeros(classes, classes).index_add(0, y, d.square()) / n + 1e-5
        spread = u - 1e-5 - 1 - torch.log(u)
        target = 40.0 * torch.eye(classes, dtype=x.dtype, device=x.device)
        loss = 0.5 * (torch.where(count > 1, spread, 0.0) + (mean - target).square()).sum(1)
        if weight > 0:
            k = x.new_zeros(classes, classes).index_add(0, y, d.square().square()) / n / u.square()
            loss = loss + torch.where(count[:, 0] > 1, weight * (k - 3).abs().mean(1), 0.0)
        present = count[:, 0] > 0
        loss = torch.where(present, loss, 0.0)
        return loss if reduction == "none" else loss.sum() / (present.sum() if reduction == "mean" else 1)

    return function


# Cases ----------------------------------------------------------------------------------------------------------------


def gccs(shape: tuple[int, int], dtype: torch.dtype = torch.float32, reduction: str = "sum", **options: Any) -> Case:
    return Case(OP, shape, dtype, reduction=reduction, options=tuple(options.items()))


CASES = [
    *harness.both(gccs((256, 10))),
    *harness.both(gccs((8192, 100))),
    gccs((8192, 100), kurtosis_weight=0.2),
    gccs((8192, 100), reduction="none"),
    gccs((8192, 100), BF16, "mean"),
    gccs((8192, 100), FP16),
    *harness.both(gccs((4096, 1000))),
    *harness.both(gccs((65536, 10))),
    gccs((65536, 10), kurtosis_weight=0.2),
]

FULL_CASES = [
    gccs((256, 10), kurtosis_weight=0.2),
    gccs((256, 10), BF16),
    gccs((1024, 100), reduction="mean"),
    gccs((65536, 100)),
    gccs((4096, 1000), BF16),
    gccs((4096, 1000), kurtosis_weight=0.2),
    gccs((16384, 2000)),
]

# On a GPU the quick set is mostly launch cost: these fill one.
GPU_CASES = [
    *(c for dtype in (torch.float32, BF16) for c in harness.both(gccs((65536, 1000), dtype))),
    gccs((65536, 1000), kurtosis_weight=0.2),
    gccs((1 << 20, 100)),
    gccs((1 << 20, 10)),
]

# Small and ragged: for sanitizers, capture, rehearsal. Every kernel.
GATE_CASES = [
    gccs((37, 5)),
    gccs((60, 13), BF16, "mean", kurtosis_weight=0.2),
    gccs((60, 13), FP16, "mean"),
    gccs((90, 130), reduction="none"),
    gccs((33, 1)),
]

TRAFFIC_CASES = [
    gccs((262144, 1000)),
    gccs((262144, 1000), reduction="none"),
    gccs((1 << 22, 64), BF16),
]

FAMILY = Family(
    OP, CASES, FULL_CASES, inputs, ours, eager, bytes_fwd, bytes_bwd, (), GPU_CASES, GATE_CASES, TRAFFIC_CASES
)


@pytest.mark.parametrize("case", FAMILY.selected(), ids=lambda case: case.name.replace(" ", "-"))
def test_bench(case: Case, bench: Callable[[Family, Case], None]) -> None:
    bench(FAMILY, case)


assert all(math.prod(case.shape) * case.itemsize < 32 << 20 for case in CASES), "quick cases stay below 32 MB a tensor"
