"""Sigmoid focal loss, softmax focal loss, cross entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend, _checks
from .._library import has_tangent, is_quiet, transforms_active, wants_grad
from ..reference import focal_loss as reference
from ._focal_loss import SigmoidFocalLoss, SoftmaxFocalLoss
from ._reduced import MEAN, NONE

_is_compiling = torch.compiler.is_compiling


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float | None = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    ignore_index: int = -100,
    normalizer: float | Tensor | None = None,
    higher_order: bool = True,
) -> Tensor:
    r"""Sigmoid focal loss of independent binary classifications, `torchvision.ops.sigmoid_focal_loss` drop-in.

    With s = +1 for positives and -1 for negatives, and p_t = sigmoid(s x):

        FL = -alpha_t (1 - p_t)^gamma log(p_t),   alpha_t = alpha for positives, 1 - alpha for negatives

    Soft targets y in (0, 1): FL = alpha_t (p + y - 2 p y)^gamma (softplus(x) - y x), p = sigmoid(x).

    Args:
        inputs: logits of any shape; float32, float16, bfloat16 or float64, any strides.
        targets: floats of the shape of inputs (0, 1, or soft), or integers: 0/1 of the shape of inputs (bool too), or
            class indices of shape inputs.shape[:-1], where -1 means no positive class.
        alpha: weight of positives, in [0, 1]; None or a negative number switches the balancing off.
        gamma: focusing exponent, any number >= 0.
        reduction: "none", "mean" (over what is not left out) or "sum".
        ignore_index: integer targets of this value leave their element, or row of classes, out.
        normalizer: number or one-element tensor that the sum is divided by, such as the foreground count; a constant
            to autograd; needs reduction="sum".
        higher_order: keep `inputs` beside a stored gradient, so that second derivatives work. False saves that memory.

    Returns:
        float32 (float64 for float64 inputs): the shape of inputs for "none", otherwise a scalar.

    Raises:
        TypeError: inputs or targets of an unsupported dtype.
        ValueError: shapes, devices, alpha above 1 or NaN, gamma < 0, an unknown reduction.
        IndexError: an integer target out of range (CPU). On CUDA nothing is read out of bounds and the loss is NaN.

    Note:
        A mean or a sum writes its gradient in the forward pass: one read of the logits, one write of the gradient.
        Works under torch.compile(fullgraph=True), export, torch.func and AMP (half inputs, float32 inside and out);
        bitwise equal between runs and thread counts. Targets that require a gradient are served by the reference.

    Reference:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, eq. 5.
    """
    fast = None if _is_compiling() else _backend.fast(inputs)
    if fast is not None:
        loss = fast.sigmoid_focal_loss(
            inputs, targets, alpha, gamma, reduction, ignore_index, normalizer, higher_order
        )  # fmt: skip
        if loss is not None:
            return loss

    code = _checks.reduction_code(reduction)
    _checks.floating("inputs", inputs)
    _check_sigmoid_targets(inputs, targets)
    alpha = -1.0 if alpha is None else _checks.number("alpha", alpha)
    alpha = -1.0 if alpha < 0 else _checks.in_unit_interval("alpha", alpha)
    gamma = _checks.non_negative("gamma", gamma)
    _checks.integer("ignore_index", ignore_index)
    divisor = _checks.normalizer(normalizer, reduction, "inputs", inputs)

    # The kernels read targets of the inputs' dtype, float32, bool / uint8, int32 and int64.
    if targets.is_floating_point():
        if targets.dtype not in (inputs.dtype, torch.float32) or inputs.dtype == torch.float64:
            targets = targets.to(torch.float64 if inputs.dtype == torch.float64 else torch.float32)
    elif targets.dtype in (torch.int8, torch.int16):
        targets = targets.int()

    serve = _backend.choose(inputs.device.type, "sigmoid_focal_loss_fwd")
    plain = serve == "reference" or wants_grad(targets) or has_tangent(inputs)
    if plain or (transforms_active() and code != NONE):
        if code == MEAN:
            divisor = reference.sigmoid_divisor(inputs, targets, ignore_index)
        if plain:
            _check_labels(targets, *_label_range(inputs, targets), ignore_index)
            rows = reference.sigmoid_focal_loss(inputs, targets, alpha, gamma, ignore_index)
        else:
            rows = SigmoidFocalLoss.call(inputs, targets, None, alpha, gamma, ignore_index, NONE, False, True)[0]
        return reference.reduce(rows, code, divisor)

    # Elementwise in and out: in memory order a channels_last input needs no copy, and its loss keeps the layout.
    order = _memory_order(inputs) if targets.shape == inputs.shape else None
    if order is not None:
        inputs, targets = inputs.permute(order), targets.permute(order)
    need_grad = code != NONE and wants_grad(inputs)
    loss = SigmoidFocalLoss.call(
        inputs, targets, divisor, alpha, gamma, ignore_index, code, need_grad, higher_order
    )[0]  # fmt: skip
    if order is not None and code == NONE:
        loss = loss.permute(sorted(range(len(order)), key=order.__getitem__))
    return loss


def softmax_focal_loss(
    input: Tensor,
    target: Tensor,
    alpha: float | Tensor | None = None,
    gamma: float = 2.0,
    reduction: str = "mean",
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    normalizer: float | Tensor | None = None,
    higher_order: bool = True,
) -> Tensor:
    r"""Softmax (multi-class) focal loss from logits.

        FL = -alpha_y (1 - p_y)^gamma log(p_y),   p = softmax(input)

    With probabilities q as targets, and with label smoothing q = (1 - eps) onehot(y) + eps / C:
    FL = sum_c q_c alpha_c (1 - p_c)^gamma (-log p_c).

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...), classes in dimension 1; C from 1 to 262,144 and beyond.
        target: class indices (), (N,) or (N, d1, ...), or probabilities of the shape of input.
        alpha: None, a number in [0, 1] that multiplies every row, or a tensor (C,) of weights >= 0.
        gamma: focusing exponent, any number >= 0; 0 is cross entropy.
        reduction: "none", "mean" (over the rows that are not left out) or "sum".
        ignore_index: index targets of this value (any integer) leave their row out: loss 0, gradient 0.
        label_smoothing: eps in [0, 1].
        normalizer: number or one-element tensor that the sum is divided by; needs reduction="sum".
        higher_order: keep `input` beside a stored gradient, so that second derivatives work. False saves that memory.

    Returns:
        float32 (float64 for float64 input): the shape of index targets for "none", otherwise a scalar.
        The mean over no row at all is NaN, with zero gradients.

    Raises:
        TypeError, ValueError, IndexError: as `sigmoid_focal_loss`; probabilities together with an ignore_index >= 0.

    Note:
        1 - p is never formed by subtraction, so small losses keep their digits and gamma < 1 has finite gradients.
        The rest as in `sigmoid_focal_loss`.

    Reference:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, eq. 4, with p_t from a softmax.
    """
    fast = None if _is_compiling() else _backend.fast(input)
    if fast is not None:
        loss = fast.softmax_focal_loss(
            input, target, alpha, gamma, reduction, ignore_index, label_smoothing, normalizer, False, higher_order
        )
        if loss is not None:
            return loss
    gamma = _checks.non_negative("gamma", gamma)
    return _softmax(
        input, target, alpha, gamma, reduction, ignore_index, label_smoothing, normalizer, False, higher_order
    )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: None = None,
    ignore_index: int = -100,
    reduce: None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    normalizer: float | Tensor | None = None,
    higher_order: bool = True,
) -> Tensor:
    r"""Cross entropy from logits, `torch.nn.functional.cross_entropy` drop-in; with `weight`, balanced cross entropy.

        CE = -w_y log(p_y),   p = softmax(input)

    With probabilities q as targets, and with label smoothing q = (1 - eps) onehot(y) + eps / C:
    CE = -sum_c w_c q_c log(p_c).

    Args:
        input: logits (C,), (N, C) or (N, C, d1, ...), classes in dimension 1.
        target: class indices (), (N,) or (N, d1, ...), or probabilities of the shape of input.
        weight: None or a tensor (C,) of weights >= 0.
        size_average, reduce: torch's legacy arguments; anything but None raises.
        ignore_index: index targets of this value (any integer) leave their row out: loss 0, gradient 0.
        reduction: "none", "mean" or "sum". The mean divides by the sum of w_y over the rows that count (index targets),
            or by the number of rows (probabilities), as torch does.
        label_smoothing: eps in [0, 1].
        normalizer: number or one-element tensor that the sum is divided by; needs reduction="sum".
        higher_order: keep `input` beside a stored gradient, so that second derivatives work. False saves that memory.

    Returns:
        float32 (float64 for float64 input), where torch would return half precision for half-precision logits.

    Raises:
        TypeError, ValueError, IndexError: as `softmax_focal_loss`.

    Note:
        As `softmax_focal_loss`. A masked class (logit -inf) with a target probability of 0 costs 0; in torch it is NaN.

    Reference:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, eq. 1 to 3; torch.nn.CrossEntropyLoss.
    """
    fast = None if _is_compiling() or not (size_average is reduce is None) else _backend.fast(input)
    if fast is not None:
        loss = fast.softmax_focal_loss(
            input, target, weight, 0.0, reduction, ignore_index, label_smoothing, normalizer, True, higher_order
        )
        if loss is not None:
            return loss
    if size_average is not None or reduce is not None:
        raise ValueError("`size_average` and `reduce` must be None: use `reduction`")
    if weight is not None:
        _checks.tensor("weight", weight)
    return _softmax(
        input, target, weight, 0.0, reduction, ignore_index, label_smoothing, normalizer, True, higher_order
    )


def _softmax(
    input: Tensor,
    target: Tensor,
    alpha: float | Tensor | None,
    gamma: float,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    normalizer: float | Tensor | None,
    mean_of_weights: bool,
    higher_order: bool,
) -> Tensor:
    """Both softmax losses: check, bring to rows (N, C) or (N, C, S), run, restore the shape."""
    code = _checks.reduction_code(reduction)
    _check_softmax_targets(input, target, ignore_index)
    eps = _checks.in_unit_interval("label_smoothing", label_smoothing)
    _checks.integer("ignore_index", ignore_index)
    divisor = _checks.normalizer(normalizer, reduction, "input", input)
    weight = _per_class_weight(alpha, input, "weight" if mean_of_weights else "alpha")

    loss_shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else input.shape[:0]
    x = _rows(input)
    if target.is_floating_point():
        t = _rows(target, like=input)
        if t.dtype not in (x.dtype, torch.float32) or x.dtype == torch.float64:
            t = t.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    else:
        t = target.reshape(x.shape[:1] + x.shape[2:])
        t = t if t.dtype in (torch.int64, torch.int32) else t.int()

    plain = (
        _backend.choose(input.device.type, "softmax_focal_loss_fwd") == "reference"
        or wants_grad(t)
        or wants_grad(weight)
    )
    plain = plain or has_tangent(x)
    if plain or (transforms_active() and code != NONE):
        if code == MEAN:
            divisor = reference.softmax_divisor(x, t, weight if mean_of_weights else None, ignore_index)
        if plain:
            _check_labels(t, 0, x.shape[1], ignore_index)
            rows = reference.softmax_focal_loss(x, t, weight, gamma, eps, ignore_index)
        else:
            options = (gamma, eps, ignore_index, mean_of_weights, NONE, False, True)
            rows = SoftmaxFocalLoss.call(x, t, weight, None, *options)[0]
        return reference.reduce(rows.reshape(loss_shape), code, divisor)

    need_grad = code != NONE and wants_grad(x)
    loss = SoftmaxFocalLoss.call(
        x, t, weight, divisor, gamma, eps, ignore_index, mean_of_weights, code, need_grad, higher_order
    )[0]
    return loss.reshape(loss_shape) if code == NONE else loss


def _memory_order(x: Tensor) -> list[int] | None:
    """The permutation that makes a dense tensor contiguous; None when it is contiguous already, or not dense."""
    if x.is_contiguous():
        return None
    order = sorted(range(x.dim()), key=lambda d: -x.stride(d))
    return order if x.permute(order).is_contiguous() else None


def _rows(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Logits as rows: (N, C), or (N, C, S) where the classes are strided; channels_last becomes (N S, C), no copy."""
    like = x if like is None else like
    if x.dim() == 1:
        return x.unsqueeze(0)
    if x.dim() == 2:
        return x
    if not like.is_contiguous() and like.movedim(1, -1).is_contiguous():
        return x.movedim(1, -1).reshape(-1, x.shape[1])
    return x.flatten(2)


