"""The name "dlkernels" among the backends of torch.compile, where no installed metadata brings it."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint


def register() -> None:
    """Name the backend to torch._dynamo when that is imported already; it is loaded on first use."""
    registry = sys.modules.get("torch._dynamo.backends.registry")
    if registry is not None:
        entry = EntryPoint("dlkernels", "dlkernels.compile:backend", "torch_dynamo_backends")
        registry._BACKENDS.setdefault("dlkernels", entry)
