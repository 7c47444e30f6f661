"""Our layers for Hugging Face's `kernels`: `kernelize(model, mode=...)` puts them into models, from this process."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ._swap._activations import qualified
from ._swap._rules import Rule, unknown_forward
from ._swap._tensors import is_served
from .ops.group_norm import group_norm

TESTED = "0.17"  # the interface differs between minor versions


@dataclass(frozen=True)
class Layer:
    """What `kernels` takes for a repository: it is asked for a class, whose forward it binds to modules."""

    layer_name: str

    def load(self) -> type[nn.Module]:
        return _layers()[self.layer_name][0]


def register_with_hf_kernels(*, devices: Sequence[str] = ("cpu", "cuda"), register: bool = True) -> dict[str, Any]:
    """Make dlkernels' layers known to Hugging Face `kernels`, so that `kernels.kernelize` puts them into models.

    torch.nn.GroupNorm, and the squeeze-excite classes of the libraries that are imported by now, are made layers that
    can be kernelized, for inference, training and torch.compile. Their subclasses with a forward of their own are not.

    Args:
        devices: types of device to register for.
        register: register the mapping for good; False leaves that to `with kernels.use_kernel_mapping(mapping):`.

    Returns:
        The mapping: layer name (the class, with its module) -> device type -> what loads the layer.

    Raises:
        ImportError: when `kernels` is not installed, or in a version that this was not written for.
        ValueError: for a device other than "cpu" and "cuda".

    Note:
        Nothing is downloaded. After importing another library, call it again. state_dict, parameters and hooks stay as
        they are. `kernelize` puts a bound forward into the instance: `copy.deepcopy` keeps it, and `pickle` and
        `torch.save` give a module back with its original forward. `dlkernels.swap` does more (activations and residuals
        are fused with their norm) and its modules pickle as they are.
    """
    for device in devices:
        if device not in ("cpu", "cuda"):
            raise ValueError(f"`devices` must be of 'cpu' and 'cuda', got {device!r}")
    kernels = _kernels()
    mapping: dict[str, Any] = {}
    for name, (_, rule) in _layers().items():
        mapping[name] = {device: Layer(name) for device in devices}
        cls = _imported(name)
        if cls is not None and "kernel_layer_name" not in vars(cls):  # of somebody else, or of the last call
            kernels.replace_kernel_forward_from_hub(cls, name, _condition(cls, rule))
    if register:
        kernels.register_kernel_mapping(mapping)
    return mapping


def _kernels() -> Any:
    try:
        kernels = importlib.import_module("kernels")
    except ImportError as err:
        raise ImportError(
            f"Hugging Face `kernels` cannot be imported ({err}): pip install kernels=={TESTED}.*, or use dlkernels.swap"
        ) from None
    version = getattr(kernels, "__version__", "of an unknown version")
    if ".".join(version.split(".")[:2]) != TESTED:
        raise ImportError(f"`kernels` must be {TESTED}.*, got {version}: install that one, or use dlkernels.swap")
    return kernels


def _condition(cls: type, rule: Rule | None) -> Callable[[nn.Module], bool]:
    """Whether a module that says it is of this layer has its forward, and a form that ours can compute."""

    def condition(module: nn.Module) -> bool:
        if type(module).forward is not cls.forward:
            return False
        return rule is None or not (unknown_forward(cls, rule) or rule.check(module))

    return condition


def _imported(name: str) -> Any:
    """The class of this qualified name, None where its module has not been imported."""
    module, _, cls = name.rpartition(".")
    return getattr(sys.modules.get(module), cls, None)


_made: dict[str, tuple[type[nn.Module], Rule | None]] = {}


def _layers() -> dict[str, tuple[type[nn.Module], Rule | None]]:
    """Layers without a state, by the class whose forward they replace."""
    if not _made:
        from ._swap._squeeze_excite import RULES

        _made[qualified(nn.GroupNorm)] = (_layer("GroupNorm", _group_norm()), None)
        for name, rule in RULES.items():
            fused_forward = rule.members.get("fused_forward")
            if fused_forward is not None:
                _made[name] = (_layer(name.rpartition(".")[2], _squeeze_excite(fused_forward)), rule)
    return _made


def _layer(name: str, forward: Callable[..., Tensor]) -> type[nn.Module]:
    """What `kernels` accepts: a forward, two flags and no other member."""
    return type(name, (nn.Module,), {"forward": forward, "has_backward": True, "can_torch_compile": True})


# Their names are "forward", by which `pickle` finds the method again.


def _group_norm() -> Callable[..., Tensor]:
    def forward(self: Any, input: Tensor) -> Tensor:
        if type(self).forward is not nn.GroupNorm.forward or not is_served(input):
            return type(self).forward(self, input)
        return group_norm(input, self.num_groups, self.weight, self.bias, self.eps)

    return forward


def _squeeze_excite(fused_forward: Callable[..., Any]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = fused_forward(self, x)
        return type(self).forward(self, x) if y is None else y

    return forward
