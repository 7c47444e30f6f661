"""Stochastic depth, alone and as the end of a residual block.

    pytest benchmarks/bench_stochastic_depth.py                     the quick set, table at the end
    FULL=1 pytest benchmarks/bench_stochastic_depth.py -k bf16      more sizes, selected by name

Every candidate draws its own rows while it is timed. The check against float64 hands all of them one draw.

Bytes are minimal, and expected ones: a dropped row of the input is never read, and its gradient is zero without a look
at the upstream one. The residual's gradient is the upstream gradient itself and moves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from harness import Case, Family, Function, Peer, both, layer
from torch import Tensor

import dlkernels as dk

BF16, FP16 = torch.bfloat16, torch.float16
OP = "stochastic_depth"


# Inputs and minimal bytes ---------------------------------------------------------------------------------------------


def inputs(case: Case, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    """(input[, residual][, noise]): the noise for cases that ask for it, such as a captured step that is replayed."""
    count = 2 if case.option("residual") else 1
    tensors = [torch.randn(case.shape, device=device, generator=generator).to(case.dtype) for _ in range(count)]
    return (*tensors, noise(case, device, generator)) if case.option("noise") else tuple(tensors)


def noise(case: Case, device: str, generator: torch.Generator) -> Tensor:
    """One draw: 1 / (1 - p) for rows that are kept, 0 for the others; at least one of each where there are two."""
    rows = case.shape[0] if mode(case) == "row" else 1
    kept = torch.rand(rows, device=device, generator=generator) >= case.option("p")
    kept[0], kept[-1] = False, True
    return (kept / (1 - case.option("p"))).to(case.dtype).reshape(-1, *[1] * (len(case.shape) - 1))


def draws(case: Case, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    return () if case.option("noise") else (noise(case, device, generator),)


def mode(case: Case) -> str:
    return case.option("mode", "row")


def _kept(case: Case) -> int:
    """Bytes of the rows that are expected to be kept."""
    return int((1 - case.option("p")) * case.numel) * case.itemsize


def bytes_fwd(case: Case) -> int:
    """Read the kept rows and the residual, write the output."""
    return _kept(case) + (2 if case.option("residual") else 1) * case.numel * case.itemsize


def bytes_bwd(case: Case) -> int:
    """Read the upstream gradient of kept rows, write the gradient of all."""
    return _kept(case) + case.numel * case.itemsize


# Candidates -----------------------------------------------------------------------------------------------------------


def _named(case: Case, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What stands behind the input by name; the noise is there in the check only."""
    return dict(zip(("residual", "noise") if case.option("residual") else ("noise",), tensors, strict=False))


def ours(case: Case) -> Function:
    p = case.option("p")
    return lambda x, *rest: dk.stochastic_depth(x, p, mode(case), **_named(case, rest))


def eager(case: Case) -> Function:
    """torchvision.ops.stochastic_depth, line by line, and the sum that follows it."""
    survival_rate = 1.0 - case.option("p")
    size = [case.shape[0] if mode(case) == "row" else 1, *[1] * (len(case.shape) - 1)]

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        given = _named(case, rest)
        noise = given.get("noise")
        if noise is None:
            noise = torch.empty(size, dtype=x.dtype, device=x.device)
            noise = noise.bernoulli_(survival_rate)
            if survival_rate > 0.0:
                noise.div_(survival_rate)
        y = x * noise
        return given["residual"] + y if "residual" in given else y

    return function


def _drawing(case: Case, drop: Callable[[Tensor], Tensor]) -> Function:
    """A peer, which draws by itself and takes no noise: in the check the eager formula stands for it."""
    formula = eager(case)

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        given = _named(case, rest)
        if "noise" in given:
            return formula(x, *rest)
        return given["residual"] + drop(x) if "residual" in given else drop(x)

    return function


