"""Sigmoid and softmax focal loss, cross entropy: per-element and per-row losses, without reductions.

Lin et al., "Focal Loss for Dense Object Detection", eq. 4 and 5: FL(p_t) = -alpha_t (1 - p_t)^gamma log(p_t).
Every form below stays in log space, so that no power has a singular derivative (gamma < 1) and no 1 - p cancels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _compute(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def sigmoid_focal_loss(inputs: Tensor, targets: Tensor, alpha: float, gamma: float, ignore_index: int) -> Tensor:
    """Per-element loss, in the shape of inputs; alpha < 0 switches the balancing off.

    Targets: floats, 0/1 integers, or class indices of shape inputs.shape[:-1].
    """
    x = _compute(inputs)
    y, ignored = dense_targets(inputs, targets, ignore_index)
    x = torch.where(ignored, 0.0, x) if ignored is not None else x
    alpha_t = alpha * y + (1 - alpha) * (1 - y) if alpha >= 0 else torch.ones_like(y)

    # Hard labels: u = -s x with s = +-1, p_t = sigmoid(-u), FL = alpha_t sigmoid(u)^gamma softplus(u).
    u = (1 - 2 * y) * x
    hard = _focal(F.logsigmoid(u), F.logsigmoid(-u), gamma)
    if torch.is_floating_point(targets):
        # Soft labels: ce = softplus(x) - y x, FL = alpha_t (p + y - 2 p y)^gamma ce.
        is_hard = (y == 0) | (y == 1)
        x, y_soft = torch.where(is_hard, 0.0, x), torch.where(is_hard, 0.5, y)
        p = torch.sigmoid(x)
        ce = -F.logsigmoid(-x) - y_soft * x
        hard = torch.where(is_hard, hard, (p * (1 - y_soft) + y_soft * (1 - p)) ** gamma * ce)
    loss = alpha_t * hard
    return torch.where(ignored, 0.0, loss) if ignored is not None else loss


def _focal(log_u: Tensor, log_p: Tensor, gamma: float) -> Tensor:
    """-u^gamma log p from the logarithms of u = 1 - p and p; gamma = 0 leaves log_u alone, which may be -inf."""
    if gamma == 0:
        return -log_p
    lost = log_p == float("-inf")  # there u = 1, and the gradient's p log p tends to 0
    return torch.where(lost, -log_p, -torch.exp(gamma * log_u) * torch.where(lost, -1.0, log_p))


def widened(target: Tensor) -> Tensor:
    """uint8 labels as int32: compared with a negative number, uint8 would wrap around."""
    return target.int() if target.dtype == torch.uint8 else target


def dense_targets(inputs: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Targets as floats of the shape of inputs, and a mask of what is left out (None when floats were given)."""
    targets = widened(targets)
    if torch.is_floating_point(targets):
        return _compute(targets).to(_compute(inputs).dtype), None
    if targets.dtype == torch.bool:
        return targets.to(_compute(inputs).dtype), None
    if targets.shape == inputs.shape:
        ignored = targets == ignore_index
        bad = ~ignored & (targets != 0) & (targets != 1)
        y = targets
    else:
        classes = inputs.shape[-1]
        ignored = (targets == ignore_index).unsqueeze(-1).expand(inputs.shape)
        bad = ((targets < -1) | (targets >= classes)).unsqueeze(-1) & ~ignored
        y = targets.unsqueeze(-1) == torch.arange(classes, device=inputs.device)
    y = torch.where(bad, float("nan"), torch.where(ignored, 0.0, y.to(_compute(inputs).dtype)))
    return y, ignored


