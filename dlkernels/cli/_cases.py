"""The losses that `check` runs: one line per case. A new one adds its lines to CASES and its eager form to `_eager`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

import dlkernels as dk

from . import _eager
from ._budget import Sample

Shape = tuple[int, ...]
Targets = Callable[[Shape, Generator], Tensor]


@dataclass(frozen=True)
class Case:
    """One call of a public function `op(x, target, **options)` and its eager counterpart."""

    op: str
    name: str
    shape: Shape
    targets: Targets
    options: dict[str, Any] = field(default_factory=dict)
    layout: str = "contiguous"  # contiguous, channels_last or transposed

    def sample(self, dtype: torch.dtype, device: str, seed: int) -> Sample:
        """One draw: logits, targets and a gradient for unreduced losses, bound to the fused and the eager function."""
        generator = torch.Generator().manual_seed(seed)
        x = (3.0 * torch.randn(self.shape, generator=generator)).to(device, dtype)
        if self.layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        elif self.layout == "transposed":
            x = x.mT.contiguous().mT
        target = self.targets(self.shape, generator)
        target = target.to(device, dtype) if target.is_floating_point() else target.to(device)
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        rows = self.shape if self.op.startswith("sigmoid") else self.shape[:1] + self.shape[2:]
        rows = self.shape[1:] if self.op == "gccs_loss" else rows  # one loss per class
        grad_output = torch.rand(rows, generator=generator).to(device, dtype)
        fused, eager = getattr(dk, self.op), getattr(_eager, self.op)
        return Sample(
            lambda x: fused(x, target, **options), lambda x: eager(x, target, **options), x, grad_output
        )  # fmt: skip


# Targets --------------------------------------------------------------------------------------------------------------


def binary(shape: Shape, generator: Generator) -> Tensor:
    return (torch.rand(shape, generator=generator) < 0.25).float()


def soft(shape: Shape, generator: Generator) -> Tensor:
    return torch.rand(shape, generator=generator)


def binary_integers(shape: Shape, generator: Generator) -> Tensor:
    """0, 1 and some ignored elements."""
    y = binary(shape, generator).long()
    return torch.where(torch.rand(shape, generator=generator) < 0.1, -100, y)


def binary_bool(shape: Shape, generator: Generator) -> Tensor:
    return binary(shape, generator).bool()


def detection_classes(shape: Shape, generator: Generator) -> Tensor:
    """Class indices of anchors: most are background (-1), some ignored."""
    rows = shape[:-1]
    y = torch.randint(0, shape[-1], rows, generator=generator)
    y = torch.where(torch.rand(rows, generator=generator) < 0.7, -1, y)
    return torch.where(torch.rand(rows, generator=generator) < 0.1, -100, y)


def indices(shape: Shape, generator: Generator) -> Tensor:
    return torch.randint(0, shape[1], shape[:1] + shape[2:], generator=generator)


def indices_ignoring(shape: Shape, generator: Generator) -> Tensor:
    y = indices(shape, generator)
    return torch.where(torch.rand(y.shape, generator=generator) < 0.2, -100, y)


def probabilities(shape: Shape, generator: Generator) -> Tensor:
    return torch.softmax(torch.randn(shape, generator=generator), 1)


IGNORING = (binary_integers, detection_classes, indices_ignoring)


# Cases ----------------------------------------------------------------------------------------------------------------


def _weights(classes: int) -> Tensor:
    return 0.5 + torch.arange(classes) % 7 / 4.0


def _case(op: str, shape: Shape, targets: Targets, layout: str = "contiguous", **options: Any) -> Case:
    words = ["x".join(map(str, shape)), targets.__name__]
    words += [] if layout == "contiguous" else [layout]
    words += [f"{k}=(C,)" if isinstance(v, Tensor) else f"{k}={v}" for k, v in options.items()]
    if targets in IGNORING:
        options["ignore_index"] = -100
    return Case(op, " ".join(words), shape, targets, options, layout)


_sigmoid = functools.partial(_case, "sigmoid_focal_loss")
_focal = functools.partial(_case, "softmax_focal_loss")
_cross_entropy = functools.partial(_case, "cross_entropy")
_gccs = functools.partial(_case, "gccs_loss")

CASES: list[Case] = [
    _sigmoid((4099,), binary, reduction="none"),
    _sigmoid((4099,), binary, reduction="mean", gamma=1.5),
    _sigmoid((257, 91), binary, reduction="sum", normalizer=37.0),
    _sigmoid((257, 91), soft, reduction="none", alpha=None),
    _sigmoid((257, 91), soft, reduction="mean"),
    _sigmoid((257, 91), binary_bool, reduction="none", gamma=0.0),
    _sigmoid((257, 91), binary_integers, reduction="mean"),
    _sigmoid((2, 301, 80), detection_classes, reduction="sum", normalizer=12.0),
    _sigmoid((2, 301, 80), detection_classes, reduction="none"),
    _sigmoid((2, 5, 17, 13), binary, "channels_last", reduction="none"),
    _sigmoid((33, 65), binary, "transposed", reduction="mean", gamma=0.5),
    _sigmoid((0, 7), binary, reduction="sum"),
    _focal((129, 10), indices, reduction="mean"),
    _focal((129, 10), indices, reduction="none", alpha=_weights(10)),
    _focal((129, 10), indices_ignoring, reduction="mean", alpha=0.25, gamma=0.5),
    _focal((33, 1000), indices, reduction="sum", normalizer=8.0),
    _focal((5, 32003), indices, reduction="none"),
    _focal((33, 1000), indices, reduction="mean", label_smoothing=0.1),
    _focal((65, 21), probabilities, reduction="none", gamma=1.5),
    _focal((2, 21, 16, 15), indices_ignoring, reduction="mean", alpha=_weights(21)),
    _focal((2, 21, 16, 15), indices_ignoring, "channels_last", reduction="none"),
    _focal((70, 33), indices, "transposed", reduction="mean"),
    _focal((0, 7), indices, reduction="sum"),
    _cross_entropy((129, 10), indices, reduction="mean"),
    _cross_entropy((129, 10), indices_ignoring, reduction="none", weight=_weights(10)),
    _cross_entropy((33, 1000), indices_ignoring, reduction="mean", weight=_weights(1000)),
    _cross_entropy((5, 32003), indices, reduction="sum", normalizer=5.0),
    _cross_entropy((33, 1000), indices, reduction="mean", label_smoothing=0.1),
    _cross_entropy((65, 21), probabilities, reduction="mean", weight=_weights(21)),
    _cross_entropy((2, 21, 16, 15), indices_ignoring, reduction="mean"),
    _cross_entropy((2, 21, 16, 15), indices_ignoring, "channels_last", reduction="none"),
    _cross_entropy((70, 33), indices, "transposed", reduction="mean"),
    _cross_entropy((0, 7), indices, reduction="sum"),
    _gccs((257, 10), indices),
    _gccs((257, 10), indices_ignoring, reduction="mean", target_mean=7.0, target_std=2.5),
    _gccs((257, 10), indices_ignoring, reduction="none", kurtosis_weight=0.25),
    _gccs((600, 131), indices, "transposed", reduction="none"),
    _gccs((0, 7), indices, reduction="sum"),
]
