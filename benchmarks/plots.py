"""Two pictures of a result document: speed against eager, and bandwidth against the roof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import report

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

OURS = "dlkernels"
COLORS = {OURS: "#d1495b", "compile": "#6b9ac4", report.FUSED: "#6b9ac4", "eager": "#8d99ae"}
MARKERS = {"eager": "x", "compile": "s", report.FUSED: "s", OURS: "o"}
LABELS = {"compile": "torch.compile"}
PANELS = {"fwd+bwd": "forward + backward", "fwd": "forward, no_grad", "step": "one step"}
GRID = "#e5e7eb"


def _measured(doc: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in doc["records"] if not r["refused"] and "gbps" in r["candidates"].get(OURS, {})]


def _short(record: dict[str, Any]) -> str:
    """The case without its op: that is the heading."""
    return record["name"].split(" ", 1)[1].replace("label_smoothing", "smoothing").replace("=True", "")


def draw(doc: dict[str, Any], directory: Path) -> list[Path]:
    records = _measured(doc)
    if not records:
        return []
    paths = [directory / f"{doc['family']}_speed.png", directory / f"{doc['family']}_bandwidth.png"]
    with plt.rc_context(
        {"font.size": 9, "axes.edgecolor": "#9ca3af", "axes.titlesize": 10, "font.family": "DejaVu Sans"}
    ):
        _speed(doc, records, paths[0])
        _bandwidth(doc, records, paths[1])
    return paths


def _speed(doc: dict[str, Any], records: list[dict[str, Any]], path: Path) -> None:
    """Bars: how many times faster than eager PyTorch (the line at 1), compiled (or torch's fused step) and ours."""
    base = report.second(records)
    lines: list[dict[str, Any] | str] = []
    for record in records:
        if not lines or record["op"] != next(r["op"] for r in reversed(lines) if isinstance(r, dict)):
            lines.append(record["op"])
        lines.append(record)
    figure, axes = plt.subplots(figsize=(9.5, 0.29 * len(lines) + 1.1), layout="constrained")
    widest = 1.0
    for y, line in enumerate(lines):
        if isinstance(line, str):
            continue
        for name, offset in ((OURS, -0.2), (base, 0.2)):
            ratio = line["candidates"].get(name, {}).get("x_eager")
            if ratio is None:
                continue
            widest = max(widest, ratio)
            axes.barh(y + offset, ratio - 1, 0.4, left=1, color=COLORS[name])
            best = name == OURS
            axes.annotate(
                f"{ratio:.2f}x" if ratio < 1.05 else f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x",
                (ratio, y + offset),
                xytext=(3 if ratio >= 1 else -3, 0),
                textcoords="offset points",
                va="center",
                ha="left" if ratio >= 1 else "right",
                fontsize=7,
                color="#111827" if best else "#6b7280",
                weight="bold" if best else "normal",
            )
    axes.axvline(1, color="#374151", linewidth=1.2)
    axes.set_xscale("log", base=2)
    ratios = [c["x_eager"] for r in records for n, c in r["candidates"].items() if n in (OURS, base) and "x_eager" in c]
    axes.set_xlim(min(0.5, min(ratios) / 1.5), widest * 1.4)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(lines)), ["" if isinstance(line, str) else _short(line) for line in lines], fontsize=8)
    for y, line in enumerate(lines):
        if isinstance(line, str):
            axes.annotate(
                line,
                (0, y),
                xycoords=("axes fraction", "data"),
                xytext=(-5, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                weight="bold",
                fontsize=9,
                annotation_clip=False,
            )
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.tick_params(length=0)
    axes.grid(axis="x", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("times faster than eager PyTorch (line at 1x); below 1x is slower")
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[n]) for n in (OURS, base)]
    axes.legend(
        handles, [OURS, LABELS.get(base, base)], loc="lower right", frameon=True, framealpha=0.95, edgecolor=GRID
    )
    axes.set_title(f"{doc['device']['name']}, torch {doc['environment']['torch']}", loc="left", color="#374151")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bandwidth(doc: dict[str, Any], records: list[dict[str, Any]], path: Path) -> None:
    """Points: minimal bytes of a case over its time, against what a plain copy of as many bytes reaches here."""
    directions = ["step"] if any(r["direction"] == "step" for r in records) else ["fwd+bwd", "fwd"]
    size = (5.25 * len(directions), 4.4)
    figure, panels = plt.subplots(1, len(directions), figsize=size, sharey=True, squeeze=False, layout="constrained")
    panels = panels[0]
    drawn = [name for name in MARKERS if name in ("eager", report.second(records), OURS)]
    for axes, direction in zip(panels, directions, strict=True):
        chosen = [r for r in records if r["direction"] == direction]
        curve = [
            [64, doc["copy"]["curve"][0][1] * 64 / doc["copy"]["curve"][0][0]],
            *doc["copy"]["curve"],
        ]  # a copy costs a call
        axes.plot(*zip(*curve, strict=True), color="#111827", linewidth=1.6, label="copy of as many bytes", zorder=1)
        axes.fill_between([c[0] for c in curve], [c[1] for c in curve], 1e-3, color="#111827", alpha=0.04, linewidth=0)
        for record in chosen:
            ends = [record["candidates"][n]["gbps"] for n in drawn if "gbps" in record["candidates"].get(n, {})]
            axes.plot([record["bytes"]] * 2, [min(ends), max(ends)], color="#d1d5db", linewidth=0.8, zorder=1)
        for name in drawn:
            points = [
                (r["bytes"], r["candidates"][name]["gbps"]) for r in chosen if "gbps" in r["candidates"].get(name, {})
            ]
            if points:
                ours = name == OURS
                axes.scatter(
                    *zip(*points, strict=True),
                    marker=MARKERS[name],
                    s=34 if ours else 20,
                    color=COLORS[name],
                    zorder=3 if ours else 2,
                    alpha=0.95 if ours else 0.8,
                    label=LABELS.get(name, name),
                    linewidths=1,
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(PANELS[direction], loc="left", color="#374151")
        axes.set_xlabel("minimal bytes of the case")
        axes.xaxis.set_major_formatter(FuncFormatter(_size))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    rates = [c["gbps"] for r in records for c in r["candidates"].values() if "gbps" in c]
    sizes = [r["bytes"] for r in records]
    panels[0].set_ylim(min(rates) / 1.6, 1.6 * max([*rates, *(c[1] for c in doc["copy"]["curve"])]))
    for axes in panels:
        axes.set_xlim(min(sizes) / 2, max(sizes) * 2)
    panels[0].set_ylabel("GB/s over minimal bytes")
    panels[-1].legend(loc="lower right", frameon=True, framealpha=0.95, edgecolor=GRID)
    figure.suptitle(
        f"{doc['device']['name']}, torch {doc['environment']['torch']}", x=0.01, ha="left", fontsize=10, color="#374151"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _size(value: float, _: Any) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:g} {unit}"
    return f"{value:g} B"
