"""AdamW over a table of tensors, interpreted: against plain loops, every dtype pair and option, and bytes moved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fused_steps import SIZES, Item, Plain, Row, clone, make_items, philox, rounded, state_of
from torch import Tensor

from dlkernels._traffic import eager_traffic, interpreter_traffic
from dlkernels.testing import Canary, assert_bitwise, assert_within_budget, poisoned_empty, relative_error
from dlkernels.triton import _multi_tensor
from dlkernels.triton._philox import philox as triton_philox

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
VALUES = (1e-2, 0.1, 1.0, 0.9, 0.99, 1e-8)
PLAIN = (True, True, False)
AMSGRAD = (True, True, True)
SEED = 0x123456789ABCDEF


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What a kernel does not write is NaN."""
    with poisoned_empty():
        yield


def runner(items: list[Item], seed: int | None = None, decay: float | None = None) -> _multi_tensor.Runner:
    return _multi_tensor.Runner("adamw", items, rounding_seed=seed, average_decay=decay)


def new_grads(items: list[Item]) -> list[Tensor]:
    return [torch.randn(i.param.shape).to(i.param.dtype) for i in items]


def assert_same(items: list[Item], expected: list[Item]) -> None:
    for a, b in zip(items, expected, strict=True):
        for name, value in state_of(a).items():
            assert_bitwise(value, state_of(b)[name], name)


def check(items: list[Item], values: tuple[Any, ...] = VALUES, decay: float | None = None, steps: int = 3) -> None:
    """Some steps, each with gradients in other memory, against float64 and against the same loop in these dtypes.

    Where moments are stored with fewer digits than the parameter, each step in float64 begins at the stored ones.
    """
    exact, eager = (Plain("adamw", items, exact, average_decay=decay or 0.0) for exact in (True, False))
    theta = items[0].param if items[0].master is None else items[0].master
    begin = items[0].slots[0].element_size() < theta.element_size()
    counter, rows = torch.zeros(()), []
    ours = runner(items, decay=decay)
    for t in range(1, steps + 1):
        grads, rows = new_grads(items), [Row(values, counter)]
        if begin:
            exact = Plain("adamw", items, True, average_decay=decay or 0.0)
        ours.set_grads(grads)
        assert ours.run(rows) is None
        for loop in (exact, eager):
            loop.run(rows, [t], grads)
    assert counter.item() == steps
    for i, item in enumerate(items):
        for name, value in state_of(item).items():
            right, theirs = (state_of(loop.items[i])[name] for loop in (exact, eager))
            if value.dtype == F64:
                assert relative_error(value, right) <= 1e-13, name
            else:
                assert_within_budget(value, right, theirs, what=f"{name} of {value.numel()}")


PAIRS = (
    (F32, F32),
    (F32, BF16),
    (BF16, BF16),
    (BF16, F32),
    (F16, F16),
    (F16, F32),
    (F16, BF16),
    (F64, F64),
    (F64, BF16),
)


@pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: "-".join(str(d)[6:] for d in p))
def test_matches_float64(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(make_items(*dtypes, PLAIN))


@pytest.mark.parametrize("dtypes", PAIRS[:4] + PAIRS[7:8], ids=lambda p: "-".join(str(d)[6:] for d in p))
def test_amsgrad_master_average_maximize(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    master = dtypes[0] == BF16
    check(make_items(*dtypes, AMSGRAD, master, True, (7, 1300)), (1e-2, 0.1, -1.0, 0.9, 0.99, 1e-8), 0.9)


@pytest.mark.parametrize("values", [(1e-2, 0.0, 1.0, 0.0, 0.0, 1e-3), (1e-3, 0.1, 1.0, 0.9, 0.99999, 1e-8)], ids=str)
def test_betas_at_their_ends(values: tuple[float, ...]) -> None:
    check(make_items(F32, F32, PLAIN, sizes=(9,)), values)
    check(make_items(F64, F64, PLAIN, sizes=(9,)), values)


def test_state_of_different_kinds_and_rows() -> None:
    """Four launches; two groups, whose parameters share counters or not; a learning rate in device memory."""
    items = make_items(F32, F32, PLAIN, sizes=(40, 7)) + make_items(BF16, BF16, AMSGRAD, sizes=(33,))
    items += make_items(F32, F32, PLAIN, average=True, sizes=(5,)) + make_items(F64, BF16, PLAIN, sizes=(6,))
    counters = [torch.tensor(4.0), torch.tensor(9.0)]
    for i, item in enumerate(items):
        item.row = i % 3
    for dtype in (F32, F64, BF16, F16):
        lr = torch.tensor(0.25, dtype=dtype)
        rows = [
            Row((lr, 0.1, *VALUES[2:]), counters[0]),
            Row(VALUES, counters[0]),
            Row((0.5, *VALUES[1:]), counters[1]),
        ]
        steps = [int(r.step) + 1 for r in rows]
        plain = Plain("adamw", items, False, SEED, average_decay=0.5)
        runner(items, SEED, 0.5).run(rows)
        plain.run(rows, steps, [i.grad for i in items])
        wide, other = items[-1].param, plain.items[-1].param
        assert relative_error(wide, other) <= 1e-15
        wide.copy_(other)
        assert_same(items, plain.items)
    assert [c.item() for c in counters] == [8.0, 13.0]


def test_many_groups() -> None:
    """A group for each parameter, more than a warp has threads, of one counter: it goes up once."""
    items = make_items(F32, F32, PLAIN, sizes=(3,) * 70)
    for i, item in enumerate(items):
        item.row = i
    counter = torch.tensor(2.0)
    rows = [Row((1e-3 * (1 + i), *VALUES[1:]), counter) for i in range(len(items))]
    plain = Plain("adamw", items, False)
    runner(items).run(rows)
    plain.run(rows, [3] * len(rows), [i.grad for i in items])
    assert_same(items, plain.items)
    assert counter.item() == 3.0


def test_scalars_and_memory_may_change_between_steps() -> None:
    items = make_items(F32, F32, PLAIN, sizes=(130,))
    plain, ours, counter = Plain("adamw", items, False), runner(items), torch.zeros(())
    for t, lr in enumerate((0.1, 0.2, 0.2), 1):
        rows = [Row((lr, *VALUES[1:]), counter)]
        ours.run(rows)
        plain.run(rows, [t], [items[0].grad])
        items[0].param.data = items[0].param.data.clone()
    assert_same(items, plain.items)


@pytest.mark.parametrize("dtype", (F32, BF16, F64), ids=lambda d: str(d)[6:])
def test_pieces_and_alignment_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks to a program; tensors that do not begin at 16 bytes; what is beside them stays."""
    items = make_items(dtype, dtype, PLAIN, sizes=(129, 5003))
    seed = SEED if dtype == BF16 else None
    others = [clone(items), clone(items)]
    runner(items, seed).run([Row(VALUES, torch.zeros(()))])

    monkeypatch.setattr(_multi_tensor, "PROGRAMS", 2)
    assert _multi_tensor.steps_of([129, 5003], _multi_tensor.BLOCK) == 2
    runner(others[0], seed).run([Row(VALUES, torch.zeros(()))])
    assert_same(others[0], items)

    canaries = []
    for item in others[1]:
        named = [Canary(t) for t in (item.param, *item.slots[:2])]
        item.param, item.slots = named[0].tensor, (named[1].tensor, named[2].tensor, None)
        canaries += named
    assert any(c.tensor.data_ptr() % 16 for c in canaries)
    runner(others[1], seed).run([Row(VALUES, torch.zeros(()))])
    assert_same(others[1], items)
    for canary in canaries:
        canary.check()


# Control --------------------------------------------------------------------------------------------------------------


def test_unscales_and_clips() -> None:
    for max_norm, scale in ((0.5, 1.0), (1e9, 0.25), (2.0, 1 / 1024)):
        items = make_items(F32, F32, PLAIN)
        plain, counter = Plain("adamw", items, False), torch.zeros(())
        ours = runner(items)
        total = ours.squares(1)
        norm = math.sqrt(sum(i.grad.double().square().sum().item() for i in items)) * scale
        rows = [Row(VALUES, counter)]
        got = ours.run(rows, inv_scale=torch.tensor(scale), norm_squares=total[0], max_norm=max_norm)
        assert got.dtype == F32 and got.shape == () and abs(got.item() - norm) <= 2e-7 * norm
        plain.run(rows, [1], [i.grad for i in items], scale * min(1.0, max_norm / (norm + 1e-6)))
        for a, b in zip(items, plain.items):
            assert_within_budget(a.param, b.param.double())
            assert_within_budget(a.slots[0], b.slots[0].double())


def test_norm_that_is_nan_reaches_the_parameters() -> None:
    """As with torch.nn.utils.clip_grad_norm_: NaN everywhere; an infinite norm clips what is finite to 0."""
    for bad in (float("nan"), float("inf")):
        items = make_items(F32, F32, PLAIN, sizes=(9, 3))
        items[0].grad[2] = bad
        before, ours = clone(items), runner(items)
        ours.run([Row(VALUES, torch.zeros(()))], norm_squares=ours.squares(1)[0], max_norm=1.0)
        if math.isnan(bad):
            assert all(i.param.isnan().all() for i in items)
        else:
            assert items[0].param.isnan().sum() == 1
            assert_within_budget(items[1].slots[0], before[1].slots[0].double() * 0.9)


@pytest.mark.parametrize("seed", (None, SEED))
@pytest.mark.parametrize("by", ("found_inf", "nan", "inf"))
def test_skipping_changes_nothing(by: str, seed: int | None) -> None:
    items = make_items(BF16, BF16, AMSGRAD, average=True, sizes=(7, 1300))
    counter = torch.tensor(3.0)
    if by != "found_inf":
        items[1].grad[-1] = float(by)
    before, ours = clone(items), runner(items, seed, 0.9)
    with interpreter_traffic(p=items[1].param, g=items[1].grad) as traffic:
        if by == "found_inf":
            ours.run([Row(VALUES, counter)], found_inf=torch.ones(()))
            assert traffic.by_tensor == {"p": [0, 0], "g": [0, 0]}
        else:
            norm = ours.run([Row(VALUES, counter)], norm_squares=ours.squares(1)[0], skip_nonfinite=True)
            assert not norm.isfinite()
    assert_same(items, before)
    assert counter.item() == 3.0
    items[1].grad[-1] = 1.0
    ours.run([Row(VALUES, counter)], found_inf=torch.zeros(()), norm_squares=ours.squares(1)[0], skip_nonfinite=True)
    assert counter.item() == 4.0 and not torch.equal(items[1].param, before[1].param)


def test_norms_of_sets() -> None:
    """Sets of mixed dtypes; magnitudes whose squares float32 does not hold; nothing, zeros; not finite."""
    sizes = (5003, 1, 300, 0, 2100)
    items = [i for d in (F32, BF16, F16, F64) for i in make_items(d, d, PLAIN, sizes=sizes)]
    for n, item in enumerate(items):
        item.norm_set = n * 7 % 3
        if item.grad.dtype in (F32, BF16):
            item.grad *= (1e25, 1e-25, 1e-30, 1.0, 1e-42)[n % 5]
    exact = torch.stack([sum(i.grad.double().square().sum() for i in items if i.norm_set == s) for s in range(3)])
    first = runner(items).squares(3)
    assert first.dtype == F64 and bool(((first - exact).abs() <= 2e-7 * exact).all()), (first, exact)
    assert_bitwise(runner(items).squares(3), first)
    assert_bitwise(runner(items).squares(4), torch.cat([first, first.new_zeros(1)]))

    for magnitude in (1e25, 1e-25, 1e-41, 1.0, 0.0):
        one = make_items(F32, F32, PLAIN, sizes=(3000,))
        one[0].grad *= magnitude
        total = one[0].grad.double().square().sum()
        assert (runner(one).squares(1)[0] - total).abs() <= 2e-7 * total, magnitude
    for bad in ("nan", "inf", "-inf"):
        for position in (0, 2999):
            one[0].grad[position] = float(bad)
            assert not runner(one).squares(1).isfinite().any()
            one[0].grad[position] = 0.0


def test_reads_nothing_back_and_uploads_what_changed() -> None:
    """No value of a tensor reaches the host, so that a CUDA graph can hold the step; tables are written once."""
    items = make_items(F32, F32, PLAIN, sizes=(7, 3))
    ours, rows = runner(items), [Row((torch.tensor(0.1), *VALUES[1:]), torch.zeros(()))]
    uploads = []
    for grads in ([i.grad for i in items], [i.grad for i in items], [i.grad.clone() for i in items]):
        with eager_traffic() as traffic:
            ours.set_grads(grads)
            total = ours.squares(1)
            ours.run(rows, found_inf=torch.zeros(()), norm_squares=total[0], max_norm=1.0, skip_nonfinite=True)
        reads = [name for name in traffic.calls if "_local_scalar_dense" in name or "nonzero" in name]
        assert not reads or not uploads  # pieces are counted, on the host, before the first step
        uploads.append([table.tensor._version for table in (ours._items, ours._grads, ours._rows)])
    assert uploads[0] == uploads[1] and [b - a for a, b in zip(*uploads[1:])] == [0, 1, 0]


def test_nothing_to_sum_or_step() -> None:
    items = make_items(F32, F32, PLAIN, sizes=(0,))
    ours, counter = runner(items), torch.zeros(())
    assert_bitwise(ours.squares(2), torch.zeros(2, dtype=F64))
    ours.run([Row(VALUES, counter)])
    assert counter.item() == 1.0


def test_rejects() -> None:
    ours = runner(make_items(F32, F32, PLAIN, sizes=(3, 4)))
    with pytest.raises(ValueError, match="need `norm_squares`"):
        ours.run([Row(VALUES, torch.zeros(()))], max_norm=1.0)
    with pytest.raises(ValueError, match="`grads` must have 2 tensors, got 1"):
        ours.set_grads([torch.zeros(3)])


# Stochastic rounding --------------------------------------------------------------------------------------------------


@triton.jit
def _words_kernel(counter_ptr, seed_ptr, out_ptr):
    i = tl.arange(0, 2)
    c0, c1, c2, c3 = (
        tl.load(counter_ptr + i).to(tl.uint32), tl.load(counter_ptr + 2 + i).to(tl.uint32),
        tl.load(counter_ptr + 4 + i).to(tl.uint32), tl.load(counter_ptr + 6 + i).to(tl.uint32),
    )  # fmt: skip
    w0, w1, w2, w3 = triton_philox(c0, c1, c2, c3, tl.load(seed_ptr))
    tl.store(out_ptr + i, w0.to(tl.int64))
    tl.store(out_ptr + 2 + i, w1.to(tl.int64))
    tl.store(out_ptr + 4 + i, w2.to(tl.int64))
    tl.store(out_ptr + 6 + i, w3.to(tl.int64))


# The published known answers: zeros, and the digits of pi.
ANSWERS = (
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("counter", "seed", "words"), ANSWERS)
def test_philox(counter: tuple[int, ...], seed: int, words: tuple[int, ...]) -> None:
    assert [int(w) for w in philox(list(counter), seed)] == list(words)
    out = torch.zeros(4, 2, dtype=torch.int64)
    given = torch.tensor(counter).unsqueeze(1).expand(4, 2).contiguous()
    _words_kernel[(1,)](given, torch.tensor(seed), out)
    assert out[:, 0].tolist() == out[:, 1].tolist() == list(words)


# (offset, period, full_period) of a shard: whole, rows from a multiple of eight on, columns; then at odd places.
PLACES = (
    (0, None, None), (64, None, None), ((1 << 40) + 8, None, None), (16, 24, 96),
    (3, None, None), ((1 << 36) + 5, None, None), (10, 50, 100),
)  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_stochastic_rounding_bit_for_bit(place: tuple[Any, ...]) -> None:
    """Parameters and moments, two steps; a counter far on; a seed of 64 bits."""
    items = make_items(BF16, BF16, PLAIN, sizes=(1300, 129, 1)) + make_items(BF16, BF16, AMSGRAD, sizes=(70,))
    for n, item in enumerate(items):
        size = item.param.numel()
        item.offset, item.index = place[0], 5 + n
        item.period, item.full_period = place[1] or size, place[2] or size
    items[1].grad[3] = float("nan")
    seed = SEED | 1 << 63
    counter = torch.tensor(99.0)
    plain, ours = Plain("adamw", items, False, seed), runner(items, seed)
    for t in (100, 101):
        rows = [Row(VALUES, counter)]
        ours.run(rows)
        plain.run(rows, [t], [i.grad for i in items])
    assert_same(items, plain.items)
    assert (items[1].param.view(torch.int16)[3] & 0xFFFF) == 0x7FC0


@pytest.mark.parametrize("kind", ("float32 moments", "master", "float32 parameter", "float16"))
def test_what_is_rounded_stochastically(kind: str) -> None:
    """bfloat16 only, and not the copy of a master."""
    dtypes = {"float32 moments": (BF16, F32), "master": (BF16, BF16), "float32 parameter": (F32, BF16)}
    items = make_items(*dtypes.get(kind, (F16, F16)), PLAIN, kind == "master", True, (130, 3))
    plain, counter = Plain("adamw", items, False, SEED, 0.9), torch.zeros(())
    rows = [Row(VALUES, counter)]
    runner(items, SEED, 0.9).run(rows)
    plain.run(rows, [1], [i.grad for i in items])
    if kind == "master":  # the interpreter cuts digits off where GPUs round to nearest
        for ours, theirs in zip(items, plain.items):
            assert_within_budget(ours.param, theirs.master.double())
            theirs.param = ours.param
    assert_same(items, plain.items)


def test_rounding_is_unbiased_and_to_a_neighbour() -> None:
    x = torch.full((4096,), 1 + 0.25 * 2**-7)
    item = Item(x.bfloat16(), x, (), None, None, period=4096, full_period=4096)
    y = rounded(x, item, 1, 0, SEED).double()
    assert set(y.unique().tolist()) == {1.0, 1 + 2**-7}
    assert abs(np.mean((y.numpy() - 1) * 2**7) - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4096)


# Traffic --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_norm", (False, True))
def test_moves_28_bytes_per_parameter(with_norm: bool) -> None:
    """Read theta, g, m, v; write theta, m, v: 28 bytes in float32; the norm reads g once more. The rest is tables."""
    items = make_items(F32, F32, PLAIN, sizes=(40_000, 4099))
    assert sum(SIZES) < 44_099
    ours = runner(items)
    with interpreter_traffic(p=items[0].param, g=items[0].grad, m=items[0].slots[0], v=items[0].slots[1]) as traffic:
        options = {"norm_squares": ours.squares(1)[0], "max_norm": 1.0} if with_norm else {}
        ours.run([Row(VALUES, torch.zeros(()))], **options)
    one = 40_000 * 4
    grad = [2 * one, 0] if with_norm else [one, 0]
    assert traffic.by_tensor == {"p": [one, one], "g": grad, "m": [one, one], "v": [one, one]}
    least = (32 if with_norm else 28) * 44_099
    print(f"adamw, norm {with_norm}: {traffic.total / 44_099:.2f} bytes per parameter")
    assert least <= traffic.total <= 1.02 * least


@pytest.mark.parametrize(
    ("dtypes", "master", "bytes_each"), [((BF16, BF16), False, 14), ((BF16, F32), True, 28), ((F64, F64), False, 56)]
)
def test_moves_the_least_in_other_dtypes(dtypes: tuple[Any, Any], master: bool, bytes_each: int) -> None:
    items = make_items(*dtypes, PLAIN, master, sizes=(20_000,))
    with interpreter_traffic() as traffic:
        runner(items).run([Row(VALUES, torch.zeros(()))])
    assert 20_000 * bytes_each <= traffic.total <= 1.04 * 20_000 * bytes_each
