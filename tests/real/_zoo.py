"""Architectures of six libraries, made from configurations: reduced in width, depth and image, whole in structure.

Nothing is imported before a model is built, so that collecting the tests needs none of the libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from _entry import Entry, Inputs
from _expected import EXPECTED
from torch import nn

ZOO: dict[str, Entry] = {}


def model(library: str, inputs: Inputs, **options: Any) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register the decorated builder under its own name."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        name = build.__name__
        assert name not in ZOO, name
        ZOO[name] = Entry(name, library, build, inputs, **EXPECTED.get(name, {}), **options)
        return build

    return register


def image(size: int, channels: int = 3, batch: int = 2, dims: int = 2, **kwargs: Any) -> Inputs:
    """A batch of images, as the first argument."""

    def make(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shape = (batch, channels, *([size] * dims))
        return (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype),), dict(kwargs)

    return make


# timm -----------------------------------------------------------------------------------------------------------------


def from_timm(name: str, **kwargs: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=kwargs.pop("num_classes", 5), **kwargs)


@model("timm", image(64))
def seresnet18() -> nn.Module:
    return from_timm("seresnet18", layers=(1, 1, 1, 1), channels=(16, 24, 32, 48), drop_path_rate=0.2)


@model("timm", image(64))
def seresnext26d() -> nn.Module:
    return from_timm("seresnext26d_32x4d", layers=(1, 1, 1, 1), channels=(16, 24, 32, 48), cardinality=4, base_width=16)


@model("timm", image(64))
def legacy_seresnet18() -> nn.Module:
    return from_timm("legacy_seresnet18", layers=(1, 1, 1, 1), inplanes=64)


@model("timm", image(64))
def efficientnet_b0() -> nn.Module:
    return from_timm("efficientnet_b0", drop_path_rate=0.2)


@model("timm", image(64))
def mobilenetv3_small() -> nn.Module:
    return from_timm("mobilenetv3_small_100")


@model("timm", image(64))
def regnety_002() -> nn.Module:
    return from_timm("regnety_002", drop_path_rate=0.2)


@model("timm", image(64))
def resnet_group_norm() -> nn.Module:
    return from_timm("resnet50_gn", layers=(1, 1, 2, 1), channels=(32, 32, 64, 64))


@model("timm", image(64))
def resnetv2_bit() -> nn.Module:
    from timm.models.resnetv2 import _create_resnetv2_bit

    widths = {
        "channels": (128, 128, 256, 256),
        "stem_chs": 32,
        "width_factor": 1,
    }  # of which a block's inside has a quarter
    return _create_resnetv2_bit("resnetv2_50x1_bit", layers=[1, 1, 2, 1], num_classes=5, **widths)


@model("timm", image(64))
def ese_vovnet() -> nn.Module:
    return from_timm("ese_vovnet19b_slim_dw")


@model("timm", image(64))
def poolformer_s12() -> nn.Module:
    from timm.models.metaformer import GroupNorm1NoBias, MetaFormer

    sizes = {"depths": [1, 1, 2, 1], "dims": [16, 24, 32, 48], "num_classes": 5}
    return MetaFormer(**sizes, norm_layers=GroupNorm1NoBias, use_mlp_head=False, drop_path_rate=0.2)


@model("timm", image(64))
def repvit_m1() -> nn.Module:
    return from_timm("repvit_m1", embed_dim=(16, 24, 32, 48), depth=(2, 2, 2, 2))


@model("timm", image(64))
def cs3sedarknet() -> nn.Module:
    from timm.models.cspnet import CspNet, _cs3_cfg

    config = _cs3_cfg(width_multiplier=0.25, depth_multiplier=0.4, attn_layer="se", attn_kwargs={"rd_ratio": 0.25})
    return CspNet(config, num_classes=5)


@model("timm", image(64))
def rexnet() -> nn.Module:
    return from_timm("rexnet_100", initial_chs=8, final_chs=48)


@model("timm", image(32))
def vit() -> nn.Module:
    return from_timm(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, drop_path_rate=0.3
    )


# torchvision ----------------------------------------------------------------------------------------------------------


@model("torchvision", image(64))
def tv_efficientnet_b0() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, _efficientnet_conf

    stages, last = _efficientnet_conf("efficientnet_b0", width_mult=0.4, depth_mult=0.7)
    return EfficientNet(stages, dropout=0.2, stochastic_depth_prob=0.2, last_channel=last or 96, num_classes=5)


@model("torchvision", image(64))
def tv_mobilenet_v3_small() -> nn.Module:
    from torchvision.models import mobilenet_v3_small

    return mobilenet_v3_small(weights=None, num_classes=5)


@model("torchvision", image(64))
def tv_regnet_y() -> nn.Module:
    from torchvision.models.regnet import BlockParams, RegNet

    return RegNet(BlockParams.from_init_params(depth=5, w_0=16, w_a=16.0, w_m=2.0, group_width=8, se_ratio=0.25), 5)


@model("torchvision", image(32))
def convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    stages = [CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 2)]
    return ConvNeXt(stages, stochastic_depth_prob=0.3, num_classes=5)


@model("torchvision", image(32))
def swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 24, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=0.3, num_classes=5)


def detection(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Two images with two boxes each: the losses are the output."""
    images = [torch.rand(3, 96, 96, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)]
    boxes = torch.tensor([[4.0, 6.0, 50.0, 58.0], [20.0, 30.0, 90.0, 80.0]], dtype=dtype)
    targets = [{"boxes": boxes + i, "labels": torch.tensor([1, 3 - i])} for i in range(2)]
    return (images, targets), {}


