"""AdamW: torch.optim.AdamW with everything around it in the same pass over memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ._base import FusedOptimizer

DECOUPLINGS = {"lr": 0, "schedule": 1}


class AdamW(FusedOptimizer, torch.optim.AdamW):
    """AdamW in one fused step: a drop-in for `torch.optim.AdamW`.

    Per step t, with g the gradient after unscaling and clipping, and eta_t the schedule:

        m = beta1 m + (1 - beta1) g;    v = beta2 v + (1 - beta2) g^2
        theta = theta - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps) - decay theta

    Clipping, unscaling, master copies, rounding and averages happen in the same read and write of each parameter.

    Args:
        params: parameters, groups of them, or named parameters; float32, float16, bfloat16 or float64, in any dense
            layout, also DTensors (FSDP2).
        lr: learning rate; a number or a 0-d tensor.
        betas: decay of the first and the second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: how much a parameter loses of itself per step, see `decoupling`.
        amsgrad: divide by the largest second moment so far.
        maximize: follow the gradient instead of its opposite.
        foreach, fused: accepted, and kept in the state_dict; the step is fused in any case.
        capturable: accepted; a step on a GPU can always be captured in a CUDA graph.
        differentiable: must be False.
        decoupling: "lr": decay = lr * weight_decay, as torch has it; "schedule": decay = eta_t * weight_decay, the
            paper's, with eta_t = lr / the lr given at construction. A group may have its own.
        master_weights: keep a float32 copy of float16 and bfloat16 parameters and step that (`state["master_param"]`).
            Where something else writes a parameter in between (clamps it, loads a model), its copy follows.
        stochastic_rounding: round bfloat16 parameters (without master weights) and bfloat16 moments up or down at
            random, so that small steps are not lost. Counted random numbers (Philox) of seed, step and element: the
            result does not depend on threads, launches or sharding.
        max_grad_norm: clip the norm of all gradients together to this, as `torch.nn.utils.clip_grad_norm_`; the norm
            before clipping is `optimizer.grad_norm`. The gradients themselves stay as they are.
        skip_nonfinite: leave out a step in which a gradient is NaN or infinite: nothing changes, t does not advance. By
            default they reach the parameters, as in torch.
        state_dtype: torch.float32 or torch.bfloat16 moments; None: the parameter's dtype, as torch has it, or float32
            with `master_weights`. float64 parameters keep float64.
        ema_decay: keep a moving average of the parameters in float32 (`state["ema"]`), theta_ema = ema_decay
            theta_ema + (1 - ema_decay) theta, from the parameters before the first step on; `ema_weights()` puts it in
            their place for evaluation.
        fused_unscale: let torch.amp.GradScaler leave unscaling to the step, and whether there is one: the gradients
            stay scaled, and nothing waits for a GPU to say whether one is infinite. Hosts that clip by themselves
            between unscaling and the step (Lightning) need it off.
        seed: of stochastic rounding.

    Raises:
        ValueError, TypeError: for hyper-parameters, parameters or gradients that cannot be used; by a step only before
            it has changed anything. A decay of 1 or more warns.

    Note:
        The state_dict is that of `torch.optim.AdamW`, and loads into it and from it, also in mid-training; master
        copies and averages are further entries. Moments keep their dtype on loading. In `state`, parameters that were
        always stepped together share one `step`: give one a tensor of its own to change it for that one only.
        Parameters without a gradient are left alone, decay included. A step does not wait for a GPU. Inside
        torch.compile the step runs as it is, outside of the graph.

    Reference:
        Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2. Reddi et al., "On the
        Convergence of Adam and Beyond", ICLR 2018 (amsgrad).
    """

    _family = "adamw"
    _slots = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupling: str = "lr",
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
        self.decoupling = decoupling
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
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        self._check_group(defaults)
        torch.optim.Optimizer.__init__(self, params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        self._check_common(group)
        betas = group["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise ValueError(f"`betas` must be two numbers, got {betas!r}")
        for beta in betas:
            if not 0.0 <= float(beta) < 1.0:
                raise ValueError(f"`betas` must be in [0, 1), got {tuple(map(float, betas))}")
        _checks.non_negative("eps", group["eps"])

    def _slots_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self._slots if group["amsgrad"] else self._slots[:2]

    def _counts(self) -> bool:
        return True

    def _init_group(self, *args: Any, **kwargs: Any) -> Any:
        """Only the step of torch's class calls this, kept by somebody from before `swap_optimizer`."""
        raise RuntimeError(
            "a step of torch.optim.AdamW was called that had been taken before swap_optimizer: swap before a trainer, "
            "a wrapper or a variable keeps optimizer.step"
        )

    def _values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        lr, eps = group["lr"], group["eps"]
        try:
            beta1, beta2 = map(float, group["betas"])
        except (TypeError, ValueError):
            self._check_group(group)  # says what they must be
            raise
        if isinstance(lr, Tensor):
            lr = self._tensor_lr(lr) if lr.numel() == 1 else self._check_group(group)
        decay_rate = self._decay_rate(group)
        if not (lr.__class__ is Tensor or 0.0 <= lr < math.inf) or not (
            0.0 <= decay_rate < math.inf and 0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0 and 0.0 <= eps < math.inf
        ):
            self._check_group(group)
        return lr, decay_rate, -1.0 if group["maximize"] else 1.0, beta1, beta2, eps
