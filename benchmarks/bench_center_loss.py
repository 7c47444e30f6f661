"""Center-loss family: center, sparse center and island loss, with and without the centers' update.

    pytest benchmarks/bench_center_loss.py                          the quick set, table at the end
    FULL=1 pytest benchmarks/bench_center_loss.py -k 1000000        a million classes, selected by name

The shape is that of the features (N, D); `classes` is K. With `update=True` a call is a training step of the paper: the
loss, its gradient and the centers moved, in place from call to call; the check against float64 hands every candidate
the same centers and compares those that come out too. With `centers=True` the centers take the exact gradient.

Bytes are minimal: features read once, their gradient written once, the centers of the classes present read once, and
written once where they move or take a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Case, Family, Function, Peer, both
from torch import Tensor

import dlkernels as dk
from dlkernels.ops.center_loss import loss_and_update

BF16, FP16 = torch.bfloat16, torch.float16
CENTER, SPARSE, ISLAND = "center_loss", "sparse_center_loss", "island_loss"
ALPHA, ISLAND_WEIGHT = 0.5, 10.0


# Inputs and minimal bytes ---------------------------------------------------------------------------------------------


def inputs(case: Case, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    """(features[, attention][, centers], labels[, centers]): what takes a gradient comes first."""
    n, d = case.shape
    k = case.option("classes")
    x = torch.randn(n, d, device=device, generator=generator).to(case.dtype)
    y = torch.randint(k, (n,), device=device, generator=generator)
    if case.option("one_class"):
        y = y.clamp(max=0)
    c = torch.randn(k, d, device=device, generator=generator)  # float32 beside half-precision features too
    if case.op == SPARSE:
        return x, torch.rand(n, d, device=device, generator=generator).to(case.dtype), y, c
    return (x, c, y) if _learns(case) else (x, y, c)


def _learns(case: Case) -> bool:
    return case.op == ISLAND or case.option("centers", False)


def draws(case: Case, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Weights with which the check looks at the centers after an update."""
    if not case.option("update"):
        return ()
    return (torch.rand(case.option("classes"), 1, device=device, generator=generator),)


def _present(case: Case) -> int:
    """Bytes of the centers that a batch can touch; all of them where the island moves them."""
    rows = case.option("classes") if case.op == ISLAND else min(case.shape[0], case.option("classes"))
    return 4 * rows * case.shape[1]


def bytes_fwd(case: Case) -> int:
    """Read features, attention, labels and centers, write the loss; with an update write the centers."""
    features = case.numel * case.itemsize * (2 if case.op == SPARSE else 1)
    loss = 4 * case.shape[0] if case.reduction == "none" else 4
    return features + 8 * case.shape[0] + _present(case) * (2 if case.option("update") else 1) + loss


def bytes_bwd(case: Case) -> int:
    """Write the gradients; those in the centers, and of reduction "none", are made from all inputs read again."""
    gradients = case.numel * case.itemsize * (2 if case.op == SPARSE else 1)
    if _learns(case):
        gradients += 4 * case.option("classes") * case.shape[1]
    again = bytes_fwd(case) if _learns(case) or case.reduction == "none" else 0
    return gradients + again


# Candidates -----------------------------------------------------------------------------------------------------------


def ours(case: Case) -> Function:
    reduction = case.reduction
    if case.option("update"):

        def step(x: Tensor, *rest: Tensor) -> Tensor:
            a, y, c, seen = _parts(case, rest)
            loss = loss_and_update(x, y, c, a, False, reduction, -100, ALPHA, False, 0.0)
            return _looked_at(loss, c, seen)

        return step
    if case.op == SPARSE:
        return lambda x, a, y, c: dk.sparse_center_loss(x, y, c, a, reduction=reduction)
    if case.op == ISLAND:
        return lambda x, c, y: dk.island_loss(x, y, c, ISLAND_WEIGHT, reduction=reduction)
    if _learns(case):
        return lambda x, c, y: dk.center_loss(x, y, c, reduction=reduction)
    return lambda x, y, c: dk.center_loss(x, y, c, reduction=reduction)


