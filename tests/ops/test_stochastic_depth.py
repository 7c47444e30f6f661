"""Stochastic depth: torchvision's masks and values, gradients, what dropping means, layouts, errors, rate schedules.

The formulas below are written down here a second time on purpose: what they are compared with is not their source.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from _layers import backend_fixture
from torch import Tensor

import dlkernels as dk
from dlkernels.testing import assert_bitwise, assert_within_budget, layouts, num_threads, poisoned_empty, unmodified

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

backend = backend_fixture("stochastic_depth", interpreted=True)


def plain(
    input: Tensor, p: float, mode: str, training: bool = True, residual: Tensor | None = None, noise: Any = None
) -> Tensor:
    """torchvision.ops.stochastic_depth, line by line, and the addition that follows it in a network."""
    if not training or p == 0.0:
        return input if residual is None else residual + input
    survival_rate = 1.0 - p
    size = [input.shape[0]] + [1] * (input.ndim - 1) if mode == "row" else [1] * input.ndim
    if noise is None:
        noise = torch.empty(size, dtype=input.dtype, device=input.device)
        noise = noise.bernoulli_(survival_rate)
        if survival_rate > 0.0:
            noise.div_(survival_rate)
    out = input * noise.view(size).to(input.dtype)
    return out if residual is None else residual + out


# CASES ----------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    shape: tuple[int, ...]
    p: float = 0.3
    mode: str = "row"
    residual: bool = True
    training: bool = True

    def __str__(self) -> str:
        words = ("x".join(map(str, self.shape)), self.p, self.mode, self.residual, self.training)
        return "-".join(map(str, words))


SHAPES = ((1,), (7,), (5, 1), (9, 7), (6, 16), (4, 33), (3, 2, 5), (8, 3, 5, 7), (2, 1, 2, 3, 4), (5, 4099))
CASES = [
    *(Case(shape, residual=residual) for shape in SHAPES for residual in (True, False)),
    *(Case((9, 7), p, mode) for p in (0.0, 0.001, 0.5, 0.999, 1.0) for mode in ("row", "batch")),
    *(Case((9, 7), 0.4, "batch", residual) for residual in (True, False)),
    *(Case((9, 7), 0.4, training=False, residual=residual) for residual in (True, False)),
    Case((9, 7), 1, residual=False),
]


def tensors(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor | None, Tensor]:
    torch.manual_seed(1000 + seed)
    x, r, dy = ((2 * torch.randn(case.shape) + 0.1).to(dtype).to(device) for _ in range(3))
    return x, r if case.residual else None, dy


def everything(call: Callable[..., Tensor], x: Tensor, r: Tensor | None, dy: Tensor, *args: Any, **more: Any) -> Any:
    """(y, dx[, dresidual])"""
    x = x.detach().requires_grad_()
    r = None if r is None else r.detach().requires_grad_()
    y = call(x, *args, residual=r, **more)
    return (y.detach(), *torch.autograd.grad(y, [t for t in (x, r) if t is not None], dy))


def check(call: Callable[..., Tensor], case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
    """From one seed: the mask of torchvision, values and gradients within twice its error plus 4 eps."""
    x, r, dy = tensors(case, dtype, device, seed)
    options = (case.p, case.mode, case.training)
    torch.manual_seed(seed)
    eager = everything(plain, x, r, dy, *options)
    following = torch.rand(3)
    torch.manual_seed(seed)
    actual = everything(call, x, r, dy, *options)
    assert_bitwise(torch.rand(3), following, "the generator's state afterwards")

    torch.manual_seed(seed)
    rows = case.shape[0] if case.mode == "row" else 1
    noise = torch.empty(rows, dtype=dtype, device=device).bernoulli_(1 - case.p)
    if case.p < 1:
        noise.div_(1 - case.p)
    doubles = [None if t is None else t.double() for t in (x, r, dy)]
    exact = everything(plain, *doubles, *options, noise=noise.double())
    names = ("y", "dx", "dresidual")[: len(actual)]
    for name, a, e, t in zip(names, actual, exact, eager, strict=True):
        assert a.dtype == dtype and a.shape == case.shape
        if dtype == torch.float64:
            assert (a - e).abs().max() <= 1e-15 * e.abs().max()
        else:
            assert_within_budget(a, e, t, what=name)
    if r is None:
        assert_bitwise(actual[0] + 0.0, eager[0] + 0.0, "y")  # -0 in what is dropped: 0
        assert_bitwise(actual[1] + 0.0, eager[1] + 0.0, "dx")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_torchvisions(case: Case, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Every case and dtype, the generator left as torchvision leaves it."""
    if backend == "triton" and device.type == "cpu" and dtype != torch.float32:
        pytest.skip("by design: in the slow interpreter float32 stands for all dtypes")
    for seed in range(2):
        check(dk.stochastic_depth, case, dtype, device, seed)


