"""CenterLoss, IslandLoss, SparseCenterLoss: what they compute and how their centers move, against loops.

Every published convention is written here as its authors' text or code states it: row by row, in plain Python loops.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
from _layers import backend_fixture, rejects, saved
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import dlkernels as dk
from dlkernels import testing
from dlkernels.nn import CenterLoss, IslandLoss, SparseCenterLoss
from dlkernels.testing import assert_bitwise

backend = backend_fixture("center_loss")

K, D = 5, 7


class Batch(NamedTuple):
    x: Tensor
    y: Tensor
    a: Tensor


def batches(device: torch.device, dtype: torch.dtype = torch.float64, count: int = 3) -> list[Batch]:
    """Class 3 is never there, class 0 more often than others; one row is ignored, one is negative."""
    found = []
    for step in range(count):
        x = 1.5 * torch.randn(9, D, dtype=torch.float64) + 0.2
        y = torch.tensor([0, 1, 0, -100, 2, 4, 0, -1, 1 if step % 2 else 2])
        found.append(Batch(x.to(device, dtype), y.to(device), torch.rand(9, D, dtype=torch.float64).to(device, dtype)))
    return found


def start(device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(K, D, dtype=torch.float64) + 0.3).to(device, dtype)


def with_centers(module: nn.Module, centers: Tensor) -> nn.Module:
    module = module.to(centers.device, centers.dtype)
    with torch.no_grad():
        module.centers.copy_(centers)
    return module


def call(module: nn.Module, b: Batch, x: Tensor | None = None) -> Tensor:
    given = (b.x if x is None else x, b.y)
    return module(*given, b.a) if isinstance(module, SparseCenterLoss) else module(*given)


# The published rules, as loops ----------------------------------------------------------------------------------------


class Step(NamedTuple):
    loss: Tensor
    dx: Tensor
    centers: Tensor


def rows_of(y: Tensor, j: int | None = None) -> list[int]:
    return [i for i, label in enumerate(y.tolist()) if label >= 0 and (j is None or label == j)]


def wen(b: Batch, c: Tensor, alpha: float = 0.5, *, one: float = 1.0, half: float = 0.5, new: bool = False) -> Step:
    """Wen et al., eq. 2 to 4: sums, 1/2, 1 + n_j, the loss of the centers as they were."""
    moved = c.clone()
    for j in range(K):
        delta = torch.zeros_like(c[j])
        for i in rows_of(b.y, j):
            delta += c[j] - b.x[i]
        moved[j] = c[j] - alpha * delta / max(one + len(rows_of(b.y, j)), 1e-30)
    seen = moved if new else c
    loss, dx = torch.zeros_like(c[0, 0]), torch.zeros_like(b.x)
    for i in rows_of(b.y):
        difference = b.x[i] - seen[b.y[i]]
        loss, dx[i] = loss + half * difference.dot(difference), 2 * half * difference
    return Step(loss, dx, moved)


def caffe_face(b: Batch, c: Tensor, alpha: float = 0.5) -> Step:
    """The authors' layer: loss and dx over the batch size, the centers' difference over 1 + n_j and handed to SGD."""
    n = len(rows_of(b.y))
    loss, dx, centers = wen(b, c, alpha)
    return Step(loss / n, dx / n, centers)


def jxgu1016(b: Batch, c: Tensor, lr: float = 0.5) -> Step:
    """counts begin at 1; sum of squares / 2; the centers' 'gradient' sum(c - x) / counts goes to SGD."""
    counts, gradient = torch.ones_like(c[:, 0]), torch.zeros_like(c)
    loss, dx = torch.zeros_like(c[0, 0]), torch.zeros_like(b.x)
    for i in rows_of(b.y):
        j = int(b.y[i])
        counts[j] += 1
        gradient[j] += c[j] - b.x[i]
        loss, dx[i] = loss + (b.x[i] - c[j]).square().sum() / 2, b.x[i] - c[j]
    return Step(loss, dx, c - lr * gradient / counts[:, None])


