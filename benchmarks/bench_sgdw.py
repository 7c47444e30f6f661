"""SGDW: one step, with everything that users put around it.

    pytest benchmarks/bench_sgdw.py                        the quick set, table at the end
    FULL=1 pytest benchmarks/bench_sgdw.py -k vit_b16      more sizes and dtypes, selected by name

torch has no SGDW: the other candidates are torch.optim.SGD without its own (L2) decay, and before it the decoupled
decay, where the case has one. Without a decay, that is torch.optim.SGD alone: the bar for speed.
Bytes are minimal: the gradient read, parameter and momentum read and written: 20 per float32 parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import optimizers
import pytest
import torch
from harness import Case, Family, Function
from torch import Tensor

import dlkernels as dk

BF16 = torch.bfloat16
OP = "sgdw"
tensors, model = partial(optimizers.tensors, OP), partial(optimizers.model, OP)


def _ours(case: Case, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    return dk.optim.SGDW(params, lr=optimizers.LR, **optimizers.our_options(case))


def _torch(case: Case, params: Sequence[Tensor], **flags: Any) -> torch.optim.Optimizer:
    flags |= {"momentum": case.option("momentum", 0.9), "nesterov": case.option("nesterov", False)}
    return torch.optim.SGD(params, lr=optimizers.LR, **flags)


def ours(case: Case) -> Function:
    return partial(optimizers.Ours, case, _ours)


def bytes_step(case: Case) -> int:
    return optimizers.minimal_bytes(case, 1 if case.option("momentum", 0.9) else 0)


# The schedule is at 1: the decay of a step is the weight decay.
eager, PEERS = optimizers.usual(_torch, lambda case: case.option("weight_decay", 0.0))
CLIP, MASTER, DECAY = {"max_grad_norm": 1.0}, {"master_weights": True}, {"weight_decay": 1e-4}
NESTEROV = {"nesterov": True, "momentum_scaling": "gradient"}


# Cases ----------------------------------------------------------------------------------------------------------------

CASES = [
    tensors(1, 1 << 20),
    tensors(300, 256),
    tensors(300, 256, **DECAY),
    model("lenet5"),
    model("resnet50"),
    model("resnet50", **DECAY),
    model("resnet50", **CLIP),
    model("resnet50", BF16, **MASTER),
]

FULL_CASES = [
    tensors(1, 1 << 12),
    tensors(1, 1 << 20, BF16),
    tensors(1, 1 << 20, momentum=0.0),
    tensors(1, 1 << 20, **NESTEROV),
    tensors(300, 256, BF16, **MASTER),
    tensors(300, 256, **CLIP),
    tensors(1000, 1024),
    model("lenet5", **DECAY, **CLIP),
    model("resnet50", BF16),
    model("resnet50", ema_decay=0.999),
    model("resnet50", grad_scale=0.5, **CLIP),
    model("vit_b16"),
    model("vit_b16", **DECAY),
]

# On a GPU the quick set is mostly launch cost: these fill one.
GPU_CASES = [
    tensors(1, 1 << 27),
    model("vit_b16"),
    model("vit_b16", **DECAY, **CLIP),
    model("vit_b16", BF16, **MASTER),
]

# Small and ragged: for sanitizers, capture, rehearsal. Every kernel.
GATE_CASES = [
    model("ragged", **DECAY),
    model("ragged", momentum=0.0),
    model("ragged", **NESTEROV, **CLIP),
    model("ragged", BF16, **MASTER, **DECAY),
    model("ragged", BF16, stochastic_rounding=True),
    tensors(300, 5, ema_decay=0.999),
]

TRAFFIC_CASES = [
    tensors(1, 1 << 28),
    tensors(1, 1 << 28, **CLIP),
    tensors(1, 1 << 28, BF16, **MASTER),
]

FAMILY = Family(
    OP, CASES, FULL_CASES, optimizers.inputs, ours, eager, bytes_step, lambda case: 0, PEERS, GPU_CASES, GATE_CASES,
    TRAFFIC_CASES, compiles=False,
)  # fmt: skip


@pytest.mark.parametrize("case", FAMILY.selected(), ids=lambda case: case.name.replace(" ", "-"))
def test_bench(case: Case, bench: Callable[[Family, Case], None]) -> None:
    bench(FAMILY, case)


assert all(math.prod(shape) * case.itemsize < 32 << 20 for case in CASES for shape in optimizers.shapes(case)), (
    "quick cases stay below 32 MB a tensor"
)
