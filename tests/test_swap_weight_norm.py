"""`swap` on torch's weight normalisation: the parametrization and the hook that was there before it."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import dlkernels as dk
from dlkernels._swap._weight_norm import FusedWeightNormHook
from dlkernels.testing import assert_within_budget

Make = Callable[[], nn.Module]


def legacy(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        return torch.nn.utils.weight_norm(module, *args, **kwargs)


NORMED = {"parametrization": parametrizations.weight_norm, "hook": legacy}
# layer, dim, shape of x
LAYERS: dict[str, tuple[Make, Any, tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(7, 5), 0, (3, 7)),
    "Linear, dim 1": (lambda: nn.Linear(7, 5), 1, (3, 7)),
    "Linear, whole": (lambda: nn.Linear(7, 5), None, (3, 7)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), 0, (2, 4, 9)),
    "Conv1d, dim -2": (lambda: nn.Conv1d(4, 6, 3), -2, (2, 4, 9)),
    "Conv1d, dim 2": (lambda: nn.Conv1d(4, 6, 3), 2, (2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3), 0, (2, 4, 9, 5)),
    "Conv2d, channels_last": (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), 0, (2, 4, 9, 5)),
    "Conv2d, whole": (lambda: nn.Conv2d(4, 6, 3), -1, (2, 4, 9, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), 1, (2, 4, 9)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2), -5, (1, 2, 3, 4, 5)),
}


@pytest.fixture(params=NORMED)
def normed(request: pytest.FixtureRequest) -> Callable[..., nn.Module]:
    return NORMED[request.param]


def made(normed: Callable[..., nn.Module], name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A layer with random g and v, and an input."""
    make, dim, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = normed(make().to(dtype), "weight", dim=dim)
    for p in layer.parameters():
        p.data.normal_()
    return layer, torch.randn(shape, dtype=dtype)


def swapped(layer: nn.Module) -> nn.Module:
    layer = copy.deepcopy(layer) if parametrize.is_parametrized(layer) else pickle.loads(pickle.dumps(layer.cpu()))
    report = dk.swap(layer, "weight_norm")
    assert len(report.swapped) == 1 and not report.skipped
    return layer


def results(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)).sum().backward()
    return {"y": y.detach(), "dx": x.grad, **{n: p.grad.clone() for n, p in layer.named_parameters()}}


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, t in expected.items():
        error = ((actual[name] - t).norm() / t.norm()).item()
        assert t.norm() > 1e-3 and error <= 1e-12, f"{name}: relative error {error:.3g}"


def calls(f: Callable[[], Any]) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        f()
    return sum(e.count for e in profile.key_averages() if e.key == "dlkernels::weight_norm_fwd")


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients(normed: Callable[..., nn.Module], name: str) -> None:
    layer, x = made(normed, name)
    fused = swapped(layer)
    compare(results(fused, x), results(layer, x))
    assert list(fused.state_dict()) == list(layer.state_dict())
    if dk.build_info()["cpp"]:
        ours = name not in ("Conv2d, channels_last", "Linear, dim 1")
        assert calls(partial(fused, x)) == ours and calls(partial(layer, x)) == 0
    assert fused.weight.stride() == layer.weight.stride()


