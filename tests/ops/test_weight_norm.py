"""Weight normalisation: values, gradients, edges, errors, and the parametrization.

The formulas below are written down here a second time on purpose: what they are compared with is not their source.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from _layers import backend_fixture
from torch import Tensor, nn

import dlkernels as dk
from dlkernels.testing import (
    assert_bitwise,
    assert_within_budget,
    layouts,
    num_threads,
    poisoned_empty,
    relative_error,
    unmodified,
)

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

backend = backend_fixture("weight_norm", interpreted=True)


def plain(v: Tensor, g: Tensor, dim: int | None) -> Tensor:
    """g v / ||v||, as one writes it first."""
    whole = dim is None or dim == -1
    dims = tuple(i for i in range(v.dim()) if whole or i != dim % v.dim())
    n = v.square().sum(dims, keepdim=True).sqrt() if dims else v.abs()
    return v * (g / n)


# CASES ----------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    shape: tuple[int, ...]
    dim: int | None
    wide_g: bool = False  # g in float32 beside a half-precision v

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}-{self.dim}{'-wide_g' if self.wide_g else ''}"


CASES = [
    *(
        Case(shape, 0)
        for shape in ((1, 1), (1, 7), (5, 1), (3, 5), (7, 16), (4, 33), (130, 9), (3, 4099), (6, 4, 3, 2))
    ),
    *(Case(shape, None) for shape in ((3, 5), (7,), (2, 3, 4), (1, 1), (5, 4099))),
    *(Case(shape, 1) for shape in ((3, 5), (1, 4), (130, 17), (67, 64), (33, 1), (300, 129), (4, 3, 5), (5, 4, 3, 3))),
    *(Case(shape, 2) for shape in ((3, 4, 5), (4, 3, 2, 3), (2, 3, 70), (2, 40, 3, 5))),
    *(Case(shape, 1) for shape in ((3, 4, 64), (5, 3, 100), (40, 2, 513), (2, 2, 20_001))),  # long chunks
    *(Case(shape, -2) for shape in ((3, 4), (3, 4, 5))),
    Case((3, 4), -1),
    Case((2, 3, 4, 5), 3),
    Case((9,), 0),
    Case((2, 40_001), 0),
    Case((1, 70_001), None),
    *(Case(shape, dim, True) for shape, dim in (((5, 33), 0), ((5, 33), 1), ((5, 33), None), ((3, 4, 70), 1))),
]


def v_size(case: Case) -> int:
    return math.prod(case.shape)


def g_shape(shape: tuple[int, ...], dim: int | None) -> tuple[int, ...]:
    if dim is None or dim == -1:
        return ()
    return tuple(n if i == dim % len(shape) else 1 for i, n in enumerate(shape))


def tensors(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """v, g and the upstream gradient; g has nothing to do with ||v||, and both signs."""
    torch.manual_seed(seed)
    v = (1.5 * torch.randn(case.shape) + 0.2).to(dtype)
    g = (2 * torch.randn(g_shape(case.shape, case.dim)) + 0.3).to(torch.float32 if case.wide_g else dtype)
    return v.to(device), g.to(device), (torch.randn(case.shape) + 0.5).to(dtype).to(device)


def everything(call: Callable[..., Tensor], v: Tensor, g: Tensor, dw: Tensor, dim: int | None) -> tuple[Tensor, ...]:
    v, g = v.detach().requires_grad_(), g.detach().requires_grad_()
    w = call(v, g, dim)
    return (w.detach(), *torch.autograd.grad(w, (v, g), dw))


def check(call: Callable[..., Tensor], case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
    """w, dv and dg within twice eager's error plus 4 eps, and w like torch's own."""
    if case.wide_g and dtype == torch.float64:
        return
    v, g, dw = tensors(case, dtype, device, seed)
    actual = everything(call, v, g, dw, case.dim)
    exact = everything(plain, v.double(), g.double(), dw.double(), case.dim)
    assert [t.dtype for t in actual] == [v.dtype, v.dtype, g.dtype]
    eager = everything(plain, v, g.to(dtype), dw, case.dim)
    for name, a, e, t in zip(("w", "dv", "dg"), actual, exact, eager, strict=True):
        if name == "dv" and v.numel() == g.numel():  # rows of one element: dv is 0 but for rounding
            assert a.shape == e.shape
            size = (g.double() / v.double() * dw.double()).abs().max()
            assert a.double().abs().max() <= 4 * torch.finfo(torch.float32 if dtype.itemsize == 2 else dtype).eps * size
        elif dtype == torch.float64:  # the plain formula is no more exact than what it judges
            assert a.shape == e.shape and bool(torch.isfinite(a).all())
            assert relative_error(a, e) <= 1e-12, name
        else:
            assert_within_budget(a, e, t, what=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: Case, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Every case and dtype against float64 and against eager PyTorch."""
    if backend in ("triton", "cuda") and device.type == "cpu" and (dtype != torch.float32 or v_size(case) > 1000):
        pytest.skip("by design: small cases in float32 stand for all where kernels run slowly")
    for seed in range(3 if dtype == torch.bfloat16 and backend != "triton" else 1):
        check(dk.weight_norm, case, dtype, device, seed)


