"""Squeeze-and-excitation: values, gradients, layouts, edges, errors, and the modules of other libraries.

Compared with the modules that people write of torch's pooling, convolutions and products, in float64 and in the dtype
under test.
"""

from __future__ import annotations

import copy
import itertools
import math
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

backend = backend_fixture("squeeze_excite")
small = backend_fixture("squeeze_excite", interpreted=True)
fused = backend_fixture("squeeze_excite", plain=False)

HIDDEN = ("relu", "silu", "gelu", "leaky_relu")
GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": lambda z: F.relu6(z + 3) / 6,  # in float64 the gradient of F.hardsigmoid is a float32 one sixth
    "relu": F.relu,
}
WEIGHTS = ("w1", "b1", "w2", "b2")

# Sizes (N, C, R, positions): one of everything, no multiples of a vector, weights larger than x and the reverse.
SIZES = [
    (2, 1, 1, (5,)),
    (3, 6, 1, (4, 5)),
    (1, 17, 5, (3, 3)),
    (2, 33, 9, (1,)),
    (2, 16, 4, ()),
    (4, 96, 48, (1, 1)),
    (2, 96, 48, (2, 2)),
    (2, 4, 2, (57, 73)),
    (5, 8, 19, (7,)),
    (2, 12, 3, (2, 3, 4)),
    (1, 6, 2, (2, 1, 3, 2)),
    (2, 6, 2, (20_011,)),
]


def plain(
    x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str = "relu",
    gate: str = "sigmoid", residual: Tensor | None = None, residual_activation: str | None = None,
    layout: str = "channels_first",
) -> Tensor:  # fmt: skip
    """Mean over the positions, two layers, gate, product, sum, activation."""
    channel = 1 if layout == "channels_first" else x.dim() - 1
    positions = [d for d in range(1, x.dim()) if d != channel]
    z = x.mean(positions, keepdim=True) if positions else x
    z = z.flatten(1).to(w2.dtype)
    if w1 is not None:
        z = ACTIVATIONS[activation](F.linear(z, w1.flatten(1), b1))
    e = GATES[gate](F.linear(z, w2.flatten(1), b2))
    y = x * e.view([n if d in (0, channel) else 1 for d, n in enumerate(x.shape)])
    if residual is not None:
        y = ACTIVATIONS[residual_activation](y + residual)
    return y.to(x.dtype)


def draw(
    shape: tuple[int, ...],
    hidden: int | None,
    present: tuple[str, ...] = ("b1", "b2"),
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    device: torch.device | str = "cpu",
    memory: Callable[[Tensor], Tensor] = lambda x: x,
    ones: int = 0,
    channel: int = 1,
) -> Tensors:
    """The tensors by name: x with a mean in every channel, weights that keep the gate off its limits.

    Args:
        shape: of x, the channels in dimension `channel`.
        hidden: R, or None for one layer.
        present: which of b1, b2 and residual there are.
        dtypes: of x and residual, and of the weights.
        device: of all.
        memory: lays x and residual out.
        ones: trailing dimensions of the weights, as a convolution has them.
        channel: see shape.
    """
    c, (dtype, parameters) = shape[channel], dtypes
    per_channel = [n if d in (0, channel % len(shape)) else 1 for d, n in enumerate(shape)]
    x = normal(*shape) + normal(*per_channel)

    def layer(out: int, inputs: int) -> Tensor:
        weight = normal(out, inputs, std=1.2 / math.sqrt(inputs), dtype=parameters)
        return weight.view(out, inputs, *[1] * ones).to(device)

    return {
        "x": memory(x.to(dtype).to(device)),
        "w1": layer(hidden, c) if hidden else None,
        "b1": normal(hidden, mean=0.4, dtype=parameters).to(device) if hidden and "b1" in present else None,
        "w2": layer(c, hidden or c),
        "b2": normal(c, mean=0.2, dtype=parameters).to(device) if "b2" in present else None,
        "residual": memory(normal(*shape, dtype=dtype).to(device)) if "residual" in present else None,
    }


def check_layer(
    layer: Callable[..., Tensor], shape: tuple[int, ...], hidden: int | None, *, options: dict[str, Any] | None = None,
    seeds: int = 3, **how: Any,
) -> None:  # fmt: skip
    """`check` of one squeeze_excite against the composition, over this many draws."""
    options = options or {}
    drawn = [draw(shape, hidden, channel=-1 if "layout" in options else 1, **how) for _ in range(seeds)]
    check(lambda **t: layer(**t, **options), lambda **t: plain(**t, **options), drawn)


# Values and gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", HIDDEN)
def test_every_activation_and_gate(activation: str, gate: str, dtypes: Any, backend: str, device: torch.device) -> None:
    for memory in (torch.Tensor.contiguous, channels_last):
        check_layer(
            dk.squeeze_excite, (3, 12, 5, 3), 5, options={"activation": activation, "gate": gate}, dtypes=dtypes,
            device=device, memory=memory,
        )  # fmt: skip


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("residual_activation", ACTIVATIONS)
def test_every_residual_activation(
    residual_activation: str | None, dtypes: Any, backend: str, device: torch.device
) -> None:
    for memory, hidden in itertools.product((torch.Tensor.contiguous, channels_last), (4, None)):
        check_layer(
            dk.squeeze_excite, (2, 6, 7, 5), hidden, options={"residual_activation": residual_activation},
            present=("b1", "b2", "residual"), dtypes=dtypes, device=device, memory=memory,
        )  # fmt: skip


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]])
@pytest.mark.parametrize(("n", "c", "r", "s"), SIZES, ids=str)
def test_every_size(
    n: int, c: int, r: int, s: tuple[int, ...], dtypes: Any, backend: str, device: torch.device
) -> None:
    """Two layers and one, channels first and last in memory and in the shape."""
    for hidden, memory in ((r, torch.Tensor.contiguous), (r, channels_last), (None, torch.Tensor.contiguous)):
        check_layer(
            dk.squeeze_excite, (n, c, *s), hidden, options={"activation": "silu"}, seeds=enough(2 * r), dtypes=dtypes,
            device=device, memory=memory,
        )  # fmt: skip
    check_layer(
        dk.squeeze_excite, (n, *s, c), r, options={"layout": "channels_last"}, seeds=enough(2 * r), dtypes=dtypes,
        device=device,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["channels_last", "tokens"])
