"""Who does the arithmetic of a step: compiled loops, Triton, or plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _backend
from .._library import accumulate_dtype
from ..reference._rounding import random_bits, stochastic_round
from ..reference.adamw import adamw, moments, parameter
from ..reference.sgdw import sgdw
from ._items import Item, Row

FAMILIES = ("adamw", "sgdw")

for _module in (_backend.C, _backend.TWIN):
    if hasattr(_module, "CudaOptimizerTable"):
        _backend.CUDA_OPS.update(FAMILIES)


def backend_for(family: str, params: list[Tensor]) -> str:
    """Who steps parameters of one device. CUDA C++ serves no float64, and only devices that it was compiled for."""
    device = params[0].device.type
    backend = _backend.choose(device, family)
    if backend == "cuda" and not all(_cuda_table(device).serves(p) for p in params):
        return "reference" if _backend._why_not("triton", device) else "triton"
    return backend


def _cuda_table(device_type: str) -> Any:
    return _backend.cuda_module(device_type).CudaOptimizerTable  # type: ignore[union-attr]


def make_runner(family: str, items: list[Item], rows: list[Row], owners: list[Tensor], **options: Any) -> Any:
    """The runner for the items of one device."""
    backend = backend_for(family, [item.param for item in items])
    if backend == "cpp":
        return CppRunner(family, items, rows, owners, **options)
    if backend == "cuda":
        return CudaRunner(family, items, rows, owners, **options)
    if backend == "triton":
        from ..triton._multi_tensor import Runner

        return Runner(family, items, **options)
    return ReferenceRunner(family, items, **options)


def host_control(
    *, inv_scale: Any, found_inf: Any, norm_squares: Any, max_norm: float | None, skip_nonfinite: bool
) -> tuple[float, float | None, bool]:
    """The factor of the gradients, their norm after unscaling, and whether the step is to be left out."""
    inv = 1.0 if inv_scale is None else float(inv_scale)
    factor, norm = inv, None
    if norm_squares is not None:
        norm_squares = float(norm_squares)
        norm = math.sqrt(norm_squares) * inv if norm_squares >= 0 else math.nan
        if max_norm is not None:
            clip = max_norm / (norm + 1e-6)
            factor = inv * (clip if not clip > 1.0 else 1.0)  # a NaN stays one
    skip = found_inf is not None and float(found_inf) != 0
    return factor, norm, skip or (skip_nonfinite and not math.isfinite(norm_squares))


class TableRunner:
    """A compiled table keeps pointers between steps and notices when they change."""

    def __init__(
        self,
        family: str,
        items: list[Item],
        rows: list[Row],
        owners: list[Tensor],
        *,
        rounding_seed: int | None,
        average_decay: float | None,
    ) -> None:
        self.rounding_seed = rounding_seed
        self.average_decay = 0.0 if average_decay is None else average_decay
        counters = {id(row.step): row.step for row in rows if row.step is not None}
        places = {key: i for i, key in enumerate(counters)}
        by_group = {row.scalars.group: row.scalars for row in rows}
        self.scalars, groups = list(by_group.values()), list(by_group)
        self.table = self._new_table(
            items[0].param.device.type,
            family,
            owners,
            [
                (
                    (i.position, i.param, i.grad, list(i.slots), i.master, i.average),
                    (i.row, i.norm_set, i.offset, i.period, i.full_period, i.index),
                )
                for i in items
            ],
            list(counters.values()),
            [places.get(id(row.step), -1) for row in rows],
            [groups.index(row.scalars.group) for row in rows],
        )

    def _new_table(self, device_type: str, *lists: Any) -> Any:
        raise NotImplementedError

    def set_grads(self, grads: list[Tensor]) -> None:
        self.table.set_grads(grads)

    def forget_grads(self) -> None:
        """The table holds addresses only."""

    def squares(self, num_sets: int) -> Any:
        return self.table.squares(num_sets)


class CppRunner(TableRunner):
    """CPU tensors by the compiled loops."""

    on_host = True  # scalars are numbers

    def _new_table(self, device_type: str, *lists: Any) -> Any:
        return _backend.C.OptimizerTable(*lists)  # type: ignore[union-attr]

    def run(self, rows: list[Row], **scaling: Any) -> float | None:
        factor, norm, skip = host_control(**scaling) if scaling else (1.0, None, False)
        if not skip:
            self.table.step(
                [scalars.values for scalars in self.scalars], factor, self.average_decay, self.rounding_seed
            )
        return norm


class CudaRunner(TableRunner):
    """CUDA tensors by one launch for all of them. What a captured step reads of the host, its graph has."""

    on_host = False  # scalars may be tensors
    takes_numbers = True  # and numbers

    def _new_table(self, device_type: str, *lists: Any) -> Any:
        return _cuda_table(device_type)(*lists, self.average_decay, self.rounding_seed)

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph has recorded a step, and reads the table whenever it is replayed."""
        return self.table.captured

    def run(
        self,
        rows: list[Row],
        *,
        scale: Any = None,
        found_inf: Any = None,
        norm_squares: Tensor | None = None,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> Tensor | None:
        values = [scalars.values for scalars in self.scalars]
        return self.table.step(values, scale, found_inf, norm_squares, max_norm, skip_nonfinite)


class ReferenceRunner:
    """Any device, in plain PyTorch, one parameter after the other."""

    on_host = True

    def __init__(
        self, family: str, items: list[Item], *, rounding_seed: int | None, average_decay: float | None
    ) -> None:
        self.family, self.items = family, items
        self.rounding_seed, self.average_decay = rounding_seed, average_decay

    def set_grads(self, grads: list[Tensor]) -> None:
        for item, grad in zip(self.items, grads, strict=True):
            item.grad = grad

    def forget_grads(self) -> None:
        """They were held by the items."""

    def squares(self, num_sets: int) -> list[float]:
        sums = [0.0] * num_sets
        for item in self.items:
            sums[item.norm_set] += item.grad.double().square().sum().item()
        return sums

    @torch.no_grad()
    def run(self, rows: list[Row], **scaling: Any) -> float | None:
        factor, norm, skip = host_control(**scaling) if scaling else (1.0, None, False)
        if skip:
            return norm
        for step in {id(row.step): row.step for row in rows if row.step is not None}.values():
            step += 1
        for item in self.items:
            self._update(item, rows[item.row], factor)
        return norm

    def _update(self, item: Item, row: Row, factor: float) -> None:
        lr, decay_rate, sign, *rest = (float(value) for value in row.values)
        t = 0 if row.step is None else int(row.step.item())
        wide = accumulate_dtype(item.param.dtype)
        theta = (item.param if item.master is None else item.master).to(wide)
        g = item.grad.to(wide) * (sign * factor)
        slots = [None if s is None else s.to(wide) for s in item.slots]
        if self.family == "adamw":
            beta1, beta2, eps = rest
            scalars = {"t": t, "alpha": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "decay": lr * decay_rate}
            if slots[2] is not None and self._rounds(item.slots[2]):
                self._update_with_largest_stored(item, theta, g, slots, scalars)
                return
            theta, *slots = adamw(theta, g, *slots, **scalars)
        else:
            beta, paper, nesterov = rest
            theta, m = sgdw(
                theta, g, slots[0], lr=lr, beta=beta, decay=lr * decay_rate, paper=bool(paper), nesterov=bool(nesterov)
            )
            slots = [m]
        self._store_all(item, theta, slots, t)

    def _update_with_largest_stored(self, item: Item, theta: Tensor, g: Tensor, slots: Any, scalars: Any) -> None:
        """AMSGrad where v is rounded at random: the largest v is that of those stored, and what is divided by."""
        t, beta1, beta2 = (scalars[name] for name in ("t", "beta1", "beta2"))
        m, v = moments(g, slots[0], slots[1], beta1=beta1, beta2=beta2)
        self._store(item.slots[1], v, item, t, 2)
        largest = torch.maximum(slots[2], item.slots[1].to(v.dtype))
        item.slots[2].copy_(largest)
        self._store_all(item, parameter(theta, m, largest, **scalars), [m], t)

    def _store_all(self, item: Item, theta: Tensor, values: Any, t: int) -> None:
        for stream, (slot, value) in enumerate(zip(item.slots, values), 1):
            if slot is not None:
                self._store(slot, value, item, t, stream)
        if item.master is None:
            self._store(item.param, theta, item, t, 0)
        else:
            item.master.copy_(theta)
            item.param.copy_(theta)
        if item.average is not None:
            wide = item.average.dtype
            stored = item.param.to(wide) if item.master is None else item.master
            item.average.add_(stored - item.average, alpha=1.0 - self.average_decay)

    def _rounds(self, out: Tensor) -> bool:
        return self.rounding_seed is not None and out.dtype == torch.bfloat16

    def _store(self, out: Tensor, value: Tensor, item: Item, t: int, stream: int) -> None:
        if not self._rounds(out):
            out.copy_(value)
            return
        i = torch.arange(out.numel(), device=out.device)
        element = i // item.period * item.full_period + item.offset + i % item.period
        in_memory = value.as_strided((value.numel(),), (1,), value.storage_offset())
        bits = random_bits(element, item.index, t, stream, self.rounding_seed or 0)
        rounded = stochastic_round(in_memory, bits)
        out.as_strided((out.numel(),), (1,), out.storage_offset()).copy_(rounded)
