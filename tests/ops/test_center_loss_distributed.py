"""Centers on several processes: replicas over a group, and shards by class over a mesh (gloo, localhost).

Four processes are started once and run every check below, on each backend.
Each rank holds the whole problem too, so that it compares with what one process makes of the rows of all.
"""

from __future__ import annotations

import contextlib
import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dlkernels as dk
from dlkernels.testing import assert_bitwise

WORLD = 4
D = 6
CHECKS: dict[str, Callable[[], None]] = {}

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available() and hasattr(os, "fork")),
    reason="this torch has no torch.distributed with gloo, or this system no fork",
)


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


# The problem ----------------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    x: Tensor
    y: Tensor
    a: Tensor


SIZES = {2: (4, 3), 4: (5, 0, 3, 8)}  # rows of each rank: uneven, one rank without any


def parts(k: int, world: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Part]:
    """Every rank's rows, the same on every rank. Class 1 is absent; rows are ignored, and one label is negative."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for n in SIZES[world]:
        y = torch.randint(0, k, (n,), generator=g)
        y[y == 1] = 0
        y[2::4] = -100
        y[3:4] = -1
        x, a = (torch.randn(n, D, generator=g, dtype=torch.float64) for _ in range(2))
        found.append(Part((1.5 * x + 0.2).to(dtype), y, torch.sigmoid(a).to(dtype)))
    return found


def joined(all_parts: list[Part]) -> Part:
    return Part(*(torch.cat(group) for group in zip(*all_parts, strict=True)))


def centers_of(k: int, dtype: torch.dtype = torch.float64) -> Tensor:
    g = torch.Generator().manual_seed(99)
    return (torch.randn(k, D, generator=g, dtype=torch.float64) + 0.3).to(dtype)


RULES: dict[str, dict[str, Any]] = {
    "alpha": {},
    "ema": {"ema": True},
    "island": {"island_weight": 0.7},
    "attention": {"attention": True},
    "logits": {"attention": True, "attention_logits": True, "island_weight": 0.2, "ema": True},
}
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def update(centers: Tensor, part: Part, attention: bool = False, **options: Any) -> Tensor:
    return dk.update_centers_(centers, part.x, part.y, 0.4, attention=part.a if attention else None, **options)


def close(actual: Tensor, expected: Tensor, what: str, scale: float = 1.0) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    error = (actual.double() - expected.double()).norm().item()
    assert error <= scale * TOLERANCE[actual.dtype] * expected.double().norm().item() + 1e-300, (
        f"{what}: off by {error}"
    )


def equal_on_all_ranks(t: Tensor, group: Any) -> None:
    found = [torch.empty_like(t) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, t.detach().contiguous(), group=group)
    for other in found:
        assert_bitwise(other, found[0], "replicas")


PAIR: Any = None  # the group of ranks 0 and 1
MESHES: dict[int, Any] = {}


def worlds() -> Iterator[tuple[int, Any, int]]:
    """(size, group, this rank in it) of the groups that this rank belongs to: the pair, then all."""
    if dist.get_rank() < 2:
        yield 2, PAIR, dist.get_rank()
    yield WORLD, dist.group.WORLD, dist.get_rank()


def sharded(centers: Tensor, world: int, grad: bool = False) -> Tensor:
    from torch.distributed.tensor import Shard, distribute_tensor

    shards = distribute_tensor(centers.clone(), MESHES[world], [Shard(0)])
    return nn.Parameter(shards) if grad else shards


def whole(shards: Tensor) -> Tensor:
    return shards.detach().full_tensor()


@contextlib.contextmanager
def gathering(on: bool) -> Iterator[None]:
    """Replicas gather rows in place of summing classes, also for few classes."""
    from dlkernels.ops import _distributed_centers

    with mock.patch.object(_distributed_centers, "SMALL", 0 if on else 1 << 21):
        yield


# Replicas -------------------------------------------------------------------------------------------------------------


@check
def replicas_move_as_one_process_does() -> None:
    """Both ways, every rule, several steps: the rows of all ranks count, and replicas stay equal to the bit."""
    for world, group, rank in worlds():
        for gather, k in ((False, 5), (True, 40)):
            for name, options in RULES.items():
                for dtype in (torch.float64,) if name != "alpha" else TOLERANCE:
                    ours, one = centers_of(k, dtype), centers_of(k, dtype)
                    with gathering(gather):
                        for step in range(3):
                            every = parts(k, world, dtype, step)
                            update(ours, every[rank], process_group=group, **options)
                            update(one, joined(every), **options)
                    close(ours, one, f"{name}, {k} classes, {world} ranks, {dtype}, gather={gather}", 4.0)
                    equal_on_all_ranks(ours, group)


@check
def dividing_before_the_sum_is_noticed() -> None:
    every = parts(5, WORLD)
    expected = update(centers_of(5), joined(every))
    mine = update(centers_of(5), every[dist.get_rank()]) - centers_of(5)
    dist.all_reduce(mine)
    for moved in (centers_of(5) + mine, centers_of(5) + mine / WORLD):
        with pytest.raises(AssertionError, match="off by"):
            close(moved, expected, "divided, then summed", 1e6)


@check
def many_classes_send_rows_only() -> None:
    """More classes than rows: what goes round is the size of the batch, in three messages."""
    sent: list[int] = []
    from dlkernels.ops import _distributed_centers as module

    gather, reduce = module._all_gather, dist.all_reduce
    record = mock.Mock(side_effect=lambda out, x, group: (sent.append(out.numel()), gather(out, x, group=group)))
    summed = mock.Mock(side_effect=lambda x, group: (sent.append(x.numel()), reduce(x, group=group)))
    every = parts(4000, WORLD, torch.float32)
    c = centers_of(4000, torch.float32)
    with (
        gathering(True),
        mock.patch.object(module, "_all_gather", record),
        mock.patch.object(dist, "all_reduce", summed),
    ):
        update(c, every[dist.get_rank()], process_group=dist.group.WORLD)
    assert max(sent) <= WORLD * max(SIZES[WORLD]) * D and len(sent) == 3, sent
    equal_on_all_ranks(c[joined(every).y.clamp(min=0)], dist.group.WORLD)


@check
def a_wrong_label_raises_on_every_rank() -> None:
    """And nothing has changed, and the ranks are still together."""
    k, rank = 5, dist.get_rank()
    every = parts(k, WORLD)
    every[2].y[0] = k
    b = every[rank]

    def refused(run: Callable[[], Any], *, rank_named: bool) -> None:
        with pytest.raises(IndexError, match="rank 2" if rank_named else "this rank" if rank == 2 else "another rank"):
            run()

    for gather in (False, True):
        c = centers_of(k)
        with gathering(gather):
            refused(lambda c=c: update(c, b, process_group=dist.group.WORLD), rank_named=gather)
        assert_bitwise(c, centers_of(k), "centers after an error")
    shards = sharded(centers_of(k), WORLD)
    refused(lambda: update(shards, b), rank_named=True)
    refused(lambda: dk.center_loss(b.x, b.y, shards), rank_named=True)
    assert_bitwise(whole(shards), centers_of(k), "shards after an error")


@check
def replicas_in_modules() -> None:
    """Loss of the rank's own rows from the old centers, update with all rows; inside DistributedDataParallel too."""
    rank, every = dist.get_rank(), parts(5, WORLD, torch.float32)
    b, group = every[rank], dist.group.WORLD
    for make in (dk.nn.CenterLoss, dk.nn.IslandLoss, dk.nn.SparseCenterLoss):
        for when in ("forward", "backward"):
            module = make(5, D, process_group=group, update_in=when)
            module.load_state_dict({"centers": centers_of(5, torch.float32)})
            one = copy.deepcopy(module)
            assert one.process_group is group
            one.process_group, one.update_in = None, "forward"
            more = (lambda p: (p.a,)) if make is dk.nn.SparseCenterLoss else lambda p: ()
            x, y = b.x.clone().requires_grad_(), b.x.clone().requires_grad_()
            loss = module(x, b.y, *more(b))
            loss.backward()
            expected = one.eval()(y, b.y, *more(b))
            expected.backward()
            close(loss.detach(), expected.detach(), "loss")
            close(x.grad, y.grad, "gradient")
            every_row = joined(every)
            one.update_centers_(every_row.x, every_row.y, *more(every_row))
            close(module.centers, one.centers, f"centers of {make.__name__} in {when}", 4.0)
            equal_on_all_ranks(module.centers, group)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.loss = nn.Linear(D, D), dk.nn.CenterLoss(5, D, process_group=group)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.loss(self.layer(x), y)

    torch.manual_seed(11)  # replicas have to start equal
    model = nn.parallel.DistributedDataParallel(Model(), broadcast_buffers=False)
    for seed in range(2):
        b = parts(5, WORLD, torch.float32, seed)[rank]
        model(b.x, b.y).backward()
    equal_on_all_ranks(model.module.loss.centers, group)
    equal_on_all_ranks(model.module.layer.weight.grad, group)


