"""The demo's picture: the loss curves, what was learnt, the times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import format_time

EAGER, FUSED = "#8a8f98", "#d1495b"
COLOURS = {"focal": "#d1495b", "cross entropy": "#2e6f95"}
STYLES = {"eager": {"linewidth": 4.5, "alpha": 0.3}, "fused": {"linewidth": 1.4, "linestyle": "--"}}


def draw(runs: list[Any], timings: list[Any], out: Path) -> Path:
    """Write demo.png into the folder `out`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(18, 5.6), layout="constrained", gridspec_kw={"width_ratios": (1, 1, 1.15)}
    )
    _curves(left, [r for r in runs if r.loss.name == runs[0].loss.name])
    _accuracy(middle, runs)
    _times(right, timings)
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


def _times(axes: Any, timings: list[Any]) -> None:
    for row, timing in enumerate(timings):
        share = 100 * timing.fused / timing.eager
        axes.barh(row, 100, 0.62, color=EAGER, alpha=0.45, label="eager = 100 %" if row == 0 else None)
        axes.barh(row, share, 0.62, color=FUSED, label="fused" if row == 0 else None)
        axes.text(max(share, 100) + 2, row, f"{timing.speedup:.1f}x", va="center", fontsize=12, fontweight="bold")
        text = f"{format_time(timing.eager)}  →  {format_time(timing.fused)}"
        inside = share < 50
        axes.text(98 if inside else 3, row, text, va="center", ha="right" if inside else "left", fontsize=9.5,
                  color="black" if inside else "white")  # fmt: skip
    axes.set_xlim(0, 122)
    axes.set_xticks(range(0, 101, 25))
    axes.set_yticks(range(len(timings)), [t.name.replace(", ", "\n", 1).replace(" (", "\n(", 1) for t in timings])
    axes.set_ylim(len(timings) - 0.4, -1.0)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("% of the eager time")
    axes.set_title("Time of forward + backward", loc="left", fontweight="bold")
    axes.legend(frameon=False, loc="upper left", ncols=2, borderpad=0.1)
    _note(axes, "Eager and fused in turns, the fastest of many rounds; CPU: one thread.\n"
                "The step is the whole model's: its loss is a small part of it.")  # fmt: skip


def _note(axes: Any, text: str) -> None:
    axes.text(0, -0.15, text, transform=axes.transAxes, va="top", fontsize=8.5, color="#555555")
