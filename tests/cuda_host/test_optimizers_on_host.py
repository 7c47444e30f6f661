"""Fused optimizer steps: CUDA C++ on the host, against float64, plain loops in the same dtypes, and Triton."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from _fused import Table, assert_same, unaligned
from fused_steps import Item, Plain, Row, clone, make_items, state_of
from torch import Tensor

from dlkernels.testing import assert_bitwise, assert_within_budget
from dlkernels.triton import _multi_tensor

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SEED = 0x123456789ABCDEF
VALUES = {"adamw": (1e-2, 0.1, 1.0, 0.9, 0.99, 1e-8), "sgdw": (1e-2, 0.1, 1.0, 0.9, True, False)}
USUAL = {"adamw": (True, True, False), "sgdw": (True,)}
MOST = {"adamw": (True, True, True), "sgdw": (True,)}
PAIRS = ((F32, F32), (F32, BF16), (BF16, BF16), (BF16, F32), (F16, F16), (F16, F32), (F16, BF16))
SIZES = (1, 7, 129, 4099, 0, 2048, 8)

families = pytest.mark.parametrize("family", VALUES)
pairs = pytest.mark.parametrize("dtypes", PAIRS, ids=lambda p: "-".join(str(d)[6:] for d in p))


def new_grads(items: list[Item]) -> list[Tensor]:
    return [torch.randn(i.param.shape).to(i.param.dtype) for i in items]


def check(
    family: str, items: list[Item], values: tuple[Any, ...] | None = None, decay: float | None = None, steps: int = 2
) -> None:
    """Some steps, each with gradients in other memory, against float64 and against the same loop in these dtypes.

    Where moments are stored with fewer digits than the parameter, each step in float64 begins at the stored ones.
    """
    values = values or VALUES[family]
    exact, eager = (Plain(family, items, exact, average_decay=decay or 0.0) for exact in (True, False))
    theta, slot = items[0].param if items[0].master is None else items[0].master, items[0].slots[0]
    begin = slot is not None and slot.element_size() < theta.element_size()
    counter = torch.zeros(())
    rows = [Row(values, counter)]
    ours = Table(family, items, rows, decay=decay)
    for t in range(1, steps + 1):
        grads = new_grads(items)
        if begin:
            exact = Plain(family, items, True, average_decay=decay or 0.0)
        ours.set_grads(grads)
        assert ours.run(rows) is None
        for loop in (exact, eager):
            loop.run(rows, [t], grads)
    assert counter.item() == steps
    for i, item in enumerate(items):
        for name, value in state_of(item).items():
            right, theirs = (state_of(loop.items[i])[name] for loop in (exact, eager))
            assert_within_budget(value, right, theirs, what=f"{name} of {value.numel()}")


def near(items: list[Item], expected: list[Item]) -> None:
    for n, (a, b) in enumerate(zip(items, expected, strict=True)):
        for name, value in state_of(a).items():
            assert_within_budget(value, state_of(b)[name].double(), what=f"{name} of item {n}")


# Steps ----------------------------------------------------------------------------------------------------------------


@families
@pairs
def test_usual(family: str, dtypes: tuple[Any, Any], twin: Any) -> None:
    check(family, make_items(*dtypes, USUAL[family], sizes=SIZES))
    assert [launch["op"] for launch in twin.launches() if launch["grid"] > 1] == [f"{family}_step"] * 2


@families
@pairs
def test_everything(family: str, dtypes: tuple[Any, Any], twin: Any) -> None:
    """AMSGrad, master copies, averages, maximize."""
    values = (*VALUES[family][:2], -1.0, *VALUES[family][3:])
    check(family, make_items(*dtypes, MOST[family], dtypes[0] != F32, True, sizes=SIZES), values, 0.9)
    items = make_items(*dtypes, MOST[family], False, True, sizes=(7, 2056))  # averages of what is stored in half
    plain, rows = Plain(family, items, False, average_decay=0.9), [Row(values, torch.zeros(()))]
    Table(family, items, rows, None, 0.9).run(rows)
    plain.run(rows, [1], [i.grad for i in items])
    near(items, plain.items)


@pytest.mark.parametrize("values", [(1e-2, 0.0, 1.0, 0.0, 0.0, 1e-3), (1e-3, 0.1, 1.0, 0.9, 0.99999, 1e-8)], ids=str)
def test_betas_at_their_ends(values: tuple[float, ...], twin: Any) -> None:
    check("adamw", make_items(F32, F32, USUAL["adamw"], sizes=(9,)), values)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("form", [(True, False), (False, False), (False, True)], ids=["paper", "gradient", "nesterov"])
def test_forms_of_sgdw(form: tuple[bool, bool], momentum: bool, twin: Any) -> None:
    values = (1e-2, 0.1, -1.0, 0.9 if momentum else 0.0, *form)
    check("sgdw", make_items(F32, F32, (momentum,), sizes=(7, 300)), values)
    check("sgdw", make_items(BF16, BF16, (momentum,), sizes=(7, 300)), values)


def test_infinite_gradients_stay_where_they_are(twin: Any) -> None:
    """Without nesterov its term is not added as 0 times infinity."""
    items = make_items(F32, F32, (True,), sizes=(5,))
    items[0].grad[1] = float("inf")
    rows = [Row(VALUES["sgdw"], torch.zeros(()))]
    Table("sgdw", items, rows).run(rows)
    assert items[0].param[1] == -float("inf") and items[0].param[[0, 2, 3, 4]].isfinite().all()


@families
def test_rows_and_kinds_in_one_launch(family: str, twin: Any) -> None:
    """Groups, counters that are shared or not or not there, learning rates in device memory, all dtypes: one launch."""
    items = [i for d in PAIRS for i in make_items(*d, USUAL[family], sizes=(40, 2100, 7))]
    items += make_items(BF16, F32, USUAL[family], True, True, sizes=(33, 4100))
    counters = [torch.tensor(4.0), torch.tensor(9.0)]
    for i, item in enumerate(items):
        item.row = i % 4
    for dtype in (F32, torch.float64, BF16, F16):
        lr, values = torch.tensor(0.25, dtype=dtype), VALUES[family]
        rows = [
            Row((lr, 0.1, *values[2:]), counters[0]),
            Row(values, counters[0]),
            Row((0.5, *values[1:]), counters[1]),
            Row(values, counters[1]),
        ]
        steps = [int(r.step) + 1 for r in rows]
        plain = Plain(family, items, False, average_decay=0.5)
        table = Table(family, items, rows, None, 0.5)
        twin.launches()
        table.run(rows)
        assert [launch["op"] for launch in twin.launches() if launch["grid"] > 1] == [f"{family}_step"]
        plain.run(rows, steps, [i.grad for i in items])
        near(items, plain.items)
    assert [c.item() for c in counters] == [8.0, 13.0]


@families
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("machine", ["h200", "a100", "t4"])
def test_machines_alignment_and_order_change_nothing(family: str, dtype: Any, machine: str, twin: Any) -> None:
    """The same bits for any number of blocks, any order of them, and for tensors that do not begin at 16 bytes."""
    items = make_items(dtype, dtype, USUAL[family], sizes=(129, 5003, 4096))
    seed, rows = SEED if dtype == BF16 else None, [Row(VALUES[family], torch.zeros(()))]
    others = clone(items)
    Table(family, items, rows, seed).run(rows)
    for item in others:
        item.param, item.grad = unaligned(item.param), unaligned(item.grad)
        item.slots = tuple(None if s is None else unaligned(s) for s in item.slots)
    twin.machine(machine)
    twin.module.seed(99)
    rows = [Row(VALUES[family], torch.zeros(()))]
    Table(family, others, rows, seed).run(rows)
    assert_same(others, items)


@families
def test_triton_steps_alike(family: str, twin: Any) -> None:
    """The launcher that serves these where CUDA C++ is not there, over two steps."""
    for dtypes, master in (((F32, F32), False), ((BF16, F32), True)):
        items = make_items(*dtypes, MOST[family], master, True, sizes=(7, 1300))
        theirs = clone(items)
        rows = [[Row(VALUES[family], torch.zeros(()))] for _ in range(2)]
        ours = Table(family, items, rows[0], None, 0.9)
        other = _multi_tensor.Runner(family, theirs, rounding_seed=None, average_decay=0.9)
        for _ in range(2):
            norms = [
                ours.run(rows[0], norm_squares=ours.squares()[0], max_norm=1.0),
                other.run(rows[1], norm_squares=other.squares(1)[0], max_norm=1.0),
            ]
        assert_within_budget(norms[0], norms[1].double(), scalar=True)
        for a, b in zip(items, theirs, strict=True):
            for name, value in state_of(a).items():
                if name == "param" and master:  # the interpreter cuts digits off
                    assert torch.equal(value, a.master.to(value.dtype))
                else:
                    assert_within_budget(value, state_of(b)[name].double(), what=name)


def test_units(twin: Any) -> None:
    """Of 2048 to 16384 elements, several for each block where there are enough; a grid of no more than fits."""
    for machine, blocks in (("h200", 264), ("a100", 216), ("t4", 80)):
        twin.machine(machine)
        for numel in (0, 5, 2048, 5_000_000, 20_000_000):
            item = make_items(F32, F32, (True,), sizes=(0,))[0]
            item.param = item.grad = torch.empty(0).expand(0) if numel == 0 else torch.empty(1).expand(numel)
            item.slots = (item.param,)
            twin.module.dry_run(True)
            try:
                rows = [Row(VALUES["sgdw"], None)]
                table = Table("sgdw", [item], rows)
                table.run(rows)
            finally:
                twin.module.dry_run(False)
            length = max(1, min(8, numel // (blocks * 8 * 2048))) * 2048
            launch = twin.launches()[-1]
            assert (launch["grid"], launch["block"]) == (max(1, min(blocks, -(-numel // length))), 256)


# Control --------------------------------------------------------------------------------------------------------------


@families
def test_unscales_and_clips(family: str, twin: Any) -> None:
    for max_norm, scale in ((0.5, 1.0), (1e9, 4.0), (2.0, 1024.0)):
        items = make_items(F32, F32, USUAL[family])
        plain, rows = Plain(family, items, False), [Row(VALUES[family], torch.zeros(()))]
        ours = Table(family, items, rows)
        norm = math.sqrt(sum(i.grad.double().square().sum().item() for i in items)) / scale
        given = scale if scale > 4 else torch.tensor(scale)
        twin.launches()
        got = ours.run(rows, scale=given, norm_squares=ours.squares()[0], max_norm=max_norm)
        assert [launch["op"] for launch in twin.launches()[-2:]] == ["gradient_squares", f"{family}_step"]
        assert got.dtype == F32 and got.shape == () and abs(got.item() - norm) <= 2e-7 * norm
        plain.run(rows, [1], [i.grad for i in items], 1 / scale * min(1.0, max_norm / (norm + 1e-6)))
        near(items, plain.items)


@families
def test_norm_that_is_nan_reaches_the_parameters(family: str, twin: Any) -> None:
    """As with torch.nn.utils.clip_grad_norm_: NaN everywhere; an infinite norm clips what is finite to 0."""
    for bad in (math.nan, math.inf):
        items = make_items(F32, F32, USUAL[family], sizes=(9, 3))
        items[0].grad[2] = bad
        before, rows = clone(items), [Row(VALUES[family], torch.zeros(()))]
        ours = Table(family, items, rows)
        ours.run(rows, norm_squares=ours.squares()[0], max_norm=1.0)
        if math.isnan(bad):
            assert all(i.param.isnan().all() for i in items)
        else:
            assert items[0].param.isnan().sum() == 1
            assert_within_budget(items[1].slots[0], before[1].slots[0].double() * 0.9)


def test_amsgrad_keeps_nan(twin: Any) -> None:
    """In the gradient or in the largest second moment: as torch.maximum."""
    items = make_items(F32, F32, MOST["adamw"], sizes=(16, 3))
    for item in items:
        item.grad[1] = math.nan
        item.slots[2][2] = math.nan
    rows = [Row(VALUES["adamw"], torch.zeros(()))]
    Table("adamw", items, rows).run(rows)
    for item in items:
        assert item.slots[2].isnan().nonzero().flatten().tolist() == [1, 2]
        assert item.param.isnan().nonzero().flatten().tolist() == [1, 2]


@families
@pytest.mark.parametrize("seed", [None, SEED])
@pytest.mark.parametrize("by", ["found_inf", "nan", "inf"])
def test_skipping_changes_nothing(family: str, by: str, seed: int | None, twin: Any) -> None:
    items = make_items(BF16, BF16, MOST[family], average=True, sizes=(7, 1300))
    counter = torch.tensor(3.0)
    rows = [Row(VALUES[family], counter)]
    if by != "found_inf":
        items[1].grad[-1] = float(by)
    before, ours = clone(items), Table(family, items, rows, seed, 0.9)
    if by == "found_inf":
        with twin.traffic(p=items[1].param, g=items[1].grad) as moved:
            ours.run(rows, found_inf=torch.ones(()))
        assert all((moved[x].loaded, moved[x].stored) == (0, 0) for x in "pg")
    else:
        norm = ours.run(rows, norm_squares=ours.squares()[0], skip_nonfinite=True)
        assert not norm.isfinite()
    assert_same(items, before)
    assert counter.item() == 3.0
    items[1].grad[-1] = 1.0
    ours.run(rows, found_inf=torch.zeros(()), norm_squares=ours.squares()[0], skip_nonfinite=True)
    assert counter.item() == 4.0 and not torch.equal(items[1].param, before[1].param)


def test_norms_of_sets(twin: Any) -> None:
    """Sets of mixed dtypes; magnitudes whose squares float32 does not hold; nothing, zeros; not finite."""
    sizes, rows = (5003, 1, 300, 0, 2100), [Row(VALUES["adamw"], None)]
    items = [i for d in (F32, BF16, F16) for i in make_items(d, d, USUAL["adamw"], sizes=sizes)]
    for n, item in enumerate(items):
        item.norm_set = n * 7 % 3
        if item.grad.dtype in (F32, BF16):
            item.grad *= (1e25, 1e-25, 1e-30, 1.0, 1e-42)[n % 5]
    items[6].grad = unaligned(items[6].grad)
    exact = torch.stack([sum(i.grad.double().square().sum() for i in items if i.norm_set == s) for s in range(3)])
    first = Table("adamw", items, rows).squares(3).clone()
    assert first.dtype == torch.float64 and bool(((first - exact).abs() <= 2e-7 * exact).all()), (first, exact)
    twin.module.seed(5)
    twin.machine("t4")
    assert_bitwise(Table("adamw", items, rows).squares(3), first)
    assert_bitwise(Table("adamw", items, rows).squares(4), torch.cat([first, first.new_zeros(1)]))

    one = make_items(F32, F32, USUAL["adamw"], sizes=(3000,))
    table, start = Table("adamw", one, rows), one[0].grad.clone()
    for magnitude in (1e25, 1e-25, 1e-41, 1.0, 0.0):
        one[0].grad.copy_(start * magnitude)
        total = one[0].grad.double().square().sum()
        assert (table.squares()[0] - total).abs() <= 2e-7 * total, magnitude
    for bad in ("nan", "inf", "-inf"):
        for position in (0, 2999):
            one[0].grad[position] = float(bad)
            assert not table.squares().isfinite().any()
            one[0].grad[position] = 0.0


@families
def test_nothing_to_sum_or_step(family: str, twin: Any) -> None:
    items, counter = make_items(F32, F32, USUAL[family], sizes=(0,)), torch.zeros(())
    rows = [Row(VALUES[family], counter)]
    table = Table(family, items, rows)
    assert_bitwise(table.squares(2), torch.zeros(2, dtype=torch.float64))
    table.run(rows)
    assert counter.item() == 1.0


def test_rejects(twin: Any) -> None:
    rows = [Row(VALUES["adamw"], torch.zeros(()))]
    table = Table("adamw", make_items(F32, F32, USUAL["adamw"], sizes=(3, 4)), rows)
    with pytest.raises(ValueError, match="need `norm_squares`"):
        table.run(rows, max_norm=1.0)
    with pytest.raises(ValueError, match="expected 2 gradients, got 1"):
        table.set_grads([torch.zeros(3)])
    with pytest.raises(ValueError, match="`lr` must be one number on cpu"):
        table.run([Row((torch.zeros(2), *VALUES["adamw"][1:]), None)])
    with pytest.raises(TypeError, match="no float64"):
        Table("adamw", make_items(torch.float64, torch.float64, USUAL["adamw"], sizes=(3,)), rows)


# Stochastic rounding --------------------------------------------------------------------------------------------------

# (offset, period, full_period) of a shard: whole, rows from a multiple of eight on, columns; then at odd places.
PLACES = (
    (0, None, None), (64, None, None), ((1 << 40) + 8, None, None), (16, 24, 96),
    (3, None, None), ((1 << 36) + 5, None, None), (10, 50, 100),
)  # fmt: skip


@families
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_stochastic_rounding_bit_for_bit(family: str, place: tuple[Any, ...], twin: Any) -> None:
    """Parameters and moments, two steps; a counter far on; a seed of 64 bits."""
    for slots, sizes in ((USUAL[family], (1300, 129, 1)), (MOST[family], (2200,))):
        items = make_items(BF16, BF16, slots, sizes=sizes)
        for n, item in enumerate(items):
            size = item.param.numel()
            item.offset, item.index = place[0], 5 + n
            item.period, item.full_period = place[1] or size, place[2] or size
        items[-1].grad[0] = math.nan
        seed = SEED | 1 << 63
        rows = [Row(VALUES[family], torch.tensor(99.0))]
        plain, ours = Plain(family, items, False, seed), Table(family, items, rows, seed)
        for t in (100, 101):
            ours.run(rows)
            plain.run(rows, [t], [i.grad for i in items])
        assert_same(items, plain.items)


@families
@pytest.mark.parametrize("kind", ["float32 moments", "master", "float32 parameter", "float16"])
@pytest.mark.parametrize("average", [False, True])
def test_what_is_rounded_stochastically(family: str, average: bool, kind: str, twin: Any) -> None:
    """bfloat16 only, and not the copy of a master; packs of four too."""
    dtypes = {"float32 moments": (BF16, F32), "master": (BF16, BF16), "float32 parameter": (F32, BF16)}
    items = make_items(*dtypes.get(kind, (F16, F16)), USUAL[family], kind == "master", average, (2130, 3))
    for item in items:
        item.offset = 4
    plain, rows = Plain(family, items, False, SEED, 0.9), [Row(VALUES[family], torch.zeros(()))]
    Table(family, items, rows, SEED, 0.9).run(rows)
    plain.run(rows, [1], [i.grad for i in items])
    assert_same(items, plain.items)


# Traffic --------------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("with_norm", [False, True])
def test_moves_the_least_in_float32(family: str, with_norm: bool, twin: Any) -> None:
    """Read theta, g and the moments, write theta and the moments; the norm reads g once more. The rest is tables."""
    items = make_items(F32, F32, USUAL[family], sizes=(40_000, 4099))
    rows = [Row(VALUES[family], torch.zeros(()))]
    table = Table(family, items, rows)
    table.run(rows)
    with twin.traffic(p=items[0].param, g=items[0].grad, m=items[0].slots[0]) as moved:
        options = {"norm_squares": table.squares()[0], "max_norm": 1.0} if with_norm else {}
        table.run(rows, **options)
    one = 40_000 * 4
    assert (moved["p"].loaded, moved["p"].stored, moved["p"].again) == (one, one, 0)
    assert (moved["m"].loaded, moved["m"].stored, moved["m"].again) == (one, one, 0)
    assert (moved["g"].loaded, moved["g"].stored) == (2 * one if with_norm else one, 0)
    least = 44_099 * ({"adamw": 28, "sgdw": 20}[family] + 4 * with_norm)
    assert least <= moved["all"].loaded + moved["all"].stored <= 1.01 * least


@pytest.mark.parametrize(
    ("family", "dtypes", "master", "seed", "each"),
    [("adamw", (BF16, BF16), False, SEED, 14), ("adamw", (BF16, F32), True, None, 28),
     ("adamw", (F32, BF16), False, None, 20), ("sgdw", (BF16, BF16), False, None, 10)],
)  # fmt: skip
def test_moves_the_least_in_other_dtypes(
    family: str, dtypes: Any, master: bool, seed: int | None, each: int, twin: Any
) -> None:
    items = make_items(*dtypes, USUAL[family], master, sizes=(20_000,))
    rows = [Row(VALUES[family], torch.zeros(()))]
    table = Table(family, items, rows, seed)
    table.run(rows)
    with twin.traffic() as moved:
        table.run(rows)
    assert 20_000 * each <= moved["all"].loaded + moved["all"].stored <= 1.01 * 20_000 * each


# Tables ---------------------------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("argument", [32760, 4096])
def test_tables_in_device_memory(family: str, argument: int, twin: Any) -> None:
    """What does not fit into the argument of a launch is written ahead of it, where it differs from the last one."""
    sizes = (3, 9, *(0,) * 28) * (20 if argument == 4096 else 140)  # it is their number that fills a table
    items = make_items(F32, F32, USUAL[family], sizes=sizes)
    rows = [Row(VALUES[family], torch.zeros(()))]
    some = [n for n, size in enumerate(sizes) if size]
    expected = Plain(family, [items[n] for n in some], False)
    ours = Table(family, items, rows)
    twin.module.machine(90, 2, 232448, 233472, 2048, 50 << 20)
    assert ours.table.argument == 32760
    ours.table.argument = argument
    for step in range(3):
        if step == 1:
            grads = [g.clone() for g in (i.grad for i in items)]
            ours.set_grads(grads)
        twin.launches()
        norm = ours.squares()
        ours.run(rows, norm_squares=norm[0], max_norm=1e9)
        ops = [(launch["op"], launch["grid"] > 1) for launch in twin.launches()]
        writes = [op for op, many in ops if not many]
        assert len(ops) - len(writes) == 2 and (not writes) == (step == 2), ops
        expected.run(rows, [step + 1], [items[n].grad for n in some])
        near([items[n] for n in some], expected.items)


@families
def test_few_parameters_need_no_table(family: str, twin: Any) -> None:
    """One launch, whatever changes from step to step."""
    items, counter = make_items(F32, F32, USUAL[family], sizes=(2500,) * 300), torch.zeros(())
    table = Table(family, items, [Row(VALUES[family], counter)])
    twin.module.dry_run(True)
    try:
        table.run([Row(VALUES[family], counter)])
        for lr in (0.1, 0.2):
            grads = new_grads(items)
            table.set_grads(grads)
            twin.launches()
            table.run([Row((lr, *VALUES[family][1:]), counter)])
            assert len(twin.launches()) == 1
    finally:
        twin.module.dry_run(False)


def barrier(file: str, text: str) -> str:
    """The first one at or behind a text, by its name."""
    path = Path(__file__).resolve().parents[2] / file
    lines = path.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if text in line)
    return f"{path.name}:{next(i for i in range(first, len(lines)) if '__syncthreads' in lines[i]) + 1}"


@families
def test_barriers(family: str, twin: Any) -> None:
    """Rows that differ from unit to unit, norms over units of several blocks."""
    items = make_items(F32, F32, USUAL[family], sizes=(3000, 2500, 2100, 5000))
    for n, item in enumerate(items):
        item.row = n
        item.norm_set = n % 2
    # Fibers run each as far as it can go, one after another, so that none is two steps ahead of another; and the thread
    # that takes the ticket is the one that has written, and read the counters.
    unseen = {
        barrier("csrc/cuda/optimizer_step.h", "// nobody needs the row before any more"),
        barrier("csrc/common/cuda_reduce.h", "DL_DEVICE bool last_block"),
    }
    twin.module.machine(75, 1, 65536, 65536, 1024, 4 << 20)  # so that a block has many units

    def check() -> None:
        mine, counters = clone(items), [torch.tensor(float(n)) for n in range(4)]
        rows = [Row((0.01 * (n + 1), *VALUES[family][1:]), c) for n, c in enumerate(counters)]
        plain = Plain(family, mine, False)
        table = Table(family, mine, rows)
        squares = table.squares(2)
        exact = [sum(i.grad.double().square().sum() for i in mine if i.norm_set == s) for s in range(2)]
        assert all(abs(a - b) <= 2e-7 * b for a, b in zip(squares.tolist(), exact, strict=True))
        table.run(rows, norm_squares=squares.sum(), max_norm=1e9)
        plain.run(rows, [n + 1 for n in range(4)], [i.grad for i in mine])
        near(mine, plain.items)
        assert [c.item() for c in counters] == [1.0, 2.0, 3.0, 4.0]

    assert set(twin.unnoticed_barriers(check)) <= unseen
