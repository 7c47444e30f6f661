"""Optimizers whose step is one pass over memory, and the schedule that belongs to them."""

from .adamw import AdamW
from .sgdw import SGDW

__all__ = ["SGDW", "AdamW"]
