"""Squeeze-and-excitation in one call: pool, two small layers, gate, scale, and a residual with its activation."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from .. import _backend, _checks, _layout
from .._library import has_tangent, is_compiling
from ..reference import squeeze_excite as reference
from ..reference._activation import ACTIVATIONS, GATES
from ._squeeze_excite import SqueezeExcite

LAYOUTS = {"channels_first": 0, "channels_last": 1, "tokens": 2}
HIDDEN_ACTIVATIONS = {name: ACTIVATIONS[name] for name in ("relu", "silu", "gelu", "leaky_relu")}


def squeeze_excite(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "relu",
    gate: str = "sigmoid",
    residual: Tensor | None = None,
    residual_activation: str | None = None,
    layout: str = "channels_first",
) -> Tensor:
    r"""Squeeze-and-excitation: scale every channel by a gate that all channel means decide.

        s = mean over positions of x,   e = gate(w2 act(w1 s + b1) + b2),   y = residual_act(x * e + residual)

    With `w1=None` there is one layer only, e = gate(w2 s + b2) with w2 (C, C): effective squeeze-and-excitation.

    Args:
        x: (N, C, d1, ...) for layout "channels_first", with any number of positional dimensions and any strides;
            (N, d1, ..., C) for "channels_last"; (B, N, C) for "tokens", pooled over all N tokens.
        w1: (R, C) as of a Linear or (R, C, 1, ...) as of a 1x1 convolution, or None.
        b1: (R,) or None.
        w2: (C, R) or (C, R, 1, ...); (C, C) without w1.
        b2: (C,) or None.
        activation: "relu", "silu", "gelu" or "leaky_relu" (slope 0.01), between the two layers.
        gate: "sigmoid", "hard_sigmoid" (clamp(z + 3, 0, 6) / 6) or "relu".
        residual: of the shape and dtype of x, added to the scaled x.
        residual_activation: None or any activation of `group_norm`, after the addition; needs a residual.
        layout: "channels_first", "channels_last" or "tokens".

    Returns:
        The shape, dtype and memory layout of x. Weights have the dtype of x, or float32 beside a half-precision x.

    Raises:
        TypeError: a dtype that is not served, mixed dtypes.
        ValueError: no positions, shapes that do not fit, devices, an unknown activation, gate or layout, b1 without w1.

    Note:
        Means, hidden values and gates are kept in float32; x is read twice forward, and once more than dy backward
        (three times with a residual activation). Sums run in a fixed order: bitwise equal between runs and thread
        counts. Works under torch.compile(fullgraph=True), export, torch.func and AMP (autocast changes nothing);
        second derivatives run the reference twice.

    Reference:
        Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, eq. 2 to 4; Lee and Park, "CenterMask", CVPR 2020
        (effective SE); Yuan et al., "Tokens-to-Token ViT", ICCV 2021 (tokens).
    """
    fast = None if is_compiling() else _backend.fast(x)
    if fast is not None:
        y = fast.squeeze_excite(x, w1, b1, w2, b2, activation, gate, residual, residual_activation, layout)
        if y is not None:
            return y

    codes = (
        _checks.one_of("activation", activation, HIDDEN_ACTIVATIONS),
        _checks.one_of("gate", gate, GATES),
        _checks.one_of("residual_activation", residual_activation, ACTIVATIONS),
    )
    channels_inner = _checks.one_of("layout", layout, LAYOUTS) > 0
    _check_input(x, layout, residual, residual_activation)
    x = x.movedim(-1, 1) if channels_inner else x
    residual = residual.movedim(-1, 1) if residual is not None and channels_inner else residual
    w1, w2 = _check_weights(x, w1, b1, w2, b2)

    if _backend.choose(x.device.type, "squeeze_excite_fwd") == "reference" or has_tangent(x, w1, b1, w2, b2, residual):
        y = reference.squeeze_excite(x, w1, b1, w2, b2, residual, *codes)
    else:
        channels_last = _layout.is_channels_last(x)
        rows = _layout.to_rows(x, channels_last)
        r = None if residual is None else _layout.to_rows(residual, channels_last)
        y = SqueezeExcite.call(rows, w1, b1, w2, b2, r, *codes, channels_last)[0]
        y = _layout.from_rows(y, x, channels_last)
    return y.movedim(1, -1) if channels_inner else y


def _check_input(x: Tensor, layout: str, residual: Tensor | None, residual_activation: str | None) -> None:
    _checks.floating("x", x)
    least, meaning = {"channels_first": (2, "(N, C, d1, ...)"), "channels_last": (2, "(N, d1, ..., C)")}.get(
        layout, (3, "(B, N, C)")
    )
    if x.dim() < least or (layout == "tokens" and x.dim() != 3):
        raise ValueError(f"`x` must have shape {meaning} for layout {layout!r}, got {tuple(x.shape)}")
    channel = 1 if layout == "channels_first" else x.dim() - 1
    if math.prod(x.shape[1:]) == 0:
        what = "channel" if x.shape[channel] == 0 else "position"
        raise ValueError(f"`x` must have at least one {what}, got shape {tuple(x.shape)}")
    if residual is not None:
        _checks.like("residual", residual, "x", x)
    elif residual_activation is not None:
        raise ValueError("`residual_activation` needs a `residual`")


def _check_weights(x: Tensor, w1: Any, b1: Any, w2: Any, b2: Any) -> tuple[Tensor | None, Tensor]:
    """The weights as matrices."""
    c = x.shape[1]
    hidden = c
    if w1 is not None:
        w1 = _matrix("w1", w1)
        hidden = w1.shape[0]
        _checks.parameter("w1", w1, (hidden, c), "(R, C)", "x", x)
        if hidden == 0:
            raise ValueError("`w1` must have at least one row, got shape (0, C)")
    elif b1 is not None:
        raise ValueError("`b1` needs `w1`: the form with one layer has no hidden bias")
    w2 = _matrix("w2", w2)
    _checks.parameter("w2", w2, (c, hidden), "(C, R)", "x", x)
    if b1 is not None:
        _checks.parameter("b1", b1, (hidden,), "(R,)", "x", x)
    if b2 is not None:
        _checks.parameter("b2", b2, (c,), "(C,)", "x", x)
    return w1, w2


def _matrix(name: str, w: Any) -> Tensor:
    _checks.tensor(name, w)
    if w.dim() < 2 or math.prod(w.shape[2:]) != 1:
        raise ValueError(f"`{name}` must have shape (out, in) or (out, in, 1, ...), got {tuple(w.shape)}")
    return w.flatten(1) if w.dim() > 2 else w
