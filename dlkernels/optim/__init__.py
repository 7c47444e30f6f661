"""Optimizers and what belongs to them: warm restarts and the normalised weight decay."""

from .warm_restarts import CosineWarmRestarts, normalized_weight_decay

__all__ = ["CosineWarmRestarts", "normalized_weight_decay"]
