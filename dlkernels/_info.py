"""What is installed and active: the data behind `python -m dlkernels info`."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import _backend
from ._library import OPS


def build_info() -> dict[str, Any]:
    """What serves each op on each device, and why not something better.

    Returns:
        A dict: `torch`, `python`, `cpp` (None, or what the extension was built with: torch, compiler, instruction sets
        and the one in use, CUDA architectures), `triton` (version or the reason why not), `cuda_device`, `forced`, and
        `ops`: {op: {device: {"backend": name, "why": reason or ""}}}.
    """
    triton = _backend.triton_missing()
    if not triton:
        import triton as triton_module

        triton = triton_module.__version__
    cuda = torch.cuda.is_available()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpp": dict(_backend.C.build_info()) if _backend.C is not None else None,
        "cpp_missing": _backend.C_MISSING,
        "triton": triton,
        "cuda_device": torch.cuda.get_device_name() if cuda else None,
        "forced": _backend.state.forced,
        "ops": {name: {device: _active(device) for device in ("cpu", "cuda")} for name in sorted(OPS)},
    }


def _active(device: str) -> dict[str, str]:
    name = _backend.default_for(device)
    if device == "cpu":
        return {"backend": name, "why": _backend.C_MISSING}
    if not torch.cuda.is_available():
        return {"backend": name, "why": "no CUDA device is visible"}
    return {"backend": name, "why": _backend._why_not("cuda", device) if name == "triton" else _backend.triton_missing()}
