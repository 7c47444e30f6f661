"""Fused ops into a model that somebody else wrote, in place, and back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ._swap import _families as families
from ._swap._activations import qualified
from ._swap._chains import spans
from ._swap._classes import Fused, fused_name, original_of
from ._swap._refusals import refuse_wrapped, stranger
from ._swap._report import SwapReport

__all__ = ["SwapReport", "swap", "unswap"]

Filter = Callable[[nn.Module, str], bool]


def swap(
    model: nn.Module,
    include: str | Iterable[str] | None = None,
    *,
    filter_fn: Filter | None = None,
    strict: bool = False,
) -> SwapReport:
    """Make the modules of a model run on fused ops, in place; numbers, parameters, names and state_dict stay.

    Each module that has a fused form gets a subclass of its own class (`module.__class__`), so that hooks, parameter
    identity, isinstance, pickling, optimizers and checkpoints go on working. Neighbouring steps become one: a norm with
    the modulation, the residual and the activation behind it, stochastic depth and squeeze-and-excitation with the
    residual.

    Args:
        model: an nn.Module, itself included; before or after a checkpoint is loaded, on any device ("meta" too).
        include: the families to swap, one name or several of "center_loss", "focal_loss", "group_norm",
            "squeeze_excite", "stochastic_depth" and "weight_norm"; None for all.
        filter_fn: filter_fn(module, path) -> bool, False leaves the module as it is.
        strict: raise when a module of these families has no equal form here, before anything is changed.

    Returns:
        A `SwapReport`: print it for a table of what was swapped, what was not and why; `report.undo()` takes it back.

    Raises:
        TypeError: `model` is no nn.Module.
        ValueError: an unknown family, a model that is compiled, scripted or under DDP, FSDP or DataParallel already;
            with `strict`, modules that are not swapped.

    Note:
        Only what is provably equal is swapped: classes by exact name and by the source of their forward; subclasses
        that change it, BatchNorm inside of squeeze-and-excitation and the like are reported and left. At each call,
        too, whatever does not fit (a hook on an inner layer, another dtype, DTensors, tracing) takes the original
        path. Swap before torch.compile, DDP and FSDP; unswap before torch.jit.script. Pickles of a swapped model need
        dlkernels to be loaded; its state_dict does not. Calling it twice changes nothing more. Under autocast on GPUs,
        GroupNorm gives the dtype of its input, where torch gives float32.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be an nn.Module, got {type(model).__name__}: pass the module that has the layers"
        )
    wanted = _included(include)
    modules = list(model.named_modules())
    refuse_wrapped(modules)
    plan = _Plan(wanted, filter_fn)
    plan.read(modules)
    if strict and plan.skipped:
        path, name, reason = plan.skipped[0]
        more = f" (and {len(plan.skipped) - 1} more)" if len(plan.skipped) > 1 else ""
        raise ValueError(f"strict: {path or 'the model itself'}, {name}, is not swapped: {reason}{more}")
    return plan.carry_out()


