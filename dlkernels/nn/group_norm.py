"""Module of group normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..ops.group_norm import group_norm
from ..reference._activation import ACTIVATIONS


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` on the fused op: same arguments, parameters and state_dict, and an activation.

    Args:
        num_groups, num_channels, eps, affine, device, dtype, bias: as torch's; `bias=False` leaves the weight alone.
        activation: None, "relu", "leaky_relu", "silu", "gelu" or "gelu_tanh".

    Shape:
        input: (N, C, d1, ...) in any layout; the output has its shape, dtype and layout.
        forward also takes `residual` (of the shape of input), `scale` and `shift` (N, C), as `dlkernels.group_norm`.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        _checks.one_of("activation", activation, ACTIVATIONS)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if affine and not bias:
            self.register_parameter("bias", None)
        self.activation = activation

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        return group_norm(
            input, self.num_groups, self.weight, self.bias, self.eps,
            activation=self.activation, residual=residual, scale=scale, shift=shift,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")
