"""Tables on a device that steps outside of a CUDA graph and its replays write in turn."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import dlkernels as dk
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


@pytest.mark.parametrize("captured", [False, True])
def test_tables_live_as_long_as_a_graph_may_read_them(captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the optimizer has made a new plan: its graph is not known, and may be replayed."""
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with dk.backend("triton"):
        optimizer = dk.optim.AdamW([p])
        optimizer.step()
        monkeypatch.setattr(_multi_tensor, "is_capturing", lambda device: captured)
        optimizer.step()
        monkeypatch.setattr(_multi_tensor, "is_capturing", lambda device: False)
        runner = weakref.ref(optimizer._plan.parts[0].runner)
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        gc.collect()
        assert optimizer._plan.parts[0].runner is not runner()
        assert (runner() is not None) == captured
        if captured:
            host = runner()._items._kept[0]
            assert host[0, 1] == p.data_ptr()
        pickle.dumps(optimizer)
        assert copy.deepcopy(optimizer)._plan is None
