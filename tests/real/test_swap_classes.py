"""Squeeze-and-excitation classes of real libraries, one by one: the fused class against the original.

Whole models say little here: random networks make the input of such a layer zero or its gate one half everywhere.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import _libraries  # noqa: F401
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import dlkernels as dk
from dlkernels._swap import _classes, _rules
from dlkernels._swap._squeeze_excite import RULES
from dlkernels.testing import assert_within_budget

for _name in ("timm", "torchvision", "transformers", "monai", "segmentation_models_pytorch", "fvcore"):
    pytest.importorskip(_name, reason=f"needs real: {_name} is not installed")
pytest.importorskip("dynamic_network_architectures", reason="needs real: dynamic_network_architectures is missing")

import timm.layers  # noqa: E402
from dynamic_network_architectures.building_blocks.regularization import SqueezeExcite as NnUNet  # noqa: E402
from fvcore.nn.squeeze_excitation import SqueezeExcitation as Fvcore  # noqa: E402
from monai.data import MetaTensor  # noqa: E402
from monai.networks.blocks import ChannelSELayer, ResidualSELayer, SEBlock, SEResNetBottleneck  # noqa: E402
from segmentation_models_pytorch.base.modules import SCSEModule  # noqa: E402
from segmentation_models_pytorch.encoders._senet import SEModule as SmpSenet  # noqa: E402
from segmentation_models_pytorch.encoders.mobileone import SEBlock as MobileOne  # noqa: E402
from timm.layers import EffectiveSEModule, SEModule  # noqa: E402
from timm.layers.squeeze_excite import SqueezeExciteCl  # noqa: E402
from timm.models._efficientnet_blocks import SqueezeExcite as TimmEfficientNet  # noqa: E402
from timm.models.senet import SEModule as TimmSenet  # noqa: E402
from torchvision.models.quantization.mobilenetv3 import QuantizableSqueezeExcitation  # noqa: E402
from torchvision.ops import SqueezeExcitation  # noqa: E402
from transformers.models.align.modeling_align import AlignVisionSqueezeExciteLayer  # noqa: E402
from transformers.models.efficientnet.modeling_efficientnet import EfficientNetSqueezeExciteLayer  # noqa: E402
from transformers.models.pp_lcnet.modeling_pp_lcnet import PPLCNetSqueezeExcitationModule  # noqa: E402
from transformers.models.pp_lcnet_v3.modeling_pp_lcnet_v3 import PPLCNetV3SqueezeExcitationModule  # noqa: E402
from transformers.models.pp_lcnet_v4.modeling_pp_lcnet_v4 import PPLCNetV4SqueezeExcitationModule  # noqa: E402
from transformers.models.pp_ocrv5_mobile_det.modeling_pp_ocrv5_mobile_det import (  # noqa: E402
    PPOCRV5MobileDetSqueezeExcitationModule,
)
from transformers.models.pp_ocrv6_small_det.modeling_pp_ocrv6_small_det import (  # noqa: E402
    PPOCRV6SmallDetSqueezeExcitationModule,
)
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import SqueezeExcitationBlock  # noqa: E402
from transformers.models.regnet.modeling_regnet import RegNetSELayer  # noqa: E402

C = 12
ONE = ((2, C, 9),)
TWO = ((2, C, 5, 7), (1, C, 1, 1), (3, C, 16, 4))
THREE = ((2, C, 3, 4, 5),)
INNER = ((2, 5, 7, C), (1, 1, 1, C))


def config(act: str) -> SimpleNamespace:
    return SimpleNamespace(squeeze_expansion_ratio=0.5, hidden_act=act)


# name -> (how it is made, shapes of x)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "timm": (lambda: SEModule(C, rd_channels=5), TWO),
    "timm silu": (lambda: SEModule(C, rd_channels=5, act_layer=nn.SiLU, bias=False), TWO),
    "timm gelu": (lambda: SEModule(C, rd_channels=5, act_layer=timm.layers.activations.GELU), TWO),
    "timm hard": (lambda: SEModule(C, rd_channels=5, gate_layer="hard_sigmoid"), TWO),
    "timm own hard": (lambda: SEModule(C, rd_channels=5, gate_layer=timm.layers.activations.HardSigmoid), TWO),
    "timm effective": (lambda: EffectiveSEModule(C), TWO),
    "timm effective sigmoid": (lambda: EffectiveSEModule(C, gate_layer="sigmoid"), TWO),
    "timm nhwc": (lambda: SqueezeExciteCl(C, rd_channels=5), INNER),
    "timm efficientnet": (lambda: TimmEfficientNet(C, 0.4, act_layer=nn.SiLU), TWO),
    "timm senet": (lambda: TimmSenet(C, 3), TWO),
    "smp senet": (lambda: SmpSenet(C, 3), TWO),
    "smp mobileone": (lambda: MobileOne(C, 0.5), TWO),
    "torchvision": (lambda: SqueezeExcitation(C, 5), TWO),
    "torchvision silu": (lambda: SqueezeExcitation(C, 5, nn.SiLU), TWO),
    "torchvision hard": (lambda: SqueezeExcitation(C, 5, nn.ReLU, nn.Hardsigmoid), TWO),
    "transformers regnet": (lambda: RegNetSELayer(C, 5), TWO),
    "transformers efficientnet": (lambda: EfficientNetSqueezeExciteLayer(config("swish"), C, 2 * C), TWO),
    "transformers efficientnet gelu": (lambda: EfficientNetSqueezeExciteLayer(config("gelu"), C, C, True), TWO),
    "transformers align": (lambda: AlignVisionSqueezeExciteLayer(config("swish"), C, C), TWO),
    "transformers pp_lcnet": (lambda: PPLCNetSqueezeExcitationModule(C), TWO),
    "transformers pp_lcnet_v3": (lambda: PPLCNetV3SqueezeExcitationModule(C), TWO),
    "transformers pp_lcnet_v4": (lambda: PPLCNetV4SqueezeExcitationModule(C), TWO),
    "transformers pp_ocrv5": (lambda: PPOCRV5MobileDetSqueezeExcitationModule(C, 3), TWO),
    "transformers pp_ocrv6": (lambda: PPOCRV6SmallDetSqueezeExcitationModule(C, 3, "silu"), TWO),
    "transformers qwen2_5_omni": (lambda: SqueezeExcitationBlock(C, 5, C), ONE),
    "monai 1-D": (lambda: ChannelSELayer(1, C, 3), ONE),
    "monai 2-D": (lambda: ChannelSELayer(2, C, 3), TWO),
    "monai 3-D": (lambda: ChannelSELayer(3, C, 3, acti_type_1="gelu"), THREE),
    "monai + x": (lambda: ChannelSELayer(2, C, 3, add_residual=True), TWO),
    "monai residual": (lambda: ResidualSELayer(3, C, 3), THREE),
    "monai block": (lambda: SEBlock(2, C, 6, 6, C, r=3), TWO[2:]),
    "monai block, leaky": (lambda: SEBlock(3, C, 6, 6, 9, r=3, acti_type_final="leakyrelu"), THREE),
    "monai block, no activation": (lambda: SEBlock(2, C, 6, 6, C, r=3, acti_type_final=None), TWO[2:]),
    "monai bottleneck": (lambda: SEResNetBottleneck(2, C, 3, 1, 4), TWO[2:]),
    "fvcore": (lambda: Fvcore(C), TWO),
    "fvcore 3-D": (lambda: Fvcore(C, is_3d=True, activation=nn.SiLU()), THREE),
    "nnU-Net": (lambda: NnUNet(C, nn.Conv2d, rd_channels=5), TWO),
}
BLOCKS = [name for name in CASES if name.startswith(("monai block", "monai bottleneck"))]
LAYERS = [name for name in CASES if name not in BLOCKS]

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm inside": (lambda: SEModule(C, norm_layer=nn.BatchNorm2d), "`bn` is BatchNorm2d between its layers"),
    "max pool": (lambda: SEModule(C, add_maxpool=True), "it has `add_maxpool`"),
    "max pool, one layer": (lambda: EffectiveSEModule(C, add_maxpool=True), "it has `add_maxpool`"),
    "activation": (lambda: SEModule(C, act_layer=nn.Mish), "its activation is Mish, not one of gelu, leaky_relu, relu"),
    "slope": (lambda: SqueezeExcitation(C, 4, lambda: nn.LeakyReLU(0.2)), "its activation is LeakyReLU"),
    "gelu, tanh form": (lambda: SEModule(C, act_layer=timm.layers.activations.GELUTanh), "its activation is GELUTanh"),
    "gate": (lambda: SEModule(C, gate_layer="tanh"), "its gate is Tanh, not one of hard_sigmoid, relu, sigmoid"),
    "gate of monai": (lambda: ChannelSELayer(2, C, 3, acti_type_2="tanh"), "its gate is Tanh"),
    "3-D nnU-Net": (lambda: NnUNet(C, nn.Conv3d), "its mean is not one over all positions of a tensor with 5"),
    "1-D nnU-Net": (lambda: NnUNet(C, nn.Conv1d), "its mean is not one over all positions of a tensor with 3"),
    "two gates": (lambda: SCSEModule(32), "it also has a gate for every position"),
    "quantizable": (lambda: QuantizableSqueezeExcitation(C, 4), "it is to be quantized"),
    "channels": (lambda: SqueezeExcitationBlock(C, 5, 1), "it has 12 channels in and 1 out"),
    "dtypes": (lambda: changed(SEModule(C), lambda m: m.fc2.double()), "its parameters are float32, float64"),
    "integers": (lambda: SEModule(C).to(torch.complex64), "its parameters are complex64"),
    "kernel": (lambda: with_fc1(nn.Conv2d(C, 8, 3)), "its convolutions are not 1x1"),
    "padding": (lambda: with_fc1(nn.Conv2d(C, 8, 1, padding=1)), "its convolutions are not 1x1"),
    "stride": (lambda: with_fc1(nn.Conv2d(C, 8, 1, stride=2)), "its convolutions are not 1x1"),
    "groups": (lambda: with_fc1(nn.Conv2d(C, 8, 1, groups=4)), "its convolutions are not 1x1"),
    "Linear": (lambda: with_fc1(nn.Linear(C, 8)), "its layers are Linear and Conv2d, not convolutions or Linear"),
    "lazy": (lambda: with_fc1(nn.LazyConv2d(8, 1)), "its layers are LazyConv2d and Conv2d"),
    "parametrized": (
        lambda: changed(SEModule(C), lambda m: parametrizations.weight_norm(m.fc1)),
        "its layers are ParametrizedConv2d and Conv2d",
    ),
    "another pool": (
        lambda: changed(SqueezeExcitation(C, 4), lambda m: setattr(m, "avgpool", nn.AdaptiveMaxPool2d(1))),
        "`avgpool` is AdaptiveMaxPool2d between its layers",
    ),
    "pool to 2x2": (
        lambda: changed(RegNetSELayer(C, 4), lambda m: setattr(m, "pooler", nn.AdaptiveAvgPool2d((1, 2)))),
        "`pooler` leaves (1, 2) positions, not one",
    ),
    "a layer more": (
        lambda: changed(RegNetSELayer(C, 4), lambda m: m.attention.append(nn.Dropout())),
        "`attention` does not hold two layers, an activation and a gate",
    ),
    "is_3d": (lambda: changed(Fvcore(C), lambda m: setattr(m, "is_3d", True)), "its `is_3d` does not fit"),
}


def changed(module: nn.Module, change: Callable[[Any], Any]) -> nn.Module:
    change(module)
    return module


def with_fc1(layer: nn.Module) -> nn.Module:
    return changed(SEModule(C, rd_channels=8), lambda m: setattr(m, "fc1", layer))


# Helpers --------------------------------------------------------------------------------------------------------------


class ExactHardsigmoid(nn.Module):
    """Of torch's own, the gradient in float64 is a float32 one sixth."""

    def forward(self, z: Tensor) -> Tensor:
        return F.relu6(z + 3) / 6


