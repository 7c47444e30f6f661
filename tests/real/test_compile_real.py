"""torch.compile(backend="dlkernels") on models of real libraries: what is found in them, and that nothing changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import _libraries  # noqa: F401  (torchvision without a GPU)
import pytest
import torch
from torch import Tensor, nn

import dlkernels as dk
import dlkernels.compile  # in a checkout, this names the backend to torch.compile
from dlkernels._patterns import calls, rewrite

for _name in ("timm", "torchvision", "transformers", "diffusers", "monai", "segmentation_models_pytorch", "fvcore"):
    pytest.importorskip(_name, reason=f"needs real: {_name} is not installed")

pytestmark = pytest.mark.needs("cpp")

F64 = torch.float64
# Everything that is found: between contiguous convolutions squeeze-and-excitation would else be left as not faster.
OPTIONS = {"then": "aot_eager", "all": True}
LIMIT = 1e-12
HARD = 1e-7  # torch's backward pass of hardsigmoid has 1/6 in float32, whatever the dtype


class Case(NamedTuple):
    """A model, its inputs, what is replaced in it, why the rest is left."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    replaced: dict[str, int]
    left: dict[str, int] = {}
    output: Callable[[Any], Tensor] = lambda y: y
    limit: float = LIMIT


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    torch._dynamo.reset()
    dk.compile_report().clear()
    yield
    torch._dynamo.reset()


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=F64)


def image(size: int = 64) -> tuple[Tensor, ...]:
    return (normal(2, 3, size, size),)


def randomised(model: nn.Module) -> nn.Module:
    """float64, eval, and values that keep a deep network's rounding where it was: none of them 0 or 1."""
    model = model.to(F64).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                uniform = torch.rand(value.shape, generator=generator, dtype=F64)
                if value.dim() > 1:
                    value.copy_(torch.randn(value.shape, generator=generator, dtype=F64) / value[0].numel() ** 0.5)
                else:
                    value.copy_(uniform * 0.5 + (0.5 if name.endswith(("weight", "var")) else -0.25))
    return model


def timm_model(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def torchvision_model(name: str) -> nn.Module:
    import torchvision

    return getattr(torchvision.models, name)()


def unet(**options: Any) -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        **options,
    )


def autoencoder() -> nn.Module:
    from diffusers import AutoencoderKL

    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return AutoencoderKL(block_out_channels=(32, 64), down_block_types=down, up_block_types=up, norm_num_groups=8)


def bit() -> nn.Module:
    from transformers import BitConfig, BitModel

    return BitModel(BitConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[1, 2], num_groups=8))


def regnet() -> nn.Module:
    from transformers import RegNetConfig, RegNetModel

    return RegNetModel(RegNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8))


def segresnet() -> nn.Module:
    from monai.networks.nets import SegResNet

    return SegResNet(spatial_dims=3, init_filters=8, in_channels=1, out_channels=2)


def channel_se(rank: int) -> nn.Module:
    from monai.networks.blocks import ChannelSELayer, ResidualSELayer

    return nn.Sequential(ChannelSELayer(rank, 8, add_residual=True), ResidualSELayer(rank, 8), ChannelSELayer(rank, 8))


def scse() -> nn.Module:
    from segmentation_models_pytorch.base.modules import SCSEModule

    return SCSEModule(16)


def sample(output: Any) -> Tensor:
    return output.sample


def hidden(output: Any) -> Tensor:
    return output.last_hidden_state


