"""Squeeze-and-excitation: pool, one or two layers, gate, scale, and a residual with its activation."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from . import calls
from .calls_of_torch import Call, call_of
from .graph import Facts, Left, Match, is_number, same_shape, same_size, shape, tensor, with_constant
from .group_norm import SLOPE, activation_after, residual_after

HIDDEN = {"relu": "relu", "silu": "silu", "gelu": "gelu", "leaky_relu": "leaky_relu"}
GATES = {"sigmoid": "sigmoid", "hardsigmoid": "hard_sigmoid", "relu": "relu"}
SEARCHED = 12  # nodes above a product in which a pool is looked for, to say why it is no match


class _Branch:
    """The gate of one x, read upwards from the product: node by node, each the only input of the one below."""

    def __init__(self, x: Node) -> None:
        self.x = x
        self.nodes: list[Node] = []  # from the product upwards

    def through(self, node: Any, channels: Any) -> Any:
        """Past reshapes of one vector of `channels` values per sample, which change no order."""
        while (call := call_of(node)) is not None and call.kind == "reshape" and not call.in_place:
            inner = call.get("input")
            if not (self.vector(node, channels) and self.vector(inner, channels)):
                break
            self.nodes.append(node)
            node = inner
        return node

    def vector(self, node: Any, width: Any) -> bool:
        """Whether a value is (N, 1, ..., width, 1, ...)."""
        if tensor(node) is None:
            return False
        first, *rest = shape(node) or (0,)
        wide = [size for size in rest if not same_size(size, 1)]
        fits = all(same_size(size, width) for size in wide) and len(wide) == (0 if same_size(width, 1) else 1)
        return bool(rest) and fits and same_size(first, shape(self.x)[0])

    def layer(self, node: Any) -> tuple[Any, Any, Any] | None:
        """(input, weight, bias) of a 1x1 convolution or a linear layer over one vector per sample."""
        call = call_of(node)
        if call is None or call.kind not in ("conv", "linear"):
            return None
        weight = shape(call.get("weight"))
        if len(weight) < 2 or not self.vector(node, weight[0]) or not self.vector(call.get("input"), weight[1]):
            return None
        if call.kind == "conv" and not _is_pointwise(call, weight):
            return None
        self.nodes.append(node)
        return call.get("input"), call.get("weight"), call.get("bias")


def _is_pointwise(call: Call, weight: tuple[Any, ...]) -> bool:
    """A 1x1 kernel at one position, with nothing padded: a matrix product."""
    padding = call.get("padding", 0)
    padded = padding not in ("same", "valid") and any(p != 0 for p in _several(padding))
    ones = (*weight[2:], *shape(call.get("input"))[2:])
    rank = len(shape(call.get("input")))
    return not padded and call.get("groups", 1) == 1 and rank == len(weight) and all(same_size(s, 1) for s in ones)


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def find(node: Node, facts: Facts) -> Match | None:
    call = call_of(node)
    if call is None or call.kind != "mul":
        return None
    left, right = call.operands
    for x, gate in ((left, right), (right, left)):
        if tensor(x) is None or tensor(gate) is None or x is gate or len(shape(x)) < 3:
            continue
        if not same_shape(shape(node), shape(x)):
            continue
        found = _match(node, call, x, gate, facts)
        if found is not None:
            return found
    return None


def _match(node: Node, call: Call, x: Node, gate: Node, facts: Facts) -> Match | None:
    branch = _Branch(x)
    read = _gate(branch, gate)
    if read is None:
        _say_why_not(x, gate)
        return None
    gate_name, layout, layers, hidden = read
    if call.in_place:
        raise Left("the product is in place on x")
    nodes = [*reversed(branch.nodes), node]
    dtype = tensor(x).dtype
    if any(tensor(n) is None or tensor(n).dtype != dtype for n in nodes):
        raise Left("autocast: the layers run in another dtype than x")

    last, residual, activation = node, residual_after(node), None
    if residual is not None:
        last = residual[1]
        nodes.append(last)
        activation = activation_after(last)
        nodes += activation[1] if activation is not None else []
    (w2, b2), (w1, b1) = layers[0], layers[1] if len(layers) == 2 else (None, None)
    middle = f"{hidden}, {gate_name}" if len(layers) == 2 else f"one layer, {gate_name}"
    extra = " + residual" if residual else ""
    extra += f" + {activation[0]}" if activation else ""
    return Match(
        "squeeze_excite",
        f"squeeze_excite ({middle}){extra}",
        _kind(x, layout, facts),
        sorted(nodes, key=facts.position.__getitem__),
        calls.squeeze_excite,
        (x, w1, b1, w2, b2, hidden or "relu", gate_name, residual[0] if residual else None,
         activation[0] if activation else None, layout),
        op="squeeze_excite_fwd",
    )  # fmt: skip


def _kind(x: Node, layout: str, facts: Facts) -> str:
    if layout == "channels_last":
        return "tokens" if len(shape(x)) == 3 else ""
    contiguous = not same_size(tensor(x).stride(1), 1)
    return "contiguous network" if contiguous and facts.convolves else ""


def _say_why_not(x: Node, gate: Node) -> None:
    """Raises Left with what stands between a pool of x and the product, where it has the layers of this block."""
    node: Any = gate
    layers, strange = 0, ""
    for _ in range(SEARCHED):
        if any(_pool(_Branch(x), node, layout) for layout in ("channels_first", "channels_last")):
            if layers:
                raise Left(strange or "its layers are no plain 1x1 convolutions")
            return
        call = call_of(node)
        if not isinstance(node, Node) or node.op not in ("call_function", "call_method"):
            return
        layers += call is not None and call.kind in ("conv", "linear")
        if call is None or call.kind not in (*GATES, *HIDDEN, "conv", "linear", "reshape", "expand"):
            strange = f"`{getattr(node.target, '__name__', node.target)}` between the pool and the product"
        node = next((a for a in node.args if isinstance(a, Node)), None)


def _gate(branch: _Branch, gate: Any) -> tuple[str, str, list[tuple[Any, Any]], str] | None:
    """Read a gate upwards to the pool of x: its name, the layout of x, the layers from the last, the activation."""
    x_shape = shape(branch.x)
    call = call_of(gate)
    if call is not None and call.kind == "expand" and same_shape(shape(gate), x_shape):
        branch.nodes.append(gate)
        gate = call.get("input")
    places = {"channels_first": 1, "channels_last": len(x_shape) - 1}
    layouts = [name for name, at in places.items() if _stands(gate, x_shape, at)]
    if not layouts:
        return None
    # Both layouts fit a vector of one channel; then the pool decides.
    for layout in layouts:
        start = list(branch.nodes)
        channels = x_shape[1 if layout == "channels_first" else -1]
        read = _layers(branch, gate, channels, layout)
        if read is not None:
            name, layers, hidden = read
            return name, layout, layers, hidden
        branch.nodes = start
    return None


def _stands(gate: Any, x_shape: tuple[Any, ...], at: int) -> bool:
    wanted = [size if i in (0, at) else 1 for i, size in enumerate(x_shape)]
    return tensor(gate) is not None and same_shape(shape(gate), wanted)


def _layers(branch: _Branch, gate: Any, channels: Any, layout: str) -> tuple[str, list[tuple[Any, Any]], str] | None:
    node = branch.through(gate, channels)
    found = _gate_activation(branch, node)
    if found is None:
        return None
    name, node = found
    node = branch.through(node, channels)
    second = branch.layer(node)
    if second is None:
        return None
    above, w2, b2 = second
    width = shape(w2)[1]
    above = branch.through(above, width)
    if same_size(width, channels) and _pool(branch, above, layout):
        return name, [(w2, b2)], ""
    call = call_of(above)
    if call is None or call.kind not in HIDDEN:
        return None
    problem = ""
    if call.kind == "leaky_relu" and call.get("negative_slope", SLOPE) != SLOPE:
        problem = f"leaky_relu with slope {call.get('negative_slope')}"
    if call.kind == "gelu" and call.get("approximate", "none") != "none":
        problem = "gelu with the tanh approximation between the layers"
    branch.nodes.append(above)
    above = branch.through(call.get("input"), width)
    first = branch.layer(above)
    if first is None:
        return None
    pooled, w1, b1 = first
    pooled = branch.through(pooled, channels)
    if not _pool(branch, pooled, layout):
        return None
    if problem:
        raise Left(problem)
    return name, [(w2, b2), (w1, b1)], HIDDEN[call.kind]


def _gate_activation(branch: _Branch, node: Any) -> tuple[str, Any] | None:
    call = call_of(node)
    if call is None:
        return None
    if call.kind in GATES:
        branch.nodes.append(node)
        return GATES[call.kind], call.get("input")
    # relu6(z + 3) / 6, also as a product with 1/6
    divided = call.kind == "div" and call.operands[1] == 6
    if not divided and with_constant(node, "mul") is None:
        return None
    inner, factor = (call.operands[0], 6) if divided else with_constant(node, "mul")
    if not divided and factor != 1 / 6:
        return None
    clipped = call_of(inner)
    if clipped is None or not _is_relu6(clipped):
        return None
    moved = with_constant(clipped.get("input"), "add")
    if moved is None or moved[1] != 3:
        return None
    branch.nodes += [node, inner, clipped.get("input")]
    return "hard_sigmoid", moved[0]


def _is_relu6(call: Call) -> bool:
    limits = (call.get("min"), call.get("max"))
    return call.kind == "relu6" or (call.kind == "clamp" and all(map(is_number, limits)) and limits == (0, 6))


def _pool(branch: _Branch, node: Any, layout: str) -> bool:
    """Whether a node is the mean of x over all its positions."""
    call, x = call_of(node), branch.x
    if call is None or call.kind not in ("mean", "pool") or call.get("dtype") is not None:
        return False
    source, rank = call.get("input"), len(shape(x))
    if call.kind == "pool":
        size = _several(call.get("output_size"))
        spatial = len(shape(node)) - 2
        if layout != "channels_first" or source is not x or spatial != rank - 2 or any(s != 1 for s in size):
            return False
        branch.nodes.append(node)
        return True
    dims = call.get("dim")
    if call.get("*"):
        return False
    dims = None if dims is None else _several(dims)
    if dims is None or not all(type(d) is int for d in dims):
        return False
    flat = None
    inner = call_of(source)
    if source is not x and inner is not None and inner.kind == "reshape" and inner.get("input") is x:
        if layout != "channels_first" or len(shape(source)) != 3 or not same_shape(shape(source)[:2], shape(x)[:2]):
            return False
        flat, rank = source, 3
    elif source is not x:
        return False
    wanted = range(2, rank) if layout == "channels_first" else range(1, rank - 1)
    if sorted(d % rank for d in dims) != list(wanted):
        return False
    branch.nodes += [node] if flat is None else [node, flat]
    return True
