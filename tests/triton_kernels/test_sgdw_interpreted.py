"""SGDW over a table of tensors, interpreted: against plain loops, every dtype pair and option, and bytes moved."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fused_steps import Item, Plain, Row, clone, make_items, state_of

from dlkernels._traffic import interpreter_traffic
from dlkernels.testing import assert_bitwise, assert_within_budget, poisoned_empty, relative_error
from dlkernels.triton import _multi_tensor

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
SEED = 0xFEDCBA9876543210

# lr, decay_rate, sign, momentum, paper, nesterov
FORMS = {
    "paper": (1e-2, 0.1, 1.0, 0.9, True, False),
    "gradient": (1e-2, 0.1, 1.0, 0.9, False, False),
    "nesterov": (1e-2, 0.1, -1.0, 0.9, False, True),
    "no decay": (1e-2, 0.0, -1.0, 0.5, True, False),
}


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What a kernel does not write is NaN."""
    with poisoned_empty():
        yield


def runner(items: list[Item], seed: int | None = None, decay: float | None = None) -> _multi_tensor.Runner:
    return _multi_tensor.Runner("sgdw", items, rounding_seed=seed, average_decay=decay)


def assert_same(items: list[Item], expected: list[Item]) -> None:
    for a, b in zip(items, expected, strict=True):
        for name, value in state_of(a).items():
            assert_bitwise(value, state_of(b)[name], name)


