"""Parametrizations over `dlkernels.ops`, with the names and the state_dict of `torch.nn.utils.parametrizations`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ... import _backend
from ..._library import is_compiling, transforms_active
from ...ops.weight_norm import weight_norm as _weight_norm

__all__ = ["init_data_dependent", "weight_norm"]


class _WeightNorm(nn.Module):
    """w = g v / ||v|| of original0 = g and original1 = v; the result is kept while gradients are off."""

    def __init__(self, dim: int | None = 0) -> None:
        super().__init__()
        self.dim = -1 if dim is None else dim
        self._kept: tuple[Any, ...] | None = None

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        if not _may_keep(g, v):
            if self._kept is not None and not is_compiling():
                self._kept = None
            return _weight_norm(v, g, self.dim)
        key = _state(g), _state(v), _backend.state.forced
        kept = self._kept
        if kept is not None and kept[0] == key and _state(kept[1]) == kept[2]:
            return kept[1]
        with torch.inference_mode(False), torch.no_grad():  # a tensor that may be used anywhere
            w = _weight_norm(v, g, self.dim)
        # The aliases of g and v hold their memory: no other tensor can appear at the same address.
        self._kept = (key, w, _state(w), g.detach(), v.detach())
        return w

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.norm_except_dim(weight, 2, self.dim), weight

    def train(self, mode: bool = True) -> _WeightNorm:
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def _may_keep(*tensors: Tensor) -> bool:
    """Plain tensors, outside of gradients, transforms and tracing."""
    return (
        not torch.is_grad_enabled()
        and not is_compiling()
        and not torch.jit.is_tracing()
        and not transforms_active()
        and torch.utils._python_dispatch._get_current_dispatch_mode() is None
        and all(type(t) in (Tensor, nn.Parameter) and not t.is_inference() for t in tensors)
    )


def _state(t: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor does: its memory, its form, the count of its changes in place."""
    return t.data_ptr(), t._version, t.dtype, t.device, t.shape, t.stride()


def weight_norm(module: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    """Give a parameter of a module the form w = g v / ||v||: `torch.nn.utils.parametrizations.weight_norm`, fused.

    Args:
        module: the module, changed in place.
        name: of its parameter.
        dim: the dimension that keeps its own norms: 0 for the output units of a linear layer or a convolution, 1 for
            those of a transposed convolution. None (or -1) for one norm of the whole tensor.

    Returns:
        The module. Its parameters are `parametrizations.{name}.original0` (g) and `.original1` (v), as torch's: a
        state_dict loads either way, and one of the old `torch.nn.utils.weight_norm` (`{name}_g`, `{name}_v`) too.
        `torch.nn.utils.parametrize.remove_parametrizations` folds w back into one parameter.

    Raises:
        ValueError: the module has no such parameter.

    Note:
        With gradients off (`torch.no_grad()`, `torch.inference_mode()`) w is computed once and kept until g or v
        change. A change through `.data`, which autograd does not see, is not seen here either; `train()` and `eval()`
        forget what is kept.

    Reference:
        Salimans and Kingma, "Weight Normalization", NeurIPS 2016, eq. 2.
    """
    parametrize.register_parametrization(module, name, _WeightNorm(dim), unsafe=True)
    module._register_load_state_dict_pre_hook(_OldNames(name))
    return module


class _OldNames:
    """Takes a state_dict with `{name}_g` and `{name}_v`. A class, so that the module can be pickled."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        old = [f"{prefix}{self.name}_{letter}" for letter in "gv"]
        if all(key in state_dict for key in old):
            for i, key in enumerate(old):
                state_dict[f"{prefix}parametrizations.{self.name}.original{i}"] = state_dict.pop(key)


@torch.no_grad()
def init_data_dependent(module: nn.Module, *batch: Any, init_scale: float = 1.0) -> Any:
    """Scale and shift every weight-normed layer by its own outputs for one batch: zero mean, deviation `init_scale`.

        t = x . v / ||v||,    g <- init_scale / sqrt(var[t] + 1e-10),    b <- -mean[t] g

    Args:
        module: a weight-normed linear layer or convolution, or a network of them, initialised in the order in which its
            forward pass calls them, each from the outputs of those before it.
        batch: what the module is called with.
        init_scale: the deviation of every output unit.

    Returns:
        What the initialised module gives for the batch. A layer without a bias is scaled only.

    Raises:
        ValueError: there is no weight-normed layer, or one whose norms are not one per output unit (a transposed
            convolution needs dim=1); nothing has been changed then.

    Note:
        mean and the biased variance are taken over the batch and all positions. Layers that the batch does not reach
        stay as they are.

    Reference:
        Salimans and Kingma, "Weight Normalization", NeurIPS 2016, section 3, eq. 5 and 6.
    """
    layers = [m for m in module.modules() if _is_weight_normed(m)]
    if not layers:
        raise ValueError(f"`module` must have a layer with a weight-normed `weight`, got {type(module).__name__}")
    for layer in layers:
        _check_layer(layer)
    pending = set(layers)

    def before(layer: nn.Module, inputs: Any, named: Any) -> None:
        if layer in pending:
            pending.discard(layer)
            _init_layer(layer, inputs, named, init_scale)

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    try:
        return module(*batch)
    finally:
        for hook in hooks:
            hook.remove()


def _is_weight_normed(module: nn.Module) -> bool:
    if not parametrize.is_parametrized(module, "weight"):
        return False
    torchs = type(torch.nn.utils.parametrizations._WeightNorm())
    return isinstance(module.parametrizations["weight"][0], (_WeightNorm, torchs))


def _channel_dim(layer: nn.Module) -> int:
    """Where the output units lie in the layer's output, counted from the end."""
    return -1 if isinstance(layer, nn.Linear) else -1 - (layer.weight.dim() - 2)


def _check_layer(layer: nn.Module) -> None:
    units = getattr(layer, "out_channels", getattr(layer, "out_features", None))
    g = layer.parametrizations["weight"].original0
    dim = layer.parametrizations["weight"][0].dim
    at = 1 if getattr(layer, "transposed", False) else 0
    if units is None or g.dim() != layer.weight.dim() or g.numel() != units or dim % max(g.dim(), 1) != at or dim == -1:
        raise ValueError(
            f"`module` must have weight-normed layers with one norm per output unit ({units}, at dimension {at} of the "
            f"weight), got {type(layer).__name__} with g of shape {tuple(g.shape)}"
        )


def _init_layer(layer: nn.Module, inputs: Any, named: Any, init_scale: float) -> None:
    g = layer.parametrizations["weight"].original0
    ones = {"parametrizations.weight.original0": torch.ones_like(g)}
    if layer.bias is not None:
        ones["bias"] = torch.zeros_like(layer.bias)
    hooks, layer._forward_pre_hooks = layer._forward_pre_hooks, type(layer._forward_pre_hooks)()
    try:
        t = torch.func.functional_call(layer, ones, inputs, named)
    finally:
        layer._forward_pre_hooks = hooks
    t = t.movedim(_channel_dim(layer), -1).flatten(0, -2).to(torch.promote_types(t.dtype, torch.float32))
    var, mean = torch.var_mean(t, 0, correction=0)
    scale = init_scale / torch.sqrt(var + 1e-10)
    g.copy_(scale.view(g.shape))
    if layer.bias is not None:
        layer.bias.copy_(-mean * scale)
