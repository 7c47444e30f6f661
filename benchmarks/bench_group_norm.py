"""Group normalisation, alone and with the activation, the residual or the modulation that follows it.

    pytest benchmarks/bench_group_norm.py                     the quick set, table at the end
    FULL=1 pytest benchmarks/bench_group_norm.py -k bf16      more sizes, selected by name

Bytes are minimal: forward reads the input and writes the output; backward reads the input and the upstream gradient and
writes the input's gradient. A residual is read forward; an activation behind it makes backward read it and write its
gradient too.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import Case, Family, Function, Peer, both, layer
from torch import Tensor

import dlkernels as dk

BF16, FP16 = torch.bfloat16, torch.float16
OP = "group_norm"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "leaky_relu": F.leaky_relu, "silu": F.silu, "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}  # fmt: skip


# Inputs and minimal bytes ---------------------------------------------------------------------------------------------


def inputs(case: Case, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    """(input[, weight, bias][, residual][, scale, shift]): channels with means of their own, as after a convolution."""
    n, c = case.shape[:2]
    randn = lambda *shape: torch.randn(*shape, device=device, generator=generator)  # noqa: E731
    offset = randn(1, c, *[1] * (len(case.shape) - 2))
    tensors = [2 * randn(*case.shape) + offset]
    tensors += [1 + 0.2 * randn(c), 0.2 * randn(c)] if case.option("affine", True) else []
    tensors += [randn(*case.shape)] if case.option("residual") else []
    tensors += [0.5 * randn(n, c), 0.5 * randn(n, c)] if case.option("film") else []
    return tuple(t.to(case.dtype) for t in tensors)


def named(case: Case, tensors: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The tensors behind the input by the names of their arguments."""
    names = ["weight", "bias"] if case.option("affine", True) else []
    names += ["residual"] if case.option("residual") else []
    names += ["scale", "shift"] if case.option("film") else []
    return dict(zip(names, tensors, strict=True))


def _small(case: Case) -> int:
    """Bytes of weight and bias, of scale and shift, and of mean and rstd in fp32."""
    n, c = case.shape[:2]
    modulation = 2 * n * c * case.itemsize if case.option("film") else 0
    return (2 * c * case.itemsize if case.option("affine", True) else 0) + modulation + 8 * n * case.option("groups")


def bytes_fwd(case: Case) -> int:
    """Read the input and the residual, write the output."""
    return (3 if case.option("residual") else 2) * case.numel * case.itemsize + _small(case)


def bytes_bwd(case: Case) -> int:
    """Read the upstream gradient and the input, write the input's gradient.

    Behind a residual an activation needs its values, and its gradient is another than the upstream one. The small
    tensors are read, and their gradients written.
    """
    residual = 2 if case.option("residual") and case.option("activation") else 0
    return (3 + residual) * case.numel * case.itemsize + 2 * _small(case)


# Candidates -----------------------------------------------------------------------------------------------------------


def ours(case: Case) -> Function:
    groups, activation = case.option("groups"), case.option("activation")
    return lambda x, *rest: dk.group_norm(x, groups, activation=activation, **named(case, rest))


def eager(case: Case) -> Function:
    """F.group_norm and what people write behind it."""
    groups, activation = case.option("groups"), ACTIVATIONS.get(case.option("activation"))
    ones = [1] * (len(case.shape) - 2)

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        given = named(case, rest)
        y = F.group_norm(x, groups, given.get("weight"), given.get("bias"))
        if "scale" in given:
            scale, shift = (given[name].reshape(*x.shape[:2], *ones) for name in ("scale", "shift"))
            y = y * (1 + scale) + shift
        if "residual" in given:
            y = y + given["residual"]
        return y if activation is None else activation(y)

    return function


def _apex(case: Case) -> Function | None:
    """NHWC in half precision only, with SiLU or nothing behind it."""
    from apex.contrib.group_norm import GroupNorm

    plain = not case.option("residual") and not case.option("film") and case.option("affine", True)
    served = case.layout == "channels_last" and case.dtype != torch.float32
    if not plain or not served or case.option("activation") not in (None, "silu"):
        return None
    module = GroupNorm(case.option("groups"), case.shape[1], act=case.option("activation") or "").cuda()

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

    return function


def _liger(case: Case) -> Function | None:
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    plain = not case.option("residual") and not case.option("film") and case.option("affine", True)
    if not plain or case.option("activation") is not None or case.layout != "contiguous" or len(case.shape) < 3:
        return None
    channels, groups = case.shape[1], case.option("groups")
    return lambda x, weight, bias: LigerGroupNormFunction.apply(x, weight, bias, channels, groups, 1e-5)


PEERS = (Peer("apex", "apex", _apex, gpu_only=True), Peer("liger", "liger_kernel", _liger, gpu_only=True))


# Cases ----------------------------------------------------------------------------------------------------------------