@pytest.mark.parametrize("hidden", [3, None])
def test_channels_in_the_last_dimension(layout: str, hidden: int | None, backend: str, device: torch.device) -> None:
    """(N, d1, ..., C) and (B, N, C), with everything, of any memory layout; biases on their own."""
    for shape in [(4, 5, 6)] + ([(4, 6), (2, 5, 3, 6), (2, 2, 3, 2, 6)] if layout == "channels_last" else []):
        for memory in (torch.Tensor.contiguous, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)):
            for present in (("b1", "b2", "residual"), ("b2",), ("b1",), ()):
                options = {"layout": layout, "gate": "hard_sigmoid"}
                options |= {"residual_activation": "silu"} if "residual" in present else {}
                t = draw(shape, hidden, present, device=device, memory=memory, channel=-1)
                first = {**t, **each({k: t[k] for k in ("x", "residual")}, lambda v: v.movedim(-1, 1))}
                y = dk.squeeze_excite(**t, **options)
                assert_bitwise(y, dk.squeeze_excite(**first, **{**options, "layout": "channels_first"}).movedim(1, -1))
                compare(t, options)


def compare(t: Tensors, options: dict[str, Any]) -> None:
    """`check` without layouts, for shapes whose channels are not in dimension 1."""
    g = normal(*t["x"].shape).to(t["x"].device)
    actual = results(lambda **t: dk.squeeze_excite(**t, **options), t, g)
    exact = results(lambda **t: plain(**t, **options), each(t, lambda v: v.double()), g)
    for name, value in actual.items():
        assert_within_budget(value, exact[name], results(lambda **t: plain(**t, **options), t, g)[name], what=name)


@pytest.mark.parametrize("ones", [0, 1, 2, 3])
@pytest.mark.parametrize("present", [(), ("b1",), ("b2",), ("b1", "b2")], ids=str)
def test_kinds_of_weights(present: tuple[str, ...], ones: int, backend: str, device: torch.device) -> None:
    """Linear, and 1x1 convolutions of every rank, whatever the rank of x; biases on their own; the gradient's shape."""
    for hidden, dtypes in itertools.product((5, None), (DTYPES[0].values[0], DTYPES[4].values[0])):
        check_layer(dk.squeeze_excite, (3, 8, 6, 3), hidden, present=present, dtypes=dtypes, device=device, ones=ones)


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2], DTYPES[5]])
def test_every_remainder(dtypes: Any, fused: str, device: torch.device) -> None:
    """All numbers of channels, hidden units and positions up to a few vectors, so that every tail is met."""
    sizes = [(c, 3, 2) for c in range(1, 70)] + [(3, r, 2) for r in range(1, 70)] + [(2, 2, s) for s in range(1, 70)]
    for (c, r, s), memory in itertools.product(sizes, (torch.Tensor.contiguous, channels_last)):
        t = draw((2, c, s), r, dtypes=dtypes, device=device, memory=memory)
        g = normal(2, c, s, mean=1.5, dtype=dtypes[0]).to(device)
        actual = results(lambda **t: dk.squeeze_excite(**t, activation="gelu"), t, g)
        exact = results(lambda **t: plain(**t, activation="gelu"), each(t, lambda v: v.double()), g)
        for name, value in actual.items():  # one element that is lost or wrong is an error above 1 / sqrt(276)
            limit = 2 * torch.finfo(value.dtype).eps if value.dtype == torch.bfloat16 else 1e-4
            assert relative_error(value, exact[name]) < limit, f"{name} of C = {c}, R = {r}, S = {s}"


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_different_dtypes(half: torch.dtype, backend: str, device: torch.device) -> None:
    """Each of them may be float32 beside a half-precision x; its gradient is what it is."""
    for single in (*zip(WEIGHTS), ("w1", "b2"), ("b1", "w2")):
        t = draw((3, 8, 5, 3), 4, dtypes=(half, half), device=device)
        t |= {k: v.float() for k, v in t.items() if k in single}
        g = normal(3, 8, 5, 3, dtype=half).to(device)
        exact = results(plain, each(t, lambda v: v.double()), g)
        for name, value in results(dk.squeeze_excite, t, g).items():
            assert value.dtype == t[name.removeprefix("gradient of ") if name != "output" else "x"].dtype
            assert_within_budget(value, exact[name], what=name)


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]])
@pytest.mark.parametrize("hidden", [2, None])
def test_small(hidden: int | None, dtypes: Any, small: str, device: torch.device) -> None:
    """What the interpreter can do in reasonable time."""
    for memory in (torch.Tensor.contiguous, channels_last):
        check_layer(
            dk.squeeze_excite, (2, 6, 3, 3), hidden, options={"residual_activation": "silu"}, seeds=1, dtypes=dtypes,
            present=("b1", "b2", "residual"), device=device, memory=memory,
        )  # fmt: skip


