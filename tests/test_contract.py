"""The contract of every op: what a user of PyTorch takes for granted.

A new op inherits all of it by adding an `OpCase` to OPS. What cannot apply to it is said there, with the reason.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import math
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import dlkernels as dk
from dlkernels import _backend, _library, testing

Make = Callable[[torch.dtype, int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class OpCase:
    """One op with one set of options.

    name: "op/options". The first case of an op also runs the checks that take long.
    call: the public function of the tensors from `make`; returns one tensor.
    make: (dtype, batch) -> CPU tensors, the batch in dimension 0 of those in `batched`. Distinct values everywhere.
    wants_grad: positions of the tensors that the op is differentiable in.
    batched: positions of the tensors whose dimension 0 is the batch.
    reduced: the output is a scalar, over the batch too.
    module: the same as a module, called with the same tensors.
    kernels: names of the registered operators that a call and its backward pass use.
    higher_order: `call` takes higher_order=.
    of_nothing: what a mean over an empty batch is; a sum is 0.
    image: a maker of 4-D tensors, for channels_last; None where the op has no such input.
    keeps_layout: a channels_last input gives a channels_last output (its gradient is channels_last in any case).
    not_applicable: {check: reason}.
    """

    name: str
    call: Callable[..., Tensor]
    make: Make
    kernels: tuple[str, ...]
    module: Callable[[], torch.nn.Module]
    image: Make | None = None
    wants_grad: tuple[int, ...] = (0,)
    batched: tuple[int, ...] = (0, 1)
    reduced: bool = True
    keeps_layout: bool = False
    higher_order: bool = True
    of_nothing: float = float("nan")
    not_applicable: dict[str, str] = field(default_factory=dict)

    @property
    def op(self) -> str:
        return self.name.split("/")[0]


# Inputs ---------------------------------------------------------------------------------------------------------------


def seeded(*sizes: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(sizes) % 2**31)


def logits(dtype: torch.dtype, *shape: int) -> Tensor:
    return (3 * torch.randn(shape, generator=seeded(*shape), dtype=torch.float64)).to(dtype)


def labels(low: int, high: int, *shape: int, ignore: int | None = None) -> Tensor:
    y = torch.randint(low, high, shape, generator=seeded(*shape, 1))
    if ignore is not None and y.numel() > 2:
        y.view(-1)[2::7] = ignore
    return y


def probabilities(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.softmax(logits(torch.float64, *shape).flip(0), 1).to(dtype)


def class_weights(dtype: torch.dtype, classes: int) -> Tensor:
    return torch.linspace(0.25, 2.0, classes, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def weights(dtype: torch.dtype, *shape: int) -> Tensor:
    return logits(dtype, *shape) / 3 + 0.25


def se_weights(dtype: torch.dtype, channels: int, hidden: int) -> tuple[Tensor, ...]:
    """w1, b1, w2, b2."""
    shapes = ((hidden, channels), (hidden,), (channels, hidden), (channels,))
    return tuple(weights(dtype, *shape) for shape in shapes)


def drop_factors(dtype: torch.dtype, n: int) -> Tensor:
    """Some rows dropped, the others each with a factor of its own."""
    kept = 1.25 + 0.125 * (torch.arange(n) % 7)
    return torch.where(torch.arange(n) % 3 == 1, 0.0, kept).to(dtype)


def some_crops(n: int, regions: int) -> Tensor:
    """Three of four regions take part; in every ninth row none does."""
    rows, columns = torch.arange(n).unsqueeze(1), torch.arange(regions)
    return ((rows + columns) % 4 != 1) & (rows % 9 != 4)


# The ops --------------------------------------------------------------------------------------------------------------

SIGMOID = ("sigmoid_focal_loss_fwd", "sigmoid_focal_loss_bwd")
SOFTMAX = ("softmax_focal_loss_fwd", "softmax_focal_loss_bwd")
STORED = ("scale_stored_grad",)
GCCS = ("gccs_loss_fwd", "gccs_loss_bwd")
GROUP_NORM = ("group_norm_fwd", "group_norm_bwd")
WEIGHT_NORM = ("weight_norm_fwd", "weight_norm_bwd")
STOCHASTIC_DEPTH = ("stochastic_depth_fwd",)
REGION_BIASED = ("region_biased_loss_fwd", "region_biased_loss_bwd")
CENTER = ("center_loss_fwd", "center_loss_bwd")
ISLAND = ("island_pairs_fwd", "island_pairs_bwd")
SQUEEZE_EXCITE = ("squeeze_excite_fwd", "squeeze_excite_bwd")
KEEPS_INPUTS = {"higher_order_off": "a gradient in the centers needs the inputs, which are kept whatever was asked for"}
LAYER: dict[str, Any] = {"reduced": False, "keeps_layout": True, "higher_order": False}
LINEAR = {"second_derivative_in_float32": "linear in all its inputs: no gradient depends on one"}
PIECEWISE_LINEAR = {"second_derivative_in_float32": "piecewise linear: the gradient does not depend on the input"}
# Arguments of operators that have a gradient. A loss's `weight` is a constant, so are centers beside stored gradients.
DIFFERENTIABLE = ("input", "grad_output", "features", "attention")
DIFFERENTIABLE += ("bias", "residual", "scale", "shift", "w1", "b1", "w2", "b2", "v", "g")

OPS = [
    OpCase(
        "sigmoid_focal_loss/mean",
        lambda x, y, **more: dk.sigmoid_focal_loss(x, y, 0.25, 2.0, "mean", **more),
        lambda dtype, n: (logits(dtype, n, 7), labels(0, 2, n, 7).to(dtype)),
        SIGMOID + STORED,
        lambda: dk.nn.SigmoidFocalLoss(0.25, 2.0, "mean"),
        image=lambda dtype, n: (logits(dtype, n, 5, 3, 4), labels(0, 2, n, 5, 3, 4).to(dtype)),
    ),
    OpCase(
        "sigmoid_focal_loss/none",
        lambda x, y, **more: dk.sigmoid_focal_loss(x, y, 0.4, 1.5, **more),
        lambda dtype, n: (logits(dtype, n, 7), torch.sigmoid(logits(dtype, n, 7).flip(0))),
        SIGMOID,
        lambda: dk.nn.SigmoidFocalLoss(0.4, 1.5, "none"),
        image=lambda dtype, n: (logits(dtype, n, 5, 3, 4), torch.sigmoid(logits(dtype, n, 5, 3, 4).flip(1))),
        reduced=False,
        keeps_layout=True,
    ),
    OpCase(
        "sigmoid_focal_loss/classes",
        lambda x, y, **more: dk.sigmoid_focal_loss(x, y, None, 0.5, "sum", ignore_index=-2, normalizer=3.5, **more),
        lambda dtype, n: (logits(dtype, n, 3, 7), labels(-1, 7, n, 3, ignore=-2)),
        SIGMOID + STORED,
        lambda: _WithNormalizer(dk.nn.SigmoidFocalLoss(None, 0.5, "sum", ignore_index=-2), 3.5),
    ),
    OpCase(
        "softmax_focal_loss/mean",
        lambda z, y, a, **more: dk.softmax_focal_loss(z, y, a, 2.0, label_smoothing=0.1, ignore_index=2, **more),
        lambda dtype, n: (logits(dtype, n, 7), labels(0, 7, n, ignore=2), class_weights(dtype, 7)),
        SOFTMAX + STORED,
        lambda: _WithBuffer(dk.nn.SoftmaxFocalLoss, "alpha", gamma=2.0, label_smoothing=0.1, ignore_index=2),
        image=lambda dtype, n: (
            logits(dtype, n, 5, 3, 4),
            labels(0, 5, n, 3, 4, ignore=2),
            class_weights(dtype, 5),
        ),
    ),
    OpCase(
        "softmax_focal_loss/none",
        lambda z, y, **more: dk.softmax_focal_loss(z, y, 0.25, 3.7, "none", **more),
        lambda dtype, n: (logits(dtype, n, 5, 3), labels(0, 5, n, 3, ignore=-100)),
        SOFTMAX,
        lambda: dk.nn.SoftmaxFocalLoss(0.25, 3.7, "none"),
        image=lambda dtype, n: (logits(dtype, n, 5, 3, 4), labels(0, 5, n, 3, 4, ignore=-100)),
        reduced=False,
    ),
    OpCase(
        "softmax_focal_loss/probabilities",
        lambda z, q, **more: dk.softmax_focal_loss(z, q, None, 0.5, "sum", normalizer=2.5, **more),
        lambda dtype, n: (logits(dtype, n, 7), probabilities(dtype, n, 7)),
        SOFTMAX + STORED,
        lambda: _WithNormalizer(dk.nn.SoftmaxFocalLoss(None, 0.5, "sum"), 2.5),
    ),
    OpCase(
        "cross_entropy/mean",
        lambda z, y, w, **more: dk.cross_entropy(z, y, w, ignore_index=-1, **more),
        lambda dtype, n: (logits(dtype, n, 7), labels(0, 7, n, ignore=-1), class_weights(dtype, 7)),
        SOFTMAX + STORED,
        lambda: _WithBuffer(dk.nn.CrossEntropyLoss, "weight", ignore_index=-1),
        image=lambda dtype, n: (
            logits(dtype, n, 5, 3, 4),
            labels(0, 5, n, 3, 4, ignore=-1),
            class_weights(dtype, 5),
        ),
    ),
    OpCase(
        "cross_entropy/none",
        lambda z, y, **more: dk.cross_entropy(z, y, reduction="none", label_smoothing=0.1, **more),
        lambda dtype, n: (logits(dtype, n, 5, 3), labels(0, 5, n, 3, ignore=-100)),
        SOFTMAX,
        lambda: dk.nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1),
        image=lambda dtype, n: (logits(dtype, n, 5, 3, 4), labels(0, 5, n, 3, 4, ignore=-100)),
        reduced=False,
    ),
    OpCase(
        "cross_entropy/probabilities",
        lambda z, q, **more: dk.cross_entropy(z, q, reduction="sum", label_smoothing=0.2, **more),
        lambda dtype, n: (logits(dtype, n, 7), probabilities(dtype, n, 7)),
        SOFTMAX + STORED,
        lambda: dk.nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.2),
    ),
    OpCase(
        "region_biased_loss/mean",
        lambda x, m, **more: dk.region_biased_loss(
            x, origin_index=-1, margin=0.9, normalize="softmax", mask=m.bool(), **more
        ),
        lambda dtype, n: (logits(dtype, n, 7), some_crops(n, 7)),
        REGION_BIASED + STORED,
        lambda: dk.nn.RegionBiasedLoss(-1, 0.9, "softmax"),
        not_applicable={"empty_batch": "no torch reference to follow: the mean over no row is 0, not NaN"},
    ),
    OpCase(
        "region_biased_loss/none",
        lambda x, **more: dk.region_biased_loss(x, origin_index=2, margin=3.5, reduction="none", **more),
        lambda dtype, n: (logits(dtype, n, 5),),
        REGION_BIASED,
        lambda: dk.nn.RegionBiasedLoss(2, 3.5, reduction="none"),
        batched=(0,),
        reduced=False,
        not_applicable=PIECEWISE_LINEAR,
    ),
    OpCase(
        "gccs_loss/sum",
        lambda z, y, **more: dk.gccs_loss(z, y, target_mean=4.0, target_std=1.5, **more),
        lambda dtype, n: (logits(dtype, n, 5), labels(0, 5, n, ignore=-100)),
        GCCS + STORED,
        lambda: dk.nn.GCCSLoss(target_mean=4.0, target_std=1.5),
    ),
    OpCase(
        "gccs_loss/none",
        lambda z, y, **more: dk.gccs_loss(
            z, y, target_mean=7.0, kurtosis_weight=0.25, reduction="none", ignore_index=2, eps=1e-3, **more
        ),
        lambda dtype, n: (logits(dtype, n, 5), labels(-1, 5, n)),
        GCCS,
        lambda: dk.nn.GCCSLoss(target_mean=7.0, kurtosis_weight=0.25, reduction="none", ignore_index=2, eps=1e-3),
        reduced=False,
        not_applicable={
            "empty_batch": "one number per class, whatever the batch: tests/ops/test_gccs_loss.py has its empty ones",
        },
    ),
    OpCase(
        "group_norm/affine",
        lambda x, w, b: dk.group_norm(x, 3, w, b),
        lambda dtype, n: (logits(dtype, n, 6, 7), weights(dtype, 6), weights(dtype, 6).flip(0)),
        GROUP_NORM,
        lambda: _Functional(dk.nn.GroupNorm(3, 6), "weight", "bias"),
        image=lambda dtype, n: (logits(dtype, n, 6, 3, 4), weights(dtype, 6), weights(dtype, 6).flip(0)),
        wants_grad=(0, 1, 2),
        batched=(0,),
        **LAYER,
    ),
    OpCase(
        "group_norm/modulated",
        lambda x, w, b, r, scale, shift: dk.group_norm(
            x, 2, w, b, 1e-3, activation="silu", residual=r, scale=scale, shift=shift
        ),
        lambda dtype, n: (
            *(logits(dtype, n, 6, 5), weights(dtype, 6), weights(dtype, 6).flip(0)),
            *(logits(dtype, n, 5, 6).mT, 0.2 * logits(dtype, n, 6), 0.3 * logits(dtype, n, 6).flip(0)),
        ),
        GROUP_NORM,
        lambda: _Functional(dk.nn.GroupNorm(2, 6, 1e-3, activation="silu"), "weight", "bias"),
        wants_grad=(0, 1, 2, 3, 4, 5),
        batched=(0, 3, 4, 5),
        **LAYER,
    ),
    OpCase(
        "group_norm/bare",
        lambda x, r: dk.group_norm(x, 1, activation="gelu", residual=r),
        lambda dtype, n: (logits(dtype, n, 5, 4), logits(dtype, n, 4, 5).mT),
        GROUP_NORM,
        lambda: dk.nn.GroupNorm(1, 5, affine=False, activation="gelu"),
        image=lambda dtype, n: (logits(dtype, n, 5, 3, 4), logits(dtype, n, 4, 3, 5).transpose(1, 3)),
        wants_grad=(0, 1),
        batched=(0, 1),
        **LAYER,
    ),
    OpCase(
        "squeeze_excite/two_layers",
        lambda x, w1, b1, w2, b2: dk.squeeze_excite(x, w1, b1, w2, b2),
        lambda dtype, n: (logits(dtype, n, 6, 7), *se_weights(dtype, 6, 4)),
        SQUEEZE_EXCITE,
        lambda: _Functional(
            dk.nn.SqueezeExcite(6, hidden_channels=4, layout="channels_first"),
            *("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"),
        ),
        image=lambda dtype, n: (logits(dtype, n, 6, 3, 4), *se_weights(dtype, 6, 4)),
        wants_grad=(0, 1, 2, 3, 4),
        batched=(0,),
        **LAYER,
    ),
    OpCase(
        "squeeze_excite/residual",
        lambda x, w1, w2, r: dk.squeeze_excite(
            x, w1, None, w2, None, activation="silu", gate="hard_sigmoid", residual=r, residual_activation="gelu_tanh"
        ),
        lambda dtype, n: (logits(dtype, n, 6, 5), *se_weights(dtype, 6, 4)[::2], logits(dtype, n, 5, 6).mT),
        SQUEEZE_EXCITE,
        lambda: _Functional(
            dk.nn.SqueezeExcite(
                6,
                bias=False,
                hidden_channels=4,
                activation="silu",
                gate="hard_sigmoid",
                residual_activation="gelu_tanh",
            ),
            *("fc1.weight", "fc2.weight"),
        ),
        wants_grad=(0, 1, 2, 3),
        batched=(0, 3),
        **LAYER,
    ),
    OpCase(
        "squeeze_excite/effective",
        lambda x, w, b: dk.squeeze_excite(x, None, None, w, b, layout="tokens"),
        lambda dtype, n: (logits(dtype, n, 5, 6), *se_weights(dtype, 6, 6)[2:]),
        SQUEEZE_EXCITE,
        lambda: _Functional(dk.nn.EffectiveSqueezeExcite(6, gate="sigmoid", layout="tokens"), "fc.weight", "fc.bias"),
        wants_grad=(0, 1, 2),
        batched=(0,),
        **LAYER,
    ),
    OpCase(
        "weight_norm/rows",
        lambda v, g: dk.weight_norm(v, g),
        lambda dtype, n: (logits(dtype, n, 7), weights(dtype, n, 1)),
        WEIGHT_NORM,
        lambda: _WeightNormed(0),
        image=lambda dtype, n: (logits(dtype, n, 5, 3, 4), weights(dtype, n, 1, 1, 1)),
        wants_grad=(0, 1),
        batched=(0, 1),
        **LAYER,
    ),
    OpCase(
        "weight_norm/middle",
        lambda v, g: dk.weight_norm(v, g, 1),
        lambda dtype, n: (logits(dtype, n, 4, 3), weights(dtype, 1, 4, 1)),
        WEIGHT_NORM,
        lambda: _WeightNormed(1),
        image=lambda dtype, n: (logits(dtype, n, 4, 9, 8), weights(dtype, 1, 4, 1, 1)),
        wants_grad=(0, 1),
        batched=(0,),
        **LAYER,
    ),
    OpCase(
        "weight_norm/whole",
        lambda v, g: dk.weight_norm(v, g, None),
        lambda dtype, n: (logits(dtype, n, 5), weights(dtype, 1, 1)),
        WEIGHT_NORM,
        lambda: _WeightNormed(None),
        wants_grad=(0, 1),
        batched=(0,),
        **LAYER,
    ),
    OpCase(
        "stochastic_depth/row",
        lambda x, f: dk.stochastic_depth(x, 0.4, noise=f),
        lambda dtype, n: (logits(dtype, n, 7), drop_factors(dtype, n)),
        STOCHASTIC_DEPTH,
        lambda: _WithNoise(dk.nn.StochasticDepth(0.4)),
        image=lambda dtype, n: (logits(dtype, n, 5, 3, 4), drop_factors(dtype, n)),
        not_applicable=LINEAR,
        **LAYER,
    ),
    OpCase(
        "stochastic_depth/residual",
        lambda x, f, r: dk.stochastic_depth(x, 0.4, noise=f, residual=r.to(x.dtype)),
        lambda dtype, n: (logits(dtype, n, 5, 4), drop_factors(dtype, n), logits(dtype, n, 4, 5).mT),
        STOCHASTIC_DEPTH,
        lambda: _WithNoise(dk.nn.StochasticDepth(0.4)),
        image=lambda dtype, n: (
            *(logits(dtype, n, 5, 3, 4), drop_factors(dtype, n)),
            logits(dtype, n, 5, 4, 3).mT.contiguous(),
        ),
        wants_grad=(0, 2),
        batched=(0, 1, 2),
        not_applicable={
            **LINEAR,
            "channels_last_in_channels_last_out": "the residual's gradient is the upstream one itself, as it lies",
        },
        **LAYER,
    ),
    OpCase(
        "center_loss/mean",
        lambda x, c, y, **more: dk.center_loss(x, y, c, ignore_index=1, **more),
        lambda dtype, n: (logits(dtype, n, 7), weights(dtype, 5, 7), labels(-1, 5, n, ignore=1)),
        CENTER,
        lambda: _Functional(dk.nn.CenterLoss(5, 7, update="grad", ignore_index=1), "centers"),
        wants_grad=(0, 1),
        batched=(0, 2),
        of_nothing=0.0,
        not_applicable=KEEPS_INPUTS,
    ),
    OpCase(
        "center_loss/none",
        lambda x, c, y, **more: dk.center_loss(x, y, c, reduction="none", **more),
        lambda dtype, n: (logits(dtype, n, 7), weights(dtype, 5, 7), labels(-1, 5, n, ignore=-100)),
        CENTER,
        lambda: _Functional(dk.nn.CenterLoss(5, 7, update="grad", reduction="none"), "centers"),
        wants_grad=(0, 1),
        batched=(0, 2),
        reduced=False,
    ),
    OpCase(
        "center_loss/sum",
        lambda x, c, y, **more: dk.center_loss(x, y, c, reduction="sum", **more),
        lambda dtype, n: (logits(dtype, n, 7), weights(dtype, 5, 7), labels(0, 5, n)),
        CENTER + STORED,
        lambda: _Functional(dk.nn.CenterLoss(5, 7, update="grad", reduction="sum"), "centers"),
        batched=(0, 2),
    ),
    OpCase(
        "center_loss/attention",
        lambda x, c, y, a, **more: dk.sparse_center_loss(x, y, c, a, ignore_index=2, **more),
        lambda dtype, n: (
            *(logits(dtype, n, 7), weights(dtype, 5, 7), labels(0, 5, n, ignore=2)),
            torch.sigmoid(logits(torch.float64, n, 7).flip(0)).to(dtype),
        ),
        CENTER,
        lambda: _Functional(dk.nn.SparseCenterLoss(5, 7, update="grad", ignore_index=2), "centers"),
        wants_grad=(0, 1, 3),
        batched=(0, 2, 3),
        not_applicable={
            **KEEPS_INPUTS,
            "python_reads_no_value": "on CPUs an attention, unlike its logits, is checked to be in [0, 1]",
        },
    ),
    OpCase(
        "center_loss/logits",
        lambda x, c, y, a, **more: dk.sparse_center_loss(x, y, c, a, reduction="sum", attention_logits=True, **more),
        lambda dtype, n: (
            *(logits(dtype, n, 7), weights(dtype, 5, 7), labels(-1, 5, n)),
            weights(dtype, n, 7).flip(0),
        ),
        CENTER + STORED,
        lambda: _Functional(
            dk.nn.SparseCenterLoss(5, 7, update="grad", reduction="sum", attention_logits=True), "centers"
        ),
        wants_grad=(0, 3),
        batched=(0, 2, 3),
    ),
    OpCase(
        "center_loss/island",
        lambda x, c, y, **more: dk.island_loss(x, y, c, 0.5, **more),
        lambda dtype, n: (logits(dtype, n, 7), weights(dtype, 5, 7), labels(0, 5, n, ignore=-1)),
        CENTER + ISLAND,
        lambda: _Functional(dk.nn.IslandLoss(5, 7, 0.5, update="grad"), "centers"),
        wants_grad=(0, 1),
        batched=(0, 2),
        not_applicable={
            **KEEPS_INPUTS,
            "empty_batch": "the pairs of the centers remain, whatever the batch",
        },
    ),
]


class _WeightNormed(torch.nn.Module):
    """The parametrization, called with (v, g): torch has them the other way round."""

    def __init__(self, dim: int | None) -> None:
        super().__init__()
        layer = dk.nn.utils.parametrizations.weight_norm(torch.nn.Conv2d(2, 2, 1), dim=dim)
        self.weight_norm = layer.parametrizations["weight"][0]

    def forward(self, v: Tensor, g: Tensor) -> Tensor:
        return self.weight_norm(g, v)


class _WithNoise(torch.nn.Module):
    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, noise: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.layer(x, residual, noise=noise)


class _Functional(torch.nn.Module):
    """A layer called with its parameters: (x, *parameters, *further inputs)."""

    def __init__(self, layer: torch.nn.Module, *names: str) -> None:
        super().__init__()
        self.layer, self.names = layer, names

    def forward(self, x: Tensor, *tensors: Tensor) -> Tensor:
        shapes = [self.layer.get_parameter(name).shape for name in self.names]
        own = {name: t.view(shape) for name, t, shape in zip(self.names, tensors, shapes)}
        return torch.func.functional_call(self.layer, own, (x, *tensors[len(self.names) :]))


class _WithNormalizer(torch.nn.Module):
    def __init__(self, loss: torch.nn.Module, normalizer: float) -> None:
        super().__init__()
        self.loss, self.normalizer = loss, normalizer

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(x, y, self.normalizer)


class _WithBuffer(torch.nn.Module):
    """A module whose per-class weights are a buffer; called with them, it checks that they are the same."""

    def __init__(self, cls: type[torch.nn.Module], name: str, **options: Any) -> None:
        super().__init__()
        self.loss = cls(**{name: class_weights(torch.float32, 7)}, **options)

    def forward(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        return self.loss(x, y)


# Helpers --------------------------------------------------------------------------------------------------------------

CHECKS: list[str] = []


def contract(only: Callable[[OpCase], bool] = lambda case: True) -> Callable[..., Any]:
    """Run a test once per op that it applies to."""

    def decorate(test: Callable[..., Any]) -> Callable[..., Any]:
        check = test.__name__.removeprefix("test_")
        CHECKS.append(check)
        cases = [c for c in OPS if check not in c.not_applicable and only(c)]
        return pytest.mark.parametrize("op", cases, ids=[c.name for c in cases])(test)

    return decorate


def differentiable(op: OpCase) -> bool:
    return bool(op.wants_grad)


def first_of_its_op(case: OpCase) -> bool:
    return next(c for c in OPS if c.op == case.op) is case


def inputs(op: OpCase, device: torch.device, dtype: torch.dtype = torch.float32, n: int = 6, make: Any = None) -> list:
    tensors = [t.to(device) for t in (make or op.make)(dtype, n)]
    for i in op.wants_grad:
        tensors[i].requires_grad_()
    return tensors


def leaves(op: OpCase, tensors: list) -> list[Tensor]:
    return [tensors[i] for i in op.wants_grad]


def cotangent(out: Tensor) -> Tensor:
    """A gradient of the output in which every element differs; 1.7 for a scalar."""
    n = out.numel()
    return torch.linspace(1.7, 0.5, max(n, 1), dtype=torch.float64)[:n].to(out).view(out.shape)


def run(op: OpCase, tensors: list, call: Any = None, **more: Any) -> tuple[Tensor, ...]:
    """(output, gradients...), detached."""
    out = (call or op.call)(*tensors, **more)
    if not op.wants_grad:
        return (out.detach(),)
    return (out.detach(), *torch.autograd.grad(out, leaves(op, tensors), cotangent(out)))


def assert_all_bitwise(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        testing.assert_bitwise(a, e, f"{what}: {'output' if i == 0 else 'gradient'}")


def assert_all_close(actual: Any, expected: Any, what: str = "", rtol: float | None = None) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype, f"{what}: {a.dtype}, expected {e.dtype}"
        size = e.double().norm().item()
        eps = torch.finfo(e.dtype).eps
        error = (a.double() - e.double()).norm().item()
        assert error <= (16 * eps if rtol is None else rtol) * size, f"{what}: off by {error / max(size, 1e-300):.3g}"


def exact(op: OpCase, tensors: list) -> tuple[Tensor, ...]:
    """The op in float64 by the reference, from the same rounded inputs."""
    doubles = [t.detach().double() if t.is_floating_point() else t for t in tensors]
    for i in op.wants_grad:
        doubles[i].requires_grad_()
    with dk.backend("reference"):
        return run(op, doubles)


def assert_correct(op: OpCase, actual: tuple[Tensor, ...], tensors: list, what: str = "") -> None:
    """Within 16 eps of float64 (norm): eager PyTorch's own error is the subject of the op's test file."""
    truth = tuple(e.to(a.dtype) for a, e in zip(actual, exact(op, tensors), strict=True))
    assert_all_close(actual, truth, what)


@contextlib.contextmanager
def without_fast_path() -> Iterator[None]:
    """Eager calls go through the dispatcher, as compiled ones do."""
    before = _backend.fast
    _backend.fast = lambda x: None
    try:
        yield
    finally:
        _backend.fast = before


@contextlib.contextmanager
def recorded_kernels() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    """Collect (operator, arguments) of every operator called in the block."""
    calls: list[tuple[str, tuple[Any, ...]]] = []
    before = {cls: cls.call for cls in _library.OPS.values()}

    def record(cls: Any, original: Any) -> Any:
        def call(*args: Any) -> Any:
            calls.append((cls.op_name(), args))
            return original(*args)

        return staticmethod(call)

    for cls, original in before.items():
        cls.call = record(cls, original)
    try:
        with without_fast_path():
            yield calls
    finally:
        for cls, original in before.items():
            cls.call = staticmethod(original)


def kernel_calls(op: OpCase, tensors: list) -> list[tuple[str, tuple[Any, ...]]]:
    """Every distinct operator call that the op makes: once to train, once with create_graph, once without a graph."""
    with recorded_kernels() as calls:
        out = op.call(*tensors)
        if op.wants_grad:
            torch.autograd.grad(out, leaves(op, tensors), cotangent(out), retain_graph=True)
            torch.autograd.grad(out, leaves(op, tensors), cotangent(out), create_graph=True)
            with torch.no_grad():
                op.call(*tensors)
    return calls


# The list itself ------------------------------------------------------------------------------------------------------


def test_every_registered_op_is_in_the_list() -> None:
    listed = {kernel for op in OPS for kernel in op.kernels}
    assert set(_library.OPS) <= listed, f"without a contract: {set(_library.OPS) - listed}"


def test_exceptions_are_named_and_explained() -> None:
    for op in OPS:
        for check, reason in op.not_applicable.items():
            assert check in CHECKS, f"{op.name}: no check is called {check}"
            assert len(reason) > 20, f"{op.name}: why does {check} not apply?"


# Registration ---------------------------------------------------------------------------------------------------------


@pytest.mark.needs("cpp")
@contract()
def test_opcheck(op: OpCase, device: torch.device) -> None:
    """Schema, fake, autograd registration and aot dispatch of every operator, on the arguments that it really gets."""
    seen = set()
    for make in filter(None, (op.make, op.image)):
        for kernel, args in kernel_calls(op, inputs(op, device, n=3, make=make)):
            overload = getattr(torch.ops.dlkernels, kernel).default
            names = [a.name for a in overload._schema.arguments]
            floating = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]
            wants = [i for i in floating if names[i] in DIFFERENTIABLE]
            args = tuple(a.detach().requires_grad_(i in wants) if i in floating else a for i, a in enumerate(args))
            torch.library.opcheck(overload, args)
            seen.add(kernel)
    assert seen == set(op.kernels), f"called {seen}, declared {set(op.kernels)}"


@pytest.mark.needs("cpp")
@contract()
def test_opcheck_layouts(op: OpCase, device: torch.device) -> None:
    """Transposed inputs and gradients of strides (0, 0): what the fake promises holds there too."""
    for kernel, args in kernel_calls(op, inputs(op, device, n=3)):
        overload = getattr(torch.ops.dlkernels, kernel).default
        wide = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dim() >= 2]
        transposed = [
            a.detach().transpose(0, 1).contiguous().transpose(0, 1) if i in wide else a for i, a in enumerate(args)
        ]
        torch.library.opcheck(overload, tuple(transposed), test_utils=("test_schema", "test_faketensor"))
        if kernel.endswith("_bwd"):
            flat = (args[0].new_ones(()).expand(args[0].shape), *transposed[1:])
            torch.library.opcheck(overload, flat, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.needs("cpp")
@contract()
def test_same_result_through_the_dispatcher(op: OpCase, device: torch.device) -> None:
    """The eager fast path and the dispatcher run the same kernels."""
    tensors = inputs(op, device)
    fast = run(op, tensors)
    with without_fast_path():
        assert_all_bitwise(run(op, tensors), fast, "dispatcher against fast path")


# Gradients ------------------------------------------------------------------------------------------------------------


@contract(differentiable)
def test_gradcheck(op: OpCase, device: torch.device) -> None:
    for make in filter(None, (op.make, op.image)):
        tensors = inputs(op, device, torch.float64, 3, make)
        assert torch.autograd.gradcheck(op.call, tensors, nondet_tol=0.0, rtol=1e-5, atol=1e-7)


@contract(differentiable)
def test_gradgradcheck(op: OpCase, device: torch.device) -> None:
    tensors = inputs(op, device, torch.float64, 3)
    assert torch.autograd.gradgradcheck(op.call, tensors, nondet_tol=0.0, rtol=1e-5, atol=1e-7)


@contract(differentiable)
def test_second_derivative_in_float32(op: OpCase, device: torch.device) -> None:
    """What create_graph gives is the gradient, and its derivative is the reference's."""
    tensors = inputs(op, device)

    def twice(tensors: list) -> tuple[Tensor, ...]:
        out = op.call(*tensors)
        (first,) = torch.autograd.grad(out, leaves(op, tensors)[:1], cotangent(out), create_graph=True)
        return first.detach(), *torch.autograd.grad(first.square().sum(), leaves(op, tensors)[:1])

    actual = twice(tensors)
    assert_all_close(actual[:1], run(op, tensors)[1:2], "create_graph changes the gradient")
    doubles = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors]
    with dk.backend("reference"):
        assert_all_close(actual, [e.float() for e in twice(doubles)], "second derivative", 1e-5)


