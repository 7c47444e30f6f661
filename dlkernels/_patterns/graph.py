"""Reading a captured graph: values, shapes, users, regions, and what is changed in place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .calls_of_torch import Call, call_of, changed_arguments


class Left(Exception):
    """Something was recognised that must stay as it is; the message says why."""


@dataclass
class Match:
    """A subgraph and the call that computes the same."""

    pattern: str  # the family, as the report names it
    what: str  # group_norm + silu
    kind: str  # of the case, for the table that decides
    nodes: list[Node]  # replaced; the last one is the result, the others are used by these only
    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    shared: list[Node] = field(default_factory=list)  # computed anew by the call; others may use them too
    op: str = ""  # the operator that serves it
    dense: bool = False  # make the first argument contiguous: the result lies in memory as it does

    @property
    def last(self) -> Node:
        return self.nodes[-1]

    @property
    def inputs(self) -> list[Node]:
        return [a for a in self.args if isinstance(a, Node)]


# Values ---------------------------------------------------------------------------------------------------------------


def value(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, Node) else node


def tensor(node: Any) -> Tensor | None:
    """The value of a node that is a tensor."""
    found = value(node)
    return found if isinstance(node, Node) and isinstance(found, Tensor) else None


def shape(node: Any) -> tuple[Any, ...]:
    found = tensor(node)
    if found is None:
        raise Left("a value without a known shape")
    return tuple(found.shape)


def is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def surely(condition: Any) -> bool:
    """Whether a condition on sizes holds for every size that the graph stands for; asks for no new guard."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def same_size(a: Any, b: Any) -> bool:
    return a is b or surely(a == b)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(same_size, a, b))


def same_tensor_kind(a: Any, b: Any) -> bool:
    """Equal shape, dtype and device."""
    x, y = tensor(a), tensor(b)
    if x is None or y is None or x.dtype != y.dtype or x.device != y.device:
        return False
    return same_shape(x.shape, y.shape)


def broadcasts_per_channel(node: Any, like: Any) -> bool:
    """Whether a tensor is (N, C, 1, ...) beside (N, C, d1, ...), in its dtype."""
    x, y = tensor(node), tensor(like)
    if x is None or y is None or x.dtype != y.dtype or x.dim() != y.dim() or x.dim() < 3:
        return False
    return same_shape(x.shape[:2], y.shape[:2]) and all(same_size(s, 1) for s in x.shape[2:])


# Users ----------------------------------------------------------------------------------------------------------------


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def other_operand(call: Call, node: Node) -> Any:
    """The other side of a two-sided call that takes `node` on exactly one side; else None."""
    left, right = call.operands
    if (left is node) == (right is node):
        return None
    return right if left is node else left


def following(node: Node, *kinds: str) -> tuple[Node, Call] | None:
    """The only user of a node when it is one of these calls. In place, it must change this node and not the other."""
    user = only_user(node)
    call = call_of(user)
    if user is None or call is None or call.kind not in kinds:
        return None
    if call.in_place and call.get("input") is not node:
        return None
    return user, call


def with_constant(node: Any, kind: str) -> tuple[Node, float] | None:
    """(x, c) of x + c, c + x, x * c or c * x."""
    call = call_of(node)
    if call is None or call.kind != kind or call.in_place:
        return None
    left, right = call.operands
    if isinstance(left, Node) and is_number(right):
        return left, right
    if isinstance(right, Node) and is_number(left):
        return right, left
    return None


def one_minus(node: Any) -> Node | None:
    """x of 1 - x."""
    call = call_of(node)
    if call is None or call.in_place:
        return None
    left, right = call.operands
    if call.kind == "rsub":
        left, right = right, left
    if call.kind not in ("sub", "rsub") or not is_number(left) or left != 1 or not isinstance(right, Node):
        return None
    return right


# A graph --------------------------------------------------------------------------------------------------------------


def _storages(found: Any) -> set[int]:
    if isinstance(found, Tensor):
        try:
            return {found.untyped_storage()._cdata}
        except (NotImplementedError, RuntimeError):
            return set()
    if isinstance(found, (tuple, list)):
        return set().union(*map(_storages, found)) if found else set()
    return set()


def storages(nodes: Iterable[Any]) -> set[int]:
    """Whose memory these are: a view has the storage of its base."""
    every: set[int] = set()
    for node in nodes:
        if isinstance(node, (list, tuple)):
            every |= storages(node)
        elif isinstance(node, Node):
            every |= _storages(value(node))
    return every


