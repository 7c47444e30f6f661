"""Bytes moved, counted: by Triton kernels in the interpreter, and by eager PyTorch, operator by operator."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["EagerTraffic", "Traffic", "eager_traffic", "interpreter_traffic"]


@dataclasses.dataclass
class Traffic:
    """Bytes loaded and stored by Triton kernels inside `interpreter_traffic()`."""

    loaded: int = 0
    stored: int = 0
    by_tensor: dict[str, list[int]] = dataclasses.field(default_factory=dict)  # name -> [loaded, stored]

    @property
    def total(self) -> int:
        return self.loaded + self.stored


@contextlib.contextmanager
def interpreter_traffic(**tensors: Tensor) -> Iterator[Traffic]:
    """Count the bytes that Triton kernels load and store while they run in the interpreter (TRITON_INTERPRET=1).

    Each load, store and atomic counts the distinct addresses of its active lanes times the element size: lanes of one
    instruction that read the same word share one transaction, masked lanes cost nothing. A second instruction that
    reads the same address counts again, so that a kernel which reads its input twice shows.

    Args:
        tensors: name=tensor; what falls into the memory of one of them is also counted under its name.

    Yields:
        Traffic, filled in while kernels run: `loaded`, `stored`, `total`, and `by_tensor[name] == [loaded, stored]`.

    Raises:
        RuntimeError: when kernels are compiled instead of interpreted.
    """
    import numpy as np
    from triton.runtime import interpreter

    from . import _backend

    if not _backend.interpreting():
        raise RuntimeError("interpreter_traffic counts in the Triton interpreter: set TRITON_INTERPRET=1")
    traffic = Traffic(by_tensor={name: [0, 0] for name in tensors})
    spans = {name: (t.data_ptr(), t.data_ptr() + _span(t)) for name, t in tensors.items()}

    def count(pointers: Any, mask: Any, stored: int) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        data = np.atleast_1d(pointers.data)
        active = np.broadcast_to(np.atleast_1d(mask.data), data.shape).astype(bool) if mask is not None else ...
        addresses = np.unique(data[active])
        if stored:
            traffic.stored += addresses.size * size
        else:
            traffic.loaded += addresses.size * size
        for name, (low, high) in spans.items():
            inside = np.count_nonzero((addresses >= low) & (addresses < high))
            traffic.by_tensor[name][stored] += int(inside) * size

    builder = interpreter.InterpreterBuilder
    # Unmasked and block-pointer accesses end in the masked ones.
    originals = {
        name: getattr(builder, name) for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw")
    }

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask, 0)
        return originals["create_masked_load"](self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask, 1)
        return originals["create_masked_store"](self, pointers, value, mask, *rest)

    def atomic(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask, 0)
        count(pointers, mask, 1)
        return originals["create_atomic_rmw"](self, op, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw = load, store, atomic
    try:
        yield traffic
    finally:
        for name, original in originals.items():
            setattr(builder, name, original)


def _span(t: Tensor) -> int:
    """Bytes from the first to one past the last element."""
    if t.numel() == 0:
        return 0
    return (sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1) * t.element_size()


class EagerTraffic(TorchDispatchMode):
    """Sums the operand bytes of every aten operator. `total` in bytes, `by_op` per operator, `calls` per operator."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.by_op: dict[str, int] = {}
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if _moves_nothing(func):
            return out
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        moved = sum(_bytes(t) for t in read) + sum(_bytes(t) for t in written)
        name = str(func)
        self.total += moved
        self.by_op[name] = self.by_op.get(name, 0) + moved
        self.calls[name] = self.calls.get(name, 0) + 1
        return out


def eager_traffic() -> EagerTraffic:
    """Count the bytes that eager PyTorch moves: the operands of every aten operator, each read or written once.

    A model of a GPU without fusion and without cache: views are free, a broadcast dimension (stride 0) counts once,
    an operator updated in place counts its operand as read and as written. What an operator does inside is not seen,
    so that the count is a lower bound.

    Example:
        with eager_traffic() as traffic:
            loss(x, t).backward()
        traffic.total, traffic.by_op
    """
    return EagerTraffic()


_FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh")


def _moves_nothing(func: Any) -> bool:
    """Views and allocations."""
    return func.is_view or func._schema.name.rsplit("::", 1)[-1] in _FREE


def _bytes(t: Tensor) -> int:
    elements = 1
    for size, stride in zip(t.shape, t.stride()):
        elements *= size if stride != 0 or size == 0 else 1
    return elements * t.element_size()
