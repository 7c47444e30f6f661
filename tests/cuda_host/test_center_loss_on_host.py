"""The center-loss family: CUDA C++ on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dlkernels.testing import assert_bitwise, assert_within_budget
from dlkernels.triton import center_loss as triton

ROOT = Path(__file__).resolve().parents[2]
OPS = torch.ops.dlkernels_cuda_host
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Of features, centers and attention.
DTYPES = [(F32, F32, F32), (F16, F16, F32), (F16, F32, F16), (BF16, BF16, BF16), (BF16, F32, F32)]
WEIGHTS = ("none", "weights", "logits")
NONE, MEAN, SUM = 0, 1, 2
IGNORED = 3
NAN = float("nan")


def barrier_after(file: str, text: str) -> str:
    """The name of the first __syncthreads behind a text."""
    lines = (ROOT / "csrc" / file).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if text in line)
    line = next(i for i in range(start, len(lines)) if "__syncthreads" in lines[i])
    return f"{Path(file).name}:{line + 1}"


# Before a block's ticket: for the sake of other blocks, which do not run meanwhile here.
LAST_BLOCK = barrier_after("common/cuda_reduce.h", "bool last_block(")


class Sample(NamedTuple):
    x: Tensor
    y: Tensor
    c: Tensor
    a: Tensor | None
    logits: bool

    def exact(self) -> Sample:
        return Sample(
            self.x.double(), self.y, self.c.double(), None if self.a is None else self.a.double(), self.logits
        )


def off(t: Tensor, by: int) -> Tensor:
    """The same numbers, `by` elements away from a multiple of 16 bytes; ends where its memory ends."""
    out = t.new_empty(t.numel() + by)[by:].view(t.shape)
    return out.copy_(t)


def draw(
    n: int, k: int, d: int, dtypes: Any = (F32, F32, F32), weigh: str = "none", labels: str = "some", by: int = 0
) -> Sample:
    """Features around their centers; some labels left out, all of one class, sorted backwards, of two classes."""
    g = torch.Generator().manual_seed(n + 7 * k + d)
    c = 2 * torch.randn(k, d, generator=g)
    y = torch.randint(0, k, (n,), generator=g)
    if labels == "some":
        y[1::5], y[3::7] = -100, IGNORED
    elif labels == "one":
        y[:] = k - 1
    elif labels == "backwards":
        y = y.sort(descending=True)[0]
    elif labels == "skewed":
        y[torch.rand(n, generator=g) < 0.8] = k // 2
    elif labels == "narrow":
        y[::4] = -1
        y = y.int()
    x = c[y.long().clamp(0, k - 1)] + torch.randn(n, d, generator=g)
    a = (
        None
        if weigh == "none"
        else torch.randn(n, d, generator=g)
        if weigh == "logits"
        else torch.rand(n, d, generator=g)
    )
    x, c = off(x.to(dtypes[0]), by), off(c.to(dtypes[1]), by)
    return Sample(x, y, c, None if a is None else off(a.to(dtypes[2]), by), weigh == "logits")


def counted(s: Sample) -> Tensor:
    return (s.y >= 0) & (s.y != IGNORED)


def rows(s: Sample) -> tuple[Tensor, Tensor, Tensor]:
    """The formula: losses, their gradients in x and in what was given as attention."""
    keep = counted(s)[:, None]
    diff = torch.where(keep, s.x - s.c[torch.where(keep[:, 0], s.y, 0).long()], 0.0)
    a = torch.ones_like(s.x) if s.a is None else s.a.sigmoid() if s.logits else s.a
    slope = a * (1 - a) if s.logits else torch.ones_like(a)
    return 0.5 * (a * diff * diff).sum(1), a * diff, 0.5 * slope * diff * diff


def forward(s: Sample, reduction: int = MEAN, need_grad: bool = True, ops: Any = OPS) -> Any:
    return ops.center_loss_fwd(s.x, s.y, s.c, s.a, s.logits, IGNORED, reduction, need_grad, False)


def check_forward(s: Sample, reduction: int, need_grad: bool, found: Any) -> None:
    exact = s.exact()
    loss, dx, da = rows(exact)
    here = max(int(counted(s).sum()), 1) if reduction == MEAN else 1
    if reduction != NONE:
        loss = loss.sum() / here
    got_loss, got_dx, got_da, divisor = found
    assert_within_budget(got_loss, loss, scalar=reduction != NONE, what="loss")
    assert (divisor.dtype, divisor.item(), got_loss.dtype) == (F32, here, F32)
    for name, got, right, like in (("dx", got_dx, dx, s.x), ("da", got_da, da, s.x if s.a is None else s.a)):
        assert got.dtype == like.dtype
        if not need_grad or (name == "da" and s.a is None):
            assert got.shape == (0,)
            continue
        right = right if got.dtype == F16 else right / here
        assert_within_budget(got, right, right.to(got.dtype), what=name)
        assert not got[~counted(s)].any()


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))
@pytest.mark.parametrize("by", [0, 1], ids=["aligned", "unaligned"])
def test_forward(by: int, dtypes: Any, twin: Any) -> None:
    """Every kind of attention and of reduction; lanes from one to a warp, packs and single elements."""
    for i, (n, k, d) in enumerate([(1, 5, 1), (37, 5, 7), (70, 40, 16), (33, 9, 24), (9, 300, 264), (5, 4, 136)]):
        for weigh in WEIGHTS:
            s = draw(n, k, d, dtypes, weigh, labels="narrow" if i == 1 else "some", by=by)
            for reduction in (NONE, MEAN, SUM):
                for need_grad in (False, True):
                    check_forward(s, reduction, need_grad, forward(s, reduction, need_grad))
                    assert len(twin.launches()) == 1


@pytest.mark.parametrize("machine", ["h200", "a100", "t4"])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[4]], ids=["float32", "bfloat16"])
def test_long_rows(dtypes: Any, machine: str, twin: Any) -> None:
    """A block per row."""
    twin.machine(machine)
    for d in (4096, 2056, 1030):
        for weigh, reduction in (("none", NONE), ("logits", MEAN)):
            s = draw(5, 4, d, dtypes, weigh, labels="all")
            check_forward(s, reduction, True, forward(s, reduction))
            assert twin.launches()[0]["grid"] == 5


def test_blocks_of_several_sets(twin: Any) -> None:
    """More rows than blocks take at a time; the labels counted by a kernel before, by each block, or at the end."""
    for n, need_grad, launches in ((9001, True, 1), (9001, False, 1), (52001, True, 2), (52001, False, 1)):
        s = draw(n, 6, 3, labels="narrow" if n < 10000 else "some")
        twin.machine("t4")
        check_forward(s, MEAN, need_grad, forward(s, MEAN, need_grad))
        found = twin.launches()
        assert len(found) == launches and found[-1]["overlap"] == (launches == 2)
        assert found[-1]["grid"] <= 40 * 16


def test_no_row_and_no_feature(twin: Any) -> None:
    empty = draw(0, 4, 3)
    for reduction in (NONE, MEAN, SUM):
        loss, dx, _, divisor = forward(empty, reduction)
        assert loss.shape == ((0,) if reduction == NONE else ()) and not loss.any() and divisor == 1
        assert dx.shape == (0, 3)
    assert not twin.launches()
    flat = Sample(torch.empty(2, 0), torch.tensor([0, -1]), torch.empty(1, 0), None, False)
    assert forward(flat, MEAN)[0] == 0 and forward(flat, NONE)[0].tolist() == [0, 0]
    none = Sample(torch.ones(2, 3), torch.tensor([-1, -2]), torch.empty(0, 3), None, False)
    assert forward(none, MEAN)[0] == 0 and not forward(none, MEAN)[1].any()


@pytest.mark.parametrize("d", [6, 8, 4096])
def test_labels_out_of_range(d: int, twin: Any) -> None:
    """NaN in the loss and in the row's gradients, nothing read out of bounds; such rows count."""
    s = draw(6, 5, d, weigh="weights", labels="all")
    for label in (5, 1 << 40):
        y = s.y.clamp(max=2)
        y[2] = label
        bad = s._replace(y=y)
        loss, dx, da, _ = forward(bad, NONE)
        assert loss.isnan().nonzero().tolist() == [[2]]
        for grad in (dx, da):
            assert grad[2].isnan().all() and not grad[[0, 1, 3, 4, 5]].isnan().any()
        loss, _, _, divisor = forward(bad, MEAN)
        assert loss.isnan() and divisor == 6


