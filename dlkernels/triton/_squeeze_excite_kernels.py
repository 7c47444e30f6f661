"""Kernels of squeeze-and-excitation: sums per channel, the two small layers of a sample, the sweeps that scale.

A tile is [C, S] or with channels last [S, C]: memory order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._activation import activate, activate_grad, gate, gate_grad
from ._common import scalar

PLACE = ["c_vectors", "s_vectors", "c_blocks", "s_blocks", "first_n"]
POINT_ACTIVATE, POINT_GATE, POINT_ACTIVATE_GRAD, POINT_GATE_GRAD = (tl.constexpr(i) for i in range(4))


@triton.jit
def tile_offsets(c, s, LAST: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Channel and position of a tile's elements, and the strides of both. One channel is a scalar (no layout)."""
    offs_c = tl.full([], 0, tl.int32)
    offs_s = tl.arange(0, BLOCK_S)
    if WIDE:
        c = c.to(tl.int64)
        s = s.to(tl.int64)
    if LAST:
        step_c = 1
        step_s = c
        offs_s = offs_s[:, None]
        if BLOCK_C > 1:
            offs_c = tl.arange(0, BLOCK_C)[None, :]
    else:
        step_c = s
        step_s = 1
        offs_s = offs_s[None, :]
        if BLOCK_C > 1:
            offs_c = tl.arange(0, BLOCK_C)[:, None]
    return offs_c, offs_s, step_c, step_s


