"""What a benchmark declares (Family, Case), and how one case is measured once parity.py has checked it."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import timing  # noqa: E402
from parity import OURS, as_tuple, check, evaluate, forced, upstream  # noqa: E402

import dlkernels as dk  # noqa: E402

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
FULL = os.environ.get("FULL", "0") not in ("", "0")

Function = Callable[..., Any]  # of the inputs, to a tensor or a sequence of tensors
TRITON = "triton"  # the same op as OURS, where CUDA C++ serves that
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Case:
    """One row of the results: an op on one kind of input, in one direction.

    Args:
        op: public name in dlkernels.
        shape: of the first input: logits, activations, weights. What stands for many parameters: optimizers.py.
        direction: "fwd" (under no_grad) or "fwd+bwd" (`loss.backward()`; of a layer the gradients for a random one);
            "step" of an optimizer.
        reduction: of a loss; None for a layer or an optimizer.
        targets: "float", "index" or "soft"; what each means is the family's business. None as above.
        layout: "contiguous" or "channels_last", of every input that has this shape.
        options: further arguments of the op, as (name, value) pairs.
        loss_scale: the gradient that arrives at the loss, as from a GradScaler.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    direction: str = "fwd+bwd"
    reduction: str | None = "mean"
    targets: str | None = "index"
    layout: str = "contiguous"
    options: tuple[tuple[str, Any], ...] = ()
    loss_scale: float = 1.0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def backward(self) -> bool:
        return self.direction == "fwd+bwd"

    @property
    def steps(self) -> bool:
        return self.direction == "step"

    @property
    def name(self) -> str:
        """`cross_entropy 4096x1000 fp32 mean fwd+bwd`, plus what is unusual."""
        words = [self.op, "x".join(map(str, self.shape)), DTYPE_NAMES[self.dtype]]
        words += [] if self.reduction is None else [self.reduction]
        words += [] if self.targets in ("index", None) else [f"{self.targets}-targets"]
        words += [] if self.layout == "contiguous" else [self.layout]
        words += [f"{k}={v}" for k, v in self.options]
        words += [] if self.loss_scale == 1.0 else [f"loss-scale={self.loss_scale:g}"]
        return " ".join([*words, self.direction])

    def option(self, name: str, default: Any = None) -> Any:
        return dict(self.options).get(name, default)


def layer(op: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, direction: str = "fwd+bwd",
          layout: str = "contiguous", **options: Any) -> Case:  # fmt: skip
    """The case of a layer: neither a reduction nor targets."""
    return Case(op, shape, dtype, direction, None, None, layout, tuple(options.items()))


def both(case: Case) -> list[Case]:
    """The case with its backward pass, and its forward pass alone under no_grad."""
    return [replace(case, direction=direction) for direction in ("fwd+bwd", "fwd")]


@dataclass(frozen=True)
class Peer:
    """A package that has the op: measured where it imports, listed as "not installed" where not.

    `build(case)` gives a function of the case's inputs, or None when the peer does not do this case.
    """

    name: str
    module: str
    build: Callable[[Case], Function | None]
    gpu_only: bool = False

    def missing(self, device: str) -> str:
        """Empty when usable here, else why not."""
        if importlib.util.find_spec(self.module) is None:
            return "not installed"
        if self.gpu_only and device != "cuda":
            return "needs a GPU"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(self.module)
        except Exception as error:
            return f"does not import: {type(error).__name__}: {error}".splitlines()[0][:120]
        return ""


@dataclass(frozen=True)
class Family:
    """The declarations of one bench_<family>.py.

    Args:
        inputs: (case, device, generator) -> tensors.
        ours, eager: case -> function of these tensors to the loss, or to the output or outputs of a layer, or to an
            `optimizers.Step`.
        grads: how many of the tensors, from the first on, take gradients: the logits of a loss, a layer's input and
            parameters. None: all.
        draws: further inputs for the check against float64 only: what a random op draws by itself when it is timed.
        bytes_fwd, bytes_bwd: minimal bytes of each direction, the `Traffic` lines of the kernels; those of a step are
            bytes_fwd.
        compiles: whether torch.compile of eager is a candidate.
    """

    name: str
    cases: Sequence[Case]
    full_cases: Sequence[Case]
    inputs: Callable[[Case, str, torch.Generator], tuple[Tensor, ...]]
    ours: Callable[[Case], Function]
    eager: Callable[[Case], Function]
    bytes_fwd: Callable[[Case], int]
    bytes_bwd: Callable[[Case], int]
    peers: Sequence[Peer] = ()
    gpu_cases: Sequence[Case] = ()  # added on a GPU, which the others do not fill
    gate_cases: Sequence[Case] = ()  # small ones: sanitizers, capture
    traffic_cases: Sequence[Case] = ()  # one large per kernel: ncu
    grads: Callable[[Case], int | None] = lambda case: 1
    draws: Callable[[Case, str, torch.Generator], tuple[Tensor, ...]] = lambda case, device, generator: ()
    compiles: bool = True

    def headline(self, most: int = 4) -> list[Case]:
        """What to measure first: of the cases that fill a GPU the first of each op, then of each kind; by direction."""
        chosen: list[Case] = []
        kinds = (
            lambda case: case.op,
            lambda case: (case.op, case.dtype, case.layout, case.targets, [name for name, _ in case.options]),
        )
        for direction in dict.fromkeys(case.direction for case in self.gpu_cases):
            mine: list[Case] = []
            for kind in kinds:
                for case in self.gpu_cases:
                    new = case.direction == direction and kind(case) not in [kind(other) for other in mine]
                    mine += [case] if new and len(mine) < most else []
            chosen += mine
        return chosen

    def bytes(self, case: Case) -> int:
        return self.bytes_fwd(case) + (self.bytes_bwd(case) if case.backward else 0)

    def selected(self, device: str = "cpu", full: bool = FULL) -> list[Case]:
        gpu_cases = self.gpu_cases if device == "cuda" else ()
        return list(dict.fromkeys([*self.cases, *gpu_cases, *(self.full_cases if full else ())]))