@contract(differentiable)
def test_backward_twice(op: OpCase, device: torch.device) -> None:
    """retain_graph=True gives the same gradient again, whatever came in between; without it a second call raises."""
    tensors = inputs(op, device)
    out = op.call(*tensors)
    wanted = leaves(op, tensors)
    first = [g.clone() for g in torch.autograd.grad(out, wanted, cotangent(out), retain_graph=True)]
    other = torch.autograd.grad(out, wanted, 0.5 * cotangent(out), retain_graph=True)
    again = torch.autograd.grad(out, wanted, cotangent(out), retain_graph=True)
    assert_all_bitwise(again, tuple(first), "second backward")
    assert_all_close(other, [0.5 * g for g in first], "backward of another gradient")
    ones = [g.clone() for g in torch.autograd.grad(out, wanted, torch.ones_like(out), retain_graph=True)]
    assert_all_bitwise(
        torch.autograd.grad(out, wanted, torch.ones_like(out), retain_graph=True), tuple(ones), "of ones"
    )
    last = torch.autograd.grad(out, wanted, cotangent(out))
    assert_all_bitwise(last, tuple(first), "last backward")
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, wanted, cotangent(out))


@contract(differentiable)
def test_results_of_backward_are_the_callers(op: OpCase, device: torch.device) -> None:
    """Changing a gradient in place changes no later one, and no other one."""
    tensors = inputs(op, device)
    out = op.call(*tensors)
    first = torch.autograd.grad(out, leaves(op, tensors), torch.ones_like(out), retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.fill_(float("nan"))
    again = torch.autograd.grad(out, leaves(op, tensors), torch.ones_like(out))
    assert_all_bitwise(again, tuple(kept), "gradient after its twin was overwritten")


@contract(differentiable)
def test_gradient_accumulation(op: OpCase, device: torch.device) -> None:
    tensors = inputs(op, device)
    gradients = run(op, tensors)[1:]
    for leaf in leaves(op, tensors):
        leaf.grad = torch.ones_like(leaf)
    held = [leaf.grad for leaf in leaves(op, tensors)]
    for _ in range(2):
        out = op.call(*tensors)
        out.backward(cotangent(out))
    for leaf, g, kept in zip(leaves(op, tensors), gradients, held, strict=True):
        assert leaf.grad is kept
        assert_all_close([leaf.grad], [1 + g + g], "accumulated gradient")


@contract(differentiable)
def test_used_twice_in_one_graph(op: OpCase, device: torch.device) -> None:
    tensors = inputs(op, device)
    out = op.call(*tensors) + 2 * op.call(*tensors)
    actual = torch.autograd.grad(out, leaves(op, tensors), cotangent(out))
    assert_all_close(actual, [3 * g for g in run(op, tensors)[1:]], "a + 2 a")


@contract(lambda op: differentiable(op) and not op.reduced)
def test_expanded_and_strided_grad_output(op: OpCase, device: torch.device) -> None:
    """`out.sum()` hands the kernel a gradient of strides 0; other ops hand over transposed and half-zero ones."""
    tensors = inputs(op, device)
    out = op.call(*tensors)
    wanted = leaves(op, tensors)

    def gradient(g: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, wanted, g, retain_graph=True)

    one = out.new_full((), 1.7)
    expected = gradient(one.expand(out.shape).contiguous())
    assert_all_bitwise(gradient(one.expand(out.shape)), expected, "expanded gradient")
    row = cotangent(out)[:1]
    expected = gradient(row.expand(out.shape).contiguous())
    assert_all_bitwise(gradient(row.expand(out.shape)), expected, "one row expanded")
    for name, g in testing.layouts(cotangent(out)):
        assert_all_bitwise(gradient(g), gradient(cotangent(out)), f"{name} gradient")


@contract(lambda op: op.higher_order and differentiable(op))
def test_higher_order_off(op: OpCase, device: torch.device) -> None:
    """First derivatives are the same; a second one raises and says how to get it, or works."""
    tensors = inputs(op, device)
    assert_all_bitwise(run(op, tensors, higher_order=False), run(op, tensors), "higher_order=False")
    if not op.reduced:
        return
    out = op.call(*tensors, higher_order=False)
    if device.type == "cpu" and _backend.default_for("cpu") == "reference":
        return
    with pytest.raises(RuntimeError, match="higher_order=True"):
        torch.autograd.grad(out, leaves(op, tensors), cotangent(out), create_graph=True)


@contract(differentiable)
def test_no_graph_without_requires_grad(op: OpCase, device: torch.device) -> None:
    tensors = inputs(op, device)
    expected = op.call(*tensors).detach()
    out = op.call(*[t.detach() for t in tensors])
    assert not out.requires_grad and out.grad_fn is None
    assert_all_bitwise((out,), (expected,), "without a gradient")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = op.call(*tensors)
            assert not out.requires_grad and out.grad_fn is None
            assert_all_bitwise((out,), (expected,), mode.__name__)


@contract(differentiable)
def test_input_changed_before_backward(op: OpCase, device: torch.device) -> None:
    """Changing an input between forward and backward raises, or does not matter; never a wrong gradient."""
    tensors = inputs(op, device)
    expected = run(op, tensors)[1:]
    for position in range(len(tensors)):
        tensors = inputs(op, device)
        shifted = [t.detach().clone() if i == position else t for i, t in enumerate(tensors)]
        if position in op.wants_grad:
            shifted[position] = tensors[position] * 1  # not a leaf: may be changed in place
        out = op.call(*shifted)
        with torch.no_grad():
            shifted[position].copy_(shifted[position].flip(0))
        try:
            actual = torch.autograd.grad(out, leaves(op, tensors), cotangent(out))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
            continue
        assert_all_bitwise(actual, expected, f"input {position} changed in place")


@contract(differentiable)
def test_batched_gradients(op: OpCase, device: torch.device) -> None:
    """is_grads_batched, as vectorised jacobians use it: one backward pass of several gradients."""
    tensors = inputs(op, device)
    out = op.call(*tensors)
    g = torch.stack([cotangent(out), 2 * cotangent(out), -cotangent(out)])
    single = [torch.autograd.grad(out, leaves(op, tensors), one, retain_graph=True) for one in g]
    batched = torch.autograd.grad(out, leaves(op, tensors), g, is_grads_batched=True)
    assert_all_close(batched, [torch.stack(group) for group in zip(*single, strict=True)], "batched gradients")


@contract(differentiable)
def test_forward_mode(op: OpCase, device: torch.device) -> None:
    """A forward-mode derivative is right, or an error; never silently missing."""
    tensors = [t.detach() for t in inputs(op, device, torch.float64)]
    tangent = torch.linspace(-1, 1, tensors[0].numel(), dtype=torch.float64, device=device).view(tensors[0].shape)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0], tangent)
        try:
            actual = torch.autograd.forward_ad.unpack_dual(op.call(dual, *tensors[1:])).tangent
        except (RuntimeError, NotImplementedError):
            return
    assert actual is not None, "the tangent is lost"
    step = 1e-6
    with torch.no_grad():
        up = op.call(tensors[0] + step * tangent, *tensors[1:])
        down = op.call(tensors[0] - step * tangent, *tensors[1:])
    assert_all_close([actual], [(up - down) / (2 * step)], "forward mode", 1e-5)


