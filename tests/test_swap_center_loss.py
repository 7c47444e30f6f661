"""Center losses of other people: which of them are known by what they compute, and that the fused ones compute it."""

from __future__ import annotations

import copy
import functools
import pickle
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlkernels._swap._center_loss import CONVENTIONS, forward_of, recognise
from dlkernels.testing import assert_bitwise, assert_within_budget

pytestmark = pytest.mark.filterwarnings("error")
K, D = 5, 3
F64 = torch.float64


class Centers(nn.Module):
    """What all of them have; the classes below each have a formula."""

    def __init__(self, num_classes: int = K, feat_dim: int = D, use_gpu: bool = False) -> None:
        super().__init__()
        self.num_classes, self.feat_dim, self.use_gpu = num_classes, feat_dim, use_gpu
        self.centers = nn.Parameter(torch.randn(num_classes, feat_dim))

    def squares(self, x: Tensor, labels: Tensor) -> Tensor:
        return (x - self.centers[labels]).square().sum(1)


class Masked(Centers):
    """All N x K distances in the expanded form, those to other classes masked, each clamped, their sum / N."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        rows = x.shape[0]
        distances = x.square().sum(1, keepdim=True) + self.centers.square().sum(1) - 2 * x @ self.centers.t()
        classes = torch.arange(self.num_classes)
        if self.use_gpu:
            classes = classes.cuda()
        own = labels[:, None].expand(rows, self.num_classes) == classes
        return (distances * own).clamp(1e-12, 1e12).sum() / rows


class MaskedUnclamped(Centers):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("classes", torch.arange(K))

    def forward(self, features: Tensor, target: Tensor, unused: Any = None) -> Tensor:
        own = target[:, None] == self.classes
        return (torch.cdist(features, self.centers).square() * own).sum() / len(features)


class HalfSum(Centers):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.squares(x, labels).sum() / 2


class Sum(Centers):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return (x - F.embedding(labels, self.centers)).pow(2).sum()


class HalfMean(Centers):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return 0.5 * (x - self.centers.index_select(0, labels)).square().sum() / x.size(0)


class MeanOfSquares(Centers):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(x, self.centers[labels])


class Buffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centers", torch.zeros(K, D))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (x - self.centers.detach()[y]).square().sum(1).mean()


class PlainTensor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centers = torch.randn(K, D)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(x, self.centers[y], reduction="sum") / 2


KNOWN: dict[type[nn.Module], tuple[str, str, str]] = {
    Masked: ("sum of squares / batch, distances of at least 1e-12", "left out", "left out"),
    MaskedUnclamped: ("sum of squares / batch", "left out", "left out"),
    HalfSum: ("half the sum of squares", "counted from the end", "refused"),
    Sum: ("sum of squares", "refused", "refused"),
    HalfMean: ("half the sum of squares / batch", "refused", "refused"),
    MeanOfSquares: ("mean of squares", "counted from the end", "refused"),
    Buffer: ("half the sum of squares / batch", "counted from the end", "refused"),
    PlainTensor: ("half the sum of squares", "counted from the end", "refused"),
}
known = pytest.mark.parametrize("cls", KNOWN, ids=lambda cls: cls.__name__)


def fused(module: nn.Module) -> nn.Module:
    """A copy whose class has the fused forward."""
    found = recognise(module)
    assert not isinstance(found, str), found
    other = copy.deepcopy(module)
    other.__class__ = type(f"Fused{type(module).__name__}", (type(module),), {"forward": found[0]})
    return other


def run(module: Any, x: Tensor, labels: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    loss = module(x, labels)
    wanted = [x, module.centers] if module.centers.requires_grad else [x]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


def converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    module = module.to(dtype)
    if "centers" in vars(module):
        module.centers = module.centers.to(dtype)
    return module


# Known ones -----------------------------------------------------------------------------------------------------------


def test_every_convention_is_tested() -> None:
    assert {convention for convention, _, _ in KNOWN.values()} == CONVENTIONS.keys()


@known
def test_known(cls: type[nn.Module]) -> None:
    found = recognise(cls())
    assert not isinstance(found, str), found
    forward, key = found
    convention, negative, beyond = KNOWN[cls]
    assert key == f"{convention}; labels below 0 {negative}, above {beyond}"
    assert forward_of(key) is forward
    with pytest.raises(ValueError, match="`key` must be what `recognise` returned"):
        forward_of("sum")


@known
@pytest.mark.parametrize("rows", [1, 6, 64])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_equal(cls: type[nn.Module], rows: int, scale: float) -> None:
    module = converted(cls(), F64)
    with torch.no_grad():
        module.centers.copy_(torch.randn(K, D, dtype=F64) * scale)
    ours = fused(module)
    x, labels = torch.randn(rows, D, dtype=F64) * scale, torch.randint(K, (rows,))
    for a, b in zip(run(ours, x, labels), run(module, x, labels), strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()
    for a, b in zip(run(ours, x, labels), run(module, x * 1.001, labels), strict=True):
        assert (a - b).norm() > 1e-6 * b.norm() * scale, "the comparison must be able to fail"


@known
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(cls: type[nn.Module], dtype: torch.dtype) -> None:
    """As near to the exact value as the module itself, and of its dtype."""
    module = converted(cls(), dtype)
    ours, exact = fused(module), converted(copy.deepcopy(module), F64)
    x, labels = torch.randn(20, D).to(dtype), torch.randint(K, (20,))
    if (cls is MaskedUnclamped and dtype != torch.float32) or (cls is Masked and dtype == torch.float16):
        with pytest.raises(RuntimeError):  # no cdist of such a dtype, no 1e12 in it
            module(x, labels)
        assert ours(x, labels).dtype == dtype
        return
    names = ("loss", "x.grad", "centers.grad")
    for what, a, b, c in zip(names, run(ours, x, labels), run(exact, x.double(), labels), run(module, x, labels)):
        assert a.dtype == c.dtype
        assert_within_budget(a, b, c, scalar=what == "loss", what=what)


def test_half_beside_float32_centers() -> None:
    module = HalfSum()
    x, labels = torch.randn(7, D, dtype=torch.bfloat16), torch.randint(K, (7,))
    ours, theirs = run(fused(module), x, labels), run(module, x, labels)
    assert [a.dtype for a in ours] == [b.dtype for b in theirs] == [torch.float32, torch.bfloat16, torch.float32]
    assert (ours[0] - theirs[0]).abs() <= 1e-6 * theirs[0]


@known
def test_labels(cls: type[nn.Module]) -> None:
    """Those that are no class are left out, counted from the end or refused, as in the module."""
    module = converted(cls(), F64)
    ours = fused(module)
    x = torch.randn(4, D, dtype=F64)
    for label in (-1, -K, -K - 1, -100, K, 200):
        labels = torch.tensor([0, label, 2, 2])
        try:
            theirs = run(module, x, labels)
        except (IndexError, RuntimeError):
            with pytest.raises(IndexError):
                run(ours, x, labels)
        else:
            for a, b in zip(run(ours, x, labels), theirs, strict=True):
                assert (a - b).norm() <= 1e-11 * b.norm(), label  # a row that is left out has 1e-12 too
    for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8):
        labels = torch.tensor([0, 1, 2, 2])
        same = zip(run(ours, x, labels.to(dtype)), run(ours, x, labels), strict=True)
        assert all(torch.equal(a, b) for a, b in same)


@known
def test_empty_batch(cls: type[nn.Module]) -> None:
    x, labels = torch.randn(0, D), torch.zeros(0, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = cls()
        a, b = fused(module)(x, labels), module(x, labels)
    assert torch.equal(a, b) or (bool(a.isnan() and b.isnan()))


def test_what_is_not_served_goes_to_its_own_forward() -> None:
    """Float labels, more than two dimensions, a third argument; and names work."""
    module = Masked().double()
    ours = fused(module)
    x, labels = torch.randn(4, D, dtype=F64), torch.tensor([0, 1, 2, 2])
    assert_bitwise(ours(x, labels.double()), module(x, labels.double()))
    assert_bitwise(ours(x=x, labels=labels), ours(x, labels))
    assert_bitwise(ours(x, labels=labels), ours(labels=labels, x=x))
    with pytest.raises(TypeError, match="y"):
        ours(x, y=labels)
    other = MaskedUnclamped().double()
    assert_bitwise(fused(other)(x, labels, 3), other(x, labels, 3))
    assert_bitwise(fused(other)(x, labels, unused=3), other(x, labels, unused=3))
    sequence = MeanOfSquares().double()
    x, labels = torch.randn(4, 6, D, dtype=F64), torch.randint(K, (4, 6))
    assert_bitwise(fused(sequence)(x, labels), sequence(x, labels))
    with pytest.raises(RuntimeError):
        ours(torch.randn(4, D + 1, dtype=F64), torch.zeros(4, dtype=torch.long))


def test_it_is_the_fused_loss_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from dlkernels._swap import _center_loss

    calls: list[int] = []
    original = _center_loss.center_loss
    monkeypatch.setattr(_center_loss, "center_loss", lambda *a, **k: calls.append(1) or original(*a, **k))
    fused(Masked())(torch.randn(4, D), torch.tensor([0, 1, 2, 2]))
    assert calls == [1]


@known
def test_compiled(cls: type[nn.Module]) -> None:
    """One graph, without a break."""
    module = fused(converted(cls(), F64))
    x, labels = torch.randn(6, D, dtype=F64), torch.randint(K, (6,))
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for a, b in zip(run(module, x, labels), [*run_compiled(compiled, module, x, labels)], strict=True):
        assert_bitwise(a, b)
    torch._dynamo.reset()


def run_compiled(compiled: Any, module: Any, x: Tensor, labels: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    loss = compiled(x, labels)
    wanted = [x, module.centers] if module.centers.requires_grad else [x]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


# How they are looked at -----------------------------------------------------------------------------------------------


def test_nothing_is_left_behind() -> None:
    """No hook is called, no number drawn, nothing of the module or of torch's state changed."""
    module = Masked()
    module.register_forward_hook(lambda *_: pytest.fail("a hook was called"))
    module.register_forward_pre_hook(lambda *_: pytest.fail("a hook was called"))
    module.eval()
    module.centers.requires_grad_(False)
    before, attributes = copy.deepcopy(module.state_dict()), dict(vars(module))
    states = torch.get_rng_state(), random.getstate()
    with torch.no_grad():
        assert not isinstance(recognise(module), str)
        assert not torch.is_grad_enabled()
    assert torch.equal(states[0], torch.get_rng_state()) and states[1] == random.getstate()
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(before["centers"], module.centers) and vars(module) == attributes
    assert module.centers.grad is None and not module.centers.requires_grad