def _label_range(inputs: Tensor, targets: Tensor) -> tuple[int, int]:
    return (0, 2) if targets.shape == inputs.shape else (-1, inputs.shape[-1])


def _check_labels(target: Tensor, low: int, high: int, ignore_index: int) -> None:
    """The reference's index check; the kernels have their own. CPU only: on CUDA it would wait for the device."""
    if target.is_floating_point() or is_quiet(target):
        return
    target = reference.widened(target)
    bad = (target != ignore_index) & ((target < low) | (target >= high))
    if bad.any():
        raise IndexError(f"targets must be in [{low}, {high}) or ignore_index, got {int(target[bad][0])}")


def _check_sigmoid_targets(inputs: Tensor, targets: Tensor) -> None:
    _checks.tensor("targets", targets)
    _checks.same_device("targets", targets, "inputs", inputs)
    if targets.is_floating_point():
        _checks.floating("targets", targets)
        _checks.shape("targets", targets, inputs.shape, "of inputs")
        return
    if targets.dtype != torch.bool and targets.dtype not in _checks.INTEGER_DTYPES:
        raise TypeError(f"`targets` must be floating, integer or bool, got {targets.dtype}")
    if targets.shape != inputs.shape and (
        inputs.dim() == 0 or targets.shape != inputs.shape[:-1] or targets.dtype == torch.bool
    ):
        raise ValueError(
            f"`targets` must have the shape of inputs {tuple(inputs.shape)} or, for class indices, "
            f"{tuple(inputs.shape[:-1])}, got {tuple(targets.shape)} of {targets.dtype}"
        )