@contract(differentiable)
def test_hooks_and_checkpointing(op: OpCase, device: torch.device) -> None:
    """Saved-tensor hooks and activation checkpointing see what the op saves."""
    from torch.utils.checkpoint import checkpoint

    tensors = inputs(op, device)
    expected = run(op, tensors)
    assert_all_bitwise(
        run(op, tensors, lambda *t: checkpoint(op.call, *t, use_reentrant=False)), expected, "checkpoint"
    )
    with torch.autograd.graph.save_on_cpu():
        assert_all_bitwise(run(op, tensors), expected, "save_on_cpu")


# Compilers ------------------------------------------------------------------------------------------------------------


def dynamic_batches(op: OpCase, device: torch.device, call: Any) -> None:
    for n in (4, 6, 9, 5):
        tensors = inputs(op, device, n=n)
        assert_all_close(run(op, tensors, call), run(op, tensors), f"batch {n}")


@contract()
def test_compile(op: OpCase, device: torch.device) -> None:
    """fullgraph, forward and backward, at most two compilations for any number of batch sizes."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    dynamic_batches(op, device, torch.compile(op.call, backend=counter, fullgraph=True))
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.needs("compiler")
@contract(first_of_its_op)
def test_compile_inductor(op: OpCase, device: torch.device) -> None:
    torch._dynamo.reset()
    dynamic_batches(op, device, torch.compile(op.call, fullgraph=True, dynamic=True))


@pytest.mark.needs("cpp")
@contract()
def test_compiled_graph_holds_the_operator(op: OpCase, device: torch.device) -> None:
    """One opaque operator per pass, so that the kernel runs under torch.compile instead of a decomposition."""
    torch._dynamo.reset()
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    torch.compile(op.call, backend=backend, fullgraph=True)(*inputs(op, device))
    assert len(graphs) == 1
    assert any(f"dlkernels.{kernel}" in graphs[0] for kernel in op.kernels), graphs[0]


@contract()
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(op: OpCase, device: torch.device, strict: bool) -> None:
    """A module over the op exports with a dynamic batch and gives the same values."""
    batch = torch.export.Dim("batch", min=2, max=64)
    tensors = [t.detach() for t in inputs(op, device)]
    module = op.module().to(device)
    shapes: Any = tuple({0: batch} if i in op.batched else None for i in range(len(tensors)))
    if isinstance(module, _Functional):
        shapes = (shapes[0], shapes[1:])  # (x, *tensors)
    program = torch.export.export(module, tuple(tensors), dynamic_shapes=shapes, strict=strict)
    for n in (6, 9):
        tensors = [t.detach() for t in inputs(op, device, n=n)]
        expected = op.call(*tensors)
        assert_all_close([program.module()(*tensors)], [expected], "exported")
        assert_all_close([program.run_decompositions().module()(*tensors)], [expected], "decomposed")


# torch.func -----------------------------------------------------------------------------------------------------------


def stacked(op: OpCase, device: torch.device, copies: int = 3) -> list[Tensor]:
    """`copies` different sets of inputs, stacked in a new dimension 0 (per-class weights and the like are shared)."""
    sets = [inputs(op, device, torch.float64, 4) for _ in range(copies)]
    return [
        torch.stack(
            [
                s[i].detach().roll(k, 0) * (1 if not s[i].is_floating_point() else 1 - 0.1 * k)
                for k, s in enumerate(sets)
            ]
        )
        if i in op.batched
        else sets[0][i]
        for i in range(len(sets[0]))
    ]


@contract()
def test_vmap(op: OpCase, device: torch.device) -> None:
    tensors = stacked(op, device)
    in_dims = tuple(0 if i in op.batched else None for i in range(len(tensors)))
    pick = [[t[k] if d == 0 else t for t, d in zip(tensors, in_dims, strict=True)] for k in range(3)]
    expected = torch.stack([op.call(*p) for p in pick])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = torch.func.vmap(op.call, in_dims)(*tensors)
        last = [t.movedim(0, -1).contiguous() if d == 0 else t for t, d in zip(tensors, in_dims, strict=True)]
        moved = torch.func.vmap(op.call, tuple(None if d is None else -1 for d in in_dims))(*last)
        shared = torch.func.vmap(op.call, (0, *[None] * (len(tensors) - 1)))(tensors[0], *pick[0][1:])
    assert_all_close([actual, moved], [expected, expected], "vmap")
    assert_all_close([shared], [torch.stack([op.call(t, *pick[0][1:]) for t in tensors[0]])], "vmap, shared targets")


@contract(differentiable)
def test_func_grad(op: OpCase, device: torch.device) -> None:
    tensors = [t.detach() for t in inputs(op, device, torch.float64, 4)]

    def scalar(x: Tensor, *rest: Tensor) -> Tensor:
        return op.call(x, *rest).sum()

    leaf = tensors[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(scalar(leaf, *tensors[1:]), leaf)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_all_close([torch.func.grad(scalar)(*tensors)], [expected], "grad")
        value, pull = torch.func.vjp(lambda x: op.call(x, *tensors[1:]), tensors[0])
        assert_all_close([pull(torch.ones_like(value))[0]], [expected], "vjp")


@contract(differentiable)
def test_func_vmap_of_grad(op: OpCase, device: torch.device) -> None:
    tensors = stacked(op, device)
    in_dims = tuple(0 if i in op.batched else None for i in range(len(tensors)))

    def scalar(x: Tensor, *rest: Tensor) -> Tensor:
        return op.call(x, *rest).sum()

    expected = []
    for k in range(3):
        x, *rest = [t[k] if d == 0 else t for t, d in zip(tensors, in_dims, strict=True)]
        x = x.detach().requires_grad_()
        expected += torch.autograd.grad(scalar(x, *rest), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = torch.func.vmap(torch.func.grad(scalar), in_dims)(*tensors)
    assert_all_close([actual], [torch.stack(expected)], "per-sample gradients")


@contract(differentiable)
def test_func_jacrev_and_hessian(op: OpCase, device: torch.device) -> None:
    tensors = [t.detach() for t in inputs(op, device, torch.float64, 2)]

    def of_first(x: Tensor) -> Tensor:
        return op.call(x, *tensors[1:])

    def summed(x: Tensor) -> Tensor:
        return of_first(x).sum()

    with dk.backend("reference"):
        jacobian = torch.autograd.functional.jacobian(of_first, tensors[0])
        hessian = torch.autograd.functional.hessian(summed, tensors[0])
    assert_all_close([torch.func.jacrev(of_first)(tensors[0])], [jacobian], "jacrev", 1e-12)
    twice = torch.func.jacrev(torch.func.jacrev(summed))(tensors[0])
    assert_all_close([twice], [hessian], "jacrev of jacrev", 1e-10)
    assert_all_close([torch.autograd.functional.hessian(summed, tensors[0])], [hessian], "hessian", 1e-10)


# Precision ------------------------------------------------------------------------------------------------------------


@contract()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast(op: OpCase, device: torch.device, dtype: torch.dtype) -> None:
    """Autocast changes nothing: kernels compute in float32 whatever comes in, and gradients take the input's dtype."""
    for given in (torch.float32, dtype):
        tensors = inputs(op, device, given)
        expected = run(op, tensors)
        with torch.autocast(device.type, dtype):
            out = op.call(*tensors)
        grads = torch.autograd.grad(out, leaves(op, tensors), cotangent(out)) if op.wants_grad else ()
        assert_all_bitwise((out.detach(), *grads), expected, f"{given} under autocast")
        assert all(g.dtype == given for g in grads)


