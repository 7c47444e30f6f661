"""What the tests of layers share: backends, activations, and the comparison with float64 and with eager PyTorch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlkernels as dk
from dlkernels import _backend
from dlkernels.testing import assert_within_budget, relative_error

INF, NAN = float("inf"), float("nan")

# Of the input and of the parameters.
DTYPES = [
    pytest.param((torch.float32, torch.float32), id="float32"),
    pytest.param((torch.float16, torch.float16), id="float16"),
    pytest.param((torch.bfloat16, torch.bfloat16), id="bfloat16"),
    pytest.param((torch.float16, torch.float32), id="float16-float32"),
    pytest.param((torch.bfloat16, torch.float32), id="bfloat16-float32"),
    pytest.param((torch.float64, torch.float64), id="float64"),
]

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}

Tensors = dict[str, Tensor | None]


def backend_fixture(family: str, *, plain: bool = True, interpreted: bool = False, ops: str | None = None) -> Any:
    """A fixture that runs a test on each backend that can serve the device.

    Args:
        family: the module of dlkernels.triton that would serve it.
        plain: the reference too, which keeps intermediate results and calls operators that a fused op does not.
        ops: how the names of its operators begin, where not with the family's: those that CUDA C++ may serve.
        interpreted: Triton's interpreter and the CUDA kernels' host twin too, for tests of a few hundred elements.
    """
    names: list[Any] = ["reference"] if plain else []
    names.append(pytest.param("cpp", marks=pytest.mark.needs("cpp")))
    if importlib.util.find_spec(f"dlkernels.triton.{family}") and (
        torch.cuda.is_available() or (interpreted and _backend.interpreting())
    ):
        names.append(pytest.param("triton", marks=pytest.mark.needs("interpreter")))
    if any(op.startswith(ops or family) for op in _backend.CUDA_OPS) and (
        torch.cuda.is_available() or (interpreted and _backend.TWIN is not None)
    ):
        names.append(pytest.param("cuda", marks=pytest.mark.needs("twin")))

    @pytest.fixture(params=names)
    def backend(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
        if _backend._why_not(request.param, device.type):
            pytest.skip(f"by design: {request.param} does not serve {device.type}")
        with dk.backend(request.param):
            yield request.param

    return backend


def normal(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Drawn in float64, then rounded: the same numbers in every dtype."""
    return (mean + std * torch.randn(shape, dtype=torch.float64)).to(dtype)


def channels_last(x: Tensor) -> Tensor:
    """The channels innermost in memory, in any rank."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def random_(module: nn.Module) -> nn.Module:
    """Every parameter drawn: none is 0 or 1, none keeps what its initialisation left."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.4)
    return module


def enough(numbers: int) -> int:
    """Draws of a gradient of this many numbers: over 24 of them no single sum that cancels decides about the error."""
    return max(2, 24 // numbers)


def each(tensors: Tensors, function: Callable[[Tensor], Tensor]) -> Tensors:
    return {name: None if t is None else function(t) for name, t in tensors.items()}


def results(layer: Callable[..., Tensor], tensors: Tensors, cotangent: Tensor) -> dict[str, Tensor]:
    """The output, and the gradient of every tensor."""
    leaves = each(tensors, lambda t: t.detach().requires_grad_())
    given = {name: t for name, t in leaves.items() if t is not None}
    y = layer(**leaves)
    gradients = torch.autograd.grad(y, list(given.values()), cotangent.to(y.dtype), allow_unused=True)
    named = {f"gradient of {name}": g for name, g in zip(given, gradients, strict=True)}
    missing = [name for name, g in named.items() if g is None]
    assert not missing, f"no {', '.join(missing)}"
    return {"output": y.detach(), **named}


def channels_innermost(x: Tensor) -> bool:
    """Dense, and channels_last in any rank."""
    return x.dim() > 2 and x.movedim(1, -1).is_contiguous()


def assert_layout(x: Tensor, like: Tensor, what: str) -> None:
    """Contiguous and channels_last stay what they are; what is strided otherwise becomes one of them."""
    if like.is_contiguous() or channels_innermost(like):
        assert same_layout(x, like.stride()), f"{what}: strides {x.stride()}, expected {like.stride()}"
    else:
        assert x.is_contiguous() or channels_innermost(x), f"{what}: strides {x.stride()} of a tensor that is not dense"


def check(
    layer: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    drawn: Sequence[Tensors],
    *,
    cotangent: Tensor | None = None,
) -> None:
    """Output and gradients: dtype, shape, layout, and the error over all draws within twice eager's plus 4 eps.

    The output lies in memory as the first tensor does, and so does its gradient; the reference promises nothing.

    Args:
        layer: what is under test, a function of named tensors; the first one decides dtype and layout of the output.
        plain: the same in plain PyTorch; in float64 it is the truth, in the dtypes of the tensors the yardstick.
        drawn: the tensors by name, once or several times; None where there is none.
        cotangent: of the output; random if None.
    """
    first = next(iter(drawn[0]))
    laid = () if _backend.state.forced == "reference" else ("output", f"gradient of {first}")
    found: dict[str, tuple[list[Tensor], list[Tensor], list[Tensor]]] = {}
    for tensors in drawn:
        x = tensors[first]
        g = normal(*x.shape, dtype=x.dtype).to(x.device) if cotangent is None else cotangent
        actual = results(layer, tensors, g)
        exact = results(plain, each(tensors, lambda t: t.double()), g)
        eager = results(plain, tensors, g)
        for name, a in actual.items():
            t = tensors[name.removeprefix("gradient of ")] if name != "output" else x
            assert a.dtype == t.dtype, f"{name}: {a.dtype}, expected {t.dtype}"
            assert a.shape == t.shape, f"{name}: shape {tuple(a.shape)}, expected {tuple(t.shape)}"
            if name in laid:
                assert_layout(a, x, name)
            for group, value in zip(found.setdefault(name, ([], [], [])), (a, exact[name], eager[name]), strict=True):
                group.append(value.flatten())
    for name, (a, e, b) in found.items():
        ours, exact_, eager_ = torch.cat(a), torch.cat(e), torch.cat(b)
        if ours.dtype == torch.float64:  # plain PyTorch is no more exact than what it judges
            error = relative_error(ours, exact_)
            assert error <= 1e-12, f"{name}: relative error {error:.3g} in float64"
        else:
            assert_within_budget(ours, exact_, eager_, what=name)


def same_layout(x: Tensor, strides: tuple[int, ...]) -> bool:
    """Equal strides, but for dimensions of extent 1, whose stride means nothing."""
    return all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), strides, strict=True))


COPIES = ("aten::copy_", "aten::clone", "aten::contiguous", "aten::_to_copy")


def work(function: Callable[[], Any]) -> tuple[list[str], int]:
    """What ran besides the kernels: the operators that copy, by name, and the bytes allocated (on the CPU)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = function()
    events = profile.events()
    del kept
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in events)
    return [e.name for e in events if e.name in COPIES], allocated


def saved(function: Callable[[], Tensor]) -> list[Tensor]:
    """The tensors that a call keeps for its backward pass."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function()
    return kept


def rejects(error: type[Exception], call: Callable[[], Any], words: tuple[str, ...]) -> None:
    """A call raises exactly this, in one line with these words."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {message}"
    assert "\n" not in message, f"more than one line: {message!r}"
    for word in words:
        assert word in message, f"{word!r} is missing: {message!r}"
