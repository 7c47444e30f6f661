"""Fused losses, layers and optimizers of modern vision training, for NVIDIA GPUs and for CPUs."""

import torch  # noqa: F401  (before _C: the extension links against libtorch)

from . import nn, ops, optim
from ._backend import backend
from ._hf_kernels import register_with_hf_kernels
from ._info import build_info
from ._patterns.registration import register as _register
from ._patterns.report import compile_report
from ._version import __version__
from .ops import (
    center_loss,
    cross_entropy,
    gccs_loss,
    group_norm,
    island_loss,
    region_biased_loss,
    sigmoid_focal_loss,
    softmax_focal_loss,
    sparse_center_loss,
    squeeze_excite,
    stochastic_depth,
    update_centers_,
    weight_norm,
)
from .optim import restore_optimizer, swap_optimizer
from .swap import SwapReport, swap, unswap

__all__ = [
    "SwapReport",
    "__version__",
    "backend",
    "build_info",
    "center_loss",
    "compile_report",
    "cross_entropy",
    "gccs_loss",
    "group_norm",
    "island_loss",
    "nn",
    "ops",
    "optim",
    "region_biased_loss",
    "register_with_hf_kernels",
    "restore_optimizer",
    "sigmoid_focal_loss",
    "softmax_focal_loss",
    "sparse_center_loss",
    "squeeze_excite",
    "stochastic_depth",
    "swap",
    "swap_optimizer",
    "unswap",
    "update_centers_",
    "weight_norm",
]

_register()  # the backend of torch.compile, where no installed metadata names it
