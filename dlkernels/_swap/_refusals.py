"""What cannot be swapped, and what to do instead."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

# Wrappers by module and name, looked for only where their module is loaded; what to call that; the way out.
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "compiled by torch.compile", "torch.compile"),
    (
        "torch.nn.parallel.distributed",
        "DistributedDataParallel",
        "under DistributedDataParallel",
        "DistributedDataParallel",
    ),
    ("torch.nn.parallel.data_parallel", "DataParallel", "under DataParallel", "DataParallel"),
    (
        "torch.distributed.fsdp",
        "FullyShardedDataParallel",
        "under FullyShardedDataParallel",
        "FullyShardedDataParallel",
    ),
    ("torch.distributed.fsdp", "FSDPModule", "under FSDP2 (fully_shard)", "fully_shard"),
    ("torch.jit", "ScriptModule", "a ScriptModule", "torch.jit"),
)


def refuse_model(model: nn.Module) -> None:
    """Raise for a model that is wrapped, compiled or scripted, whole or in part."""
    wrappers: list[tuple[Any, str, str]] = []
    for module, name, what, way in _WRAPPERS:
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None:
            wrappers.append((cls, what, way))
    for path, module in model.named_modules():
        where = f"`model.{path}`" if path else "`model`"
        for cls, what, way in wrappers:
            if isinstance(module, cls):
                raise ValueError(f"{where} is {what}: swap the model first, then give it to {way}")
        if module._compiled_call_impl is not None:
            raise ValueError(f"{where} is compiled by module.compile(): swap the model first, then compile it")


_FAMILY_OF_NAMES = {
    "squeeze_excite": ("SqueezeExcit", "SEModule", "SELayer", "SEBlock", "SqueezeAndExcit"),
    "stochastic_depth": ("DropPath", "StochasticDepth"),
}


_strangers: dict[type, tuple[str, str]] = {}


def stranger(cls: type) -> tuple[str, str]:
    """(family, reason) for a class that looks like one of ours and is not known; ("", "") for all others."""
    if cls not in _strangers:
        _strangers[cls] = _look(cls)
    return _strangers[cls]


def _look(cls: type) -> tuple[str, str]:
    if cls.__module__.startswith("dlkernels."):
        return "", ""
    if ".quantized" in cls.__module__ or cls.__module__.startswith("torch.ao.nn"):
        quantized = issubclass(cls, nn.GroupNorm) or any(part in cls.__name__ for part in ("GroupNorm", "SqueezeExcit"))
        return (
            ("group_norm" if "GroupNorm" in cls.__name__ else "squeeze_excite", "quantized") if quantized else ("", "")
        )
    if issubclass(cls, nn.GroupNorm):
        return "group_norm", "a subclass of GroupNorm with a forward of its own"
    for family, parts in _FAMILY_OF_NAMES.items():
        if any(part in cls.__name__ for part in parts) and not issubclass(cls, nn.Sequential | nn.ModuleList):
            return family, "its class is not among those that are known"
    return "", ""
