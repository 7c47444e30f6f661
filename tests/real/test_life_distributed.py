"""Swapped models on two processes (gloo, localhost): DDP, and FSDP2 after the swap.

Each rank compares with the training, by the same means, of the model as it was.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from _entry import Entry
from _training import NETS, assert_close, loss, pair
from torch import Tensor, nn

WORLD = 2
CHECKS: dict[str, Callable[[], None]] = {}

pytestmark = [
    pytest.mark.needs("real"),
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available() and hasattr(os, "fork")),
        reason="this torch has no torch.distributed with gloo, or this system no fork",
    ),
]


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def losses(entry: Entry, wrap: Callable[[nn.Module], nn.Module], model: nn.Module) -> Tensor:
    """Of three steps, each rank on batches of its own."""
    wrapped = wrap(model.train())
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    found = []
    for step in range(3):
        optimizer.zero_grad()
        value = loss(entry, wrapped, 100 * step + dist.get_rank())
        value.backward()
        optimizer.step()
        found.append(value.detach())
    return torch.stack(found)


def compare(wrap: Callable[[nn.Module], nn.Module]) -> None:
    for name in NETS:
        entry, theirs, ours = pair(name)
        assert_close(losses(entry, wrap, ours), losses(entry, wrap, theirs), name)


@check
def ddp() -> None:
    compare(lambda model: nn.parallel.DistributedDataParallel(model))


@check
def fsdp2() -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))

    def shard(model: nn.Module) -> nn.Module:
        for child in next(m for m in model.modules() if isinstance(m, nn.Sequential | nn.ModuleList)):
            fully_shard(child, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    compare(shard)


def main(folder: Path) -> None:
    def rank_main(rank: int) -> None:
        processes.join(rank, WORLD, folder)
        processes.run_checks(rank, folder, CHECKS)

    for name in NETS:  # imported once, before the fork
        pair(name)
    processes.fork(WORLD, rank_main)


def test_on_two_processes(tmp_path: Path) -> None:
    processes.assert_all_pass(__file__, tmp_path, WORLD, CHECKS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
