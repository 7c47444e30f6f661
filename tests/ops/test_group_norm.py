"""Group normalisation with activation, residual, scale and shift: values, gradients, layouts, edges, errors.

Compared with compositions of torch.nn.functional.group_norm, in float64 and in the dtype under test.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _layers import (
    ACTIVATIONS,
    DTYPES,
    INF,
    NAN,
    Tensors,
    assert_layout,
    backend_fixture,
    channels_last,
    check,
    each,
    enough,
    normal,
    random_,
    rejects,
    results,
    same_layout,
    saved,
    work,
)
from torch import Tensor, nn

import dlkernels as dk
from dlkernels.testing import assert_bitwise, assert_within_budget, layouts, num_threads, relative_error, unmodified

backend = backend_fixture("group_norm")
small = backend_fixture("group_norm", interpreted=True)
fused = backend_fixture("group_norm", plain=False)

ALL = ("weight", "bias", "residual", "scale", "shift")
SETS = {
    "bare": (),
    "weight": ("weight",),
    "bias": ("bias",),
    "affine": ("weight", "bias"),
    "residual": ("residual",),
    "scale": ("scale",),
    "shift": ("shift",),
    "modulated": ("scale", "shift"),
    "weight_shift_residual": ("weight", "shift", "residual"),
    "all": ALL,
}

# (shape, groups): one channel per group and all in one, one position, odd groups, just past vectors, two to five ranks.
SHAPES = [
    ((5, 6), 1),
    ((4, 33), 11),
    ((2, 6, 1), 3),
    ((2, 9, 1), 3),
    ((1, 1, 9), 1),
    ((1, 4, 7), 4),
    ((2, 3, 33), 3),
    ((3, 34, 9), 17),
    ((2, 6, 5, 3), 2),
    ((1, 12, 17, 19), 4),
    ((2, 32, 8, 8), 8),
    ((2, 24, 1, 1), 4),
    ((2, 8, 1, 31), 1),
    ((2, 4, 3, 5, 7), 2),
    ((1, 18, 2, 2, 2), 9),
    ((2, 6, 2, 1, 3, 2), 3),
]


def plain(
    input: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    activation: str | None = None, residual: Tensor | None = None, scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """torch's group_norm and what models write behind it."""
    ones = (1,) * (input.dim() - 2)
    if weight is None and bias is not None:  # torch 2.13 has no gradient for it
        y = F.group_norm(input, groups, None, None, eps) + bias.view(-1, *ones)
    else:
        y = F.group_norm(input, groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + scale.view(*scale.shape, *ones))
    if shift is not None:
        y = y + shift.view(*shift.shape, *ones)
    if residual is not None:
        y = y + residual
    return ACTIVATIONS[activation](y).to(input.dtype)


