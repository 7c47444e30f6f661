"""What is asked of syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any


def bodies(statement: ast.stmt) -> Iterator[list[ast.stmt]]:
    """The lists of statements inside of one, but for those of other functions."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return
    for name in ("body", "orelse", "finalbody"):
        if getattr(statement, name, None):
            yield getattr(statement, name)
    for part in (*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())):
        yield part.body


def binds(node: ast.expr) -> bool:
    return any(isinstance(n, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom) for n in ast.walk(node))


def is_constant(node: ast.expr, value: Any) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _is_one(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value == 1


def is_simple(node: ast.expr) -> bool:
    """A variable, or a view of one: evaluating it earlier changes nothing."""
    if isinstance(node, ast.Subscript):
        rest = ast.walk(node.slice)
        return isinstance(node.value, ast.Name) and not any(isinstance(n, ast.Name | ast.Call) for n in rest)
    return isinstance(node, ast.Name)


def film_of(node: ast.expr) -> tuple[ast.expr, ast.expr] | None:
    """x and s of x * (1 + s), with the factors in either order."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, ast.Mult):
        return None
    for x, factor in ((node.left, node.right), (node.right, node.left)):
        if isinstance(factor, ast.BinOp) and isinstance(factor.op, ast.Add):
            for one, s in ((factor.left, factor.right), (factor.right, factor.left)):
                if _is_one(one) and is_simple(s):
                    return x, s
    return None


def tagged(kind: str, *nodes: ast.expr) -> ast.expr:
    return ast.Tuple([ast.Constant(kind), *nodes], ast.Load())
