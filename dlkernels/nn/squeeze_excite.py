"""Modules of squeeze-and-excitation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..ops.squeeze_excite import HIDDEN_ACTIVATIONS, LAYOUTS, squeeze_excite
from ..reference._activation import ACTIVATIONS, GATES

# The two layers under the names that others give them: timm, torchvision, MONAI, transformers, fvcore, smp.
_TWO_LAYERS = (
    ("conv_reduce", "conv_expand"), ("reduce", "expand"), ("conv1", "conv2"), ("fc.0", "fc.2"), ("block.0", "block.2"),
    ("attention.0", "attention.2"), ("convolutions.0", "convolutions.2"),
)  # fmt: skip


class _Gated(nn.Module):
    """What both forms share: layers that are 1x1 convolutions or Linear, and loading either kind into the other."""

    _aliases: tuple[tuple[str, ...], ...] = ()
    _layers: tuple[str, ...] = ()

    def _layer(self, layout: str, inputs: int, outputs: int, bias: bool, **where: Any) -> nn.Module:
        if layout == "channels_first":
            return nn.Conv2d(inputs, outputs, 1, bias=bias, **where)
        return nn.Linear(inputs, outputs, bias=bias, **where)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for names in self._aliases:
            if prefix + f"{names[0]}.weight" in state_dict:
                for theirs, ours in zip(names, self._layers, strict=True):
                    for kind in ("weight", "bias"):
                        if prefix + f"{theirs}.{kind}" in state_dict:
                            state_dict[prefix + f"{ours}.{kind}"] = state_dict.pop(prefix + f"{theirs}.{kind}")
        for name in self._layers:
            key, own = prefix + f"{name}.weight", getattr(self, name).weight
            given = state_dict.get(key)
            if given is not None and given.dim() != own.dim() and given.numel() == own.numel():
                state_dict[key] = given.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class SqueezeExcite(_Gated):
    """`dlkernels.squeeze_excite` as a module, with the layers `fc1` and `fc2`.

    Args:
        channels: C.
        reduction: the hidden layer has max(1, C // reduction) units.
        bias: of both layers.
        hidden_channels: R itself, in place of `reduction`.
        rd_divisor: round C / reduction to a multiple of this, as timm does with 8.
        activation, gate, residual_activation, layout: as in the function.
        device, dtype: of the parameters.

    Shape:
        x: (N, C, d1, ...); (N, d1, ..., C) for "channels_last"; (B, N, C) for "tokens". The output is like x.
        forward also takes `residual`, of the shape of x.

    The layers are 1x1 convolutions for "channels_first", else Linear; the state_dicts of the modules of timm,
    torchvision, MONAI, transformers and fvcore load, whichever of the two they use and whatever they call them.
    """

    _aliases = _TWO_LAYERS
    _layers = ("fc1", "fc2")

    def __init__(
        self,
        channels: int,
        reduction: float = 16,
        bias: bool = True,
        *,
        hidden_channels: int | None = None,
        rd_divisor: int | None = None,
        activation: str = "relu",
        gate: str = "sigmoid",
        residual_activation: str | None = None,
        layout: str = "channels_first",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.one_of("activation", activation, HIDDEN_ACTIVATIONS)
        _checks.one_of("gate", gate, GATES)
        _checks.one_of("residual_activation", residual_activation, ACTIVATIONS)
        _checks.one_of("layout", layout, LAYOUTS)
        if hidden_channels is None:
            hidden_channels = max(1, int(channels // reduction))
            if rd_divisor is not None:
                hidden_channels = max(rd_divisor, int(channels / reduction + rd_divisor / 2) // rd_divisor * rd_divisor)
        where = {"device": device, "dtype": dtype}
        self.fc1 = self._layer(layout, channels, hidden_channels, bias, **where)
        self.fc2 = self._layer(layout, hidden_channels, channels, bias, **where)
        self.activation = activation
        self.gate = gate
        self.residual_activation = residual_activation
        self.layout = layout

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return squeeze_excite(
            x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias, activation=self.activation,
            gate=self.gate, residual=residual, residual_activation=self.residual_activation, layout=self.layout,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, gate={self.gate!r}, layout={self.layout!r}"


class EffectiveSqueezeExcite(_Gated):
    """Squeeze-and-excitation with one layer, `fc`: no bottleneck.

    Args:
        channels: C.
        bias: of the layer.
        gate, residual_activation, layout: as in `dlkernels.squeeze_excite`; timm's gate is "hard_sigmoid".
        device, dtype: of the parameters.

    Shape:
        x: (N, C, d1, ...); (N, d1, ..., C) for "channels_last"; (B, N, C) for "tokens". The output is like x.
        forward also takes `residual`, of the shape of x.
    """

    _layers = ("fc",)

    def __init__(
        self,
        channels: int,
        bias: bool = True,
        *,
        gate: str = "hard_sigmoid",
        residual_activation: str | None = None,
        layout: str = "channels_first",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _checks.one_of("gate", gate, GATES)
        _checks.one_of("residual_activation", residual_activation, ACTIVATIONS)
        _checks.one_of("layout", layout, LAYOUTS)
        self.fc = self._layer(layout, channels, channels, bias, device=device, dtype=dtype)
        self.gate = gate
        self.residual_activation = residual_activation
        self.layout = layout

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return squeeze_excite(
            x, None, None, self.fc.weight, self.fc.bias, gate=self.gate, residual=residual,
            residual_activation=self.residual_activation, layout=self.layout,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"gate={self.gate!r}, layout={self.layout!r}"