def unswap(model: nn.Module) -> int:
    """Give every module of a model its own class back, whoever swapped it; the number of modules that had another.

    For models that were copied or unpickled, which the report of the first swap does not know.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be an nn.Module, got {type(model).__name__}")
    count = 0
    for module in model.modules():
        for x in (module, *module._forward_pre_hooks.values()):
            original = original_of(x)
            if original is not type(x):
                x.__class__ = original
                count += 1
    return count


def _included(include: str | Iterable[str] | None) -> frozenset[str]:
    if include is None:
        return frozenset(families.FAMILIES)
    names = (include,) if isinstance(include, str) else tuple(include)
    for name in names:
        if name not in families.FAMILIES:
            raise ValueError(f"`include` must name some of {', '.join(families.FAMILIES)}, got {name!r}")
    return frozenset(names)


class _Plan:
    """What would be done to a model: nothing is changed while it is made."""

    def __init__(self, wanted: frozenset[str], filter_fn: Filter | None) -> None:
        self.wanted, self.filter = wanted, filter_fn
        self.changes: list[tuple[str, Any, type, str]] = []  # path, module, its new class, what it does
        self.skipped: list[tuple[str, str, str]] = []
        self._strangers: list[tuple[str, type, str]] = []
        self._starts: dict[int, str] = {}  # modules that can take along what follows them

    def read(self, modules: list[tuple[str, nn.Module]]) -> None:
        rest = [(path, module) for path, module in modules if not self._leaf(path, module)]
        for path, module in rest:
            if any(id(child) in self._starts for child in module._modules.values()):
                self._block(path, module)
        self._report_strangers()

    def _leaf(self, path: str, module: nn.Module) -> bool:
        """Plan for a module by itself; whether there is nothing else to be done about it."""
        cls = type(module)
        for hook in module._forward_pre_hooks.values():
            self._hook(path, module, hook)
        if issubclass(cls, Fused):
            self._note_start(module, cls)
            return True
        found = families.rule_of(cls)
        if found is None and self._center_loss(path, module):
            return True
        if found is None:
            family, reason = stranger(cls)
            if family in self.wanted and self._accepted(module, path):
                self._strangers.append((path, cls, reason))
            return False
        name, rule = found
        if rule.family not in self.wanted or not self._accepted(module, path):
            return False
        reason = families.unknown_forward(cls, rule) or self._instance(module) or rule.check(module)
        if reason:
            self._skip(path, cls, reason)
            return True
        new = families.class_for(cls, families.rule_key(name))
        self.changes.append((path, module, new, rule.family))
        self._note_start(module, new)
        return True

    def _note_start(self, module: nn.Module, cls: type) -> None:
        """Whether a module of this class can take along what follows it, and as what."""
        start = getattr(cls, "_dlkernels_start", None)
        if start is not None:
            self._starts[id(module)] = start

    def _center_loss(self, path: str, module: nn.Module) -> bool:
        """Plan for a center loss, which is known by what it computes; whether it looks like one."""
        if module._modules or not any(
            "centers" in held for held in (module._parameters, module._buffers, vars(module))
        ):
            return False
        cls = type(module)
        named = "centerloss" in cls.__name__.lower()
        if (
            cls.__module__.startswith("dlkernels.")
            or "center_loss" not in self.wanted
            or not self._accepted(module, path)
        ):
            return False
        recognised = families.recognise_center_loss(module)
        if isinstance(recognised, str):
            if named:
                self._skip(path, cls, recognised)
            return named
        new = families.class_for(cls, families.center_key(recognised[1]))
        self.changes.append((path, module, new, "center_loss"))
        return True

    def _hook(self, path: str, module: nn.Module, hook: Any) -> None:
        """weight_norm as it was before parametrizations: an object among the hooks."""
        new = families.class_for_hook(hook)
        if new is not None and "weight_norm" in self.wanted and self._accepted(module, path):
            self.changes.append((f"{path} (weight_norm)".strip(), hook, new, "weight_norm"))

    def _block(self, path: str, module: nn.Module) -> None:
        """Plan for a module that calls others: what follows each other there becomes one."""
        cls = type(module)
        if not self._accepted(module, path) or self._instance(module):
            return
        if families.is_sequence(cls):
            if spans(module, list(module._modules), self._starts):
                self.changes.append((path, module, families.class_for(cls, families.SEQUENCE_KEY), "neighbours"))
            return
        found = families.live_spans(module, self._starts)
        if found:
            new = families.class_for(cls, families.block_key(found))
            self.changes.append((path, module, new, "; ".join(dict.fromkeys(", ".join(names) for *_, names in found))))

    def _report_strangers(self) -> None:
        """Classes that only look like ours, but for those that hold what they are called after and is swapped."""
        for path, cls, reason in self._strangers:
            inside = f"{path}." if path else ""
            if not any(changed.startswith(inside) for changed, *_ in self.changes):
                self._skip(path, cls, reason)

    def _instance(self, module: nn.Module) -> str:
        return "it has a forward of its own, set on the instance" if "forward" in module.__dict__ else ""

    def _accepted(self, module: nn.Module, path: str) -> bool:
        return self.filter is None or bool(self.filter(module, path))

    def _skip(self, path: str, cls: type, reason: str) -> None:
        self.skipped.append((path, qualified(cls), reason))

    def carry_out(self) -> SwapReport:
        swapped, undo = [], []
        for path, x, new, what in self.changes:
            old = type(x)
            x.__class__ = new
            undo.append((weakref.ref(x), old, new))
            swapped.append((path, qualified(old), fused_name(old), what))
        return SwapReport(swapped, self.skipped, undo)
