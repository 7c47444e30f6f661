"""The models of `bench --model`: how each is made, what it is given and what its loss is. Nothing is downloaded."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import fail

CLASSES = 1000
SCALE = 0.5  # of norms that a library starts at zero, which would hide all that their block computes
Inputs = tuple[tuple[Tensor, ...], Tensor | None]  # arguments of forward, target


@dataclass(frozen=True)
class Spec:
    """A model to train.

    Args:
        name: on the command line.
        library: whose model it is, "" for a model of the user's.
        what: in a few words.
        build: library -> module, with random weights.
        inputs: batch, size, generator -> arguments of forward and target.
        loss: output, target -> scalar.
        batch, size: the defaults of --batch and --size.
    """

    name: str
    library: str
    what: str
    build: Callable[[Any], nn.Module]
    inputs: Callable[[int, int, torch.Generator], Inputs]
    loss: Callable[[Any, Tensor | None], Tensor]
    batch: int = 8
    size: int = 112

    def make(self) -> nn.Module:
        """The model in train mode, the same weights at every call; ends the command when its library is missing."""
        library = load(self.library, self.name) if self.library else None
        torch.manual_seed(0)
        return awake(self.build(library)).train()


def load(library: str, name: str) -> ModuleType:
    """Import a library, or end the command with one line that says what to install."""
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        fail(f"`bench --model {name}` needs {library} ({error}): pip install {library}")
    except Exception as error:  # torchvision's wheel for CUDA beside a CPU build of torch: RuntimeError
        said = (str(error).splitlines() or [""])[0]
        fail(
            f"`bench --model {name}`: {library} does not import ({said}): "
            f"install the torchvision that was built for torch {torch.__version__}"
            if "torchvision" in said
            else f"`bench --model {name}`: {library} does not import ({type(error).__name__}: {said})"
        )


def awake(model: nn.Module) -> nn.Module:
    """Give norms that start at zero a scale: as they are, nothing of a residual block reaches the loss."""
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, nn.Parameter) and weight.dim() == 1 and not weight.any():
                weight.fill_(SCALE)
    return model


# Inputs and losses ----------------------------------------------------------------------------------------------------


def _images(batch: int, size: int, generator: torch.Generator) -> Inputs:
    x = torch.randn(batch, 3, size, size, generator=generator)
    return (x,), torch.randint(CLASSES, (batch,), generator=generator)


def _volumes(batch: int, size: int, generator: torch.Generator) -> Inputs:
    x = torch.randn(batch, 1, size, size, size, generator=generator)
    return (x,), torch.randint(3, (batch, size, size, size), generator=generator)


def _segmented(batch: int, size: int, generator: torch.Generator) -> Inputs:
    x = torch.randn(batch, 3, size, size, generator=generator)
    return (x,), torch.randint(3, (batch, size, size), generator=generator)


def _noisy(batch: int, size: int, generator: torch.Generator) -> Inputs:
    """Noised images, their time steps, and the noise that is to be found."""
    x = torch.randn(batch, 3, size, size, generator=generator)
    return (x, torch.randint(1000, (batch,), generator=generator)), torch.randn(x.shape, generator=generator)


def _first(output: Any) -> Tensor:
    """The tensor in what a model returns: itself, or the first of the fields."""
    return next(t for t in tree_leaves(output if isinstance(output, Tensor) else dict(output)) if t is not None)


def _cross_entropy(output: Any, target: Tensor | None) -> Tensor:
    return F.cross_entropy(_first(output).float(), target)  # type: ignore[arg-type]


def _mean_square(output: Any, target: Tensor | None) -> Tensor:
    return F.mse_loss(_first(output).float(), target)  # type: ignore[arg-type]


def _squares(output: Any, target: Tensor | None) -> Tensor:
    """Mean square of the floating outputs (the output itself when it is a scalar, a loss)."""
    outputs = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return torch.stack([t.float().square().mean() if t.dim() else t.float() for t in outputs]).sum()


# Models ---------------------------------------------------------------------------------------------------------------


def _timm(name: str) -> Callable[[Any], nn.Module]:
    return lambda timm: timm.create_model(name, pretrained=False, num_classes=CLASSES)


def _unet2d(diffusers: Any) -> nn.Module:
    """As for CIFAR in the paper on DDPM, half as wide."""
    return diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128, 128, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
    )


def _segresnet(monai: Any) -> nn.Module:
    nets = importlib.import_module("monai.networks.nets")
    return nets.SegResNet(spatial_dims=3, init_filters=8, in_channels=1, out_channels=3)


def _hf_bit(transformers: Any) -> nn.Module:
    return transformers.BitForImageClassification(transformers.BitConfig(num_labels=CLASSES))


def _hf_regnety(transformers: Any) -> nn.Module:
    sizes = {"embedding_size": 32, "hidden_sizes": [64, 128, 320, 768], "depths": [1, 3, 8, 2], "groups_width": 16}
    return transformers.RegNetForImageClassification(transformers.RegNetConfig(**sizes, num_labels=CLASSES))


def _smp_unet(smp: Any) -> nn.Module:
    return smp.Unet("se_resnet50", encoder_weights=None, decoder_attention_type="scse", classes=3)


def _torchvision(name: str) -> Callable[[Any], nn.Module]:
    return lambda torchvision: getattr(torchvision.models, name)(weights=None)


def _classifier(name: str, library: str, what: str, build: Callable[[Any], nn.Module]) -> Spec:
    return Spec(name, library, what, build, _images, _cross_entropy)


SPECS = (
    _classifier("seresnet50", "timm", "squeeze-excite, BatchNorm", _timm("seresnet50")),
    _classifier("efficientnet_b0", "timm", "squeeze-excite with SiLU, BatchNorm", _timm("efficientnet_b0")),
    _classifier("regnety_008", "timm", "squeeze-excite, BatchNorm", _timm("regnety_008")),
    _classifier("resnet50_gn", "timm", "GroupNorm with ReLU inside", _timm("resnet50_gn")),
    Spec("unet2d", "diffusers", "GroupNorm and SiLU, attention", _unet2d, _noisy, _mean_square, batch=4, size=32),
    Spec("segresnet", "monai", "GroupNorm and ReLU, volumes", _segresnet, _volumes, _cross_entropy, batch=1, size=64),
    _classifier("tv_efficientnet_b0", "torchvision", "squeeze-excite with SiLU, stochastic depth",
                _torchvision("efficientnet_b0")),
    _classifier("hf_bit", "transformers", "GroupNorm with ReLU inside", _hf_bit),
    _classifier("hf_regnety_008", "transformers", "squeeze-excite, BatchNorm", _hf_regnety),
    Spec("smp_unet", "segmentation_models_pytorch", "squeeze-excite with residual and ReLU", _smp_unet, _segmented,
         _cross_entropy, batch=4, size=128),
)  # fmt: skip


def find(name: str, input_shape: Sequence[int] | None = None) -> Spec:
    """A model by its name, or by package.module:factory with the shape of its input; ends the command for others."""
    if ":" in name:
        return _of_the_user(name, input_shape)
    for spec in SPECS:
        if spec.name == name:
            return spec
    known = ", ".join(spec.name for spec in SPECS)
    fail(f"bench: unknown model {name!r}: one of {known}, or package.module:factory with --input-shape")


def _of_the_user(name: str, input_shape: Sequence[int] | None) -> Spec:
    if input_shape is None:
        fail(f"bench --model {name}: a model of yours needs --input-shape, as 8,3,224,224")
    module_name, _, attribute = name.partition(":")
    try:
        factory: Any = functools.reduce(getattr, attribute.split("."), importlib.import_module(module_name))
    except (ImportError, AttributeError) as error:
        fail(f"cannot import {name}: {error}")

    def inputs(batch: int, size: int, generator: torch.Generator) -> Inputs:
        return (torch.randn(tuple(input_shape), generator=generator),), None

    batch, size = input_shape[0], input_shape[-1]
    return Spec(name, "", "a model of yours", lambda _: factory(), inputs, _squares, batch, size)