def _parts(case: Case, rest: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
    """Attention, labels, the centers to move, and in the check the weights with which these are looked at."""
    a, rest = (rest[0], rest[1:]) if case.op == SPARSE else (None, rest)
    y, c = rest[:2]
    seen = rest[2] if len(rest) > 2 else None
    return a, y, c if seen is None else c.clone(), seen


def _looked_at(loss: Tensor, centers: Tensor, seen: Tensor | None) -> Tensor:
    return loss if seen is None else loss + (seen * centers).mean()


def _rows(x: Tensor, y: Tensor, c: Tensor, a: Tensor | None = None) -> Tensor:
    squares = (x - c[y]).square()
    return 0.5 * (squares if a is None else a * squares).sum(1)


def _reduced(rows: Tensor, reduction: str | None) -> Tensor:
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()


@torch.no_grad()
def _eager_update(x: Tensor, y: Tensor, c: Tensor, a: Tensor | None) -> None:
    """Wen et al., eq. 4, by scattered sums: over all classes, or where most are absent over those present."""
    pulls = c[y] - x
    pulls = pulls if a is None else a * pulls
    if c.shape[0] <= x.shape[0]:
        sums = torch.zeros_like(c).index_add_(0, y, pulls)
        if c.is_cuda:  # where bincount waits for the device, and no graph can hold it
            counts = y.new_zeros(c.shape[0]).index_add_(0, y, y.new_ones(len(y)))
        else:
            counts = torch.bincount(y, minlength=c.shape[0])
        c -= ALPHA * sums / (1 + counts[:, None])
        return
    present, inverse, counts = y.unique(return_inverse=True, return_counts=True)
    sums = c.new_zeros(len(present), c.shape[1]).index_add_(0, inverse, pulls)
    c.index_add_(0, present, -ALPHA * sums / (1 + counts[:, None]))


def _pairs(c: Tensor) -> Tensor:
    """The K x K matrix of cosines."""
    n = torch.nn.functional.normalize(c)
    cosines = n @ n.T
    return (cosines + 1).sum() - (cosines.diagonal() + 1).sum()


def eager(case: Case) -> Function:
    if case.option("update"):

        def step(x: Tensor, *rest: Tensor) -> Tensor:
            a, y, c, seen = _parts(case, rest)
            loss = _reduced(_rows(x, y, c, a), case.reduction)
            _eager_update(x, y, c, a)
            return _looked_at(loss, c, seen)

        return step
    if case.op == SPARSE:
        return lambda x, a, y, c: _reduced(_rows(x, y, c, a), case.reduction)
    if case.op == ISLAND:
        return lambda x, c, y: _reduced(_rows(x, y, c), case.reduction) + ISLAND_WEIGHT * _pairs(c)
    if _learns(case):
        return lambda x, c, y: _reduced(_rows(x, y, c), case.reduction)
    return lambda x, y, c: _reduced(_rows(x, y, c), case.reduction)


def _distance_matrix(case: Case) -> Function | None:
    """All distances of rows and centers, (N, K), and a mask: the widespread way of writing it."""
    if case.op != CENTER or case.option("update") or _learns(case) or case.reduction != "mean":
        return None

    def function(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
        squares = x.square().sum(1, keepdim=True) + c.square().sum(1) - 2 * x.to(c.dtype) @ c.T
        mask = y[:, None] == torch.arange(c.shape[0], device=c.device)
        return 0.5 * (squares * mask).sum() / x.shape[0]

    return function


PEERS = (Peer("distance matrix", "torch", _distance_matrix),)


# Cases ----------------------------------------------------------------------------------------------------------------


def case(op: str, shape: tuple[int, int], classes: int, dtype: torch.dtype = torch.float32, **more: Any) -> Case:
    reduction = more.pop("reduction", "mean")
    direction = more.pop("direction", "fwd+bwd")
    return Case(op, shape, dtype, direction, reduction, options=(("classes", classes), *more.items()))


CASES = [
    *both(case(CENTER, (4096, 128), 100)),
    case(CENTER, (4096, 128), 100, update=True),
    case(CENTER, (4096, 128), 100, centers=True),
    case(CENTER, (4096, 128), 100, BF16, update=True),
    case(CENTER, (4096, 128), 100, reduction="none"),
    case(CENTER, (4096, 128), 100, update=True, one_class=True),
    *both(case(CENTER, (512, 512), 10_000)),
    case(CENTER, (512, 512), 10_000, update=True),
    case(CENTER, (2048, 512), 1000, update=True),
    case(CENTER, (128, 64), 10, update=True),
    case(CENTER, (8, 2), 10),
    case(CENTER, (8, 2), 10, update=True),
    case(SPARSE, (4096, 128), 100),
    case(SPARSE, (4096, 128), 100, update=True),
    case(SPARSE, (128, 512), 7, BF16, update=True),
    case(ISLAND, (256, 512), 1000),
    case(ISLAND, (128, 64), 10),
]

FULL_CASES = [
    case(CENTER, (2048, 256), 1_000_000, update=True),
    case(CENTER, (4096, 512), 1000, update=True),
    case(CENTER, (4096, 512), 1000, BF16),
    case(CENTER, (64, 2), 10, update=True),
    case(CENTER, (256, 512), 100_000, update=True),
    case(CENTER, (32768, 64), 1000, update=True),
    case(SPARSE, (1024, 512), 100, FP16),
    case(ISLAND, (256, 64), 100),
    case(ISLAND, (256, 256), 4000),
]

# On a GPU the quick set is mostly launch cost: these fill one.
GPU_CASES = [
    *both(case(CENTER, (65536, 512), 1000)),
    case(CENTER, (65536, 512), 1000, update=True),
    case(CENTER, (65536, 512), 1000, BF16, update=True),
    case(CENTER, (65536, 512), 1000, update=True, one_class=True),
    case(CENTER, (65536, 256), 100_000, update=True),
    case(SPARSE, (65536, 512), 100, update=True),
    case(ISLAND, (4096, 512), 10_000),
]

# Small and ragged: for sanitizers, capture, rehearsal.
GATE_CASES = [
    case(CENTER, (37, 13), 5),
    case(CENTER, (37, 13), 5, BF16, update=True),
    case(CENTER, (300, 17), 3, update=True, one_class=True),
    case(CENTER, (33, 40), 700, centers=True),
    case(CENTER, (33, 40), 7, reduction="none"),
    case(SPARSE, (21, 19), 4),
    case(SPARSE, (21, 19), 4, FP16, update=True),
    case(ISLAND, (21, 19), 6),
]

TRAFFIC_CASES = [
    case(CENTER, (524288, 512), 1000),
    case(CENTER, (524288, 512), 1000, update=True),
    case(SPARSE, (262144, 512), 1000),
    case(ISLAND, (4096, 512), 400_000),
]

FAMILY = Family(
    "center_loss", CASES, FULL_CASES, inputs, ours, eager, bytes_fwd, bytes_bwd, PEERS, GPU_CASES, GATE_CASES,
    TRAFFIC_CASES, grads=lambda case: 2 if case.op == SPARSE or _learns(case) else 1, draws=draws,
)  # fmt: skip


@pytest.mark.parametrize("case", FAMILY.selected(), ids=lambda case: case.name.replace(" ", "-"))
def test_bench(case: Case, bench: Callable[[Family, Case], None]) -> None:
    bench(FAMILY, case)


assert all(math.prod(case.shape) * case.itemsize < 32 << 20 for case in CASES), "quick cases stay below 32 MB a tensor"