def _torchvision(case: Case) -> Function | None:
    from torchvision.ops import stochastic_depth

    if case.option("noise"):
        return None
    return _drawing(case, lambda x: stochastic_depth(x, case.option("p"), mode(case)))


def _timm(case: Case) -> Function | None:
    from timm.layers import drop_path

    if case.option("noise") or mode(case) != "row":
        return None
    return _drawing(case, lambda x: drop_path(x, case.option("p"), training=True))


PEERS = (Peer("torchvision", "torchvision", _torchvision), Peer("timm", "timm", _timm))


# Cases ----------------------------------------------------------------------------------------------------------------


RESNET, SMALLER = (32, 256, 28, 28), (8, 256, 28, 28)
RESIDUAL = {"p": 0.5, "residual": True}

CASES = [
    *both(layer(OP, RESNET, **RESIDUAL)),
    layer(OP, RESNET, p=0.5),
    *both(layer(OP, SMALLER, **RESIDUAL)),
    layer(OP, SMALLER, BF16, **RESIDUAL),
    layer(OP, SMALLER, p=0.1, residual=True),
    layer(OP, SMALLER, p=0.5, mode="batch", residual=True),
    layer(OP, (8, 197, 384), p=0.2, residual=True),
    *both(layer(OP, (1, 8, 4, 4), **RESIDUAL)),
    layer(OP, (1, 8, 4, 4), p=0.5),
]

FULL_CASES = [
    layer(OP, RESNET, BF16, **RESIDUAL),
    layer(OP, RESNET, direction="fwd", p=0.5),
    layer(OP, RESNET, FP16, **RESIDUAL),
    layer(OP, RESNET, layout="channels_last", **RESIDUAL),
    layer(OP, RESNET, BF16, p=0.5),
    layer(OP, RESNET, p=0.9, residual=True),
    *both(layer(OP, (256, 64, 14, 14), **RESIDUAL)),
    layer(OP, (64, 197, 384), BF16, p=0.2, residual=True),
    layer(OP, (8, 16, 8, 8), **RESIDUAL),
]

# On a GPU the quick set is mostly launch cost: these fill one.
GPU_CASES = [
    *(c for dtype in (torch.float32, BF16) for c in both(layer(OP, (128, 256, 56, 56), dtype, **RESIDUAL))),
    layer(OP, (256, 197, 768), BF16, p=0.2, residual=True),
    layer(OP, (128, 256, 56, 56), BF16, p=0.5),
]

# Small and ragged, with the noise given: what is replayed or run twice must not draw again.
GATE_CASES = [
    layer(OP, (5, 3, 7, 9), noise=True, **RESIDUAL),
    layer(OP, (5, 3, 7, 9), BF16, noise=True, p=0.3),
    layer(OP, (4, 33), FP16, noise=True, **RESIDUAL),
    layer(OP, (3, 5, 6, 4), layout="channels_last", noise=True, **RESIDUAL),
    layer(OP, (3, 1025), noise=True, p=0.2, mode="batch", residual=True),
]

TRAFFIC_CASES = [
    layer(OP, (512, 1024, 512), **RESIDUAL),
    layer(OP, (1024, 1024, 512), BF16, **RESIDUAL),
    layer(OP, (512, 1024, 512), p=0.5),
]

FAMILY = Family(
    OP, CASES, FULL_CASES, inputs, ours, eager, bytes_fwd, bytes_bwd, PEERS, GPU_CASES, GATE_CASES, TRAFFIC_CASES,
    grads=lambda case: 2 if case.option("residual") else 1, draws=draws,
)  # fmt: skip


@pytest.mark.parametrize("case", FAMILY.selected(), ids=lambda case: case.name.replace(" ", "-"))
def test_bench(case: Case, bench: Callable[[Family, Case], None]) -> None:
    bench(FAMILY, case)


assert all(math.prod(case.shape) * case.itemsize < 32 << 20 for case in CASES), "quick cases stay below 32 MB a tensor"
