"""What others do between two steps: state replaced, memory swapped, options changed, averages for weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _helpers import BF16, F32, F64, backend_fixture, close, flat, grads, made, same_bits, train
from torch import Tensor, nn

import dlkernels as dk
from dlkernels.testing import assert_bitwise

backend = backend_fixture

Change = Callable[[torch.optim.Optimizer, list[nn.Parameter]], None]


def _replace(name: str) -> Change:
    def change(optimizer: Any, params: Any) -> None:
        optimizer.state[params[2]][name] = optimizer.state[params[2]][name] * 0.5

    return change


def _swap_data(what: str) -> Change:
    def change(optimizer: Any, params: Any) -> None:
        for p in params[1:3]:
            x = p if what == "param" else optimizer.state[p][what]
            x.data = x.detach() * 0.5  # other memory

    return change


def _relayout(optimizer: Any, params: Any) -> None:
    params[2].data = params[2].detach().t().contiguous().t()


def _turn(optimizer: Any, params: Any) -> None:
    """The same memory, read the other way."""
    params[5].data = params[5].data.t()


def _new_param(optimizer: Any, params: Any) -> None:
    old, params[1] = params[1], nn.Parameter(params[1].detach() * 2)
    group = optimizer.param_groups[0]["params"]
    group[next(i for i, p in enumerate(group) if p is old)] = params[1]


def _fewer(optimizer: Any, params: Any) -> None:
    optimizer.param_groups[0]["params"] = [params[4], params[0]]


def _one_state_less(optimizer: Any, params: Any) -> None:
    del optimizer.state[params[3]]


def _add_group(optimizer: Any, params: Any) -> None:
    params.append(nn.Parameter(torch.linspace(-1, 1, 6, dtype=params[0].dtype)))
    optimizer.add_param_group({"params": [params[-1]], "lr": 0.3})


def _in_place(optimizer: Any, params: Any) -> None:
    with torch.no_grad():
        params[0].mul_(0.5)
        optimizer.state[params[0]]["exp_avg"].add_(1.0)


def _step_back(optimizer: Any, params: Any) -> None:
    """One parameter begins again, its moments stay."""
    optimizer.state[params[1]]["step"] = torch.tensor(0.0)


def _option(**options: Any) -> Change:
    def change(optimizer: Any, params: Any) -> None:
        optimizer.param_groups[0].update(copy.deepcopy(options))

    return change


def _amsgrad(optimizer: Any, params: Any) -> None:
    """On from here; torch's own fails for want of a first value."""
    optimizer.param_groups[0]["amsgrad"] = True
    if type(optimizer) is torch.optim.AdamW:
        for p in params:
            optimizer.state[p]["max_exp_avg_sq"] = torch.zeros_like(p)


