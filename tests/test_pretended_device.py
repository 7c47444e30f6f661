"""The pretended device of pretend_cuda.py refuses what a GPU refuses, and lets through what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REFUSED = {
    "two devices": ("x + torch.ones(3)", "same device"),
    "in a backward pass": ("Mixed.apply(x).sum().backward()", "same device"),
    "indices of another device": ("torch.ones(3)[torch.zeros(1, dtype=torch.long, device='cuda')]", "same device"),
    "an operator of dlkernels": ("dk.softmax_focal_loss(x.view(1, 3), torch.tensor([1]))", "device"),
    "numpy": ("x.detach().numpy()", "numpy"),
    "generator": ("torch.rand(3, device='cuda', generator=torch.Generator())", "generator"),
    "waiting": ("strictly(lambda: x.sum().item())", "synchronizing"),
    "copying to the host": ("strictly(lambda: x.cpu())", "synchronizing"),
    "waiting in a capture": ("captured(lambda: x.nonzero())", "capturing"),
    "a pageable copy in a capture": ("captured(lambda: torch.ones(3).to('cuda'))", "capturing"),
    "a model left behind": ("torch.nn.Linear(3, 1)(x)", "same device"),
}
FINE = {
    "a number of the CPU": "(x * torch.tensor(2.0)).device == x.device == torch.device('cuda', 0)",
    "gradients": "torch.autograd.grad((x.half() ** 2).float().sum(), x)[0].is_cuda",
    "modules": "torch.nn.Linear(3, 1).to('cuda')(x).is_cuda",
    "default device": "made_there().is_cuda and not torch.ones(3).is_cuda",
    "copies": "not x.cpu().is_cuda and x.cpu().to(x).is_cuda and x.to('cuda') is x",
    "one-hot": "torch.nn.functional.one_hot(x.detach().long().clamp(0, 1), 2).is_cuda",
    "transforms": "torch.func.vmap(lambda a: a * 2)(x).is_cuda",
    "an operator of dlkernels": "dk.softmax_focal_loss(x.view(1, 3), torch.tensor([1], device='cuda')).is_cuda",
    "captures": "replayed() == 8.0",
}
PRELUDE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, pretend_cuda
import dlkernels as dk
pretend_cuda.install()
x = torch.tensor([1.0, 2.0, 3.0], device="cuda", requires_grad=True)
class Mixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 2
    @staticmethod
    def backward(ctx, g): return g * torch.ones(3)
def strictly(f):
    torch.cuda.set_sync_debug_mode("error")
    try: return f()
    finally: torch.cuda.set_sync_debug_mode("default")
def captured(f):
    with torch.cuda.graph(torch.cuda.CUDAGraph()): return f()
def made_there():
    with torch.device("cuda"): return torch.ones(3)
def replayed():
    static, graph = torch.ones(2, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): out = (static * 2).sum()
    static.fill_(2.0)
    graph.replay()
    return out.item()
"""


@pytest.fixture(scope="module")
def said() -> list[str]:
    """In one process, since nothing ends the pretence."""
    lines = [PRELUDE]
    for code in [code for code, _ in REFUSED.values()]:
        lines.append(f"try: {code}; print('let through')\nexcept Exception as e: print(str(e).splitlines()[0])")
    lines += [f"print({code})" for code in FINE.values()]
    script = [sys.executable, "-c", "\n".join(lines), str(Path(__file__).parent)]
    done = subprocess.run(script, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, said: list[str]) -> None:
    assert REFUSED[name][1] in said[list(REFUSED).index(name)]


@pytest.mark.parametrize("name", FINE)
def test_fine(name: str, said: list[str]) -> None:
    assert said[len(REFUSED) + list(FINE).index(name)] == "True"
