"""Stochastic depth by whichever name: DropPath of timm, MONAI and transformers, StochasticDepth of torchvision.

From one seed the masks are theirs: noise is drawn as they draw it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.stochastic_depth import stochastic_depth
from ._chains import Rest
from ._classes import Fused
from ._rules import Rule, fingerprint
from ._tensors import is_served

FAMILY = "stochastic_depth"
Draw = Callable[[Any, Tensor], tuple[float, str, Tensor | None]]  # (module, x) -> p, mode, noise or None


def _torchvision(self: Any, x: Tensor) -> tuple[float, str, Tensor | None]:
    return self.p, self.mode, None


def _bernoulli(self: Any, x: Tensor) -> tuple[float, str, Tensor | None]:
    if self.scale_by_keep:
        return self.drop_prob, "row", None
    keep = 1 - self.drop_prob
    return self.drop_prob, "row", x.new_empty((x.shape[0],)).bernoulli_(keep)


def _uniform(self: Any, x: Tensor) -> tuple[float, str, Tensor | None]:
    keep = 1 - self.drop_prob
    noise = torch.floor(torch.rand((x.shape[0],), dtype=x.dtype, device=x.device) + keep)
    return self.drop_prob, "row", noise / keep


def _rule(rate: str, draw: Draw, fingerprints: set[str], helper: str = "", of_helper: str = "") -> Rule:
    """`rate`: the attribute with the probability. `helper`: a function that forward calls, known by `of_helper`."""

    def drops(self: Any) -> bool:
        return self.training and getattr(self, rate) > 0

    def call(self: Any, x: Tensor, residual: Tensor | None) -> Tensor:
        p, mode, noise = draw(self, x)
        return stochastic_depth(x, p, mode, True, residual=residual, noise=noise)

    def forward(self: Any, x: Tensor) -> Tensor:
        if not drops(self) or not is_served(x):
            return super(Fused, self).forward(x)
        return call(self, x, None)

    def fuse(self: Any, x: Tensor, rest: Rest) -> tuple[Tensor, int] | None:
        if not drops(self):
            return None
        residual = rest.residual()
        return None if residual is None else (call(self, x, residual), rest.end)

    def check(module: nn.Module) -> str:
        p = getattr(module, rate, None)
        if not isinstance(p, int | float) or not 0 <= p < 1:
            return f"{rate} is {p}, not a number in [0, 1)"
        if helper:
            place = sys.modules[_defining(type(module)).__module__]
            function = getattr(type(module), helper, None) or getattr(place, helper, None)
            if fingerprint(function) != of_helper:
                return f"its {helper} is not one that is known (source {fingerprint(function) or 'not found'})"
        return ""

    members = {"_dlkernels_drop": True, "_dlkernels_start": "drop", "drops": drops, "_dlkernels_fuse": fuse}
    return Rule(FAMILY, forward, frozenset(fingerprints), check, members)


def _defining(cls: type) -> type:
    """The class that forward is from."""
    return next(base for base in cls.__mro__ if "forward" in base.__dict__ and not issubclass(base, Fused))


RULES: dict[str, Rule] = {
    "torchvision.ops.stochastic_depth.StochasticDepth": _rule(
        "p", _torchvision, {"a1774ff924be"}, "stochastic_depth", "afe47aab410a"
    ),
    "timm.layers.drop.DropPath": _rule("drop_prob", _bernoulli, {"2fb624985504"}, "drop_path", "5fad0e66b9cf"),
    "monai.networks.layers.drop_path.DropPath": _rule(
        "drop_prob", _bernoulli, {"614132c6b970"}, "drop_path", "9b9d85725689"
    ),
}

# Of transformers, where each model has a class of its own that does the same.
UNIFORM = _rule("drop_prob", _uniform, {"82409ebf7a87"})
