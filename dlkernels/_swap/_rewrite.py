"""Forward passes of others, written anew so that neighbouring calls become one.

    h = self.norm1(h)                                   h = __dk_chain(self, h, ("norm1", "act"))
    h = self.act(h)                             ->

The syntax tree of the owner's own source is what is changed, and only where calls follow each other with nothing in
between; `_chains.chain` then fuses what can be fused and calls the rest as it stood there. So the result is the same by
construction, whatever the library and its version.

Operations of a chain, in the form that `_chains.chain` takes:

    "name"                  x = self.name(x)
    ("?", "name")           the same where self.name is not None
    ("film", s, t)          x * (1 + s) + t
    ("add", r), ("radd", r), ("iadd", r)    x + r, r + x, x += r
    ("fn", f, arguments)    f(x, **arguments), an activation
"""

from __future__ import annotations
import __future__

import ast
import copy
import inspect
import linecache
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ._activations import activation_of_call
from ._rules import parse
from ._syntax import binds, bodies, film_of, is_constant, is_simple, tagged

CHAIN = "__dk_chain"
_FUTURE = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
_ENDS = (ast.Return, ast.Raise, ast.Continue, ast.Break)


@dataclass
class Operation:
    """One step of a chain. `name` is what a span is known by, `form` what `_chains.spans` takes."""

    name: str
    form: Any
    node: ast.expr  # as `chain` takes it
    nest: Any  # (expression) -> expression: the step as it stood in the source; None where it was a statement


@dataclass
class Step:
    """A statement that does nothing but to take a variable through operations."""

    target: str | None  # None: it returns the value
    base: ast.expr
    operations: list[Operation]


@dataclass
class Chain:
    """Steps that follow each other, or an expression inside of a statement.

    put(a, b, target, value) replaces steps a to b by one statement, or the expression by a value.
    """

    first: int  # statement in its list
    steps: list[Step]
    put: Callable[[int, int, str | None, ast.expr], None]

    def operations(self) -> list[tuple[int, Operation]]:
        return [(k, op) for k, step in enumerate(self.steps) for op in step.operations]

    def names(self) -> tuple[str, ...]:
        return tuple(op.name for _, op in self.operations())


Span = tuple[int, int, tuple[str, ...]]  # number of the chain, first operation, names of the operations


