"""The demo's picture: the loss curves, what was learnt, how exact it is, the times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import format_time

EAGER, FUSED = "#8a8f98", "#d1495b"
COLOURS = {"focal": "#d1495b", "cross entropy": "#2e6f95"}
GAP = 0.55  # between groups of bars
FULL = 112  # where a bar that is slower than eager is cut off
STYLES = {"eager": {"linewidth": 4.5, "alpha": 0.3}, "fused": {"linewidth": 1.4, "linestyle": "--"}}


def draw(models: list[Any], optimizers: list[Any], runs: list[Any], timings: list[Any], out: Path) -> Path:
    """Write demo.png into the folder `out`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(15, 10.6), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=(1, 1.25), height_ratios=(1, 1, 0.8))
    _curves(figure.add_subplot(grid[0, 0]), [r for r in runs if r.loss.name == runs[0].loss.name])
    _accuracy(figure.add_subplot(grid[1, 0]), runs)
    _budgets(figure.add_subplot(grid[2, 0]), models, optimizers, runs)
    _times(figure.add_subplot(grid[:, 1]), timings)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "demo.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _curves(axes: Any, runs: list[Any]) -> None:
    for run, colour in zip(runs, (EAGER, FUSED), strict=True):
        steps = range(1, len(run.losses) + 1)
        width = 2.8 if run.kind == "eager" else 0.9
        axes.plot(steps, run.losses, color=colour, linewidth=width, label=run.kind)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_title(f"Training loss, {runs[0].loss.name}", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="upper right")
    _note(axes, "Same weights, same batches. Curves may drift apart by chaos alone: training\namplifies the last bit. "
                "On the same logits they agree at every step.")  # fmt: skip


def _accuracy(axes: Any, runs: list[Any]) -> None:
    for run in runs:
        steps, values = zip(*run.accuracy, strict=True)
        label = f"{run.loss.name}, {run.kind}: {values[-1]:.1%}"
        colour = COLOURS.get(run.loss.name)
        axes.plot(steps, [100 * v for v in values], color=colour, label=label, **STYLES[run.kind])
    axes.set_xlabel("step")
    axes.set_ylabel("%")
    axes.set_title("Balanced accuracy on the test set", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="lower right", title="after the last step", alignment="left")
    axes.grid(axis="y", alpha=0.25)
    _note(axes, "Mean recall of ten classes, 40 test images each: one image is 0.25 %.\n"
                "The rarest class has a dozen training images.")  # fmt: skip


def _budgets(axes: Any, models: list[Any], optimizers: list[Any], runs: list[Any]) -> None:
    """What share of its error budget each comparison has used."""
    shares = [
        (f"network, {each.mode}: {what}", parity.ratio)
        for each in models
        if str(each.dtype) == "torch.float32"
        for what, parity in (("output", each.output), ("gradient", each.gradient))
    ]
    shares += [
        ("optimizer: parameters", each.parameters.ratio) for each in optimizers if str(each.dtype) == "torch.float32"
    ]
    shares += [
        (f"{run.loss.name}: {what}", run.parity[what][1].ratio)
        for run in runs
        if run.parity
        for what in ("loss", "gradient")
    ]
    for row, (_, ratio) in enumerate(shares):
        axes.barh(row, min(100 * ratio, FULL), 0.6, color=FUSED if ratio > 1 else "#4d9078")
        axes.text(min(100 * ratio, FULL) + 1, row, f"{ratio:.0%}", va="center", fontsize=9)
    axes.axvline(100, color="black", linewidth=1)
    axes.set_xlim(0, FULL)
    axes.set_xticks(range(0, 101, 25))
    axes.set_yticks(range(len(shares)), [name for name, _ in shares])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_title("Error against float64, % of its budget", loc="left", fontweight="bold")
    _note(axes, "Budget: twice the error of plain PyTorch plus 4 units in the last place (8 for a loss).\n"
                "Network and optimizer before training; the losses at the worst of all steps.")  # fmt: skip


def _times(axes: Any, timings: list[Any]) -> None:
    """One bar per case; losses, layers, optimizers and the step apart from each other."""
    rows, row, previous = [], 0.0, timings[0].kind
    for timing in timings:
        row += GAP if timing.kind != previous else 0
        previous = timing.kind
        rows.append(row)
        row += 1
    for row, timing in zip(rows, timings, strict=True):
        share = 100 * timing.fused / timing.eager
        first = row == 0
        speedup = f"{timing.speedup:.{0 if timing.speedup >= 100 else 1}f}x"
        axes.barh(row, 100, 0.62, color=EAGER, alpha=0.45, label="eager = 100 %" if first else None)
        axes.barh(row, min(share, FULL), 0.62, color=FUSED, label="fused" if first else None)
        axes.text(max(min(share, FULL), 100) + 2, row, speedup, va="center", fontsize=12,
                  fontweight="bold")  # fmt: skip
        text = f"{format_time(timing.eager)}  →  {format_time(timing.fused)}"
        inside = share < 50
        axes.text(98 if inside else 3, row, text, va="center", ha="right" if inside else "left", fontsize=9.5,
                  color="black" if inside else "white")  # fmt: skip
    axes.set_xlim(0, FULL + 12)
    axes.set_xticks(range(0, 101, 25))
    axes.set_yticks(rows, [_two_lines(t.name) for t in timings])
    axes.set_ylim(rows[-1] + 0.6, -1.2)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("% of the eager time")
    axes.set_title("Time of forward + backward, and of optimizer steps", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="upper left", ncols=2, borderpad=0.1)
    text = (
        "Eager and fused in turns, the fastest of many rounds; CPU: one thread.\n"
        "The step is the whole network's: its convolutions are the same on both sides."
    )
    _note(axes, text, below=0.055)


def _two_lines(name: str) -> str:
    return name.replace(", ", "\n", 1).replace(" (", "\n(", 1)


def _note(axes: Any, text: str, below: float = 0.19) -> None:
    axes.text(0, -below, text, transform=axes.transAxes, va="top", fontsize=8.5, color="#555555")
