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
MUTATIONS: list[str] = []  # ops that change a tensor in place, without a gradient
LIST_OPS: list[str] = []  # ops of lists of tensors


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
        if _backend.intercepted(_first_tensor(args).device.type, cls.op_name()):
            with torch.profiler.record_function(f"dlkernels::{cls.op_name()}"):
                return forced_launcher(cls.family, cls.op_name())(*args)
        return getattr(torch.ops.dlkernels, cls.op_name()).default(*args)

    @classmethod
    def forward(cls, *args: Any) -> Any:
        return cls.kernel(*args)


@functools.cache
def launcher(family: str, name: str) -> Callable[..., Any]:
    """The Triton launcher of an op, imported on first use."""
    return getattr(importlib.import_module(f"dlkernels.triton.{family}"), name)


def forced_launcher(family: str, name: str) -> Callable[..., Any]:
    """The kernel of an op on a forced backend that the dispatcher would not pick."""
    if _backend.state.forced == "cuda":
        return getattr(torch.ops.dlkernels_cuda_host, name).default
    return launcher(family, name)


# Ops with a kernel in CUDA C++ exist twice more: as Triton serves them, which is where CUDA C++ hands on what it has no
# kernel for, and as its host twin serves them.
_TRITON = torch.library.Library("dlkernels_triton", "DEF")
_TWIN = torch.library.Library("dlkernels_cuda_host", "DEF") if _backend.TWIN is not None else None


def register_kernels(schema: str, family: str) -> None:
    """What serves a newly defined op on GPUs: CUDA C++ where the extension brought a kernel, else Triton."""
    name = schema.split("(", 1)[0]
    if _TWIN is not None:
        _TWIN.define(schema)
    in_cpp = torch._C._dispatch_has_kernel_for_dispatch_key(f"dlkernels::{name}", "CUDA")
    in_twin = torch._C._dispatch_has_kernel_for_dispatch_key(f"dlkernels_cuda_host::{name}", "CPU") if _TWIN else False
    in_triton = _backend.triton_installed()
    if in_triton and not in_cpp:
        LIBRARY.impl(name, lambda *args: launcher(family, name)(*args), "CUDA")
    if in_cpp or in_twin:
        _backend.CUDA_OPS.add(name)
        _TRITON.define(schema)
        if in_triton:
            for key in ("CPU", "CUDA"):
                _TRITON.impl(name, lambda *args: launcher(family, name)(*args), key)


