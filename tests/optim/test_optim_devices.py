"""Parameters of several devices, and numbers that lie elsewhere: what runners are given. Nothing here needs a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlkernels as dk


class Runner:
    """Of a device that this machine may not have."""

    on_host = False

    def __init__(self) -> None:
        self.lrs: list[Any] = []

    def set_grads(self, grads: list[Tensor]) -> None: ...

    def forget_grads(self) -> None: ...

    def run(self, rows: list[Any], **scaling: Any) -> None:
        self.lrs += [row.values[0] for row in rows]


@pytest.mark.parametrize("kind", [dk.optim.AdamW, dk.optim.SGDW])
def test_lr_on_another_device(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor for the parameters of all devices, as with torch's: each GPU is given its own, the CPU a number."""
    lr = torch.ones(())
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with dk.backend("reference"):
        optimizer = kind([p], lr=lr)
        optimizer.step()
        part = optimizer._plan.parts[0]
        monkeypatch.setattr(kind, "_tensor_lr", staticmethod(lambda lr: lr.detach()))  # as if it were on a GPU
        optimizer.step()
        assert all(isinstance(row.values[0], float) for row in part.rows)
        part.runner, part.device = Runner(), torch.device("meta")
        optimizer.step()
        (given,) = part.runner.lrs
        assert given.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_lr_of_a_gpu_is_not_waited_for(dtype: torch.dtype) -> None:
    """It has a dtype that the kernels read; meta tensors have no value that could be asked for."""
    lr = dk.optim.AdamW._tensor_lr(torch.ones((), dtype=dtype, device="meta"))
    assert lr.device.type == "meta" and lr.dtype == (torch.float64 if dtype == torch.int64 else dtype)
