"""Sigmoid and softmax focal loss on GPUs. The elementwise kernel is here, the row kernel of the softmax in `_rows`.

A kernel writes the loss (per element or row, or summed per program), the gradient, or both from one read of the logits.
The backward operators are the same kernels without the loss and with a gradient per element or row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _common, _rows
from ._common import (
    DIVISOR_COUNT,
    DIVISOR_COUNTED,
    DIVISOR_GIVEN,
    DIVISOR_HERE,
    DIVISOR_ONE,
    GRAD_EACH,
    GRAD_NONE,
    GRAD_ONE,
    GRAD_STORED,
    LOSS_EACH,
    LOSS_NONE,
    LOSS_PARTIAL,
    LOSS_TOTAL,
    MEAN,
    accumulator,
    exp_neg,
    focus,
    gamma_kind,
    load_block,
    log1p_unit,
    number,
    published_divisor,
    scalar,
    store_block,
)

BLOCK = 1024  # elements of the sigmoid kernel's step: 8 per thread
TARGET_FLOAT, TARGET_BINARY, TARGET_CLASS = (tl.constexpr(i) for i in range(3))

# Sigmoid --------------------------------------------------------------------------------------------------------------


@triton.jit
def _hard_terms(x, positive, gamma, GAMMA: tl.constexpr, CORRECT: tl.constexpr, ACC: tl.constexpr):
    """q^gamma ce and its derivative in x, with u = -s x, q = sigmoid(u) = 1 - p_t, ce = softplus(u)."""
    u = tl.where(positive, -x, x)
    up = u >= 0
    e = exp_neg(tl.abs(x), CORRECT, ACC)
    r = 1.0 / (1.0 + e)
    ce = tl.maximum(u, 0.0) + log1p_unit(e, ACC)
    q = tl.where(up, r, e * r)
    f = focus(q, gamma, GAMMA)
    slope = q
    if GAMMA != 0:
        slope += gamma * (tl.where(up, e * r, r) * tl.minimum(ce, 1e30))  # u = inf: 0, not 0 * inf
    slope *= f
    return f * ce, tl.where(positive, -slope, slope)


@triton.jit
def _soft_terms(x, y, gamma, GAMMA: tl.constexpr, CORRECT: tl.constexpr, ACC: tl.constexpr):
    """v^gamma ce and its derivative in x, v = p + y - 2 p y, ce = softplus(x) - y x.

    Written in |x| with the share of the target on the wrong side of the sign, so that y = 0 and y = 1 give the hard
    formula digit for digit: no 1 - p and no v^(gamma - 1) is left on its own.
    """
    a = tl.abs(x)
    up = x >= 0
    e = exp_neg(a, CORRECT, ACC)
    r = 1.0 / (1.0 + e)
    er = e * r
    share = tl.where(up, 1.0 - y, y)
    wrong = r * share
    right = er * (1.0 - share)
    v = wrong + right
    rest = log1p_unit(e, ACC)
    ce = tl.where(share == 0, rest, share * a + rest)
    f = focus(v, gamma, GAMMA)
    slope = wrong - right
    if GAMMA != 0:
        tail = (er * r) * tl.minimum(ce, 1e30)  # x = inf: 0, not 0 * inf
        if GAMMA == 2:
            slope = v * (v * slope + tail * (4.0 * share - 2.0))
        else:
            slope = f * (slope + gamma * tl.where(v > 0, tail * (2.0 * share - 1.0) / v, 0.0))
    return f * ce, tl.where(up, slope, -slope)


@triton.jit(
    do_not_specialize=["alpha_1", "alpha_0", "gamma", "ignore_index", "numel", "count", "num_classes", "magic", "steps"]
)
def _sigmoid_focal_kernel(
    x_ptr,  # [numel] logits
    t_ptr,  # [numel] targets, or [numel / num_classes] class indices
    g_ptr,  # [numel] or [] gradient of the loss (GRAD_EACH, GRAD_ONE)
    loss_ptr,  # [numel], [programs] or []
    dx_ptr,  # [numel]
    normalizer_ptr,  # []
    divisor_ptr,  # []
    alpha_1,
    alpha_0,
    gamma,
    ignore_index,
    numel,
    count,
    num_classes,
    magic,
    steps,
    TARGET: tl.constexpr,
    GAMMA: tl.constexpr,
    LOSS: tl.constexpr,
    GRAD: tl.constexpr,
    DIVISOR: tl.constexpr,
    FOLD: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    # Sigmoid focal loss, forward and backward.
    #
    # Math      u = -s x, q = sigmoid(u), ce = softplus(u): loss = a_t q^g ce, dx = -s a_t q^g (g (1 - q) ce + q).
    # Traffic   per element: read x and the target, write the loss and / or dx; class indices are read once per row.
    # Grid      one program per `steps` blocks of BLOCK consecutive elements.
    # Requires  contiguous tensors, t of count labels; SPLIT: 0 one class, 1 num_classes < BLOCK (magic =
    #           2^32 // num_classes + 1), 2 more; one program of one step for DIVISOR_HERE.
    # Result    bitwise reproducible: a fixed tree per program, partial sums to finalise_kernel.
    alpha_1 = scalar(alpha_1, ACC)
    alpha_0 = scalar(alpha_0, ACC)
    gamma = scalar(gamma, ACC)
    pid_n = tl.program_id(0).to(tl.int64)
    CORRECT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32  # half precision in, nothing to gain
    offs = tl.arange(0, BLOCK)
    losses = tl.zeros([BLOCK], ACC)
    here = 0
    if DIVISOR == DIVISOR_HERE:
        t = tl.load(t_ptr + offs, mask=offs < count, other=0)
        here = tl.sum(((offs < count) & (t != ignore_index)).to(tl.int32), 0) * (numel // count)
    divisor = published_divisor(normalizer_ptr, divisor_ptr, numel, here, DIVISOR, LOSS != LOSS_NONE, ACC)

    for step in range(steps):
        start = (pid_n * steps + step) * BLOCK
        rest = tl.minimum(numel - start, BLOCK).to(tl.int32)
        full = rest == BLOCK
        mask = offs < rest
        x = load_block(x_ptr + start, offs, mask, full, -float("inf")).to(ACC)  # past the end: loss 0
        if TARGET == TARGET_FLOAT:
            y = load_block(t_ptr + start, offs, mask, full, 0.0).to(ACC)
            alpha_t = alpha_0 + (alpha_1 - alpha_0) * y
            loss, slope = _soft_terms(x, y, gamma, GAMMA, CORRECT, ACC)
        else:
            if TARGET == TARGET_BINARY:
                t = load_block(t_ptr + start, offs, mask, full, 0)
                t = t.to(tl.int32) if t.dtype == tl.uint8 else t
                positive = t == 1
                bad = (t != 0) & (t != 1)
            else:
                row = start // num_classes
                local = (start - row * num_classes).to(tl.int32) + offs
                if SPLIT == 0:
                    inner = local
                elif SPLIT == 1:
                    inner = tl.umulhi(local.to(tl.uint32), tl.cast(magic, tl.uint32)).to(tl.int32)
                else:
                    inner = (local >= num_classes).to(tl.int32)
                t = tl.load(t_ptr + row + inner, mask=mask, other=0)
                t = t.to(tl.int32) if t.dtype == tl.uint8 else t
                positive = t == local - inner * num_classes
                bad = (t < -1) | (t >= num_classes)
            alpha_t = tl.where(positive, alpha_1, alpha_0)
            loss, slope = _hard_terms(tl.where(bad, float("nan"), x), positive, gamma, GAMMA, CORRECT, ACC)

        loss *= alpha_t
        if TARGET != TARGET_FLOAT:
            keep = mask & (t != ignore_index)
            loss = tl.where(keep, loss, 0.0)
        if LOSS == LOSS_EACH:
            store_block(loss_ptr + start, offs, loss, mask, full)
        elif LOSS != LOSS_NONE:
            losses += loss
        if GRAD != GRAD_NONE:
            dx = alpha_t * slope
            if GRAD == GRAD_EACH:
                dx *= load_block(g_ptr + start, offs, mask, full, 0.0).to(ACC)
            elif GRAD == GRAD_ONE:
                dx *= tl.load(g_ptr).to(ACC)
            elif FOLD:
                dx *= 1.0 / divisor
            if TARGET != TARGET_FLOAT:
                dx = tl.where(keep, dx, 0.0)
            store_block(dx_ptr + start, offs, dx.to(dx_ptr.dtype.element_ty), mask, full)

    if LOSS != LOSS_NONE and LOSS != LOSS_EACH:
        total = tl.sum(losses, 0)
        tl.store(loss_ptr + pid_n, total / divisor if LOSS == LOSS_TOTAL else total)


class _Targets(NamedTuple):
    """Sigmoid targets as the kernel reads them."""

    tensor: Tensor
    kind: int
    split: int
    num_classes: int
    ignore_index: int
    skips: bool  # a label can be left out
    per_label: int  # elements of a label


def _sigmoid_targets(x: Tensor, target: Tensor, ignore_index: int) -> _Targets:
    num_classes = x.shape[-1] if x.dim() > 0 else 1
    target = target.contiguous()
    if target.is_floating_point():
        return _Targets(target, TARGET_FLOAT.value, 0, num_classes, 0, False, 1)
    if target.dtype == torch.bool:
        target, ignore_index = target.view(torch.uint8), -1
    skips = target.dtype != torch.uint8 or 0 <= ignore_index <= 255
    if target.shape == x.shape:
        return _Targets(target, TARGET_BINARY.value, 0, num_classes, ignore_index, skips, 1)
    split = 0 if num_classes == 1 else 1 if num_classes < BLOCK else 2
    return _Targets(target, TARGET_CLASS.value, split, num_classes, ignore_index, skips, num_classes)


def _sigmoid_grid(numel: int) -> tuple[int, int]:
    """Programs, and blocks of each: more blocks once every multiprocessor has enough programs."""
    steps = 1 if numel < 1 << 20 else 4 if numel < 1 << 26 else 16
    return triton.cdiv(numel, BLOCK * steps), steps


def _launch_sigmoid(
    x: Tensor, t: _Targets, g: Tensor | None, loss: Tensor | None, dx: Tensor, normalizer: Tensor | None,
    divisor: Tensor | None, alpha: float, gamma: float, modes: tuple[Any, Any, Any],
) -> None:  # fmt: skip
    programs, steps = _sigmoid_grid(x.numel())
    dtype = x.dtype
    alpha_1, alpha_0 = (alpha, 1.0 - alpha) if alpha >= 0 else (1.0, 1.0)
    loss_mode, grad_mode, divisor_mode = modes
    _sigmoid_focal_kernel[(programs,)](
        x, t.tensor, x if g is None else g, x if loss is None else loss, dx,
        x if normalizer is None else normalizer, x if divisor is None else divisor,
        number(alpha_1, dtype), number(alpha_0, dtype), number(gamma, dtype), t.ignore_index, x.numel(),
        t.tensor.numel(), t.num_classes, (1 << 32) // t.num_classes + 1 if t.split == 1 else 0, steps,
        TARGET=t.kind, GAMMA=gamma_kind(gamma), LOSS=loss_mode.value, GRAD=grad_mode.value,
        DIVISOR=divisor_mode.value, FOLD=dtype != torch.float16, SPLIT=t.split, BLOCK=BLOCK,
        ACC=accumulator(dtype)[0], num_warps=4,
    )  # fmt: skip


def sigmoid_focal_loss_fwd(
    input: Tensor,
    target: Tensor,
    normalizer: Tensor | None,
    alpha: float,
    gamma: float,
    ignore_index: int,
    reduction: int,
    need_grad: bool,
    higher_order: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x = input.contiguous()
    loss, grad, divisor = _common.outputs(x, x.shape, reduction, need_grad)
    if x.numel() == 0:
        return _common.nothing(loss, grad, divisor, normalizer, reduction)
    t = _sigmoid_targets(x, target, ignore_index)
    programs = _sigmoid_grid(x.numel())[0]
    acc = accumulator(x.dtype)[0]
    with _common.on_device(x):
        if reduction != MEAN:
            divisor_mode = DIVISOR_ONE if normalizer is None else DIVISOR_GIVEN
        elif not t.skips:
            divisor_mode = DIVISOR_COUNT
        elif programs == 1:
            divisor_mode = DIVISOR_HERE
        else:
            divisor_mode, normalizer = DIVISOR_COUNTED, divisor
            _common.count_labels(t.tensor, None, divisor, t.ignore_index, t.num_classes, t.per_label, acc)
        loss_mode, partial = _common.loss_mode(loss, reduction, programs)
        grad_mode = GRAD_STORED if grad.numel() else GRAD_NONE
        modes = (loss_mode, grad_mode, divisor_mode)
        _launch_sigmoid(x, t, None, partial, grad, normalizer, divisor, alpha, gamma, modes)
        if loss_mode is LOSS_PARTIAL:
            _common.finalise(partial, divisor, loss, 1, acc)
    return loss, grad, divisor


def sigmoid_focal_loss_bwd(
    grad_output: Tensor, input: Tensor, target: Tensor, alpha: float, gamma: float, ignore_index: int
) -> Tensor:
    x = input.contiguous()
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        return dx
    one = not any(grad_output.stride())
    g = grad_output if one else grad_output.contiguous()
    modes = (LOSS_NONE, GRAD_ONE if one else GRAD_EACH, DIVISOR_ONE)
    with _common.on_device(x):
        t = _sigmoid_targets(x, target, ignore_index)
        _launch_sigmoid(x, t, g, None, dx, None, None, alpha, gamma, modes)
    return dx


# Softmax --------------------------------------------------------------------------------------------------------------


def softmax_focal_loss_fwd(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    normalizer: Tensor | None,
    gamma: float,
    label_smoothing: float,
    ignore_index: int,
    mean_of_weights: bool,
    reduction: int,
    need_grad: bool,
    higher_order: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, target = input.contiguous(), target.contiguous()
    loss, grad, divisor = _common.outputs(x, (x.shape[0], *x.shape[2:]), reduction, need_grad)
    if x.numel() == 0:
        return _common.nothing(loss, grad, divisor, normalizer, reduction)
    tile = _rows.tile_for(x, target, label_smoothing)
    acc = accumulator(x.dtype)[0]
    with _common.on_device(x):
        if reduction != MEAN:
            divisor_mode = DIVISOR_ONE if normalizer is None else DIVISOR_GIVEN
        elif target.is_floating_point():
            divisor_mode = DIVISOR_COUNT
        elif tile.programs == 1:
            divisor_mode = DIVISOR_HERE
        else:
            divisor_mode, normalizer = DIVISOR_COUNTED, divisor
            counted = weight if mean_of_weights else None
            _common.count_labels(target, counted, divisor, ignore_index, x.shape[1], 1, acc)
        loss_mode, partial = _common.loss_mode(loss, reduction, tile.programs)
        grad_mode = GRAD_STORED if grad.numel() else GRAD_NONE
        _rows.launch(
            x, target, weight, None, partial, grad, normalizer, divisor, gamma, label_smoothing, ignore_index,
            mean_of_weights, tile, (loss_mode, grad_mode, divisor_mode),
        )  # fmt: skip
        if loss_mode is LOSS_PARTIAL:
            _common.finalise(partial, divisor, loss, 1, acc)
    return loss, grad, divisor


def softmax_focal_loss_bwd(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    gamma: float,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    x = input.contiguous()
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        return dx
    with _common.on_device(x):
        _rows.launch(
            x, target.contiguous(), weight, grad_output, None, dx, None, None, gamma, label_smoothing, ignore_index,
            False, _rows.tile_for(x, target, label_smoothing), (LOSS_NONE, GRAD_EACH, DIVISOR_ONE),
        )  # fmt: skip
    return dx
