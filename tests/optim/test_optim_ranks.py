"""Gradients that only some ranks have: each makes the same sums for the norm, or the others would wait for ever."""

from __future__ import annotations

import multiprocessing
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _runs import backends
from torch import Tensor, nn

import dlkernels as dk

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available() and hasattr(os, "fork")),
    reason="this torch has no torch.distributed with gloo, or this system no fork",
)

# By step: which parameters have a gradient, on the first rank and on the second.
PRESENT = (("abc", "abc"), ("a", "abc"), ("abc", "c"), ("", "ab"), ("bc", ""), ("", ""), ("abc", "abc"))


def norms(rank: int, folder: Path, backend: str) -> None:
    """What each step says, written to a file: a wrong number of sums ends in an error or in none at all."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    torch.set_num_threads(1)
    limit = timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")

    def cut(x: Tensor) -> Tensor:
        return DTensor.from_local(x, mesh, [Shard(0)], run_check=False)

    said = []
    with dk.backend(backend):
        for kind in (dk.optim.AdamW, dk.optim.SGDW):
            # One of them is whole: it has a norm of its own on each rank, to which no other rank adds.
            params = {"a": cut(torch.ones(2, 3)), "b": torch.ones(4), "c": cut(torch.ones(1))}
            params = {name: nn.Parameter(p) for name, p in params.items()}
            optimizer = kind(params.values(), lr=1e-3, max_grad_norm=1.0)
            for here in PRESENT:
                for name, p in params.items():
                    ones = torch.ones_like(p.to_local() if isinstance(p, DTensor) else p)
                    grad = cut(ones) if isinstance(p, DTensor) else ones
                    p.grad = grad.detach() if name in here[rank] else None
                optimizer.step()
                said.append(optimizer.grad_norm.item())
    (folder / f"rank{rank}").write_text(repr(said))
    dist.barrier()


@pytest.mark.parametrize("backend", backends()[:2])
def test_gradients_on_some_ranks(backend: str, tmp_path: Path) -> None:
    processes = multiprocessing.get_context("fork")
    ranks = [processes.Process(target=norms, args=(rank, tmp_path, backend)) for rank in range(2)]
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(60)
        one.kill()
    squares = {"a": 6, "c": 1}
    for rank in range(2):
        expected = []
        for here in PRESENT:
            cut = sum(squares.get(name, 0) for names in here for name in names)
            expected.append((cut + (4 if "b" in here[rank] else 0)) ** 0.5)
        said: Any = (tmp_path / f"rank{rank}").read_text()
        assert eval(said) == pytest.approx(expected * 2, rel=1e-6)
