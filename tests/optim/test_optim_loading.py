"""Loading what is not quite of the same kind: groups of torch's optimizers, hooks, tensors of another layout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from _helpers import backend_fixture, grads, made, train
from torch import nn
from torch.optim import Optimizer

import dlkernels as dk
from dlkernels.testing import assert_bitwise

backend = backend_fixture


@pytest.mark.parametrize(
    ("kind", "theirs"), [(dk.optim.AdamW, torch.optim.AdamW), (dk.optim.SGDW, torch.optim.SGD)], ids=["AdamW", "SGDW"]
)
def test_the_schedule_begins_where_the_optimizer_was_built(kind: Any, theirs: Any, backend: str) -> None:
    """Decay by the schedule, of groups that say nothing of where it began: torch's, saved in mid-schedule."""
    params = made()
    other = theirs(params, lr=0.1, weight_decay=0.5)
    train(other, params, range(2))
    other.param_groups[0]["lr"] = 0.05

    optimizer = kind(params, lr=0.1, weight_decay=0.5, decoupling="schedule")
    optimizer.load_state_dict(other.state_dict())
    optimizer.state.clear()
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, b in zip(params, before, strict=True):
        assert torch.allclose(p, b * (1 - 0.5 * 0.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [dk.optim.AdamW, dk.optim.SGDW])
@pytest.mark.parametrize("initial", [None, 0.2])
def test_decoupling_by_the_schedule_from_now_on(kind: Any, initial: float | None, backend: str) -> None:
    """It begins at the lr of now, or where a scheduler says that it did."""
    p = nn.Parameter(torch.ones(3))
    optimizer = kind([p], lr=0.1, weight_decay=0.5, decoupling="lr")
    optimizer.param_groups[0] |= {"decoupling": "schedule"} | ({"initial_lr": initial} if initial else {})
    p.grad = torch.zeros(3)
    optimizer.step()
    assert torch.allclose(p, torch.full((3,), 1 - 0.5 * 0.1 / (initial or 0.1)), rtol=1e-6)
    optimizer.param_groups[0]["lr"] = 0.0
    before = p.detach().clone()
    optimizer.step()
    assert_bitwise(p.detach(), before)


@pytest.mark.parametrize("kind", [dk.optim.AdamW, dk.optim.SGDW])
def test_hooks_that_change_what_is_loaded(kind: Any, backend: str) -> None:
    """As with torch's: a pre-hook may give another state_dict, and a post-hook sees, and changes, what was loaded."""
    name = kind._slots[0]
    one, other = (kind(made(torch.bfloat16), state_dtype=torch.float32) for _ in range(2))
    train(one, one.param_groups[0]["params"], range(2))
    expected = one.state_dict()["state"][0][name]

    def twice(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0][name] *= 2
        return {**state_dict, "state": {10 + i: state for i, state in state_dict["state"].items()}} | {
            "param_groups": [
                {**group, "params": [10 + i for i in group["params"]]} for group in state_dict["param_groups"]
            ]
        }

    def and_one_more(optimizer: Optimizer) -> None:
        state = next(iter(optimizer.state.values()))
        assert state[name].dtype == torch.float32
        state[name] = state[name] + 1

    other.register_load_state_dict_pre_hook(twice)
    other.register_load_state_dict_post_hook(and_one_more)
    for _ in range(2):
        other.load_state_dict(one.state_dict())
        assert_bitwise(other.state_dict()["state"][0][name], expected * 2 + 1)


@pytest.mark.parametrize("kind", [dk.optim.AdamW, dk.optim.SGDW])
def test_hooks_that_change_what_is_saved(kind: Any, backend: str) -> None:
    """They get counters of each parameter's own, and may give anything."""
    optimizer = kind(made(torch.bfloat16), stochastic_rounding=True)
    train(optimizer, optimizer.param_groups[0]["params"], range(2))

    def packed(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict["state"][0]["step"] += 5
        return {"mine": state_dict}

    optimizer.register_state_dict_post_hook(packed)
    for _ in range(2):
        steps = [float(state["step"]) for state in optimizer.state_dict()["mine"]["state"].values()]
        assert steps == [7.0, 2.0, 2.0, 2.0, 2.0]


def channels_last(params: list[nn.Parameter]) -> None:
    for p in params:
        if p.dim() == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("options", [{}, {"master_weights": True, "ema_decay": 0.9, "amsgrad": True}])
@pytest.mark.parametrize("loads", [False, True], ids=["changed", "loaded"])
def test_state_of_another_layout(loads: bool, options: dict[str, Any], backend: str) -> None:
    """The same numbers; and one plan serves all further steps again."""
    dtype = torch.bfloat16 if options else torch.float32
    alone, params = made(dtype), made(dtype)
    one, other = dk.optim.AdamW(alone, **options), dk.optim.AdamW(params, **options)
    train(one, alone, range(6))
    train(other, params, range(3))
    channels_last(params)
    if loads:
        saved, other = other.state_dict(), dk.optim.AdamW(params, **options)
        other.load_state_dict(saved)
    plans = []
    for step in range(3, 6):
        grads(params, step)
        channels_last([p.grad for p in params])
        other.step()
        plans.append(other._plan)
    assert plans[0] is plans[1] is plans[2]
    for p, q in zip(alone, params, strict=True):
        assert_bitwise(q.detach(), p.detach())
        for name, value in one.state[p].items():
            assert_bitwise(other.state[q][name], value, name)


def test_moments_begin_in_the_dtype_of_the_others(backend: str) -> None:
    """All of a parameter have one; amsgrad switched on in mid-training adds to moments that were loaded."""
    first, params = made(), made()
    saved = dk.optim.AdamW(first, state_dtype=torch.bfloat16)
    train(saved, first, range(2))
    optimizer = dk.optim.AdamW(params)
    optimizer.load_state_dict(saved.state_dict())
    optimizer.param_groups[0]["amsgrad"] = True
    train(optimizer, params, range(2, 4))
    for state in optimizer.state.values():
        assert [state[name].dtype for name in optimizer._slots] == [torch.bfloat16] * 3

    state = optimizer.state[params[2]]
    state["exp_avg"] = state["exp_avg"].float()
    before = [p.detach().clone() for p in params]
    with pytest.raises(
        TypeError, match=r"moments of parameter 2 must have one dtype, got torch.bfloat16 and torch.float32"
    ):
        optimizer.step()
    for p, b in zip(params, before, strict=True):
        assert_bitwise(p.detach(), b)
