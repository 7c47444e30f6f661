"""Stochastic depth on GPUs: one pass over input and residual, none over what is dropped."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ._common import accumulator, load_block, on_device, store_block

BLOCK = 4096  # elements of a program: four 16-byte accesses per thread and tensor in float32


@triton.jit(do_not_specialize=["vectors", "blocks"])
def _stochastic_depth_kernel(
    x_ptr,  # [N, M]
    f_ptr,  # [N] factors
    r_ptr,  # [N, M] residual
    y_ptr,  # [N, M]
    vectors,
    blocks,
    VECTOR: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    # Stochastic depth forward, and its backward in x.
    #
    # Math      y = residual + f[n] x.
    # Traffic   per element: read x where f[n] is not 0, read the residual, write y.
    # Grid      N * blocks programs; one row n and BLOCK elements of it each.
    # Requires  contiguous tensors; M = vectors * VECTOR.
    # Result    bitwise reproducible.
    pid = tl.program_id(0)
    pid_n = pid // blocks
    length = tl.cast(vectors, tl.int64) * VECTOR
    start = (pid - pid_n * blocks).to(tl.int64) * BLOCK
    base = pid_n.to(tl.int64) * length + start
    offs = tl.arange(0, BLOCK)
    mask = start + offs < length
    full = start + BLOCK <= length
    f = tl.load(f_ptr + pid_n).to(ACC)
    y = tl.zeros([BLOCK], ACC)
    if HAS_RESIDUAL:
        y = load_block(r_ptr + base, offs, mask, full, 0.0).to(ACC)
    if f != 0:
        y += load_block(x_ptr + base, offs, mask, full, 0.0).to(ACC) * f
    store_block(y_ptr + base, offs, y.to(y_ptr.dtype.element_ty), mask, full)


def stochastic_depth_fwd(input: Tensor, noise: Tensor, residual: Tensor | None) -> Tensor:
    """residual + noise[n] * input, (N, M)."""
    x = input.contiguous()
    out = x.new_empty(x.shape)
    if x.numel() == 0:
        return out
    n = noise.numel()
    m = x.numel() // n
    block = min(BLOCK, max(128, triton.next_power_of_2(m)))
    blocks = triton.cdiv(m, block)
    vector = math.gcd(m, 8)
    r = x if residual is None else residual.contiguous()
    with on_device(x):
        _stochastic_depth_kernel[(n * blocks,)](
            x, noise.contiguous(), r, out, m // vector, blocks,
            VECTOR=vector, HAS_RESIDUAL=residual is not None, BLOCK=block, ACC=accumulator(x.dtype)[0],
            num_warps=max(1, block // 1024),
        )  # fmt: skip
    return out
