"""Optimizers whose step is one pass over memory, and the schedule that belongs to them."""

from .adamw import AdamW
from .sgdw import SGDW
from .warm_restarts import CosineWarmRestarts, normalized_weight_decay

__all__ = ["SGDW", "AdamW", "CosineWarmRestarts", "normalized_weight_decay"]