def exact(module: nn.Module) -> nn.Module:
    """A copy in float64, with gradients that are right."""
    module = copy.deepcopy(module).double()
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Hardsigmoid:
                setattr(parent, name, ExactHardsigmoid())
    return module


def made(name: str, seed: int = 0) -> nn.Module:
    """A module of a case, with random parameters and statistics: gates on both sides of their bends."""
    torch.manual_seed(seed)
    module = CASES[name][0]()
    for t in [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]:
        t.data.normal_(std=0.8)
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_var.data.uniform_(0.5, 1.5)
    return module.eval()


def input_of(name: str, shape: tuple[int, ...], **options: Any) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, **{"dtype": torch.float64, **options}) + 0.3


def swapped(module: nn.Module) -> nn.Module:
    """A copy that `swap` has gone over."""
    module = copy.deepcopy(module)
    dk.swap(module, "squeeze_excite")
    assert isinstance(module, _classes.Fused)
    return module


def reason(module: nn.Module) -> str:
    """Why a module is not swapped; "" when it is."""
    report = dk.swap(module, "squeeze_excite")
    assert len(report.swapped) + len(report.skipped) == 1
    return report.skipped[0][2] if report.skipped else ""


def shape_for(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """With the channels of a module that says how many it has: those of EfficientNet."""
    return (shape[0], module.dim, *shape[2:]) if hasattr(module, "dim") else shape


def results(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and all gradients of its product with fixed numbers."""
    x = x.detach().requires_grad_()
    module.zero_grad()
    y = module(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    (y * weight).sum().backward()
    out = {"y": y.detach(), "dx": x.grad}
    return {**out, **{f"d{n}": p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}}


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor], allowed: float = 1e-12) -> None:
    assert actual.keys() == expected.keys()
    for name, t in expected.items():
        assert torch.isfinite(t).all() and t.norm() > 1e-3, f"{name} says nothing"
        error = ((actual[name] - t).norm() / t.norm()).item()
        assert error <= allowed, f"{name}: relative error {error:.3g}"


def calls(f: Callable[[], Any]) -> int:
    """How often f calls the fused op."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        f()
    return sum(e.count for e in profile.key_averages() if e.key == "dlkernels::squeeze_excite_fwd")


def layouts_of(x: Tensor) -> Iterator[Tensor]:
    yield x
    if x.dim() in (4, 5):
        yield x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    yield x.mT.contiguous().mT


def is_channels_last(x: Tensor) -> bool:
    """And not contiguous too."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]) and not x.is_contiguous()


# Values ---------------------------------------------------------------------------------------------------------------


def test_every_class_is_tested() -> None:
    modules = [make() for make, _ in (*(CASES[name] for name in LAYERS), *REFUSED.values())]
    assert {_rules.known(type(m), RULES)[0] for m in modules} == set(RULES)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str) -> None:
    """In float64, in all layouts; the op is what computes them."""
    module = exact(made(name))
    for shape in CASES[name][1]:
        shape = shape_for(module, shape)
        fused = swapped(made(name).double())
        for x in layouts_of(input_of(name, shape)):
            expected = results(module, x)
            compare(results(fused, x), expected)
            y, theirs = fused(x), module(x)
            assert y.shape == theirs.shape and (is_channels_last(y) == is_channels_last(theirs) or "nhwc" in name)
            assert calls(partial(fused, x)) == 1
    assert list(fused.state_dict()) == list(module.state_dict())


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "autocast", "autocast bfloat16"])
def test_lower_precision(name: str, mode: str) -> None:
    """Within the error that the original makes, and in its dtype."""
    module = made(name)
    dtype = torch.bfloat16 if "bfloat16" in mode else torch.float32
    x = input_of(name, shape_for(module, CASES[name][1][0])).to(dtype)
    module = module.to(torch.bfloat16) if mode == "bfloat16" else module
    fused = swapped(module)
    with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in mode):
        theirs, ours = module(x), fused(x)
    assert ours.dtype == theirs.dtype
    assert_within_budget(ours.detach(), exact(module)(x.double()).detach(), theirs.detach())


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_parameter_is_seen(name: str) -> None:
    """The comparison fails for a change in the tenth digit."""
    module = exact(made(name))
    shape = CASES[name][1][-1]
    shape = shape_for(module, shape)
    x = input_of(name, shape)
    expected = results(module, x)
    for parameter in [n for n, _ in module.named_parameters()][-4:]:
        fused = swapped(made(name).double())
        fused.get_parameter(parameter).data.mul_(1 + 1e-9)
        with pytest.raises(AssertionError, match="relative error"):
            compare(results(fused, x), expected)


def test_train_mode_of_a_block() -> None:
    """With norms over the batch before it, behind which gradients of biases are rounding errors."""
    module = exact(made("monai block")).train()
    fused = swapped(made("monai block").double()).train()
    x = input_of("monai block", CASES["monai block"][1][0])
    ours, theirs = results(fused, x), results(module, x)
    for name in ("y", "dx", "dse_layer.fc.0.weight", "dconv1.conv.weight"):
        compare({name: ours[name]}, {name: theirs[name]}, 1e-11)
    assert torch.equal(fused.conv1.adn.N.running_mean, module.conv1.adn.N.running_mean)


# What a layer does when something about it is special -----------------------------------------------------------------


@pytest.mark.parametrize("name", LAYERS)
def test_hooks_of_inner_modules_fire(name: str) -> None:
    """With what they change."""
    fused = swapped(made(name))
    x = input_of(name, shape_for(fused, CASES[name][1][0]), dtype=torch.float32)
    paths = [n for n, m in fused.named_modules() if n and not isinstance(m, nn.ModuleList)]
    assert len(paths) >= 2
    for path in paths:
        fused, module = swapped(made(name)), made(name)
        for m in (fused, module):
            m.seen = []
            m.get_submodule(path).register_forward_hook(lambda _, i, y, m=m: m.seen.append(i[0].shape) or y * 1.5)
        assert torch.equal(fused(x), module(x)) and fused.seen == module.seen and len(fused.seen) == 1
        assert calls(partial(fused, x)) == 0


def test_hooks_around_the_layer_fire() -> None:
    fused, x, seen = swapped(made("timm")), input_of("timm", TWO[0], dtype=torch.float32), []
    fused.register_forward_hook(lambda m, i, y: seen.append(y.shape))
    fused.register_full_backward_hook(lambda m, gi, go: seen.append(go[0].shape))
    fused(x.requires_grad_()).sum().backward()
    assert seen == [x.shape, x.shape]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: parametrizations.weight_norm(m.fc1),
        lambda m: torch.nn.utils.spectral_norm(m.fc2),
        lambda m: setattr(m, "act", nn.Tanh()),
        lambda m: setattr(m, "gate", nn.Tanh()),
        lambda m: setattr(m, "bn", nn.BatchNorm2d(5)),
        lambda m: setattr(m, "fc1", nn.Sequential(m.fc1)),
        lambda m: setattr(m, "fc1", type("Adapted", (nn.Conv2d,), {})(C, 5, 1)),
        lambda m: setattr(m, "add_maxpool", True),
        lambda m: setattr(m.fc1, "forward", lambda z: z[:, :5] * 2),
    ],
)
def test_a_layer_changed_afterwards(change: Callable[[nn.Module], Any]) -> None:
    fused, module = swapped(made("timm")), made("timm")
    x = input_of("timm", TWO[0], dtype=torch.float32)
    assert calls(lambda: fused(x)) == 1
    for m in (fused, module):
        torch.manual_seed(2)
        change(m)
        m.eval()
    assert calls(lambda: fused(x)) == 0 and torch.equal(fused(x), module(x))
    assert not torch.equal(module(x), made("timm")(x)) or any(isinstance(m, nn.Sequential) for m in module.modules())


@pytest.mark.parametrize(
    ("name", "x"),
    [
        ("torchvision", torch.randn(C, 5, 7)),  # without a batch: torch's layers take it
        ("smp senet", torch.randn(C, 5, 7)),
        ("torchvision", torch.randn(0, C, 5, 7)),
        ("monai 2-D", MetaTensor(torch.randn(2, C, 5, 7), meta={"spacing": 2.0})),
        ("timm", torch.randn(2, C, 5, 7, dtype=torch.float64)),  # not of the weights' dtype
        ("timm", torch.randn(2, C - 1, 5, 7)),
        ("timm", torch.randn(2, C, 5, 0)),
        ("timm", torch.randn(2, C, 5, 7, 3)),
        ("timm", torch.ones(2, C, 5, 7, dtype=torch.int64)),
        ("monai 2-D", torch.randn(2, C, 5)),
        ("monai 1-D", torch.randn(2, C, 5, 7)),
        ("fvcore", torch.randn(2, C, 3, 5, 7)),
    ],
)
def test_other_inputs_are_the_originals(name: str, x: Tensor) -> None:
    """The same values and types, or the same error."""
    results = []
    for m in (made(name), swapped(made(name))):
        try:
            results.append(m(x))
        except Exception as error:
            results.append((type(error), str(error)))
    theirs, ours = results
    assert type(ours) is type(theirs)
    if isinstance(theirs, tuple):
        assert ours == theirs
    else:
        assert torch.equal(ours, theirs) and getattr(ours, "meta", None) == getattr(theirs, "meta", None)


# A residual in the same call ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("name", ["timm", "timm nhwc", "monai 3-D", "transformers pp_ocrv5"])
def test_fused_forward_takes_a_residual(name: str, activation: str | None) -> None:
    module, fused = made(name).double(), swapped(made(name).double())
    x = input_of(name, CASES[name][1][0])
    residual = torch.randn_like(x)
    y = fused.fused_forward(x, residual, activation)
    expected = module(x) + residual
    expected = expected if activation is None else getattr(F, activation)(expected)
    compare({"y": y.detach()}, {"y": expected.detach()})
    assert calls(lambda: fused.fused_forward(x, residual, activation)) == 1


def test_fused_forward_says_when_it_cannot() -> None:
    fused, x = swapped(made("timm")), input_of("timm", TWO[0], dtype=torch.float32)
    assert fused.fused_forward(x, x) is not None
    for residual in (x[:1], x.double(), x.to("meta"), MetaTensor(x)):
        assert fused.fused_forward(x, residual) is None
    adds_x = swapped(made("monai + x"))
    assert adds_x.fused_forward(x, x) is None and adds_x.fused_forward(x) is not None
    fused.fc1.register_forward_hook(lambda *_: None)
    assert fused.fused_forward(x, x) is None


def test_hooks_of_the_layer_in_a_block_fire() -> None:
    x = input_of("monai block", TWO[2], dtype=torch.float32)
    for path in ("se_layer", "act", "conv2", "project"):
        fused, module = swapped(made("monai block")), made("monai block")
        for m in (fused, module):
            m.seen = []
            m.get_submodule(path).register_forward_hook(lambda _, i, y, m=m: m.seen.append(y.sum().item()))
        ours, theirs = fused(x), module(x)
        assert len(fused.seen) == len(module.seen) == 1 and fused.seen[0] == pytest.approx(module.seen[0], rel=1e-4)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


# The object -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_copies_and_pickles(name: str) -> None:
    fused = swapped(made(name))
    x = input_of(name, shape_for(fused, CASES[name][1][-1]), dtype=torch.float32)
    assert isinstance(fused, type(made(name)))
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(other) is type(fused) and torch.equal(other(x), fused(x))
        assert other.state_dict().keys() == made(name).state_dict().keys()
        assert calls(partial(other, x)) == 1


@pytest.mark.parametrize(
    "name", ["timm", "timm nhwc", "torchvision hard", "monai + x", "transformers pp_ocrv5", "fvcore"]
)
def test_compile_and_export(name: str) -> None:
    """One graph, with our op in it; without it where an inner layer has a hook when it is compiled."""
    torch._dynamo.reset()
    fused, module = swapped(made(name)), made(name)
    x = input_of(name, CASES[name][1][0], dtype=torch.float32)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    def ops(graph: torch.fx.GraphModule) -> int:
        return sum("squeeze_excite" in str(n.target) for n in graph.graph.nodes)

    compiled = torch.compile(fused, backend=backend, fullgraph=True)
    assert torch.allclose(compiled(x), module(x), atol=1e-5) and [ops(g) for g in graphs] == [1]
    whole = results(torch.compile(fused, backend="aot_eager", fullgraph=True), x)
    compare({name.replace("_orig_mod.", ""): t for name, t in whole.items()}, results(module, x), 1e-5)
    program = torch.export.export(fused, (x,))
    assert ops(program) == 1 and torch.allclose(program.module()(x), module(x), atol=1e-5)
    for m in (fused, module):
        next(c for c in m.modules() if isinstance(c, (nn.Conv2d, nn.Linear))).register_forward_hook(lambda *a: a[2] * 3)
    torch._dynamo.reset()
    assert torch.allclose(compiled(x), module(x), atol=1e-5) and ops(graphs[-1]) == 0


def test_transforms_of_torch_func() -> None:
    fused, module = swapped(made("timm").double()), made("timm").double()
    parameters = dict(module.named_parameters())
    x = input_of("timm", (3, *TWO[0]))

    def gradients(m: nn.Module, p: dict[str, Tensor], x: Tensor) -> Any:
        return torch.func.grad(lambda p, x: torch.func.functional_call(m, p, (x,)).square().sum(), (0, 1))(p, x)

    per_sample = torch.func.vmap(gradients, (None, None, 0))
    for transform, given in ((gradients, x[0]), (per_sample, x)):
        ours, theirs = (torch.utils._pytree.tree_leaves(transform(m, parameters, given)) for m in (fused, module))
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    assert calls(lambda: per_sample(fused, parameters, x)) == 1


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    make, expected = REFUSED[name]
    assert reason(make()).startswith(expected)


@pytest.mark.parametrize("name", LAYERS)
def test_the_rest_is_not_refused(name: str) -> None:
    assert reason(made(name)) == ""
    assert reason(CASES[name][0]().to("meta")) == "" and reason(CASES[name][0]().bfloat16()) == ""


def test_subclasses() -> None:
    """One that changes nothing about the forward goes with its base, any other does not."""

    class Same(SEModule):
        pass

    class Other(SEModule):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class OtherScale(SqueezeExcitation):
        def _scale(self, input: Tensor) -> Tensor:
            return 2 * super()._scale(input)

    assert _rules.known(Same, RULES)[0] == "timm.layers.squeeze_excite.SEModule" and reason(Same(C)) == ""
    assert _rules.known(Other, RULES) is None
    assert reason(OtherScale(C, 4)) == "its `_scale` is not one that is known"


def test_a_forward_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another version of the library may have it."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(x.amax((2, 3), keepdim=True)))))

    monkeypatch.setattr(SEModule, "forward", forward)
    assert reason(SEModule(C)).startswith("its forward is not one that is known")
