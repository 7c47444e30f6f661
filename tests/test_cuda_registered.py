"""A build with CUDA brings every operator that csrc/cuda names: registered, and what serves the op on GPUs."""

from __future__ import annotations

import re
import runpy
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


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("9.0", "9.0"),
        ("7.5;8.0;9.0;10.0+PTX", "7.5;8.0;9.0;10.0+PTX"),
        ("Hopper", "9.0+PTX"),
        ("8.0 9.0a", "8.0;9.0a"),
    ],
)
def test_architectures_by_number_and_by_name(given: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that only torch understood left the kernels unused: their own check found no architecture in it."""
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension", reason="needs compiler")
    setuptools = pytest.importorskip("setuptools", reason="needs compiler")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    setup = runpy.run_path(str(SOURCES[0].parents[2] / "setup.py"))
    assert setup["architectures"](cpp_extension._get_cuda_arch_flags()) == expected