@contract(differentiable)
def test_model_under_autocast(op: OpCase, device: torch.device) -> None:
    """A linear layer makes half-precision logits under autocast; its weights get float32 gradients."""
    tensors = [t.detach() for t in inputs(op, device)]
    model = torch.nn.Linear(tensors[0].shape[-1], tensors[0].shape[-1], device=device)
    with torch.autocast(device.type, torch.bfloat16):
        x = model(tensors[0])
        beside = [t.to(x.dtype) if t.shape == x.shape and t.is_floating_point() else t for t in tensors[1:]]
        out = op.call(x, *beside)
    out.sum().backward()
    assert model.weight.grad.dtype == torch.float32 and torch.isfinite(model.weight.grad).all()
    assert model.weight.grad.abs().sum() > 0


@contract(lambda op: differentiable(op) and op.name.endswith("/mean"))
def test_float16_mean_with_loss_scale(op: OpCase, device: torch.device) -> None:
    """1/N is below float16's range; scaled by 65536 the gradient is exact to float16 rounding."""
    n, scale = 300_000, 65536.0
    tensors = inputs(op, device, torch.float16, n)
    out = op.call(*tensors)
    assert torch.isfinite(out)
    (scale * out).backward()
    doubles = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors]
    with dk.backend("reference"):
        (scale * op.call(*doubles)).backward()
    for a, e in zip(leaves(op, tensors), leaves(op, doubles), strict=True):
        assert (e.grad.abs() > 0).float().mean() > 0.5
        error = (a.grad.double() - e.grad).abs()
        allowed = 2.1 * torch.finfo(torch.float16).eps / 2 * e.grad.abs() + 2**-24
        assert (error <= allowed).all(), f"{int((error > allowed).sum())} of {error.numel()} gradients off"


