"""SGDW against the paper: all combinations of options over 200 steps, torch's own, and numbers worked out by hand.

What is compared with stands in _trajectories.py, how it is compared in _runs.py.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from _runs import INNER, OUTER, Run, backends, name_of
from _trajectories import BF16, F32, F64, product
from torch import nn

import dlkernels as dk
from dlkernels.testing import assert_within_budget

BACKENDS = backends()
TORCHS = [
    o
    for o in product({"momentum": (0.0, 0.9), "nesterov": (False, True), "maximize": (False, True)})
    if o["momentum"] or not o["nesterov"]
]


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
        Run("sgdw", outer | inner, "cpp", shift=i % 2).check()


@pytest.mark.parametrize("outer", OUTER, ids=name_of)
def test_every_combination_in_the_reference(outer: dict[str, Any]) -> None:
    """A few steps: all options of an optimizer, each with other groups; dtypes in turn."""
    for i, inner in enumerate(INNER):
        Run(
            "sgdw", outer | inner, "reference", steps=3, shift=i + OUTER.index(outer), rotate=True, num_groups=8
        ).check()


@pytest.mark.parametrize("rounds", [False, True])
def test_all_groups_in_the_reference(rounds: bool) -> None:
    """All options of a group times all dtypes, and moments of every kind."""
    for i, (master, state) in enumerate([(False, None), (True, None), (False, F32), (True, BF16)]):
        config = {"master_weights": master, "state_dtype": state, "stochastic_rounding": rounds} | INNER[
            (5 * i + 3) % 16
        ]
        Run("sgdw", config, "reference", steps=3, shift=i).check()


@pytest.mark.parametrize("outer", OUTER[1::4], ids=name_of)
def test_200_steps_in_the_reference(outer: dict[str, Any]) -> None:
    Run("sgdw", outer | INNER[-1], "reference", rotate=True, num_groups=5, shift=OUTER.index(outer)).check()


@pytest.mark.parametrize("outer", OUTER, ids=name_of)
def test_triton(outer: dict[str, Any]) -> None:
    if len(BACKENDS) < 3:
        pytest.skip("by design: the kernels of GPUs run in the interpreter's own test run")
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's, of lanes behind the last element
    inner = INNER[OUTER.index(outer) % len(INNER)]
    Run("sgdw", outer | inner, "triton", steps=3, rotate=True, num_groups=6, shift=OUTER.index(outer)).check()


# torch's own ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("options", TORCHS, ids=name_of)
def test_torchs(options: dict[str, Any], dtype: torch.dtype, backend: str) -> None:
    """Without decay, SGD: float64's way, no further from it than torch.optim.SGD in the dtype; with a changing lr."""

    def way(kind: type, dtype: torch.dtype, more: dict[str, Any]) -> torch.Tensor:
        p = nn.Parameter(torch.linspace(-1, 2, 37, dtype=torch.float64).to(dtype))
        optimizer = kind([p], lr=1e-2, **options, **more)
        for i in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + i % 7)
            p.grad = ((p.detach().double() - 0.7) * (0.5 + torch.arange(37) % 5)).to(dtype)
            if options["maximize"]:
                p.grad.neg_()
            optimizer.step()
        return p.detach()

    steps = 200 if dtype in (F32, F64) else 5
    exact = way(torch.optim.SGD, F64, {"foreach": False})
    eager = way(torch.optim.SGD, dtype, {"foreach": False}) if dtype != F64 else None
    with dk.backend(backend):
        actual = way(dk.optim.SGDW, dtype, {"momentum_scaling": "gradient"})
    if dtype == F64:  # as exact as what it is compared with
        assert (actual - exact).norm() <= 1e-13 * exact.norm()
    else:
        assert_within_budget(actual, exact, eager, what="theta")


# By hand --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize(("momentum_scaling", "expected"), [("paper", (0.79, 0.50605)), ("gradient", (0.79, 0.59605))])
def test_known_numbers(momentum_scaling: str, expected: tuple[float, float], backend: str) -> None:
    """theta 1, lr 0.1 then half of it, gradients 2 and 2; merging the paper's two algorithms would give others."""
    slide = (0.789, 0.5037605)
    p = nn.Parameter(torch.ones(1, dtype=F64))
    optimizer = dk.optim.SGDW([p], lr=0.1, weight_decay=0.01, momentum_scaling=momentum_scaling)
    with dk.backend(backend):
        for lr, right, wrong in zip((0.1, 0.05), expected, slide, strict=True):
            optimizer.param_groups[0]["lr"] = lr
            p.grad = torch.full((1,), 2.0, dtype=F64)
            optimizer.step()
            assert abs(p.item() - right) <= 1e-14, (p.item(), right)
            assert abs(p.item() - wrong) >= 5e-4


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_without_momentum_without_state(backend: str) -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = dk.optim.SGDW([p], lr=0.5, momentum=0.0)
    with dk.backend(backend):
        optimizer.step()
    assert p.tolist() == [0.5] * 3
    assert optimizer.state_dict()["state"].get(0, {}) == {}
