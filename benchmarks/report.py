"""Benchmark JSON -> table on the terminal, plots, and the section of README.md.

python benchmarks/report.py                                    the last local run
python benchmarks/report.py benchmarks/results/*/focal_loss.json
python benchmarks/report.py --readme                           README.md, from all results that are committed
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import model_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
OURS = "dlkernels"
FUSED = "torch fused"
NOT_RESULTS = ("tests", "gate", "copy", "results", "pytest_benchmark")
Record = dict[str, Any]

# The document ---------------------------------------------------------------------------------------------------------


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        return match.group(1).strip() if match else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def device_name(device: str) -> str:
    if device != "cuda":
        return f"{cpu_name()}, 1 thread"
    import torch

    return torch.cuda.get_device_name()


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower().replace("(r)", "").replace("(tm)", "")).strip("-")


@functools.cache
def commit() -> str:
    """Short hash of the checkout, with a + when files differ from it; empty outside git."""
    try:
        run = lambda *a: subprocess.run(["git", "-C", str(ROOT), *a], capture_output=True, text=True, timeout=20)  # noqa: E731
        head, changed = run("rev-parse", "--short", "HEAD"), run("status", "--porcelain", "-uno")
        return head.stdout.strip() + ("+" if changed.stdout.strip() else "") if head.returncode == 0 else ""
    except (OSError, subprocess.SubprocessError):
        return ""


def document(
    family: str, device: str, records: list[Record], curve: list[tuple[int, float]], tests: str
) -> dict[str, Any]:
    """All that a reader needs to judge the numbers."""
    import torch

    import dlkernels as dk

    info = dk.build_info()
    environment = {
        "torch": torch.__version__, "python": platform.python_version(), "cpu": cpu_name(), "triton": info["triton"],
        "backend": {op: by_device[device]["backend"] for op, by_device in info["ops"].items()}, "cpp": info["cpp"],
        "aten_isa": torch.backends.cpu.get_cpu_capability(), "commit": commit(),
        "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }  # fmt: skip
    large = curve[-1][1] if curve else None
    return {
        "schema": 1, "family": family, "tests": tests, "environment": environment,
        "device": {"kind": device, "name": device_name(device), "slug": slug(device)},
        "copy": {"large_gbps": large, "curve": curve}, "records": records,
    }  # fmt: skip


def write(doc: dict[str, Any], directory: Path) -> list[Path]:
    """JSON first, then the plots where matplotlib is."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{doc['family']}.json"
    path.write_text(json.dumps(doc, indent=1, default=str) + "\n")
    return [path, *_plots(doc, directory)]


def _plots(doc: dict[str, Any], directory: Path) -> list[Path]:
    doc = valid(doc)
    if not any(OURS in r["candidates"] and not r["refused"] for r in doc["records"]):
        return []
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no plots")
        return []
    import plots

    return plots.draw(doc, directory)


def valid(doc: dict[str, Any]) -> dict[str, Any]:
    """The document with every row refused where the family's tests fail: measured all the same, but no result."""
    if doc["tests"] != "failed":
        return doc
    why = f"tests fail: {doc.get('tests_why', '')}"[:300]
    return doc | {"records": [r | {"refused": r["refused"] or why} for r in doc["records"]]}


# Rows -----------------------------------------------------------------------------------------------------------------


def time_of(record: Record, name: str, key: str = "time_us") -> float | None:
    return record["candidates"].get(name, {}).get(key)


def slower_than(record: Record, key: str = "time_us") -> list[str]:
    """The candidates that beat ours by more than the spread between our own rounds."""
    ours = time_of(record, OURS, key)
    if ours is None:
        return []
    noise = 1 + max(record["candidates"][OURS].get("spread", 0.0), 0.01)
    return [n for n in record["candidates"] if n != OURS and (t := time_of(record, n, key)) and t * noise < ours]


def _time(us: float | None) -> str:
    if us is None:
        return "-"
    return (
        f"{us:.1f} us"
        if us < 100
        else f"{us:.0f} us"
        if us < 1000
        else f"{us / 1e3:.2f} ms"
        if us < 1e5
        else f"{us / 1e3:.0f} ms"
    )


def _bytes(n: int | None) -> str:
    if n is None:
        return "-"
    return (
        f"{n} B"
        if n < 1000
        else f"{n / 1e3:.0f} kB"
        if n < 1e6
        else f"{n / 1e6:.1f} MB"
        if n < 1e9
        else f"{n / 1e9:.2f} GB"
    )


def _ratio(record: Record, base: str, key: str = "time_us") -> str:
    ours, other = time_of(record, OURS, key), time_of(record, base, key)
    return "-" if not ours or not other else f"{other / ours:.2f}" if other / ours < 10 else f"{other / ours:.1f}"


HEADER = [
    "case",
    "eager",
    "compile",
    "ours",
    "GB/s",
    "% of copy",
    "x eager",
    "x compile",
    "peak memory: ours / eager",
    "",
]