def register(cls: type[FusedFunction], fake: Callable[..., Any]) -> None:
    """Define the op and attach its fake, gradient, vmap rule and Triton launcher."""
    name = f"dlkernels::{cls.op_name()}"
    LIBRARY.define(cls.schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(name, fake, lib=LIBRARY)
    register_kernels(cls.schema, cls.family)
    torch.library.register_autograd(name, cls.backward, setup_context=cls.setup_context, lib=LIBRARY)
    torch.library.register_vmap(name, cls.vmap, lib=LIBRARY)
    OPS[cls.op_name()] = cls
    overload = getattr(torch.ops.dlkernels, cls.op_name()).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return overload(*args)
        if transforms_active() or _backend.intercepted(_first_tensor(args).device.type, cls.op_name()):
            return cls.apply(*args)
        return overload(*args)

    cls.call = staticmethod(call)


def register_mutation(schema: str, family: str) -> Callable[..., None]:
    """Define an op that changes its first argument and returns nothing; gives back the function that runs it."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"dlkernels::{name}", lambda *args: None, lib=LIBRARY)
    register_kernels(schema, family)
    MUTATIONS.append(name)
    overload = getattr(torch.ops.dlkernels, name).default

    def call(*args: Any) -> None:
        if torch.compiler.is_compiling():
            return overload(*args)
        if _backend.intercepted(args[0].device.type, name):
            with torch.profiler.record_function(f"dlkernels::{name}"):
                forced_launcher(family, name)(*args)
        else:
            overload(*args)
        torch.autograd.graph.increment_version(args[0])  # a graph that has saved it must notice
        return None

    return call


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


def is_compiling() -> bool:
    return torch.compiler.is_compiling()


def is_quiet(x: Tensor) -> bool:
    """True where values are not looked at: on a device that would have to be waited for, in a compiler, a transform."""
    return x.device.type != "cpu" or is_compiling() or transforms_active()


def wants_grad(*tensors: Tensor | None) -> bool:
    """True when a gradient in one of these will be asked for."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def has_tangent(*tensors: Tensor | None) -> bool:
    """True in forward-mode differentiation (torch.autograd.forward_ad), which the reference serves."""
    if torch.compiler.is_compiling() or torch.autograd.forward_ad._current_level < 0:
        return False
    unpack = torch.autograd.forward_ad.unpack_dual
    return any(t is not None and unpack(t).tangent is not None for t in tensors)


def second_derivative(
    function: Callable[..., Tensor], grad_output: Tensor, tensors: Sequence[Tensor | None], cotangents: Sequence[Any]
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of a backward pass: of vjp(function, *tensors)(grad_output), the reference differentiated twice.

    Args:
        function: the op in plain PyTorch, of as many arguments as there are tensors.
        tensors: None where an optional argument is missing.
        cotangents: of the gradient of each tensor; None counts as zero.

    Returns:
        The gradient in grad_output, and one in each tensor (None where it is missing).
    """
    present = [i for i, t in enumerate(tensors) if t is not None]
    given = [tensors[i] for i in present]

    def of_present(*some: Tensor) -> Tensor:
        every: list[Tensor | None] = [None] * len(tensors)
        for i, t in zip(present, some, strict=True):
            every[i] = t
        return function(*every)

    def first(g: Tensor, *some: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(of_present, *some)[1](g)

    pulled = tuple(
        torch.zeros_like(t) if cotangents[i] is None else cotangents[i] for i, t in zip(present, given, strict=True)
    )
    in_grad_output, *found = torch.func.vjp(first, grad_output, *given)[1](pulled)
    every: list[Tensor | None] = [None] * len(tensors)
    for i, g in zip(present, found, strict=True):
        every[i] = g
    return in_grad_output, every


def fold(info: Any, in_dims: Sequence[int | None], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The vmap dimension folded into dimension 0 of every tensor: (B, N, ...) -> (B N, ...)."""
    return [
        None if t is None else batch_first(t, d, info.batch_size).flatten(0, 1)
        for t, d in zip(tensors, in_dims, strict=True)
    ]


def unfold(info: Any, *outputs: Tensor) -> tuple[Tensor, ...]:
    """The way back: (B N, ...) -> (B, N, ...)."""
    size = info.batch_size
    return tuple(out.unflatten(0, (size, out.shape[0] // size if size else out.shape[0])) for out in outputs)


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


def stored_grad_is_free(stored: Tensor, grad_output: Tensor) -> bool:
    """True when the backward pass under way is the last use of a stored gradient that Triton can scale in place."""
    graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    return (
        type(stored) is Tensor
        and not torch.compiler.is_compiling()
        and not transforms_active()
        and not torch._C._functorch.is_legacy_batchedtensor(grad_output)  # is_grads_batched, no transform by that name
        and _backend.choose(stored.device.type, "scale_stored_grad_") in ("triton", "cuda")
        and not graph_is_kept()
    )


def scale_in_place(grad_output: Tensor, stored: Tensor, divisor: Tensor | None) -> Tensor:
    """stored *= grad_output [/ divisor]; a launch that ends early where the factor is 1."""
    _scale_stored_grad_(stored, grad_output, divisor)
    return stored


_scale_stored_grad_ = register_mutation(
    "scale_stored_grad_(Tensor(a!) stored, Tensor grad_output, Tensor? divisor) -> ()", "stored_grad"
)
