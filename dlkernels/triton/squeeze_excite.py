"""Squeeze-and-excitation on GPUs: launchers of `squeeze_excite_fwd` and `squeeze_excite_bwd`.

Sums per channel, the two small layers, a sweep that scales. The layers run in one kernel, a program per sample, while
their weights are small beside a sample (S >= 4 R); larger ones are matrix products of (N, C) by cuBLAS, so that the
weights are read once for all samples. Samples are taken in batches that the L2 of a large GPU holds between the sums
and the sweep.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ._common import accumulator, number, on_device
from ._squeeze_excite_kernels import (
    POINT_ACTIVATE,
    POINT_ACTIVATE_GRAD,
    POINT_GATE,
    POINT_GATE_GRAD,
    channel_sums_kernel,
    excite_grad_kernel,
    excite_kernel,
    pointwise_kernel,
    scale_channels_kernel,
    scale_grad_kernel,
)

TILE = 4096  # elements
MAX_CHANNELS = 2048  # of the kernel that holds a sample's channels
PROGRAMS = 1024  # enough for every multiprocessor
MAX_CHUNKS = 64  # pieces of the positions
WIDE = 1 << 31  # elements of a sample that need 64-bit offsets
BATCH_BYTES = 32 << 20  # what is read twice


class Plan(NamedTuple):
    """How programs cover (N, C, S). Blocks depend on the shape of a sample alone: another N compiles nothing."""

    last: bool
    block_c: int
    block_s: int
    num_warps: int
    c_blocks: int
    s_blocks: int
    chunks: int  # pieces of the positions
    steps: int  # tiles of a piece
    batch: int  # samples from one launch of the sums to the next
    fused: bool  # the layers run in one kernel


@functools.lru_cache(maxsize=4096)
def plan(n: int, c: int, s: int, hidden: int, itemsize: int, channels_last: bool) -> Plan:
    """hidden: R, or 0 for one layer (C, C). itemsize counts all that is read twice."""
    last = channels_last or s == 1  # (N, C, 1) is (N, 1, C)
    block_c, block_s = triton.next_power_of_2(c), triton.next_power_of_2(s)
    if last:
        block_c = min(block_c, 256, TILE)
        block_s = min(block_s, TILE // block_c)
    else:
        block_s = min(block_s, TILE)
        block_c = min(block_c, TILE // block_s)
    c_blocks, s_blocks = triton.cdiv(c, block_c), triton.cdiv(s, block_s)
    fused = hidden > 0 and c <= MAX_CHANNELS and s >= 4 * hidden
    batch = max(1, min(n, BATCH_BYTES // (c * s * itemsize))) if fused else n
    steps = triton.cdiv(s_blocks, min(MAX_CHUNKS, triton.cdiv(PROGRAMS, batch * c_blocks)))
    num_warps = max(1, min(16, block_c * block_s // 512))
    return Plan(
        last, block_c, block_s, num_warps, c_blocks, s_blocks, triton.cdiv(s_blocks, steps), steps, batch, fused
    )


def squeeze_excite_fwd(
    input: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    activation: int,
    gate: int,
    residual_activation: int,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, residual, w1, b1, w2, b2 = map(_dense, (input, residual, w1, b1, w2, b2))
    n, c, s = _sizes(x, channels_last)
    acc, dtype = accumulator(x.dtype)
    hidden_channels = 0 if w1 is None else w1.shape[0]
    y = x.new_empty(x.shape)
    mean, hidden, e = (x.new_empty(shape, dtype=dtype) for shape in ((n, c), (n, hidden_channels), (n, c)))
    if x.numel() == 0:
        return y, mean, hidden, e
    p = plan(n, c, s, hidden_channels, x.element_size(), channels_last)
    place, tile = _tile(p, c, s, acc)
    partial = mean if p.chunks == 1 and not p.fused else mean.new_empty((n, p.chunks, c))
    factor = number(1.0 / s, dtype)
    r = x if residual is None else residual
    with on_device(x):
        for first in range(0, n, p.batch):
            samples = min(p.batch, n - first)
            channel_sums_kernel[(samples * p.c_blocks * p.chunks,)](
                x, x, x, e, partial, factor, *place, p.chunks, p.steps, first, GRAD=False, ACT=0, **tile
            )  # fmt: skip
            if p.fused:
                sizes, blocks = _layers(p, c, hidden_channels, acc)
                excite_kernel[(samples,)](
                    partial, w1, w2 if b1 is None else b1, w2, w2 if b2 is None else b2, mean, hidden, e,
                    *sizes, p.chunks, first, HAS_B1=b1 is not None, HAS_B2=b2 is not None, ACT=activation, GATE=gate,
                    **blocks,
                )  # fmt: skip
            else:
                if p.chunks > 1:
                    torch.sum(partial, 1, out=mean)
                a = mean
                if w1 is not None:
                    _linear(mean, w1, b1, hidden)
                    a = _pointwise(hidden, None, torch.empty_like(hidden), POINT_ACTIVATE, activation)
                _linear(a, w2, b2, e)
                _pointwise(e, None, e, POINT_GATE, gate)
            scale_channels_kernel[(samples * p.c_blocks * p.s_blocks,)](
                x, e, r, y, *place, first, HAS_RESIDUAL=residual is not None, ACT=residual_activation, **tile
            )  # fmt: skip
    return y, mean, hidden, e


def squeeze_excite_bwd(
    grad_output: Tensor,
    input: Tensor,
    mean: Tensor,
    hidden: Tensor,
    gate_value: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    activation: int,
    gate: int,
    residual_activation: int,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, dy, residual, w1, w2 = map(_dense, (input, grad_output, residual, w1, w2))
    mean, hidden, e = map(_dense, (mean, hidden, gate_value))
    n, c, s = _sizes(x, channels_last)
    acc, dtype = accumulator(x.dtype)
    hidden_channels = 0 if w1 is None else w1.shape[0]
    dx = x.new_empty(x.shape)
    dw1, db1, dw2, db2, dr = (
        x.new_empty((0,)) if t is None else t.new_empty(t.shape) for t in (w1, b1, w2, b2, residual)
    )
    grads = (dx, dw1, db1, dw2, db2, dr)
    if x.numel() == 0:
        for d in (dw1, db1, dw2, db2):
            d.zero_()
        return grads
    act = residual_activation if residual is not None else 0
    p = plan(n, c, s, hidden_channels, (3 if act else 2) * x.element_size(), channels_last)
    place, tile = _tile(p, c, s, acc)
    partial = mean.new_empty((n, p.chunks, c))
    dz2, ds = mean.new_empty((n, c)), mean.new_empty((n, c))
    dz1, a = hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)
    one, share = number(1.0, dtype), number(1.0 / s, dtype)
    r = x if residual is None else residual
    with on_device(x):
        for first in range(0, n, p.batch):
            samples = min(p.batch, n - first)
            channel_sums_kernel[(samples * p.c_blocks * p.chunks,)](
                x, dy, r, e, partial, one, *place, p.chunks, p.steps, first, GRAD=True, ACT=act, **tile
            )  # fmt: skip
            if p.fused:
                sizes, blocks = _layers(p, c, hidden_channels, acc)
                excite_grad_kernel[(samples,)](
                    partial, w1, w2, hidden, e, dz2, dz1, a, ds, share, *sizes, p.chunks, first,
                    ACT=activation, GATE=gate, **blocks,
                )  # fmt: skip
            else:
                de = partial.view(n, c) if p.chunks == 1 else partial.sum(1)
                _pointwise(de, e, dz2, POINT_GATE_GRAD, gate)
                dz = dz2
                if w1 is not None:
                    _pointwise(hidden, None, a, POINT_ACTIVATE, activation)
                    dz = _pointwise(_product(dz2, w2.to(dtype)), hidden, dz1, POINT_ACTIVATE_GRAD, activation)
                ds = _product(dz, (w2 if w1 is None else w1).to(dtype)).mul_(1.0 / s)
            scale_grad_kernel[(samples * p.c_blocks * p.s_blocks,)](
                dy, x, r, e, ds, dx, dr, *place, first, HAS_RESIDUAL=residual is not None, ACT=act, **tile
            )  # fmt: skip
        dw2.copy_(_product(dz2.t(), mean if w1 is None else a))
        if w1 is not None:
            dw1.copy_(_product(dz1.t(), mean))
        for d, dz, given in ((db1, dz1, b1), (db2, dz2, b2)):
            if given is not None:
                d.copy_(dz.sum(0))
    return grads


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _sizes(x: Tensor, channels_last: bool) -> tuple[int, int, int]:
    n, c, s = x.shape
    return (n, s, c) if channels_last else (n, c, s)


def _tile(p: Plan, c: int, s: int, acc: Any) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Sizes, as the compiler may assume them to be multiples of up to 8; and how the tile lies."""
    c_vector, s_vector = math.gcd(c, 8), math.gcd(s, 8)
    tile = {
        "C_VECTOR": c_vector, "S_VECTOR": s_vector, "LAST": p.last, "WIDE": c * s >= WIDE, "BLOCK_C": p.block_c,
        "BLOCK_S": p.block_s, "ACC": acc, "num_warps": p.num_warps,
    }  # fmt: skip
    return (c // c_vector, s // s_vector, p.c_blocks, p.s_blocks), tile


def _layers(p: Plan, c: int, hidden: int, acc: Any) -> tuple[tuple[int, int], dict[str, Any]]:
    c_vector, r_vector = math.gcd(c, 8), math.gcd(hidden, 8)
    block_c = triton.next_power_of_2(c)
    block_r = min(triton.next_power_of_2(hidden), max(1, 8192 // block_c))
    blocks = {
        "C_VECTOR": c_vector, "R_VECTOR": r_vector, "BLOCK_K": 1 if p.s_blocks == 1 else 4, "BLOCK_R": block_r,
        "BLOCK_C": block_c, "ACC": acc, "num_warps": max(1, min(8, block_c * block_r // 512)),
    }  # fmt: skip
    return (c // c_vector, hidden // r_vector), blocks


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, in their dtype under autocast too: it takes no call with `out`."""
    return torch.mm(a, b, out=a.new_empty((a.shape[0], b.shape[1])))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = x weight^T + bias, in the dtype of x."""
    weight = weight.to(x.dtype).t()
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, weight, out=out)


def _pointwise(a: Tensor, b: Tensor | None, out: Tensor, kind: Any, code: int) -> Tensor:
    pointwise_kernel[(triton.cdiv(a.numel(), 1024),)](
        a, a if b is None else b, out, a.numel(), KIND=kind.value, CODE=code, BLOCK=1024, ACC=accumulator(a.dtype)[0],
        num_warps=4,
    )  # fmt: skip
    return out
