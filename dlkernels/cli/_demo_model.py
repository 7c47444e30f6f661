"""The demo's network: a small residual one, its layers in plain PyTorch and MONAI, or fused, or swapped.

A block is conv, GroupNorm and SiLU, conv, GroupNorm, squeeze-and-excitation, and a residual with stochastic depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlkernels as dk

from ..testing import error_budget, relative_error
from . import _eager_layers
from ._budget import Parity

CLASSES, BATCH, SEED = 10, 64, 0
LEARNING_RATE = 2e-3
GROUPS, REDUCTION = 8, 4
STEM, STAGES = 32, ((32, 1), (64, 2), (96, 2))  # (channels, stride) of each block
DROP = 0.2  # of the last block; linear over the blocks
OPTIMIZER_STEPS = 20  # compared before training
FLOAT64 = 1e-12  # what the order of sums may change over a whole network, or over these steps

# Layers, eager and fused ----------------------------------------------------------------------------------------------


class GroupNormSiLU(nn.GroupNorm):
    """nn.GroupNorm and F.silu, one after the other."""

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(super().forward(input))


class Drop(nn.Module):
    """residual + torchvision's stochastic depth of the branch, in plain PyTorch."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return _eager_layers.stochastic_depth(input, self.p, training=self.training, residual=residual)


@dataclass(frozen=True)
class Layers:
    """Constructors: norm and norm_silu of (groups, channels), squeeze_excite of (channels, reduction), drop of p."""

    norm: Callable[[int, int], nn.Module]
    norm_silu: Callable[[int, int], nn.Module]
    squeeze_excite: Callable[[int, int], nn.Module]
    drop: Callable[[float], nn.Module]


def layers(kind: str) -> Layers:
    """The switch: "eager", "fused", or "plain", where an activation and a sum are steps of their own."""
    if kind == "fused":
        return Layers(
            dk.nn.GroupNorm,
            lambda groups, channels: dk.nn.GroupNorm(groups, channels, activation="silu"),
            dk.nn.SqueezeExcite,
            dk.nn.StochasticDepth,
        )
    from monai.networks.blocks.squeeze_and_excitation import ChannelSELayer

    if kind == "plain":
        from monai.networks.layers.drop_path import DropPath

        return Layers(nn.GroupNorm, nn.GroupNorm, lambda channels, r: ChannelSELayer(2, channels, r), DropPath)
    return Layers(nn.GroupNorm, GroupNormSiLU, lambda channels, r: ChannelSELayer(2, channels, r), Drop)


# Network --------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, use: Layers, inputs: int, channels: int, stride: int, p: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.norm1 = use.norm_silu(GROUPS, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = use.norm(GROUPS, channels)
        self.se = use.squeeze_excite(channels, REDUCTION)
        self.drop = use.drop(p)
        same = inputs == channels and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        y = self.se(self.norm2(self.conv2(y)))
        return self.drop(y, self.shortcut(x))


class PlainBlock(Block):
    """The same in steps, as people write it: what `dlkernels.swap` is given."""

    def __init__(self, use: Layers, inputs: int, channels: int, stride: int, p: float) -> None:
        super().__init__(use, inputs, channels, stride, p)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm1(self.conv1(x)))
        y = self.se(self.norm2(self.conv2(y)))
        y = self.drop(y)
        return y + self.shortcut(x)


class Network(nn.Module):
    """Images (N, 1, 8, 8) to logits (N, 10)."""

    block: type[Block] = Block

    def __init__(self, use: Layers) -> None:
        super().__init__()
        rates = dk.nn.stochastic_depth_rates(DROP, len(STAGES))
        self.stem = nn.Sequential(nn.Conv2d(1, STEM, 3, 1, 1, bias=False), use.norm_silu(GROUPS, STEM))
        widths = (STEM, *(channels for channels, _ in STAGES))
        self.blocks = nn.Sequential(
            *(self.block(use, inputs, *stage, p) for inputs, stage, p in zip(widths, STAGES, rates))  # type: ignore[arg-type]
        )
        self.norm = use.norm_silu(GROUPS, widths[-1])
        self.head = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))).mean((2, 3)))


class PlainNetwork(Network):
    block = PlainBlock

    def __init__(self) -> None:
        super().__init__(layers("plain"))
        self.stem.append(nn.SiLU())
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(self.stem(x))
        y = self.act(self.norm(y))
        return self.head(y.mean((2, 3)))


