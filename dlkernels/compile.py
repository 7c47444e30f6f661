"""`torch.compile(model, backend="dlkernels")`: fused ops where a captured graph has their formula, then Inductor.

An install brings the name "dlkernels" as an entry point, so that nothing has to be imported. In a source checkout that
is on the path without being installed, `import dlkernels.compile` before `torch.compile` brings it.
"""

from __future__ import annotations

import copy
import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from ._patterns.registration import register
from ._patterns.report import CompileReport, GraphFinds, compile_report

__all__ = ["CompileReport", "backend", "compile_report"]


def backend(
    gm: GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend: replaces in a graph what the ops of dlkernels compute faster, and compiles it.

    Args:
        gm: a graph as torch._dynamo captures it.
        example_inputs: its inputs, without values.
        mode: a mode of Inductor, as `torch.compile` takes it.
        options: of this backend, the rest being Inductor's:
            "then": the backend that compiles the rewritten graph, "inductor" by default;
            "include": names of the patterns to look for, all by default;
            "all": replace also where it is not known to be faster. DLKERNELS_COMPILE_ALL=1 in the environment does so.

    Returns:
        The compiled graph.

    Raises:
        ValueError: an unknown pattern or a wrong option. A graph in which matching fails is compiled unchanged, with
            one warning.
    """
    left = dict(options or {})
    then, names = left.pop("then", "inductor"), left.pop("include", None)
    everything = left.pop("all", os.environ.get("DLKERNELS_COMPILE_ALL", "0") not in ("", "0"))
    _rewrite(gm, names, bool(everything))
    return _compiled(gm, example_inputs, then, mode, left)


def _rewrite(gm: GraphModule, names: Sequence[str] | None, everything: bool) -> None:
    from ._patterns import rewrite

    unknown = set(names or ()) - set(rewrite.PATTERNS)
    if unknown or isinstance(names, str):
        raise ValueError(f"`include` must list some of {', '.join(rewrite.PATTERNS)}, got {names!r}")
    wanted = [name for name in rewrite.PATTERNS if names is None or name in names]
    calls = sum(node.op in ("call_function", "call_method") for node in gm.graph.nodes)
    record = compile_report().begin(calls)
    before = _copy(gm.graph)
    try:
        rewrite.rewrite(gm, record, wanted, everything)
    except Exception as error:  # whatever it is, the model must run
        gm.graph = before
        _gave_up(record, error)


def _copy(graph: Graph) -> Graph:
    copied, nodes = Graph(tracer_cls=getattr(graph, "_tracer_cls", None)), {}
    output = copied.graph_copy(graph, val_map=nodes, return_output_node=True)
    if output is not None:
        value, original = output
        node = copied.output(value)
        node.meta = copy.copy(original.meta)
    for original, node in nodes.items():
        for name in vars(original).keys() - vars(node).keys():
            setattr(node, name, getattr(original, name))  # what torch._dynamo notes beside `meta`
    copied._codegen = copy.copy(graph._codegen)
    return copied


def _gave_up(record: GraphFinds, error: Exception) -> None:
    record.finds.clear()
    said = str(error).splitlines()[0] if str(error) else ""
    record.error = f"{type(error).__name__}: {said}"
    warnings.warn(f"dlkernels left a graph as it was, because matching failed: {record.error}", stacklevel=3)


def _compiled(
    gm: GraphModule, example_inputs: Sequence[Any], then: Any, mode: str | None, options: dict[str, Any]
) -> Callable[..., Any]:
    from torch._dynamo.backends.registry import lookup_backend

    if then == "dlkernels" or then is backend:
        raise ValueError("`then` must be another backend than dlkernels")
    compiler: Any = lookup_backend(then)
    if then == "inductor":
        patches = dict(options)
        if mode and mode != "default":
            patches = {**torch._inductor.list_mode_options(mode), **patches}
        return compiler(gm, example_inputs, config_patches=patches or None)
    more = {"mode": mode} if mode and mode != "default" else {}
    return compiler(gm, example_inputs, **more, **({"options": options} if options else {}))


# In a checkout that is not installed there is no entry point: this is one.
importlib.import_module("torch._dynamo.backends.registry")
register()