@pytest.mark.parametrize("case", [c for c in CASES if not c.wide_g], ids=str)
def test_is_torchs(case: Case, backend: str, device: torch.device) -> None:
    """torch._weight_norm in float64: values, gradients, and what its dim means."""
    if backend == "triton":
        pytest.skip("by design: float64, in the slow interpreter")
    v, g, dw = tensors(case, torch.float64, device, 0)
    dim = -1 if case.dim is None else case.dim

    def torchs(v: Tensor, g: Tensor, _: Any) -> Tensor:
        if len(case.shape) == 1 and dim == 0:  # torch takes a vector's first dimension for its last: scalar rows
            return torch._weight_norm(v.unsqueeze(-1), g.unsqueeze(-1), 0).squeeze(-1)
        return torch._weight_norm(v, g, dim)

    expected = everything(torchs, v, g, dw, None)
    for a, e in zip(everything(dk.weight_norm, v, g, dw, case.dim), expected, strict=True):
        assert a.shape == e.shape and (a - e).abs().max() <= 1e-12 * max(1, e.abs().max().item())


def test_vector(backend: str, device: torch.device) -> None:
    v = torch.tensor([[3.0, 4.0], [0.0, 2.0]], device=device)
    g, dw = torch.tensor([[10.0], [1.0]], device=device), torch.tensor([[1.0, 0.0], [1.0, 1.0]], device=device)
    w, dv, dg = everything(dk.weight_norm, v, g, dw, 0)
    assert torch.allclose(w.cpu(), torch.tensor([[6.0, 8.0], [0.0, 1.0]]))
    assert torch.allclose(dg.cpu(), torch.tensor([[0.6], [1.0]]))
    assert torch.allclose(dv.cpu(), torch.tensor([[1.28, -0.96], [0.5, 0.0]]))


def test_minus_one_is_the_whole_tensor(backend: str, device: torch.device) -> None:
    """As in torch, and unlike indexing."""
    v, g = torch.randn(3, 4, device=device), torch.tensor(2.0, device=device)
    assert_bitwise(dk.weight_norm(v, g, -1), dk.weight_norm(v, g, None))
    assert_within_budget(dk.weight_norm(v, g, -1), plain(v.double(), g.double(), None))
    for shape in ((1,), (1, 1)):
        assert_bitwise(dk.weight_norm(v, g.view(shape), None), dk.weight_norm(v, g, None))