RESNET = (8, 256, 28, 28)
NHWC = {"layout": "channels_last"}

CASES = [
    *both(layer(OP, RESNET, groups=32)),
    layer(OP, RESNET, groups=32, **NHWC),
    layer(OP, RESNET, BF16, groups=32, **NHWC),
    *both(layer(OP, RESNET, groups=32, activation="silu")),
    layer(OP, RESNET, groups=32, activation="silu", **NHWC),
    layer(OP, RESNET, BF16, groups=32, activation="silu", **NHWC),
    layer(OP, RESNET, groups=32, activation="relu", residual=True),
    layer(OP, RESNET, groups=32, activation="silu", film=True),
    layer(OP, (1, 64, 16, 32, 32), groups=8),
    layer(OP, (1, 128, 128, 128), groups=32),
    layer(OP, (256, 512), groups=32),
    layer(OP, (1, 8, 4, 4), groups=4),
    layer(OP, (1, 8, 4, 4), groups=4, affine=False),
]

FULL_CASES = [
    *(c for dtype in (BF16, FP16) for c in both(layer(OP, RESNET, dtype, groups=32))),
    *both(layer(OP, (8, 64, 56, 56), groups=32)),
    *both(layer(OP, (8, 512, 14, 14), groups=32)),
    *both(layer(OP, (8, 2048, 7, 7), groups=32)),
    layer(OP, RESNET, groups=1),
    layer(OP, RESNET, groups=256),
    layer(OP, RESNET, groups=1, **NHWC),
    layer(OP, (2, 320, 64, 64), BF16, groups=32, activation="silu"),
    layer(OP, (2, 320, 64, 64), BF16, groups=32, activation="silu", film=True, **NHWC),
    layer(OP, (1, 64, 16, 32, 32), groups=8, activation="leaky_relu", **NHWC),
    layer(OP, (8, 197, 384), groups=1),
    layer(OP, RESNET, groups=32, activation="gelu"),
    layer(OP, RESNET, groups=32, residual=True),
    layer(OP, RESNET, BF16, groups=32, activation="relu", residual=True, **NHWC),
    *both(layer(OP, (1, 16, 8, 8), groups=4, activation="silu")),
]

# On a GPU the quick set is mostly launch cost: these fill one.
GPU_CASES = [
    *(c for dtype in (torch.float32, BF16) for c in both(layer(OP, (64, 256, 56, 56), dtype, groups=32))),
    *both(layer(OP, (64, 256, 56, 56), BF16, groups=32, activation="silu", **NHWC)),
    *both(layer(OP, (1, 128, 20, 256, 256), BF16, groups=32, activation="silu")),
    layer(OP, (64, 256, 56, 56), BF16, groups=32, activation="relu", residual=True),
    layer(OP, (16, 320, 64, 64), BF16, groups=32, activation="silu", film=True),
    *both(layer(OP, (13, 18, 512, 512), BF16, groups=6)),
    layer(OP, (128, 2048, 16, 32), groups=32),
]

# Small and ragged: for sanitizers, capture, rehearsal. Every kernel and option.
GATE_CASES = [
    layer(OP, (2, 6, 5, 7), groups=3, activation="silu"),
    layer(OP, (2, 6, 5, 7), BF16, groups=2, activation="relu", residual=True, **NHWC),
    layer(OP, (3, 10, 9), FP16, groups=5, film=True),
    layer(OP, (2, 12, 3, 5, 4), groups=4, activation="gelu", film=True, residual=True, **NHWC),
    layer(OP, (5, 12), groups=3, activation="leaky_relu"),
    layer(OP, (1, 4, 67, 65), groups=1, activation="gelu_tanh"),
    layer(OP, (2, 4, 4, 4), groups=4, affine=False),
    layer(OP, (1, 8, 128, 130), BF16, groups=2),
]

TRAFFIC_CASES = [
    layer(OP, (256, 256, 64, 64), groups=32),
    layer(OP, (256, 256, 64, 64), groups=32, activation="silu"),
    layer(OP, (512, 256, 64, 64), BF16, groups=32, activation="silu", **NHWC),
    layer(OP, (256, 256, 64, 64), BF16, groups=32, activation="relu", residual=True),
    layer(OP, (1, 128, 64, 256, 256), BF16, groups=32),
]

FAMILY = Family(
    OP, CASES, FULL_CASES, inputs, ours, eager, bytes_fwd, bytes_bwd, PEERS, GPU_CASES, GATE_CASES, TRAFFIC_CASES,
    grads=lambda case: None,
)  # fmt: skip


@pytest.mark.parametrize("case", FAMILY.selected(), ids=lambda case: case.name.replace(" ", "-"))
def test_bench(case: Case, bench: Callable[[Family, Case], None]) -> None:
    bench(FAMILY, case)


assert all(math.prod(case.shape) * case.itemsize < 32 << 20 for case in CASES), "quick cases stay below 32 MB a tensor"
