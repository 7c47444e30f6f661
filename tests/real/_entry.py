"""An entry of the zoo: how a model is made, what it is given, what `dlkernels.swap` must find in it.

A model as it comes from its constructor cannot show a wrong kernel: norms after the last convolution of a block are
zero, biases are zero, activations of an untrained network in eval mode vanish. `randomise` gives every parameter a
value of its own, and every BatchNorm the statistics of what it sees, so that what each module does reaches the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Inputs = Callable[[torch.dtype, torch.Generator], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Entry:
    """One model of one library.

    Args:
        name: of the test.
        library: which brings it.
        build: makes it, in float32, with no weights from anywhere.
        inputs: dtype and generator -> args and kwargs of its forward.
        swapped: the number of modules swapped by family.
        refused: a piece of the reason -> the number of modules refused for it.
        calls: how often each of our operators is called by a forward pass in train mode, and with what else in it.
        training: its losses exist in train mode only (BatchNorm stays in eval mode).
        seed: of the parameters: one with which no ReLU is dead.
        bfloat16: whether its forward takes bfloat16 at all.
    """

    name: str
    library: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    swapped: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    training: bool = False
    seed: int = 0
    bfloat16: bool = True

    def __str__(self) -> str:
        return f"{self.library}-{self.name}"

    def call(self, model: nn.Module, dtype: torch.dtype, seed: int = 1) -> tuple[Any, list[Tensor]]:
        """The output of a forward pass, and the floating inputs, which ask for gradients in eval mode.

        In train mode libraries have ideas of their own about them.
        """
        args, kwargs = self.inputs(dtype, torch.Generator().manual_seed(seed))
        leaves = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
        if not model.training:
            for leaf in leaves:
                leaf.requires_grad_()
        return model(*args, **kwargs), leaves

    def mode(self, model: nn.Module, training: bool = False) -> nn.Module:
        """Eval mode, or the nearest to it in which the model has an output to differentiate; or train mode.

        BatchNorm stays in eval mode: over a small batch it makes more of rounding errors than a comparison bears.
        """
        model.train(training or self.training)
        kept = (nn.modules.batchnorm._NormBase, *(() if training else (nn.modules.dropout._DropoutNd,)))
        for module in model.modules():
            if isinstance(module, kept):
                module.eval()
        return model

    def make(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model in the given dtype, in the state in which it is compared."""
        torch.manual_seed(self.seed)
        model = self.mode(self.build().to(torch.float64))
        randomise(self, model, torch.Generator().manual_seed(self.seed))
        return model.to(dtype)


# Values ---------------------------------------------------------------------------------------------------------------


def randomise(entry: Entry, model: nn.Module, generator: torch.Generator) -> None:
    """Give every parameter a value of its own, and every BatchNorm the statistics of what reaches it."""
    seen: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    parameter.copy_(drawn(module, name, parameter, generator))
        calibrate(entry, model, generator)


def drawn(module: nn.Module, name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Weights by fan-in, scales around one, biases around zero; none of them a value that hides a mistake."""
    uniform = torch.rand(like.shape, generator=generator, dtype=like.dtype)
    normal = torch.randn(like.shape, generator=generator, dtype=like.dtype)
    if name == "bias":
        return 0.3 * normal
    if is_norm(module) or name in ("original0", "weight_g"):  # a weight norm's g: lengths are set below
        return 0.7 + 0.6 * uniform
    other = name != "weight" or not isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    if other and (like.ndim < 2 or like.numel() == max(like.shape)):  # layer scales, temperatures
        return 0.4 + 0.6 * uniform
    if isinstance(module, nn.Embedding):
        return normal
    fan_in = like.numel() // like.shape[0]
    return normal * math.sqrt(2.0 / fan_in)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: its weight is a scale."""
    if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm):
        return True
    return "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None and module.weight.ndim == 1