def kaiyang_zhou(b: Batch, c: Tensor, lr: float = 0.5) -> Step:
    """All distances, those of other classes masked to 0, then clamped at 1e-12; over N, no 1/2; SGD on the gradient."""
    keep = rows_of(b.y)
    x, centers = b.x[keep].clone().requires_grad_(), c.clone().requires_grad_()
    loss = torch.zeros_like(c[0, 0])
    for row, i in enumerate(keep):
        for j in range(K):
            distance = (x[row] - centers[j]).square().sum() if int(b.y[i]) == j else torch.zeros_like(c[0, 0])
            loss = loss + distance.clamp(1e-12, 1e12) / len(keep)
    some, dc = torch.autograd.grad(loss, (x, centers))
    dx = torch.zeros_like(b.x)
    dx[keep] = some
    return Step(loss.detach(), dx, c - lr * dc)


def ema(b: Batch, c: Tensor, alpha: float = 0.5) -> Step:
    moved = c.clone()
    for j in range(K):
        if rows_of(b.y, j):
            moved[j] = (1 - alpha) * c[j] + alpha * torch.stack([b.x[i] for i in rows_of(b.y, j)]).mean(0)
    return caffe_face(b, c)._replace(centers=moved)


def dacl(b: Batch, c: Tensor, alpha: float = 0.5, *, weigh: bool = True) -> Step:
    """1/(2N) sum A (x - c)^2; the centers' difference is A (c - x) over 1 + n_j."""
    loss, dx, moved, n = torch.zeros_like(c[0, 0]), torch.zeros_like(b.x), c.clone(), len(rows_of(b.y))
    for i in rows_of(b.y):
        difference = b.x[i] - c[b.y[i]]
        for d in range(D):
            loss = loss + b.a[i, d] * difference[d] ** 2 / (2 * n)
            dx[i, d] = b.a[i, d] * difference[d] / n
        pull = b.a[i] * difference if weigh else difference
        moved[b.y[i]] += alpha * pull / (1 + len(rows_of(b.y, int(b.y[i]))))
    return Step(loss, dx, moved)


def pairs_of(c: Tensor) -> Tensor:
    """sum over j and k != j of cos(c_j, c_k) + 1."""
    return sum(
        c[j].dot(c[k]) / (c[j].norm() * c[k].norm()) + 1 for j in range(len(c)) for k in range(len(c)) if k != j
    )  # fmt: skip


def island(b: Batch, c: Tensor, alpha: float = 0.5, weight: float = 10.0, *, more: int = 0, over: int = K - 1) -> Step:
    """Cai et al., eq. 3 and 6: center loss over N, and a double loop over the pairs."""
    loss, dx, moved = caffe_face(b, c, alpha)
    moved = moved.clone()
    for j in range(K):
        for k in range(K):
            if k != j:
                nj, nk = c[j].norm(), c[k].norm()
                apart = c[k] / (nk * nj) - c[k].dot(c[j]) / (nk * nj**3) * c[j]
                moved[j] -= alpha * weight / over * apart
    return Step(loss + weight * (pairs_of(c) + more), dx, moved)


# The module, the loop, and what the published loss is of ours.
CONVENTIONS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Step], float]] = {
    "wen": (lambda: CenterLoss(K, D, reduction="sum"), wen, 1.0),
    "caffe_face": (lambda: CenterLoss(K, D), caffe_face, 1.0),
    "caffe_face_backward": (lambda: CenterLoss(K, D, update_in="backward"), caffe_face, 1.0),
    "jxgu1016": (lambda: CenterLoss(K, D, reduction="sum"), jxgu1016, 1.0),
    "kaiyang_zhou": (lambda: CenterLoss(K, D, update="grad"), kaiyang_zhou, 2.0),
    "ema": (lambda: CenterLoss(K, D, update="ema"), ema, 1.0),
    "dacl": (lambda: SparseCenterLoss(K, D), dacl, 1.0),
    "island": (lambda: IslandLoss(K, D), island, 1.0),
    "island_backward": (lambda: IslandLoss(K, D, update_in="backward"), island, 1.0),
}


