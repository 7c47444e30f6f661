"""How swap writes forward passes anew: which calls become one, and that nothing else changes."""

from __future__ import annotations

import copy
import inspect
import linecache
import re
import traceback
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_swap import error, randomised, same
from torch import Tensor, nn

import dlkernels as dk
from dlkernels._swap._classes import Fused

HEAD = """
class Made(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 1)
        self.norm, self.norm2 = nn.GroupNorm(2, 4), nn.GroupNorm(1, 4)
        self.act, self.act2, self.id, self.drop = nn.ReLU(), nn.Tanh(), nn.Identity(), nn.Dropout(0.4)
        self.none = None
        self.function = F.silu
        self.counted = 0
"""
_number = 0


def made(forward: str, more: str = "") -> type[nn.Module]:
    """A class from the source of its forward, which inspect finds."""
    global _number
    _number += 1
    body = "\n".join("    " + line for line in forward.strip("\n").splitlines())
    source, file = f"{more}\n{HEAD}\n{body}\n", f"<made {_number}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    scope: dict[str, Any] = {"nn": nn, "F": F, "torch": torch, "Tensor": Tensor, "__name__": __name__}
    exec(compile(source, file, "exec", dont_inherit=True), scope)
    return scope["Made"]


def written(forward: str, more: str = "") -> str:
    """The source that a forward gets, or "" where the class stays."""
    model = made(forward, more)()
    dk.swap(model)
    return inspect.getsource(type(model).forward) if issubclass(type(model), Fused) else ""