def calibrate(entry: Entry, model: nn.Module, generator: torch.Generator) -> None:
    """Running statistics near those of the activations, layer after layer in one pass; nothing else changes."""

    def set_statistics(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        axes = [0, *range(2, x.ndim)]
        mean, variance = x.mean(axes), x.var(axes, correction=0)
        noise = torch.rand(mean.shape, generator=generator, dtype=mean.dtype)
        module.running_mean.copy_(mean + (noise - 0.5) * 0.3 * variance.sqrt())
        module.running_var.copy_((variance + 0.3 * variance.mean() + 1e-3) * (0.8 + 0.4 * noise))

    normed = [m for m in model.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
    for module in normed:  # a frozen BatchNorm keeps its scale and bias as buffers
        for name, buffer in module.named_buffers(recurse=False):
            if name in ("weight", "bias"):
                buffer.copy_(drawn(module, name, buffer, generator))
    hooks = [module.register_forward_pre_hook(set_statistics) for module in normed]
    entry.call(model, torch.float64)
    for hook in hooks:
        hook.remove()


# Outputs --------------------------------------------------------------------------------------------------------------


def tensors(output: Any) -> list[Tensor]:
    """The floating tensors in whatever a model returns, in a fixed order."""
    return [t for t in leaves_of(output) if t.is_floating_point()]


def leaves_of(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for key in output:
            yield from leaves_of(output[key])
    elif isinstance(output, list | tuple):
        for item in output:
            yield from leaves_of(item)
    elif hasattr(output, "latent_dist"):  # diffusers' encoders
        yield output.latent_dist.mean


def loss_of(output: Any) -> Tensor:
    """A scalar in which every element of every output has a weight of its own, of the order of one."""
    total = None
    for tensor in tensors(output):
        if tensor.grad_fn is None:
            continue
        weights = torch.cos(torch.arange(tensor.numel(), dtype=torch.float64) * 0.7 + 0.3).to(tensor.dtype)
        part = (tensor.flatten() * weights).sum() / math.sqrt(max(tensor.numel(), 1))
        total = part if total is None else total + part
    assert total is not None, "no output depends on anything that is trained"
    return total


@dataclass
class Result:
    """What a forward and a backward pass gave."""

    outputs: list[Tensor]
    inputs: list[Tensor | None]  # gradients
    parameters: dict[str, Tensor]  # gradients of those that have one


def exact_hard_sigmoid() -> Any:
    """PyTorch's derivative of hardsigmoid has 1/6 in float32 on CPUs, in float64 too: wrong by 3e-8, past our limit."""
    return mock.patch.object(F, "hardsigmoid", lambda x, inplace=False: F.relu6(x + 3) / 6)


def run(entry: Entry, model: nn.Module, dtype: torch.dtype, seed: int = 1) -> Result:
    """One forward and backward pass."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)  # for what draws in train mode
    with exact_hard_sigmoid():
        output, leaves = entry.call(model, dtype, seed)
        loss_of(output).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Result([t.detach().clone() for t in tensors(output)], [leaf.grad for leaf in leaves], found)


def errors(actual: Result, expected: Result) -> dict[str, float]:
    """Relative errors in the Euclidean norm, by name.

    A gradient that is zero but for rounding (a bias before a norm) is measured against a thousandth of the others.
    """
    assert len(actual.outputs) == len(expected.outputs)
    assert actual.parameters.keys() == expected.parameters.keys(), "other parameters have gradients"
    pairs = [(f"output {i}", *pair) for i, pair in enumerate(zip(actual.outputs, expected.outputs))]
    grads = [(f"gradient of input {i}", *pair) for i, pair in enumerate(zip(actual.inputs, expected.inputs))]
    grads = [(name, a, b) for name, a, b in grads if a is not None or b is not None]
    grads += [(f"gradient of {n}", actual.parameters[n], expected.parameters[n]) for n in expected.parameters]
    sizes = [b.double().norm().item() for _, _, b in grads]
    floor = 1e-3 * math.sqrt(sum(s * s for s in sizes) / max(len(sizes), 1))
    found = {}
    for name, a, b in [*pairs, *grads]:
        assert a.shape == b.shape and a.dtype == b.dtype, f"{name}: {a.dtype} {a.shape}, expected {b.dtype} {b.shape}"
        difference = (a.double() - b.double()).norm().item()
        size = max(b.double().norm().item(), floor if name.startswith("gradient") else 0.0)
        found[name] = difference / size if size else (0.0 if difference == 0 else math.inf)
        if not math.isfinite(found[name]):
            found[name] = math.inf
    return found
