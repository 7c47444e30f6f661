"""AdamW. Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2. AMSGrad: Reddi et al."""

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
    """theta, m, v and v_max after step t (from 1 on); `decay` is the share of itself that theta loses in this step."""
    m, v = moments(g, m, v, beta1=beta1, beta2=beta2)
    v_max = None if v_max is None else torch.maximum(v_max, v)
    largest = v if v_max is None else v_max
    theta = parameter(theta, m, largest, t=t, alpha=alpha, beta1=beta1, beta2=beta2, eps=eps, decay=decay)
    return theta, m, v, v_max


def moments(g: Tensor, m: Tensor, v: Tensor, *, beta1: float, beta2: float) -> tuple[Tensor, Tensor]:
    """m and v after a step."""
    return beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g


def parameter(
    theta: Tensor, m: Tensor, v: Tensor, *, t: int, alpha: float, beta1: float, beta2: float, eps: float, decay: float
) -> Tensor:
    """theta after step t, from the moments after it; with AMSGrad v is the largest so far."""
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return theta - decay * theta - alpha * m_hat / (v_hat.sqrt() + eps)