# Shards ---------------------------------------------------------------------------------------------------------------

# Over 4 ranks, 5 classes are 2, 2, 1 and none; 3 are 1, 1, 1 and none.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "center": lambda b, c, **more: dk.center_loss(b.x, b.y, c, **more),
    "sparse": lambda b, c, **more: dk.sparse_center_loss(b.x, b.y, c, b.a, **more),
    "logits": lambda b, c, **more: dk.sparse_center_loss(b.x, b.y, c, b.a, attention_logits=True, **more),
    "island": lambda b, c, **more: dk.island_loss(b.x, b.y, c, 0.7, **more),
}


def cotangent(loss: Tensor, rank: int) -> Tensor:
    """Another one on each rank and in each row."""
    return (
        (torch.linspace(0.5, 1.5, max(1, loss.numel()))[: loss.numel()] + 0.25 * rank).to(loss.dtype).view(loss.shape)
    )


@check
def shards_give_the_unsharded_loss_and_gradients() -> None:
    """Loss and the gradients of features and attention to the bit; that of the centers summed over the ranks."""
    for world, _, rank in worlds():
        for k in (5, 3) if world == WORLD else (5,):
            for name, loss in LOSSES.items():
                for reduction in ("none", "mean", "sum"):
                    dtype = torch.float32 if reduction == "mean" else torch.float64
                    for trained in (False, True):
                        compare_gradients(loss, reduction, k, world, rank, dtype, trained, f"{name} {reduction}")


