"""Group normalisation: torch's own, and subclasses with an activation inside."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops.group_norm import group_norm
from ._activations import activation_of
from ._chains import Rest, is_identity
from ._classes import Fused, plain
from ._rules import Rule, mixed_dtypes
from ._tensors import is_served

FAMILY = "group_norm"


def _forward(self: Any, input: Tensor) -> Tensor:
    if not is_served(input):
        return super(Fused, self).forward(input)
    return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _fuse(self: Any, x: Tensor, rest: Rest) -> tuple[Tensor, int] | None:
    """The norm with the modulation, the residual and the activation behind it, whichever there are."""
    film, residual, activation = rest.film(), rest.residual(), rest.activation()
    if rest.end == rest.start:
        return None
    scale, shift = film or (None, None)
    y = group_norm(
        x,
        self.num_groups,
        self.weight,
        self.bias,
        self.eps,
        activation=activation,
        residual=residual,
        scale=scale,
        shift=shift,
    )
    return y, rest.end


def _with_activation(name: str, dropout: str | None = None) -> Any:
    """Forward of a norm that has its activation (and a dropout before it) as submodules."""

    def forward(self: Any, x: Tensor) -> Tensor:
        act = self._modules.get(name)
        drop = None if dropout is None else self._modules.get(dropout)
        if act is not None and is_served(x) and plain(act) and (drop is None or is_identity(drop)):
            activation = activation_of(act)
            if activation is not None or type(act) is nn.Identity:
                return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, activation=activation)
        return super(Fused, self).forward(x)

    return forward


def _check_activation(name: str, dropout: str | None = None) -> Any:
    def check(module: nn.Module) -> str:
        act = module._modules.get(name)
        if act is None or (activation_of(act) is None and type(act) is not nn.Identity):
            return f"no fused form of the activation {type(act).__name__}"
        if dropout is not None and not is_identity(module._modules.get(dropout)):
            return "a dropout between norm and activation"
        return mixed_dtypes(module)

    return check


_PLAIN = {"_dlkernels_fuse": _fuse, "_dlkernels_start": "norm"}
_TIMM_ACT = Rule(
    FAMILY,
    _with_activation("act", "drop"),
    frozenset({"517d826d3329"}),
    _check_activation("act", "drop"),
)
RULES: dict[str, Rule] = {
    "torch.nn.modules.normalization.GroupNorm": Rule(FAMILY, _forward, check=mixed_dtypes, members=_PLAIN),
    "timm.layers.norm.GroupNorm": Rule(FAMILY, _forward, frozenset({"5ff1bc386035"}), mixed_dtypes, _PLAIN),
    "timm.layers.norm.GroupNorm1": Rule(FAMILY, _forward, frozenset({"5ff1bc386035"}), mixed_dtypes, _PLAIN),
    "timm.layers.norm_act.GroupNormAct": _TIMM_ACT,
    "timm.layers.norm_act.GroupNorm1Act": _TIMM_ACT,
    "transformers.models.bit.modeling_bit.BitGroupNormActivation": Rule(
        FAMILY, _with_activation("activation"), frozenset({"1fe667996af9"}), _check_activation("activation")
    ),
}
