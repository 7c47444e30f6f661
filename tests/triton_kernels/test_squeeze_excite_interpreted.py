"""Squeeze-and-excitation's launchers against the float64 reference: both ways of the layers, each gate and option."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dlkernels as dk
from dlkernels.reference import squeeze_excite as reference
from dlkernels.reference._activation import ACTIVATIONS, GATES, activate, gate
from dlkernels.testing import assert_bitwise, assert_within_budget, poisoned_empty, unmodified
from dlkernels.triton import squeeze_excite

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIGMOID = GATES["sigmoid"]
# (N, C, R, S): R = 0 for one layer. In one kernel (S >= 4 R) and by matrix products; one channel, position, unit.
SHAPES = ((2, 6, 2, 9), (3, 5, 1, 37), (2, 6, 3, 5), (2, 7, 0, 6), (4, 5, 2, 1), (1, 1, 1, 4), (1, 20, 5, 21))


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What a kernel does not write is NaN."""
    with poisoned_empty():
        yield


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several blocks of channels and of positions, chunks of several tiles, launches for a sample or two."""
    for name, value in {"TILE": 16, "PROGRAMS": 5, "BATCH_BYTES": 1200}.items():
        monkeypatch.setattr(squeeze_excite, name, value)
    plan = squeeze_excite.plan
    plan.cache_clear()
    yield
    plan.cache_clear()


class Case(NamedTuple):
    """x and residual as (N, C, S); the operator's codes."""

    x: Tensor
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    residual: Tensor | None
    activation: int = 1
    gate: int = SIGMOID
    residual_activation: int = 0


def make(shape: tuple[int, ...], dtype: torch.dtype, given: str = "12r", *codes: int) -> Case:
    """`given`: 1 = b1, 2 = b2, r = residual. Weights in float32 beside float16."""
    n, c, hidden, s = shape
    own = torch.float32 if dtype == torch.float16 else dtype
    sizes = {"1": (hidden,), "2": (c,)}
    b1, b2 = (0.5 * torch.randn(size).to(own) if name in given else None for name, size in sizes.items())
    w1, w2 = (torch.randn(hidden, c).to(own), torch.randn(c, hidden).to(own)) if hidden else (None, torch.randn(c, c))
    x = (torch.randn(n, c, s) + 0.5).to(dtype)
    residual = torch.randn(n, c, s).to(dtype) if "r" in given else None
    return Case(x, w1, b1 if hidden else None, w2.to(own), b2, residual, *codes)


def exact(case: Case, tensors: tuple[Tensor | None, ...]) -> Tensor:
    return reference.squeeze_excite(*tensors, *case[6:])


def eager(case: Case, tensors: tuple[Tensor | None, ...]) -> Tensor:
    """As PyTorch code writes it, every step in the dtype of x."""
    x, w1, b1, w2, b2, residual = (None if t is None else t.to(tensors[0].dtype) for t in tensors)
    z = x.mean(2)
    if w1 is not None:
        z = activate(F.linear(z, w1, b1), case.activation)
    y = x * gate(F.linear(z, w2, b2), case.gate).unsqueeze(-1)
    return y if residual is None else activate(y + residual, case.residual_activation)


def gradients(
    function: Callable[..., Tensor], case: Case, dy: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, list[Tensor | None]]:
    """Output and gradients of the six tensors, computed in `dtype` (None: each in its own)."""
    leaves = [None if t is None else (t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in case[:6]]
    y = function(case, tuple(leaves))
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype)))
    return y.detach(), [None if t is None else next(grads) for t in leaves]


NAMES = ("dx", "dw1", "db1", "dw2", "db2", "dresidual")


