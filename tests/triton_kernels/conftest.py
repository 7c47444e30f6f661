"""Kernels run on the CPU, program by program, in the Triton interpreter: TRITON_INTERPRET=1 pytest tests/triton_kernels

The variable is read when a kernel is defined, so that it has to be there before Python starts.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs the interpreter; without it the tests skip, and the reason names the variable."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.needs("interpreter"))


@pytest.fixture(autouse=True)
def _quiet_lanes() -> Iterator[None]:
    """Lanes outside of a mask compute inf - inf and the like in NumPy; what they give is never stored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
