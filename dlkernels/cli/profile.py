"""`python -m dlkernels profile`: where the time of an op, or of a model's training step, goes."""

from __future__ import annotations

import argparse
import shlex
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .. import _backend
from ..testing import num_threads
from . import fail, format_bytes, format_time, print_table, quiet
from ._profile_bytes import bytes_per_step, kernel_pattern
from ._workloads import CLASSES, DTYPES, LAYERS, LOSSES, OPS, Workload, make_workload

WARMUP = 3
EXAMPLES = """\
examples:
  python -m dlkernels profile sigmoid_focal_loss --shape 1048576 --device cpu
  python -m dlkernels profile cross_entropy --shape 4096,1000 --dtype bfloat16 --eager
  python -m dlkernels profile group_norm --shape 8,256,28,28 --layout channels_last --eager
  python -m dlkernels profile adamw --shape 300,256 --eager
  python -m dlkernels profile demo --eager
  python -m dlkernels profile my_package.models:make_model --input-shape 8,3,224,224 --device cuda

Writes a trace for chrome://tracing or https://ui.perfetto.dev. Bytes are the least that an op can move: every tensor
that it reads or writes, once. An op whose forward pass has stored the gradient moves nothing backward.
"""
METRICS = (
    "gpu__time_duration.sum",
    "dram__bytes_read.sum",
    "dram__bytes_write.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "launch__registers_per_thread",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "profile",
        help="times, bytes and bandwidth of one op or of a model's training step, and a trace",
        description="Profiles one op, the demo's training step, or a model of yours, and says what each op moved.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", metavar="OP|MODEL",
        help=f"{', '.join(OPS)}; demo (the demo's training step); or package.module:factory, called without arguments, "
             "which returns a torch.nn.Module")  # fmt: skip
    add(
        "--shape",
        type=_shape,
        help="of an op's input, as 4096,1000 (classes or channels in dimension 1); of "
        "an optimizer: 300,256 is 300 tensors of 256, one number is one tensor",
    )
    add("--input-shape", type=_shape, help="of a model's input, as 8,3,224,224")
    add("--dtype", default="float32", choices=list(DTYPES), help="of an op's tensors or a model (default: %(default)s)")
    add("--layout", default="contiguous", choices=("contiguous", "channels_last"),
        help="of a layer's input (default: %(default)s)")  # fmt: skip
    add("--targets", default="auto", choices=("auto", "dense", "index"),
        help="of a loss: dense floats like the logits, or class indices; auto: what people use with it")  # fmt: skip
    add("--reduction", default="mean", choices=("none", "mean", "sum"), help="of a loss (default: %(default)s)")
    add("--classes", type=_count, help=f"centers of a center loss (default: {CLASSES})")
    add("--device", choices=("cpu", "cuda"), help="default: CUDA when it is visible, else the CPU")
    add("--threads", type=int, default=1, help="of the CPU (default: %(default)s, which neighbours disturb least)")
    add("--steps", type=int, default=20, help="profiled steps, after a warm-up (default: %(default)s)")
    add("--eager", action="store_true",
        help="show the eager counterpart beside it: of an op or the demo plain PyTorch, of a model the same "
             "model with every dlkernels op on its plain PyTorch reference")  # fmt: skip
    add("--nvtx", action="store_true", help="no profiler, NVTX ranges instead: for a run under ncu or nsys (CUDA)")
    add("--out", type=Path, default=Path("demo-output"), help="folder of the trace (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    quiet()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no CUDA device is visible")
    if min(args.steps, args.threads) < 1:
        fail(f"--steps and --threads must be at least 1, got {args.steps} and {args.threads}")
    if args.nvtx and device != "cuda":
        fail("--nvtx marks ranges for NVIDIA's tools: it needs --device cuda")
    workload = make_workload(args, device)
    # Backward passes run in this thread, inside their range.
    with num_threads(args.threads), torch.autograd.set_multithreading_enabled(False):
        steps = [workload.fused, workload.eager] if args.eager else [workload.fused]
        for step in steps:
            for _ in range(WARMUP):
                step()
        if args.nvtx:
            _with_nvtx(workload, args.steps)
            return 0
        moved = bytes_per_step(workload.fused)
        walls = [_wall(step, args.steps) for step in steps]
        profiler = _profile(workload, args.steps, eager=args.eager)
    backend = _backend.state.forced or _backend.default_for(device)
    print(f"{workload.name}\ndevice {_device_name(device, args.threads)}, backend {backend}, {args.steps} steps\n")
    _report(profiler, moved, device)
    print("\nwithout the profiler: " + ", ".join(f"{k} {format_time(w)}" for k, w in zip(("fused", "eager"), walls)))
    args.out.mkdir(parents=True, exist_ok=True)
    trace = args.out / f"profile-{args.what.replace(':', '.')}.json"
    profiler.export_chrome_trace(str(trace))
    print(f"\ntrace: {trace} (open in https://ui.perfetto.dev)")
    print(f"\none kernel under Nsight Compute, on an NVIDIA GPU:\n{ncu_command(args, moved)}")
    return 0


