"""The center-loss family's launchers against the float64 reference: every mode, ragged shapes, dtypes, edges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import dlkernels as dk
from dlkernels._traffic import interpreter_traffic
from dlkernels.testing import Canary, assert_bitwise, assert_within_budget, poisoned_empty, unmodified
from dlkernels.triton import _center_loss_island as island
from dlkernels.triton import _center_loss_segments as segments
from dlkernels.triton import center_loss

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("none", "mean", "sum")
# (N, D, K): one of each, one feature, one class, more classes than rows, ragged tiles.
SHAPES = ((1, 1, 1), (7, 5, 3), (37, 1, 4), (5, 70, 1), (9, 19, 40), (23, 130, 3))
KINDS = ("plain", "attention", "logits")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What a kernel does not write is NaN."""
    with poisoned_empty():
        yield


@pytest.fixture
def tiny_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles along D, pieces of four rows, programs of four positions, merges of several blocks."""
    plan, tiny = segments.plan, {"piece": 4, "steps": 4, "block_r": 2, "block_d": 16}
    monkeypatch.setattr(segments, "plan", lambda *shape: plan(*shape)._replace(**tiny))
    monkeypatch.setattr(segments, "MERGE_BLOCK", 2)
    monkeypatch.setattr(center_loss, "TILE", 32)
    monkeypatch.setattr(island, "TILE", 16)
    monkeypatch.setattr(island, "PROGRAMS", 3)


class Case(NamedTuple):
    x: Tensor
    y: Tensor
    c: Tensor
    a: Tensor | None
    logits: bool
    ignore_index: int = -100


def make(shape: tuple[int, int, int], dtype: torch.dtype, kind: str = "plain", wide: bool = False) -> Case:
    """Labels of every class, negative ones and, with more classes than one, a class that ignore_index leaves out.

    wide: centers and attention in float32 beside half-precision features.
    """
    torch.manual_seed(sum(shape))
    n, d, k = shape
    own = torch.float32 if wide else dtype
    y = torch.randint(-1 if n > 1 else 0, k, (n,))
    a = {"plain": None, "attention": torch.rand(n, d).to(own), "logits": (3 * torch.randn(n, d)).to(own)}[kind]
    return Case(
        (torch.randn(n, d) + 0.3).to(dtype), y, torch.randn(k, d).to(own), a, kind == "logits", 1 if k > 2 else -100
    )  # fmt: skip


def one_class(n: int, d: int, k: int = 3, dtype: torch.dtype = torch.float32, kind: str = "plain") -> Case:
    case = make((n, d, k), dtype, kind)
    return case._replace(y=torch.full((n,), k - 1), ignore_index=-100)


def few_programs(n: int, d: int, tile: int) -> center_loss.Plan:
    return center_loss.Plan(256, 4, 1, -(-n // 256), 4)


def to(t: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return t if t is None or dtype is None else t.to(dtype)


def loss_of(case: Case, x: Tensor, c: Tensor, a: Tensor | None, reduction: str) -> Tensor:
    common: dict[str, Any] = {"reduction": reduction, "ignore_index": case.ignore_index}
    if a is None:
        return dk.center_loss(x, case.y, c, **common)
    return dk.sparse_center_loss(x, case.y, c, a, attention_logits=case.logits, **common)


def gradients(
    case: Case, backend: str, dtype: torch.dtype | None, reduction: str, centers_too: bool, g: Tensor
) -> list[Tensor]:
    """Loss and gradients of features, attention and, if asked for, centers."""
    x, c, a = (to(t, dtype) for t in (case.x, case.c, case.a))
    x, a = x.detach().requires_grad_(), None if a is None else a.detach().requires_grad_()
    c = c.detach().requires_grad_(centers_too)
    with dk.backend(backend):
        loss = loss_of(case, x, c, a, reduction)
        wanted = [t for t in (x, a, c) if t is not None and t.requires_grad]
        return [loss.detach(), *torch.autograd.grad(loss, wanted, g.to(loss.dtype))]


def check(case: Case, reduction: str, centers_too: bool, g: Tensor | None = None) -> list[Tensor]:
    if g is None:
        g = torch.randn(case.y.shape) if reduction == "none" else torch.tensor(0.7)
    with unmodified(*case[:4]):
        found = gradients(case, "triton", None, reduction, centers_too, g)
    exact = gradients(case, "reference", torch.float64, reduction, centers_too, g)
    plain = gradients(case, "reference", None, reduction, centers_too, g)
    for i, (ours, right, theirs) in enumerate(zip(found, exact, plain, strict=True)):
        assert ours.dtype == theirs.dtype and ours.is_contiguous()
        assert_within_budget(ours, right, theirs, scalar=ours.dim() == 0, what=f"{reduction} result {i}")
    return found


def update(case: Case, backend: str, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    c = to(case.c, dtype).clone()
    with dk.backend(backend):
        out = dk.update_centers_(
            c, to(case.x, dtype), case.y, attention=to(case.a, dtype), attention_logits=case.logits,
            ignore_index=case.ignore_index, **options,
        )  # fmt: skip
    assert out is c
    return c


def check_update(case: Case, **options: Any) -> Tensor:
    with unmodified(*case[:4]):
        found = update(case, "triton", **options)
    exact = update(case, "reference", torch.float64, **options)
    assert_within_budget(found, exact, update(case, "reference", **options), what=f"centers {options}")
    if not options.get("island_weight"):
        present = torch.zeros(case.c.shape[0], dtype=torch.bool)
        present[case.y[(case.y >= 0) & (case.y != case.ignore_index)]] = True
        assert_bitwise(found[~present], case.c[~present], "centers of absent classes")
    return found


# Loss and gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients(shape: tuple[int, int, int]) -> None:
    for i, kind in enumerate(KINDS):
        case = make(shape, torch.float32, kind)
        check(case, REDUCTIONS[i], False)
        check(case, REDUCTIONS[i - 1], True)


@pytest.mark.parametrize("shape", [(7, 5, 3), (37, 1, 4), (5, 70, 1), (9, 19, 40), (18, 35, 3)], ids=str)
@pytest.mark.usefixtures("tiny_tiles")
def test_several_tiles_and_pieces(shape: tuple[int, int, int]) -> None:
    check(make(shape, torch.float32), "mean", True)
    check(make(shape, torch.float32, "logits"), "sum", shape[0] < 8)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    wide = (False, True) if dtype.itemsize == 2 else (False,)
    for w in wide:
        case = make((13, 21, 4), dtype, kind, w)
        for reduction in REDUCTIONS:
            check(case, reduction, False)
        check(case, "none", True)
        check_update(case, alpha=0.5)
        check_update(case, alpha=0.5, island_weight=2.0)


@pytest.mark.parametrize("n", (2, 3, 4, 5, 8, 9, 23))
@pytest.mark.usefixtures("tiny_tiles")
def test_all_rows_of_one_class(n: int) -> None:
    """Pieces of four rows: less than one, one, several that fill the last block or do not."""
    check(one_class(n, 19), "mean", True)
    check_update(one_class(n, 19, kind="attention"), alpha=0.4)


@pytest.mark.parametrize("labels", ["0123", "000011112222", "0001111122", "00000000001", "01111111112", "i0ii00ii1110"])
@pytest.mark.parametrize("steps", (1, 2, 8))
def test_pieces_and_slots(steps: int, labels: str, tiny_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes that begin and end at a block's edge, before and after it, beside rows that are left out."""
    tiny = segments.plan
    monkeypatch.setattr(segments, "plan", lambda *shape: tiny(*shape)._replace(steps=steps))
    y = torch.tensor([-3 if char == "i" else int(char) for char in labels])
    order = torch.randperm(len(labels))
    case = make((len(labels), 3, 4), torch.float32)._replace(y=y[order], ignore_index=-100)
    check(case, "sum", True)
    check_update(case, alpha=0.6, island_weight=0.0 if steps == 1 else 1.5)


