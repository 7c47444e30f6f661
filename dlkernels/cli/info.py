"""`python -m dlkernels info`: what is installed, and which backend serves each op."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .._info import build_info
from . import print_table

EXAMPLES = """\
examples:
  python -m dlkernels info
  python -m dlkernels info --json | python -m json.tool
  DLKERNELS_BACKEND=reference python -m dlkernels info
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="what is installed, and which backend serves each op on each device",
        description="Shows the installation, and per op and device the active backend and why not a better one.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print dlkernels.build_info() as JSON, for bug reports")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    info = build_info()
    if args.json:
        print(json.dumps(info, indent=2, default=str))
        return 0
    for name, text in header(info):
        print(f"{name:<12}{text}")
    print()
    reasons: dict[str, int] = {}
    rows = []
    for names, devices in grouped(info["ops"]):
        cells = [_cell(devices[device], reasons) for device in ("cpu", "cuda")]
        rows.append((names, *cells))
    print_table("Active backend", ("op", "CPU", "CUDA"), rows)
    for reason, number in reasons.items():
        print(f"[{number}] {reason}")
    return 0


def header(info: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, one line) for everything above the table."""
    cpu = info["cpu"]
    lines = [
        ("dlkernels", info["dlkernels"]),
        ("torch", f"{info['torch']}, CUDA {info['torch_cuda'] or 'none (a CPU build)'}"),
        ("python", info["python"]),
        ("cpu", f"{cpu['architecture']}, {cpu['threads']} threads, torch uses {cpu['torch_instruction_set']}"),
        ("gpu", _gpu(info)),
        ("extension", "built" if info["cpp"] is not None else f"none: {info['cpp_missing']}"),
    ]
    lines += [("", line) for line in _extension(info["cpp"])] if info["cpp"] is not None else []
    lines.append(("triton", info["triton"]))
    if info["forced"]:
        lines.append(("forced", f"every op on {info['forced']!r} (DLKERNELS_BACKEND)"))
    return lines


def _extension(cpp: dict[str, Any]) -> list[str]:
    """What the compiled part was built with, one line each."""
    rest = dict(cpp)
    sets, active = rest.pop("instruction_sets", None), rest.pop("instruction_set", None)
    cuda, archs = rest.pop("cuda", False), rest.pop("cuda_archs", "")
    lines = []
    if sets:
        lines.append(f"instruction sets: {', '.join(sets)}; in use: {active}")
    lines.append(f"CUDA C++: {archs or 'built'}" if cuda else "CUDA C++: not built; Triton serves CUDA tensors")
    return lines + [f"{name.replace('_', ' ')}: {value}" for name, value in rest.items()]


def _gpu(info: dict[str, Any]) -> str:
    if info["cuda_device"] is None:
        return "none: no CUDA device is visible"
    return f"{info['cuda_device']}, compute capability {info['cuda_capability']}"


def grouped(ops: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Forward and backward of one op on one row when the same backends serve them."""
    families: dict[str, list[str]] = {}
    for op in ops:
        families.setdefault(op.removesuffix("_fwd").removesuffix("_bwd"), []).append(op)
    rows = []
    for family, members in families.items():
        if all(ops[m] == ops[members[0]] for m in members):
            passes = [m.removeprefix(family).lstrip("_") for m in sorted(members, reverse=True) if m != family]
            rows.append((f"{family} ({', '.join(passes)})" if passes else family, ops[members[0]]))
        else:
            rows += [(m, ops[m]) for m in members]
    return rows


def _cell(active: dict[str, str], reasons: dict[str, int]) -> str:
    if not active["why"]:
        return active["backend"]
    return f"{active['backend']} [{reasons.setdefault(active['why'], len(reasons) + 1)}]"
