"""Modules over `dlkernels.ops`; constructors take the arguments of the modules that they replace."""

from . import utils
from .center_loss import CenterLoss, IslandLoss, SparseCenterLoss
from .focal_loss import CrossEntropyLoss, SigmoidFocalLoss, SoftmaxFocalLoss
from .gccs_loss import GCCSLoss
from .group_norm import GroupNorm
from .region_biased_loss import RegionAttention, RegionBiasedLoss
from .squeeze_excite import EffectiveSqueezeExcite, SqueezeExcite
from .stochastic_depth import StochasticDepth, stochastic_depth_rates

__all__ = [
    "CenterLoss",
    "CrossEntropyLoss",
    "EffectiveSqueezeExcite",
    "GCCSLoss",
    "GroupNorm",
    "IslandLoss",
    "RegionAttention",
    "RegionBiasedLoss",
    "SigmoidFocalLoss",
    "SoftmaxFocalLoss",
    "SparseCenterLoss",
    "SqueezeExcite",
    "StochasticDepth",
    "stochastic_depth_rates",
    "utils",
]