def compare_gradients(
    loss: Callable[..., Tensor],
    reduction: str,
    k: int,
    world: int,
    rank: int,
    dtype: torch.dtype,
    trained: bool,
    what: str,
) -> None:
    what = f"{what}, {k} classes over {world}, {dtype}, trained={trained}"
    every = parts(k, world, dtype)
    whole_centers = centers_of(k, dtype).requires_grad_(trained)
    expected: list[tuple[Tensor, ...]] = []
    total = torch.zeros(k, D, dtype=torch.float64)
    for r, part in enumerate(every):
        b = Part(part.x.clone().requires_grad_(), part.y, part.a.clone().requires_grad_())
        value = loss(b, whole_centers, reduction=reduction)
        wanted = (b.x, b.a, whole_centers) if trained else (b.x, b.a)
        found = torch.autograd.grad(value, wanted, cotangent(value, r), allow_unused=True)
        expected.append((value.detach(), *found[:2]))
        total += found[2].double() if trained else 0
    shards = sharded(centers_of(k, dtype), world, trained)
    b = Part(every[rank].x.clone().requires_grad_(), every[rank].y, every[rank].a.clone().requires_grad_())
    value = loss(b, shards, reduction=reduction)
    wanted = (b.x, b.a, shards) if trained else (b.x, b.a)
    found = torch.autograd.grad(value, wanted, cotangent(value, rank), allow_unused=True)
    for part_of, actual, right in zip(("loss", "dx", "da"), (value.detach(), *found[:2]), expected[rank], strict=True):
        if right is None:
            assert actual is None
        elif what.startswith("island") and part_of == "loss":
            close(actual, right, f"{what}: {part_of}")
        else:
            assert_bitwise(actual, right, f"{what}: {part_of}")
    if trained:
        assert type(found[2]) is type(shards.detach()), f"{what}: {found[2]}"
        assert found[2].placements == shards.placements, f"{what}: {found[2].placements}"
        close(whole(found[2]), total.to(dtype), f"{what}: centers", 4.0)


