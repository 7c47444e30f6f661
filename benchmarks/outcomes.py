"""A pytest plugin that writes the outcome of every test as it comes, and what gpu_gate.py reads out of them.

    pytest -p outcomes --outcomes FILE ...      one JSON object a line, appended; with pytest-xdist too

What ended the run, a time limit or a lost GPU, loses no outcome. A process whose CUDA context is gone fails all that
follows: it ends, and pytest-xdist starts another one; without it the exit code is `LOST`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gate_state import in_turn

LOST = 13
_state = {"watch": False, "lost": False}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("outcomes")  # strings, because pytest-xdist hands them to its workers
    group.addoption("--outcomes", help="append the outcome of every test to this file")
    group.addoption("--seen-before", help="leave out the tests that this file of outcomes has")
    group.addoption("--test-seconds", type=int, default=0, help="a test that takes longer ends its process")


def pytest_configure(config: pytest.Config) -> None:
    # Whoever only hands out tests has no context to lose.
    _state["watch"] = hasattr(config, "workerinput") or not config.getoption("numprocesses", None)
    if config.getoption("--outcomes") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Writer(Path(config.getoption("--outcomes"))), "outcomes-writer")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not (path := config.getoption("--seen-before")):
        return
    seen = set(read(Path(path))[0])
    if gone := [item for item in items if item.nodeid in seen]:
        config.hook.pytest_deselected(items=gone)
    left = {item.nodeid: item for item in items if item.nodeid not in seen}
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = [left[nodeid] for nodeid in spread(list(left), workers)]


def spread(tests: list[str], workers: int = 1) -> list[str]:
    """A case of every test function, then the next of each: a run that is cut short has seen something of all.

    Each of the workers starts with a stretch of the list, which has this order too.
    """
    cases: dict[str, list[str]] = {}
    for test in tests:
        cases.setdefault(test.partition("[")[0], []).append(test)
    ordered = in_turn(cases.values())
    return [test for worker in range(workers) for test in ordered[worker::workers]]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """A kernel that hangs would hang the run."""
    if seconds := item.config.getoption("--test-seconds"):
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    yield
    if seconds:
        faulthandler.cancel_dump_traceback_later()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _state["lost"] = _state["lost"] or (_state["watch"] and report.failed and lost())


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    if _state["lost"]:
        os._exit(LOST)


def lost() -> bool:
    """Whether nothing runs on the GPU in this process any more."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


class Writer:
    """In the process that sees all reports."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("a")
        self.collected: set[str] = set()

    def write(self, entry: dict[str, Any]) -> None:
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.add(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.add(ids)

    def add(self, ids: Any) -> None:
        if new := sorted(set(ids) - self.collected):
            self.collected |= set(new)
            self.write({"collected": new})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write({"test": report.nodeid, "outcome": "failed", "why": why(report)})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed or report.when == "call" or (report.when == "setup" and report.skipped):
            said = {"why": why(report)} if report.failed else {}
            self.write({"test": report.nodeid, "outcome": report.outcome, **said})

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.write({"finished": int(exitstatus)})


def why(report: Any) -> str:
    """The first line of the error."""
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash else report.longrepr).strip() or "no message"
    lines = [line for line in text.splitlines() if line.strip()]
    return (lines[0] if crash else lines[-1])[:300]


# Reading --------------------------------------------------------------------------------------------------------------


def read(path: Path) -> tuple[dict[str, dict[str, str]], set[str]]:
    """(outcome by test, tests that were collected). The last line may be half written."""
    outcomes: dict[str, dict[str, str]] = {}
    collected: set[str] = set()
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        collected |= set(entry.get("collected", ()))
        if "test" in entry and outcomes.get(entry["test"], {}).get("outcome") != "failed":
            outcomes[entry["test"]] = entry
    return outcomes, collected


def by_file(path: Path) -> dict[str, dict[str, Any]]:
    """Of each test file: how many passed, failed, were skipped, did not run, and the first failure."""
    outcomes, collected = read(path)
    files: dict[str, dict[str, Any]] = {}
    for test in dict.fromkeys([*outcomes, *sorted(collected)]):
        counts = files.setdefault(test.partition("::")[0], dict.fromkeys(("passed", "failed", "skipped", "not_run"), 0))
        entry = outcomes.get(test)
        counts[entry["outcome"] if entry else "not_run"] += 1
        if entry and entry["outcome"] == "failed":
            counts.setdefault("first", f"{test}: {entry.get('why', '')}")
    return files


def verdict(counts: dict[str, Any] | None) -> str:
    """ "passed", "failed: ..." or "not finished"."""
    if counts and counts["failed"]:
        return f"failed: {counts['first']}"
    return "passed" if counts and counts["passed"] and not counts["not_run"] else "not finished"
