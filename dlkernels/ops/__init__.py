"""The functions that users call, one module per family."""

from .focal_loss import cross_entropy, sigmoid_focal_loss, softmax_focal_loss
from .gccs_loss import gccs_loss
from .group_norm import group_norm
from .squeeze_excite import squeeze_excite
from .stochastic_depth import stochastic_depth
from .weight_norm import weight_norm

__all__ = [
    "cross_entropy",
    "gccs_loss",
    "group_norm",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
    "squeeze_excite",
    "stochastic_depth",
    "weight_norm",
]
