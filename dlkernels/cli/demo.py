"""`python -m dlkernels demo`: one network, trained with eager and with fused layers, losses and optimizer."""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dlkernels as dk

from .. import _backend
from ..testing import num_threads
from . import _features, fail, format_time, need, output_folder, print_table, quiet
from ._budget import Parity

STEPS, QUICK_STEPS = 240, 40
SECONDS, QUICK_SECONDS = 1.0, 0.1  # per timing
THRESHOLD = 0.85
EXAMPLES = """\
examples:
  python -m dlkernels demo
  python -m dlkernels demo --quick --out /tmp/demo
  python -m dlkernels demo --device cuda --steps 1000
  python -m dlkernels demo --features

Trains a small residual network (GroupNorm, MONAI's squeeze-and-excitation, stochastic depth) on scikit-learn's digits,
made long-tailed (class c keeps 0.75^c of its images), four times from one seed: balanced focal loss and cross entropy,
each with layers, loss and AdamW of plain PyTorch and with fused ones. The eager network's state_dict loads into the
fused one. The same network of torch's and MONAI's own layers is swapped in place by dlkernels.swap, whose report is
shown. At the start, outputs and parameter gradients of all networks are compared with float64, and so are the
parameters after twenty steps of both optimizers with the same gradients. At every step of the eager runs, both losses
and their gradients are computed on the same logits and held to the error budget of dlkernels.testing.
Exit code 1: a network, an optimizer or a step outside its budget, or a balanced accuracy of at most 85 %.

--features shows something else, what losses do to features: it trains small networks with cross entropy, center loss,
island loss and GCCS loss, draws the features of the test images (features.png) and writes the numbers (features.json).
Exit code 1: center loss does not bring the features of a class together, or an accuracy of at most 85 %.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="train a network with eager and with fused layers, losses and optimizer: same results, times, one picture",
        description='Shows that swapping layers, losses and optimizer changes the speed only. Needs "dlkernels[demo]".',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--features", action="store_true", help="draw what center, island and GCCS loss do to the features"
    )
    parser.add_argument("--quick", action="store_true", help="few steps, short timings, no accuracy required")
    parser.add_argument(
        "--steps",
        type=int,
        help=f"training steps of each run (default: {STEPS}, quick {QUICK_STEPS}; with --features "
        f"{_features.STEPS}, quick {_features.QUICK_STEPS})",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="folder of what it writes (default: %(default)s)"
    )
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: CUDA when it is visible, else the CPU"
    )
    parser.set_defaults(run=run)


@dataclass
class Demo:
    """What the parts hand to each other."""

    quick: bool
    steps: int
    seconds: float
    device: str
    out: Path
    data: Any = None
    models: list[Any] = field(default_factory=list)
    swap: Any = None  # the report of the plain network's swap
    swapped: list[Any] = field(default_factory=list)
    optimizers: list[Any] = field(default_factory=list)
    runs: list[Any] = field(default_factory=list)
    timings: list[Any] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    quiet()
    warnings.filterwarnings("ignore", module="monai")
    if args.steps is not None and args.steps < 1:
        fail(f"--steps must be at least 1, got {args.steps}")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no CUDA device is visible")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if args.features:
        return _features.run(args, device)
    need("demo", "rich", "matplotlib", "sklearn", "monai")
    output_folder(args.out)
    steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    demo = Demo(args.quick, steps, QUICK_SECONDS if args.quick else SECONDS, device, args.out)
    start = time.perf_counter()
    with num_threads(1):  # a model this small gains nothing from more, and loses much where cores are shared
        for part in PARTS:
            part(demo)
    verdict = "FAIL: " + "; ".join(demo.failures) if demo.failures else "PASS"
    print(f"{verdict} ({time.perf_counter() - start:.0f} s)")
    return 1 if demo.failures else 0


# Parts, in this order -------------------------------------------------------------------------------------------------


def prepare(demo: Demo) -> None:
    from . import _demo_model
    from . import _demo_parts as parts

    demo.data = parts.load_data(demo.device)
    model = parts.make_model(demo.device, "eager")
    count = sum(p.numel() for p in model.parameters())
    backend = _backend.state.forced or _backend.default_for(demo.device)
    blocks = len(_demo_model.STAGES)
    print(
        f"model    {blocks} residual blocks: GroupNorm, squeeze-and-excitation, stochastic depth; {count:,} parameters,"
    )
    print("         those of the eager network loaded into the fused one")
    print(f"data     digits 8 x 8, per class {demo.data.counts.tolist()} for training,", end=" ")
    print(f"{parts.TEST_PER_CLASS} each for testing")
    threads = "one thread; " if demo.device == "cpu" else ""
    print(f"device   {demo.device}; {threads}fused ops run on {backend}", end="\n\n")
    if backend == "reference":
        print("         (plain PyTorch: no kernel is active, so expect no speedup; see `python -m dlkernels info`)\n")


def compare(demo: Demo) -> None:
    """The networks and both optimizers before training: what layers and steps compute."""
    from . import _demo_model

    x, y = demo.data.train_x[: _demo_model.BATCH], demo.data.train_y[: _demo_model.BATCH]
    demo.models = _demo_model.compare_models(x, y)
    demo.swap = dk.swap(_demo_model.make_model(demo.device, "plain"))
    demo.swapped = _demo_model.compare_models(x, y, "swapped")
    for each in (*demo.models, *demo.swapped):
        if each.failed:
            worst = max((each.output, each.gradient), key=lambda parity: parity.ratio)
            demo.failures.append(f"the {each.kind} network, {each.mode} in {_dtype(each)}: error {worst.error:.2e}, "
                                 f"allowed {worst.allowed:.2e}")  # fmt: skip
    demo.optimizers = _demo_model.compare_optimizers(demo.device)
    for each in demo.optimizers:
        if each.failed:
            demo.failures.append(f"the fused optimizer in {_dtype(each)}: error {each.parameters.error:.2e}, "
                                 f"allowed {each.parameters.allowed:.2e}")  # fmt: skip


def train(demo: Demo) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from . import _demo_parts as parts

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        jobs = [(loss, kind) for loss in (make(demo.data) for make in parts.LOSSES) for kind in ("eager", "fused")]
        tasks = [progress.add_task(f"{loss.name}, {kind}", total=demo.steps) for loss, kind in jobs]
        for (loss, kind), task in zip(jobs, tasks, strict=True):
            demo.runs.append(parts.train(loss, kind, demo.data, demo.steps, lambda task=task: progress.advance(task)))
    for each in demo.runs:
        if each.violations:
            more = f" (and {len(each.violations) - 1} more)" if len(each.violations) > 1 else ""
            demo.failures.append(f"parity: {each.violations[0]}{more}")
        reached = each.accuracy[-1][1]
        if not demo.quick and each.loss.name == "focal" and reached <= THRESHOLD:
            demo.failures.append(
                f"balanced accuracy of {each.loss.name}, {each.kind}: {reached:.1%}, expected more than {THRESHOLD:.0%}"
            )


def measure(demo: Demo) -> None:
    from rich.progress import Progress, SpinnerColumn, TextColumn

    from . import _demo_timings as timings

    last = demo.runs[0]
    cases = (
        timings.time_losses(demo.data, last.logits, last.labels, demo.seconds),
        timings.time_layers(demo.device, demo.seconds),
        timings.time_optimizers(demo.device, demo.seconds),
    )
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), transient=True) as progress:
        task = progress.add_task("timing losses, layers and optimizers")
        for timing in itertools.chain(*cases):
            demo.timings.append(timing)
            progress.update(task, description=f"timed {timing.name}")
        demo.timings.append(timings.time_step(demo.data, last.loss, 2 * demo.seconds))
        demo.timings.append(timings.time_swapped(demo.data, last.loss, demo.seconds))


def report(demo: Demo) -> None:
    from . import _demo_model

    print("dlkernels.swap(model), where model is the same network of torch's and MONAI's own layers:")
    print(demo.swap)
    print_table(
        "The network before training: eager, fused and swapped, same weights, same seed",
        ("network", "mode", "dtype", ">output error", ">of budget", ">gradient error", ">of budget", "result"),
        [(each.kind, each.mode, _dtype(each), *_shares(each.output), *_shares(each.gradient),
          "FAIL" if each.failed else "PASS") for each in (*demo.models, *demo.swapped)],
        "Errors against eager in float64: its own (eager's). The gradient is that of every parameter, as one vector.",
    )  # fmt: skip
    print_table(
        f"The optimizer before training: {_demo_model.OPTIMIZER_STEPS} steps of AdamW, same weights, same gradients",
        ("dtype", ">parameters' error", ">of budget", "result"),
        [(_dtype(each), *_shares(each.parameters), "FAIL" if each.failed else "PASS") for each in demo.optimizers],
        "Errors against torch.optim.AdamW in float64: fused (eager); every parameter, as one vector.",
    )
    rows = []
    for each in demo.runs:
        cells = [_parity(*each.parity[what]) if each.parity else "" for what in ("loss", "gradient")]
        rows.append((each.loss.name, each.kind, len(each.losses), *cells, f"{each.losses[-1]:.4f}",
                     f"{each.accuracy[-1][1]:.1%}"))  # fmt: skip
    print_table(
        "Training: eager and fused from the same weights and batches",
        ("loss", "run", ">steps", ">worst loss error", ">worst gradient error", ">final loss", ">balanced accuracy"),
        rows,
        "Errors against float64 on the same logits, over all steps: fused (eager; share of the budget; step). "
        "Final losses differ as runs do that differ in the last bit.",
    )
    print_table(
        "Time of forward + backward, and of optimizer steps: in turns, the fastest of many rounds (CPU: one thread)",
        ("case", ">eager", ">fused", ">speedup"),
        [(t.name, format_time(t.eager), format_time(t.fused), f"{t.speedup:.2f}x") for t in demo.timings],
        _share(demo),
    )
    if demo.quick:
        print(f"--quick: the balanced accuracy is not held to its threshold of {THRESHOLD:.0%}.")


def picture(demo: Demo) -> None:
    from ._demo_picture import draw

    print(f"picture  {draw(demo.models, demo.optimizers, demo.runs, demo.timings, demo.out)}")


PARTS: list[Callable[[Demo], None]] = [prepare, compare, train, measure, report, picture]


def _parity(step: int, parity: Parity) -> str:
    return f"{parity.error:.1e} ({parity.eager_error:.1e}; {parity.ratio:.0%}; {step})"


def _shares(parity: Parity) -> tuple[str, str]:
    return f"{parity.error:.1e} ({parity.eager_error:.1e})", f"{parity.ratio:.0%}"


def _dtype(each: Any) -> str:
    return str(each.dtype).removeprefix("torch.")


def _share(demo: Demo) -> str:
    step = next(t for t in demo.timings if t.kind == "step")
    parts = {"loss": demo.timings[0], "optimizer": next(t for t in demo.timings if t.kind == "optimizer")}
    eager, fused = (
        " and ".join(f"{getattr(part, kind) / getattr(step, kind):.1%} ({name})" for name, part in parts.items())
        for kind in ("eager", "fused")
    )
    return (
        f"This network is tiny, and so are the shares of its loss and its optimizer: {eager} of the eager step, "
        f"{fused} of the fused one. Most of the step is convolutions, the same on both sides. The larger rows show "
        "what losses, layers and optimizers cost at scale."
    )
