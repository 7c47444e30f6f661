"""A running torch.optim.AdamW becomes a dlkernels.optim.AdamW in place, and back."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ._base import FusedOptimizer
from ._options import OPTIONS
from ._sharding import local_of
from .adamw import AdamW


def swap_optimizer(optimizer: torch.optim.Optimizer, **options: Any) -> AdamW:
    """Make a running `torch.optim.AdamW` a `dlkernels.optim.AdamW`, in place: the same object with a fused step.

    Moments, step counts, parameter groups, hooks and defaults stay; the next step continues where the last one ended.
    Learning rate schedulers, gradient scalers and trainers go on holding the object that they hold, whether they
    were made before or are made after.

    Args:
        optimizer: a `torch.optim.AdamW`, or a `torch.optim.Adam` all of whose groups have
            `decoupled_weight_decay=True` or no weight decay, which is the same formula; no subclass, no wrapper. An
            optimizer of dlkernels comes back as it is.
        options: max_grad_norm, master_weights, stochastic_rounding, seed, state_dtype, ema_decay, skip_nonfinite or
            fused_unscale of `dlkernels.optim.AdamW`. `fused_unscale` is by default what `optimizer` has: True if it was
            made with `fused=True`.

    Returns:
        `optimizer`, of its new class.

    Raises:
        TypeError: for anything but these optimizers, for an option that there is not, for complex parameters.
        ValueError: for Adam with L2 decay, `differentiable`, a `step` that something else has replaced, an optimizer of
            dlkernels with other options. Whatever is raised, nothing has changed.

    Note:
        The state_dict is still that of `torch.optim.AdamW` and loads into it; `restore_optimizer` is the way back in
        place. Weight decay that a former Adam without decay is given later is decoupled, as in any AdamW. A bound
        `optimizer.step` that was kept from before (accelerate does so where there is a gradient scaler) raises when it
        is called: swap first. A CUDA graph that was captured before has to be captured again.

    Reference:
        Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2.
    """
    for name in options:
        if name not in OPTIONS:
            raise TypeError(
                f"`{name}` must be one of {', '.join(OPTIONS)}; anything else is set in the parameter groups"
            )
    if isinstance(optimizer, FusedOptimizer):
        for name, value in options.items():
            if value != getattr(optimizer, name):
                raise ValueError(
                    f"`optimizer` must not be of dlkernels already to be given {name}={value!r}: "
                    f"it has {name}={getattr(optimizer, name)!r}, and that can be set"
                )
        return optimizer  # type: ignore[return-value]
    _check_class(optimizer)
    _check_step(optimizer)
    options.setdefault("fused_unscale", bool(getattr(optimizer, "_step_supports_amp_scaling", False)))
    # All checks of groups, parameters and options are those of the constructor.
    made = AdamW([dict(group) for group in optimizer.param_groups], **options)
    state = _taken_over(made, optimizer)

    was = (type(optimizer), [group.get("decoupled_weight_decay", False) for group in optimizer.param_groups])
    _become(optimizer, AdamW)
    optimizer.decoupling = made.decoupling
    optimizer._set_options({name: getattr(made, name) for name in OPTIONS})
    optimizer._step_supports_amp_scaling = made.fused_unscale
    optimizer._swapped_from = was
    for name, value in made.defaults.items():
        optimizer.defaults.setdefault(name, value)
    for group in (optimizer.defaults, *optimizer.param_groups):
        group["decoupled_weight_decay"] = True
    for group, complete in zip(optimizer.param_groups, made.param_groups, strict=True):
        for name, value in complete.items():
            group.setdefault(name, value)
    for p, taken in state.items():
        optimizer.state[p].update(taken)
    return optimizer


def restore_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make a `dlkernels.optim.AdamW` one of torch's again, in place: what `swap_optimizer` did is undone.

    Args:
        optimizer: what `swap_optimizer` returned. Any other `dlkernels.optim.AdamW` becomes a `torch.optim.AdamW`. An
            optimizer of torch comes back as it is.

    Returns:
        `optimizer`, of its old class. Master copies and averages stay in its state; torch does not read them.

    Raises:
        TypeError: for another optimizer of dlkernels, or something that is not an optimizer.
        ValueError: for `decoupling="schedule"`, which torch does not have, and where something has replaced `step`.
        RuntimeError: while the averages are in the place of the parameters.

    Reference:
        Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2.
    """
    if type(optimizer) in (torch.optim.AdamW, torch.optim.Adam):
        return optimizer
    if type(optimizer) is not AdamW:
        raise TypeError(f"`optimizer` must be a dlkernels.optim.AdamW, got {_name_of(optimizer)}")
    if any(group.get("decoupling", optimizer.decoupling) != "lr" for group in optimizer.param_groups):
        raise ValueError("`optimizer` must have decoupling='lr' to become torch's: it has no other")
    optimizer._refuse_while_swapped("restore_optimizer()")
    _check_step(optimizer)
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            if "step" in state:  # torch counts each parameter by itself, on the GPU only where it captures
                home = local_of(p).device if group["capturable"] or group["fused"] else torch.device("cpu")
                state["step"] = state["step"].detach().to(home, copy=True)
            for name in optimizer._slots_of(group):
                if name in state:  # torch's kernels take moments of the parameter's dtype
                    state[name] = state[name].to(p.dtype)
    optimizer._forget_plan()
    cls, decoupled = optimizer.__dict__.pop("_swapped_from", (torch.optim.AdamW, []))
    for name in (*OPTIONS, "decoupling", "_plan", "_averages", "_norm", "_step_supports_amp_scaling"):
        optimizer.__dict__.pop(name, None)
    if any(group["fused"] for group in optimizer.param_groups):
        optimizer._step_supports_amp_scaling = True
    if decoupled:
        for group, was in zip(optimizer.param_groups, decoupled, strict=False):
            group["decoupled_weight_decay"] = was
        optimizer.defaults["decoupled_weight_decay"] = cls is torch.optim.AdamW or decoupled[0]
    _become(optimizer, cls)
    return optimizer


