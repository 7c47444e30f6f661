"""The host half of fused optimizer steps on GPUs: tables of pointers and scalars on the device, and the launches.

No call synchronises, and all that a step launches can be captured in a CUDA graph. A captured step replays the tables
that it was captured with, which its Runner holds; scalars that are to change between replays are tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _norm
from ._common import on_device
from .adamw import adamw_kernel
from .sgdw import sgdw_kernel

BLOCK, TAIL = 1024, 256
MAX_STEPS = 16  # blocks of a piece
PROGRAMS = 2048  # pieces get longer where there would be more of them
SQUARES_BLOCK, SET_BLOCK = 2048, 1024
COLUMNS = 16

_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
_LR_KINDS = {torch.float32: 1, torch.float64: 2, torch.float16: 3, torch.bfloat16: 4}


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Mirror:
    """A table on the host and its copy on the device, written anew where it differs from the last one.

    Each copy has pinned memory of its own, which the caching host allocator keeps from reuse until it is read. A
    capture copies nothing yet, and its replays may find the table of a later step: it records the copy even where the
    table is the last one (not where it is `fixed`) and keeps its host memory. From then on a replay may have written
    the device's copy at any time, so that every later step writes it anew.
    Memory for one capture is allocated ahead: not every PyTorch allocates pinned memory during one.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.int64, fixed: bool = False) -> None:
        self.device, self.dtype, self.fixed = device, dtype, fixed
        self.tensor: Tensor | None = None
        self._last: Any = None
        self._spare: Tensor | None = None
        self._kept: list[Tensor] = []

    def set(self, key: Any, table: Callable[[], Any]) -> Tensor:
        """The table on the device, for a key that tells whether it is the last one."""
        cuda, capturing = self.device.type == "cuda", is_capturing(self.device)
        replayed = capturing or self._kept
        if self.tensor is not None and key == self._last and (self.fixed or not replayed):
            return self.tensor
        values = torch.as_tensor(table(), dtype=self.dtype, device="cpu")
        spare = self._spare if self._spare is not None and self._spare.shape == values.shape else None
        if not cuda:
            host = values
        elif capturing and spare is not None:
            host, self._spare = spare.copy_(values), None
        else:
            host = values.pin_memory()
        if self.tensor is None or self.tensor.shape != host.shape:
            self.tensor = torch.empty(host.shape, dtype=self.dtype, device=self.device)
        self.tensor.copy_(host, non_blocking=True)
        self._last = None if capturing else key
        if capturing:
            self._kept.append(host)
        elif cuda and spare is None and not self.fixed:
            self._spare = torch.empty_like(host, pin_memory=True)
        return self.tensor


class _Launch:
    """Items that one specialisation of the kernel serves."""

    def __init__(self, items: list[int], constants: dict[str, Any], num_warps: int) -> None:
        self.items, self.constants, self.num_warps = items, constants, num_warps
        self.steps, self.pieces = 1, torch.empty(0, device="cpu")