def test_attention_out_of_range(twin: Any) -> None:
    s = draw(6, 5, 8, weigh="weights", labels="all")
    for value in (-0.25, 1.5, NAN):
        s.a[3, 5] = value
        loss, dx, da, _ = forward(s, NONE)
        assert loss.isnan().nonzero().tolist() == [[3]] and dx.isnan().nonzero().tolist() == [[3, 5]]
        assert not da.isnan().any()
    logits = draw(6, 5, 8, weigh="logits", labels="all")
    logits.a[1, 2], logits.a[2, 2], logits.a[3, 3] = NAN, float("inf"), -float("inf")
    loss, _, da, _ = forward(logits, NONE)
    assert loss.isnan().nonzero().tolist() == [[1]] and da.isnan().nonzero().tolist() == [[1, 2]]
    check_forward(
        logits._replace(a=logits.a.nan_to_num(0.0)), MEAN, True, forward(logits._replace(a=logits.a.nan_to_num(0.0)))
    )


def test_forward_traffic(twin: Any) -> None:
    """Features and attention read once, gradients written once, rows that are left out not read."""
    for dtypes, weigh, n, d in (
        (DTYPES[0], "none", 96, 512),
        (DTYPES[3], "logits", 64, 256),
        (DTYPES[0], "none", 9, 7),
    ):
        s = draw(n, 4, d, dtypes, weigh)
        keep = int(counted(s).sum())
        out = forward(s)
        blocks = [one["grid"] for one in twin.launches()]
        weights = {} if s.a is None else {"a": s.a}
        with twin.traffic(x=s.x, y=s.y, c=s.c, **weights) as moved:
            out = forward(s)
        for name in ("x", *weights):
            assert (moved[name].loaded, moved[name].again) == (keep * d * s.x.element_size(), 0), name
        assert moved["c"].loaded == keep * d * s.c.element_size()
        assert moved["all"].stored - 8 * (blocks[0] + 3) <= out[1].nbytes + out[2].nbytes <= moved["all"].stored
        assert moved["y"].loaded <= s.y.nbytes * (blocks[0] + 32 + 8 * 8)


