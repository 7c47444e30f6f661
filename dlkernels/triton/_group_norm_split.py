"""GroupNorm of groups that do not stay in registers: tiles, partial sums merged in a fixed order, a second read.

The second read comes while the L2 of a large GPU still holds the data: launches take batches of groups
(`_group_norm_tiles.BATCH_BYTES`), the first read is kept (evict_last), the second and the output are not (evict_first).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._activation import activate
from ._common import scalar
from ._group_norm_tiles import (
    MAX_CHUNKS,
    affine_terms,
    before_activation,
    channel_terms,
    over_group,
    over_positions,
    tile_axes,
    tile_strides,
)

CHUNKS = tl.constexpr(MAX_CHUNKS)
ORDER = ["groups", "d_vectors", "s_vectors", "g_blocks", "d_blocks", "s_blocks", "chunks", "steps", "first_unit"]


@triton.jit(do_not_specialize=[*ORDER, "plane"])
def stats_kernel(
    x_ptr,  # [N, C, S] or [N, S, C]
    partial_ptr,  # [3, N, chunks, G]: count, mean - x_0, M2
    plane,
    groups,
    d_vectors,
    s_vectors,
    g_blocks,
    d_blocks,
    s_blocks,
    chunks,
    steps,
    first_unit,
    D_VECTOR: tl.constexpr,
    S_VECTOR: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ACC: tl.constexpr,
):
    # Statistics of a piece of a group.
    #
    # Math      per tile: mean, then M2 = sum (x - mean)^2 over the resident tile; tiles merged by Chan's formula. All
    #           relative to the first element of the group, x_0.
    # Traffic   read x; it is to stay in L2.
    # Grid      units (BLOCK_G groups of a sample) x chunks of `steps` tiles.
    # Requires  contiguous x; D = d_vectors D_VECTOR, S = s_vectors S_VECTOR; WIDE when C S >= 2^31; no empty chunk.
    # Result    bitwise reproducible: tiles in the order of their index.
    d = d_vectors * D_VECTOR
    s = s_vectors * S_VECTOR
    pid = tl.program_id(0).to(tl.int64)
    unit = pid // chunks
    chunk = (pid - unit * chunks).to(tl.int32)
    unit += first_unit
    pid_n = unit // g_blocks
    first_g = (unit - pid_n * g_blocks).to(tl.int32) * BLOCK_G
    offs_g, offs_d, offs_s = tile_axes(BLOCK_G, BLOCK_D, BLOCK_S, LAST)
    step_g, step_d, step_s = tile_strides(groups, d, s, LAST, WIDE)
    mask_g = offs_g < groups - first_g
    base = pid_n * groups * d * s + first_g * step_g
    offs = offs_g * step_g + offs_d * step_d + offs_s * step_s
    origin = tl.load(x_ptr + base + offs_g * step_g, mask=mask_g, other=0.0).to(ACC)

    count = tl.zeros(mask_g.shape, ACC)
    mean = tl.zeros(mask_g.shape, ACC)
    m2 = tl.zeros(mask_g.shape, ACC)
    for step in range(tl.minimum(d_blocks * s_blocks - chunk * steps, steps)):
        tile = chunk * steps + step
        pid_d = tile // s_blocks
        first_d = pid_d * BLOCK_D
        first_s = (tile - pid_d * s_blocks) * BLOCK_S
        mask = mask_g & (offs_d < d - first_d) & (offs_s < s - first_s)
        start = base + first_d.to(tl.int64) * step_d + first_s.to(tl.int64) * step_s
        x = tl.load(x_ptr + start + offs, mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        x = tl.where(mask, x - origin, 0.0)
        here = (tl.minimum(d - first_d, BLOCK_D) * tl.minimum(s - first_s, BLOCK_S)).to(ACC)
        tile_mean = over_group(x, BLOCK_G, BLOCK_D, LAST) / here
        x = tl.where(mask, x - tile_mean, 0.0)
        share = here / (count + here)
        away = tile_mean - mean
        m2 += over_group(x * x, BLOCK_G, BLOCK_D, LAST) + away * away * (count * share)
        mean += away * share
        count += here
    out = (pid_n * chunks + chunk) * groups + first_g + offs_g
    tl.store(partial_ptr + out, count, mask=mask_g)
    tl.store(partial_ptr + plane + out, mean, mask=mask_g)
    tl.store(partial_ptr + 2 * plane + out, m2, mask=mask_g)


@triton.jit
def merged_chunks(partial_ptr, plane, first, chunks, groups, first_g, BLOCK_G: tl.constexpr, LAST: tl.constexpr):
    """Mean (relative to x_0) and M2 of whole groups, from those of their chunks; shaped as the tile's groups."""
    if BLOCK_G == 1:
        offs_g = tl.full([], 0, tl.int32)
        offs_k = tl.arange(0, CHUNKS)
    else:
        offs_g = tl.arange(0, BLOCK_G)[:, None]
        offs_k = tl.arange(0, CHUNKS)[None, :]
    mask = (offs_g < groups - first_g) & (offs_k < chunks)
    part = (first + offs_k) * groups + first_g + offs_g
    counts = tl.load(partial_ptr + part, mask=mask, other=0.0)
    means = tl.load(partial_ptr + plane + part, mask=mask, other=0.0)
    m2 = tl.load(partial_ptr + 2 * plane + part, mask=mask, other=0.0)
    AXIS: tl.constexpr = 0 if BLOCK_G == 1 else 1
    mean = tl.sum(counts * means, AXIS) / tl.maximum(tl.sum(counts, AXIS), 1.0)
    away = means - (mean if BLOCK_G == 1 else mean[:, None])
    m2 = tl.sum(m2 + counts * away * away, AXIS)
    if BLOCK_G > 1 and LAST:
        mean = mean[None, :, None]
        m2 = m2[None, :, None]
    elif BLOCK_G > 1:
        mean = mean[:, None, None]
        m2 = m2[:, None, None]
    return mean, m2