def check(case: Case, channels_last: bool = False, dy: Tensor | None = None) -> None:
    """Both launchers against float64, in one layout."""
    dy = torch.randn(case.x.shape).to(case.x.dtype) if dy is None else dy
    y, grads = gradients(exact, case, dy, torch.float64)
    eager_y, eager_grads = gradients(eager, case, dy, None)

    def laid(t: Tensor | None) -> Tensor | None:
        return t if t is None or not channels_last else t.mT.contiguous()

    x, residual, options = laid(case.x), laid(case.residual), (*case[6:], channels_last)
    with unmodified(*case[:6], dy):
        found, mean, hidden, e = squeeze_excite.squeeze_excite_fwd(x, *case[1:5], residual, *options)
        kept = residual if case.residual_activation else None
        upstream = dy.mT if channels_last else dy
        found_grads = squeeze_excite.squeeze_excite_bwd(upstream, x, mean, hidden, e, *case[1:5], kept, *options)
    assert found.is_contiguous() and found.dtype == case.x.dtype
    assert_within_budget(found.mT if channels_last else found, y, eager_y, what="y")
    check_saved(case, mean, hidden, e)
    for name, given, grad, right, theirs in zip(NAMES, case[:6], found_grads, grads, eager_grads, strict=True):
        if given is None or (name == "dresidual" and not case.residual_activation):
            assert grad.shape == (0,), name
            continue
        assert grad.dtype == given.dtype and grad.is_contiguous(), name
        assert_within_budget(grad.mT if channels_last and grad.dim() == 3 else grad, right, theirs, what=name)


def check_saved(case: Case, mean: Tensor, hidden: Tensor, e: Tensor) -> None:
    """Mean, hidden and gate in the accumulator's dtype, against float64 and the same steps in that dtype."""

    def saved(dtype: torch.dtype) -> list[Tensor]:
        x, w1, b1, w2, b2 = (None if t is None else t.to(dtype) for t in case[:5])
        z = mean = x.mean(2)
        hidden = z.new_empty(z.shape[0], 0)
        if w1 is not None:
            hidden = F.linear(z, w1, b1)
            z = activate(hidden, case.activation)
        return [mean, hidden, gate(F.linear(z, w2, b2), case.gate)]

    dtype = torch.float64 if case.x.dtype == torch.float64 else torch.float32
    for name, ours, right, theirs in zip(
        ("mean", "hidden", "gate"), (mean, hidden, e), saved(torch.float64), saved(dtype)
    ):
        assert ours.dtype == dtype, name
        assert_within_budget(ours, right, theirs, what=name)


# Regimes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: tuple[int, ...], channels_last: bool) -> None:
    generator = random.Random(f"{shape} {channels_last}")
    check(make(shape, torch.float32, "12"), channels_last)
    check(make(shape, generator.choice(DTYPES), "12r", 3, SIGMOID, 3), channels_last)


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("shape", ((2, 6, 2, 19), (1, 5, 3, 50), (2, 20, 5, 7), (2, 20, 0, 4), (3, 3, 1, 11)))
def test_tiles_and_batches(shape: tuple[int, ...], channels_last: bool, tiny_tiles: None) -> None:
    generator = random.Random(f"{shape} {channels_last}")
    check(make(shape, generator.choice(DTYPES), "12r", 1, SIGMOID, generator.choice((0, 3))), channels_last)


def test_both_ways_and_every_loop(tiny_tiles: None) -> None:
    """The shapes above take one kernel and matrix products, several batches, chunks, and tiles of a chunk."""
    shapes = ((2, 6, 2, 19), (1, 5, 3, 50), (2, 20, 5, 7), (2, 20, 0, 4), (3, 3, 1, 11))
    plans = [(n, squeeze_excite.plan(n, c, s, r, 8, last)) for n, c, r, s in shapes for last in (False, True)]
    assert {p.fused for _, p in plans} == {False, True}
    assert any(p.batch < n for n, p in plans) and any(p.chunks > 1 and p.fused for _, p in plans)
    assert any(p.chunks > 1 and not p.fused for _, p in plans) and any(p.steps > 1 for _, p in plans)
    assert any(p.c_blocks > 1 for _, p in plans)


@pytest.mark.parametrize("gate_code", GATES.values())
@pytest.mark.parametrize("activation", [ACTIVATIONS[name] for name in ("relu", "silu", "gelu", "leaky_relu")])
def test_hidden_activations_and_gates(activation: int, gate_code: int) -> None:
    """In one kernel and by matrix products."""
    for shape, dtype in (((2, 5, 2, 9), torch.float32), ((2, 5, 3, 4), random.Random(activation).choice(DTYPES))):
        check(make(shape, dtype, "12", activation, gate_code))


