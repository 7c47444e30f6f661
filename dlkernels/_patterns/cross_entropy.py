"""Cross entropy, as one call or as a log-softmax and a negative log-likelihood."""

from __future__ import annotations

from torch.fx import Node

from . import calls
from .calls_of_torch import call_of
from .graph import Facts, Left, Match, is_number, shape, tensor


def find(node: Node, facts: Facts) -> Match | None:
    call = call_of(node)
    if call is None or call.kind not in ("cross_entropy", "nll"):
        return None
    x, target, nodes = call.get("input"), call.get("target"), [node]
    smoothing = call.get("label_smoothing", 0.0)
    if call.kind == "nll":
        inner = call_of(x)
        logits = inner.get("input") if inner is not None and inner.kind == "log_softmax" else None
        if logits is None:
            return None
        rank = len(shape(logits))
        if inner.get("dim") not in (1, 1 - rank) or rank < 2:
            return None
        if inner.get("dtype") is not None or tensor(x).dtype != tensor(logits).dtype:
            raise Left("the log-softmax changes the dtype")
        nodes, x = [x, node], logits
    weight, ignore, reduction = call.get("weight"), call.get("ignore_index", -100), call.get("reduction", "mean")
    if call.get("size_average") is not None or call.get("reduce") is not None:
        raise Left("the deprecated arguments size_average and reduce")
    made = tensor(node)
    if tensor(x) is None or tensor(target) is None or made is None:
        return None
    if type(ignore) is not int or not isinstance(reduction, str) or not is_number(smoothing):
        raise Left("arguments that are not constants")
    if tensor(target).requires_grad or (weight is not None and tensor(weight).requires_grad):
        raise Left("a gradient in the targets or the weights")
    kind = "none" if reduction == "none" else "positions" if len(shape(x)) > 2 else ""
    return Match(
        "cross_entropy",
        "cross_entropy" if call.kind == "cross_entropy" else "log_softmax + nll_loss",
        kind,
        nodes,
        calls.cross_entropy,
        (x, target, weight, ignore, reduction, float(smoothing), made.dtype),
        op="softmax_focal_loss_fwd",
    )
