"""Tensors of other kinds, as parameters and gradients; parameters that modules exchange."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from _helpers import backend_fixture
from torch import nn

import dlkernels as dk

backend = backend_fixture
KINDS = pytest.mark.parametrize("kind", [dk.optim.AdamW, dk.optim.SGDW])


@KINDS
def test_modules_may_swap_their_parameters(kind: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With swap_tensors, as DTensors always are: it needs that nobody else holds what is behind a parameter."""
    model = nn.Linear(3, 3).half()
    optimizer = kind(model.parameters(), lr=0.5, state_dtype=torch.float32)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    weight = model.weight
    model.float()
    assert model.weight is weight and weight.dtype == torch.float32

    before = weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.all(weight < before - 0.1)