def check(items: list[Item], values: tuple[Any, ...], decay: float | None = None) -> None:
    """Three steps with gradients in other memory, against float64 and against the same loop in these dtypes."""
    exact, eager = (Plain("sgdw", items, exact, average_decay=decay or 0.0) for exact in (True, False))
    theta = items[0].param if items[0].master is None else items[0].master
    slot = items[0].slots[0]
    begin = slot is not None and slot.element_size() < theta.element_size()
    counter, ours = torch.zeros(()), runner(items, decay=decay)
    for t in range(1, 4):
        grads = [torch.randn(i.param.shape).to(i.param.dtype) for i in items]
        if begin:
            exact = Plain("sgdw", items, True, average_decay=decay or 0.0)
        ours.set_grads(grads)
        rows = [Row(values, counter)]
        assert ours.run(rows) is None
        for loop in (exact, eager):
            loop.run(rows, [t], grads)
    assert counter.item() == 3
    for i, item in enumerate(items):
        for name, value in state_of(item).items():
            right, theirs = (state_of(loop.items[i])[name] for loop in (exact, eager))
            if value.dtype == F64:
                assert relative_error(value, right) <= 1e-14, name
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
    check(make_items(*dtypes, (True,)), FORMS["paper"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("momentum", (True, False))
def test_forms(form: str, momentum: bool) -> None:
    for dtype in (F32, F64):
        check(make_items(dtype, dtype, (momentum,), sizes=(7, 300)), FORMS[form])


@pytest.mark.parametrize("momentum", (True, False))
@pytest.mark.parametrize(
    "dtypes", (PAIRS[0], PAIRS[2], PAIRS[3], PAIRS[7]), ids=lambda p: "-".join(str(d)[6:] for d in p)
)
def test_master_and_average(dtypes: tuple[torch.dtype, torch.dtype], momentum: bool) -> None:
    check(make_items(*dtypes, (momentum,), dtypes[0] == BF16, True, (7, 1300)), FORMS["nesterov"], 0.9)


def test_infinite_gradients_stay_where_they_are() -> None:
    """Without nesterov its term is not added as 0 times infinity."""
    items = make_items(F32, F32, (True,), sizes=(5,))
    items[0].grad[1] = float("inf")
    runner(items).run([Row(FORMS["paper"], torch.zeros(()))])
    assert items[0].param[1] == -float("inf") and items[0].param[[0, 2, 3, 4]].isfinite().all()


def test_rows_share_counters_and_take_tensors() -> None:
    """Both forms side by side, with and without momentum; the learning rate in device memory; no counter at all."""
    items = make_items(F32, F32, (True,), sizes=(40, 7)) + make_items(BF16, BF16, (True,), sizes=(33,))
    items += make_items(F32, F32, (False,), sizes=(5, 6))
    for i, item in enumerate(items):
        item.row = i % 3
    counter = torch.tensor(4.0)
    lr = torch.tensor(0.25, dtype=F64)
    for second in (counter, None):
        rows = [
            Row((lr, *FORMS["paper"][1:]), counter),
            Row(FORMS["nesterov"], second),
            Row(FORMS["gradient"], counter),
        ]
        plain = Plain("sgdw", items, False, SEED)
        runner(items, SEED).run(rows)
        plain.run(rows, [int(counter)] * 3, [i.grad for i in items])
        assert_same(items, plain.items)
    assert counter.item() == 6.0


@pytest.mark.parametrize("seed", (None, SEED))
@pytest.mark.parametrize("by", ("found_inf", "nan"))
def test_skipping_changes_nothing(by: str, seed: int | None) -> None:
    items = make_items(BF16, BF16, (True,), average=True, sizes=(7, 1300))
    counter = torch.tensor(3.0)
    if by == "nan":
        items[0].grad[-1] = float(by)
    before, ours = clone(items), runner(items, seed, 0.9)
    options = {"found_inf": torch.ones(1)} if by == "found_inf" else {"norm_squares": ours.squares(1)[0]}
    ours.run([Row(FORMS["paper"], counter)], **options, skip_nonfinite=by == "nan")
    assert_same(items, before)
    assert counter.item() == 3.0


def test_unscales_and_clips() -> None:
    items = make_items(F32, F32, (True,))
    plain, ours, scale = Plain("sgdw", items, False), runner(items), torch.tensor(0.25, dtype=F16)
    total = ours.squares(1)[0]
    norm = ours.run([Row(FORMS["paper"], torch.zeros(()))], inv_scale=scale, norm_squares=total, max_norm=2.0)
    exact = 0.25 * sum(i.grad.double().square().sum() for i in items).sqrt()
    assert (norm - exact).abs() <= 2e-7 * exact
    plain.run([Row(FORMS["paper"], None)], [1], [i.grad for i in items], 0.25 * 2.0 / (exact.item() + 1e-6))
    for a, b in zip(items, plain.items):
        assert_within_budget(a.param, b.param.double())
        assert_within_budget(a.slots[0], b.slots[0].double())


@pytest.mark.parametrize("place", ((0, 130, 130), (16, 24, 96), (3, 130, 130), ((1 << 36) + 5, 10, 33)), ids=str)
@pytest.mark.parametrize("slot_dtype", (BF16, F32), ids=lambda d: str(d)[6:])
def test_stochastic_rounding_bit_for_bit(place: tuple[int, int, int], slot_dtype: torch.dtype) -> None:
    items = make_items(BF16, slot_dtype, (True,), average=True, sizes=(130,))
    items += make_items(BF16, slot_dtype, (False,), sizes=(5,)) + make_items(F32, BF16, (True,), sizes=(9,))
    for item in items:
        item.offset, item.period, item.full_period = place
    plain, ours, counter = Plain("sgdw", items, False, SEED, 0.9), runner(items, SEED, 0.9), torch.zeros(())
    for t in (1, 2):
        ours.run([Row(FORMS["gradient"], counter)])
        plain.run([Row(FORMS["gradient"], None)], [t], [i.grad for i in items])
    assert_same(items, plain.items)


@pytest.mark.parametrize("with_norm", (False, True))
def test_moves_20_bytes_per_parameter(with_norm: bool) -> None:
    """Read theta, g, m; write theta, m: 20 bytes in float32; the norm reads g once more. The rest is tables."""
    items = make_items(F32, F32, (True,), sizes=(30_000,))
    ours = runner(items)
    with interpreter_traffic(p=items[0].param, g=items[0].grad, m=items[0].slots[0]) as traffic:
        options = {"norm_squares": ours.squares(1)[0], "max_norm": 1.0} if with_norm else {}
        ours.run([Row(FORMS["paper"], torch.zeros(()))], **options)
    one = 30_000 * 4
    assert traffic.by_tensor == {"p": [one, one], "g": [(1 + with_norm) * one, 0], "m": [one, one]}
    least = (24 if with_norm else 20) * 30_000
    print(f"sgdw, norm {with_norm}: {traffic.total / 30_000:.2f} bytes per parameter")
    assert least <= traffic.total <= 1.03 * least


def test_moves_12_bytes_without_momentum() -> None:
    items = make_items(F32, F32, (False,), sizes=(30_000,))
    with interpreter_traffic() as traffic:
        runner(items).run([Row(FORMS["paper"], torch.zeros(()))])
    assert 12 * 30_000 <= traffic.total <= 1.04 * 12 * 30_000
