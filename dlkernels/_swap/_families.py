"""All rules, and the class that a module gets."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import _center_loss, _focal_loss, _group_norm, _squeeze_excite, _stochastic_depth, _weight_norm
from ._chains import chain, spans
from ._classes import Key, fused
from ._rewrite import Source, Span, rewritten
from ._rules import Rule, fingerprint, known, unknown_forward

FAMILIES = ("center_loss", "focal_loss", "group_norm", "squeeze_excite", "stochastic_depth", "weight_norm")
RULES: dict[str, Rule] = {
    **_focal_loss.RULES, **_group_norm.RULES, **_squeeze_excite.RULES, **_stochastic_depth.RULES, **_weight_norm.RULES,
}  # fmt: skip
# Rules of classes that many modules of a library have a copy of: by the end of their name, and by what they do.
_COPIES: dict[str, Rule] = {"DropPath": _stochastic_depth.UNIFORM}

_found: dict[type, tuple[str, Rule] | None] = {}


def rule_of(cls: type) -> tuple[str, Rule] | None:
    """The rule for a class, and what it goes by; None where there is none."""
    if cls not in _found:
        _found[cls] = known(cls, RULES) or _copy(cls)
    return _found[cls]


def _copy(cls: type) -> tuple[str, Rule] | None:
    for ending, rule in _COPIES.items():
        if cls.__name__.endswith(ending) and fingerprint(cls.forward) in rule.fingerprints:
            return f"*{ending}", rule
    return None


def class_for(original: type, key: Key) -> type:
    """The fused class that a key stands for."""
    kind, what = key
    if kind == "rule":
        rule = RULES[what] if what in RULES else _COPIES[what[1:]]
        return fused(original, key, lambda: _members(rule, original))
    if kind == "center":
        return fused(original, key, lambda: {"forward": _center_loss.forward_of(what)})
    if kind == "sequence":
        return fused(original, key, lambda: {"forward": _sequence})
    return fused(original, key, lambda: {"forward": rewritten(original, what, chain)})


def _members(rule: Rule, original: type) -> dict[str, Any]:
    members = dict(rule.members)
    if rule.forward is not None:
        members["forward"] = rule.forward
    return members if rule.make is None else {**members, **rule.make(original)}


def rule_key(name: str) -> Key:
    return "rule", name


def block_key(spans: tuple[Span, ...]) -> Key:
    return "block", spans


SEQUENCE_KEY: Key = ("sequence", "")


def _sequence(self: nn.Sequential, input: Any) -> Any:
    return chain(self, input, tuple(self._modules))


def center_key(convention: str) -> Key:
    return "center", convention


recognise_center_loss = _center_loss.recognise
class_for_hook = _weight_norm.class_for_hook


def is_sequence(cls: type) -> bool:
    """Whether a class does nothing but to call its children one after the other."""
    return issubclass(cls, nn.Sequential) and cls.forward is nn.Sequential.forward


_sources: dict[type, Source] = {}


def live_spans(module: nn.Module, starts: dict[int, str]) -> tuple[Span, ...]:
    """The stretches of a module's forward that could be fused, with these modules as they are."""
    cls = type(module)
    if cls not in _sources:
        _sources[cls] = Source(cls.forward)
    found: list[Span] = []
    for number, steps in enumerate(_sources[cls].chains):
        names = steps.names()
        for i, j in spans(module, [op.form for _, op in steps.operations()], starts):
            found.append((number, i, names[i:j]))
    return tuple(found)


__all__ = [
    "FAMILIES", "RULES", "SEQUENCE_KEY", "block_key", "center_key", "class_for", "class_for_hook", "is_sequence",
    "live_spans", "recognise_center_loss", "rule_key", "rule_of", "unknown_forward",
]  # fmt: skip
