"""What a check may need, and the rule that a required check is never skipped.

A module of its own: tests import it, which `conftest` would not survive. Of several files of that name pytest keeps one
in `sys.modules`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable

import pytest
import torch

from dlkernels import _backend


def without_gpu() -> str:
    return "" if torch.cuda.is_available() else "no CUDA device is visible"


def _without_interpreter() -> str:
    return _backend.triton_missing() or ("" if _backend.interpreting() else "TRITON_INTERPRET=1 is not set")


def _without_aot() -> str:
    if _backend.triton_missing():
        return _backend.triton_missing()
    return "Triton's compiler is off under TRITON_INTERPRET=1" if _backend.interpreting() else ""


def without(module: str) -> str:
    return "" if importlib.util.find_spec(module) else f"{module} is not installed"


def _without_hosts() -> str:
    missing = [name for name in ("lightning", "transformers", "accelerate") if without(name)]
    return f"not installed: {', '.join(missing)}" if missing else ""


def _without_real() -> str:
    names = ("timm", "torchvision", "transformers", "diffusers", "monai", "segmentation_models_pytorch")
    missing = [name for name in (*names, "dynamic_network_architectures") if without(name)]
    return f"not installed: {', '.join(missing)}; `make test-real` has an environment for it" if missing else ""


# What a check may need -> the reason why it is missing, or "".
NEEDS: dict[str, Callable[[], str]] = {
    "cpp": lambda: _backend.C_MISSING,
    "gpu": without_gpu,
    "interpreter": _without_interpreter,
    "aot": _without_aot,
    "nvcc": lambda: "" if shutil.which("nvcc") else "nvcc is not on PATH",
    "compiler": lambda: "" if shutil.which("g++") or shutil.which("c++") else "no C++ compiler is on PATH",
    "hypothesis": lambda: without("hypothesis"),
    "hosts": _without_hosts,
    "real": _without_real,
    "twin": lambda: _backend.cuda_missing("cpu"),
}


def required() -> set[str]:
    """The names in DLKERNELS_REQUIRE; "all" turns every skip into a failure."""
    names = {name.strip() for name in os.environ.get("DLKERNELS_REQUIRE", "").split(",") if name.strip()}
    unknown = names - NEEDS.keys() - {"all"}
    if unknown:
        raise pytest.UsageError(
            f"DLKERNELS_REQUIRE must name some of {', '.join(NEEDS)} or all, got {', '.join(unknown)}"
        )
    return names


def must_not_skip(needs: set[str], reason: str) -> bool:
    """Whether a check that skipped with `reason`, marked as needing `needs`, has to fail instead."""
    if "by design" in reason:
        return False  # not for want of anything
    names = required()
    said = {name for name in NEEDS if f"needs {name}" in reason}  # of several needs, the one that was missing
    return "all" in names or bool(names & (said or needs))