def pyramid() -> nn.Module:
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.resnet import BasicBlock, ResNet
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    body = ResNet(BasicBlock, [1, 1, 1, 1])
    layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
    return BackboneWithFPN(body, layers, [128, 256, 512], 64, extra_blocks=LastLevelP6P7(64, 64))


@model("torchvision", detection, training=True, bfloat16=False)
def retinanet() -> nn.Module:
    from functools import partial

    from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead, _default_anchorgen

    backbone, anchors = pyramid(), _default_anchorgen()
    head = RetinaNetHead(64, anchors.num_anchors_per_location()[0], 5, norm_layer=partial(nn.GroupNorm, 32))
    head.regression_head._loss_type = "giou"
    return RetinaNet(backbone, 5, min_size=96, max_size=96, anchor_generator=anchors, head=head)


@model("torchvision", detection, training=True, bfloat16=False)
def fcos() -> nn.Module:
    from torchvision.models.detection.fcos import FCOS

    return FCOS(pyramid(), 5, min_size=96, max_size=96)


# transformers ---------------------------------------------------------------------------------------------------------


@model("transformers", image(64))
def hf_regnet() -> nn.Module:
    from transformers import RegNetConfig, RegNetForImageClassification

    sizes, depths = [32, 32, 40, 48], [1, 1, 2, 1]
    config = RegNetConfig(embedding_size=16, hidden_sizes=sizes, depths=depths, groups_width=8, num_labels=5)
    return RegNetForImageClassification(config)


@model("transformers", image(64))
def hf_efficientnet() -> nn.Module:
    from transformers import EfficientNetConfig, EfficientNetForImageClassification

    config = EfficientNetConfig(
        image_size=48, width_coefficient=0.25, depth_coefficient=0.4, hidden_dim=320, num_labels=5
    )
    return EfficientNetForImageClassification(config)


@model("transformers", image(64))
def hf_bit() -> nn.Module:
    from transformers import BitConfig, BitForImageClassification

    sizes, depths = [32, 48, 64, 96], [1, 1, 2, 1]
    config = BitConfig(
        embedding_size=16, hidden_sizes=sizes, depths=depths, num_groups=8, drop_path_rate=0.2, num_labels=5
    )
    return BitForImageClassification(config)


@model("transformers", image(64))
def hf_poolformer() -> nn.Module:
    from transformers import PoolFormerConfig, PoolFormerForImageClassification

    config = PoolFormerConfig(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 2, 1], drop_path_rate=0.2, num_labels=5)
    return PoolFormerForImageClassification(config)


@model("transformers", image(64))
def hf_mobilevitv2() -> nn.Module:
    from transformers import MobileViTV2Config, MobileViTV2ForImageClassification

    config = MobileViTV2Config(image_size=64, width_multiplier=0.25, n_attn_blocks=[1, 1, 1], num_labels=5)
    return MobileViTV2ForImageClassification(config)


def boxes_as_labels(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
    pixels = torch.randn(2, 3, 64, 64, generator=generator, dtype=torch.float64).to(dtype)
    boxes = torch.tensor([[0.4, 0.5, 0.3, 0.2], [0.6, 0.3, 0.2, 0.4]], dtype=dtype)
    labels = [{"class_labels": torch.tensor([1, 3 - i]), "boxes": boxes} for i in range(2)]
    return (pixels,), {"labels": labels}


@model("transformers", boxes_as_labels, bfloat16=False)
def deformable_detr() -> nn.Module:
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

    stages = ["stage2", "stage3", "stage4"]
    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], layer_type="basic", out_features=stages
    )
    config = DeformableDetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        num_labels=5,
        num_queries=8,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        auxiliary_loss=True,
    )
    return DeformableDetrForObjectDetection(config)


def waveform(length: int) -> Inputs:
    def make(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(2, length, generator=generator, dtype=torch.float64).to(dtype),), {}

    return make


