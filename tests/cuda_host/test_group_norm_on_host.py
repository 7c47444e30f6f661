"""GroupNorm in CUDA C++, on the host: every regime and machine, options, shapes, traffic, launches, barriers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlkernels.testing import assert_bitwise, assert_within_budget, relative_error
from dlkernels.triton import group_norm as triton

OPS = torch.ops.dlkernels_cuda_host
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = [lambda z: z, F.relu, F.leaky_relu, F.silu, F.gelu, partial(F.gelu, approximate="tanh")]
SILU = 3
NAMES = ("weight", "bias", "residual", "scale", "shift")
AFFINE, ALL = ("weight", "bias"), NAMES

# Machines with little shared memory and few multiprocessors: regimes of large tensors, at sizes for fibers. As
# Twin.machine has them; 4 multiprocessors, 16 KB for a block, room for two.
SMALL = (90, 4, 16 << 10, 32 << 10, 2048, 64 << 10)
SMALL_OLD = (75, 4, 16 << 10, 20 << 10, 1024, 64 << 10)

Shape = tuple[int, int, int]


class Case:
    """Inputs of both directions and what float64 and eager PyTorch make of them; in memory as `last` says."""

    def __init__(
        self, shape: Shape, groups: int, dtype: torch.dtype = torch.float32, present: tuple[str, ...] = ALL,
        activation: int = SILU, last: bool = False, parameters: torch.dtype | None = None, offset: int = 0,
        mean: float = 0.3,
    ) -> None:  # fmt: skip
        n, c, s = shape
        self.groups, self.activation, self.last = groups, activation, last
        torch.manual_seed(n * c * s)
        big = (n, s, c) if last else shape
        like = {"weight": (c,), "bias": (c,), "residual": big, "scale": (n, c), "shift": (n, c)}

        def draw(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.2) -> Tensor:
            flat = torch.randn(torch.Size(shape).numel() + offset) + mean
            return flat.to(dtype)[offset:].view(shape)

        self.x, self.dy = draw(big, dtype, mean), draw(big, dtype)
        self.tensors = {
            name: draw(like[name], dtype if name == "residual" else parameters or dtype) if name in present else None
            for name in NAMES
        }

    def options(self) -> tuple[Any, ...]:
        return self.groups, 1e-5, self.activation, self.last

    def forward(self, ops: Any = OPS) -> tuple[Tensor, Tensor, Tensor]:
        return ops.group_norm_fwd(self.x, *self.tensors.values(), *self.options())

    def backward(self, mean: Tensor, rstd: Tensor, ops: Any = OPS) -> tuple[Tensor, ...]:
        return ops.group_norm_bwd(self.dy, self.x, mean, rstd, *self.tensors.values(), *self.options())

    def run(self, ops: Any = OPS) -> dict[str, Tensor]:
        y, mean, rstd = self.forward(ops)
        grads = zip(("x", *NAMES), self.backward(mean, rstd, ops), strict=True)
        named = {f"d{name}": g for name, g in grads if name == "x" or self.tensors[name] is not None}
        return {"y": y, "mean": mean, "rstd": rstd, **named}

    def plain(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """By plain PyTorch, in this dtype or as the tensors are."""
        given = {"x": self.x, **self.tensors}
        leaves = {k: None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for k, t in given.items()}
        x, w, b, r, k, shift = leaves.values()
        y = F.group_norm(x.mT if self.last else x, self.groups, w, None if w is None else b)
        if w is None and b is not None:
            y = y + b[:, None]
        if k is not None:
            y = y * (1 + k[..., None])
        if shift is not None:
            y = y + shift[..., None]
        y = y.mT if self.last else y
        y = ACTIVATIONS[self.activation](y if r is None else y + r).to(x.dtype)
        y.backward(self.dy.to(y.dtype))
        return {"y": y.detach(), **{f"d{k}": t.grad for k, t in leaves.items() if t is not None}}

    def check(self) -> dict[str, Tensor]:
        found, exact, eager = self.run(), self.plain(torch.float64), self.plain()
        for name, value in exact.items():
            assert found[name].dtype == eager[name].dtype, name
            assert_within_budget(found[name], value, eager[name], what=name)
        x = (self.x.mT if self.last else self.x).double().reshape(self.x.shape[0], self.groups, -1)
        torch.testing.assert_close(found["mean"].double(), x.mean(2), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["rstd"].double(), (x.var(2, correction=0) + 1e-5).rsqrt(), rtol=1e-5, atol=0)
        return found


def set_machine(twin: Any, machine: Any) -> None:
    twin.machine(machine) if isinstance(machine, str) else twin.module.machine(*machine)


def planned(twin: Any) -> str:
    """How tiles were spread in the launches since the last call, those of parameters left out."""
    launches = [x for x in twin.launches() if x["shared"] != GRADS_SHARED]
    halves = [x["overlap"] for x in launches]
    if len(launches) > 1:
        assert halves == [False, True] * (len(launches) // 2)
        assert {x["cluster"] for x in launches} == {1}
        return f"split {len(launches) // 2}"
    (only,) = launches
    return f"cluster {only['cluster']}" if only["cluster"] > 1 else "block"


GRADS_SHARED = 2 * 16 * 32 * 4 + 4  # what the kernel of the parameters' gradients asks for

# (machine, shape, groups, plans of forward and backward, the same for channels_last). A split has so many batches.
REGIMES: list[tuple[Any, Shape, int, tuple[str, str], tuple[str, str]]] = [
    ("h200", (2, 8, 12), 4, ("block", "block"), ("block", "block")),
    ("a100", (2, 8, 12), 4, ("block", "block"), ("block", "block")),
    ("t4", (3, 8, 200), 2, ("block", "block"), ("block", "block")),
    ("h200", (1, 4, 4096), 2, ("cluster 2", "cluster 4"), ("cluster 4", "cluster 8")),
    (SMALL, (6, 6, 40), 6, ("block", "block"), ("block", "block")),
    (SMALL, (2, 4, 1024), 1, ("cluster 2", "cluster 4"), ("cluster 4", "split 2")),
    (SMALL, (3, 10, 512), 1, ("cluster 2", "split 3"), ("cluster 2", "split 3")),
    (SMALL, (4, 12, 1032), 1, ("cluster 4", "split 4"), ("split 4", "split 4")),
    (SMALL_OLD, (4, 6, 256), 1, ("block", "split 2"), ("block", "split 2")),
    (SMALL_OLD, (1, 4, 5000), 1, ("split 1", "split 1"), ("split 1", "split 1")),
    (SMALL_OLD, (5, 3, 2000), 1, ("split 5", "split 5"), ("split 5", "split 5")),
]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("machine", "shape", "groups", "first", "then"), REGIMES, ids=str)
def test_regimes(
    machine: Any, shape: Shape, groups: int, first: tuple[str, str], then: tuple[str, str], last: bool, twin: Any
) -> None:
    set_machine(twin, machine)
    case = Case(shape, groups, last=last)
    _, mean, rstd = case.forward()
    forward = planned(twin)
    case.backward(mean, rstd)
    assert (forward, planned(twin)) == (then if last else first)
    case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("cluster", [2, 4, 8, 16])
def test_clusters(cluster: int, last: bool, dtype: torch.dtype, twin: Any) -> None:
    """Every size: a block has room for 4.5 KB of the group if two are to fit, for 7 KB if one is; 16 is for what
    clusters of 8 have no room for."""
    tables = 256 * 16 // dtype.itemsize * 8 if last else 0
    twin.module.machine(90, 32, (8 << 10) + tables, (13 << 10) + 2 * tables, 2048, 1 << 20)
    c = 8 if last else 6
    case = Case((1, c, (4200 * cluster // (c * dtype.itemsize) + 7) // 8 * 8), 1, dtype, AFFINE, last=last)
    case.forward()
    assert planned(twin) == f"cluster {cluster}"
    case.check()


def test_clusters_that_the_device_does_not_run(twin: Any) -> None:
    """No cluster of 16 on 8 multiprocessors: split, as on machines without clusters."""
    twin.module.machine(90, 8, 8 << 10, 13 << 10, 2048, 1 << 20)
    case = Case((1, 6, 2800), 1)
    case.forward()
    assert planned(twin) == "split 1"
    case.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("present", [(), ("weight",), ("bias", "residual"), ("scale", "shift"), AFFINE, ALL], ids=str)
def test_options(present: tuple[str, ...], last: bool, dtype: torch.dtype, twin: Any) -> None:
    for activation in (0, SILU):
        Case((3, 6, 40), 3, dtype, present, activation, last).check()
    Case((3, 6, 40), 3, dtype, present, SILU, last, torch.float32).check()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", range(6))
def test_activations(activation: int, last: bool, twin: Any) -> None:
    Case((2, 6, 40), 2, torch.bfloat16, AFFINE, activation, last).check()
    Case((2, 6, 41), 2, torch.float32, ALL, activation, last).check()


SHAPES = [
    ((2, 6, 15), 3), ((1, 4, 7), 4), ((3, 34, 9), 17), ((2, 24, 1), 4), ((5, 33, 1), 11), ((2, 8, 31), 1),
    ((40, 8, 8), 8), ((300, 16, 2), 8), ((2, 64, 49), 4), ((1, 320, 16), 32), ((2, 40, 24), 2), ((1, 2050, 3), 1),
    ((9, 1, 33), 1), ((70, 3, 16), 3),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_shapes(shape: Shape, groups: int, last: bool, dtype: torch.dtype, twin: Any) -> None:
    """Ragged rows, one position, sub-warp teams, teams beyond the last group; also off the 16 bytes' boundaries."""
    for offset in (0, 1):
        Case(shape, groups, dtype, AFFINE if shape[0] % 2 else ALL, last=last, offset=offset).check()


