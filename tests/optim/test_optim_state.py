"""The state of an optimizer: torch's state_dict both ways, gradients that come and go, what others do to the state."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _helpers import BACKENDS, BF16, CLOSE, F32, F64, backend_fixture, close, flat, grads, made, same_bits, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import dlkernels as dk
from dlkernels.testing import assert_bitwise, num_threads

backend = backend_fixture


# torch's state_dict ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_state_dict_is_torchs(dtype: torch.dtype, amsgrad: bool, backend: str) -> None:
    """Keys, their order, kinds, dtypes, shapes and strides, values; the groups' options too."""
    ours, theirs = made(dtype), made(dtype)
    a = dk.optim.AdamW([{"params": ours[:2]}, {"params": ours[2:], "lr": 0.1}], amsgrad=amsgrad)
    b = torch.optim.AdamW([{"params": theirs[:2]}, {"params": theirs[2:], "lr": 0.1}], amsgrad=amsgrad)
    same_bits(a.state_dict(), b.state_dict())
    for step in range(3):
        grads(ours, step, [True, True, False, True, True])
        grads(theirs, step, [True, True, False, True, True])
        a.step(), b.step()
    for x, y in zip(flat(a.state_dict()), flat(b.state_dict()), strict=True):
        assert x[:-1] == y[:-1] and type(x[-1]) is type(y[-1]), x[:-1]
        if not isinstance(x[-1], Tensor):
            assert x[-1] == y[-1]
            continue
        assert (x[-1].dtype, x[-1].shape, x[-1].stride()) == (y[-1].dtype, y[-1].shape, y[-1].stride()), x[:-1]
        assert (x[-1] - y[-1]).norm() <= CLOSE[dtype] * y[-1].norm(), x[:-1]


