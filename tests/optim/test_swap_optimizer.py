"""A running torch.optim.AdamW that becomes ours, and back: it goes on as if nothing had happened, whoever holds it."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _helpers import same_bits
from _hosts import Given, backward, flat, gradients, train
from torch import Tensor, nn
from torch.optim import lr_scheduler

import dlkernels as dk
from dlkernels.testing import assert_bitwise, assert_within_budget

pytestmark = pytest.mark.filterwarnings("error")
F32, F64 = torch.float32, torch.float64
Adam, AdamW = torch.optim.Adam, torch.optim.AdamW
Optimizer = torch.optim.Optimizer
BEFORE, AFTER = range(4), range(4, 10)

WAYS: dict[str, Callable[[Given], Optimizer]] = {
    "plain": lambda m: AdamW(m.parameters(), lr=0.05),
    "groups": lambda m: AdamW(m.groups(), lr=0.05, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1),
    "named": lambda m: AdamW(m.named_parameters(), lr=0.05),
    "amsgrad": lambda m: AdamW(m.groups(), lr=0.05, amsgrad=True),
    "maximize": lambda m: AdamW(m.groups(), lr=0.05, maximize=True),
    "foreach": lambda m: AdamW(m.groups(), lr=0.05, foreach=True),
    "fused": lambda m: AdamW(m.groups(), lr=0.05, fused=True),
    "fused amsgrad": lambda m: AdamW(m.groups(), lr=0.05, fused=True, amsgrad=True),
    "tensor lr": lambda m: AdamW(m.parameters(), lr=torch.tensor(0.05, dtype=F64)),
    "tensor betas": lambda m: AdamW(
        m.parameters(), lr=0.05, betas=(torch.tensor(0.8, dtype=F64), torch.tensor(0.9, dtype=F64))
    ),
    "decoupled Adam": lambda m: Adam(m.groups(), lr=0.05, weight_decay=0.1, decoupled_weight_decay=True),
    "Adam without decay": lambda m: Adam(m.parameters(), lr=0.05),
}
every_way = pytest.mark.parametrize("way", WAYS)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def assert_continues(run: Callable[[bool, torch.dtype], Given], dtypes: tuple[torch.dtype, ...] = (F64, F32)) -> None:
    """`run(swapped, dtype)`: a training that is swapped half-way gives what the one that is not gives."""
    plain = {dtype: flat(run(False, dtype)) for dtype in (F64, F32)}
    assert relative(flat(Given(F64)), plain[F64]) > 1e-3  # it has gone somewhere
    for dtype in dtypes:
        ours = flat(run(True, dtype))
        if dtype == F64:
            assert relative(ours, plain[F64]) <= 1e-12
        else:
            assert_within_budget(ours, plain[F64], plain[F32], what="parameters")


# The numbers ----------------------------------------------------------------------------------------------------------


@every_way
def test_continues(way: str) -> None:
    """Steps of torch, the swap, steps of ours: parameters and state of steps of torch only."""
    states: dict[bool, Any] = {}

    def run(swapped: bool, dtype: torch.dtype) -> Given:
        model = Given(dtype)
        optimizer = WAYS[way](model)
        train(model, optimizer, BEFORE)
        if swapped:
            assert dk.swap_optimizer(optimizer) is optimizer and type(optimizer) is dk.optim.AdamW
        train(model, optimizer, AFTER)
        if dtype == F64:
            states[swapped] = optimizer.state_dict()
        return model

    assert_continues(run)
    ours, theirs = states[True], states[False]
    for group in theirs["param_groups"]:
        group["decoupled_weight_decay"] = True  # of an Adam without decay
    assert ours["param_groups"] == theirs["param_groups"]
    for i, state in theirs["state"].items():
        assert ours["state"][i].keys() == state.keys()
        for name, value in state.items():
            assert ours["state"][i][name].dtype == value.dtype or name == "step"
            assert relative(ours["state"][i][name].double(), value.double()) <= 1e-12, (i, name)


def test_the_comparison_notices() -> None:
    """A swap that loses the state, or one count of it, is not what is called continuing."""

    def forgetting(what: str) -> Callable[[bool, torch.dtype], Given]:
        def run(swapped: bool, dtype: torch.dtype) -> Given:
            model = Given(dtype)
            optimizer = WAYS["plain"](model)
            train(model, optimizer, BEFORE)
            if swapped:
                dk.swap_optimizer(optimizer)
                for state in optimizer.state.values():
                    state[what] = state[what] * 0 if what != "step" else state[what] + 1
            train(model, optimizer, AFTER)
            return model

        return run

    for what in ("exp_avg", "exp_avg_sq", "step"):
        with pytest.raises(AssertionError):
            assert_continues(forgetting(what), (F64,))
        with pytest.raises(AssertionError):
            assert_continues(forgetting(what), (F32,))


def test_before_the_first_step() -> None:
    def run(swapped: bool, dtype: torch.dtype) -> Given:
        model = Given(dtype)
        optimizer = WAYS["groups"](model)
        if swapped:
            dk.swap_optimizer(optimizer)
            assert not optimizer.state
        train(model, optimizer, AFTER)
        return model

    assert_continues(run)


def test_parameters_that_begin_at_different_times() -> None:
    """Steps that differ keep their own counter, equal ones share it, and part again where a gradient is missing."""

    def run(swapped: bool, dtype: torch.dtype) -> Given:
        model = Given(dtype)
        optimizer = WAYS["groups"](model)
        model.scale.requires_grad_(False)
        params = list(model.parameters())
        for step in (*BEFORE, *AFTER):
            if swapped and step == AFTER[0]:
                dk.swap_optimizer(optimizer)
                counters = {id(optimizer.state[p]["step"]) for p in params if p in optimizer.state}
                assert len(counters) == 2 and params[3] not in optimizer.state and params[2] not in optimizer.state
            for i, (p, g) in enumerate(zip(params, gradients(step, dtype), strict=True)):
                absent = (i == 3, i == 2 and step < 6, i == 1 and step == 2, i == 4 and step == 7)
                p.grad = None if any(absent) else g
            optimizer.step()
        counts = [float(optimizer.state[p]["step"]) for p in params if p in optimizer.state]
        assert counts == [10.0, 9.0, 4.0, 9.0]
        return model

    assert_continues(run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_master_weights(dtype: torch.dtype) -> None:
    """Moments become float32, the master copies begin at the parameters: what a fresh optimizer loads."""
    model, other = Given(dtype), Given(dtype)
    optimizer = AdamW(model.groups(), lr=0.05)
    train(model, optimizer, BEFORE)
    other.load_state_dict(model.state_dict())
    loaded = dk.optim.AdamW(other.groups(), lr=0.05, master_weights=True)
    loaded.load_state_dict(optimizer.state_dict())
    dk.swap_optimizer(optimizer, master_weights=True)
    train(model, optimizer, AFTER)
    train(other, loaded, AFTER)
    assert_bitwise(flat(model), flat(other))
    same_bits(optimizer.state_dict(), loaded.state_dict())
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {F32}


def test_options() -> None:
    """They are what the constructor would have made of them."""
    model, other = Given(), Given()
    optimizer = dk.swap_optimizer(AdamW(model.parameters(), lr=0.05), max_grad_norm=0.5, ema_decay=0.9)
    made = dk.optim.AdamW(other.parameters(), lr=0.05, max_grad_norm=0.5, ema_decay=0.9)
    train(model, optimizer, AFTER)
    train(other, made, AFTER)
    assert_bitwise(flat(model), flat(other))
    assert optimizer.grad_norm is not None and torch.equal(optimizer.grad_norm, made.grad_norm)
    same_bits(optimizer.state_dict(), made.state_dict())
    assert vars(made).keys() <= vars(optimizer).keys()


def test_has_all_that_a_constructed_one_has() -> None:
    for make in WAYS.values():
        swapped = dk.swap_optimizer(make(Given()))
        made = dk.optim.AdamW(Given().parameters())
        assert vars(made).keys() <= vars(swapped).keys()
        assert swapped.defaults.keys() == made.defaults.keys()
        assert swapped._zero_grad_profile_name == made._zero_grad_profile_name
        keys = swapped.param_groups[0].keys() - {"param_names"}
        assert keys == made.param_groups[0].keys()


def test_idempotent() -> None:
    model = Given()
    optimizer = dk.swap_optimizer(AdamW(model.parameters(), lr=0.05), max_grad_norm=1.0)
    train(model, optimizer, BEFORE)
    before, attributes = copy.deepcopy(optimizer.state_dict()), dict(vars(optimizer))
    assert dk.swap_optimizer(optimizer) is dk.swap_optimizer(optimizer, max_grad_norm=1.0) is optimizer
    assert all(vars(optimizer)[name] is value for name, value in attributes.items())
    same_bits(optimizer.state_dict(), before)
    sgdw = dk.optim.SGDW(model.parameters())
    assert dk.swap_optimizer(sgdw) is sgdw
    with pytest.raises(ValueError, match="max_grad_norm"):
        dk.swap_optimizer(optimizer, max_grad_norm=2.0)


# Schedulers -----------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=12),  # betas too
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["", "tensor_lr"])
@pytest.mark.parametrize("made", ["before", "right after", "after some steps"])
def test_scheduler(name: str, tensor_lr: bool, made: str) -> None:
    """Made before the swap or after: no warning, the same rates, the same parameters."""
    rates: dict[bool, list[Any]] = {}

    def run(swapped: bool, dtype: torch.dtype) -> Given:
        model = Given(dtype)
        optimizer = AdamW(model.groups(), lr=torch.tensor(0.05, dtype=F64) if tensor_lr else 0.05)
        scheduler = SCHEDULERS[name](optimizer) if made == "before" else None
        seen = rates[swapped] = []
        for step in (*BEFORE, *AFTER):
            if swapped and step == (0 if made == "right after" else AFTER[0]):
                dk.swap_optimizer(optimizer)
            if scheduler is None and (made == "right after" or step == AFTER[0]):
                scheduler = SCHEDULERS[name](optimizer)
            backward(model, step)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            seen.append([(float(g["lr"]), tuple(map(float, g["betas"]))) for g in optimizer.param_groups])
        assert optimizer._opt_called and scheduler.optimizer is optimizer
        return model

    assert_continues(run)
    assert rates[True] == rates[False] and len({str(r) for r in rates[True]}) > 2


def test_schedulers_see_a_missing_step() -> None:
    """Their warning still comes where it should, also after the swap."""
    for when in ("before", "after"):
        optimizer = AdamW(Given().parameters())
        if when == "after":
            dk.swap_optimizer(optimizer)
        scheduler = lr_scheduler.StepLR(optimizer, 2)
        dk.swap_optimizer(optimizer)
        with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before"):
            scheduler.step()


def test_our_schedule() -> None:
    model = Given()
    optimizer = AdamW(model.parameters(), lr=0.05)
    schedule = dk.optim.CosineWarmRestarts(optimizer, 3)
    dk.swap_optimizer(optimizer)
    for step in range(5):
        backward(model, step)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] != 0.05


def test_nothing_keeps_it_alive() -> None:
    """The wrapped step must not make a cycle out of the optimizer."""
    model = Given()
    optimizer = AdamW(model.parameters())
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    dk.swap_optimizer(optimizer)
    train(model, optimizer, range(1))
    gone = weakref.ref(optimizer)
    gc.collect()
    gc.disable()
    try:
        del scheduler, optimizer
        assert gone() is None
    finally:
        gc.enable()


# Hosts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("clip", [False, True], ids=["", "clip"])
def test_grad_scaler(fused: bool, clip: bool) -> None:
    """Steps are skipped before the swap and after; the scaler unscales, or leaves it to the step as before."""
    scales: dict[bool, list[float]] = {}

    def run(swapped: bool, dtype: torch.dtype) -> Given:
        model = Given(dtype)
        optimizer = AdamW(model.groups(), lr=0.05, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        scales[swapped] = []
        for step in (*BEFORE, *AFTER):
            if swapped and step == AFTER[0]:
                dk.swap_optimizer(optimizer)
                assert optimizer.fused_unscale == fused
            factor = scaler.get_scale()
            scaler.scale(torch.zeros(()))
            backward(model, step, factor)
            if step in (2, 6):
                model.bias.grad[3] = math.inf
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 2.0)
            scaler.step(optimizer)
            scaler.update()
            scales[swapped].append(scaler.get_scale())
        assert {float(s["step"]) for s in optimizer.state.values()} == {8.0}
        return model

    assert_continues(run)
    assert scales[True] == scales[False]


def test_fused_unscale_can_be_turned_off() -> None:
    optimizer = dk.swap_optimizer(AdamW(Given().parameters(), fused=True), fused_unscale=False)
    assert optimizer._step_supports_amp_scaling is False and not optimizer.fused_unscale
    assert "found_inf" not in vars(optimizer)


def test_hooks_and_closure() -> None:
    """Hooks of before the swap are called after it, and can be taken off."""
    model, said = Given(), []
    optimizer = AdamW(model.parameters(), lr=0.05)
    handles = [
        optimizer.register_step_pre_hook(lambda o, a, k: said.append("pre step")),
        optimizer.register_step_post_hook(lambda o, a, k: said.append("post step")),
        optimizer.register_state_dict_pre_hook(lambda o: said.append("pre save")),
        optimizer.register_state_dict_post_hook(lambda o, d: said.append("post save")),
        optimizer.register_load_state_dict_pre_hook(lambda o, d: said.append("pre load")),
        optimizer.register_load_state_dict_post_hook(lambda o: said.append("post load")),
    ]
    lr_scheduler.StepLR(optimizer, 2)
    dk.swap_optimizer(optimizer)
    assert optimizer.step(lambda: backward(model, 0)) is not None
    optimizer.load_state_dict(optimizer.state_dict())
    assert said == ["pre step", "post step", "pre save", "post save", "pre load", "post load"]
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert len(said) == 6


def test_groups_added_later() -> None:
    def run(swapped: bool, dtype: torch.dtype) -> Given:
        model = Given(dtype)
        first, *others = model.named_parameters()
        optimizer = AdamW([first], lr=0.05, weight_decay=0.2)
        train(model, optimizer, BEFORE)
        if swapped:
            dk.swap_optimizer(optimizer)
        optimizer.add_param_group({"params": others, "lr": 0.02})
        train(model, optimizer, AFTER)
        assert optimizer.param_groups[1]["weight_decay"] == 0.2
        return model

    assert_continues(run)


@pytest.mark.needs("hosts")
def test_accelerate() -> None:
    """Swapped before `prepare`, and after it where there is no scaler; the wrapper itself is refused."""
    import accelerate

    for after in (False, True):

        def run(swapped: bool, dtype: torch.dtype, after: bool = after) -> Given:
            model = Given(dtype)
            inner = AdamW(model.parameters(), lr=0.05)
            if swapped and not after:
                dk.swap_optimizer(inner)
            accelerator = accelerate.Accelerator(cpu=True)
            wrapper = accelerator.prepare(inner)
            train(model, wrapper, BEFORE)
            if swapped and after:
                with pytest.raises(TypeError, match=r"AcceleratedOptimizer, which wraps another one"):
                    dk.swap_optimizer(wrapper)
                dk.swap_optimizer(inner)
            train(model, wrapper, AFTER)
            assert type(inner) is (dk.optim.AdamW if swapped else AdamW)
            return model

        assert_continues(run)


# Copies, files and the way back ---------------------------------------------------------------------------------------


def saved(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_way
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), saved],
                         ids=["deepcopy", "pickle", "save"])  # fmt: skip
def test_copies(way: str, copied: Callable[[Any], Any]) -> None:
    model = Given()
    optimizer = WAYS[way](model)
    lr_scheduler.StepLR(optimizer, 2)
    train(model, optimizer, BEFORE)
    dk.swap_optimizer(optimizer)
    train(model, optimizer, range(4, 6))
    model_of_copy, copy_of_it = copied((model, optimizer))
    assert type(copy_of_it) is dk.optim.AdamW
    train(model, optimizer, range(6, 9))
    train(model_of_copy, copy_of_it, range(6, 9))
    assert_bitwise(flat(model_of_copy), flat(model))
    same_bits(copy_of_it.state_dict(), optimizer.state_dict())


@every_way
def test_state_dicts(way: str) -> None:
    """Saved before, loaded after the swap; saved after it, loaded into torch's, which goes on alike."""
    model, other = Given(F64), Given(F64)
    optimizer, plain = WAYS[way](model), WAYS[way](other)
    train(model, optimizer, BEFORE)
    early, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    dk.swap_optimizer(optimizer)
    train(model, optimizer, range(4, 6))
    other.load_state_dict(model.state_dict())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, range(6, 9))
    train(other, plain, range(6, 9))
    assert type(plain) in (Adam, AdamW) and relative(flat(other), flat(model)) <= 1e-12
    optimizer.load_state_dict(early)
    model.load_state_dict(weights)
    train(model, optimizer, range(4, 9))
    assert relative(flat(model), flat(other)) <= 1e-12


