"""Squeeze-and-excitation: CUDA C++ on the host, in every regime, against float64 and against Triton's launchers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlkernels.reference import squeeze_excite as reference
from dlkernels.reference._activation import ACTIVATIONS, GATES, activate, gate
from dlkernels.testing import assert_bitwise, assert_within_budget, unmodified
from dlkernels.triton import squeeze_excite as triton

ROOT = Path(__file__).resolve().parents[2]
OPS = torch.ops.dlkernels_cuda_host
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SILU = ACTIVATIONS["silu"]
HARD = GATES["hard_sigmoid"]
LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["first", "last"])


class Case(NamedTuple):
    """x and residual as (N, C, S) or, with `last`, (N, S, C); the operator's codes."""

    x: Tensor
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    residual: Tensor | None
    activation: int
    gate: int
    residual_activation: int
    last: bool


def make(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, given: str = "12", *, act: int = 1,
    gate: int = 0, after: int = 0, last: bool = False, seed: int = 0,
) -> Case:  # fmt: skip
    """`shape`: N, C, R (0: one layer), S. `given`: 1 = b1, 2 = b2, r = residual. Weights in float32 beside float16."""
    torch.manual_seed(seed)
    n, c, r, s = shape
    own = torch.float32 if dtype == torch.float16 else dtype
    dims = (n, s, c) if last else (n, c, s)
    x = torch.randn(dims) + torch.randn((n, 1, c) if last else (n, c, 1))

    def layer(out: int, inputs: int) -> Tensor:
        return (torch.randn(out, inputs) * 1.2 / inputs**0.5).to(own)

    return Case(
        x.to(dtype),
        layer(r, c) if r else None,
        (0.4 + torch.randn(r)).to(own) if r and "1" in given else None,
        layer(c, r or c),
        (0.2 + torch.randn(c)).to(own) if "2" in given else None,
        torch.randn(dims).to(dtype) if "r" in given else None,
        act, gate, after, last,
    )  # fmt: skip


def exact(case: Case, *tensors: Tensor | None) -> Tensor:
    x, *weights, residual = tensors
    if case.last:
        x, residual = x.mT, None if residual is None else residual.mT
    y = reference.squeeze_excite(x, *weights, residual, *case[6:9])
    return y.mT if case.last else y


def eager(case: Case, *tensors: Tensor | None) -> Tensor:
    """As PyTorch code writes it, every step in the dtype of x."""
    x, w1, b1, w2, b2, residual = (None if t is None else t.to(tensors[0].dtype) for t in tensors)
    positions = 1 if case.last else 2
    z = x.mean(positions)
    if w1 is not None:
        z = activate(F.linear(z, w1, b1), case.activation)
    y = x * gate(F.linear(z, w2, b2), case.gate).unsqueeze(positions)
    return y if residual is None else activate(y + residual, case.residual_activation)


def gradients(function: Callable[..., Tensor], case: Case, dy: Tensor, dtype: torch.dtype | None) -> list[Any]:
    """Output and gradients of the six tensors, computed in `dtype` (None: each in its own)."""
    leaves = [None if t is None else (t if dtype is None else t.to(dtype)).detach().requires_grad_() for t in case[:6]]
    y = function(case, *leaves)
    grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy.to(y.dtype)))
    return [y.detach(), *(None if t is None else next(grads) for t in leaves)]


def saved(case: Case, dtype: torch.dtype) -> list[Tensor]:
    x, w1, b1, w2, b2 = (None if t is None else t.to(dtype) for t in case[:5])
    z = mean = x.mean(1 if case.last else 2)
    hidden = z.new_empty(z.shape[0], 0)
    if w1 is not None:
        hidden = F.linear(z, w1, b1)
        z = activate(hidden, case.activation)
    return [mean, hidden, gate(F.linear(z, w2, b2), case.gate)]


NAMES = ("y", "dx", "dw1", "db1", "dw2", "db2", "dresidual")


def run(case: Case, dy: Tensor, of: Any = OPS) -> tuple[list[Tensor], list[Tensor]]:
    """(y and the six gradients, mean and hidden and gate)."""
    y, *kept = of.squeeze_excite_fwd(*case)
    return [y, *of.squeeze_excite_bwd(dy, case.x, *kept, *case[1:])], kept


def outputs(case: Case, of: Any = OPS) -> list[Tensor]:
    found, kept = run(case, upstream(case), of)
    return [*found, *kept]


def upstream(case: Case) -> Tensor:
    return torch.randn(case.x.shape, generator=torch.Generator().manual_seed(7)).to(case.x.dtype)