@pytest.mark.parametrize("around", [
    torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta"),
])  # fmt: skip
def test_wherever_it_is_called(around: Callable[[], Any]) -> None:
    for module in (Masked(), MaskedUnclamped(), Buffer()):
        with around():
            assert not isinstance(recognise(module), str)


def test_before_it_is_materialised() -> None:
    with torch.device("meta"):
        module = Masked()
    assert not isinstance(recognise(module), str)


def test_a_module_for_gpus_is_probed_on_the_cpu() -> None:
    module = Masked(use_gpu=True)
    assert not isinstance(recognise(module), str) and module.use_gpu


def test_one_class_and_one_feature() -> None:
    for classes, features in ((1, 1), (1, 4), (2, 1), (1000, 2)):
        for cls in (Masked, HalfSum):
            assert not isinstance(recognise(cls(classes, features)), str), (classes, features)


# What is refused ------------------------------------------------------------------------------------------------------


class Margin(Centers):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return (self.squares(x, labels) - 0.02).relu().sum() / 2


class FarMargin(Centers):
    """Nothing to see of it where the centers are far apart."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        near = (0.5 - torch.pdist(self.centers)).relu().sum()
        return self.squares(x, labels).sum() / 2 + near


class Huber(Centers):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.smooth_l1_loss(x, self.centers[labels], reduction="sum")


class OtherDivisorForSmallBatches(Centers):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.squares(x, labels).sum() / 2 / max(len(x), 4)


class OtherDivisorForLargeBatches(Centers):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.squares(x, labels).sum() / 2 / min(len(x), 256)


class DividedByClasses(Centers):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.squares(x, labels).sum() / 2 / len(labels.unique())


class Weighted(Centers):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(K))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return (self.weight[labels] * self.squares(x, labels)).sum() / 2


class WeightedByCounts(Centers):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        counts = torch.bincount(labels, minlength=K)
        return (self.squares(x, labels) / counts[labels]).sum() / 2


class WeightOfOne(HalfSum):
    def __init__(self) -> None:
        super().__init__()
        self.loss_weight = 1.0

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss_weight * super().forward(x, labels)


class MovesItsCenters(Buffer):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = super().forward(x, y)
        if self.training:
            with torch.no_grad():
                self.centers[y] = 0.9 * self.centers[y] + 0.1 * x
        return loss


class Counts(HalfSum):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x, labels)


class Remembers(HalfSum):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.last = float(loss := super().forward(x, labels))
        return loss


class DetachedCenters(Centers):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return (x - self.centers.detach()[labels]).square().sum() / 2


class OwnGradient(Centers):
    """The centers' update of the paper in the place of a gradient."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
            ctx.save_for_backward(x, labels, centers)
            return (x - centers[labels]).square().sum() / 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            x, labels, centers = ctx.saved_tensors
            difference = x - centers[labels]
            counts = torch.ones(len(centers)).index_add(0, labels, torch.ones(len(x)))
            return (
                grad * difference,
                None,
                torch.zeros_like(centers).index_add(0, labels, -difference) / counts[:, None],
            )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.Function.apply(x, labels, self.centers)