@check
def shards_have_a_second_derivative() -> None:
    k, rank = 5, dist.get_rank()
    every = parts(k, WORLD)

    def twice(b: Part, c: Tensor, r: int) -> tuple[Tensor, ...]:
        x = b.x.clone().requires_grad_()
        value = dk.center_loss(x, b.y, c, reduction="sum")
        dx, dc = torch.autograd.grad(value, (x, c), cotangent(value, r), create_graph=True)
        return torch.autograd.grad((dx**3).sum() + (dc.sum() if c.dim() else 0.0), (x, c))

    whole_centers = centers_of(k).requires_grad_()
    shards = sharded(centers_of(k), WORLD, True)
    x = every[rank].x.clone().requires_grad_()
    value = dk.center_loss(x, every[rank].y, shards, reduction="sum")
    (dx,) = torch.autograd.grad(value, x, cotangent(value, rank), create_graph=True)
    ddx, ddc = torch.autograd.grad((dx**3).sum(), (x, shards))
    total = torch.zeros(k, D, dtype=torch.float64)
    for r, b in enumerate(every):
        leaf = b.x.clone().requires_grad_()
        value = dk.center_loss(leaf, b.y, whole_centers, reduction="sum")
        (dx,) = torch.autograd.grad(value, leaf, cotangent(value, r), create_graph=True)
        right, part = torch.autograd.grad((dx**3).sum(), (leaf, whole_centers))
        total += part
        if r == rank:
            close(ddx, right, "second derivative in features")
    close(whole(ddc), total, "second derivative in centers", 4.0)


@check
def shards_move_as_the_whole_does() -> None:
    for world, _, rank in worlds():
        for k in (5, 3, 1) if world == WORLD else (5,):
            for name, options in RULES.items():
                for dtype in (torch.float64,) if name != "alpha" else TOLERANCE:
                    shards, one = sharded(centers_of(k, dtype), world), centers_of(k, dtype)
                    for step in range(2):
                        every = parts(k, world, dtype, step)
                        assert update(shards, every[rank], **options) is shards
                        update(one, joined(every), **options)
                    close(whole(shards), one, f"{name}, {k} classes over {world}, {dtype}", 4.0)


@check
def shards_in_modules() -> None:
    """Steps of training on shards: the loss, its gradient and the centers of a module that has them all."""
    rank = dist.get_rank()
    for make in (dk.nn.CenterLoss, dk.nn.IslandLoss, dk.nn.SparseCenterLoss):
        more = (lambda p: (p.a,)) if make is dk.nn.SparseCenterLoss else lambda p: ()
        for options in ({"update_in": "backward"}, {"update": "ema", "reduction": "none"}, {"update": "grad"}):
            one = make(5, D, **options).double()
            one.load_state_dict({"centers": centers_of(5)})
            module = copy.deepcopy(one).shard_(MESHES[WORLD])
            assert "shards=4" in repr(module) and list(module.state_dict()) == ["centers"]
            assert module.centers.to_local().shape == ((2, D), (2, D), (1, D), (0, D))[rank]
            grad = options.get("update") == "grad"
            optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (one, module)] if grad else []
            for step in range(2):
                every = parts(5, WORLD, torch.float64, step)
                losses = []
                one.eval()
                for r, b in enumerate(every):  # of the centers as they are, one rank after the other
                    x = b.x.clone().requires_grad_()
                    losses.append((one(x, b.y, *more(b)), x))
                    losses[-1][0].backward(cotangent(losses[-1][0], r))
                rows = joined(every)
                if not grad:
                    one.update_centers_(rows.x, rows.y, *more(rows))
                x = every[rank].x.clone().requires_grad_()
                loss = module(x, every[rank].y, *more(every[rank]))
                loss.backward(cotangent(loss, rank))
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                what = f"{make.__name__} {options}"
                close(loss.detach(), losses[rank][0].detach(), f"{what}: loss")
                close(x.grad, losses[rank][1].grad, f"{what}: gradient")
                close(whole(module.centers), one.centers.detach(), f"{what}: centers", 8.0)
            module.init_centers_(every[rank].x, every[rank].y)
            one.init_centers_(rows.x, rows.y)
            close(whole(module.centers), one.centers.detach(), "means of classes", 4.0)