def test_forward_same_bits(twin: Any) -> None:
    s = draw(301, 7, 40, weigh="logits")
    found = []
    for seed in range(3):
        twin.module.seed(seed)
        found.append(forward(s) + forward(s, NONE))
    for other in found[1:]:
        for got, right in zip(other, found[0], strict=True):
            assert_bitwise(got, right)


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
@pytest.mark.parametrize("weigh", WEIGHTS)
def test_forward_is_tritons(weigh: str, reduction: int, twin: Any) -> None:
    for dtypes in (DTYPES[0], DTYPES[2]):
        s = draw(19, 6, 21, dtypes, weigh)
        for ours, theirs in zip(forward(s, reduction), forward(s, reduction, ops=triton), strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.stride() == theirs.stride()
            torch.testing.assert_close(ours, theirs)


def test_float64_is_tritons(twin: Any) -> None:
    s = draw(5, 4, 3).exact()
    assert forward(s)[0].dtype == torch.float64 and not twin.launches()


def test_forward_barriers(twin: Any) -> None:
    many, long, later = draw(9001, 6, 3), draw(3, 4, 4096, weigh="weights", labels="all"), draw(301, 6, 16)
    counts = draw(52001, 6, 1)

    def check() -> None:
        twin.machine("t4")
        check_forward(counts, MEAN, True, forward(counts, MEAN, True))
        check_forward(many, MEAN, True, forward(many, MEAN, True))
        check_forward(later, MEAN, False, forward(later, MEAN, False))
        check_forward(long, NONE, True, forward(long, NONE, True))

    assert set(twin.unnoticed_barriers(check)) <= {LAST_BLOCK}


# By class -------------------------------------------------------------------------------------------------------------


def update(s: Sample, alpha: float = 0.5, ema: bool = False, ops: Any = OPS, island: float = 0.0) -> Tensor:
    c = s.c.clone() if s.c.data_ptr() % 16 == 0 else off(s.c, 1)
    ops.update_centers_(c, s.x, s.y, s.a, s.logits, alpha, ema, island, IGNORED)
    return c


def class_sums(s: Sample, g: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """sum g A (x - c) of each class, and its rows."""
    pull = rows(s)[1]
    keep = counted(s) & (s.y < s.c.shape[0])
    label = s.y.long()[keep]
    sums = torch.zeros_like(s.c).index_add(0, label, (pull if g is None else pull * g[:, None])[keep])
    return sums, torch.bincount(label, minlength=s.c.shape[0])[:, None]


def check_update(s: Sample, alpha: float, ema: bool, found: Tensor) -> None:
    exact = s.exact()
    sums, count = class_sums(exact)
    expected = exact.c + alpha * sums / (count.clamp(min=1) if ema else 1 + count)
    assert_within_budget(found, expected, expected.to(found.dtype), what="centers")
    assert_bitwise(found[count[:, 0] == 0], s.c[count[:, 0] == 0], "centers of absent classes")


def backward(s: Sample, g: Tensor, need_centers: bool, ops: Any = OPS) -> Any:
    return ops.center_loss_bwd(g, s.x, s.y, s.c, s.a, s.logits, IGNORED, need_centers)


def check_backward(s: Sample, g: Tensor, need_centers: bool, found: Any) -> None:
    exact = s.exact()
    _, dx, da = rows(exact)
    right = {"dx": g.double()[:, None] * dx, "dc": -class_sums(exact, g.double())[0], "da": g.double()[:, None] * da}
    missing = {"dc": not need_centers, "da": s.a is None}
    for got, like, (name, exactly) in zip(found, (s.x, s.c, s.x if s.a is None else s.a), right.items(), strict=True):
        assert got.dtype == like.dtype
        if missing.get(name):
            assert got.shape == (0,)
        else:
            assert_within_budget(got, exactly, exactly.to(got.dtype), what=name)
    assert not found[0][~counted(s)].any()


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t)[6:] for t in d))
@pytest.mark.parametrize("by", [0, 1], ids=["aligned", "unaligned"])
def test_by_class(by: int, dtypes: Any, twin: Any) -> None:
    """The update and all gradients in two launches: one block and several, one slab and several, however rows lie."""
    cases = [(1, 5, 1, "all"), (37, 5, 7, "narrow"), (70, 300, 16, "some"), (300, 5, 132, "skewed")]
    for i, (n, k, d, labels) in enumerate([*cases, (129, 9, 40, "backwards"), (260, 4, 136, "one")]):
        for weigh in WEIGHTS if n < 100 and not by else WEIGHTS[i % 3 :][:1]:
            s = draw(n, k, d, dtypes, weigh, labels=labels, by=by)
            alpha, ema = ((0.5, False), (0.3, True))[i % 2]
            check_update(s, alpha, ema, update(s, alpha, ema))
            assert len(twin.launches()) == 2
            g = torch.linspace(0.5, 1.5, n)
            for need_centers in (False, True):
                check_backward(s, g, need_centers, backward(s, g, need_centers))
                assert len(twin.launches()) == 1 + need_centers


