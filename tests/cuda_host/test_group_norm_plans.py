"""How GroupNorm is spread over a GPU, for tensors of real size: csrc/cuda/group_norm_plan.h alone, compiled here."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from _machines import MACHINES

HERE = Path(__file__).parent
FIELDS = [
    "served",
    "split",
    "cluster",
    "team",
    "teams",
    "tile_groups",
    "tiles",
    "channel_parts",
    "position_parts",
    "channels",
    "positions",
    "batch",
    "lanes",
    "chunks",
    "chunk",
    "shared",
]
Planner = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Planner:
    """plans(machine, [(n, c, s, groups, itemsize, backward, channels_last)]), packs where the rows allow them."""
    program = tmp_path_factory.mktemp("plans") / "plans"
    compiler = os.environ.get("CXX", "c++").split()
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    source = HERE / "group_norm_plans.cpp"
    subprocess.run([*compiler, "-std=c++17", "-O1", str(source), "-o", str(program)], check=True, env=environment)

    def ask(machine: tuple[int, ...], shapes: list[tuple[Any, ...]], most: int = 16) -> list[dict[str, Any]]:
        lines = [machine]
        for n, c, s, groups, itemsize, backward, last in shapes:
            packs = (c if last else s) % (16 // itemsize) == 0
            lines.append((n, c, s, groups, itemsize, 1 + backward, int(backward), int(last), int(packs), most))
        text = "\n".join(" ".join(map(str, line)) for line in lines)
        out = subprocess.run([program], input=text, capture_output=True, text=True, check=True, env=environment)
        return [dict(zip(FIELDS, map(int, line.split()), strict=True)) for line in out.stdout.splitlines()]

    return ask


def regime(plan: dict[str, Any]) -> str:
    if plan["split"]:
        return "split"
    return f"cluster {plan['cluster']}" if plan["cluster"] > 1 else "teams" if plan["teams"] > 1 else "block"


# (n, c, s, groups) of bfloat16, and the regimes forward: H200 and A100, contiguous and channels_last.
KNOWN = [
    ((1024, 32, 16, 8), ("teams", "teams"), ("teams", "teams")),
    ((32, 2048, 49, 32), ("block", "block"), ("block", "block")),
    ((32, 256, 56 * 56, 32), ("block", "cluster 4"), ("block", "split")),
    ((8, 320, 64 * 64, 32), ("block", "cluster 8"), ("block", "split")),
    ((1, 320, 64 * 64, 32), ("cluster 4", "cluster 8"), ("split", "split")),
    ((2, 1280, 16 * 16, 32), ("block", "cluster 2"), ("block", "block")),
    ((1, 128, 512 * 512, 32), ("cluster 16", "split"), ("split", "split")),
    ((1, 128, 20 * 256 * 256, 32), ("split", "split"), ("split", "split")),
]


@pytest.mark.parametrize(("shape", "h200", "a100"), KNOWN, ids=str)
def test_known_shapes(shape: tuple[int, ...], h200: tuple[str, str], a100: tuple[str, str], plans: Planner) -> None:
    both = [(*shape, 2, False, last) for last in (False, True)]
    assert tuple(map(regime, plans(MACHINES["h200"], both))) == h200
    assert tuple(map(regime, plans(MACHINES["a100"], both))) == a100


@pytest.mark.parametrize("name", MACHINES)
def test_plans_can_be_launched(name: str, plans: Planner) -> None:
    """Whatever the shape: blocks that a device takes, parts that cover the tile, batches that stay in L2."""
    machine = MACHINES[name]
    arch, _, shared_per_block, _, _, l2 = machine
    draw = random.Random(name)
    shapes = []
    for _ in range(3000):
        groups = draw.choice([1, 2, 3, 8, 32, 64])
        d, s = draw.choice([1, 2, 3, 4, 10, 16, 40, 64]), int(10 ** draw.uniform(0, 6))
        n = max(1, int(10 ** draw.uniform(0, 4)) // (1 + s * d * groups // 10**6))
        shapes.append((n, groups * d, s, groups, draw.choice([2, 4]), draw.random() < 0.5, draw.random() < 0.5))
    for shape, plan in zip(shapes, plans(machine, shapes), strict=True):
        n, c, s, groups, itemsize, backward, last = shape
        said = f"{shape}: {plan}"
        assert plan["served"], said
        assert plan["shared"] <= shared_per_block, said
        assert plan["cluster"] in ((1, 2, 4, 8, 16) if arch >= 90 else (1,)), said
        block = plan["team"] * plan["teams"]
        assert block % 32 == 0 and block <= (256 if backward or last else 512), said
        assert plan["team"] & (plan["team"] - 1) == 0, said
        assert plan["tiles"] == n * -(-groups // plan["tile_groups"]), said
        width = plan["tile_groups"] * c // groups
        assert plan["channel_parts"] * plan["channels"] >= width or last, said
        assert plan["position_parts"] * plan["positions"] >= s, said
        parts = plan["channel_parts"] * plan["position_parts"]
        assert plan["cluster"] in (1, parts) and (plan["split"] or parts == plan["cluster"]), said
        if plan["split"]:
            assert (plan["channel_parts"] - 1) * plan["channels"] < width, said
            assert (plan["position_parts"] - 1) * plan["positions"] < s, said
            bytes_of_tile = width * s * itemsize * (1 + backward)
            assert plan["batch"] == 1 or plan["batch"] * bytes_of_tile <= 0.6 * l2, said
        else:
            assert plan["batch"] == plan["tiles"], said


def test_few_tiles_fill_the_machine(plans: Planner) -> None:
    """A batch of one: clusters, so that three multiprocessors in four have work."""
    (plan,) = plans(MACHINES["h200"], [(1, 512, 4096, 32, 2, False, False)])
    assert plan["tiles"] * plan["cluster"] * 4 >= 132 * 3
    assert regime(plans(MACHINES["h200"], [(1, 128, 512 * 512, 32, 2, False, False)], most=8)[0]) == "split"


def test_long_rows_are_left_to_triton(plans: Planner) -> None:
    """channels_last needs room for a row of a group."""
    assert not plans(MACHINES["t4"], [(1, 100_000, 5, 1, 4, True, True)])[0]["served"]
    assert plans(MACHINES["t4"], [(1, 100_000, 5, 1, 4, True, False)])[0]["served"]
