"""What the tests of fused optimizer steps share: items and rows as the optimizers make them, plain loops."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIZES = (1, 7, 129, 4099, 0)
BFLOAT16 = torch.bfloat16


@dataclasses.dataclass
class Item:
    param: Tensor
    grad: Tensor
    slots: tuple[Tensor | None, ...]
    master: Tensor | None
    average: Tensor | None
    row: int = 0
    norm_set: int = 0
    index: int = 0
    offset: int = 0
    period: int = 1
    full_period: int = 1


@dataclasses.dataclass
class Row:
    values: tuple[Any, ...]
    step: Tensor | None


def clone(items: list[Item]) -> list[Item]:
    """Items with memory of their own."""

    def copy(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(copy, value))
        return value.clone() if isinstance(value, Tensor) else value

    return [Item(**{f.name: copy(getattr(i, f.name)) for f in dataclasses.fields(Item)}) for i in items]


def state_of(item: Item) -> dict[str, Tensor]:
    """What a step writes, by name."""
    named = {"param": item.param, "master": item.master, "average": item.average}
    named |= {f"slot {i}": s for i, s in enumerate(item.slots)}
    return {name: t for name, t in named.items() if t is not None}


def make_items(
    dtype: torch.dtype, slot_dtype: torch.dtype, slots: tuple[bool, ...], master: bool = False, average: bool = False,
    sizes: tuple[int, ...] = SIZES,
) -> list[Item]:  # fmt: skip
    """Random parameters, gradients and state; moments as if some steps had been made. Second moments are positive."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    items = []
    for i, size in enumerate(sizes):
        theta = torch.randn(size, dtype=wide)
        state = [torch.randn(size) if j == 0 else torch.rand(size) for j in range(len(slots))]
        items.append(
            Item(
                theta.to(dtype),
                torch.randn(size).to(dtype),
                tuple(s.to(slot_dtype) if has else None for s, has in zip(state, slots)),
                theta.clone() if master else None,
                theta + 0.1 if average else None,
                index=3 * i,
                period=max(1, size),
                full_period=max(1, size),
            )
        )
    return items


# Random bits, written out ---------------------------------------------------------------------------------------------


def philox(counter: list[Any], seed: int) -> list[Any]:
    """Philox4x32-10 on arrays of uint64 that hold 32-bit words."""
    word = np.uint64(0xFFFFFFFF)
    c = [np.asarray(x, dtype=np.uint64) for x in counter]
    k = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        p, q = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        half = np.uint64(32)
        c = [(q >> half) ^ c[1] ^ np.uint64(k[0]), q & word, (p >> half) ^ c[3] ^ np.uint64(k[1]), p & word]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def rounded(x: Tensor, item: Item, step: int, stream: int, seed: int) -> Tensor:
    """float32 to bfloat16 by the random bits of the elements' numbers in the whole parameter."""
    numbers = [i // item.period * item.full_period + item.offset + i % item.period for i in range(x.numel())]
    low = [e // 8 & 0xFFFFFFFF for e in numbers]
    high = [(e // 8 >> 32) + (stream << 24) for e in numbers]
    words = philox([low, high, np.full(len(low), item.index), np.full(len(low), step)], seed)
    bits = [int(words[e % 8 // 2][i]) >> 16 * (e % 2) & 0xFFFF for i, e in enumerate(numbers)]
    pattern = (x.view(torch.int32).long() & 0xFFFFFFFF) + torch.tensor(bits, dtype=torch.int64)
    pattern = torch.where(x.isnan(), 0x7FC0, pattern >> 16)
    return torch.where(pattern > 0x7FFF, pattern - 0x10000, pattern).to(torch.int16).view(BFLOAT16)


def root(x: Tensor) -> Tensor:
    """The square root to the last bit, which torch's vectors do not give."""
    return torch.from_numpy(np.sqrt(x.numpy()))


# Plain steps ----------------------------------------------------------------------------------------------------------


class Plain:
    """Steps items one after the other: in float64 throughout (`exact`), or in the dtypes that kernels compute in.

    The order of operations is the kernels', so that what is not exact has their bits where nothing is contracted.
    """

    def __init__(
        self, family: str, items: list[Item], exact: bool, seed: int | None = None, average_decay: float = 0.0
    ):
        self.family, self.exact, self.seed, self.average_decay = family, exact, seed, average_decay
        self.items = clone(items)
        if exact:
            for i in self.items:
                i.param, i.slots = i.param.double(), tuple(None if s is None else s.double() for s in i.slots)
                i.master, i.average = (None if t is None else t.double() for t in (i.master, i.average))

    def run(self, rows: list[Row], steps: list[int], grads: list[Tensor], factor: float = 1.0) -> None:
        for item, grad in zip(self.items, grads):
            self._one(item, grad, [float(v) for v in rows[item.row].values], steps[item.row], factor)

    def _one(self, item: Item, grad: Tensor, values: list[float], t: int, factor: float) -> None:
        lr, decay_rate, sign, a, b, c = values
        wide = torch.float64 if self.exact or item.param.dtype == torch.float64 else torch.float32

        def scalar(x: float) -> Tensor:
            return torch.tensor(x, dtype=torch.float64).to(wide)

        theta = (item.param if item.master is None else item.master).to(wide)
        g = grad.to(wide) * scalar(sign * factor)
        slots = [None if s is None else s.to(wide) for s in item.slots]
        keep = scalar(1 - lr * decay_rate)
        if self.family == "adamw":
            m = scalar(a) * slots[0] + scalar(1 - a) * g
            v = scalar(b) * slots[1] + scalar(1 - b) * g * g
            top = v
            if slots[2] is not None:
                if self.seed is not None and item.slots[1].dtype == BFLOAT16:
                    self._store(item.slots[1], v, item, t, 2)
                    top = item.slots[1].to(v.dtype)
                top = torch.maximum(slots[2], top)
            one, two = (-math.expm1(t * math.log(beta)) if beta else 1.0 for beta in (a, b))
            denom = root(top) * scalar(1 / math.sqrt(two)) + scalar(c)
            theta = theta * keep - scalar(lr / one) * m / denom
            new = [m, v, None if slots[2] is None else top]
        else:
            gain, rate = (lr, 1.0) if b else (1.0, lr)
            m = scalar(gain) * g
            if slots[0] is not None:
                m = m + scalar(a) * slots[0]
            d = g + scalar(a) * m if c else m
            theta = theta * keep - scalar(rate) * d
            new = [None if slots[0] is None else m]
        for stream, (slot, value) in enumerate(zip(item.slots, new), 1):
            if slot is None:
                continue
            if stream == 3:
                slot.copy_(value)
            else:
                self._store(slot, value, item, t, stream)
        if item.master is None:
            self._store(item.param, theta, item, t, 0)
        else:
            item.master.copy_(theta)
            item.param.copy_(theta)
        if item.average is not None:
            stored = (item.param if item.master is None else item.master).to(wide)
            item.average.copy_(item.average + scalar(1 - self.average_decay) * (stored - item.average))

    def _store(self, out: Tensor, value: Tensor, item: Item, t: int, stream: int) -> None:
        if self.seed is not None and out.dtype == BFLOAT16:
            value = rounded(value.float(), item, t, stream, self.seed)
        out.copy_(value)
