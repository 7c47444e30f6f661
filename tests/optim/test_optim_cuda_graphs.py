"""The optimizers in CUDA graphs: a replay is a step, whatever happens between replays; and the memory of steps.

Where there is no GPU, `replays` gives the function itself, and the tests compare steps with steps.
"""

from __future__ import annotations

import copy
import gc
import math
import warnings
from typing import Any

import pytest
import torch
from _helpers import BF16, F16, F32, F64, same_bits
from _places import KINDS, LR, SHAPES, Training, no_waiting, place_fixture, replays
from torch import nn

from dlkernels.testing import assert_bitwise

place = place_fixture
both = pytest.mark.parametrize("kind", KINDS)

CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain": (F32, {}),
    "float64": (F64, {"weight_decay": 0.1}),
    "clipped": (F32, {"max_grad_norm": 0.5, "skip_nonfinite": True}),
    "rounded": (BF16, {"stochastic_rounding": True, "seed": 5}),
    "master": (F16, {"master_weights": True, "ema_decay": 0.75, "max_grad_norm": 0.5}),
    "scaled": (F32, {"fused_unscale": True, "max_grad_norm": 0.5}),
}


def pair(kind: str, place: torch.device, dtype: torch.dtype, **options: Any) -> tuple[Training, Training]:
    """Two that are alike, with a tensor each for the learning rate, after one step."""
    both = [Training(KINDS[kind], place, dtype=dtype, lr=torch.tensor(LR, device=place), **options) for _ in range(2)]
    for training in both:
        if options.get("fused_unscale"):
            training.optimizer.grad_scale = torch.tensor(8.0, device=place)
            training.optimizer.found_inf = torch.tensor(0.0, device=place)
        training.step(0)
    return both[0], both[1]


@both
@pytest.mark.parametrize("case", CASES)
def test_replays_are_steps(kind: str, case: str, place: torch.device) -> None:
    """Other gradients in the same memory, another lr in the same tensor: bit for bit, and t advances."""
    dtype, options = CASES[case]
    eager, captured = pair(kind, place, dtype, **options)
    before = copy.deepcopy(captured.everything())
    replay = replays(place, captured.optimizer.step)
    same_bits(captured.everything(), before)  # a capture takes no step
    skips = case in ("clipped", "scaled")
    for step in range(1, 8):
        bad = math.inf if case == "clipped" and step == 3 else None
        for training in (eager, captured):
            training.give(step, bad=bad)
            training.lr(LR * (1 + step % 3))
            if case == "scaled":
                training.optimizer.grad_scale.fill_(2.0**step)
                training.optimizer.found_inf.fill_(float(step == 3))
        last = captured.flat()
        eager.optimizer.step()
        with no_waiting(place):
            replay()
        same_bits(captured.everything(), eager.everything())
        assert torch.equal(last, captured.flat()) == (skips and step == 3)
        if "max_grad_norm" in options:
            assert captured.optimizer.grad_norm.device == place
            assert_bitwise(captured.optimizer.grad_norm, eager.optimizer.grad_norm, "norm")
    if kind == "adamw":
        assert captured.count() == {7.0 if skips else 8.0}


@both
def test_amsgrad_and_groups_in_a_graph(kind: str, place: torch.device) -> None:
    """Groups that differ, each with a learning rate of its own, as a tensor and as a number that the capture keeps."""

    def make(params: list[nn.Parameter], lr: Any) -> torch.optim.Optimizer:
        more = {"amsgrad": True} if kind == "adamw" else {"nesterov": True, "momentum_scaling": "gradient"}
        groups = [
            {"params": params[:3], **({"amsgrad": True} if kind == "adamw" else {})},
            {"params": params[3:5], "lr": 2 * LR, "weight_decay": 0.25},
            {"params": params[5:], "lr": lr.clone(), "maximize": True},
        ]
        return KINDS[kind](groups, lr=lr, **more)

    eager, captured = (Training(make, place, lr=torch.tensor(LR, device=place)) for _ in range(2))
    for training in (eager, captured):
        training.give(0)
        training.optimizer.step()
    replay = replays(place, captured.optimizer.step)
    for step in range(1, 6):
        for training in (eager, captured):
            training.give(step)
            for group in (training.optimizer.param_groups[0], training.optimizer.param_groups[2]):
                group["lr"].mul_(0.5)
        eager.optimizer.step()
        replay()
        same_bits(captured.everything(), eager.everything())


@both
@pytest.mark.parametrize("change", ["values", "gradients", "plan"])
def test_steps_between_replays(kind: str, change: str, place: torch.device) -> None:
    """Replay, step, replay, step on the same parameters: each with its own numbers and its own gradients.

    The steps between have other numbers, other gradient tensors, or lists of their own, made anew.
    """
    steps, captured = pair(kind, place, F32, weight_decay=0.125, ema_decay=0.75)

    def as_captured(training: Training) -> None:
        for group in training.optimizer.param_groups:
            group["weight_decay"] = 0.125
        training.optimizer.max_grad_norm = None
        for p, buffer in zip(training.params, training.buffers, strict=True):
            p.grad = buffer
        training.optimizer.step()

    def between(training: Training) -> None:
        if change == "values":
            for group in training.optimizer.param_groups:
                group["weight_decay"] = 0.5
        elif change == "plan":
            training.optimizer.max_grad_norm = 0.25
        if change != "values":
            for p in training.params:
                p.grad = p.grad * 3
        training.optimizer.step()

    replay = replays(place, lambda: as_captured(captured))
    for step in range(1, 7):
        for training in (steps, captured):
            training.give(step)
            training.lr(LR * (1 + step % 3))
        if step % 2:
            as_captured(steps)
            replay()
        else:
            between(steps)
            between(captured)
        same_bits(captured.everything(), steps.everything())
    if kind == "adamw":
        assert captured.count() == {7.0}


