"""The table of training steps: whole models, eager, swapped and compiled, in Markdown and on the terminal."""

from __future__ import annotations

import math
from typing import Any

FAMILY = "models"
HEADER = [
    "training step",
    "eager, ms",
    "torch's fused AdamW",
    "swapped",
    "+ our AdamW",
    "compiled",
    "compiled with ours",
    "share of the swapped, %",
    "share of AdamW, %",
    "",
]
COLUMNS = ("eager-fused-adamw", "swapped", "swapped-adamw", "compile", "compile-dlkernels")
OURS = ("swapped", "swapped-adamw", "compile-dlkernels")
DROPPED = ((), (2,), (8,), (7,))  # of a narrow terminal
Record = dict[str, Any]


def label(record: Record) -> str:
    parts = [record["library"], f"{record['batch']} x {record['size']}"]
    parts += [record["dtype"]] if record["dtype"] != "float32" else []
    parts += [record["layout"]] if record["layout"] != "contiguous" else []
    return f"{record['name']} ({', '.join(filter(None, parts))})"


def losing(record: Record) -> str:
    """Where ours loses, and to whom; what failed."""
    parts = [f"REFUSED: {record['refused'].partition(':')[0]}"] if record["refused"] else []
    for name in OURS:
        rivals = record["candidates"].get(name, {}).get("slower_than", [])
        parts += [f"{name} slower than {', '.join(rivals)}"] if rivals else []
    return "; ".join([*parts, *(f"{name} failed" for name in record["failed"])])


def row(record: Record) -> list[str]:
    """Eager in ms, the others in ms and as times faster than eager, shares in per cent, and what is lost."""
    results = record["candidates"]
    eager = results.get("eager", {}).get("min_ms")
    cells = [label(record), f"{eager:.1f}" if eager else "-"]
    for name in COLUMNS:
        entry = results.get(name)
        cells.append(f"{entry['min_ms']:.1f} ({entry['x_eager']:.2f}x)" if entry else "-")
    share = record["share"]
    cells += [f"{100 * share[key]:.1f}" if share else "-" for key in ("modules", "optimizer")]
    return [*cells, losing(record)]


def conclusion(doc: dict[str, Any]) -> str:
    """Geometric means over the models against eager, and how many rows lose."""
    records = [r for r in doc["records"] if not r["refused"]]
    parts = [f"{len(records)} models"]
    parts += [f"{len(doc['records']) - len(records)} REFUSED"] if len(records) < len(doc["records"]) else []
    for name in ("swapped", "swapped-adamw", "compile", "compile-dlkernels"):
        ratios = [r["candidates"][name]["x_eager"] for r in records if name in r["candidates"]]
        if ratios:
            parts.append(f"{name} {math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f}x")
    parts.append(f"{sum(bool(losing(r)) for r in records)} with a form of ours slower than another")
    return f"{parts[0]}; geometric means against eager: {', '.join(parts[1:])}"


def swaps(doc: dict[str, Any]) -> list[str]:
    """What was swapped in each model, and why something was left."""
    lines = []
    for record in doc["records"]:
        if swap := record["swap"]:
            left = f"; left: {'; '.join(swap['left'])}" if swap["left"] else ""
            lines.append(f"{record['name']}: {swap['summary']}{left}")
    return lines


def markdown(doc: dict[str, Any], machine: str) -> str:
    """The section for one device."""
    rounds = {e["rounds"] for r in doc["records"] for e in r["candidates"].values()}
    how = next((r["share"]["how"] for r in doc["records"] if r["share"]), "")
    lines = ["### models", "", f"**{machine}**: {conclusion(doc)}.", ""]
    lines += ["| " + " | ".join(HEADER) + " |", "|---|" + "---:|" * (len(HEADER) - 2) + "---|"]
    lines += ["| " + " | ".join(row(record)) + " |" for record in doc["records"]]
    lines += ["", "Forward, loss, backward, optimizer step and zero_grad; the fastest of "
              f"{' or '.join(map(str, sorted(rounds)))} rounds, in turns; AdamW is torch's default where nothing else "
              "is said. Losses of all candidates agreed before anything was timed.", ""]  # fmt: skip
    lines += [f"Shares: {how}.", ""] if how else []
    lines += ["Swapped: " + ". ".join(swaps(doc)) + ".", ""] if swaps(doc) else []
    return "\n".join(lines)
