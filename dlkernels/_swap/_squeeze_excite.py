"""Squeeze-and-excitation layers of other libraries, computed by `dlkernels.squeeze_excite`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import _backend
from .._checks import FLOAT_DTYPES
from ..ops.squeeze_excite import HIDDEN_ACTIVATIONS, squeeze_excite
from ._activations import GATES, name_of
from ._chains import Rest
from ._classes import Fused, plain
from ._rules import Rule, fingerprint
from ._tensors import TENSORS, plain_tensor, traced

FAMILY = "squeeze_excite"
HIDDEN = frozenset(HIDDEN_ACTIVATIONS)
_CONVOLUTIONS = {nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}  # -> the rank of their input
_POOLS = {nn.AdaptiveAvgPool1d: 3, nn.AdaptiveAvgPool2d: 4, nn.AdaptiveAvgPool3d: 5}
_BOXES = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class Form:
    """Where a class keeps the parts of `x * gate(fc2 act(fc1 mean(x)))`.

    fc1, fc2, act, gate: names of its submodules. fc1 is None where there is one layer only, act or gate is None where
        the class calls a function: `act_name`, `gate_name`.
    box: the submodule that holds these four, as its children 0 to 3.
    beside: one more submodule that must be what it was: a pool, or an Identity in the place of a norm.
    rank: of x, where the layers are Linear and no pool tells; otherwise the convolutions do.
    ranks: which are right. A mean over the last two axes is one over all positions for a rank of 4 only.
    layout: of x.
    refused: an attribute that must be false.
    adds_x: an attribute that says whether x is added to the result.
    gate_scale: what the argument of the gate is multiplied by to make it ours.
    """

    fc1: str | None
    fc2: str
    act: str | None
    gate: str | None
    act_name: str | None = None
    gate_name: str | None = None
    box: str | None = None
    beside: str | None = None
    rank: int | None = None
    ranks: tuple[int, ...] = (4,)
    layout: str = "channels_first"
    refused: str | None = None
    adds_x: str | None = None
    gate_scale: float = 1.0


def _methods(form: Form) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(forward, fused_forward) of the fused classes of a form.

    Everything is looked at in every call: layers may have been wrapped, parametrized or hooked meanwhile.
    """
    n_fc1, n_fc2, n_act, n_gate = form.fc1, form.fc2, form.act, form.gate
    box_name, beside_name, refused, adds_x = form.box, form.beside, form.refused, form.adds_x
    layout, scale, ranks = form.layout, form.gate_scale, form.ranks

    def fused_forward(
        self: Any, x: Tensor, residual: Tensor | None = None, residual_activation: str | None = None
    ) -> Tensor | None:
        """This layer, with a residual and its activation if given, in one call; None where that cannot be."""
        modules = inner = self._modules
        box = None
        if box_name is not None:
            box = modules.get(box_name)
            if type(box) not in _BOXES or len(box._modules) != 4:
                return None
            inner = box._modules
        fc2 = inner.get(n_fc2)
        fc1 = fc2 if n_fc1 is None else inner.get(n_fc1)
        kind = type(fc2)
        rank = _CONVOLUTIONS.get(kind)
        if type(fc1) is not kind or (rank is None and kind is not nn.Linear):
            return None
        beside = fc2
        if beside_name is not None:
            beside = modules.get(beside_name)
            if type(beside) is not nn.Identity:
                pooled = _POOLS.get(type(beside))
                if pooled is None or (rank is not None and rank != pooled):
                    return None
                rank = pooled
        if rank is None:
            rank = form.rank
        if rank not in ranks or (type(x) not in TENSORS and not traced(x)) or x.dim() != rank:
            return None
        act, gate, act_name, gate_name = fc2, fc2, form.act_name, form.gate_name
        if n_act is not None:
            act = inner.get(n_act)
            act_name = name_of(act)
        if n_gate is not None:
            gate = inner.get(n_gate)
            gate_name = name_of(gate)
        if act_name not in HIDDEN or gate_name not in GATES or (refused is not None and getattr(self, refused)):
            return None
        if not plain(fc1, fc2, act, gate, beside, fc2 if box is None else box):
            return None
        if adds_x is not None and getattr(self, adds_x):
            if residual is not None:
                return None
            residual = x
        p = fc2._parameters
        w2, b2 = p.get("weight"), p.get("bias")
        w1 = b1 = None
        if n_fc1 is not None:
            p = fc1._parameters
            w1, b1 = p.get("weight"), p.get("bias")
        if scale != 1.0 and w2 is not None:
            w2, b2 = w2 * scale, None if b2 is None else b2 * scale

        fast = None if torch.compiler.is_compiling() else _backend.fast(x)
        if fast is not None:
            y = fast.squeeze_excite(x, w1, b1, w2, b2, act_name, gate_name, residual, residual_activation, layout)
            if y is not None:
                return y
        if w2 is None or (w1 is None and n_fc1 is not None):  # not parameters of their own
            return None
        if not _fit(x if layout == "channels_first" else x.movedim(-1, 1), w1, b1, w2, b2):
            return None
        if residual is not None and not _like(residual, x):
            return None
        return squeeze_excite(
            x, w1, b1, w2, b2, activation=act_name, gate=gate_name, residual=residual,
            residual_activation=residual_activation, layout=layout,
        )  # fmt: skip

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.fused_forward(x)
        return super(Fused, self).forward(x) if y is None else y

    return forward, fused_forward


