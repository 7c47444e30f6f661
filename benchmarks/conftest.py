"""Runs the declared cases, refuses ops whose tests fail, and ends with the table, the JSON and the plots."""

from __future__ import annotations

import importlib.util
import os
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import guard
import model_table
import pytest
import report
import timing
import torch
from harness import OURS, Case, Family, refused, run_case

HAS_PLUGIN = importlib.util.find_spec("pytest_benchmark") is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dlkernels benchmarks")
    group.addoption("--bench-device", choices=("cpu", "cuda"), default="cpu", help="what to measure (default: cpu)")
    group.addoption("--bench-seconds", type=float, default=1.0, help="CPU seconds of samples per case (default: 1)")
    group.addoption("--roof-bytes", type=int, default=None, help="largest copy of the roof (default: 512 MB, GPU 8 GB)")
    group.addoption("--commit-results", action="store_true", help="write to benchmarks/results/<device>/, not local/")
    group.addoption("--skip-tests", action="store_true", help="time untested ops; the results say so")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out")
    group.addoption("--model-rounds", type=int, default=20, help="steps of every candidate of a model (default: 20)")
    group.addoption("--model-size", type=int, default=None, help="of the models' inputs (default: each one's own)")


class Session:
    """What is measured once a session: the roof, whether tests pass, and the records so far."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.device: str = config.getoption("--bench-device")
        self.records: dict[str, list[dict[str, Any]]] = {}
        self.verdicts: dict[str, str] = {}
        self._curve: list[tuple[int, float]] | None = None

    @property
    def curve(self) -> list[tuple[int, float]]:
        if self._curve is None:
            before = torch.get_num_threads()
            torch.set_num_threads(1)
            self._curve = timing.copy_curve(self.device, self.config.getoption("--roof-bytes"))
            torch.set_num_threads(before)
        return self._curve

    @property
    def tests(self) -> str:
        return "skipped" if self.config.getoption("--skip-tests") else "passed"

    def refusal(self, family: str) -> str:
        if self.tests == "skipped":
            return ""
        if family not in self.verdicts:
            self.verdicts[family] = guard.why_tests_fail(family, self.device)
        return self.verdicts[family]

    def measure(self, family: Family, case: Case) -> tuple[dict[str, Any], dict[str, list[float]]]:
        why = self.refusal(family.name)
        if why:
            record, samples = refused(case.name, case.op, why), {}
        else:
            record, samples = run_case(
                family, case, self.device, self.curve, budget_s=self.config.getoption("--bench-seconds"),
                compile=not self.config.getoption("--no-compile"), gpu=timing.Cuda() if self.device == "cuda" else None,
            )  # fmt: skip
        self.keep(family.name, record)
        return record, samples

    def keep(self, family: str, record: dict[str, Any]) -> None:
        """A record that was measured elsewhere."""
        self.records.setdefault(family, []).append(record)

    def directory(self) -> Path:
        if os.environ.get("OUT"):
            return Path(os.environ["OUT"])
        name = report.slug(self.device) if self.config.getoption("--commit-results") else "local"
        return Path(__file__).parent / "results" / name


SESSION = pytest.StashKey[Session]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.option.verbose <= 0:  # our table says more; -v shows pytest-benchmark's too
        config.option.benchmark_quiet = True
        config.option.disable_warnings = True
    config.stash[SESSION] = Session(config)
    timing.settle_allocator()


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """`pytest benchmarks` finds bench_*.py; a file named on the command line pytest collects by itself."""
    if file_path.suffix == ".py" and file_path.name.startswith("bench_") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


if not HAS_PLUGIN:

    @pytest.fixture
    def benchmark() -> None:
        """pytest-benchmark is not installed: our own JSON and table remain."""


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Family, Case], None]:
    """Measure one case; the samples of ours become pytest-benchmark's, all the rest its `extra_info`."""

    def run(family: Family, case: Case) -> None:
        record, samples = request.config.stash[SESSION].measure(family, case)
        if record["refused"]:
            if benchmark is not None:
                benchmark.disabled = True
                benchmark.pedantic(lambda: None)
            pytest.fail(f"REFUSED: {record['refused']}", pytrace=False)
        if benchmark is not None:
            benchmark.group = case.op
            benchmark.extra_info.update(extra_info(record))
            replay(benchmark, samples.get(OURS, []))

    return run


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Callable[[str, dict[str, Any]], None]:
    """Add a record to a family's results."""
    return request.config.stash[SESSION].keep


def extra_info(record: dict[str, Any]) -> dict[str, Any]:
    """The numbers that every row of pytest-benchmark's JSON carries."""
    ours = record["candidates"][OURS]
    keys = ("gbps", "copy_share", "x_eager", "x_compile", "peak_bytes", "spread", "latency_us", "host_us")
    others = {name: entry.get("time_us") for name, entry in record["candidates"].items() if name != OURS}
    return {"bytes": record["bytes"], "others_us": others} | {key: ours[key] for key in keys if key in ours}


def replay(benchmark: Any, samples: list[float]) -> None:
    """Hand samples that were taken interleaved to pytest-benchmark: a clock that reads them off, one round each."""
    if not samples or benchmark.disabled:
        benchmark.pedantic(lambda: None)
        return
    ticks = clock(samples)
    timer = lambda: next(ticks)  # noqa: E731
    benchmark._timer = timer
    benchmark._precisions[timer] = min(samples)
    benchmark.pedantic(lambda: None, rounds=len(samples), iterations=1)


def clock(samples: list[float]) -> Iterator[float]:
    """Start and end of each sample; past the last one, time as usual."""
    now = 0.0
    for sample in samples:
        yield now
        now += sample
        yield now
    while True:
        now += statistics.median(samples)
        yield now


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    for family, records in session.records.items():
        terminalreporter.ensure_newline()
        copied = family != model_table.FAMILY and any(not record["refused"] for record in records)
        curve = session.curve if copied else []  # a whole model has no roof
        document = report.document(family, session.device, records, curve, session.tests)
        written = report.write(document, session.directory())
        report.show(document)
        terminalreporter.write_line("written: " + ", ".join(os.path.relpath(path) for path in written))
