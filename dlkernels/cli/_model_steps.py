"""Training steps of one model in several forms: each on its own copy, checked against eager, measured in turns."""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import dlkernels as dk

from ..testing import no_gc
from ._models import Spec

CHECKED = 3  # steps whose losses are compared
WARMUP = 2  # more steps of each before the clock runs
NOISE = 0.01  # a smaller difference is none
# Of the gradient's norm, and of the losses before any step and after each; losses as a share of the first one. Training
# amplifies rounding: BatchNorm over a few values does so by several orders of magnitude in two steps. Under autocast, a
# candidate may also be twice as far from eager in float32 as eager is, unless that is nowhere near.
LIMITS = {torch.float32: (5e-3, 2e-5, 1e-2, 5e-2), torch.bfloat16: (5e-2, 5e-3, 5e-2, 0.1)}


@dataclass(frozen=True)
class Recipe:
    """What makes a candidate of a plain model. `adamw`: "default" and "fused" are torch's, "dlkernels" is ours."""

    title: str
    swap: bool = False
    adamw: str = "default"
    backend: str = ""


RECIPES = {
    "eager": Recipe("eager, torch's default AdamW"),
    "eager-fused-adamw": Recipe("eager, torch's AdamW(fused=True)", adamw="fused"),
    "swapped": Recipe("dk.swap", swap=True),
    "swapped-adamw": Recipe("dk.swap and dk.swap_optimizer", swap=True, adamw="dlkernels"),
    "compile": Recipe("torch.compile", backend="inductor"),
    "compile-dlkernels": Recipe('torch.compile(backend="dlkernels")', backend="dlkernels"),
}
# Whom a candidate should beat, or lose openly to.
RIVALS = {
    "swapped": ("eager", "compile"),
    "swapped-adamw": ("eager", "eager-fused-adamw", "compile"),
    "compile-dlkernels": ("eager", "compile"),
}
Observe = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Setting:
    """What all candidates of a run have in common."""

    spec: Spec
    batch: int
    size: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def model(self) -> nn.Module:
        return self.layout(self.spec.make().to(self.device))

    def inputs(self) -> tuple[tuple[Tensor, ...], Tensor | None]:
        args, target = self.spec.inputs(self.batch, self.size, torch.Generator().manual_seed(1))
        args = tuple(self.layout(t.to(self.device)) for t in args)
        return args, None if target is None else target.to(self.device)

    def layout(self, x: Any) -> Any:
        """A module or a tensor in the memory format of the run."""
        if not self.channels_last:
            return x
        tensors = (x,) if isinstance(x, Tensor) else (*x.parameters(), *x.buffers())
        for t in tensors:
            if t.dim() in (4, 5):
                t.data = t.data.contiguous(
                    memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d
                )
        return x

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=self.dtype)


@dataclass
class Candidate:
    """A form of the model with its optimizer; `step` runs forward, loss, backward, optimizer step and zero_grad."""

    name: str
    model: nn.Module
    step: Callable[..., Tensor]
    report: dk.SwapReport | None = None
    matches: dict[str, dict[str, int]] | None = None  # of the compile backend
    losses: list[float] = field(default_factory=list)
    norm: float = math.nan  # of the gradient before the first step
    build_s: float = 0.0  # of making it and of its first step, where compiling is
    samples: list[float] = field(default_factory=list)  # seconds


def make(name: str, base: nn.Module, setting: Setting) -> Candidate:
    """A candidate on a deep copy of the model."""
    recipe, model = RECIPES[name], copy.deepcopy(base)
    report = dk.swap(model) if recipe.swap else None
    optimizer = torch.optim.AdamW(model.parameters(), **({"fused": True} if recipe.adamw == "fused" else {}))
    if recipe.adamw == "dlkernels":
        dk.swap_optimizer(optimizer)
    called: Any = model
    if recipe.backend:
        called = torch.compile(model, backend=_known(recipe.backend))
    args, target = setting.inputs()

    def step(observe: Observe | None = None) -> Tensor:
        with setting.autocast():
            loss = setting.spec.loss(called(*args), target)
        loss.backward()
        if observe is not None:
            observe(model)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return Candidate(name, model, step, report)


