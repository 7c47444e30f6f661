"""Many weights at once: the operators on lists behind `fuse_weight_norm`, one launch each where CUDA C++ serves them.

`weight_norm_multi_fwd` and `weight_norm_multi_bwd` take lists of what `weight_norm_fwd` and `weight_norm_bwd` take, and
give lists of what those give, bitwise the same. `weight_norm_multi` is the differentiable function of whole weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backend, _layout
from .._library import LIBRARY, LIST_OPS, forced_launcher, register_kernels, second_derivative
from ._weight_norm import _backward_fake, _forward_fake, _like_reference
from .weight_norm import by_reference, from_rows, to_rows

Lists = tuple[list[Tensor], list[Tensor]]

FORWARD = "weight_norm_multi_fwd(Tensor[] v, Tensor[] g) -> (Tensor[], Tensor[])"
BACKWARD = "weight_norm_multi_bwd(Tensor[] grad_output, Tensor[] v, Tensor[] g, Tensor[] norm) -> (Tensor[], Tensor[])"


def weight_norm_multi(v: Sequence[Tensor], g: Sequence[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
    """The weights g v / ||v|| of layers on one device. `dims` are counted from the front, None for a whole tensor."""
    return list(WeightNormMulti.apply(tuple(dims), *v, *g))


class WeightNormMulti(torch.autograd.Function):
    """(dims, v..., g...) -> w... A weight whose v and g want no gradient has none."""

    @staticmethod
    def forward(ctx: Any, dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        v, g = _split(tensors, 2)
        lasts = [_layout.is_channels_last(x) for x in v]
        rows = _rows(v, dims, lasts)
        out, norm = _kernel("weight_norm_multi_fwd", rows, _flat(g, rows))
        w = tuple(map(from_rows, out, v, lasts))
        wanted = [any(pair) for pair in zip(*_split(ctx.needs_input_grad[1:], 2), strict=True)]
        ctx.mark_non_differentiable(*(x for x, wants in zip(w, wanted, strict=True) if not wants))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *norm)
        ctx.dims, ctx.wanted = dims, wanted
        return w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        count = len(grads)
        used = [i for i in range(count) if grads[i] is not None and ctx.wanted[i]]
        every: list[Tensor | None] = [None] * (2 * count)
        if used:
            groups = _split(ctx.saved_tensors, 3)  # v, g, norm
            args = [grads[i] for i in used] + [group[i] for group in groups for i in used]
            results = WeightNormMultiBackward.apply(tuple(ctx.dims[i] for i in used), *args)
            for i, dv, dg in zip(used, *_split(results, 2), strict=True):
                every[i], every[count + i] = dv, dg
        return None, *every


class WeightNormMultiBackward(torch.autograd.Function):
    """(dims, dw..., v..., g..., norm...) -> (dv..., dg...)."""

    @staticmethod
    def forward(ctx: Any, dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        grads, v, g, norm = _split(tensors, 4)
        lasts = [_layout.is_channels_last(x) for x in v]
        rows = _rows(v, dims, lasts)
        dv, dg = _kernel("weight_norm_multi_bwd", _rows(grads, dims, lasts), rows, _flat(g, rows), list(norm))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[: 3 * len(dims)])
        ctx.dims = dims
        return (*map(from_rows, dv, v, lasts), *(d.view(x.shape) for d, x in zip(dg, g, strict=True)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        found = []
        for dim, dw, v, g, *pulled in zip(ctx.dims, *_split(ctx.saved_tensors, 3), *_split(cotangents, 2), strict=True):
            if pulled[0] is None and pulled[1] is None:
                found.append((None, None, None))
                continue
            in_dw, grads = second_derivative(lambda a, b, d=dim: by_reference(a, b, d), dw, (v, g), pulled)
            found.append((in_dw, *grads))
        return None, *(group for part in zip(*found, strict=True) for group in part), *([None] * len(ctx.dims))


def _split(tensors: Sequence[Any], parts: int) -> list[Sequence[Any]]:
    size = len(tensors) // parts
    return [tensors[i * size : (i + 1) * size] for i in range(parts)]


def _rows(tensors: Sequence[Tensor], dims: Sequence[int | None], lasts: Sequence[bool]) -> list[Tensor]:
    return list(map(to_rows, tensors, dims, lasts))


def _flat(g: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
    return [x.reshape(r.shape[1]) for x, r in zip(g, rows, strict=True)]


def _kernel(name: str, *lists: list[Tensor]) -> Lists:
    """Below autograd, on the backend in force."""
    if _backend.intercepted(lists[0][0].device.type, name):
        with torch.profiler.record_function(f"dlkernels::{name}"):
            return forced_launcher("weight_norm", name)(*lists)
    return getattr(torch.ops.dlkernels, name).default(*lists)


# The operators of the dispatcher --------------------------------------------------------------------------------------


def _each(one: Any) -> Any:
    """A function of single tensors for lists of them: ([first], [second])."""

    def every(*lists: list[Tensor]) -> Lists:
        pairs = [one(*args) for args in zip(*lists, strict=True)]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    return every


def _forward_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.mark_non_differentiable(*output[1])
    ctx.save_for_backward(*inputs[0], *inputs[1], *output[1])


def _forward_gradient(ctx: Any, grads: Any, *_: Any) -> Any:
    v, g, norm = map(list, _split(ctx.saved_tensors, 3))
    given = [torch.zeros_like(x) if d is None else d for d, x in zip(grads, v, strict=True)]
    return torch.ops.dlkernels.weight_norm_multi_bwd.default(given, v, g, norm)


def _backward_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[0], *inputs[1], *inputs[2])


def _backward_gradient(ctx: Any, of_dv: Any, of_dg: Any) -> Any:
    found = [
        second_derivative(_like_reference, dw, (v, g), pulled)
        for dw, v, g, *pulled in zip(*_split(ctx.saved_tensors, 3), of_dv, of_dg, strict=True)
    ]
    in_dw, in_v, in_g = [f[0] for f in found], [f[1][0] for f in found], [f[1][1] for f in found]
    return in_dw, in_v, in_g, [None] * len(found)


def _register(schema: str, single: str, fake: Any, context: Any, gradient: Any) -> None:
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"dlkernels::{name}", _each(fake), lib=LIBRARY)
    LIBRARY.impl(name, _each(getattr(torch.ops.dlkernels, single).default), "CPU")
    register_kernels(schema, "weight_norm")
    LIST_OPS.append(name)
    torch.library.register_autograd(f"dlkernels::{name}", gradient, setup_context=context, lib=LIBRARY)


_register(FORWARD, "weight_norm_fwd", _forward_fake, _forward_context, _forward_gradient)
_register(BACKWARD, "weight_norm_bwd", _backward_fake, _backward_context, _backward_gradient)
