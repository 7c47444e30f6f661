"""Defaults that a program may set for torch, of devices and dtypes: they are for its own tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _helpers import made, same_bits
from _runs import backends

import dlkernels as dk
from dlkernels.testing import assert_bitwise

ALL = {"max_grad_norm": 1.0, "stochastic_rounding": True, "state_dtype": torch.float32, "ema_decay": 0.9}


@contextlib.contextmanager
def other_defaults() -> Iterator[None]:
    """A device that is not that of the parameters, and whose tensors have no values."""
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", [dk.optim.AdamW, dk.optim.SGDW])
@pytest.mark.parametrize("backend", backends())
def test_of_device_and_dtype(kind: Any, backend: str) -> None:
    def run() -> None:
        optimizer = kind(params, lr=0.1, **ALL)
        for step, values in enumerate(gradients):
            for p, g in zip(params, values, strict=True):
                p.grad = g.detach()
            optimizer.step()
            norms.append(optimizer.grad_norm)
            if step == 1:
                optimizer.load_state_dict(optimizer.state_dict())
        states.append(optimizer.state_dict()["state"])
        optimizer.swap_ema()

    gradients = [made(torch.bfloat16, seed=seed) for seed in range(1, 5)]
    results, norms, states = [], [], []
    for defaults in (contextlib.nullcontext, other_defaults):
        params = made(torch.bfloat16)
        with dk.backend(backend), defaults():
            run()
        results.append(params)
    for expected, p in zip(*results, strict=True):
        assert_bitwise(p.detach(), expected.detach())
    same_bits(states[1], states[0])
    for expected, norm in zip(norms[:4], norms[4:], strict=True):
        assert_bitwise(norm, expected)
