"""The layers that `check` and `profile` run: one line per case, and for each op how its tensors are drawn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

import dlkernels as dk

from . import _eager_layers
from ._budget import Sample

Shape = tuple[int, ...]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LayerCase:
    """One call of a public function `op(x, **tensors, **options)` and its eager counterpart.

    `draw` gives the tensors by argument name; they take gradients as x does, but for those named in `fixed`.
    """

    op: str
    name: str
    shape: Shape
    draw: Callable[[LayerCase, Generator], Tensors]
    options: dict[str, Any] = field(default_factory=dict)
    extras: tuple[str, ...] = ()  # optional tensors, such as "residual"
    layout: str = "contiguous"  # contiguous, channels_last or transposed
    fixed: tuple[str, ...] = ()

    def sample(self, dtype: torch.dtype, device: str, seed: int) -> Sample:
        """One draw: the input, its parameters and a gradient, bound to the fused and to the eager function."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape, generator=generator) + 0.5
        tensors = {"x": x, **self.draw(self, generator)}
        moved = {k: self._laid_out(t.to(device, dtype)) for k, t in tensors.items()}
        grad_output = self._laid_out(torch.randn(self.shape, generator=generator).to(device, dtype))
        names = [k for k in moved if k not in (*self.fixed, "x")]
        kept = {k: moved[k] for k in self.fixed}

        def bound(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def call(x: Tensor, *parameters: Tensor) -> Tensor:
                given = dict(zip(names, parameters, strict=True))
                absent = {} if self.op != "squeeze_excite" or "w1" in given else {"w1": None, "b1": None}
                return function(x, **absent, **given, **{k: t.to(x.dtype) for k, t in kept.items()}, **self.options)

            return call

        fused, eager = bound(getattr(dk, self.op)), bound(getattr(_eager_layers, self.op))
        return Sample(fused, eager, moved["x"], grad_output, tuple(moved[k] for k in names))

    def _laid_out(self, t: Tensor) -> Tensor:
        if t.shape != self.shape or self.layout == "contiguous":
            return t
        if self.layout == "transposed":
            return t.mT.contiguous().mT
        return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)


# Tensors of each op ---------------------------------------------------------------------------------------------------


def of_group_norm(case: LayerCase, generator: Generator) -> Tensors:
    n, c = case.shape[:2]
    randn = functools.partial(torch.randn, generator=generator)
    tensors = {"weight": 1 + 0.3 * randn(c), "bias": 0.3 * randn(c)} if "affine" in case.extras else {}
    if "residual" in case.extras:
        tensors["residual"] = randn(case.shape)
    return tensors | ({"scale": 0.5 * randn(n, c), "shift": 0.5 * randn(n, c)} if "film" in case.extras else {})


