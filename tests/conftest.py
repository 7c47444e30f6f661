"""Options, fixtures and the rule that a required check is never skipped.

    pytest tests                                  everything a CPU can show
    pytest tests --device cuda                    the same contract on a GPU
    DLKERNELS_REQUIRE=cpp,interpreter pytest ...  a check skipped for want of one of these fails instead

A test says what it cannot do without: `@pytest.mark.needs("cpp")`, or by skipping with a reason that says "needs cpp".
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

import dlkernels as dk
from dlkernels import _backend


def _without_gpu() -> str:
    return "" if torch.cuda.is_available() else "no CUDA device is visible"


def _without_interpreter() -> str:
    return _backend.triton_missing() or ("" if _backend.interpreting() else "TRITON_INTERPRET=1 is not set")


def _without_aot() -> str:
    if _backend.triton_missing():
        return _backend.triton_missing()
    return "Triton's compiler is off under TRITON_INTERPRET=1" if _backend.interpreting() else ""


def _without(module: str) -> str:
    return "" if importlib.util.find_spec(module) else f"{module} is not installed"


def _without_hosts() -> str:
    missing = [name for name in ("lightning", "transformers", "accelerate") if _without(name)]
    return f"not installed: {', '.join(missing)}" if missing else ""


def _without_real() -> str:
    names = ("timm", "torchvision", "transformers", "diffusers", "monai", "segmentation_models_pytorch")
    missing = [name for name in (*names, "dynamic_network_architectures") if _without(name)]
    return f"not installed: {', '.join(missing)}; `make test-real` has an environment for it" if missing else ""


# What a check may need -> the reason why it is missing, or "".
NEEDS: dict[str, Callable[[], str]] = {
    "cpp": lambda: _backend.C_MISSING,
    "gpu": _without_gpu,
    "interpreter": _without_interpreter,
    "aot": _without_aot,
    "nvcc": lambda: "" if shutil.which("nvcc") else "nvcc is not on PATH",
    "compiler": lambda: "" if shutil.which("g++") or shutil.which("c++") else "no C++ compiler is on PATH",
    "hypothesis": lambda: _without("hypothesis"),
    "hosts": _without_hosts,
    "real": _without_real,
    "twin": lambda: _backend.cuda_missing("cpu"),
}


def required() -> set[str]:
    """The names in DLKERNELS_REQUIRE; "all" turns every skip into a failure."""
    names = {name.strip() for name in os.environ.get("DLKERNELS_REQUIRE", "").split(",") if name.strip()}
    unknown = names - NEEDS.keys() - {"all"}
    if unknown:
        raise pytest.UsageError(
            f"DLKERNELS_REQUIRE must name some of {', '.join(NEEDS)} or all, got {', '.join(unknown)}"
        )
    return names


def must_not_skip(needs: set[str], reason: str) -> bool:
    """Whether a check that skipped with `reason`, marked as needing `needs`, has to fail instead."""
    if "by design" in reason:
        return False  # not for want of anything
    names = required()
    said = {name for name in NEEDS if f"needs {name}" in reason}  # of several needs, the one that was missing
    return "all" in names or bool(names & (said or needs))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the ops under test run")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than about ten seconds")
    config.addinivalue_line("markers", "gpu: runs on a CUDA device only, with --device cuda")
    config.addinivalue_line("markers", "needs(*names): what the check cannot do without; see tests/conftest.py")
    required()
    if not _without("hypothesis"):
        from hypothesis import settings

        settings.register_profile("dlkernels", deadline=None, derandomize=True, max_examples=60, print_blob=True)
        settings.load_profile("dlkernels")


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
    if name == "cuda" and _without_gpu():
        pytest.skip(f"needs gpu: {_without_gpu()}")
    return torch.device(name)


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