def softmax_focal_loss(
    input: Tensor, target: Tensor, alpha: Tensor | None, gamma: float, label_smoothing: float, ignore_index: int
) -> Tensor:
    """Per-row loss of logits (N, C) or (N, C, S), class dimension 1; targets are indices or probabilities."""
    z = _compute(input)
    if torch.is_floating_point(target):
        return _dense_rows(z, _smooth(_compute(target).to(z.dtype), label_smoothing), alpha, gamma)

    target = widened(target)
    ignored = target == ignore_index
    bad = ~ignored & ((target < 0) | (target >= z.shape[1]))
    index = torch.where(ignored | bad, 0, target).long().unsqueeze(1)
    z = torch.where(ignored.unsqueeze(1), 0.0, z)
    if label_smoothing > 0:
        one_hot = torch.zeros_like(z).scatter(1, index, 1.0)
        loss = _dense_rows(z, _smooth(one_hot, label_smoothing), alpha, gamma)
    else:
        # d = z_y - log sum_{k != y} exp z_k is the logit of p_y: log p = logsigmoid(d), log (1 - p) = logsigmoid(-d).
        others = z.scatter(1, index, float("-inf"))
        alone = (others == float("-inf")).all(1, keepdim=True) & (z.gather(1, index) > float("-inf"))
        d = z.gather(1, index) - torch.logsumexp(torch.where(alone, 0.0, others), 1, keepdim=True)
        loss = _focal(F.logsigmoid(-d), F.logsigmoid(d), gamma)
        loss = torch.where(alone, 0.0, loss)
        loss = (loss * torch.where((z == float("inf")).any(1, keepdim=True), float("nan"), 1.0)).squeeze(1)
        if alpha is not None:
            loss = loss * alpha.to(z.dtype)[index.squeeze(1)]
    loss = torch.where(bad, float("nan"), loss)
    return torch.where(ignored, 0.0, loss)


def _smooth(q: Tensor, label_smoothing: float) -> Tensor:
    return (1 - label_smoothing) * q + label_smoothing / q.shape[1] if label_smoothing > 0 else q


def _dense_rows(z: Tensor, q: Tensor, alpha: Tensor | None, gamma: float) -> Tensor:
    """sum_c q_c alpha_c (1 - p_c)^gamma (-log p_c), with 0 log 0 = 0."""
    log_p = torch.log_softmax(z, 1)
    focus = torch.ones((), dtype=z.dtype, device=z.device)
    if gamma > 0:
        u = -torch.expm1(log_p)
        saturated = u <= 0
        focus = torch.where(saturated, 0.0, torch.where(saturated, 1.0, u) ** gamma)
    weight = q if alpha is None else q * alpha.to(z.dtype).view(-1, *[1] * (z.dim() - 2))
    nothing = weight == 0
    return -(torch.where(nothing, 0.0, weight * focus * torch.where(nothing, 0.0, log_p))).sum(1)


def reduce(loss: Tensor, reduction: int, divisor: Tensor | None) -> Tensor:
    """0 none, 1 mean, 2 sum; the mean and a normalised sum divide by `divisor`."""
    if reduction == 0:
        return loss
    total = loss.sum()
    return total if divisor is None else total / divisor


def sigmoid_divisor(inputs: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """The mean's divisor: the number of elements that are not left out."""
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    if torch.is_floating_point(targets) or targets.dtype == torch.bool:
        return torch.full((), inputs.numel(), dtype=dtype, device=inputs.device)
    per_target = 1 if targets.shape == inputs.shape else inputs.shape[-1]
    return (widened(targets) != ignore_index).sum().to(dtype) * per_target


def softmax_divisor(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The mean's divisor: rows that count; with `weight` (cross entropy, index targets) the sum of their weights."""
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    if torch.is_floating_point(target):
        rows = input.numel() // max(input.shape[1], 1)
        return torch.full((), rows, dtype=dtype, device=input.device)
    target = widened(target)
    valid = target != ignore_index
    if weight is None:
        return valid.sum().to(dtype)
    index = torch.where(valid, target, 0).long().clamp(0, input.shape[1] - 1)
    return torch.where(valid, weight.to(dtype)[index], 0.0).sum()