def test_vector(small: str, device: torch.device) -> None:
    x = torch.tensor([[[1.0, 3], [2, 2]]], device=device)
    y = dk.squeeze_excite(
        x, torch.tensor([[1, -0.5]], device=device), None, torch.tensor([[1.0], [-1]], device=device), None
    )
    expected = torch.tensor([[[0.73105858, 2.19317574], [0.53788284, 0.53788284]]], device=device)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=0)


@pytest.mark.needs("hypothesis")
def test_random_shapes_and_options(device: torch.device) -> None:
    from hypothesis import given
    from hypothesis import strategies as st

    @given(
        st.integers(1, 4), st.integers(1, 40), st.one_of(st.none(), st.integers(1, 20)),
        st.lists(st.integers(1, 9), max_size=3), st.sets(st.sampled_from(["b1", "b2", "residual"])),
        st.sampled_from(HIDDEN), st.sampled_from(sorted(GATES)), st.sampled_from(["silu", "gelu", None]),
        st.sampled_from([d.values[0] for d in DTYPES]), st.booleans(), st.booleans(), st.integers(0, 9),
    )  # fmt: skip
    def holds(
        n: int, c: int, hidden: Any, s: list[int], present: set[str], activation: str, gate: str, after: Any,
        dtypes: Any, memory_last: bool, shape_last: bool, seed: int,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        options = {"activation": activation, "gate": gate}
        options |= {"residual_activation": after} if "residual" in present else {}
        options |= {"layout": "channels_last"} if shape_last else {}
        check_layer(
            dk.squeeze_excite, (n, *s, c) if shape_last else (n, c, *s), hidden, options=options,
            seeds=enough(hidden or c), present=tuple(present), dtypes=dtypes, device=device,
            memory=channels_last if memory_last and not shape_last else torch.Tensor.contiguous,
        )  # fmt: skip

    holds()


# Layouts and memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 6), (3, 6, 7), (3, 6, 4, 5), (2, 6, 3, 2, 4)], ids=str)
def test_layouts(shape: tuple[int, ...], backend: str, device: torch.device) -> None:
    """x, residual and upstream gradient of any layout, also of three different ones."""
    t = draw(shape, 4, ("b1", "b2", "residual"), device=device)
    g = normal(*shape).to(device)
    names = [name for name, _ in layouts(t["x"])]
    for shift, name in enumerate(names):
        other, third = names[(shift + 1) % len(names)], names[(shift + 2) % len(names)]
        for residual, cotangent in ((name, name), (other, third)):
            laid = {**t, "x": dict(layouts(t["x"]))[name], "residual": dict(layouts(t["residual"]))[residual]}
            for after in (None, "gelu"):
                check(
                    lambda **t: dk.squeeze_excite(**t, residual_activation=after),  # noqa: B023
                    lambda **t: plain(**t, residual_activation=after),  # noqa: B023
                    [laid],
                    cotangent=dict(layouts(g))[cotangent],
                )
    expanded = torch.full((), 0.7, device=device).expand(shape)  # what y.sum().backward() brings
    check(dk.squeeze_excite, plain, [t], cotangent=expanded)


TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "without_the_class_token": lambda x: torch.cat([x[:, :1], x], 1)[:, 1:],
    "part_of_qkv": lambda x: torch.cat([x, x, x], -1)[..., 6:12],
    "every_other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "channels_first_in_memory": lambda x: x.mT.contiguous().mT,
    "one_token_everywhere": lambda x: x[:, :1].expand(x.shape),
}


@pytest.mark.parametrize("name", TOKENS)
def test_slices(name: str, backend: str, device: torch.device) -> None:
    """Parts of larger tensors, and tensors whose elements share memory."""
    t = draw((3, 9, 6), 4, ("b1", "b2", "residual"), device=device, channel=-1)
    sliced = {**t, **each({k: t[k] for k in ("x", "residual")}, TOKENS[name])}
    compare(sliced, {"layout": "tokens", "residual_activation": "gelu"})


def test_strided_weights(backend: str, device: torch.device) -> None:
    """Transposed and sliced weights, expanded biases."""
    t = draw((3, 8, 4, 4), 5, device=device)
    wide = torch.stack([t["w2"], t["w2"]], -1)
    b2 = torch.full((1,), 0.3, device=device).expand(8)
    check(dk.squeeze_excite, plain, [{**t, "w1": t["w1"].mT.contiguous().mT, "w2": wide[..., 0], "b2": b2}])


