"""What a run of gpu_gate.py leaves: files that a later run continues, and one file that holds them all."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import guard

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ("dlkernels/**/*.py", "csrc/**/*", "setup.py")
TESTS = ("tests/**/*.py",)
DONE, SOME_FAILED, OUT_OF_TIME, LOST = 0, 1, 3, 4  # exit codes of gate_worker.py; LOST: nothing runs on its GPU
Item = TypeVar("Item")
FILES = ("gate.json", "copy.json")  # beside the documents of the families


def families() -> list[str]:
    """By their benchmarks; whole models are measured beside the gate."""
    return sorted({p.stem.removeprefix("bench_") for p in (ROOT / "benchmarks").glob("bench_*.py")} - {"models"})


def in_turn(lists: Iterable[Sequence[Item]]) -> list[Item]:
    """The first of each list, then the second of each: what is cut short has something of all."""
    return [item for row in itertools.zip_longest(*lists) for item in row if item is not None]


def save(path: Path, data: Any) -> None:
    """Whole or not at all: a stage may be killed at any time."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(data, indent=1, default=str) + "\n")
    part.replace(path)


def load(path: Path, default: Any = None) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return default


def fingerprint(device: str, torch_version: str, patterns: tuple[str, ...] = PACKAGE) -> str:
    """Of the sources and what they run with: what passed on the same need not run again. Not of what is built."""
    return guard.digest(f"{device} {sys.version} {torch_version}", patterns)[:32]


def built() -> str:
    """A hash of the compiled part."""
    return guard.digest("", ("dlkernels/_C*",))[:32]


def documents(state: Path) -> dict[str, dict[str, Any]]:
    found = {name: load(state / f"{name}.json") for name in families()}
    return {name: doc for name, doc in found.items() if doc}


def bundle(state: Path) -> dict[str, Any]:
    return {name: load(state / name) for name in FILES} | {"families": documents(state)}


def publish(state: Path, out: Path, plots: bool) -> None:
    """Three files: results.json, gate.log, plots.tar.gz."""
    out.mkdir(parents=True, exist_ok=True)
    save(out / "results.json", bundle(state))
    with contextlib.suppress(OSError):
        shutil.copy(state / "gate.log", out / "gate.log")
    drawn = sorted(state.glob("*.png"))
    if plots and drawn:
        held = io.BytesIO()
        with tarfile.open(fileobj=held, mode="w:gz") as archive:
            for path in drawn:
                archive.add(path, path.name)
        (out / "plots.tar.gz").write_bytes(held.getvalue())


def unpack(path: Path, folder: Path, *, over: bool = True) -> list[Path]:
    """The files that a bundle holds, and the plots beside it; `over`: also where there are such files already."""
    data = load(path)
    if not data or "families" not in data:
        raise SystemExit(f"{path} holds no results")
    folder.mkdir(parents=True, exist_ok=True)
    contents = {name: data[name] for name in FILES if data.get(name)}
    contents |= {f"{name}.json": doc for name, doc in data["families"].items()}
    written = []
    for name, content in contents.items():
        if over or not (folder / name).exists():
            save(folder / name, content)
            written.append(folder / name)
    if over and (path.parent / "plots.tar.gz").exists():
        with tarfile.open(path.parent / "plots.tar.gz") as archive:
            for member in archive.getmembers():
                source = archive.extractfile(member)
                if source and member.name == Path(member.name).name and member.name.endswith(".png"):
                    (folder / member.name).write_bytes(source.read())
                    written.append(folder / member.name)
    return written


def unpack_to(path: Path) -> Path:
    """benchmarks/results/<device> of the device that the results are of."""
    data = load(path) or {}
    docs = list(data.get("families", {}).values())
    if not docs:
        raise SystemExit(f"{path} holds no measured family")
    if (data.get("gate.json") or {}).get("rehearsal"):
        raise SystemExit(f"{path} is of a rehearsal: no results")
    return ROOT / "benchmarks" / "results" / docs[0]["device"]["slug"]


def forget_choices(cache: Path) -> None:
    """What torch.compile chose among its configurations beside other work: it chooses anew when it is timed."""
    for path in cache.rglob("*.best_config"):
        path.unlink(missing_ok=True)