def follows(
    module: nn.Module, loop: Callable[..., Step], times: float = 1.0, weight: float = 1.0, **flipped: Any
) -> None:
    """Three steps of training: loss, gradient and centers are the loop's; `weight` is that of the loss in a sum.

    Centers that are a Parameter are moved by SGD, with gradients over the weight, as published code has it.
    """
    device = module.centers.device
    c, scale = start(device), 1e-11
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5) if list(module.parameters()) else None
    with_centers(module, c)
    for step, b in enumerate(batches(device)):
        loss, dx, c = loop(b, c, **flipped)
        x = b.x.clone().requires_grad_()
        actual = times * call(module, b, x)
        (weight * actual).backward()
        if optimizer is not None:
            module.centers.grad /= weight
            optimizer.step()
            optimizer.zero_grad()
        assert abs(actual.item() - loss.item()) <= scale * abs(loss.item()), f"loss of step {step}"
        assert (x.grad - weight * dx).norm() <= scale * dx.norm(), f"gradient of step {step}"
        assert (module.centers - c).norm() <= scale * c.norm(), f"centers after step {step}"


@pytest.mark.parametrize("name", CONVENTIONS)
def test_published_rules(name: str, backend: str, device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("by design: the loops are compared in float64, which the CPU has")
    make, loop, times = CONVENTIONS[name]
    follows(make().double(), loop, times)
    follows(make().double(), loop, times, 0.003)  # the weight of the loss does not enter the update


FLIPS: list[tuple[str, str, dict[str, Any]]] = [
    ("n for 1 + n", "wen", {"one": 0.0}),
    ("no 1/2", "wen", {"half": 1.0}),
    ("the loss of the new centers", "wen", {"new": True}),
    ("the loss's weight in the update", "wen", {"alpha": 0.5 * 0.003}),
    ("an update without the attention", "dacl", {"weigh": False}),
    ("K more pairs", "island", {"more": K}),
    ("the exact gradient for the paper's term", "island", {"over": 0.5}),
    ("1 + n for n", "ema", {"rule": caffe_face}),
]


@pytest.mark.parametrize(("what", "name", "flip"), FLIPS, ids=[what for what, _, _ in FLIPS])
def test_a_changed_rule_is_noticed(what: str, name: str, flip: dict[str, Any]) -> None:
    make, loop, times = CONVENTIONS[name]
    flip = dict(flip)
    loop = flip.pop("rule", loop)
    with dk.backend("reference"):
        follows(make().double(), CONVENTIONS[name][1], times, 0.003)
        with pytest.raises(AssertionError, match=r"loss of|gradient of|centers after"):
            follows(make().double(), loop, times, 0.003, **flip)


def test_an_update_in_eval_is_noticed() -> None:
    """And a missing one while training."""
    with dk.backend("reference"):
        with pytest.raises(AssertionError, match="centers after step 0"):
            follows(CenterLoss(K, D).double().eval(), caffe_face)
        with pytest.raises(AssertionError, match="centers after step 0"):
            follows(CenterLoss(K, D).double(), lambda b, c: caffe_face(b, c)._replace(centers=c))
        follows(CenterLoss(K, D).double().eval(), lambda b, c: caffe_face(b, c)._replace(centers=c))


def test_published_island_values(backend: str, device: torch.device) -> None:
    """Some code zeroes the diagonal and adds 1 to it all the same: K more. Some counts each pair once."""
    c = start(device, torch.float32)
    b = batches(device, torch.float32)[0]
    loss = with_centers(IslandLoss(K, D, 1.0), c).eval()
    parts = loss(b.x, b.y, return_parts=True)
    assert parts.loss == parts.center + parts.pairs
    n = c / c.norm(dim=1, keepdim=True)
    cosines = n @ n.mT
    with_diagonal = (cosines - cosines.diag().diag() + 1).sum()
    assert abs(parts.pairs - (with_diagonal - K)) < 1e-4
    unordered = (torch.triu(cosines, 1) + torch.triu(torch.ones_like(cosines), 1)).sum()
    assert abs(parts.pairs - 2 * unordered) < 1e-4
    known = torch.tensor([[1.0, 0], [0, 2], [-3, 0]], device=device)
    small = with_centers(IslandLoss(3, 2, 1.0), known)
    assert small(known, torch.arange(3, device=device), return_parts=True).pairs == 4


# When the centers move ------------------------------------------------------------------------------------------------

MODULES: dict[str, Callable[..., nn.Module]] = {
    "center": lambda **more: CenterLoss(K, D, **more),
    "island": lambda **more: IslandLoss(K, D, 0.7, **more),
    "sparse": lambda **more: SparseCenterLoss(K, D, **more),
}
each_module = pytest.mark.parametrize("name", MODULES)


@each_module
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_training_and_eval_agree_on_the_loss(name: str, reduction: str, backend: str, device: torch.device) -> None:
    """The fused call gives the loss and the gradient of the plain one, of any reduction; eval leaves the centers."""
    b = batches(device, torch.float32)[0]
    module = with_centers(MODULES[name](reduction=reduction), start(device, torch.float32))
    before = module.centers.clone()
    found = []
    for training in (False, True):
        module.train(training)
        x = b.x.clone().requires_grad_()
        out = call(module, b, x)
        found.append(
            (
                out.detach(),
                *torch.autograd.grad(out, x, torch.linspace(0.5, 2, max(1, out.numel())).to(out).view(out.shape)),
            )
        )
        assert torch.equal(module.centers, before) is not training
    for actual, expected in zip(*found, strict=True):
        assert (actual - expected).norm() <= 1e-6 * expected.norm()


@each_module
def test_all_rules_of_all_modules(name: str, backend: str, device: torch.device) -> None:
    """`update_centers_` of the module, forward, and the function move the centers alike; and "grad" does not."""
    b = batches(device, torch.float32)[0]
    options = {"attention": b.a} if name == "sparse" else {"island_weight": 0.7} if name == "island" else {}
    for rule in ("alpha", "ema"):
        c = start(device, torch.float32)
        module = with_centers(MODULES[name](update=rule, alpha=0.3), c)
        call(module, b)
        expected = dk.update_centers_(c.clone(), b.x, b.y, 0.3, ema=rule == "ema", **options)
        assert_bitwise(module.centers, expected, f"{rule} in forward")
        module = with_centers(module, c).eval()
        module.update_centers_(b.x, b.y, *([b.a] if name == "sparse" else []))
        assert_bitwise(module.centers, expected, f"{rule} by hand")
    module = with_centers(MODULES[name](update="grad"), c)
    call(module, b).backward()
    assert_bitwise(module.centers, c, "grad in forward")
    assert module.centers.grad.abs().sum() > 0


def test_centers_move_without_a_graph(backend: str, device: torch.device) -> None:
    """As BatchNorm: in training mode under no_grad and inference_mode too."""
    b = batches(device, torch.float32)[0]
    for mode in (torch.no_grad, torch.inference_mode):
        module = with_centers(CenterLoss(K, D), start(device, torch.float32))
        before = module.centers.clone()
        with mode():
            assert not module(b.x, b.y).requires_grad
        assert not torch.equal(module.centers, before)


def test_a_graph_keeps_the_gradient_and_no_centers(backend: str, device: torch.device) -> None:
    """Forward twice, then backward: each gradient is that of the centers as its forward pass saw them."""
    first, second = batches(device, torch.float32, 2)
    for reduction in ("mean", "none"):
        module = with_centers(CenterLoss(K, D, reduction=reduction), start(device, torch.float32))
        xs = [b.x.clone().requires_grad_() for b in (first, second)]
        seen, losses = [], []
        for x, b in zip(xs, (first, second), strict=True):
            seen.append(module.centers.clone())
            losses.append(module(x, b.y).sum())
        assert module.centers.data_ptr() not in [t.data_ptr() for t in saved(partial(module, xs[0], first.y))]
        for x, b, c, loss in zip(xs, (first, second), seen, losses, strict=True):
            kept = x.clone().detach().requires_grad_()
            (expected,) = torch.autograd.grad(dk.center_loss(kept, b.y, c, reduction=reduction).sum(), kept)
            (actual,) = torch.autograd.grad(loss, x)
            assert (actual - expected).norm() <= 1e-6 * expected.norm()


@each_module
def test_update_in_backward(name: str, backend: str, device: torch.device) -> None:
    """Nothing moves before the backward pass nor without one; a retained graph moves the centers once."""
    b = batches(device, torch.float32)[0]
    module = with_centers(MODULES[name](update_in="backward"), start(device, torch.float32))
    plain = copy.deepcopy(module)
    plain.update_in = "forward"
    before = module.centers.clone()
    with torch.no_grad():
        call(module, b)
    assert not call(module, b).requires_grad
    x = b.x.clone().requires_grad_()
    loss = call(module, b, x)
    assert_bitwise(module.centers, before, "centers after forward")
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    twin = b.x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(call(plain, b, twin), twin)
    assert_bitwise(first, expected, "gradient")
    assert_bitwise(module.centers, plain.centers, "centers after backward")
    (again,) = torch.autograd.grad(loss, x)
    assert_bitwise(again, expected, "second gradient")
    assert_bitwise(module.centers, plain.centers, "centers after a second backward")
    module.eval()
    call(module, b, x).backward()
    assert_bitwise(module.centers, plain.centers, "centers after eval")


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_activation_checkpointing(reentrant: bool, backend: str, device: torch.device) -> None:
    """Checkpointing runs forward twice: the centers move once with update_in="backward", and twice without."""
    b = batches(device, torch.float32)[0]
    layer = nn.Linear(D, D, device=device)
    c = start(device, torch.float32)
    moved, gradients = {}, {}
    for when in ("backward", "forward", "plain"):
        module = with_centers(CenterLoss(K, D, update_in="forward" if when == "plain" else when), c)
        x = b.x.clone().requires_grad_()

        def step(x: Tensor, module: nn.Module = module) -> Tensor:
            return module(layer(x), b.y).square()  # kept after the loss: the second run goes past it

        loss = step(x) if when == "plain" else checkpoint(step, x, use_reentrant=reentrant)
        (gradients[when],) = torch.autograd.grad(loss, x) if not reentrant else (loss.backward(), x.grad)[1:]
        moved[when] = module.centers
    assert_bitwise(moved["backward"], moved["plain"], "centers")
    assert_bitwise(gradients["backward"], gradients["plain"], "gradient")
    assert not torch.equal(moved["forward"], moved["plain"])


# Copies, checkpoints, precision ---------------------------------------------------------------------------------------


@each_module
def test_checkpoints_go_between_rules(name: str) -> None:
    """One key, `centers`, whether it is a buffer or a Parameter; and that of a module with a Parameter of its own."""
    published = nn.Module()
    published.centers = nn.Parameter(torch.randn(K, D))
    sources = [MODULES[name](update=rule) for rule in ("alpha", "ema", "grad")]
    for source in (*sources, published):
        assert list(source.state_dict()) == ["centers"]
        for rule in ("alpha", "ema", "grad"):
            target = MODULES[name](update=rule)
            target.load_state_dict(source.state_dict(), strict=True)
            assert_bitwise(target.centers, source.centers, "loaded centers")
            assert isinstance(target.centers, nn.Parameter) is (rule == "grad")
            assert list(dict(target.named_buffers())) == ([] if rule == "grad" else ["centers"])


@each_module
def test_copies(name: str, device: torch.device) -> None:
    module = MODULES[name](alpha=0.25, update="ema", reduction="sum", update_in="backward").to(device)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)):
        assert repr(twin) == repr(module)
        assert twin.centers.data_ptr() != module.centers.data_ptr()
        assert_bitwise(twin.centers, module.centers, "copied centers")
    assert "update='ema', alpha=0.25, update_in='backward', reduction='sum'" in repr(module)
    module.process_group = group = object()
    assert copy.deepcopy(module).process_group is group
    with pytest.raises(TypeError, match="process_group"):
        pickle.dumps(module)


