"""What `profile` runs: one op, the demo's training step, or a model of the user's."""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import dlkernels as dk

from . import _center_cases, _eager, _layer_cases, _optimizer_cases, _region_cases, fail, need

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Loss -> (default shape, does it take class indices by default)
LOSSES = {
    "sigmoid_focal_loss": ((1 << 20,), False),
    "softmax_focal_loss": ((4096, 1000), True),
    "cross_entropy": ((4096, 1000), True),
    "region_biased_loss": ((4096, 6), False),
    "gccs_loss": ((8192, 100), True),
    **dict.fromkeys(_center_cases.MODULES, ((4096, 128), True)),
}
CLASSES = 100  # of the center losses, whose features do not tell
# Layer -> (default shape, least dimensions)
LAYERS = {
    "group_norm": ((8, 256, 28, 28), 2),
    "squeeze_excite": ((8, 256, 28, 28), 2),
    "weight_norm": ((512, 4608), 1),
    "stochastic_depth": ((32, 256, 28, 28), 1),
}
OPTIMIZERS = dict.fromkeys(_optimizer_cases.CLASSES, (300, 256))  # tensors and their shape
OPS = (*LOSSES, *LAYERS, *OPTIMIZERS)


@dataclass(frozen=True)
class Workload:
    """A step with dlkernels and its eager counterpart; parts of a step are record_function ranges."""

    name: str
    fused: Callable[[], None]
    eager: Callable[[], None]


def make_workload(args: argparse.Namespace, device: str) -> Workload:
    if args.classes is not None and args.what not in _center_cases.MODULES:
        fail(f"--classes is of {', '.join(_center_cases.MODULES)}")
    if args.what in LOSSES:
        return _loss(args, device)
    if args.what in LAYERS:
        return _layer(args, device)
    if args.what in OPTIMIZERS:
        return _optimizer(args, device)
    if args.what == "demo":
        return _demo(device)
    if ":" in args.what:
        return _model(args, device)
    fail(f"unknown op or model {args.what!r}: expected {', '.join(OPS)}, demo, or package.module:factory")


def _loss(args: argparse.Namespace, device: str) -> Workload:
    default, indexed = LOSSES[args.what]
    shape, dtype = args.shape or default, DTYPES[args.dtype]
    if args.what == "region_biased_loss":
        return _region_loss(args, shape, device)
    if args.what in _center_cases.MODULES:
        return _center_step(args, shape, device)
    sigmoid = args.what.startswith("sigmoid")
    indexed = indexed if args.targets == "auto" else args.targets == "index"
    if len(shape) < 2 and (indexed or not sigmoid):
        fail(f"--shape must have a class dimension, as 4096,1000, got {','.join(map(str, shape))}")
    if args.what == "gccs_loss" and (len(shape) != 2 or not indexed):
        fail("gccs_loss takes features N,D, as 8192,100, and class indices")
    generator = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(shape, generator=generator)).to(device, dtype)
    if not indexed:
        target = torch.rand(shape, generator=generator) < 0.02 if sigmoid else torch.softmax(torch.rand(shape), 1)
        target = target.to(device, dtype)
    elif sigmoid:
        target = torch.randint(-9 * shape[-1], shape[-1], shape[:-1], generator=generator).clamp(-1).to(device)
    else:
        target = torch.randint(shape[1], shape[:1] + shape[2:], generator=generator).to(device)
    functions = [functools.partial(getattr(m, args.what), reduction=args.reduction) for m in (dk, _eager)]
    kind = "class indices" if indexed else "dense targets"
    name = f"{args.what} of {' x '.join(map(str, shape))} {args.dtype}, {kind}, reduction {args.reduction}"
    return Workload(name, *(_op_step(lambda x, f=f: f(x, target), (x,)) for f in functions))


def _region_loss(args: argparse.Namespace, shape: tuple[int, ...], device: str) -> Workload:
    """As the authors' code has it: the whole face last, a softmax over the regions."""
    if len(shape) != 2:
        fail(f"--shape must be N,R, as 4096,6, got {','.join(map(str, shape))}")
    if args.targets != "auto":
        fail("--targets is of classification losses: region_biased_loss has none")
    options = {"origin_index": -1, "margin": 0.1, "normalize": "softmax", "reduction": args.reduction}
    case = _region_cases.RegionCase(shape, options=options)
    sample = case.sample(DTYPES[args.dtype], device, seed=0)
    name = f"{args.what} of {case.name} {args.dtype}"
    return Workload(name, *(_op_step(function, (sample.x,)) for function in (sample.fused, sample.eager)))


