"""The functions that users call, one module per family."""

from .center_loss import center_loss, island_loss, sparse_center_loss, update_centers_
from .focal_loss import cross_entropy, sigmoid_focal_loss, softmax_focal_loss
from .gccs_loss import gccs_loss
from .group_norm import group_norm
from .region_biased_loss import region_biased_loss
from .squeeze_excite import squeeze_excite
from .stochastic_depth import stochastic_depth
from .weight_norm import weight_norm

__all__ = [
    "center_loss",
    "cross_entropy",
    "gccs_loss",
    "group_norm",
    "island_loss",
    "region_biased_loss",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
    "sparse_center_loss",
    "squeeze_excite",
    "stochastic_depth",
    "update_centers_",
    "weight_norm",
]