# Layouts and sizes ----------------------------------------------------------------------------------------------------


@contract()
def test_layouts(op: OpCase, device: torch.device) -> None:
    """Every tensor argument in every layout gives the values of the contiguous one."""
    for make in filter(None, (op.make, op.image)):
        base = inputs(op, device, make=make)
        for position in range(len(base)):
            for name, changed in testing.layouts(base[position]):
                tensors = list(base)
                tensors[position] = changed.requires_grad_(base[position].requires_grad)
                assert_correct(op, run(op, tensors), tensors, f"argument {position} {name}")


@contract()
def test_expanded_input(op: OpCase, device: torch.device) -> None:
    tensors = inputs(op, device)
    single = [t.detach()[:1] if i in op.batched else t.detach() for i, t in enumerate(tensors)]
    expanded = [t.expand(6, *t.shape[1:]) if i in op.batched else t for i, t in enumerate(single)]
    expected = op.call(*[t.contiguous() for t in expanded])
    assert_all_close([op.call(*expanded)], [expected], "expanded")
    for i in op.wants_grad:
        single[i].requires_grad_()
    stretched = [t.expand(6, *t.shape[1:]) if i in op.batched else t for i, t in enumerate(single)]
    dense = inputs(op, device)
    for i in op.batched:
        dense[i] = expanded[i].contiguous().requires_grad_(i in op.wants_grad)
    assert_all_close(run(op, stretched, None)[:1], run(op, dense)[:1], "expanded output")
    out = op.call(*stretched)
    grads = torch.autograd.grad(out, leaves(op, single), cotangent(out)) if op.wants_grad else ()
    summed = [
        g.sum(0, keepdim=True) if i in op.batched else g for i, g in zip(op.wants_grad, run(op, dense)[1:], strict=True)
    ]
    assert_all_close(grads, summed, "expanded gradient")


