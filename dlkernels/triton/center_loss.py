"""The center-loss family on GPUs: launchers of the loss, its gradients, the island's pairs and the centers' update.

The loss and the gradients of features and attention go by rows in their natural order (`_center_loss_rows`); what is
summed over a class goes by rows sorted by class (`_center_loss_segments`); the island needs the centers alone
(`_center_loss_island`). Nothing waits for the device, and nothing of size N x K is made.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import _center_loss_island as island
from . import _common
from ._center_loss_rows import (
    ATTENTION_LOGITS,
    ATTENTION_NONE,
    ATTENTION_WEIGHTS,
    COUNT_HERE,
    OUT_GRAD,
    OUT_MOVE,
    OUT_STEP,
    center_rows_kernel,
    count_rows_kernel,
)
from ._center_loss_segments import class_sums
from ._common import (
    DIVISOR_COUNTED,
    DIVISOR_HERE,
    DIVISOR_ONE,
    GRAD_EACH,
    GRAD_NONE,
    GRAD_STORED,
    LOSS_NONE,
    LOSS_PARTIAL,
    MEAN,
    NONE,
    accumulator,
)

TILE = 2048  # elements of the row kernel's tile, 16 per thread; with attention half of that, for want of registers
COUNT_BLOCK, COUNT_STEPS = 4096, 4


class Plan(NamedTuple):
    """How programs cover the rows (N, D). A function of the shape alone."""

    block_r: int
    block_d: int
    steps: int  # blocks of rows of one program
    programs: int
    num_warps: int


@functools.lru_cache(maxsize=4096)
def plan(n: int, d: int, tile: int) -> Plan:
    """Small batches: more programs rather than larger tiles. Large ones: fewer partial sums."""
    block_d = min(max(1, triton.next_power_of_2(d)), tile)
    block_r = max(1, tile // block_d)
    while block_r > 1 and triton.cdiv(n, block_r) < 256 and block_r * block_d > 256:
        block_r //= 2
    blocks = triton.cdiv(n, block_r)
    steps = 1 if blocks < 1 << 13 else 4 if blocks < 1 << 16 else 16
    size = block_r * block_d
    return Plan(block_r, block_d, steps, triton.cdiv(blocks, steps), max(1, min(4, size // 256)))


def plan_for(x: Tensor, attention: Tensor | None) -> Plan:
    return plan(*x.shape, TILE if attention is None else TILE // 2)


def _kind(attention: Tensor | None, logits: bool) -> Any:
    return ATTENTION_NONE if attention is None else ATTENTION_LOGITS if logits else ATTENTION_WEIGHTS


def _count(labels: Tensor, ignore_index: int, divisor: Tensor, acc: Any) -> None:
    """divisor = how many rows count, at least 1."""
    n = labels.numel()
    programs = triton.cdiv(n, COUNT_BLOCK * COUNT_STEPS)
    options = {"BLOCK": COUNT_BLOCK, "ACC": acc, "num_warps": 8}
    if programs == 1:
        steps = triton.cdiv(n, COUNT_BLOCK)
        count_rows_kernel[(1,)](labels, divisor, n, ignore_index, steps, MERGE=False, FINAL=True, **options)
        return
    partial = labels.new_empty((programs,), dtype=torch.int64)
    count_rows_kernel[(programs,)](labels, partial, n, ignore_index, COUNT_STEPS, MERGE=False, FINAL=False, **options)
    steps = triton.cdiv(programs, COUNT_BLOCK)
    count_rows_kernel[(1,)](partial, divisor, programs, 0, steps, MERGE=True, FINAL=True, **options)


def _launch_rows(
    x: Tensor, labels: Tensor, centers: Tensor, attention: Tensor | None, g: Tensor | None, loss: Tensor | None,
    dx: Tensor, dattention: Tensor, divisor: Tensor | None, logits: bool, ignore_index: int,
    modes: tuple[Any, Any, Any],
) -> None:  # fmt: skip
    (n, d), p = x.shape, plan_for(x, attention)
    loss_mode, grad_mode, divisor_mode = modes
    vector = math.gcd(d, 8)
    center_rows_kernel[(p.programs,)](
        x, labels, centers, x if attention is None else attention, x if g is None else g, x if loss is None else loss,
        dx, dattention, x if divisor is None else divisor, n, centers.shape[0], ignore_index, d // vector,
        0 if g is None else g.stride(0), p.steps,
        D_VECTOR=vector, ATTENTION=_kind(attention, logits).value, LOSS=loss_mode.value, GRAD=grad_mode.value,
        DIVISOR=divisor_mode.value, BLOCK_R=p.block_r, BLOCK_D=p.block_d,
        ACC=accumulator(x.dtype)[0], num_warps=p.num_warps,
    )  # fmt: skip


def center_loss_fwd(
    features: Tensor,
    labels: Tensor,
    centers: Tensor,
    attention: Tensor | None,
    logits: bool,
    ignore_index: int,
    reduction: int,
    need_grad: bool,
    higher_order: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, labels, centers = features.contiguous(), labels.contiguous(), centers.contiguous()
    a = None if attention is None else attention.contiguous()
    n = x.shape[0]
    acc, dtype = accumulator(x.dtype)
    loss = x.new_empty((n,) if reduction == NONE else (), dtype=dtype)
    divisor = x.new_empty((), dtype=dtype)
    dx = x.new_empty(x.shape if need_grad else (0,))
    like = x if a is None else a
    dattention = like.new_empty(like.shape if need_grad and a is not None else (0,))
    if n == 0:
        if reduction != NONE:
            loss.zero_()
        return loss, dx, dattention, divisor.fill_(1.0)
    programs = plan_for(x, a).programs
    with _common.on_device(x):
        divisor_mode = DIVISOR_ONE
        if reduction == MEAN and n <= COUNT_HERE.value:
            divisor_mode = DIVISOR_HERE
        elif reduction == MEAN:
            divisor_mode = DIVISOR_COUNTED
            _count(labels, ignore_index, divisor, acc)
        loss_mode, partial = _common.loss_mode(loss, reduction, programs)
        grad_mode = GRAD_STORED if need_grad else GRAD_NONE
        modes = (loss_mode, grad_mode, divisor_mode)
        _launch_rows(x, labels, centers, a, None, partial, dx, dattention, divisor, logits, ignore_index, modes)
        if loss_mode is LOSS_PARTIAL:
            _common.finalise(partial, divisor, loss, 1, acc)
    return loss, dx, dattention, divisor


def center_loss_bwd(
    grad_output: Tensor,
    features: Tensor,
    labels: Tensor,
    centers: Tensor,
    attention: Tensor | None,
    logits: bool,
    ignore_index: int,
    need_centers: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, labels, centers = features.contiguous(), labels.contiguous(), centers.contiguous()
    a = None if attention is None else attention.contiguous()
    dx = x.new_empty(x.shape)
    like = x if a is None else a
    dattention = like.new_empty(like.shape if a is not None else (0,))
    dcenters = centers.new_zeros(centers.shape if need_centers else (0,))
    if x.shape[0] == 0:
        return dx, dcenters, dattention
    with _common.on_device(x):
        modes = (LOSS_NONE, GRAD_EACH, DIVISOR_ONE)
        _launch_rows(x, labels, centers, a, grad_output, None, dx, dattention, None, logits, ignore_index, modes)
        if need_centers:
            class_sums(
                x, labels, centers, a, _kind(a, logits), grad_output, dcenters, None, OUT_GRAD, 0.0, False,
                ignore_index,
            )  # fmt: skip
    return dx, dcenters, dattention


def island_pairs_fwd(centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The value, S (D,) and 1 / ||c_j|| (K,)."""
    c = centers.contiguous()
    k, d = c.shape
    dtype = accumulator(c.dtype)[1]
    out = c.new_empty((), dtype=dtype)
    if c.numel() == 0:
        return out.fill_(max(0, k * (k - 1))), c.new_zeros((d,), dtype=dtype), c.new_zeros((k,), dtype=dtype)
    with _common.on_device(c):
        total, inverse, nonzero = island.totals(c)
        island.value(total, nonzero, k, out)
    return out, total, inverse