@pytest.mark.parametrize("machine", [SMALL, SMALL_OLD], ids=["clusters", "split"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("shape", "groups"), [((1, 5, 2001), 1), ((2, 33, 130), 3), ((1, 8, 1030), 2)], ids=str)
def test_ragged_parts(shape: Shape, groups: int, last: bool, machine: Any, twin: Any) -> None:
    set_machine(twin, machine)
    for dtype, offset in ((torch.float32, 0), (torch.bfloat16, 1)):
        Case(shape, groups, dtype, last=last, offset=offset).check()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_many_samples(last: bool, twin: Any) -> None:
    """The samples of a channel are shared out to blocks; the last of them adds up what all found."""
    for present in (AFFINE, ALL):
        case = Case((513, 40, 2), 10, present=present, last=last)
        twin.launches()
        case.check()
        assert any(x["shared"] == GRADS_SHARED and x["grid"] > 2 for x in twin.launches())


def test_split_without_modulation(twin: Any) -> None:
    """The parts' sums of a channel are added up as samples are."""
    set_machine(twin, SMALL_OLD)
    for last in (False, True):
        Case((2, 3, 3000), 1, present=AFFINE, last=last).check()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("machine", "reads"), [("h200", 1), (SMALL, 1), (SMALL_OLD, 2)], ids=["block", "cluster", "split"]
)
@pytest.mark.parametrize("positions", [4096, 4093])
def test_traffic(positions: int, machine: Any, reads: int, last: bool, twin: Any) -> None:
    """One read of each tensor and one write; split, one more read of what the sums are made of."""
    set_machine(twin, machine)
    case = Case((2, 4, positions), 1, torch.bfloat16, last=last)
    r, size = case.tensors["residual"], case.x.nbytes
    with twin.traffic(x=case.x, r=r) as moved:
        _, mean, rstd = case.forward()
    assert [(moved[k].loaded, moved[k].stored) for k in "xr"] == [(reads * size, 0), (size, 0)]
    written = moved["all"].stored - size
    assert 0 <= written <= 0.05 * size + 64
    assert moved["all"].loaded <= (reads + 2) * size  # each thread's read of one number for all counts
    with twin.traffic(x=case.x, dy=case.dy, r=r) as moved:
        case.backward(mean, rstd)
    reads = 2 if any(x["op"] == "group_norm_bwd" and x["overlap"] and x["shared"] != GRADS_SHARED
                     for x in twin.launches()) else 1  # fmt: skip
    assert [moved[k].loaded for k in ("x", "dy", "r")] == [reads * size] * 3
    assert 2 * size <= moved["all"].stored <= 2.1 * size + 2000


