"""GroupNorm with the modulation, the residual and the activation that follow it."""

from __future__ import annotations

from torch.fx import Node

from . import calls
from .calls_of_torch import call_of
from .graph import (
    Facts,
    Left,
    Match,
    broadcasts_per_channel,
    following,
    is_number,
    other_operand,
    same_tensor_kind,
    shape,
    tensor,
    with_constant,
)

SLOPE = 0.01


def activation_after(node: Node) -> tuple[str, list[Node]] | None:
    """The activation that alone uses a node: its name and its nodes."""
    found = following(node, "relu", "silu", "gelu", "leaky_relu")
    if found is not None:
        user, call = found
        name = call.kind
        if name == "leaky_relu" and call.get("negative_slope", SLOPE) != SLOPE:
            return None
        if name == "gelu":
            name = {"none": "gelu", "tanh": "gelu_tanh"}.get(call.get("approximate", "none"), "")
        return (name, [user]) if name else None
    return _written_out_silu(node)


def _written_out_silu(node: Node) -> tuple[str, list[Node]] | None:
    """x * sigmoid(x)"""
    users = list(node.users)
    gates = [user for user in users if (call := call_of(user)) and call.kind == "sigmoid" and not call.in_place]
    if len(users) != 2 or len(gates) != 1:
        return None
    product = following(gates[0], "mul")
    if product is None or product[1].in_place or other_operand(product[1], gates[0]) is not node:
        return None
    return "silu", [gates[0], product[0]]


def residual_after(node: Node) -> tuple[Node, Node] | None:
    """(residual, sum) where a tensor of the same shape and dtype is added and nothing else uses the node."""
    found = following(node, "add")
    other = None if found is None else other_operand(found[1], node)
    return (other, found[0]) if found is not None and same_tensor_kind(other, node) else None


def find(node: Node, facts: Facts) -> Match | None:
    call = call_of(node)
    if call is None or call.kind != "group_norm":
        return None
    x, groups, eps = call.get("input"), call.get("num_groups"), call.get("eps", 1e-5)
    weight, bias = call.get("weight"), call.get("bias")
    given, made = tensor(x), tensor(node)
    if given is None or made is None or type(groups) is not int or not is_number(eps):
        raise Left("arguments that are not constants")
    if made.dtype != given.dtype:
        raise Left(f"autocast: {given.dtype} becomes {made.dtype}")

    nodes, shared, last, parts = [node], [], node, ["group_norm"]
    scale, shift = None, None
    product = following(last, "mul")
    if product is not None:
        grown = with_constant(other_operand(product[1], last), "add")
        if grown is not None and grown[1] == 1 and broadcasts_per_channel(grown[0], last):
            scale = grown[0]
            shared.append(other_operand(product[1], last))
            last = product[0]
            nodes.append(last)
    moved = following(last, "add")
    if moved is not None and broadcasts_per_channel(other_operand(moved[1], last), last):
        shift = other_operand(moved[1], last)
        last = moved[0]
        nodes.append(last)
    if scale is not None or shift is not None:
        parts.append("scale and shift" if scale is not None and shift is not None else "scale" if scale else "shift")
    residual = residual_after(last)
    if residual is not None:
        last = residual[1]
        nodes.append(last)
        parts.append("residual")
    activation = activation_after(last)
    if activation is not None:
        nodes += activation[1]
        parts.append(activation[0])

    kind = "activation" if activation else ""
    kind = "residual" if residual else "film" if scale is not None or shift is not None else kind
    if _is_position_free(node):
        kind = "rows"
    return Match(
        "group_norm",
        " + ".join(parts),
        kind,
        nodes,
        calls.group_norm,
        (x, groups, weight, bias, float(eps), activation[0] if activation else None, residual[0] if residual else None,
         scale, shift),
        shared,
        op="group_norm_fwd",
    )  # fmt: skip


def _is_position_free(node: Node) -> bool:
    """(N, C): what is added there is a residual, not a shift."""
    return len(shape(node)) == 2
