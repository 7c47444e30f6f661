"""The functions that users call, one module per family."""

from .focal_loss import cross_entropy, sigmoid_focal_loss, softmax_focal_loss
from .group_norm import group_norm
from .region_biased_loss import region_biased_loss
from .squeeze_excite import squeeze_excite
from .stochastic_depth import stochastic_depth
from .weight_norm import weight_norm

__all__ = [
    "cross_entropy",
    "group_norm",
    "region_biased_loss",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
    "squeeze_excite",
    "stochastic_depth",
    "weight_norm",
]