def check(case: Case, dy: Tensor | None = None, of: Any = OPS) -> list[Tensor]:
    """Both operators against float64. Gives back all results."""
    dy = upstream(case) if dy is None else dy
    with unmodified(*case[:6], dy):
        found, kept = run(case, dy, of)
    right, theirs = gradients(exact, case, dy, torch.float64), gradients(eager, case, dy, None)
    for name, given, ours, e, b in zip(NAMES, (case.x, *case[:6]), found, right, theirs, strict=True):
        if given is None:
            assert ours.shape == (0,), name
            continue
        assert ours.dtype == given.dtype and ours.is_contiguous(), name
        assert_within_budget(ours, e, b, what=name)
    for name, ours, e, b in zip(
        ("mean", "hidden", "gate"), kept, saved(case, torch.float64), saved(case, torch.float32), strict=True
    ):
        assert ours.dtype == torch.float32, name
        assert_within_budget(ours, e, b, what=name)
    return [*found, *kept]


# Machines that bring a regime out at sizes that fibers can do: arch, multiprocessors, bytes of shared memory, L2.
def machine(twin: Any, arch: int, shared: int, l2: int = 50 << 20, multiprocessors: int = 16) -> None:
    twin.module.machine(arch, multiprocessors, shared, 2 * shared + 2048, 2048, l2)


# Clusters -------------------------------------------------------------------------------------------------------------


def with_clusters(twin: Any, size: int, call: Callable[[], Any]) -> Any:
    """The call's result on a machine whose shared memory asks for clusters of this size."""
    low, high = 512, 32 << 10
    while low + 32 < high:
        shared = (low + high) // 2
        machine(twin, 90, shared)
        twin.launches()
        try:
            now = call()
            first, *more = twin.launches()
            clusters = 32 if more else first["cluster"]
        except RuntimeError as error:  # a machine of less than what sweeps want
            assert "bytes of shared memory" in str(error)
            clusters = 32
        low, high = (low, shared) if clusters < size else (shared, high)
        if clusters == size:
            return now
    raise AssertionError(f"no machine asks for clusters of {size}")


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_clusters(size: int, dtype: torch.dtype, last: bool, twin: Any) -> None:
    """Two layers and one, with an activation behind the residual and without."""

    class Ops:
        @staticmethod
        def squeeze_excite_fwd(*args: Any) -> Any:
            return with_clusters(twin, size, lambda: OPS.squeeze_excite_fwd(*args))

        @staticmethod
        def squeeze_excite_bwd(*args: Any) -> Any:
            return with_clusters(twin, size, lambda: OPS.squeeze_excite_bwd(*args))

    for given, r, after in (("12r", 3, SILU), ("2", 3, 0), ("2", 0, 0)):
        check(make((1, 32, r, 100), dtype, given, after=after, last=last), of=Ops)


def test_no_cluster_of_16(twin: Any) -> None:
    """A device that cannot run one walks."""
    case = make((1, 16, 2, 1024))
    machine(twin, 90, 8 << 10)
    OPS.squeeze_excite_fwd(*case)
    assert [launch["cluster"] for launch in twin.launches()] == [16]
    machine(twin, 90, 8 << 10, multiprocessors=15)
    check(case)
    assert [launch["cluster"] for launch in twin.launches()] == [1] * 4


# Two sweeps -----------------------------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(3, 4, 2, 2100), (2, 5, 3, 1999), (3, 40, 2, 132), (1, 1, 1, 9000), (2, 300, 3, 24), (1, 2, 0, 4100)],
    ids=str,
)
def test_walk(shape: tuple[int, ...], dtype: torch.dtype, last: bool, twin: Any) -> None:
    """Long rows and many, in packs, across packs and one by one; several batches."""
    machine(twin, 80, 8 << 10, 40 << 10)
    after = random.Random(str(shape)).choice((0, SILU))
    check(make(shape, dtype, "12r" if after else "2", act=SILU, after=after, last=last))
    launches = twin.launches()
    assert len(launches) >= 4 and len(launches) % 2 == 0 and {x["cluster"] for x in launches} == {1}


def test_batches(twin: Any) -> None:
    """As many samples as half of L2 holds: 3 of 16 KB forward, 1 of twice 16 KB backward."""
    case = make((7, 4, 1, 1024))
    machine(twin, 80, 8 << 10, 96 << 10)
    y, *kept = OPS.squeeze_excite_fwd(*case)
    grids = [x["grid"] for x in twin.launches()]
    assert len(grids) == 6 and grids[::2] == [3 * grids[4], 3 * grids[4], grids[4]]
    OPS.squeeze_excite_bwd(y, case.x, *kept, *case[1:])
    assert len(twin.launches()) == 14