def test_initialisation(device: torch.device) -> None:
    drawn = CenterLoss(500, 40, device=device).centers
    assert abs(drawn.mean()) < 0.05 and abs(drawn.std() - 1) < 0.05
    assert CenterLoss(2, 3, dtype=torch.bfloat16).centers.dtype == torch.bfloat16
    assert CenterLoss(2, 3, device="meta").centers.is_meta
    torch.manual_seed(7)
    module = CenterLoss(K, D, device=device)
    before = module.centers.clone()
    b = batches(device, torch.float32)[0]
    module(b.x, b.y)
    torch.manual_seed(7)
    module.reset_parameters()
    assert_bitwise(module.centers, before, "reset centers")


@pytest.mark.parametrize("rule", ["alpha", "grad"])
def test_init_centers(rule: str, backend: str, device: torch.device) -> None:
    b = batches(device, torch.float32)[0]
    module = CenterLoss(K, D, update=rule).to(device)
    before = module.centers.detach().clone()
    module.init_centers_(b.x, b.y)
    for j in range(K):
        rows = rows_of(b.y, j)
        expected = b.x[rows].mean(0) if rows else before[j]
        assert (module.centers[j] - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """float32 centers beside half-precision features, as autocast makes them, move as those in float32 do."""
    b = batches(device, dtype)[0]
    c = start(device, torch.float32)
    module, wide = (with_centers(CenterLoss(K, D), c) for _ in range(2))
    linear = nn.Linear(D, D, device=device)
    with torch.autocast(device.type, dtype):
        features = linear(b.x.float())
        loss = module(features, b.y)
    assert features.dtype == dtype and module.centers.dtype == loss.dtype == torch.float32
    loss.backward()
    assert torch.isfinite(linear.weight.grad).all()
    wide(features.detach().float(), b.y)
    assert (module.centers - wide.centers).norm() <= 1e-6 * wide.centers.norm()
    rounded = module.to(dtype)
    assert rounded.centers.dtype == dtype and rounded(b.x, b.y).dtype == torch.float32
    assert CenterLoss(K, D, device=device).to(dtype).float()(b.x, b.y).dtype == torch.float32


def test_rejects() -> None:
    for error, make, words in (
        (ValueError, lambda: CenterLoss(0, 3), ("num_classes", "0")),
        (TypeError, lambda: CenterLoss(3, 2.0), ("feat_dim", "float")),
        (ValueError, lambda: CenterLoss(3, 2, alpha=1.5), ("alpha", "1.5")),
        (ValueError, lambda: CenterLoss(3, 2, update="sgd"), ("update", "'ema'", "'sgd'")),
        (ValueError, lambda: CenterLoss(3, 2, update_in="step"), ("update_in", "'backward'", "'step'")),
        (ValueError, lambda: CenterLoss(3, 2, reduction="avg"), ("reduction", "'avg'")),
        (ValueError, lambda: CenterLoss(3, 2, update="grad", update_in="backward"), ("update_in", "optimizer")),
        (ValueError, lambda: CenterLoss(3, 2, update="grad", process_group=object()), ("process_group", "optimizer")),
        (TypeError, lambda: CenterLoss(3, 2, ignore_index=1.0), ("ignore_index", "float")),
        (TypeError, lambda: CenterLoss(3, 2, dtype=torch.int32), ("centers", "int32")),
        (ValueError, lambda: IslandLoss(3, 2, -1.0), ("island_weight", "-1")),
        (TypeError, lambda: IslandLoss(3, 2, "ten"), ("island_weight", "str")),
    ):
        rejects(error, make, words)
    with dk.backend("reference"):
        module, x = CenterLoss(3, 2), torch.zeros(4, 2)
        before = module.centers.clone()
        for error, y in (
            (IndexError, torch.tensor([0, 1, 2, 3])),
            (TypeError, torch.zeros(4)),
            (ValueError, torch.zeros(3).long()),
        ):
            with pytest.raises(error):
                module(x, y)
        sparse = SparseCenterLoss(3, 2)
        with pytest.raises(ValueError, match="attention_logits"):
            sparse(x, torch.zeros(4).long(), x + 2)
        assert_bitwise(module.centers, before, "centers after errors")


@each_module
@pytest.mark.parametrize("rule", ["alpha", "grad"])
def test_compiled_training_step(name: str, rule: str, device: torch.device) -> None:
    """fullgraph, with the update inside, for any number of batch sizes in two compilations."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    c = start(device, torch.float32)
    eager = with_centers(MODULES[name](update=rule), c)
    module = copy.deepcopy(eager)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for n in (9, 7, 5, 8):
        b = Batch(*(t[:n] for t in batches(device, torch.float32, 1)[0]))
        found = []
        for f, owner in ((eager, eager), (compiled, module)):
            x = b.x.clone().requires_grad_()
            loss = f(x, b.y, b.a) if name == "sparse" else f(x, b.y)
            loss.backward()
            found.append((loss.detach(), x.grad, owner.centers.detach()))
        for expected, actual in zip(*found, strict=True):
            assert (actual - expected).norm() <= 1e-6 * expected.norm()
    assert counter.frame_count <= 2
    assert torch.equal(module.centers, c) is (rule == "grad")


# The update as an operator: a mutation has a contract too -------------------------------------------------------------

UPDATES: dict[str, dict[str, Any]] = {
    "alpha": {},
    "ema": {"ema": True},
    "island": {"island_weight": 0.7},
    "attention": {"attention": True},
    "logits": {"attention": True, "attention_logits": True, "island_weight": 0.1},
}


def update(c: Tensor, b: Batch, attention: bool = False, **options: Any) -> Tensor:
    return dk.update_centers_(c, b.x, b.y, 0.3, attention=b.a if attention else None, **options)


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("name", UPDATES)
def test_update_opcheck(name: str, device: torch.device) -> None:
    """Schema and fake: only the centers change, and nothing is returned."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        if dtype == torch.float64 and device.type != "cpu":
            continue
        b, c = batches(device, dtype)[0], start(device, dtype)
        options = UPDATES[name]
        a = b.a if options.get("attention") else None
        rule = (
            options.get("attention_logits", False),
            0.3,
            options.get("ema", False),
            options.get("island_weight", 0.0),
        )
        torch.library.opcheck(
            torch.ops.dlkernels.update_centers_.default, (c, b.x, b.y, a, *rule, -100),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip


@pytest.mark.parametrize("name", UPDATES)
def test_update_contract(name: str, backend: str, device: torch.device) -> None:
    """Rounded once from float64, in place, returns its argument, leaves the inputs alone, the same to the bit again."""
    options = UPDATES[name]
    for dtype in (torch.float32, torch.bfloat16):
        b, c = batches(device, dtype)[0], start(device, dtype)
        moved = c.clone()
        with testing.unmodified(*b):
            assert update(moved, b, **options) is moved
        with testing.poisoned_empty():
            assert_bitwise(update(c.clone(), b, **options), moved, "second run")
        with dk.backend("reference"):
            exact = update(c.cpu().double(), Batch(b.x.cpu().double(), b.y.cpu(), b.a.cpu().double()), **options)
        testing.assert_within_budget(moved.cpu(), exact)
        wide = torch.full((K + 2, D), 7.0, dtype=dtype, device=device)
        inside = wide[1:-1].copy_(c)
        assert_bitwise(update(inside, b, **options), moved, "centers inside a larger tensor")
        assert (wide[0] == 7).all() and (wide[-1] == 7).all()


def test_update_is_noticed_by_a_graph_that_saved_the_centers(backend: str, device: torch.device) -> None:
    b, c = batches(device, torch.float32)[0], start(device, torch.float32)
    for centers in (c.clone(), nn.Parameter(c.clone())):
        x = b.x.clone().requires_grad_()
        loss = ((x - centers[b.y.clamp(min=0)]) * centers[b.y.clamp(min=0)]).sum() + (centers * x[:K]).sum()
        version = centers._version
        update(centers, b)
        assert centers._version > version
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        assert centers.grad is None and not (centers.requires_grad and not centers.is_leaf)


def test_update_changes_nothing_after_an_error(backend: str, device: torch.device) -> None:
    b, c = batches(device, torch.float32)[0], start(device, torch.float32)
    before = c.clone()
    bad = b.y.clone()
    bad[-1] = K
    wrong: list[tuple[type[Exception], Callable[[], Any]]] = [
        (ValueError, lambda: dk.update_centers_(c, b.x, b.y, 1.5)),
        (ValueError, lambda: dk.update_centers_(c, b.x, b.y, island_weight=-1.0)),
        (ValueError, lambda: dk.update_centers_(c, b.x[:, :-1], b.y)),
        (ValueError, lambda: dk.update_centers_(c, b.x, b.y[:-1])),
        (ValueError, lambda: dk.update_centers_(c.mT.contiguous().mT, b.x, b.y)),
        (TypeError, lambda: dk.update_centers_(c, b.x.double(), b.y)),
        (TypeError, lambda: dk.update_centers_(c, b.x, b.x[:, 0])),
        (ValueError, lambda: dk.update_centers_(c, b.x, b.y, attention=b.a[:, 1:])),
    ]
    if device.type == "cpu":
        wrong.append((IndexError, lambda: dk.update_centers_(c, b.x, bad)))
        wrong.append((ValueError, lambda: dk.update_centers_(c, b.x, b.y, attention=b.a + 1)))
    for error, run in wrong:
        with pytest.raises(error):
            run()
        assert_bitwise(c, before, "centers after an error")


def test_update_compiles(device: torch.device) -> None:
    torch._dynamo.reset()
    b, c = batches(device, torch.float32)[0], start(device, torch.float32)
    for options in UPDATES.values():
        expected = update(c.clone(), b, **options)
        moved = c.clone()
        torch.compile(lambda c, o=options: update(c, b, **o), backend="aot_eager", fullgraph=True)(moved)
        assert (moved - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.needs("cpp")
def test_update_reads_no_value(device: torch.device) -> None:
    """Fake tensors have no values: an .item() on the way raises. So a CUDA graph can hold the step."""
    with FakeTensorMode() as mode:
        b = Batch(*(mode.from_tensor(t) for t in batches(device, torch.float32)[0]))
        c = mode.from_tensor(start(device, torch.float32))
        for name, options in UPDATES.items():
            if name != "attention" or device.type != "cpu":  # its values in [0, 1] are checked on CPUs
                update(c, b, **options)


@pytest.mark.gpu
@each_module
def test_training_step_in_a_cuda_graph(name: str, device: torch.device) -> None:
    """Loss, gradient and update captured once, replayed with other values; nothing waits for the device."""
    b, other = batches(device, torch.float32, 2)
    eager = with_centers(MODULES[name](), start(device, torch.float32))
    module = copy.deepcopy(eager)
    static = Batch(b.x.clone().requires_grad_(), b.y.clone(), b.a.clone())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            torch.autograd.grad(call(module, static), static.x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = call(module, static)
        (dx,) = torch.autograd.grad(loss, static.x)
    with torch.no_grad():
        module.centers.copy_(eager.centers)
        for s, t in zip(static, other, strict=True):
            s.copy_(t)
    graph.replay()
    x = other.x.clone().requires_grad_()
    expected = call(eager, other, x)
    for actual, wanted in ((loss, expected), (dx, *torch.autograd.grad(expected, x)), (module.centers, eager.centers)):
        assert_bitwise(actual.detach(), wanted.detach(), "replayed step")
