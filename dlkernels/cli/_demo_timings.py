"""The demo's times: losses, layers, optimizers, a whole training step. A later op joins in a list of cases."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dlkernels as dk

from . import _eager
from ._demo_model import BATCH, CLASSES, DROP, GROUPS, REDUCTION, SEED, STEM, layers, make_model, make_optimizer
from ._demo_parts import LOSSES, Data, Loss, LossFunction, training_step


@dataclass(frozen=True)
class Timing:
    """Seconds per call of the eager and the fused form, and where the case comes from."""

    name: str
    eager: float
    fused: float
    kind: str = "loss"  # "loss", "layer", "optimizer" or "step"

    @property
    def speedup(self) -> float:
        return self.eager / self.fused


# Losses ---------------------------------------------------------------------------------------------------------------


def loss_cases(data: Data, logits: Tensor, labels: Tensor) -> Iterator[tuple[str, Loss, Tensor, Tensor]]:
    """(name, loss, logits, targets): the training batch, one at the scale of ImageNet, one of a dense detector."""
    device, generator = logits.device, torch.Generator().manual_seed(SEED)
    pair = [make(data) for make in LOSSES]
    for loss in pair:
        yield f"{loss.name}, this batch {BATCH} x {CLASSES}", loss, logits, labels
    x = (2 * torch.randn(4096, 1000, generator=generator)).to(device)
    y = torch.randint(1000, (4096,), generator=generator).to(device)
    for loss in (Loss("focal", _eager.softmax_focal_loss, dk.softmax_focal_loss), pair[1]):
        yield f"{loss.name}, 4096 x 1000", loss, x, y
    x = (2 * torch.randn(1 << 20, generator=generator)).to(device)
    y = (torch.rand(1 << 20, generator=generator) < 0.02).float().to(device)
    mean = {"reduction": "mean"}
    sigmoid = Loss(
        "sigmoid focal",
        functools.partial(_eager.sigmoid_focal_loss, **mean),
        functools.partial(dk.sigmoid_focal_loss, **mean),
    )
    yield "sigmoid focal, 1M elements (dense detector)", sigmoid, x, y


def time_losses(data: Data, logits: Tensor, labels: Tensor, seconds: float) -> Iterator[Timing]:
    """Forward + backward of every case, about `seconds` each."""
    for name, loss, x, target in loss_cases(data, logits, labels):
        calls = (_loss_call(function, x, target) for function in (loss.eager, loss.fused))
        yield Timing(name, *interleaved(*calls, seconds))


def _loss_call(loss: LossFunction, x: Tensor, target: Tensor) -> Callable[[], None]:
    x = x.detach().clone().requires_grad_(True)

    def call() -> None:
        x.grad = None
        loss(x, target).backward()

    return call


# Layers ---------------------------------------------------------------------------------------------------------------


def layer_cases() -> Iterator[tuple[str, Callable[[str], nn.Module], list[tuple[int, ...]]]]:
    """(name, module by kind, shapes of its inputs): as in this network, and at the scale of a ResNet."""
    here, scale = (BATCH, STEM, 8, 8), (8, 256, 28, 28)
    where = f"this batch {BATCH} x {STEM} x 8 x 8"
    yield f"GroupNorm + SiLU, {where}", lambda kind: layers(kind).norm_silu(GROUPS, STEM), [here]
    yield f"squeeze-excite, {where}", lambda kind: layers(kind).squeeze_excite(STEM, REDUCTION), [here]
    yield f"residual + stochastic depth, {where}", lambda kind: layers(kind).drop(DROP), [here, here]
    yield "GroupNorm + SiLU, 8 x 256 x 28 x 28", lambda kind: layers(kind).norm_silu(32, 256), [scale]
    yield "squeeze-excite, 8 x 256 x 28 x 28", lambda kind: layers(kind).squeeze_excite(256, 16), [scale]
    yield "residual + stochastic depth, 8 x 256 x 28 x 28", lambda kind: layers(kind).drop(0.5), [scale, scale]
    yield "weight norm, 512 x 4608", WeightNorm, [(512, 4608), (512, 1)]


class WeightNorm(nn.Module):
    """What a weight-normalised layer does before it is used."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.function = dk.weight_norm if kind == "fused" else torch._weight_norm

    def forward(self, v: Tensor, g: Tensor) -> Tensor:
        return self.function(v, g, 0)


