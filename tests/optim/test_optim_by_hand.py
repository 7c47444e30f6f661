"""What users may change in the state by hand, between steps."""

from __future__ import annotations

import pytest
import torch
from _helpers import backend_fixture, made, train

import dlkernels as dk
from dlkernels.testing import assert_bitwise

backend = backend_fixture


@pytest.mark.parametrize("kind", [dk.optim.AdamW, dk.optim.SGDW])
def test_deleted_master_copies_are_made_anew(kind: type, backend: str) -> None:
    """And those of parameters that something else has written, too."""
    params = made(torch.bfloat16)
    optimizer = kind(params, lr=1e-3, weight_decay=0.0, master_weights=True)
    train(optimizer, params, range(2))
    with torch.no_grad():
        for p in params:
            p.fill_(8.0)
    for p in params[:2]:
        del optimizer.state[p]["master_param"]
    train(optimizer, params, range(2, 3))
    for i, p in enumerate(params):
        assert torch.all((p - 8).abs() < 0.1), i
        assert_bitwise(p.detach(), optimizer.state[p]["master_param"].bfloat16())


def test_a_step_of_its_own(backend: str) -> None:
    params = made()
    optimizer = dk.optim.AdamW(params)
    train(optimizer, params, range(3))
    shared = optimizer.state[params[0]]["step"]
    assert optimizer.state[params[1]]["step"] is shared
    optimizer.state[params[1]]["step"] = torch.zeros(())
    train(optimizer, params, range(3, 5))
    assert [float(optimizer.state[p]["step"]) for p in params] == [5.0, 2.0, 5.0, 5.0, 5.0]
