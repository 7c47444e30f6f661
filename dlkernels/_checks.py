"""Argument checks shared by every public function: one line each, expectation first, then the fact."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def shape_of(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"`{name}` must be a strided (dense) tensor, got {value.layout}")
    return value


def floating(name: str, value: Any) -> Tensor:
    tensor(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"`{name}` must be float32, float16, bfloat16 or float64, got {value.dtype}")
    return value


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"`{name}` must be on the device of `{other_name}`, {other.device}, got {value.device}")


def shape(name: str, value: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if shape_of(value) != tuple(expected):
        raise ValueError(f"`{name}` must have shape {meaning} = {tuple(expected)}, got {shape_of(value)}")


def reduction_code(reduction: str) -> int:
    code = REDUCTIONS.get(reduction) if isinstance(reduction, str) else None
    if code is None:
        raise ValueError(f"`reduction` must be 'none', 'mean' or 'sum', got {reduction!r}")
    return code


def non_negative(name: str, value: Any) -> float:
    x = number(name, value)
    if not 0.0 <= x < math.inf:
        raise ValueError(f"`{name}` must be a finite number >= 0, got {value}")
    return x


def finite(name: str, value: Any) -> float:
    x = number(name, value)
    if not -math.inf < x < math.inf:
        raise ValueError(f"`{name}` must be a finite number, got {value}")
    return x


def in_unit_interval(name: str, value: Any) -> float:
    x = number(name, value)
    if not 0.0 <= x <= 1.0:
        raise ValueError(f"`{name}` must be in [0, 1], got {value}")
    return x


def number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        try:
            if isinstance(value, (str, bytes)):  # of a configuration: 1e-3 without a dot is one in YAML
                raise TypeError
            return float(value)  # numpy scalars and the like
        except (TypeError, ValueError):
            raise TypeError(f"`{name}` must be a number, got {type(value).__name__}") from None
    return float(value)


def integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an int, got {type(value).__name__}")
    return value


def per_class(name: str, value: Tensor, num_classes: int, like_name: str, like: Tensor) -> None:
    """A per-class vector: floating, shape (C,), on the device of the logits."""
    floating(name, value)
    shape(name, value, (num_classes,), "(C,)")
    same_device(name, value, like_name, like)


def normalizer(value: Any, reduction: str, like_name: str, like: Tensor) -> Tensor | None:
    """The sum's divisor as a tensor of one element on the device of the logits, or None."""
    if value is None:
        return None
    if reduction != "sum":
        raise ValueError(f"`normalizer` needs reduction='sum', got reduction={reduction!r}")
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"`normalizer` must have one element, got shape {shape_of(value)}")
        same_device("normalizer", value, like_name, like)
        return value.reshape(()).to(dtype)
    return torch.full((), number("normalizer", value), dtype=dtype, device=like.device)


def one_of(name: str, value: Any, codes: dict[Any, int]) -> int:
    """The code of a named option."""
    code = codes.get(value) if value is None or isinstance(value, str) else None
    if code is None:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, codes))}, got {value!r}")
    return code


def parameter(name: str, value: Any, expected: tuple[int, ...], meaning: str, like_name: str, like: Tensor) -> None:
    """A parameter of a layer: shape, device, and the dtype of the input or float32 beside a half-precision one."""
    floating(name, value)
    half = like.dtype in (torch.float16, torch.bfloat16)
    if value.dtype != like.dtype and not (half and value.dtype == torch.float32):
        allowed = f"{like.dtype} or torch.float32" if half else f"{like.dtype}"
        raise TypeError(f"`{name}` must be {allowed} beside a {like_name} of {like.dtype}, got {value.dtype}")
    shape(name, value, expected, meaning)
    same_device(name, value, like_name, like)


def like(name: str, value: Any, other_name: str, other: Tensor) -> None:
    """A tensor of the shape, dtype and device of another."""
    floating(name, value)
    if value.dtype != other.dtype:
        raise TypeError(f"`{name}` must have the dtype of `{other_name}`, {other.dtype}, got {value.dtype}")
    shape(name, value, shape_of(other), f"of {other_name}")
    same_device(name, value, other_name, other)


def labels(name: str, value: Any, expected: tuple[int, ...], meaning: str, like_name: str, like: Tensor) -> None:
    """Class indices: integers of a shape, on the device of the features."""
    tensor(name, value)
    if value.dtype not in INTEGER_DTYPES:
        raise TypeError(f"`{name}` must be of an integer dtype, got {value.dtype}")
    shape(name, value, expected, meaning)
    same_device(name, value, like_name, like)
