"""Checkpoints of the optimizers between devices, and torch.compile around a step.

All of these also run on the CPU, see _places.py.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from _helpers import BF16, F32, F64, same_bits
from _places import KINDS, LR, Training, flat, place_fixture

import dlkernels as dk
from dlkernels.testing import assert_within_budget

place = place_fixture
both = pytest.mark.parametrize("kind", KINDS)
CPU = torch.device("cpu")


# Checkpoints ----------------------------------------------------------------------------------------------------------


def saved(optimizer: torch.optim.Optimizer, map_location: Any = None) -> dict[str, Any]:
    """Its state_dict, from a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, map_location=map_location)


@both
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("map_location", [None, "cpu"])
def test_comes_back(kind: str, map_location: Any, capturable: bool, place: torch.device) -> None:
    """By way of the CPU or not: as if never saved, bit for bit."""
    options = {"lr": LR, "stochastic_rounding": True, "ema_decay": 0.75, "capturable": capturable}
    whole, first = (Training(KINDS[kind], place, dtype=BF16, **options) for _ in range(2))
    for step in range(4):
        whole.step(step), first.step(step)
    for state in first.optimizer.state_dict()["state"].values():
        assert state["step"].device == (place if capturable else CPU)
        assert state["ema"].device == place
    second = Training(KINDS[kind], place, dtype=BF16, **options)
    for p, q in zip(second.params, first.params, strict=True):
        p.data.copy_(q.data)
    second.optimizer.load_state_dict(saved(first.optimizer, map_location))
    for state in second.optimizer.state.values():
        assert {x.device for x in state.values()} == {place}
    for step in range(4, 8):
        whole.step(step), second.step(step)
    same_bits(second.everything(), whole.everything())


@pytest.mark.parametrize("map_location", [None, "cpu"])
@pytest.mark.parametrize("kinds", ["ours-ours", "ours-torchs", "torchs-ours"])
@pytest.mark.parametrize("back", [False, True], ids=["to-cpu", "from-cpu"])
def test_moves_between_devices(kinds: str, back: bool, map_location: Any, place: torch.device) -> None:
    """Five steps on one device, five on the other; torch's own on a GPU is the fused one, which counts there."""
    makes = {"ours": dk.optim.AdamW, "torchs": torch.optim.AdamW}
    devices = [CPU, place] if back else [place, CPU]

    def run(dtype: torch.dtype, *stations: tuple[Any, torch.device]) -> Training:
        last: Training | None = None
        for half, (make, device) in enumerate(stations):
            fused = {"fused": True} if make is torch.optim.AdamW and dtype == F32 else {}
            training = Training(make, device, dtype=dtype, values=F32, lr=LR, weight_decay=0.125, **fused)
            if last is not None:
                for p, q in zip(training.params, last.params, strict=True):
                    p.data.copy_(q.data)
                training.optimizer.load_state_dict(saved(last.optimizer, map_location))
            for step in range(5 * half, 5 * half + 5):
                training.step(step)
            last = training
        return last

    actual = run(F32, *((makes[name], device) for name, device in zip(kinds.split("-"), devices, strict=True)))
    exact = run(F64, *[(torch.optim.AdamW, CPU)] * 2)
    eager = run(F32, *((torch.optim.AdamW, device) for device in devices))
    assert actual.count() == {10.0}
    assert_within_budget(actual.flat(), exact.flat(), eager.flat(), what="theta")


# torch.compile --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.needs("compiler"))])
def test_compiled(kind: str, compiler: str, place: torch.device) -> None:
    """The step runs as it is, outside of the graph: bit for bit."""
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        training = Training(KINDS[kind], place, lr=torch.tensor(LR, device=place), max_grad_norm=2.0)

        def run(training: Training = training) -> None:
            training.optimizer.step()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own
            run = torch.compile(run, backend=compiler) if compiled else run
            for step in range(5):
                training.give(step)
                training.lr(LR * (1 + step % 3))
                run()
        results.append(training.everything())
    same_bits(*results)
    assert not torch.equal(flat(results[0]["params"]), Training(KINDS[kind], CPU, lr=LR).flat())
    torch._dynamo.reset()
