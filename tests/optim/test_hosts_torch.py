"""The optimizers beside what torch itself puts around an optimizer: each host gives what it gives with torch's."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _hosts import KINDS, ONLY_TORCH, Given, Make, assert_trains_alike, backward, flat, gradients, train
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dlkernels.testing import assert_bitwise

pytestmark = pytest.mark.filterwarnings("error")
both = pytest.mark.parametrize("kind", KINDS)

# GradScaler -----------------------------------------------------------------------------------------------------------

BAD = {2: math.inf, 4: math.nan, 5: -math.inf}  # steps with such a gradient, and what it is


def with_scaler(
    make: Make, dtype: torch.dtype, options: dict[str, Any], clip: float | None = None
) -> tuple[Given, torch.optim.Optimizer, list[float]]:
    """Eight steps under a GradScaler, three of them with a bad gradient."""
    model = Given(dtype)
    optimizer = make(model.groups(), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    scales = []
    for step in range(8):
        factor = scaler.get_scale()
        scaler.scale(torch.zeros(()))  # makes the scale
        backward(model, step, factor)
        if step in BAD:
            model.bias.grad[3] = BAD[step]
        before = flat(model).clone()
        if clip is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        assert scaler.step(optimizer) is None
        assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
        scaler.update()
        assert torch.equal(before, flat(model)) == (step in BAD), f"step {step}"
        scales.append(scaler.get_scale())
    return model, optimizer, scales


def steps_of(optimizer: torch.optim.Optimizer) -> set[float]:
    return {float(state["step"]) for state in optimizer.state.values() if "step" in state}


@both
@pytest.mark.parametrize("clip", [None, 0.5])
def test_grad_scaler(kind: str, clip: float | None) -> None:
    """The scaler unscales: our default has no say in it, whatever `fused=` says."""
    options = KINDS[kind].options
    (_, ours, scales), (_, _, expected) = assert_trains_alike(kind, lambda m, d: with_scaler(m, d, options, clip))
    assert scales == expected and len(set(scales)) > 2
    assert not getattr(ours, "_step_supports_amp_scaling", False)
    if kind == "adamw":
        assert steps_of(ours) == {5.0}


@both
@pytest.mark.parametrize("clip", [None, 0.5])
def test_grad_scaler_unscaling_in_the_step(kind: str, clip: float | None) -> None:
    """With `fused_unscale=True` the step divides by `grad_scale` and looks at `found_inf` itself."""

    def run(make: Make, dtype: torch.dtype) -> Any:
        plain = make is KINDS[kind].plain
        more = ({"fused": True} if kind == "adamw" else {}) if plain else {"fused_unscale": True}
        return with_scaler(make, dtype, {**KINDS[kind].options, **more}, clip)

    (_, ours, scales), (_, _, expected) = assert_trains_alike(kind, run)
    assert scales == expected
    if not ONLY_TORCH:
        assert ours._step_supports_amp_scaling
    if kind == "adamw":
        assert steps_of(ours) == {5.0}


@both
def test_fused_does_not_take_the_scale_over(kind: str) -> None:
    """`fused=True`, which trainers pass for speed, does not forbid them to clip."""
    if ONLY_TORCH or kind == "sgdw":
        pytest.skip("of torch's own class by design")
    optimizer = KINDS[kind].ours(Given().parameters(), fused=True)
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)


# Schedulers -----------------------------------------------------------------------------------------------------------

Optimizer = torch.optim.Optimizer
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [4, 9], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 6),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=8),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 10)], [5]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 15, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 7, 1e-3),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 6), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3, 2, 1e-3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 21),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.002, 6),
}


def test_every_scheduler_of_torch_is_listed() -> None:
    def below(cls: type) -> Iterator[type]:
        for sub in cls.__subclasses__():
            yield sub
            yield from below(sub)

    found = {cls.__name__ for cls in below(lr_scheduler.LRScheduler) if cls.__module__.startswith("torch.optim")}
    assert found - {"_LRScheduler"} == SCHEDULERS.keys()


@both
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_scheduler(kind: str, name: str, tensor_lr: bool) -> None:
    def run(make: Make, dtype: torch.dtype) -> Any:
        model = Given(dtype)
        first, *others = model.parameters()
        groups = [{"params": [first]}, {"params": others, "lr": torch.tensor(0.03) if tensor_lr else 0.03}]
        optimizer = make(groups, **KINDS[kind].options)
        scheduler = SCHEDULERS[name](optimizer)
        said = []
        for step in range(20):
            train(model, optimizer, [step])
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            momenta = [g["betas"] if "betas" in g else g["momentum"] for g in optimizer.param_groups]
            said.append(([float(g["lr"]) for g in optimizer.param_groups], momenta))
        return model, optimizer, said

    (_, ours, said), (_, _, expected) = assert_trains_alike(kind, run, name)
    assert said == expected
    assert len({str(rates) for rates, _ in said}) > 1, "a schedule that stands still shows nothing"
    assert len({str(momenta) for _, momenta in said}) > 1 or name not in ("CyclicLR", "OneCycleLR")
    assert isinstance(ours.param_groups[1]["lr"], Tensor) == tensor_lr


@both
def test_swa_and_averaged_model(kind: str) -> None:
    """AveragedModel sees each step's parameters: running mean and exponential average."""
    for options in ({}, {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.8)}):

        def run(make: Make, dtype: torch.dtype, options: dict[str, Any] = options) -> Any:
            model = Given(dtype)
            optimizer = make(model.groups(), **KINDS[kind].options)
            average = swa_utils.AveragedModel(model, **options)
            for step in range(8):
                train(model, optimizer, [step])
                average.update_parameters(model)
            assert not torch.equal(flat(average.module), flat(model))
            return average.module

        assert_trains_alike(kind, run, "average")