def draw(
    shape: tuple[int, ...],
    present: tuple[str, ...] = ALL,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    device: torch.device | str = "cpu",
    layout: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensors:
    """The tensors by name, none special: no weight 1, no bias 0, another mean in every channel."""
    n, c = shape[:2]
    like, (dtype, parameters) = (n, c, *[1] * (len(shape) - 2)), dtypes
    tensors: Tensors = {"input": layout((normal(*shape) * 1.3 + 0.6 * normal(*like)).to(dtype).to(device))}
    makers: dict[str, Callable[[], Tensor]] = {
        "weight": lambda: normal(c, dtype=parameters, mean=0.4),
        "bias": lambda: normal(c, dtype=parameters, mean=-0.2, std=0.7),
        "residual": lambda: layout(normal(*shape, dtype=dtype, mean=0.1).to(device)),
        "scale": lambda: normal(n, c, dtype=parameters, std=0.4),
        "shift": lambda: normal(n, c, dtype=parameters, std=0.5),
    }
    return tensors | {name: makers[name]().to(device) if name in present else None for name in ALL}


def check_layer(
    layer: Callable[..., Tensor], shape: tuple[int, ...], groups: int, *, seeds: int = 3, eps: float = 1e-5,
    activation: str | None = None, **how: Any,
) -> None:  # fmt: skip
    """`check` of one group_norm against F.group_norm, over this many draws."""
    options = {"eps": eps, "activation": activation}
    check(
        lambda input, **more: layer(input, groups, **more, **options),
        lambda input, **more: plain(input, groups, **more, **options),
        [draw(shape, **how) for _ in range(seeds)],
    )


# Values and gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("present", SETS)
def test_every_combination_of_tensors(present: str, dtypes: Any, backend: str, device: torch.device) -> None:
    for activation in (None, "silu"):
        check_layer(
            dk.group_norm, (2, 6, 5, 3), 3, present=SETS[present], dtypes=dtypes, device=device, activation=activation
        )


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, dtypes: Any, backend: str, device: torch.device) -> None:
    """After the residual, contiguous and channels_last, other eps too."""
    for present, layout, eps in itertools.product(
        ("affine", "all"), (torch.Tensor.contiguous, channels_last), (1e-5, 0.1)
    ):
        check_layer(
            dk.group_norm, (2, 6, 9, 3), 2, seeds=2, eps=eps, activation=activation, present=SETS[present],
            dtypes=dtypes, device=device, layout=layout,
        )  # fmt: skip


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], groups: int, dtypes: Any, backend: str, device: torch.device) -> None:
    eps = 1e-5 if torch.Size(shape[1:]).numel() // groups > 3 else 0.5  # x_hat of two values is +-1, and dx is noise
    for present, layout in itertools.product(("bare", "affine", "all"), (torch.Tensor.contiguous, channels_last)):
        check_layer(
            dk.group_norm, shape, groups, seeds=enough(shape[1]), eps=eps, present=SETS[present], dtypes=dtypes,
            device=device, layout=layout,
        )  # fmt: skip


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2], DTYPES[5]])
def test_every_remainder(dtypes: Any, fused: str, device: torch.device) -> None:
    """All numbers of channels and of positions up to a few vectors, so that every tail is met."""
    few = [((2, 1, s), 1) for s in range(4, 70)] + [((1, 4, s), 2) for s in (*range(2, 34), 63, 64, 65, 127, 129)]
    many = [((2, c, 3), 1) for c in range(2, 70)] + [((1, 2 * c, 2), 2) for c in range(2, 34)]
    for (shape, groups), layout in itertools.product(few + many, (torch.Tensor.contiguous, channels_last)):
        t = draw(shape, ("weight", "bias"), dtypes, device, layout)
        g = (normal(*shape, mean=1.5).to(device) + t["input"]).to(dtypes[0])  # no sum cancels
        actual = results(lambda input, **more: dk.group_norm(input, groups, **more), t, g)  # noqa: B023
        exact = results(lambda input, **more: plain(input, groups, **more), each(t, lambda v: v.double()), g)  # noqa: B023
        for name, value in actual.items():  # one element that is lost or wrong is an error above 1 / sqrt(420)
            limit = 2 * torch.finfo(value.dtype).eps if value.dtype == torch.bfloat16 else 1e-4
            assert relative_error(value, exact[name]) < limit, f"{name} of {shape}"


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_parameters_of_different_dtypes(half: torch.dtype, backend: str, device: torch.device) -> None:
    """Each of them may be float32 beside a half-precision input; its gradient is what it is."""
    for single in (("weight",), ("bias",), ("scale",), ("shift",), ("weight", "shift"), ("bias", "scale")):
        t = draw((3, 6, 5, 3), dtypes=(half, half), device=device)
        t |= {k: v.float() for k, v in t.items() if k in single}
        g = normal(3, 6, 5, 3, dtype=half).to(device)
        exact = results(lambda input, **more: plain(input, 2, **more), each(t, lambda v: v.double()), g)
        for name, value in results(lambda input, **more: dk.group_norm(input, 2, **more), t, g).items():
            assert value.dtype == t[name.removeprefix("gradient of ") if name != "output" else "input"].dtype
            assert_within_budget(value, exact[name], what=name)


@pytest.mark.parametrize(("shape", "groups"), [((2, 6, 5), 3), ((2, 6, 3, 3), 1), ((2, 5, 4), 5)], ids=str)
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]])
def test_small(shape: tuple[int, ...], groups: int, dtypes: Any, small: str, device: torch.device) -> None:
    """What the interpreter can do in reasonable time."""
    for layout in (torch.Tensor.contiguous, channels_last):
        check_layer(
            dk.group_norm, shape, groups, seeds=1, activation="silu", dtypes=dtypes, device=device, layout=layout
        )


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]])
@pytest.mark.parametrize(
    ("shape", "groups"), [((1, 8, 300, 301), 2), ((2, 3, 70_001), 3), ((1, 4, 33_000), 1), ((1, 2050, 9), 1)], ids=str
)
def test_large_groups(shape: tuple[int, ...], groups: int, dtypes: Any, backend: str, device: torch.device) -> None:
    """More of everything than fits into one block; smooth activations, as one sign in a million may flip."""
    for layout, present in ((torch.Tensor.contiguous, "all"), (channels_last, "affine")):
        check_layer(
            dk.group_norm, shape, groups, seeds=1, activation="silu", present=SETS[present], dtypes=dtypes,
            device=device, layout=layout,
        )  # fmt: skip


def test_vector(small: str, device: torch.device) -> None:
    """0..7 as [1, 4, 2] in two groups."""
    x = torch.arange(8.0, device=device).view(1, 4, 2)
    group = [-1.34163542, -0.44721181, 0.44721181, 1.34163542]
    torch.testing.assert_close(dk.group_norm(x, 2).flatten(), torch.tensor(2 * group, device=device), rtol=1e-6, atol=0)
    weight, bias = torch.tensor([1.0, 2, 3, 4], device=device), torch.tensor([0.0, 0, 1, 1], device=device)
    expected = torch.tensor(group, device=device).repeat(2) * weight.repeat_interleave(2) + bias.repeat_interleave(2)
    torch.testing.assert_close(dk.group_norm(x, 2, weight, bias).flatten(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last, torch.channels_last_3d], ids=str)
