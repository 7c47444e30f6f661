"""Calls that follow each other, made as one where they can be: what rewritten forward passes and Sequentials run.

What is fused is decided anew at each call, from the modules as they are then: a hook on one of them, another module in
its place, a residual of another shape or dtype, and they are called one by one as they always were.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, nn

from ._activations import activation_of, activation_of_call
from ._classes import plain
from ._tensors import is_served

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
ADDITIONS = ("add", "radd", "iadd")


def module_at(owner: nn.Module, op: Any) -> Any:
    """What an operation calls: `self.name`, a module or not; None where it is optional and not there."""
    name = op if isinstance(op, str) else op[1]
    found = owner._modules.get(name)
    return getattr(owner, name, None) if found is None else found


def is_module(op: Any) -> bool:
    return isinstance(op, str) or op[0] == "?"


def is_identity(module: Any) -> bool:
    """Whether a module gives back what it gets, as it is now."""
    cls = type(module)
    if cls is nn.Identity:
        return plain(module)
    if cls in _DROPOUTS:
        return (not module.training or module.p == 0) and plain(module)
    return hasattr(cls, "_dlkernels_drop") and not module.drops() and plain(module)


def chain(owner: nn.Module, x: Any, ops: tuple[Any, ...]) -> Any:
    """x through the operations of `_rewrite`, fused where that gives the same."""
    i, n = 0, len(ops)
    while i < n:
        op = ops[i]
        i += 1
        if not is_module(op):
            x = _apply(x, op)
            continue
        module = module_at(owner, op)
        if module is None and not isinstance(op, str):
            continue
        fuse = getattr(type(module), "_dlkernels_fuse", None) if i < n else None
        if fuse is not None and is_served(x) and plain(module):
            done = fuse(module, x, Rest(owner, x, ops, i))
            if done is not None:
                x, i = done
                continue
        x = module(x)
    return x


def _apply(x: Any, op: Any) -> Any:
    kind = op[0]
    if kind == "film":
        return x * (1 + op[1]) + op[2]
    if kind == "fn":
        return op[1](x, **op[2])
    r = op[1]
    if kind == "iadd":
        return operator.iadd(x, r)
    return x + r if kind == "add" else r + x


class Rest:
    """The operations behind a module, read by what could take them along. `end` is behind the last one taken."""

    def __init__(self, owner: nn.Module, x: Tensor, ops: tuple[Any, ...], start: int) -> None:
        self._owner, self._x, self._ops = owner, x, ops
        self.start = self.end = self._at = start

    def _next(self) -> Any:
        """The next operation that does something, and its module if it is one."""
        while self._at < len(self._ops):
            op = self._ops[self._at]
            if not is_module(op):
                return op, None
            module = module_at(self._owner, op)
            absent = module is None and not isinstance(op, str)
            if not absent and not is_identity(module):
                return op, module
            self._at += 1
        return None, None

    def _take(self) -> None:
        self._at += 1
        self.end = self._at

    def residual(self) -> Tensor | None:
        """What is added to x next, if it is a tensor like x."""
        op, _ = self._next()
        if op is None or is_module(op) or op[0] not in ADDITIONS:
            return None
        r, x = op[1], self._x
        if not isinstance(r, Tensor) or r.shape != x.shape or r.dtype != x.dtype or r.device != x.device:
            return None
        self._take()
        return r

    def film(self) -> tuple[Tensor, Tensor] | None:
        """Scale and shift (N, C) that come next."""
        op, _ = self._next()
        if op is None or is_module(op) or op[0] != "film":
            return None
        x = self._x
        like_pooled = (*x.shape[:2], *(1,) * (x.dim() - 2))
        for t in op[1:]:
            if not isinstance(t, Tensor) or t.shape != like_pooled or t.dtype != x.dtype or t.device != x.device:
                return None
        self._take()
        return op[1].flatten(1), op[2].flatten(1)

    def activation(self) -> str | None:
        """The activation that comes next, by its name."""
        op, module = self._next()
        name = None
        if module is not None:
            name = activation_of(module) if isinstance(module, nn.Module) and plain(module) else None
            if name is None and not isinstance(module, nn.Module):
                name = activation_of_call(module, {})
        elif op is not None and not is_module(op) and op[0] == "fn":
            name = activation_of_call(op[1], op[2])
        if name is not None:
            self._take()
        return name


# Before any call ------------------------------------------------------------------------------------------------------


def spans(owner: nn.Module, ops: list[Any], starts: dict[int, str]) -> list[tuple[int, int]]:
    """Stretches of operations that could be fused: [first, behind the last).

    Args:
        ops: operations by `_rewrite`'s names or as `chain` takes them.
        starts: id of a module -> "norm", "drop" or "squeeze", for the modules that can take along what follows.
    """
    kinds = [_kind(owner, op, starts) for op in ops]
    found, i = [], 0
    while i < len(kinds):
        first = kinds[i]
        j = end = i + 1
        if first in ("norm", "drop", "squeeze"):
            while j < len(kinds) and kinds[j] in ("identity", "drop", "film", "add", "activation"):
                j += 1
                if kinds[j - 1] in ("film", "add", "activation"):
                    end = j
            inside = [kind for kind in kinds[i + 1 : end] if kind not in ("identity", "drop")]
            if inside and (first == "norm" or inside[0] == "add"):
                found.append((i, end))
            else:
                end = i + 1
        i = end
    return found


def _kind(owner: nn.Module, op: Any, starts: dict[int, str]) -> str:
    if not is_module(op):
        return {"fn": "activation", "film": "film"}.get(op[0], "add")
    module = module_at(owner, op)
    if id(module) in starts:
        return starts[id(module)]
    if module is None and not isinstance(op, str):
        return "identity"
    if type(module) is nn.Identity or type(module) in _DROPOUTS:
        return "identity"
    known = activation_of(module) if isinstance(module, nn.Module) else activation_of_call(module, {})
    return "other" if known is None else "activation"