@pytest.mark.parametrize("mode, rows", [("row", 6), ("batch", 1)])
def test_noise_is_replayed(mode: str, rows: int, backend: str, device: torch.device) -> None:
    """Given factors are used as they are, in either shape and in float32 beside half precision; none is drawn."""
    factors = torch.tensor([1.5, 0.0, -2.0, 0.25, 0.0, 1.0])[:rows].to(device)
    for dtype in (torch.float32, torch.bfloat16):
        x, r, _ = tensors(Case((6, 5, 4)), dtype, device, 0)
        expected = (r.double() + x.double() * factors.double().view(-1, 1, 1)).to(dtype)
        state = torch.get_rng_state()
        for noise in (factors, factors.view(-1, 1, 1), factors.to(dtype)):
            y = dk.stochastic_depth(x, 0.9, mode, residual=r, noise=noise)
            assert (y.double() - expected.double()).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()
            assert y.dtype == dtype
        assert torch.equal(torch.get_rng_state(), state)
    for training, p in ((False, 0.9), (True, 0.0)):
        assert dk.stochastic_depth(x, p, mode, training, noise=factors) is x


@pytest.mark.parametrize("residual", [True, False])
def test_what_is_dropped_is_not_read(residual: bool, backend: str, device: torch.device) -> None:
    """Infinities and NaN in a dropped sample go no further, in values or in gradients."""
    x, r, dy = tensors(Case((4, 37), residual=residual), torch.float32, device, 0)
    noise = torch.tensor([2.0, 0.0, 0.0, 2.0], device=device)
    clean = everything(dk.stochastic_depth, x, r, dy, 0.5, noise=noise)
    x[1, 5], x[2, 36] = NAN, -INF
    for a, e in zip(everything(dk.stochastic_depth, x, r, dy, 0.5, noise=noise), clean, strict=True):
        assert_bitwise(a, e)
    x[0, 1] = INF
    assert torch.isinf(dk.stochastic_depth(x, 0.5, noise=noise)[0, 1])


def test_without_training_the_input_itself(backend: str, device: torch.device) -> None:
    x, r, _ = tensors(Case((4, 5)), torch.float32, device, 0)
    assert dk.stochastic_depth(x, 0.5, training=False) is x and dk.stochastic_depth(x, 0.0) is x
    assert_bitwise(dk.stochastic_depth(x, 0.5, "batch", False, residual=r), x + r)


@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (6, 4, 3), (3, 4, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_layouts(shape: tuple[int, ...], mode: str, backend: str, device: torch.device) -> None:
    if backend == "triton" and device.type == "cpu":
        pytest.skip("by design: what is above the launchers is the same on every backend")
    """Input, residual and gradient each in a layout of its own; channels_last stays, without training too."""
    x, r, dy = tensors(Case(shape), torch.float32, device, 1)
    noise = torch.tensor([1.5, 0.0, -2.0, 0.25, 0.0, 1.0], device=device)[: shape[0]] if mode == "row" else None
    noise = torch.tensor([1.75], device=device) if noise is None else noise
    exact = everything(plain, x.double(), r.double(), dy.double(), 0.5, mode, noise=noise.double())
    for name, changed in layouts(x):
        for other, rest in layouts(r):
            upstream = dict(layouts(dy))[other]
            actual = everything(dk.stochastic_depth, changed, rest, upstream, 0.5, mode, noise=noise)
            for a, e in zip(actual, exact, strict=True):
                assert_within_budget(a, e, what=f"{name} input, {other} residual")
            if name.startswith("channels_last"):
                kept = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
                assert all(t.is_contiguous(memory_format=kept) for t in actual[:2]), (name, other)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (3, 0, 4)], ids=str)
@pytest.mark.parametrize("mode", ["row", "batch"])
def test_empty(shape: tuple[int, ...], mode: str, backend: str, device: torch.device) -> None:
    x = torch.zeros(shape, device=device)
    for t in everything(dk.stochastic_depth, x, x, x, 0.5, mode):
        assert t.shape == shape


def test_scalar_of_mode_batch(backend: str, device: torch.device) -> None:
    torch.manual_seed(3)
    y = [dk.stochastic_depth(torch.tensor(3.0, device=device), 0.5, "batch").item() for _ in range(20)]
    assert set(y) == {0.0, 6.0}