def time_layers(device: str, seconds: float) -> Iterator[Timing]:
    """Forward + backward of every case, about `seconds` each; gradients of inputs and parameters."""
    for name, make, shapes in layer_cases():
        generator = torch.Generator().manual_seed(SEED)
        tensors = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
        calls = (_layer_call(make(kind).to(device), tensors) for kind in ("eager", "fused"))
        yield Timing(name, *interleaved(*calls, seconds), kind="layer")


def _layer_call(module: nn.Module, tensors: list[Tensor]) -> Callable[[], None]:
    inputs = [t.clone().requires_grad_(True) for t in tensors]
    leaves = [*inputs, *module.parameters()]
    grad_output = torch.randn_like(tensors[0])

    def call() -> None:  # computed, not accumulated: a residual's gradient, passed through, is not copied
        torch.autograd.grad(module(*inputs), leaves, grad_output)

    return call


# Optimizers -----------------------------------------------------------------------------------------------------------


def optimizer_cases(device: str) -> Iterator[tuple[str, Callable[[str], nn.Module]]]:
    """(name, parameters by kind): those of this network, and many small ones, as biases and norms are."""
    count = len(list(make_model(device, "eager").parameters()))
    yield f"AdamW, this network's {count} tensors", lambda kind: make_model(device, kind)
    small = [torch.randn(256, generator=torch.Generator().manual_seed(SEED)) for _ in range(300)]
    yield "AdamW, 300 tensors of 256", lambda kind: nn.ParameterList([t.clone() for t in small]).to(device)


def time_optimizers(device: str, seconds: float) -> Iterator[Timing]:
    """A step of every case, about `seconds` each; the eager optimizer with its default implementation."""
    for name, make in optimizer_cases(device):
        calls = (_optimizer_call(make(kind), kind) for kind in ("eager", "fused"))
        yield Timing(name, *interleaved(*calls, seconds), kind="optimizer")


def _optimizer_call(module: nn.Module, kind: str) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(SEED)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p)
    optimizer = make_optimizer(module, kind)
    return lambda: optimizer.step()


# The step, and the clock ----------------------------------------------------------------------------------------------


def time_step(data: Data, loss: Loss, seconds: float) -> Timing:
    """A whole training step: network, loss, backward, optimizer."""
    calls = (training_step(data, loss, kind) for kind in ("eager", "fused"))
    return Timing(f"whole training step ({loss.name})", *interleaved(*calls, seconds), kind="step")


def time_swapped(data: Data, loss: Loss, seconds: float) -> Timing:
    """The same step of the plain network, as it is and after `swap` and `swap_optimizer`; the loss stays plain."""
    calls = (training_step(data, loss, kind) for kind in ("plain", "swapped"))
    return Timing("whole training step, plain and after dk.swap", *interleaved(*calls, seconds), kind="step")


def interleaved(eager: Callable[[], None], fused: Callable[[], None], seconds: float) -> tuple[float, float]:
    """The fastest of many rounds of each, taken in turns: neighbours and clocks hit both alike."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def round_of(call: Callable[[], None], repeat: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        synchronize()
        return (time.perf_counter() - start) / repeat

    calls = (eager, fused)
    repeats = []
    for call in calls:
        round_of(call, 3)
        repeats.append(max(1, round(2e-3 / round_of(call, 3))))  # a round of about 2 ms, or one call
    best = [float("inf"), float("inf")]
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 5 or time.perf_counter() < end:
        best = [min(b, round_of(c, r)) for b, c, r in zip(best, calls, repeats, strict=True)]
        rounds += 1
    return best[0], best[1]