DENSE: dict[str, tuple[Callable[[], Tensor], dict[str, Any]]] = {
    "contiguous": (lambda: normal(2, 8, 48, 48), {}),
    "channels_last": (lambda: channels_last(normal(2, 8, 48, 48)), {}),
    "channels_last_3d": (lambda: channels_last(normal(2, 8, 12, 12, 16)), {}),
    "last_dimension": (lambda: normal(2, 48, 48, 8), {"layout": "channels_last"}),
    "tokens": (lambda: normal(2, 2304, 8), {"layout": "tokens"}),
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("after", [None, "relu"])
def test_nothing_is_copied(name: str, after: str | None, fused: str, device: torch.device) -> None:
    """Dense layouts: no copying operator; allocated is the output, then dx (and dresidual), and little beside."""
    make, options = DENSE[name]
    x = make().to(device).requires_grad_()
    t = draw((2, 8, 3), 4, device=device)
    weights = [t[k].requires_grad_() for k in WEIGHTS]
    options = {**options, "residual": torch.randn_like(x).requires_grad_(), "residual_activation": after}
    y = dk.squeeze_excite(x, *weights, **options)
    g = torch.randn_like(y)
    assert same_layout(y, x.stride())
    for call, tensors in (
        (lambda: dk.squeeze_excite(x, *weights, **options), 1),
        (lambda: torch.autograd.grad(y, (x, *weights, options["residual"]), g, retain_graph=True), 1 + bool(after)),
    ):
        copies, allocated = work(call)
        assert not copies, copies
        assert device.type != "cpu" or tensors <= allocated / x.nbytes <= tensors + 0.2, f"{allocated} bytes"


@pytest.mark.parametrize("after", [False, None, "relu", "silu"], ids=str)
def test_the_output_may_be_changed_in_place(after: Any, fused: str, device: torch.device) -> None:
    """y += residual, as MONAI does, and ReLU(inplace=True) behind the layer, before the backward pass."""
    t = draw((2, 6, 5, 3), 4, ("b1", "b2") if after is False else ("b1", "b2", "residual"), device=device)
    shortcut = normal(2, 6, 5, 3).to(device)

    def behind(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def block(**t: Any) -> Tensor:
            y = layer(**t, residual_activation=after or None)
            y += shortcut.to(y.dtype)
            return F.relu(y, inplace=True) * 1.5

        return block

    check(behind(dk.squeeze_excite), behind(lambda **t: plain(**t).clone()), [t])


def test_what_is_kept(fused: str, device: torch.device) -> None:
    """x, what is small, and the residual with an activation only; never the output."""
    t = draw((2, 6, 16, 16), 4, ("b1", "b2", "residual"), device=device)
    for tensor in t.values():
        tensor.requires_grad_()
    for after in (None, "relu", "silu"):
        made: list[Tensor] = []
        kept = saved(lambda: made.append(dk.squeeze_excite(**t, residual_activation=after)))  # noqa: B023
        large = sorted(k.data_ptr() for k in kept if k.numel() >= t["x"].numel())
        assert large == sorted(t[k].data_ptr() for k in (("x", "residual") if after else ("x",)))
        assert made[0].data_ptr() not in {k.data_ptr() for k in kept}
        limit = 2 * 6 * 2 + 2 * 4 + sum(t[k].numel() for k in WEIGHTS)
        assert sum(k.numel() for k in kept if k.numel() < t["x"].numel()) <= limit


def test_only_what_is_asked_for(backend: str, device: torch.device) -> None:
    """Frozen input or frozen weights: the other gradients are the same, to the bit."""
    t = draw((3, 6, 5, 3), 4, ("b1", "b2", "residual"), device=device)
    g = normal(3, 6, 5, 3).to(device)

    def gradients(*wanted: str) -> dict[str, Tensor]:
        leaves = {k: v.detach().requires_grad_(k in wanted) for k, v in t.items()}
        y = dk.squeeze_excite(**leaves, residual_activation="gelu_tanh")
        return dict(zip(wanted, torch.autograd.grad(y, [leaves[k] for k in wanted], g), strict=True))

    everything = gradients(*t)
    for name in t:
        assert_bitwise(gradients(name)[name], everything[name], f"gradient of {name} alone")
    with torch.no_grad():
        assert not dk.squeeze_excite(**t).requires_grad


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_sums_beyond_float16(last: bool, backend: str, device: torch.device) -> None:
    """The sum over the positions overflows float16, the mean does not; in any order of the sum."""
    shape = (2, 6, 64, 64)
    t = draw(shape, 4, dtypes=(torch.float16, torch.float32), device=device)
    t["x"] = (1000 + 50 * normal(*shape)).half().to(device)
    t["x"] = channels_last(t["x"]) if last else t["x"]
    t["w1"], t["w2"] = t["w1"] / 1000, t["w2"] / 4
    y = dk.squeeze_excite(**t)
    assert y.isfinite().all()
    assert_within_budget(y, plain(**each(t, lambda v: v.double())))


def test_saturated_gates(backend: str, device: torch.device) -> None:
    """hard_sigmoid outside (-3, 3): exactly 0 and 1, and no gradient goes through; sigmoid far out: no NaN."""
    x = normal(2, 4, 5, 5).to(device)
    bias = torch.tensor([-40.0, -9, 9, 40], device=device)
    for w1, b1 in ((None, None), (torch.eye(4, device=device), torch.ones(4, device=device))):
        t = {"x": x, "w1": w1, "b1": b1, "w2": 0.1 * torch.eye(4, device=device), "b2": bias}
        found = results(lambda **t: dk.squeeze_excite(**t, gate="hard_sigmoid"), t, torch.ones_like(x))
        assert_bitwise(found["output"][:, 2:], x[:, 2:])
        assert (found["output"][:, :2] == 0).all()
        assert (found["gradient of x"][:, 2:] == 1).all() and (found["gradient of x"][:, :2] == 0).all()
        assert all((found[f"gradient of {k}"] == 0).all() for k in WEIGHTS if t[k] is not None)
        t["b2"] = 20 * bias
        assert all(v.isfinite().all() for v in results(dk.squeeze_excite, t, torch.ones_like(x)).values())
    for gate, z in (("hard_sigmoid", (-4.0, -2.9, 2.9, 4.0)), ("relu", (-1.0, -0.1, 0.1, 2.0))):
        t = {**t, "w1": None, "b1": None, "b2": torch.tensor(z, device=device)}
        check(lambda **t: dk.squeeze_excite(**t, gate=gate), lambda **t: plain(**t, gate=gate), [t])  # noqa: B023


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_nothing_leaks_out_of_a_sample(bad: float, last: bool, backend: str, device: torch.device) -> None:
    """NaN and infinities of one sample leave the bits of all others alone."""
    memory = channels_last if last else torch.Tensor.contiguous
    t = draw((4, 6, 7, 5), 3, ("b1", "b2", "residual"), device=device, memory=memory)
    spoilt = {**t, "x": t["x"].clone()}
    spoilt["x"][1, 2, 4, 3] = bad
    g = normal(4, 6, 7, 5).to(device)
    clean, dirty = (results(lambda **t: dk.squeeze_excite(**t, activation="silu"), given, g) for given in (t, spoilt))
    for name in ("output", "gradient of x", "gradient of residual"):
        assert_bitwise(dirty[name][[0, 2, 3]], clean[name][[0, 2, 3]], name)
    assert not dirty["output"][1, 2, 4, 3].isfinite()
    assert bad == INF or dirty["output"][1].isnan().all()


@pytest.mark.parametrize(("shape", "hidden"), [((9, 24, 9, 11), 7), ((3, 6, 130, 131), 2), ((64, 96), 48)], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_sums_do_not_depend_on_threads(shape: Any, hidden: int, last: bool, fused: str, device: torch.device) -> None:
    """All results are bitwise equal between runs and for one to four threads."""
    t = draw(shape, hidden, device=device, memory=channels_last if last else torch.Tensor.contiguous)
    g = normal(*shape).to(device)
    runs = []
    for threads in (1, 1, 2, 3, 4):
        with num_threads(threads):
            runs.append(results(dk.squeeze_excite, t, g))
    for run in runs[1:]:
        for name, value in run.items():
            assert_bitwise(value, runs[0][name], name)


@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 4), (0, 6, 3, 5)], ids=str)
@pytest.mark.parametrize("hidden", [2, None])
def test_empty_batch(shape: tuple[int, ...], hidden: int | None, backend: str, device: torch.device) -> None:
    """An empty output of the right kind, and zero gradients of the weights."""
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        t = draw(shape, hidden, ("b1", "b2", "residual"), dtypes=dtypes, device=device)
        found = results(lambda **t: dk.squeeze_excite(**t, residual_activation="relu"), t, normal(*shape).to(device))
        assert found["output"].shape == shape and found["output"].dtype == dtypes[0]
        for name in WEIGHTS:
            if t[name] is not None:
                gradient = found[f"gradient of {name}"]
                assert gradient.shape == t[name].shape and gradient.dtype == dtypes[1] and (gradient == 0).all()