@pytest.mark.parametrize("shape, dim", [((6, 4, 3, 5), 0), ((6, 4, 3, 5), 1), ((6, 4, 3, 5), 3), ((5, 7), 1)])
def test_layouts(shape: tuple[int, ...], dim: int, backend: str, device: torch.device) -> None:
    if backend == "triton" and device.type == "cpu":
        pytest.skip("by design: what is above the launchers is the same on every backend")
    v, g, dw = tensors(Case(shape, dim), torch.float32, device, 1)
    exact = everything(plain, v.double(), g.double(), dw.double(), dim)
    for name, changed in layouts(v):
        for other, upstream in layouts(dw):
            actual = everything(dk.weight_norm, changed, g, upstream, dim)
            for a, e in zip(actual, exact, strict=True):
                assert_within_budget(a, e, what=f"v {name}, gradient {other}")
            if name == "channels_last":
                assert actual[0].is_contiguous(memory_format=torch.channels_last) or backend == "reference"


# Edges ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim, shape", [(0, (4, 37)), (1, (37, 4)), (1, (3, 4, 70))], ids=["rows", "columns", "middle"])
def test_a_row_of_zeros_has_zero_gradients(dim: int, shape: Any, backend: str, device: torch.device) -> None:
    v, g, dw = tensors(Case(shape, dim), torch.float32, device, 0)
    zero = v.movedim(dim, 0)[2]
    zero.zero_()
    dw.movedim(dim, 0)[2].view(-1)[0:1].fill_(NAN) if dw.movedim(dim, 0)[2].is_contiguous() else None
    w, dv, dg = everything(dk.weight_norm, v, g, dw, dim)
    for t in (w.movedim(dim, 0)[2], dv.movedim(dim, 0)[2], dg.movedim(dim, 0)[2]):
        assert (t == 0).all()
    keep = [0, 1, 3]
    exact = everything(plain, v.double(), g.double(), dw.double(), dim)
    for a, e in zip((w, dv, dg), exact, strict=True):
        assert_within_budget(a.movedim(dim, 0)[keep], e.movedim(dim, 0)[keep])


def test_zero_g(backend: str, device: torch.device) -> None:
    """g = 0: w = 0 and dv = 0, but dg is not."""
    v, g, dw = tensors(Case((3, 20), 0), torch.float32, device, 0)
    g[1] = 0
    w, dv, dg = everything(dk.weight_norm, v, g, dw, 0)
    assert (w[1] == 0).all() and (dv[1] == 0).all() and dg[1] != 0


def test_one_element_rows_are_signs(backend: str, device: torch.device) -> None:
    v = torch.tensor([[-2.0], [0.5], [0.0]], device=device)
    g = torch.tensor([[3.0], [4.0], [5.0]], device=device)
    w, dv, dg = everything(dk.weight_norm, v, g, torch.ones_like(v), 0)
    assert w.flatten().tolist() == [-3.0, 4.0, 0.0]
    assert dg.flatten().tolist() == [-1.0, 1.0, 0.0] and (dv == 0).all()


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-19, 1e19, 1e30, 1e37])
def test_squares_beyond_float32(scale: float, dim: int | None, backend: str, device: torch.device) -> None:
    """Rows whose squares overflow or vanish still have a direction."""
    if backend == "triton" or (device.type != "cpu" and backend != "cuda"):
        pytest.skip("by design: Triton computes such rows as any other")
    torch.manual_seed(0)
    v = torch.randn(40, 5) * scale
    g = torch.randn(g_shape((40, 5), dim))
    exact = plain(v.double(), g.double(), dim)
    assert_within_budget(dk.weight_norm(v, g, dim), exact)
    if scale > 1e-38:
        dw = v.sign()  # dg adds up what does not cancel
        w, dv, dg = everything(dk.weight_norm, v, g, dw, dim)
        exact_all = everything(plain, v.double(), g.double(), dw.double(), dim)
        for a, e in zip((w, dg), exact_all[::2], strict=True):
            assert_within_budget(a, e)
        assert (dv.double() - exact_all[1]).abs().max() <= 1e-6 * exact_all[1].abs().max()