def island_pairs_bwd(grad_output: Tensor, centers: Tensor, total: Tensor, inverse_norms: Tensor) -> Tensor:
    c = centers.contiguous()
    dc = c.new_empty(c.shape)
    if c.numel() == 0:
        return dc
    factor = 2.0 if c.shape[0] > 1 else 0.0
    with _common.on_device(c):
        island.rows(c, total.contiguous(), inverse_norms.contiguous(), grad_output, None, None, dc, factor)
    return dc


def update_centers_(
    centers: Tensor,
    features: Tensor,
    labels: Tensor,
    attention: Tensor | None,
    logits: bool,
    alpha: float,
    ema: bool,
    island_weight: float,
    ignore_index: int,
) -> None:
    if not centers.is_contiguous():
        raise ValueError(f"`centers` must be contiguous to be changed in place, got strides {centers.stride()}")
    if centers.numel() == 0:
        return
    x, labels = features.contiguous(), labels.contiguous()
    a = None if attention is None else attention.contiguous()
    (n, d), k = x.shape, centers.shape[0]
    kind = _kind(a, logits)
    with _common.on_device(x):
        if not island_weight or k == 1:
            class_sums(x, labels, centers, a, kind, None, centers, None, OUT_MOVE, alpha, ema, ignore_index)
            return
        # The island's term is made of the centers as they are, so that no class may move before all are read: the
        # steps of the classes with rows wait in a buffer for the one pass that moves every class.
        total, inverse, _ = island.totals(centers)
        slot = labels.new_full((k,), -1, dtype=torch.int64)
        step = total.new_empty((max(1, min(n, k)), d))
        class_sums(x, labels, centers, a, kind, None, step, slot, OUT_STEP, alpha, ema, ignore_index)
        island.rows(centers, total, inverse, None, step, slot, centers, -alpha * island_weight / (k - 1))