# Errors ---------------------------------------------------------------------------------------------------------------

X = torch.arange(48.0).view(2, 6, 4)
W1, B1, W2, B2 = torch.ones(3, 6), torch.ones(3), torch.ones(6, 3), torch.ones(6)
SE = dk.squeeze_excite


def se(x: Any = X, w1: Any = W1, b1: Any = B1, w2: Any = W2, b2: Any = B2, **options: Any) -> Callable[[], Any]:
    return lambda: SE(x, w1, b1, w2, b2, **options)


REJECTED: dict[str, tuple[type[Exception], Callable[[], Any], tuple[str, ...]]] = {
    "list": (TypeError, se([1.0]), ("`x`", "Tensor", "list")),
    "integer": (TypeError, se(X.int()), ("`x`", "float32", "int32")),
    "sparse": (TypeError, se(X.to_sparse()), ("`x`", "strided", "sparse")),
    "one_dimension": (ValueError, se(B2), ("`x`", "(N, C, d1, ...)", "(6,)")),
    "one_dimension_last": (ValueError, se(B2, layout="channels_last"), ("`x`", "(N, d1, ..., C)", "(6,)")),
    "tokens_of_four_dimensions": (ValueError, se(X[None], layout="tokens"), ("`x`", "(B, N, C)", "(1, 2, 6, 4)")),
    "tokens_of_two_dimensions": (ValueError, se(X[0], layout="tokens"), ("`x`", "(B, N, C)", "(6, 4)")),
    "no_positions": (ValueError, se(X[..., :0]), ("`x`", "position", "(2, 6, 0)")),
    "no_tokens": (ValueError, se(X.mT[:, :0], layout="tokens"), ("`x`", "position", "(2, 0, 6)")),
    "no_channels": (ValueError, se(X[:, :0]), ("`x`", "channel", "(2, 0, 4)")),
    "w1_shape": (ValueError, se(w1=W1[:, :5]), ("`w1`", "(R, C) = (3, 6)", "(3, 5)")),
    "w1_vector": (ValueError, se(w1=B2), ("`w1`", "(out, in)", "(6,)")),
    "w1_kernel": (ValueError, se(w1=torch.ones(3, 6, 3)), ("`w1`", "(out, in, 1, ...)", "(3, 6, 3)")),
    "w1_empty": (ValueError, se(w1=W1[:0], b1=None, w2=W2[:, :0]), ("`w1`", "one row")),
    "w1_number": (TypeError, se(w1=1.0), ("`w1`", "Tensor", "float")),
    "w1_half": (TypeError, se(w1=W1.bfloat16()), ("`w1`", "float32", "bfloat16")),
    "w1_other_half": (TypeError, se(X.half(), w1=W1.bfloat16()), ("`w1`", "float16", "bfloat16")),
    "w1_device": (ValueError, se(w1=W1.to("meta")), ("`w1`", "device", "cpu", "meta")),
    "w1_of_another_layout": (ValueError, se(layout="tokens"), ("`w1`", "(3, 4)", "(3, 6)")),
    "b1_shape": (ValueError, se(b1=B2), ("`b1`", "(R,) = (3,)", "(6,)")),
    "b1_alone": (ValueError, se(w1=None, w2=torch.ones(6, 6)), ("`b1`", "`w1`")),
    "w2_none": (TypeError, se(w2=None), ("`w2`", "Tensor", "NoneType")),
    "w2_shape": (ValueError, se(w2=W1), ("`w2`", "(C, R) = (6, 3)", "(3, 6)")),
    "w2_not_square": (ValueError, se(w1=None, b1=None), ("`w2`", "(6, 6)", "(6, 3)")),
    "w2_double": (TypeError, se(w2=W2.double()), ("`w2`", "float32", "float64")),
    "w2_integer": (TypeError, se(w2=W2.int()), ("`w2`", "float32", "int32")),
    "b2_shape": (ValueError, se(b2=B1), ("`b2`", "(C,) = (6,)", "(3,)")),
    "b2_half": (TypeError, se(b2=B2.half()), ("`b2`", "float32", "float16")),
    "activation": (ValueError, se(activation="tanh"), ("`activation`", "'relu'", "'tanh'")),
    "activation_none": (ValueError, se(activation=None), ("`activation`", "'relu'", "None")),
    "gate": (ValueError, se(gate="softmax"), ("`gate`", "'hard_sigmoid'", "'softmax'")),
    "gate_none": (ValueError, se(gate=None), ("`gate`", "'sigmoid'", "None")),
    "layout": (ValueError, se(layout="NHWC"), ("`layout`", "'channels_last'", "'NHWC'")),
    "residual_shape": (ValueError, se(residual=X[:1]), ("`residual`", "(2, 6, 4)", "(1, 6, 4)")),
    "residual_dtype": (TypeError, se(residual=X.half()), ("`residual`", "float32", "float16")),
    "residual_activation": (ValueError, se(residual=X, residual_activation="x"), ("`residual_activation`", "'x'")),
    "residual_activation_alone": (ValueError, se(residual_activation="relu"), ("`residual_activation`", "`residual`")),
    "module_activation": (ValueError, lambda: dk.nn.SqueezeExcite(8, activation="x"), ("`activation`", "'x'")),
    "module_gate": (ValueError, lambda: dk.nn.EffectiveSqueezeExcite(8, gate="x"), ("`gate`", "'x'")),
    "module_layout": (ValueError, lambda: dk.nn.SqueezeExcite(8, layout="x"), ("`layout`", "'x'")),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name: str) -> None:
    """The right exception, in one line that names the argument; no tensor is touched."""
    with unmodified(X, W1, B1, W2, B2):
        rejects(*REJECTED[name])


