"""Stochastic depth, with the residual connection around it."""

from __future__ import annotations

import math

from torch import Tensor

from .. import _backend, _checks, _layout
from .._library import has_tangent, is_compiling
from ..reference import stochastic_depth as reference
from ._stochastic_depth import StochasticDepth

MODES = {"row": 0, "batch": 1}


def stochastic_depth(
    input: Tensor,
    p: float,
    mode: str = "row",
    training: bool = True,
    *,
    residual: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    r"""Drop whole samples of a residual branch, `torchvision.ops.stochastic_depth` drop-in, and add the residual.

        y = residual + b / (1 - p) * input,    b ~ Bernoulli(1 - p) per sample

    Args:
        input: (N, ...), the output of the branch; float32, float16, bfloat16 or float64, any strides.
        p: probability of a drop, in [0, 1]; 1 drops everything.
        mode: "row" draws for each sample of dimension 0, "batch" once for all.
        training: False leaves the input as it is.
        residual: of the shape and dtype of input, added in the same pass.
        noise: the factors themselves, b / (1 - p), in place of drawn ones: N of them ("row") or 1 ("batch"), of shape
            (N,) or (N, 1, ...); the dtype of input, or float32 beside a half-precision input. A constant.

    Returns:
        The shape, dtype and memory layout of input: channels_last stays channels_last without a copy. Without training
        or with p = 0 it is input itself, or input + residual.

    Raises:
        TypeError: a dtype that is not served, mixed dtypes.
        ValueError: `p` outside of [0, 1], an unknown mode, other shapes or devices, noise that requires a gradient.

    Note:
        From one seed the mask is torchvision's. A dropped sample is not read, forward or backward: infinities and NaN
        in it go no further (torchvision multiplies them by 0). Computed in float32 and rounded once (float64 for
        float64). Bitwise equal between thread counts. Works under torch.compile(fullgraph=True), export, torch.func and
        AMP (autocast changes nothing); derivatives of every order run the same kernel.

    Reference:
        Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016, eq. 2.
    """
    fast = None if is_compiling() else _backend.fast(input)
    if fast is not None:
        y = fast.stochastic_depth(input, p, mode, training, residual, noise)
        if y is not None:
            return y

    p = _checks.in_unit_interval("p", p)
    by_row = _checks.one_of("mode", mode, MODES) == 0
    _checks.floating("input", input)
    if by_row and input.dim() == 0:
        raise ValueError("`input` must have shape (N, ...) for mode 'row', got ()")
    if residual is not None:
        _checks.like("residual", residual, "input", input)
    n = input.shape[0] if by_row else 1
    if noise is not None:
        _check_noise(noise, input, n)
    if not training or p == 0:
        return input if residual is None else input + residual

    noise = reference.draw_noise(input, p, n) if noise is None else noise.reshape(n)
    last = _layout.is_channels_last(input)
    shape = (n, math.prod(input.shape[1:]) if by_row else input.numel())
    x, r = (None if t is None else (t.movedim(1, -1) if last else t) for t in (input, residual))
    rows, r_rows = (None if t is None else t.contiguous().view(shape) for t in (x, r))
    if _backend.choose(input.device.type, "stochastic_depth_fwd") == "reference" or has_tangent(input, residual):
        y = reference.stochastic_depth(rows, noise, r_rows).view(x.shape)
    else:
        y = StochasticDepth.call(rows, noise, r_rows).view(x.shape)
    return y.movedim(-1, 1) if last else y


def _check_noise(noise: Tensor, input: Tensor, n: int) -> None:
    _checks.floating("noise", noise)
    full = (n, *[1] * (input.dim() - 1))
    meaning = "(N,)" if noise.dim() == 1 or input.dim() == 0 else "(N, 1, ...)"
    _checks.parameter("noise", noise, (n,) if meaning == "(N,)" else full, meaning, "input", input)
    if noise.requires_grad:
        raise ValueError("`noise` must not require a gradient: it is a constant of the op")