@every_way
def test_restored(way: str) -> None:
    """There and back: torch's own class, counters of their own, and a scheduler that has seen all of it."""
    kept: list[Optimizer] = []

    def run(swapped: bool, dtype: torch.dtype) -> Given:
        model = Given(dtype)
        optimizer = WAYS[way](model)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)
        cls, attributes = type(optimizer), set(vars(optimizer))
        flags = [group["decoupled_weight_decay"] for group in optimizer.param_groups]
        for step in (*BEFORE, *AFTER):
            if swapped and step == 2:
                dk.swap_optimizer(optimizer)
            if swapped and step == 6:
                assert dk.restore_optimizer(optimizer) is optimizer is dk.restore_optimizer(optimizer)
                assert type(optimizer) is cls and attributes - set(vars(optimizer)) == set()
                assert set(vars(optimizer)) - attributes == {"_opt_called"}
                assert [group["decoupled_weight_decay"] for group in optimizer.param_groups] == flags
                counters = {id(state["step"]) for state in optimizer.state.values()}
                assert len(counters) == len(optimizer.state)
            backward(model, step)
            optimizer.step()
            scheduler.step()
        kept[:] = [optimizer]
        return model

    assert_continues(run)
    train(Given(), dk.swap_optimizer(kept[0]), range(1))


