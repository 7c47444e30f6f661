"""Weight normalisation: one layer, and all layers of a network.

    pytest benchmarks/bench_weight_norm.py                     the quick set, table at the end
    FULL=1 pytest benchmarks/bench_weight_norm.py -k dim       more sizes, selected by name

Bytes are minimal: v read and w written forward; v and the upstream gradient read, the gradient of v written backward.
A case with `layers` is a whole network: that many weights of mixed sizes, normalised one after the other, as every
training step does; its shape is the number of their elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from harness import Case, Family, Function, both, layer
from torch import Tensor

import dlkernels as dk

BF16, FP16 = torch.bfloat16, torch.float16
OP = "weight_norm"
# Weights of a residual network of 50 layers: a stem, blocks of 1x1 and 3x3 convolutions, a classifier.
MIXED = ((32, 3, 3, 3), *[(32, 32, 1, 1), (32, 32, 3, 3), (64, 32, 1, 1)] * 4, *[(64, 64, 1, 1), (64, 64, 3, 3),
         (128, 64, 1, 1)] * 6, *[(128, 128, 1, 1), (128, 128, 3, 3), (256, 128, 1, 1)] * 6, (100, 256))  # fmt: skip
ELEMENTS = sum(math.prod(shape) for shape in MIXED)


# Inputs and minimal bytes ---------------------------------------------------------------------------------------------


def shapes(case: Case) -> tuple[tuple[int, ...], ...]:
    return MIXED if case.option("layers") else (case.shape,)


def _norms(shape: tuple[int, ...], dim: int | None) -> tuple[int, ...]:
    """The shape of g."""
    if dim is None:
        return ()
    return tuple(size if i == dim else 1 for i, size in enumerate(shape))


def inputs(case: Case, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    """(v, g), or v and g of every layer in turn."""
    tensors = []
    for shape in shapes(case):
        size = _norms(shape, case.option("dim", 0))
        tensors.append(0.05 * torch.randn(shape, device=device, generator=generator))
        tensors.append(0.5 + torch.rand(size, device=device, generator=generator))
    return tuple(t.to(case.dtype) for t in tensors)


def _small(case: Case) -> tuple[int, int]:
    """Bytes of g, and of the norms in fp32."""
    count = sum(math.prod(_norms(shape, case.option("dim", 0))) for shape in shapes(case))
    return count * case.itemsize, 4 * count


def bytes_fwd(case: Case) -> int:
    """Read v and g; write w and the norms."""
    return 2 * case.numel * case.itemsize + sum(_small(case))


def bytes_bwd(case: Case) -> int:
    """Read the upstream gradient, v, g and the norms; write the gradients of v and g."""
    g, norms = _small(case)
    return 3 * case.numel * case.itemsize + 2 * g + norms


# Candidates -----------------------------------------------------------------------------------------------------------


def _each(case: Case, one: Callable[[Tensor, Tensor], Tensor]) -> Function:
    if not case.option("layers"):
        return one
    return lambda *tensors: [one(v, g) for v, g in zip(tensors[::2], tensors[1::2], strict=True)]


def ours(case: Case) -> Function:
    dim = case.option("dim", 0)
    return _each(case, lambda v, g: dk.weight_norm(v, g, dim))


def eager(case: Case) -> Function:
    """What torch.nn.utils.parametrizations.weight_norm calls; to it, dim=None is -1, the norm of the whole tensor."""
    dim = case.option("dim", 0)
    dim = -1 if dim is None else dim
    return _each(case, lambda v, g: torch._weight_norm(v, g, dim))


# Cases ----------------------------------------------------------------------------------------------------------------


NETWORK = layer(OP, (ELEMENTS,), layers=len(MIXED))

CASES = [
    *both(layer(OP, (512, 4608))),
    layer(OP, (512, 4608), BF16),
    *both(NETWORK),
    layer(OP, (4, 1 << 20)),
    layer(OP, (4608, 512), dim=1),
    layer(OP, (256, 512, 3, 3), dim=1),
    layer(OP, (512, 4608), dim=None),
    *both(layer(OP, (8, 16))),
]

FULL_CASES = [
    layer(OP, (512, 4608), FP16),
    *both(layer(OP, (4096, 1024))),
    *both(layer(OP, (64, 3, 7, 7))),
    *both(layer(OP, (65536, 64))),
    layer(OP, (4608, 512), BF16, dim=1),
    layer(OP, (256, 512, 3, 3), BF16, dim=1),
    layer(OP, (4, 1 << 20), BF16),
    layer(OP, (ELEMENTS,), BF16, layers=len(MIXED)),
    layer(OP, (1, 8)),
]

# On a GPU the quick set is mostly launch cost: these fill one.
GPU_CASES = [
    *(c for dtype in (torch.float32, BF16) for c in both(layer(OP, (16384, 4096), dtype))),
    layer(OP, (4096, 16384), dim=1),
    layer(OP, (8, 1 << 23)),
]

# Small and ragged: for sanitizers, capture, rehearsal. Every kernel.
GATE_CASES = [
    layer(OP, (7, 33)),
    layer(OP, (5, 3, 3, 3), BF16),
    layer(OP, (33, 6), FP16, dim=1),
    layer(OP, (6, 10, 3, 3), dim=1),
    layer(OP, (3, 70001)),
    layer(OP, (5, 7), dim=None),
]

TRAFFIC_CASES = [
    layer(OP, (65536, 4096)),
    layer(OP, (131072, 4096), BF16),
    layer(OP, (65536, 4096), dim=1),
    layer(OP, (16, 1 << 24)),
]

FAMILY = Family(
    OP, CASES, FULL_CASES, inputs, ours, eager, bytes_fwd, bytes_bwd, (), GPU_CASES, GATE_CASES, TRAFFIC_CASES,
    grads=lambda case: None,
)  # fmt: skip


@pytest.mark.parametrize("case", FAMILY.selected(), ids=lambda case: case.name.replace(" ", "-"))
def test_bench(case: Case, bench: Callable[[Family, Case], None]) -> None:
    bench(FAMILY, case)


assert all(math.prod(case.shape) * case.itemsize < 32 << 20 for case in CASES), "quick cases stay below 32 MB a tensor"