def test_larger_than_the_caches(device: torch.device) -> None:
    """The stores that go past the caches write every element, whatever the alignment and the number of threads."""
    for shape, dtype in (((3, 1_080_021), torch.float32), ((3, 5, 419_431), torch.bfloat16)):
        x = torch.linspace(-2, 2, 1021, device=device).repeat(math.prod(shape) // 1021 + 1)[: math.prod(shape)]
        x = x.view(shape).to(dtype)
        r, noise = x.flip(-1), torch.tensor([1.5, 0.0, 2.0], device=device)
        expected = (r.float() + x.float() * noise.view(-1, *[1] * (x.dim() - 1))).to(dtype)
        for count in (1, 3):
            with num_threads(count), poisoned_empty():
                y = dk.stochastic_depth(x, 0.5, residual=r, noise=noise)
            assert torch.allclose(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_masks_of_rows_and_batch(device: torch.device) -> None:
    """Rates and values over many draws: 1 / (1 - p) with probability 1 - p."""
    torch.manual_seed(0)
    y = dk.stochastic_depth(torch.ones(20_000, 2, device=device), 0.3)
    assert torch.equal(y[:, 0], y[:, 1])
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1.0).div(0.7).item()}
    assert abs((y[:, 0] == 0).float().mean().item() - 0.3) < 0.015
    each = torch.stack([dk.stochastic_depth(torch.ones(3, 2, device=device), 0.3, "batch") for _ in range(50)])
    assert all(len(t.unique()) == 1 for t in each) and len(each.unique()) == 2


REJECTED: list[tuple[str, Callable[[Tensor], Any], type[Exception], str]] = [
    ("p above", lambda x: dk.stochastic_depth(x, 1.1), ValueError, r"`p` must be in \[0, 1\], got 1.1"),
    ("p below", lambda x: dk.stochastic_depth(x, -0.1, training=False), ValueError, "got -0.1"),
    ("p nan", lambda x: dk.stochastic_depth(x, NAN), ValueError, "got nan"),
    ("p none", lambda x: dk.stochastic_depth(x, None), TypeError, "`p` must be a number"),
    ("mode", lambda x: dk.stochastic_depth(x, 0.5, "rows"), ValueError, "'row', 'batch', got 'rows'"),
    ("mode none", lambda x: dk.stochastic_depth(x, 0.5, None), ValueError, "got None"),
    ("integers", lambda x: dk.stochastic_depth(x.long(), 0.5), TypeError, "`input` must be float32"),
    ("no tensor", lambda x: dk.stochastic_depth([1.0], 0.5), TypeError, "`input` must be a Tensor"),
    ("scalar", lambda x: dk.stochastic_depth(x[0, 0], 0.5), ValueError, "mode 'row'"),
    ("residual shape", lambda x: dk.stochastic_depth(x, 0.5, residual=x[:1]), ValueError, r"= \(3, 4\), got \(1, 4\)"),
    ("residual dtype", lambda x: dk.stochastic_depth(x, 0.5, residual=x.half()), TypeError, "dtype of `input`"),
    ("residual device", lambda x: dk.stochastic_depth(x, 0.5, residual=x.to("meta")), ValueError, "on the device"),
    ("residual unused", lambda x: dk.stochastic_depth(x, 0.5, training=False, residual=x[:1]), ValueError, "residual"),
    ("noise shape", lambda x: dk.stochastic_depth(x, 0.5, noise=x[:, 0][:2]), ValueError, r"\(N,\) = \(3,\), got \(2"),
    ("noise batch", lambda x: dk.stochastic_depth(x, 0.5, "batch", noise=x[:, 0]), ValueError, r"= \(1,\), got \(3,\)"),
    ("noise full", lambda x: dk.stochastic_depth(x, 0.5, noise=x), ValueError, r"= \(3, 1\), got \(3, 4\)"),
    ("noise dtype", lambda x: dk.stochastic_depth(x, 0.5, noise=x[:, 0].half()), TypeError, "`noise` must be"),
    ("noise grad", lambda x: dk.stochastic_depth(x, 0.5, noise=torch.ones(3).requires_grad_()), ValueError, "gradient"),
    ("module p", lambda x: dk.nn.StochasticDepth(2.0), ValueError, "`p`"),
    ("module mode", lambda x: dk.nn.StochasticDepth(0.5, "x"), ValueError, "`mode`"),
    ("depth", lambda x: dk.nn.stochastic_depth_rates(0.5, -1), ValueError, "`depth`"),
    ("schedule", lambda x: dk.nn.stochastic_depth_rates(0.5, 3, "linear"), ValueError, "'linspace', 'huang'"),
]