def test_restored_with_master_weights() -> None:
    """Moments go back to the parameters' dtype, which torch's kernels need."""
    model = Given(torch.bfloat16)
    optimizer = dk.swap_optimizer(AdamW(model.parameters(), lr=0.05, foreach=True), master_weights=True)
    train(model, optimizer, BEFORE)
    dk.restore_optimizer(optimizer)
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} == {torch.bfloat16}
    before = flat(model).clone()
    train(model, optimizer, AFTER)
    assert not torch.equal(before, flat(model))


# What is refused ------------------------------------------------------------------------------------------------------


class OwnAdamW(AdamW):
    pass


class Wrapper(Optimizer):
    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer


def bad() -> Iterator[tuple[Any, dict[str, Any], type[Exception], str]]:
    def params() -> list[nn.Parameter]:
        return [nn.Parameter(torch.zeros(3))]

    yield 5, {}, TypeError, "`optimizer` must be a torch.optim.AdamW, got int"
    yield torch.optim.SGD(params(), 0.1), {}, TypeError, "got SGD: its decay is L2 and dlkernels.optim.SGDW"
    yield torch.optim.RAdam(params()), {}, TypeError, "got torch.optim.radam.RAdam: another formula"
    yield OwnAdamW(params()), {}, TypeError, "OwnAdamW: a subclass whose step may differ"
    yield Wrapper(AdamW(params())), {}, TypeError, "Wrapper, which wraps another one: swap that one"
    yield Adam(params(), weight_decay=0.1), {}, ValueError, "group 0 has L2 decay of 0.1"
    mixed = [{"params": params()}, {"params": params(), "decoupled_weight_decay": False}]
    yield AdamW(mixed), {}, ValueError, "group 1 has L2 decay of 0.01"
    yield AdamW(params(), differentiable=True), {}, ValueError, "`differentiable` must be False"
    yield AdamW([nn.Parameter(torch.zeros(3, dtype=torch.complex64))]), {}, TypeError, "parameters must be real"
    yield AdamW(params()), {"momentum": 0.9}, TypeError, "`momentum` must be one of max_grad_norm, "
    yield AdamW(params()), {"max_grad_norm": -1.0}, ValueError, "`max_grad_norm` must be > 0"
    replaced = AdamW(params())
    replaced.step = replaced.step
    yield replaced, {}, ValueError, "`optimizer` must have the step of its class"
    compiled = AdamW(params())
    compiled.step = torch.compile(compiled.step)
    yield compiled, {}, ValueError, "swap before a trainer, a wrapper or a compiler replaces it"


