"""Warm restarts against the paper, against torch's scheduler, and under what trainers do with a scheduler."""

from __future__ import annotations

import copy
import decimal
import doctest
import io
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from dlkernels import optim
from dlkernels.optim import CosineWarmRestarts, normalized_weight_decay, warm_restarts

EPS = torch.finfo(torch.float64).eps
SIZES = {"batch_size": 128, "dataset_size": 50_000}


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Tests of the schedule alone do not train.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step\\(\\)` before")
        yield


def weight(dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, 5, dtype=dtype))


def sgd(lr: Any = 0.5, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([weight()], lr=lr, **options)


def two_groups(kind: type = torch.optim.AdamW, **options: Any) -> torch.optim.Optimizer:
    groups = [{"params": [weight()], "weight_decay": 0.1}, {"params": [weight()], "weight_decay": 0.0, "lr": 0.5}]
    return kind(groups, lr=0.25, **options)


def rate(optimizer: torch.optim.Optimizer, group: int = 0) -> float:
    return float(optimizer.param_groups[group]["lr"])


def decays(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["weight_decay"]) for group in optimizer.param_groups]


class Scheduled(torch.optim.Optimizer):
    """SGD whose decay is eta_t * weight_decay * theta, the paper's: what decoupling="schedule" says."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "decoupling": "schedule"})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            eta = group["lr"] / group["initial_lr"]
            for p in group["params"]:
                p.copy_(p - eta * (group["initial_lr"] * p.grad + group["weight_decay"] * p))


# Normalised decay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0.025, 128, 50_000, 100), 1.264911e-4),
        ((0.025, 128, 50_000, 1500), 3.265986e-5),
        ((0.025, 1, 391, 100), 1.264304e-4),  # the authors count batches
        ((0.05, 10, 1000, 0.25), 0.01),
        ((0, 1, 1, 1), 0.0),
    ],
)
def test_normalized_weight_decay(arguments: tuple[float, ...], expected: float) -> None:
    assert normalized_weight_decay(*arguments) == pytest.approx(expected, rel=5e-7, abs=0)


@pytest.mark.parametrize("name", ["weight_decay_norm", "batch_size", "dataset_size", "epochs"])
def test_normalized_weight_decay_rejects(name: str) -> None:
    good = {"weight_decay_norm": 0.025, "batch_size": 128, "dataset_size": 50_000, "epochs": 100}
    for value in (-1, math.nan, math.inf, *((0,) if name != "weight_decay_norm" else ())):
        with pytest.raises(ValueError, match=f"^`{name}` must be a finite number >=? ?0.*got {value}"):
            normalized_weight_decay(**{**good, name: value})
    with pytest.raises(TypeError, match=f"^`{name}` must be a number, got str"):
        normalized_weight_decay(**{**good, name: "many"})


# The rates ------------------------------------------------------------------------------------------------------------


def test_values_of_the_paper() -> None:
    """Equation 14, written out: the ends and the quarters of two cycles, with a floor."""
    optimizer = sgd(lr=2.0)
    scheduler = CosineWarmRestarts(optimizer, T_0=4, T_mult=2, eta_min=0.1)
    half = math.sqrt(0.5)
    expected = {0: 1, 1: 0.1 + 0.45 * (1 + half), 2: 0.55, 3: 0.1 + 0.45 * (1 - half), 4: 1, 8: 0.55, 12: 1, 20: 0.55}
    for epoch in range(28):
        if epoch in expected:
            assert rate(optimizer) == pytest.approx(2 * expected[epoch], rel=4 * EPS, abs=0), epoch
        scheduler.step()
    scheduler.step(11.9999999)
    assert rate(optimizer) == pytest.approx(0.2, rel=1e-12)  # eta_min multiplies; it is not a learning rate


@pytest.mark.parametrize(("T_0", "T_mult"), [(1, 1), (5, 1), (7, 1), (3, 2), (4, 3), (1, 5)])
def test_steps_equal_torch(T_0: int, T_mult: int) -> None:
    ours, theirs = sgd(), sgd()
    a = CosineWarmRestarts(ours, T_0, T_mult)
    b = lr_scheduler.CosineAnnealingWarmRestarts(theirs, T_0, T_mult)
    for _ in range(140):
        assert (rate(ours), a.T_cur, a.T_i, a.last_epoch) == (rate(theirs), b.T_cur, b.T_i, b.last_epoch)
        assert a.get_last_lr() == b.get_last_lr() == [rate(ours)]
        a.step()
        b.step()


@pytest.mark.parametrize(("T_0", "T_mult"), [(1, 1), (5, 1), (3, 2), (4, 2)])
def test_fractional_epochs_equal_torch(T_0: int, T_mult: int) -> None:
    ours, theirs = sgd(), sgd()
    a = CosineWarmRestarts(ours, T_0, T_mult)
    b = lr_scheduler.CosineAnnealingWarmRestarts(theirs, T_0, T_mult)
    for batch in range(7 * 40):
        epoch = batch // 7 + batch % 7 / 7
        a.step(epoch)
        b.step(epoch)
        assert (rate(ours), a.T_cur, a.T_i, a.last_epoch) == (rate(theirs), b.T_cur, b.T_i, b.last_epoch), epoch
    for epoch in (26, 0, 13.25, 3.5, None, None, 2.25, None):  # jumps, and bare steps after them
        a.step(epoch)
        b.step(epoch)
        assert (rate(ours), a.T_cur) == (rate(theirs), b.T_cur), epoch


@pytest.mark.parametrize("T_mult", [2, 3, 5, 10])
def test_a_jump_to_a_restart_is_a_restart(T_mult: int) -> None:
    """Also where log((m^n - 1) + 1, m) rounds to less than n, as for 3^5."""
    optimizer = sgd()
    scheduler = CosineWarmRestarts(optimizer, 1, T_mult)
    for n in range(1, 9):
        scheduler.step((T_mult**n - 1) // (T_mult - 1))
        assert (scheduler.cycle, scheduler.T_cur, scheduler.T_i, rate(optimizer)) == (n, 0, T_mult**n, 0.5)


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 7, 10, 391, 97.5])
@pytest.mark.parametrize(("T_0", "T_mult"), [(2, 1), (1, 2), (0.1, 1), (0.3, 1), (0.7, 1.1), (1.5, 1.5)])
def test_bare_steps_by_batches(steps_per_epoch: float, T_0: float, T_mult: float) -> None:
    """A restart comes with the first batch at or after it, and never later for the sake of rounding."""
    optimizer = sgd(lr=1.0)
    scheduler = CosineWarmRestarts(optimizer, T_0, T_mult, steps_per_epoch=steps_per_epoch)
    number = [decimal.Decimal(repr(float(x))) for x in (T_0, T_mult, steps_per_epoch)]  # decimals as they are written
    start, length, cycle = decimal.Decimal(0), number[0], 0
    for step in range(1200):
        while step >= (start + length) * number[2]:
            start, length, cycle = start + length, length * number[1], cycle + 1
        T_cur = float(step / number[2] - start)
        assert (scheduler.last_epoch, scheduler.cycle) == (step, cycle)
        assert abs(scheduler.T_cur - T_cur) <= 16 * EPS * (1 + step / steps_per_epoch)
        scheduler.step()


def test_batches_equal_fractional_epochs() -> None:
    """step() with steps_per_epoch and step(epoch + i / n) are the same schedule, and a jump keeps its place."""
    ours, theirs = sgd(), sgd()
    a = CosineWarmRestarts(ours, 2, 2, 0.1, steps_per_epoch=8)
    b = CosineWarmRestarts(theirs, 2, 2, 0.1)
    for batch in range(8 * 15):
        b.step(batch / 8)
        assert rate(ours) == rate(theirs) and (a.T_cur, a.cycle) == (b.T_cur, b.cycle)
        a.step()
    a.step(3.3125)
    a.step()
    b.step(3.4375)
    assert rate(ours) == rate(theirs) and a.last_epoch == 27


@pytest.mark.needs("hypothesis")
def test_closed_form_equals_a_slow_loop() -> None:
    from hypothesis import assume, given
    from hypothesis import strategies as st

    lengths = st.one_of(st.integers(1, 30), st.floats(0.125, 40))
    growths = st.one_of(st.sampled_from([1, 2, 3]), st.floats(1, 4), st.floats(0, 1e-3).map(lambda x: 1 + x))
    epochs = st.one_of(st.integers(0, 300), st.floats(0, 300), st.integers(0, 4000).map(lambda i: i / 13))

    @given(lengths, growths, st.floats(0, 1), st.lists(epochs, min_size=1, max_size=6))
    def holds(T_0: float, T_mult: float, eta_min: float, jumps: list[float]) -> None:
        optimizer = sgd(lr=1.0)
        scheduler = CosineWarmRestarts(optimizer, T_0, T_mult, eta_min)
        for epoch in jumps:
            now, start, length, cycle = decimal.Decimal(epoch), decimal.Decimal(0), decimal.Decimal(T_0), 0
            late = now * (1 + decimal.Decimal("1e-12"))
            while late >= start + length:
                start, length, cycle = start + length, length * decimal.Decimal(T_mult), cycle + 1
            # Where rounding may decide on which side of a restart an epoch is, there is nothing to compare.
            assume(all(abs(late - x) > now * decimal.Decimal("1e-13") for x in (start, start + length)) or epoch == 0)
            T_cur, T_i = float(max(now - start, decimal.Decimal(0))), float(length)
            scheduler.step(epoch)
            assert scheduler.cycle == cycle
            # Rounding of m^n and of the epoch at which the cycle began, in units of the cycle.
            error = 32 * EPS * (1 + epoch / T_i)
            assert abs(scheduler.T_i - T_i) <= 32 * EPS * (1 + cycle) * T_i
            exact = eta_min + (1 - eta_min) * (1 + math.cos(math.pi * T_cur / T_i)) / 2
            assert abs(rate(optimizer) - exact) <= math.pi / 2 * error
            assert eta_min * (1 - EPS) <= rate(optimizer) <= 1 + EPS

    with decimal.localcontext() as context:
        context.prec = 60
        holds()


def test_no_drift() -> None:
    """After a million batches a step is where a jump would have been."""
    optimizer = sgd(lr=1.0)
    scheduler = CosineWarmRestarts(optimizer, 10, 2, steps_per_epoch=391)
    scheduler.last_epoch = 999_999
    scheduler.step()
    stepped = rate(optimizer)
    CosineWarmRestarts(other := sgd(lr=1.0), 10, 2).step(1_000_000 / 391)
    assert stepped == rate(other)
    looped = CosineWarmRestarts(other, 10, 2, steps_per_epoch=391)
    for _ in range(5000):
        looped.step()
    scheduler.step(5000 / 391)
    assert (looped.T_cur, looped.cycle) == (scheduler.T_cur, scheduler.cycle)


# The decay ------------------------------------------------------------------------------------------------------------


def test_decay_of_each_cycle() -> None:
    """lambda_i / base_lr for torch's optimizers, at the start and at each restart; groups without decay stay so."""
    optimizer = two_groups()
    scheduler = CosineWarmRestarts(optimizer, 10, 2, weight_decay_norm=0.05, **SIZES)
    for epoch in range(80):
        T_i = 10 if epoch < 10 else 20 if epoch < 30 else 40 if epoch < 70 else 80
        expected = 0.05 * math.sqrt(128 / (50_000 * T_i)) / 0.25
        assert decays(optimizer) == [pytest.approx(expected, rel=4 * EPS), 0.0]
        scheduler.step()


def test_decay_by_batches_alone() -> None:
    """b / B is one over the batches of an epoch where no sizes are given: the authors' code."""
    optimizer = sgd(lr=1.0, weight_decay=1.0)
    CosineWarmRestarts(optimizer, 100, steps_per_epoch=391, weight_decay_norm=0.025)
    assert decays(optimizer) == [pytest.approx(1.264304e-4, rel=5e-7)]


@pytest.mark.parametrize(
    ("option", "of_group", "divides"),
    [
        (None, None, True),
        ("lr", "schedule", True),
        (None, "schedule", False),
        ("schedule", None, False),
        (None, "lr", True),
    ],
)
def test_decoupling(option: str | None, of_group: str | None, divides: bool) -> None:
    optimizer = sgd(lr=0.25, weight_decay=1.0)
    if of_group:
        optimizer.param_groups[0]["decoupling"] = of_group
    CosineWarmRestarts(optimizer, 100, weight_decay_norm=0.025, decoupling=option, **SIZES)
    assert decays(optimizer) == [pytest.approx(1.2649110640673518e-4 * (4 if divides else 1), rel=4 * EPS)]


def test_decoupling_of_the_defaults_and_of_the_optimizer() -> None:
    by_default, by_attribute = Scheduled([weight()], lr=0.25), sgd(lr=0.25, weight_decay=1.0)
    del by_default.param_groups[0]["decoupling"]
    by_attribute.decoupling = "schedule"  # type: ignore[attr-defined]
    for optimizer in (by_default, by_attribute):
        CosineWarmRestarts(optimizer, 100, weight_decay_norm=0.025, **SIZES)
        assert decays(optimizer) == [pytest.approx(1.2649110640673518e-4, rel=4 * EPS)]


def test_decay_by_groups() -> None:
    """A list is for the groups as they are, 0 included; what is between two restarts is the caller's."""
    optimizer = two_groups()
    scheduler = CosineWarmRestarts(optimizer, 4, weight_decay_norm=[0, 0.1], **SIZES)
    expected = [0.0, pytest.approx(0.1 * math.sqrt(128 / (50_000 * 4)) / 0.5, rel=4 * EPS)]
    assert decays(optimizer) == expected
    optimizer.param_groups[1]["weight_decay"] = 7.0
    scheduler.step()
    scheduler.step(3.9)
    assert decays(optimizer) == [0.0, 7.0]
    scheduler.step(4)
    assert decays(optimizer) == expected


def test_no_norm_leaves_the_decay_alone() -> None:
    optimizer = two_groups()
    scheduler = CosineWarmRestarts(optimizer, 1, 2, **SIZES)
    for _ in range(9):
        scheduler.step()
    assert decays(optimizer) == [0.1, 0.0]
    plain = torch.optim.Rprop([weight()], lr=0.1)  # has no decay at all
    CosineWarmRestarts(plain, 1).step()
    assert "weight_decay" not in plain.param_groups[0]


def test_a_group_without_a_rate_keeps_its_decay() -> None:
    optimizer = two_groups()
    optimizer.param_groups[1].update(lr=0.0, weight_decay=0.3)
    CosineWarmRestarts(optimizer, 4, weight_decay_norm=0.1, **SIZES)
    assert decays(optimizer)[1] == 0.3 and decays(optimizer)[0] != 0.1


# Training -------------------------------------------------------------------------------------------------------------

A, B, C = 0.05, (0.9, 0.99), 1e-8  # alpha, the betas and eps of the runs below


def gradient(step: int) -> Tensor:
    return torch.linspace(1, -2, 5, dtype=torch.float64) * math.sin(step + 1)


def candidates() -> list[Any]:
    """torch's AdamW, and ours both ways."""
    ours = getattr(optim, "AdamW", None)
    return [(torch.optim.AdamW, {})] + [(ours, {"decoupling": d}) for d in ("lr", "schedule") if ours is not None]


@pytest.mark.parametrize(("kind", "options"), candidates())
def test_adamwr_follows_the_paper(kind: type, options: dict[str, Any]) -> None:
    """Algorithm 2 in a plain loop, through two restarts: the moments survive, the decay is that of the cycle."""
    p = weight()
    optimizer = kind([p], lr=A, betas=B, eps=C, weight_decay=0.1, **options)
    norm = {"weight_decay_norm": 3.0, "batch_size": 4, "dataset_size": 20}
    scheduler = CosineWarmRestarts(optimizer, 2, 2, 0.05, steps_per_epoch=5, **norm)
    theta, m, v = weight().detach(), torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    effective = []
    for step in range(5 * (2 + 4 + 2)):
        epoch = step / 5
        start, T_i = (0, 2) if epoch < 2 else (2, 4) if epoch < 6 else (6, 8)
        eta = 0.05 + 0.95 * (1 + math.cos(math.pi * (epoch - start) / T_i)) / 2
        decay = 3.0 * math.sqrt(4 / (20 * T_i))
        g, t = gradient(step), step + 1
        m, v = B[0] * m + (1 - B[0]) * g, B[1] * v + (1 - B[1]) * g * g
        update = A * (m / (1 - B[0] ** t)) / ((v / (1 - B[1] ** t)).sqrt() + C)
        theta = theta - eta * (update + decay * theta)

        p.grad = g
        optimizer.step()
        assert torch.allclose(p, theta, rtol=1e-13, atol=1e-14), step
        assert torch.allclose(optimizer.state[p]["exp_avg"], m, rtol=1e-13, atol=1e-14)
        assert torch.allclose(optimizer.state[p]["exp_avg_sq"], v, rtol=1e-13, atol=1e-14)
        effective.append(decays(optimizer)[0] * (rate(optimizer) if options.get("decoupling") != "schedule" else eta))
        assert effective[-1] == pytest.approx(eta * decay, rel=1e-14)
        scheduler.step()
    assert effective[0] > effective[10] > effective[30] > 0  # eta is 1 at all three
    assert float(optimizer.state[p]["step"]) == 40


def test_both_decouplings_are_one_trajectory() -> None:
    """Without momentum, lr * (lambda / base_lr) and eta * lambda are the same decay: Proposition 1."""
    runs = []
    for kind in (torch.optim.SGD, Scheduled):
        p = weight()
        optimizer = kind([p], lr=A, weight_decay=0.1)
        norm = {"weight_decay_norm": 0.5, "batch_size": 1, "dataset_size": 3}
        scheduler = CosineWarmRestarts(optimizer, 1, 2, steps_per_epoch=3, **norm)
        for step in range(25):
            p.grad = gradient(step)
            optimizer.step()
            scheduler.step()
        runs.append(p.detach())
    assert torch.allclose(*runs, rtol=1e-13, atol=1e-14)
    assert not torch.allclose(runs[0], weight(), atol=0.1)


# What trainers do with a scheduler ------------------------------------------------------------------------------------


def record(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[tuple[float, ...]]:
    seen = []
    for _ in range(steps):
        seen.append((*(rate(optimizer, i) for i in range(len(optimizer.param_groups))), *decays(optimizer)))
        scheduler.step()
    return seen


def full(optimizer: torch.optim.Optimizer) -> CosineWarmRestarts:
    return CosineWarmRestarts(optimizer, 1.5, 2, 0.1, steps_per_epoch=4, weight_decay_norm=0.05, **SIZES)


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("jump", [None, 2.3])
def test_state_round_trip_in_mid_cycle(optimizer_first: bool, jump: float | None) -> None:
    optimizer = two_groups()
    scheduler = full(optimizer)
    record(optimizer, scheduler, 9)  # in the second cycle
    if jump:
        scheduler.step(jump)
    buffer = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, buffer)
    expected = record(optimizer, scheduler, 60)

    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    resumed = two_groups()
    other = CosineWarmRestarts(resumed, 99, weight_decay_norm=0.5, steps_per_epoch=1)  # all options come back
    for part in ("optimizer", "scheduler") if optimizer_first else ("scheduler", "optimizer"):
        (resumed if part == "optimizer" else other).load_state_dict(state[part])
    assert record(resumed, other, 60) == expected


def test_a_scheduler_state_alone_brings_the_decay() -> None:
    optimizer, resumed = two_groups(), two_groups()
    scheduler = full(optimizer)
    scheduler.step(2.0)
    full(resumed).load_state_dict(scheduler.state_dict())
    assert decays(resumed) == decays(optimizer) != decays(two_groups())


def test_a_state_is_a_snapshot() -> None:
    optimizer = two_groups()
    scheduler = full(optimizer)
    state = scheduler.state_dict()
    before = copy.deepcopy(state)
    optimizer.add_param_group({"params": [weight()]})
    scheduler.step(3)
    assert state == before and scheduler.state_dict() != before
    scheduler.load_state_dict(state)
    scheduler.step(3)
    assert state == before


def test_last_epoch_resumes() -> None:
    optimizer = two_groups()
    expected = record(optimizer, full(optimizer), 40)
    resumed = two_groups()
    for group in resumed.param_groups:
        group["initial_lr"] = group["lr"]
    scheduler = CosineWarmRestarts(
        resumed, 1.5, 2, 0.1, 16, steps_per_epoch=4, weight_decay_norm=0.05, batch_size=128, dataset_size=50_000
    )
    assert record(resumed, scheduler, 23) == expected[17:]
    with pytest.raises(KeyError, match="initial_lr"):
        CosineWarmRestarts(two_groups(), 1.5, last_epoch=3)


def test_copies() -> None:
    """copy.deepcopy and pickle take the optimizer along; the copies go on alone."""
    optimizer = two_groups()
    scheduler = full(optimizer)
    record(optimizer, scheduler, 9)
    copies = [copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))]
    expected = record(optimizer, scheduler, 40)
    for other in copies:
        assert other.optimizer is not optimizer
        assert record(other.optimizer, other, 40) == expected


@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_options_are_filled_in_place(shape: tuple[int, ...]) -> None:
    """Rates equal torch's in float32; a captured step keeps seeing the tensors."""
    lr, decay = torch.full(shape, 0.3), torch.tensor(0.5)
    optimizer = torch.optim.SGD([weight()], lr=lr, weight_decay=decay)  # type: ignore[arg-type]
    theirs = torch.optim.SGD([weight()], lr=lr.clone())
    scheduler = CosineWarmRestarts(optimizer, 5, 2, weight_decay_norm=0.05, **SIZES)
    reference = lr_scheduler.CosineAnnealingWarmRestarts(theirs, 5, 2)
    group = optimizer.param_groups[0]
    for epoch in range(30):
        assert group["lr"] is lr and group["weight_decay"] is decay
        assert torch.equal(lr, theirs.param_groups[0]["lr"]), epoch
        T_i = 5 if epoch < 5 else 10 if epoch < 15 else 20
        assert float(decay) == pytest.approx(0.05 * math.sqrt(128 / (50_000 * T_i)) / 0.3, rel=2e-7)
        last = scheduler.get_last_lr()[0]
        assert isinstance(last, Tensor) and last is not lr and torch.equal(last, lr)
        scheduler.step()
        reference.step()


def test_momentum_is_left_alone() -> None:
    optimizer = torch.optim.SGD([weight()], lr=0.5, momentum=0.9)
    scheduler = CosineWarmRestarts(optimizer, 2)
    for _ in range(5):
        scheduler.step()
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_warm_up_in_front() -> None:
    """SequentialLR: the warm-up, then epoch 0 of the first cycle with its decay."""
    optimizer, alone = two_groups(), two_groups()
    warm_up = lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=4)
    scheduler = lr_scheduler.SequentialLR(optimizer, [warm_up, full(optimizer)], milestones=[4])
    seen = record(optimizer, scheduler, 50)
    expected = record(alone, full(alone), 46)
    assert [row[0] for row in seen[:4]] == pytest.approx([0.25 * f for f in (0.25, 0.4375, 0.625, 0.8125)])
    assert seen[4:] == expected
    assert {row[2:] for row in seen[:4]} == {expected[0][2:]}


def test_in_front_of_another() -> None:
    optimizer, alone = two_groups(), two_groups()
    flat = lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=100)
    scheduler = lr_scheduler.SequentialLR(optimizer, [full(optimizer), flat], milestones=[9])
    assert record(optimizer, scheduler, 9) == record(alone, full(alone), 9)


def test_two_in_a_row_each_bring_their_decay() -> None:
    optimizer, first, second = two_groups(), two_groups(), two_groups()

    def longer(of: torch.optim.Optimizer) -> CosineWarmRestarts:
        return CosineWarmRestarts(of, 8, weight_decay_norm=0.3, **SIZES)

    scheduler = lr_scheduler.SequentialLR(optimizer, [full(optimizer), longer(optimizer)], milestones=[5])
    seen = record(optimizer, scheduler, 20)
    assert seen == record(first, full(first), 5) + record(second, longer(second), 15)


def test_sequential_state() -> None:
    """The state of a SequentialLR, saved in the second cycle."""

    def sequence(optimizer: torch.optim.Optimizer) -> lr_scheduler.SequentialLR:
        warm_up = lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=4)
        return lr_scheduler.SequentialLR(optimizer, [warm_up, full(optimizer)], milestones=[4])

    optimizer, resumed = two_groups(), two_groups()
    scheduler, other = sequence(optimizer), sequence(resumed)
    record(optimizer, scheduler, 13)
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    assert record(resumed, other, 40) == record(optimizer, scheduler, 40)


def test_chained_as_torch() -> None:
    """ChainedScheduler: in the place of torch's scheduler, the same rates."""
    rates = []
    for kind in (CosineWarmRestarts, lr_scheduler.CosineAnnealingWarmRestarts):
        optimizer = sgd()
        parts = [kind(optimizer, 4, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)]
        rates.append(record(optimizer, lr_scheduler.ChainedScheduler(parts), 30))
    assert rates[0] == rates[1] and rates[0][4][0] == 0.45


@pytest.mark.parametrize("norm", [0.05, [0.05, 0.1]])
def test_groups_added_later(norm: Any) -> None:
    """They begin at the current epoch; a number is for them too, a list is not."""
    optimizer = two_groups()
    scheduler = CosineWarmRestarts(optimizer, 4, weight_decay_norm=norm, **SIZES)
    scheduler.step(2)
    optimizer.add_param_group({"params": [weight()], "lr": 2.0, "weight_decay": 0.25})
    optimizer.add_param_group({"params": [weight()], "lr": 2.0, "initial_lr": 3.0, "weight_decay": 0.0})
    scheduler.step()
    eta = (1 - math.sqrt(0.5)) / 2
    assert [rate(optimizer, i) for i in range(4)] == pytest.approx([eta * x for x in (0.25, 0.5, 2, 3)], rel=1e-14)
    decay = 0.05 * math.sqrt(128 / (50_000 * 4)) / 2 if norm == 0.05 else 0.25
    assert decays(optimizer)[2:] == [pytest.approx(decay, rel=4 * EPS), 0.0]
    assert len(scheduler.get_last_lr()) == 4
    other = two_groups()
    with pytest.raises(ValueError, match=r"`state_dict` must be for at most 2 groups.*got 4"):
        CosineWarmRestarts(other, 4).load_state_dict(scheduler.state_dict())


def test_a_first_step_without_an_update_warns_as_torch_does() -> None:
    scheduler = CosineWarmRestarts(sgd(), 4)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    jumped = CosineWarmRestarts(sgd(), 4)
    jumped.step(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jumped.step()


# Bad input ------------------------------------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"T_0": 0}, ValueError, "`T_0` must be a finite number > 0, got 0"),
    ({"T_0": -3}, ValueError, "`T_0` must be a finite number > 0, got -3"),
    ({"T_0": math.nan}, ValueError, "`T_0` must be a finite number > 0, got nan"),
    ({"T_0": "x"}, TypeError, "`T_0` must be a number, got str"),
    ({"T_mult": 0.99}, ValueError, "`T_mult` must be in [1, 1e+09], got 0.99"),
    ({"T_mult": math.nan}, ValueError, "`T_mult` must be a finite number, got nan"),
    ({"T_mult": 1e300}, ValueError, "`T_mult` must be in [1, 1e+09], got 1e+300"),
    ({"eta_min": -0.1}, ValueError, "`eta_min` must be in [0, 1], got -0.1"),
    ({"eta_min": 1.5}, ValueError, "`eta_min` must be in [0, 1], got 1.5"),
    ({"eta_min": math.nan}, ValueError, "`eta_min` must be in [0, 1], got nan"),
    ({"last_epoch": -2}, ValueError, "`last_epoch` must be -1 or more, got -2"),
    ({"last_epoch": 1.5}, TypeError, "`last_epoch` must be an int, got float"),
    ({"steps_per_epoch": 0}, ValueError, "`steps_per_epoch` must be a finite number > 0, got 0"),
    ({"weight_decay_norm": 0.1}, ValueError, "`weight_decay_norm` needs `batch_size` and `dataset_size`, or"),
    ({"batch_size": 8}, ValueError, "`dataset_size` must be given together with `batch_size`, got None"),
    ({"dataset_size": 8}, ValueError, "`batch_size` must be given together with `dataset_size`, got None"),
    ({"batch_size": 0, "dataset_size": 8}, ValueError, "`batch_size` must be a finite number > 0, got 0"),
    ({"weight_decay_norm": -1, **SIZES}, ValueError, "`weight_decay_norm` must be a finite number >= 0, got -1"),
    ({"weight_decay_norm": "x", **SIZES}, TypeError, "`weight_decay_norm` must be a number, got str"),
    ({"weight_decay_norm": [1], **SIZES}, ValueError, "`weight_decay_norm` must have one entry for each of 2 groups"),
    ({"weight_decay_norm": [1, -1], **SIZES}, ValueError, "`weight_decay_norm[1]` must be a finite number >= 0"),
    ({"decoupling": "paper"}, ValueError, "`decoupling` must be one of None, 'lr', 'schedule', got 'paper'"),
    ({"optimizer": "adam"}, TypeError, "`optimizer` must be a torch.optim.Optimizer, got str"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD, ids=[f"{next(iter(b[0]))}-{i}" for i, b in enumerate(BAD)]
)
def test_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """And nothing was written before the check."""
    optimizer = two_groups()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error) as raised:
        CosineWarmRestarts(**{"optimizer": optimizer, "T_0": 10, **change})
    assert str(raised.value).startswith(message), str(raised.value)
    assert optimizer.state_dict() == before


def test_rejects_optimizers_without_a_decay() -> None:
    with pytest.raises(ValueError, match=r"^`optimizer` must have groups with a `weight_decay`, got group 0 without"):
        CosineWarmRestarts(torch.optim.Rprop([weight()]), 1, weight_decay_norm=0.1, **SIZES)
    with pytest.raises(ValueError, match=r"^`weight_decay_norm` needs a group with `weight_decay` > 0"):
        CosineWarmRestarts(sgd(), 1, weight_decay_norm=0.1, **SIZES)
    odd = sgd(weight_decay=0.1)
    odd.param_groups[0]["decoupling"] = "paper"
    with pytest.raises(
        ValueError, match=r"^`decoupling of the optimizer` must be one of 'lr', 'schedule', got 'paper'"
    ):
        CosineWarmRestarts(odd, 1, weight_decay_norm=0.1, **SIZES)


def test_rejects_epochs_and_foreign_states() -> None:
    """A refused step leaves the schedule where it was."""
    optimizer = sgd()
    scheduler = CosineWarmRestarts(optimizer, 4)
    scheduler.step(1.5)
    before = scheduler.state_dict()
    for epoch in (-1, -1e-9, math.nan, math.inf, 1e10):
        with pytest.raises(ValueError, match=r"^`epoch` must be"):
            scheduler.step(epoch)
    with pytest.raises(TypeError, match=r"^`epoch` must be a number, got str"):
        scheduler.step("x")
    theirs = lr_scheduler.CosineAnnealingWarmRestarts(sgd(), 4)
    with pytest.raises(ValueError, match=r"^`state_dict` must be that of a CosineWarmRestarts, got one without cycle"):
        scheduler.load_state_dict(theirs.state_dict())
    assert scheduler.state_dict() == before


def test_examples_of_the_docstrings() -> None:
    result = doctest.testmod(warm_restarts)
    assert result.failed == 0 and result.attempted >= 7