def test_launches(twin: Any) -> None:
    """One forward, two backward, the second of them before the first has ended; one without parameters."""
    for last in (False, True):
        case = Case((2, 8, 16), 4, last=last)
        _, mean, rstd = case.forward()
        assert [x["overlap"] for x in twin.launches()] == [False]
        case.backward(mean, rstd)
        assert [x["overlap"] for x in twin.launches()] == [False, True]
        case = Case((2, 8, 16), 4, present=("residual",), last=last)
        _, mean, rstd = case.forward()
        twin.launches()
        case.backward(mean, rstd)
        assert len(twin.launches()) == 1
        case = Case((0, 8, 16), 4, last=last)
        assert [g.shape[0] for g in case.run().values()] == [0, 0, 0, 0, 8, 8, 0, 0, 0]
        assert not twin.launches()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("machine", ["h200", SMALL, SMALL_OLD], ids=["block", "cluster", "split"])
def test_same_bits_in_any_order_of_threads(machine: Any, last: bool, twin: Any) -> None:
    set_machine(twin, machine)
    case = Case((3, 6, 700), 2, last=last)
    twin.module.seed(0)
    first = case.run()
    for seed in (1, 2):
        twin.module.seed(seed)
        for name, value in case.run().items():
            assert_bitwise(value, first[name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_is_tritons(last: bool, dtype: torch.dtype, twin: Any) -> None:
    """The same numbers up to rounding, and the same shapes where nothing is given."""
    for present in (AFFINE, ALL, ()):
        case = Case((2, 6, 11), 3, dtype, present, last=last)
        theirs = case.run(triton)
        for name, value in case.run().items():
            assert value.dtype == theirs[name].dtype, name
            tolerance = 4 * torch.finfo(value.dtype).eps
            torch.testing.assert_close(value, theirs[name], rtol=tolerance, atol=4 * tolerance, msg=name)
        _, mean, rstd = case.forward()
        ours, its = case.backward(mean, rstd), case.backward(mean, rstd, triton)
        assert [(g.shape, g.dtype, g.stride()) for g in ours] == [(g.shape, g.dtype, g.stride()) for g in its]


def test_float64_is_tritons(twin: Any) -> None:
    twin.launches()
    Case((2, 6, 4), 3, torch.float64).run()
    assert not twin.launches()


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("machine", ["h200", SMALL, SMALL_OLD], ids=["block", "cluster", "split"])
def test_large_mean(machine: Any, last: bool, twin: Any) -> None:
    """mean = 10^4 std costs its digits and no more; a group of equal values has them as its mean, to the bit."""
    set_machine(twin, machine)
    case = Case((2, 4, 1000), 1, present=AFFINE, activation=0, last=last, mean=1e4)
    found, exact, eager = case.run(), case.plain(torch.float64), case.plain()
    for name, value in exact.items():
        error = relative_error(found[name], value)
        assert error <= 2 * relative_error(eager[name], value) + 1e4 * torch.finfo(torch.float32).eps, name
    case.x.fill_(0.1)
    y, mean, _ = case.forward()
    assert (mean == case.x.flatten()[0]).all()
    bias = case.tensors["bias"]
    assert_bitwise(y, (bias if last else bias[:, None]).expand(y.shape).contiguous())


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("machine", ["h200", SMALL_OLD], ids=["block", "split"])
def test_nothing_leaks_out_of_a_group(machine: Any, last: bool, twin: Any) -> None:
    set_machine(twin, machine)
    clean, dirty = (Case((2, 6, 600), 3, last=last) for _ in range(2))
    (dirty.x.mT if last else dirty.x)[1, 2, 5] = float("nan")
    before, after = clean.run(), dirty.run()
    for name in ("y", "dx"):
        a, b = ((r[name].mT if last else r[name]).reshape(2, 3, -1) for r in (before, after))
        assert b[1, 1].isnan().all()
        others = [0, 1, 2, 3, 5]
        assert_bitwise(b.view(6, -1)[others], a.view(6, -1)[others], name)
    assert_bitwise(after["dweight"][[0, 1, 4, 5]], before["dweight"][[0, 1, 4, 5]])


# Cases of which each barrier of the kernels is needed by one at least.
BARRIERS: list[tuple[Any, Shape, int, tuple[str, ...]]] = [
    (SMALL_OLD, (1, 4, 3000), 2, ALL),
    ("h200", (2, 6, 501), 2, ALL),
    ("h200", (513, 8, 2), 2, AFFINE),
    (SMALL, (2, 4, 1024), 1, ALL),
    ("h200", (2, 6, 19), 2, ALL),
]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_every_barrier_is_needed(last: bool, twin: Any) -> None:
    """Left out, it makes wrong numbers or an error; those of last_block, in cuda_reduce.h, are tested there."""
    unnoticed: set[str] = set()
    needed: set[str] = set()
    for machine, shape, groups, present in BARRIERS:
        set_machine(twin, machine)
        case = Case(shape, groups, present=present, last=last)
        exact, eager = case.plain(torch.float64), case.plain()
        twin.module.take_barriers()
        case.run()
        for barrier in twin.module.take_barriers():
            if barrier in needed or barrier.startswith("cuda_reduce"):
                continue
            twin.module.leave_out(barrier)
            try:
                for seed in range(3):
                    twin.module.seed(seed)
                    found = case.run()
                    for name, value in exact.items():
                        assert_within_budget(found[name], value, eager[name], what=name)
                unnoticed.add(barrier)
            except (AssertionError, RuntimeError):
                needed.add(barrier)
            finally:
                twin.module.leave_out("")
    assert sorted(unnoticed - needed) == []
    assert len(needed) >= 6
