"""What `profile` runs: one op, the demo's training step, or a model of the user's."""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import dlkernels as dk

from . import _eager, fail, need

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Op -> (default shape, does it take class indices by default)
OPS = {
    "sigmoid_focal_loss": ((1 << 20,), False),
    "softmax_focal_loss": ((4096, 1000), True),
    "cross_entropy": ((4096, 1000), True),
}


@dataclass(frozen=True)
class Workload:
    """A step with dlkernels and its eager counterpart; parts of a step are record_function ranges."""

    name: str
    fused: Callable[[], None]
    eager: Callable[[], None]


def make_workload(args: argparse.Namespace, device: str) -> Workload:
    if args.what in OPS:
        return _op(args, device)
    if args.what == "demo":
        return _demo(device)
    if ":" in args.what:
        return _model(args, device)
    fail(f"unknown op or model {args.what!r}: expected {', '.join(OPS)}, demo, or package.module:factory")


def _op(args: argparse.Namespace, device: str) -> Workload:
    default, indexed = OPS[args.what]
    shape, dtype = args.shape or default, DTYPES[args.dtype]
    sigmoid = args.what.startswith("sigmoid")
    indexed = indexed if args.targets == "auto" else args.targets == "index"
    if len(shape) < 2 and (indexed or not sigmoid):
        fail(f"--shape must have a class dimension, as 4096,1000, got {','.join(map(str, shape))}")
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
    return Workload(name, *(_loss_step(f, x, target) for f in functions))


def _loss_step(function: Callable[..., Tensor], x: Tensor, target: Tensor) -> Callable[[], None]:
    x = x.detach().clone().requires_grad_(True)
    mark = torch.profiler.record_function
    grad_output: Tensor | None = None

    def step() -> None:
        nonlocal grad_output
        x.grad = None
        with mark("forward"):
            loss = function(x, target)
        if loss.dim() and grad_output is None:
            grad_output = torch.full_like(loss, 1 / loss.numel())
        with mark("backward"):
            loss.backward(grad_output)

    return step


def _demo(device: str) -> Workload:
    need("profile demo", "sklearn", "monai")
    from . import _demo_parts as parts

    data = parts.load_data(device)
    loss = parts.focal(data)
    steps = (parts.training_step(data, function) for function in (loss.fused, loss.eager))
    return Workload(f"the demo's training step: ResNet, batch {parts.BATCH}, focal loss, AdamW", *steps)


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
