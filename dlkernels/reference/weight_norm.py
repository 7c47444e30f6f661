"""Weight normalisation: w = g v / ||v||.

Salimans and Kingma, "Weight Normalization", eq. 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._activation import compute


def weight_norm(v: Tensor, g: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """v of any shape; g broadcast against it; the norm over `dims`. Returns w in the dtype of v, and the norm."""
    x = compute(v)
    # In units near the largest element no square leaves the range; n is the same function of v in any unit.
    largest = x.detach().abs().amax(dims, keepdim=True) if x.numel() else torch.zeros_like(x.sum(dims, True))
    exponent = torch.where((largest > 0) & torch.isfinite(largest), torch.frexp(largest)[1] - 1, 0)
    unit = torch.exp2(exponent.to(x.dtype))
    u = x / unit
    squares = u.square().sum(dims, keepdim=True)
    zero = squares == 0  # a row of zeros has no direction: its weight and its gradients are 0
    length = torch.where(zero, 1, squares).sqrt()
    w = torch.where(zero, 0, u * (compute(g) / length))
    return w.to(v.dtype), torch.where(zero, 0, length * unit)
