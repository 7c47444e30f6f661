"""AdamW: one step, with everything that users put around it.

    pytest benchmarks/bench_adamw.py                       the quick set, table at the end
    FULL=1 pytest benchmarks/bench_adamw.py -k vit_b16     more sizes and dtypes, selected by name

Eager is torch.optim.AdamW as it is built by default (on a CPU a loop over the parameters, on a GPU the multi-tensor
step) with the usual code around it; "torch foreach" and "torch fused" are the same optimizer asked for those.
Bytes are minimal: the gradient read, parameter and moments read and written: 28 per float32 parameter; clipping reads
the gradients once more.
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

BF16, FP16 = torch.bfloat16, torch.float16
OP = "adamw"
tensors, model = partial(optimizers.tensors, OP), partial(optimizers.model, OP)


def _ours(case: Case, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    return dk.optim.AdamW(params, lr=optimizers.LR, **optimizers.our_options(case))


def _torch(case: Case, params: Sequence[Tensor], **flags: Any) -> torch.optim.Optimizer:
    flags |= {"amsgrad": case.option("amsgrad", False), "capturable": optimizers.capturable(params)}
    return torch.optim.AdamW(params, lr=optimizers.LR, **flags)


def ours(case: Case) -> Function:
    return partial(optimizers.Ours, case, _ours)


def bytes_step(case: Case) -> int:
    return optimizers.minimal_bytes(case, 3 if case.option("amsgrad") else 2)


eager, PEERS = optimizers.usual(_torch)
CLIP, MASTER, SCALED = {"max_grad_norm": 1.0}, {"master_weights": True}, {"max_grad_norm": 1.0, "grad_scale": 0.5}
AVERAGE, AMSGRAD, ROUNDED = {"ema_decay": 0.999}, {"amsgrad": True}, {"stochastic_rounding": True}


# Cases ----------------------------------------------------------------------------------------------------------------

CASES = [
    tensors(1, 1 << 20),
    tensors(300, 256),
    tensors(300, 256, **CLIP),
    tensors(300, 256, BF16, **MASTER),
    model("lenet5"),
    model("resnet50"),
    model("resnet50", **CLIP),
    model("resnet50", **SCALED),
    model("resnet50", **AVERAGE),
    model("resnet50", **AMSGRAD),
    model("resnet50", BF16, **MASTER),
    model("resnet50", BF16),
    model("resnet50", BF16, **ROUNDED),
]

FULL_CASES = [
    tensors(1, 1 << 12),
    tensors(1, 1 << 20, BF16),
    tensors(1, 1 << 20, BF16, **MASTER),
    tensors(1, 1 << 20, FP16, **MASTER),
    tensors(1, 1 << 20, BF16, **ROUNDED),
    tensors(300, 256, BF16),
    tensors(300, 256, **SCALED),
    tensors(300, 256, **AVERAGE),
    tensors(300, 256, **AMSGRAD),
    tensors(1000, 1024),
    model("lenet5", **CLIP),
    model("resnet50", FP16, **MASTER, **SCALED),
    model("resnet50", BF16, **MASTER, **CLIP, **AVERAGE),
    model("vit_b16"),
    model("vit_b16", **CLIP),
    model("vit_b16", BF16, **MASTER),
    model("vit_b16", BF16, **ROUNDED),
]

# On a GPU the quick set is mostly launch cost: these fill one.
GPU_CASES = [
    tensors(1, 1 << 27),
    model("vit_b16"),
    model("vit_b16", **SCALED),
    model("vit_b16", BF16, **MASTER),
    model("vit_b16", BF16, **ROUNDED),
    tensors(300, 256, **SCALED),
]

# Small and ragged: for sanitizers, capture, rehearsal. Every kernel.
GATE_CASES = [
    model("ragged"),
    model("ragged", BF16, **MASTER, **CLIP),
    model("ragged", BF16, **ROUNDED),
    model("ragged", FP16, **MASTER, **AVERAGE),
    model("ragged", **AMSGRAD, **SCALED),
    tensors(300, 5, **AVERAGE),
]

TRAFFIC_CASES = [
    tensors(1, 1 << 28),
    tensors(1, 1 << 28, **CLIP),
    tensors(1, 1 << 28, BF16, **MASTER),
    tensors(1, 1 << 29, BF16, **ROUNDED),
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
