"""The calls that stand in a rewritten graph: public functions, with the dtype that the graph had there."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import ops


@contextlib.contextmanager
def _compiling(x: Tensor) -> Iterator[None]:
    """`torch.compiler.is_compiling()` is True while a compiler runs a graph on tensors without values."""
    if type(x) is Tensor or type(x) is Parameter:
        yield  # real values: a graph that is run as it is
        return
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def _traceable(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with _compiling(x):
            return function(x, *args, **kwargs)

    return call


@_traceable
def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """`dlkernels.group_norm` with scale and shift (N, C, 1, ...) as models write them."""
    scale = scale if scale is None else scale.flatten(1)
    shift = shift if shift is None else shift.flatten(1)
    return ops.group_norm(
        x, num_groups, weight, bias, eps, activation=activation, residual=residual, scale=scale, shift=shift
    )


@_traceable
def squeeze_excite(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    gate: str,
    residual: Tensor | None,
    residual_activation: str | None,
    layout: str,
) -> Tensor:
    """`dlkernels.squeeze_excite`."""
    return ops.squeeze_excite(
        x,
        w1,
        b1,
        w2,
        b2,
        activation=activation,
        gate=gate,
        residual=residual,
        residual_activation=residual_activation,
        layout=layout,
    )


@_traceable
def sigmoid_focal_loss(
    x: Tensor, targets: Tensor, alpha: float | None, gamma: float, reduction: str, dtype: torch.dtype
) -> Tensor:
    """`dlkernels.sigmoid_focal_loss`, in the dtype that the formula had."""
    return ops.sigmoid_focal_loss(x, targets, alpha, gamma, reduction).to(dtype)


@_traceable
def cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    dtype: torch.dtype,
) -> Tensor:
    """`dlkernels.cross_entropy`, in the dtype of torch's: half precision for half-precision logits."""
    return ops.cross_entropy(x, target, weight, None, ignore_index, None, reduction, label_smoothing).to(dtype)


@_traceable
def squared_distances(
    x: Tensor, labels: Tensor, centers: Tensor, reduction: str, wraps: bool, per: str, dtype: torch.dtype
) -> Tensor:
    """||x_i - c_{y_i}||^2, twice `dlkernels.center_loss`.

    wraps: negative labels count from the end, as in centers[labels]; the op would leave their rows out.
    per: what a sum is divided by: "" (nothing), "row" or "element".
    """
    if wraps:
        labels = torch.where(labels < 0, labels + centers.shape[0], labels)
    loss = 2 * ops.center_loss(x, labels, centers, reduction=reduction)
    if per:
        loss = loss / (x.shape[0] if per == "row" else x.shape[0] * x.shape[1])
    return loss.to(dtype)


@_traceable
def clamped_center_loss(
    x: Tensor, labels: Tensor, centers: Tensor, least: float, most: float, dtype: torch.dtype
) -> Tensor:
    """The sum over a masked and clamped (N, K) matrix of squared distances, without the matrix.

    Every masked entry is clamped up from 0 as well; a label that no column has leaves a whole row masked.
    """
    n, k = x.shape[0], centers.shape[0]
    labels = torch.where(labels < k, labels, -1)
    rows = 2 * ops.center_loss(x, labels, centers, reduction="none")
    return (rows.clamp(least, most).sum() + n * (k - 1) * min(max(0.0, least), most)).to(dtype)