def second(records: list[Record]) -> str:
    """Whom the table shows beside eager: compiled code, or torch's fused step where there is nothing to compile."""
    names = {name for record in records for name in record["candidates"]}
    return FUSED if FUSED in names and "compile" not in names else "compile"


def header(base: str) -> list[str]:
    return [word.replace("compile", base) for word in HEADER]


def row(record: Record, key: str = "time_us", base: str = "compile") -> list[str]:
    """One line of the table; the last field says what is wrong with it, if anything."""
    name = f"{record['name']}"
    if record["refused"]:
        return [name, *["-"] * 8, f"REFUSED: {record['refused'].partition(':')[0]}"]
    ours = record["candidates"].get(OURS, {})
    rate = (
        [f"{ours['gbps']:.0f}", f"{100 * ours['copy_share']:.0f}"]
        if "gbps" in ours and key == "time_us"
        else ["-", "-"]
    )
    peaks = f"{_bytes(ours.get('peak_bytes'))} / {_bytes(time_of(record, 'eager', 'peak_bytes'))}"
    beaten = slower_than(record, key)
    times = [_time(time_of(record, n, key)) for n in ("eager", base, OURS)]
    return [name, *times, *rate, _ratio(record, "eager", key), _ratio(record, base, key), peaks,
            f"slower than {', '.join(beaten)}" if beaten else ""]  # fmt: skip


def geomean(records: list[Record], base: str, key: str = "time_us") -> float | None:
    logs = [math.log(t / o) for r in records if (t := time_of(r, base, key)) and (o := time_of(r, OURS, key))]
    return math.exp(sum(logs) / len(logs)) if logs else None


def conclusion(doc: dict[str, Any]) -> str:
    doc = valid(doc)
    records = [r for r in doc["records"] if not r["refused"]]
    refused = len(doc["records"]) - len(records)
    parts = [f"{len(records)} cases"] + ([f"{refused} REFUSED"] if refused else [])
    for base in ("eager", second(records)):
        mean = geomean(records, base)
        if mean is not None:
            parts.append(f"{mean:.2f}x {base} (geometric mean)")
    parts.append(f"{sum(bool(slower_than(r)) for r in records)} slower than another candidate")
    parts += [_busy(doc).removeprefix(", ")] if busy(doc) else []
    if "reference" in set(doc["environment"].get("backend", {}).values()):
        parts.append("ours was the plain PyTorch REFERENCE")
    if doc["tests"] != "passed":
        parts.append(f"tests {doc['tests']}")
    return ", ".join(parts)


def busy(doc: dict[str, Any]) -> bool:
    """More work was waiting than there are cores: ratios of such a run are not to be quoted."""
    load, cores = doc["environment"].get("load"), doc["environment"].get("cores")
    return doc["device"]["kind"] == "cpu" and bool(load and cores) and load > cores


def _busy(doc: dict[str, Any]) -> str:
    env = doc["environment"]
    return f", on a BUSY machine (load {env['load']} on {env['cores']} cores)" if busy(doc) else ""


def machine(doc: dict[str, Any]) -> str:
    env, large = doc["environment"], doc["copy"]["large_gbps"]
    cpp = env.get("cpp") or {}
    isa = next(
        (str(cpp[k]) for k in ("isa", "active", "cpu_capability", "capability") if k in cpp), env.get("aten_isa", "")
    )
    words = [doc["device"]["name"], f"torch {env['torch']}"]
    words += [f"Triton {env['triton']}"] if doc["device"]["kind"] == "cuda" else [isa]
    words += [f"copy {large:.0f} GB/s"] if large else []
    return ", ".join([*words, env["date"], *([f"commit {env['commit']}"] if env["commit"] else [])])


def peers(doc: dict[str, Any]) -> list[str]:
    """What other packages did, one line each: geometric mean over the cases they do, or why they are absent."""
    records = [r for r in doc["records"] if not r["refused"]]
    names = {n for r in records for n in r["candidates"]} - {"eager", second(records), OURS}
    lines = []
    for name in sorted(names):
        count, mean = sum(name in r["candidates"] for r in records), geomean(records, name)
        lines.append(f"{name}: {mean:.2f}x over {count} cases" if mean else f"{name}: no time")
    absent = {n: why for r in records for n, why in r.get("absent", {}).items()}
    dropped = {f"{n} on {r['name']}": why for r in records for n, why in r.get("dropped", {}).items()}
    return lines + [f"{n}: {why}" for n, why in sorted({**absent, **dropped}.items())]


# Output ---------------------------------------------------------------------------------------------------------------


def show(doc: dict[str, Any]) -> None:
    """The table on the terminal, with rich where it is installed."""
    doc = valid(doc)
    print(f"\n{doc['family']}: {machine(doc)}")
    if doc["family"] == model_table.FAMILY:
        _show_rows(model_table.HEADER, [model_table.row(r) for r in doc["records"]], "", model_table.DROPPED)
        print("\n".join([model_table.conclusion(doc) + _busy(doc), *model_table.swaps(doc)]))
        return
    tables = [("time_us", "device time" if doc["device"]["kind"] == "cuda" else "")]
    tables += [("latency_us", "call latency, without a graph")] if doc["device"]["kind"] == "cuda" else []
    for key, title in tables:
        base = second(doc["records"])
        _show_rows(header(base), [row(r, key, base) for r in doc["records"]], title)
    print(conclusion(doc))
    for why in sorted({r["refused"] for r in doc["records"] if r["refused"]}):
        print(f"REFUSED: {why}")
    if names := peers(doc):
        print("peers, time of theirs over ours: " + "; ".join(names))


