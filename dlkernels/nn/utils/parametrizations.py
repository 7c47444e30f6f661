"""Parametrizations over `dlkernels.ops`, with the names and the state_dict of `torch.nn.utils.parametrizations`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ... import _backend
from ..._library import has_tangent, is_compiling, transforms_active
from ...ops._weight_norm_multi import weight_norm_multi
from ...ops.weight_norm import check as _check
from ...ops.weight_norm import weight_norm as _weight_norm

__all__ = ["fuse_weight_norm", "init_data_dependent", "weight_norm"]


class _Given(NamedTuple):
    """A weight that the model's hook has computed, and what it was computed from."""

    weight: Tensor
    key: tuple[Any, ...]
    situation: tuple[Any, ...]
    owner: Any


class _WeightNorm(nn.Module):
    """w = g v / ||v|| of original0 = g and original1 = v; the result is kept while gradients are off."""

    def __init__(self, dim: int | None = 0) -> None:
        super().__init__()
        self.dim = -1 if dim is None else dim
        self._kept: tuple[Any, ...] | None = None
        self._given: _Given | None = None  # for one forward pass: see fuse_weight_norm

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        if not is_compiling() and self._given is not None:
            w = self._given_for(g, v)
            if w is not None:
                return w
        if not _may_keep(g, v):
            if self._kept is not None and not is_compiling():
                self._kept = None
            return _weight_norm(v, g, self.dim)
        kept = self._kept_for(g, v)
        if kept is not None:
            return kept
        with torch.inference_mode(False), torch.no_grad():  # a tensor that may be used anywhere
            w = _weight_norm(v, g, self.dim)
        self._keep(g, v, w)
        return w

    def _kept_for(self, g: Tensor, v: Tensor) -> Tensor | None:
        kept = self._kept
        return kept[1] if kept is not None and kept[0] == _key(g, v) and _state(kept[1]) == kept[2] else None

    def _keep(self, g: Tensor, v: Tensor, w: Tensor) -> None:
        # The aliases of g and v hold their memory: no other tensor can appear at the same address.
        self._kept = (_key(g, v), w, _state(w), g.detach(), v.detach())

    def _given_for(self, g: Tensor, v: Tensor) -> Tensor | None:
        given = self._given
        if given is None or not _plain(g, v) or given.key != (id(g), id(v), *_key(g, v)):
            return None
        return given.weight if given.situation == _situation() else None

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.norm_except_dim(weight, 2, self.dim), weight

    def train(self, mode: bool = True) -> _WeightNorm:
        self._kept = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None, "_given": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_given": None, **state})

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def _may_keep(*tensors: Tensor) -> bool:
    """Plain tensors, outside of gradients, transforms and tracing."""
    return not torch.is_grad_enabled() and _plain(*tensors)


def _plain(*tensors: Tensor) -> bool:
    """Plain tensors, outside of transforms and tracing."""
    return (
        not is_compiling()
        and not torch.jit.is_tracing()
        and not transforms_active()
        and torch.utils._python_dispatch._get_current_dispatch_mode() is None
        and all(type(t) in (Tensor, nn.Parameter) and not t.is_inference() for t in tensors)
    )


