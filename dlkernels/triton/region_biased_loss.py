"""The region biased loss on GPUs: loss and gradient of rows of regions from one read of the attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import region_biased_loss as reference
from . import _common
from ._common import (
    DIVISOR_COUNT,
    DIVISOR_ONE,
    GRAD_EACH,
    GRAD_NONE,
    GRAD_STORED,
    LOSS_EACH,
    LOSS_NONE,
    LOSS_PARTIAL,
    LOSS_TOTAL,
    MEAN,
    accumulator,
    number,
    published_divisor,
    scalar,
)
from ._rows import vector

MAX_REGIONS = 8192  # a row that stays in registers; longer ones, which no face has, run the reference


@triton.jit(do_not_specialize=["origin", "margin", "n", "vectors", "stride_g"])
def _region_biased_loss_kernel(
    x_ptr,  # [N, R] attention
    mask_ptr,  # [N, R] 0 or 1
    g_ptr,  # [N] gradient of the row losses, stride stride_g (GRAD_EACH)
    loss_ptr,  # [N], [programs] or []
    dx_ptr,  # [N, R]
    divisor_ptr,  # []
    origin,
    margin,
    n,
    vectors,
    stride_g,
    VECTOR: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SOFTMAX: tl.constexpr,
    LOSS: tl.constexpr,
    GRAD: tl.constexpr,
    DIVISOR: tl.constexpr,
    FOLD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):
    # Region biased loss, forward and backward.
    #
    # Math      mu = x or softmax(x), gap = max over crops - mu_0: loss = max(0, margin - gap), active = loss > 0:
    #           dmu_0 = active, dmu_top = -active;  through the softmax dx_r = mu_r (dmu_r + active gap).
    # Traffic   per element: read x and the mask, write dx.
    # Grid      one program per ROWS rows.
    # Requires  contiguous x, mask and dx; R = vectors VECTOR <= BLOCK_R.
    # Result    bitwise reproducible: a fixed tree per program, partial sums to finalise_kernel.
    margin = scalar(margin, ACC)
    regions = vectors * VECTOR
    pid_n = tl.program_id(0).to(tl.int64)
    row = pid_n * ROWS
    offs_n = tl.arange(0, ROWS)[:, None]
    offs_r = tl.arange(0, BLOCK_R)[None, :]
    mask_n = offs_n < n - row
    inside = mask_n & (offs_r < regions)
    offs = offs_n * regions + offs_r
    base = row * regions
    is_origin = offs_r == origin
    if HAS_MASK:
        parts = inside & (is_origin | (tl.load(mask_ptr + base + offs, mask=inside, other=0) != 0))
    else:
        parts = inside
    crops = parts & ~is_origin
    x = tl.load(x_ptr + base + offs, mask=parts, other=-float("inf"), eviction_policy="evict_first").to(ACC)

    # The crop of the largest weight, the first of several; BLOCK_R where a row has none.
    known = tl.where(crops & (x == x), x, -float("inf"))
    largest = tl.max(known, 1, keep_dims=True)
    top = tl.min(tl.where(crops & ((x == largest) | (x != x)), offs_r, BLOCK_R), 1, keep_dims=True)
    is_top = offs_r == top
    undefined = tl.max((parts & (x != x)).to(tl.int32), 1, keep_dims=True) > 0

    x_top = tl.sum(tl.where(is_top, x, 0.0), 1, keep_dims=True)
    x_0 = tl.sum(tl.where(is_origin, x, 0.0), 1, keep_dims=True)
    if SOFTMAX:
        highest = tl.max(tl.where(parts & (x == x), x, -float("inf")), 1, keep_dims=True)
        e = tl.where(parts, tl.exp(x - highest), 0.0)
        e_sum = tl.sum(e, 1, keep_dims=True)
        gap = (tl.exp(x_top - highest) - tl.exp(x_0 - highest)) / e_sum
    else:
        gap = x_top - x_0
    value = margin - gap
    undefined = undefined | (value != value)
    active = tl.where(value > 0, 1.0, 0.0).to(ACC)
    active = tl.where(undefined, float("nan"), active)
    active = tl.where(top < BLOCK_R, active, 0.0)
    divisor = published_divisor(divisor_ptr, divisor_ptr, n, 0, DIVISOR, LOSS != LOSS_NONE, ACC)

    if LOSS != LOSS_NONE:
        loss = tl.where(active == 0, 0.0, tl.where(undefined, float("nan"), value))
        loss = tl.where(mask_n, loss, 0.0)
        if LOSS == LOSS_EACH:
            tl.store(loss_ptr + row + offs_n, loss, mask=mask_n)
        else:
            total = tl.sum(tl.sum(loss, 1), 0)
            tl.store(loss_ptr + pid_n, total / divisor if LOSS == LOSS_TOTAL else total)

    if GRAD != GRAD_NONE:
        if GRAD == GRAD_EACH:
            scale = tl.load(g_ptr + (row + offs_n) * stride_g, mask=mask_n, other=0.0).to(ACC)
        elif FOLD:
            scale = tl.full(mask_n.shape, 1.0, ACC) / divisor
        else:
            scale = tl.full(mask_n.shape, 1.0, ACC)
        dx = tl.where(is_origin, active, tl.where(is_top, -active, 0.0))
        if SOFTMAX:
            dx = e / e_sum * (dx + active * gap)
        dx = tl.where(undefined, float("nan"), dx) * scale
        dx = tl.where(parts & (active != 0), dx, 0.0)
        tl.store(dx_ptr + base + offs, dx.to(dx_ptr.dtype.element_ty), mask=inside)


class Tile(NamedTuple):
    rows: int
    block_r: int
    num_warps: int
    programs: int


def plan(n: int, regions: int) -> Tile:
    """A function of the shape alone: 1024 elements a program, fewer where the batch would not fill a GPU."""
    block_r = triton.next_power_of_2(regions)
    rows = 1
    while rows * block_r < 1024 and rows < n:
        rows *= 2
    while rows > 1 and rows * block_r > 256 and triton.cdiv(n, rows) < 256:
        rows //= 2
    return Tile(rows, block_r, min(16, max(2, rows * block_r // 256)), triton.cdiv(n, rows))


def _launch(
    x: Tensor, mask: Tensor | None, g: Tensor | None, loss: Tensor | None, dx: Tensor, divisor: Tensor | None,
    origin: int, margin: float, softmax: bool, modes: tuple[Any, Any, Any],
) -> None:  # fmt: skip
    n, regions = x.shape
    tile, width = plan(n, regions), vector(regions)
    loss_mode, grad_mode, divisor_mode = modes
    _region_biased_loss_kernel[(tile.programs,)](
        x, x if mask is None else mask.contiguous().view(torch.uint8), x if g is None else g,
        x if loss is None else loss, dx, x if divisor is None else divisor,
        origin, number(margin, x.dtype), n, regions // width, 0 if g is None else g.stride(0),
        VECTOR=width, HAS_MASK=mask is not None, SOFTMAX=softmax, LOSS=loss_mode.value, GRAD=grad_mode.value,
        DIVISOR=divisor_mode.value, FOLD=x.dtype != torch.float16, ROWS=tile.rows, BLOCK_R=tile.block_r,
        ACC=accumulator(x.dtype)[0], num_warps=tile.num_warps,
    )  # fmt: skip


def region_biased_loss_fwd(
    attention: Tensor,
    mask: Tensor | None,
    origin_index: int,
    margin: float,
    softmax: bool,
    reduction: int,
    need_grad: bool,
    higher_order: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = attention.contiguous()
    loss, grad, divisor = _common.outputs(x, x.shape[:1], reduction, need_grad)
    if x.shape[0] == 0:  # the mean over no row is 0
        return loss.zero_(), grad, divisor.fill_(1.0)
    if x.shape[1] > MAX_REGIONS:
        return _long_rows(x, mask, (origin_index, margin, softmax), loss, grad, divisor, reduction)
    with _common.on_device(x):
        loss_mode, partial = _common.loss_mode(loss, reduction, plan(*x.shape).programs)
        grad_mode = GRAD_STORED if grad.numel() else GRAD_NONE
        modes = (loss_mode, grad_mode, DIVISOR_COUNT if reduction == MEAN else DIVISOR_ONE)
        _launch(x, mask, None, partial, grad, divisor, origin_index, margin, softmax, modes)
        if loss_mode is LOSS_PARTIAL:
            _common.finalise(partial, divisor, loss, 1, accumulator(x.dtype)[0])
    return loss, grad, divisor


def region_biased_loss_bwd(
    grad_output: Tensor, attention: Tensor, mask: Tensor | None, origin_index: int, margin: float, softmax: bool
) -> Tensor:
    x = attention.contiguous()
    dx = x.new_empty(x.shape)
    if x.shape[0] == 0:
        return dx
    if x.shape[1] > MAX_REGIONS:
        return dx.copy_(_pull(x, mask, (origin_index, margin, softmax))[1](grad_output)[0])
    with _common.on_device(x):
        modes = (LOSS_NONE, GRAD_EACH, DIVISOR_ONE)
        _launch(x, mask, grad_output, None, dx, None, origin_index, margin, softmax, modes)
    return dx


def _pull(x: Tensor, mask: Tensor | None, options: tuple[int, float, bool]) -> Any:
    return torch.func.vjp(lambda z: reference.region_biased_loss(z, mask, *options), x)


def _long_rows(
    x: Tensor, mask: Tensor | None, options: tuple[int, float, bool], loss: Tensor, grad: Tensor, divisor: Tensor,
    reduction: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows that do not fit a tile, in plain PyTorch."""
    rows, pull = _pull(x, mask, options)
    divisor.fill_(float(x.shape[0]) if reduction == MEAN else 1.0)
    loss.copy_(rows if reduction == _common.NONE else rows.sum() / divisor)
    if grad.numel():
        g = torch.ones_like(rows)
        grad.copy_(pull(g if x.dtype == torch.float16 else g / divisor)[0])
    return loss, grad, divisor