def test_is_torchs(order: torch.memory_format, dtypes: Any, backend: str, device: torch.device) -> None:
    """Same positions and defaults, and the dtype, shape and layout of output and gradient."""
    torch.manual_seed(0)
    shape = (2, 6, 3, 4, 5) if order == torch.channels_last_3d else (2, 6, 3, 4)
    t = draw(shape, SETS["affine"], dtypes, device, lambda x: x.contiguous(memory_format=order))
    args = (3, t["weight"], t["bias"], 1e-3)
    for given in ((1,), args[:2], args[:3], args):
        a, b = (t["input"].clone().requires_grad_() for _ in range(2))
        ours, torchs = dk.group_norm(a, *given), F.group_norm(b, *given)
        exact = F.group_norm(a.detach().double(), *[g.double() if isinstance(g, Tensor) else g for g in given])
        assert ours.dtype == torchs.dtype and ours.shape == torchs.shape and ours.stride() == torchs.stride()
        if dtypes[0] != torch.float64:
            assert_within_budget(ours, exact, torchs)
        ours.backward(torch.ones_like(ours))
        torchs.backward(torch.ones_like(torchs))
        assert a.grad.dtype == b.grad.dtype and a.grad.stride() == b.grad.stride()


@pytest.mark.needs("hypothesis")
def test_random_shapes_and_options(device: torch.device) -> None:
    from hypothesis import given
    from hypothesis import strategies as st

    positions = st.lists(st.integers(1, 9), max_size=3)

    @given(
        st.integers(1, 3), st.integers(1, 7), st.integers(1, 9), positions, st.sets(st.sampled_from(ALL)),
        st.sampled_from(sorted(ACTIVATIONS, key=str)), st.sampled_from([d.values[0] for d in DTYPES]),
        st.sampled_from([1e-5, 1e-3]), st.booleans(), st.integers(0, 9),
    )  # fmt: skip
    def holds(
        n: int, groups: int, per: int, s: list[int], present: set[str], activation: Any, dtypes: Any, eps: float,
        last: bool, seed: int,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        shape = (n, groups * per, *s)
        if per * torch.Size(s).numel() < 4:
            shape, eps = (n, groups * per, 2, *s), 0.5
        check_layer(
            dk.group_norm, shape, groups, seeds=enough(shape[1]), eps=eps, activation=activation,
            present=tuple(present), dtypes=dtypes, device=device,
            layout=channels_last if last else torch.Tensor.contiguous,
        )  # fmt: skip

    holds()


# Layouts and memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 6, 7), (3, 6, 4, 5), (2, 6, 3, 2, 4)], ids=str)
def test_layouts(shape: tuple[int, ...], backend: str, device: torch.device) -> None:
    """Input, residual and upstream gradient of any layout, also of three different ones."""
    t = draw(shape, device=device)
    g = normal(*shape).to(device)
    names = [name for name, _ in layouts(t["input"])]
    for shift, name in enumerate(names):
        other, third = names[(shift + 1) % len(names)], names[(shift + 2) % len(names)]
        for residual, cotangent in ((name, name), (other, third)):
            laid = {**t, "input": dict(layouts(t["input"]))[name], "residual": dict(layouts(t["residual"]))[residual]}
            check(
                lambda input, **more: dk.group_norm(input, 2, activation="silu", **more),
                lambda input, **more: plain(input, 2, activation="silu", **more),
                [laid],
                cotangent=dict(layouts(g))[cotangent],
            )
    expanded = torch.full((), 0.7, device=device).expand(shape)  # what y.sum().backward() brings
    check(lambda input, **more: dk.group_norm(input, 2, **more), lambda input, **more: plain(input, 2, **more),
          [t], cotangent=expanded)  # fmt: skip


SLICED: dict[str, Callable[[Tensor], Tensor]] = {
    "window": lambda x: F.pad(x, (1, 2, 3, 1))[:, :, 3:-1, 1:-2],
    "channels": lambda x: torch.cat([x, x], 1)[:, 6:],
    "channels_of_channels_last": lambda x: channels_last(torch.cat([x, x], 1))[:, 6:],
    "window_of_channels_last": lambda x: channels_last(F.pad(x, (1, 2)))[..., 1:-2],
    "every_other_channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "every_other_sample": lambda x: x.repeat_interleave(2, 0)[::2],
    "flipped_in_memory": lambda x: x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
    "expanded": lambda x: x[:, :, :1].expand(x.shape),
}


@pytest.mark.parametrize("name", SLICED)
def test_slices(name: str, backend: str, device: torch.device) -> None:
    """Parts of larger tensors, and tensors whose elements share memory."""
    t = draw((3, 6, 5, 4), device=device)
    t["input"], t["residual"] = SLICED[name](t["input"]), SLICED[name](t["residual"])
    check(
        lambda input, **more: dk.group_norm(input, 2, activation="silu", **more),
        lambda input, **more: plain(input, 2, activation="silu", **more),
        [t],
    )


def test_strided_parameters(backend: str, device: torch.device) -> None:
    """Slices, chunks of one tensor, expanded vectors: scale and shift come out of one Linear."""
    t = draw((3, 6, 4, 4), device=device)
    both = torch.cat([t["scale"], t["shift"]], 1)
    wide = torch.stack([t["weight"], t["bias"]], 1)
    odd = {
        **t,
        "input": torch.stack([t["input"], t["residual"]], -1)[..., 0],
        "weight": wide[:, 0],
        "bias": torch.full((1,), 0.3, device=device).expand(6),
        "scale": both[:, :6],
        "shift": both[:1, 6:].expand(3, 6),
    }
    check(
        lambda input, **more: dk.group_norm(input, 3, activation="gelu", **more),
        lambda input, **more: plain(input, 3, activation="gelu", **more),
        [odd],
    )


DENSE: dict[str, Callable[[torch.device], Tensor]] = {
    "contiguous": lambda device: normal(2, 8, 48, 48).to(device),
    "channels_last": lambda device: channels_last(normal(2, 8, 48, 48)).to(device),
    "channels_last_3d": lambda device: channels_last(normal(2, 8, 12, 12, 16)).to(device),
    "tokens": lambda device: normal(2, 2304, 8).to(device).mT,
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("activation", [None, "silu"])
def test_nothing_is_copied(name: str, activation: str | None, fused: str, device: torch.device) -> None:
    """Dense layouts: no copying operator; allocated is the output, then dx (and dresidual), and little beside."""
    x = DENSE[name](device).requires_grad_()
    weight, bias = (normal(8).to(device).requires_grad_() for _ in range(2))
    residual = torch.randn_like(x).requires_grad_()
    y = dk.group_norm(x, 4, weight, bias, activation=activation, residual=residual)
    g = torch.randn_like(y)
    assert same_layout(y, x.stride())
    for call, tensors in (
        (lambda: dk.group_norm(x, 4, weight, bias, activation=activation, residual=residual), 1),
        (lambda: torch.autograd.grad(y, (x, weight, bias, residual), g, retain_graph=True), 2 if activation else 1),
    ):
        copies, allocated = work(call)
        assert not copies, copies
        assert device.type != "cpu" or tensors <= allocated / x.nbytes <= tensors + 0.2, f"{allocated} bytes"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_output_may_be_changed_in_place(activation: str | None, fused: str, device: torch.device) -> None:
    """y += shortcut and ReLU(inplace=True) behind the layer, before the backward pass."""
    t = draw((2, 6, 5, 3), device=device)
    shortcut = normal(2, 6, 5, 3).to(device)

    def behind(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def layer(input: Tensor, **more: Any) -> Tensor:
            y = norm(input, 3, activation=activation, **more)
            y += shortcut.to(y.dtype)
            return F.relu(y, inplace=True) * 1.5

        return layer

    check(behind(dk.group_norm), behind(lambda x, *a, **k: plain(x, *a, **k).clone()), [t])


def test_what_is_kept(fused: str, device: torch.device) -> None:
    """Input, mean, rstd, parameters; the residual with an activation only; never the output."""
    t = draw((2, 6, 16, 16), device=device)
    x = t["input"].requires_grad_()
    for name in ALL:
        t[name].requires_grad_()
    for activation in (None, "relu", "silu"):
        for present in (("weight", "bias"), ALL):
            more = {name: t[name] for name in present}
            made: list[Tensor] = []
            kept = saved(lambda: made.append(dk.group_norm(x, 3, activation=activation, **more)))  # noqa: B023
            large = [k.data_ptr() for k in kept if k.numel() >= x.numel()]
            allowed = [x.data_ptr()] + ([t["residual"].data_ptr()] if activation and "residual" in present else [])
            assert sorted(large) == sorted(allowed), f"{len(large)} large tensors are kept, expected {len(allowed)}"
            assert made[0].data_ptr() not in {k.data_ptr() for k in kept}
            assert sum(k.numel() for k in kept if k.numel() < x.numel()) <= 2 * 2 * 3 + 2 * 6 + 2 * 12


def test_only_what_is_asked_for(backend: str, device: torch.device) -> None:
    """Frozen input or frozen parameters: the other gradients are the same, to the bit."""
    t = draw((3, 6, 5, 3), device=device)
    g = normal(3, 6, 5, 3).to(device)

    def gradients(*wanted: str) -> dict[str, Tensor]:
        leaves = {k: v.detach().requires_grad_(k in wanted) for k, v in t.items()}
        y = dk.group_norm(num_groups=2, activation="gelu_tanh", **leaves)
        return dict(zip(wanted, torch.autograd.grad(y, [leaves[k] for k in wanted], g), strict=True))

    everything = gradients(*t)
    for name in t:
        assert_bitwise(gradients(name)[name], everything[name], f"gradient of {name} alone")
    with torch.no_grad():
        assert not dk.group_norm(num_groups=2, **t).requires_grad


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_large_mean(last: bool, backend: str, device: torch.device) -> None:
    """mean = 10^4 std: an error of eps mean / std, that of rounding the mean; E[x^2] - E[x]^2 would leave no digit."""
    check_large_mean(dk.group_norm, device, channels_last if last else torch.Tensor.contiguous)


def check_large_mean(layer: Callable[..., Tensor], device: torch.device, layout: Callable[[Tensor], Tensor]) -> None:
    t = draw((3, 8, 16, 17), ("weight", "bias"), device=device)
    t["input"] = layout(t["input"] + 1e4)
    g = normal(3, 8, 16, 17).to(device)
    exact, eager = (
        results(lambda input, **more: plain(input, 2, **more), each(t, lambda v: v.to(dtype)), g)  # noqa: B023
        for dtype in (torch.float64, torch.float32)
    )
    for name, value in results(lambda input, **more: layer(input, 2, **more), t, g).items():
        error, theirs = relative_error(value, exact[name]), relative_error(eager[name], exact[name])
        assert error <= 2 * theirs + 1e4 * torch.finfo(torch.float32).eps, f"{name}: relative error {error:.3g}"


def test_one_value_per_group(backend: str, device: torch.device) -> None:
    """y = bias and dx = 0 but for the rounding of dy / sqrt(eps), as long as there is more than one sample."""
    for shape in ((3, 6), (2, 6, 1, 1), (2, 6, 1)):
        t = draw(shape, ("weight", "bias"), device=device)
        g = normal(*shape).to(device)
        found = results(lambda input, **more: dk.group_norm(input, 6, **more), t, g)
        torch.testing.assert_close(found["output"].flatten(1), t["bias"].expand(shape[:2]), rtol=0, atol=0)
        assert (found["gradient of weight"] == 0).all()
        rounding = 2 * torch.finfo(torch.float32).eps * (g.flatten(1) * t["weight"]).abs() / 1e-5**0.5
        assert (found["gradient of input"].flatten(1).abs() <= rounding).all()


def test_constant_groups(backend: str, device: torch.device) -> None:
    """Variance 0: rstd = 1 / sqrt(eps), y = bias, finite gradients."""
    for value in (0.0, 3.0, -1024.0, 0.1):
        for shape in ((2, 6, 40), (2, 6, 7, 9), (2, 6)):
            x = torch.full(shape, value, device=device).requires_grad_()
            weight, bias = (normal(6).to(device).requires_grad_() for _ in range(2))
            y = dk.group_norm(x, 3, weight, bias)
            expected = bias.detach().view(1, 6, *[1] * (len(shape) - 2)).expand(shape)
            torch.testing.assert_close(y.detach(), expected, rtol=1e-6, atol=1e-4 if value == 0.1 else 1e-6)
            g = normal(*shape).to(device)
            found = torch.autograd.grad(y, (x, weight, bias), g)
            a = x.detach().double().requires_grad_()
            exact = torch.autograd.grad(F.group_norm(a, 3, weight.double(), bias.double()), a, g.double())[0]
            assert all(f.isfinite().all() for f in found)
            torch.testing.assert_close(found[0].double(), exact, rtol=1e-4, atol=1e-3)  # of the order of 1 / sqrt(eps)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_nothing_leaks_out_of_a_group(bad: float, last: bool, backend: str, device: torch.device) -> None:
    """NaN and infinities make their own group NaN; every other group has the bits that it had."""
    layout = channels_last if last else torch.Tensor.contiguous
    t = draw((3, 6, 7, 5), device=device, layout=layout)
    spoilt = {**t, "input": t["input"].clone()}
    spoilt["input"][1, 2, 4, 3] = bad
    g = normal(3, 6, 7, 5).to(device)
    clean, dirty = (results(lambda input, **more: dk.group_norm(input, 3, activation="silu", **more), each, g)
                    for each in (t, spoilt))  # fmt: skip
    group = torch.zeros(3, 6, dtype=torch.bool, device=device)
    group[1, 2:4] = True
    for name in ("output", "gradient of input", "gradient of residual", "gradient of scale", "gradient of shift"):
        assert_bitwise(dirty[name][~group], clean[name][~group], name)
    for name in ("output", "gradient of input"):
        assert dirty[name][group].isnan().all(), name
    for name in ("gradient of weight", "gradient of bias"):
        assert_bitwise(dirty[name][[0, 1, 4, 5]], clean[name][[0, 1, 4, 5]], name)
        assert dirty[name][2:4].isnan().all(), name


@pytest.mark.parametrize("shape", [(5, 24, 9, 11), (3, 6, 130, 131), (64, 32, 4)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_sums_do_not_depend_on_threads(shape: Any, last: bool, fused: str, device: torch.device) -> None:
    """All results are bitwise equal between runs and for one to four threads."""
    layout = channels_last if last else torch.Tensor.contiguous
    t = draw(shape, device=device, layout=layout)
    g = normal(*shape).to(device)
    runs = []
    for threads in (1, 1, 2, 3, 4):
        with num_threads(threads):
            runs.append(results(lambda input, **more: dk.group_norm(input, 3 if shape[1] != 32 else 4, **more), t, g))
    for run in runs[1:]:
        for name, value in run.items():
            assert_bitwise(value, runs[0][name], name)


@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 4), (0, 6, 3, 5), (0, 6, 2, 3, 2)], ids=str)
def test_empty_batch(shape: tuple[int, ...], backend: str, device: torch.device) -> None:
    """An empty output of the right kind, and zero gradients of the parameters."""
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        t = draw(shape, dtypes=dtypes, device=device)
        for present in (SETS["affine"], ALL):
            given = {k: v for k, v in t.items() if k == "input" or k in present}
            found = results(lambda input, **more: dk.group_norm(input, 3, activation="relu", **more), given,
                            normal(*shape).to(device))  # fmt: skip
            assert found["output"].shape == shape and found["output"].dtype == dtypes[0]
            for name in ("weight", "bias"):
                gradient = found[f"gradient of {name}"]
                assert gradient.shape == (6,) and gradient.dtype == dtypes[1] and (gradient == 0).all()


# Errors ---------------------------------------------------------------------------------------------------------------

X, W = torch.arange(48.0).view(2, 6, 4), torch.ones(6)
NC = torch.ones(2, 6)
GN = dk.group_norm

REJECTED: dict[str, tuple[type[Exception], Callable[[], Any], tuple[str, ...]]] = {
    "groups": (ValueError, lambda: GN(X, 4), ("`num_groups`", "6", "4")),
    "groups_zero": (ValueError, lambda: GN(X, 0), ("`num_groups`", "6", "0")),
    "groups_negative": (ValueError, lambda: GN(X, -3), ("`num_groups`", "-3")),
    "groups_many": (ValueError, lambda: GN(X, 12), ("`num_groups`", "12")),
    "groups_float": (TypeError, lambda: GN(X, 3.0), ("`num_groups`", "int", "float")),
    "one_value": (ValueError, lambda: GN(X[:1, :, :1], 6), ("more than 1 value per channel", "(1, 6, 1)")),
    "one_value_of_two_dimensions": (ValueError, lambda: GN(NC[:1], 6), ("more than 1 value", "(1, 6)")),
    "no_positions": (ValueError, lambda: GN(X[:, :, :0], 3), ("`input`", "position", "(2, 6, 0)")),
    "no_channels": (ValueError, lambda: GN(X[:, :0], 1), ("`num_groups`", "0")),
    "one_dimension": (ValueError, lambda: GN(W, 3), ("`input`", "(N, C, d1, ...)", "(6,)")),
    "list": (TypeError, lambda: GN([1.0], 1), ("`input`", "Tensor", "list")),
    "integer": (TypeError, lambda: GN(X.int(), 3), ("`input`", "float32", "int32")),
    "complex": (TypeError, lambda: GN(X.cfloat(), 3), ("`input`", "complex64")),
    "sparse": (TypeError, lambda: GN(X.to_sparse(), 3), ("`input`", "strided", "sparse")),
    "weight_shape": (ValueError, lambda: GN(X, 3, W[:5]), ("`weight`", "(C,) = (6,)", "(5,)")),
    "weight_column": (ValueError, lambda: GN(X, 3, W[:, None]), ("`weight`", "(6,)", "(6, 1)")),
    "weight_number": (TypeError, lambda: GN(X, 3, 1.0), ("`weight`", "Tensor", "float")),
    "weight_integer": (TypeError, lambda: GN(X, 3, W.int()), ("`weight`", "float32", "int32")),
    "weight_half": (TypeError, lambda: GN(X, 3, W.bfloat16()), ("`weight`", "float32", "bfloat16")),
    "weight_double": (TypeError, lambda: GN(X, 3, W.double()), ("`weight`", "float32", "float64")),
    "weight_other_half": (TypeError, lambda: GN(X.half(), 3, W.bfloat16()), ("`weight`", "float16", "bfloat16")),
    "weight_device": (ValueError, lambda: GN(X, 3, W.to("meta")), ("`weight`", "device", "cpu", "meta")),
    "bias_shape": (ValueError, lambda: GN(X, 3, None, W[:1]), ("`bias`", "(C,) = (6,)", "(1,)")),
    "bias_half": (TypeError, lambda: GN(X, 3, W, W.half()), ("`bias`", "float32", "float16")),
    "eps_text": (TypeError, lambda: GN(X, 3, eps="small"), ("`eps`", "number", "str")),
    "eps_none": (TypeError, lambda: GN(X, 3, eps=None), ("`eps`", "number", "NoneType")),
    "activation": (ValueError, lambda: GN(X, 3, activation="tanh"), ("`activation`", "'silu'", "'tanh'")),
    "activation_function": (ValueError, lambda: GN(X, 3, activation=F.relu), ("`activation`", "'relu'")),
    "residual_shape": (ValueError, lambda: GN(X, 3, residual=X[:1]), ("`residual`", "(2, 6, 4)", "(1, 6, 4)")),
    "residual_dtype": (TypeError, lambda: GN(X.half(), 3, residual=X), ("`residual`", "float16", "float32")),
    "residual_number": (TypeError, lambda: GN(X, 3, residual=1.0), ("`residual`", "Tensor", "float")),
    "scale_shape": (ValueError, lambda: GN(X, 3, scale=W), ("`scale`", "(N, C) = (2, 6)", "(6,)")),
    "scale_column": (ValueError, lambda: GN(X, 3, scale=NC[..., None]), ("`scale`", "(2, 6)", "(2, 6, 1)")),
    "shift_shape": (ValueError, lambda: GN(X, 3, shift=NC[:1]), ("`shift`", "(2, 6)", "(1, 6)")),
    "shift_dtype": (TypeError, lambda: GN(X, 3, shift=NC.half()), ("`shift`", "float32", "float16")),
    "module_activation": (ValueError, lambda: dk.nn.GroupNorm(3, 6, activation="x"), ("`activation`", "'x'")),
}

# Calls that torch refuses for the same reason, and the word in its message.
AS_TORCH: dict[str, tuple[tuple[Any, ...], str]] = {
    "groups": ((X, 4), "num_groups"),
    "one_value": ((X[:1, :, :1], 6), "more than 1 value"),
    "one_value_of_two_dimensions": ((NC[:1], 6), "more than 1 value"),
    "weight_shape": ((X, 3, W[:5]), "weight"),
    "weight_column": ((X, 3, W[:, None]), "weight"),
    "weight_half": ((X, 3, W.bfloat16()), ""),
    "bias_shape": ((X, 3, None, W[:1]), "bias"),
    "one_dimension": ((W, 3), ""),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name: str) -> None:
    """The right exception, in one line that names the argument; no tensor is touched."""
    with unmodified(X, W, NC):
        rejects(*REJECTED[name])


@pytest.mark.parametrize("name", AS_TORCH)
def test_rejects_what_torch_rejects(name: str) -> None:
    args, word = AS_TORCH[name]
    for function in (F.group_norm, dk.group_norm):
        with pytest.raises((ValueError, RuntimeError, TypeError), match=word or None):
            function(*args)


# The module -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"bias": False}, {"affine": False}, {"eps": 0.1}], ids=str)
def test_module_is_torchs(how: dict[str, Any], backend: str, device: torch.device) -> None:
    """Same arguments, parameters, state_dict in both directions, and numbers."""
    theirs, ours = (random_(cls(3, 6, **how)).to(device) for cls in (nn.GroupNorm, dk.nn.GroupNorm))
    assert isinstance(ours, nn.GroupNorm) and ours.state_dict().keys() == theirs.state_dict().keys()
    assert (ours.eps, ours.affine, ours.num_groups) == (theirs.eps, theirs.affine, theirs.num_groups)
    assert how != {"bias": False} or (ours.bias is None and ours.weight is not None)
    x = normal(2, 6, 5, 4).to(device)
    for a, b in ((theirs, ours), (ours, random_(theirs))):
        b.load_state_dict(a.state_dict(), strict=True)
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert repr(ours) == repr(theirs)
    fresh = dk.nn.GroupNorm(3, 6, **how)
    assert all((p == (1 if name == "weight" else 0)).all() for name, p in fresh.named_parameters())
    assert dk.nn.GroupNorm(3, 6, dtype=torch.bfloat16, device="meta").weight.dtype == torch.bfloat16


def test_module_forward(backend: str, device: torch.device) -> None:
    """forward(input, residual, scale, shift) is the function with the module's parameters and activation."""
    layer = random_(dk.nn.GroupNorm(2, 6, 1e-3, activation="gelu")).to(device)
    t = draw((2, 6, 5, 3), device=device)
    t.update(layer.named_parameters())
    order = ("residual", "scale", "shift")
    for names in (order, ("shift",), ()):
        given = {k: v for k, v in t.items() if k in names or k not in order}
        exact = plain(**each(given, lambda v: v.double()), groups=2, eps=1e-3, activation="gelu")
        assert_within_budget(layer(t["input"], **{k: t[k] for k in names}), exact)
        if names == order:
            assert_within_budget(layer(t["input"], *[t[k] for k in order]), exact)
    assert "gelu" in repr(layer) and "2, 6" in repr(layer)
    assert "activation" not in repr(dk.nn.GroupNorm(2, 6))


# Negative controls: the comparison above can fail ---------------------------------------------------------------------


def composed(
    input: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *, activation: Any = None,
    residual: Any = None, scale: Any = None, shift: Any = None, flaw: str = "",
) -> Tensor:  # fmt: skip
    """The formula by hand, with one detail wrong: a detached factor is a gradient that lacks its term."""
    n, c = input.shape[:2]
    ones = (1,) * (input.dim() - 2)
    single = input if input.dtype == torch.float64 else input.float()
    x = single.reshape(n, groups, -1)
    mean = x.mean(2, keepdim=True)
    variance = x.var(2, correction=int(flaw == "unbiased"), keepdim=True)
    if flaw == "around_zero":
        variance = x.square().mean(2, keepdim=True)
    elif flaw == "difference_of_squares":
        variance = (x.square().mean(2, keepdim=True) - mean.square()).clamp(min=0)
    rstd = torch.rsqrt(variance + (10 * eps if flaw == "eps" else eps))
    if flaw == "eps_outside":
        rstd = 1 / (variance.sqrt() + eps)
    mean = mean.detach() if flaw in ("no_mean_of_q", "no_mean_terms") else mean
    rstd = rstd.detach() if flaw in ("no_mean_of_q_x_hat", "no_mean_terms") else rstd
    y = ((x - mean) * rstd).reshape(input.shape)

    def first_sample_only(t: Tensor) -> Tensor:
        return torch.cat([t.expand(1, c), t.detach().expand(n - 1, c)])

    if weight is not None:
        w = weight.expand(n, c)
        w = {"weight": torch.ones_like(w) + 0 * w, "weight_shifted": w.roll(1, 1), "dweight": first_sample_only(weight),
             "weight_rounded": w.bfloat16()}.get(flaw, w)  # fmt: skip
        y = y * w.to(y.dtype).view(n, c, *ones)
    if bias is not None:
        b = bias.expand(n, c)
        b = {"bias": 0 * b, "bias_squared": b * b, "dbias": first_sample_only(bias)}.get(flaw, b)
        y = y + b.to(y.dtype).view(n, c, *ones)
    if shift is not None and flaw == "shift_first":
        y = y + shift.view(n, c, *ones)
    if scale is not None:
        y = y * (
            (flaw != "no_one_plus") + (scale.roll(1, 0) if flaw == "scale_of_another" else scale).view(n, c, *ones)
        )
    if shift is not None and flaw != "shift_first":
        y = y + shift.view(n, c, *ones)
    if residual is not None and flaw != "residual_last":
        y = y + (residual.detach() + 0 * residual if flaw == "dresidual" else residual)
    slope = 0.011 if flaw == "slope" else 0.01
    y = F.leaky_relu(y, slope) if activation == "leaky_relu" else ACTIVATIONS[
        {"tanh_for_erf": "gelu_tanh", "no_activation": None}.get(flaw, activation)](y)  # fmt: skip
    if residual is not None and flaw == "residual_last":
        y = y + residual
    if flaw == "last_element":
        y = y * torch.ones_like(y).index_put_(tuple(torch.tensor([k - 1]) for k in y.shape), torch.zeros(()))
    return y.to(input.dtype)


# The flaw -> what the comparison has to complain about, and the options under which it shows.
FLAWS: dict[str, tuple[str, dict[str, Any]]] = {
    "weight": ("output", {}),
    "weight_shifted": ("output", {}),
    "bias": ("output", {}),
    "bias_squared": ("output", {}),
    "eps": ("output", {}),
    "eps_outside": ("output", {}),
    "unbiased": ("output", {}),
    "around_zero": ("output", {}),
    "no_one_plus": ("output", {}),
    "shift_first": ("output", {}),
    "scale_of_another": ("output", {}),
    "residual_last": ("output", {"activation": "relu"}),
    "no_activation": ("output", {"activation": "silu"}),
    "slope": ("output", {"activation": "leaky_relu"}),
    "tanh_for_erf": ("output", {"activation": "gelu"}),
    "last_element": ("output", {}),
    "no_mean_of_q": ("gradient of input", {}),
    "no_mean_of_q_x_hat": ("gradient of input", {}),
    "no_mean_terms": ("gradient of input", {}),
    "dweight": ("gradient of weight", {}),
    "dbias": ("gradient of bias", {}),
    "dresidual": ("gradient of residual", {}),
    "weight_rounded": ("gradient of weight", {"dtypes": (torch.bfloat16, torch.float32)}),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_negative_control(flaw: str) -> None:
    """The formula passes `check_layer`, and with this one flaw in it does not."""
    complaint, options = FLAWS[flaw]
    with dk.backend("reference"):
        check_layer(dk.group_norm, (3, 6, 5, 3), 2, **options)
        check_layer(composed, (3, 6, 5, 3), 2, **options)
    with dk.backend("reference"), pytest.raises(AssertionError, match=complaint):
        check_layer(lambda *a, **k: composed(*a, **k, flaw=flaw), (3, 6, 5, 3), 2, **options)


def test_negative_control_of_the_layout() -> None:
    """torch's own keeps channels_last; a contiguous output or gradient is noticed."""
    how: dict[str, Any] = {"present": SETS["affine"], "layout": channels_last}
    check_layer(plain, (2, 6, 5, 3), 2, **how)
    with pytest.raises(AssertionError, match="output: strides"):
        check_layer(lambda *a, **k: plain(*a, **k).contiguous(), (2, 6, 5, 3), 2, **how)
    with pytest.raises(AssertionError, match="gradient of input: strides"):
        check_layer(lambda x, *a, **k: channels_last(plain(x.contiguous(), *a, **k)), (2, 6, 5, 3), 2, **how)
    x = normal(2, 6, 5, 3)
    assert_layout(channels_last(x), x.transpose(2, 3), "output")
    with pytest.raises(AssertionError, match="not dense"):
        assert_layout(x[:, ::2], x.transpose(2, 3), "output")


def test_negative_control_of_the_large_mean() -> None:
    cpu = torch.device("cpu")
    check_large_mean(composed, cpu, torch.Tensor.contiguous)
    with pytest.raises(AssertionError, match="output"):
        check_large_mean(lambda *a, **k: composed(*a, **k, flaw="difference_of_squares"), cpu, torch.Tensor.contiguous)


def test_negative_controls_of_memory() -> None:
    """A layer that keeps its output, or copies its input, is noticed."""
    x = normal(2, 8, 48, 48).requires_grad_()
    made: list[Tensor] = []
    kept = saved(lambda: made.append(F.relu(F.group_norm(x, 4))))
    assert made[0].data_ptr() in {k.data_ptr() for k in kept}
    copies, allocated = work(lambda: F.relu(F.group_norm(channels_last(x.detach()).contiguous(), 4)))
    assert "aten::copy_" in copies and allocated > 2.9 * x.nbytes
    y = F.relu(F.group_norm(x, 4))
    y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