@triton.jit(do_not_specialize=[*ORDER, "plane", "eps"])
def normalise_kernel(
    x_ptr,  # [N, C, S] or [N, S, C]
    w_ptr,  # [C]
    b_ptr,  # [C]
    r_ptr,  # like x
    scale_ptr,  # [N, C]
    shift_ptr,  # [N, C]
    partial_ptr,  # [3, N, chunks, G]
    y_ptr,  # like x
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    plane,
    eps,
    groups,
    d_vectors,
    s_vectors,
    g_blocks,
    d_blocks,
    s_blocks,
    chunks,
    steps,
    first_unit,
    D_VECTOR: tl.constexpr,
    S_VECTOR: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ACT: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ACC: tl.constexpr,
):
    # GroupNorm forward after stats_kernel.
    #
    # Math      mean and M2 of the chunks merged by Chan's formula, in every program; then as group_norm_fwd_kernel.
    # Traffic   per element: read x (from L2) and r, write y; per program 3 numbers of each chunk of its groups.
    # Grid      as stats_kernel, backwards: what it read last is what L2 surely holds. A and B are short vectors of a
    #           tile's channels.
    # Requires  as stats_kernel; chunks <= MAX_CHUNKS.
    # Result    bitwise reproducible: a fixed tree over the chunks.
    eps = scalar(eps, ACC)
    d = d_vectors * D_VECTOR
    s = s_vectors * S_VECTOR
    pid = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    unit = pid // chunks
    chunk = (pid - unit * chunks).to(tl.int32)
    unit += first_unit
    pid_n = unit // g_blocks
    first_g = (unit - pid_n * g_blocks).to(tl.int32) * BLOCK_G
    offs_g, offs_d, offs_s = tile_axes(BLOCK_G, BLOCK_D, BLOCK_S, LAST)
    step_g, step_d, step_s = tile_strides(groups, d, s, LAST, WIDE)
    mask_g = offs_g < groups - first_g
    base = pid_n * groups * d * s + first_g * step_g
    offs = offs_g * step_g + offs_d * step_d + offs_s * step_s
    origin = tl.load(x_ptr + base + offs_g * step_g, mask=mask_g, other=0.0).to(ACC)

    mean, m2 = merged_chunks(partial_ptr, plane, pid_n * chunks, chunks, groups, first_g, BLOCK_G, LAST)
    rstd = 1.0 / tl.sqrt(m2 / (d.to(ACC) * s.to(ACC)) + eps)
    row = pid_n * groups + first_g + offs_g
    tl.store(mean_ptr + row, origin + mean, mask=mask_g & (chunk == 0))
    tl.store(rstd_ptr + row, rstd, mask=mask_g & (chunk == 0))

    for step in range(tl.minimum(d_blocks * s_blocks - chunk * steps, steps)):
        tile = chunk * steps + step
        pid_d = tile // s_blocks
        first_d = pid_d * BLOCK_D
        first_s = (tile - pid_d * s_blocks) * BLOCK_S
        mask_c = mask_g & (offs_d < d - first_d)
        mask = mask_c & (offs_s < s - first_s)
        c = (first_g + offs_g) * d + first_d + offs_d
        mul, add = affine_terms(
            w_ptr, b_ptr, scale_ptr, shift_ptr, c, pid_n * groups * d + c, mask_c, HAS_WEIGHT, HAS_BIAS, HAS_SCALE,
            HAS_SHIFT, ACC,
        )  # fmt: skip
        start = base + first_d.to(tl.int64) * step_d + first_s.to(tl.int64) * step_s
        x = tl.load(x_ptr + start + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        z = (x - origin - mean) * (rstd * mul) + add
        if HAS_RESIDUAL:
            z += tl.load(r_ptr + start + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        y = activate(z, ACT, ACC).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + start + offs, y, mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=[*ORDER, "plane"])
def grad_kernel(
    dy_ptr,  # like x
    x_ptr,  # [N, C, S] or [N, S, C]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    w_ptr,  # [C]
    b_ptr,  # [C]
    r_ptr,  # like x
    scale_ptr,  # [N, C]
    shift_ptr,  # [N, C]
    partial_ptr,  # [2, N, chunks, C]: u, v (SUMS)
    term_ptr,  # [2, N, G]: mean_g(q x_hat), mean_g(q) (not SUMS)
    dx_ptr,  # like x (not SUMS)
    dr_ptr,  # like x (not SUMS)
    plane,
    groups,
    d_vectors,
    s_vectors,
    g_blocks,
    d_blocks,
    s_blocks,
    chunks,
    steps,
    first_unit,
    D_VECTOR: tl.constexpr,
    S_VECTOR: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    ACT: tl.constexpr,
    LAST: tl.constexpr,
    WIDE: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ACC: tl.constexpr,
):
    # GroupNorm backward, one of its two sweeps.
    #
    # Math      as group_norm_bwd_kernel. SUMS: u and v of a piece of the positions. Else: dx and dr, from the terms.
    # Traffic   per element, SUMS: read x, dy (and r), to stay in L2. Else: read them again, write dx (and dr).
    # Grid      units x blocks of channels x chunks of `steps` tiles along the positions; the second sweep backwards.
    # Requires  as stats_kernel; plane = N chunks C (SUMS) or N G.
    # Result    bitwise reproducible: tiles in the order of their index, no atomics.
    KEEP: tl.constexpr = "evict_last" if SUMS else "evict_first"
    d = d_vectors * D_VECTOR
    s = s_vectors * S_VECTOR
    pid = tl.program_id(0)
    if not SUMS:
        pid = tl.num_programs(0) - 1 - pid
    pid = pid.to(tl.int64)
    block = pid // chunks
    chunk = (pid - block * chunks).to(tl.int32)
    unit = block // d_blocks
    first_d = (block - unit * d_blocks).to(tl.int32) * BLOCK_D
    unit += first_unit
    pid_n = unit // g_blocks
    first_g = (unit - pid_n * g_blocks).to(tl.int32) * BLOCK_G
    offs_g, offs_d, offs_s = tile_axes(BLOCK_G, BLOCK_D, BLOCK_S, LAST)
    step_g, step_d, step_s = tile_strides(groups, d, s, LAST, WIDE)
    mask_g = offs_g < groups - first_g
    mask_c = mask_g & (offs_d < d - first_d)
    base = pid_n * groups * d * s + first_g * step_g + first_d.to(tl.int64) * step_d
    offs = offs_g * step_g + offs_d * step_d + offs_s * step_s
    row = pid_n * groups + first_g + offs_g
    mean = tl.load(mean_ptr + row, mask=mask_g, other=0.0)
    rstd = tl.load(rstd_ptr + row, mask=mask_g, other=0.0)
    c = (first_g + offs_g) * d + first_d + offs_d
    mul, add = affine_terms(
        w_ptr, b_ptr, scale_ptr, shift_ptr, c, pid_n * groups * d + c, mask_c, HAS_WEIGHT, HAS_BIAS, HAS_SCALE,
        HAS_SHIFT, ACC,
    )  # fmt: skip
    if SUMS:
        u = tl.zeros(offs.shape, ACC)
        v = tl.zeros(offs.shape, ACC)
    else:
        along = tl.load(term_ptr + row, mask=mask_g, other=0.0)
        level = tl.load(term_ptr + plane + row, mask=mask_g, other=0.0)

    for step in range(tl.minimum(s_blocks - chunk * steps, steps)):
        first_s = (chunk * steps + step) * BLOCK_S
        mask = mask_c & (offs_s < s - first_s)
        start = base + first_s.to(tl.int64) * step_s
        x = tl.load(x_ptr + start + offs, mask=mask, other=0.0, eviction_policy=KEEP).to(ACC)
        dy = tl.load(dy_ptr + start + offs, mask=mask, other=0.0, eviction_policy=KEEP).to(ACC)
        x_hat = (x - mean) * rstd
        dz = before_activation(dy, x_hat, mul, add, r_ptr + start + offs, mask, ACT, HAS_RESIDUAL, ACC)
        if SUMS:
            u += dz * x_hat
            v += dz
        else:
            dx = (rstd * (mul * dz - level - x_hat * along)).to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + start + offs, dx, mask=mask, eviction_policy="evict_first")
            if HAS_RESIDUAL:
                dr = dz.to(dr_ptr.dtype.element_ty)
                tl.store(dr_ptr + start + offs, dr, mask=mask, eviction_policy="evict_first")
    if SUMS:
        out = (pid_n * chunks + chunk) * groups * d + c
        tl.store(partial_ptr + out, over_positions(u, BLOCK_G, BLOCK_D, LAST), mask=mask_c)
        tl.store(partial_ptr + plane + out, over_positions(v, BLOCK_G, BLOCK_D, LAST), mask=mask_c)


