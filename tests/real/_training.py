"""What the tests of swapped models in use share: two reduced models, their training, the comparison."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from typing import Any

import torch
from _entry import Entry, loss_of
from _zoo import ZOO, image
from torch import Tensor, nn

import dlkernels as dk

# Squeeze-excite, stochastic depth and BatchNorm; GroupNorm, FiLM and dropout.
NETS = {"tv_efficientnet_b0": "squeeze_excite", "unet2d_scale_shift": "group_norm"}
LIMIT = 1e-9  # several steps of an optimizer, which divides by what may be small


def entry_of(name: str) -> Entry:
    """On batches that BatchNorm can be trained with: over two samples it makes chaos of rounding errors."""
    entry = ZOO[name]
    return replace(entry, inputs=image(64, batch=6)) if name == "tv_efficientnet_b0" else entry


def pair(name: str, dtype: torch.dtype = torch.float64) -> tuple[Entry, nn.Module, nn.Module]:
    """The entry, the model as it was, and its swapped copy."""
    importlib.import_module("_libraries")
    entry = entry_of(name)
    theirs = entry.make(dtype)
    ours = copy.deepcopy(theirs)
    report = dk.swap(ours)
    assert report.swapped
    return entry, theirs, ours


def loss(entry: Entry, model: nn.Module, seed: int, dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
    """Of a batch of its own; what draws starts from the same seed."""
    args, kwargs = entry.inputs(dtype, torch.Generator().manual_seed(seed))
    args[0].requires_grad_()  # for reentrant checkpoints around the first block
    torch.manual_seed(seed)
    return loss_of(model(*args, **kwargs, **options))


def train(entry: Entry, model: nn.Module, steps: int = 5, start: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """The losses of some steps of AdamW in train mode."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        value = loss(entry, model, 10 + step, dtype)
        value.backward()
        optimizer.step()
        losses.append(value.detach())
    return torch.stack(losses)


def assert_close(actual: Tensor, expected: Tensor, what: str = "result", limit: float = LIMIT) -> None:
    """Relative, in the Euclidean norm."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    error = (actual.detach() - expected.detach()).double().norm() / expected.detach().double().norm()
    assert error <= limit, f"{what}: relative error {error.item():.3g} > {limit:.3g}"
    assert expected.detach().double().norm() > 0, what


def gradients(model: nn.Module) -> Tensor:
    """All of them in one row."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
