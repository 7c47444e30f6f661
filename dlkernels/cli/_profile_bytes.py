"""The least bytes that an op can move, by name, and the kernels behind it. Most ops need no entry here."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import _backend
from ..optim._base import FusedOptimizer
from ..optim._plan import Plan


def touched(tensor: Tensor) -> int:
    """Bytes of the distinct elements: a broadcast dimension costs nothing."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride()) if stride != 0 or n == 0)
    return math.prod(sizes) * tensor.element_size()


def of_kept_rows(x: Tensor, noise: Tensor, residual: Tensor | None) -> int:
    """Stochastic depth does not read the rows that it drops: noise 0."""
    kept = int(noise.count_nonzero()) / max(noise.numel(), 1)
    written = x.numel() * x.element_size()
    return round(kept * touched(x)) + touched(noise) + (0 if residual is None else touched(residual)) + written


def of_step(plan: Plan) -> int:
    """Gradients read, state read and written, parameters too, but only written where a master copy is read."""
    total = 0
    for item in (item for part in plan.parts for item in part.items if plan.owners[item.position].grad is not None):
        param = item.param.numel() * item.param.element_size()
        state = (t for t in (*item.slots, item.master, item.average) if t is not None)
        total += (3 if item.master is None else 2) * param  # the gradient is as large
        total += sum(2 * t.numel() * t.element_size() for t in state)
    return total


# Where the general rule (every argument and every output once, written arguments twice) is wrong.
BYTES: dict[str, Callable[..., int]] = {
    "scale_stored_grad": lambda *_: 0,  # returns at once when the incoming gradient is 1
    "stochastic_depth_fwd": of_kept_rows,
}

# Op -> part of its kernels' names; the default is the op's own name without its pass.
KERNELS = {
    "sigmoid_focal_loss": "sigmoid_focal",
    "softmax_focal_loss": "softmax_focal",
    "cross_entropy": "softmax_focal",
    "scale_stored_grad": "scale",
    "center_loss": "center_rows",
    "sparse_center_loss": "center_rows",
    "update_centers_": "segments|merge",
    "island_loss": "center_rows|island",
    "island_pairs": "island",
}


def kernel_pattern(ops: Iterable[str]) -> str:
    """A regular expression for the kernels of some ops."""
    names = dict.fromkeys(re.sub(r"_(fwd|bwd|step)$", "", op) for op in ops)
    parts = dict.fromkeys(KERNELS.get(name, name) for name in names if name != "scale_stored_grad" or len(names) == 1)
    return "|".join(parts) or "kernel"


def minimum_bytes(func: Any, args: tuple[Any, ...], outputs: Any) -> int:
    """Arguments read once, outputs written once; an argument that the schema marks as written counts twice."""
    name = func.overloadpacket.__name__
    if name in BYTES:
        return BYTES[name](*args)
    written = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
    total = sum(
        touched(t) * (2 if is_written else 1)
        for argument, is_written in zip(args, written)
        for t in tree_leaves(argument)
        if isinstance(t, Tensor)
    )
    return total + sum(touched(t) for t in tree_leaves(outputs) if isinstance(t, Tensor))


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.moved: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if func.namespace == "dlkernels":
            name = f"dlkernels::{func.overloadpacket.__name__}"
            self.moved[name] = self.moved.get(name, 0) + minimum_bytes(func, args, outputs)
        return outputs

    def add_step(self, optimizer: Any, *_: Any) -> None:
        """A fused optimizer's step is no op of the dispatcher."""
        plan = getattr(optimizer, "_plan", None)
        if isinstance(optimizer, FusedOptimizer) and plan is not None:
            name = f"dlkernels::{optimizer._family}_step"
            self.moved[name] = self.moved.get(name, 0) + of_step(plan)


def bytes_per_step(step: Callable[[], None]) -> dict[str, int]:
    """Least bytes of one step by range name, from a step whose ops all go through the dispatcher."""
    fast, _backend.fast = _backend.fast, lambda x: None  # the eager C++ entries bypass it
    count = _Count()
    hook = register_optimizer_step_post_hook(count.add_step)
    try:
        with count:
            step()
    finally:
        hook.remove()
        _backend.fast = fast
    return count.moved
