"""The optimizers stepped by CUDA C++ on the host: all options against the tests' own formulas, what a table notices,
CUDA graphs, and the time of a step on the host."""

from __future__ import annotations

import copy
import gc
import time
import weakref
from collections.abc import Callable
from typing import Any

import _fused  # noqa: F401  puts the folders of the tests below on the path
import pytest
import torch
from _helpers import same_bits, train
from _places import KINDS, LR, Training
from _runs import INNER, OUTER, Run, name_of
from torch import Tensor, nn

import dlkernels as dk
from dlkernels.optim._runners import CudaRunner

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
both = pytest.mark.parametrize("kind", KINDS)


def runner_of(optimizer: Any) -> Any:
    (part,) = optimizer._plan.parts
    return part.runner


# All options ----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("outer", OUTER, ids=name_of)
def test_options(kind: str, outer: dict[str, Any], twin: Any) -> None:
    """Every single step of a few, from what was stored before it, and the way as a whole."""
    inner = INNER[(5 * OUTER.index(outer) + 3) % len(INNER)]
    run = Run(kind, outer | inner, "cuda", steps=3, rotate=True, num_groups=8, shift=OUTER.index(outer),
              dtypes=(F32, F16, BF16))  # fmt: skip
    assert isinstance(runner_of(run.optimizer), CudaRunner)
    run.check()


