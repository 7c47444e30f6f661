"""Region biased loss: weights of a face and of its crops, without and with the softmax of the authors' code.

    pytest benchmarks/bench_region_biased_loss.py                     the quick set, table at the end
    FULL=1 pytest benchmarks/bench_region_biased_loss.py -k bf16      more sizes, selected by name

Bytes are minimal: the weights (and the mask) read once, the gradient written once. A mean or a sum with a backward pass
writes its gradient while the weights are at hand; reduction="none" has to read them again.
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
OP = "region_biased_loss"
SOFTMAX = {"normalize": "softmax"}


# Inputs and minimal bytes ---------------------------------------------------------------------------------------------


def inputs(case: Case, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    """(attention[, mask]): sigmoids that differ within a row in every dtype, so that all candidates find one crop."""
    order = torch.rand(case.shape, device=device, generator=generator).argsort(1)
    x = ((order + 0.5) / case.shape[1]).to(case.dtype)
    if not case.option("mask"):
        return (x,)
    return x, torch.rand(case.shape, device=device, generator=generator) < 0.7


def _read(case: Case) -> int:
    return case.numel * (case.itemsize + (1 if case.option("mask") else 0))


def bytes_fwd(case: Case) -> int:
    """Read the weights and the mask; write the loss in fp32."""
    return _read(case) + 4 * (case.shape[0] if case.reduction == "none" else 1)


def bytes_bwd(case: Case) -> int:
    """Write the gradient; with reduction="none" also read the upstream gradient, the weights and the mask again."""
    again = _read(case) + 4 * case.shape[0] if case.reduction == "none" else 0
    return case.numel * case.itemsize + again


# Candidates -----------------------------------------------------------------------------------------------------------

ORIGIN, MARGIN = -1, 0.11  # no difference of two weights is the margin


def ours(case: Case) -> Function:
    normalize, reduction = case.option("normalize"), case.reduction
    return lambda x, mask=None: dk.region_biased_loss(
        x, origin_index=ORIGIN, margin=MARGIN, normalize=normalize, mask=mask, reduction=reduction
    )


def eager(case: Case) -> Function:
    """The whole face last: slices, a maximum, a hinge."""
    softmax, reduction = case.option("normalize") == "softmax", case.reduction

    def function(x: Tensor, mask: Tensor | None = None) -> Tensor:
        crops = None
        if mask is not None:
            crops = mask[:, :-1]
            x = torch.cat([x[:, :-1].masked_fill(~crops, float("-inf")), x[:, -1:]], 1)
        mu = torch.softmax(x, 1) if softmax else x
        loss = torch.relu(MARGIN - (mu[:, :-1].max(1).values - mu[:, -1]))
        if crops is not None:
            loss = torch.where(crops.any(1), loss, 0)
        return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()

    return function


# Cases ----------------------------------------------------------------------------------------------------------------


def region(shape: tuple[int, int], dtype: torch.dtype = torch.float32, reduction: str = "mean", **options: Any) -> Case:
    return Case(OP, shape, dtype, reduction=reduction, targets=None, options=tuple(options.items()))


RAN = (256, 6)  # the batch and the regions of the paper

CASES = [
    *harness.both(region(RAN)),
    *harness.both(region(RAN, **SOFTMAX)),
    region(RAN, **SOFTMAX, mask=True),
    *harness.both(region((65536, 6))),
    *harness.both(region((65536, 6), **SOFTMAX)),
    region((65536, 6), BF16, **SOFTMAX),
    region((65536, 6), **SOFTMAX, mask=True),
    region((65536, 6), reduction="none", **SOFTMAX),
    *harness.both(region((16384, 33))),
    region((16384, 33), **SOFTMAX),
    *harness.both(region((2048, 300))),
    region((2048, 300), **SOFTMAX),
]

FULL_CASES = [
    region(RAN, BF16),
    region((65536, 6), FP16, **SOFTMAX),
    region((65536, 6), BF16),
    region((65536, 9), **SOFTMAX),
    region((65536, 16)),
    region((65536, 16), **SOFTMAX),
    region((16, 1000), **SOFTMAX),
]

# On a GPU the quick set is mostly launch cost: these fill one.
GPU_CASES = [
    *(c for dtype in (torch.float32, BF16) for c in harness.both(region((1 << 22, 6), dtype, **SOFTMAX))),
    region((1 << 22, 6)),
    region((1 << 20, 33), **SOFTMAX),
    region((1 << 17, 300), **SOFTMAX),
]

GATE_CASES = [
    region((37, 6)),
    region((37, 6), BF16, **SOFTMAX, mask=True),
    region((33, 7), FP16, reduction="sum", **SOFTMAX),
    region((5, 300), reduction="none", **SOFTMAX),
    region((3, 2), mask=True),
]

TRAFFIC_CASES = [
    region((1 << 25, 8), **SOFTMAX),
    region((1 << 25, 8)),
    region((1 << 20, 256), BF16, **SOFTMAX),
]

FAMILY = Family(
    OP, CASES, FULL_CASES, inputs, ours, eager, bytes_fwd, bytes_bwd, (), GPU_CASES, GATE_CASES, TRAFFIC_CASES
)


@pytest.mark.parametrize("case", FAMILY.selected(), ids=lambda case: case.name.replace(" ", "-"))
def test_bench(case: Case, bench: Callable[[Family, Case], None]) -> None:
    bench(FAMILY, case)


assert all(math.prod(case.shape) * case.itemsize < 32 << 20 for case in CASES), "quick cases stay below 32 MB a tensor"