def _center_step(args: argparse.Namespace, shape: tuple[int, ...], device: str) -> Workload:
    if len(shape) != 2 or args.targets == "dense":
        fail(f"{args.what} takes features N,D, as 4096,128, and class indices")
    options = (args.classes or CLASSES, args.reduction, DTYPES[args.dtype], device)
    name, sample = _center_cases.training_step(args.what, shape, *options)
    inputs = (sample.x, *sample.parameters)
    name = f"{args.what} of {name} {args.dtype}"
    return Workload(name, *(_op_step(function, inputs) for function in (sample.fused, sample.eager)))


def _layer(args: argparse.Namespace, device: str) -> Workload:
    default, least = LAYERS[args.what]
    shape = args.shape or default
    if len(shape) < least:
        fail(f"--shape must have at least {least} dimensions, got {','.join(map(str, shape))}")
    if args.reduction != "mean" or args.targets != "auto":
        fail(f"--reduction and --targets are of losses: {args.what} has neither")
    if args.layout == "channels_last" and len(shape) not in (4, 5):
        fail(f"--layout channels_last needs four or five dimensions, got {','.join(map(str, shape))}")
    case = _layer_cases.typical(args.what, shape, args.layout)
    sample = case.sample(DTYPES[args.dtype], device, seed=0)
    inputs = (sample.x, *sample.parameters)
    name = f"{args.what} of {case.name} {args.dtype}"
    return Workload(name, *(_op_step(function, inputs) for function in (sample.fused, sample.eager)))


def _optimizer(args: argparse.Namespace, device: str) -> Workload:
    if args.reduction != "mean" or args.targets != "auto" or args.layout != "contiguous":
        fail(f"--reduction, --targets and --layout are of losses and layers: {args.what} has none")
    shape = args.shape or OPTIMIZERS[args.what]
    name, *steps = _optimizer_cases.profiled(args.what, shape, DTYPES[args.dtype], device)
    return Workload(f"{name}, {args.dtype}", *steps)


def _op_step(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Callable[[], None]:
    """Forward and backward of an op; every input takes a gradient."""
    inputs = [t.detach().clone().requires_grad_(True) for t in inputs]
    mark = torch.profiler.record_function
    grad_output: Tensor | None = None

    def step() -> None:
        nonlocal grad_output
        for t in inputs:
            t.grad = None
        with mark("forward"):
            out = function(*inputs)
        if out.dim() and grad_output is None:
            grad_output = torch.full_like(out, 1 / out.numel())
        with mark("backward"):
            out.backward(grad_output)

    return step


def _demo(device: str) -> Workload:
    need("profile demo", "sklearn", "monai")
    from . import _demo_parts as parts

    data = parts.load_data(device)
    loss = parts.focal(data)
    steps = (parts.training_step(data, loss, kind) for kind in ("fused", "eager"))
    name = f"the demo's training step: residual network, batch {parts.BATCH}, focal loss, AdamW"
    return Workload(name, *steps)


def _model(args: argparse.Namespace, device: str) -> Workload:
    if args.input_shape is None:
        fail("a model needs --input-shape, as 8,3,224,224")
    module_name, _, attribute = args.what.partition(":")
    try:
        factory: Any = functools.reduce(getattr, attribute.split("."), importlib.import_module(module_name))
    except (ImportError, AttributeError) as error:
        fail(f"cannot import {args.what}: {error}")
    torch.manual_seed(0)
    model = factory().to(device, DTYPES[args.dtype])
    if not any(p.requires_grad for p in model.parameters()):
        fail(f"{args.what} has no parameters to train")
    x = torch.randn(args.input_shape, device=device, dtype=DTYPES[args.dtype])
    count = sum(p.numel() for p in model.parameters())
    name = f"{args.what}: {count:,} parameters, input {' x '.join(map(str, args.input_shape))} {args.dtype}"
    step = _model_step(model, x)

    def on_reference() -> None:
        with dk.backend("reference"):
            step()

    return Workload(name, step, on_reference)


def _model_step(model: torch.nn.Module, x: Tensor) -> Callable[[], None]:
    """Forward, mean square of the floating outputs (the output itself when it is a scalar, a loss), backward."""
    mark = torch.profiler.record_function

    def step() -> None:
        model.zero_grad()
        with mark("forward"):
            outputs = [t for t in tree_leaves(model(x)) if isinstance(t, Tensor) and t.is_floating_point()]
        with mark("loss"):
            loss = torch.stack([t.float().square().mean() if t.dim() else t.float() for t in outputs]).sum()
        with mark("backward"):
            loss.backward()

    return step
