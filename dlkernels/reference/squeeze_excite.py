"""Squeeze-and-excitation: every channel scaled by a gate computed from all channel means.

Hu et al., "Squeeze-and-Excitation Networks", eq. 2 to 4: s = mean x, e = gate(W2 act(W1 s + b1) + b2), y = e x.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ._activation import activate, compute, gate


def squeeze_excite(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    activation: int,
    gate_kind: int,
    residual_activation: int,
) -> Tensor:
    """x (N, C, d1, ...), w1 (R, C), w2 (C, R); without w1 one layer, w2 (C, C). Returns the dtype of x."""
    z = compute(x).flatten(2).mean(2) if x.dim() > 2 else compute(x)
    if w1 is not None:
        z = activate(F.linear(z, compute(w1), None if b1 is None else compute(b1)), activation)
    e = gate(F.linear(z, compute(w2), None if b2 is None else compute(b2)), gate_kind)
    y = compute(x) * e.view(*e.shape, *[1] * (x.dim() - 2))
    if residual is not None:
        y = activate(y + compute(residual), residual_activation)
    return y.to(x.dtype)
