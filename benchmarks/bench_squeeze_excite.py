"""Squeeze-and-excitation: pool, two small layers, gate, scale, and a residual with its activation.

    pytest benchmarks/bench_squeeze_excite.py                     the quick set, table at the end
    FULL=1 pytest benchmarks/bench_squeeze_excite.py -k bf16      more sizes, selected by name

Bytes: forward reads the input twice (all of it must be pooled before any of it is scaled) and writes the output;
backward reads the upstream gradient and the input for the gate, the gradient again, and writes the input's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from harness import Case, Family, Function, Peer, both, layer
from torch import Tensor, nn

import dlkernels as dk

BF16, FP16 = torch.bfloat16, torch.float16
OP = "squeeze_excite"
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "silu": F.silu, "gelu": F.gelu, "leaky_relu": F.leaky_relu,
}  # fmt: skip
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": lambda z: F.relu6(z + 3) / 6,  # F.hardsigmoid multiplies by 1/6 in float32, in float64 too
    "relu": F.relu,
}


# Inputs and minimal bytes ---------------------------------------------------------------------------------------------


def channels(case: Case) -> int:
    return case.shape[-1] if case.option("tokens") else case.shape[1]


def inputs(case: Case, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    """(x[, w1, b1], w2, b2[, residual]): weights of 1x1 convolutions (of Linear for tokens), channels that differ."""
    c, r = channels(case), case.option("hidden")
    randn = lambda *shape: torch.randn(*shape, device=device, generator=generator)  # noqa: E731
    mean = randn(c) if case.option("tokens") else randn(c, *[1] * (len(case.shape) - 2))
    ones = () if case.option("tokens") else (1, 1)
    tensors = [randn(*case.shape) + mean]
    tensors += [randn(r, c, *ones) / c**0.5, 0.1 * randn(r)] if r else []
    fan_in = r or c
    tensors += [2 * randn(c, fan_in, *ones) / fan_in**0.5, 0.5 * randn(c)]
    tensors += [randn(*case.shape)] if case.option("residual") else []
    return tuple(t.to(case.dtype) for t in tensors)


def split(case: Case, tensors: tuple[Tensor, ...]) -> tuple[list[Tensor | None], Tensor | None]:
    """([w1, b1, w2, b2], residual) of what stands behind x."""
    rest: list[Tensor | None] = list(tensors)
    residual = rest.pop() if case.option("residual") else None
    return (rest if case.option("hidden") else [None, None, *rest]), residual


def _small(case: Case) -> int:
    """Bytes of the weights and biases, and of what is kept per channel in fp32."""
    c, r = channels(case), case.option("hidden")
    weights = 2 * c * r + r + c if r else c * c + c
    return weights * case.itemsize + 4 * case.shape[0] * (2 * c + (r or 0))


def bytes_fwd(case: Case) -> int:
    """Read the input twice and the residual once, write the output."""
    return (4 if case.option("residual") else 3) * case.numel * case.itemsize + _small(case)


def bytes_bwd(case: Case) -> int:
    """Read the upstream gradient twice and the input once, write the input's gradient.

    An activation behind a residual needs the residual too; the first sweep writes the residual's gradient, which the
    second one reads in place of the upstream one. The small tensors are read, and their gradients written.
    """
    residual = 2 if case.option("residual") and case.option("residual_activation") else 0
    return (4 + residual) * case.numel * case.itemsize + 2 * _small(case)


# Candidates -----------------------------------------------------------------------------------------------------------


def _options(case: Case) -> dict[str, str]:
    return {"activation": case.option("activation", "relu"), "gate": case.option("gate", "sigmoid")}


def ours(case: Case) -> Function:
    behind = {"residual_activation": case.option("residual_activation")} if case.option("residual") else {}
    options = _options(case) | behind | {"layout": "tokens" if case.option("tokens") else "channels_first"}

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        weights, residual = split(case, rest)
        return dk.squeeze_excite(x, *weights, residual=residual, **options)

    return function


def eager(case: Case) -> Function:
    """The module that people write: mean, 1x1 convolution, activation, 1x1 convolution, gate, product."""
    options, tokens = _options(case), bool(case.option("tokens"))
    activation, gate = ACTIVATIONS[options["activation"]], GATES[options["gate"]]
    after = ACTIVATIONS.get(case.option("residual_activation", ""))
    linear = F.linear if tokens else F.conv2d
    positions = (1,) if tokens else (2, 3)

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        (w1, b1, w2, b2), residual = split(case, rest)
        s = x.mean(positions, keepdim=True)
        if w1 is not None:
            s = activation(linear(s, w1, b1))
        y = x * gate(linear(s, w2, b2))
        if residual is not None:
            y = y + residual
        return y if after is None else after(y)

    return function


def _module(case: Case, module: nn.Module, *names: str) -> Function:
    """A peer's module on the weights of the case; w1 and w2 take the shape that its layers have."""
    module = module.to(case.dtype)
    shapes = {name: p.shape for name, p in module.named_parameters()}

    def function(x: Tensor, *weights: Tensor) -> Tensor:
        given = {name: w.reshape(shapes[name]) for name, w in zip(names, weights, strict=True)}
        return torch.func.functional_call(module, given, (x,))

    return function