@contract(lambda op: op.image is not None)
def test_channels_last_in_channels_last_out(op: OpCase, device: torch.device) -> None:
    tensors = inputs(op, device, make=op.image)
    tensors = [
        t.detach().contiguous(memory_format=torch.channels_last).requires_grad_(t.requires_grad) if t.dim() == 4 else t
        for t in tensors
    ]
    out, *grads = run(op, tensors)
    if op.keeps_layout:
        assert out.is_contiguous(memory_format=torch.channels_last), out.stride()
    for g in grads:
        if g.dim() == 4:
            assert g.is_contiguous(memory_format=torch.channels_last), g.stride()
    out, *grads = run(op, inputs(op, device, make=op.image))
    assert all(t.is_contiguous() for t in (out, *grads) if t.dim() == 4)


@contract()
def test_empty_batch(op: OpCase, device: torch.device) -> None:
    tensors = inputs(op, device, n=0)
    out = op.call(*tensors)
    reference = op.call(*inputs(op, device, n=2))
    assert out.dtype == reference.dtype
    assert out.shape == (reference.shape if op.reduced else (0, *reference.shape[1:]))
    if op.reduced:
        undefined = op.name.endswith("/mean") and math.isnan(op.of_nothing)
        assert torch.isnan(out) if undefined else out == 0, f"loss of nothing is {out.item()}"
    for g, leaf in zip(torch.autograd.grad(out, leaves(op, tensors), cotangent(out)), leaves(op, tensors), strict=True):
        assert g.shape == leaf.shape and g.dtype == leaf.dtype


