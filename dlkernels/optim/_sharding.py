"""Parameters that are shards: DTensor's local tensors, where they lie in the whole, and over whom norms are summed."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor


def is_sharded(x: Tensor) -> bool:
    """Whether x is a DTensor; torch.distributed.tensor is not imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local_of(x: Any) -> Tensor:
    """This rank's part of a tensor: itself where it is not a DTensor."""
    if not is_sharded(x):
        return x
    part = x.to_local()
    return part.wait() if hasattr(part, "wait") else part  # of a collective that is still under way


def like_parameter(grad: Any, param: Any) -> Any:
    """A gradient brought to the placements of its parameter; partial sums are summed."""
    if is_sharded(param) and is_sharded(grad) and grad.placements != param.placements:
        return grad.redistribute(param.device_mesh, param.placements)
    return grad


def place_of(x: Any) -> tuple[int, int, int] | None:
    """(offset, period, full_period) of the local part, see `Item`; None where more than one dimension is cut."""
    numel = max(1, x.numel())
    if not is_sharded(x):
        return 0, numel, numel
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(type(p) not in (Shard, Replicate) for p in x.placements):
        return None
    shape, start = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    cut = [d for d, (a, b) in enumerate(zip(shape, x.shape, strict=True)) if a != b]
    if not cut:
        return 0, numel, numel
    if len(cut) > 1:
        return None
    d = cut[0]
    inner = math.prod(x.shape[d + 1 :])
    return start[d] * inner, max(1, shape[d] * inner), x.shape[d] * inner


def norm_key(x: Any) -> Any:
    """Parameters with equal keys have their squares summed over the same ranks; None: over no others."""
    if not is_sharded(x):
        return None
    dims = tuple(i for i, p in enumerate(x.placements) if not p.is_replicate())
    return (x.device_mesh, dims) if dims else None


def reduce_squares(sums: list[Any], keys: list[Any]) -> Any:
    """The total of sums by set of parameters, one list or tensor for each device, over all ranks that hold a part.

    Every rank makes one sum for each key, whatever gradients it has. A number where all sums are lists and nothing is
    sharded, else a tensor.
    """
    if all(key is None for key in keys):
        totals = [
            sum(some) if isinstance(some, list) else some.squeeze(0) if len(some) == 1 else some.sum() for some in sums
        ]
        if len(totals) == 1:
            return totals[0]
        tensor = next((total for total in totals if isinstance(total, Tensor)), None)
        return sum(
            total if tensor is None or not isinstance(total, Tensor) else total.to(tensor.device) for total in totals
        )
    from torch.distributed import all_reduce

    tensors = [
        torch.tensor(some, dtype=torch.float64, device="cpu") if isinstance(some, list) else some
        for some in sums or [[0.0] * len(keys)]
    ]
    total = tensors[0]
    for more in tensors[1:]:
        total = total + more.to(total.device)
    parts = list(total.unbind())
    for i, key in enumerate(keys):
        if key is not None:
            mesh, dims = key
            parts[i] = parts[i].to(mesh.device_type, copy=True)
            for dim in dims:
                all_reduce(parts[i], group=mesh.get_group(dim))
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()