def test_pieces_at_the_size_that_ships() -> None:
    """More than two pieces of 64 rows, and a class that begins inside of one."""
    y = torch.cat([torch.zeros(50), torch.ones(91), torch.full((4,), 2)]).long()[torch.randperm(145)]
    case = make((145, 20, 4), torch.float32)._replace(y=y, ignore_index=-100)
    assert segments.plan(145, 4, 20).piece == 64
    check_update(case, alpha=0.5)


def test_longer_pieces_and_programs_for_many_rows() -> None:
    plans = [segments.plan(n, 1000, 512) for n in (100, 10_000, 100_000, 10_000_000)]
    assert [p.piece for p in plans] == [64, 64, 256, 1024] and [p.steps for p in plans] == [1, 1, 16, 16]
    assert plans[0].block_d > plans[1].block_d and plans[0].block_r < plans[1].block_r
    steps = [center_loss.plan(n, 512, center_loss.TILE).steps for n in (100, 100_000, 10_000_000)]
    assert steps == [1, 4, 16]


def test_rows_of_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = center_loss.plan
    monkeypatch.setattr(center_loss, "plan", lambda *a: plan(*a)._replace(block_r=2, steps=3, programs=4))
    for reduction in REDUCTIONS:
        check(make((21, 9, 3), torch.float32, "logits"), reduction, False)


