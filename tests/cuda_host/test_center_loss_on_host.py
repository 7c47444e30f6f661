"""The center-loss family: CUDA C++ on the host."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dlkernels.testing import assert_bitwise, assert_within_budget
from dlkernels.triton import center_loss as triton

OPS = torch.ops.dlkernels_cuda_host
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Of features, centers and attention.
DTYPES = [(F32, F32, F32), (F16, F16, F32), (F16, F32, F16), (BF16, BF16, BF16), (BF16, F32, F32)]
NONE, MEAN, SUM = 0, 1, 2
IGNORED = 3
NAN = float("nan")


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
        for weigh in ("none", "weights", "logits"):
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
@pytest.mark.parametrize("weigh", ["none", "weights", "logits"])
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

    assert not twin.unnoticed_barriers(check)