# Running --------------------------------------------------------------------------------------------------------------


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _wall(step: Any, count: int) -> float:
    """Seconds per step, the fastest of `count` (CPU) or their mean (CUDA, which runs ahead)."""
    if torch.cuda.is_available():
        _synchronize()
        start = time.perf_counter()
        for _ in range(count):
            step()
        _synchronize()
        return (time.perf_counter() - start) / count
    best = float("inf")
    for _ in range(count):
        start = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - start)
    return best


def _profile(workload: Workload, steps: int, eager: bool) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(steps):
            with torch.profiler.record_function("fused step"):
                workload.fused()
            if eager:
                with torch.profiler.record_function("eager step"):
                    workload.eager()
        _synchronize()
    return profiler


def _with_nvtx(workload: Workload, steps: int) -> None:
    with torch.autograd.profiler.emit_nvtx():
        for _ in range(steps):
            with torch.profiler.record_function("fused step"):
                workload.fused()
    _synchronize()


# Reporting ------------------------------------------------------------------------------------------------------------


def _report(profiler: torch.profiler.profile, moved: dict[str, int], device: str) -> None:
    rows, ours = [], False
    for kind in ("fused", "eager"):
        root = f"{kind} step"
        ranges = _ranges(profiler.events(), root, device)
        for name, (calls, seconds) in ranges.items():
            kernel = name.startswith("dlkernels::")
            ours = ours or kernel
            count = moved.get(name, 0) if kind == "fused" else 0
            rate = f"{count / seconds / 1e9:.2f}" if count and seconds else ""
            depth = 0 if name == root else 4 if kernel else 2
            share = f"{seconds / ranges[root][1]:.1%}" if ranges[root][1] else ""
            rows.append((" " * depth + name, calls, format_time(seconds), format_bytes(count) if count else "", rate,
                         share))  # fmt: skip
    clock = "GPU time" if device == "cuda" else "CPU time with the profiler's overhead"
    print_table(
        f"One step ({clock}, median)", ("range", ">calls", ">time", ">least bytes", ">GB/s", ">share"), rows,
        "Least bytes: each tensor that the op reads or writes, once. GB/s: these bytes by this time.",
    )  # fmt: skip
    if not ours:
        print("No dlkernels kernel ran: the reference serves the ops, or there are none (`python -m dlkernels info`).")


def _ranges(events: Iterable[Any], root: str, device: str) -> dict[str, tuple[int, float]]:
    """{name: (calls, seconds)} of a step, medians over steps: the marked ranges and our ops inside `root`."""
    steps: dict[int, dict[str, list[float]]] = {}
    for event in sorted(events, key=lambda e: e.time_range.start):
        ours = event.name.startswith("dlkernels::")
        if event.device_type != torch.autograd.DeviceType.CPU or not (event.is_user_annotation or ours):
            continue
        step = _ancestor(event, root)
        if step is None or event.name.startswith("Optimizer.zero_grad"):
            continue
        if ours and _ancestor(event.cpu_parent, event.name) is not None:
            continue  # the eager entry and the operator below it carry one name
        spent = event.device_time_total if device == "cuda" else event.cpu_time_total
        steps.setdefault(step.id, {}).setdefault(event.name, []).append(spent * 1e-6)
    names = dict.fromkeys(name for step in steps.values() for name in step)
    return {
        name: (
            round(statistics.median(len(step.get(name, ())) for step in steps.values())),
            statistics.median(sum(step.get(name, ())) for step in steps.values()),
        )
        for name in names
    }


def _ancestor(event: Any, name: str) -> Any:
    """The event itself or the nearest one around it of this name, or None."""
    while event is not None and event.name != name:
        event = event.cpu_parent
    return event


def _device_name(device: str, threads: int) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu ({threads} thread{'s' if threads > 1 else ''})"


def ncu_command(args: argparse.Namespace, moved: Iterable[str]) -> str:
    """Nsight Compute on the op's kernels, after the warm-up; clocks are left alone, as for benchmarks."""
    own = ["python", "-m", "dlkernels", "profile", args.what, "--device", "cuda", "--dtype", args.dtype]
    for option, shape in (("--shape", args.shape), ("--input-shape", args.input_shape)):
        own += [option, ",".join(map(str, shape))] if shape else []
    if args.what in LOSSES:
        own += ["--targets", args.targets, "--reduction", args.reduction]
        own += ["--classes", str(args.classes)] if args.classes else []
    elif args.what in LAYERS:
        own += ["--layout", args.layout]
    own += ["--steps", "3", "--nvtx"]
    names = [args.what] if args.what in OPS else [name.removeprefix("dlkernels::") for name in moved]
    ncu = ["ncu", "--clock-control", "none", "--kernel-name", f"regex:{kernel_pattern(names)}"]
    ncu += ["--launch-skip", str(WARMUP), "--launch-count", "2", "--metrics", ",".join(METRICS)]
    return f"{shlex.join(ncu)} \\\n    {shlex.join(own)}"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected sizes such as 4096,1000, got {text!r}") from None
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected sizes of at least 1, got {text!r}")
    return shape
