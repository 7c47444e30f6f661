"""What cannot be used is refused with a clear line, and a step that fails has changed nothing."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _helpers import BF16, F16, F32, F64, backend_fixture, flat, made, same_bits, train
from torch import Tensor, nn

import dlkernels as dk
from dlkernels import _backend
from dlkernels.testing import assert_bitwise, layouts

backend = backend_fixture

INF, NAN = float("inf"), float("nan")
KINDS = pytest.mark.parametrize("kind", [dk.optim.AdamW, dk.optim.SGDW])


def one(dtype: torch.dtype = F32) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, 5).to(dtype))


# Hyper-parameters -----------------------------------------------------------------------------------------------------

# Option, values that are refused, the beginning of the message.
COMMON = [
    ("lr", (-1e-3, NAN, INF, torch.tensor(-1.0), torch.tensor(NAN)), "`lr` must be a finite number >= 0, got "),
    ("lr", (torch.ones(2),), r"`lr` must be a number or a tensor of one element, got shape \(2,\)"),
    ("weight_decay", (-0.1, NAN, INF), "`weight_decay` must be a finite number >= 0, got "),
]
ADAMW = [
    ("betas", ((-0.1, 0.9), (0.9, 1.0), (1.0, 0.9), (NAN, 0.9), (0.9, INF)), r"`betas` must be in \[0, 1\), got "),
    ("betas", ((0.9,), 0.9, (0.9, 0.9, 0.9)), "`betas` must be two numbers, got "),
    ("eps", (-1e-8, NAN, INF), "`eps` must be a finite number >= 0, got "),
]
SGDW = [("momentum", (-0.1, 1.0, NAN, INF), r"`momentum` must be in \[0, 1\), got ")]
OPTIMIZER = [
    ("max_grad_norm", (0.0, -1.0, NAN), "`max_grad_norm` must be > 0 or None, got "),
    ("ema_decay", (-0.1, 1.1, NAN), r"`ema_decay` must be in \[0, 1\], got "),
    ("state_dtype", (F16, F64, torch.int32, "float32"), "`state_dtype` must be torch.float32, torch.bfloat16 or None"),
    ("seed", (-1, 2**64), r"`seed` must be in \[0, 2\*\*64\), got "),
]


def rejected(table: list[Any]) -> list[Any]:
    return [pytest.param(n, v, m, id=f"{n}-{i}{j}") for i, (n, vs, m) in enumerate(table) for j, v in enumerate(vs)]


def of_groups() -> list[Any]:
    kinds = ((dk.optim.AdamW, COMMON + ADAMW), (dk.optim.SGDW, COMMON + SGDW))
    return [pytest.param(k, *p.values, id=f"{k.__name__}-{p.id}") for k, table in kinds for p in rejected(table)]


@pytest.mark.parametrize(("kind", "name", "value", "message"), of_groups())
def test_hyper_parameters(kind: Any, name: str, value: Any, message: str, backend: str) -> None:
    """Refused at construction, in a group, in a group added later, and by the next step when set between steps."""
    with pytest.raises(ValueError, match=message):
        kind([one()], **{name: value})
    with pytest.raises(ValueError, match=message):
        kind([{"params": [one()], name: value}])
    params = made()
    optimizer = kind(params[:3])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[3:], name: value})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": params[3:]})
    train(optimizer, params, range(2))
    good = optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = value
    assert_step_fails(optimizer, params, ValueError, message)
    optimizer.param_groups[1][name] = good
    train(optimizer, params, range(2, 3))


@KINDS
@pytest.mark.parametrize(("name", "value", "message"), rejected(OPTIMIZER))
def test_options_of_the_optimizer(kind: Any, name: str, value: Any, message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind([one()], **{name: value})
    with pytest.raises(ValueError, match=f"`{name}` is an option of the optimizer, not of a parameter group"):
        kind([{"params": [one()], name: value}])
    if name in ("max_grad_norm", "ema_decay"):  # may be set between steps
        params = made()
        optimizer = kind(params)
        train(optimizer, params, range(2))
        setattr(optimizer, name, value)
        assert_step_fails(optimizer, params, ValueError, message)
        setattr(optimizer, name, None)
        train(optimizer, params, range(2, 3))


@KINDS
def test_wrong_kinds(kind: Any) -> None:
    for name in ("lr", "weight_decay"):
        with pytest.raises(TypeError, match=f"`{name}` must be a number, got str"):
            kind([one()], **{name: "1e-3"})
    with pytest.raises(TypeError, match="`seed` must be an int, got float"):
        kind([one()], seed=0.5)
    with pytest.raises(ValueError, match="`decoupling` must be one of 'lr', 'schedule', got 'paper'"):
        kind([one()], decoupling="paper")
    with pytest.raises(ValueError, match="`decoupling` must be 'lr' or 'schedule', got 'paper'"):
        kind([{"params": [one()], "decoupling": "paper"}])
    with pytest.raises(ValueError, match="`differentiable` must be False"):
        kind([one()], differentiable=True)


def test_momentum_scaling_and_nesterov() -> None:
    with pytest.raises(ValueError, match="`momentum_scaling` must be one of 'paper', 'gradient', got 'lr'"):
        dk.optim.SGDW([one()], momentum_scaling="lr")
    message = "`nesterov` needs a momentum and momentum_scaling='gradient', got momentum={}, momentum_scaling='{}'"
    with pytest.raises(ValueError, match=message.format(0.9, "paper")):
        dk.optim.SGDW([one()], nesterov=True)
    with pytest.raises(ValueError, match=message.format(0.0, "gradient")):
        dk.optim.SGDW([one()], nesterov=True, momentum=0.0, momentum_scaling="gradient")
    params = made()
    optimizer = dk.optim.SGDW(params)
    train(optimizer, params, range(2))
    optimizer.param_groups[0]["nesterov"] = True
    assert_step_fails(optimizer, params, ValueError, message.format(0.9, "paper"))


@KINDS
def test_a_decay_of_one_or_more_warns(kind: Any) -> None:
    """Once, in the caller's file; a decay that is just large does not."""
    options = {"lr": 2.0, "weight_decay": 0.5, "decoupling": "lr"}
    with pytest.warns(
        UserWarning, match="each step multiplies the parameters by 1 - 1: the weight decay of a step"
    ) as seen:
        optimizer = kind([one()], **options)
    assert [w.filename for w in seen] == [__file__]
    with pytest.warns(UserWarning, match="1 - 3") as seen:
        optimizer.add_param_group({"params": [one()], "weight_decay": 1.5})
    assert [w.filename for w in seen] == [__file__]
    with pytest.warns(UserWarning, match="1 - 1.5"):
        kind([one()], lr=1e-3, weight_decay=1.5, decoupling="schedule")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kind([one()], lr=1.9, weight_decay=0.5, decoupling="lr")
        kind([one()], lr=2.0, weight_decay=0.5, decoupling="schedule")