@pytest.mark.parametrize("machine", ["h200", "t4"])
@pytest.mark.parametrize("k", [3, 200, 70_000])
def test_many_rows(k: int, machine: str, twin: Any) -> None:
    """One block sorts while it has room; several take two launches per digit. Warps of many rows."""
    twin.machine(machine)
    for n, labels in ((3001, "some"), (5003, "skewed"), (17001, "some")):
        s = draw(n, k, 5 if n > 10_000 else 8, labels=labels)
        check_update(s, 0.5, False, update(s))
        here = n < (4000 if machine == "t4" else 16384)
        found = twin.launches()
        assert len(found) == (2 if here else 1 + 2 * (1 if k < 255 else 3)), [one["grid"] for one in found]
        assert [one["overlap"] for one in found] == [False] + [True] * (len(found) - 1)


def test_gradients_of_what_is_expanded(twin: Any) -> None:
    """A gradient with stride 0, in half precision too."""
    s = draw(30, 4, 12)
    for g in (torch.tensor(0.75).expand(30), torch.tensor(0.75).half().expand(30), torch.linspace(1, 2, 60)[::2]):
        for need_centers in (False, True):
            check_backward(s, g.float(), need_centers, backward(s, g, need_centers))


@pytest.mark.parametrize("d", [6, 8])
def test_by_class_out_of_range(d: int, twin: Any) -> None:
    """A label out of range moves no center, and makes its row's gradients NaN."""
    s = draw(40, 5, d, weigh="weights", labels="all")
    y = s.y.clone()
    y[7], y[20], y[21] = 5, 1 << 40, -5
    bad = s._replace(y=y)
    valid = bad._replace(y=torch.where(y > 4, -1, y))
    assert_bitwise(update(bad), update(valid))
    for need_centers in (False, True):
        dx, dc, da = backward(bad, torch.ones(40), need_centers)
        for grad in (dx, da):
            assert grad.isnan().any(1).nonzero()[:, 0].tolist() == [7, 20] and grad[[7, 20]].isnan().all()
            assert not grad[21].any()
        if need_centers:
            assert_bitwise(dc, backward(valid, torch.ones(40), True)[1])


