"""The rewrite of one graph: find, prove, decide, replace, report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import _backend
from . import center_loss, cross_entropy, focal_loss, group_norm, measured, squeeze_excite
from .calls_of_torch import checkpointed
from .graph import Facts, Left, Match, follow_in_place, same_size, tensor, value, where
from .report import Find, GraphFinds

# The larger patterns first: a residual may belong to two of them.
PATTERNS = {
    "squeeze_excite": squeeze_excite.find,
    "sigmoid_focal_loss": focal_loss.find,
    "cross_entropy": cross_entropy.find,
    "center_loss": center_loss.find,
    "group_norm": group_norm.find,
}


def rewrite(gm: GraphModule, record: GraphFinds, names: list[str], everything: bool) -> None:
    """Replace in place what is proven to be equal, in the graph and in its activation checkpoints."""
    for node in gm.graph.nodes:
        body = checkpointed(node)
        if body is not None:
            rewrite(body, record, names, everything)
    follow_in_place(gm.graph)
    facts = Facts(gm.graph)
    before = len(record.finds)
    for name in names:
        for node in list(gm.graph.nodes):
            if node not in facts.position or node.op not in ("call_function", "call_method"):
                continue  # part of what has been replaced
            _one(gm.graph, node, name, facts, record, everything)
    if len(record.finds) > before:
        gm.graph.lint()
        gm.recompile()


def _one(graph: Graph, node: Node, name: str, facts: Facts, record: GraphFinds, everything: bool) -> None:
    what, anchor = name, node
    try:
        match = PATTERNS[name](node, facts)
        if match is None:
            return
        what = match.what
        anchor = match.nodes[0] if name != "squeeze_excite" else node
        _prove(match, facts)
        reason = _decide(match, everything)
    except Left as left:
        record.finds.append(Find(name, what, *where(anchor), False, str(left)))
        return
    record.finds.append(Find(name, what, *where(anchor), True, reason))
    facts.replaced(match, _replace(graph, match))


# Proof ----------------------------------------------------------------------------------------------------------------


def _prove(match: Match, facts: Facts) -> None:
    """Raises Left unless nothing else sees a difference: users, order, and what the call makes of these inputs."""
    if facts.transforms:
        raise Left("inside of a torch.func transform")
    reason = facts.why_not(match)
    if reason:
        raise Left(reason)
    for node in match.inputs:
        found = tensor(node)
        if found is None or is_traceable_wrapper_subclass(found):
            raise Left(f"`{node.name}` is not a plain tensor")
    expected = tensor(match.last)
    try:
        made = _run(match)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Left(str(error).splitlines()[0]) from None
    if expected is None or made.dtype != expected.dtype or made.device != expected.device:
        raise Left(f"the result would be {made.dtype}")
    if not _same_layout(made, expected):
        match.dense = True  # as eager PyTorch makes an input that lies in no known order
        if not _same_layout(_run(match), expected):
            raise Left("the result would lie in memory in another order")


def _run(match: Match) -> Tensor:
    """The call on the values that the graph was captured with: shapes and strides, no arithmetic."""
    modes = {getattr(value(node), "fake_mode", None) for node in match.inputs}
    if len(modes) != 1 or None in modes:
        raise Left("the graph was captured without shapes")
    with modes.pop(), torch.no_grad():
        first, *rest = (value(a) for a in match.args)
        return match.function(first.contiguous() if match.dense else first, *rest)


def _same_layout(a: Tensor, b: Tensor) -> bool:
    if a.dim() != b.dim():
        return False
    pairs = zip(a.shape, b.shape, a.stride(), b.stride())
    return all(same_size(n, m) and (same_size(n, 1) or same_size(s, t)) for n, m, s, t in pairs)


# Decision -------------------------------------------------------------------------------------------------------------


def _decide(match: Match, everything: bool) -> str:
    """The reason to replace; raises Left with the reason not to."""
    made = tensor(match.last)
    device = made.device.type if made is not None else ""
    if everything:
        return "asked for"
    if device not in ("cpu", "cuda"):
        raise Left(f"no kernel for {device} tensors")
    try:
        served_by = _backend.choose(device, match.op)
    except RuntimeError as error:
        raise Left(str(error)) from None
    if served_by == "reference":
        raise Left("only the plain PyTorch reference would serve it here: see dlkernels.build_info()")
    training = any((found := tensor(node)) is not None and found.requires_grad for node in match.inputs)
    take, reason = measured.decide(match.pattern, match.kind, training and torch.is_grad_enabled(), device)
    if not take:
        raise Left(reason)
    return reason


# Replacement ----------------------------------------------------------------------------------------------------------


def _replace(graph: Graph, match: Match) -> Node:
    last, args = match.last, match.args
    with graph.inserting_before(last):
        if match.dense:
            args = (graph.call_method("contiguous", args[:1]), *args[1:])
            args[0].meta = {key: last.meta[key] for key in ("stack_trace", "nn_module_stack") if key in last.meta}
        call = graph.call_function(match.function, args)
    call.meta = dict(last.meta)
    last.replace_all_uses_with(call)
    for node in reversed(match.nodes):
        graph.erase_node(node)
    again: list[Any] = list(match.shared)
    for node in reversed(again):
        if not node.users:
            graph.erase_node(node)
    return call
