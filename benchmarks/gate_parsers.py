"""Reads what Nsight Compute and compute-sanitizer print. Torch-free, tested on samples without a GPU."""

from __future__ import annotations

import csv
import glob
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARKER = "spin_kernel"  # torch.cuda._sleep: launched before each case
DRAM = ("dram__bytes_read.sum", "dram__bytes_write.sum")
METRICS = (
    *DRAM,
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "launch__registers_per_thread",
    "l1tex__t_bytes_pipe_lsu_mem_local_op_ld.sum",
    "l1tex__t_bytes_pipe_lsu_mem_local_op_st.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)
_SCALE = {
    "byte": 1.0,
    "kbyte": 1e3,
    "mbyte": 1e6,
    "gbyte": 1e9,
    "tbyte": 1e12,
    "ns": 1.0,
    "nsecond": 1.0,
    "us": 1e3,
    "usecond": 1e3,
    "ms": 1e6,
    "msecond": 1e6,
    "s": 1e9,
    "second": 1e9,
}


def find_tool(name: str) -> str | None:
    """A profiler's path: on PATH, or where NVIDIA's installers put it; the newest of several."""
    patterns = ("/usr/local/cuda*/bin/", "/opt/nvidia/nsight-compute/*/", "/usr/local/cuda*/compute-sanitizer/")
    found = [path for pattern in patterns for path in sorted(glob.glob(pattern + name), reverse=True)]
    return shutil.which(name) or (found[0] if found else None)


@dataclass
class Launch:
    """One profiled kernel launch; bytes in bytes, times in nanoseconds."""

    kernel: str
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def dram_bytes(self) -> float:
        return sum(self.metrics[name] for name in DRAM)


def _number(text: str, unit: str = "") -> float | None:
    try:
        return float(text.replace(",", "")) * _SCALE.get(unit.strip().lower(), 1.0)
    except ValueError:
        return None


def ncu_launches(text: str) -> list[Launch]:
    """Launches in order, from `ncu --csv` with `--page raw` (a column per metric) or the details page (a row each).

    Lines before the header (the program's own output, "==PROF==") are skipped.

    Raises:
        ValueError: without a CSV header, with what ncu said instead.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        said = [line for line in lines if line.startswith("==")]
        raise ValueError("no CSV in the output of ncu: " + (said[-1] if said else "nothing was printed"))
    rows = list(csv.reader(line for line in lines[start:] if line.startswith('"')))
    header, rows = rows[0], rows[1:]
    return _long(header, rows) if "Metric Name" in header else _wide(header, rows)


def _wide(header: list[str], rows: list[list[str]]) -> list[Launch]:
    units = dict(zip(header, rows[0], strict=False)) if rows and not rows[0][0].strip() else {}
    launches = []
    for cells in rows[1 if units else 0 :]:
        record = dict(zip(header, cells, strict=False))
        launch = Launch(record["Kernel Name"])
        for name in header:
            if "__" in name and (value := _number(record.get(name, ""), units.get(name, ""))) is not None:
                launch.metrics[name] = value
        launches.append(launch)
    return launches


def _long(header: list[str], rows: list[list[str]]) -> list[Launch]:
    launches: dict[str, Launch] = {}
    for cells in rows:
        record = dict(zip(header, cells, strict=False))
        launch = launches.setdefault(record["ID"], Launch(record["Kernel Name"]))
        value = _number(record.get("Metric Value", ""), record.get("Metric Unit", ""))
        if value is not None:
            launch.metrics[record["Metric Name"]] = value
    return list(launches.values())


def by_case(launches: list[Launch], names: list[str]) -> dict[str, list[Launch]]:
    """Split the launches at the marker kernel; the n-th group belongs to the n-th name.

    Raises:
        ValueError: when the number of markers is not the number of names.
    """
    groups: list[list[Launch]] = []
    for launch in launches:
        if MARKER in launch.kernel:
            groups.append([])
        elif groups:
            groups[-1].append(launch)
    if len(groups) != len(names):
        raise ValueError(f"{len(groups)} of {len(names)} cases were profiled")
    return dict(zip(names, groups, strict=True))


def traffic_rows(
    groups: dict[str, list[Launch]], declared: dict[str, int], tolerance: float = 0.05
) -> list[dict[str, Any]]:
    """DRAM bytes counted against bytes declared, per case."""
    rows = []
    for name, launches in groups.items():
        counted = sum(launch.dram_bytes for launch in launches)
        largest = max(launches, key=lambda launch: launch.dram_bytes, default=None)
        spilled = sum(v for launch in launches for k, v in launch.metrics.items() if "mem_local_op" in k)
        rows.append(
            {
                "case": name,
                "declared": declared[name],
                "counted": counted,
                "ratio": counted / declared[name],
                "launches": len(launches),
                "kernel": largest.kernel if largest else "",
                "local_bytes": spilled,
                "time_us": sum(launch.metrics.get("gpu__time_duration.sum", 0.0) for launch in launches) / 1e3,
                "registers": max(
                    (launch.metrics.get("launch__registers_per_thread", 0.0) for launch in launches), default=0.0
                ),
                "passed": bool(launches) and abs(counted / declared[name] - 1) <= tolerance,
            }
        )
    return rows


# compute-sanitizer ----------------------------------------------------------------------------------------------------


@dataclass
class Sanitized:
    """One run of one tool. `complete` is False when no summary was printed: the run proves nothing."""

    tool: str
    complete: bool
    count: int  # errors, or hazards
    findings: list[str]  # first line of each, with the kernel where one is named

    def in_kernels(self, names: set[str]) -> list[str]:
        return [finding for finding in self.findings if any(name in finding for name in names)]


_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) errors?)|(?:RACECHECK SUMMARY: (\d+) hazards?)")
_KERNEL = re.compile(r"(?:\bat (?:0x[0-9a-f]+ in )?|in kernel |access at )([^\s+(]+)")
_NOT_FINDINGS = (
    "COMPUTE-SANITIZER",
    "SUMMARY",
    "Host Frame",
    "Saved host",
    "Program hit",
    "LEAK",
    "Target application",
)


def sanitizer_log(text: str, tool: str = "memcheck") -> Sanitized:
    """Findings of a log. A finding starts at an unindented `=========` line; the indented ones after it explain it."""
    complete, count = False, 0
    findings: list[str] = []
    for line in text.splitlines():
        if not line.startswith("========="):
            continue
        body = line[len("=========") :]
        if match := _SUMMARY.search(body):
            complete, count = True, int(match.group(1) or match.group(2))
        elif body.strip() and not body.startswith("    ") and not any(word in body for word in _NOT_FINDINGS):
            findings.append(body.strip())
        elif findings and body.startswith("    ") and (match := _KERNEL.search(body)) and " in " not in findings[-1]:
            findings[-1] += f" in {match.group(1)}"
    return Sanitized(tool, complete, count, findings)


def kernel_names() -> set[str]:
    """Names of the package's GPU kernels, from its Triton and CUDA sources."""
    names: set[str] = set()
    for path in (ROOT / "dlkernels" / "triton").glob("*.py"):
        names |= set(re.findall(r"@triton\.jit(?:\([^@]*?\))?[^\n@]*\n(?:@[^\n]*\n)*def (\w+)", path.read_text()))
    for path in (ROOT / "csrc" / "cuda").iterdir():
        names |= set(re.findall(r"^DL_KERNEL\(.*\)\n(\w+)\(", path.read_text(), re.MULTILINE))
    return names
