"""Which of our activations and gates a module or a function of theirs is, by exact class."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# Classes by qualified name: no library is imported to know them.
_OF_CLASSES: dict[str, str] = {
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.activation.Hardsigmoid": "hard_sigmoid",
    "timm.layers.activations.Swish": "silu",
    "timm.layers.activations.Sigmoid": "sigmoid",
    "timm.layers.activations.HardSigmoid": "hard_sigmoid",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.SiLUActivation": "silu",
}
_FORMS = {"none": "gelu", "tanh": "gelu_tanh"}
ACTIVATIONS = frozenset({"relu", "leaky_relu", "silu", "gelu", "gelu_tanh"})
GATES = frozenset({"sigmoid", "hard_sigmoid", "relu"})
_names: dict[type, str | None] = {}


def qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def name_of(module: Any) -> str | None:
    """The name of an elementwise module, as `dlkernels.group_norm` and the gates have it; None for any other."""
    cls = type(module)
    if cls is nn.LeakyReLU:
        return "leaky_relu" if module.negative_slope == 0.01 else None
    if cls is nn.GELU:
        return _FORMS.get(module.approximate)
    if cls not in _names:
        _names[cls] = _OF_CLASSES.get(qualified(cls))
    name = _names[cls]
    if name == "gelu" and getattr(module, "use_gelu_python", False):
        return None
    return name


def activation_of(module: Any) -> str | None:
    name = name_of(module)
    return name if name in ACTIVATIONS else None


_OF_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.silu: "silu",
    F.gelu: "gelu",
    F.leaky_relu: "leaky_relu",
}


def activation_of_call(function: Any, arguments: dict[str, Any]) -> str | None:
    """The activation that `function(x, **arguments)` is."""
    try:
        name = _OF_FUNCTIONS.get(function)
    except TypeError:  # cannot be hashed
        return None
    if name is None:
        return None
    rest = {k: v for k, v in arguments.items() if k != "inplace"}
    if name == "gelu":
        return _FORMS.get(rest.pop("approximate", "none")) if rest.keys() <= {"approximate"} else None
    if name == "leaky_relu":
        return name if rest.pop("negative_slope", 0.01) == 0.01 and not rest else None
    return name if not rest else None