@check
def shards_are_made_drawn_and_loaded() -> None:
    """From the meta device no rank makes all; ranks with one seed draw apart; all centers load into shards."""
    torch.manual_seed(3)
    module = dk.nn.CenterLoss(7, D, device="meta").shard_(MESHES[WORLD])
    drawn = whole(module.centers)
    assert drawn.shape == (7, D) and drawn.device.type == "cpu"
    assert torch.unique(drawn, dim=0).shape[0] == 7 and 0.5 < drawn.std() < 1.5
    equal_on_all_ranks(drawn, dist.group.WORLD)
    for rule in ("alpha", "grad"):
        module = dk.nn.CenterLoss(7, D, update=rule).shard_(MESHES[WORLD])
        equal_on_all_ranks(whole(module.centers), dist.group.WORLD)
        module.load_state_dict({"centers": centers_of(7, torch.float32)}, strict=True)
        assert_bitwise(whole(module.centers), centers_of(7, torch.float32), "loaded")
        twin = dk.nn.CenterLoss(7, D).shard_(MESHES[WORLD])
        twin.load_state_dict(module.state_dict())
        assert_bitwise(whole(twin.centers), centers_of(7, torch.float32), "loaded from shards")


@check
def shards_take_no_memory_of_all_classes() -> None:
    """K = 4000: no tensor that a step makes is larger than a shard."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, (tuple, list)) else (out,)) if type(t) is Tensor)
            return out

    module = dk.nn.IslandLoss(4000, D, device="meta").shard_(MESHES[WORLD])
    b = parts(4000, WORLD, torch.float32)[dist.get_rank()]
    x = b.x.clone().requires_grad_()
    with Sizes():
        module(x, b.y).backward()
    assert max(sizes) == 1000 * D, max(sizes)


@check
def what_cannot_be_is_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    b, c = parts(4, WORLD, torch.float32)[0], torch.ones(4, D)
    square = init_device_mesh("cpu", (2, 2))
    for shards in (
        distribute_tensor(c, MESHES[WORLD], [Replicate()]),
        distribute_tensor(c, MESHES[WORLD], [Shard(1)]),
        distribute_tensor(c, square, [Replicate(), Shard(0)]),
    ):
        for run in (lambda s: dk.center_loss(b.x, b.y, s), lambda s: dk.update_centers_(s, b.x, b.y), dk_pairs(b)):
            with pytest.raises(ValueError, match="placements") as caught:
                run(shards)
            assert "\n" not in str(caught.value)
    good = sharded(c, WORLD)
    with pytest.raises(ValueError, match="plain tensor"):
        dk.center_loss(DTensor.from_local(b.x, MESHES[WORLD], [Shard(0)]), b.y, good)
    with pytest.raises(ValueError, match="process_group"):
        dk.update_centers_(good, b.x, b.y, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="process_group"):
        dk.nn.CenterLoss(4, D, process_group=dist.group.WORLD).shard_(MESHES[WORLD])
    with pytest.raises(ValueError, match="1 dimension"):
        dk.nn.CenterLoss(4, D).shard_(square)
    with pytest.raises(ValueError, match=r"\(K, D\)"):
        dk.center_loss(b.x[:, 1:], b.y, good)


def dk_pairs(b: Part) -> Callable[[Tensor], Any]:
    return lambda c: dk.island_loss(b.x, b.y, c)


# The processes --------------------------------------------------------------------------------------------------------


def rank_main(rank: int, folder: Path) -> None:
    global PAIR
    from torch.distributed.device_mesh import DeviceMesh

    processes.join(rank, WORLD, folder)
    PAIR = dist.new_group([0, 1], timeout=processes.LIMIT)
    if rank < 2:
        MESHES[2] = DeviceMesh.from_group(PAIR, "cpu")
    MESHES[WORLD] = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    processes.run_checks(rank, folder, CHECKS)


def main(folder: Path) -> None:

    processes.fork(WORLD, lambda rank: rank_main(rank, folder))


def test_on_four_processes(tmp_path: Path) -> None:
    processes.assert_all_pass(__file__, tmp_path, WORLD, CHECKS)


def test_without_torch_distributed() -> None:
    """A torch built without it has no DTensor and no groups, and everything else of this package."""
    code = (
        "import sys, torch\n"
        "for name in ('torch.distributed.tensor', 'torch.distributed', 'torch.distributed.device_mesh'):\n"
        "    sys.modules[name] = None\n"
        "import dlkernels as dk\n"
        "with dk.backend('reference'):\n"
        "    loss = dk.nn.IslandLoss(3, 2)\n"
        "    print(loss(torch.ones(4, 2, requires_grad=True), torch.tensor([0, 1, 2, 0])).requires_grad)\n"
    )
    root = Path(dk.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env, cwd=root)
    assert done.stdout == "True\n", done.stderr[-2000:]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
