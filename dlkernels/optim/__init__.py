"""Optimizers whose step is one pass over memory, and the schedule that belongs to them."""

from ._swap import restore_optimizer, swap_optimizer
from .adamw import AdamW
from .sgdw import SGDW
from .warm_restarts import CosineWarmRestarts, normalized_weight_decay

__all__ = [
    "SGDW",
    "AdamW",
    "CosineWarmRestarts",
    "normalized_weight_decay",
    "restore_optimizer",
    "swap_optimizer",
]
