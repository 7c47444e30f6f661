"""AdamW against the paper: all combinations of options over 200 steps, torch's own, and numbers worked out by hand.

What is compared with stands in _trajectories.py, how it is compared in _runs.py.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from _runs import INNER, OUTER, Run, backends, name_of
from _trajectories import BF16, F32, F64, philox, product, random16
from torch import nn

import dlkernels as dk
from dlkernels.reference._rounding import random_bits
from dlkernels.testing import assert_within_budget

BACKENDS = backends()
TORCHS = product({"amsgrad": (False, True), "maximize": (False, True), "weight_decay": (0.0, 0.1)})


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# Every combination ----------------------------------------------------------------------------------------------------


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("outer", OUTER, ids=name_of)
def test_every_combination(outer: dict[str, Any]) -> None:
    """200 steps of all options of an optimizer times all options of a group times all dtypes."""
    for i, inner in enumerate(INNER):
        Run("adamw", outer | inner, "cpp", shift=i % 2).check()


@pytest.mark.parametrize("outer", OUTER, ids=name_of)
def test_every_combination_in_the_reference(outer: dict[str, Any]) -> None:
    """A few steps: all options of an optimizer, each with other groups; dtypes in turn."""
    for i, inner in enumerate(INNER):
        Run(
            "adamw", outer | inner, "reference", steps=3, shift=i + OUTER.index(outer), rotate=True, num_groups=8
        ).check()


@pytest.mark.parametrize("rounds", [False, True])
def test_all_groups_in_the_reference(rounds: bool) -> None:
    """All options of a group times all dtypes, and moments of every kind."""
    for i, (master, state) in enumerate([(False, None), (True, None), (False, F32), (True, BF16)]):
        config = {"master_weights": master, "state_dtype": state, "stochastic_rounding": rounds} | INNER[
            (5 * i + 3) % 16
        ]
        Run("adamw", config, "reference", steps=3, shift=i).check()


@pytest.mark.parametrize("outer", OUTER[1::4], ids=name_of)
def test_200_steps_in_the_reference(outer: dict[str, Any]) -> None:
    Run("adamw", outer | INNER[-1], "reference", rotate=True, num_groups=5, shift=OUTER.index(outer)).check()


@pytest.mark.parametrize("outer", OUTER, ids=name_of)
def test_triton(outer: dict[str, Any]) -> None:
    if len(BACKENDS) < 3:
        pytest.skip("by design: the kernels of GPUs run in the interpreter's own test run")
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's, of lanes behind the last element
    inner = INNER[OUTER.index(outer) % len(INNER)]
    Run("adamw", outer | inner, "triton", steps=3, rotate=True, num_groups=6, shift=OUTER.index(outer)).check()


# torch's own ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("options", TORCHS, ids=name_of)
def test_torchs(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """float64's way, no further from it than torch.optim.AdamW in the dtype; with a loss of the parameters."""

    def way(kind: type, dtype: torch.dtype, more: dict[str, Any]) -> torch.Tensor:
        p = nn.Parameter(torch.linspace(-1, 2, 37, dtype=torch.float64).to(dtype))
        optimizer = kind([p], lr=1e-2, **options, **more)
        for i in range(steps):
            p.grad = ((p.detach().double() - 0.7) * (0.5 + torch.arange(37) % 5) * (-1) ** (i // 20)).to(dtype)
            optimizer.step()
        return p.detach()

    steps = 200 if dtype in (F32, F64) else 5
    exact = way(torch.optim.AdamW, F64, {"foreach": False})
    eager = way(torch.optim.AdamW, dtype, {"foreach": False}) if dtype != F64 else None
    with dk.backend(backend):
        actual = way(dk.optim.AdamW, dtype, {})
    if dtype == F64:  # as exact as what it is compared with
        assert (actual - exact).norm() <= 1e-13 * exact.norm()
    else:
        assert_within_budget(actual, exact, eager, what="theta")


# By hand --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize(
    ("decoupling", "weight_decay", "expected"),
    [("schedule", 0.01, (0.989000000005, 0.9839218315)), ("lr", 0.01, (0.998990000005, 0.9988518365))],
)
def test_known_numbers(decoupling: str, weight_decay: float, expected: tuple[float, float], backend: str) -> None:
    """theta 1, lr 1e-3 then half of it, gradients 2 and -1, the paper's decay and torch's."""
    p = nn.Parameter(torch.ones(1, dtype=F64))
    optimizer = dk.optim.AdamW([p], lr=1e-3, weight_decay=weight_decay, decoupling=decoupling)
    with dk.backend(backend):
        for lr, grad, right in zip((1e-3, 5e-4), (2.0, -1.0), expected, strict=True):
            optimizer.param_groups[0]["lr"] = lr
            p.grad = torch.full((1,), grad, dtype=F64)
            optimizer.step()
            assert abs(p.item() - right) <= 6e-11, (p.item(), right)  # the numbers have 10 digits


def test_philox_known_answers() -> None:
    """The authors' vectors, for the generator that the tests judge by."""
    ones = 0xFFFFFFFF
    for counter, key, expected in (
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
         (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):  # fmt: skip
        assert tuple(int(x) for x in philox([np.array(c) for c in counter], key)) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_random_bits_of_the_reference(seed: int) -> None:
    """Far elements, far steps, late parameters, every stream."""
    element = torch.tensor([0, 1, 7, 8, 9, 4097, 2**31 + 3, 2**32 - 1, 2**35 + 5, 2**36 + 2])
    for number, step, stream in ((0, 1, 0), (3, 2**24, 1), (2**20, 2**31 + 1, 2)):
        expected = random16(seed, element.numpy(), number, step, stream)
        actual = random_bits(element, number, step, stream, seed)
        assert actual.tolist() == expected.tolist()