def _name_of(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__name__}"


def _check_class(optimizer: Any) -> None:
    """Raise unless the formula is that of AdamW."""
    cls = type(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"`optimizer` must be a torch.optim.AdamW, got {cls.__name__}")
    if cls is torch.optim.SGD:
        raise TypeError(
            "`optimizer` must be a torch.optim.AdamW, got SGD: its decay is L2 and dlkernels.optim.SGDW decouples it, "
            "which is another training; build that one instead"
        )
    if cls not in (torch.optim.AdamW, torch.optim.Adam):
        for name in ("optimizer", "_optimizer"):
            if isinstance(optimizer.__dict__.get(name), torch.optim.Optimizer):
                raise TypeError(
                    f"`optimizer` must be a torch.optim.AdamW, got {_name_of(optimizer)}, which wraps another one: "
                    f"swap that one before it is wrapped"
                )
        kind = "a subclass whose step may differ" if isinstance(optimizer, torch.optim.Adam) else "another formula"
        raise TypeError(f"`optimizer` must be exactly a torch.optim.AdamW, got {_name_of(optimizer)}: {kind}")
    for i, group in enumerate(optimizer.param_groups):
        if not group.get("decoupled_weight_decay", cls is torch.optim.AdamW) and group["weight_decay"] != 0:
            raise ValueError(
                f"`optimizer` must have decoupled weight decay, and group {i} has L2 decay of {group['weight_decay']}: "
                "build it with torch.optim.AdamW, or with weight_decay=0"
            )


def _check_step(optimizer: torch.optim.Optimizer) -> None:
    """Raise where `step` of the instance is more than the class's, or the class's as a scheduler has wrapped it."""
    step = optimizer.__dict__.get("step")
    if step is not None and not (
        getattr(step, "_wrapped_by_lr_sched", False) and step.__wrapped__ is type(optimizer).step
    ):
        raise ValueError(
            f"`optimizer` must have the step of its class, got {getattr(step, '__qualname__', step)} in its place: "
            "swap before a trainer, a wrapper or a compiler replaces it"
        )


def _become(optimizer: Any, cls: type) -> None:
    """Change the class, and with it what torch and its schedulers have put into the instance about it."""
    optimizer.__class__ = cls
    optimizer._patch_step_function()
    if "step" in optimizer.__dict__:
        optimizer.step = _seen_by_schedulers(optimizer)


def _seen_by_schedulers(optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    """The step as torch's schedulers wrap it, to see whether it is called before theirs."""
    of, step = weakref.ref(optimizer), type(optimizer).step

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        instance = of()
        instance._opt_called = True  # type: ignore[union-attr]
        return step(instance, *args, **kwargs)  # type: ignore[arg-type]

    wrapper._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return wrapper


def _taken_over(made: AdamW, optimizer: torch.optim.Optimizer) -> dict[Tensor, dict[str, Tensor]]:
    """What changes in the state: moments that get another dtype, and one counter for parameters with equal steps."""
    params = [p for group in optimizer.param_groups for p in group["params"] if optimizer.state.get(p)]
    taken: dict[Tensor, dict[str, Tensor]] = {p: {} for p in params}
    for p in params:
        for name in made._slots:
            x = optimizer.state[p].get(name)
            if x is not None:
                taken[p][name] = x.to(made._dtype_on_load(name, x, p))
    counted = [p for p in params if "step" in optimizer.state[p]]
    counters: dict[tuple[float, torch.device], Tensor] = {}
    for p, value in zip(counted, _numbers(optimizer.state[p]["step"] for p in counted), strict=True):
        key = (value, made._counter_device(p))
        if key not in counters:
            counters[key] = torch.tensor(value, dtype=torch.float32, device=key[1])
        taken[p]["step"] = counters[key]
    return taken


def _numbers(steps: Iterable[Any]) -> list[float]:
    """Counts as numbers, waiting once for each device."""
    found = list(steps)
    values = [float(step) if not isinstance(step, Tensor) else 0.0 for step in found]
    of_device: dict[torch.device, list[int]] = {}
    for i, step in enumerate(found):
        if isinstance(step, Tensor):
            of_device.setdefault(step.device, []).append(i)
    for places in of_device.values():
        counts = torch.stack([local_of(found[i]).detach().reshape(()).double() for i in places]).tolist()
        for i, count in zip(places, counts, strict=True):
            values[i] = count
    return values
