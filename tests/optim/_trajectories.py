"""AdamW and SGDW once more, in NumPy, over every combination of options at a time.

All parameters of an optimizer lie in flat memory, one parameter per parameter group and dtype, and the groups are the
product of everything a group may differ in. So 200 steps of all combinations are judged by a few operations on vectors:

* every single step from the state that was stored before it (`Run.check_steps`), element by element: a stored value
  must be what the exact result, give or take 4 eps of float32 of the terms it was added from, rounds to;
* the way as a whole (`Run.check_trajectory`), where nothing is stored in half precision, by the error budget.

The formulas are those of the paper and of its moving parts, not those of the code under test.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
DTYPES = (F32, F16, BF16, F64)
HALF = (F16, BF16)
STEPS = 200
SCALE = 12.0  # of the gradients under a GradScaler: no power of two
CHECKPOINTS = (1, 2, 10, 50, STEPS)
# Number of elements, and the view of as many elements in a row: vector, odd, transposed, channels_last, one, none.
SHAPES = (
    (3, lambda x: x.view(3)),
    (17, lambda x: x.view(17)),
    (6, lambda x: x.view(3, 2).t()),
    (12, lambda x: x.view(1, 2, 2, 3).permute(0, 3, 1, 2)),
    (1, lambda x: x.view(1)),
    (0, lambda x: x.view(0)),
)
BETAS, EPS = ((0.9, 0.999), (0.8, 0.95), (0.95, 0.99)), (1e-8, 1e-4, 1e-6)  # of groups 0, 1, 2, 0, ...
SLOTS = {"adamw": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), "sgdw": ("momentum_buffer",)}

OPTIMIZER_OPTIONS = {
    "master_weights": (False, True),
    "state_dtype": (None, F32, BF16),
    "stochastic_rounding": (False, True),
    "max_grad_norm": (None, 60.0),
    "skip_nonfinite": (False, True),
    "ema_decay": (None, 0.9),
    "scaled": (False, True),
}
GROUP_OPTIONS = {
    "adamw": {
        "amsgrad": (False, True),
        "maximize": (False, True),
        "decoupling": ("lr", "schedule"),
        "weight_decay": (0.0, 0.05),
        "tensor_lr": (False, True),
    },
    "sgdw": {
        "mode": ((0.9, "paper", False), (0.9, "gradient", False), (0.9, "gradient", True), (0.0, "paper", False),
                 (0.0, "gradient", False)),
        "maximize": (False, True),
        "decoupling": ("lr", "schedule"),
        "weight_decay": (0.0, 0.05),
        "tensor_lr": (False, True),
    },
}  # fmt: skip


def product(options: dict[str, Iterable[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


# Random numbers and rounding ------------------------------------------------------------------------------------------


def philox(counter: list[np.ndarray], key: tuple[int, int]) -> list[np.ndarray]:
    """Philox4x32-10 on arrays of uint64 that hold 32 bits."""
    mask = np.uint64(0xFFFFFFFF)
    a, b, c, d = (np.asarray(x, dtype=np.uint64) for x in counter)
    k0, k1 = key
    for _ in range(10):
        p, q = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)  # below 2^64
        a, b, c, d = (
            (q >> np.uint64(32)) ^ b ^ np.uint64(k0),
            q & mask,
            (p >> np.uint64(32)) ^ d ^ np.uint64(k1),
            p & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def random16(seed: int, element: Any, number: Any, step: Any, stream: int) -> np.ndarray:
    """The 16 bits for an element of a parameter, at a step, in a stream (0 parameter, 1 first, 2 second moment)."""
    element, number, step = np.broadcast_arrays(*(np.asarray(x, dtype=np.uint64) for x in (element, number, step)))
    block, k = element // np.uint64(8), (element % np.uint64(8)).astype(np.int64)
    high = (block >> np.uint64(32)) + np.uint64(stream << 24)
    words = np.stack(philox([block & np.uint64(0xFFFFFFFF), high, number, step], (seed & 0xFFFFFFFF, seed >> 32)))
    word = np.take_along_axis(words, (k // 2)[None], 0)[0]
    return np.where(k % 2 == 0, word & np.uint64(0xFFFF), word >> np.uint64(16)).astype(np.uint32)


def stored(x: np.ndarray, dtype: torch.dtype, bits: np.ndarray | None = None) -> np.ndarray:
    """x as it comes back from memory of a dtype: to nearest, or bfloat16 by random bits."""
    if bits is not None:
        pattern = ((x.astype(np.float32).view(np.uint32) + bits) >> np.uint32(16)) << np.uint32(16)
        return pattern.view(np.float32).astype(np.float64)
    if dtype == F64:
        return x
    if dtype == BF16:
        return torch.from_numpy(x.astype(np.float32)).bfloat16().double().numpy()
    with np.errstate(over="ignore"):
        return x.astype(np.float16 if dtype == F16 else np.float32).astype(np.float64)


def assert_stored(
    actual: np.ndarray, exact: np.ndarray, tol: np.ndarray, dtype: torch.dtype, bits: Any, what: str
) -> None:
    """Rounding is monotone: what is stored lies between what the ends of the interval round to."""
    low, high = stored(exact - tol, dtype, bits), stored(exact + tol, dtype, bits)
    wrong = ~((low <= actual) & (actual <= high))
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.size} wrong; (step, element) {at}: {actual[at]!r}, "
            f"exact {exact[at]!r}, stored between {low[at]!r} and {high[at]!r}"
        )


# Formulas -------------------------------------------------------------------------------------------------------------


def adamw(theta: Any, g: Any, m: Any, v: Any, v_max: Any, t: Any, lr: Any, decay: Any, h: Any) -> tuple[Any, ...]:
    """Algorithm 2; `h` holds beta1, beta2, eps, amsgrad and 1 - beta^t (by t) per element."""
    kind = theta.dtype.type
    one, b1, b2 = kind(1), h.beta1.astype(kind), h.beta2.astype(kind)
    m = b1 * m + (1 - h.beta1).astype(kind) * g
    v = b2 * v + (1 - h.beta2).astype(kind) * g * g
    v_max = np.where(h.amsgrad, np.maximum(v_max, v), v)
    c1, c2 = (table[t, h.column].astype(kind) for table in h.corrections)
    update = lr * (m / c1) / (np.sqrt(v_max / c2) + h.eps.astype(kind))
    return theta * (one - decay) - update, m, v, v_max, update


def sgdw(theta: Any, g: Any, m: Any, lr: Any, decay: Any, h: Any) -> tuple[Any, ...]:
    """Algorithm 1 without its line 6; `h` holds momentum, paper and nesterov per element."""
    kind = theta.dtype.type
    beta = h.momentum.astype(kind)
    m = beta * m + np.where(h.paper, lr * g, g)
    update = np.where(h.paper, m, lr * np.where(h.nesterov, g + beta * m, m))
    return theta * (kind(1) - decay) - update, m, update


# Flat memory ----------------------------------------------------------------------------------------------------------


class Layout:
    """Where each parameter lies: dtype by dtype, and in a dtype group by group."""

    def __init__(self, family: str, dtypes: tuple[Any, ...], rotate: bool, shift: int, num_groups: int | None) -> None:
        self.family = family
        self.groups = product(GROUP_OPTIONS[family])
        if num_groups is not None:  # spread over all of them
            self.groups = [self.groups[(i * 7 + shift) % len(self.groups)] for i in range(num_groups)]
        self.members: list[tuple[int, torch.dtype, int, int]] = []  # position, dtype, begin, shape
        rows, position_of = [], {}
        for g in range(len(self.groups)):
            for d in (dtypes[(g + shift) % len(dtypes)],) if rotate else dtypes:
                position_of[g, d] = len(position_of)
        self.segments: dict[torch.dtype, slice] = {}
        at = 0
        for d in dtypes:
            begin = at
            for g in range(len(self.groups)):
                if (g, d) not in position_of:
                    continue
                shape = (g + 2 * dtypes.index(d) + shift) % len(SHAPES)
                position = position_of[g, d]
                self.members.append((position, d, at - begin, shape))
                rows += [(g, position, e) for e in range(SHAPES[shape][0])]
                at += SHAPES[shape][0]
            self.segments[d] = slice(begin, at)
        self.n = at
        self.group_of_position = {p: g for (g, _), p in position_of.items()}
        self.members.sort()
        table = np.array(rows, dtype=np.int64)
        self.group, self.position, self.element = table[:, 0], table[:, 1], table[:, 2]
        self.num_params = len(self.members)
        per_group = {
            name: np.array([float(g["mode"][i] == "paper" if name == "paper" else g["mode"][i]) for g in self.groups])
            for i, name in enumerate(("momentum", "paper", "nesterov"))
        } if family == "sgdw" else {}  # fmt: skip
        self.maximize = np.array([g["maximize"] for g in self.groups])[self.group]
        if family == "adamw":
            column = self.group % len(BETAS)
            beta1, beta2 = np.array(BETAS)[column].T
            t = np.maximum(np.arange(STEPS + 1), 1)[:, None]  # before the first step any number will do
            self.h = SimpleNamespace(
                beta1=beta1,
                beta2=beta2,
                eps=np.array(EPS)[column],
                amsgrad=np.array([g["amsgrad"] for g in self.groups])[self.group],
                column=column,
                corrections=[1 - np.array([b[i] for b in BETAS], dtype=np.longdouble) ** t for i in (0, 1)],
            )
        else:
            momentum, paper, nesterov = (per_group[k][self.group] for k in ("momentum", "paper", "nesterov"))
            self.h = SimpleNamespace(momentum=momentum, paper=paper > 0, nesterov=nesterov > 0)

    def flat(self, dtypes: dict[torch.dtype, torch.dtype], device: Any = "cpu") -> dict[torch.dtype, Tensor]:
        return {d: torch.zeros(s.stop - s.start, dtype=dtypes[d], device=device) for d, s in self.segments.items()}

    def views(self, flat: dict[torch.dtype, Tensor]) -> list[Tensor]:
        return [SHAPES[s][1](flat[d][at : at + SHAPES[s][0]]) for _, d, at, s in self.members]

    def read(self, flat: dict[torch.dtype, Tensor]) -> np.ndarray:
        return torch.cat([flat[d].double() for d in self.segments]).cpu().numpy()


@functools.cache
def layout(family: str, dtypes: tuple[Any, ...], rotate: bool, shift: int, num_groups: int | None) -> Layout:
    return Layout(family, dtypes, rotate, shift, num_groups)


@functools.cache
def given(lay: Layout, scaled: bool) -> tuple[np.ndarray, np.ndarray]:
    """Where the parameters start, and the gradients of all steps as stored, not unscaled."""
    rng = np.random.default_rng(7)
    theta = rng.normal(size=lay.n) + 0.5
    size = 10.0 ** rng.uniform(-2, 0.5, size=lay.n) * np.where(np.arange(STEPS) % 3 == 0, 0.2, 1.0)[:, None]
    grads = (rng.normal(size=(STEPS, lay.n)) + 0.3) * size * (SCALE if scaled else 1.0)
    for dtype, s in lay.segments.items():
        theta[s], grads[:, s] = stored(theta[s], dtype), stored(grads[:, s], dtype)
    return theta, grads


@functools.cache
def rounding_bits(lay: Layout, seed: int, stream: int) -> np.ndarray:
    """[step t, element]"""
    return random16(seed, lay.element, lay.position, np.arange(STEPS + 1)[:, None], stream)
