"""Weight normalisation: the length of a weight apart from its direction."""

from __future__ import annotations

import math

from torch import Tensor

from .. import _backend, _checks, _layout
from .._library import has_tangent, is_compiling
from ..reference import weight_norm as reference
from ._weight_norm import WeightNorm


def weight_norm(v: Tensor, g: Tensor, dim: int | None = 0) -> Tensor:
    r"""Weight normalisation, with the values of `torch._weight_norm`.

        w = g v / ||v||

    The norm is taken over all dimensions but `dim`: one per output unit of a linear layer or a convolution.

    Args:
        v: the direction, any shape; float32, float16, bfloat16 or float64, any strides.
        g: the lengths, of the shape of v with 1 everywhere but at `dim`; one element where the norm is of the whole
            tensor. The dtype of v, or float32 beside a half-precision v.
        dim: the dimension that keeps its own norms; None for one norm of the whole tensor. -1 means that too, as in
            torch, and not the last dimension; -2 and below count from the end.

    Returns:
        The shape, dtype and memory layout of v: channels_last stays channels_last without a copy.

    Raises:
        TypeError: a dtype that is not served, mixed dtypes.
        ValueError: another shape of g, another device.
        IndexError: `dim` is out of range.

    Note:
        A row of zeros gives w = 0, dg = 0, dv = 0, where torch gives NaN; there is no epsilon otherwise. Norms are
        computed in float32 (float64 for float64), partial sums over fixed segments added in order: bitwise equal
        between runs and thread counts. Rows of very large or very small elements, whose squares leave float32's range,
        are computed in float64, except in Triton. Keeps v, g and the norms; w may be changed in place. Works under
        torch.compile(fullgraph=True), export, torch.func and AMP (autocast changes nothing); second derivatives run the
        reference twice.

    Reference:
        Salimans and Kingma, "Weight Normalization", NeurIPS 2016, eq. 2 and 3.
    """
    fast = None if is_compiling() else _backend.fast(v)
    if fast is not None:
        w = fast.weight_norm(v, g, dim)
        if w is not None:
            return w

    dim = check(v, g, dim)
    if _backend.choose(v.device.type, "weight_norm_fwd") == "reference" or has_tangent(v, g):
        return by_reference(v, g, dim)
    last = _layout.is_channels_last(v)
    rows = to_rows(v, dim, last)
    return from_rows(WeightNorm.call(rows, g.reshape(rows.shape[1]))[0], v, last)


def by_reference(v: Tensor, g: Tensor, dim: int | None) -> Tensor:
    """The plain PyTorch form; `dim` counted from the front, None for the whole tensor."""
    dims = tuple(i for i in range(v.dim()) if i != dim)
    if not dims and v.dim():
        return reference.weight_norm(v.unsqueeze(-1), g.unsqueeze(-1), (1,))[0].squeeze(-1)
    return reference.weight_norm(v, g.view([1] * v.dim()) if dim is None else g, dims)[0]


def to_rows(x: Tensor, dim: int | None, channels_last: bool) -> Tensor:
    """(A, K, B) as the operators take it, with K at `dim`: a view of a tensor that lies so, else a copy."""
    rank = x.dim()
    x = (x.movedim(1, -1) if channels_last else x).contiguous()
    if dim is None:
        return x.view(1, 1, x.numel())
    at = [0, rank - 1, *range(1, rank - 1)][dim] if channels_last else dim
    return x.view(math.prod(x.shape[:at]), x.shape[at], math.prod(x.shape[at + 1 :]))


def from_rows(rows: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    """The way back, to the shape of `like`."""
    return rows.view(like.movedim(1, -1).shape).movedim(-1, 1) if channels_last else rows.view(like.shape)


def check(v: Tensor, g: Tensor, dim: int | None) -> int | None:
    """Everything that can be wrong, in one line each; dim counted from the front, None for the whole tensor."""
    _checks.floating("v", v)
    if dim is not None:
        rank = v.dim()
        if not -rank <= _checks.integer("dim", dim) < rank:
            raise IndexError(f"`dim` must be None or in [{-rank}, {rank}), got {dim}")
        dim = None if dim == -1 else dim % rank
    if dim is not None:
        expected = tuple(size if i == dim else 1 for i, size in enumerate(v.shape))
        _checks.parameter("g", g, expected, f"of v at dimension {dim}, else 1", "v", v)
        return dim
    _checks.tensor("g", g)
    if g.numel() != 1 or g.dim() > v.dim():
        raise ValueError(f"`g` must have one element for a norm of the whole tensor, got shape {tuple(g.shape)}")
    _checks.parameter("g", g, tuple(g.shape), "", "v", v)
    return None
