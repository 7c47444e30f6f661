"""`dlkernels.swap` on models that others wrote: the same numbers, keys and objects, and every fault would be seen.

Compared in float64, in eval mode, with parameters that hide nothing: whole models, every swapped module on the inputs
that it has in the model, and the same with one call of one kernel being wrong by a thousandth, which has to fail.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from _entry import Entry, Result, errors, exact_hard_sigmoid, leaves_of, loss_of, run, tensors
from _zoo import ZOO
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import dlkernels as dk

pytestmark = [pytest.mark.needs("real"), pytest.mark.needs("cpp")]

LIMIT = 1e-12
TRAIN_LIMIT = 1e-11  # dropped samples leave the range that the statistics of BatchNorm were made for


class Case(NamedTuple):
    """A model, its swapped copy, and what both gave."""

    entry: Entry
    reference: nn.Module
    model: nn.Module
    before: dict[str, Any]
    report: Any
    expected: Result
    actual: Result
    calls: Counter[str]  # of our operators, in a forward and backward pass


@pytest.fixture(scope="module", params=ZOO)
def c(request: pytest.FixtureRequest) -> Case:
    """Made once for all tests of a model, which leave it as it is."""
    importlib.import_module("_libraries")
    torch.set_num_threads(1)
    entry = ZOO[request.param]
    reference = entry.make()
    model = copy.deepcopy(reference)
    before = identity(model)
    report = dk.swap(model)
    expected, actual = run(entry, reference, torch.float64), run(entry, model, torch.float64)
    with Kernels() as kernels:
        run(entry, model, torch.float64)
    return Case(entry, reference, model, before, report, expected, actual, kernels.calls)


def swapped_paths(report: Any) -> list[str]:
    """Of modules: a weight norm from before parametrizations is a hook beside its module."""
    return [path for path, *_ in report.swapped if not path.endswith("(weight_norm)")]


def worst(found: dict[str, float]) -> tuple[float, str]:
    return max((error, name) for name, error in found.items())


# What a model is besides its numbers ----------------------------------------------------------------------------------


def identity(model: nn.Module) -> dict[str, Any]:
    """Names and objects: modules, parameters, buffers, and everything that is in a module's dictionary."""
    return {
        "modules": [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)],
        "parameters": [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)],
        "buffers": [(name, id(b)) for name, b in model.named_buffers(remove_duplicate=False)],
        "keys": list(model.state_dict()),
    }


def contents(model: nn.Module) -> list[Any]:
    """The class of every module, and what its dictionary holds, two levels deep."""
    found = []
    for name, m in model.named_modules():
        inside = {k: {kk: id(vv) for kk, vv in v.items()} if isinstance(v, dict) else id(v) for k, v in vars(m).items()}
        found.append((name, type(m), inside))
    return found


# Kernels that are wrong -----------------------------------------------------------------------------------------------


class Kernels(TorchDispatchMode):
    """Counts the calls of our operators; from call `at` on, makes the outputs of one too large by a thousandth.

    That of the first call whose outputs are not zero: of a batch, all samples may have been dropped.
    """

    def __init__(self, wrong: str = "", at: int = 0) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.forms: Counter[str] = Counter()  # the same, with what is done in the same pass
        self.wrong, self.at = wrong, at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        namespace, _, op = func.name().partition("::")
        if namespace != "dlkernels":
            return output
        op = op.partition(".")[0]
        self.calls[op] += 1
        self.forms[op + form(func, args)] += 1
        if op != self.wrong or self.calls[op] < self.at or not any(t.any() for t in tensors(output)):
            return output
        self.wrong = ""
        return pytree.tree_map(lambda t: t * 1.001 if isinstance(t, Tensor) and t.is_floating_point() else t, output)


def form(func: Any, args: Any) -> str:
    """What a call does besides: an activation, FiLM, a residual."""
    values = dict(zip((argument.name for argument in func._schema.arguments), args))
    found = [name for name in ("scale", "residual") if values.get(name) is not None]
    if func.name().startswith("dlkernels::group_norm") and values["activation"]:
        found.append("activation")
    return "".join(f" + {name}" for name in found)


# Tests ----------------------------------------------------------------------------------------------------------------