CHANGES: dict[str, Change] = {
    "exp_avg_replaced": _replace("exp_avg"),
    "exp_avg_sq_replaced": _replace("exp_avg_sq"),
    "param_data": _swap_data("param"),
    "exp_avg_data": _swap_data("exp_avg"),
    "exp_avg_sq_data": _swap_data("exp_avg_sq"),
    "in_place": _in_place,
    "state_clear": lambda optimizer, params: optimizer.state.clear(),
    "one_state_less": _one_state_less,
    "relayout": _relayout,
    "turned": _turn,
    "new_param": _new_param,
    "fewer_params": _fewer,
    "add_group": _add_group,
    "step_back": _step_back,
    "lr": _option(lr=0.2),
    "lr_zero": _option(lr=0.0),
    "tensor_lr": _option(lr=torch.tensor(0.2, dtype=F64)),
    "betas": _option(betas=(0.5, 0.7)),
    "betas_zero": _option(betas=(0.0, 0.0)),
    "eps": _option(eps=0.1),
    "weight_decay": _option(weight_decay=0.4),
    "maximize": _option(maximize=True),
    "amsgrad": _amsgrad,
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_steps(name: str, backend: str) -> None:
    """Whatever torch's optimizer does after a change, this one does: the plan of the steps before is no excuse."""
    ours, theirs = made(F64), made(F64)
    for params in (ours, theirs):
        params.append(nn.Parameter(torch.linspace(-1, 1, 9, dtype=F64).view(3, 3)))
    a, b = dk.optim.AdamW(ours, lr=0.01), torch.optim.AdamW(theirs, lr=0.01)
    for optimizer, params in ((a, ours), (b, theirs)):
        train(optimizer, params, range(3))
        CHANGES[name](optimizer, params)
        train(optimizer, params, range(3, 6))
    close(ours, theirs)
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        mine, right = a.state[p], b.state[q]
        assert set(mine) == set(right), f"parameter {i}"
        for key in right:
            assert (mine[key] - right[key]).norm() <= 1e-13 * right[key].norm(), f"{key} of parameter {i}"


def test_amsgrad_off_again(backend: str) -> None:
    """Off, the largest v is not used and not kept up."""
    ours, theirs = made(F64), made(F64)
    a = dk.optim.AdamW(ours, amsgrad=True, lr=0.01)
    b = torch.optim.AdamW(theirs, amsgrad=True, lr=0.01, foreach=False)
    for optimizer, params in ((a, ours), (b, theirs)):
        for i, amsgrad in enumerate((True, False, True, False)):
            optimizer.param_groups[0]["amsgrad"] = amsgrad
            train(optimizer, params, range(2 * i, 2 * i + 2))
    close(ours, theirs)


@pytest.mark.parametrize("scaling", ["paper", "gradient"])
def test_momentum_switched_on_and_off(scaling: str, backend: str) -> None:
    """As if it had always been there, at zero, from where it is switched on."""
    params, expected = made(F64), [p.detach().clone() for p in made(F64)]
    optimizer = dk.optim.SGDW(params, lr=0.1, momentum=0.0, momentum_scaling=scaling)
    buffers = [torch.zeros_like(p) for p in expected]
    for step, momentum in enumerate((0.0, 0.0, 0.9, 0.9, 0.5)):
        optimizer.param_groups[0]["momentum"] = momentum
        grads(params, step)
        optimizer.step()
        for p, m, x in zip(params, buffers, expected, strict=True):
            m.mul_(momentum).add_(p.grad)
            x.sub_(0.1 * m)
        if momentum == 0:
            for m in buffers:
                m.zero_()
    close(params, expected)


def test_options_of_the_optimizer_between_steps(backend: str) -> None:
    """Set as attributes, they hold from the next step on: as in an optimizer that was built with them."""
    params = made()
    optimizer = dk.optim.AdamW(params, lr=0.01)
    train(optimizer, params, range(2))
    for name, value in (("max_grad_norm", 0.1), ("ema_decay", 0.5), ("ema_decay", 0.9), ("max_grad_norm", None)):
        other_params = copy.deepcopy(params)
        options = {"max_grad_norm": optimizer.max_grad_norm, "ema_decay": optimizer.ema_decay, name: value}
        other = dk.optim.AdamW(other_params, lr=0.01, **options)
        other.load_state_dict(optimizer.state_dict())
        setattr(optimizer, name, value)
        train(optimizer, params, range(2, 4))
        train(other, other_params, range(2, 4))
        same_bits(optimizer.state_dict(), other.state_dict())
        assert (optimizer.grad_norm is None) == (optimizer.max_grad_norm is None)
    assert all("ema" in s for s in optimizer.state.values())


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("rounds", [False, True])
def test_backend_switched_in_mid_training(rounds: bool) -> None:
    """Any order of backends: the same to rounding; the random numbers are the same, so few bfloat16 differ."""
    orders = (("cpp",) * 6, ("reference",) * 6, ("cpp", "cpp", "reference", "reference", "cpp", "reference"))
    results = []
    for order in orders:
        params = made(BF16 if rounds else F64)
        optimizer = dk.optim.AdamW(params, lr=0.01, stochastic_rounding=rounds, state_dtype=F32)
        for step, name in enumerate(order):
            with dk.backend(name):
                train(optimizer, params, range(step, step + 1))
        results.append(torch.cat([p.detach().double().flatten() for p in params]))
        assert all(s["step"] == 6 for s in optimizer.state.values())
    for other in results[1:]:
        if rounds:
            assert (other != results[0]).sum() <= 2
        else:
            assert (other - results[0]).norm() <= 1e-14 * other.norm()


# Averages -------------------------------------------------------------------------------------------------------------


def snapshot(optimizer: Any, params: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in params] + [x[-1].clone() for x in flat(optimizer.state_dict()["state"])]


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_averages_in_and_out(dtype: torch.dtype, master: bool, backend: str) -> None:
    params = made(dtype)
    optimizer = dk.optim.AdamW(params, lr=0.1, ema_decay=0.5, master_weights=master)
    train(optimizer, params, range(3))
    before = snapshot(optimizer, params)
    with pytest.raises(KeyError), optimizer.ema_weights():
        for p in params:
            assert_bitwise(p.detach(), optimizer.state[p]["ema"].to(dtype))
        loads, again = lambda: optimizer.load_state_dict({}), optimizer.ema_weights().__enter__
        for refused in (optimizer.step, optimizer.state_dict, loads, again):
            with pytest.raises(RuntimeError, match="averages are in their place"):
                refused()
        raise KeyError("inside")
    for old, now in zip(before, snapshot(optimizer, params), strict=True):
        assert_bitwise(now, old)
    optimizer.swap_ema()
    optimizer.swap_ema()
    train(optimizer, params, range(3, 4))
    with pytest.raises(RuntimeError, match="build the optimizer with ema_decay="):
        dk.optim.AdamW(made()).swap_ema()


def test_average_begins_with_its_parameter(backend: str) -> None:
    """Of the value before the first step; a parameter whose gradient comes later begins later, and is not swapped."""
    params = made()
    optimizer = dk.optim.SGDW(params, lr=0.1, ema_decay=0.75)
    first = [p.detach().clone() for p in params]
    grads(params, 0, [True, False, True, True, True])
    optimizer.step()
    with optimizer.ema_weights():
        assert_bitwise(params[1].detach(), first[1])
    expected = 0.75 * first[0] + 0.25 * params[0].detach()
    torch.testing.assert_close(optimizer.state[params[0]]["ema"], expected, rtol=1e-6, atol=1e-7)
    train(optimizer, params, range(1, 2))
    expected = 0.75 * first[1] + 0.25 * params[1].detach()
    torch.testing.assert_close(optimizer.state[params[1]]["ema"], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("kind", [dk.optim.AdamW, dk.optim.SGDW])
def test_alternating_sets_of_gradients_need_no_new_plan(kind: Any) -> None:
    """As in a mixture of experts: once each set has been seen, the table serves them all, with every step exact."""
    params = made()
    optimizer = kind(params, lr=1e-2, max_grad_norm=1.0)
    twins = made()
    twin = kind(twins, lr=1e-2, max_grad_norm=1.0)
    patterns = [[True] * 5, [True, False] * 2 + [True], [False, True] * 2 + [False], [i == 2 for i in range(5)]]
    plans: list[Any] = []
    for step in range(20):
        present = patterns[step % 4]
        grads(params, step, present)
        grads(twins, step, present)
        optimizer.step()
        twin._forget_plan()
        twin.step()
        plans.append(optimizer._plan)
        for a, b in zip(params, twins, strict=True):
            assert_bitwise(a, b)
        assert_bitwise(optimizer.grad_norm, twin.grad_norm)
    assert all(plan is plans[8] for plan in plans[8:])
    same_bits(optimizer.state_dict(), twin.state_dict())


def test_a_parameter_written_by_somebody_else_takes_its_master_copy_along(backend: str) -> None:
    """Weights restored, or one element set: what was not written keeps the digits of the master copy."""
    params = made(BF16)
    optimizer = dk.optim.AdamW(params, lr=1e-3, weight_decay=0.0, master_weights=True)
    train(optimizer, params, range(3))
    master = optimizer.state[params[1]]["master_param"]
    before = master.clone()
    with torch.no_grad():
        params[1][3] = 5.0
    for p in params:
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert params[1][3] == 5.0 and master[3] == 5.0
    rest = torch.arange(len(before)) != 3
    assert_bitwise(master[rest], before[rest])
    assert (master[rest] != params[1].detach().float()[rest]).any(), "no digit was there to be kept"


def test_a_first_step_inside_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """As on a GPU: the state would be made anew by each replay."""
    params = made()
    optimizer = dk.optim.AdamW(params)
    grads(params, 0)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="take one step before the capture"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.needs("cpp")
def test_parameters_that_share_memory_of_one_tensor_need_no_new_plan() -> None:
    """As in flat parameters: what is written into one view counts for all of them."""
    flat = torch.randn(12, dtype=BF16)
    params = [nn.Parameter(flat[:5]), nn.Parameter(flat[5:])]
    optimizer = dk.optim.AdamW(params, master_weights=True)
    plans = []
    for step in range(4):
        grads(params, step)
        optimizer.step()
        plans.append(optimizer._plan)
    assert all(plan is plans[0] for plan in plans)