def _known(backend: str) -> str:
    """The backend's name; in a checkout, importing it registers it."""
    if backend == "dlkernels" and importlib.util.find_spec("dlkernels.compile") is not None:
        importlib.import_module("dlkernels.compile")
    if backend not in torch._dynamo.list_backends(exclude_tags=()):
        raise RuntimeError(f"torch.compile has no backend {backend!r} here")
    return backend


# Agreement ------------------------------------------------------------------------------------------------------------


def warm_up(candidate: Candidate) -> None:
    """The first steps, whose losses and gradient norm are kept: they compile, and they say what it computes."""

    def observe(model: nn.Module) -> None:
        grads = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
        candidate.norm = torch.stack(grads).norm().item()

    finds = _finds() if RECIPES[candidate.name].backend == "dlkernels" else None
    if finds is not None:
        finds.clear()
    for i in range(CHECKED):
        torch.manual_seed(i)  # for what draws
        candidate.losses.append(candidate.step(observe if i == 0 else None).item())
    for _ in range(WARMUP):
        candidate.step()
    if finds is not None:
        found = {"replaced": finds.replaced, "left": finds.left}
        candidate.matches = {what: dict(Counter(find.pattern for find in some)) for what, some in found.items()}


def _finds() -> Any:
    """The compile backend's report, or None where there is no such backend."""
    backend = sys.modules.get("dlkernels.compile")
    return None if backend is None else backend.compile_report()


def disagreement(candidate: Candidate, eager: Candidate, exact: Candidate, dtype: torch.dtype) -> tuple[float, str]:
    """The largest difference from `exact` as a share of what is allowed, and in words; above 1 the result is wrong.

    `exact` is eager in float32: `eager` itself, but under autocast.
    """
    found = [("norm of the gradient", *(c.norm for c in (candidate, eager, exact)), exact.norm)]
    for i, losses in enumerate(zip(candidate.losses, eager.losses, exact.losses)):
        found.append((f"loss after {i} step{'' if i == 1 else 's'}", *losses, exact.losses[0]))
    worst, words = -1.0, ""
    for (what, value, of_eager, expected, size), limit in zip(found, LIMITS[dtype]):
        error, allowed = (abs(x - expected) / max(abs(size), 1e-12) for x in (value, of_eager))
        allowed = limit + min(2 * allowed, 1.0) if math.isfinite(allowed) else 0.0
        share = error / allowed if math.isfinite(error) and allowed else math.inf
        if share > worst:
            worst = share
            where = "eager" if exact is eager else "eager in float32"
            words = (
                f"{what} {value:.6g}, {where} {expected:.6g}: relative difference {error:.1e}, allowed {allowed:.0e}"
            )
    return worst, words


# The clock ------------------------------------------------------------------------------------------------------------


def measure(candidates: list[Candidate], device: str, rounds: int, on_round: Callable[[], None]) -> None:
    """One step of each per round, the order rotated, so that what disturbs hits all alike."""
    clock = _on_cuda if device == "cuda" else _on_cpu
    with no_gc():
        for r in range(rounds):
            turn = r % len(candidates)
            for candidate in candidates[turn:] + candidates[:turn]:
                candidate.samples.append(clock(candidate.step))
            on_round()


def _on_cpu(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _on_cuda(step: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


# Numbers --------------------------------------------------------------------------------------------------------------


def summary(samples: list[float]) -> dict[str, float]:
    """Milliseconds; `spread` compares the minima of even and odd rounds: what the same code differs by."""
    halves = min(samples[::2]), min(samples[1::2] or samples)
    return {
        "min_ms": min(samples) * 1e3,
        "median_ms": statistics.median(samples) * 1e3,
        "spread": abs(halves[0] - halves[1]) / min(samples),
        "rounds": len(samples),
    }


def slower_than(name: str, candidates: dict[str, dict[str, Any]]) -> list[str]:
    """The rivals that a candidate loses to by more than the spread between its own rounds."""
    ours = candidates.get(name, {}).get("min_ms")
    if ours is None:
        return []
    noise = 1 + max(candidates[name].get("spread", 0.0), NOISE)
    times = {rival: candidates.get(rival, {}).get("min_ms") for rival in RIVALS.get(name, ("eager",))}
    return [rival for rival, t in times.items() if t and rival != name and t * noise < ours]
