"""Layers see an input (N, C, d1, ...) as three dimensions in memory order: (N, C, S), or channels_last (N, S, C)."""

from __future__ import annotations

import math

from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Dense with the channels innermost: torch's channels_last, in any number of dimensions."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def to_rows(x: Tensor, channels_last: bool) -> Tensor:
    """(N, C, S) or, with channels_last, (N, S, C), contiguous: a view of a tensor that lies so, else a copy."""
    n, c, s = x.shape[0], x.shape[1], math.prod(x.shape[2:])
    if channels_last:
        return x.movedim(1, -1).contiguous().view(n, s, c)
    return x.contiguous().view(n, c, s)


def from_rows(y: Tensor, like: Tensor, channels_last: bool) -> Tensor:
    """The way back, to the shape of `like`."""
    if channels_last:
        return y.view(like.shape[0], *like.shape[2:], like.shape[1]).movedim(-1, 1)
    return y.view(like.shape)
