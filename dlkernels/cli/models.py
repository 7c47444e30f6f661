"""`python -m dlkernels bench --model`: the training step of a real model, eager, swapped and compiled."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import _backend
from ..testing import num_threads
from . import _model_steps as steps
from . import fail, print_table, quiet
from ._model_share import owned, shares
from ._models import SPECS, find

ROUNDS = 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Say = Callable[[str, int], None]  # what goes on now, how many steps further the bar is
EXAMPLES = """\
examples:
  python -m dlkernels bench --list
  python -m dlkernels bench --model seresnet50 --share
  python -m dlkernels bench --model efficientnet_b0 --no-compile --rounds 5
  python -m dlkernels bench --model unet2d --device cuda --dtype bfloat16 --layout channels_last --batch 64
  python -m dlkernels bench --model my_package.models:make_model --input-shape 8,3,224,224

Exit code: 0 measured, 1 a candidate computes other losses than eager (nothing is measured then), 2 it could not run.
"""


def parser() -> argparse.ArgumentParser:
    """The options that stand beside --model."""
    made = argparse.ArgumentParser(
        prog="python -m dlkernels bench --model NAME",
        usage="python -m dlkernels bench --model NAME [options]",
        description="Measures a training step: forward, loss, backward, optimizer step, zero_grad.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    add = made.add_argument
    add("--batch", type=_count, help="default: the model's own, see --list")
    add("--size", type=_count, help="height and width (and depth) of the input; default: the model's own")
    add("--input-shape", type=_shape, help="of package.module:factory, as 8,3,224,224")
    add("--rounds", type=_count, default=ROUNDS, help="steps of every candidate, in turns (default: %(default)s)")
    add("--threads", type=_count, default=1, help="of the CPU (default: %(default)s, which neighbours disturb least)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: CUDA when it is visible, else the CPU")
    add("--dtype", default="float32", choices=list(DTYPES), help="bfloat16: under autocast (default: %(default)s)")
    add("--layout", default="contiguous", choices=("contiguous", "channels_last"), help="default: %(default)s")
    add("--candidates", type=_candidates, help=f"some of {','.join(steps.RECIPES)} (default: all)")
    add("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes to build")
    add("--share", action="store_true", help="also profile what share of the eager step the swapped modules have")
    add("--json", type=Path, help="write all numbers to this file")
    return made


def run(name: str, options: Sequence[str]) -> int:
    """Measure one model, print the table; 1 when losses do not agree."""
    args = parser().parse_args(options)
    quiet()
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no CUDA device is visible")
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if args.json is not None and not (args.json.parent.is_dir() and os.access(args.json.parent, os.W_OK)):
        fail(f"--json {args.json}: no folder to write to")
    spec = find(name, args.input_shape)
    batch, size = args.batch or spec.batch, args.size or spec.size
    channels_last = args.layout == "channels_last"
    setting = steps.Setting(spec, batch, size, device, DTYPES[args.dtype], channels_last)
    names = [n for n in args.candidates or steps.RECIPES if not (args.no_compile and steps.RECIPES[n].backend)]
    with num_threads(args.threads):
        record = measure(setting, names, args.rounds, args.share)
    record["threads"] = args.threads
    show(record)
    if args.json is not None:
        document = {"schema": 1, "family": "models", "environment": environment(), "records": [record]}
        args.json.write_text(json.dumps(document, indent=1) + "\n")
        print(f"written: {args.json}")
    return 1 if record["refused"] else 0


def listing() -> int:
    """The models by name, and what their default input is."""
    rows = [(s.name, s.library, s.what, s.batch, s.size) for s in SPECS]
    print_table("Models of `python -m dlkernels bench --model NAME`", ("name", "library", "what is in it", ">batch",
                ">size"), rows, "Or package.module:factory, called without arguments, with --input-shape.")  # fmt: skip
    return 0


# Measuring ------------------------------------------------------------------------------------------------------------


def measure(setting: steps.Setting, names: Sequence[str], rounds: int, share: bool) -> dict[str, Any]:
    """Make, check and measure the candidates: the record of the JSON. Eager is always one of them."""
    names = ["eager", *(n for n in names if n != "eager")]
    base = setting.model()
    record = describe(setting, base)
    made: list[steps.Candidate] = []
    with progress(len(names) + rounds + share) as say:
        for name in names:
            how = "compiling, which takes minutes" if steps.RECIPES[name].backend else "first steps"
            say(f"{name}: {how}", 0)
            start = time.perf_counter()
            try:
                candidate = steps.make(name, base, setting)
                steps.warm_up(candidate)
            except Exception as error:
                if not steps.RECIPES[name].backend:
                    raise
                record["failed"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            else:
                candidate.build_s = time.perf_counter() - start
                made.append(candidate)
            say(name, 1)
        eager = exact = made[0]
        if setting.dtype != torch.float32:
            say("eager in float32: first steps", 0)
            exact = steps.make("eager", base, replace(setting, dtype=torch.float32))
            steps.warm_up(exact)
        agree(record, made, exact, setting.dtype)
        if record["refused"]:
            return record
        steps.measure(made, setting.device, rounds, lambda: say("measuring, in turns", 1))
        if share:
            say("profiling the eager step", 0)
            changes = next((c.report._changes for c in made if c.report is not None), None)
            if changes is None:
                changes = steps.make("swapped", base, setting).report._changes
            record["share"] = shares(eager.step, owned(eager.model, changes), setting.device)
            say("profiled", 1)
    for candidate in made:
        record["candidates"][candidate.name] = steps.summary(candidate.samples) | {"build_s": candidate.build_s}
    base_ms = record["candidates"]["eager"]["min_ms"]
    for name, entry in record["candidates"].items():
        entry["x_eager"] = base_ms / entry["min_ms"]
        entry["slower_than"] = steps.slower_than(name, record["candidates"])
    return record


def describe(setting: steps.Setting, base: torch.nn.Module) -> dict[str, Any]:
    spec, device = setting.spec, setting.device
    cuda = torch.cuda.get_device_name() if device == "cuda" else ""
    return {
        "name": spec.name, "library": version(spec.library), "batch": setting.batch, "size": setting.size,
        "parameters": sum(p.numel() for p in base.parameters()), "tensors": sum(1 for _ in base.parameters()),
        "dtype": str(setting.dtype).removeprefix("torch."), "device": device, "cuda": cuda,
        "layout": "channels_last" if setting.channels_last else "contiguous",
        "backend": _backend.state.forced or _backend.default_for(device),
        "swap": {}, "matches": {}, "losses": {}, "failed": {}, "refused": "", "share": {}, "candidates": {},
    }  # fmt: skip


def agree(record: dict[str, Any], made: list[steps.Candidate], exact: steps.Candidate, dtype: torch.dtype) -> None:
    """Hold every candidate's losses to eager's; a compiled one that differs is dropped, one of ours is refused.

    Where torch.compile alone differs from eager, our backend is held to it: the difference is the compiler's.
    """
    eager, wrong, compiled = made[0], [], None
    for candidate in list(made):
        if candidate.report is not None:
            reasons = sorted({reason for *_, reason in candidate.report.skipped})
            record["swap"] = {"summary": candidate.report.summary(), "counts": candidate.report.counts(),
                              "left": reasons}  # fmt: skip
        record["matches"] |= candidate.matches or {}
        share, words = steps.disagreement(candidate, eager, exact, dtype)
        record["losses"][candidate.name] = {"values": candidate.losses, "gradient_norm": candidate.norm,
                                            "of_allowed": share}  # fmt: skip
        if not share <= 1:
            if candidate.name == "compile":  # nothing of ours
                record["failed"][candidate.name] = words
                made.remove(candidate)
                compiled = candidate
            elif (
                candidate.name == "compile-dlkernels"
                and compiled is not None
                and steps.disagreement(candidate, compiled, compiled, dtype)[0] <= 1
            ):
                record["failed"][candidate.name] = f"as torch.compile alone: {words}"
                made.remove(candidate)
            else:
                wrong.append(f"{candidate.name}: {words}")
    record["refused"] = "; ".join(wrong)


def version(library: str) -> str:
    try:
        return f"{library} {importlib.metadata.version(library)}" if library else ""
    except importlib.metadata.PackageNotFoundError:
        return library


def environment() -> dict[str, Any]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine(),
        "cores": os.cpu_count(), "load": load,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
    }  # fmt: skip


@contextlib.contextmanager
def progress(total: int) -> Iterator[Say]:
    """A bar on stderr with rich, else with tqdm, else lines."""
    with contextlib.suppress(ImportError):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("building", total=total)
            yield lambda what, done: bar.update(task, description=what, advance=done)
        return
    with contextlib.suppress(ImportError):
        from tqdm import tqdm

        with tqdm(total=total, leave=False) as bar:
            yield lambda what, done: (bar.set_description(what), bar.update(done))  # type: ignore[func-returns-value]
        return
    yield lambda what, done: None if done else print(what, file=sys.stderr, flush=True)


# Output ---------------------------------------------------------------------------------------------------------------


def show(record: dict[str, Any]) -> None:
    """The table on stdout."""
    where = record["cuda"] or f"CPU, {record['threads']} thread{'s' if record['threads'] > 1 else ''}"
    print(f"model   {record['name']} ({record['library'] or 'yours'}): {record['parameters']:,} parameters in "
          f"{record['tensors']} tensors")  # fmt: skip
    print(f"input   batch {record['batch']}, size {record['size']}, {record['dtype']}, {record['layout']}")
    print(f"device  {where}; torch {torch.__version__}; fused ops run on {record['backend']}")
    if record["swap"]:
        print(f"swap    {record['swap']['summary']}")
        for reason in record["swap"]["left"]:
            print(f"        left: {reason}")
    for done, counts in record["matches"].items():
        print(f"compile {done} {', '.join(f'{n} {name}' for name, n in sorted(counts.items())) or 'nothing'}")
    if record["refused"]:
        print(f"\nFAIL: losses do not agree with eager, nothing was measured\n  {record['refused']}")
        return
    worst = max((entry["of_allowed"] for entry in record["losses"].values()), default=0.0)
    print(f"losses  of all candidates agree over {steps.CHECKED} steps: {worst:.1%} of what is allowed, at most")
    rows = [row(name, record) for name in steps.RECIPES if name in record["candidates"] or name in record["failed"]]
    columns = ("candidate", "what it is", ">fastest", ">median", ">x eager", "")
    rounds = record["candidates"]["eager"]["rounds"]
    caption = f"ms per training step over {rounds} rounds, in turns. x eager: above 1 is faster than eager."
    print_table("One training step", columns, rows, "\n".join([caption, *share_lines(record)]))


def row(name: str, record: dict[str, Any]) -> tuple[str, ...]:
    """One line of the table; the last field says what is wrong with it, if anything."""
    what = steps.RECIPES[name].title
    if name in record["failed"]:
        return name, what, "-", "-", "-", f"failed: {record['failed'][name]}"
    entry = record["candidates"][name]
    notes = [f"SLOWER than {', '.join(entry['slower_than'])}"] if entry["slower_than"] else []
    if steps.RECIPES[name].backend:
        notes.append(f"built in {entry['build_s']:.0f} s")
    return (
        name,
        what,
        f"{entry['min_ms']:.2f}",
        f"{entry['median_ms']:.2f}",
        f"{entry['x_eager']:.3f}",
        "; ".join(notes),
    )


def share_lines(record: dict[str, Any]) -> list[str]:
    share = record["share"]
    if not share:
        return []
    text = (
        f"share of the eager step: {share['modules']:.1%} in what the swap takes over, {share['optimizer']:.1%} AdamW"
    )
    return [text, f"({share['how']})"]


# Options --------------------------------------------------------------------------------------------------------------


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(_count(part) for part in text.replace("x", ",").split(","))


def _candidates(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in steps.RECIPES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(steps.RECIPES)}, got {text!r}")
    return names
