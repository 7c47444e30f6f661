"""The optimizers on two processes (gloo, localhost): DDP, FSDP, DTensor parameters, ZeRO and distributed checkpoints.

Two processes are started once and run every check below, on each backend. Each rank also makes the training of one
process that sees the batches of both, which is what it is compared with.
"""

from __future__ import annotations

import copy
import itertools
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from _hosts import KINDS, Make, assert_trains_alike, flat
from torch import Tensor, nn

import dlkernels as dk
from dlkernels import _backend
from dlkernels.testing import assert_bitwise, assert_within_budget

WORLD = 2
CHECKS: dict[str, Callable[[], None]] = {}
FOLDER: list[Path] = []

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available() and hasattr(os, "fork")),
    reason="this torch has no torch.distributed with gloo, or this system no fork",
)


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


# The problem ----------------------------------------------------------------------------------------------------------


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Cut over two ranks: shards of 2 and 1 rows, of 1 and none."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 6, generator=draw), torch.randn(4, 1, generator=draw)


def loss_of(model: nn.Module, step: int, rank: int) -> Tensor:
    x, y = batch(step, rank)
    dtype = next(model.parameters()).dtype
    return nn.functional.mse_loss(model(x.to(dtype)), y.to(dtype))


def train(model: nn.Module, optimizer: Any, steps: Iterable[int]) -> Any:
    """On this rank's batches. Gives the optimizer."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, dist.get_rank()).backward()
        optimizer.step()
    return optimizer


def train_alone(model: nn.Module, optimizer: Any, steps: Iterable[int], clip: float | None = None) -> list[float]:
    """On the batches of all ranks; the gradients are the mean of theirs. Gives the norms before clipping."""
    params, norms = list(model.parameters()), []
    for step in steps:
        parts = [torch.autograd.grad(loss_of(model, step, rank), params) for rank in range(WORLD)]
        for p, *grads in zip(params, *parts, strict=True):
            p.grad = sum(grads) / WORLD
        if clip is not None:
            norms.append(nn.utils.clip_grad_norm_(params, clip).item())
        optimizer.step()
    return norms


def mesh() -> Any:
    from torch.distributed.device_mesh import DeviceMesh

    return DeviceMesh.from_group(dist.group.WORLD, "cpu")


def sharded(dtype: torch.dtype = torch.float32) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    model = network(dtype)
    fully_shard(model[2], mesh=mesh())
    return fully_shard(model, mesh=mesh())


def whole(model: nn.Module | Iterable[Tensor]) -> Tensor:
    """All parameters of a model whose parameters may be shards."""
    params = model.parameters() if isinstance(model, nn.Module) else model
    return flat(p.full_tensor() if hasattr(p, "full_tensor") else p for p in params)


def equal_on_all_ranks(x: Tensor, what: str) -> None:
    every = [torch.empty_like(x) for _ in range(WORLD)]
    dist.all_gather(every, x)
    for other in every:
        assert_bitwise(other, x, f"{what}, of another rank")


# Replicas -------------------------------------------------------------------------------------------------------------


@check
def replicas_make_what_one_process_makes() -> None:
    """DDP, with gradients of their own and as views of buckets, which move after the first step."""
    for (kind, (make, _, options)), views in itertools.product(KINDS.items(), (False, True)):
        alone = network()
        train_alone(alone, make(alone.parameters(), **options), range(6))
        model = nn.parallel.DistributedDataParallel(network(), gradient_as_bucket_view=views)
        train(model, make(model.parameters(), **options), range(6))
        assert_bitwise(flat(model), flat(alone), f"{kind}, gradient_as_bucket_view={views}")


@check
def zero_redundancy() -> None:
    """Each rank steps its own parameters and sends them to the other."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    for kind, (make, _, options) in KINDS.items():
        alone = network()
        train_alone(alone, make(alone.parameters(), **options), range(6))
        model = nn.parallel.DistributedDataParallel(network())
        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=make, **options)
        train(model, optimizer, range(6))
        assert_bitwise(flat(model), flat(alone), kind)


# Shards ---------------------------------------------------------------------------------------------------------------


@check
def shards_make_what_one_process_makes() -> None:
    for kind in KINDS:

        def run(make: Make, dtype: torch.dtype, kind: str = kind) -> list[Tensor]:
            if make is KINDS[kind].ours and dtype == torch.float32:
                model = sharded()
                optimizer = make(model.parameters(), **KINDS[kind].options)
                train(model, optimizer, range(6))
                states = [(p, s) for p, state in optimizer.state.items() for n, s in state.items() if n != "step"]
                assert states and all(s.placements == p.placements for p, s in states)
            else:
                model = network(dtype)
                train_alone(model, make(model.parameters(), **KINDS[kind].options), range(6))
            return [whole(model)]

        assert_trains_alike(kind, run)