NOISY = lambda: (*image(16), torch.tensor([3, 7]))  # noqa: E731
SE = "squeeze_excite"
CASES: dict[str, Case] = {
    "torchvision efficientnet_b0": Case(
        lambda: torchvision_model("efficientnet_b0"), image, {f"{SE} (silu, sigmoid)": 16}
    ),
    "torchvision mobilenet_v3_small": Case(
        lambda: torchvision_model("mobilenet_v3_small"), image, {f"{SE} (relu, hard_sigmoid)": 9}, limit=HARD
    ),
    "timm seresnet50": Case(lambda: timm_model("seresnet50"), image, {f"{SE} (relu, sigmoid) + residual + relu": 16}),
    "timm ese_vovnet19b_dw": Case(
        lambda: timm_model("ese_vovnet19b_dw"), image, {f"{SE} (one layer, hard_sigmoid)": 4}, limit=HARD
    ),
    "timm resnet50_gn": Case(
        lambda: timm_model("resnet50_gn"),
        image,
        {"group_norm + relu": 33, "group_norm + residual + relu": 16, "group_norm": 4},
    ),
    "timm rexnet_100": Case(
        lambda: timm_model("rexnet_100"), image, {}, {"`batch_norm` between the pool and the product": 13}
    ),
    "diffusers UNet2DModel": Case(unet, NOISY, {"group_norm + silu": 17, "group_norm": 4}, output=sample),
    "diffusers UNet2DModel scale_shift": Case(
        lambda: unet(resnet_time_scale_shift="scale_shift"),
        NOISY,
        {"group_norm + silu": 9, "group_norm + scale and shift + silu": 8, "group_norm": 3},
        output=sample,
    ),
    "diffusers AutoencoderKL": Case(
        autoencoder, lambda: image(32), {"group_norm + silu": 22, "group_norm": 2}, output=sample
    ),
    "transformers BitModel": Case(bit, image, {"group_norm + relu": 10}, output=hidden),
    "transformers RegNetModel": Case(regnet, image, {f"{SE} (relu, sigmoid)": 3}, output=hidden),
    "MONAI SegResNet": Case(segresnet, lambda: (normal(1, 1, 16, 16, 16),), {"group_norm + relu": 25}),
    **{
        f"MONAI ChannelSELayer {rank}-D": Case(
            lambda rank=rank: channel_se(rank),
            lambda rank=rank: (normal(2, 8, *(4, 5, 6)[:rank]),),
            {
                f"{SE} (relu, sigmoid) + residual": 1,
                f"{SE} (leaky_relu, relu) + residual": 1,
                f"{SE} (relu, sigmoid)": 1,
            },
        )
        for rank in (1, 2, 3)
    },
    "smp SCSEModule": Case(scse, lambda: (normal(2, 16, 6, 6),), {f"{SE} (relu, sigmoid) + residual": 1}),
}


def results(model: nn.Module, call: Callable[..., Any], case: Case) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients that are there."""
    output = case.output(call(*case.inputs()))
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad((output * normal(*output.shape)).sum(), parameters, allow_unused=True)
    return output.detach(), [g for g in grads if g is not None]


def differences(made: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> tuple[float, float]:
    """Of the output, and of the gradient that differs most: relative to itself, or to a thousandth of the largest."""
    assert len(made[1]) == len(expected[1])
    least = max(float(g.norm()) for g in expected[1]) / 1000
    of_grads = [float((a - b).norm()) / max(float(b.norm()), least) for a, b in zip(made[1], expected[1])]
    return float((made[0] - expected[0]).norm() / expected[0].norm()), max(of_grads)


@pytest.mark.parametrize("name", CASES)
def test_model(name: str) -> None:
    case = CASES[name]
    model = randomised(case.make())
    expected = results(model, model, case)
    made = results(model, torch.compile(model, backend="dlkernels", options=OPTIONS), case)
    output, grad = differences(made, expected)
    report = dk.compile_report()
    assert not [graph.error for graph in report.graphs if graph.error]
    assert Counter(find.what for find in report.replaced) == case.replaced, str(report)
    assert Counter(find.reason for find in report.left).items() >= case.left.items(), str(report)
    assert output <= LIMIT and grad <= case.limit, f"{output:.1e} {grad:.1e}"
    for find in report.replaced:
        assert ".py:" in find.line and all(
            part.isidentifier() or part.isdigit() for part in find.module.split(".") if part
        )


@pytest.mark.parametrize("name", ["timm resnet50_gn", "torchvision efficientnet_b0"])
def test_an_error_would_be_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replaced call off by 1e-9: the comparison above fails."""
    case = CASES[name]
    for op in ("group_norm", "squeeze_excite"):
        original = getattr(calls, op)
        monkeypatch.setattr(calls, op, lambda *args, f=original: f(*args) * (1 + 1e-9))
    model = randomised(case.make())
    expected = results(model, model, case)
    made = results(model, torch.compile(model, backend="dlkernels", options=OPTIONS), case)
    output, grad = differences(made, expected)
    assert dk.compile_report().replaced and output > 100 * LIMIT and grad > 100 * LIMIT


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_inductor_in_training() -> None:
    """A block of a diffusion model through Inductor, in float32."""
    from diffusers.models.resnet import ResnetBlock2D

    block = ResnetBlock2D(in_channels=16, temb_channels=8, groups=4, time_embedding_norm="scale_shift")
    model = randomised(block).float().train()
    inputs = (normal(2, 16, 8, 8).float(), normal(2, 8).float())

    def step(call: Callable[..., Any]) -> list[Tensor]:
        return torch.autograd.grad(call(*inputs).square().mean(), list(model.parameters()))

    expected, made = step(model), step(torch.compile(model, backend="dlkernels"))
    difference = torch.cat([(a - b).flatten() for a, b in zip(made, expected)]).norm()
    assert difference <= 1e-4 * torch.cat([e.flatten() for e in expected]).norm()
    found = [find.what for find in dk.compile_report().replaced]
    assert found == ["group_norm + silu", "group_norm + scale and shift + silu"]