# Memory ---------------------------------------------------------------------------------------------------------------


@contract()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_outputs_are_written(op: OpCase, device: torch.device, dtype: torch.dtype) -> None:
    """Every element of what `at::empty` gave is written: it is NaN before."""
    for n in (1, 6, 67):
        tensors = inputs(op, device, dtype, n)
        expected = run(op, tensors)
        with testing.poisoned_empty():
            assert_all_bitwise(run(op, tensors), expected, f"poisoned memory, batch {n}")


@contract()
def test_inputs_are_left_alone(op: OpCase, device: torch.device) -> None:
    """No bit of an input changes, nor of the memory around it; what lies around it is not read."""
    for n in (1, 5, 67):
        tensors = inputs(op, device, n=n)
        expected = run(op, tensors)
        canaries = [testing.Canary(t) for t in tensors]
        inside = [c.tensor.requires_grad_(t.requires_grad) for c, t in zip(canaries, tensors, strict=True)]
        with testing.unmodified(*inside):
            actual = run(op, inside)
        assert_all_close(actual, expected, "between canaries")
        for i, canary in enumerate(canaries):
            canary.check(f"input {i}")


GUARDED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_contract as contract
from dlkernels import testing
torch.set_num_threads(1)
for op in contract.OPS:
    for dtype in (torch.float32, torch.bfloat16):
        for n in (1, 5, 67):
            tensors = contract.inputs(op, torch.device("cpu"), dtype, n)
            expected = contract.run(op, tensors)
            for side in ("after", "before"):
                print(op.name, dtype, n, side, flush=True)
                inside = [testing.guard_page(t, side).requires_grad_(t.requires_grad) for t in tensors]
                contract.assert_all_close(contract.run(op, inside), expected, "between guard pages")
print("done")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guard pages are made with Linux' mprotect")
def test_nothing_is_read_outside(tmp_path: Path) -> None:
    """Inputs that end at, or begin behind, a page that no one may touch: a vector too far is a segmentation fault."""
    result = python(GUARDED, str(Path(__file__).parent))
    assert result.returncode == 0, f"exit {result.returncode} after: {result.stdout[-200:]}\n{result.stderr[-2000:]}"
    assert result.stdout.endswith("done\n")


def python(code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
        cwd=Path(dk.__file__).parents[1],
        env={**os.environ, **env},
    )


# Determinism ----------------------------------------------------------------------------------------------------------

LARGE = 20_011


@contract()
def test_two_runs_are_bitwise_equal(op: OpCase, device: torch.device) -> None:
    tensors = inputs(op, device, n=LARGE)
    assert_all_bitwise(run(op, tensors), run(op, tensors), "second run")


@pytest.mark.needs("cpp")
@contract()
def test_thread_counts_are_bitwise_equal(op: OpCase, device: torch.device) -> None:
    if device.type != "cpu":
        return
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs(op, device, dtype, LARGE)
        one = run(op, tensors)
        for count in (2, 3):
            with testing.num_threads(count):
                assert_all_bitwise(run(op, tensors), one, f"{count} threads, {dtype}")


CAPABILITY = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_contract as contract
torch.set_num_threads(1)
results = {}
for op in contract.OPS:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n in (3, 67):
            results[op.name, dtype, n] = contract.run(op, contract.inputs(op, torch.device("cpu"), dtype, n))
