"""torch's weight normalisation, computed by `dlkernels.weight_norm`: the parametrization and the older hook.

Values are torch's, but for rows of zeros, which give 0 and gradients of 0 where torch gives NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from .. import _backend
from .._checks import FLOAT_DTYPES
from ..ops.weight_norm import weight_norm
from ._classes import Fused
from ._rules import Rule, fingerprint
from ._tensors import plain_tensor

_HALF = (torch.float16, torch.bfloat16)


def _fused_weight(v: Tensor, g: Tensor, dim: Any) -> Tensor | None:
    """g v / ||v||; None for what torch is to compute, or to complain about."""
    if g.dtype != v.dtype or (v.dtype in _HALF and torch.is_autocast_enabled(v.device.type)):
        return None  # where autocast takes the norm in float32, so may torch's result be
    fast = None if torch.compiler.is_compiling() else _backend.fast(v)
    if fast is not None:
        w = fast.weight_norm(v, g, dim)
        if w is not None:
            return w
    return weight_norm(v, g, dim) if _fit(v, g, dim) else None


def _fit(v: Tensor, g: Tensor, dim: Any) -> bool:
    if not (
        plain_tensor(v)
        and plain_tensor(g)
        and v.dtype in FLOAT_DTYPES
        and g.device == v.device
        and type(dim) is int
        and -v.dim() <= dim < v.dim()
    ):
        return False
    if dim == -1:
        return g.numel() == 1 and g.dim() <= v.dim()
    return g.dim() == v.dim() and all(
        size == (v.shape[i] if i == dim % v.dim() else 1) for i, size in enumerate(g.shape)
    )


def _forward(self: Any, weight_g: Tensor, weight_v: Tensor) -> Tensor:
    w = _fused_weight(weight_v, weight_g, self.dim)
    return super(Fused, self).forward(weight_g, weight_v) if w is None else w


def _check(module: nn.Module) -> str:
    return "" if type(module.dim) is int else f"its `dim` is {module.dim!r}, not an int"


RULES: dict[str, Rule] = {
    # torch 2.13
    "torch.nn.utils.parametrizations._WeightNorm": Rule("weight_norm", _forward, frozenset({"f2c47ccb6ca3"}), _check),
}


# The hook of `torch.nn.utils.weight_norm`, which is no module ---------------------------------------------------------

_HOOK = {"compute_weight": "61416463919e", "__call__": "fb152accae56"}  # torch 2.13


class FusedWeightNormHook(Fused, WeightNorm):
    """torch's hook, which sets the weight before a layer's forward pass, with `dlkernels.weight_norm`."""

    _dlkernels_original = WeightNorm
    __reduce_ex__ = object.__reduce_ex__  # it can be imported by its name

    def compute_weight(self, module: nn.Module) -> Any:
        w = _fused_weight(getattr(module, self.name + "_v"), getattr(module, self.name + "_g"), self.dim)
        return super().compute_weight(module) if w is None else w


def class_for_hook(hook: Any) -> type | None:
    """The class for one of the forward pre-hooks of a module; None where it is not torch's weight norm."""
    if type(hook) is not WeightNorm:
        return None
    known = all(fingerprint(getattr(WeightNorm, name)) == of for name, of in _HOOK.items())
    return FusedWeightNormHook if known else None