# Matrix products ------------------------------------------------------------------------------------------------------


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 20, 9, 5), (2, 12, 0, 7), (5, 33, 8, 1), (2, 64, 200, 70), (3, 8, 40, 49)], ids=str
)
def test_matmul(shape: tuple[int, ...], dtype: torch.dtype, last: bool, twin: Any) -> None:
    """Weights larger than samples."""
    machine(twin, 90, 64 << 10, 1 << 10)
    for after in (0, SILU):
        check(make(shape, dtype, "12r" if after else "1", act=SILU, gate=HARD, after=after, last=last))
        points = 3 if shape[2] else 1
        assert len(twin.launches()) == 2 + (points + 1) // 2 + 2 + points, "no sum needs another launch"


# Options, layouts, edges ----------------------------------------------------------------------------------------------

# A machine for each regime, at the shape of small().
REGIMES = {"cluster": (90, 64 << 10, 50 << 20), "walk": (80, 2816, 8 << 10), "matmul": (90, 64 << 10, 64)}
regimes = pytest.mark.parametrize("regime", REGIMES)


def small(regime: str, **how: Any) -> Case:
    return make((2, 16, 24 if regime == "matmul" else 3, 92), **how)


def enter(twin: Any, regime: str) -> None:
    """On its machine, for both passes."""
    machine(twin, *REGIMES[regime])
    twin.launches()
    run(small(regime), torch.ones(2, 16, 92))
    launches = twin.launches()
    assert len(launches) == {"cluster": 2, "walk": 8, "matmul": 9}[regime], len(launches)


@regimes
def test_hidden_activations_and_gates(regime: str, twin: Any) -> None:
    enter(twin, regime)
    for act, gate_code in itertools.product((1, 2, 3, 4), GATES.values()):
        check(small(regime, given="12", act=act, gate=gate_code, last=act % 2 == 0))


@regimes
@pytest.mark.parametrize("after", ACTIVATIONS.values())
def test_residual_activations(after: int, regime: str, twin: Any) -> None:
    enter(twin, regime)
    for dtype, last in itertools.product(DTYPES, (False, True)):
        check(small(regime, dtype=dtype, given="12r", after=after, last=last))


@regimes
def test_every_option_alone_and_left_out(regime: str, twin: Any) -> None:
    enter(twin, regime)
    for given in ("", "1", "2", "r", "1r", "2r"):
        check(small(regime, given=given))


@regimes
@pytest.mark.parametrize("half", DTYPES[1:], ids=str)
def test_weights_of_different_dtypes(half: torch.dtype, regime: str, twin: Any) -> None:
    enter(twin, regime)
    case = small(regime, dtype=half)
    for single in itertools.chain.from_iterable(itertools.combinations(range(1, 5), k) for k in (1, 2, 3)):
        check(Case(*(t.to(torch.float32 if i in single else half) if 0 < i < 5 else t for i, t in enumerate(case))))


@regimes
@LAYOUTS
def test_every_remainder(last: bool, regime: str, twin: Any) -> None:
    """Channels, hidden units and positions around the widths of packs and warps, in float16."""
    machine(twin, *REGIMES[regime])
    sizes = [(c, 3, 4) for c in (1, 7, 8, 9, 31, 33, 65)] + [(4, r, 6) for r in (1, 5, 32, 33)]
    for c, r, s in sizes + [(2, 1, s) for s in (1, 2, 7, 8, 31, 64, 67)]:
        s += 1450 // c if regime == "walk" else 0  # too large for shared memory
        check(make((2, c, r, s), torch.float16, "12r", after=SILU, last=last))


@regimes
@LAYOUTS
def test_unaligned(last: bool, regime: str, twin: Any) -> None:
    """Every tensor in turn begins in the middle of a pack."""
    enter(twin, regime)
    case = small(regime, given="12r", dtype=torch.bfloat16, after=SILU, last=last)
    dy = upstream(case)
    expected, _ = run(case, dy)
    for i in (*(i for i in range(6)), 6):
        t = dy if i == 6 else case[i]
        moved = t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t)
        found, _ = run(case if i == 6 else Case(*case[:i], moved, *case[i + 1 :]), moved if i == 6 else dy)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1.6e-2, atol=1e-2)
    _, *kept = OPS.squeeze_excite_fwd(*case)
    moved = [t.new_zeros(t.numel() + 1)[1:].view(t.shape).copy_(t) for t in kept]
    for a, b in zip(OPS.squeeze_excite_bwd(dy, case.x, *moved, *case[1:]), expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1.6e-2, atol=1e-2)


