"""The libraries whose models are tested, and what they need to be importable on a machine without a GPU.

torchvision's wheel is linked against CUDA: beside a CPU build of torch its operators are not registered, and its import
fails where it describes them. Declaring the two is enough for every model; calls of `nms` still raise. Processes that
a test starts import this module too, before anything that imports torchvision.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings

import torch

for _name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
    os.environ.setdefault(_name, "error")
# Nothing here may ask a hub for weights.
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DIFFUSERS_OFFLINE"):
    os.environ.setdefault(_name, "1")

_DECLARED: list[torch.library.Library] = []  # an operator lives as long as the Library that declared it


def declare_torchvision() -> None:
    """Import torchvision, after its operators are declared where its own library could not be loaded."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for op in ("nms", "qnms"):
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
        importlib.import_module("torchvision")


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that its image codecs are missing
    declare_torchvision()
