"""Gaussian class-conditional simplex loss: one number per class, without reductions.

With mu_i, v_i (or Sigma_i) the mean and the biased variance (covariance) of the n_i rows of class i, and the target
N(m_i, s^2 I), m_i = target_mean e_i, s = target_std:

    diagonal   L_i = 1/2 sum_d [log(s^2 / (v_id + eps)) - 1 + v_id / s^2 + (mu_id - m_id)^2 / s^2]
    full       L_i = 1/2 [D log s^2 - log|Sigma_i + eps I| - D + tr(Sigma_i) / s^2 + |mu_i - m_i|^2 / s^2]
    kurtosis   + weight mean_d |K_id - 3|,   K_id = mean(d^4) / (v_id + eps)^2,   d = z - mu_i
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def _counted(labels: Tensor, classes: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels with 0 where a row is left out, whether a row counts, and whether its label is too large."""
    y = labels.long()
    asked = (y >= 0) & (y != ignore_index)
    keep = asked & (y < classes)
    return torch.where(keep, y, 0), keep, asked & (y >= classes)


def classes_present(features: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """How many classes have a row, at least 1: the divisor of a mean."""
    y, keep, _ = _counted(labels, features.shape[1], ignore_index)
    rows = torch.zeros(features.shape[1], dtype=torch.int64, device=y.device).index_add(0, y, keep.long())
    return (rows > 0).sum().clamp(min=1)


def gccs_loss(
    features: Tensor,
    labels: Tensor,
    target_mean: float,
    target_std: float,
    eps: float,
    kurtosis_weight: float,
    ignore_index: int,
    full: bool = False,
) -> Tensor:
    """Per-class loss (D,) of features (N, D) and labels (N,): 0 for a class without rows, NaN where a label is bad."""
    z = features if features.dtype == torch.float64 else features.float()
    classes, s2 = z.shape[1], target_std**2
    y, keep, bad = _counted(labels, classes, ignore_index)
    z = torch.where(keep.unsqueeze(1), z, 0)
    n = z.new_zeros(classes).index_add(0, y, keep.to(z.dtype))

    def class_mean(rows: Tensor) -> Tensor:
        # Not index_add, whose second derivative torch 2.11 does not trace with symbolic sizes.
        rows = torch.where(keep.unsqueeze(1), rows, 0)
        total = rows.new_zeros(classes, classes).index_put((y,), rows, accumulate=True)
        return total / n.clamp(min=1).unsqueeze(1)

    # Around a first mean, so that a spread far below the mean keeps its digits.
    shift = class_mean(z).detach()
    d = z - shift[y]
    mean = class_mean(d)
    d = d - mean[y]
    to_target = shift - target_mean * torch.eye(classes, dtype=z.dtype, device=z.device) + mean
    v = class_mean(d.square())
    several = n > 1

    loss = (to_target.square() / s2).sum(1)
    u = torch.where(several.unsqueeze(1), v + eps, 1)
    if full:
        log_size = torch.stack([_log_det(d, keep & (y == c), n[c], eps) for c in range(classes)])
    else:
        log_size = u.log().sum(1)
    spread = classes * (2 * math.log(target_std) - 1) - log_size + (v / s2).sum(1)
    loss = 0.5 * (torch.where(several, spread, 0) + torch.where(n > 0, loss, 0))
    if kurtosis_weight > 0:
        excess = class_mean(d**4) / u.square() - 3
        size = excess * excess.detach().sign()  # abs, but for what torch 2.11 makes of its second derivative
        loss = loss + torch.where(several, kurtosis_weight * size.mean(1), 0)
    return loss + torch.where(bad.any(), math.nan, 0)


def _log_det(d: Tensor, rows: Tensor, n: Tensor, eps: float) -> Tensor:
    """log|Sigma + eps I| of the class that these rows are of; recomputed in the backward pass, where one is kept."""
    plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if plain or not (torch.is_grad_enabled() and d.requires_grad):
        return _log_det_of(d, rows, n, eps)
    return checkpoint(_log_det_of, d, rows, n, eps, use_reentrant=False)


def _log_det_of(d: Tensor, rows: Tensor, n: Tensor, eps: float) -> Tensor:
    eye = torch.eye(d.shape[1], dtype=d.dtype, device=d.device)
    sigma = torch.where(rows.unsqueeze(1), d, 0).mT @ d / n.clamp(min=1) + eps * eye
    factor, info = torch.linalg.cholesky_ex(torch.where(n > 1, sigma, eye))
    return torch.where(info == 0, 2 * factor.diagonal().log().sum(), math.nan)


def reduce(rows: Tensor, reduction: int, divisor: Tensor | None) -> Tensor:
    """0 none, 1 mean over the classes present, 2 sum."""
    if reduction == 0:
        return rows
    return rows.sum() if divisor is None else rows.sum() / divisor