def steps_of(numels: list[int], block: int) -> int:
    """Blocks of a piece: more of them where there are many. It follows from sizes only, as the order of sums must."""
    return max(1, min(MAX_STEPS, sum(numels) // (block * PROGRAMS)))


def pieces_of(items: list[int], numels: list[int], length: int) -> Tensor:
    """[pieces, 2]: item and number of each piece of `length` elements, on the host."""
    counts = torch.tensor([-(-numels[i] // length) for i in items], dtype=torch.int64, device="cpu")
    total = int(counts.sum())
    first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    item = torch.repeat_interleave(torch.tensor(items, dtype=torch.int64, device="cpu"), counts)
    return torch.stack((item, torch.arange(total, device="cpu") - first), 1).to(torch.int32)


def prepare_block(rows: int) -> tuple[int, int]:
    """Rows of the one program that prepares a step, and its warps: a row per thread, as far as there are threads."""
    block = max(32, triton.next_power_of_2(rows))
    return block, min(16, block // 32)


class Runner:
    """Steps the parameters of one device.

    Args:
        family: "adamw" or "sgdw".
        items: see dlkernels/optim/_items.py; at least one. Empty parameters are allowed.
        rounding_seed: of stochastic rounding; None rounds to nearest.
        average_decay: of the moving averages.
    """

    on_host = False  # scalars are tensors

    def __init__(
        self, family: str, items: list[Any], *, rounding_seed: int | None, average_decay: float | None
    ) -> None:
        self.family, self.items = family, items
        self.device = items[0].param.device
        self.rounding = rounding_seed is not None
        seed = (rounding_seed or 0) & (2**64 - 1)
        self.seed = seed - (1 << 64) if seed >> 63 else seed
        self.average_decay = 0.0 if average_decay is None else float(average_decay)
        self.grads = [item.grad for item in items]
        self.numels = [item.param.numel() for item in items]
        self._tensors = [t for i in items for t in (i.param, *i.slots, i.master, i.average) if t is not None]
        self._items, self._grads, self._rows = (Mirror(self.device) for _ in range(3))
        self._tables: dict[Any, Mirror] = {}
        self._scalars: Tensor | None = None
        self._bounds: dict[int, Tensor] = {}
        self._launches = self._specialisations()
        self._squares: list[tuple[Any, int, Tensor]] | None = None

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph has recorded a step, and reads the tables whenever it is replayed."""
        return bool(self._items._kept)

    # Tables -----------------------------------------------------------------------------------------------------------

    def _fixed(self, name: Any, table: Tensor) -> Tensor:
        """A table that never changes, on the device."""
        if name not in self._tables:
            self._tables[name] = Mirror(self.device, table.dtype, fixed=True)
        return self._tables[name].set(True, lambda: table)

    def _constants(self, item: Any) -> dict[str, Any]:
        """What the kernel is specialised for."""
        dtype = item.param.dtype
        whole = item.param.numel() <= item.period
        strides = (item.offset,) if whole else (item.offset, item.period, item.full_period)
        slot_dtype = next((s.dtype for s in item.slots if s is not None), dtype)
        present = [s is not None for s in item.slots]
        state = {"AMSGRAD": present[2]} if self.family == "adamw" else {"MOMENTUM": present[0]}
        return {
            "PARAM": _TYPES[dtype],
            "SLOT": _TYPES[slot_dtype],
            **state,
            "MASTER": item.master is not None,
            "AVERAGE": item.average is not None,
            "ROUND_PARAM": self.rounding and dtype == torch.bfloat16 and item.master is None,
            "ROUND_SLOTS": self.rounding and slot_dtype == torch.bfloat16 and any(present),
            "GROUPED": all(s % 8 == 0 for s in strides),
            "WHOLE": whole,
            "ACC": tl.float64 if dtype == torch.float64 else tl.float32,
        }

    def _specialisations(self) -> list[_Launch]:
        found: dict[tuple[Any, ...], _Launch] = {}
        for i, item in enumerate(self.items):
            if not self.numels[i]:
                continue
            constants = self._constants(item)
            rounds = constants["ROUND_PARAM"] or constants["ROUND_SLOTS"]
            if not rounds:
                constants["GROUPED"] = constants["WHOLE"] = True
            tensors = (item.param, *item.slots, item.master, item.average)
            mixed = len({t.element_size() for t in tensors if t is not None}) > 1
            # A thread takes eight elements: one Philox, 16 bytes of bfloat16. Beside float32 its four are the better
            # share, for what is stored would be exchanged between threads first.
            num_warps = 8 if mixed and not rounds else 4
            key = (*(str(v) for v in constants.values()), num_warps)
            found.setdefault(key, _Launch([], constants, num_warps)).items.append(i)
        for launch in found.values():
            launch.steps = steps_of([self.numels[i] for i in launch.items], BLOCK)
            launch.pieces = pieces_of(launch.items, self.numels, launch.steps * BLOCK)
        return list(found.values())

    def _item_table(self) -> Tensor:
        """Sizes, pointers, places: columns as in _tables.py. A parameter's memory may have been exchanged."""
        return self._items.set([t.data_ptr() for t in self._tensors], lambda: [self._line(i) for i in self.items])

    def _line(self, item: Any) -> tuple[int, ...]:
        tensors = (item.param, *item.slots, *(None,) * (3 - len(item.slots)), item.master, item.average)
        return (
            item.param.numel(), *(0 if t is None else t.data_ptr() for t in tensors), item.row, item.index, item.offset,
            item.period, item.full_period, self.seed, 0, 0, 0,
        )  # fmt: skip

    def _grad_table(self) -> Tensor:
        pointers = [g.data_ptr() for g in self.grads]
        return self._grads.set(pointers, lambda: pointers)

    def set_grads(self, grads: list[Tensor]) -> None:
        """Other gradient tensors, of the same dtypes, shapes and layouts."""
        if len(grads) != len(self.items):
            raise ValueError(f"`grads` must have {len(self.items)} tensors, got {len(grads)}")
        self.grads = grads

    def forget_grads(self) -> None:
        """Hold them no longer: whoever sets gradients to None wants the memory back."""
        self.grads = []

    # Launches ---------------------------------------------------------------------------------------------------------

    def squares(self, num_sets: int) -> Tensor:
        """Sums of squares of the gradients as they are, by `norm_set`: float64, (num_sets,)."""
        out = torch.empty(num_sets, dtype=torch.float64, device=self.device)
        if self._squares is None:
            self._plan_squares()
        if num_sets not in self._bounds:
            counts = torch.zeros(num_sets + 1, dtype=torch.int64, device="cpu")
            for item, pieces in zip(self.items, self._piece_counts):
                counts[item.norm_set + 1] += pieces
            self._bounds[num_sets] = counts.cumsum(0)
        with on_device(out):
            numels, grads = self._fixed("numels", torch.tensor(self.numels, device="cpu")), self._grad_table()
            bounds = self._fixed(("bounds", num_sets), self._bounds[num_sets])
            for dtype, steps, table in self._squares:
                pieces = self._fixed(dtype, table)
                _norm.squares_kernel[(pieces.shape[0],)](
                    numels, grads, pieces, self._partial, steps, DTYPE=_TYPES[dtype], BLOCK=SQUARES_BLOCK, TAIL=TAIL,
                    ACC=tl.float64 if dtype == torch.float64 else tl.float32, num_warps=8,
                )  # fmt: skip
            _norm.sum_sets_kernel[(num_sets,)](self._partial, bounds, out, BLOCK=SET_BLOCK, num_warps=4)
        return out

    def _plan_squares(self) -> None:
        """Pieces by dtype; each knows where its sum goes, so that the sums of a set are side by side."""
        order = sorted(range(len(self.items)), key=lambda i: self.items[i].norm_set)
        groups: dict[torch.dtype, list[int]] = {}
        for i in order:
            if self.numels[i]:
                groups.setdefault(self.items[i].param.dtype, []).append(i)
        steps = {d: steps_of([self.numels[i] for i in some], SQUARES_BLOCK) for d, some in groups.items()}
        counts = [
            -(-n // (steps[i.param.dtype] * SQUARES_BLOCK)) if n else 0
            for n, i in zip(self.numels, self.items, strict=True)
        ]
        begin, total = [0] * len(self.items), 0
        for i in order:
            begin[i], total = total, total + counts[i]
        self._piece_counts = counts
        self._partial = torch.empty(max(1, total), dtype=torch.float64, device=self.device)
        starts = torch.tensor(begin, device="cpu")
        self._squares = []
        for dtype, some in groups.items():
            pieces = pieces_of(some, self.numels, steps[dtype] * SQUARES_BLOCK)
            slot = starts[pieces[:, 0].long()] + pieces[:, 1]
            table = torch.stack((pieces[:, 0], pieces[:, 1], slot.int(), torch.zeros_like(slot).int()), 1)
            self._squares.append((dtype, steps[dtype], table))

    def run(
        self,
        rows: list[Any],
        *,
        inv_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        norm_squares: Tensor | None = None,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> Tensor | None:
        """One step. Nothing is written where `found_inf` is not 0, or `norm_squares` not finite and `skip_nonfinite`.

        Args:
            rows: see dlkernels/optim/_items.py.
            inv_scale: 0-d, multiplies the gradients.
            found_inf: 0-d.
            norm_squares: 0-d float64, the sum of the squares of all gradients before `inv_scale`.
            max_norm: clips the norm of the gradients after `inv_scale`; needs `norm_squares`.
            skip_nonfinite: needs `norm_squares`.

        Returns:
            The norm after `inv_scale` and before clipping, 0-d float32; None without `norm_squares`.
        """
        if norm_squares is None and (max_norm is not None or skip_nonfinite):
            raise ValueError("`max_norm` and `skip_nonfinite` need `norm_squares`, got None")
        norm = None
        if norm_squares is not None:
            norm = torch.empty((), dtype=torch.float32, device=self.device)
        with on_device(self.items[0].param):
            scalars = self._prepare(rows, inv_scale, found_inf, norm_squares, norm, max_norm, skip_nonfinite)
            items, grads = self._item_table(), self._grad_table()
            kernel = adamw_kernel if self.family == "adamw" else sgdw_kernel
            for launch in self._launches:
                pieces = self._fixed(launch, launch.pieces)
                kernel[(pieces.shape[0],)](
                    items, grads, pieces, scalars, launch.steps, **launch.constants, BLOCK=BLOCK, TAIL=TAIL,
                    num_warps=launch.num_warps,
                )  # fmt: skip
        return norm

    def _prepare(
        self,
        rows: list[Any],
        inv_scale: Tensor | None,
        found_inf: Tensor | None,
        norm_squares: Tensor | None,
        norm: Tensor | None,
        max_norm: float | None,
        skip_nonfinite: bool,
    ) -> Tensor:
        """Advances the counters; returns the table of scalars that the steps read."""
        addresses, numbers = [], []
        for row in rows:
            lr, decay_rate, sign, a, b, c = row.values
            counter = 0 if row.step is None else row.step.data_ptr()
            of_tensor = isinstance(lr, Tensor)
            kind = _LR_KINDS[lr.dtype] if of_tensor else 0
            addresses.append((counter, lr.data_ptr() if of_tensor else 0, kind, 0))
            logs = [math.log(beta) if beta > 0 else -math.inf for beta in (a, b)] if self.family == "adamw" else [0, 0]
            numbers.append(
                (
                    self.average_decay,
                    max_norm or 0.0,
                    0.0 if of_tensor else lr,
                    decay_rate,
                    sign,
                    a,
                    b,
                    c,
                    *logs,
                    0.0,
                    0.0,
                )
            )

        def lines() -> list[list[int]]:
            bits = torch.tensor(numbers, dtype=torch.float64, device="cpu").view(torch.int64).tolist()
            return [[*a, *b] for a, b in zip(addresses, bits)]

        table = self._rows.set((addresses, numbers), lines)
        if self._scalars is None or self._scalars.shape[0] != len(rows):
            self._scalars = torch.empty((len(rows), COLUMNS), dtype=torch.float64, device=self.device)
        some = self._scalars
        block, num_warps = prepare_block(len(rows))
        _norm.prepare_kernel[(1,)](
            table, some if inv_scale is None else inv_scale, some if found_inf is None else found_inf,
            some if norm_squares is None else norm_squares, some, some if norm is None else norm, len(rows),
            ADAMW=self.family == "adamw", INV_SCALE=inv_scale is not None, FOUND_INF=found_inf is not None,
            NORM=norm_squares is not None, CLIP=max_norm is not None, SKIP_NONFINITE=skip_nonfinite,
            BLOCK_R=block, num_warps=num_warps,
        )  # fmt: skip
        return some
