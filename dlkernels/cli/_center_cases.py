"""The center-loss family that `check` and `profile` run: one line per case, and the modules' training step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dlkernels as dk

from . import _eager_centers
from ._budget import Sample

MODULES = {"center_loss": "CenterLoss", "sparse_center_loss": "SparseCenterLoss", "island_loss": "IslandLoss"}
UPDATE = "update_centers_"


@dataclass(frozen=True)
class CenterCase:
    """One call `op(x, labels, centers[, attention], **options)` and its eager counterpart.

    Of `extras`: "ignored" leaves a fifth of the rows out, "centers" gives the centers a gradient, "float32" keeps them
    in float32 beside half-precision features. The update returns the centers as it leaves them: no gradients there.
    """

    op: str
    shape: tuple[int, int]
    classes: int
    attention: str = ""  # "", "weights" or "logits"
    extras: tuple[str, ...] = ()
    layout: str = "contiguous"  # contiguous or transposed
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        words = ["x".join(map(str, self.shape)), f"K={self.classes}", self.attention, *self.extras]
        words += [] if self.layout == "contiguous" else [self.layout]
        return " ".join([*(w for w in words if w), *(f"{k}={v}" for k, v in self.options.items())])

    def tensors(self, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Features, labels, centers and attention."""
        generator = torch.Generator().manual_seed(seed)
        randn = functools.partial(torch.randn, generator=generator)
        x = randn(self.shape)
        x = x.mT.contiguous().mT if self.layout == "transposed" else x
        y = torch.randint(self.classes, self.shape[:1], generator=generator)
        if "ignored" in self.extras:
            draw = torch.rand(y.shape, generator=generator)
            y = torch.where(draw < 0.2, torch.where(draw < 0.1, -100, -1), y)
        c = randn(self.classes, self.shape[1])
        a = None
        if self.attention == "weights":
            a = torch.rand(self.shape, generator=generator)
        elif self.attention:
            a = 2 * randn(self.shape)
        c = c.to(device, torch.float32 if "float32" in self.extras else dtype)
        return x.to(device, dtype), y.to(device), c, None if a is None else a.to(device, dtype)

    def sample(self, dtype: torch.dtype, device: str, seed: int) -> Sample:
        """One draw, bound to the fused and to the eager function, and a gradient for unreduced losses."""
        x, y, c, a = self.tensors(dtype, device, seed)
        grad_output = torch.rand(self.shape[0], generator=torch.Generator().manual_seed(seed)).to(device, dtype)
        options = dict(self.options)
        if "ignored" in self.extras:
            options["ignore_index"] = -100
        if self.attention == "logits":
            options["attention_logits"] = True
        inputs = {"attention": a, "centers": c if "centers" in self.extras or self.op == UPDATE else None}
        inputs = {name: t for name, t in inputs.items() if t is not None}

        def bound(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(x: Tensor, *parameters: Tensor) -> Tensor:
                given = dict(zip(inputs, parameters, strict=True))
                if self.op == UPDATE:
                    return function(given.pop("centers").detach().clone(), x, y, **given, **options)
                # Without a gradient they are no input, and are cast here for the run in float64.
                fixed = {} if "centers" in given else {"centers": c.double() if x.dtype == torch.float64 else c}
                return function(x, y, **fixed, **given, **options)

            return call

        fused, eager = bound(getattr(dk, self.op)), bound(getattr(_eager_centers, self.op))
        return Sample(fused, eager, x, grad_output, tuple(inputs.values()))


def training_step(
    op: str, shape: tuple[int, int], classes: int, reduction: str, dtype: torch.dtype, device: str
) -> tuple[str, Sample]:
    """A module's call while it trains, the loss and its centers moved by the paper's rule, and its name."""
    attention = "weights" if op == "sparse_center_loss" else ""
    case = CenterCase(op, shape, classes, attention, ("float32",), options={"reduction": reduction})
    x, y, c, a = case.tensors(dtype, device, seed=0)
    module = getattr(dk.nn, MODULES[op])(classes, shape[1], reduction=reduction, device=device)
    module.centers.copy_(c)
    loss = getattr(_eager_centers, op)
    island = {"island_weight": module.island_weight} if op == "island_loss" else {}

    def eager(x: Tensor, *a: Tensor) -> Tensor:
        out = loss(x, y, c, *a, reduction=reduction, **island)
        _eager_centers.update_centers_(c, x, y, module.alpha, *a, **island)
        return out

    parameters = () if a is None else (a,)
    name = f"{'x'.join(map(str, shape))} K={classes} reduction={reduction} with the centers' update"
    return name, Sample(lambda x, *a: module(x, y, *a), eager, x, parameters=parameters)


def _case(
    op: str, shape: tuple[int, int], classes: int, *extras: str, attention: str = "", layout: str = "contiguous",
    **options: Any,
) -> CenterCase:  # fmt: skip
    return CenterCase(op, shape, classes, attention, extras, layout, options)


_center = functools.partial(_case, "center_loss")
_sparse = functools.partial(_case, "sparse_center_loss")
_island = functools.partial(_case, "island_loss")
_update = functools.partial(_case, UPDATE)

CASES: list[CenterCase] = [
    _center((257, 33), 10),
    _center((257, 33), 10, "ignored", "centers"),
    _center((257, 33), 10, "ignored", "float32", reduction="sum"),
    _center((65, 130), 7, "centers", "float32", layout="transposed", reduction="none"),
    _center((33, 40), 700, "centers", reduction="sum"),
    _center((33, 40), 700, "ignored", reduction="none"),
    _center((129, 2), 10, "centers"),
    _center((0, 7), 3, "centers", reduction="sum"),
    _sparse((129, 33), 10, attention="weights"),
    _sparse((129, 33), 10, "ignored", "centers", attention="weights", reduction="sum"),
    _sparse((129, 33), 10, "float32", attention="logits"),
    _sparse((65, 40), 7, "ignored", "centers", attention="logits", reduction="none"),
    _island((129, 33), 10, "centers"),
    _island((129, 33), 10, "ignored", "centers", "float32", island_weight=0.5, reduction="sum"),
    _island((65, 40), 131, "ignored", "centers", island_weight=0.01, reduction="none"),
    _island((33, 20), 1, "centers"),
    _update((257, 33), 10),
    _update((257, 33), 10, "ignored", "float32", alpha=0.9),
    _update((257, 33), 1, "float32"),
    _update((33, 40), 700, "float32", alpha=1.0, ema=True),
    _update((129, 33), 10, "ignored", "float32", attention="weights"),
    _update((129, 33), 10, "float32", attention="logits"),
    _update((129, 33), 10, "float32", island_weight=10.0),
    _update((0, 7), 3),
]