def of_squeeze_excite(case: LayerCase, generator: Generator) -> Tensors:
    """R = C / 16 hidden units, at least 4 where there are so many channels; none for the form with one layer."""
    c = case.shape[1 if case.options.get("layout", "channels_first") == "channels_first" else -1]
    randn = functools.partial(torch.randn, generator=generator)
    hidden = c if "effective" in case.extras else max(c // 16, min(c, 4))
    tensors = {"w2": 2 * randn(c, hidden) / hidden**0.5, "b2": 0.5 * randn(c)}
    if "effective" not in case.extras:
        tensors = {"w1": randn(hidden, c) / c**0.5, "b1": 0.5 + 0.1 * randn(hidden)} | tensors
    return tensors | ({"residual": randn(case.shape)} if "residual" in case.extras else {})


def of_weight_norm(case: LayerCase, generator: Generator) -> Tensors:
    dim = case.options.get("dim", 0)
    size = () if dim is None else tuple(n if i == dim else 1 for i, n in enumerate(case.shape))
    return {"g": 0.5 + torch.rand(size, generator=generator)}


def of_stochastic_depth(case: LayerCase, generator: Generator) -> Tensors:
    """One draw for both sides: 1 / (1 - p) where a row is kept."""
    p = case.options["p"]
    rows = case.shape[0] if case.options.get("mode", "row") == "row" else 1
    kept = (torch.rand(rows, generator=generator) >= p).float() / (1 - p)
    tensors = {"noise": kept.reshape(-1, *[1] * (len(case.shape) - 1))}
    return tensors | ({"residual": torch.randn(case.shape, generator=generator)} if "residual" in case.extras else {})


# Cases ----------------------------------------------------------------------------------------------------------------


DRAWS = {
    "group_norm": of_group_norm,
    "squeeze_excite": of_squeeze_excite,
    "weight_norm": of_weight_norm,
    "stochastic_depth": of_stochastic_depth,
}


def _case(op: str, shape: Shape, *extras: str, layout: str = "contiguous", **options: Any) -> LayerCase:
    words = ["x".join(map(str, shape)), *extras, *([] if layout == "contiguous" else [layout])]
    words += [f"{k}={v}" for k, v in options.items()]
    if "tokens" in extras:
        options["layout"] = "tokens"
    fixed = ("noise",) if op == "stochastic_depth" else ()
    return LayerCase(op, " ".join(words), shape, DRAWS[op], options, extras, layout, fixed)


def typical(op: str, shape: Shape, layout: str = "contiguous") -> LayerCase:
    """The op as it stands in networks: SiLU behind the normalisation, a residual beside rows that are dropped."""
    if op == "group_norm":
        groups = next(g for g in range(min(32, shape[1]), 0, -1) if shape[1] % g == 0)
        return _case(op, shape, "affine", layout=layout, num_groups=groups, activation="silu")
    if op == "stochastic_depth":
        case = _case(op, shape, "residual", layout=layout, p=0.5)
        return replace(case, draw=lambda *a: {"residual": of_stochastic_depth(*a)["residual"]}, fixed=())
    return _case(op, shape, layout=layout)


_group_norm = functools.partial(_case, "group_norm")
_squeeze_excite = functools.partial(_case, "squeeze_excite")
_weight_norm = functools.partial(_case, "weight_norm")
_stochastic_depth = functools.partial(_case, "stochastic_depth")

CASES: list[LayerCase] = [
    _group_norm((2, 32, 17, 13), "affine", num_groups=8),
    _group_norm((2, 32, 17, 13), num_groups=32, eps=1e-3),
    _group_norm((2, 32, 17, 13), "affine", layout="channels_last", num_groups=8, activation="silu"),
    _group_norm((2, 12, 9, 7), "affine", "residual", num_groups=3, activation="relu"),
    _group_norm((2, 12, 9, 7), "affine", "film", layout="channels_last", num_groups=4, activation="gelu"),
    _group_norm((1, 8, 5, 6, 7), "affine", "residual", "film", num_groups=2, activation="leaky_relu"),
    _group_norm((1, 4, 70, 101), "affine", num_groups=1, activation="gelu_tanh"),
    _group_norm((2, 6, 9, 13), "affine", layout="transposed", num_groups=2),
    _group_norm((33, 24), "affine", num_groups=4),
    _group_norm((0, 8, 4, 4), "affine", num_groups=4),
    _squeeze_excite((2, 32, 17, 13)),
    _squeeze_excite((2, 32, 17, 13), layout="channels_last", activation="silu"),
    _squeeze_excite((2, 20, 9, 7), "residual", activation="gelu", residual_activation="relu"),
    _squeeze_excite((2, 20, 9, 7), "residual", layout="channels_last", gate="hard_sigmoid"),
    _squeeze_excite((2, 24, 9, 7), "effective", gate="hard_sigmoid"),
    _squeeze_excite((3, 65, 48), "tokens", activation="leaky_relu"),
    _squeeze_excite((1, 8, 5, 6, 7), gate="relu"),
    _squeeze_excite((2, 260, 3, 3)),
    _squeeze_excite((0, 8, 4, 4)),
    _weight_norm((65, 257)),
    _weight_norm((32, 16, 3, 3)),
    _weight_norm((3, 20011)),
    _weight_norm((16, 33, 3), dim=1),
    _weight_norm((129, 40), dim=1),
    _weight_norm((17, 31), dim=None),
    _weight_norm((33, 65), layout="transposed"),
    _stochastic_depth((9, 8, 7, 5), p=0.5),
    _stochastic_depth((9, 8, 7, 5), "residual", p=0.25),
    _stochastic_depth((9, 8, 7, 5), "residual", layout="channels_last", p=0.5),
    _stochastic_depth((5, 1025), "residual", p=0.1, mode="batch"),
    _stochastic_depth((0, 8), "residual", p=0.5),
]