class Source:
    """The syntax tree of one function, with the chains in it."""

    def __init__(self, function: Any) -> None:
        self.function = inspect.unwrap(function)
        self.tree = parse(function)
        self.chains: list[Chain] = []
        if self.tree is None or not self._can_be_compiled():
            return
        arguments = [*self.tree.args.posonlyargs, *self.tree.args.args]
        if arguments:
            self.self_name = arguments[0].arg
            self._visit(self.tree.body)

    def _can_be_compiled(self) -> bool:
        """Free variables can be given again, no name is mangled, and variables are the function's own."""
        if not inspect.isfunction(self.function) or inspect.isgeneratorfunction(self.function):
            return False
        if set(self.function.__code__.co_freevars) - {"__class__"}:
            return False
        assert self.tree is not None
        if any(isinstance(n, ast.Global | ast.Nonlocal) for n in ast.walk(self.tree)):
            return False
        names = {n.attr for n in ast.walk(self.tree) if isinstance(n, ast.Attribute)}
        names |= {n.id for n in ast.walk(self.tree) if isinstance(n, ast.Name)}
        return not any(name.startswith("__") and not name.endswith("__") for name in names)

    # Reading ----------------------------------------------------------------------------------------------------------

    def _visit(self, body: list[ast.stmt]) -> None:
        self._sink(body)
        steps: list[Step] = []
        first = 0
        for position, statement in enumerate(body):
            step = self._step(statement)
            if steps and (step is None or not _follows(step, steps[-1])):
                self.chains.append(Chain(first, steps, _statements(body, first)))
                steps = []
            self._look_inside(statement if step is None else step.base)
            if step is not None:
                if not steps:
                    first = position
                steps.append(step)
            for inner in bodies(statement):
                self._visit(inner)
        if steps:
            self.chains.append(Chain(first, steps, _statements(body, first)))

    def _look_inside(self, node: ast.AST) -> None:
        """Chains in the expressions of a statement, or in what a step starts from."""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            return
        for name, value in ast.iter_fields(node):
            values = value if isinstance(value, list) else [value]
            for k, x in enumerate(values):
                if isinstance(x, ast.expr):
                    base, operations = self._value(x, None)
                    if len(operations) > 1 and not binds(base):
                        put = _expression(
                            values if isinstance(value, list) else node, k if isinstance(value, list) else name
                        )
                        self.chains.append(Chain(0, [Step(None, base, operations)], put))
                        x = base
                    self._look_inside(x)
                elif isinstance(x, ast.AST) and not isinstance(x, ast.stmt):
                    self._look_inside(x)

    def _sink(self, body: list[ast.stmt]) -> None:
        """Take what follows an `if` whose branches end in a step of the same variable into the branches."""
        position = 0
        while position < len(body):
            statement = body[position]
            if isinstance(statement, ast.If) and self._optional(statement) is None:
                targets = self._tails(statement)
                last = position + 1
                while last < len(body):
                    step = self._step(body[last])
                    base = None if step is None else step.base
                    if not isinstance(base, ast.Name) or base.id not in targets or step.target not in (base.id, None):
                        break
                    last += 1
                    if step.target is None:
                        break
                sunk = body[position + 1 : last]
                if sunk:
                    del body[position + 1 : last]
                    for branch in (statement.body, statement.orelse):
                        if not branch or not isinstance(branch[-1], _ENDS):
                            branch.extend(copy.deepcopy(sunk))
            position += 1

    def _tails(self, statement: ast.If) -> set[str]:
        """The variables that branches of an `if` end in a step of."""
        found: set[str] = set()
        for branch in (statement.body, statement.orelse):
            if branch and isinstance(branch[-1], ast.If) and self._optional(branch[-1]) is None:
                found |= self._tails(branch[-1])
            elif branch:
                step = self._step(branch[-1])
                if step is not None and step.target is not None:
                    found.add(step.target)
        return found

    def _step(self, statement: ast.stmt) -> Step | None:
        step = None
        if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            target = statement.targets[0]
            if isinstance(target, ast.Name) and target.id != self.self_name:
                step = Step(target.id, *self._value(statement.value, target.id))
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value:
            step = Step(statement.target.id, *self._value(statement.value, statement.target.id))
        elif isinstance(statement, ast.Return) and statement.value is not None:
            step = Step(None, *self._value(statement.value, None))
        elif isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
            target, r = statement.target, statement.value
            if isinstance(target, ast.Name) and isinstance(r, ast.Name) and r.id != target.id:
                base = ast.Name(target.id, ast.Load())
                step = Step(target.id, base, [Operation(f"+= {r.id}", ("iadd",), tagged("iadd", r), None)])
        elif isinstance(statement, ast.If):
            step = self._optional(statement)
        return step if step is not None and step.operations and not binds(step.base) else None

    def _optional(self, statement: ast.If) -> Step | None:
        """`if self.name is not None: x = self.name(x)`."""
        test = statement.test
        if statement.orelse or len(statement.body) != 1 or not isinstance(test, ast.Compare):
            return None
        name = self._attribute(test.left)
        isnt = len(test.ops) == 1 and isinstance(test.ops[0], ast.IsNot)
        if name is None or not isnt or not is_constant(test.comparators[0], None):
            return None
        step = self._step(statement.body[0])
        if step is None or [op.name for op in step.operations] != [name] or step.target is None:
            return None
        if not isinstance(step.base, ast.Name) or step.base.id != step.target:
            return None
        return Step(step.target, step.base, [Operation(f"?{name}", ("?", name), tagged("?", ast.Constant(name)), None)])

    def _attribute(self, node: ast.expr) -> str | None:
        """The name in `self.name`."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.self_name:
            return node.attr
        return None

    def _value(self, node: ast.expr, target: str | None) -> tuple[ast.expr, list[Operation]]:
        """What an expression starts from, and the operations that it does."""
        if isinstance(node, ast.Call) and node.args and not isinstance(node.args[0], ast.Starred):
            operation = self._call(node)
            if operation is not None:
                base, operations = self._value(node.args[0], target)
                return base, [*operations, operation]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._sum(node, target)
        return node, []

    def _call(self, node: ast.Call) -> Operation | None:
        name = self._attribute(node.func)
        if name is not None and len(node.args) == 1 and not node.keywords:
            return Operation(name, name, ast.Constant(name), lambda x: ast.Call(node.func, [x], []))
        if len(node.args) > 1 or not isinstance(node.func, ast.Name | ast.Attribute):
            return None
        arguments = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
        if len(arguments) != len(node.keywords):
            return None
        activation = activation_of_call(self._resolve(node.func), arguments)
        if activation is None:
            return None
        given = ast.Dict([ast.Constant(k) for k in arguments], [ast.Constant(v) for v in arguments.values()])
        return Operation(
            f"{activation}()",
            ("fn",),
            tagged("fn", node.func, given),
            lambda x: ast.Call(node.func, [x], node.keywords),
        )

    def _resolve(self, node: ast.expr) -> Any:
        """What a dotted name of the module stands for."""
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return None
        value = self.function.__globals__.get(node.id)
        for name in reversed(names):
            value = getattr(value, name, None)
        return value

    def _sum(self, node: ast.BinOp, target: str | None) -> tuple[ast.expr, list[Operation]]:
        left, right = node.left, node.right
        film = film_of(left)
        if film is not None and is_simple(right):
            base, operations = self._value(film[0], target)
            text = f"* (1 + {ast.unparse(film[1])}) + {ast.unparse(right)}"
            factor = node.left.right if node.left.left is film[0] else node.left.left
            nest = lambda y: ast.BinOp(ast.BinOp(y, ast.Mult(), factor), ast.Add(), right)  # noqa: E731
            return base, [*operations, Operation(text, ("film",), tagged("film", film[1], right), nest)]
        for kind, x, r in (("add", left, right), ("radd", right, left)):
            if not isinstance(r, ast.Name):
                continue
            base, operations = self._value(x, target)
            if operations or (isinstance(x, ast.Name) and x.id == target != r.id):
                add = Operation(
                    f"+ {r.id}" if kind == "add" else f"{r.id} +",
                    (kind,),
                    tagged(kind, r),
                    lambda y, kind=kind, r=r: (
                        ast.BinOp(y, ast.Add(), r) if kind == "add" else ast.BinOp(r, ast.Add(), y)
                    ),
                )
                return base, [*operations, add]
        return node, []


def _rewritten(function: Any, spans: tuple[Span, ...], chain: Any, cls: type) -> Any:
    """The function with these spans fused; spans that its source does not have are left out."""
    source = Source(function)  # anew, as its tree is changed
    edits: dict[int, list[tuple[int, int]]] = {}
    for number, first, names in spans:
        last = first + len(names)
        if number < len(source.chains) and source.chains[number].names()[first:last] == names:
            edits.setdefault(number, []).append((first, last))
    for number in sorted(edits, key=lambda n: -source.chains[n].first):  # from behind, as statements become fewer
        _merge(source.chains[number], edits[number], source.self_name)
    assert source.tree is not None
    return compiled(source.tree, source.function, {CHAIN: chain}, cls)


def rewritten(cls: type, spans: tuple[Span, ...], chain: Any) -> Any:
    """The forward of a class with these spans fused."""
    return _rewritten(cls.forward, spans, chain, cls)


def _merge(chain: Chain, spans: list[tuple[int, int]], self_name: str) -> None:
    """Replace the steps that spans lie in, and those only, by one statement each."""
    operations = chain.operations()
    intervals: list[list[Any]] = []  # first step, last step, spans
    for i, j in sorted(spans):
        a, b = operations[i][0], operations[j - 1][0]
        if intervals and a <= intervals[-1][1]:
            intervals[-1][1] = max(b, intervals[-1][1])
            intervals[-1][2].append((i, j))
        else:
            intervals.append([a, b, [(i, j)]])
    for a, b, inside in reversed(intervals):
        starts = dict(inside)
        value = chain.steps[a].base
        n = next(k for k, (step, _) in enumerate(operations) if step == a)
        while n < len(operations) and operations[n][0] <= b:
            if n in starts:
                fused = [op.node for _, op in operations[n : starts[n]]]
                value = ast.Call(ast.Name(CHAIN), [ast.Name(self_name), value, ast.Tuple(fused)], [])
                n = starts[n]
            else:
                value = operations[n][1].nest(value)
                n += 1
        chain.put(a, b, chain.steps[b].target, value)


def _statements(body: list[ast.stmt], first: int) -> Callable[[int, int, str | None, ast.expr], None]:
    def put(a: int, b: int, target: str | None, value: ast.expr) -> None:
        statement = ast.Return(value) if target is None else ast.Assign([ast.Name(target)], value)
        body[first + a : first + b + 1] = [statement]

    return put


def _expression(holder: Any, place: Any) -> Callable[[int, int, str | None, ast.expr], None]:
    def put(a: int, b: int, target: str | None, value: ast.expr) -> None:
        if isinstance(holder, list):
            holder[place] = value
        else:
            setattr(holder, place, value)

    return put


def compiled(tree: ast.FunctionDef, function: Any, names: dict[str, Any], cls: Any) -> Any:
    """A function from its syntax tree, in the module of `function`, with further names that hide the module's."""
    names = dict(names)
    if "__class__" in function.__code__.co_freevars:
        cell = function.__closure__[function.__code__.co_freevars.index("__class__")]
        names["__class__"] = cell.cell_contents
    factory = ast.FunctionDef(
        name="__dk_factory",
        args=ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, []),
        body=[tree, ast.Return(ast.Name(tree.name, ast.Load()))],
        decorator_list=[],
        type_params=[],
    )
    code = ast.unparse(ast.fix_missing_locations(ast.Module([factory], [])))
    file = f"<dlkernels: {cls.__module__}.{cls.__qualname__}.{tree.name} {zlib.crc32(code.encode()):x}>"
    linecache.cache[file] = (len(code), None, code.splitlines(True), file)  # for tracebacks and for inspect
    scope: dict[str, Any] = {}
    flags = function.__code__.co_flags & _FUTURE
    exec(compile(code, file, "exec", flags=flags, dont_inherit=True), function.__globals__, scope)
    return scope["__dk_factory"](*names.values())


def _follows(step: Step, previous: Step) -> bool:
    """Whether a step goes on where the one before it ended, and nothing else needs what that one gave."""
    v = previous.target
    if v is None or not isinstance(step.base, ast.Name) or step.base.id != v or step.target not in (v, None):
        return False
    return not any(isinstance(n, ast.Name) and n.id == v for op in step.operations for n in ast.walk(op.node))