@pytest.mark.parametrize("case", range(13))
def test_refused(case: int) -> None:
    """One line, and nothing has changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer, options, error, text = list(bad())[case]
    is_plain = isinstance(optimizer, Optimizer) and "param_groups" in vars(optimizer)
    before = (type(optimizer), dict(vars(optimizer)), copy.deepcopy(optimizer.param_groups)) if is_plain else None
    with pytest.raises(error) as raised:
        dk.swap_optimizer(optimizer, **options)
    assert text in str(raised.value) and "\n" not in str(raised.value)
    if before is not None:
        assert type(optimizer) is before[0] and vars(optimizer) == before[1]
        assert [g.keys() for g in optimizer.param_groups] == [g.keys() for g in before[2]]


def test_all_that_is_refused_is_tested() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert len(list(bad())) == 13


def test_a_step_kept_from_before() -> None:
    """It would count every shared counter once for each parameter: it raises, and changes nothing."""
    model = Given()
    optimizer = AdamW(model.parameters())
    step = optimizer.step
    train(model, optimizer, BEFORE)
    dk.swap_optimizer(optimizer)
    backward(model, 4)
    before = flat(model).clone()
    with pytest.raises(RuntimeError, match="had been taken before swap_optimizer"):
        step()
    assert_bitwise(flat(model), before)
    optimizer.step()
    assert {float(s["step"]) for s in optimizer.state.values()} == {5.0}


def test_restore_refuses() -> None:
    params = list(Given().parameters())
    with pytest.raises(TypeError, match=r"must be a dlkernels.optim.AdamW, got dlkernels.optim.sgdw.SGDW"):
        dk.restore_optimizer(dk.optim.SGDW(params))
    with pytest.raises(ValueError, match="decoupling='lr'"):
        dk.restore_optimizer(dk.optim.AdamW(params, decoupling="schedule"))
    optimizer = dk.optim.AdamW(params, ema_decay=0.9)
    optimizer.swap_ema()
    with pytest.raises(RuntimeError, match="swap_ema"):
        dk.restore_optimizer(optimizer)
