"""Tensors of other kinds, as parameters and gradients; parameters that modules exchange."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _helpers import backend_fixture
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import dlkernels as dk
from dlkernels.testing import assert_bitwise

backend = backend_fixture
KINDS = pytest.mark.parametrize("kind", [dk.optim.AdamW, dk.optim.SGDW])


@KINDS
def test_modules_may_swap_their_parameters(kind: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With swap_tensors, as DTensors always are: it needs that nobody else holds what is behind a parameter."""
    model = nn.Linear(3, 3).half()
    optimizer = kind(model.parameters(), lr=0.5, state_dtype=torch.float32)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)
    weight = model.weight
    model.float()
    assert model.weight is weight and weight.dtype == torch.float32

    before = weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.all(weight < before - 0.1)


class Wrapper(Tensor):
    """A class that dispatches to a tensor inside, and has no memory itself."""

    @staticmethod
    def __new__(cls, inside: Tensor) -> Wrapper:
        made = Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype, device=inside.device)
        made.inside = inside
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Wrapper, lambda x: x.inside, (args, kwargs or {}))
        return tree_map_only(Tensor, Wrapper, func(*args, **kwargs))


class Named(Tensor):
    """A class of its own, with memory as usual."""


@KINDS
def test_wrappers_are_refused(kind: Any, backend: str) -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = kind([p])
    p.grad = torch.ones(3)
    optimizer.step()
    before = p.detach().clone()
    p.grad = Wrapper(torch.ones(3))
    with pytest.raises(TypeError, match=r"the gradient of parameter 0 must be a tensor with memory .*, got Wrapper"):
        optimizer.step()
    assert torch.equal(p, before)

    p = nn.Parameter(Wrapper(torch.ones(3)))
    p.grad = Wrapper(torch.ones(3))
    with pytest.raises(TypeError, match=r"^parameter 0 must be a tensor with memory of its own, got Wrapper"):
        kind([p]).step()


@KINDS
def test_other_classes_are_stepped(kind: Any, backend: str) -> None:
    one, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3).as_subclass(Named))
    for p in (one, other):
        optimizer = kind([p], lr=0.1)
        for value in (1.0, 2.0):
            p.grad = torch.full((3,), value).as_subclass(type(p.data))
            optimizer.step()
    assert_bitwise(other.detach().as_subclass(Tensor), one.detach())


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Of this process alone."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no torch.distributed with gloo")
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@KINDS
def test_shards_and_whole_tensors_do_not_mix(kind: Any, backend: str, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    whole = torch.ones(4, 3)
    part = distribute_tensor(whole, mesh, [Shard(0)])
    for value, grad, message in ((whole, part, "a Tensor as it is, got DTensor"), (part, whole, "a DTensor as it is")):
        p = nn.Parameter(value.clone())
        p.grad = grad.clone()
        with pytest.raises(TypeError, match=message):
            kind([p]).step()
