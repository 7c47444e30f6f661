"""What the tests of hosts share: a model whose gradients are given, optimizers to compare with, the comparison.

The loss is linear in the parameters, so that two optimizers in one host get equal gradients whatever they make of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import dlkernels as dk
from dlkernels.testing import assert_within_budget

Make = Callable[..., torch.optim.Optimizer]


class PlainSGDW(torch.optim.Optimizer):
    """The paper's algorithm 1, a line each."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["alpha"] = float(group["lr"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad, alpha=float(group["lr"]))
                eta = float(group["lr"]) / group["alpha"]
                p.copy_(p * (1 - eta * group["weight_decay"]) - buffer)
        return loss


class Kind(NamedTuple):
    ours: Make
    plain: Make
    options: dict[str, Any]


KINDS = {
    "adamw": Kind(dk.optim.AdamW, torch.optim.AdamW, {"lr": 0.05}),
    "sgdw": Kind(dk.optim.SGDW, PlainSGDW, {"lr": 0.05, "weight_decay": 0.01}),
}

SHAPES = {"weight": (5, 3), "bias": (17,), "one": (1,), "scale": (), "tall": (3, 2, 3, 3)}


class Given(nn.Module):
    """Parameters p and the loss sum(p * g), whose gradients are the given g."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(7)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=draw).to(dtype)))

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        return sum((p * g).sum() for p, g in zip(self.parameters(), gradients, strict=True))

    def groups(self) -> list[dict[str, Any]]:
        """Two groups with different options."""
        first, *others = self.parameters()
        return [{"params": [first], "weight_decay": 0.0}, {"params": others, "lr": 0.03}]


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Those of one step, for every parameter of `Given`."""
    draw = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=draw).to(dtype) for shape in SHAPES.values()]


def backward(model: Given, step: int, factor: float = 1.0) -> Tensor:
    """Put the gradients of a step into the parameters."""
    for p in model.parameters():
        p.grad = None
    loss = model(gradients(step, next(model.parameters()).dtype))
    (loss * factor).backward()
    return loss


def train(model: Given, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def flat(model: nn.Module | Iterable[Tensor]) -> Tensor:
    """All parameters as one vector."""
    params = model.parameters() if isinstance(model, nn.Module) else model
    return torch.cat([p.detach().reshape(-1) for p in params])


def assert_trains_alike(kind: str, run: Callable[[Make, torch.dtype], Any], what: str = "parameters") -> Any:
    """One training with ours, with the plain optimizer, and with the plain one in float64.

    Args:
        kind: a key of KINDS.
        run: trains from the start with the given optimizer class and dtype; gives the model, or (model, ...).
        what: the name of the parameters in the message.

    Returns:
        What run gave with our optimizer and with the plain one.
    """
    ours, plain = run(KINDS[kind].ours, torch.float32), run(KINDS[kind].plain, torch.float32)
    exact = run(KINDS[kind].plain, torch.float64)
    first = [flat(result[0] if isinstance(result, tuple) else result) for result in (ours, exact, plain)]
    assert_within_budget(*first, what=f"{kind}: {what}")
    return ours, plain