def _situation() -> tuple[Any, ...]:
    """What a weight with its graph is good for: the thread, the grad mode, what becomes of saved tensors.

    An activation checkpoint computes a layer twice, and both times must save the same tensors.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return threading.get_ident(), torch.is_grad_enabled(), hooks


def _key(g: Tensor, v: Tensor) -> tuple[Any, ...]:
    return _state(g), _state(v), _backend.state.forced


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


def fuse_weight_norm(model: nn.Module) -> FusedWeightNorm:
    """Compute all weight-normalised weights of a model at the start of its forward pass, on GPUs in one launch.

    A network of many small layers spends more on launching a kernel per weight, and one more per weight in the backward
    pass, than in the kernels: this makes it one of each. Weights and their gradients are bitwise those of the layers by
    themselves, where no layer is called twice.

    Args:
        model: a module with layers that `weight_norm` of this module has been applied to, at any depth. Layers that
            are weight-normed, added or loaded later are not seen: call it again then.

    Returns:
        A handle, whose `remove()` ends it. `handle.layers` is the number of weights that it serves.

    Raises:
        ValueError: the model has no layer that `dlkernels.nn.utils.parametrizations.weight_norm` was applied to.

    Note:
        The model keeps its parameters, its state_dict and its layers; two hooks are added to it, which a deepcopy takes
        along. The weights hold for one forward pass: whatever changes a parameter, in it or between two,
        is seen. A weight is handed out only as it was meant: layers called outside of the model's forward pass, under
        another grad mode, under torch.func, torch.compile or export, in an activation checkpoint or in another thread
        compute theirs by themselves. All gradients of v and g become available when the last layer's backward pass is
        done, where DistributedDataParallel would have started to send those of the last layers. Second derivatives run
        the reference twice. Layers that CUDA C++ does not serve in one block (float64, very long rows) have launches of
        their own; dtypes have one each.
    """
    hook = _Hook(model)
    if not hook.layers:
        raise ValueError(
            "`model` must have a layer that dlkernels.nn.utils.parametrizations.weight_norm was applied to, got "
            f"{type(model).__name__}"
        )
    return FusedWeightNorm(model, hook)


class FusedWeightNorm:
    """The handle that `fuse_weight_norm` gives."""

    def __init__(self, model: nn.Module, hook: _Hook) -> None:
        self.layers = len(hook.layers)
        self._hook = hook
        self._handles = (
            model.register_forward_pre_hook(hook.before),
            model.register_forward_hook(hook.after, always_call=True),
        )

    def remove(self) -> None:
        """Layers compute their weights by themselves again. May be called more than once."""
        for handle in self._handles:
            handle.remove()
        self._hook.take_back()


class _Hook:
    """Hands weights to the parametrizations before the forward pass, and takes them back behind it."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = list(_weight_normed(model))

    def before(self, model: nn.Module, *_: Any) -> None:
        if is_compiling() or getattr(model, "_is_replica", False):  # DataParallel's copies share this hook
            return
        keeps = not torch.is_grad_enabled()
        groups: dict[torch.device, list[tuple[_WeightNorm, Tensor, Tensor, int | None]]] = {}
        for owner, name, parametrization in self.layers:
            if not _is_there(owner, name, parametrization):
                continue
            layer, g, v = parametrization[0], parametrization.original0, parametrization.original1
            given = layer._given
            if given is not None and given.owner is self:
                layer._given = None  # of a pass that was interrupted
            if not _plain(g, v) or has_tangent(g, v):
                continue
            there = layer._kept_for(g, v) if keeps else layer._given_for(g, v)
            if there is None and _backend.choose(v.device.type, "weight_norm_fwd") != "reference":
                groups.setdefault(v.device, []).append((layer, g, v, _check(v, g, layer.dim)))
        for group in groups.values():
            if len(group) > 1:
                self._hand_out(group, keeps)

    def _hand_out(self, group: list[tuple[_WeightNorm, Tensor, Tensor, int | None]], keeps: bool) -> None:
        layers, g, v, dims = map(list, zip(*group, strict=True))
        if keeps:
            with torch.inference_mode(False), torch.no_grad():
                weights = weight_norm_multi(v, g, dims)
            for layer, *pair, w in zip(layers, g, v, weights, strict=True):
                layer._keep(*pair, w)
            return
        weights, situation = weight_norm_multi(v, g, dims), _situation()
        for layer, a, b, w in zip(layers, g, v, weights, strict=True):
            layer._given = _Given(w, (id(a), id(b), *_key(a, b)), situation, self)

    def after(self, model: nn.Module, *_: Any) -> None:
        if not is_compiling():
            self.take_back()

    def take_back(self) -> None:
        for _, _, parametrization in self.layers:
            given = parametrization[0]._given
            if given is not None and given.owner is self:
                parametrization[0]._given = None


def _weight_normed(model: nn.Module) -> Iterator[tuple[nn.Module, str, parametrize.ParametrizationList]]:
    """(the layer, its parameter's name, the parametrization), each parametrization once."""
    seen = set()
    for module in model.modules():
        if not parametrize.is_parametrized(module):
            continue
        for name, parametrization in module.parametrizations.items():
            if isinstance(parametrization[0], _WeightNorm) and id(parametrization[0]) not in seen:
                seen.add(id(parametrization[0]))
                yield module, name, parametrization


def _is_there(owner: nn.Module, name: str, parametrization: parametrize.ParametrizationList) -> bool:
    """Whether the layer still has its parametrization."""
    everything = owner._modules.get("parametrizations")
    return everything is not None and everything._modules.get(name) is parametrization


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
