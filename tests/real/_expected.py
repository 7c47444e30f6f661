"""What `dlkernels.swap` finds in each model of the zoo, and how often our operators are then called.

`swapped`: modules by family; "blocks" call several modules as one. `refused`: a piece of the reason, and how many.
`calls`: in a forward pass in train mode; "+ activation", "+ scale", "+ residual" are done in the same pass.
"""

from __future__ import annotations

from typing import Any

EXPECTED: dict[str, dict[str, Any]] = {
    "seresnet18": {
        "swapped": {"squeeze_excite": 4, "stochastic_depth": 3},
        "calls": {"squeeze_excite_fwd": 4, "stochastic_depth_fwd": 3},
    },
    "seresnext26d": {"swapped": {"squeeze_excite": 4}, "calls": {"squeeze_excite_fwd": 4}},
    "legacy_seresnet18": {"swapped": {"blocks": 4, "squeeze_excite": 4}, "calls": {"squeeze_excite_fwd + residual": 4}},
    "efficientnet_b0": {
        "swapped": {"blocks": 15, "squeeze_excite": 16, "stochastic_depth": 15},
        "calls": {"squeeze_excite_fwd": 16, "stochastic_depth_fwd + residual": 9},
    },
    "mobilenetv3_small": {"swapped": {"squeeze_excite": 9}, "calls": {"squeeze_excite_fwd": 9}},
    "regnety_002": {
        "swapped": {"squeeze_excite": 13, "stochastic_depth": 12},
        "calls": {"squeeze_excite_fwd": 13, "stochastic_depth_fwd": 12},
    },
    "resnet_group_norm": {
        "swapped": {"blocks": 5, "group_norm": 20},
        "calls": {"group_norm_fwd": 10, "group_norm_fwd + activation": 10},
    },
    "resnetv2_bit": {"swapped": {"group_norm": 16}, "calls": {"group_norm_fwd + activation": 16}},
    "ese_vovnet": {"swapped": {"squeeze_excite": 4}, "calls": {"squeeze_excite_fwd": 4}},
    "poolformer_s12": {
        "swapped": {"group_norm": 10, "stochastic_depth": 8},
        "calls": {"group_norm_fwd": 10, "stochastic_depth_fwd": 8},
    },
    "repvit_m1": {"swapped": {"squeeze_excite": 4}, "calls": {"squeeze_excite_fwd": 4}},
    "cs3sedarknet": {"swapped": {"squeeze_excite": 7}, "calls": {"squeeze_excite_fwd": 7}},
    "rexnet": {"swapped": {}, "refused": {"`bn` is BatchNorm2d between its layers": 13}, "calls": {}},
    "vit": {"swapped": {"blocks": 2, "stochastic_depth": 4}, "calls": {"stochastic_depth_fwd + residual": 4}},
    "tv_efficientnet_b0": {
        "swapped": {"blocks": 15, "squeeze_excite": 15, "stochastic_depth": 15},
        "calls": {"squeeze_excite_fwd": 15, "stochastic_depth_fwd + residual": 8},
    },
    "tv_mobilenet_v3_small": {"swapped": {"squeeze_excite": 9}, "calls": {"squeeze_excite_fwd": 9}},
    "tv_regnet_y": {"swapped": {"squeeze_excite": 5}, "calls": {"squeeze_excite_fwd": 5}},
    "convnext": {"swapped": {"blocks": 3, "stochastic_depth": 3}, "calls": {"stochastic_depth_fwd + residual": 2}},
    "swin": {"swapped": {"blocks": 4, "stochastic_depth": 4}, "calls": {"stochastic_depth_fwd + residual": 6}},
    "retinanet": {
        "swapped": {"blocks": 8, "focal_loss": 1, "group_norm": 8},
        "calls": {"group_norm_fwd + activation": 40, "sigmoid_focal_loss_fwd": 2},
    },
    "fcos": {
        "swapped": {"blocks": 2, "focal_loss": 1, "group_norm": 8},
        "calls": {"group_norm_fwd + activation": 40, "sigmoid_focal_loss_fwd": 1},
    },
    "hf_regnet": {"swapped": {"squeeze_excite": 5}, "calls": {"squeeze_excite_fwd": 5}},
    "hf_efficientnet": {"swapped": {"squeeze_excite": 10}, "calls": {"squeeze_excite_fwd": 10}},
    "hf_bit": {
        "swapped": {"group_norm": 16, "stochastic_depth": 4},
        "calls": {"group_norm_fwd + activation": 16, "stochastic_depth_fwd": 4},
    },
    "hf_poolformer": {
        "swapped": {"blocks": 4, "group_norm": 11, "stochastic_depth": 9},
        "calls": {"group_norm_fwd": 11, "stochastic_depth_fwd": 8, "stochastic_depth_fwd + residual": 8},
    },
    "hf_mobilevitv2": {"swapped": {"group_norm": 9}, "calls": {"group_norm_fwd": 9}},
    "deformable_detr": {
        "swapped": {"focal_loss": 1, "group_norm": 4},
        "calls": {"group_norm_fwd": 4, "sigmoid_focal_loss_fwd": 2},
    },
    "wav2vec2": {
        "swapped": {"blocks": 1, "group_norm": 1, "weight_norm": 1},
        "calls": {"group_norm_fwd + activation": 1, "weight_norm_fwd": 1},
    },
    "unet2d_default": {
        "swapped": {"blocks": 9, "group_norm": 21},
        "calls": {"group_norm_fwd": 4, "group_norm_fwd + activation": 17},
    },
    "unet2d_scale_shift": {
        "swapped": {"blocks": 10, "group_norm": 22},
        "calls": {"group_norm_fwd": 3, "group_norm_fwd + activation": 10, "group_norm_fwd + scale + activation": 9},
    },
    "unet2d_condition": {
        "swapped": {"blocks": 9, "group_norm": 21},
        "calls": {"group_norm_fwd": 4, "group_norm_fwd + activation": 17},
    },
    "unet3d_condition": {
        "swapped": {"blocks": 41, "group_norm": 58},
        "calls": {"group_norm_fwd": 9, "group_norm_fwd + activation": 49},
    },
    "autoencoder_kl": {
        "swapped": {"blocks": 12, "group_norm": 24},
        "calls": {"group_norm_fwd": 2, "group_norm_fwd + activation": 22},
    },
    "monai_seresnet": {"swapped": {"blocks": 4, "squeeze_excite": 4}, "calls": {"squeeze_excite_fwd + residual": 4}},
    "segresnet": {"swapped": {"blocks": 5, "group_norm": 9}, "calls": {"group_norm_fwd + activation": 9}},
    "dynunet": {
        "swapped": {"blocks": 5, "group_norm": 13},
        "calls": {"group_norm_fwd": 6, "group_norm_fwd + activation": 7},
    },
    "monai_unet": {"swapped": {"group_norm": 9}, "calls": {"group_norm_fwd": 9}},
    "smp_unet_scse": {
        "swapped": {"blocks": 3, "squeeze_excite": 3},
        "refused": {"it also has a gate for every position": 8},
        "calls": {"squeeze_excite_fwd + residual": 3},
    },
    "nnunet_2d": {
        "swapped": {"blocks": 4, "squeeze_excite": 4},
        "refused": {"its class is not among those that are known": 4},
        "calls": {"squeeze_excite_fwd + residual": 4},
    },
    "nnunet_3d": {
        "swapped": {},
        "refused": {
            "its class is not among those that are known": 4,
            "its mean is not one over all positions of a tensor with 5 dimensions": 4,
        },
        "calls": {},
    },
}