# The protocol of torch.optim.Optimizer --------------------------------------------------------------------------------


@both
def test_closure(kind: str) -> None:
    """Called once, with gradients on, its result returned; the step uses the gradients that it makes."""

    def run(make: Make, dtype: torch.dtype) -> Given:
        model = Given(dtype)
        optimizer = make(model.groups(), **KINDS[kind].options)
        for step in range(4):
            calls = []

            def closure(step: int = step, calls: list[Tensor] = calls) -> Tensor:
                assert torch.is_grad_enabled()
                calls.append(backward(model, step))
                return calls[-1]

            with torch.no_grad():
                assert optimizer.step(closure) is calls[0]
            assert len(calls) == 1
            assert optimizer.step(closure=lambda: 3.5) == 3.5
            assert optimizer.step() is None
        return model

    assert_trains_alike(kind, run)


@both
def test_step_hooks(kind: str) -> None:
    """Before and after each step, of the instance and of all optimizers; a pre-hook may change the arguments."""
    model = Given()
    optimizer = KINDS[kind].ours(model.parameters(), **KINDS[kind].options)
    said: list[Any] = []

    def before(o: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        said.append(("before", o is optimizer, flat(model).clone()))
        return (args[0], lambda: 2.5), kwargs

    def after(o: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        said.append(("after", o is optimizer, flat(model).clone()))

    handles = [
        register_optimizer_step_pre_hook(lambda *_: said.append(("all before",))),
        register_optimizer_step_post_hook(lambda *_: said.append(("all after",))),
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
    ]
    backward(model, 0)
    start = flat(model).clone()
    try:
        assert optimizer.step(lambda: 1.5) == 2.5
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(entry[0] for entry in said) == ["after", "all after", "all before", "before"]
    found = {entry[0]: entry for entry in said}
    assert_bitwise(found["before"][2], start)
    assert_bitwise(found["after"][2], flat(model))
    assert not torch.equal(start, flat(model)) and found["before"][1] and found["after"][1]
    assert optimizer.step(lambda: 1.5) == 1.5 and len(said) == 4


@both
def test_state_dict_hooks(kind: str) -> None:
    model = Given()
    optimizer = KINDS[kind].ours(model.parameters(), **KINDS[kind].options)
    train(model, optimizer, range(2))
    said: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: said.append("pre save"))
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "mark": len(said)})
    optimizer.register_load_state_dict_pre_hook(lambda o, d: {k: v for k, v in d.items() if k != "mark"})
    optimizer.register_load_state_dict_post_hook(lambda o: said.append("post load"))
    saved = optimizer.state_dict()
    assert saved["mark"] == 1 and said == ["pre save"]
    optimizer.load_state_dict(saved)
    assert said == ["pre save", "post load"]


@both
def test_named_parameters(kind: str) -> None:
    """`named_parameters()` instead of `parameters()`: the names come back, and go into the state_dict."""
    saved = []
    for make in (KINDS[kind].ours, KINDS[kind].plain):
        model = Given()
        optimizer = make(model.named_parameters(), **KINDS[kind].options)
        train(model, optimizer, range(2))
        saved.append(optimizer.state_dict())
    names = [[group["param_names"] for group in entry["param_groups"]] for entry in saved]
    assert names[0] == names[1] == [[name for name, _ in Given().named_parameters()]]
    model = Given()
    optimizer = KINDS[kind].ours(model.named_parameters(), **KINDS[kind].options)
    optimizer.load_state_dict(saved[0])
    assert optimizer.state_dict()["param_groups"] == saved[0]["param_groups"]