def test_not_finite_stays_in_its_row(backend: str, device: torch.device) -> None:
    v, g, dw = tensors(Case((4, 37), 0), torch.float32, device, 0)
    v[1, 5], v[2, 7] = NAN, INF
    w, dv, _ = everything(dk.weight_norm, v, g, dw, 0)
    assert w[1].isnan().all() and w[2, 7].isnan()
    assert torch.isfinite(w[[0, 3]]).all() and torch.isfinite(dv[[0, 3]]).all()


@pytest.mark.parametrize("shape, dim", [((0, 5), 0), ((5, 0), 0), ((0, 5), 1), ((5, 0), 1), ((0, 3), None)])
def test_empty(shape: tuple[int, ...], dim: int | None, backend: str, device: torch.device) -> None:
    v, g = torch.zeros(shape, device=device), torch.ones(g_shape(shape, dim), device=device)
    w, dv, dg = everything(dk.weight_norm, v, g, torch.zeros(shape, device=device), dim)
    assert w.shape == dv.shape == shape and dg.shape == g.shape and (dg == 0).all()


def test_only_one_wants_a_gradient(backend: str, device: torch.device) -> None:
    v, g, dw = tensors(Case((4, 9), 0), torch.float32, device, 0)
    _, dv, dg = everything(dk.weight_norm, v, g, dw, 0)
    only_v = v.clone().requires_grad_()
    only_g = g.clone().requires_grad_()
    assert_bitwise(torch.autograd.grad(dk.weight_norm(only_v, g), only_v, dw)[0], dv)
    assert_bitwise(torch.autograd.grad(dk.weight_norm(v, only_g), only_g, dw)[0], dg)


def test_the_weight_may_be_changed_in_place(backend: str, device: torch.device) -> None:
    """Nothing that the backward pass needs is kept in w."""
    v, g, dw = tensors(Case((4, 9), 0), torch.float32, device, 0)
    _, dv, dg = everything(dk.weight_norm, v, g, dw, 0)
    a, b = v.clone().requires_grad_(), g.clone().requires_grad_()
    w = dk.weight_norm(a, b)
    w.mul_(2)
    for actual, expected in zip(torch.autograd.grad(w, (a, b), dw / 2), (dv, dg), strict=True):
        assert_bitwise(actual, expected)


@pytest.mark.parametrize("shape, dim", [((2, 100_003), 0), ((3, 70_001, 1), 0), ((2000, 67), 1), ((50, 3, 3001), 1)])
def test_threads_do_not_change_a_bit(shape: tuple[int, ...], dim: int, device: torch.device) -> None:
    """Few long rows are shared by the threads; the sums are the same."""
    v, g, dw = tensors(Case(shape, dim), torch.float32, device, 0)
    one = everything(dk.weight_norm, v, g, dw, dim)
    exact = everything(plain, v.double(), g.double(), dw.double(), dim)
    for count in (2, 3):
        with num_threads(count), poisoned_empty():
            for a, e in zip(everything(dk.weight_norm, v, g, dw, dim), one, strict=True):
                assert_bitwise(a, e, f"{count} threads")
    for a, e in zip(one, exact, strict=True):
        assert_within_budget(a, e)


