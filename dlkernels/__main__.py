"""`python -m dlkernels info | demo | check | profile | bench`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .cli import check, demo, fail, info, models, need, profile

EXAMPLES = """\
examples:
  python -m dlkernels info                                  what is installed, what serves each op
  python -m dlkernels check                                 every op against float64 on this machine
  python -m dlkernels demo                                  a real model trained with and without the fused ops
  python -m dlkernels demo --features                       what center, island and GCCS loss do to features
  python -m dlkernels profile cross_entropy --shape 4096,1000
  python -m dlkernels bench
  python -m dlkernels bench --model seresnet50 --share      a real model's training step, swapped and compiled

`python -m dlkernels COMMAND --help` describes a command's options.
"""
BENCH_EXAMPLES = """\
examples:
  python -m dlkernels bench                                 every benchmark
  python -m dlkernels bench -k sigmoid                      those with sigmoid in their name
  FULL=1 python -m dlkernels bench --bench-device cuda      more sizes, on the GPU
  python -m dlkernels bench --model seresnet50 --share      the training step of a real model; needs no checkout
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; returns the exit code (0 fine, 1 a check failed, 2 it could not run)."""
    parser = argparse.ArgumentParser(
        prog="python -m dlkernels",
        description="Fused losses, layers and optimizers: see what is active, prove it, measure it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dlkernels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (info, demo, check, profile):
        command.add_parser(commands)
    add_bench_parser(commands)
    args, rest = parser.parse_known_args(argv)
    if args.run is run_bench:
        args.pytest_options = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args.run(args)


def add_bench_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="run the benchmarks of a checkout, or measure the training step of a real model",
        description=(
            "Without --model: runs pytest on benchmarks/ in a checkout, where `make bench` ends too; options are\n"
            "handed on, see `bench --co -q` for the cases. They are not part of the installed package."
        ),
        epilog=f"{BENCH_EXAMPLES}\nwith --model:\n{models.parser().format_help()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # what begins alike may be an option of pytest
    )
    parser.add_argument("--model", metavar="NAME", help="measure this model instead, with the options below")
    parser.add_argument("--list", action="store_true", help="names that --model takes")
    parser.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    """A model, or pytest on the benchmarks in the top folder of the checkout; the exit code."""
    if args.list:
        return models.listing()
    if args.model is not None:
        return models.run(args.model, args.pytest_options)
    candidates = (Path.cwd(), Path(__file__).resolve().parents[1])
    root = next((p for p in candidates if (p / "benchmarks" / "report.py").is_file()), None)
    if root is None:
        fail("`bench` needs a checkout of the repository (benchmarks/report.py): run it in its top folder")
    need("bench", "pytest", extra="bench")
    files = map(str, sorted((root / "benchmarks").glob("bench_*.py")))
    command = [sys.executable, "-m", "pytest", *files, *args.pytest_options]
    return subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": _path_with(root)}).returncode


def _path_with(root: Path) -> str:
    return os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH", ""))))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
