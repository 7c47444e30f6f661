"""Classes that modules are turned into: each a subclass of the module's own, with another forward.

`module.__class__ = fused(...)` keeps the object, and with it hooks, parameters, names, state_dict and isinstance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules import module as torch_module

Key = tuple[Any, ...]  # what a class is made from beside the original: (family, ...), picklable


class Fused:
    """First base of all of them. `super(Fused, self).forward` is the original.

    Each has the name and module of its original: libraries write them into files (save_pretrained, the index of a
    pipeline) and choose modules by them (what FSDP wraps, what a device map keeps whole). What is printed says Fused.
    """

    _dlkernels_original: type
    _dlkernels_key: Key

    def _get_name(self) -> str:
        return fused_name(self._dlkernels_original)

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, args, *rest = super().__reduce_ex__(protocol)
        if args[:1] != (type(self),):
            raise TypeError(f"{fused_name(type(self))} cannot be pickled: `report.undo()` first")
        return (_rebuild, (self._dlkernels_original, self._dlkernels_key, *args[1:]), *rest)


def _rebuild(original: type, key: Key, *args: Any) -> Any:
    from ._families import class_for

    cls = class_for(original, key)
    return cls.__new__(cls, *args)


def fused_name(original: type) -> str:
    """What reports and printed models call the class that a module of this class gets."""
    return f"Fused{original.__name__}"


_MADE: dict[tuple[type, Key], type] = {}


def fused(original: type, key: Key, members: Callable[[], dict[str, Any]]) -> type:
    """The subclass of `original` that `key` stands for, made once."""
    cls = _MADE.get((original, key))
    if cls is None:
        namespace = {
            **members(),
            "_dlkernels_original": original,
            "_dlkernels_key": key,
            "__doc__": original.__doc__,
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
        }
        cls = _MADE[original, key] = type(original.__name__, (Fused, original), namespace)
    return cls


def original_of(x: Any) -> type:
    """The class that a module had."""
    cls = type(x)
    return cls._dlkernels_original if issubclass(cls, Fused) and "_dlkernels_original" in cls.__dict__ else cls


def plain(*modules: Any) -> bool:
    """Whether calling these modules is nothing but their forward: no hooks, no compiled or instance forward."""
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return False
    if torch.compiler.is_compiling():
        return True
    if torch_module._has_any_global_hook() or torch._C._get_tracing_state() is not None:
        return False
    return not any("forward" in m.__dict__ or m._compiled_call_impl is not None for m in modules)
