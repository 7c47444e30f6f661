"""GroupNorm of groups that stay in registers: everything is read once."""

from __future__ import annotations

import triton
import triton.language as tl

from ._activation import activate
from ._common import scalar
from ._group_norm_tiles import (
    affine_terms,
    before_activation,
    channel_terms,
    over_channels,
    over_group,
    over_positions,
    tile_axes,
    tile_strides,
)


@triton.jit(do_not_specialize=["eps", "groups", "d_vectors", "s_vectors", "g_blocks"])
def group_norm_fwd_kernel(
    x_ptr,  # [N, C, S] or [N, S, C]
    w_ptr,  # [C]
    b_ptr,  # [C]
    r_ptr,  # like x
    scale_ptr,  # [N, C]
    shift_ptr,  # [N, C]
    y_ptr,  # like x
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    eps,
    groups,
    d_vectors,
    s_vectors,
    g_blocks,
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
    # GroupNorm forward, whole groups in registers.
    #
    # Math      x_hat = (x - mean) rstd;  y = act(A x_hat + B + r), A = w (1 + scale), B = b (1 + scale) + shift.
    #           Everything is taken relative to the first element of its group, x - x_0: mean - x_0 is a small number,
    #           whose rounding does not grow with |mean|. The variance is a second pass over the resident tile.
    # Traffic   per element: read x (and r), write y; x_0 once more per group.
    # Grid      one program per BLOCK_G groups of a sample.
    # Requires  contiguous x, r, y; D = d_vectors D_VECTOR, S = s_vectors S_VECTOR; WIDE when C S >= 2^31.
    # Result    bitwise reproducible: fixed reduction trees.
    eps = scalar(eps, ACC)
    d = d_vectors * D_VECTOR
    s = s_vectors * S_VECTOR
    pid = tl.program_id(0).to(tl.int64)
    pid_n = pid // g_blocks
    first_g = (pid - pid_n * g_blocks).to(tl.int32) * BLOCK_G
    offs_g, offs_d, offs_s = tile_axes(BLOCK_G, BLOCK_D, BLOCK_S, LAST)
    step_g, step_d, step_s = tile_strides(groups, d, s, LAST, WIDE)
    mask_g = offs_g < groups - first_g
    mask_c = mask_g & (offs_d < d)
    mask = mask_c & (offs_s < s)
    base = pid_n * groups * d * s + first_g * step_g
    offs = offs_g * step_g + offs_d * step_d + offs_s * step_s

    x = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
    origin = tl.load(x_ptr + base + offs_g * step_g, mask=mask_g, other=0.0).to(ACC)
    x = tl.where(mask, x - origin, 0.0)
    count = d.to(ACC) * s.to(ACC)
    mean = over_group(x, BLOCK_G, BLOCK_D, LAST) / count
    x = tl.where(mask, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(over_group(x * x, BLOCK_G, BLOCK_D, LAST) / count + eps)
    row = pid_n * groups + first_g + offs_g
    tl.store(mean_ptr + row, origin + mean, mask=mask_g)
    tl.store(rstd_ptr + row, rstd, mask=mask_g)

    c = (first_g + offs_g) * d + offs_d
    nc = pid_n * groups * d + c
    mul, add = affine_terms(
        w_ptr, b_ptr, scale_ptr, shift_ptr, c, nc, mask_c, HAS_WEIGHT, HAS_BIAS, HAS_SCALE, HAS_SHIFT, ACC
    )
    z = x * (rstd * mul) + add
    if HAS_RESIDUAL:
        z += tl.load(r_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
    tl.store(y_ptr + base + offs, activate(z, ACT, ACC).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "groups", "d_vectors", "s_vectors", "g_blocks", "samples"])
def group_norm_bwd_kernel(
    dy_ptr,  # like x
    x_ptr,  # [N, C, S] or [N, S, C]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    w_ptr,  # [C]
    b_ptr,  # [C]
    r_ptr,  # like x
    scale_ptr,  # [N, C]
    shift_ptr,  # [N, C]
    dx_ptr,  # like x
    dr_ptr,  # like x
    dscale_ptr,  # [N, C]
    dshift_ptr,  # [N, C]
    dw_ptr,  # [programs / g_blocks, C] partial sums, or [C] itself
    db_ptr,  # [programs / g_blocks, C]
    n,
    groups,
    d_vectors,
    s_vectors,
    g_blocks,
    samples,
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
    # GroupNorm backward, whole groups in registers.
    #
    # Math      dz = dy act'(z), z recomputed;  q = A dz:  dx = rstd (q - mean_g(q) - x_hat mean_g(q x_hat)), dr = dz;
    #           per sample and channel u = sum_s dz x_hat, v = sum_s dz:  dscale = w u + b v, dshift = v,
    #           dw = sum_n (1 + scale) u, db = sum_n (1 + scale) v.
    # Traffic   per element: read x, dy (and r), write dx (and dr).
    # Grid      one program per BLOCK_G groups, walking over `samples` samples; partial dw, db to sum_rows_kernel.
    # Requires  as the forward kernel.
    # Result    bitwise reproducible: samples in the order of their index, no atomics.
    d = d_vectors * D_VECTOR
    s = s_vectors * S_VECTOR
    pid = tl.program_id(0).to(tl.int64)
    pid_n = pid // g_blocks
    first_g = (pid - pid_n * g_blocks).to(tl.int32) * BLOCK_G
    offs_g, offs_d, offs_s = tile_axes(BLOCK_G, BLOCK_D, BLOCK_S, LAST)
    step_g, step_d, step_s = tile_strides(groups, d, s, LAST, WIDE)
    mask_g = offs_g < groups - first_g
    mask_c = mask_g & (offs_d < d)
    mask = mask_c & (offs_s < s)
    offs = offs_g * step_g + offs_d * step_d + offs_s * step_s
    c = (first_g + offs_g) * d + offs_d
    count = d.to(ACC) * s.to(ACC)
    dw = tl.zeros(mask_c.shape, ACC)
    db = tl.zeros(mask_c.shape, ACC)

    for step in range(tl.minimum(n - pid_n * samples, samples).to(tl.int32)):
        i = pid_n * samples + step
        base = i * groups * d * s + first_g * step_g
        x = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        dy = tl.load(dy_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        row = i * groups + first_g + offs_g
        mean = tl.load(mean_ptr + row, mask=mask_g, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=mask_g, other=0.0)
        nc = i * groups * d + c
        mul, add = affine_terms(
            w_ptr, b_ptr, scale_ptr, shift_ptr, c, nc, mask_c, HAS_WEIGHT, HAS_BIAS, HAS_SCALE, HAS_SHIFT, ACC
        )
        x_hat = (x - mean) * rstd
        dz = before_activation(dy, x_hat, mul, add, r_ptr + base + offs, mask, ACT, HAS_RESIDUAL, ACC)
        if HAS_RESIDUAL:
            tl.store(dr_ptr + base + offs, dz.to(dr_ptr.dtype.element_ty), mask=mask)
        u = over_positions(dz * x_hat, BLOCK_G, BLOCK_D, LAST)
        v = over_positions(dz, BLOCK_G, BLOCK_D, LAST)
        along = over_channels(mul * u, BLOCK_G, BLOCK_D, LAST) / count
        level = over_channels(mul * v, BLOCK_G, BLOCK_D, LAST) / count
        dx = rstd * (mul * dz - level - x_hat * along)
        tl.store(dx_ptr + base + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        # Read again, from L1, rather than kept in registers beside x and dy.
        w, b, k = channel_terms(w_ptr, b_ptr, scale_ptr, c, nc, mask_c, HAS_WEIGHT, HAS_BIAS, HAS_SCALE, ACC)
        if HAS_SCALE:
            tl.store(dscale_ptr + nc, (w * u + b * v).to(dscale_ptr.dtype.element_ty), mask=mask_c)
        if HAS_SHIFT:
            tl.store(dshift_ptr + nc, v.to(dshift_ptr.dtype.element_ty), mask=mask_c)
        dw += k * u
        db += k * v

    out = pid_n * groups * d + c
    if HAS_WEIGHT:
        tl.store(dw_ptr + out, dw.to(dw_ptr.dtype.element_ty), mask=mask_c)
    if HAS_BIAS:
        tl.store(db_ptr + out, db.to(db_ptr.dtype.element_ty), mask=mask_c)