def make_model(device: str, kind: str) -> nn.Module:
    """The same weights at every call: those of the eager network, which load into the others as they are.

    "swapped" is the plain network after `dlkernels.swap`.
    """
    torch.manual_seed(SEED)
    model = Network(layers("eager"))
    if kind != "eager":
        eager, model = model, Network(layers("fused")) if kind == "fused" else PlainNetwork()
        model.load_state_dict(eager.state_dict())
    if kind == "swapped":
        dk.swap(model)
    return model.to(device)


def make_optimizer(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    use = dk.optim.AdamW if kind == "fused" else torch.optim.AdamW
    optimizer = use(model.parameters(), lr=LEARNING_RATE)
    return dk.swap_optimizer(optimizer) if kind == "swapped" else optimizer


# Parity of the whole network ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelParity:
    """Errors of a network against the eager one in float64: of its output and of all its gradients together."""

    mode: str  # "eval" or "train"
    dtype: torch.dtype
    output: Parity
    gradient: Parity
    kind: str = "fused"  # or "swapped"

    @property
    def failed(self) -> bool:
        return max(self.output.ratio, self.gradient.ratio) > 1


def compare_models(x: Tensor, y: Tensor, kind: str = "fused") -> list[ModelParity]:
    """Eager and another network on one batch, from the same weights and seed, evaluating and training.

    In float64 they differ by rounding only; in float32 the other one has the error budget of dlkernels.testing.
    """
    # On a GPU, float64 draws other rows than float32, and has no kernels of its own.
    cpu = x.device.type == "cpu"
    found = []
    for mode in ("eval", "train") if cpu else ("eval",):
        exact = outcome("eager", mode, x.double(), y)
        for dtype in (torch.float64, torch.float32) if cpu else (torch.float32,):
            other = outcome(kind, mode, x.to(dtype), y)
            eager = exact if dtype == torch.float64 else outcome("eager", mode, x.to(dtype), y)
            found.append(ModelParity(mode, dtype, *map(_parity, exact, other, eager), kind))
    return found


def _parity(exact: Tensor, fused: Tensor, eager: Tensor) -> Parity:
    allowed = FLOAT64 if fused.dtype == torch.float64 else error_budget(exact, eager, fused.dtype)
    finite = torch.equal(torch.isfinite(fused), torch.isfinite(exact))
    return Parity(relative_error(fused, exact) if finite else math.inf, relative_error(eager, exact), allowed)


def outcome(kind: str, mode: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of their cross entropy in every parameter, as one vector."""
    model = make_model(x.device.type, kind).to(x.dtype).train(mode == "train")
    torch.manual_seed(SEED)
    logits = model(x)
    grads = torch.autograd.grad(F.cross_entropy(logits, y), list(model.parameters()))
    return logits.detach(), torch.cat([g.flatten() for g in grads])


# Parity of the optimizer ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimizerParity:
    """Errors of all parameters after OPTIMIZER_STEPS fused steps, against the eager ones in float64."""

    dtype: torch.dtype
    parameters: Parity

    @property
    def failed(self) -> bool:
        return self.parameters.ratio > 1


def compare_optimizers(device: str) -> list[OptimizerParity]:
    """Both optimizers on this network's parameters, with the same gradients; bounds as for the networks."""
    exact = stepped("eager", device, torch.float64)
    found = []
    for dtype in (torch.float64, torch.float32) if device == "cpu" else (torch.float32,):
        eager = exact if dtype == torch.float64 else stepped("eager", device, dtype)
        found.append(OptimizerParity(dtype, _parity(exact, stepped("fused", device, dtype), eager)))
    return found


def stepped(kind: str, device: str, dtype: torch.dtype) -> Tensor:
    """The parameters after steps with random gradients, as one vector.

    Each element's gradients have a size of their own, from 1e-9 to 10: among the small ones eps decides.
    """
    model = make_model(device, kind).to(dtype)
    optimizer, generator = make_optimizer(model, kind), torch.Generator().manual_seed(SEED)
    sizes = [10 ** (1 - 10 * torch.rand(p.shape, generator=generator)) for p in model.parameters()]
    for _ in range(OPTIMIZER_STEPS):
        for p, size in zip(model.parameters(), sizes, strict=True):
            p.grad = (size * torch.randn(p.shape, generator=generator)).to(p)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])