import dlkernels
info = dlkernels.build_info()["cpp"]
torch.save({"results": results, "info": info, "torch": torch.backends.cpu.get_cpu_capability()}, sys.argv[2])
"""


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_instruction_sets(capability: str, device: torch.device, tmp_path: Path) -> None:
    """Every instruction set that the binary holds gives results within 16 eps of float64."""
    if device.type != "cpu":
        return
    path = tmp_path / "results.pt"
    result = python(CAPABILITY, str(Path(__file__).parent), str(path), ATEN_CPU_CAPABILITY=capability)
    assert result.returncode == 0, result.stderr[-2000:]
    loaded = torch.load(path, weights_only=False)
    assert capability in str(loaded["info"]).lower(), f"build_info does not say that {capability} is in use"
    for (name, dtype, n), actual in loaded["results"].items():
        op = next(c for c in OPS if c.name == name)
        assert_correct(op, actual, inputs(op, device, dtype, n), f"{capability} {name} {dtype} {n}")


@contract()
def test_threads_of_the_caller(op: OpCase, device: torch.device) -> None:
    """Calls from several Python threads at once give what one gives."""
    sets = [inputs(op, device, n=50 + i) for i in range(8)]
    expected = [run(op, tensors) for tensors in sets]
    actual: list[Any] = [None] * len(sets)

    def work(i: int) -> None:
        torch.set_num_threads(1)
        for _ in range(5):
            actual[i] = run(op, sets[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(sets))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for a, e in zip(actual, expected, strict=True):
        assert a is not None, "a thread died"
        assert_all_bitwise(a, e, "threaded call")


# Synchronisation ------------------------------------------------------------------------------------------------------


@pytest.mark.needs("cpp")
@contract()
def test_python_reads_no_value(op: OpCase, device: torch.device) -> None:
    """Fake tensors have no values: any .item(), bool() or tolist() on the way, forward or backward, raises."""
    with FakeTensorMode() as mode:
        tensors = [mode.from_tensor(t.detach()).requires_grad_(t.requires_grad) for t in inputs(op, device)]
        out = op.call(*tensors)
        if op.wants_grad:
            grads = torch.autograd.grad(out, leaves(op, tensors), torch.ones_like(out))
            assert [g.shape for g in grads] == [t.shape for t in leaves(op, tensors)]
    expected = run(op, inputs(op, device))
    assert (out.shape, out.dtype, out.stride()) == (expected[0].shape, expected[0].dtype, expected[0].stride())


@pytest.mark.gpu
@contract()
def test_no_host_synchronisation(op: OpCase, device: torch.device) -> None:
    tensors = inputs(op, device)
    gradient = cotangent(op.call(*tensors))
    run(op, tensors)  # compile the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = op.call(*tensors)
        if op.wants_grad:
            torch.autograd.grad(out, leaves(op, tensors), gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@contract()
def test_two_streams(op: OpCase, device: torch.device) -> None:
    """Calls on two streams at once share no scratch memory."""
    sets = [inputs(op, device, n=LARGE + i) for i in range(2)]
    expected = [run(op, tensors) for tensors in sets]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in sets]
    actual: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                actual[i].append(run(op, sets[i]))
    torch.cuda.synchronize()
    for results, e in zip(actual, expected, strict=True):
        for a in results:
            assert_all_bitwise(a, e, "beside another stream")


@pytest.mark.gpu
@contract()
def test_cuda_graph(op: OpCase, device: torch.device) -> None:
    """Captured once, replayed with other values."""
    static = inputs(op, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradient = cotangent(op.call(*static))
        for _ in range(3):
            run(op, static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = op.call(*static)
        grads = torch.autograd.grad(out, leaves(op, static), gradient) if op.wants_grad else ()
    fresh = [t.detach().flip(0) if i in op.batched else t.detach() for i, t in enumerate(static)]
    with torch.no_grad():
        for s, f in zip(static, fresh, strict=True):
            s.copy_(f)
    graph.replay()
    torch.cuda.synchronize()
    assert_all_bitwise(
        (out.detach(), *grads),
        run(op, [f.requires_grad_(s.requires_grad) for f, s in zip(fresh, static, strict=True)]),
        "replay",
    )


@pytest.mark.gpu
@contract()
def test_memory_pool(op: OpCase, device: torch.device) -> None:
    """Nothing that a call keeps lies in the pool in force: the warm-up of CUDA graphs by torch.compile takes it."""
    tensors = inputs(op, device)
    pool = torch.cuda.MemPool()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.cuda.use_mem_pool(pool):
        run(op, tensors)
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    blocks = [block for segment in pool.snapshot() for block in segment["blocks"]]
    assert not [block for block in blocks if block["state"] == "active_allocated"]


# Backends and modules -------------------------------------------------------------------------------------------------


@contract()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_equals_reference_backend(op: OpCase, device: torch.device, dtype: torch.dtype) -> None:
    """The kernels, and the reference in the same dtype, are within 16 eps of the reference in float64."""
    if dtype == torch.float64 and device.type != "cpu":
        return
    for n in (1, 6, 67):
        tensors = inputs(op, device, dtype, n)
        assert_correct(op, run(op, tensors), tensors, f"default backend, batch {n}")
        with dk.backend("reference"):
            assert_correct(op, run(op, tensors), tensors, f"reference backend, batch {n}")


@contract()
def test_module(op: OpCase, device: torch.device) -> None:
    """The module computes what the function does, and survives pickle, deepcopy, torch.save and a state_dict."""
    tensors = inputs(op, device)
    module = op.module().to(device)
    expected = run(op, tensors)
    assert_all_bitwise(run(op, tensors, module), expected, "module")
    twins = {"pickle": pickle.loads(pickle.dumps(module)), "deepcopy": copy.deepcopy(module)}
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    twins["torch.save"] = torch.load(buffer, weights_only=False)
    twins["state_dict"] = op.module().to(device)
    twins["state_dict"].load_state_dict(module.state_dict(), strict=True)
    for name, twin in twins.items():
        assert_all_bitwise(run(op, tensors, twin), expected, name)
        assert repr(twin) == repr(module)


# Negative controls: each of these mistakes is noticed -----------------------------------------------------------------


def plain_loss(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(z, y, w.to(z.dtype), ignore_index=-1)


class StoresGradient(torch.autograd.Function):
    """A loss that keeps its gradient, and then does what the subclass says with it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, w: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            loss = plain_loss(leaf, y, w)
            (ctx.stored,) = torch.autograd.grad(loss, leaf)
        ctx.save_for_backward(z)
        return loss.detach()


class ScalesInPlace(StoresGradient):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _ = ctx.saved_tensors
        return ctx.stored.mul_(grad), None, None


class HandsOutItsStorage(StoresGradient):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.stored if bool(grad == 1) else ctx.stored * grad, None, None


class NoSecondDerivative(StoresGradient):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.stored * grad, None, None


class WrongGradient(StoresGradient):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return 1.001 * ctx.stored * grad, None, None


def leaves_output_unwritten(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    rows = torch.empty(z.shape[0] + 1, dtype=z.dtype, device=z.device)
    rows[:-1] = 0
    return plain_loss(z, y, w) + rows[-1].isnan()


def changes_its_input(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    loss = plain_loss(z, y, w)
    z.detach().view(-1)[-1] *= 1.0001
    return loss


def changes_memory_behind(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    if z.untyped_storage().nbytes() > (z.storage_offset() + z.numel()) * z.element_size():
        torch.as_strided(z.detach(), (1,), (1,), z.storage_offset() + z.numel()).fill_(0)
    return plain_loss(z, y, w)


def reads_memory_behind(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    behind = torch.zeros(1)
    if z.untyped_storage().nbytes() > (z.storage_offset() + z.numel()) * z.element_size():
        behind = torch.as_strided(z.detach(), (1,), (1,), z.storage_offset() + z.numel())
    return plain_loss(z, y, w) + 0 * behind.sum()


def reads_a_value(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return plain_loss(z, y, w) * (2.0 if z.sum().item() > 1e9 else 1.0)


def loops_over_the_batch(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    rows = [torch.nn.functional.cross_entropy(z[i], y[i], w, reduction="sum", ignore_index=-1) for i in range(len(z))]
    return torch.stack(rows).sum() / torch.where(y >= 0, w[y.clamp(0)], 0.0).sum()


def is_random(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return plain_loss(z, y, w) * (1 + 1e-5 * torch.rand((), dtype=z.dtype))


def computes_in_half(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return plain_loss(z if z.dtype == torch.float64 else z.bfloat16(), y, w).to(z.dtype)


def mixes_the_batch(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return plain_loss(z, y, w) + 0 * z[0, 0].detach() + (1e-3 if z._is_view() else 0.0)


def keeps_a_graph(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return plain_loss(z, y, w) + torch.zeros((), requires_grad=True)


def loses_the_tangent(z: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return (
        plain_loss(torch.autograd.forward_ad.unpack_dual(z).primal, y, w)
        if not z.requires_grad
        else plain_loss(z, y, w)
    )


NOTICED: dict[str, tuple[Callable[..., None], Callable[..., Tensor]]] = {
    "backward_twice": (test_backward_twice, ScalesInPlace.apply),
    "own_storage": (test_results_of_backward_are_the_callers, HandsOutItsStorage.apply),
    "gradcheck": (test_gradcheck, WrongGradient.apply),
    "gradgradcheck": (test_gradgradcheck, NoSecondDerivative.apply),
    "second_derivative": (test_second_derivative_in_float32, NoSecondDerivative.apply),
    "forward_mode": (test_forward_mode, loses_the_tangent),
    "unwritten": (lambda op, device: test_outputs_are_written(op, device, torch.float32), leaves_output_unwritten),
    "input_changed": (test_inputs_are_left_alone, changes_its_input),
    "written_outside": (test_inputs_are_left_alone, changes_memory_behind),
    "read_outside": (test_inputs_are_left_alone, reads_memory_behind),
    "synchronises": (test_python_reads_no_value, reads_a_value),
    "graph_break": (test_compile, reads_a_value),
    "recompiles": (test_compile, loops_over_the_batch),
    "random": (test_two_runs_are_bitwise_equal, is_random),
    "precision": (lambda op, device: test_equals_reference_backend(op, device, torch.float32), computes_in_half),
    "layout": (test_layouts, mixes_the_batch),
    "graph": (test_no_graph_without_requires_grad, keeps_a_graph),
    "per_sample": (test_vmap, reads_a_value),
}


@pytest.mark.parametrize("name", NOTICED)
def test_the_contract_notices(name: str) -> None:
    """The plain loss passes this check; with one mistake in it, it does not."""
    check, broken = NOTICED[name]
    case = next(c for c in OPS if c.name == "cross_entropy/mean")
    cpu = torch.device("cpu")
    check(dataclasses.replace(case, call=plain_loss, image=None), cpu)
    torch._dynamo.reset()
    with pytest.raises(Exception) as caught:
        check(dataclasses.replace(case, call=broken, image=None), cpu)
    assert not isinstance(caught.value, (TypeError, NameError, KeyError)), caught.value
