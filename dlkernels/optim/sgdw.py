"""SGDW: stochastic gradient descent with momentum and decoupled weight decay, as the paper has it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ._base import FusedOptimizer
from .adamw import DECOUPLINGS

MOMENTUM_SCALINGS = {"paper": 0, "gradient": 1}


class SGDW(FusedOptimizer):
    """SGD with momentum and decoupled weight decay in one fused step.

    Per step, with g the gradient after unscaling and clipping, and eta_t the schedule:

        m = momentum m + lr g;    theta = theta - m - eta_t weight_decay theta

    The decay is applied once. The two colours of the paper's algorithm 1 are two algorithms, SGD with L2 regularisation
    (line 6) and SGDW (line 9); copies of it that merge them apply the decay twice.

    Args:
        params: parameters, groups of them, or named parameters; float32, float16, bfloat16 or float64, in any dense
            layout, also DTensors (FSDP2).
        lr: learning rate; a number or a 0-d tensor.
        momentum: factor of the accumulated steps, in [0, 1); 0 keeps no state.
        weight_decay: how much a parameter loses of itself per step, see `decoupling`.
        nesterov: look ahead, theta = theta - lr (g + momentum m) - ...; needs momentum_scaling="gradient".
        maximize: follow the gradient instead of its opposite.
        foreach, fused: accepted, and kept in the state_dict; the step is fused in any case.
        capturable: accepted; a step on a GPU can always be captured in a CUDA graph.
        differentiable: must be False.
        decoupling: "schedule": decay = eta_t * weight_decay, the paper's, with eta_t = lr / the lr given at
            construction; "lr": decay = lr * weight_decay, as torch.optim.AdamW has it. A group may have its own.
        momentum_scaling: "paper": the momentum accumulates lr * g, so that what was gained keeps its own learning rate;
            "gradient": it accumulates g and is multiplied by the lr of the step, as in torch.optim.SGD and in the
            authors' code. The same for a constant lr. A group may have its own.
        master_weights, stochastic_rounding, max_grad_norm, skip_nonfinite, state_dtype, ema_decay, fused_unscale, seed:
            as for `AdamW`.

    Raises:
        ValueError, TypeError: for hyper-parameters, parameters or gradients that cannot be used; by a step only before
            it has changed anything. A decay of 1 or more warns.

    Note:
        The state is `momentum_buffer`, as in `torch.optim.SGD` (in other units with momentum_scaling="paper").

    Reference:
        Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 1.
    """

    _family = "sgdw"
    _slots = ("momentum_buffer",)
    _own = ("momentum_scaling",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupling: str = "schedule",
        momentum_scaling: str = "paper",
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        state_dtype: torch.dtype | None = None,
        ema_decay: float | None = None,
        fused_unscale: bool = False,
        seed: int = 0,
    ) -> None:
        _checks.one_of("decoupling", decoupling, DECOUPLINGS)
        self.decoupling, self.momentum_scaling = decoupling, momentum_scaling
        self._set_options(
            {
                "max_grad_norm": max_grad_norm,
                "master_weights": master_weights,
                "stochastic_rounding": stochastic_rounding,
                "seed": seed,
                "state_dtype": state_dtype,
                "ema_decay": ema_decay,
                "skip_nonfinite": skip_nonfinite,
                "fused_unscale": fused_unscale,
            }
        )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        self._check_group(defaults)
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        self._check_common(group)
        if not 0.0 <= _checks.number("momentum", group["momentum"]) < 1.0:
            raise ValueError(f"`momentum` must be in [0, 1), got {group['momentum']}")
        if group.get("dampening", 0) != 0:
            raise ValueError(f"`dampening` must be 0, got {group['dampening']}: SGDW has none")
        scaling = group.get("momentum_scaling", self.momentum_scaling)
        _checks.one_of("momentum_scaling", scaling, MOMENTUM_SCALINGS)
        if group["nesterov"] and (scaling != "gradient" or group["momentum"] == 0):
            raise ValueError(
                "`nesterov` needs a momentum and momentum_scaling='gradient', "
                f"got momentum={group['momentum']}, momentum_scaling={scaling!r}"
            )

    def _slots_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._slots if group["momentum"] != 0 else ()

    def _counts(self) -> bool:
        return bool(self.stochastic_rounding)

    def _values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        lr, momentum = group["lr"], group["momentum"]
        if isinstance(lr, Tensor):
            lr = self._tensor_lr(lr) if lr.numel() == 1 else self._check_group(group)
        decay_rate = self._decay_rate(group)
        paper = group.get("momentum_scaling", self.momentum_scaling) == "paper"
        if (
            not (lr.__class__ is Tensor or 0.0 <= lr < math.inf)
            or not (0.0 <= decay_rate < math.inf and 0.0 <= momentum < 1.0)
            or (group["nesterov"] and (paper or not momentum))
        ):
            self._check_group(group)
        sign = -1.0 if group["maximize"] else 1.0
        return lr, decay_rate, sign, float(momentum), float(paper), float(group["nesterov"])
