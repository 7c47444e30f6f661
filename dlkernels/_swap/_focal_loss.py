"""Focal losses of detectors: the head or model that owns one gets its own method anew, in which the name of the loss
stands for ours. Nothing in the library's modules is changed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..ops.focal_loss import sigmoid_focal_loss
from ._classes import Fused
from ._rewrite import compiled
from ._rules import Rule, fingerprint, parse
from ._tensors import is_served

FAMILY = "focal_loss"
NAME = "sigmoid_focal_loss"  # in all of these modules


def _torchvision(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torchvision.ops.sigmoid_focal_loss: the dtype of the inputs."""

    def focal_loss(
        inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
    ) -> Tensor:
        if not _fit(inputs, targets):
            return original(inputs, targets, alpha, gamma, reduction)
        return sigmoid_focal_loss(inputs, targets, alpha, gamma, reduction).to(inputs.dtype)

    return focal_loss


def _transformers(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """transformers.loss.loss_for_object_detection: mean over the queries, sum over the rest, over the boxes."""

    def focal_loss(inputs: Tensor, targets: Tensor, num_boxes: Any, alpha: float = 0.25, gamma: float = 2) -> Tensor:
        if not _fit(inputs, targets) or inputs.dim() < 2 or inputs.numel() == 0:
            return original(inputs, targets, num_boxes, alpha, gamma)
        loss = sigmoid_focal_loss(inputs, targets, alpha, gamma, "sum")
        return (loss / inputs.shape[1] / num_boxes).to(inputs.dtype)

    return focal_loss


def _fit(inputs: Any, targets: Any) -> bool:
    return (
        is_served(inputs)
        and is_served(targets)
        and inputs.shape == targets.shape
        and inputs.dtype == targets.dtype
        and inputs.device == targets.device
    )


def _with(function: Any, names: dict[str, Any], cls: Any) -> Any:
    """The function with these names standing for something else."""
    tree = parse(function)
    assert tree is not None
    return compiled(tree, function, names, cls)


# torchvision ----------------------------------------------------------------------------------------------------------


def _head(method: str) -> Rule:
    def make(cls: type) -> dict[str, Any]:
        function = getattr(cls, method)
        return {method: _with(function, {NAME: _torchvision(function.__globals__[NAME])}, cls)}

    return Rule(FAMILY, None, check=lambda head: _unknown(getattr(type(head), method), "abfc1099318d"), make=make)


def _unknown(function: Any, known: str) -> str:
    """Why the loss that a function calls is not taken for ours."""
    if parse(function) is None:
        return "its source is not there"
    found = fingerprint(function.__globals__.get(NAME))
    return "" if found == known else f"its {NAME} is not one that is known (source {found or 'not found'})"


# transformers ---------------------------------------------------------------------------------------------------------

_LOSS = "DeformableDetrForObjectDetectionLoss"
_CRITERION = "DeformableDetrImageLoss"


@functools.cache
def _fused_loss(function: Any) -> Any:
    """The loss function of a model with a criterion whose focal loss is ours."""
    criterion = function.__globals__[_CRITERION]
    labels = criterion.loss_labels
    ours = _with(labels, {NAME: _transformers(labels.__globals__[NAME])}, criterion)
    fused = type(f"Fused{_CRITERION}", (criterion,), {"loss_labels": ours, "__module__": __name__})
    return _with(function, {_CRITERION: fused}, function)


def _of_model(cls: type) -> dict[str, Any]:
    inherited = cls.loss_function

    def get(self: Any) -> Any:
        function = super(Fused, self).loss_function
        return _fused_loss(function) if function is _detr_loss() else function

    return {"loss_function": property(get, inherited.fset)}


def _detr_loss() -> Any:
    return getattr(sys.modules.get("transformers.loss.loss_deformable_detr"), _LOSS, None)


def _check_model(model: nn.Module) -> str:
    function = _detr_loss()
    if function is None or model.loss_function is not function:
        return f"its loss function is not {_LOSS}"
    criterion = function.__globals__.get(_CRITERION)
    if parse(function) is None or criterion is None:
        return "the source of its loss is not there"
    return _unknown(criterion.loss_labels, "e0e76debac74")


_DETR = Rule(FAMILY, None, check=_check_model, make=_of_model)
RULES: dict[str, Rule] = {
    "torchvision.models.detection.retinanet.RetinaNetClassificationHead": _head("compute_loss"),
    "torchvision.models.detection.fcos.FCOSHead": _head("compute_loss"),
    **{
        f"transformers.models.{package}.modeling_{package}.{name}ForObjectDetection": _DETR
        for package, name in (
            ("deformable_detr", "DeformableDetr"),
            ("conditional_detr", "ConditionalDetr"),
            ("dab_detr", "DabDetr"),
        )
    },
}
