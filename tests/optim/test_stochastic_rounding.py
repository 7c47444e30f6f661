"""Rounding at random: unbiased, independent, and good for what it is there for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from _helpers import BF16, F32, backend_fixture
from torch import Tensor, nn

import dlkernels as dk
from dlkernels.testing import assert_bitwise

backend = backend_fixture

N = 100_003  # elements: not a multiple of anything
SIGMAS = 5


def rounded_up(number: int, step: int, part: float, seed: int = 0, n: int = N, stream: int = 0) -> Tensor:
    """Which of n elements go up when each is `part` of the way from a bfloat16 number to the next one.

    By an optimizer that is at parameter `number` and step `step`. A step of SGDW gives the parameter (stream 0) or its
    momentum (stream 1) a value between two bfloat16 numbers, 1 and 1 + 2^-7.
    """
    params = [nn.Parameter(torch.ones(1, dtype=BF16)) for _ in range(number)] + [
        nn.Parameter(torch.ones(n, dtype=BF16))
    ]
    momentum = 0.5 if stream else 0.0
    optimizer = dk.optim.SGDW(params, lr=0.0, momentum=momentum, stochastic_rounding=True, seed=seed,
                              momentum_scaling="gradient")  # fmt: skip
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # makes the state
    if step > 1:
        for p in params:
            optimizer.state[p]["step"].fill_(step - 1)
    if stream:
        optimizer.state[params[-1]]["momentum_buffer"].fill_(2.0)
        params[-1].grad.fill_(part / 128)  # bfloat16 numbers, if part is one
        optimizer.step()
        result = optimizer.state[params[-1]]["momentum_buffer"]
    else:
        params[-1].data.fill_(1.0)
        params[-1].grad.fill_(-1.0)
        optimizer.param_groups[0]["lr"] = part / 128
        optimizer.step()
        result = params[-1].detach()
    up = result.double() == 1 + 1 / 128
    assert bool((up | (result == 1)).all())
    return up


def assert_fair(up: Tensor, part: float) -> None:
    deviation = math.sqrt(part * (1 - part) / up.numel())
    assert abs(up.double().mean().item() - part) <= SIGMAS * deviation


@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize("part", [1 / 64, 0.25, 0.5, 0.8125, 63 / 64])
def test_unbiased(part: float, stream: int, backend: str) -> None:
    """Up as often as the value is far from the lower neighbour."""
    for number, step, seed in ((0, 2, 0), (3, 2, 0), (0, 1000, 2**40 + 1)):
        assert_fair(rounded_up(number, step, part, seed, stream=stream), part)


@pytest.mark.parametrize("stream", [0, 1])
def test_what_is_a_bfloat16_number_stays(stream: int, backend: str) -> None:
    assert not rounded_up(0, 2, 0.0, stream=stream).any()


def test_negative_values_by_their_size(backend: str) -> None:
    """Away from zero and towards it: no drift in one direction, either sign."""
    values = torch.where(torch.arange(N) % 2 == 0, 1.0, -1.0).to(BF16)
    p = nn.Parameter(values.clone())
    optimizer = dk.optim.SGDW([p], lr=0.25 / 128, momentum=0.0, stochastic_rounding=True)
    p.grad = -values.sign()
    optimizer.step()
    moved = p.detach() != values
    assert bool((p.detach()[moved].abs() == 1 + 1 / 128).all())
    assert_fair(moved[::2], 0.25)
    assert_fair(moved[1::2], 0.25)


def assert_independent(a: Tensor, b: Tensor) -> None:
    """Of two fair coins that they agree half of the time."""
    assert abs((a == b).double().mean().item() - 0.5) <= SIGMAS * 0.5 / math.sqrt(a.numel())


def test_independent(backend: str) -> None:
    """Of neighbours in memory, of those in one random word or block of words; of steps, parameters, seeds."""
    first = rounded_up(0, 2, 0.5)
    for lag in (1, 2, 3, 4, 7, 8, 16, 64, 4096):
        assert_independent(first[lag:], first[:-lag])
    for other in (
        rounded_up(0, 3, 0.5),
        rounded_up(1, 2, 0.5),
        rounded_up(0, 2, 0.5, seed=1),
        rounded_up(0, 2, 0.5, seed=2**32),
        rounded_up(0, 2, 0.5, stream=1),
    ):
        assert_independent(first, other)
    assert torch.equal(first, rounded_up(0, 2, 0.5))  # and the same when asked again
    long = rounded_up(0, 2, 0.5, n=2 * N)
    assert torch.equal(first, long[:N])  # of the element, not of the tensor's size


@pytest.mark.parametrize("kind", [dk.optim.AdamW, dk.optim.SGDW])
def test_training_goes_on_where_rounding_to_nearest_stalls(kind: Any, backend: str) -> None:
    """Steps of a hundredth of the distance between bfloat16 numbers, 400 of them."""
    n, lr = 4099, 1 / 128 / 100

    def mean(dtype: torch.dtype, rounds: bool) -> float:
        p = nn.Parameter(torch.full((n,), 1.5, dtype=dtype))
        options = {"weight_decay": 0.0, "stochastic_rounding": rounds, "state_dtype": F32}
        optimizer = kind([p], lr=lr, **options) if kind is dk.optim.AdamW else kind([p], lr=lr, momentum=0.0, **options)
        p.grad = torch.ones_like(p)
        for _ in range(400):
            optimizer.step()
        return p.detach().double().mean().item()

    exact = mean(F32, False)
    assert abs(exact - (1.5 - 400 * lr)) < 1e-4
    assert mean(BF16, False) == 1.5
    deviation = math.sqrt(400 * 0.01 * 0.99) / 128 / math.sqrt(n)
    assert abs(mean(BF16, True) - exact) <= SIGMAS * deviation + 1e-5


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("shape", [(N,), (211, 97), (7,), (0,)], ids=str)
def test_backends_round_alike(shape: tuple[int, ...]) -> None:
    """The same bits of the same values, element by element: a step of zero length, of moments that are exact."""
    results = []
    for name in ("cpp", "reference"):
        p = nn.Parameter(torch.zeros(shape, dtype=BF16))
        optimizer = dk.optim.AdamW([p], lr=0.0, betas=(0.5, 0.0), weight_decay=0.0, stochastic_rounding=True, seed=3)
        with dk.backend(name):
            for step in range(3):
                p.grad = (torch.arange(p.numel()) * 37 % 129 / 128 + step).view(shape).to(BF16)
                optimizer.step()
        results.append(optimizer.state[p])
    for key in ("exp_avg", "exp_avg_sq"):
        assert_bitwise(results[0][key], results[1][key], key)