# name: how many calls become one. Those with 0 must stay as they are.
FORMS = {
    name: (body, int(count))
    for name, count, body in re.findall(
        r"^# (.+): (\d)\n((?:[^#].*\n)+)",
        """
# nested: 1
def forward(self, x, r):
    return self.act(self.norm(self.conv(x)))
# statements: 1
def forward(self, x, r):
    x = self.norm(x)
    x = self.act(x)
    return x
# typed: 1
def forward(self, x, r):
    y: Tensor = self.norm(x)
    y: Tensor = self.act(y)
    return y + x
# function: 1
def forward(self, x, r):
    x = self.norm(x)
    return F.leaky_relu(x, negative_slope=0.01)
# in place: 1
def forward(self, x, r):
    x = self.norm(x)
    return F.relu(x, inplace=True)
# attribute function: 1
def forward(self, x, r):
    return self.function(self.norm(x))
# residual: 1
def forward(self, x, r):
    x = self.norm(x)
    x += r
    x = self.act(x)
    return x
# residual left: 1
def forward(self, x, r):
    return self.act(r + self.norm(x))
# own input: 1
def forward(self, x, r):
    x = x + self.norm(self.conv(x))
    return self.act(x)
# film: 1
def forward(self, x, r):
    s = r.mean(2, keepdim=True)
    x = self.norm(x)
    x = x * (1 + s) + s
    return self.act(x)
# film turned: 1
def forward(self, x, r):
    s = r.mean(2)
    return (s[:, :, None] + 1) * self.norm(x) + s[..., None]
# optional: 1
def forward(self, x, r):
    x = self.norm(x)
    if self.none is not None:
        x = self.none(x)
    return self.act(x)
# identity: 1
def forward(self, x, r):
    x = self.id(self.norm(x))
    x = self.act(x)
    return x
# sunk: 2
def forward(self, x, r):
    if x.sum() > 0:
        x = self.norm(x)
    elif x.sum() < -1e9:
        raise ValueError
    else:
        x = self.norm2(x)
    x = self.act(x)
    return x * 3
# sunk, one branch: 1
def forward(self, x, r):
    if x.numel() > 3:
        x = self.norm(x)
    return self.act(x)
# twice in one: 2
def forward(self, x, r):
    x = self.act(self.norm2(self.conv(self.act(self.norm(x)))))
    return x
# loop: 1
def forward(self, x, r):
    for _ in range(3):
        x = self.norm(x)
        x = self.act(x)
    return x
# with: 1
def forward(self, x, r):
    with torch.enable_grad():
        x = self.norm(x)
        x = self.act(x)
    return x
# super: 1
def forward(self, x, r):
    super().extra_repr()
    return self.act(self.norm(x))
# decorated: 1
@torch.enable_grad()
def forward(self, x, r):
    return self.act(self.norm(x))
# defaults: 1
def forward(self, x, r=None, *args, k=3, **more):
    return self.act(self.norm(x)) * k
# inside of an expression: 2
def forward(self, x, r):
    x = torch.cat([self.act(self.norm(x)), r], 2)
    return {"y": self.norm2(x).sum() + F.silu(self.norm(x))}["y"]
# in a condition: 1
def forward(self, x, r):
    if self.act(self.norm(x)).sum() > 0:
        x = 2 * x
    return self.act2(x)
# used again: 0
def forward(self, x, r):
    h = self.norm(x)
    y = self.act(h)
    return y + h
# other name: 0
def forward(self, x, r):
    h = self.norm(x)
    y = self.act(h)
    return y
# between: 0
def forward(self, x, r):
    x = self.norm(x)
    r = x + 1
    x = self.act(x)
    return x * r
# itself added: 0
def forward(self, x, r):
    x = self.norm(x)
    x = x + x
    return x
# itself read: 0
def forward(self, x, r):
    x = self.norm(x)
    x = self.act(x) + x
    return x
# other activation: 0
def forward(self, x, r):
    return self.act2(self.norm(x))
# two: 0
def forward(self, x, r):
    s = r.mean(2, keepdim=True)
    return self.norm(x) * (2 + s) + s
# minus: 0
def forward(self, x, r):
    s = r.mean(2, keepdim=True)
    return self.norm(x) * (1 + s) - s
# slope: 0
def forward(self, x, r):
    return F.leaky_relu(self.norm(x), negative_slope=0.3)
# global: 0
def forward(self, x, r):
    global shared
    shared = self.norm(x)
    shared = self.act(shared)
    return shared
# mangled: 0
def forward(self, x, r):
    self.__seen = 1
    return self.act(self.norm(x))
""",
        re.MULTILINE,
    )
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    source, expected = FORMS[form]
    assert written(source).count("__dk_chain(") == expected
    torch.manual_seed(0)
    model = randomised(made(source)().double())
    reference = copy.deepcopy(model)
    dk.swap(model)
    for training in (True, False):
        model.train(training), reference.train(training)
        x, r = torch.randn(3, 4, 5).double(), torch.randn(3, 4, 5).double()
        same(model, reference, x, r)


def test_closures_stay() -> None:
    """A forward with free variables is not compiled again."""
    slope = 0.3

    class Free(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = nn.GroupNorm(2, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.norm(x)) * slope

    model = Free()
    assert dk.swap(model).counts() == {"group_norm": 1}
    torch.testing.assert_close(model(torch.ones(1, 4, 2)), torch.zeros(1, 4, 2))


def test_traceback_shows_the_line() -> None:
    model = made("def forward(self, x, r):\n    x = self.norm(x)\n    return self.act(x)")()
    dk.swap(model)
    try:
        model(torch.randn(2, 3, 4), None)
    except (ValueError, RuntimeError):
        assert "__dk_chain(self, x, ('norm', 'act'))" in traceback.format_exc()
    else:
        raise AssertionError("three channels should not have been taken for four")


@pytest.mark.needs("hypothesis")
def test_any_program() -> None:
    """Forward passes put together at random compute what they did."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    operand = st.sampled_from(["x", "r", "q"])
    module = st.sampled_from(["norm", "norm", "norm2", "act", "act", "act2", "id", "conv", "drop", "function"])

    def expression(v: str) -> Any:
        return st.recursive(
            st.just(v),
            lambda inner: st.one_of(
                st.tuples(module, inner).map(lambda t: f"self.{t[0]}({t[1]})"),
                st.tuples(inner, operand).map(lambda t: f"{t[0]} + {t[1]}"),
                st.tuples(inner, operand).map(lambda t: f"{t[1]} + {t[0]}"),
                inner.map(lambda e: f"({e}) * (1 + s) + t"),
                inner.map(lambda e: f"F.silu({e})"),
            ),
            max_leaves=4,
        )

    def block(depth: int) -> Any:
        v = st.sampled_from(["x", "x", "r"])
        line = st.one_of(
            v.flatmap(lambda v: expression(v).map(lambda e: f"{v} = {e}")),
            v.flatmap(lambda v: st.sampled_from("rqx").map(lambda o: f"{v} = {v} + 0\n{v} += {o}")),
            v.map(lambda v: f"if self.none is not None:\n    {v} = self.none({v})"),
            st.just("q = x"),
            st.tuples(
                v, st.sampled_from(["self.act(self.norm({}))", "self.norm2({}) + r", "F.relu(self.norm({}))"])
            ).map(lambda t: f"{t[0]} = {t[1].format(t[0])}"),
            v.map(lambda v: f"{v} = self.norm({v})\n{v} = {v} * (1 + s) + t\n{v} = self.act({v})"),
            v.map(lambda v: f"q = torch.cat([self.act(self.norm({v})), q], 2)[..., :5]"),
        )
        if depth:
            inner = block(depth - 1)
            line = line | st.tuples(inner, st.none() | inner).map(
                lambda b: (
                    "if q.sum() > 0:\n" + _indented(b[0]) + ("" if b[1] is None else "\nelse:\n" + _indented(b[1]))
                )
            )
        return st.lists(line, min_size=1, max_size=5).map("\n".join)

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(block(2), expression("x"))
    def run(body: str, last: str) -> None:
        lines = f"q = x\ns = r.mean(2, keepdim=True)\nt = s * 2\n{body}\nreturn {last}"
        model = randomised(made("def forward(self, x, r):\n" + _indented(lines))().double())
        reference = copy.deepcopy(model)
        swapped.append(dk.swap(model).counts().get("blocks", 0))
        x, r = torch.randn(3, 4, 5).double(), torch.randn(3, 4, 5).double()
        outs = []
        for m in (model, reference):
            torch.manual_seed(0)
            outs.append(m(x.clone(), r.clone()))
        assert error(*outs) < 1e-10, lines

    swapped: list[int] = []
    run()
    assert sum(swapped) > 20  # programs in which something was fused


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.splitlines())
