"""A rule says which class is swapped, how it is known, what its forward becomes, and when not to."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import linecache
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ._activations import qualified


def mixed_dtypes(module: nn.Module) -> str:
    """Why a module with parameters of several dtypes is not swapped; "" for one dtype."""
    dtypes = {p.dtype for p in module.parameters()}
    return "" if len(dtypes) < 2 else f"parameters of several dtypes: {', '.join(sorted(map(str, dtypes)))}"


def never(module: nn.Module) -> str:
    """The check of a rule that has nothing to refuse."""
    return ""


@dataclass(frozen=True)
class Rule:
    """How the modules of one class are swapped.

    family: what `include` names.
    forward: forward(self, ...) of the fused class; calls `super(Fused, self).forward` for what it does not serve. None
        where it stays.
    fingerprints: of the forward passes that it stands for; a class with another one is refused. Empty: any.
    check: why a module of this class is not swapped, in a few words; "" when it is.
    members, make: what else the fused class has, whatever the original, and made from the original.
    """

    family: str
    forward: Callable[..., Any] | None
    fingerprints: frozenset[str] = frozenset()
    check: Callable[[nn.Module], str] = never
    members: dict[str, Any] = field(default_factory=dict)
    make: Callable[[type], dict[str, Any]] | None = None


class _Bare(ast.NodeTransformer):
    """Leaves out what a function does not do: annotations, docstrings, decorators of documentation."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.returns = None
        if isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant):
            node.body = node.body[1:] or [ast.Pass()]
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None or not node.simple:
            return node
        return ast.Assign(targets=[node.target], value=node.value)


@functools.lru_cache(maxsize=1024)
def _source(function: Any) -> str:
    """What inspect.getsource finds, which would look through every loaded module for it; kept, as it takes a while."""
    code = function.__code__
    return "".join(inspect.getblock(linecache.getlines(code.co_filename)[code.co_firstlineno - 1 :]))


def parse(function: Any) -> ast.FunctionDef | None:
    """The syntax tree of a function, without the wrappers around it; None when its source is not there."""
    try:
        source = _source(inspect.unwrap(function))
        tree = ast.parse(f"if 1:\n{source}" if source[:1].isspace() else source)
    except (AttributeError, SyntaxError, TypeError, ValueError):
        return None
    if not tree.body:
        return None
    node = tree.body[0]
    if isinstance(node, ast.If):
        node = node.body[0]
    return node if isinstance(node, ast.FunctionDef) else None


def _dump(node: Any) -> str:
    """`ast.dump` as Python 3.11 writes it: later versions know more fields and leave out empty lists."""
    if isinstance(node, ast.AST):
        cls = type(node)
        fields = [(name, getattr(node, name, None)) for name in node._fields if name != "type_params"]
        shown = [f"{name}={_dump(x)}" for name, x in fields if x is not None or getattr(cls, name, ...) is not None]
        return f"{cls.__name__}({', '.join(shown)})"
    return f"[{', '.join(map(_dump, node))}]" if isinstance(node, list) else repr(node)


_prints: dict[Any, str] = {}


def fingerprint(function: Any) -> str:
    """A few letters that stand for what a function does: the same for sources that differ in words only."""
    if function not in _prints:
        node = parse(function)
        text = "" if node is None else _dump(_Bare().visit(node))
        _prints[function] = hashlib.sha256(text.encode()).hexdigest()[:12] if text else ""
    return _prints[function]


def known(cls: type, rules: dict[str, Rule]) -> tuple[str, Rule] | None:
    """The rule of a class, or that of the base whose forward it has unchanged."""
    for base in cls.__mro__:
        rule = rules.get(qualified(base))
        if rule is not None:
            unchanged = cls.forward is base.forward and cls.__call__ is nn.Module.__call__
            return (qualified(base), rule) if unchanged else None
    return None


def unknown_forward(cls: type, rule: Rule) -> str:
    """Why the rule does not stand for this class; "" when it does."""
    if not rule.fingerprints or fingerprint(cls.forward) in rule.fingerprints:
        return ""
    return f"its forward is not one that is known (source {fingerprint(cls.forward) or 'not found'})"
