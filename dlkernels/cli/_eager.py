"""The losses as people write them in plain PyTorch: what `check`, `demo` and `profile` compare the fused ones with.

They share no code with dlkernels and run in the dtype that they are given. `ignore_index=None` leaves its masks out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _reduce(loss: Tensor, reduction: str, kept: Tensor | None, normalizer: float | None) -> Tensor:
    if reduction == "none":
        return loss
    if reduction == "mean":
        return loss.mean() if kept is None else loss.sum() / kept.sum()
    return loss.sum() if normalizer is None else loss.sum() / normalizer


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    ignore_index: int | None = None,
    normalizer: float | None = None,
) -> Tensor:
    """torchvision's formula; class indices become a one-hot matrix first."""
    kept = None
    if ignore_index is not None:
        kept = targets != ignore_index
        targets = torch.where(kept, targets, 0 if targets.shape == inputs.shape else -1)
    if targets.shape != inputs.shape:
        targets = targets.unsqueeze(-1) == torch.arange(inputs.shape[-1], device=inputs.device)
        kept = kept.unsqueeze(-1).expand(inputs.shape) if kept is not None else None
    targets = targets.to(inputs.dtype)
    p = torch.sigmoid(inputs)
    ce_loss = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    loss = ce_loss * ((1 - p_t) ** gamma)
    if alpha is not None and alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    if kept is not None:
        loss = loss * kept
    return _reduce(loss, reduction, kept, normalizer)


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: Tensor | float | None = None,
    gamma: float = 2.0,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    normalizer: float | None = None,
) -> Tensor:
    """log_softmax, gather, (1 - p)^gamma; probabilities and label smoothing sum over the classes."""
    log_p = F.log_softmax(input, dim=1)
    alpha = alpha.to(input.dtype) if isinstance(alpha, Tensor) else alpha
    kept = None
    if ignore_index is not None:
        kept = target != ignore_index
        target = torch.where(kept, target, 0)
    if target.is_floating_point() or label_smoothing > 0:
        q = target.to(input.dtype)
        if not target.is_floating_point():
            q = torch.zeros_like(log_p).scatter(1, target.unsqueeze(1), 1.0)
        q = (1 - label_smoothing) * q + label_smoothing / input.shape[1]
        if alpha is not None:
            q = q * (alpha.view(-1, *[1] * (input.dim() - 2)) if isinstance(alpha, Tensor) else alpha)
        loss = -(q * (1 - log_p.exp()) ** gamma * log_p).sum(1)
    else:
        log_pt = log_p.gather(1, target.unsqueeze(1)).squeeze(1)
        loss = -((1 - log_pt.exp()) ** gamma) * log_pt
        if alpha is not None:
            loss = (alpha[target] if isinstance(alpha, Tensor) else alpha) * loss
    if kept is not None:
        loss = loss * kept
    return _reduce(loss, reduction, kept, normalizer)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    normalizer: float | None = None,
) -> Tensor:
    """torch.nn.functional.cross_entropy."""
    weight = None if weight is None else weight.to(input.dtype)
    target = target.to(input.dtype) if target.is_floating_point() else target
    loss = F.cross_entropy(
        input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    return loss if normalizer is None else loss / normalizer


def region_biased_loss(
    attention: Tensor,
    origin_index: int = 0,
    margin: float = 0.02,
    normalize: str | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The margin by which the largest weight of a crop falls short of that of the whole face, and a hinge."""
    origin = torch.arange(attention.shape[1], device=attention.device) == origin_index % attention.shape[1]
    if mask is not None:
        attention = attention.masked_fill(~(mask | origin), float("-inf"))
    mu = torch.softmax(attention, 1) if normalize == "softmax" else attention
    best = mu.masked_fill(origin, float("-inf")).max(1).values if mu.shape[0] else mu[:, 0]
    loss = torch.relu(margin - (best - mu[:, origin_index]))
    if mask is not None:
        loss = torch.where((mask & ~origin).any(1), loss, 0.0)
    return _reduce(loss, reduction, None, None)


def gccs_loss(
    features: Tensor,
    labels: Tensor,
    target_mean: float = 40.0,
    target_std: float = 1.0,
    kurtosis_weight: float = 0.0,
    reduction: str = "sum",
    ignore_index: int | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Means and variances of the classes from a one-hot matrix, gathered back to the rows."""
    classes = features.shape[1]
    one_hot = labels.unsqueeze(1) == torch.arange(classes, device=features.device)
    if ignore_index is not None:
        one_hot = one_hot & (labels != ignore_index).unsqueeze(1)
        labels = torch.where(labels == ignore_index, 0, labels)
    one_hot = one_hot.to(features.dtype)
    count = one_hot.sum(0).unsqueeze(1)
    n = count.clamp(min=1)
    mean = one_hot.mT @ features / n
    d = features - mean[labels]
    v = one_hot.mT @ d.square() / n
    s2 = target_std**2
    target = target_mean * torch.eye(classes, dtype=features.dtype, device=features.device)
    spread = torch.log(s2 / (v + eps)) - 1 + v / s2
    loss = 0.5 * (torch.where(count > 1, spread, 0.0) + (mean - target).square() / s2).sum(1)
    if kurtosis_weight > 0:
        kurtosis = one_hot.mT @ d**4 / n / (v + eps).square()
        loss = loss + torch.where(count[:, 0] > 1, kurtosis_weight * (kurtosis - 3).abs().mean(1), 0.0)
    present = count[:, 0] > 0
    loss = torch.where(present, loss, 0.0)
    return loss if reduction == "none" else loss.sum() / (present.sum() if reduction == "mean" else 1)
