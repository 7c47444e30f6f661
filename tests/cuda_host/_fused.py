"""Items of fused steps (tests/triton_kernels/fused_steps.py) stepped by the table of the host twin, and by Triton."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlkernels import _backend

TESTS = Path(__file__).resolve().parents[1]
for folder in ("optim", "triton_kernels"):
    sys.path.append(str(TESTS / folder))

from fused_steps import Item, Row, state_of  # noqa: E402

from dlkernels.testing import assert_bitwise  # noqa: E402


class Table:
    """What `_runners.CudaRunner` is around the twin's table, for items and rows of tests."""

    def __init__(
        self, family: str, items: list[Item], rows: list[Row], seed: int | None = None, decay: float | None = None
    ) -> None:
        counters = list({id(r.step): r.step for r in rows if r.step is not None}.values())
        places = {id(c): i for i, c in enumerate(counters)}
        lines = [
            (
                (n, i.param, i.grad, [*i.slots], i.master, i.average),
                (i.row, i.norm_set, i.offset, i.period, i.full_period, i.index),
            )
            for n, i in enumerate(items)
        ]
        owners = [i.param for i in items]
        of_row = [places.get(id(r.step), -1) for r in rows]
        self.table = _backend.TWIN.CudaOptimizerTable(
            family, owners, lines, counters, of_row, list(range(len(rows))), decay or 0.0, seed
        )

    def set_grads(self, grads: list[Tensor]) -> None:
        self.table.set_grads(grads)

    def squares(self, sets: int = 1) -> Tensor:
        return self.table.squares(sets)

    def run(self, rows: list[Row], *, scale: Any = None, found_inf: Any = None, norm_squares: Tensor | None = None,
            max_norm: float | None = None, skip_nonfinite: bool = False) -> Tensor | None:  # fmt: skip
        values = [r.values for r in rows]
        return self.table.step(values, scale, found_inf, norm_squares, max_norm, skip_nonfinite)


def assert_same(items: list[Item], expected: list[Item]) -> None:
    """Bit for bit, but for what a NaN looks like."""
    for n, (a, b) in enumerate(zip(items, expected, strict=True)):
        for name, value in state_of(a).items():
            right = state_of(b)[name]
            assert torch.equal(value.isnan(), right.isnan()), f"{name} of item {n}"
            assert_bitwise(value.nan_to_num(), right.nan_to_num(), f"{name} of item {n}")


def unaligned(x: Tensor) -> Tensor:
    """The same values one element behind a multiple of 16 bytes."""
    memory = torch.zeros(x.numel() + 1, dtype=x.dtype)
    return memory[1:].copy_(x)