def _plain(case: Case) -> bool:
    return bool(case.option("hidden")) and not case.option("tokens") and not case.option("residual")


def _timm(case: Case) -> Function | None:
    from timm.layers.squeeze_excite import EffectiveSEModule, SEModule

    options = _options(case)
    if case.option("tokens") or case.option("residual"):
        return None
    if not case.option("hidden"):
        module: nn.Module = EffectiveSEModule(channels(case), gate_layer=options["gate"])
        return _module(case, module, "fc.weight", "fc.bias")
    module = SEModule(
        channels(case), rd_channels=case.option("hidden"), act_layer=type(_layer(options["activation"])),
        gate_layer=options["gate"],
    )  # fmt: skip
    return _module(case, module, "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def _torchvision(case: Case) -> Function | None:
    from torchvision.ops import SqueezeExcitation

    if not _plain(case):
        return None
    options = _options(case)
    module = SqueezeExcitation(
        channels(case), case.option("hidden"), type(_layer(options["activation"])), type(_layer(options["gate"]))
    )
    return _module(case, module, "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


def _monai(case: Case) -> Function | None:
    from monai.networks.blocks.squeeze_and_excitation import ChannelSELayer

    options = _options(case)
    if not _plain(case) or options["gate"] == "hard_sigmoid" or options["activation"] == "silu":
        return None
    module = ChannelSELayer(2, channels(case), channels(case) // case.option("hidden"), options["activation"],
                            options["gate"])  # fmt: skip
    return _module(case, module, "fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias")


def _layer(name: str) -> nn.Module:
    return {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU, "leaky_relu": nn.LeakyReLU, "sigmoid": nn.Sigmoid,
            "hard_sigmoid": nn.Hardsigmoid}[name]()  # fmt: skip


PEERS = (
    Peer("timm", "timm", _timm),
    Peer("torchvision", "torchvision", _torchvision),
    Peer("monai", "monai", _monai),
)


# Cases ----------------------------------------------------------------------------------------------------------------


RESNET = (8, 256, 28, 28)
NHWC = {"layout": "channels_last"}
MOBILENET = {"hidden": 24, "gate": "hard_sigmoid"}

CASES = [
    *both(layer(OP, RESNET, hidden=16)),
    layer(OP, RESNET, hidden=16, **NHWC),
    *both(layer(OP, RESNET, BF16, hidden=16, **NHWC)),
    layer(OP, (8, 197, 384), hidden=24, tokens=True),
    layer(OP, (8, 96, 28, 28), **MOBILENET),
    layer(OP, RESNET, hidden=16, residual=True, residual_activation="relu"),
    layer(OP, RESNET, gate="hard_sigmoid"),
    layer(OP, (8, 2048, 7, 7), hidden=128),
    *both(layer(OP, (1, 8, 4, 4), hidden=2)),
]

FULL_CASES = [
    *(c for dtype in (BF16, FP16) for c in both(layer(OP, RESNET, dtype, hidden=16))),
    *both(layer(OP, (8, 64, 56, 56), hidden=4)),
    *both(layer(OP, (8, 512, 14, 14), hidden=32)),
    layer(OP, (8, 96, 28, 28), **MOBILENET, **NHWC),
    layer(OP, (8, 240, 14, 14), BF16, hidden=10, activation="silu", **NHWC),
    layer(OP, (8, 197, 768), BF16, hidden=48, tokens=True),
    layer(OP, RESNET, BF16, hidden=16, residual=True, residual_activation="relu", **NHWC),
    layer(OP, RESNET, hidden=16, residual=True),
    layer(OP, RESNET, BF16, gate="hard_sigmoid", **NHWC),
    layer(OP, (1, 64, 224, 224), hidden=4),
    layer(OP, (2, 16, 8, 8), hidden=4),
]

# On a GPU the quick set is mostly launch cost: these fill one.
GPU_CASES = [
    *(c for dtype in (torch.float32, BF16) for c in both(layer(OP, (128, 256, 56, 56), dtype, hidden=16))),
    *both(layer(OP, (128, 256, 56, 56), BF16, hidden=16, **NHWC)),
    layer(OP, (128, 256, 56, 56), BF16, hidden=16, residual=True, residual_activation="relu"),
    layer(OP, (256, 2048, 7, 7), BF16, hidden=128),
    layer(OP, (256, 96, 56, 56), BF16, **MOBILENET, **NHWC),
    layer(OP, (256, 197, 768), BF16, hidden=48, tokens=True),
    layer(OP, (64, 256, 56, 56), BF16, gate="hard_sigmoid"),
]

# Small and ragged: for sanitizers, capture, rehearsal. Every kernel and option.
GATE_CASES = [
    layer(OP, (2, 10, 5, 7), hidden=3),
    layer(OP, (2, 10, 5, 7), BF16, hidden=3, activation="silu", residual=True, residual_activation="relu", **NHWC),
    layer(OP, (3, 9, 13), FP16, hidden=4, activation="gelu", tokens=True),
    layer(OP, (2, 12, 3, 5), gate="hard_sigmoid"),
    layer(OP, (2, 12, 8, 8), hidden=5, activation="leaky_relu", gate="relu", residual=True, **NHWC),
    layer(OP, (1, 260, 3, 3), hidden=65),
    layer(OP, (1, 4, 129, 131), BF16, hidden=2),
]

TRAFFIC_CASES = [
    layer(OP, (256, 256, 64, 64), hidden=16),
    layer(OP, (512, 256, 64, 64), BF16, hidden=16, **NHWC),
    layer(OP, (256, 256, 64, 64), BF16, hidden=16, residual=True, residual_activation="relu"),
    layer(OP, (512, 1024, 1024), BF16, hidden=64, tokens=True),
]

FAMILY = Family(
    OP, CASES, FULL_CASES, inputs, ours, eager, bytes_fwd, bytes_bwd, PEERS, GPU_CASES, GATE_CASES, TRAFFIC_CASES,
    grads=lambda case: None,
)  # fmt: skip


@pytest.mark.parametrize("case", FAMILY.selected(), ids=lambda case: case.name.replace(" ", "-"))
def test_bench(case: Case, bench: Callable[[Family, Case], None]) -> None:
    bench(FAMILY, case)


assert all(math.prod(case.shape) * case.itemsize < 32 << 20 for case in CASES), "quick cases stay below 32 MB a tensor"
