"""Focal-loss family: sigmoid focal, softmax focal, cross entropy.

    pytest benchmarks/bench_focal_loss.py                     the quick set, table at the end
    FULL=1 pytest benchmarks/bench_focal_loss.py -k bf16      more sizes, selected by name

Bytes are minimal: logits and targets read once, the gradient written once. A mean or a sum with a backward pass writes
its gradient while the logits are at hand; reduction="none" has to read them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
import torch.nn.functional as F
from harness import Case, Family, Function, Peer
from torch import Tensor

import dlkernels as dk

BF16, FP16 = torch.bfloat16, torch.float16
SIGMOID, SOFTMAX, CE = "sigmoid_focal_loss", "softmax_focal_loss", "cross_entropy"


# Inputs and minimal bytes ---------------------------------------------------------------------------------------------


def inputs(case: Case, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    """(logits, targets[, per-class weights]): logits as of a network half trained, few positives for sigmoid."""
    rand = lambda *shape: torch.rand(*shape, device=device, generator=generator)  # noqa: E731
    x = torch.randn(case.shape, device=device, generator=generator).mul_(2.0).to(case.dtype)
    classes = case.shape[1]
    rows = (case.shape[0], *case.shape[2:])
    labels = torch.randint(classes, rows, device=device, generator=generator)
    if case.op == SIGMOID:
        if case.targets == "float":
            return x, (rand(*case.shape) < 0.02).to(case.dtype)
        return x, torch.where(rand(*rows) < 0.1, labels, -1)  # -1: background
    target = torch.softmax(2 * rand(*case.shape), 1).to(case.dtype) if case.targets == "soft" else labels
    return (x, target, 0.5 + rand(classes)) if case.option("weights") else (x, target)


def _rows(case: Case) -> int:
    return case.numel if case.op == SIGMOID else case.numel // case.shape[1]


def _read(case: Case) -> int:
    """Logits, targets (class indices are int64) and per-class weights."""
    index = 8 * (case.numel // case.shape[1])
    targets = index if case.targets == "index" else case.numel * case.itemsize
    return case.numel * case.itemsize + targets + (4 * case.shape[1] if case.option("weights") else 0)


def bytes_fwd(case: Case) -> int:
    """Read logits and targets; write the loss in fp32."""
    return _read(case) + 4 * (_rows(case) if case.reduction == "none" else 1)


def bytes_bwd(case: Case) -> int:
    """Write the gradient; with reduction="none" also read the upstream gradient, the logits and the targets again."""
    again = _read(case) + 4 * _rows(case) if case.reduction == "none" else 0
    return case.numel * case.itemsize + again


# Candidates -----------------------------------------------------------------------------------------------------------


def ours(case: Case) -> Function:
    reduction, smoothing = case.reduction, case.option("label_smoothing", 0.0)
    if case.op == SIGMOID:
        return lambda x, t: dk.sigmoid_focal_loss(x, t, 0.25, 2.0, reduction)
    if case.op == SOFTMAX:
        return lambda x, t, w=None: dk.softmax_focal_loss(x, t, w, 2.0, reduction, label_smoothing=smoothing)
    return lambda x, t, w=None: dk.cross_entropy(x, t, w, reduction=reduction, label_smoothing=smoothing)


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _eager_sigmoid(x: Tensor, t: Tensor, reduction: str) -> Tensor:
    """torchvision.ops.sigmoid_focal_loss, line by line."""
    p = torch.sigmoid(x)
    ce_loss = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    p_t = p * t + (1 - p) * (1 - t)
    loss = ce_loss * ((1 - p_t) ** 2.0)
    alpha_t = 0.25 * t + (1 - 0.25) * (1 - t)
    return _reduce(alpha_t * loss, reduction)


def _eager_sigmoid_classes(x: Tensor, y: Tensor, reduction: str) -> Tensor:
    """The same from class indices: detectors scatter a one-hot matrix, with one column more for the background."""
    one_hot = x.new_zeros(x.shape[0], x.shape[1] + 1)
    one_hot.scatter_(1, torch.where(y < 0, x.shape[1], y).unsqueeze(1), 1.0)
    return _eager_sigmoid(x, one_hot[:, :-1], reduction)


def _eager_softmax(x: Tensor, y: Tensor, alpha: Tensor | None, reduction: str) -> Tensor:
    log_p = F.log_softmax(x, dim=1)
    log_pt = log_p.gather(1, y.unsqueeze(1)).squeeze(1)
    loss = -((1 - log_pt.exp()) ** 2.0) * log_pt
    return _reduce(loss if alpha is None else alpha[y] * loss, reduction)


def eager(case: Case) -> Function:
    reduction, smoothing = case.reduction, case.option("label_smoothing", 0.0)
    if case.op == SIGMOID:
        body = _eager_sigmoid if case.targets == "float" else _eager_sigmoid_classes
        return lambda x, t: body(x, t, reduction)
    if case.op == SOFTMAX:
        return lambda x, t, w=None: _eager_softmax(x, t, w, reduction)
    return lambda x, t, w=None: F.cross_entropy(
        x, t, None if w is None else w.to(x.dtype), reduction=reduction, label_smoothing=smoothing
    )


def _torchvision(case: Case) -> Function | None:
    from torchvision.ops import sigmoid_focal_loss

    if case.op != SIGMOID or case.targets != "float":
        return None
    return lambda x, t: sigmoid_focal_loss(x, t, 0.25, 2.0, case.reduction)


def _kornia(case: Case) -> Function | None:
    from kornia.losses import binary_focal_loss_with_logits

    if case.op != SIGMOID or case.targets != "float":
        return None
    return lambda x, t: binary_focal_loss_with_logits(x, t, alpha=0.25, gamma=2.0, reduction=case.reduction)


def _monai(case: Case) -> Function | None:
    from monai.losses import FocalLoss

    if case.op == SIGMOID and case.targets == "float" and case.reduction == "mean":
        return FocalLoss(gamma=2.0, alpha=0.25, reduction="mean")
    return None


def _liger(case: Case) -> Function | None:
    from liger_kernel.transformers.functional import liger_cross_entropy

    plain = case.op == CE and case.targets == "index" and len(case.shape) == 2 and not case.option("weights")
    if not plain:
        return None
    smoothing: float = case.option("label_smoothing", 0.0)
    # Its forward pass writes the gradient over the logits: on a copy, as every other candidate keeps them.
    return lambda x, t: liger_cross_entropy(x.clone(), t, label_smoothing=smoothing, reduction=case.reduction)


PEERS = (
    Peer("torchvision", "torchvision", _torchvision),
    Peer("kornia", "kornia", _kornia),
    Peer("monai", "monai", _monai),
    Peer("liger", "liger_kernel", _liger, gpu_only=True),
)


# Cases ----------------------------------------------------------------------------------------------------------------


def both(op: str, shape: tuple[int, ...], *args: Any, **kwargs: Any) -> list[Case]:
    return harness.both(Case(op, shape, *args, **kwargs))


RETINANET = (12137, 91)
SCALED: dict[str, Any] = {"loss_scale": 1024.0}

CASES = [
    *both(SIGMOID, (1024, 1024), targets="float"),
    *both(SIGMOID, (64, 64), targets="float"),
    *both(SIGMOID, RETINANET, reduction="sum", targets="float"),
    *both(SIGMOID, RETINANET, reduction="sum"),
    Case(SIGMOID, RETINANET, reduction="none", targets="float"),
    Case(SIGMOID, (1024, 1024), BF16, targets="float"),
    Case(SIGMOID, (1024, 1024), FP16, targets="float", **SCALED),
    *both(SOFTMAX, (4096, 1000)),
    *both(SOFTMAX, (4096, 10)),
    Case(SOFTMAX, (4096, 1000), reduction="none"),
    Case(SOFTMAX, (4096, 1000), options=(("weights", True),)),
    Case(SOFTMAX, (4096, 1000), BF16),
    Case(SOFTMAX, (4, 21, 128, 128)),
    *both(CE, (4096, 1000)),
    *both(CE, (256, 32000)),
    *both(CE, (256, 32000), BF16),
    *both(CE, (128, 10)),
    Case(CE, (8, 10)),
    Case(CE, (65536, 100)),
    Case(CE, (4096, 1000), reduction="none"),
    Case(CE, (4096, 1000), options=(("label_smoothing", 0.1),)),
    Case(CE, (4096, 1000), targets="soft"),
    Case(CE, (4096, 1000), options=(("weights", True),)),
    Case(CE, (4096, 1000), BF16),
    Case(CE, (4096, 1000), FP16, **SCALED),
    *both(CE, (4, 21, 128, 128)),
    *both(CE, (4, 21, 128, 128), layout="channels_last"),
    Case(CE, (4, 21, 128, 128), BF16),
]

FULL_CASES = [
    *(c for n in (16, 32768, 7_000_000) for c in both(SIGMOID, (n, 1), targets="float")),
    *(c for dtype in (BF16, FP16) for c in both(SIGMOID, RETINANET, dtype, reduction="sum")),
    *(c for classes in (2, 10, 100, 21841) for c in both(SOFTMAX, (256, classes))),
    *(c for classes in (2, 10, 100, 1000, 21841) for c in both(CE, (256, classes))),
    *(c for classes in (1000, 32000, 262144) for c in both(CE, (1, classes))),
    *(c for dtype in (torch.float32, BF16) for c in both(CE, (16, 262144), dtype)),
    *both(CE, (32, 128256), BF16),
    *both(CE, (65536, 10)),
    *both(CE, (65536, 100), BF16),
    *both(CE, (2, 19, 256, 512)),
    *both(CE, (2, 19, 256, 512), BF16, layout="channels_last"),
    Case(CE, (4096, 1000), BF16, targets="soft"),
    Case(CE, (4096, 1000), targets="soft", options=(("label_smoothing", 0.1),)),
    Case(SOFTMAX, (4, 21, 128, 128), layout="channels_last"),
    Case(SIGMOID, (1024, 1024), BF16, reduction="none", targets="float"),
]

# On a GPU the quick set is mostly launch cost: these fill one.
GPU_CASES = [
    *(c for dtype in (torch.float32, BF16) for c in both(SIGMOID, (65536, 1024), dtype, targets="float")),
    *both(SIGMOID, (16 * 12137, 91), reduction="sum"),
    *(c for dtype in (torch.float32, BF16) for c in both(SOFTMAX, (65536, 1000), dtype)),
    *(c for dtype in (torch.float32, BF16) for c in both(CE, (8192, 32000), dtype)),
    Case(CE, (4096, 128256), BF16),
    Case(CE, (16384, 8192), BF16),
    Case(CE, (65536, 1000), targets="soft"),
    *both(CE, (16, 21, 512, 512)),
    Case(CE, (16, 21, 512, 512), BF16, layout="channels_last"),
]

# Small and ragged: for sanitizers, capture, rehearsal. Every kernel, every way of giving targets.
GATE_CASES = [
    Case(SIGMOID, (37, 13), targets="float"),
    Case(SIGMOID, (37, 13), BF16, reduction="sum"),
    Case(SIGMOID, (37, 13), FP16, reduction="none", targets="float"),
    Case(SOFTMAX, (33, 10)),
    Case(SOFTMAX, (5, 1000), BF16, options=(("weights", True),)),
    Case(SOFTMAX, (3, 4099), reduction="none"),
    Case(SOFTMAX, (2, 5, 7, 9)),
    Case(CE, (33, 10), FP16, **SCALED),
    Case(CE, (3, 33001), BF16),
    Case(CE, (5, 1000), targets="soft", options=(("label_smoothing", 0.1),)),
    Case(CE, (2, 5, 7, 9), reduction="none"),
    Case(CE, (2, 5, 8, 8), layout="channels_last"),
]

# Gradients of about a gigabyte, so that what an L2 still holds when a kernel ends is a few percent of what it wrote.
TRAFFIC_CASES = [
    Case(SIGMOID, (262144, 1024), targets="float"),
    Case(SIGMOID, (2 * 262144, 1024), BF16, reduction="sum"),
    Case(SIGMOID, (262144, 1024), reduction="none", targets="float"),
    Case(SOFTMAX, (262144, 1000)),
    Case(SOFTMAX, (262144, 1000), reduction="none"),
    Case(CE, (32 * 1048576, 10)),
    Case(CE, (16384, 32000), BF16),
    Case(CE, (4096, 128256), BF16),
    Case(CE, (262144, 1000), targets="soft"),
    Case(CE, (64, 21, 512, 512)),
    Case(CE, (64, 21, 512, 512), layout="channels_last"),
]

FAMILY = Family(
    "focal_loss", CASES, FULL_CASES, inputs, ours, eager, bytes_fwd, bytes_bwd, PEERS, GPU_CASES, GATE_CASES,
    TRAFFIC_CASES,
)  # fmt: skip


@pytest.mark.parametrize("case", FAMILY.selected(), ids=lambda case: case.name.replace(" ", "-"))
def test_bench(case: Case, bench: Callable[[Family, Case], None]) -> None:
    bench(FAMILY, case)


assert all(math.prod(case.shape) * case.itemsize < 32 << 20 for case in CASES), "quick cases stay below 32 MB a tensor"
