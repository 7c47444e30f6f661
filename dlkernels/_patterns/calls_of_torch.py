"""The calls that patterns are made of: every spelling that torch has for one and the same computation."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

_CONV = "input weight bias stride padding dilation groups"
_ONE = "input"
_TWO = "input other"

# kind -> [(target, names of its arguments)]; a str is a tensor method, of which the first argument is the tensor.
_SPELLINGS: dict[str, list[tuple[Any, str]]] = {
    "relu": [(F.relu, "input inplace"), (torch.relu, _ONE), ("relu", _ONE)],
    "silu": [(F.silu, "input inplace")],
    "gelu": [(F.gelu, "input approximate")],
    "leaky_relu": [(F.leaky_relu, "input negative_slope inplace")],
    "sigmoid": [(torch.sigmoid, _ONE), (F.sigmoid, _ONE), (torch.special.expit, _ONE), ("sigmoid", _ONE)],
    "hardsigmoid": [(F.hardsigmoid, "input inplace")],
    "relu6": [(F.relu6, "input inplace")],
    "add": [(operator.add, _TWO), (torch.add, _TWO + " alpha"), ("add", _TWO + " alpha")],
    "sub": [(operator.sub, _TWO), (torch.sub, _TWO + " alpha"), ("sub", _TWO + " alpha")],
    "rsub": [(torch.rsub, _TWO + " alpha"), ("__rsub__", _TWO)],
    "mul": [(operator.mul, _TWO), (torch.mul, _TWO), ("mul", _TWO)],
    "div": [(operator.truediv, _TWO), (torch.div, _TWO), ("div", _TWO), (torch.true_divide, _TWO)],
    "pow": [(operator.pow, _TWO), (torch.pow, "input exponent"), ("pow", "input exponent")],
    "square": [(torch.square, _ONE), ("square", _ONE)],
    "mean": [(torch.mean, "input dim keepdim dtype"), ("mean", "input dim keepdim dtype")],
    "sum": [(torch.sum, "input dim keepdim dtype"), ("sum", "input dim keepdim dtype")],
    "pool": [
        (F.adaptive_avg_pool1d, "input output_size"),
        (F.adaptive_avg_pool2d, "input output_size"),
        (F.adaptive_avg_pool3d, "input output_size"),
        (torch.adaptive_avg_pool1d, "input output_size"),
    ],
    "conv": [(torch.conv1d, _CONV), (torch.conv2d, _CONV), (torch.conv3d, _CONV)],
    "linear": [(F.linear, "input weight bias")],
    "group_norm": [
        (F.group_norm, "input num_groups weight bias eps"),
        (torch.group_norm, "input num_groups weight bias eps cudnn_enabled"),
    ],
    # `reshape`: the same elements in the same order; what shape results is read from the value
    "reshape": [
        ("view", "input *"),
        ("reshape", "input *"),
        ("flatten", "input *"),
        ("unsqueeze", "input *"),
        ("squeeze", "input *"),
        ("view_as", _TWO),
        ("reshape_as", _TWO),
        ("contiguous", "input memory_format"),
        (torch.reshape, "input *"),
        (torch.flatten, "input *"),
        (torch.unsqueeze, "input *"),
        (torch.squeeze, "input *"),
    ],
    "expand": [("expand", "input *"), ("expand_as", _TWO)],
    "cast": [("float", _ONE), ("double", _ONE), ("long", _ONE), ("to", "input *"), ("type_as", _TWO)],
    "transpose": [("t", _ONE), (torch.t, _ONE)],
    "getitem": [(operator.getitem, _TWO)],
    "embedding": [(F.embedding, "index input padding_idx max_norm norm_type scale_grad_by_freq sparse")],
    "index_select": [(torch.index_select, "input dim index"), ("index_select", "input dim index")],
    "bce": [
        (F.binary_cross_entropy_with_logits, "input target weight size_average reduce reduction pos_weight"),
    ],
    "mse": [(F.mse_loss, "input target size_average reduce reduction weight")],
    "cross_entropy": [
        (F.cross_entropy, "input target weight size_average ignore_index reduce reduction label_smoothing"),
    ],
    "nll": [(F.nll_loss, "input target weight size_average ignore_index reduce reduction")],
    "log_softmax": [(F.log_softmax, "input dim _stacklevel dtype"), ("log_softmax", "input dim dtype"),
                    (torch.log_softmax, "input dim dtype")],
    "addmm": [("addmm", "input mat1 mat2 beta alpha"), (torch.addmm, "input mat1 mat2 beta alpha")],
    "matmul": [(operator.matmul, _TWO), (torch.matmul, _TWO), (torch.mm, _TWO), ("matmul", _TWO), ("mm", _TWO)],
    "eq": [(operator.eq, _TWO), (torch.eq, _TWO), ("eq", _TWO), ("__eq__", _TWO)],
    "arange": [(torch.arange, "*")],
    "clamp": [(torch.clamp, "input min max"), ("clamp", "input min max"), (torch.clip, "input min max"),
              ("clip", "input min max")],
}  # fmt: skip

# The same, changing their first argument.
_IN_PLACE: dict[str, list[tuple[Any, str]]] = {
    "relu": [(torch.relu_, _ONE), ("relu_", _ONE)],
    "leaky_relu": [(F.leaky_relu_, "input negative_slope")],
    "sigmoid": [(torch.sigmoid_, _ONE), ("sigmoid_", _ONE)],
    "add": [(operator.iadd, _TWO), ("add_", _TWO + " alpha")],
    "sub": [(operator.isub, _TWO), ("sub_", _TWO + " alpha")],
    "mul": [(operator.imul, _TWO), ("mul_", _TWO)],
    "div": [(operator.itruediv, _TWO), ("div_", _TWO)],
    "addmm": [("addmm_", "input mat1 mat2 beta alpha")],
    "clamp": [("clamp_", "input min max")],
}

_TABLE: dict[Any, tuple[str, str, bool]] = {
    target: (kind, names, in_place)
    for spellings, in_place in ((_SPELLINGS, False), (_IN_PLACE, True))
    for kind, several in spellings.items()
    for target, names in several
}


class Call(NamedTuple):
    """A call of a known kind, with its arguments by name."""

    kind: str
    args: dict[str, Any]
    in_place: bool

    def get(self, name: str, default: Any = None) -> Any:
        return self.args.get(name, default)

    @property
    def operands(self) -> tuple[Any, Any]:
        """The two sides of an elementwise call."""
        return self.args.get("input"), self.args.get("other", self.args.get("exponent"))


def call_of(node: Any) -> Call | None:
    """What a node computes, when it is one of the known calls with arguments that the table names."""
    if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
        return None
    try:
        found = _TABLE.get(node.target)
    except TypeError:  # an unhashable target
        return None
    if found is None:
        return None
    kind, spelled, in_place = found
    names = spelled.split()
    if names[-1] == "*":
        names, rest = names[:-1], True
    else:
        rest = False
    if len(node.args) > len(names) and not rest:
        return None
    args: dict[str, Any] = dict(zip(names, node.args))
    for name, value in node.kwargs.items():
        if name in args or not (rest or name in names):
            return None
        args[name] = value
    args["*"] = node.args[len(names) :]
    if kind == "getitem" and _only_adds_dimensions(args.get("other")):
        return Call("reshape", args, False)
    if args.get("alpha", 1) != 1 and kind in ("add", "sub", "rsub"):
        return None
    return Call(kind, args, in_place or bool(args.get("inplace", False)))


def _only_adds_dimensions(index: Any) -> bool:
    """x[:, :, None]"""
    parts = index if isinstance(index, tuple) else (index,)
    return None in parts and all(part is None or part is Ellipsis or part == slice(None) for part in parts)


_CHANGES_FIRST: set[Callable[..., Any]] = {
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul",
                 "ilshift", "irshift", "setitem", "delitem")
}  # fmt: skip
_CHANGES_STATISTICS = {F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm}
_PLAIN_MODULES = ("torch", "_operator", "math", "builtins", "torch.nn.functional", "dlkernels._patterns.calls")


def changed_arguments(node: Node) -> list[Any]:
    """Arguments that a node may change in place; all of them for a call that is not known."""
    every = [*node.args, *node.kwargs.values()]
    if node.op == "call_method":
        name = str(node.target)
        return [node.args[0]] if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) else []
    if node.op == "call_module":
        return every
    if node.op != "call_function":
        return []
    changed = [node.kwargs["out"]] if node.kwargs.get("out") is not None else []
    call = call_of(node)
    if node.kwargs.get("inplace") is True or (call is not None and call.in_place):
        return [*changed, node.args[0] if node.args else node.kwargs.get("input")]
    if call is not None:
        return changed if call.get("max_norm") is None else every
    target: Any = node.target
    if target in _CHANGES_FIRST:
        return [node.args[0]]
    if target in _CHANGES_STATISTICS:
        return [node.args[i] for i in (1, 2, 3, 4) if i < len(node.args)] + [
            node.kwargs.get("running_mean"), node.kwargs.get("running_var")]  # fmt: skip
    if isinstance(target, torch._ops.OpOverload):
        names = list(target._schema.arguments)
        written = [a.alias_info is not None and a.alias_info.is_write for a in names]
        return [a for a, w in zip(node.args, written) if w] + [
            node.kwargs[a.name] for a, w in zip(names, written) if w and a.name in node.kwargs]  # fmt: skip
    name = getattr(target, "__name__", "")
    module = getattr(target, "__module__", None) or ""
    if isinstance(target, torch._ops.HigherOrderOperator):
        body = checkpointed(node)
        return [] if body is not None and not any(changed_arguments(inner) for inner in body.graph.nodes) else every
    if isinstance(target, torch._ops.OpOverloadPacket):
        return every
    if name.endswith("_") and not name.endswith("__"):
        return every
    if name == "embedding_bag" or (name in _INPLACE_FLAG and True in node.args):
        return every
    known = module in _PLAIN_MODULES or module.startswith(("torch._C", "torch.functional", "torch._tensor"))
    known = known or (module.startswith("torch.") and "autograd" not in module)
    return changed if known else every


def checkpointed(node: Node) -> GraphModule | None:
    """The body of an activation checkpoint."""
    if node.op != "call_function" or node.target is not torch.ops.higher_order.tag_activation_checkpoint:
        return None
    body, owner = node.args[0], node.graph.owning_module
    if not isinstance(body, Node) or body.op != "get_attr" or owner is None:
        return None
    found = getattr(owner, str(body.target), None)
    return found if isinstance(found, GraphModule) else None


_INPLACE_FLAG = {"hardtanh", "relu6", "elu", "selu", "celu", "rrelu", "hardswish", "hardsigmoid", "mish", "threshold",
                 "dropout", "alpha_dropout", "dropout1d", "dropout2d", "dropout3d"}  # fmt: skip
