"""Tables on a device that steps outside of a CUDA graph and its replays write in turn."""

from __future__ import annotations

import pytest
import torch

from dlkernels.triton import _multi_tensor


@pytest.mark.parametrize("fixed", [False, True])
def test_steps_between_replays_find_their_own_table(fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = _multi_tensor.Mirror(torch.device("cpu"), fixed=fixed)
    captured = not fixed
    tables = {"eager": [1, 2], "captured": [3, 4] if captured else [1, 2]}

    def step(name: str) -> None:
        key = True if fixed else tuple(tables[name])
        assert mirror.set(key, lambda: tables[name]).tolist() == tables[name]

    step("eager")
    address = mirror.set(True if fixed else (1, 2), lambda: tables["eager"]).data_ptr()
    monkeypatch.setattr(_multi_tensor, "is_capturing", lambda device: True)
    step("captured")
    monkeypatch.setattr(_multi_tensor, "is_capturing", lambda device: False)
    assert len(mirror._kept) == captured
    for _ in range(3):
        for host in mirror._kept:  # what a replay does
            mirror.tensor.copy_(host)
        step("eager")
        assert mirror.tensor.data_ptr() == address