@pytest.mark.parametrize("activation", ACTIVATIONS.values())
def test_residual_activations(activation: int) -> None:
    for dtype in DTYPES:
        check(make((2, 5, 2, 9), dtype, "12r", 1, SIGMOID, activation), channels_last=activation % 2 == 1)


@pytest.mark.parametrize("shape", ((2, 5, 2, 9), (2, 5, 3, 4), (2, 5, 0, 4)))
def test_every_option_alone_and_left_out(shape: tuple[int, ...]) -> None:
    for given in ("", "1", "2", "r", "1r", "2r"):
        check(make(shape, torch.float32, given, 1, GATES["hard_sigmoid"], 1 if "r" in given else 0))


def test_float64() -> None:
    for shape in ((2, 5, 2, 9), (2, 5, 3, 4), (2, 5, 0, 7)):
        for gate_code in GATES.values():
            check(make(shape, torch.float64, "12r", 2, gate_code, 4), channels_last=gate_code == 1)


def test_real_tiles() -> None:
    """Rows longer than a tile, more hidden units than a block of them, more channels than the kernel of the layers."""
    check(make((1, 2, 2, 4099), torch.float32, "12r", 1, SIGMOID, 1))
    check(make((1, 1030, 9, 36), torch.bfloat16, "12"))
    check(make((1, squeeze_excite.MAX_CHANNELS + 2, 1, 4), torch.float32, "12"))


def test_wide_offsets(tiny_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 64-bit offsets of a huge sample, on a small one."""
    monkeypatch.setattr(squeeze_excite, "WIDE", 1)
    for last in (False, True):
        check(make((2, 5, 2, 19), torch.float32, "12r", 1, SIGMOID, 1), last)


def test_large_mean() -> None:
    """Means of numbers far from zero."""
    case = make((2, 4, 2, 9), torch.float32, "12")
    check(case._replace(x=1000 + case.x, w1=case.w1 / 1000))


def test_empty_batch() -> None:
    for shape in ((0, 5, 2, 9), (0, 5, 0, 4)):
        case = make(shape, torch.float32, "12r", 1, SIGMOID, 1)
        y, *saved = squeeze_excite.squeeze_excite_fwd(*case, False)
        assert y.shape == (0, 5, shape[3]) and [tuple(t.shape) for t in saved] == [(0, 5), (0, shape[2]), (0, 5)]
        grads = squeeze_excite.squeeze_excite_bwd(y, case.x, *saved, *case[1:], False)
        for given, grad in zip(case[:6], grads, strict=True):
            assert grad.shape == ((0,) if given is None else given.shape)
            assert torch.equal(grad, torch.zeros_like(grad))


def test_strides() -> None:
    """Strides of 0, transposed, and every input with strides of its own."""
    case = make((2, 6, 2, 10), torch.float32, "12r", 1, SIGMOID, 1)
    for dy in (torch.tensor(-1.7).expand(2, 6, 10), torch.randn(2, 10, 6).mT, torch.randn(6, 1).expand(2, 6, 10)):
        check(case, dy=dy)
    strided = [None if t is None else torch.stack([t, t], -1)[..., 0] for t in case[:6]]
    expected = squeeze_excite.squeeze_excite_fwd(*case, False)
    for a, b in zip(squeeze_excite.squeeze_excite_fwd(*strided, *case[6:], False), expected, strict=True):
        assert_bitwise(a, b)


@pytest.mark.parametrize("layout", ("channels_first", "channels_last"))
def test_public_function(layout: str) -> None:
    x = torch.randn(2, 4, 3, 4)
    c = x.shape[1 if layout == "channels_first" else 3]
    tensors, dy = (x, torch.randn(2, c), torch.randn(c, 2)), torch.randn(x.shape)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        x, w1, w2 = leaves = [t.to(dtype).requires_grad_() for t in tensors]
        with dk.backend(backend):
            y = dk.squeeze_excite(x, w1, None, w2, None, residual=2 * x, residual_activation="gelu_tanh", layout=layout)
            return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    for ours, right, theirs in zip(
        run("triton", torch.float32), run("reference", torch.float64), run("reference", torch.float32), strict=True
    ):
        assert_within_budget(ours, right, theirs)


@pytest.mark.parametrize("shape", ((3, 6, 4, 7), (2, 7, 0, 6), (2, 6, 2, 9)))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=lambda d: str(d)[6:])
def test_autocast_around_both_passes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The matrix products keep their dtype where the backward pass too runs inside of it."""
    case = make(shape, torch.float32, "12")

    def run() -> list[Tensor]:
        leaves = [None if t is None else t.requires_grad_() for t in case[:5]]
        with dk.backend("triton"):
            y = dk.squeeze_excite(*leaves)
            return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], torch.ones_like(y))]

    expected = run()
    with torch.autocast("cpu", dtype):
        found = run()
    for a, e in zip(found, expected, strict=True):
        assert_bitwise(a, e)