@check
def swapped_shards_go_on_as_torch_would() -> None:
    """torch's AdamW on shards, moments and all, becomes ours in the middle of a training."""
    cases = {"for loop": {}, "foreach": {"foreach": True}, "fused": {"fused": True}, "amsgrad": {"amsgrad": True}}
    for what, options in cases.items():
        plain, model = sharded(torch.float64), sharded(torch.float64)
        before = train(plain, torch.optim.AdamW(plain.parameters(), lr=0.05, **options), range(3))
        optimizer = train(model, torch.optim.AdamW(model.parameters(), lr=0.05, **options), range(3))
        assert dk.swap_optimizer(optimizer) is optimizer and type(optimizer) is dk.optim.AdamW
        train(plain, before, range(3, 6))
        train(model, optimizer, range(3, 6))
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            moments = [optimizer.state[a][name] for name in optimizer._slots_of(optimizer.param_groups[0])]
            assert all(x.placements == a.placements for x in moments), what
            a, b = a.full_tensor(), b.full_tensor()
            assert (a - b).norm() <= 1e-12 * b.norm(), what


@check
def flat_shards_make_what_one_process_makes() -> None:
    """The older FSDP: one flat parameter of a layer, or views into it that move."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for (kind, (make, _, options)), original in itertools.product(KINDS.items(), (False, True)):
        alone = network()
        train_alone(alone, make(alone.parameters(), **options), range(6))
        model = FullyShardedDataParallel(network(), use_orig_params=original, device_id=torch.device("cpu"))
        train(model, make(model.parameters(), **options), range(6))
        with FullyShardedDataParallel.summon_full_params(model):
            together = flat(model)[: flat(alone).numel()].clone()
        assert_within_budget(together, flat(alone).double(), what=f"{kind}, use_orig_params={original}")


SHAPES = ((3, 6), (1,), (1, 5), (4, 3, 2), (2, 9))


def drawn(draw: torch.Generator, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, generator=draw).to(dtype) for shape in SHAPES]


def cut(values: list[Tensor], way: str) -> list[Tensor]:
    """The same tensors, this rank's part of each."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    places = {"rows": lambda x: Shard(0), "columns": lambda x: Shard(x.dim() - 1), "copies": lambda x: Replicate()}
    if way == "mixed":
        return [distribute_tensor(x.clone(), mesh(), [Shard(0)]) if i % 2 else x.clone() for i, x in enumerate(values)]
    return [distribute_tensor(x.clone(), mesh(), [places[way](x)]) for x in values]


@check
def cutting_does_not_change_a_bit() -> None:
    """Given equal gradients; stochastic rounding draws for an element the same wherever it lies."""
    cases = (
        (torch.float32, {}),
        (torch.bfloat16, {"stochastic_rounding": True, "seed": 11}),
        (torch.bfloat16, {"master_weights": True, "ema_decay": 0.9}),
    )
    for (kind, (make, _, options)), (dtype, more) in itertools.product(KINDS.items(), cases):
        for way in ("rows", "columns", "copies", "mixed"):
            draw = torch.Generator().manual_seed(3)
            start = drawn(draw, dtype)
            alone = [nn.Parameter(x.clone()) for x in start]
            parts = [nn.Parameter(x) for x in cut(start, way)]
            optimizers = [make(params, **options, **more) for params in (alone, parts)]
            for _ in range(4):
                grads = drawn(draw, dtype)
                for params, values in ((alone, grads), (parts, cut(grads, way))):
                    for p, g in zip(params, values, strict=True):
                        p.grad = g
                for optimizer in optimizers:
                    optimizer.step()
            what = f"{kind} {dtype} {more} {way}"
            if "ema_decay" in more:
                with optimizers[0].ema_weights(), optimizers[1].ema_weights():
                    assert_bitwise(whole(parts), flat(alone), f"{what}: averages")
            assert not torch.equal(flat(alone), flat(start)), what
            assert_bitwise(whole(parts), flat(alone), what)
            for p, q in zip(alone, parts, strict=True):
                for name, value in optimizers[0].state[p].items():
                    other = optimizers[1].state[q][name]
                    assert_bitwise(other.full_tensor() if hasattr(other, "full_tensor") else other, value, what + name)


