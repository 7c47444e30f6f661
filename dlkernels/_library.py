"""How an op is put together: schema, fake, gradient, second derivative, vmap, from one set of static methods.

An op is two `FusedFunction`s, its forward and its backward. Each is a `torch.autograd.Function` in the
`setup_context` style; `register` attaches the same methods to the `torch.library` op of the same arguments:

* plain eager calls and `torch.compile` go through the dispatcher op, whose gradient is registered with it;
* `torch.func` transforms, and a backend forced against the dispatcher's choice, go through `Function.apply`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _backend

LIBRARY = torch.library.Library("dlkernels", "DEF")
OPS: dict[str, type[FusedFunction]] = {}


def transforms_active() -> bool:
    """True inside torch.func transforms (vmap, grad, jvp, ...)."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


class FusedFunction(torch.autograd.Function):
    """Base of every op. A subclass names its op, its family, and gives fake, setup_context, backward and vmap."""

    schema: str  # "foo_fwd(Tensor input, ...) -> Tensor"
    call: Callable[..., Any]  # the differentiable op; `register` sets it
    family: str  # module of dlkernels.triton that holds the launcher

    @classmethod
    def op_name(cls) -> str:
        return cls.schema.split("(", 1)[0]

    @classmethod
    def kernel(cls, *args: Any) -> Any:
        """Run the kernel: below autograd, on the backend in force."""
        if _backend.intercepted(_first_tensor(args).device.type):
            with torch.profiler.record_function(f"dlkernels::{cls.op_name()}"):
                return launcher(cls)(*args)
        return getattr(torch.ops.dlkernels, cls.op_name()).default(*args)

    @classmethod
    def forward(cls, *args: Any) -> Any:
        return cls.kernel(*args)


@functools.cache
def launcher(cls: type[FusedFunction]) -> Callable[..., Any]:
    """The Triton launcher of an op, imported on first use."""
    return getattr(importlib.import_module(f"dlkernels.triton.{cls.family}"), cls.op_name())


def register(cls: type[FusedFunction], fake: Callable[..., Any]) -> None:
    """Define the op and attach its fake, gradient, vmap rule and Triton launcher."""
    name = f"dlkernels::{cls.op_name()}"
    LIBRARY.define(cls.schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(name, fake, lib=LIBRARY)
    if _backend.triton_installed():
        LIBRARY.impl(cls.op_name(), lambda *args: launcher(cls)(*args), "CUDA")
    torch.library.register_autograd(name, cls.backward, setup_context=cls.setup_context, lib=LIBRARY)
    torch.library.register_vmap(name, cls.vmap, lib=LIBRARY)
    OPS[cls.op_name()] = cls
    overload = getattr(torch.ops.dlkernels, cls.op_name()).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return overload(*args)
        if transforms_active() or _backend.intercepted(_first_tensor(args).device.type):
            return cls.apply(*args)
        return overload(*args)

    cls.call = staticmethod(call)


def _first_tensor(args: Sequence[Any]) -> Tensor:
    return next(a for a in args if isinstance(a, Tensor))


def loop_over_batch(call: Callable[..., Any], info: Any, in_dims: Sequence[int | None], args: Sequence[Any]) -> Any:
    """The vmap rule of last resort: one call per batch element, results stacked."""
    results = []
    for index in range(info.batch_size):
        picked = [a if d is None else a.select(d, index) for a, d in zip(args, in_dims, strict=True)]
        results.append(call(*picked))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(group) for group in zip(*results, strict=True)), (0,) * len(results[0])


def batch_first(x: Tensor, dim: int | None, size: int) -> Tensor:
    """`x` with its vmap dimension first; expanded to `size` when it has none."""
    return x.movedim(dim, 0) if dim is not None else x.expand(size, *x.shape)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, statistics and losses: float64 for float64, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# The stored-gradient scale, shared by every loss that writes its gradient in the forward pass -------------------------


class ScaleStoredGrad(FusedFunction):
    """dx = stored * grad_output [/ divisor]: the backward pass of a loss whose forward pass wrote its gradient."""

    schema = "scale_stored_grad(Tensor grad_output, Tensor stored, Tensor? divisor) -> Tensor"
    family = "stored_grad"

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_output, stored, divisor = ctx.saved_tensors
        grad_grad_output = (grad.to(grad_output.dtype) * stored).sum()
        if divisor is not None:
            grad_grad_output = grad_grad_output / divisor
        return grad_grad_output, ScaleStoredGrad.call(grad_output, grad, divisor), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return loop_over_batch(ScaleStoredGrad.call, info, in_dims, args)


def _scale_stored_grad_fake(grad_output: Tensor, stored: Tensor, divisor: Tensor | None) -> Tensor:
    return stored.new_empty(stored.shape)


register(ScaleStoredGrad, _scale_stored_grad_fake)


def stored_grad_is_free(stored: Tensor) -> bool:
    """True when the backward pass under way is the last use of a stored gradient that Triton can scale in place."""
    graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return (
        type(stored) is Tensor
        and not torch.compiler.is_compiling()
        and not transforms_active()
        and _backend.choose(stored.device.type) == "triton"
        and not graph_is_kept()
    )


def scale_in_place(grad_output: Tensor, stored: Tensor, divisor: Tensor | None) -> Tensor:
    """stored *= grad_output [/ divisor]; a launch that ends early where the factor is 1."""
    from .triton.stored_grad import scale_stored_grad_

    with torch.profiler.record_function("dlkernels::scale_stored_grad_"):
        scale_stored_grad_(grad_output, stored, divisor)
    return stored