@both
def test_one_launch_a_step(kind: str, twin: Any) -> None:
    """Two with a norm, whatever the groups, dtypes and options; none of torch's own beside them."""
    params = [nn.Parameter(torch.randn(n).to(d)) for d in (F32, BF16) for n in (5, 3000, 64)]
    groups = [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "weight_decay": 0.1}]
    for options, launches in (({}, 1), ({"max_grad_norm": 1.0, "skip_nonfinite": True}, 2)):
        optimizer = KINDS[kind](groups, lr=LR, ema_decay=0.9, stochastic_rounding=True, **options)
        train(optimizer, params, range(1))
        for step in range(1, 3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.param_groups[0]["lr"] = 0.5 / step
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
            twin.launches()
            with CountedOps() as ops:
                optimizer.step()
            names = [launch["op"] for launch in twin.launches()]
            assert names == ["gradient_squares", f"{kind}_step"][-launches:]
            of_the_twin = {"aten.zeros.default", "aten.any.default", "aten._local_scalar_dense.default"}  # its counters
            assert not ops.names - {"aten.empty.memory_format", "aten.squeeze.dim"} - of_the_twin, ops.names


class CountedOps(torch.utils._python_dispatch.TorchDispatchMode):
    """Operators that are called from Python."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_float64_is_served_otherwise(twin: Any) -> None:
    params = [nn.Parameter(torch.randn(5, dtype=d)) for d in (F32, F64)]
    optimizer = dk.optim.AdamW(params)
    train(optimizer, params[:1], range(1))
    assert isinstance(runner_of(optimizer), CudaRunner)
    train(optimizer, params, range(2))
    assert not isinstance(runner_of(optimizer), CudaRunner)


# What a table notices -------------------------------------------------------------------------------------------------


@both
def test_changes_between_steps(kind: str, twin: Any) -> None:
    """Gradients in other memory or none, parameters and state exchanged, other groups: as on CPUs."""

    def changes(training: Training, step: int) -> None:
        optimizer, params = training.optimizer, training.params
        if step in (2, 3):
            params[1].grad = params[4].grad = None
        if step == 4:
            params[0].data = params[0].data.clone()
        if step == 5:
            state = optimizer.state[params[2]]
            name = "exp_avg" if kind == "adamw" else "momentum_buffer"
            state[name] = state[name].clone()
        if step == 6:
            with torch.no_grad():
                params[3].mul_(0.5)
        if step == 7:
            optimizer.param_groups[0]["weight_decay"] = 0.25
        if step == 8:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if step == 9:
            optimizer.max_grad_norm = 0.125
        if step > 6:
            for p in params:
                p.grad = p.grad.clone()

    ways = []
    for backend in ("cuda", "cpp"):
        with dk.backend(backend):
            training = Training(KINDS[kind], torch.device("cpu"), lr=LR, ema_decay=0.75)
            for step in range(11):
                training.give(step)
                training.lr(LR * (1 + step % 3))
                changes(training, step)
                training.optimizer.step()
            ways.append(training)
    for a, b in zip(*(w.params for w in ways), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert ways[0].count() == ways[1].count()


@both
def test_a_plan_serves_as_long_as_it_can(kind: str, twin: Any) -> None:
    training = Training(KINDS[kind], torch.device("cpu"), lr=LR)
    training.step(0)
    runner = runner_of(training.optimizer)
    for step in (1, 2, 3):
        training.give(step)
        for p in training.params:
            p.grad = p.grad.clone()
        if step == 2 and kind == "sgdw":  # nothing is counted: the rest is stepped
            training.params[1].grad = None
        training.optimizer.step()
        assert runner_of(training.optimizer) is runner
    versions = [p._version for p in training.params]
    training.step(4)
    assert [p._version for p in training.params] == [v + 1 for v in versions]
    training.params[0].data = training.params[0].data.clone()
    training.step(5)
    assert runner_of(training.optimizer) is not runner


# CUDA graphs ----------------------------------------------------------------------------------------------------------


def capture(twin: Any, run: Callable[[], Any]) -> Callable[[], None]:
    """What repeats the launches of `run`, as they were recorded."""
    twin.module.begin_capture()
    try:
        run()
    finally:
        graph = twin.module.end_capture()
    return lambda: twin.module.replay(graph)


CASES = {
    "plain": (F32, {}),
    "clipped": (F32, {"max_grad_norm": 0.5, "skip_nonfinite": True}),
    "rounded": (BF16, {"stochastic_rounding": True, "seed": 5}),
    "master": (F16, {"master_weights": True, "ema_decay": 0.75, "max_grad_norm": 0.5}),
    "scaled": (F32, {"fused_unscale": True, "max_grad_norm": 0.5}),
}


@both
@pytest.mark.parametrize("small", [False, True], ids=["argument", "table"])
@pytest.mark.parametrize("case", CASES)
def test_replays_are_steps(kind: str, case: str, small: bool, twin: Any) -> None:
    """Other gradients in the same memory: bit for bit, and t advances; with steps between that have other numbers and
    other gradient tensors. `small`: as if nothing fitted into the argument of a launch."""
    dtype, options = CASES[case]
    eager, captured = (Training(KINDS[kind], torch.device("cpu"), dtype=dtype, lr=LR, **options) for _ in range(2))
    for training in (eager, captured):
        if case == "scaled":
            training.optimizer.grad_scale, training.optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        if small:
            training.more = [nn.Parameter(torch.zeros(0, dtype=dtype)) for _ in range(600)]
            for p in training.more:
                p.grad = torch.ones_like(p)
            training.optimizer.add_param_group({"params": training.more})
        training.step(0)
        if small:
            runner_of(training.optimizer).table.argument = 4096
    before = copy.deepcopy(captured.everything())
    replay = capture(twin, captured.optimizer.step)
    norm = captured.optimizer.grad_norm  # the memory that replays write
    same_bits(captured.everything(), before)
    assert captured.optimizer._plan.captured and not eager.optimizer._plan.captured
    for step in range(1, 6):
        for training in (eager, captured):
            training.give(step, bad=float("inf") if case == "clipped" and step == 3 else None)
            if case == "scaled":
                training.optimizer.grad_scale.fill_(2.0**step)
                training.optimizer.found_inf.fill_(float(step == 3))
            if step % 2:
                training.lr(LR)
            else:
                training.lr(LR / 2)
                for p in training.params:
                    p.grad = p.grad * 3
        eager.optimizer.step()
        replay() if step % 2 else captured.optimizer.step()
        same_bits(captured.everything(), eager.everything())
        if norm is not None and step % 2:
            assert torch.equal(norm, eager.optimizer.grad_norm)


@both
def test_a_plan_made_in_a_capture(kind: str, twin: Any) -> None:
    """Its graph writes the table that it needs, and so does the first step outside of it."""
    for first in ("replay", "step"):
        eager, captured = (Training(KINDS[kind], torch.device("cpu"), lr=LR) for _ in range(2))
        for training in (eager, captured):
            training.step(0)
            training.optimizer.max_grad_norm = 0.5
        replay = capture(twin, captured.optimizer.step)
        norm = captured.optimizer.grad_norm
        for step in range(1, 5):
            for training in (eager, captured):
                training.give(step)
            eager.optimizer.step()
            replay() if (step % 2 == 1) == (first == "replay") else captured.optimizer.step()
            same_bits(captured.everything(), eager.everything())
        del norm


@both
def test_tables_live_as_long_as_a_graph_may_read_them(kind: str, twin: Any) -> None:
    """Also when the optimizer has made a new plan: its graph is not known, and may be replayed."""
    for captures in (False, True):
        eager, captured = (Training(KINDS[kind], torch.device("cpu"), lr=LR) for _ in range(2))
        for training in (eager, captured):
            training.step(0)
        replay = capture(twin, captured.optimizer.step) if captures else None
        runner = weakref.ref(runner_of(captured.optimizer))
        for training in (eager, captured):
            training.optimizer.ema_decay = 0.75  # another plan
            training.step(1)
            training.optimizer.ema_decay = None
        gc.collect()
        assert (runner() is not None) == captures
        if replay is not None:
            for training in (eager, captured):
                training.give(2)
                training.lr(LR)
            eager.optimizer.step()
            replay()
            same_bits(captured.everything(), eager.everything())


# Time -----------------------------------------------------------------------------------------------------------------


@both
def test_time_on_the_host(kind: str, twin: Any) -> None:
    """Of a step of 300 parameters without its kernel; far below what a loop in Python would take. Printed, for under
    sanitizers it is not what it is without them."""
    params = [nn.Parameter(torch.zeros(16)) for _ in range(300)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = KINDS[kind](params, lr=LR)
    optimizer.step()
    grads: list[list[Tensor]] = [[torch.ones_like(p) for p in params] for _ in range(2)]
    twin.module.dry_run(True)
    times = []
    try:
        for i in range(40):
            for p, g in zip(params, grads[i % 2], strict=True):
                p.grad = g
            start = time.perf_counter()
            optimizer.step()
            times.append(time.perf_counter() - start)
    finally:
        twin.module.dry_run(False)
    print(f"{kind}: {1e6 * sorted(times)[len(times) // 2]:.1f} us on the host for 300 parameters")
    assert min(times) < 5e-3