def test_whole_model(c: Case) -> None:
    """Outputs and all gradients in float64."""
    sizes = [t.abs().max().item() for t in c.expected.outputs if t.numel()]
    assert all(1e-3 < size < 1e3 for size in sizes), f"the outputs are not of the order of one: {sizes}"
    assert c.expected.parameters and all(g.isfinite().all() for g in c.expected.parameters.values())
    dead = [name for name, g in c.expected.parameters.items() if not g.any()]
    assert not dead, f"what these parameters do reaches no output: {dead}"
    found = worst(errors(c.actual, c.expected))
    assert found[0] <= LIMIT, found


def test_finds(c: Case) -> None:
    """As many modules of each family as the model is known to have, and reasons for the others."""
    assert c.report.counts() == c.entry.swapped, (c.report.counts(), str(c.report))
    for reason, number in c.entry.refused.items():
        refused = [path for path, _, why in c.report.skipped if reason in why]
        assert len(refused) == number, (reason, len(refused), str(c.report))
    assert len(c.report.skipped) == sum(c.entry.refused.values()), str(c.report)
    assert json.loads(json.dumps(c.report.to_dict()))["counts"] == c.entry.swapped
    model = c.entry.mode(copy.deepcopy(c.model), training=True)
    with Kernels() as kernels, torch.no_grad():
        c.entry.call(model, torch.float64)
    assert kernels.forms == c.entry.calls, kernels.forms


def test_each_module(c: Case) -> None:
    """Every swapped module on what it gets in the model, beside the module that it was."""
    paths = [path for path in swapped_paths(c.report) if callable_alone(c.reference.get_submodule(path))]
    inputs = recorded(c, paths)
    for path in paths:
        theirs, ours = c.reference.get_submodule(path), c.model.get_submodule(path)
        for args, kwargs in inputs.get(path, []):
            found = worst(errors(alone(ours, args, kwargs), alone(theirs, args, kwargs)))
            assert found[0] <= LIMIT, (path, found)
    uncalled = [path for path in paths if path not in inputs]
    assert len(uncalled) <= len(paths) // 2, f"not called by the model: {uncalled}"


def callable_alone(module: nn.Module) -> bool:
    """Not a detector's head, whose fused part is a method beside its forward, nor the model itself."""
    return len(list(module.modules())) < 200


def recorded(c: Case, paths: list[str]) -> dict[str, list[Any]]:
    """Copies of what the first call of each module was given, in the model as it was."""
    found: dict[str, list[Any]] = {}

    def keep(path: str, args: Any, kwargs: Any) -> None:
        if path not in found:
            found[path] = [copied((args, kwargs))]

    hooks = [
        c.reference.get_submodule(path).register_forward_pre_hook(
            lambda module, args, kwargs, path=path: keep(path, args, kwargs), with_kwargs=True
        )
        for path in paths
    ]
    try:
        with torch.no_grad():
            torch.manual_seed(1)
            c.entry.call(c.reference, torch.float64)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def copied(values: Any) -> Any:
    return pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, Tensor) else v, values)


