"""Activations and gates of the layer kernels, with their derivatives. Codes as in reference/_activation.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import exp_neg

# torch's leaky_relu; 1 / sqrt(2), 1 / sqrt(2 pi), 2 sqrt(2 / pi).
NEGATIVE_SLOPE = tl.constexpr(0.01)
SQRT_HALF = tl.constexpr(0.7071067811865476)
NORMAL_PEAK = tl.constexpr(0.3989422804014327)
TWICE_SQRT_2_PI = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def sigmoid_pair(z, ACC: tl.constexpr):
    """sigmoid(z) and 1 - sigmoid(z), neither by a difference."""
    e = exp_neg(tl.abs(z), False, ACC)
    r = 1.0 / (1.0 + e)
    er = e * r
    return tl.where(z >= 0, r, er), tl.where(z >= 0, er, r)


@triton.jit
def activate(z, ACT: tl.constexpr, ACC: tl.constexpr):
    """The activation. NaN stays NaN."""
    if ACT == 1:
        y = tl.where(z <= 0, 0.0, z)
    elif ACT == 2:
        y = tl.where(z < 0, z * NEGATIVE_SLOPE, z)
    elif ACT == 3:
        y = z * sigmoid_pair(z, ACC)[0]
    elif ACT == 4:
        y = 0.5 * z * (1.0 + tl.erf(z * SQRT_HALF))
    elif ACT == 5:  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        y = z * sigmoid_pair(z * (TWICE_SQRT_2_PI * (1.0 + CUBIC * (z * z))), ACC)[0]
    else:
        y = z
    return y


@triton.jit
def activate_grad(z, ACT: tl.constexpr, ACC: tl.constexpr):
    """The derivative of the activation."""
    if ACT == 1:
        dz = tl.where(z <= 0, 0.0, tl.full([], 1.0, ACC))
    elif ACT == 2:
        dz = tl.where(z > 0, tl.full([], 1.0, ACC), NEGATIVE_SLOPE)
    elif ACT == 3:
        p, q = sigmoid_pair(z, ACC)
        dz = p * (1.0 + z * q)
    elif ACT == 4:
        e = exp_neg(0.5 * z * z, False, ACC)
        dz = 0.5 * (1.0 + tl.erf(z * SQRT_HALF)) + z * (NORMAL_PEAK * e)
    elif ACT == 5:
        square = z * z
        p, q = sigmoid_pair(z * (TWICE_SQRT_2_PI * (1.0 + CUBIC * square)), ACC)
        dz = p + (p * q * z) * (TWICE_SQRT_2_PI * (1.0 + 3.0 * CUBIC * square))
    else:
        dz = tl.full(z.shape, 1.0, ACC)
    return dz


@triton.jit
def gate(z, GATE: tl.constexpr, ACC: tl.constexpr):
    """The gate. NaN stays NaN."""
    if GATE == 0:
        e = sigmoid_pair(z, ACC)[0]
    elif GATE == 1:
        e = tl.where(z <= -3, 0.0, tl.where(z >= 3, 1.0, (z + 3.0) / 6.0))
    else:
        e = tl.where(z <= 0, 0.0, z)
    return e


@triton.jit
def gate_grad(e, GATE: tl.constexpr, ACC: tl.constexpr):
    """The derivative of the gate as a function of its value."""
    if GATE == 0:
        d = e * (1.0 - e)
    elif GATE == 1:
        d = tl.where((e > 0) & (e < 1), tl.full([], 1.0 / 6.0, ACC), 0.0)
    else:
        d = tl.where(e > 0, tl.full([], 1.0, ACC), 0.0)
    return d