REJECTED: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("integers", lambda: (torch.ones(3, 4, dtype=torch.int64), torch.ones(3, 1), 0), TypeError, "`v` must be float32"),
    ("integer g", lambda: (torch.ones(3, 4), torch.ones(3, 1, dtype=torch.int32), 0), TypeError, "`g` must be"),
    ("no tensor", lambda: ([[1.0]], torch.ones(1, 1), 0), TypeError, "`v` must be a Tensor"),
    ("g no tensor", lambda: (torch.ones(3, 4), 1.0, None), TypeError, "`g` must be a Tensor"),
    ("g vector", lambda: (torch.ones(3, 4), torch.ones(3), 0), ValueError, r"= \(3, 1\), got \(3,\)"),
    ("g of other dim", lambda: (torch.ones(3, 4), torch.ones(1, 4), 0), ValueError, r"got \(1, 4\)"),
    ("g too long", lambda: (torch.ones(3, 4), torch.ones(4, 1), 0), ValueError, r"got \(4, 1\)"),
    ("g for whole", lambda: (torch.ones(3, 4), torch.ones(3, 1), None), ValueError, "one element"),
    ("g for -1", lambda: (torch.ones(3, 4), torch.ones(1, 4), -1), ValueError, "one element"),
    ("dim high", lambda: (torch.ones(3, 4), torch.ones(3, 1), 2), IndexError, r"in \[-2, 2\), got 2"),
    ("dim low", lambda: (torch.ones(3, 4), torch.ones(3, 1), -3), IndexError, "got -3"),
    ("dim float", lambda: (torch.ones(3, 4), torch.ones(3, 1), 0.0), TypeError, "`dim` must be an int"),
    ("mixed", lambda: (torch.ones(3, 4), torch.ones(3, 1).half(), 0), TypeError, "torch.float32 beside"),
    ("mixed halves", lambda: (torch.ones(3, 4).half(), torch.ones(3, 1).bfloat16(), 0), TypeError, "torch.float16 or"),
    ("devices", lambda: (torch.ones(3, 4), torch.ones(3, 1, device="meta"), 0), ValueError, "on the device of `v`"),
]


@pytest.mark.parametrize(
    ("make", "error", "message"), [r[1:] for r in REJECTED], ids=[r[0].replace(" ", "_") for r in REJECTED]
)
def test_rejects(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    """One line that says what was expected and what came; nothing is written."""
    v, g, dim = make()
    given = [t for t in (v, g) if isinstance(t, Tensor) and t.device.type == "cpu"]
    with unmodified(*given), pytest.raises(error, match=message) as caught:
        dk.weight_norm(v, g, dim)
    assert "\n" not in str(caught.value)


# Random shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.needs("hypothesis")
def test_any_shape(device: torch.device) -> None:
    from hypothesis import given
    from hypothesis import strategies as st

    @st.composite
    def cases(draw: Any) -> Case:
        shape = tuple(draw(st.lists(st.integers(1, 19), min_size=1, max_size=4)))
        return Case(shape, draw(st.none() | st.integers(-len(shape), len(shape) - 1)))

    @given(cases(), st.sampled_from((torch.float32, torch.bfloat16)), st.integers(0, 99))
    def holds(case: Case, dtype: torch.dtype, seed: int) -> None:
        v, g, dw = tensors(case, dtype, device, seed)
        exact = everything(plain, v.double(), g.double(), dw.double(), case.dim)
        eager = everything(plain, v, g, dw, case.dim)
        w, dv, dg = everything(dk.weight_norm, v, g, dw, case.dim)
        assert_within_budget(w, exact[0], eager[0])
        # The gradients may cancel: judged by the size of what is added up.
        eps = torch.finfo(dtype).eps
        dims = tuple(i for i in range(v.dim()) if case.dim in (None, -1) or i != case.dim % v.dim())
        n = exact[0].new_tensor(0) + (v.double().square().sum(dims, True).sqrt() if dims else v.double().abs())
        assert ((dv.double() - exact[1]).abs() <= 8 * eps * (g.double() / n).abs() * dw.double().abs().amax()).all()
        assert ((dg.double() - exact[2]).abs() <= 8 * eps * dw.double().norm()).all()

    holds()


# The parametrization --------------------------------------------------------------------------------------------------

weight_norm = dk.nn.utils.parametrizations.weight_norm
torchs = torch.nn.utils.parametrizations.weight_norm

LAYERS: dict[str, tuple[Callable[[], nn.Module], int | None, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), 0, (5, 6)),
    "linear whole": (lambda: nn.Linear(6, 4), None, (5, 6)),
    "linear inputs": (lambda: nn.Linear(6, 4, bias=False), 1, (5, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3), 0, (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 4, 3, groups=2), 0, (2, 6, 5, 7)),
    "transposed": (lambda: nn.ConvTranspose1d(6, 4, 3), 1, (2, 6, 9)),
    "transposed inputs": (lambda: nn.ConvTranspose2d(6, 4, 3), 0, (2, 6, 5, 4)),
}


