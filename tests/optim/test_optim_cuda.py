"""The optimizers on GPUs: values, GradScaler, streams, several devices.

Most of these also run on the CPU, see _places.py; `gpu` marks what needs a GPU.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from typing import Any

import pytest
import torch
from _helpers import BF16, F16, F32, F64, same_bits
from _places import KINDS, LR, SHAPES, Training, flat, no_waiting, place_fixture
from _runs import INNER, OUTER, Run, name_of
from torch import Tensor, nn

import dlkernels as dk
from dlkernels import _backend
from dlkernels.testing import assert_bitwise, assert_within_budget

place = place_fixture
both = pytest.mark.parametrize("kind", KINDS)
CPU = torch.device("cpu")


# Values ---------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("outer", OUTER, ids=name_of)
def test_combinations_of_options(kind: str, outer: dict[str, Any], place: torch.device) -> None:
    """20 steps, each from what was stored before it, and the way as a whole; all dtypes, unaligned memory, layouts.

    Where bfloat16 is rounded at random, what is stored must be what the exact value gives with the random bits of its
    element, give or take the error that the float32 value may have before it is rounded.
    """
    steps, backend = (20, "triton") if place.type == "cuda" else (3, "triton" if _backend.interpreting() else "cpp")
    if backend == "cpp" and _backend.C_MISSING:
        pytest.skip(f"needs cpp: {_backend.C_MISSING}")
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy's, of the interpreter's lanes behind the end
    i = OUTER.index(outer)
    inner = INNER[(5 * i + 11) % len(INNER)]
    Run(kind, outer | inner, backend, steps=steps, rotate=True, num_groups=6, shift=i + 1, device=place).check()


CASES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain": (F32, {}),
    "amsgrad": (F32, {"amsgrad": True, "maximize": True, "weight_decay": 0.1}),
    "float64": (F64, {"weight_decay": 0.1}),
    "clipped": (F32, {"max_grad_norm": 2.0, "skip_nonfinite": True}),
    "averaged": (F32, {"ema_decay": 0.75, "betas": (0.8, 0.95), "eps": 1e-6}),
    "bfloat16": (BF16, {"master_weights": True, "weight_decay": 0.1}),
    "float16": (F16, {"master_weights": True, "ema_decay": 0.75, "max_grad_norm": 2.0}),
}
OURS = ("max_grad_norm", "skip_nonfinite", "ema_decay", "master_weights")


def torchs(device: torch.device, dtype: torch.dtype, values: torch.dtype, options: dict[str, Any]) -> Training:
    """torch.optim.AdamW, with what our options do written out around it."""
    plain = {k: v for k, v in options.items() if k not in OURS}
    fused = {"fused": True} if dtype != F64 or device.type == "cuda" else {"foreach": False}
    training = Training(torch.optim.AdamW, device, dtype=dtype, values=values, lr=LR, **plain, **fused)
    averages = [p.detach().clone() for p in training.params]
    for step in range(20):
        training.give(step)
        training.lr(LR * (1 + step % 3))
        if "max_grad_norm" in options:
            nn.utils.clip_grad_norm_(training.params, options["max_grad_norm"])
        training.optimizer.step()
        if "ema_decay" in options:
            for average, p in zip(averages, training.params, strict=True):
                average.lerp_(p.detach(), 1 - options["ema_decay"])
    training.averages = averages
    return training


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("case", CASES)
def test_no_further_from_float64_than_torchs_fused(case: str, tensor_lr: bool, place: torch.device) -> None:
    dtype, options = CASES[case]
    wide = F64 if dtype == F64 else F32
    lr = torch.tensor(LR, device=place) if tensor_lr else LR
    ours = Training(dk.optim.AdamW, place, dtype=dtype, lr=lr, **options)
    for step in range(20):
        ours.step(step)
    assert ours.count() == {20.0}
    if case == "float64":  # what it is compared with has the same digits
        exact = torchs(CPU, F64, dtype, options)
        for name in ("exp_avg", "exp_avg_sq"):
            assert (ours.state(name) - exact.state(name)).norm() <= 1e-13 * exact.state(name).norm()
        assert (ours.flat() - exact.flat()).norm() <= 1e-13 * exact.flat().norm()
        return
    exact, eager = torchs(CPU, F64, dtype, options), torchs(place, wide, dtype, options)
    theta = ours.state("master_param") if "master_weights" in options else ours.flat()
    assert_within_budget(theta, exact.flat(), eager.flat(), what="theta")
    for name in ("exp_avg", "exp_avg_sq") + ("max_exp_avg_sq",) * options.get("amsgrad", False):
        assert_within_budget(ours.state(name), exact.state(name), eager.state(name), what=name)
    if "ema_decay" in options:
        assert_within_budget(ours.state("ema"), flat(exact.averages), flat(eager.averages), what="average")


VIEWS = {
    "long": lambda x: x,
    "transposed": lambda x: x[:4_087].view(61, 67).t(),
    "channels_last": lambda x: x[:2_400].view(4, 10, 12, 5).permute(0, 3, 1, 2),
    "odd": lambda x: x[1:8],
    "unaligned": lambda x: x[3:5001],
    "one": lambda x: x[:1].view(()),
    "none": lambda x: x[:0],
}


def rounded(kind: str, device: torch.device, seed: int) -> list[Tensor]:
    """Parameters and moments after three steps in which every value is exact in float32 before it is rounded.

    So the bits of what is stored say which random bits were used, whatever the order of operations. AdamW has lr 0: its
    parameter's update is a quotient, which is exact nowhere.
    """
    n = 12_289
    k = torch.arange(n)
    params = [nn.Parameter(view((1 + k % 128 / 128).to(device, BF16))) for view in VIEWS.values()]
    options: dict[str, Any] = {"stochastic_rounding": True, "seed": seed, "weight_decay": 0.0}
    if kind == "adamw":
        optimizer = dk.optim.AdamW(params, lr=0.0, betas=(0.5, 0.0), **options)
    else:
        optimizer = dk.optim.SGDW(params, lr=2.0**-9, momentum=0.5, momentum_scaling="gradient", **options)
    for step in range(3):
        for p, view in zip(params, VIEWS.values(), strict=True):
            p.grad = view(((k * (37 + step)) % 129 / 128 - 0.25 + step / 4).to(device, BF16))
        optimizer.step()
    names = ("exp_avg", "exp_avg_sq") if kind == "adamw" else ("momentum_buffer",)
    return [x.detach().cpu() for p in params for x in (p, *(optimizer.state[p][name] for name in names))]


@both
@pytest.mark.parametrize("seed", [3, 2**32 + 1, 2**64 - 5])
def test_random_rounding_is_the_references(kind: str, seed: int, place: torch.device) -> None:
    with dk.backend("reference"):
        expected = rounded(kind, CPU, seed)
    for i, (x, y) in enumerate(zip(rounded(kind, place, seed), expected, strict=True)):
        assert_bitwise(x, y, f"tensor {i}")
    to_nearest = (1 + torch.arange(8) % 128 / 128).to(BF16)
    assert kind == "adamw" or not torch.equal(expected[0][:8], to_nearest)


# GradScaler -----------------------------------------------------------------------------------------------------------

BAD = {2: math.inf, 5: math.nan, 6: -math.inf}


def scaled(make: Any, device: torch.device, dtype: torch.dtype = F32, waits: bool = True, **options: Any) -> Any:
    """Nine steps under a GradScaler, three of them with a bad gradient."""
    training = Training(make, device, dtype=dtype, values=F32, lr=LR, **options)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=2)
    scales = []
    for step in range(9):
        scaler.scale(torch.zeros((), device=device))  # makes the scale
        training.give(step, factor=scaler.get_scale(), bad=BAD.get(step))
        training.lr(LR * (1 + step % 3))
        before = training.flat()
        with contextlib.nullcontext() if waits or step < 2 else no_waiting(device):
            scaler.step(training.optimizer)
            scaler.update()
        assert torch.equal(before, training.flat()) == (step in BAD), f"step {step}"
        norm = getattr(training.optimizer, "grad_norm", None)
        if norm is not None:
            assert norm.device == device
            assert math.isfinite(norm.item()) == (step not in BAD) or not options["fused_unscale"]
        scales.append(scaler.get_scale())
    return training, scales


@pytest.mark.parametrize("max_grad_norm", [None, 1e6])
@pytest.mark.parametrize("fused_unscale", [False, True], ids=["", "fused_unscale"])
def test_grad_scaler(fused_unscale: bool, max_grad_norm: float | None, place: torch.device) -> None:
    """With `fused_unscale` nothing waits, not even to learn that a gradient is infinite; without it GradScaler does."""
    options = {"fused_unscale": fused_unscale, "max_grad_norm": max_grad_norm}  # that clips nothing
    ours, scales = scaled(dk.optim.AdamW, place, waits=not fused_unscale, **options)
    exact, expected = scaled(torch.optim.AdamW, CPU, F64)
    eager, _ = scaled(torch.optim.AdamW, place, fused=True)
    assert scales == expected and len(set(scales)) > 2
    assert ours.count() == exact.count() == {6.0}
    assert_within_budget(ours.flat(), exact.flat(), eager.flat(), what="theta")


# Waiting --------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_waiting_is_noticed() -> None:
    device = torch.device("cuda")
    with no_waiting(device), pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones((), device=device).item()
    assert torch.ones((), device=device).item() == 1  # the mode is as it was


@both
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("option", ["plain", "clipped", "skipping", "rounded", "master", "scaled"])
def test_a_step_does_not_wait(kind: str, option: str, tensor_lr: bool, place: torch.device) -> None:
    """After the first two; also with another lr, an infinite gradient, parameters that somebody else has written."""
    dtype, options = {
        "plain": (F32, {}),
        "clipped": (F32, {"max_grad_norm": 2.0}),
        "skipping": (F32, {"skip_nonfinite": True, "max_grad_norm": 2.0}),
        "rounded": (BF16, {"stochastic_rounding": True, "ema_decay": 0.75}),
        "master": (BF16, {"master_weights": True, "max_grad_norm": 2.0}),
        "scaled": (F32, {}),
    }[option]
    lr = torch.tensor(LR, device=place) if tensor_lr else LR
    training = Training(KINDS[kind], place, dtype=dtype, lr=lr, **options)
    if option == "scaled":  # by numbers of the host
        training.optimizer.grad_scale, training.optimizer.found_inf = 8.0, 0.0
    for step in range(7):
        bad = math.inf if option == "skipping" and step == 4 else None
        training.give(step, bad=bad)
        training.lr(LR * (1 + step % 3))
        before = training.flat()
        squares = sum(g.double().square().sum() for g in training.buffers)
        if option == "master" and step == 5:
            with torch.no_grad():
                training.params[0].mul_(2.0)
        with contextlib.nullcontext() if step < 2 else no_waiting(place):
            training.optimizer.step()
            norm = training.optimizer.grad_norm
        assert torch.equal(before, training.flat()) == (bad is not None)
        assert (norm is None) == ("max_grad_norm" not in options)
        if norm is not None:
            assert norm.device == place and norm.dtype == F32 and norm.dim() == 0
            assert_within_budget(norm.cpu(), squares.sqrt().cpu(), scalar=True, what="norm")
    if kind == "adamw":
        assert training.count() == {6.0 if option == "skipping" else 7.0}


# Streams and devices --------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("first", [0, 1], ids=["first-here", "first-aside"])
def test_streams(kind: str, first: int, place: torch.device) -> None:
    """Steps on the current stream and on another one in turn, events between them.

    The other one is late, and until it has written the gradients they are NaN: what a step queues elsewhere finds that.
    """

    def run(aside: bool) -> Training:
        training = Training(KINDS[kind], place, lr=LR, max_grad_norm=2.0, ema_decay=0.75)
        side = torch.cuda.Stream(place) if place.type == "cuda" else None
        for step in range(8):
            if side is None or not aside or step % 2 != first:
                training.step(step)
                continue
            training.give(step)
            training.lr(LR * (1 + step % 3))
            ready = [buffer.clone() for buffer in training.buffers]
            for buffer in training.buffers:
                buffer.fill_(math.nan)
            here = torch.cuda.current_stream(place)
            side.wait_stream(here)
            with torch.cuda.stream(side):
                torch.cuda._sleep(20_000_000)
                for buffer, grad in zip(training.buffers, ready, strict=True):
                    buffer.copy_(grad)
                training.optimizer.step()
            here.wait_stream(side)
            for buffer in training.buffers:
                buffer.fill_(math.nan)
        return training

    same_bits(run(True).everything(), run(False).everything())


def assert_spread(kind: str, devices: list[torch.device], gpu_lr: bool) -> None:
    """Parameters on several devices are stepped as on one, and their gradients are clipped together.

    Norms that are summed in another order differ in the last digits; without clipping nothing does.
    """
    for clip in (None, 0.5):
        exact, apart = (
            Training(
                KINDS[kind],
                *homes,
                dtype=dtype,
                values=F32,
                lr=torch.tensor(LR, device=next((d for d in homes if d.type == "cuda" and gpu_lr), CPU)),
                max_grad_norm=clip,
                weight_decay=0.125,
            )
            for homes, dtype in (([CPU], F64), (devices, F32))
        )
        together = Training(KINDS[kind], CPU, lr=LR, max_grad_norm=clip, weight_decay=0.125)
        for step in range(10):
            for training in (exact, apart, together):
                training.step(step)
        assert [p.device for p in apart.params] == [devices[i % len(devices)] for i in range(len(SHAPES))]
        assert_within_budget(apart.flat(), exact.flat(), together.flat(), what=f"theta, clipped to {clip}")
        if clip is not None:
            assert_within_budget(
                apart.optimizer.grad_norm.cpu(), exact.optimizer.grad_norm.double(), scalar=True, what="norm"
            )
        if kind == "adamw":
            assert apart.count() == {10.0}


@both
@pytest.mark.parametrize("gpu_lr", [False, True], ids=["cpu-lr", "gpu-lr"])
@pytest.mark.parametrize("order", ["cpu-first", "cpu-last"])
def test_cpu_and_gpu_in_one_optimizer(kind: str, order: str, gpu_lr: bool, place: torch.device) -> None:
    assert_spread(kind, [CPU, place] if order == "cpu-first" else [place, CPU], gpu_lr)


@both
@pytest.mark.gpu
@pytest.mark.parametrize("current", [0, 1])
def test_two_gpus(kind: str, current: int) -> None:
    """Whichever is the current one; lr lies on one of them."""
    if torch.cuda.device_count() < 2:
        pytest.skip("by design: there is one CUDA device")
    with torch.cuda.device(current):
        assert_spread(kind, [torch.device("cuda", 1), torch.device("cuda", 0)], True)
        assert torch.cuda.current_device() == current