@regimes
def test_strides(regime: str, twin: Any) -> None:
    """Expanded, transposed and strided inputs."""
    enter(twin, regime)
    case = small(regime, given="12r", after=SILU)
    for dy in (torch.tensor(-1.7).expand(2, 16, 92), torch.randn(2, 92, 16).mT, torch.randn(16, 1).expand(2, 16, 92)):
        check(case, dy=dy)
    strided = [torch.stack([t, t], -1)[..., 0] for t in case[:6]]
    for a, b in zip(outputs(Case(*strided, *case[6:])), outputs(case), strict=True):
        assert_bitwise(a, b)


@regimes
def test_nothing_leaks_out_of_a_sample(regime: str, twin: Any) -> None:
    enter(twin, regime)
    case = small(regime)
    clean, _ = run(case, upstream(case))
    case.x[0, 3, 5] = torch.nan
    y, dx, *_ = run(case, upstream(case))[0]
    assert y[0].isnan().any() and dx[0].isnan().any()
    assert_bitwise(y[1], clean[0][1])
    assert_bitwise(dx[1], clean[1][1])


@pytest.mark.parametrize("r", [2, 0])
def test_empty_batch(r: int, twin: Any) -> None:
    case = make((0, 5, r, 9), given="12r", after=1)
    y, *kept = OPS.squeeze_excite_fwd(*case)
    assert y.shape == (0, 5, 9) and [tuple(t.shape) for t in kept] == [(0, 5), (0, r), (0, 5)]
    for given, grad in zip(case[:6], OPS.squeeze_excite_bwd(y, case.x, *kept, *case[1:]), strict=True):
        assert grad.shape == ((0,) if given is None else given.shape)
        assert torch.equal(grad, torch.zeros_like(grad))
    assert not twin.launches()


@regimes
def test_means_beyond_float16(regime: str, twin: Any) -> None:
    """Sums that float16 cannot hold."""
    enter(twin, regime)
    case = small(regime, dtype=torch.float16)
    check(case._replace(x=case.x + 6000, w1=case.w1 / 6000))


def test_convolutions_weights(twin: Any) -> None:
    """Ones behind the two dimensions; the gradient has them too."""
    for regime in REGIMES:
        enter(twin, regime)
        case = small(regime)
        found = outputs(case._replace(w1=case.w1[..., None, None], w2=case.w2[..., None, None]))
        for a, b in zip(found, outputs(case), strict=True):
            assert_bitwise(a.squeeze(-1).squeeze(-1) if a.dim() == 4 else a, b)


# What is promised -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["h200", "a100", "t4"])
@pytest.mark.parametrize("shape", [(2, 24, 6, 49), (1, 8, 2, 3136), (3, 96, 4, 1), (2, 18, 2, 81)], ids=str)
def test_machines(name: str, shape: tuple[int, ...], twin: Any) -> None:
    """Small samples are one launch everywhere."""
    twin.machine(name)
    check(make(shape, torch.bfloat16, "12r", after=SILU))
    assert len(twin.launches()) == 2


@pytest.mark.parametrize("name", ["h200", "a100", "t4"])
def test_regimes_of_machines(name: str, twin: Any) -> None:
    """A sample of 240 KB: a cluster, else two sweeps; one of much weight and many samples: matrix products."""
    twin.machine(name)
    x = make((1, 8, 1, 7680))
    OPS.squeeze_excite_fwd(*x)
    launches = twin.launches()
    assert [s["cluster"] for s in launches] == ([8] if name == "h200" else [1, 1])
    OPS.squeeze_excite_fwd(*make((60, 128, 128, 1)))
    assert len(twin.launches()) == 4


@regimes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_tritons(dtype: torch.dtype, regime: str, twin: Any) -> None:
    """The same numbers from Triton's launchers."""
    enter(twin, regime)
    eps = torch.finfo(dtype).eps
    for last in (False, True):
        case = small(regime, dtype=dtype, given="12r", act=SILU, gate=HARD, after=SILU, last=last)
        for a, b in zip(outputs(case), outputs(case, triton), strict=True):
            assert a.dtype == b.dtype and a.stride() == b.stride()
            torch.testing.assert_close(a, b, rtol=4 * max(eps, 1e-5), atol=4 * max(eps, 1e-5))