def test_no_two_entries_share_a_step(backend: str) -> None:
    params = made()
    optimizer = dk.optim.AdamW(params)
    train(optimizer, params, range(2))
    first, second = optimizer.state_dict(), optimizer.state_dict()
    steps = [s["step"] for s in (*first["state"].values(), *second["state"].values())]
    assert len({s.data_ptr() for s in steps}) == len(steps) == 2 * len(params)
    for s in steps:
        s.add_(1)
    train(optimizer, params, range(2, 3))
    assert [s["step"].item() for s in optimizer.state_dict()["state"].values()] == [3.0] * len(params)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("way", ["to", "from", "own"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_loads_in_mid_training(dtype: torch.dtype, way: str, amsgrad: bool, backend: str) -> None:
    """Five steps in one optimizer, five in the other, is ten of torch's."""
    kinds = {"to": (dk.optim.AdamW, torch.optim.AdamW), "from": (torch.optim.AdamW, dk.optim.AdamW)}
    first, second = kinds.get(way, (dk.optim.AdamW, dk.optim.AdamW))
    ours, theirs = made(dtype), made(dtype)
    options = {"lr": 0.01, "weight_decay": 0.1, "amsgrad": amsgrad}
    a, reference = first(ours, **options), torch.optim.AdamW(theirs, **options)
    train(a, ours, range(5))
    b = second(ours, lr=0.5)  # what is loaded wins
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    train(b, ours, range(5, 10))
    train(reference, theirs, range(10))
    close(ours, theirs)
    for mine, right in zip(b.state_dict()["state"].values(), reference.state_dict()["state"].values(), strict=True):
        assert list(mine) == list(right) and mine["step"] == right["step"] == 10


def test_loading_takes_copies(backend: str) -> None:
    """Neither training on nor loading twice touches what was loaded."""
    params = made()
    optimizer = dk.optim.AdamW(params, ema_decay=0.9)
    train(optimizer, params, range(3))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other_params = copy.deepcopy(params)
    other = dk.optim.AdamW(other_params, ema_decay=0.9)
    other.load_state_dict(kept)
    before = copy.deepcopy(kept)
    train(other, other_params, range(3, 6))
    same_bits(kept, before)
    train(optimizer, params, range(3, 6))
    same_bits(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    ("saved", "state_dtype", "master", "expected"),
    [
        (F32, None, False, F32),  # kept
        (BF16, None, False, BF16),
        (BF16, F32, False, F32),
        (F32, BF16, False, BF16),
        (BF16, None, True, F32),
        (F32, None, True, F32),
    ],
)
def test_moments_keep_their_dtype(
    saved: torch.dtype, state_dtype: Any, master: bool, expected: torch.dtype, backend: str
) -> None:
    """bfloat16 parameters; float32 moments come back bit for bit, not through bfloat16."""
    params = made(BF16)
    optimizer = dk.optim.AdamW(params, state_dtype=saved)
    train(optimizer, params, range(3))
    other = dk.optim.AdamW(copy.deepcopy(params), state_dtype=state_dtype, master_weights=master)
    other.load_state_dict(optimizer.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        for p, q in zip(params, other.param_groups[0]["params"], strict=True):
            assert_bitwise(other.state[q][name], optimizer.state[p][name].to(expected), name)
    train(other, other.param_groups[0]["params"], range(3, 5))
    assert all(s["exp_avg"].dtype == expected for s in other.state.values())


def test_missing_master_and_average_are_made_anew(backend: str) -> None:
    params = made(BF16)
    plain = dk.optim.AdamW(params, state_dtype=F32)
    train(plain, params, range(3))
    optimizer = dk.optim.AdamW(params, master_weights=True, ema_decay=0.5)
    optimizer.load_state_dict(plain.state_dict())
    before = [p.detach().clone() for p in params]
    train(optimizer, params, range(3, 4))
    for p, old in zip(params, before, strict=True):
        state = optimizer.state[p]
        assert state["step"] == 4 and state["master_param"].dtype == state["ema"].dtype == F32
        assert_bitwise(p.detach(), state["master_param"].bfloat16())
        torch.testing.assert_close(state["ema"], (old.float() + state["master_param"]) / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.0}, {"stochastic_rounding": True, "state_dtype": BF16}])
def test_sgdw_comes_back(options: dict[str, Any], backend: str) -> None:
    """Saved and loaded is as if never saved, bit for bit."""
    ours, theirs = made(BF16), made(BF16)
    whole, a = dk.optim.SGDW(theirs, lr=0.1, **options), dk.optim.SGDW(ours, lr=0.1, **options)
    train(whole, theirs, range(6))
    train(a, ours, range(3))
    b = dk.optim.SGDW(ours, lr=0.1, **options)
    b.load_state_dict(a.state_dict())
    train(b, ours, range(3, 6))
    same_bits(b.state_dict(), whole.state_dict())
    for p, q in zip(ours, theirs, strict=True):
        assert_bitwise(p.detach(), q.detach())


# Gradients that come and go -------------------------------------------------------------------------------------------

PATTERNS = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=9)


@pytest.mark.needs("hypothesis")
@pytest.mark.parametrize("name", [p if isinstance(p, str) else p.values[0] for p in BACKENDS])
@settings(max_examples=30)
@given(pattern=PATTERNS, reload=st.integers(0, 8))
def test_gradients_that_are_none(name: str, pattern: list[list[bool]], reload: int) -> None:
    """Values and each parameter's own `step` as torch's, in any pattern; saved and loaded somewhere between."""
    with dk.backend(name if dk._backend._why_not(name, "cpu") == "" else "reference"):
        ours, theirs = made(F64), made(F64)
        a, b = dk.optim.AdamW(ours, lr=0.01), torch.optim.AdamW(theirs, lr=0.01)
        for step, present in enumerate(pattern):
            if step == reload:
                saved = copy.deepcopy(a.state_dict())
                a = dk.optim.AdamW(ours, lr=0.01)
                a.load_state_dict(saved)
            grads(ours, step, present)
            grads(theirs, step, present)
            a.step(), b.step()
        mine, right = a.state_dict()["state"], b.state_dict()["state"]
        assert {i: s["step"].item() for i, s in mine.items()} == {i: s["step"].item() for i, s in right.items()}
        close(ours, theirs)