def follow_in_place(graph: Graph) -> None:
    """Let what reads a tensor after a change in place read the result of that change, which is the same tensor."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        call = call_of(node)
        if call is None or not call.in_place:
            continue
        changed = call.get("input")
        if not isinstance(changed, Node) or changed.op not in ("call_function", "call_method"):
            continue
        for user in list(changed.users):
            if user.op != "output" and order[user] > order[node]:
                user.replace_input_with(changed, node)


class Facts:
    """What holds for a whole graph, computed once: positions, regions, and what changes which memory."""

    def __init__(self, graph: Graph) -> None:
        self.position: dict[Node, int] = {}
        self.region: dict[Node, int] = {}
        self.changes: list[tuple[int, Node, set[int]]] = []
        self.transforms = False
        self.convolves = False  # some convolution with positions, which a compiler may run in another layout
        region = 0
        for index, node in enumerate(graph.nodes):
            self.position[node] = index
            if _changes_context(node):
                region += 1
            self.region[node] = region
            if "functorch" in str(getattr(node.target, "__module__", "")) or "_nesting" in str(node.target):
                self.transforms = True
            self.convolves = self.convolves or _convolves(node)
            changed = changed_arguments(node)
            if changed:
                self.changes.append((index, node, storages(changed)))

    def replaced(self, match: Match, call: Node) -> None:
        """Bring the facts up to date: the call stands where the result stood."""
        self.position[call], self.region[call] = self.position[match.last], self.region[match.last]
        for node in match.nodes:
            del self.position[node], self.region[node]
        gone = set(match.nodes)
        self.changes = [change for change in self.changes if change[1] not in gone]

    def why_not(self, match: Match) -> str:
        """Empty when the replacement sees and leaves behind what the subgraph did, else the reason."""
        inside = set(match.nodes)
        for node in match.nodes[:-1]:
            if not set(node.users) <= inside:
                return f"`{node.name}` is used elsewhere too"
        every = [*match.nodes, *match.shared]
        if len({self.region[node] for node in every}) > 1:
            return "grad mode or autocast changes inside"
        begin = min(self.position[node] for node in every)
        end = self.position[match.last]
        memory = storages(match.inputs)
        between = memory | storages(match.nodes[:-1]) | storages(match.shared)
        for index, node, touched in self.changes:
            if node in inside:
                if touched & memory:
                    return f"`{node.name}` changes an input in place"
            elif begin < index < end and touched & between:
                return f"`{node.name}` changes in place what it reads"
            elif index > end and touched & memory:
                return f"`{node.name}` changes an input in place later"  # the call may keep it for its backward pass
        return ""


def _convolves(node: Node) -> bool:
    call = call_of(node)
    made = tensor(node) if call is not None and call.kind == "conv" else None
    return made is not None and made.dim() > 3 and not all(same_size(size, 1) for size in made.shape[2:])


def _changes_context(node: Node) -> bool:
    """Whether a node switches grad mode, autocast, a stream or a transform: it has no value, and changes no tensor."""
    if node.op != "call_function" or node.meta.get("example_value") is not None:
        return False
    return str(getattr(node.target, "__module__", "")).startswith("torch") and not storages(node.args)


# Where a find stands --------------------------------------------------------------------------------------------------


def where(node: Node) -> tuple[str, str]:
    """The path of the module and file:line of the user's code."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    if stack:
        path = _module_path(str(list(stack.values())[-1][0]))
    line = ""
    folder = f"{torch.__path__[0]}{os.sep}"
    for text in (node.meta.get("stack_trace") or "").splitlines():
        text = text.strip()
        if text.startswith('File "'):
            file, _, rest = text.removeprefix('File "').partition('", line ')
            if not file.startswith(folder):
                line = f"{file}:{rest.split(',')[0]}"
    return path, line


def _module_path(source: str) -> str:
    """L['self'].layer[0]._modules['norm'] -> layer.0.norm"""
    for old, new in ((".__dict__['_modules'][", "."), ("._modules[", "."), ("[", "."), ("]", ""), ("'", ""), ('"', "")):
        source = source.replace(old, new)
    parts = [part for part in source.split(".") if part]
    return ".".join(parts[2:] if parts[:1] == ["L"] else parts)
