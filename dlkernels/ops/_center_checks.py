"""What the center-loss family checks of its arguments, and the form in which the kernels take them."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import _checks
from .._library import is_quiet
from ..reference._activation import compute


def is_sharded(centers: Tensor) -> bool:
    """Whether centers are a DTensor. Where nobody has imported torch.distributed.tensor there is none."""
    if type(centers) is Tensor or type(centers) is Parameter:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(centers, module.DTensor)


def attention_of(features: Tensor, attention: Tensor, logits: bool) -> Tensor:
    """Attention (N, D), checked; logits (N, D, 2) become their difference, in float32 (float64)."""
    _checks.floating("attention", attention)
    _checks.floating("features", features)
    if logits and attention.dim() == 3 and attention.shape[2:] == (2,):
        attention = compute(attention)  # half precision would round the difference
        attention = attention[..., 1] - attention[..., 0]
    _checks.parameter("attention", attention, tuple(features.shape), "(N, D)", "features", features)
    if not logits and not is_quiet(attention) and bool(((attention < 0) | (attention > 1)).any()):
        raise ValueError("`attention` must be in [0, 1]; pass attention_logits=True if these are logits")
    return attention


def check_arguments(features: Tensor, labels: Tensor, centers: Tensor, ignore_index: int) -> None:
    _checks.floating("features", features)
    if features.dim() != 2:
        raise ValueError(f"`features` must have shape (N, D), got {tuple(features.shape)}")
    _checks.labels("labels", labels, (features.shape[0],), "(N,)", "features", features)
    _checks.tensor("centers", centers)
    k = centers.shape[0] if centers.dim() == 2 else -1
    _checks.parameter("centers", centers, (k, features.shape[1]), "(K, D)", "features", features)
    _checks.integer("ignore_index", ignore_index)


def prepared(features: Tensor, labels: Tensor, attention: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Contiguous, and labels of int64 or int32: what the kernels read."""
    labels = labels if labels.dtype in (torch.int64, torch.int32) else labels.int()
    return features.contiguous(), labels.contiguous(), None if attention is None else attention.contiguous()


def check_labels(labels: Tensor, num_classes: int, ignore_index: int) -> None:
    """The reference's index check; the kernels have their own."""
    if is_quiet(labels):
        return
    bad = (labels >= num_classes) & (labels != ignore_index)
    if bad.any():
        raise IndexError(f"labels must be in [0, {num_classes}), negative or ignore_index, got {int(labels[bad][0])}")