def test_nothing_by_class(twin: Any) -> None:
    for s in (draw(0, 4, 3), Sample(torch.ones(3, 0), torch.zeros(3).long(), torch.ones(4, 0), None, False)):
        assert_bitwise(update(s), s.c)
        dx, dc, _ = backward(s, torch.ones(s.x.shape[0]), True)
        assert dx.shape == s.x.shape and dc.shape == s.c.shape and not dc.any()
    assert not twin.launches()
    none = Sample(torch.ones(2, 3), torch.tensor([-1, -2]), torch.empty(0, 3), None, False)
    dx, dc, _ = backward(none, torch.ones(2), True)
    assert not dx.any() and dc.shape == (0, 3)
    assert update(none).shape == (0, 3)
    left = draw(50, 4, 8)._replace(y=torch.full((50,), IGNORED))
    assert_bitwise(update(left), left.c)


def test_update_traffic(twin: Any) -> None:
    """Features read once; centers of classes with rows written once and read by the warps that have them."""
    for n, k, d, dtypes in ((128, 9, 128, DTYPES[0]), (96, 40, 40, DTYPES[3])):
        s = draw(n, k, d, dtypes, labels="some")
        keep, present = int(counted(s).sum()), len(set(s.y[counted(s)].tolist()))
        c = s.c.clone()
        with twin.traffic(x=s.x, y=s.y, c=c) as moved:
            OPS.update_centers_(c, s.x, s.y, None, False, 0.5, False, 0.0, IGNORED)
        row = d * s.x.element_size()
        assert (moved["x"].loaded, moved["x"].again, moved["y"].loaded) == (keep * row, 0, s.y.nbytes)
        assert moved["c"].stored == present * row
        warps = -(-n // 4)
        assert moved["c"].loaded <= (2 * present + warps) * row


def test_by_class_same_bits(twin: Any) -> None:
    s = draw(301, 7, 132, weigh="logits", labels="skewed")
    found = []
    for seed in range(3):
        twin.module.seed(seed)
        found.append((update(s), *backward(s, torch.linspace(0, 1, 301), True)))
    for other in found[1:]:
        for got, right in zip(other, found[0], strict=True):
            assert_bitwise(got, right)


@pytest.mark.parametrize("weigh", WEIGHTS)
def test_by_class_is_tritons(weigh: str, twin: Any) -> None:
    for dtypes in (DTYPES[0], DTYPES[2]):
        s = draw(90, 6, 21, dtypes, weigh)
        torch.testing.assert_close(update(s), update(s, ops=triton))
        g = torch.linspace(0.5, 1.5, 90)
        for need_centers in (False, True):
            ours, theirs = backward(s, g, need_centers), backward(s, g, need_centers, ops=triton)
            for got, right in zip(ours, theirs, strict=True):
                assert got.dtype == right.dtype and got.shape == right.shape and got.stride() == right.stride()
                torch.testing.assert_close(got, right)


def test_the_island_is_tritons(twin: Any) -> None:
    s = draw(9, 4, 5)
    assert_bitwise(update(s, island=0.5), update(s, ops=triton, island=0.5))
    assert not twin.launches()
    with pytest.raises(ValueError, match="must be contiguous"):
        OPS.update_centers_(s.c.T.contiguous().T, s.x, s.y, None, False, 0.5, False, 0.0, IGNORED)


def test_by_class_barriers(twin: Any) -> None:
    """Warps of fewer rows than others, and fewer digits than warps: somebody gets ahead where a barrier is missing."""
    samples = [
        draw(100, 5, 132, labels="skewed"),
        draw(2218, 300, 2, labels="skewed"),
        draw(100, 1, 2),
        draw(4203, 300, 2, labels="skewed"),
        draw(4203, 1, 2),
    ]

    def check() -> None:
        twin.machine("t4")
        for s in samples:
            check_update(s, 0.5, False, update(s))

    unseen = {
        LAST_BLOCK,
        # Of the keys: each fiber has loaded all of its own before its warp goes on.
        barrier_after("cuda/center_loss_sort_kernel.cu", "keys[i] = sort_key"),
    }
    assert set(twin.unnoticed_barriers(check, seeds=3, forked=True)) <= unseen
