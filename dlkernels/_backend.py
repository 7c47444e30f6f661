"""Which implementation serves a call: what is installed, what was asked for, and why.

CPU tensors: compiled C++ (`cpp`), else the plain PyTorch `reference`, with one warning.
CUDA tensors: CUDA C++ (`cuda`) where it is built and has a kernel for the op, else Triton, else `reference` with one
warning.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("reference", "cpp", "triton", "cuda")
_RECORD = Path(__file__).with_name("_build_record.json")


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _built_for() -> str:
    """The torch that the extension was built for, as its build wrote it down."""
    try:
        return str(json.loads(_RECORD.read_text())["torch"])
    except (OSError, ValueError, LookupError, TypeError):
        return "an unknown torch"


def _load_extension() -> tuple[ModuleType | None, str]:
    """The compiled module, or None and the reason in one line."""
    if importlib.util.find_spec("dlkernels._C") is None:
        return None, "dlkernels._C is not built: run `pip install --no-build-isolation .` with a C++17 compiler"
    built_for = _built_for()
    if _minor(built_for) != _minor(torch.__version__):
        return None, (
            f"dlkernels._C was built for torch {built_for} and this is torch {torch.__version__}: "
            "run `pip install --no-build-isolation --force-reinstall --no-deps .` again"
        )
    try:
        return importlib.import_module("dlkernels._C"), ""
    except ImportError as error:
        return None, f"dlkernels._C does not load: {str(error).splitlines()[0]}"


C, C_MISSING = _load_extension()


def _load_twin() -> ModuleType | None:
    """The CUDA kernels compiled for the host, which tests build (tests/cuda_host): as "cuda", they take CPU tensors."""
    path = os.environ.get("DLKERNELS_CUDA_HOST", "")
    if not path:
        return None
    spec = importlib.util.spec_from_file_location("_cuda_host", path)
    if spec is None or spec.loader is None or not Path(path).exists():
        raise ImportError(f"`DLKERNELS_CUDA_HOST` must be the path of a library, got {path!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TWIN = _load_twin()
if TWIN is not None and C is not None:
    C.serve_from_host_twin(True)
CUDA_OPS: set[str] = set()  # ops with a kernel in CUDA C++, in this build or in its host twin


def cuda_module(device_type: str) -> ModuleType | None:
    """The compiled module whose CUDA kernels take tensors of this device."""
    return TWIN if device_type == "cpu" else C


@functools.cache
def cuda_missing(device_type: str) -> str:
    """Empty when there are CUDA C++ kernels for tensors of this device, else the reason."""
    if device_type == "cpu":
        return "" if TWIN is not None else "CUDA C++ serves CPU tensors in its tests only"
    if device_type != "cuda":
        return f"it does not serve {device_type} tensors"
    if C is None:
        return C_MISSING
    if not C.build_info()["cuda"]:
        return "dlkernels._C was built without CUDA: build with a CUDA build of torch, nvcc and DLKERNELS_CUDA=1"
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return str(C.cuda_code_problem(10 * major + minor))


def triton_installed() -> bool:
    """Whether there is a triton to import: asked without importing it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def triton_missing() -> str:
    """Empty when Triton can be imported, else the reason."""
    if not triton_installed():
        return "triton is not installed"
    try:
        importlib.import_module("triton.language")
    except Exception as error:
        return f"triton does not import: {error}".splitlines()[0]
    return ""


def interpreting() -> bool:
    """True when Triton kernels run in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "True", "on")


def _why_not(backend: str, device_type: str, op: str | None = None) -> str:
    """Empty when `backend` can serve tensors of `device_type`, else the reason. Without an op, of some op."""
    if backend == "reference":
        return ""
    if backend == "cpp":
        if device_type != "cpu":
            return f"it serves CPU tensors, not {device_type}"
        return C_MISSING
    if backend == "triton":
        if triton_missing():
            return triton_missing()
        if device_type == "cuda" or (device_type == "cpu" and interpreting()):
            return ""
        if device_type == "cpu":
            return "it serves CPU tensors only in its interpreter: set TRITON_INTERPRET=1 before Python starts"
        return f"it does not serve {device_type} tensors"
    if backend == "cuda":
        if cuda_missing(device_type) or op is None or op in CUDA_OPS:
            return cuda_missing(device_type)
        return "no CUDA C++ kernel exists for this op: Triton serves it"
    raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {backend!r}")


class _State:
    """Process-wide, not per thread: autograd runs backward passes in threads of its own."""

    forced: str | None = None


state = _State()


def _from_environment() -> None:
    name = os.environ.get("DLKERNELS_BACKEND", "").strip()
    if not name:
        return
    if name not in BACKENDS:
        raise ValueError(f"`DLKERNELS_BACKEND` must be one of {', '.join(BACKENDS)}, got {name!r}")
    state.forced = name


_from_environment()


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Serve every op from one backend inside a `with` block, to compare or to debug.

    Args:
        name: "reference" (plain PyTorch), "cpp" (compiled, CPU), "triton" or "cuda".

    Raises:
        ValueError: for another name. An op that the backend cannot serve raises `RuntimeError`, with the reason,
            when it is called.

    Note:
        The choice holds for the whole process, because autograd runs backward passes in other threads.
        `DLKERNELS_BACKEND=name` sets it from outside.
    """
    if name not in BACKENDS:
        raise ValueError(f"`backend` must be one of {', '.join(BACKENDS)}, got {name!r}")
    before, state.forced = state.forced, name
    try:
        yield
    finally:
        state.forced = before


def default_for(device_type: str, op: str | None = None) -> str:
    """The backend that serves tensors of this device when nothing is forced."""
    order = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}.get(device_type, ())
    return next((name for name in order if not _why_not(name, device_type, op)), "reference")


def _outside(*more: str) -> int:
    """The stacklevel, for a warning raised by this function's caller, of the first frame outside of the package.

    `more`: further folders that are not the user's.
    """
    folders, level, frame = (str(Path(__file__).parent), *more), 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(folders):
        frame, level = frame.f_back, level + 1
    return level


@functools.cache
def _warn_reference(device_type: str) -> None:
    better = {"cpu": "cpp", "cuda": "triton"}.get(device_type)
    reason = f": {_why_not(better, device_type)}" if better else ""
    warnings.warn(
        f"dlkernels runs its plain PyTorch reference for {device_type} tensors{reason}", stacklevel=_outside()
    )


def choose(device_type: str, op: str | None = None) -> str:
    """The backend for a call of an op on this device; raises when the one asked for cannot serve it."""
    if state.forced is not None:
        reason = _why_not(state.forced, device_type, op)
        if reason:
            raise RuntimeError(f"backend {state.forced!r} cannot serve this call: {reason}")
        return state.forced
    name = default_for(device_type, op)
    if name == "reference" and device_type != "meta" and not torch.compiler.is_compiling():
        _warn_reference(device_type)
    return name


def intercepted(device_type: str, op: str) -> bool:
    """True when a forced backend is not the one that the dispatcher would pick: call its launcher directly."""
    return state.forced is not None and state.forced not in ("reference", default_for(device_type, op))


def fast(x: Any) -> ModuleType | None:
    """The compiled module, whose eager entries may take a call with this tensor; None where a backend is forced that
    they would not call."""
    if state.forced is None:
        return C if TWIN is None else None
    served_by = "cuda" if TWIN is not None or getattr(x, "is_cuda", False) else "cpp"
    return C if state.forced == served_by else None
