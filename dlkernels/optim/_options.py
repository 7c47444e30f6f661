"""The options of a whole optimizer."""

from __future__ import annotations

from typing import Any

import torch

from .. import _checks

# Options of the whole optimizer and not of a group, with their defaults.
OPTIONS: dict[str, Any] = {
    "max_grad_norm": None,
    "master_weights": False,
    "stochastic_rounding": False,
    "seed": 0,
    "state_dtype": None,
    "ema_decay": None,
    "skip_nonfinite": False,
    "fused_unscale": False,
}


def check_options(o: dict[str, Any]) -> None:
    """Raise for one that cannot be; they are attributes, and may have been set since construction."""
    if o["max_grad_norm"] is not None and not _checks.number("max_grad_norm", o["max_grad_norm"]) > 0:
        raise ValueError(f"`max_grad_norm` must be > 0 or None, got {o['max_grad_norm']}")
    if o["ema_decay"] is not None:
        _checks.in_unit_interval("ema_decay", o["ema_decay"])
    if o["state_dtype"] not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"`state_dtype` must be torch.float32, torch.bfloat16 or None, got {o['state_dtype']}")
    seed = _checks.integer("seed", o["seed"])
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"`seed` must be in [0, 2**64), got {seed}")
