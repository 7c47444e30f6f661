"""The backward pass of a loss that wrote its gradient in the forward pass: scale it by grad_output, on the device."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import accumulator, load_block, on_device, store_block


@triton.jit(do_not_specialize=["numel"])
def _scale_kernel(
    g_ptr,  # []
    x_ptr,  # [numel]
    divisor_ptr,  # []
    y_ptr,  # [numel]
    numel,
    HAS_DIVISOR: tl.constexpr,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    # A stored gradient times the gradient of the loss.
    #
    # Math      y = x * g / divisor;  0 stays 0 whatever g and divisor are (rows left out of a mean over nothing).
    # Traffic   per element: read x, write y; nothing when IN_PLACE and the factor is 1.
    # Grid      one program per BLOCK elements.
    # Requires  contiguous x and y; IN_PLACE: y is x.
    # Result    bitwise reproducible.
    factor = tl.load(g_ptr).to(ACC)
    if HAS_DIVISOR:
        factor = factor / tl.load(divisor_ptr).to(ACC)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    rest = tl.minimum(numel - start, BLOCK).to(tl.int32)
    if IN_PLACE:
        rest = tl.where(factor == 1, 0, rest)
    offs = tl.arange(0, BLOCK)
    if rest > 0:
        full = rest == BLOCK
        x = load_block(x_ptr + start, offs, offs < rest, full, 0.0).to(ACC)
        y = tl.where(x == 0, 0.0, x * factor)
        store_block(y_ptr + start, offs, y.to(y_ptr.dtype.element_ty), offs < rest, full)


def scale_stored_grad(grad_output: Tensor, stored: Tensor, divisor: Tensor | None) -> Tensor:
    """stored * grad_output [/ divisor], out of place. grad_output and divisor are 0-d and read on the device."""
    stored = stored.contiguous()
    out = stored.new_empty(stored.shape)
    _launch(grad_output, stored, divisor, out)
    return out


def scale_stored_grad_(stored: Tensor, grad_output: Tensor, divisor: Tensor | None) -> None:
    """The same in place; a factor of exactly 1 costs one small read per program."""
    if not stored.is_contiguous():
        raise ValueError(f"`stored` must be contiguous, got strides {stored.stride()}")
    _launch(grad_output, stored, divisor, stored)


def _launch(grad_output: Tensor, stored: Tensor, divisor: Tensor | None, out: Tensor) -> None:
    numel = stored.numel()
    if numel == 0:
        return
    block = 4096 if numel >= 1 << 20 else 1024
    with on_device(stored):
        _scale_kernel[(triton.cdiv(numel, block),)](
            grad_output, stored, grad_output if divisor is None else divisor, out, numel,
            HAS_DIVISOR=divisor is not None, IN_PLACE=out is stored, BLOCK=block, ACC=accumulator(stored.dtype)[0],
            num_warps=block // 512,
        )  # fmt: skip