def test_what_is_slower_is_left() -> None:
    """In a contiguous network; in a channels_last one it is replaced."""
    model, (x,) = randomised(timm_model("seresnet18")), image()
    options = {"then": "eager"}
    for memory_format, count in ((torch.contiguous_format, 0), (torch.channels_last, 8)):
        torch._dynamo.reset()
        dk.compile_report().clear()
        moved = model.to(memory_format=memory_format)
        torch.compile(moved, backend="dlkernels", options=options)(x.to(memory_format=memory_format))
        report = dk.compile_report()
        assert (len(report.replaced), len(report.left)) == (count, 8 - count), str(report)


@pytest.mark.parametrize("name", ["timm resnet50_gn", "torchvision efficientnet_b0"])
def test_channels_last_and_bfloat16(name: str) -> None:
    """As people train on GPUs: the output keeps its layout, and is no further from float64 than eager's is."""
    case = CASES[name]
    model = randomised(case.make())
    (x,) = case.inputs()
    exact = model(x)
    model = model.bfloat16().to(memory_format=torch.channels_last)
    x = x.bfloat16().to(memory_format=torch.channels_last)
    made = torch.compile(model, backend="dlkernels", options=OPTIONS)
    with torch.no_grad():
        ours, eager = (float((call(x).double() - exact).norm() / exact.norm()) for call in (made, model))
    assert Counter(find.what for find in dk.compile_report().replaced) == case.replaced
    assert ours <= 2 * eager + 0.01


# Losses ---------------------------------------------------------------------------------------------------------------


def focal_losses() -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]]:
    from fvcore.nn import sigmoid_focal_loss as of_fvcore
    from torchvision.ops import sigmoid_focal_loss as of_torchvision
    from transformers.loss.loss_for_object_detection import sigmoid_focal_loss as of_transformers

    return {
        "torchvision": (lambda x, t: of_torchvision(x, t, reduction="sum"), "sum"),
        "torchvision, none": (of_torchvision, "none"),
        "fvcore": (lambda x, t: of_fvcore(x.float(), t.float(), 0.25, reduction="mean"), "mean"),
        "transformers": (lambda x, t: of_transformers(x, t, 3), "none"),
    }


@pytest.mark.parametrize("name", ["torchvision", "torchvision, none", "fvcore", "transformers"])
def test_focal_loss(name: str) -> None:
    function, reduction = focal_losses()[name]
    x, t = normal(5, 7).requires_grad_(), (normal(5, 7) > 0.3).double()
    made = torch.compile(function, backend="dlkernels", options=OPTIONS)(x, t)
    expected = function(x, t)
    limit = 1e-6 if name == "fvcore" else LIMIT  # which computes in float32
    assert float((made - expected).detach().norm() / expected.detach().norm()) <= limit
    grads = [torch.autograd.grad(loss.square().sum(), x)[0] for loss in (made, expected)]
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) <= limit
    assert [find.what for find in dk.compile_report().replaced] == [f"sigmoid_focal_loss, {reduction}"]


def test_rewriting_is_quick() -> None:
    """A graph of a thousand calls is searched and rewritten in a fraction of the time that compiling it takes."""
    import time

    case = CASES["timm resnet50_gn"]
    model = randomised(case.make())
    spent: list[float] = []
    original = rewrite.rewrite

    def timed(*args: Any) -> None:
        begin = time.perf_counter()
        original(*args)
        spent.append(time.perf_counter() - begin)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewrite, "rewrite", timed)
        torch.compile(model, backend="dlkernels", options={"then": "eager"})(*case.inputs())
    assert sum(spent) < 5.0, f"{sum(spent):.1f} s"