@pytest.mark.parametrize(("call", "error", "message"), [r[1:] for r in REJECTED], ids=[r[0] for r in REJECTED])
def test_rejects(call: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    """One line that says what was expected and what came; nothing is written, nothing drawn."""
    x = torch.arange(12.0).view(3, 4)
    state = torch.get_rng_state()
    with unmodified(x), pytest.raises(error, match=message) as caught:
        call(x)
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.needs("hypothesis")
def test_any_shape(device: torch.device) -> None:
    from hypothesis import given
    from hypothesis import strategies as st

    @st.composite
    def cases(draw: Any) -> Case:
        shape = tuple(draw(st.lists(st.integers(1, 19), min_size=1, max_size=4)))
        p = draw(st.floats(0, 1))
        return Case(shape, p, draw(st.sampled_from(("row", "batch"))), draw(st.booleans()), draw(st.booleans()))

    @given(cases(), st.sampled_from(DTYPES[:3]), st.integers(0, 99))
    def holds(case: Case, dtype: torch.dtype, seed: int) -> None:
        check(dk.stochastic_depth, case, dtype, device, seed)

    holds()


# The module and the schedules -----------------------------------------------------------------------------------------


def test_module() -> None:
    layer = dk.nn.StochasticDepth(0.4)
    x, r = torch.randn(6, 5), torch.randn(6, 5)
    torch.manual_seed(5)
    y = layer(x, r)
    torch.manual_seed(5)
    torch.manual_seed(5)
    noise = torch.empty(6, 1).bernoulli_(0.6).div_(0.6)
    assert torch.allclose(y, r + x * noise)
    assert layer.eval()(x) is x and torch.equal(layer(x, r), x + r)
    assert repr(layer) == "StochasticDepth(p=0.4, mode='row')" and not layer.state_dict()


def test_rates() -> None:
    rates = dk.nn.stochastic_depth_rates
    assert rates(0.2, 5) == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert rates(0.2, 5) == pytest.approx(torch.linspace(0, 0.2, 5).tolist())
    assert rates(0.5, 4, "huang") == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert rates(0.2, 4, "efficientnet") == pytest.approx([0, 0.05, 0.1, 0.15])
    assert rates(0.2, 1) == [0.0] and rates(0.2, 1, "huang") == [0.2] and rates(0.2, 0) == []
    assert all(type(rate) is float for name in ("linspace", "huang", "efficientnet") for rate in rates(1, 3, name))


# Negative controls: each of these mistakes is noticed -----------------------------------------------------------------


def broken(flaw: str) -> Callable[..., Tensor]:
    """torchvision's lines with one detail changed."""

    def call(input: Tensor, p: float, mode: str, training: bool, residual: Tensor | None = None) -> Tensor:
        if not training and flaw != "drops without training":
            return plain(input, p, mode, training, residual)
        rows = input.shape[0] if (mode == "row") != (flaw == "other mode") else 1
        rate = p if flaw == "p is the survival rate" else 1 - p
        form = (rows, *[1] * (input.dim() - 1))
        noise = torch.empty(form, dtype=input.dtype, device=input.device).bernoulli_(rate)
        if flaw == "drawn in float32":
            noise = torch.rand(form, device=input.device).lt(rate).to(input.dtype)
        if flaw != "not rescaled" and rate > 0:
            noise.div_(rate)
        if flaw == "residual scaled too" and residual is not None:
            return (residual + input) * noise
        y = input * (noise if flaw != "no gradient for input" else noise.mul(0)) + (
            input.detach() * noise if flaw == "no gradient for input" else 0
        )
        return y if residual is None or flaw == "residual dropped" else residual + y

    return call


FLAWS = (
    *("not rescaled", "other mode", "residual dropped", "residual scaled too", "drops without training"),
    *("p is the survival rate", "drawn in float32", "no gradient for input"),
)


@pytest.mark.parametrize("flaw", FLAWS)
def test_the_check_notices(flaw: str, device: torch.device) -> None:
    """The lines as they are pass the check above; with one detail changed they do not."""
    case = Case((16, 7), 0.3, training=flaw != "drops without training")
    check(broken(""), case, torch.float32, device)
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        check(broken(flaw), case, torch.float32, device)
    assert isinstance(caught.value, AssertionError) or "not have been used" in str(caught.value)
