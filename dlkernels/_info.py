"""What is installed and active: the data behind `python -m dlkernels info`."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import _backend
from ._library import LIST_OPS, MUTATIONS, OPS
from .optim._runners import FAMILIES


def build_info() -> dict[str, Any]:
    """What serves each op on each device, and why not something better.

    Returns:
        A dict that JSON can hold: `dlkernels`, `torch`, `torch_cuda` (the CUDA that torch was built for, or None),
        `python`, `cpu` (architecture, the instruction set that torch uses, threads), `cpp` (None, or what the extension
        was built with: torch, compiler, instruction sets and the one in use, CUDA architectures), `cpp_missing`,
        `triton` (version or the reason why not), `triton_missing`, `cuda_device`, `cuda_capability`, `forced`, and
        `ops`: {op: {device: {"backend": name, "why": reason or ""}}}; `adamw` and `sgdw` are the optimizers' steps.
    """
    from . import __version__

    missing = _backend.triton_missing()
    names = sorted([*OPS, *MUTATIONS, *LIST_OPS, *FAMILIES])
    cuda = torch.cuda.is_available()
    return {
        "dlkernels": __version__,
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cpu": {
            "architecture": platform.machine(),
            "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "cpp": dict(_backend.C.build_info()) if _backend.C is not None else None,
        "cpp_missing": _backend.C_MISSING,
        "triton": missing or _triton_version(),
        "triton_missing": missing,
        "cuda_device": torch.cuda.get_device_name() if cuda else None,
        "cuda_capability": ".".join(map(str, torch.cuda.get_device_capability())) if cuda else None,
        "forced": _backend.state.forced,
        "ops": {name: {device: _active(device, name) for device in ("cpu", "cuda")} for name in names},
    }


def _triton_version() -> str:
    import triton

    return triton.__version__


def _active(device: str, op: str) -> dict[str, str]:
    """The backend that serves a call of an op on this device now, and why the better one does not."""
    forced = _backend.state.forced
    if forced is not None:
        reason = _backend._why_not(forced, device, op)
        return {"backend": forced, "why": f"forced, and cannot serve it: {reason}" if reason else "forced"}
    name = _backend.default_for(device, op)
    if device == "cpu":
        return {"backend": name, "why": _backend.C_MISSING}
    reasons = {"cuda": "", "triton": _backend._why_not("cuda", device, op)}
    why = reasons.get(name, _backend.triton_missing())
    return {"backend": name, "why": why if torch.cuda.is_available() else "no CUDA device is visible"}
