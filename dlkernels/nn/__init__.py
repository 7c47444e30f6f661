"""Modules over `dlkernels.ops`; constructors take the arguments of the modules that they replace."""

from .focal_loss import CrossEntropyLoss, SigmoidFocalLoss, SoftmaxFocalLoss
from .group_norm import GroupNorm
from .squeeze_excite import EffectiveSqueezeExcite, SqueezeExcite

__all__ = [
    "CrossEntropyLoss",
    "EffectiveSqueezeExcite",
    "GroupNorm",
    "SigmoidFocalLoss",
    "SoftmaxFocalLoss",
    "SqueezeExcite",
]
