"""torch.compile(backend="dlkernels"): focal loss, cross entropy and center loss in the ways that people write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _compiled import assert_equal, check, check_left, compiled, found, leaf, left, needs_kernels
from torch import Tensor

pytestmark = needs_kernels

N, K, D = 6, 5, 4


def hard_targets() -> Tensor:
    return (leaf(N, K, seed=3).detach() > 0.5).double()


def focal(
    x: Tensor, t: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """As detectors write it."""
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    p_t = p * t + (1 - p) * (1 - t)
    loss = ce * ((1 - p_t) ** gamma)
    if alpha >= 0:
        alpha_t = alpha * t + (1 - alpha) * (1 - t)
        loss = alpha_t * loss
    return reduction(loss) if reduction else loss


def focal_in_another_order(x: Tensor, t: Tensor) -> Tensor:
    """The factors first; methods; p_t the other way round."""
    prob = x.sigmoid()
    weight = (t * 0.25 + 0.75 * (1 - t)) * (1 - ((1 - t) * (1 - prob) + t * prob)).pow(2.0)
    return (F.binary_cross_entropy_with_logits(x, t, reduction="none") * weight).mean(1).sum() / 7


FOCAL: dict[str, tuple[Callable[..., Tensor], str]] = {
    "none": (focal, "none"),
    "mean": (lambda x, t: focal(x, t, reduction=torch.mean), "mean"),
    "sum": (lambda x, t: focal(x, t, reduction=lambda z: z.sum()), "sum"),
    "no alpha": (lambda x, t: focal(x, t, alpha=-1, reduction=torch.mean), "mean"),
    "gamma 1.5": (lambda x, t: focal(x, t, gamma=1.5, reduction=torch.sum), "sum"),
    "alpha 0.4": (lambda x, t: focal(x, t, alpha=0.4, reduction=torch.sum), "sum"),
    "another order": (focal_in_another_order, "none"),
    "per row": (lambda x, t: focal(x, t, reduction=lambda z: z.sum(1)), "none"),
}


@pytest.mark.parametrize("targets", [hard_targets, lambda: torch.rand(N, K, dtype=torch.float64)], ids=["hard", "soft"])
@pytest.mark.parametrize("name", FOCAL)
def test_focal(name: str, targets: Callable[[], Tensor]) -> None:
    function, reduction = FOCAL[name]
    check(function, leaf(N, K), targets(), replaced=[f"sigmoid_focal_loss, {reduction}"])


def with_parts(x: Tensor, t: Tensor) -> Any:
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    return (ce * (1 - (p * t + (1 - p) * (1 - t))) ** 2).mean(), p * 2


def wrong_sum(x: Tensor, t: Tensor) -> Tensor:
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    return (ce * (1 - (p * t + (1 - p) * (1 - p))) ** 2).mean()


def other_probability(x: Tensor, t: Tensor) -> Tensor:
    p = torch.sigmoid(2 * x)
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    return (ce * (1 - (p * t + (1 - p) * (1 - t))) ** 2).mean()


def by_exponential(x: Tensor, t: Tensor) -> Tensor:
    """Equal for hard targets only, which nothing in the graph says."""
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    return (ce * (1 - torch.exp(-ce)) ** 2).mean()


def weighted(x: Tensor, t: Tensor) -> Tensor:
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, t, weight=torch.full_like(t, 2.0), reduction="none")
    return (ce * (1 - (p * t + (1 - p) * (1 - t))) ** 2).mean()


FOCAL_NEAR: dict[str, tuple[Callable[..., Any], str | None]] = {
    "p is used elsewhere": (with_parts, "used elsewhere"),
    "another p_t": (wrong_sum, None),
    "another p": (other_probability, None),
    "exp(-ce)": (by_exponential, None),
    "weights": (weighted, "weights"),
    "cross entropy only": (lambda x, t: F.binary_cross_entropy_with_logits(x, t), None),
}


@pytest.mark.parametrize("name", FOCAL_NEAR)
def test_focal_near_miss(name: str) -> None:
    function, reason = FOCAL_NEAR[name]
    check_left(function, leaf(N, K), torch.rand(N, K, dtype=torch.float64), reason=reason)


def test_focal_with_unbalanced_alpha() -> None:
    """alpha t + beta (1 - t) with another beta than 1 - alpha is a factor like any other."""

    def function(x: Tensor, t: Tensor) -> Tensor:
        return ((0.25 * t + 0.8 * (1 - t)) * focal(x, t, alpha=-1)).mean()

    check(function, leaf(N, K), hard_targets(), replaced=["sigmoid_focal_loss, none"])


def test_focal_with_targets_that_want_a_gradient() -> None:
    check_left(focal, leaf(N, K), torch.rand(N, K, dtype=torch.float64).requires_grad_(), reason="targets")


# Cross entropy --------------------------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 4, 2, 2, 1, 3])
WEIGHT = torch.rand(K, dtype=torch.float64)
SOFT = torch.rand(N, K, dtype=torch.float64).softmax(1)

CROSS_ENTROPY: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: F.cross_entropy(x, LABELS),
    "module": lambda x: torch.nn.CrossEntropyLoss()(x, LABELS),
    "sum": lambda x: F.cross_entropy(x, LABELS, reduction="sum"),
    "none": lambda x: F.cross_entropy(x, LABELS, reduction="none"),
    "weight": lambda x: F.cross_entropy(x, LABELS, WEIGHT),
    "weight, none": lambda x: F.cross_entropy(x, LABELS, WEIGHT, reduction="none"),
    "ignore_index": lambda x: F.cross_entropy(x, LABELS, ignore_index=2),
    "smoothing": lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.1),
    "all": lambda x: F.cross_entropy(x, LABELS, WEIGHT, ignore_index=2, label_smoothing=0.1),
    "soft": lambda x: F.cross_entropy(x, SOFT),
    "soft, weight": lambda x: F.cross_entropy(x, SOFT, WEIGHT, label_smoothing=0.2),
    "one row": lambda x: F.cross_entropy(x[0], LABELS[0]),
}


@pytest.mark.parametrize("name", CROSS_ENTROPY)
def test_cross_entropy(name: str) -> None:
    check(CROSS_ENTROPY[name], leaf(N, K), replaced=["cross_entropy"])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_of_positions(reduction: str) -> None:
    labels = torch.randint(0, K, (2, 3, 4))
    check(
        lambda x: F.cross_entropy(x, labels, ignore_index=1, reduction=reduction),
        leaf(2, K, 3, 4),
        replaced=["cross_entropy"],
    )


NLL: dict[str, Callable[[Tensor], Tensor]] = {
    "nll": lambda x: F.nll_loss(F.log_softmax(x, dim=1), LABELS),
    "method": lambda x: F.nll_loss(x.log_softmax(-1), LABELS, WEIGHT, ignore_index=2),
    "sum": lambda x: F.nll_loss(torch.log_softmax(x, 1), LABELS, reduction="sum"),
}


@pytest.mark.parametrize("name", NLL)
def test_log_softmax_and_nll(name: str) -> None:
    check(NLL[name], leaf(N, K), replaced=["log_softmax + nll_loss"])


@pytest.mark.parametrize(("name", "reason"), [("used", "used elsewhere"), ("dim", None), ("none", None)])
def test_nll_near_miss(name: str, reason: str | None) -> None:
    def function(x: Tensor) -> Any:
        if name == "none":
            return F.nll_loss(x, LABELS)
        y = F.log_softmax(x, dim=1 if name == "used" else 0)
        return F.nll_loss(y, LABELS), y.sum()

    check_left(function, leaf(N, K), reason=reason)


def test_cross_entropy_near_misses() -> None:
    check_left(lambda x: F.cross_entropy(x, LABELS, reduce=False), leaf(N, K), reason="deprecated")
    check_left(lambda x, q: F.cross_entropy(x, q), leaf(N, K), SOFT.clone().requires_grad_(), reason="gradient")


def test_cross_entropy_of_logits_that_change_later() -> None:
    """torch keeps its own softmax for the backward pass; what the op keeps must not have changed by then."""

    def function(x: Tensor) -> Any:
        logits = x * 2
        loss = F.cross_entropy(logits, LABELS, reduction="none")
        return loss.sum(), logits.detach().mul_(3)

    check_left(function, leaf(N, K), reason="later")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cross_entropy_in_half_precision(dtype: torch.dtype) -> None:
    x = leaf(N, K).detach().to(dtype).requires_grad_()

    def function(x: Tensor) -> Tensor:
        return F.cross_entropy(x, LABELS)

    made = compiled(function)
    assert_equal(function, made, (x,), limit=8 * torch.finfo(dtype).eps)
    assert found() == ["cross_entropy"]


def test_cross_entropy_under_autocast() -> None:
    """The loss is float32 of bfloat16 logits, as autocast has it."""
    w = leaf(K, D, dtype=torch.float32)

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(F.linear(x, w), LABELS)

    made = compiled(function)
    assert_equal(function, made, (leaf(N, D, dtype=torch.float32),), limit=0.01)
    assert found() == ["cross_entropy"] and made(leaf(N, D, dtype=torch.float32)).dtype == torch.float32


def test_cross_entropy_dynamic() -> None:
    made = compiled(F.cross_entropy, dynamic=True)
    for n in (2, 5, 9):
        assert_equal(F.cross_entropy, made, (leaf(n, K), torch.arange(n) % K))
    assert found() == ["cross_entropy"]


# Center loss ----------------------------------------------------------------------------------------------------------

Y = torch.tensor([0, 2, 1, 1, 0, 2])

CENTER: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "index": (lambda x, c: ((x - c[Y]) ** 2).sum() / x.shape[0], "sum"),
    "half": (lambda x, c: 0.5 * (x - c[Y]).pow(2).sum(dim=1).mean(), "sum"),
    "embedding": (lambda x, c: (x - F.embedding(Y, c)).square().sum(-1).sum(), "sum"),
    "index_select": (lambda x, c: (x - c.index_select(0, Y)).pow(2).mean(), "sum"),
    "the other way": (lambda x, c: (torch.index_select(c, 0, Y) - x).pow(2).sum(1), "none"),
    "product": (lambda x, c: (lambda d: (d * d).sum())(x - c[Y]), "sum"),
    "mse_loss": (lambda x, c: F.mse_loss(x, c[Y]), "sum"),
    "mse_loss, sum": (lambda x, c: F.mse_loss(c[Y], x, reduction="sum") / 2, "sum"),
    "negative labels": (lambda x, c: (x - c[Y - 3]).pow(2).sum(), "sum"),
    "per row": (lambda x, c: (x - c[Y]).pow(2).sum(dim=(1,)), "none"),
}


@pytest.mark.parametrize("centers", ["gradient", "buffer"])
@pytest.mark.parametrize("name", CENTER)
def test_center(name: str, centers: str) -> None:
    function, reduction = CENTER[name]
    c = leaf(3, D, seed=1)
    check(
        function,
        leaf(N, D),
        c if centers == "gradient" else c.detach(),
        replaced=[f"center_loss, {reduction}"],
    )


def attention(x: Tensor, c: Tensor) -> Tensor:
    return ((x - c[Y]) ** 2 * x.sigmoid()).sum()


def shared(x: Tensor, c: Tensor) -> Any:
    d = x - c[Y]
    return (d**2).sum(), d * 1


CENTER_NEAR: dict[str, tuple[Callable[..., Any], str | None]] = {
    "weighed": (attention, "not summed"),
    "used elsewhere": (shared, "used elsewhere"),
    "over samples": (lambda x, c: ((x - c[Y]) ** 2).sum(0), "other dimensions"),
    "kept dimension": (lambda x, c: ((x - c[Y]) ** 2).sum(1, keepdim=True), "other dimensions"),
    "cube": (lambda x, c: ((x - c[Y]) ** 3).sum(), None),
    "sum of both": (lambda x, c: ((x + c[Y]) ** 2).sum(), None),
    "slice": (lambda x, c: ((x[:3] - c[0:3]) ** 2).sum(), None),
    "padding": (lambda x, c: ((x - F.embedding(Y, c, padding_idx=0)) ** 2).sum(), None),
    "two tensors": (lambda x, c: ((x - x.detach() * 2) ** 2).sum(), None),
}


@pytest.mark.parametrize("name", CENTER_NEAR)
def test_center_near_miss(name: str) -> None:
    function, reason = CENTER_NEAR[name]
    check_left(function, leaf(N, D), leaf(3, D, seed=1), reason=reason)


def test_centers_that_an_embedding_rescales() -> None:
    """max_norm changes the rows that are read, in place."""

    def function(x: Tensor, c: Tensor) -> Any:
        loss = ((x - c[Y]) ** 2).sum()
        return loss + F.embedding(Y, c, max_norm=0.5).sum()

    made = compiled(function)
    assert_equal(function, made, (leaf(N, D), 3 * leaf(3, D, seed=1).detach()))
    assert not found() and any("later" in reason for reason in left())


def test_centers_that_move_later() -> None:
    def function(x: Tensor, c: Tensor) -> Any:
        loss = ((x - c[Y]) ** 2).sum()
        with torch.no_grad():
            c.mul_(0.5)
        return loss

    made = compiled(function)
    assert_equal(function, made, (leaf(N, D), leaf(3, D, seed=1).detach()))
    assert not found() and any("later" in reason for reason in left())


def matrix(x: Tensor, labels: Tensor, centers: Tensor, least: float = 1e-12) -> Tensor:
    """Of the matrix of all distances, masked by the labels."""
    n, k = x.size(0), centers.size(0)
    distances = torch.pow(x, 2).sum(dim=1, keepdim=True).expand(n, k)
    distances = distances + torch.pow(centers, 2).sum(dim=1, keepdim=True).expand(k, n).t()
    distances = torch.addmm(distances, x, centers.t(), beta=1, alpha=-2)
    classes = torch.arange(k).long()
    mask = labels.unsqueeze(1).expand(n, k).eq(classes.expand(n, k))
    return (distances * mask.float()).clamp(min=least, max=1e12).sum() / n


def matrix_in_place(x: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    n, k = x.size(0), centers.size(0)
    distances = (
        x.pow(2).sum(dim=1, keepdim=True).expand(n, k) + centers.pow(2).sum(dim=1, keepdim=True).expand(k, n).t()
    )
    distances.addmm_(x, centers.t(), beta=1, alpha=-2)
    mask = labels.unsqueeze(1).expand(n, k).eq(torch.arange(k).expand(n, k))
    return (distances * mask).clamp(1e-12, 1e12).sum() / n


@pytest.mark.parametrize("function", [matrix, matrix_in_place])
def test_center_of_a_masked_matrix(function: Callable[..., Tensor]) -> None:
    what = "center_loss, from the matrix of all distances"
    check(function, leaf(N, D), Y, leaf(3, D, seed=1), replaced=[what])
    far = torch.tensor([0, 2, 1, 3, -1, 9])  # labels that have no column count as masked
    check(function, leaf(N, D), far, leaf(3, D, seed=1), replaced=[what])


def test_clamped_entries_of_a_masked_matrix() -> None:
    """A large lower limit makes the masked entries visible."""
    what = "center_loss, from the matrix of all distances"
    check(lambda x, y, c: matrix(x, y, c, 0.5), leaf(N, D), Y, leaf(3, D, seed=1), replaced=[what])


@pytest.mark.slow
def test_inductor() -> None:
    def function(x: Tensor, t: Tensor, c: Tensor) -> Any:
        return focal(x, t, reduction=torch.mean) + F.cross_entropy(x, LABELS) + ((x[:, :D] - c[Y]) ** 2).sum()

    check(
        function,
        leaf(N, K),
        hard_targets(),
        leaf(3, D, seed=1),
        replaced=["sigmoid_focal_loss, mean", "cross_entropy", "center_loss, sum"],
        then="inductor",
    )
