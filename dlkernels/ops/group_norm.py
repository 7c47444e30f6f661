"""Group normalisation, with the activation, the residual and the modulation that surround it in real models."""

from __future__ import annotations

import math

from torch import Tensor

from .. import _backend, _checks, _layout
from .._library import has_tangent, is_compiling
from ..reference import group_norm as reference
from ..reference._activation import ACTIVATIONS
from ._group_norm import GroupNorm


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    r"""Group normalisation, `torch.nn.functional.group_norm` drop-in, with what follows it in the same pass.

        y = act(((x - mean) rstd * weight + bias) * (1 + scale) + shift + residual)

    mean and the biased variance are taken per sample over C/G channels and all positions; rstd = 1 / sqrt(var + eps).

    Args:
        input: (N, C, d1, ...), two to five dimensions and more; float32, float16, bfloat16 or float64, any strides.
        num_groups: G, a divisor of C; 1 (a layer norm over C and positions) and C (an instance norm) included.
        weight, bias: (C,) or None, each on its own; the dtype of input, or float32 beside a half-precision input.
        eps: added to the variance.
        activation: None, "relu", "leaky_relu" (slope 0.01), "silu", "gelu" or "gelu_tanh".
        residual: of the shape and dtype of input, added before the activation.
        scale, shift: (N, C), dtypes as for weight: the modulation of diffusion models (FiLM); y * (1 + scale) + shift.

    Returns:
        The shape, dtype and memory layout of input: channels_last (2-D and 3-D) stays channels_last without a copy.

    Raises:
        TypeError: a dtype that is not served, mixed dtypes.
        ValueError: C % num_groups != 0, one value per group and sample only, no positions, other shapes or devices,
            an unknown activation.

    Note:
        Statistics in float32 (float64 for float64) by a second pass over resident data. Keeps input, mean and rstd; the
        activation is recomputed, so that the output may be changed in place. dweight and dbias are summed in a fixed
        order: bitwise equal between runs and thread counts. Works under torch.compile(fullgraph=True), export,
        torch.func and AMP (autocast changes nothing); second derivatives run the reference twice.

    Reference:
        Wu and He, "Group Normalization", ECCV 2018, eq. 1 to 3; Perez et al., "FiLM", AAAI 2018, eq. 1.
    """
    fast = None if is_compiling() else _backend.fast(input)
    if fast is not None:
        y = fast.group_norm(input, num_groups, weight, bias, eps, activation, residual, scale, shift)
        if y is not None:
            return y

    code = _check(input, num_groups, weight, bias, activation, residual, scale, shift)
    eps = _checks.number("eps", eps)
    tensors = (input, weight, bias, residual, scale, shift)
    if _backend.choose(input.device.type, "group_norm_fwd") == "reference" or has_tangent(*tensors):
        return reference.group_norm(input, num_groups, weight, bias, eps, code, residual, scale, shift)
    channels_last = _layout.is_channels_last(input)
    x = _layout.to_rows(input, channels_last)
    r = None if residual is None else _layout.to_rows(residual, channels_last)
    y = GroupNorm.call(x, weight, bias, r, scale, shift, num_groups, eps, code, channels_last)[0]
    return _layout.from_rows(y, input, channels_last)


def _check(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
) -> int:
    """Everything that can be wrong, in one line each; the code of the activation."""
    code = _checks.one_of("activation", activation, ACTIVATIONS)
    _checks.floating("input", input)
    _checks.integer("num_groups", num_groups)
    if input.dim() < 2:
        raise ValueError(f"`input` must have shape (N, C, d1, ...), got {tuple(input.shape)}")
    n, c = input.shape[:2]
    if num_groups < 1 or c % num_groups != 0 or c == 0:
        raise ValueError(f"`num_groups` must divide the number of channels, {c}, got {num_groups}")
    positions = math.prod(input.shape[2:])
    if positions == 0:
        raise ValueError(f"`input` must have at least one position, got shape {tuple(input.shape)}")
    if not is_compiling() and c // num_groups * positions * n == 1:
        raise ValueError(f"expected more than 1 value per channel, got input of shape {tuple(input.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _checks.parameter(name, value, (c,), "(C,)", "input", input)
    for name, value in (("scale", scale), ("shift", shift)):
        if value is not None:
            _checks.parameter(name, value, (n, c), "(N, C)", "input", input)
    if residual is not None:
        _checks.like("residual", residual, "input", input)
    return code