def _fuse(self: Any, x: Tensor, rest: Rest) -> tuple[Tensor, int] | None:
    """This layer with the addition and the activation that follow it."""
    residual = rest.residual()
    if residual is None:
        return None
    y = self.fused_forward(x, residual, rest.activation())
    return None if y is None else (y, rest.end)


def _fit(x: Tensor, w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> bool:
    """Whether `squeeze_excite` takes these; where it would raise, the original says what is wrong."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    for t in (x, w1, b1, w2, b2):
        if t is not None and not (
            plain_tensor(t)
            and (t.dtype == x.dtype or (half and t.dtype == torch.float32))
            and t.device == x.device
            and 0 not in t.shape
        ):
            return False
    c = x.shape[1]
    hidden = c if w1 is None else w1.shape[0]
    return (
        x.dtype in FLOAT_DTYPES
        and (w1 is None or (w1.shape[1] == c and w1.numel() == hidden * c))
        and w2.shape[0] == c
        and w2.shape[1] == hidden
        and w2.numel() == hidden * c
    )


def _like(residual: Tensor, x: Tensor) -> bool:
    return (
        plain_tensor(residual)
        and residual.dtype == x.dtype
        and residual.shape == x.shape
        and residual.device == x.device
    )


# Why a module is not swapped ------------------------------------------------------------------------------------------


def _check(form: Form) -> Callable[[nn.Module], str]:
    def check(module: nn.Module) -> str:
        children = module._modules
        inner = children
        if form.box is not None:
            box = children.get(form.box)
            if type(box) not in _BOXES or len(box._modules) != 4:
                return f"`{form.box}` does not hold two layers, an activation and a gate"
            inner = box._modules
        if form.refused is not None and getattr(module, form.refused):
            return f"it has `{form.refused}`"
        if form.beside is not None:
            beside = children.get(form.beside)
            if type(beside) in _POOLS:
                sizes = beside.output_size
                if set(sizes if isinstance(sizes, (tuple, list)) else (sizes,)) != {1}:
                    return f"`{form.beside}` leaves {sizes} positions, not one"
            elif type(beside) is not nn.Identity:
                return f"`{form.beside}` is {_known_as(beside)} between its layers"
        for name, fixed, ours, what in (
            (form.act, form.act_name, HIDDEN, "activation"),
            (form.gate, form.gate_name, GATES, "gate"),
        ):
            known = fixed if name is None else name_of(inner.get(name))
            if known not in ours:
                return f"its {what} is {_known_as(inner.get(name))}, not one of {', '.join(sorted(ours))}"
        return _layers(form, children, [inner.get(n) for n in (form.fc1, form.fc2) if n is not None])

    return check


def _known_as(module: Any) -> str:
    return "missing" if module is None else type(module).__name__


def _layers(form: Form, children: dict[str, Any], layers: list[Any]) -> str:
    kind = type(layers[-1])
    for layer in layers:
        if type(layer) is not kind or not (kind in _CONVOLUTIONS or kind is nn.Linear):
            return f"its layers are {' and '.join(_known_as(m) for m in layers)}, not convolutions or Linear"
        if kind is not nn.Linear and not (
            set(layer.kernel_size) == {1}
            and set(layer.stride) == {1}
            and layer.groups == 1
            and (layer.padding in ("same", "valid") or set(layer.padding) == {0})
        ):
            return "its convolutions are not 1x1 of stride 1 without padding and groups"
        if not isinstance(layer._parameters.get("weight"), nn.Parameter):
            return "its layers have no plain weight"
    pool = None if form.beside is None else _POOLS.get(type(children[form.beside]))
    rank = _CONVOLUTIONS.get(kind, pool or form.rank)
    if rank not in form.ranks or pool not in (None, rank):
        return f"its mean is not one over all positions of a tensor with {rank} dimensions"
    first, last = layers[0].weight, layers[-1].weight
    if first.shape[1] != last.shape[0] or (len(layers) == 1 and first.shape[0] != first.shape[1]):
        return f"it has {first.shape[1]} channels in and {last.shape[0]} out"
    if first.shape[0] == 0:
        return "its hidden layer has no units"
    dtypes = {p.dtype for layer in layers for p in layer._parameters.values() if p is not None}
    if len(dtypes) > 1 or not dtypes <= set(FLOAT_DTYPES):
        return f"its parameters are {', '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}"
    return ""


def _rule(form: Form, *prints: str, helpers: dict[str, str] | None = None) -> Rule:
    """helpers: methods that the forward calls -> their fingerprint."""
    forward, fused_forward = _methods(form)
    check = _check(form)

    def with_helpers(module: nn.Module) -> str:
        for name, known in (helpers or {}).items():
            if fingerprint(getattr(type(module), name)) != known:
                return f"its `{name}` is not one that is known"
        return check(module)

    return Rule(
        FAMILY,
        forward,
        frozenset(prints),
        with_helpers if helpers else check,
        {"_dlkernels_start": "squeeze", "_dlkernels_fuse": _fuse, "fused_forward": fused_forward},
    )


def _refused(reason: str) -> Rule:
    """For classes that a report should name, with why they stay."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return super(Fused, self).forward(*args, **kwargs)

    return Rule(FAMILY, forward, check=lambda module: reason)


# The classes ----------------------------------------------------------------------------------------------------------

_TIMM = Form("fc1", "fc2", "act", "gate", beside="bn", refused="add_maxpool")
_SENET = Form("fc1", "fc2", "relu", "sigmoid")
_HF_EFFICIENTNET = Form("reduce", "expand", "act_reduce", "act_expand", beside="squeeze")
_HF_PP_DET = Form(
    "conv1", "conv2", "act_fn", None, gate_name="hard_sigmoid", beside="avg_pool",
    gate_scale=1.2,  # clamp(0.2 z + 0.5, 0, 1) is the hard sigmoid of 1.2 z
)  # fmt: skip


def _in_a_box(box: str, **more: Any) -> Form:
    return Form("0", "2", "1", "3", box=box, **more)


_HF_PP_LCNET = _in_a_box("convolutions", beside="avg_pool")


def _fvcore() -> Rule:
    rule = _rule(_in_a_box("block", ranks=(4, 5)), "d85d5ffc1744")

    def check(module: nn.Module) -> str:
        reason = rule.check(module)
        if not reason and module.is_3d is not (type(module._modules["block"][0]) is nn.Conv3d):
            return "its `is_3d` does not fit its convolutions"
        return reason

    return replace(rule, check=check)


# Fingerprints: timm 1.0.31, torchvision 0.28, transformers 5.23, segmentation-models-pytorch 0.6, MONAI 1.6.1,
# fvcore 0.1.5, dynamic-network-architectures 0.4.4. A subclass that has the forward of one of these goes with it:
# MONAI's ResidualSELayer.
RULES: dict[str, Rule] = {
    "timm.layers.squeeze_excite.SEModule": _rule(_TIMM, "56b427456a27"),
    "timm.layers.squeeze_excite.EffectiveSEModule": _rule(
        Form(None, "fc", None, "gate", act_name="relu", refused="add_maxpool"), "c1cc8a4aef19"
    ),
    "timm.layers.squeeze_excite.SqueezeExciteCl": _rule(
        Form("fc1", "fc2", "act", "gate", rank=4, layout="channels_last"), "a2ee9bc55247"
    ),
    "timm.models._efficientnet_blocks.SqueezeExcite": _rule(
        Form("conv_reduce", "conv_expand", "act1", "gate"), "889445b22e65"
    ),
    "timm.models.senet.SEModule": _rule(_SENET, "5a00719912e1"),
    "segmentation_models_pytorch.encoders._senet.SEModule": _rule(replace(_SENET, beside="avg_pool"), "0886abe86e07"),
    "segmentation_models_pytorch.encoders.mobileone.SEBlock": _rule(
        Form("reduce", "expand", None, None, act_name="relu", gate_name="sigmoid"), "224e8d2e1fd4"
    ),
    "segmentation_models_pytorch.base.modules.SCSEModule": _refused("it also has a gate for every position"),
    "torchvision.ops.misc.SqueezeExcitation": _rule(
        Form("fc1", "fc2", "activation", "scale_activation", beside="avgpool"),
        "9958d395a06b",
        helpers={"_scale": "6023f5b30e63"},
    ),
    "torchvision.models.quantization.mobilenetv3.QuantizableSqueezeExcitation": _refused("it is to be quantized"),
    "transformers.models.regnet.modeling_regnet.RegNetSELayer": _rule(
        _in_a_box("attention", beside="pooler"), "4d9e52cfe363"
    ),
    "transformers.models.efficientnet.modeling_efficientnet.EfficientNetSqueezeExciteLayer": _rule(
        _HF_EFFICIENTNET, "6f0c6fc4bd9b"
    ),
    "transformers.models.align.modeling_align.AlignVisionSqueezeExciteLayer": _rule(_HF_EFFICIENTNET, "6f0c6fc4bd9b"),
    "transformers.models.pp_lcnet.modeling_pp_lcnet.PPLCNetSqueezeExcitationModule": _rule(
        _HF_PP_LCNET, "ec98c00aca15"
    ),
    "transformers.models.pp_lcnet_v3.modeling_pp_lcnet_v3.PPLCNetV3SqueezeExcitationModule": _rule(
        _HF_PP_LCNET, "ec98c00aca15"
    ),
    "transformers.models.pp_lcnet_v4.modeling_pp_lcnet_v4.PPLCNetV4SqueezeExcitationModule": _rule(
        _HF_PP_LCNET, "ec98c00aca15"
    ),
    "transformers.models.pp_ocrv5_mobile_det.modeling_pp_ocrv5_mobile_det.PPOCRV5MobileDetSqueezeExcitationModule": (
        _rule(_HF_PP_DET, "5712032997a5")
    ),
    "transformers.models.pp_ocrv6_small_det.modeling_pp_ocrv6_small_det.PPOCRV6SmallDetSqueezeExcitationModule": (
        _rule(_HF_PP_DET, "5712032997a5")
    ),
    "transformers.models.qwen2_5_omni.modeling_qwen2_5_omni.SqueezeExcitationBlock": _rule(
        Form("conv1", "conv2", "relu", "sigmoid", ranks=(3,)), "7988e5441cf7"
    ),
    "monai.networks.blocks.squeeze_and_excitation.ChannelSELayer": _rule(
        _in_a_box("fc", beside="avg_pool", ranks=(3, 4, 5), adds_x="add_residual"), "269cca694108"
    ),
    "fvcore.nn.squeeze_excitation.SqueezeExcitation": _fvcore(),
    "dynamic_network_architectures.building_blocks.regularization.SqueezeExcite": _rule(_TIMM, "56b427456a27"),
}
