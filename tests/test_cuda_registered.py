"""A build with CUDA brings every operator that csrc/cuda names: registered, and what serves the op on GPUs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import dlkernels as dk
from dlkernels import _backend

SOURCES = sorted((Path(__file__).resolve().parents[1] / "csrc" / "cuda").glob("*.cpp"))
NAMED = [(path.stem, name) for path in SOURCES for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())]


def built_with_cuda() -> bool:
    return _backend.C is not None and bool(_backend.C.build_info()["cuda"])


def test_operators_are_found() -> None:
    assert ("stored_grad", "scale_stored_grad") in NAMED
    assert len(NAMED) == len(set(NAMED))


@pytest.mark.parametrize(("family", "name"), NAMED, ids=[name for _, name in NAMED])
def test_registered(family: str, name: str) -> None:
    if not built_with_cuda():
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"dlkernels::{name}", "CUDA") or (
            _backend.triton_installed()
        )
        pytest.skip("by design: this build is for CPUs")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dlkernels::{name}", "CUDA")
    assert name in _backend.CUDA_OPS
    assert dk.build_info()["ops"][name]["cuda"]["backend"] == "cuda"
    schema = str(getattr(torch.ops.dlkernels, name).default._schema)
    triton = str(getattr(torch.ops.dlkernels_triton, name).default._schema)
    assert schema.split("(", 1)[1] == triton.split("(", 1)[1], "what it cannot serve is handed on as it is"


def test_every_architecture_is_in_the_build() -> None:
    if not built_with_cuda():
        pytest.skip("by design: this build is for CPUs")
    archs = _backend.C.build_info()["cuda_archs"].replace("+PTX", "").split(";")
    for arch in archs:
        assert _backend.C.cuda_code_problem(int(arch.replace(".", ""))) == ""
    reason = _backend.C.cuda_code_problem(52)
    assert "sm_52" in reason and "TORCH_CUDA_ARCH_LIST" in reason and "\n" not in reason