def test_plans_do_not_depend_on_the_batch() -> None:
    """Blocks and warps are a function of a sample's shape: another batch size compiles nothing new."""
    for c, s, hidden in ((64, 3136, 4), (2048, 49, 128), (320, 4096, 20)):
        for last in (False, True):
            plans = [squeeze_excite.plan(n, c, s, hidden, 2, last) for n in (1, 3, 64)]
            assert len({(p.block_c, p.block_s, p.num_warps, p.last, p.fused) for p in plans}) == 1


# What the check notices -----------------------------------------------------------------------------------------------


def scaled_gate(launch: Any) -> Any:
    def run(*args: Any) -> Any:
        y, *saved = launch(*args)
        return y * 1.001 if args[5] is None else y, *saved

    return run


def ignored(position: int) -> Callable[[Any], Any]:
    def replace(args: Any) -> Any:
        return torch.zeros_like(args[position]) if position in (1, 3) else None

    return lambda launch: lambda *args: launch(*args[:position], replace(args), *args[position + 1 :])


def recoded(position: int) -> Callable[[Any], Any]:
    return lambda launch: lambda *args: launch(*args[:position], 2, *args[position + 1 :])


@pytest.mark.parametrize("shape", ((2, 5, 2, 9), (2, 5, 3, 4)))
@pytest.mark.parametrize(
    "wrong, given",
    ((scaled_gate, ""), (ignored(1), ""), (ignored(2), "1"), (ignored(3), ""), (ignored(4), "2"), (ignored(5), "r"),
     (recoded(6), "1"), (recoded(7), "")),
)  # fmt: skip
def test_the_check_notices_a_wrong_forward(
    wrong: Any, given: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make(shape, torch.float32, given, 3)
    check(case)
    monkeypatch.setattr(squeeze_excite, "squeeze_excite_fwd", wrong(squeeze_excite.squeeze_excite_fwd))
    with pytest.raises(AssertionError, match="relative error"):
        check(case)


@pytest.mark.parametrize("index, name", list(enumerate(NAMES)))
def test_the_check_notices_a_wrong_gradient(index: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make((2, 5, 2, 9), torch.float32, "12r", 3, SIGMOID, 3)
    launch = squeeze_excite.squeeze_excite_bwd

    def run(*args: Any) -> Any:
        grads = list(launch(*args))
        grads[index] = grads[index] * 1.001
        return tuple(grads)

    monkeypatch.setattr(squeeze_excite, "squeeze_excite_bwd", run)
    with pytest.raises(AssertionError, match=f"{name}: relative error"):
        check(case)


def test_the_check_notices_a_lost_chunk(tiny_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of all chunks but the last."""
    case = make((1, 4, 2, 70), torch.float32, "12")
    check(case)
    plan = squeeze_excite.plan

    def short(*args: Any) -> Any:
        p = plan(*args)
        return p._replace(chunks=p.chunks - 1)

    monkeypatch.setattr(squeeze_excite, "plan", short)
    with pytest.raises(AssertionError, match="relative error"):
        check(case)