@check
def the_norm_is_that_of_all_shards() -> None:
    """`max_grad_norm` on shards, some of them plain parameters, against clip_grad_norm_ on the whole."""
    for kind, (make, _, options) in KINDS.items():
        norms: list[list[float]] = []

        def run(m: Make, dtype: torch.dtype, kind: str = kind, norms: list[list[float]] = norms) -> list[Tensor]:
            if m is not KINDS[kind].ours:
                model = network(dtype)
                norms.append(train_alone(model, m(model.parameters(), **KINDS[kind].options), range(5), 0.3))
                return [flat(model)]
            model = sharded()
            optimizer = m(model.parameters(), **KINDS[kind].options, max_grad_norm=0.3)
            said = torch.stack([train(model, optimizer, [step]).grad_norm for step in range(5)])
            equal_on_all_ranks(said, "norm")
            norms.append(said.tolist())
            return [whole(model)]

        assert_trains_alike(kind, run)
        ours, theirs, exact = (torch.tensor(n, dtype=torch.float64) for n in norms)
        assert_within_budget(ours.float(), exact, theirs.float(), what="norms")
        assert exact.min() > 0.3, "there must be something to clip"

        start = drawn(torch.Generator().manual_seed(3))
        for way in ("rows", "copies", "mixed"):
            parts = [nn.Parameter(x) for x in cut(start, way)]
            for p, g in zip(parts, cut(start, way), strict=True):
                p.grad = g
            optimizer = make(parts, **options, max_grad_norm=0.3)
            optimizer.step()
            assert_within_budget(optimizer.grad_norm, flat(start).double().norm(), scalar=True, what=f"norm, {way}")


@check
def one_rank_with_a_bad_gradient_holds_all_back() -> None:
    """NaN in the second rank's shard: the step is skipped everywhere, by GradScaler or by `skip_nonfinite`."""
    ways = (("scaler", {}), ("scaler", {"fused_unscale": True}), ("step", {"skip_nonfinite": True}))
    for (kind, (make, _, options)), (way, more) in itertools.product(KINDS.items(), ways):
        model = sharded()
        optimizer = make(model.parameters(), **options, **more)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=way == "scaler")
        for bad in (False, True, False):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, 0, dist.get_rank())).backward()
            if bad and dist.get_rank() == 1:
                model[0].weight.grad.to_local().view(-1)[2] = float("nan")
            before = whole(model)
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before, whole(model)) == bad, f"{kind} {way} {more}"
        assert all(float(s["step"]) == 2 for s in optimizer.state.values() if "step" in s)
        assert scaler.get_scale() == (512.0 if way == "scaler" else 1.0)


# Checkpoints ----------------------------------------------------------------------------------------------------------


@check
def distributed_checkpoint() -> None:
    """Saved in mid-training and loaded onto a fresh optimizer, whole or in shards: it goes on as it would have."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd

    half = {"master_weights": True, "ema_decay": 0.9, "state_dtype": torch.bfloat16}
    cases = ((torch.float32, {}), (torch.bfloat16, half))
    for number, ((kind, (make, _, options)), (dtype, more)) in enumerate(itertools.product(KINDS.items(), cases)):
        what = f"{kind} {more}"
        folder = FOLDER[0] / f"checkpoint-{_backend.state.forced}-{number}"
        for flatten in (False, True):
            how = sd.StateDictOptions(flatten_optimizer_state_dict=flatten)
            model = sharded(dtype)
            optimizer = make(model.parameters(), **options, **more)
            train(model, optimizer, range(3))
            saved = {
                "model": model.state_dict(),
                "optimizer": sd.get_optimizer_state_dict(model, optimizer, options=how),
            }
            dcp.save(saved, checkpoint_id=folder / str(flatten))
            full = sd.get_optimizer_state_dict(model, optimizer, options=sd.StateDictOptions(full_state_dict=True))
            full = copy.deepcopy(full)
            train(model, optimizer, range(3, 6))

            fresh = sharded(dtype)
            other = make(fresh.parameters(), **{**options, "lr": 9.0}, **more)
            before = whole(fresh)
            state = {"model": fresh.state_dict(), "optimizer": sd.get_optimizer_state_dict(fresh, other, options=how)}
            assert_bitwise(whole(fresh), before, "parameters, after a state was made for loading")
            dcp.load(state, checkpoint_id=folder / str(flatten))
            fresh.load_state_dict(state["model"])
            sd.set_optimizer_state_dict(fresh, other, state["optimizer"], options=how)
            train(fresh, other, range(3, 6))
            assert_bitwise(whole(fresh), whole(model), what)

        alone = network(dtype)
        one = make(alone.parameters(), **{**options, "lr": 9.0}, **more)
        sd.set_optimizer_state_dict(alone, one, copy.deepcopy(full), options=sd.StateDictOptions(full_state_dict=True))
        assert one.param_groups[0]["lr"] == options["lr"]
        for name, p in alone.named_parameters():
            assert one.state[p].keys() == full["state"][name].keys(), what
            for key, value in full["state"][name].items():
                assert_bitwise(one.state[p][key], value, f"{what}: {name}.{key}")


# The processes --------------------------------------------------------------------------------------------------------


def main(folder: Path) -> None:

    def rank_main(rank: int) -> None:
        FOLDER.append(folder)
        processes.join(rank, WORLD, folder)
        processes.run_checks(rank, folder, CHECKS)

    processes.fork(WORLD, rank_main)


def test_on_two_processes(tmp_path: Path) -> None:
    processes.assert_all_pass(__file__, tmp_path, WORLD, CHECKS)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
