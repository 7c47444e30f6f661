"""torch.compile(backend="dlkernels"): GroupNorm and what follows it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from _compiled import assert_equal, check, check_left, compiled, found, leaf, left, needs_kernels, randomised
from torch import Tensor, nn

pytestmark = needs_kernels

N, C, G = 2, 8, 4


WEIGHT = leaf(C).detach()


def norm(x: Tensor) -> Tensor:
    return F.group_norm(x, G, WEIGHT, None, 1e-3)


class Norm(nn.Module):
    """A norm and what a test puts behind it."""

    def __init__(self, after: Callable[..., Tensor], **options: object) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(G, C, **options)  # type: ignore[arg-type]
        self.after = after
        randomised(self)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.after(self.norm(x), *others)


def in_place_statement(y: Tensor) -> Tensor:
    """What follows reads y, and not the result of the call."""
    F.relu(y, inplace=True)
    return y * 2


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "relu": (F.relu, "relu"),
    "torch.relu": (torch.relu, "relu"),
    "x.relu": (lambda y: y.relu(), "relu"),
    "relu in place": (lambda y: F.relu(y, inplace=True), "relu"),
    "relu_": (lambda y: y.relu_(), "relu"),
    "leaky_relu": (lambda y: F.leaky_relu(y, 0.01), "leaky_relu"),
    "silu": (F.silu, "silu"),
    "silu in place": (lambda y: F.silu(y, inplace=True), "silu"),
    "x sigmoid(x)": (lambda y: y * torch.sigmoid(y), "silu"),
    "sigmoid(x) x": (lambda y: y.sigmoid() * y, "silu"),
    "gelu": (F.gelu, "gelu"),
    "gelu_tanh": (lambda y: F.gelu(y, approximate="tanh"), "gelu_tanh"),
    "module": (nn.SiLU(), "silu"),
    "in place as a statement": (in_place_statement, "relu"),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name: str) -> None:
    after, expected = ACTIVATIONS[name]
    check(Norm(after), leaf(N, C, 3, 5), replaced=[f"group_norm + {expected}"])


@pytest.mark.parametrize("shape", [(N, C, 7), (N, C, 3, 5), (N, C, 2, 3, 4)])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"eps": 1e-2}], ids=str)
def test_ranks_and_parameters(shape: tuple[int, ...], options: dict[str, object]) -> None:
    check(Norm(lambda y: y, **options), leaf(*shape), replaced=["group_norm"])


@pytest.mark.parametrize("groups", [1, 2, C])
def test_groups(groups: int) -> None:
    check(lambda x: F.silu(F.group_norm(x, groups)), leaf(N, C, 3, 5), replaced=["group_norm + silu"])


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_format(memory_format: torch.memory_format) -> None:
    x = leaf(N, C, 3, 5).detach().to(memory_format=memory_format)
    check(Norm(F.silu), x.requires_grad_(), replaced=["group_norm + silu"])


def test_transposed_input() -> None:
    """As before an attention layer: F.group_norm makes it contiguous first, and so does the replacement."""
    model = Norm(lambda y: y)
    check(lambda x: model(x.transpose(1, 2)).view(-1), leaf(N, 6, C), replaced=["group_norm"])


FILM: dict[str, tuple[Callable[..., Tensor], str]] = {
    "scale and shift": (lambda y, s, b: y * (1 + s) + b, "group_norm + scale and shift"),
    "the other order": (lambda y, s, b: b + (s + 1) * y, "group_norm + scale and shift"),
    "scale": (lambda y, s, b: y * (1 + s), "group_norm + scale"),
    "shift": (lambda y, s, b: y + b, "group_norm + shift"),
    "then silu": (lambda y, s, b: F.silu(y * (1 + s) + b), "group_norm + scale and shift + silu"),
    "in place": (lambda y, s, b: y.mul_(1 + s).add_(b).relu_(), "group_norm + scale and shift + relu"),
}


@pytest.mark.parametrize("name", FILM)
def test_film(name: str) -> None:
    after, expected = FILM[name]
    check(Norm(after), leaf(N, C, 3, 5), leaf(N, C, 1, 1, seed=1), leaf(N, C, 1, 1, seed=2), replaced=[expected])


def test_film_of_a_chunked_embedding() -> None:
    """As diffusion models write it."""

    def after(y: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = embedding[:, :, None, None].chunk(2, dim=1)
        return F.silu(y * (1 + scale) + shift)

    check(Norm(after), leaf(N, C, 3, 5), leaf(N, 2 * C), replaced=["group_norm + scale and shift + silu"])


def test_a_scale_that_is_used_elsewhere_too() -> None:
    def after(y: Tensor, s: Tensor) -> Tensor:
        grown = 1 + s
        return y * grown + 3 * grown.sum()

    check(Norm(after), leaf(N, C, 3, 5), leaf(N, C, 1, 1), replaced=["group_norm + scale"])


RESIDUAL: dict[str, tuple[Callable[..., Tensor], str]] = {
    "y + r": (lambda y, r: y + r, "group_norm + residual"),
    "r + y": (lambda y, r: r + y, "group_norm + residual"),
    "y += r": (lambda y, r: y.add_(r), "group_norm + residual"),
    "torch.add": (lambda y, r: torch.add(y, r), "group_norm + residual"),
    "relu(y + r)": (lambda y, r: F.relu(y + r), "group_norm + residual + relu"),
    "relu_(y += r)": (lambda y, r: y.add_(r).relu_(), "group_norm + residual + relu"),
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_residual(name: str) -> None:
    after, expected = RESIDUAL[name]
    check(Norm(after), leaf(N, C, 3, 5), leaf(N, C, 3, 5, seed=1), replaced=[expected])


def test_two_norms_are_added() -> None:
    """One is the residual of the other."""
    check(
        lambda x, z: F.relu(norm(x) + norm(z)),
        leaf(N, C, 3, 5),
        leaf(N, C, 3, 5, seed=1),
        replaced=["group_norm + residual + relu", "group_norm"],
    )


def test_output_changed_in_place_later() -> None:
    def after(y: Tensor) -> Tensor:
        z = F.silu(y)
        z *= 2
        return z

    check(Norm(after), leaf(N, C, 3, 5), replaced=["group_norm + silu"])


# Near misses: the norm is replaced, what looks like its activation is not -------------------------------------------

ONLY_THE_NORM: dict[str, Callable[..., object]] = {
    "another user": lambda y: (F.silu(y), y + 1),
    "another slope": lambda y: F.leaky_relu(y, 0.2),
    "hardtanh": lambda y: F.hardtanh(y),
    "x sigmoid(z)": lambda y: y * torch.sigmoid(y + 1),
    "1.5 + s": lambda y: y * (1.5 + y.new_ones(N, C, 1, 1)),
    "no 1 + s": lambda y: y * y.new_ones(N, C, 1, 1),
    "y + y": lambda y: y + y,
    "alpha": lambda y: torch.add(y, torch.ones_like(y), alpha=2),
    "a scale per position": lambda y: y * (1 + y.new_ones(1, 1, 3, 5)),
    "a shift for all samples": lambda y: y + y.new_ones(1, C, 1, 1),
    "another dtype": lambda y: y.float() + y.new_ones(N, C, 3, 5, dtype=torch.float32),
    "an outer product": lambda y: y + y.new_ones(N, C, 1, 5),
}


@pytest.mark.parametrize("name", ONLY_THE_NORM)
def test_only_the_norm(name: str) -> None:
    check(Norm(ONLY_THE_NORM[name]), leaf(N, C, 3, 5), replaced=["group_norm"])  # type: ignore[arg-type]


def test_sum_in_place_on_the_residual() -> None:
    """`r += y` changes r, which the caller sees."""

    def after(y: Tensor, r: Tensor) -> Tensor:
        r = r * 1
        kept = r.view(-1)
        r += y
        return r * 2 + kept.view(N, C, 3, 5)

    check(Norm(after), leaf(N, C, 3, 5), leaf(N, C, 3, 5, seed=1), replaced=["group_norm"])


def test_input_changed_between() -> None:
    def function(x: Tensor) -> Tensor:
        z = x * 2
        y = norm(z.detach())
        z += 1
        return F.silu(y) + z

    made = compiled(function)
    assert_equal(function, made, (leaf(N, C, 3, 5),))
    assert not [what for what in found() if "silu" in what]
    assert any("in place" in reason for reason in left())


def test_view_of_the_input_changed_between() -> None:
    def function(x: Tensor) -> Tensor:
        z = x * 2
        flat = z.view(-1)
        y = norm(z.detach())
        flat[0] = 5
        return F.silu(y) + z

    made = compiled(function)
    assert_equal(function, made, (leaf(N, C, 3, 5),))
    assert not found()


def test_grad_mode_changes_between() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = norm(x)
        return F.silu(y) * x

    check_left(function, leaf(N, C, 3, 5), reason="grad mode or autocast")


def test_two_dimensions_are_left_because_they_are_slower() -> None:
    check_left(Norm(F.relu), leaf(16, C), reason="not faster here (0.63x)")
    check(Norm(F.relu), leaf(16, C), replaced=["group_norm + relu"], all=True)


# Dtypes and shapes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["same", "float32"])
def test_half_precision(dtype: torch.dtype, parameters: str) -> None:
    model = Norm(F.silu).to(dtype if parameters == "same" else torch.float32)
    x = leaf(N, C, 3, 5).detach().to(dtype).requires_grad_()
    made = compiled(model)
    assert_equal(model, made, (x,), limit=4 * torch.finfo(dtype).eps)
    assert found() == ["group_norm + silu"]


def test_autocast() -> None:
    """The norm takes what a convolution under autocast gives: bfloat16 in and out, float32 parameters."""
    model = nn.Sequential(nn.Conv2d(3, C, 3), nn.GroupNorm(G, C), nn.SiLU())

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    made = compiled(function)
    assert_equal(function, made, (leaf(N, 3, 6, 6, dtype=torch.float32),), limit=0.02)
    assert found() == ["group_norm + silu"]


def test_dynamic_shapes() -> None:
    """One graph for every batch and size."""
    model = Norm(lambda y, r: F.relu(y + r))
    made = compiled(model, dynamic=True)
    for n, h in ((2, 3), (3, 5), (7, 4)):
        assert_equal(model, made, (leaf(n, C, h, 5), leaf(n, C, h, 5, seed=1)))
    assert found() == ["group_norm + residual + relu"]


def test_dynamic_film() -> None:
    model = Norm(lambda y, s, b: F.silu(y * (1 + s) + b))
    made = compiled(model, dynamic=True)
    for n, h in ((2, 3), (5, 4)):
        assert_equal(model, made, (leaf(n, C, h, 5), leaf(n, C, 1, 1, seed=1), leaf(n, C, 1, 1, seed=2)))
    assert found() == ["group_norm + scale and shift + silu"]


def test_without_gradients() -> None:
    model, x = Norm(F.silu), leaf(N, C, 3, 5).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        made = compiled(model)
        with mode():
            assert torch.allclose(made(x), model(x), rtol=1e-12, atol=1e-12)
        assert found() == ["group_norm + silu"]


@pytest.mark.slow
def test_inductor() -> None:
    check(
        Norm(lambda y, s, b: F.silu(y * (1 + s) + b).mean((2, 3))),
        *(leaf(N, C, 3, 5), leaf(N, C, 1, 1, seed=1), leaf(N, C, 1, 1, seed=2)),
        replaced=["group_norm + scale and shift + silu"],
        then="inductor",
    )
