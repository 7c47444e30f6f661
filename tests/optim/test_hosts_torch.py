"""The optimizers beside what torch itself puts around an optimizer: each host gives what it gives with torch's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _hosts import KINDS, Given, Make, assert_trains_alike, backward, flat, gradients, train
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

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
@pytest.mark.parametrize("clip", [None, "host", "step"])
@pytest.mark.parametrize("fused_unscale", [False, True], ids=["", "fused_unscale"])
def test_grad_scaler(kind: str, clip: str | None, fused_unscale: bool) -> None:
    """The scaler unscales, or with `fused_unscale=True` the step, which then looks at `found_inf` itself.

    Clipping is done by the host between the two, or with `max_grad_norm` by the step.
    """

    def run(make: Make, dtype: torch.dtype) -> Any:
        if make is KINDS[kind].plain:
            return with_scaler(make, dtype, KINDS[kind].options, 0.5 if clip else None)
        more = {"fused_unscale": fused_unscale, "max_grad_norm": 0.5 if clip == "step" else None}
        return with_scaler(make, dtype, {**KINDS[kind].options, **more}, 0.5 if clip == "host" else None)

    (_, ours, scales), (_, _, expected) = assert_trains_alike(kind, run)
    assert scales == expected and len(set(scales)) > 2
    assert getattr(ours, "_step_supports_amp_scaling", False) == fused_unscale
    if kind == "adamw":
        assert steps_of(ours) == {5.0}


@both
def test_fused_does_not_take_the_scale_over(kind: str) -> None:
    """`fused=True`, which trainers pass for speed, does not forbid them to clip."""
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


# torch.compile --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("what", ["training", "step"])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.needs("compiler"))])
def test_compiled(kind: str, what: str, compiler: str) -> None:
    """Loss, backward and step in one compiled function, or only the step: what eager makes, bit for bit."""
    results = []
    torch._dynamo.reset()
    for compiled in (False, True):
        model = Given()
        optimizer = KINDS[kind].ours(model.groups(), **KINDS[kind].options)
        schedule = lr_scheduler.ExponentialLR(optimizer, 0.9)

        def training(wanted: list[Tensor], model: Given = model, optimizer: Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            model(wanted).backward()
            optimizer.step()

        def step(wanted: list[Tensor], model: Given = model, optimizer: Optimizer = optimizer) -> None:
            optimizer.step()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            run = training if what == "training" else step
            run = torch.compile(run, backend=compiler) if compiled else run
            for number in range(5):
                if what == "step":
                    backward(model, number)
                run(gradients(number))
                schedule.step()
        results.append((model, optimizer))
    (eager, first), (other, second) = results
    assert not torch.equal(flat(eager), flat(Given()))
    assert_bitwise(flat(other), flat(eager), f"{kind} compiled with {compiler}")
    assert steps_of(first) == steps_of(second)
    torch._dynamo.reset()