@pytest.mark.parametrize("n", (512, 513, 5000))
def test_the_divisor_of_small_and_large_batches(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by each program, by a launch of one, by a launch of several and another."""
    monkeypatch.setattr(center_loss, "COUNT_BLOCK", 256)
    monkeypatch.setattr(center_loss, "plan", few_programs)
    check(make((n, 1, 3), torch.float32), "mean", False)


def test_half_precision_stores_undivided() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        case = make((9, 5, 2), dtype)
        _, dx, _, divisor = center_loss.center_loss_fwd(case.x, case.y, case.c, None, False, -100, 1, True, True)
        full = center_loss.center_loss_fwd(case.x, case.y, case.c, None, False, -100, 2, True, True)[1]
        assert divisor == (case.y >= 0).sum()
        by = 1.0 if dtype == torch.float16 else float(divisor)
        torch.testing.assert_close(dx.float(), full.float() / by, rtol=1e-2, atol=0)


# Rows that are left out, labels out of range, NaN ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_rows_left_out_are_not_read(kind: str) -> None:
    """Loss 0 and gradient 0 whatever is in them, and whatever the upstream gradient is."""
    case = make((9, 5, 3), torch.float32, kind)
    case.y[:3] = torch.tensor([-1, -100, 1])
    for t in (case.x, case.a):
        if t is not None:
            t[:3] = float("nan")
    g = torch.ones(9)
    g[:3] = float("inf")
    for reduction, upstream, centers_too in (("none", g, True), ("mean", torch.tensor(1.0), False)):
        loss, *grads = gradients(case, "triton", None, reduction, centers_too, upstream)
        assert loss.isfinite().all() and all(t.isfinite().all() for t in grads)
        assert all((t[:3] == 0).all() for t in grads[: 1 + (kind != "plain")])
        assert reduction == "mean" or (loss[:3] == 0).all()
    rest = case._replace(x=case.x[3:], y=case.y[3:], a=None if case.a is None else case.a[3:])
    assert_bitwise(update(case, "triton", alpha=0.5), update(rest, "triton", alpha=0.5))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("n", (0, 3, 600))
def test_no_row_counts(n: int, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """0, and gradients of 0; the centers stay, but for the island."""
    monkeypatch.setattr(center_loss, "plan", few_programs)
    case = make((n, 4, 3), torch.float32)._replace(y=torch.full((n,), -1))
    g = torch.ones(n) if reduction == "none" else torch.tensor(1.0)
    for centers_too in (False, True) if n < 600 else (False,):
        for t in gradients(case, "triton", None, reduction, centers_too, g):
            assert (t == 0).all()
    if n == 600:
        return
    assert_bitwise(update(case, "triton", alpha=0.5), case.c)
    if reduction == "mean":
        check_update(case, alpha=0.5, island_weight=1.0)


# In one piece, in two.
@pytest.mark.parametrize(("kind", "bad"), [("plain", (3, 3, 4, 4, 4, 4, 4)), ("attention", (3, 3, 3, 3, 3, 4, 2**40))])
@pytest.mark.usefixtures("tiny_tiles")
def test_labels_out_of_range(kind: str, bad: tuple[int, ...]) -> None:
    """A NaN loss; nothing is read or written out of bounds, and no other class notices."""
    case = make((18, 5, 3), torch.float32, kind)._replace(ignore_index=-100)
    case.y[:9] = torch.tensor([*bad, 2**31, 2**62])
    canaries = [Canary(t) for t in case[:4] if t is not None]
    inside = case._replace(**dict(zip(("x", "y", "c", "a"), (k.tensor for k in canaries))))
    loss, dx, *_ = gradients(inside, "triton", None, "none", True, torch.ones(18))
    assert loss[:9].isnan().all() and dx[:9].isnan().all() and loss[9:].isfinite().all() and dx[9:].isfinite().all()
    assert gradients(inside, "triton", None, "mean", False, torch.tensor(1.0))[0].isnan()
    rest = case._replace(x=case.x[9:], y=case.y[9:], a=None if case.a is None else case.a[9:])
    without = gradients(rest, "triton", None, "none", True, torch.ones(9))
    torch.testing.assert_close(gradients(inside, "triton", None, "none", True, torch.ones(18))[-1], without[-1])
    for weight in (0.0, 1.0):
        options = {"alpha": 0.5, "island_weight": weight}
        with dk.backend("triton"):
            dk.update_centers_(inside.c, inside.x, inside.y, attention=inside.a, **options)
        torch.testing.assert_close(inside.c, update(rest, "triton", **options))
        inside.c.copy_(case.c)
    for canary in canaries:
        canary.check()


def test_no_classes() -> None:
    x, y, c = torch.randn(3, 4), torch.tensor([-1, 0, 5]), torch.zeros(0, 4)
    loss, dx, _, _ = center_loss.center_loss_fwd(x, y, c, None, False, -100, 0, True, True)
    assert loss[0] == 0 and loss[1:].isnan().all() and (dx[0] == 0).all()
    assert center_loss.center_loss_bwd(loss, x, y, c, None, False, -100, True)[1].shape == (0, 4)
    center_loss.update_centers_(c, x, y, None, False, 0.5, False, 1.0, -100)
    value, total, inverse = center_loss.island_pairs_fwd(c)
    assert value == 0 and (total == 0).all() and inverse.shape == (0,)


def test_no_features() -> None:
    x, y, c = torch.zeros(3, 0), torch.tensor([0, 1, -1]), torch.zeros(2, 0)
    loss, _, _, divisor = center_loss.center_loss_fwd(x, y, c, None, False, -100, 1, False, True)
    assert loss == 0 and divisor == 2
    assert center_loss.center_loss_bwd(torch.ones(3), x, y, c, None, False, -100, True)[1].shape == (2, 0)


def test_attention_outside_of_its_range() -> None:
    """NaN where it takes part; the public function cannot look at it on a GPU."""
    case = make((4, 3, 2), torch.float32, "attention")
    case.y[:] = torch.tensor([0, 1, 0, -1])
    case.a[0, 1], case.a[2, 2], case.a[3, 0] = 1.01, -0.01, 7
    case.a[1] = torch.tensor([0.0, 1.0, 0.5])
    args = (case.x, case.y, case.c, case.a, False, -100)
    loss, dx, da, _ = center_loss.center_loss_fwd(*args, 0, True, True)
    assert loss.isnan().tolist() == [True, False, True, False]
    assert dx.isnan().nonzero().tolist() == [[0, 1], [2, 2]] and da.isfinite().all()


@pytest.mark.parametrize("where", ("x", "c", "a"))
def test_nan_is_not_hidden(where: str) -> None:
    case = make((6, 3, 2), torch.float32, "logits")
    case.y[:] = torch.tensor([0, 1, 0, 1, 1, 1])
    getattr(case, where)[0, 1] = float("nan")
    loss, dx, _, dc = gradients(case, "triton", None, "none", True, torch.ones(6))
    rows = [0, 2] if where == "c" else [0]
    assert loss.isnan().nonzero().flatten().tolist() == rows
    assert dx.isnan().nonzero().tolist() == [[r, 1] for r in rows] and dc.isnan().nonzero().tolist() == [[0, 1]]
    assert update(case, "triton", alpha=0.5).isnan().nonzero().tolist() == [[0, 1]]


# Layouts, offsets, order ----------------------------------------------------------------------------------------------


def test_strides() -> None:
    """An expanded gradient, one with gaps, transposed inputs, 32-bit labels."""
    case = make((17, 6, 3), torch.float32, "attention")
    for g in (torch.tensor(1.3).expand(17), torch.randn(34)[::2]):
        check(case, "none", True, g)
    args = (case.x, case.y, case.c, case.a)
    laid = (case.x.t().contiguous().t(), case.y.repeat_interleave(2)[::2].int(), case.c.t().contiguous().t(), case.a)
    g, options = torch.randn(34), (False, 1, True)
    for ours, plain in zip(
        center_loss.center_loss_bwd(g[::2], *laid, *options),
        center_loss.center_loss_bwd(g[::2].contiguous(), *args, *options),
        strict=True,
    ):
        assert_bitwise(ours, plain)
    with pytest.raises(ValueError, match="contiguous"):
        center_loss.update_centers_(laid[2], *args[:2], None, False, 0.5, False, 0.0, -100)


def test_offsets_beyond_32_bits() -> None:
    """Centers of 4 GB, of which three rows are touched."""
    k, d = (1 << 22) + 5, 512
    c = torch.from_numpy(np.zeros((k, d), dtype=np.float16))
    y = torch.tensor([0, k - 1, 7, k - 1])
    c[k - 1] = torch.randn(d).half()
    x = torch.randn(4, d).half()
    loss = center_loss.center_loss_fwd(x, y, c, None, False, -100, 0, False, True)[0]
    right = 0.5 * (x.double() - c[y].double()).square().sum(1)
    assert_within_budget(loss, right, what="loss")
    moved = c[k - 1].double() + 0.5 * (x[1].double() + x[3].double() - 2 * c[k - 1].double()) / 3
    center_loss.update_centers_(c, x, y, None, False, 0.5, False, 0.0, -100)
    assert_within_budget(c[k - 1], moved, what="center")


@pytest.mark.usefixtures("tiny_tiles")
def test_bitwise_equal_between_runs() -> None:
    for case in (one_class(13, 7, kind="logits"), make((14, 7, 4), torch.float32)):
        runs = [gradients(case, "triton", None, "mean", True, torch.tensor(1.0)) for _ in range(2)]
        for first, second in zip(*runs, strict=True):
            assert_bitwise(first, second)
        assert_bitwise(*(update(case, "triton", alpha=0.5, island_weight=1.0) for _ in range(2)))


def test_the_order_of_other_classes_does_not_matter() -> None:
    """A class's sum depends on its own rows and on where they lie among the sorted ones, not on the others' values."""
    case = make((20, 5, 3), torch.float32)
    other = case._replace(x=torch.where(case.y[:, None] == 0, case.x, 1e30))
    assert_bitwise(update(case, "triton", alpha=0.5)[0], update(other, "triton", alpha=0.5)[0])


# Update ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update(shape: tuple[int, int, int]) -> None:
    for i, kind in enumerate(KINDS):
        case = make(shape, torch.float32, kind)
        check_update(case, alpha=0.5, ema=i == 1, island_weight=0.0 if i == 0 else 3.0)


@pytest.mark.parametrize("island_weight", (0.0, 0.7))
@pytest.mark.parametrize("ema", (False, True))
@pytest.mark.usefixtures("tiny_tiles")
def test_update_in_pieces(ema: bool, island_weight: float) -> None:
    for shape, kind in (((23, 21, 3), "logits"), ((9, 19, 40), "attention")):
        check_update(make(shape, torch.float32, kind), alpha=0.5, ema=ema, island_weight=island_weight)


def test_ema_of_one_is_the_mean() -> None:
    case = make((12, 4, 2), torch.float32)
    found = update(case, "triton", alpha=1.0, ema=True)
    for j in range(2):
        torch.testing.assert_close(found[j], case.x[case.y == j].mean(0))


def test_vectors() -> None:
    """Worked out by hand: two rows of class 0, one of class 1, in one dimension and two."""
    x, y, c = torch.tensor([[3.0, 0], [1, 2], [0, 1]]), torch.tensor([0, 0, 1]), torch.tensor([[1.0, 0], [0, 2]])
    with dk.backend("triton"):
        torch.testing.assert_close(dk.center_loss(x, y, c, reduction="none"), torch.tensor([2, 2, 0.5]))
        torch.testing.assert_close(dk.center_loss(x, y, c), torch.tensor(1.5))
        parts = dk.island_loss(x, y, c, return_parts=True)
        torch.testing.assert_close(parts.pairs, torch.tensor(2.0))
        torch.testing.assert_close(parts.loss, torch.tensor(21.5))
        dk.update_centers_(c, x, y, 0.6)
        torch.testing.assert_close(c, torch.tensor([[1.4, 0.4], [0, 1.7]]))


# Island ---------------------------------------------------------------------------------------------------------------


def check_island(c: Tensor) -> Tensor:
    """The value and its gradient, against float64."""
    results = []
    for backend, dtype in (("triton", None), ("reference", torch.float64), ("reference", None)):
        leaf = to(c, dtype).detach().requires_grad_()
        x, y = torch.zeros_like(leaf[:1]).detach(), torch.full((1,), -1)
        with dk.backend(backend):
            pairs = dk.island_loss(x, y, leaf, 1.0, return_parts=True).pairs
            results.append((pairs.detach(), torch.autograd.grad(pairs * 1.7, leaf)[0]))
    (pairs, dc), (exact, exact_dc), (_, plain_dc) = results
    assert_within_budget(pairs, exact, scalar=True, what="pairs")
    if c.shape[1] == 1:  # on a line there is no direction to part in: 0 but for rounding
        eps = torch.finfo(dc.dtype).eps
        assert (dc.abs() <= 8 * eps * c.shape[0] / c.abs()).all() and (exact_dc.abs() < 1e-12).all()
    else:
        assert_within_budget(dc, exact_dc, plain_dc, what="dcenters")
    return pairs


@pytest.mark.parametrize("shape", [(2, 3), (5, 1), (7, 9), (3, 130), (70, 5), (300, 4)], ids=str)
def test_island(shape: tuple[int, int]) -> None:
    for dtype in DTYPES if shape == (7, 9) else DTYPES[:1]:
        check_island((torch.randn(shape) + 0.2).to(dtype))


@pytest.mark.parametrize("shape", [(2, 3), (7, 9), (3, 16), (3, 70), (40, 3)], ids=str)
@pytest.mark.usefixtures("tiny_tiles")
def test_island_in_tiles(shape: tuple[int, int]) -> None:
    check_island(torch.randn(shape) + 0.2)


def test_island_plans() -> None:
    assert not island.plan(10, 5000).whole and island.plan(10, 4096).whole
    assert island.plan(1_000_000, 512).programs <= island.PROGRAMS and island.plan(1_000_000, 512).steps > 1


def test_island_edges() -> None:
    """One center, centers of norm 0, equal and opposite ones, K (K - 1) beyond the digits of float32."""
    with dk.backend("triton"):
        value, _, inverse = center_loss.island_pairs_fwd(torch.ones(1, 4))
        assert value == 0 and inverse == 0.5
        assert all(center_loss.island_pairs_fwd(torch.randn(1, 5))[0] == 0 for _ in range(5))
        assert (center_loss.island_pairs_bwd(value, torch.ones(1, 4), torch.ones(4), inverse) == 0).all()
    c = torch.zeros(4, 3)
    c[1], c[3] = torch.tensor([1.0, 2, 2]), torch.tensor([-2.0, 0.5, 1])
    check_island(c)
    assert center_loss.island_pairs_fwd(torch.zeros(3, 2))[0] == 6
    assert center_loss.island_pairs_fwd(torch.tensor([[2.0, 0], [-3, 0]]))[0] == 0
    assert center_loss.island_pairs_fwd(torch.ones(5, 1))[0] == 40
    many = torch.ones(5001, 1)
    many[::2] = -1
    assert center_loss.island_pairs_fwd(many)[0] == 1 - 5001 + 5001 * 5000
    assert center_loss.island_pairs_fwd(torch.tensor([[1.0, float("nan")], [1, 1]]))[0].isnan()


# Atomics --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_atomics(dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opt-in: the same sums without a sort, where no more classes than rows; labels too large change nothing."""
    from dlkernels.triton import _center_loss_atomics as atomics

    used = []
    run = atomics.atomic_class_sums
    monkeypatch.setattr(atomics, "atomic_class_sums", lambda *args: (used.append(1), run(*args)))
    check_update(make((37, 19, 4), dtype, kind))
    assert not used, "atomics were not asked for"
    monkeypatch.setenv("DLKERNELS_ATOMICS", "1")
    check_update(make((37, 19, 4), dtype, kind))
    assert not used, "what poisons memory asks for determinism"
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: False)
    for case in (make((37, 19, 4), dtype, kind), make((150, 5, 7), dtype, kind), one_class(40, 130, 3, dtype, kind)):
        used.clear()
        for options in ({}, {"ema": True}, {"island_weight": 2.0}):
            check_update(case, **options)
        check(case, "mean", centers_too=True)
        assert len(used) == 4
    used.clear()
    check_update(make((9, 19, 40), dtype, kind))
    assert not used, "more classes than rows"

    c = case.c.clone()
    center_loss.update_centers_(c, case.x, case.y + 1, case.a, case.logits, 0.5, False, 0.0, -100)
    assert_bitwise(c, case.c, "centers after labels that are all too large")


def test_the_last_use_of_a_stored_gradient_moves_nothing() -> None:
    """With an upstream gradient of 1 the backward pass reads that number; a graph that is kept gets a copy."""
    case = make((37, 19, 4), torch.float32, "attention")
    x, a = case.x.clone().requires_grad_(), case.a.clone().requires_grad_()
    with dk.backend("triton"):
        loss = dk.sparse_center_loss(x, case.y, case.c, a, ignore_index=1)
        with interpreter_traffic() as kept:
            expected = torch.autograd.grad(loss, (x, a), retain_graph=True)
        with interpreter_traffic() as last:
            found = torch.autograd.grad(loss, (x, a))
    for ours, right in zip(found, expected, strict=True):
        assert_bitwise(ours, right)
    one = x.numel() * 4
    assert kept.stored == 2 * one and last.total < one, (kept.stored, last.total)
