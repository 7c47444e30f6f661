"""Options, fixtures and the rule that a required check is never skipped.

    pytest tests                                  everything a CPU can show
    pytest tests --device cuda                    the same contract on a GPU: the tests that touch the device, no others
    pytest tests --device cuda --all-tests        and the rest, which says there what it says on a CPU
    DLKERNELS_REQUIRE=cpp,interpreter pytest ...  a check skipped for want of one of these fails instead

A test says what it cannot do without: `@pytest.mark.needs("cpp")`, or by skipping with a reason that says "needs cpp".
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from needs import NEEDS, must_not_skip, required, without, without_gpu

import dlkernels as dk
from dlkernels import _backend


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the ops under test run")
    parser.addoption("--all-tests", action="store_true", help="with --device cuda: also what never touches the device")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than about ten seconds")
    config.addinivalue_line("markers", "gpu: runs on a CUDA device only, with --device cuda")
    config.addinivalue_line("markers", "needs(*names): what the check cannot do without; see tests/needs.py")
    required()
    if not without("hypothesis"):
        from hypothesis import settings

        settings.register_profile("dlkernels", deadline=None, derandomize=True, max_examples=60, print_blob=True)
        settings.load_profile("dlkernels")


def touches_device(item: pytest.Item) -> bool:
    return "device" in getattr(item, "fixturenames", ()) or item.get_closest_marker("gpu") is not None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Time on a GPU is dear: the rest has been run on a CPU."""
    if config.getoption("--device") == "cpu" or config.getoption("--all-tests"):
        return
    if others := [item for item in items if not touches_device(item)]:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if touches_device(item)]


def _needs_of(item: pytest.Item) -> set[str]:
    needs = {name for mark in item.iter_markers("needs") for name in mark.args}
    return needs | {"gpu"} if item.get_closest_marker("gpu") else needs


def pytest_runtest_setup(item: pytest.Item) -> None:
    device = item.config.getoption("--device")
    if item.get_closest_marker("gpu") and device != "cuda":
        pytest.skip("needs gpu: run with --device cuda")
    for name in sorted(_needs_of(item)):
        if (
            device == "cuda"
            and name in ("cpp", "interpreter", "twin")
            and "device" in getattr(item, "fixturenames", ())
        ):
            continue  # there these marks stand for "a kernel behind the op", which there is on a GPU
        reason = NEEDS[name]()
        if reason:
            pytest.skip(f"needs {name}: {reason}")


def _fail_when_required(report: pytest.TestReport | pytest.CollectReport, needs: set[str]) -> None:
    if report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if must_not_skip(needs, reason):
        report.outcome = "failed"
        report.longrepr = f"skipped, and DLKERNELS_REQUIRE={os.environ['DLKERNELS_REQUIRE']} forbids that: {reason}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    _fail_when_required(outcome.get_result(), _needs_of(item))


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    outcome = yield
    _fail_when_required(outcome.get_result(), set())


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the ops under test run: --device."""
    name = request.config.getoption("--device")
    if name == "cuda" and without_gpu():
        pytest.skip(f"needs gpu: {without_gpu()}")
    return torch.device(name)


@pytest.fixture
def tensors_on_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tensors are made on the device under test, in tests that have one."""
    device = request.getfixturevalue("device") if "device" in request.fixturenames else torch.device("cpu")
    if device.type == "cpu":
        yield
        return
    with device:
        yield


@pytest.fixture(scope="session", autouse=True)
def _reference_warning_once() -> None:
    """The one warning about missing kernels comes here, so that tests may turn warnings into errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dk.sigmoid_focal_loss(torch.zeros(1), torch.zeros(1))


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """One thread, one seed, no compiled graphs of other tests, the backend as it was."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    forced = _backend.state.forced
    yield
    _backend.state.forced = forced
    torch.set_num_threads(1)