@pytest.mark.parametrize("kind", [dk.optim.AdamW, dk.optim.SGDW])
def test_a_parameter_left_out_stays(kind: Callable[..., Any], backend: str) -> None:
    """No decay, no momentum, no average, no new version."""
    params = made()
    optimizer = kind(params, lr=0.1, weight_decay=0.5, ema_decay=0.9)
    train(optimizer, params, range(2))
    grads(params, 2, [True, False, True, True, True])
    before, version = copy.deepcopy(optimizer.state_dict()["state"][1]), params[1]._version
    value = params[1].detach().clone()
    optimizer.step()
    assert_bitwise(params[1].detach(), value)
    assert params[1]._version == version
    same_bits(optimizer.state_dict()["state"][1], before)


def test_versions_advance(backend: str) -> None:
    """Autograd notices that a saved parameter has been stepped."""
    params = made()
    optimizer = dk.optim.AdamW(params)
    for step in range(3):
        grads(params, step)
        before = [p._version for p in params]
        optimizer.step()
        assert all(p._version > v for p, v in zip(params, before, strict=True))
    w = nn.Parameter(torch.ones(3))
    loss = (w * w).sum()
    w.grad = torch.ones(3)
    dk.optim.AdamW([w]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("layout", ["dense", "copied"])
def test_gradients_are_let_go(layout: str, backend: str) -> None:
    """set_to_none gives the memory back, also where the step has worked on a copy."""
    params = made(shapes=((5,), (7,), (4, 13)))
    optimizer = dk.optim.AdamW(params)
    for step in range(3):
        grads(params, step)
        if layout == "copied":
            params[2].grad = params[2].grad.t().contiguous().t()
        watched = [weakref.ref(p.grad) for p in params]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        assert not any(ref() is not None for ref in watched)
        held = {o.data_ptr() for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and o.shape == (4, 13)}
        assert len(held) == 3  # memory of the parameter and of two moments


# Threads --------------------------------------------------------------------------------------------------------------


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("kind", [dk.optim.AdamW, dk.optim.SGDW])
@pytest.mark.parametrize("rounds", [False, True])
def test_threads_change_nothing(kind: Callable[..., Any], rounds: bool) -> None:
    """Several pieces of one tensor and many tensors in a piece, clipped, rounded at random or not."""

    def after(threads: int) -> dict[str, Any]:
        params = made(BF16, shapes=((3 * 16384 + 17,), (5,), (129, 130), (40_001,)))
        optimizer = kind(params, lr=0.01, stochastic_rounding=rounds, max_grad_norm=1.0, ema_decay=0.9)
        with dk.backend("cpp"), num_threads(threads):
            train(optimizer, params, range(3))
        return {"state": optimizer.state_dict(), "params": params, "norm": optimizer.grad_norm}

    one = after(1)
    for threads in (2, 3):
        same_bits(after(threads), one)


def test_master_copies_that_nobody_steps_are_dropped() -> None:
    """Loaded without `master_weights`, they would come back as they were when a later run asks for them again."""
    p = torch.nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    first = dk.optim.AdamW([p], lr=0.1, master_weights=True)
    p.grad = torch.ones_like(p)
    first.step()
    second = dk.optim.AdamW([p], lr=0.1)
    second.load_state_dict(first.state_dict())
    second.step()
    assert "master_param" not in second.state[p]
    first.load_state_dict(second.state_dict())
    first.step()
    expected = p.detach().float()
    assert torch.equal(first.state[p]["master_param"].bfloat16().float(), expected) and (expected < 0.75).all()
