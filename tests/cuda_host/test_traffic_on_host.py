"""Bytes of global memory that CUDA C++ moves from the public function on: what README says of it.

`python -m pytest tests/cuda_host/test_traffic_on_host.py -s` prints the table's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import dlkernels as dk

FLOAT, HALF = torch.float32, torch.bfloat16


class Counted:
    """Bytes and launches of what ran inside `count`."""

    total = launches = 0


@contextmanager
def count(twin: Any) -> Iterator[Counted]:
    counted = Counted()
    twin.launches()
    with twin.traffic() as moved:
        yield counted
    counted.total = moved["all"].loaded + moved["all"].stored
    counted.launches = len(twin.launches())


def parameter(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def group_norm(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    w, b = parameter(32), parameter(32)
    return dk.group_norm(x, 8, w, b, activation="silu"), [x, w, b]


def squeeze_excite(x: Tensor) -> tuple[Tensor, list[Tensor]]:
    w1, w2 = parameter(4, 64), parameter(64, 4)
    return dk.squeeze_excite(x, w1, None, w2, None), [x, w1, w2]


def weight_norm(v: Tensor) -> tuple[Tensor, list[Tensor]]:
    g = torch.rand(v.shape[0], 1).to(v.dtype).requires_grad_()
    return dk.weight_norm(v, g, 0), [v, g]


# (layer, shape, channels_last, dtype, bytes over the minimum of two passes forward and three backward, launches)
LAYERS: list[tuple[Callable[[Tensor], Any], tuple[int, ...], bool, torch.dtype, float, int]] = [
    (group_norm, (2, 32, 24, 24), False, FLOAT, 1.053, 3),
    (group_norm, (2, 32, 24, 24), True, FLOAT, 1.016, 3),
    (group_norm, (2, 32, 24, 24), False, HALF, 1.107, 3),
    (group_norm, (2, 32, 24, 24), True, HALF, 1.033, 3),
    (squeeze_excite, (2, 64, 24, 24), False, FLOAT, 1.008, 2),
    (squeeze_excite, (2, 64, 24, 24), True, FLOAT, 1.010, 2),
    (squeeze_excite, (2, 64, 24, 24), False, HALF, 1.015, 2),
    (squeeze_excite, (2, 64, 24, 24), True, HALF, 1.017, 2),
    (weight_norm, (24, 3000), False, FLOAT, 1.000, 2),
    (weight_norm, (24, 3000), False, HALF, 1.001, 2),
]


def holds(what: str, counted: Counted, minimum: float, ratio: float, launches: int, digits: int = 3) -> None:
    """`ratio` is the table's figure, true to one of its last `digits`, as the count moves with addresses a little."""
    print(f"{what}: {counted.total / minimum:.4f} of the minimum, {counted.launches} launches")
    assert 1.0 <= counted.total / minimum < ratio + 10**-digits
    assert counted.launches == launches


@pytest.mark.parametrize("case", LAYERS, ids=lambda c: f"{c[0].__name__}-{'last' if c[2] else 'first'}-{c[3]}")
def test_layers(case: Any, twin: Any) -> None:
    layer, shape, last, dtype, ratio, launches = case
    x = torch.randn(shape).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    with count(twin) as counted:
        y, wanted = layer(x)
        torch.autograd.grad(y, wanted, torch.randn_like(y))
    holds(layer.__name__, counted, 5 * x.nbytes, ratio, launches)


@pytest.mark.parametrize("dtype", [FLOAT, HALF], ids=str)
def test_sigmoid_focal_loss(dtype: torch.dtype, twin: Any) -> None:
    x, t = torch.randn(40000).to(dtype).requires_grad_(), (torch.rand(40000) > 0.5).to(dtype)
    with count(twin) as counted:
        dk.sigmoid_focal_loss(x, t, reduction="mean").backward()
    holds("sigmoid focal", counted, 3 * x.nbytes, 1.022, 2)


@pytest.mark.parametrize(("dtype", "ratio"), [(FLOAT, 1.62), (HALF, 2.09)], ids=str)
def test_center_loss_with_update(dtype: torch.dtype, ratio: float, twin: Any) -> None:
    """The features are read again by the update, from L2; a center by every row of its class, from the caches."""
    x, labels = torch.randn(520, 512).to(dtype).requires_grad_(), torch.arange(520) % 100
    loss = dk.nn.CenterLoss(100, 512)
    with count(twin) as counted:
        loss(x, labels).backward()
    holds("center loss with update", counted, 3 * x.nbytes + 2 * 100 * 512 * 4, ratio, 4, digits=2)


# (optimizer, dtype, bytes per parameter, launches)
STEPS: list[tuple[Callable[..., Any], torch.dtype, int, int]] = [
    (lambda p: dk.optim.AdamW(p), FLOAT, 28, 1),
    (lambda p: dk.optim.AdamW(p, max_grad_norm=1.0), FLOAT, 32, 2),
    (lambda p: dk.optim.AdamW(p), HALF, 14, 1),
    (lambda p: dk.optim.AdamW(p, stochastic_rounding=True), HALF, 14, 1),
    (lambda p: dk.optim.AdamW(p, master_weights=True), HALF, 28, 1),
    (lambda p: dk.optim.SGDW(p, lr=0.1, momentum=0.9), FLOAT, 20, 1),
]


@pytest.mark.parametrize("case", STEPS, ids=["adamw", "clipped", "bf16", "rounded", "master", "sgdw"])
def test_steps(case: Any, twin: Any) -> None:
    make, dtype, per_parameter, launches = case
    p = torch.randn(40000).to(dtype).requires_grad_()
    p.grad = torch.randn_like(p)
    optimizer = make([p])
    optimizer.step()
    with count(twin) as counted:
        optimizer.step()
    holds("step", counted, per_parameter * p.numel(), 1.000, launches)