def generator(device: str, seed: int = 0) -> torch.Generator:
    return torch.Generator(device=device).manual_seed(seed)


def make_inputs(family: Family, case: Case, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    """Random inputs; those that take gradients require them when the case has a backward pass."""
    tensors = list(family.inputs(case, device, generator(device, seed)))
    if case.layout == "channels_last":
        form = FORMATS[len(case.shape)]
        tensors = [t.contiguous(memory_format=form) if t.shape == case.shape else t for t in tensors]
    if case.backward:
        for t in tensors[: family.grads(case)]:
            t.requires_grad_(True)
    return tuple(tensors)


def make_draws(family: Family, case: Case, device: str, seed: int = 1) -> tuple[Tensor, ...]:
    return family.draws(case, device, generator(device, seed))


def make_call(case: Case, function: Function, sets: Sequence[tuple[Tensor, ...]]) -> timing.Call:
    """One training step on input set i, of a loss as users write it. Returns what a GPU graph has to keep alive.

    A layer hands its gradients to the layers around it: they are not accumulated, which would copy one that is passed
    through, such as a residual's.
    """
    if (name := getattr(function, "backend", None)) is not None:
        call = make_call(case, function.function, sets)

        def forced_call(i: int) -> Any:
            with dk.backend(name):
                return call(i)

        return forced_call
    if case.steps:
        runs = [function(*tensors).run for tensors in sets]
        for run in runs:
            run()  # makes the state, which no graph may
        return lambda i: runs[i]()
    if not case.backward:

        def forward(i: int) -> Any:
            return function(*sets[i])

        return forward
    with torch.enable_grad():
        grads = upstream(case, as_tuple(function(*sets[0])))
    wanted = [[t for t in tensors if t.requires_grad] for tensors in sets]

    def step(i: int) -> Any:
        for t in wanted[i]:
            t.grad = None
        loss = function(*sets[i])
        loss.backward(grads[0])
        return loss.detach(), *(t.grad for t in wanted[i])

    def layer_step(i: int) -> Any:
        outputs = as_tuple(function(*sets[i]))
        return *(out.detach() for out in outputs), *torch.autograd.grad(outputs, wanted[i], grads)

    return step if case.reduction is not None else layer_step


# Measuring ------------------------------------------------------------------------------------------------------------


def served_by_cuda(op: str) -> bool:
    """Whether CUDA C++ serves the forward operator of a public function."""
    from dlkernels import _backend

    return any(_backend.default_for("cuda", name) == "cuda" for name in (op, f"{op}_fwd"))


def candidates_for(
    family: Family, case: Case, device: str, compile: bool = True
) -> tuple[dict[str, Function], dict[str, str]]:
    """Functions by name, eager first, and the peers that are not here with the reason."""
    eager = family.eager(case)
    functions: dict[str, Function] = {"eager": eager}
    absent = {}
    if compile and family.compiles:
        torch._dynamo.reset()
        functions["compile"] = torch.compile(eager, dynamic=False, fullgraph=True)
    functions[OURS] = family.ours(case)
    if device == "cuda" and not case.steps and served_by_cuda(case.op):
        functions[TRITON] = forced("triton", functions[OURS])
    for peer in family.peers:
        if (why := peer.missing(device)) != "":
            absent[peer.name] = why
        elif (function := peer.build(case)) is not None:
            functions[peer.name] = function
    return functions, absent


@contextlib.contextmanager
def one_thread(device: str) -> Iterator[None]:
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_case(
    family: Family,
    case: Case,
    device: str,
    curve: list[tuple[int, float]],
    *,
    budget_s: float = 1.0,
    compile: bool = True,
    gpu: timing.Cuda | None = None,
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Check and measure every candidate on one case: the JSON record, and the samples in seconds by candidate.

    Args:
        curve: `timing.copy_curve`, the roof.
        budget_s: CPU seconds of samples for all candidates together.
        gpu: measures as on a GPU; None on the CPU.
    """
    started = time.perf_counter()
    with one_thread(device):
        functions, absent = candidates_for(family, case, device, compile)
        tensors = make_inputs(family, case, device)
        record = _describe(family, case, absent)
        dropped = _drop_failing(case, functions, tensors)
        compiled = time.perf_counter()
        record["correct"] = verdict = check(family, case, functions, tensors, make_draws(family, case, device))
        for name, error in verdict["not_same"].items():
            del functions[name]
            dropped[name] = f"result differs by {error:.1e}: not measured"
        record["dropped"] = dropped
        record["seconds_by"] = {"compile": compiled - started, "check": time.perf_counter() - compiled}
        if verdict["failures"]:
            record["refused"] = "wrong result: " + "; ".join(verdict["failures"])
            return record, {}
        with torch.set_grad_enabled(case.backward):
            if gpu is None:
                samples = _measure_cpu(case, functions, tensors, record, budget_s)
            else:
                samples = _measure_gpu(family, case, functions, record, gpu)
    _rate(record, curve)
    record["seconds"] = time.perf_counter() - started
    return record, samples


def refused(name: str, op: str, why: str) -> dict[str, Any]:
    """The record of a case that was not measured."""
    return {"name": name, "op": op, "refused": why, "candidates": {}}


def _describe(family: Family, case: Case, absent: dict[str, str]) -> dict[str, Any]:
    return {
        "name": case.name, "op": case.op, "shape": list(case.shape), "dtype": DTYPE_NAMES[case.dtype],
        "direction": case.direction, "reduction": case.reduction, "targets": case.targets, "layout": case.layout,
        "options": dict(case.options), "loss_scale": case.loss_scale, "bytes": family.bytes(case),
        "bytes_fwd": family.bytes_fwd(case), "bytes_bwd": family.bytes_bwd(case) if case.backward else 0,
        "absent": absent, "refused": "", "candidates": {},
    }  # fmt: skip


def _drop_failing(case: Case, functions: dict[str, Function], tensors: tuple[Tensor, ...]) -> dict[str, str]:
    """Peers and compile may fail on a case (that is a result); eager and ours may not."""
    dropped = {}
    for name in [n for n in functions if n not in ("eager", OURS)]:
        try:
            evaluate(case, functions[name], tensors)
        except Exception as error:
            dropped[name] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            del functions[name]
    return dropped


def _measure_cpu(case, functions, tensors, record, budget_s) -> dict[str, list[float]]:
    calls = {name: make_call(case, function, [tensors]) for name, function in functions.items()}
    src = torch.rand(max(record["bytes"] // 8, 1))
    dst = torch.empty_like(src)
    samples = timing.interleave(calls | {"copy": lambda _: dst.copy_(src)}, budget_s)
    record["copy_gbps"] = record["bytes"] / min(samples.pop("copy")) / 1e9  # in turn with the rest: same noise
    for name, call in calls.items():
        _forget_grads(tensors)
        record["candidates"][name] = timing.summary(samples[name]) | {"peak_bytes": timing.peak_bytes_cpu(call)}
        record["candidates"][name]["time_us"] = record["candidates"][name]["min_us"]
    return samples


def _measure_gpu(family, case, functions, record, gpu) -> dict[str, list[float]]:
    count, cold = timing.buffer_sets(gpu, family.bytes(case))
    sets = [make_inputs(family, case, gpu.device, seed) for seed in range(count)]
    # Ours first: a peer that breaks a capture takes none of the others with it.
    ordered = sorted(functions, key=lambda name: name != OURS)
    calls = {name: make_call(case, functions[name], sets) for name in ordered}
    peaks = {}
    for name, call in calls.items():
        _forget_grads(sets[0])
        call(0)  # lazy workspaces first
        _forget_grads(sets[0])
        peaks[name] = gpu.peak_bytes(call)
    latency = timing.call_latency(gpu, calls, count)
    samples, failed = timing.device_time(gpu, calls, count)
    record.update(buffer_sets=count, l2="cold" if cold else "hot")
    for name in functions:
        entry = latency[name] | {"peak_bytes": peaks[name]}
        if name in samples:
            entry |= timing.summary(samples[name])
            entry["time_us"] = entry["median_us"]
        else:
            entry["why_no_device_time"] = failed[name]
        record["candidates"][name] = entry
    return samples


def _forget_grads(tensors: tuple[Tensor, ...]) -> None:
    for t in tensors:
        t.grad = None


def _rate(record: dict[str, Any], curve: list[tuple[int, float]]) -> None:
    """Bandwidth over the minimal bytes, for every candidate alike, and ratios to eager and to compile."""
    results = record["candidates"]
    roof = record["copy_gbps"] = max(timing.copy_gbps_at(curve, record["bytes"]), record.get("copy_gbps", 0.0))
    for entry in results.values():
        if "time_us" not in entry:
            continue
        entry["gbps"] = record["bytes"] / entry["time_us"] / 1e3
        entry["copy_share"] = entry["gbps"] / roof
        for base in ("eager", "compile"):
            if "time_us" in results.get(base, {}):
                entry[f"x_{base}"] = results[base]["time_us"] / entry["time_us"]