def _check_softmax_targets(input: Tensor, target: Tensor, ignore_index: int) -> None:
    _checks.floating("input", input)
    _checks.tensor("target", target)
    _checks.same_device("target", target, "input", input)
    if input.dim() == 0:
        raise ValueError("`input` must have shape (C,), (N, C) or (N, C, d1, ...), got ()")
    if input.shape[1 if input.dim() > 1 else 0] == 0:
        raise ValueError(f"`input` must have at least one class, got shape {tuple(input.shape)}")
    if target.is_floating_point():
        _checks.floating("target", target)
        _checks.shape("target", target, input.shape, "of input (probabilities)")
        if ignore_index >= 0:
            raise ValueError(f"`ignore_index` must be negative with probability targets, got {ignore_index}")
        return
    if target.dtype not in _checks.INTEGER_DTYPES:
        raise TypeError(f"`target` must be floating (probabilities) or integer (indices), got {target.dtype}")
    expected = input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()
    _checks.shape("target", target, expected, "(N, d1, ...)")


def _per_class_weight(alpha: float | Tensor | None, input: Tensor, name: str) -> Tensor | None:
    """alpha as a float32 (float64) vector (C,), or None."""
    if alpha is None:
        return None
    num_classes = input.shape[1 if input.dim() > 1 else 0]
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    if not isinstance(alpha, Tensor):
        return torch.full((num_classes,), _checks.in_unit_interval(name, alpha), dtype=dtype, device=input.device)
    _checks.per_class(name, alpha, num_classes, "input", input)
    return alpha.to(dtype).contiguous()