class Distances(Centers):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return (x - self.centers[labels]).norm(dim=1).sum()


class Normalised(Centers):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return (F.normalize(x) - self.centers[labels]).square().sum() / 2


class Noisy(Centers):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.squares(F.dropout(x, 0.1, self.training), labels).sum() / 2


class OnlyInTraining(Centers):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.squares(x, labels).sum() / (2 if self.training else len(x))


class Background(Centers):
    """Class 0 does not count."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return (self.squares(x, labels) * (labels > 0)).sum() / 2


class PerRow(Centers):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.squares(x, labels) / 2


class LabelsFirst(Centers):
    def forward(self, labels: Tensor, x: Tensor) -> Tensor:
        return self.squares(x, labels).sum() / 2


class ThreeArguments(Centers):
    def forward(self, x: Tensor, labels: Tensor, weight: float) -> Tensor:
        return self.squares(x, labels).sum() / 2 * weight


class HasModule(HalfSum):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(D, D)


class HasParameter(HalfSum):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class ClampsLabels(Centers):
    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.squares(x, labels.clamp(0, K - 1)).sum() / 2


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.zeros(K))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return x.sum()


def replaced() -> nn.Module:
    module = HalfSum()
    module.forward = functools.partial(HalfSum.forward, module)
    return module


def large() -> nn.Module:
    with torch.device("meta"):
        return HalfSum(10**4, 10**4)


REFUSED: dict[Callable[[], nn.Module], str] = {
    Margin: "its value is that of no center loss that is known here",
    FarMargin: "its value is that of no center loss",
    Huber: "its value is that of no center loss",
    OtherDivisorForSmallBatches: "its value is that of no center loss",
    OtherDivisorForLargeBatches: "its value is that of no center loss",
    DividedByClasses: "its value is that of no center loss",
    Weighted: "its `weight` may take part in what it computes",
    WeightedByCounts: "its value is that of no center loss",
    WeightOfOne: "its `loss_weight` takes part in what it computes, and may change",
    MovesItsCenters: "its forward changes its state or its arguments",
    Counts: "its forward changes its state or its arguments",
    Remembers: "its forward changes its state or its arguments",
    DetachedCenters: "its value is half the sum of squares, but its gradient in the centers is not that of its value",
    OwnGradient: "its value is half the sum of squares, but its gradient in the centers is not that of its value",
    Distances: "its value is that of no center loss",
    Normalised: "its value is that of no center loss",
    Noisy: "its value is that of no center loss",
    OnlyInTraining: "its value is ",
    Background: "its value is that of no center loss",
    PerRow: "its forward gives a tensor of shape (6,), not a scalar",
    LabelsFirst: "its forward failed on a probe: IndexError: tensors used as indices must be",
    ThreeArguments: "its forward does not take features and labels, and nothing else that is required",
    HasModule: "it has a module of its own, `head`",
    HasParameter: "its `scale` may take part in what it computes",
    ClampsLabels: "it has a use of its own for labels outside of 0 to 4",
    Vector: "it has no `centers`, a floating-point matrix",
    functools.partial(nn.Linear, 2, 2): "it has no `centers`, a floating-point matrix",
    replaced: "its forward has been replaced",
    large: "its centers have 100000000 elements, and a probe takes from 1 to 10000000",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: getattr(make, "__name__", "Linear"))
def test_refused(make: Callable[[], nn.Module]) -> None:
    found = recognise(make())
    assert isinstance(found, str), f"taken for {found[1]}"
    assert found.startswith(REFUSED[make]) and "\n" not in found


def test_pickled() -> None:
    """The convention is enough to make the same forward again."""
    forward, key = recognise(Masked())
    assert forward_of(pickle.loads(pickle.dumps(key))) is forward
