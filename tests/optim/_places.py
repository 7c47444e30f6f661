"""What the tests on GPUs share, each of which also runs on the CPU: devices, trainings with given gradients, waiting.

On the CPU they show that they are right themselves; under TRITON_INTERPRET=1 they run the kernels of GPUs there.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _helpers import F32, F64
from torch import Tensor, nn

import dlkernels as dk
from dlkernels import _backend

SHAPES = ((2100,), (33, 65), (7,), (2, 3, 4, 5), (1,), (), (1024,))
KINDS = {"adamw": dk.optim.AdamW, "sgdw": dk.optim.SGDW}
LR = 2.0**-7  # learning rates of the tests are exact in float32


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place_fixture(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a step runs; a test file takes it as `place = place_fixture`."""
    if request.param == "cuda":
        yield torch.device("cuda", torch.cuda.current_device())
    else:
        served_as_there = "cuda" if _backend.TWIN is not None else "triton" if _backend.interpreting() else None
        with contextlib.nullcontext() if served_as_there is None else dk.backend(served_as_there):
            yield torch.device("cpu")


def starts(dtype: torch.dtype = F32) -> list[Tensor]:
    """Parameters before the first step, on the CPU; the second one transposed in memory, the fourth channels_last."""
    random = torch.Generator().manual_seed(5)
    values = [(torch.randn(shape, generator=random, dtype=F64) + 0.5).to(dtype) for shape in SHAPES]
    values[1] = values[1].t().contiguous().t()
    values[3] = values[3].contiguous(memory_format=torch.channels_last)
    return values


def gradients(step: int, dtype: torch.dtype = F32) -> list[Tensor]:
    """Those of one step, on the CPU."""
    random = torch.Generator().manual_seed(2000 + step)
    return [((torch.randn(shape, generator=random, dtype=F64) + 0.2) / 8).to(dtype) for shape in SHAPES]


class Training:
    """Parameters on devices, taking turns, and their optimizer; gradients are written in place."""

    def __init__(self, make: Callable[..., Any], *devices: torch.device, dtype: torch.dtype = F32,
                 values: torch.dtype | None = None, **options: Any) -> None:  # fmt: skip
        """`values`: what parameters and gradients are rounded to before they get `dtype`."""
        self.values = values or dtype
        homes = [devices[i % len(devices)] for i in range(len(SHAPES))]
        self.params = [nn.Parameter(x.to(home, dtype)) for x, home in zip(starts(self.values), homes, strict=True)]
        self.buffers = [torch.zeros_like(p, requires_grad=False) for p in self.params]
        self.optimizer = make(self.params, **options)

    def give(self, step: int, factor: float = 1.0, bad: float | None = None) -> None:
        """The gradients of a step; `bad` becomes one element of the last but one parameter's."""
        for p, buffer, g in zip(self.params, self.buffers, gradients(step, self.values), strict=True):
            p.grad = buffer.copy_(g).mul_(factor)
        if bad is not None:
            self.buffers[-2].fill_(bad)

    def lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def step(self, step: int, **gradients: Any) -> None:
        self.give(step, **gradients)
        self.lr(LR * (1 + step % 3))
        self.optimizer.step()

    def flat(self) -> Tensor:
        return flat(self.params)

    def state(self, name: str) -> Tensor:
        return flat([self.optimizer.state[p][name] for p in self.params])

    def count(self) -> set[float]:
        return {float(state["step"]) for state in self.optimizer.state.values() if "step" in state}

    def everything(self) -> dict[str, Any]:
        """For `same_bits`."""
        return {"params": [p.detach() for p in self.params], "state": self.optimizer.state_dict()["state"]}


def flat(tensors: list[Any]) -> Tensor:
    """All of them as one vector on the CPU."""
    return torch.cat([x.detach().reshape(-1).cpu() for x in tensors])


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Calls in which the host would wait for a GPU raise RuntimeError."""
    if device.type != "cuda":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replays(device: torch.device, run: Callable[[], Any]) -> Callable[[], Any]:
    """What repeats `run`, which must only queue work: on a GPU a graph of it, captured here and not yet replayed."""
    if device.type != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