@model("transformers", waveform(400))
def wav2vec2() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    config = Wav2Vec2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        conv_dim=(32, 32, 32),
        conv_stride=(5, 2, 2),
        conv_kernel=(8, 3, 3),
        num_feat_extract_layers=3,
        feat_extract_norm="group",
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        apply_spec_augment=False,
        layerdrop=0.0,
    )
    return Wav2Vec2Model(config)


# diffusers ------------------------------------------------------------------------------------------------------------


def noisy(channels: int = 3, size: int = 16, frames: int = 0, context: int = 0) -> Inputs:
    """A sample, its timestep and, where there is cross attention, what is attended to."""

    def make(dtype: torch.dtype, generator: torch.Generator) -> tuple[tuple[Any, ...], dict[str, Any]]:
        shape = (2, channels, frames, size, size) if frames else (2, channels, size, size)
        sample = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        args: tuple[Any, ...] = (sample, torch.tensor([7, 480]))
        if context:
            args = (*args, torch.randn(2, 5, context, generator=generator, dtype=torch.float64).to(dtype))
        return args, {}

    return make


def unet2d(**options: Any) -> nn.Module:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
        dropout=0.1,
        **options,
    )


@model("diffusers", noisy())
def unet2d_default() -> nn.Module:
    return unet2d()


@model("diffusers", noisy())
def unet2d_scale_shift() -> nn.Module:
    return unet2d(resnet_time_scale_shift="scale_shift", downsample_type="resnet", upsample_type="resnet")


@model("diffusers", noisy(4, context=32))
def unet2d_condition() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )


@model("diffusers", noisy(4, size=8, frames=3, context=32))
def unet3d_condition() -> nn.Module:
    from diffusers import UNet3DConditionModel

    return UNet3DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=32,
    )


@model("diffusers", image(16))
def autoencoder_kl() -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
    )


# MONAI ----------------------------------------------------------------------------------------------------------------


@model("monai", image(24, channels=1, dims=3))
def monai_seresnet() -> nn.Module:
    from monai.networks.nets import SEResNet50

    return SEResNet50(layers=(1, 1, 1, 1), spatial_dims=3, in_channels=1, num_classes=3, inplanes=16)


@model("monai", image(16, channels=1, dims=3))
def segresnet() -> nn.Module:
    from monai.networks.nets import SegResNet

    return SegResNet(spatial_dims=3, init_filters=8, in_channels=1, out_channels=3, blocks_down=(1, 2), blocks_up=(1,))


@model("monai", image(16, channels=1, dims=3))
def dynunet() -> nn.Module:
    from monai.networks.nets import DynUNet

    groups = ("GROUP", {"num_groups": 4})
    return DynUNet(3, 1, 3, [3, 3, 3], [1, 2, 2], [2, 2], filters=[8, 16, 24], norm_name=groups, res_block=True)


@model("monai", image(16, channels=1, dims=3))
def monai_unet() -> nn.Module:
    from monai.networks.nets import UNet

    groups = ("GROUP", {"num_groups": 2})
    return UNet(3, 1, 4, channels=(8, 16, 24), strides=(2, 2), num_res_units=2, norm=groups, dropout=0.1)


# segmentation-models-pytorch ------------------------------------------------------------------------------------------


@model("smp", image(32))
def smp_unet_scse() -> nn.Module:
    import segmentation_models_pytorch as smp

    widths = {"encoder_depth": 4, "decoder_channels": (64, 64, 48, 32)}
    net = smp.Unet("se_resnet50", encoder_weights=None, decoder_attention_type="scse", classes=3, **widths)
    for stage in ("layer1", "layer2", "layer3"):  # the first block of each, which changes the width
        setattr(net.encoder, stage, getattr(net.encoder, stage)[:1])
    net.encoder.layer4 = nn.Identity()  # not called at this depth
    return net


# nnU-Net --------------------------------------------------------------------------------------------------------------


def nnunet(dims: int) -> nn.Module:
    from dynamic_network_architectures.building_blocks.residual_encoders import ResidualEncoder

    conv, norm = (nn.Conv2d, nn.InstanceNorm2d) if dims == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    shape = {"n_stages": 3, "features_per_stage": [16, 24, 32], "strides": [1, 2, 2], "n_blocks_per_stage": [1, 2, 1]}
    normed = {"norm_op": norm, "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU}
    more = {"stochastic_depth_p": 0.2, "squeeze_excitation": True, "nonlin_kwargs": {"inplace": True}}
    return ResidualEncoder(
        1, conv_op=conv, kernel_sizes=3, conv_bias=True, return_skips=True, **shape, **normed, **more
    )


@model("nnunet", image(16, channels=1))
def nnunet_2d() -> nn.Module:
    return nnunet(2)


@model("nnunet", image(16, channels=1, dims=3), bfloat16=False)
def nnunet_3d() -> nn.Module:
    return nnunet(3)