@pytest.mark.parametrize("name", LAYERS)
def test_a_wrong_length_is_seen(normed: Callable[..., nn.Module], name: str) -> None:
    layer, x = made(normed, name)
    fused = swapped(layer)
    for p in fused.parameters():
        if p.shape != x.shape:
            p.data.mul_(1 + 1e-9)
    with pytest.raises(AssertionError, match="relative error"):
        compare(results(fused, x), results(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_lower_precision(normed: Callable[..., nn.Module], dtype: torch.dtype, autocast: bool) -> None:
    layer, _ = made(normed, "Conv1d", dtype)
    exact, _ = made(normed, "Conv1d")
    exact.load_state_dict(layer.state_dict())
    fused, seen = swapped(layer), []
    x = torch.randn(2, 4, 9, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for m in (fused, layer, exact):
            m(x.double() if m is exact else x)
            seen.append(m.weight.detach())
    assert seen[0].dtype == seen[1].dtype
    assert_within_budget(seen[0], seen[2], seen[1])


def test_undo(normed: Callable[..., nn.Module]) -> None:
    layer, x = made(normed, "Conv1d")
    before = layer(x)
    report = dk.swap(layer, "weight_norm")
    again = dk.swap(layer, "weight_norm")
    assert len(report.swapped) == 1 and not again.swapped
    report.undo()
    if dk.build_info()["cpp"]:
        assert calls(partial(layer, x)) == 0
    assert torch.equal(layer(x), before)
    dk.swap(layer, "weight_norm")
    assert dk.unswap(layer) == 1 and torch.equal(layer(x), before)


def test_what_torch_does_with_it_goes_on() -> None:
    """Another weight, folding it back, taking the norm out."""
    layer, x = made(parametrizations.weight_norm, "Conv1d")
    fused, _ = made(parametrizations.weight_norm, "Conv1d")  # no copy: it would share the class that torch changes
    assert len(dk.swap(fused).swapped) == 1
    weight = torch.randn_like(layer.weight)
    for m in (fused, layer):
        m.weight = weight
        parametrize.remove_parametrizations(m, "weight")
    assert type(fused) is nn.Conv1d and torch.allclose(fused(x), layer(x), rtol=1e-12)

    layer, x = made(legacy, "Conv1d")
    fused = swapped(layer)
    assert [type(hook) for hook in fused._forward_pre_hooks.values()] == [FusedWeightNormHook]
    for m in (fused, layer):
        torch.nn.utils.remove_weight_norm(m)
    assert not fused._forward_pre_hooks and torch.allclose(fused(x), layer(x), rtol=1e-12)


def test_copies_and_pickles() -> None:
    fused, x = swapped(made(parametrizations.weight_norm, "Conv1d")[0]), LAYERS["Conv1d"][2]
    x = torch.randn(x, dtype=torch.float64)
    other = copy.deepcopy(fused)
    norms = [m.parametrizations.weight[0] for m in (fused, other, made(parametrizations.weight_norm, "Conv1d")[0])]
    assert type(norms[0]) is type(norms[1]) and isinstance(norms[1], type(norms[2])) and torch.equal(other(x), fused(x))
    again = pickle.loads(pickle.dumps(norms[0]))
    assert type(again) is type(norms[0]) and again.dim == 0

    fused = swapped(made(legacy, "Conv1d")[0])
    other = pickle.loads(pickle.dumps(fused))
    assert [type(hook) for hook in other._forward_pre_hooks.values()] == [FusedWeightNormHook]
    assert torch.equal(other(x), fused(x)) and dk.unswap(other) == 1


def test_rows_of_zeros() -> None:
    """The one difference: weights and gradients of 0, where torch's are NaN."""
    layer, x = made(parametrizations.weight_norm, "Linear")
    layer.parametrizations.weight.original1.data[2] = 0
    fused = swapped(layer)
    assert layer(x).isnan().any(0).tolist() == [False, False, True, False, False]
    assert all(torch.isfinite(t).all() for t in results(fused, x).values())
    assert torch.equal(fused.weight[2], torch.zeros(7, dtype=torch.float64))


def test_what_torch_alone_takes() -> None:
    """Another dtype or shape of g, a subclass: the same result, or the same error."""
    torchs = parametrizations._WeightNorm(1)
    ours = swapped_norm(torchs)
    v = torch.randn(4, 3, 5)
    for g, w in [
        (torch.ones(1, 3, 1), v.bfloat16()),
        (torch.ones(1, 1, 1), v),
        (torch.ones(1, 2, 1), v),
        (torch.ones(3), v),
        (torch.ones(1, 3, 1, dtype=torch.complex64), v.to(torch.complex64)),
        (torch.ones(1, 3, 1), v.as_subclass(Marked)),
    ]:
        seen = []
        for norm in (torchs, ours):
            try:
                seen.append(norm(g, w))
            except Exception as error:
                seen.append(f"{type(error)}: {error}")
        assert type(seen[0]) is type(seen[1])
        assert seen[0] == seen[1] if isinstance(seen[0], str) else torch.equal(*seen)


class Marked(Tensor):
    pass


def swapped_norm(norm: nn.Module) -> nn.Module:
    norm = copy.deepcopy(norm)
    assert len(dk.swap(norm, "weight_norm").swapped) == 1
    return norm


@pytest.mark.needs("cpp")
@pytest.mark.filterwarnings("ignore")
def test_compile_and_export() -> None:
    torch._dynamo.reset()
    layer, x = made(parametrizations.weight_norm, "Conv1d")
    fused, graphs = swapped(layer), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch.compile(fused, backend=backend, fullgraph=True)(x)
    program = torch.export.export(fused, (x,))
    for graph in (*graphs, program):
        assert sum("dlkernels.weight_norm" in str(n.target) for n in graph.graph.nodes) == 1
    whole = results(torch.compile(fused, backend="aot_eager", fullgraph=True), x)
    compare({name.replace("_orig_mod.", ""): t for name, t in whole.items()}, results(layer, x))


@pytest.mark.filterwarnings("ignore")
def test_a_trace_is_torchs() -> None:
    layer, x = made(parametrizations.weight_norm, "Conv1d")
    traced = torch.jit.trace(swapped(layer), (x,), check_trace=False)
    assert "_weight_norm" in str(traced.inlined_graph) and "dlkernels::" not in str(traced.inlined_graph)
    assert torch.equal(traced(x), layer(x))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = parametrizations._WeightNorm(0)
    norm.dim = 0.0
    assert dk.swap(norm).skipped[0][2] == "its `dim` is 0.0, not an int"
    monkeypatch.setattr(parametrizations._WeightNorm, "forward", lambda self, g, v: g * v)
    assert dk.swap(parametrizations._WeightNorm(0)).skipped[0][2].startswith("its forward is not one that is known")

    layer, _ = made(legacy, "Linear")
    hook_class = type(next(iter(layer._forward_pre_hooks.values())))
    monkeypatch.setattr(hook_class, "compute_weight", lambda self, module: module.weight_v)
    assert not dk.swap(layer).swapped
