"""AdamW. Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2; AMSGrad of Reddi et al."""

from __future__ import annotations

import torch
from torch import Tensor


def adamw(
    theta: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    v_max: Tensor | None,
    *,
    t: int,
    alpha: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """theta, m, v and v_max after step t (from 1 on); `decay` is all that theta is multiplied with: lr * weight_decay."""
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    v_max = None if v_max is None else torch.maximum(v_max, v)
    m_hat = m / (1 - beta1**t)
    v_hat = (v if v_max is None else v_max) / (1 - beta2**t)
    theta = theta - decay * theta - alpha * m_hat / (v_hat.sqrt() + eps)
    return theta, m, v, v_max
