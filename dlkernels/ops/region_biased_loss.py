"""Region biased loss of region attention networks."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend, _checks
from .._library import has_tangent, is_compiling, transforms_active, wants_grad
from ..reference import region_biased_loss as reference
from ._reduced import NONE
from ._region_biased_loss import RegionBiasedLoss

NORMALIZE: dict[str | None, int] = {None: 0, "softmax": 1}
MAX_REGIONS = 1 << 24  # the kernels count regions in float32


def region_biased_loss(
    attention: Tensor,
    *,
    origin_index: int = 0,
    margin: float = 0.02,
    normalize: str | None = None,
    mask: Tensor | None = None,
    reduction: str = "mean",
    higher_order: bool = True,
) -> Tensor:
    r"""Region biased loss: one crop of a face is to be weighed more than the whole face, by a margin.

        L_n = max(0, margin - (max_{r != o} mu_nr - mu_no)),   o = origin_index

    The authors' published code passes its weights through a softmax over the six regions, the whole face last, and has
    another margin: `region_biased_loss(mu, origin_index=-1, margin=0.1, normalize="softmax")`.

    Args:
        attention: weights mu (N, R) of R regions; float32, float16, bfloat16 or float64, any strides.
        origin_index: which region is the whole face, in [-R, R); negative numbers count from the end.
        margin: by how much a crop is to be weighed more; any finite number.
        normalize: None, or "softmax": over the regions that take part, in the same pass, with its gradient.
        mask: None, or booleans (N, R): True where a crop takes part. Others are neither read nor part of the softmax;
            the whole face always takes part. A row without a crop costs 0.
        reduction: "mean" over the N rows, "sum" or "none".
        higher_order: keep `attention` beside a stored gradient, so that second derivatives work. False saves that
            memory.

    Returns:
        float32 (float64 for float64 attention): (N,) for "none", otherwise a scalar. The mean over no row is 0.

    Raises:
        TypeError: attention or mask of an unsupported dtype, an `origin_index` that is no int.
        ValueError: shapes, devices, origin_index outside of [-R, R), a margin that is not finite, an unknown
            `normalize` or reduction.

    Note:
        A row that just reaches the margin has gradient 0; of several largest crops the first one gets the gradient. A
        NaN in what takes part makes its row's loss and gradient NaN.
        A mean or a sum writes its gradient in the forward pass. Works under torch.compile(fullgraph=True), export,
        torch.func and AMP (half inputs, float32 inside and out); bitwise equal between runs and thread counts.

    Reference:
        Wang et al., "Region Attention Networks for Pose and Occlusion Robust Facial Expression Recognition", IEEE TIP
        2020.
    """
    fast = None if is_compiling() else _backend.fast(attention)
    if fast is not None:
        loss = fast.region_biased_loss(attention, origin_index, margin, normalize, mask, reduction, higher_order)
        if loss is not None:
            return loss

    code = _checks.reduction_code(reduction)
    softmax = _checks.one_of("normalize", normalize, NORMALIZE) == 1
    margin = _checks.finite("margin", margin)
    _check_attention(attention)
    regions = attention.shape[1]
    origin = _checks.integer("origin_index", origin_index)
    if not -regions <= origin < regions:
        raise ValueError(f"`origin_index` must be in [-R, R) = [{-regions}, {regions}), got {origin}")
    origin %= regions
    if mask is not None:
        check_mask(mask, attention, "attention")

    plain = _backend.choose(attention.device.type, "region_biased_loss_fwd") == "reference" or has_tangent(attention)
    if plain or (transforms_active() and code != NONE):
        if plain:
            rows = reference.region_biased_loss(attention, mask, origin, margin, softmax)
        else:
            rows = RegionBiasedLoss.call(attention, mask, origin, margin, softmax, NONE, False, True)[0]
        if code == NONE:
            return rows
        return rows.sum() / torch.sym_max(rows.shape[0], 1) if reduction == "mean" else rows.sum()
    need_grad = code != NONE and wants_grad(attention)
    return RegionBiasedLoss.call(attention, mask, origin, margin, softmax, code, need_grad, higher_order)[0]


def _check_attention(attention: Tensor) -> None:
    _checks.floating("attention", attention)
    if attention.dim() != 2:
        raise ValueError(f"`attention` must have shape (N, R), got {_checks.shape_of(attention)}")
    if not 1 <= attention.shape[1] <= MAX_REGIONS:
        raise ValueError(f"`attention` must have 1 to {MAX_REGIONS} regions, got {attention.shape[1]}")


def check_mask(mask: Tensor, like: Tensor, like_name: str) -> None:
    """Booleans (N, R), beside a tensor whose first two dimensions these are."""
    _checks.tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"`mask` must be torch.bool, got {mask.dtype}")
    _checks.shape("mask", mask, like.shape[:2], "(N, R)")
    _checks.same_device("mask", mask, like_name, like)