def alone(module: nn.Module, args: Any, kwargs: Any) -> Result:
    """A forward and backward pass of one module, whose inputs it may change in place."""
    args, kwargs = copied((args, kwargs))
    leaves = [t for t in leaves_of((args, kwargs)) if t.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_()
    args, kwargs = pytree.tree_map(lambda v: v * 1 if isinstance(v, Tensor) and v.requires_grad else v, (args, kwargs))
    module.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    with exact_hard_sigmoid():
        output = module(*args, **kwargs)
        loss_of(output).backward()
    grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    outputs = [t.detach() for t in leaves_of(output) if t.is_floating_point()]
    return Result(outputs, [leaf.grad for leaf in leaves], grads)


def test_nothing_else_changes(c: Case) -> None:
    """Names, parameters, buffers, keys; every module is still of the class that it was."""
    assert identity(c.model) == c.before
    paths = set(swapped_paths(c.report))
    for (path, ours), theirs in zip(c.model.named_modules(), c.reference.modules(), strict=True):
        assert isinstance(ours, type(theirs))
        assert (type(ours) is not type(theirs)) == (path in paths), (path, type(ours))


def test_undo_and_twice(c: Case) -> None:
    """A second swap finds nothing more to do; undoing restores classes and dictionaries."""
    model = c.entry.mode(c.entry.build())
    before = contents(model)
    report = dk.swap(model)
    after = contents(model)
    again = dk.swap(model)
    assert contents(model) == after and not again.swapped, str(again)
    again.undo()
    assert contents(model) == after
    report.undo()
    assert contents(model) == before


def test_train_mode(c: Case) -> None:
    """Dropout and stochastic depth draw the same from the same seed; and a wrong kernel of the latter is seen."""
    theirs = c.entry.mode(copy.deepcopy(c.reference), training=True)
    ours = c.entry.mode(copy.deepcopy(c.model), training=True)
    expected = run(c.entry, theirs, torch.float64)
    found = worst(errors(run(c.entry, ours, torch.float64), expected))
    assert found[0] <= TRAIN_LIMIT, found
    with Kernels() as kernels:
        run(c.entry, ours, torch.float64)
    drops = sum(n for op, n in kernels.calls.items() if op == "stochastic_depth_fwd")
    assert bool(drops) == bool(c.report.counts().get("stochastic_depth")), kernels.calls
    if drops:
        assert_wrong_is_seen(c, ours, expected, Counter({op: n for op, n in kernels.calls.items() if "depth" in op}))


def test_a_wrong_kernel_is_seen(c: Case) -> None:
    """One call of one kernel, forward or backward, wrong by a thousandth: the comparison of whole models fails."""
    families = set(c.report.counts()) - {"blocks", "stochastic_depth"}
    assert bool(c.calls) >= bool(families), (families, c.calls)
    assert_wrong_is_seen(c, c.model, c.expected, c.calls)


def assert_wrong_is_seen(c: Case, model: nn.Module, expected: Result, calls: Counter[str]) -> None:
    for op, number in calls.items():
        at = (number + 1) // 2
        with Kernels(wrong=op, at=at):
            result = run(c.entry, model, torch.float64)
        found = worst(errors(result, expected))
        assert found[0] > 1e3 * LIMIT, f"{op}, call {at} of {number}: {found}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_lower_precision(c: Case, dtype: torch.dtype) -> None:
    """The output of the whole model: at most twice the error of eager PyTorch, and a little."""
    if dtype == torch.bfloat16 and not c.entry.bfloat16:
        pytest.skip("by design: the model itself does not run in bfloat16")
    theirs, ours = copy.deepcopy(c.reference).to(dtype), copy.deepcopy(c.model).to(dtype)
    exact = copy.deepcopy(theirs).double()
    error, eager = 0.0, 0.0  # over three batches: of one, eager's may be small by luck
    for seed in (1, 2, 3):
        right = forward(c.entry, exact, dtype, seed)
        error += distance(forward(c.entry, ours, dtype, seed), right, dtype) ** 2
        eager += distance(forward(c.entry, theirs, dtype, seed), right, dtype) ** 2
    assert error**0.5 <= 2 * eager**0.5 + 4 * torch.finfo(dtype).eps * 3**0.5, (error**0.5, eager**0.5)


def forward(entry: Entry, model: nn.Module, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """The outputs for a batch that was rounded to `dtype`, in the dtype of the model."""
    args, kwargs = entry.inputs(dtype, torch.Generator().manual_seed(seed))
    own = next(p.dtype for p in model.parameters() if p.is_floating_point())
    args, kwargs = pytree.tree_map(
        lambda v: v.to(own) if isinstance(v, Tensor) and v.is_floating_point() else v, (args, kwargs)
    )
    with torch.no_grad():
        torch.manual_seed(seed)
        return tensors(model(*args, **kwargs))


def distance(actual: list[Tensor], right: list[Tensor], dtype: torch.dtype) -> float:
    """Relative, in the Euclidean norm over all outputs."""
    assert all(a.dtype == dtype and a.shape == r.shape for a, r in zip(actual, right, strict=True))
    error = sum((a.double() - r).norm().item() ** 2 for a, r in zip(actual, right))
    return (error / sum(r.norm().item() ** 2 for r in right)) ** 0.5