# Modules --------------------------------------------------------------------------------------------------------------


class Theirs(nn.Module):
    """Two layers under the names of another library, and that library's forward pass.

    Args:
        first, second: the names; "fc.0" and "fc.2" are a Sequential with the activation between them.
        channels, hidden: C and R.
        linear: Linear, as in MONAI; else 1x1 convolutions.
    """

    def __init__(self, first: str, second: str, channels: int, hidden: int, linear: bool = False) -> None:
        super().__init__()
        make = nn.Linear if linear else lambda *size: nn.Conv2d(*size, 1)
        layers = make(channels, hidden), make(hidden, channels)
        self.names, self.linear = (first, second), linear
        if "." in first:
            self.add_module(first.split(".")[0], nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Sigmoid()))
        else:
            self.add_module(first, layers[0])
            self.add_module(second, layers[1])

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.get_submodule(name) for name in self.names)
        pooled = x.mean((2, 3)) if self.linear else F.adaptive_avg_pool2d(x, 1)
        gate = torch.sigmoid(second(F.relu(first(pooled))))
        return x * gate.view(*x.shape[:2], 1, 1)


LIBRARIES = {
    "timm": ("fc1", "fc2", False),
    "timm_last": ("fc1", "fc2", True),
    "torchvision": ("fc1", "fc2", False),
    "timm_efficientnet": ("conv_reduce", "conv_expand", False),
    "transformers_efficientnet": ("reduce", "expand", False),
    "transformers_regnet": ("attention.0", "attention.2", False),
    "transformers_pplcnet": ("convolutions.0", "convolutions.2", False),
    "transformers_audio": ("conv1", "conv2", False),
    "monai": ("fc.0", "fc.2", True),
    "fvcore": ("block.0", "block.2", False),
}


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_state_dicts_of_others_load(name: str, layout: str, backend: str, device: torch.device) -> None:
    """Strictly, on their own and inside a model, into convolutions and into Linear; the dictionary stays as it was."""
    first, second, linear = LIBRARIES[name]
    theirs = random_(Theirs(first, second, 8, 3, linear)).to(device)
    ours = dk.nn.SqueezeExcite(8, hidden_channels=3, layout=layout).to(device)
    x = normal(2, 8, 5, 4).to(device)
    given = x if layout == "channels_first" else x.movedim(1, -1)
    for wrapped in (False, True):
        random_(theirs)
        source, target = (nn.Sequential(theirs), nn.Sequential(ours)) if wrapped else (theirs, ours)
        state = source.state_dict()
        keys = list(state)
        target.load_state_dict(state, strict=True)
        assert list(state) == keys
        y = ours(given) if layout == "channels_first" else ours(given).movedim(-1, 1)
        assert_within_budget(y, copy.deepcopy(theirs).double()(x.double()))
    if first == "fc1" and linear == (layout != "channels_first"):
        theirs.load_state_dict(random_(ours).state_dict(), strict=True)


