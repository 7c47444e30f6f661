"""Gaussian class-conditional simplex (GCCS) loss."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from .. import _backend, _checks
from .._library import has_tangent, is_compiling, is_quiet, transforms_active, wants_grad
from ..reference import gccs_loss as reference
from ._gccs_loss import GCCSLoss
from ._reduced import MEAN, NONE

COVARIANCES: dict[str | None, int] = {"diagonal": 0, "full": 1}


def gccs_loss(
    features: Tensor,
    labels: Tensor,
    *,
    target_mean: float = 40.0,
    target_std: float = 1.0,
    covariance: str = "diagonal",
    kurtosis_weight: float = 0.0,
    reduction: str = "sum",
    ignore_index: int = -100,
    eps: float = 1e-5,
    higher_order: bool = True,
) -> Tensor:
    r"""GCCS loss: pulls the distribution of each class's features towards a Gaussian at a vertex of a simplex.

    Class i has the target N(m_i, s^2 I) with m_i = target_mean e_i (one-hot) and s = target_std. With mean mu_i and
    biased variance v_i of the n_i rows of class i, it costs the divergence KL(observed || target) of two Gaussians:

        L_i = 1/2 sum_d [log(s^2 / (v_id + eps)) - 1 + v_id / s^2 + (mu_id - m_id)^2 / s^2]

    With kurtosis_weight, + kurtosis_weight mean_d |K_id - 3|, K_id = mean((z - mu_i)^4) / (v_id + eps)^2. A class with
    one row has no variance: it costs 1/2 sum_d (mu_id - m_id)^2 / s^2. Inference: argmax_d z_d, the nearest vertex.

    Args:
        features: z (N, D), D the number of classes; float32, float16, bfloat16 or float64, any strides.
        labels: integers (N,) in [0, D). A negative one, or `ignore_index`, leaves its row out: gradient 0, not counted.
        target_mean: where the vertices lie on their axes. Choose it: the default is not verified against the paper.
        target_std: s > 0. The default is not verified against the paper.
        covariance: "diagonal", or "full": -log|Sigma_i + eps I| in place of -sum_d log(v_id + eps). It is plain PyTorch
            on every backend, one Cholesky factorisation per class: memory O(N D + D^2) (under torch.func and
            torch.compile D times that), time O(N D^3). A matrix that is not positive definite gives NaN.
        kurtosis_weight: >= 0, with covariance="diagonal" only. The form of this term and its weight are not verified
            against the paper.
        reduction: "sum" over the classes present, "mean" over them, or "none": (D,), 0 for a class without rows.
        ignore_index: a label, any integer, that leaves its row out.
        eps: >= 0, added to a variance in its logarithm and in divisions. With 0, a column that does not vary within a
            class costs infinity.
        higher_order: keep `features` beside a stored gradient, so that second derivatives work. False saves that
            memory.

    Returns:
        float32 (float64 for float64 features): (D,) for "none", otherwise a scalar. Nothing that counts: 0.

    Raises:
        TypeError: features or labels of an unsupported dtype.
        ValueError: shapes, devices, target_std <= 0, eps or kurtosis_weight < 0, an unknown covariance or reduction, a
            kurtosis_weight with covariance="full".
        IndexError: a label of D or more (CPU). On CUDA nothing is read out of bounds and the loss is NaN.

    Note:
        Statistics of few rows say little: a batch of fewer than 2 D rows warns, once. With several processes, each
        sees the rows of its own.
        No official code is known. Written from the formulas above: hyper-parameters as marked, the factor 1/2 as of the
        divergence (the paper may leave it out).
        A mean or a sum writes its gradient in the forward pass. Works under torch.compile(fullgraph=True), export,
        torch.func and AMP (half inputs, float32 inside and out); bitwise equal between runs and thread counts.

    Reference:
        Ali et al., "Beyond cross-entropy: learning highly separable feature distributions for robust and accurate
        classification", arXiv 2010.15487, and "Gaussian class-conditional simplex loss for accurate, adversarially
        robust deep classifier training", EURASIP Journal on Information Security 2023:3.
    """
    fast = None if is_compiling() else _backend.fast(features)
    if fast is not None:
        loss = fast.gccs_loss(
            features, labels, target_mean, target_std, covariance, kurtosis_weight, reduction, ignore_index, eps,
            higher_order,
        )  # fmt: skip
        if loss is not None:
            if 0 < features.shape[0] < 2 * features.shape[1]:
                _warn_small_batch()
            return loss

    code = _checks.reduction_code(reduction)
    full, *options = check_options(target_mean, target_std, covariance, kurtosis_weight, ignore_index, eps)
    _check_tensors(features, labels)
    if labels.dtype not in (torch.int32, torch.int64):
        labels = labels.int()
    if not is_compiling() and 0 < features.shape[0] < 2 * features.shape[1]:
        _warn_small_batch()

    plain = bool(full) or _backend.choose(features.device.type, "gccs_loss_fwd") == "reference" or has_tangent(features)
    if plain or (transforms_active() and code != NONE):
        if plain:
            _check_labels(labels, features.shape[1], ignore_index)
            rows = reference.gccs_loss(features, labels, *options, full=bool(full))
        else:
            rows = GCCSLoss.call(features, labels, *options, NONE, False, True)[0]
        divisor = reference.classes_present(features, labels, ignore_index) if code == MEAN else None
        return reference.reduce(rows, code, divisor)
    need_grad = code != NONE and wants_grad(features)
    return GCCSLoss.call(features, labels, *options, code, need_grad, higher_order)[0]


@functools.cache
def _warn_small_batch() -> None:
    warnings.warn(
        "gccs_loss: a batch of fewer than two rows per class says little about their distributions",
        stacklevel=_backend._outside(),
    )


def check_options(
    target_mean: Any, target_std: Any, covariance: Any, kurtosis_weight: Any, ignore_index: Any, eps: Any
) -> tuple[int, float, float, float, float, int]:
    """The code of `covariance`, and the other options in the operators' order."""
    full = _checks.one_of("covariance", covariance, COVARIANCES)
    mean = _checks.finite("target_mean", target_mean)
    std = _checks.number("target_std", target_std)
    if not 1e-150 <= std <= 1e150:  # its square, and the inverse of that, are numbers too
        raise ValueError(f"`target_std` must be a finite number > 0, got {target_std}")
    weight = _checks.non_negative("kurtosis_weight", kurtosis_weight)
    if full and weight > 0:
        raise ValueError(f"`kurtosis_weight` needs covariance='diagonal', got {kurtosis_weight} with 'full'")
    return full, mean, std, _checks.non_negative("eps", eps), weight, _checks.integer("ignore_index", ignore_index)


def _check_tensors(features: Tensor, labels: Tensor) -> None:
    _checks.floating("features", features)
    if features.dim() != 2:
        raise ValueError(f"`features` must have shape (N, D), got {_checks.shape_of(features)}")
    if features.shape[1] == 0:
        raise ValueError(f"`features` must have at least one class, got shape {_checks.shape_of(features)}")
    _checks.tensor("labels", labels)
    if labels.dtype not in _checks.INTEGER_DTYPES:
        raise TypeError(f"`labels` must be integer, got {labels.dtype}")
    _checks.shape("labels", labels, features.shape[:1], "(N,)")
    _checks.same_device("labels", labels, "features", features)


def _check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    """The reference's check; the kernels have their own."""
    if is_quiet(labels):
        return
    bad = (labels >= classes) & (labels.long() != ignore_index)
    if bad.any():
        raise IndexError(f"`labels` must be below {classes}, negative or ignore_index, got {int(labels[bad][0])}")