# A narrow terminal loses peak memory first, then bandwidth.
DROPPED = ((), (8,), (4, 5), (6,))


def _show_rows(header: list[str], rows: list[list[str]], title: str, dropped: Any = DROPPED) -> None:
    if importlib.util.find_spec("rich") is None:
        widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
        print(*([title] if title else []), sep="\n")
        for line in [header, *rows]:
            print(
                "  ".join(
                    cell.ljust(w) if i == 0 else cell.rjust(w)
                    for i, (cell, w) in enumerate(zip(line, widths, strict=True))
                )
            )
        return
    from rich.console import Console
    from rich.table import Table

    columns = list(range(len(header)))
    wide = Console(width=400)
    console = Console() if sys.stdout.isatty() else wide
    for drop in dropped:
        columns = [i for i in columns if i not in drop]
        table = Table(title=title or None, box=None, header_style="bold", pad_edge=False)
        for i in columns:
            table.add_column(header[i], justify="left" if i in (0, len(header) - 1) else "right", no_wrap=True)
        previous = ""
        for cells in rows:
            op, _, rest = cells[0].partition(" ")
            if op != previous:
                table.add_row(f"[bold]{op}[/bold]")
                previous = op
            style = "red" if cells[-1].startswith("REFUSED") else "yellow" if cells[-1] else None
            table.add_row("  " + rest, *(cells[i] for i in columns[1:]), style=style)
        if wide.measure(table).maximum <= console.width:
            break
    console.print(table, soft_wrap=not sys.stdout.isatty())


def markdown(doc: dict[str, Any], directory: Path | None = None) -> str:
    """One family's section on one device: machine, conclusion, plots, table with its losing rows."""
    doc = valid(doc)
    if doc["family"] == model_table.FAMILY:
        return model_table.markdown(doc, machine(doc) + _busy(doc))
    lines = [f"### {doc['family']}", "", f"**{machine(doc)}**: {conclusion(doc)}.", ""]
    if directory is not None:
        lines += [
            f"![{p.stem}]({os.path.relpath(p, ROOT)})" for p in sorted(directory.glob(f"{doc['family']}_*.png"))
        ] + [""]
    for key, title in [("time_us", ""), ("latency_us", "Call latency, without a CUDA graph:")]:
        if key == "latency_us" and doc["device"]["kind"] != "cuda":
            continue
        lines += [title, ""] if title else []
        base = second(doc["records"])
        lines += ["| " + " | ".join(header(base)) + " |", "|---|" + "---:|" * (len(HEADER) - 2) + "---|"]
        lines += ["| " + " | ".join(row(r, key, base)) + " |" for r in doc["records"]] + [""]
    if names := peers(doc):
        lines += ["Other packages, their time over ours: " + "; ".join(names) + ".", ""]
    return "\n".join(lines)


def rewrite_readme(readme: Path, documents: list[tuple[Path, dict[str, Any]]]) -> None:
    """Replace what stands between the markers; an error when they are missing."""
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{readme.name} must have one {BEGIN} and then one {END}")
    refused = [
        doc["device"]["slug"]
        for _, doc in documents
        if doc["tests"] != "passed" or any(r["refused"] for r in doc["records"])
    ]
    if refused:
        raise SystemExit(f"results of untested or refused ops do not go into {readme.name}: {', '.join(refused)}")
    body = "\n".join(markdown(doc, path.parent) for path, doc in documents)
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    readme.write_text(f"{head}\n{body}\n{tail}")


def committed() -> list[Path]:
    return sorted(p for p in RESULTS.glob("*/*.json") if p.parent.name != "local" and p.stem not in NOT_RESULTS)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", nargs="*", type=Path, help="default: benchmarks/results/local/*.json")
    parser.add_argument("--readme", action="store_true", help=f"rewrite README.md between {BEGIN} and {END}")
    parser.add_argument("--plots", action="store_true", help="draw the plots again, beside the JSON")
    options = parser.parse_args(arguments)
    local = [p for p in sorted((RESULTS / "local").glob("*.json")) if p.stem not in NOT_RESULTS]
    paths = options.json or (committed() if options.readme else local)
    if not paths:
        print("no results: run `make bench` first")
        return 1
    documents = [(path, json.loads(path.read_text())) for path in paths]
    for path, doc in documents:
        if options.plots:
            _plots(doc, path.parent)
        if not options.readme:
            show(doc)
    if options.readme:
        rewrite_readme(ROOT / "README.md", documents)
        print(f"README.md: {len(documents)} result files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
