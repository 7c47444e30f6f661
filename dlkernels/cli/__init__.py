"""The sub-commands of `python -m dlkernels`, one module each: `add_parser` declares options, `run` does the work."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

PIP_NAMES = {"sklearn": "scikit-learn"}
PLAIN_WIDTH = 150  # columns of a table that goes to a file or a pipe


def fail(message: str) -> NoReturn:
    """End the command with exit code 2 and one line on stderr."""
    print(f"python -m dlkernels: {message}", file=sys.stderr)
    raise SystemExit(2)


def need(command: str, *modules: str, extra: str = "demo") -> None:
    """End the command with one clear line when optional packages are missing."""
    missing = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(PIP_NAMES.get(module, module))
    if missing:
        fail(f'`{command}` needs {", ".join(missing)}: pip install "dlkernels[{extra}]"')


def output_folder(folder: Path) -> None:
    """Make the folder of --out, and end the command with one clear line when nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fail(f"--out {folder}: cannot write there: {error.strerror or error}")


def quiet() -> None:
    """Silence the warning about the reference backend: these commands print the active backend themselves."""
    warnings.filterwarnings("ignore", message="dlkernels runs its plain PyTorch reference")


def available_devices(choice: str) -> list[str]:
    """The devices behind `--device auto | cpu | cuda`; auto is every one that is there."""
    if choice == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no CUDA device is visible")
    if choice == "auto":
        return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [choice]


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> None:
    """A table on stdout; columns whose name starts with ">" are right-aligned. Plain text without rich.

    Cells are plain text; the words PASS and FAIL get their colour here.
    """
    names = [c.removeprefix(">") for c in columns]
    right = [c.startswith(">") for c in columns]
    cells = [[str(cell) for cell in row] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        _plain_table(title, names, right, cells, caption)
        return
    styles = {"PASS": "bold green", "FAIL": "bold red"}
    table = Table(title=Text(title, style="bold"), title_justify="left")
    for name, is_right in zip(names, right, strict=True):
        table.add_column(name, justify="right" if is_right else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
    Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False).print(table)
    if caption:
        print(caption)


def table_text(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> str:
    """What `print_table` prints, without colours."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print_table(title, columns, rows, caption)
    return text.getvalue().rstrip("\n")


def _plain_table(title: str, names: list[str], right: list[bool], rows: list[list[str]], caption: str) -> None:
    widths = [max(len(line) for row in [names, *rows] for line in row[i].split("\n")) for i in range(len(names))]
    print(title)
    for row in [names, ["-" * w for w in widths], *rows]:
        lines = [cell.split("\n") for cell in row]
        for depth in range(max(map(len, lines))):
            texts = [cell[depth] if depth < len(cell) else "" for cell in lines]
            aligned = (t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right, strict=True))
            print("  ".join(aligned).rstrip())
    if caption:
        print(caption)


def format_time(seconds: float) -> str:
    """Three significant digits in us, ms or s."""
    for scale, unit in ((1e-6, "us"), (1e-3, "ms")):
        if seconds < 999.5 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:.3g} s"


def format_bytes(count: float) -> str:
    """Three significant digits in B, kB, MB or GB (powers of 1000, as GB/s)."""
    for scale, unit in ((1, "B"), (1e3, "kB"), (1e6, "MB")):
        if count < 999.5 * scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e9:.3g} GB"