@both
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(kind: str, to_none: bool) -> None:
    """With None a parameter stands still; with zeros it decays and its moments go on."""

    def run(make: Make, dtype: torch.dtype) -> Given:
        model = Given(dtype)
        optimizer = make(model.groups(), **KINDS[kind].options)
        train(model, optimizer, range(3))
        optimizer.zero_grad(set_to_none=to_none)
        assert all((p.grad is None) == to_none and (to_none or not p.grad.any()) for p in model.parameters())
        before = flat(model).clone()
        optimizer.step()
        assert torch.equal(before, flat(model)) == to_none
        train(model, optimizer, range(3, 6))
        return model

    assert_trains_alike(kind, run)


@both
def test_add_param_group_in_mid_training(kind: str) -> None:
    """Each parameter counts its own steps, also those that now and then have no gradient."""

    def run(make: Make, dtype: torch.dtype) -> Any:
        model = Given(dtype)
        params = list(model.parameters())
        optimizer = make(params[:2], **KINDS[kind].options)
        for step in range(9):
            if step == 3:
                optimizer.add_param_group({"params": params[2:4], "lr": 0.2})
            if step == 5:
                optimizer.add_param_group({"params": params[4:], "weight_decay": 0.5})
            backward(model, step)
            if step % 4 == 1:
                params[0].grad = None
            optimizer.step()
        return model, [optimizer.state[p].get("step") for p in params]

    (_, steps), (_, expected) = assert_trains_alike(kind, run)
    if kind == "adamw":
        assert steps == expected == [7, 9, 6, 6, 4]


# Copies and files -----------------------------------------------------------------------------------------------------


def saved_and_loaded(model: Given, optimizer: Optimizer, make: Make) -> tuple[Given, Optimizer]:
    """Through torch.save and torch.load(weights_only=True), into an optimizer made with other options."""
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    fresh = Given()
    fresh.load_state_dict(weights)
    other = make(fresh.groups(), lr=9.0)
    other.load_state_dict(state)
    return fresh, other


COPIES: dict[str, Callable[[Given, Optimizer, Make], tuple[Given, Optimizer]]] = {
    "deepcopy": lambda model, optimizer, make: copy.deepcopy((model, optimizer)),
    "pickle": lambda model, optimizer, make: pickle.loads(pickle.dumps((model, optimizer))),
    "file": saved_and_loaded,
}


@both
@pytest.mark.parametrize("way", COPIES)
def test_copy_goes_on_as_the_original_would(kind: str, way: str) -> None:
    make, options = KINDS[kind].ours, KINDS[kind].options
    model = Given()
    optimizer = make(model.groups(), **options)
    train(model, optimizer, range(3))
    before = flat(model).clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        twin, other = COPIES[way](model, optimizer, make)
    assert type(other) is type(optimizer)
    train(twin, other, range(3, 7))
    assert_bitwise(flat(model), before, "the original, after its copy has moved")
    train(model, optimizer, range(3, 7))
    assert_bitwise(flat(twin), flat(model), way)
    mine = {id(t) for state in optimizer.state.values() for t in state.values()}
    assert not mine & {id(t) for state in other.state.values() for t in state.values()}


@pytest.mark.parametrize("into", ["ours", "plain"])
def test_file_of_the_other_adamw(into: str) -> None:
    """A checkpoint of torch's goes on with ours, and one of ours with torch's, as the run would have without."""

    def run(make: Make, dtype: torch.dtype) -> Given:
        first, second = KINDS["adamw"].plain, make
        if into == "plain":
            first, second = second, first
        model = Given(dtype)
        optimizer = first(model.groups(), **KINDS["adamw"].options)
        train(model, optimizer, range(3))
        state = optimizer.state_dict()
        optimizer = second(model.groups(), lr=9.0)
        optimizer.load_state_dict(state)
        train(model, optimizer, range(3, 7))
        return model

    assert_trains_alike("adamw", run)


# torch.compile --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.needs("compiler"))])
def test_compiled_training_step(kind: str, compiler: str) -> None:
    """Loss, backward and step in one compiled function, under a schedule: what eager makes, bit for bit."""
    results = []
    torch._dynamo.reset()
    for compiled in (False, True):
        model = Given()
        optimizer = KINDS[kind].ours(model.groups(), **KINDS[kind].options)
        schedule = lr_scheduler.ExponentialLR(optimizer, 0.9)

        def step(wanted: list[Tensor], model: Given = model, optimizer: Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = model(wanted)
            loss.backward()
            optimizer.step()
            return loss

        run = torch.compile(step, backend=compiler) if compiled else step
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            for number in range(5):
                run(gradients(number))
                schedule.step()
        results.append((model, optimizer))
    (eager, first), (other, second) = results
    assert_bitwise(flat(other), flat(eager), f"{kind} compiled with {compiler}")
    assert steps_of(first) == steps_of(second)
    torch._dynamo.reset()