@triton.jit(do_not_specialize=[*PLACE, "chunks", "steps", "factor"])
def channel_sums_kernel(
    x_ptr,  # [N, C, S] or [N, S, C]
    dy_ptr,  # like x (GRAD)
    r_ptr,  # like x (GRAD and ACT)
    e_ptr,  # [N, C] gate (GRAD and ACT)
    partial_ptr,  # [N, chunks, C]
    factor,
    c_vectors,
    s_vectors,
    c_blocks,
    s_blocks,
    chunks,
    steps,
    first_n,
    C_VECTOR: tl.constexpr,
    S_VECTOR: tl.constexpr,
    GRAD: tl.constexpr,
    ACT: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ACC: tl.constexpr,
):
    # Squeeze: sums over positions; backward the gate's gradient.
    #
    # Math      factor sum_s x, or with GRAD factor sum_s dz x, dz = dy act'(x e + r).
    # Traffic   per element: read x (with GRAD dy, with ACT r); kept in L2 for the sweep that follows.
    # Grid      samples x blocks of channels x chunks of `steps` tiles along the positions.
    # Requires  contiguous tensors; C = c_vectors C_VECTOR, S = s_vectors S_VECTOR; WIDE when C S >= 2^31.
    # Result    bitwise reproducible: fixed trees; whoever reads the partial sums adds them in the order of their index.
    factor = scalar(factor, ACC)
    c = c_vectors * C_VECTOR
    s = s_vectors * S_VECTOR
    pid = tl.program_id(0).to(tl.int64)
    block = pid // chunks
    chunk = (pid - block * chunks).to(tl.int32)
    pid_n = block // c_blocks
    first_c = (block - pid_n * c_blocks).to(tl.int32) * BLOCK_C
    pid_n += first_n
    offs_c, offs_s, step_c, step_s = tile_offsets(c, s, LAST, WIDE, BLOCK_C, BLOCK_S)
    mask_c = offs_c < c - first_c
    base = pid_n * c * s + first_c.to(tl.int64) * step_c
    offs = offs_c * step_c + offs_s * step_s
    total = tl.zeros(offs.shape, ACC)
    if GRAD and ACT != 0:
        e = tl.load(e_ptr + pid_n * c + first_c + offs_c, mask=mask_c, other=0.0)
    for step in range(tl.minimum(s_blocks - chunk * steps, steps)):
        first_s = (chunk * steps + step) * BLOCK_S
        mask = mask_c & (offs_s < s - first_s)
        start = base + first_s.to(tl.int64) * step_s
        x = tl.load(x_ptr + start + offs, mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        if GRAD:
            dz = tl.load(dy_ptr + start + offs, mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
            if ACT != 0:
                r = tl.load(r_ptr + start + offs, mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
                dz = tl.where(mask, dz * activate_grad(x * e + r, ACT, ACC), 0.0)
            x *= dz
        total += x
    AXIS: tl.constexpr = 0 if LAST else 1
    if BLOCK_C == 1:
        sums = tl.sum(tl.reshape(total, [total.numel]), 0)
    else:
        sums = tl.sum(total, AXIS, keep_dims=True)
    out = (pid_n * chunks + chunk) * c + first_c + offs_c
    tl.store(partial_ptr + out, sums * factor, mask=mask_c)


@triton.jit
def merged_chunks(partial_ptr, first, chunks, c, offs_c, mask_c, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sums [BLOCK_C] of partial sums."""
    offs_k = tl.arange(0, BLOCK_K)[:, None]
    total = tl.zeros([BLOCK_K, BLOCK_C], partial_ptr.dtype.element_ty)
    for first_k in range(0, chunks, BLOCK_K):
        mask = (offs_k < chunks - first_k) & mask_c[None, :]
        total += tl.load(partial_ptr + (first + first_k + offs_k) * c + offs_c[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["c_vectors", "r_vectors", "chunks", "first_n"])
def excite_kernel(
    partial_ptr,  # [N, chunks, C] parts of the means
    w1_ptr,  # [R, C]
    b1_ptr,  # [R]
    w2_ptr,  # [C, R]
    b2_ptr,  # [C]
    mean_ptr,  # [N, C]
    hidden_ptr,  # [N, R]
    e_ptr,  # [N, C]
    c_vectors,
    r_vectors,
    chunks,
    first_n,
    C_VECTOR: tl.constexpr,
    R_VECTOR: tl.constexpr,
    HAS_B1: tl.constexpr,
    HAS_B2: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    # Excite: both layers and the gate of a sample.
    #
    # Math      hidden = w1 mean + b1,  e = gate(w2 act(hidden) + b2).
    # Traffic   per sample: read the partial sums and, from L2, both weights; write mean, hidden, e.
    # Grid      one program per sample; it walks over blocks of hidden units.
    # Requires  C <= BLOCK_C; C = c_vectors C_VECTOR, R = r_vectors R_VECTOR.
    # Result    bitwise reproducible: chunks and hidden units in the order of their index.
    c = c_vectors * C_VECTOR
    r = r_vectors * R_VECTOR
    pid_n = tl.program_id(0).to(tl.int64) + first_n
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < c
    mean = merged_chunks(partial_ptr, pid_n * chunks, chunks, c, offs_c, mask_c, BLOCK_K, BLOCK_C)
    tl.store(mean_ptr + pid_n * c + offs_c, mean, mask=mask_c)
    z = tl.zeros([BLOCK_C], ACC)
    for first_r in range(0, r, BLOCK_R):
        offs_r = first_r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < r
        mask = mask_r[:, None] & mask_c[None, :]
        w1 = tl.load(w1_ptr + offs_r[:, None] * c + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        hidden = tl.sum(w1 * mean[None, :], 1)
        if HAS_B1:
            hidden += tl.load(b1_ptr + offs_r, mask=mask_r, other=0.0).to(ACC)
        tl.store(hidden_ptr + pid_n * r + offs_r, hidden, mask=mask_r)
        a = tl.where(mask_r, activate(hidden, ACT, ACC), 0.0)
        mask = mask_c[:, None] & mask_r[None, :]
        w2 = tl.load(w2_ptr + offs_c[:, None] * r + offs_r[None, :], mask=mask, other=0.0).to(ACC)
        z += tl.sum(w2 * a[None, :], 1)
    if HAS_B2:
        z += tl.load(b2_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)
    tl.store(e_ptr + pid_n * c + offs_c, gate(z, GATE, ACC), mask=mask_c)


@triton.jit(do_not_specialize=["factor", "c_vectors", "r_vectors", "chunks", "first_n"])
def excite_grad_kernel(
    partial_ptr,  # [N, chunks, C] parts of de
    w1_ptr,  # [R, C]
    w2_ptr,  # [C, R]
    hidden_ptr,  # [N, R]
    e_ptr,  # [N, C]
    dz2_ptr,  # [N, C]
    dz1_ptr,  # [N, R]
    a_ptr,  # [N, R]
    ds_ptr,  # [N, C]
    factor,
    c_vectors,
    r_vectors,
    chunks,
    first_n,
    C_VECTOR: tl.constexpr,
    R_VECTOR: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    # Backward pass of both layers and the gate of a sample.
    #
    # Math      dz2 = de gate'(e),  dz1 = (w2^T dz2) act'(hidden),  ds = factor w1^T dz1;  a = act(hidden) for dw2.
    # Traffic   per sample: read the partial sums, hidden, e and, from L2, both weights; write dz2, dz1, a, ds.
    # Grid      as excite_kernel.
    # Requires  as excite_kernel.
    # Result    bitwise reproducible: chunks and hidden units in the order of their index.
    factor = scalar(factor, ACC)
    c = c_vectors * C_VECTOR
    r = r_vectors * R_VECTOR
    pid_n = tl.program_id(0).to(tl.int64) + first_n
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < c
    de = merged_chunks(partial_ptr, pid_n * chunks, chunks, c, offs_c, mask_c, BLOCK_K, BLOCK_C)
    dz2 = de * gate_grad(tl.load(e_ptr + pid_n * c + offs_c, mask=mask_c, other=0.0), GATE, ACC)
    tl.store(dz2_ptr + pid_n * c + offs_c, dz2, mask=mask_c)
    ds = tl.zeros([BLOCK_C], ACC)
    for first_r in range(0, r, BLOCK_R):
        offs_r = first_r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < r
        mask = mask_c[:, None] & mask_r[None, :]
        w2 = tl.load(w2_ptr + offs_c[:, None] * r + offs_r[None, :], mask=mask, other=0.0).to(ACC)
        hidden = tl.load(hidden_ptr + pid_n * r + offs_r, mask=mask_r, other=0.0)
        dz1 = tl.sum(w2 * dz2[:, None], 0) * activate_grad(hidden, ACT, ACC)
        tl.store(dz1_ptr + pid_n * r + offs_r, dz1, mask=mask_r)
        tl.store(a_ptr + pid_n * r + offs_r, activate(hidden, ACT, ACC), mask=mask_r)
        mask = mask_r[:, None] & mask_c[None, :]
        w1 = tl.load(w1_ptr + offs_r[:, None] * c + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        ds += tl.sum(w1 * dz1[:, None], 0)
    tl.store(ds_ptr + pid_n * c + offs_c, ds * factor, mask=mask_c)


@triton.jit(do_not_specialize=["numel"])
def pointwise_kernel(
    a_ptr,  # [numel]
    b_ptr,  # [numel] (the GRAD kinds)
    out_ptr,  # [numel]
    numel,
    KIND: tl.constexpr,
    CODE: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    # Activation and gate between matrix products.
    #
    # Math      act(a), gate(a), a act'(b) or a gate'(b), the last with b the gate's value.
    # Traffic   read a (and b), write out: numbers per channel, not per element.
    # Grid      one program per BLOCK numbers.
    # Requires  contiguous tensors of the accumulator's dtype.
    # Result    bitwise reproducible.
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    a = tl.load(a_ptr + offs, mask=mask, other=0.0)
    if KIND == POINT_ACTIVATE:
        out = activate(a, CODE, ACC)
    elif KIND == POINT_GATE:
        out = gate(a, CODE, ACC)
    elif KIND == POINT_ACTIVATE_GRAD:
        out = a * activate_grad(tl.load(b_ptr + offs, mask=mask, other=0.0), CODE, ACC)
    else:
        out = a * gate_grad(tl.load(b_ptr + offs, mask=mask, other=0.0), CODE, ACC)
    tl.store(out_ptr + offs, out, mask=mask)


@triton.jit(do_not_specialize=PLACE)
def scale_channels_kernel(
    x_ptr,  # [N, C, S] or [N, S, C]
    e_ptr,  # [N, C]
    r_ptr,  # like x
    y_ptr,  # like x
    c_vectors,
    s_vectors,
    c_blocks,
    s_blocks,
    first_n,
    C_VECTOR: tl.constexpr,
    S_VECTOR: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ACC: tl.constexpr,
):
    # Scale by the gate.
    #
    # Math      y = act(x e + r).
    # Traffic   per element: read x (from L2 as far as it holds it) and r, write y.
    # Grid      samples x blocks of channels x blocks of positions, the last first: what channel_sums_kernel read last
    #           is what L2 still holds.
    # Requires  as channel_sums_kernel.
    # Result    bitwise reproducible.
    c = c_vectors * C_VECTOR
    s = s_vectors * S_VECTOR
    pid = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    block = pid // s_blocks
    first_s = (pid - block * s_blocks).to(tl.int32) * BLOCK_S
    pid_n = block // c_blocks
    first_c = (block - pid_n * c_blocks).to(tl.int32) * BLOCK_C
    pid_n += first_n
    offs_c, offs_s, step_c, step_s = tile_offsets(c, s, LAST, WIDE, BLOCK_C, BLOCK_S)
    mask_c = offs_c < c - first_c
    mask = mask_c & (offs_s < s - first_s)
    start = pid_n * c * s + first_c.to(tl.int64) * step_c + first_s.to(tl.int64) * step_s
    offs = offs_c * step_c + offs_s * step_s
    e = tl.load(e_ptr + pid_n * c + first_c + offs_c, mask=mask_c, other=0.0)
    x = tl.load(x_ptr + start + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
    y = x * e
    if HAS_RESIDUAL:
        y += tl.load(r_ptr + start + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        y = activate(y, ACT, ACC)
    tl.store(y_ptr + start + offs, y.to(y_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=PLACE)
def scale_grad_kernel(
    dy_ptr,  # like x
    x_ptr,  # [N, C, S] or [N, S, C] (ACT)
    r_ptr,  # like x (ACT)
    e_ptr,  # [N, C]
    ds_ptr,  # [N, C] gradient of the mean, divided by S
    dx_ptr,  # like x
    dr_ptr,  # like x
    c_vectors,
    s_vectors,
    c_blocks,
    s_blocks,
    first_n,
    C_VECTOR: tl.constexpr,
    S_VECTOR: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACT: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ACC: tl.constexpr,
):
    # The second sweep of the backward pass.
    #
    # Math      dx = dz e + ds / S, dr = dz;  dz = dy act'(x e + r).
    # Traffic   per element: read dy, write dx; with ACT read x and r too, with a residual write dr.
    # Grid      as scale_channels_kernel.
    # Requires  as channel_sums_kernel.
    # Result    bitwise reproducible.
    c = c_vectors * C_VECTOR
    s = s_vectors * S_VECTOR
    pid = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    block = pid // s_blocks
    first_s = (pid - block * s_blocks).to(tl.int32) * BLOCK_S
    pid_n = block // c_blocks
    first_c = (block - pid_n * c_blocks).to(tl.int32) * BLOCK_C
    pid_n += first_n
    offs_c, offs_s, step_c, step_s = tile_offsets(c, s, LAST, WIDE, BLOCK_C, BLOCK_S)
    mask_c = offs_c < c - first_c
    mask = mask_c & (offs_s < s - first_s)
    start = pid_n * c * s + first_c.to(tl.int64) * step_c + first_s.to(tl.int64) * step_s
    offs = offs_c * step_c + offs_s * step_s
    nc = pid_n * c + first_c + offs_c
    e = tl.load(e_ptr + nc, mask=mask_c, other=0.0)
    ds = tl.load(ds_ptr + nc, mask=mask_c, other=0.0)
    dz = tl.load(dy_ptr + start + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
    if ACT != 0:
        x = tl.load(x_ptr + start + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        r = tl.load(r_ptr + start + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        dz *= activate_grad(x * e + r, ACT, ACC)
    if HAS_RESIDUAL:
        tl.store(dr_ptr + start + offs, dz.to(dr_ptr.dtype.element_ty), mask=mask, eviction_policy="evict_first")
    dx = (dz * e + ds).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + start + offs, dx, mask=mask, eviction_policy="evict_first")