def test_state_dict_with_a_missing_or_a_foreign_key() -> None:
    """Strict loading stays strict."""
    state = Theirs("reduce", "expand", 8, 3).state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*fc2\.bias"):
        dk.nn.SqueezeExcite(8, hidden_channels=3).load_state_dict(
            {k: v for k, v in state.items() if k != "expand.bias"}
        )
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bn\.weight"):
        dk.nn.SqueezeExcite(8, hidden_channels=3).load_state_dict({**state, "bn.weight": torch.ones(3)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        dk.nn.SqueezeExcite(8, hidden_channels=4).load_state_dict(state)


@pytest.mark.parametrize(
    ("channels", "options", "hidden"),
    [
        (64, {}, 4),
        (40, {"reduction": 4}, 10),
        (30, {"reduction": 16}, 1),
        (8, {}, 1),  # max(1, 8 // 16)
        (20, {"reduction": 2.5}, 8),
        (64, {"hidden_channels": 6}, 6),
        (64, {"rd_divisor": 8}, 8),  # 4, at least 8
        (184, {"rd_divisor": 8}, 8),  # 11.5, to the nearest multiple
        (192, {"rd_divisor": 8}, 16),  # 12, upwards from the middle
        (200, {"rd_divisor": 8}, 16),  # 12.5
        (96, {"reduction": 4, "rd_divisor": 8}, 24),
        (100, {"reduction": 4, "rd_divisor": 4}, 24),  # 25: down, however much is lost
        (100, {"reduction": 16, "rd_divisor": 1}, 6),  # 6.25
    ],
    ids=str,
)
def test_hidden_size(channels: int, options: dict[str, Any], hidden: int) -> None:
    layer = dk.nn.SqueezeExcite(channels, **options)
    assert layer.fc1.weight.shape == (hidden, channels, 1, 1) and layer.fc2.weight.shape == (channels, hidden, 1, 1)
    assert layer.fc1.bias.shape == (hidden,) and layer.fc2.bias.shape == (channels,)
    bare = dk.nn.SqueezeExcite(channels, bias=False, layout="tokens", **options)
    assert bare.fc1.weight.shape == (hidden, channels) and bare.fc1.bias is None and bare.fc2.bias is None


@pytest.mark.parametrize("layout", ["channels_first", "channels_last", "tokens"])
def test_modules(layout: str, backend: str, device: torch.device) -> None:
    """The function with the parameters and options of the module, two layers and one, with and without residual."""
    shape = {"channels_first": (2, 8, 5, 3), "channels_last": (2, 5, 3, 8), "tokens": (2, 15, 8)}[layout]
    x, residual = normal(*shape).to(device), normal(*shape).to(device)
    common: dict[str, Any] = {"gate": "hard_sigmoid", "residual_activation": "gelu", "layout": layout}
    two = random_(dk.nn.SqueezeExcite(8, 2, activation="silu", **common)).to(device)
    one = random_(dk.nn.EffectiveSqueezeExcite(8, residual_activation="gelu", layout=layout)).to(device)
    weights = (two.fc1.weight, two.fc1.bias, two.fc2.weight, two.fc2.bias)
    for module, given, options in (
        (two, weights, {"activation": "silu", **common}),
        (one, (None, None, one.fc.weight, one.fc.bias), common),
    ):
        doubles = [None if w is None else w.double() for w in given]
        exact = plain(x.double(), *doubles, residual=residual.double(), **options)
        assert_within_budget(module(x, residual), exact)
        assert "gate='hard_sigmoid'" in repr(module) and repr(layout) in repr(module)
    module = random_(dk.nn.SqueezeExcite(8, 2, layout=layout)).to(device)
    doubles = [p.double() for p in module.parameters()]
    assert_within_budget(module(x), plain(x.double(), *doubles, layout=layout))
    assert dk.nn.SqueezeExcite(8, device="meta", dtype=torch.bfloat16).fc2.weight.dtype == torch.bfloat16


def test_effective_is_timms(backend: str, device: torch.device) -> None:
    """One 1x1 convolution `fc`, hard sigmoid, strict both ways; Linear weights load too."""
    fc = random_(nn.Conv2d(8, 8, 1)).to(device)
    x = normal(2, 8, 5, 3).to(device)
    z = x.double().mean((2, 3), keepdim=True)
    expected = x * F.hardsigmoid(copy.deepcopy(fc).double()(z))
    ours, last = (dk.nn.EffectiveSqueezeExcite(8, layout=k).to(device) for k in ("channels_first", "channels_last"))
    state = {"fc.weight": fc.weight, "fc.bias": fc.bias}
    ours.load_state_dict(state)
    last.load_state_dict(state)
    assert_within_budget(ours(x), expected)
    assert_within_budget(last(x.movedim(1, -1)).movedim(-1, 1), expected)
    assert list(ours.state_dict()) == ["fc.weight", "fc.bias"] and ours.fc.weight.shape == fc.weight.shape
    ours.load_state_dict(last.state_dict())
    assert dk.nn.EffectiveSqueezeExcite(8, bias=False).fc.bias is None


# Negative controls: the comparison above can fail ---------------------------------------------------------------------


def composed(
    x: Tensor, w1: Any, b1: Any, w2: Any, b2: Any, *, activation: str = "relu", gate: str = "sigmoid",
    residual: Any = None, residual_activation: Any = None, flaw: str = "",
) -> Tensor:  # fmt: skip
    """The formula by hand, with one detail wrong: a detached factor is a gradient that lacks its term."""
    n, c, *s = x.shape
    single = x.float() if x.dtype != torch.float64 else x
    pooled = {
        "dx_without_mean": single.detach(),
        "misses_a_position": single * (torch.arange(s[-1]) > 0),
        "misses_the_residual": single + (residual if residual is not None else 0),
    }.get(flaw, single)
    z = pooled.mean(tuple(range(2, x.dim())))
    if flaw == "one_axis":  # nnU-Net in 3-D: a gate per slice
        z = pooled.mean((2, 3)).flatten(2)
    z = {"sum": z * math.prod(s), "unbiased": z * math.prod(s) / (math.prod(s) - 1), "half_mean": z.bfloat16().float(),
         "mean_of_another": z.roll(1, 0)}.get(flaw, z)  # fmt: skip

    def first_sample_only(t: Tensor) -> Tensor:
        return torch.cat([t.expand(1, *t.shape), t.detach().expand(n - 1, *t.shape)])

    def linear(z: Tensor, name: str, w: Tensor, b: Tensor | None) -> Tensor:
        ws, bs = w.expand(n, *w.shape), None if b is None else b.expand(n, *b.shape)
        if flaw == f"d{name}":
            ws = first_sample_only(w)
        if b is not None and flaw in (f"db{name[1]}", f"b{name[1]}"):
            bs = first_sample_only(b) if flaw[0] == "d" else 0 * bs
        out = torch.einsum("nc...,nrc->nr...", z, ws.to(z.dtype))
        return out if bs is None else out + bs.to(z.dtype).view(*bs.shape, *[1] * (out.dim() - 2))

    if w1 is not None:
        z = linear(z, "w1", w1, b1)
        kind = {"no_hidden_activation": None, "other_activation": "leaky_relu"}.get(flaw, activation)
        z = F.leaky_relu(z, 0.011) if flaw == "hidden_slope" else ACTIVATIONS[kind](z)
    z = linear(z, "w2", w2, b2)
    e = torch.clamp(0.2 * z + 0.5, 0, 1) if flaw == "keras_gate" else GATES[gate](z)
    e = {"gate": 1.001 * e, "no_gate": z, "dgate": e.detach() + 0 * e, "gate_shifted": e.roll(1, 1)}.get(flaw, e)
    e = e.view(n, c, 1, 1, s[-1]) if flaw == "one_axis" else e.view(n, c, *[1] * len(s))
    y = single * e
    if flaw == "dx_without_product":
        y = single.detach() * e + 0 * single
    if residual is not None:
        r = {"no_residual": 0 * residual, "dresidual": residual.detach() + 0 * residual}.get(flaw, residual)
        slope = 0.011 if flaw == "residual_slope" else 0.01
        if flaw == "residual_gated":
            y = (single + r) * e
        elif flaw == "residual_last":
            y = ACTIVATIONS[residual_activation](y) + r
        elif flaw != "no_residual_activation" and residual_activation == "leaky_relu":
            y = F.leaky_relu(y + r, slope)
        else:
            y = ACTIVATIONS[None if flaw == "no_residual_activation" else residual_activation](y + r)
        y = y if flaw != "residual_gated" else ACTIVATIONS[residual_activation](y)
    return y.to(x.dtype)


# The flaw -> what the comparison has to complain about, and the options under which it shows.
ADDED = {"present": ("b1", "b2", "residual"), "options": {"residual_activation": "leaky_relu"}}
FLAWS: dict[str, tuple[str, dict[str, Any]]] = {
    "b1": ("output", {}),
    "b2": ("output", {}),
    "no_hidden_activation": ("output", {}),
    "other_activation": ("output", {}),
    "hidden_slope": ("output", {"options": {"activation": "leaky_relu"}}),
    "gate": ("output", {}),
    "gate_shifted": ("output", {}),
    "no_gate": ("output", {}),
    "keras_gate": ("output", {"options": {"gate": "hard_sigmoid"}}),
    "one_axis": ("output", {}),
    "sum": ("output", {}),
    "unbiased": ("output", {}),
    "half_mean": ("output", {}),
    "mean_of_another": ("output", {}),
    "misses_a_position": ("output", {}),
    "misses_the_residual": ("output", ADDED),
    "no_residual": ("output", ADDED),
    "residual_gated": ("output", ADDED),
    "residual_last": ("output", ADDED),
    "residual_slope": ("output", ADDED),
    "no_residual_activation": ("output", ADDED),
    "dx_without_mean": ("gradient of x", {}),
    "dx_without_product": ("gradient of x", {}),
    "dgate": ("gradient of x", {}),
    "dresidual": ("gradient of residual", ADDED),
    "dw1": ("gradient of w1", {}),
    "db1": ("gradient of b1", {}),
    "dw2": ("gradient of w2", {}),
    "db2": ("gradient of b2", {}),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_negative_control(flaw: str) -> None:
    """The formula passes `check_layer`, and with this one flaw in it does not."""
    complaint, how = FLAWS[flaw]
    with dk.backend("reference"):
        check_layer(dk.squeeze_excite, (3, 6, 5, 3, 2), 4, **how)
        check_layer(composed, (3, 6, 5, 3, 2), 4, **how)
    with dk.backend("reference"), pytest.raises(AssertionError, match=complaint):
        check_layer(lambda **t: composed(**t, flaw=flaw), (3, 6, 5, 3, 2), 4, **how)