@regimes
@LAYOUTS
def test_reproducible(last: bool, regime: str, twin: Any) -> None:
    """The same bits whatever the order of threads and blocks."""
    enter(twin, regime)
    case = small(regime, given="12r", after=SILU, last=last, dtype=torch.bfloat16)
    expected = outputs(case)
    for seed in range(3):
        twin.module.seed(seed)
        for a, b in zip(outputs(case), expected, strict=True):
            assert_bitwise(a, b)


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("regime", ["cluster", "walk"])
@pytest.mark.parametrize("after", [0, SILU])
def test_traffic(after: int, regime: str, dtype: torch.dtype, last: bool, twin: Any) -> None:
    """x, dy and the residual are read once, y and dx written once; the scale of two sweeps reads x or dz again."""
    machine(twin, *REGIMES[regime])
    case = make((2, 8, 1, 360), dtype, "r", after=after, last=last)
    dy, again = upstream(case), case.x.nbytes if regime == "walk" else 0
    with twin.traffic(x=case.x, residual=case.residual) as moved:
        _, *kept = OPS.squeeze_excite_fwd(*case)
    bytes_ = case.x.nbytes
    assert (moved["x"].loaded, moved["x"].again) == (bytes_ + again, again)
    assert (moved["residual"].loaded, moved["residual"].again) == (bytes_, 0)
    small = 4 * 2 * 9 * 8 + bytes_ // 12  # numbers per channel, sums of chunks
    assert bytes_ < moved["all"].stored <= bytes_ + small
    with twin.traffic(x=case.x, residual=case.residual, dy=dy) as moved:
        OPS.squeeze_excite_bwd(dy, case.x, *kept, *case[1:5], case.residual if after else None, *case[6:])
    assert (moved["x"].loaded, moved["x"].again) == (bytes_, 0)
    assert moved["residual"].loaded == (bytes_ if after else 0)
    assert moved["dy"].loaded == bytes_ + (0 if after else again)
    assert moved["all"].stored <= bytes_ * (2 if after else 1) + small


# Of the walk: threads of one block write before the block counts. Blocks run one after another here, so that the last
# one finds everything in any case.
UNSEEN = {"cluster": set(), "walk": {"cuda_reduce.h:last_block"}}


@pytest.mark.parametrize("regime", UNSEEN)
def test_every_barrier_is_needed(regime: str, twin: Any) -> None:
    """By one of a few shapes at least: rows that are no multiple of the groups of threads, one block and several."""
    clusters = (90, 4 << 10, 50 << 20)
    cases = {
        "cluster": [
            (clusters, make((2, 64, 5, 68), act=SILU)),
            (clusters, make((2, 64, 5, 68), given="12r", after=SILU, last=True)),
            (clusters, make((1, 64, 0, 68), last=True)),
            (REGIMES["cluster"], make((2, 30, 5, 92), torch.bfloat16, "12r", after=SILU)),
            (REGIMES["cluster"], make((2, 16, 0, 92), last=True)),
        ],
        "walk": [
            (REGIMES["walk"], make((2, 16, 5, 92))),
            (REGIMES["walk"], make((2, 16, 0, 92), torch.bfloat16, "12r", after=SILU, last=True)),
        ],
    }[regime]
    unnoticed = []
    for on, case in cases:
        machine(twin, *on)
        expected = outputs(case)

        def same(case: Case = case, expected: list[Tensor] = expected) -> None:
            for a, b in zip(outputs(case), expected, strict=True):
                assert_bitwise(a, b)

        passed = set(barriers(twin, same))
        unnoticed.append((passed, set(twin.unnoticed_barriers(same))))
    seen = set.union(*(passed - found for passed, found in unnoticed))
    left = set.union(*(passed for passed, _ in unnoticed)) - seen
    assert {named(barrier) for barrier in left} == UNSEEN[regime]


def barriers(twin: Any, check: Callable[[], None]) -> list[str]:
    twin.module.take_barriers()
    check()
    return twin.module.take_barriers()


def named(barrier: str) -> str:
    """The first barrier of last_block by name: its line may move."""
    file, _, line = barrier.partition(":")
    if file != "cuda_reduce.h":
        return barrier
    text = (ROOT / "csrc" / "common" / file).read_text().splitlines()
    first = 1 + next(i for i, t in enumerate(text) if "__syncthreads" in t and "last_block" in text[i - 1])
    return f"{file}:last_block" if int(line) == first else barrier