def randomised(module: nn.Module) -> nn.Module:
    """Parameters of no particular length: g is not ||v||."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) + 0.1)
    return module


@pytest.mark.parametrize("name", LAYERS)
def test_parametrization_is_torchs(name: str) -> None:
    """Names, shapes, start, outputs, gradients, and the state_dict both ways."""
    make, dim, shape = LAYERS[name]
    torch.manual_seed(0)
    plain_layer = make()
    ours, theirs = weight_norm(copy.deepcopy(plain_layer), dim=dim), torchs(copy.deepcopy(plain_layer), dim=dim)
    x = torch.randn(shape)
    assert torch.allclose(ours(x), plain_layer(x), rtol=1e-5, atol=1e-6), "the start changes the layer"
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    for source, target in ((ours, theirs), (theirs, ours)):
        randomised(source)
        target.load_state_dict(source.state_dict(), strict=True)
        y, t = ours(x), theirs(x)
        assert torch.allclose(y, t, rtol=1e-5, atol=1e-5)
        for a, b in zip(
            torch.autograd.grad(y.square().sum(), list(ours.parameters())),
            torch.autograd.grad(t.square().sum(), list(theirs.parameters())),
            strict=True,
        ):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_old_names_load() -> None:
    old = randomised(torch.nn.utils.weight_norm(nn.Conv1d(3, 4, 2)))
    assert "weight_g" in old.state_dict()
    model = nn.Sequential(weight_norm(nn.Conv1d(3, 4, 2)))
    model.load_state_dict({f"0.{k}": v for k, v in old.state_dict().items()}, strict=True)
    x = torch.randn(2, 3, 5)
    assert torch.allclose(model(x), old(x), rtol=1e-5, atol=1e-5)


def test_other_parameters_and_removal() -> None:
    layer = weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    assert layer.parametrizations["weight_hh_l0"].original0.shape == (16, 1)
    layer = randomised(weight_norm(nn.Linear(3, 4)))
    w = layer.weight.detach().clone()
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is nn.Linear and isinstance(layer.weight, nn.Parameter)
    assert_bitwise(layer.weight.detach(), w)
    with pytest.raises(ValueError, match="nothing"):
        weight_norm(nn.Linear(3, 4), "nothing")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer = randomised(weight_norm(nn.Linear(30, 4))).to(dtype)
    v, g = layer.parametrizations.weight.original1, layer.parametrizations.weight.original0
    assert layer.weight.dtype == v.dtype == g.dtype == dtype
    eager = None if dtype == torch.float64 else plain(v, g, 0)
    assert_within_budget(layer.weight, plain(v.double(), g.double(), 0), eager)
    layer.weight.sum().backward()
    assert v.grad.dtype == dtype and g.grad.dtype == dtype


def test_copies_and_pickles() -> None:
    layer = randomised(weight_norm(nn.Linear(3, 4)))
    with torch.no_grad():
        w = layer.weight
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer.parametrizations["weight"][0]))):
        kept = twin if not isinstance(twin, nn.Linear) else twin.parametrizations["weight"][0]
        assert kept._kept is None and kept.dim == 0
    twin = copy.deepcopy(layer)
    assert_bitwise(twin.weight.detach(), w)
    with torch.no_grad():
        twin.parametrizations.weight.original0.mul_(2)
        assert_bitwise(layer.weight, w)
        assert torch.allclose(twin.weight, 2 * w)


def test_the_weight_is_kept_while_gradients_are_off() -> None:
    layer = randomised(weight_norm(nn.Linear(3, 4))).eval()
    _g, _v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    assert layer.weight is not layer.weight and layer.weight.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert layer.weight is layer.weight
            assert not layer.weight.is_inference() and not layer.weight.requires_grad
    with torch.no_grad():
        held = layer.weight
    assert layer.weight is not held and layer.weight.requires_grad  # with gradients: never


CHANGES: dict[str, Callable[[nn.Module, Tensor, Tensor], Any]] = {
    "v in place": lambda m, g, v: v.mul_(torch.tensor([[1.0, 2.0, 3.0]])),
    "g in place": lambda m, g, v: g.add_(1),
    "part of v": lambda m, g, v: v[0].copy_(torch.ones(3)),
    "v.data replaced": lambda m, g, v: setattr(v, "data", torch.randn(4, 3)),
    "g.data replaced": lambda m, g, v: setattr(g, "data", torch.randn(4, 1)),
    "load_state_dict": lambda m, g, v: m.load_state_dict(weight_norm(nn.Linear(3, 4)).state_dict()),
    "optimizer": lambda m, g, v: _step(m),
    "weight assigned": lambda m, g, v: setattr(m, "weight", torch.randn(4, 3)),
    "the kept weight itself": lambda m, g, v: m.weight.zero_(),
    "double": lambda m, g, v: m.double(),
    "through .data, then eval": lambda m, g, v: (v.data[0].neg_(), m.eval()),
}


def _step(m: nn.Module) -> None:
    optimizer = torch.optim.SGD(m.parameters(), 0.5)
    with torch.enable_grad():
        m(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str) -> None:
    layer = randomised(weight_norm(nn.Linear(3, 4))).eval()
    p = layer.parametrizations.weight
    with torch.no_grad():
        before = layer.weight.clone()
        CHANGES[name](layer, p.original0, p.original1)
        after = layer.weight
        assert torch.allclose(after, plain(p.original1, p.original0, 0), rtol=1e-5, atol=1e-6)
        if name not in ("the kept weight itself", "double"):
            assert not torch.allclose(after, before)
        assert layer.weight is after


def test_kept_weight_under_transforms_and_tracing() -> None:
    """functional_call, vmap over an ensemble, compile and export take the parameters they are given."""
    layer = randomised(weight_norm(nn.Linear(3, 4))).eval()
    x = torch.randn(2, 3)
    with torch.no_grad():
        kept = layer.weight
        other = {"parametrizations.weight.original0": torch.full((4, 1), 2.0)}
        y = torch.func.functional_call(layer, other, (x,))
        v = layer.parametrizations.weight.original1
        assert torch.allclose(y, x @ plain(v, torch.full((4, 1), 2.0), 0).T + layer.bias, atol=1e-5)
        many = {"parametrizations.weight.original0": torch.stack([torch.full((4, 1), 2.0), torch.full((4, 1), 3.0)])}
        stacked = torch.func.vmap(lambda p: torch.func.functional_call(layer, p, (x,)))(many)
        assert torch.allclose(stacked[0], y, atol=1e-6) and not torch.allclose(stacked[1], y)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), layer(x), atol=1e-6)
        assert_bitwise(layer.weight, kept)


# Data-dependent initialisation ----------------------------------------------------------------------------------------

init = dk.nn.utils.parametrizations.init_data_dependent


@pytest.mark.parametrize("make", [weight_norm, torchs], ids=["ours", "torchs"])
@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "transposed"])
def test_init_data_dependent(name: str, make: Any) -> None:
    """Every output unit has zero mean and the wished deviation over the batch, whatever stood there before."""
    build, dim, shape = LAYERS[name]
    layer = randomised(make(build(), dim=dim))
    v = layer.parametrizations.weight.original1.detach().clone()
    x = 3 * torch.randn(64, *shape[1:]) + 1
    y = init(layer, x, init_scale=1.5)
    assert_bitwise(layer.parametrizations.weight.original1.detach(), v, "v")
    y = y.movedim(-1 if name == "linear" else 1, -1).flatten(0, -2)
    assert y.mean(0).abs().max() < 1e-4
    assert (y.std(0, correction=0) - 1.5).abs().max() < 1e-4
    assert all(p.requires_grad and p.grad is None for p in layer.parameters())


def test_init_is_the_papers_formula() -> None:
    layer = randomised(weight_norm(nn.Linear(6, 4).double()))
    v, x = layer.parametrizations.weight.original1.detach(), torch.randn(30, 6, dtype=torch.float64) + 2
    t = x @ v.T / v.norm(dim=1)
    init(layer, x)
    g = 1 / (t.var(0, correction=0) + 1e-10).sqrt()
    assert torch.allclose(layer.parametrizations.weight.original0.detach().flatten(), g, rtol=1e-9)
    assert torch.allclose(layer.bias.detach(), -t.mean(0) * g, rtol=1e-9)


def test_init_of_a_network_goes_layer_by_layer() -> None:
    net = nn.Sequential(weight_norm(nn.Conv1d(3, 8, 3)), nn.ReLU(), weight_norm(nn.Conv1d(8, 4, 3, bias=False)))
    randomised(net)
    x = torch.randn(50, 3, 9)
    y = init(net, x)
    assert torch.allclose(net[0](x).mean((0, 2)), torch.zeros(8), atol=1e-5)
    assert torch.allclose(y.std((0, 2), correction=0), torch.ones(4), atol=1e-4)
    assert_bitwise(net(x), y)
    assert all(not m._forward_pre_hooks for m in net)


def test_init_rejects() -> None:
    with pytest.raises(ValueError, match="weight-normed"):
        init(nn.Linear(3, 4), torch.ones(2, 3))
    for layer in (weight_norm(nn.Linear(3, 4), dim=1), weight_norm(nn.Linear(4, 4), dim=None)):
        with pytest.raises(ValueError, match="one norm per output unit"):
            init(layer, torch.ones(2, layer.in_features))
    net = nn.Sequential(weight_norm(nn.Linear(3, 4)), weight_norm(nn.ConvTranspose1d(4, 4, 3)))
    before = {k: t.clone() for k, t in net.state_dict().items()}
    with pytest.raises(ValueError, match="ConvTranspose1d"):
        init(net, torch.randn(2, 3))
    for key, t in net.state_dict().items():
        assert_bitwise(t, before[key], key)


# Negative controls: each of these mistakes is noticed -----------------------------------------------------------------


class _Broken(torch.autograd.Function):
    """The formulas by hand, with one detail changed."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, g: Tensor, dim: int, flaw: str) -> Tensor:
        dims = tuple(i for i in range(v.dim()) if (i != dim) != (flaw == "wrong dim"))
        squares = v.square().sum(dims, keepdim=True)
        n = (squares + 1e-3 if flaw == "eps in the root" else squares).sqrt()
        ctx.save_for_backward(v, g, n)
        ctx.dim, ctx.flaw = dim, flaw
        return v * (g.abs() if flaw == "sign of g" else g) / n

    @staticmethod
    def backward(ctx: Any, dw: Tensor) -> Any:
        v, g, n = ctx.saved_tensors
        dims = tuple(i for i in range(v.dim()) if i != ctx.dim)
        product = (dw * v).sum(dims, keepdim=True)
        dg = product if ctx.flaw == "dg without 1/n" else product / n
        dv = g / n * (dw - (0 if ctx.flaw == "dv not orthogonal" else product / n / n) * v)
        if ctx.flaw == "gradient of one row":
            dv[-1] = dv[-1].flip(0)
        return dv, dg.reshape(g.shape) if dg.shape == g.shape else dg.sum_to_size(g.shape), None, None


FLAWS = (*("wrong dim", "eps in the root", "sign of g", "dg without 1/n", "dv not orthogonal", "gradient of one row"),)


@pytest.mark.parametrize("flaw", FLAWS)
def test_the_check_notices(flaw: str, device: torch.device) -> None:
    """The formulas by hand pass the check above; with one detail changed they do not."""
    case = Case((6, 6), 0)
    for dtype in (torch.float32, torch.float64):
        check(lambda v, g, dim: _Broken.apply(v, g, dim, ""), case, dtype, device)
        with pytest.raises(AssertionError):
            check(lambda v, g, dim: _Broken.apply(v, g, dim, flaw), case, dtype, device)
