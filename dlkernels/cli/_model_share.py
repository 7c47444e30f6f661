"""What part of an eager training step the modules have that a swap takes over, and the optimizer.

Forward: ranges around these modules, in the profiler. Backward: the time of those autograd nodes that were made inside
the ranges; autograd numbers its nodes one after the other. Residual sums and functional activations, which a swap also
takes along, are not modules and are left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces itself otherwise

STEPS = 3
RANGE, STEP = "dlkernels would run this", "one training step"
NODE = "autograd::engine::evaluate_function"
HOW = (
    "profiled eager steps: forward ranges of the modules that the swap takes over, and the backward nodes made in "
    "them; residual sums and functional activations not counted"
)


def owned(model: nn.Module, changes: list[tuple[str, str, str, str]]) -> list[nn.Module]:
    """The modules, in an unswapped model, of a swap's (path, old class, new class, what it is).

    A block's own class is only changed for the calls that follow each other in it: of them, the modules count.
    """
    from .._swap._families import FAMILIES

    found: dict[int, nn.Module] = {}
    leaves = {path for path, *_, what in changes if what in FAMILIES}
    for path, *_, what in changes:
        if path.endswith(" (weight_norm)"):
            continue  # a hook of its module, not a module
        module = model.get_submodule(path)
        if what in FAMILIES:
            members = [module]
        elif what == "neighbours":
            members = _behind(path, module, leaves)
        else:
            names = {name.strip() for chain in what.split(";") for name in chain.split("+")}
            members = [child for name, child in module.named_children() if name in names]
        found.update((id(m), m) for m in members)
    return list(found.values())


def _behind(path: str, sequence: nn.Module, leaves: set[str]) -> list[nn.Module]:
    """Activations in a Sequential behind a module that is swapped."""
    members, taken = [], False
    for name, child in sequence.named_children():
        here = f"{path}.{name}".lstrip(".") in leaves
        if taken and not here and not list(child.parameters()):
            members.append(child)
        taken = here
    return members


def shares(step: Callable[[], Any], modules: list[nn.Module], device: str) -> dict[str, Any]:
    """Shares of the step's time: {"modules": ..., "optimizer": ..., "how": ...}."""
    made: list[tuple[int, int]] = []  # numbers of the autograd nodes of each range
    with _ranges(modules, made):
        step()
        made.clear()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.autograd.set_multithreading_enabled(False), torch.profiler.profile(activities=activities) as prof:
            for _ in range(STEPS):
                with torch.profiler.record_function(STEP):
                    step()
            if device == "cuda":
                torch.cuda.synchronize()
    total = ours = optimizer = 0.0
    for event in prof.events():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue
        spent = event.device_time_total if device == "cuda" else event.cpu_time_total
        if event.name == STEP:
            total += spent
        elif event.name.startswith("Optimizer.step"):
            optimizer += spent
        elif event.name == RANGE or (event.name.startswith(NODE) and any(a <= event.sequence_nr < b for a, b in made)):
            ours += spent
    return {"modules": ours / total, "optimizer": optimizer / total, "how": HOW}


class _ranges:
    """Hooks around modules while it is open: a range for the profiler, and the numbers of the nodes made in it."""

    def __init__(self, modules: list[nn.Module], made: list[tuple[int, int]]) -> None:
        self.modules, self.made = modules, made
        self.open: list[tuple[Any, int]] = []

    def __enter__(self) -> None:
        self.handles = [m.register_forward_pre_hook(self._begin) for m in self.modules]
        self.handles += [m.register_forward_hook(self._end) for m in self.modules]

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _begin(self, *_: Any) -> None:
        mark = None if self.open else torch.profiler.record_function(RANGE)  # the outermost one counts
        if mark is not None:
            mark.__enter__()
        self.open.append((mark, torch.autograd._get_sequence_nr()))

    def _end(self, *_: Any) -> None:
        mark, start = self.open.pop()
        if mark is not None:
            self.made.append((start, torch.autograd._get_sequence_nr()))
            mark.__exit__(None, None, None)