@triton.jit(do_not_specialize=["n", "groups", "d", "s", "chunks", "first_row"])
def terms_kernel(
    partial_ptr,  # [2, N, chunks, C]: u, v
    w_ptr,  # [C]
    b_ptr,  # [C]
    scale_ptr,  # [N, C]
    term_ptr,  # [2, N, G]
    dscale_ptr,  # [N, C]
    dshift_ptr,  # [N, C]
    dw_ptr,  # [N, C] of each sample, or [C] itself when N = 1
    db_ptr,  # [N, C]
    n,
    groups,
    d,
    s,
    chunks,
    first_row,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
):
    # Between the two sweeps of the backward pass.
    #
    # Math      u, v summed over chunks; mean_g(q x_hat) = sum_d A u / (D S), mean_g(q) = sum_d A v / (D S); dscale,
    #           dshift, dw, db of the sample as in group_norm_bwd_kernel.
    # Traffic   read the partial sums, write a few numbers per channel.
    # Grid      one program per group of a sample.
    # Requires  contiguous tensors.
    # Result    bitwise reproducible: chunks in the order of their index.
    row = tl.program_id(0).to(tl.int64) + first_row
    pid_n = row // groups
    pid_g = (row - pid_n * groups).to(tl.int32)
    offs_k = tl.arange(0, BLOCK_K)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    channels = groups * d
    plane = n.to(tl.int64) * chunks * channels
    along = tl.zeros([1, BLOCK_D], ACC)
    level = tl.zeros([1, BLOCK_D], ACC)
    for first_d in range(0, d, BLOCK_D):
        mask_c = offs_d < d - first_d
        c = pid_g * d + first_d + offs_d
        nc = pid_n * channels + c
        u = tl.zeros([BLOCK_K, BLOCK_D], ACC)
        v = tl.zeros([BLOCK_K, BLOCK_D], ACC)
        for first_k in range(0, chunks, BLOCK_K):
            part = (pid_n * chunks + first_k + offs_k) * channels + c
            mask = mask_c & (offs_k < chunks - first_k)
            u += tl.load(partial_ptr + part, mask=mask, other=0.0)
            v += tl.load(partial_ptr + plane + part, mask=mask, other=0.0)
        u = tl.sum(u, 0, keep_dims=True)
        v = tl.sum(v, 0, keep_dims=True)
        w, b, k = channel_terms(w_ptr, b_ptr, scale_ptr, c, nc, mask_c, HAS_WEIGHT, HAS_BIAS, HAS_SCALE, ACC)
        along += tl.where(mask_c, w * k * u, 0.0)
        level += tl.where(mask_c, w * k * v, 0.0)
        if HAS_SCALE:
            tl.store(dscale_ptr + nc, (w * u + b * v).to(dscale_ptr.dtype.element_ty), mask=mask_c)
        if HAS_SHIFT:
            tl.store(dshift_ptr + nc, v.to(dshift_ptr.dtype.element_ty), mask=mask_c)
        if HAS_WEIGHT:
            tl.store(dw_ptr + nc, (k * u).to(dw_ptr.dtype.element_ty), mask=mask_c)
        if HAS_BIAS:
            tl.store(db_ptr + nc, (k * v).to(db_ptr.dtype.element_ty), mask=mask_c)
    count = d.to(ACC) * s.to(ACC)
    tl.store(term_ptr + row, tl.sum(tl.sum(along, 1), 0) / count)
    tl.store(term_ptr + n.to(tl.int64) * groups + row, tl.sum(tl.sum(level, 1), 0) / count)