@both
def test_two_graphs_of_one_optimizer(kind: str, place: torch.device) -> None:
    """Each keeps the number lr that it was captured with, and both go on from each other's results."""
    alike = [Training(KINDS[kind], place, lr=LR, max_grad_norm=0.5) for _ in range(2)]

    def step_with(training: Training, lr: float) -> None:
        training.lr(lr)
        training.optimizer.step()

    for training in alike:
        training.step(0)
    eager, captured = alike
    rates = (LR, LR / 4)
    graphs = []
    for i, rate in enumerate(rates):
        graphs.append(replays(place, lambda rate=rate: step_with(captured, rate)))
        for training in alike:
            training.step(1 + i)
    same_bits(captured.everything(), eager.everything())
    for step in (3, 4, 5, 6, 7):
        which = step % 2
        for training in alike:
            training.give(step)
        step_with(eager, rates[which])
        graphs[which]()
        same_bits(captured.everything(), eager.everything())


@both
@pytest.mark.gpu
def test_the_first_step_is_not_captured(kind: str) -> None:
    """Its state would be zero again at each replay. After one step it can be."""
    place = torch.device("cuda", torch.cuda.current_device())
    eager, captured = (Training(KINDS[kind], place, lr=LR) for _ in range(2))
    captured.give(0)
    start = captured.flat()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that the graph is empty
        with pytest.raises(RuntimeError, match="take one step before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            captured.optimizer.step()
    assert not any(captured.optimizer.state.values())
    assert torch.equal(start, captured.flat())
    eager.step(0)
    captured.step(0)
    replay = replays(place, captured.optimizer.step)
    eager.give(1), captured.give(1)
    eager.optimizer.step()
    replay()
    same_bits(captured.everything(), eager.everything())


@both
@pytest.mark.gpu
def test_graphs_outlive_their_optimizers_plan(kind: str) -> None:
    """Memory that only the graph reads is not given to somebody else."""
    place = torch.device("cuda", torch.cuda.current_device())
    eager, captured = pair(kind, place, F32)
    replay = replays(place, captured.optimizer.step)
    for training in (eager, captured):
        training.optimizer.ema_decay = 0.75  # another plan
        training.step(1)
        training.optimizer.ema_decay = None
    gc.collect()
    litter = [torch.full((n,), -1, dtype=torch.int64, device=place) for n in (8, 64, 112, 512, 4096) for _ in range(64)]
    pinned = [torch.full((n,), -1, dtype=torch.int64).pin_memory() for n in (8, 64, 112, 512) for _ in range(64)]
    for step in range(2, 5):
        eager.step(step)
        captured.give(step)
        captured.lr(LR * (1 + step % 3))
        replay()
    same_bits(captured.everything(), eager.everything())
    assert all(bool((x == -1).all()) for x in (*litter, *pinned))


# Memory ---------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "skip_nonfinite": True}], ids=["plain", "clipped"])
def test_memory(kind: str, options: dict[str, Any]) -> None:
    """State and small tables stay, gradients set to None are freed, and a step needs no memory to work in."""
    place = torch.device("cuda", torch.cuda.current_device())
    n, tables = 1 << 20, 1 << 17
    params = [nn.Parameter(torch.ones(n, device=place)) for _ in range(4)]
    size = 4 * params[0].numel() * params[0].element_size()
    optimizer = KINDS[kind](params, lr=LR, **options)

    def step(number: int) -> None:
        for p in params:
            p.grad = torch.full_like(p, number + 1.0)
        optimizer.param_groups[0]["lr"] = LR * (1 + number % 3)
        optimizer.step()

    def allocated() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(place)

    before = allocated()
    step(0)
    optimizer.zero_grad(set_to_none=True)
    moments = 2 if kind == "adamw" else 1
    assert moments * size <= allocated() - before <= moments * size + tables
    step(1)
    optimizer.zero_grad(set_to_none=True)
    steady = allocated()
    for number in range(2, 6):
        torch.cuda.reset_peak_memory_stats(place)
        step(number)
        assert steady + size <= torch.cuda.max_memory_allocated(place) <= steady + size + tables
        assert allocated() >= steady + size
        optimizer.zero_grad(set_to_none=True)
        assert allocated() == steady


@both
@pytest.mark.gpu
def test_a_dropped_optimizer_gives_its_memory_back(kind: str) -> None:
    place = torch.device("cuda", torch.cuda.current_device())
    params = [nn.Parameter(torch.ones(shape, device=place)) for shape in SHAPES]

    def train() -> None:
        optimizer: Any = KINDS[kind](params, lr=LR, max_grad_norm=0.5, ema_decay=0.75)
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    train()  # loads kernels
    gc.collect()
    before = torch.cuda.memory_allocated(place)
    train()
    gc.collect()
    assert torch.cuda.memory_allocated(place) == before