# Parameters -----------------------------------------------------------------------------------------------------------


@KINDS
def test_parameters(kind: Any) -> None:
    p = one()
    with pytest.raises(ValueError, match="a parameter must not appear twice in a parameter group"):
        kind([p, p])
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        kind([{"params": [p]}, {"params": [p]}])
    optimizer = kind([p])
    with pytest.raises(ValueError, match=r"some parameters appear in more than one parameter group"):
        optimizer.add_param_group({"params": [p]})
    with pytest.raises(TypeError, match=r"parameters must be real, got torch.complex64: optimize torch.view_as_real"):
        kind([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(TypeError, match=r"`params` must be float32, float16, bfloat16 or float64, got torch.int32"):
        kind([nn.Parameter(torch.zeros(2, dtype=torch.int32), requires_grad=False)])
    with pytest.raises(TypeError, match=r"`params` must be a strided \(dense\) tensor, got torch.sparse_coo"):
        kind([torch.zeros(2).to_sparse().requires_grad_()])
    with pytest.raises(ValueError, match=r"can't optimize a non-leaf Tensor"):
        kind([p * 2])
    with pytest.raises(ValueError, match="empty parameter list"):
        kind([])
    with pytest.raises(TypeError, match="optimizer can only optimize Tensors"):
        kind([1.0])


@KINDS
def test_stochastic_rounding_is_of_bfloat16(kind: Any, backend: str) -> None:
    with pytest.raises(TypeError, match="`stochastic_rounding` rounds bfloat16: use `master_weights` for float16"):
        kind([one(F16)], stochastic_rounding=True)
    with pytest.raises(TypeError, match="`stochastic_rounding` rounds bfloat16"):
        kind([one(BF16)], stochastic_rounding=True).add_param_group({"params": [one(F16)]})
    for dtype, options in ((F16, {"master_weights": True}), (F32, {}), (F64, {})):
        results = []
        for rounds in (False, True):  # nothing to round at random: no difference
            params = made(dtype)
            optimizer = kind(params, stochastic_rounding=rounds, **options)
            train(optimizer, params, range(3))
            results.append(params)
        for a, b in zip(*results, strict=True):
            assert_bitwise(a.detach(), b.detach())


# Failed steps ---------------------------------------------------------------------------------------------------------


def everything(optimizer: Any, params: list[nn.Parameter]) -> dict[str, Any]:
    """Bits of all there is, and which objects hold it."""
    state = {i: dict(optimizer.state[p]) for i, p in enumerate(params) if p in optimizer.state}
    return copy.deepcopy({"params": [p.detach() for p in params], "state": state, "known": len(optimizer.state)})


def assert_step_fails(optimizer: Any, params: list[nn.Parameter], error: Any, message: str) -> None:
    before, versions = everything(optimizer, params), [p._version for p in params]
    with pytest.raises(error, match=message):
        optimizer.step()
    same_bits(everything(optimizer, params), before)
    assert [p._version for p in params] == versions


def _grad(make: Callable[[Tensor], Any]) -> Callable[[Any, nn.Parameter], None]:
    def spoil(optimizer: Any, p: nn.Parameter) -> None:
        if torch.is_floating_point(grad := make(p.detach())) and grad.dtype != p.dtype:
            p.grad_dtype = None  # torch itself would refuse it here
        if grad.shape == p.shape and grad.device == p.device:
            p.grad = grad
        else:  # nor does torch take one of another shape or device, but the parameter may change under it
            p.grad = torch.ones_like(p)
            p.grad.data = grad

    return spoil


def _state(name: str, make: Callable[[Tensor], Any]) -> Callable[[Any, nn.Parameter], None]:
    def spoil(optimizer: Any, p: nn.Parameter) -> None:
        slot = next(n for n in ("exp_avg", "momentum_buffer") if n in optimizer.state[p]) if name == "moment" else name
        optimizer.state[p][slot] = make(optimizer.state[p][slot])

    return spoil


FAILURES: dict[str, tuple[Callable[[Any, nn.Parameter], None], Any, str]] = {
    "grad_dtype": (
        _grad(lambda p: p.double()),
        TypeError,
        "the gradient of parameter 4 must have its dtype torch.float32",
    ),
    "grad_half": (
        _grad(lambda p: p.half()),
        TypeError,
        "the gradient of parameter 4 must have its dtype torch.float32",
    ),
    "grad_sparse": (_grad(lambda p: p.to_sparse()), TypeError, "parameter 4 must be a strided .* got torch.sparse_coo"),
    "moment_shape": (
        _state("moment", lambda x: torch.ones(7)),
        ValueError,
        "a state tensor must have its parameter's shape",
    ),
    "moment_dtype": (_state("moment", lambda x: x.double()), TypeError, "must be torch.float32 or torch.bfloat16"),
    "moment_meta": (_state("moment", lambda x: x.to("meta")), ValueError, "its parameter's shape and device"),
    "ema_dtype": (_state("ema", lambda x: x.bfloat16()), TypeError, "`ema` .* torch.float32"),
}


@KINDS
@pytest.mark.parametrize("first", [False, True], ids=["later", "first_step"])
@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_step_changes_nothing(name: str, first: bool, kind: Any, backend: str) -> None:
    """What is wrong is the last parameter; the others are as they were, state and its counters included."""
    spoil, error, message = FAILURES[name]
    params = made()
    optimizer = kind(params, lr=0.1, ema_decay=0.9, max_grad_norm=1.0)
    if not first:
        train(optimizer, params, range(3))
    elif "grad" not in name:
        train(optimizer, params[4:], range(1))  # only the last one has a state
    for p in params:
        p.grad = torch.ones_like(p)
    spoil(optimizer, params[4])
    assert_step_fails(optimizer, params, error, message)
    if name.startswith("grad"):
        params[4].grad = None
        optimizer.step()  # goes on as if nothing had been


@KINDS
@pytest.mark.parametrize("steps", [0, 3])
def test_another_shape(steps: int, kind: Any, backend: str) -> None:
    """A parameter that changes under its gradient: torch allows this where it refuses the gradient itself."""
    for shape in ((3, 2), (2,), (1, 1)):
        params = made()
        optimizer = kind(params, lr=0.1)
        train(optimizer, params, range(steps))
        for p in params:
            p.grad = torch.ones_like(p)
        params[4].data = torch.ones(shape)
        assert_step_fails(optimizer, params, ValueError, re.escape(f"must have its shape {shape}, got (1,)"))


@KINDS
def test_expanded_parameters(kind: Any, backend: str) -> None:
    """One element of memory for several of the parameter's: refused before anything is stepped."""
    params = [*made(), nn.Parameter(torch.ones(1).expand(4))]
    optimizer = kind(params)
    for p in params:
        p.grad = torch.ones(p.shape)
    assert_step_fails(optimizer, params, ValueError, "parameter 5 must have an element of memory for each of its own")


def test_state_step_of_another_kind(backend: str) -> None:
    params = made()
    optimizer = dk.optim.AdamW(params)
    train(optimizer, params, range(2))
    for wrong, got in ((3, "int"), (torch.tensor(3), "torch.int64"), (torch.tensor(3.0, dtype=F64), "torch.float64")):
        optimizer.state[params[4]]["step"] = wrong
        assert_step_fails(optimizer, params, TypeError, f"`step` in the state must be a float32 tensor .* got {got}")


@pytest.mark.skipif(_backend.TWIN is not None, reason="by design: CUDA C++ serves CPU tensors here")
def test_a_backend_that_cannot() -> None:
    params = made()
    optimizer = dk.optim.AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    with dk.backend("cuda"):
        assert_step_fails(optimizer, params, Exception, "serves CPU tensors in its tests only")
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert not optimizer.state


# Non-finite gradients -------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64])
def test_non_finite_gradients(dtype: torch.dtype, bad: float, kind: Any, backend: str) -> None:
    """By default they reach the parameter's element and no other; skipped, nothing changes and t stays."""
    for skip in (False, True):
        params = made(dtype)
        optimizer = kind(params, lr=0.1, skip_nonfinite=skip, ema_decay=0.9)
        train(optimizer, params, range(2))
        for p in params:
            p.grad = torch.ones_like(p)
        params[2].grad[3, 4] = bad
        before, versions = everything(optimizer, params), [p._version for p in params]
        optimizer.step()
        if skip:
            same_bits(everything(optimizer, params), before)
            if backend == "cpp":  # the others may tell autograd of a step that was none
                assert [p._version for p in params] == versions
            train(optimizer, params, range(2, 3))
            assert all(bool(p.isfinite().all()) for p in params)
        else:
            wrong = ~torch.cat([p.detach().flatten().isfinite() for p in params])
            assert wrong.sum() == 1 and not params[2][3, 4].isfinite()


@KINDS
def test_clipping_of_non_finite_gradients(kind: Any, backend: str) -> None:
    """As clip_grad_norm_ has it: NaN spoils all; an infinite one leaves the others at zero. The norm says so."""
    for bad in (NAN, INF):
        ours, theirs = made(), made()
        a, b = kind(ours, lr=0.1, max_grad_norm=1.0), kind(theirs, lr=0.1)
        for params in (ours, theirs):
            for p in params:
                p.grad = torch.ones_like(p)
            params[2].grad[3, 4] = bad
        norm = nn.utils.clip_grad_norm_(theirs, 1.0)
        a.step(), b.step()
        assert a.grad_norm.isnan() == norm.isnan() and a.grad_norm.isinf() == norm.isinf()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p.isnan(), q.isnan())


# Layouts that work ----------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("rounds", [False, True])
def test_layouts(kind: Any, rounds: bool, backend: str) -> None:
    """Parameters and gradients in any layout, alike or not: the same bits as contiguous ones, state dense."""
    dtype, value = BF16 if rounds else F32, torch.linspace(-1, 1, 120).view(2, 3, 4, 5)

    def after(make: Callable[[Tensor], Tensor], grad: Callable[[Tensor], Tensor]) -> Any:
        p = nn.Parameter(make(value.to(dtype, copy=True)))
        optimizer = kind([p], lr=0.1, ema_decay=0.9, state_dtype=F32, max_grad_norm=0.5)
        for step in range(3):
            p.grad = grad((value * 3 + step).sin().to(dtype))
            optimizer.step()
        return {"p": p.detach(), "state": optimizer.state_dict()["state"]}

    expected = after(Tensor.contiguous, Tensor.contiguous)
    names = [name for name, _ in layouts(value)]
    for i, name in enumerate(names):
        for other in (name, names[(i + 1) % len(names)]):
            got = after(lambda x, n=name: dict(layouts(x))[n], lambda x, n=other: dict(layouts(x))[n])
            same_norm = [leaf for leaf in flat(got) if isinstance(leaf[-1], Tensor)]
            for mine, right in zip(same_norm, [x for x in flat(expected) if isinstance(x[-1], Tensor)], strict=True):
                torch.testing.assert_close(mine[-1], right[-1], rtol=0 if rounds else 1e-6, atol=0 if rounds else 1e-7)


@KINDS
def test_views_and_expanded_gradients(kind: Any, backend: str) -> None:
    """A parameter that is every other element of a buffer, and a gradient that is one number in many places."""
    buffer = torch.linspace(-1, 1, 12)
    gaps = buffer[1::2].clone()
    p, q = nn.Parameter(buffer[::2]), nn.Parameter(buffer[::2].clone())
    a, b = kind([p], lr=0.1), kind([q], lr=0.1)
    for step in range(3):
        p.grad, q.grad = torch.tensor(step - 1.0).expand(6), torch.full((6,), step - 1.0)
        a.step(), b.step()
    assert_bitwise(buffer[::2], q.detach())
    assert_bitwise(buffer[1::2], gaps)
    assert p.data_ptr() == buffer.data_ptr()


def test_a_schedule_from_nothing_warns() -> None:
    """Decay by the schedule is a share of the lr given at construction."""
    with pytest.warns(UserWarning, match="it is 0: there will be no decay"):
        dk.optim.SGDW([one()], lr=0.0, weight_decay=0.1)
    with pytest.raises(ValueError, match="`dampening` must be 0"):
        dk.optim.SGDW([{"params": [one()], "dampening": 0.5}])
