"""The shape of the project: a path one can guess, files one can read, names that say what they promise."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from needs import NEEDS, must_not_skip

import dlkernels as dk
from dlkernels import testing

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dlkernels"

FAMILIES = sorted(p.stem for p in (PACKAGE / "ops").glob("*.py") if not p.stem.startswith("_"))

# Optimizers: no function, and a step without a gradient of its own.
OPTIMIZERS = ["adamw", "sgdw"]

# Families whose public names are functions only.
WITHOUT_MODULES = {"weight_norm": "a parametrization of other modules: dlkernels/nn/utils/parametrizations.py"}

TOP_LEVEL = {
    *("setup.py", "csrc", "dlkernels", "tests", "benchmarks", "README.md"),
    *("pyproject.toml", "Makefile", "LICENSE", "MANIFEST.in"),
}

# What tools leave behind, all of it ignored by git.
LEFT_BEHIND = {"build", "dist", "demo-output"}


def files(*patterns: str) -> list[Path]:
    found = [p for pattern in patterns for p in ROOT.glob(pattern) if p.is_file()]
    return sorted(p for p in found if "__pycache__" not in p.parts and "build" not in p.relative_to(ROOT).parts)


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "path",
    [
        "dlkernels/reference/{}.py",
        "dlkernels/triton/{}.py",
        "csrc/math/{}.h",
        "csrc/cpu/{}.cpp",
        "tests/ops/test_{}.py",
        "benchmarks/bench_{}.py",
    ],
)
def test_mirrored_files(path: str, family: str) -> None:
    """Each family has the same name in every folder."""
    assert (ROOT / path.format(family)).is_file(), f"{path.format(family)} is missing"


@pytest.mark.parametrize("family", OPTIMIZERS)
@pytest.mark.parametrize(
    "path",
    [
        "dlkernels/optim/{}.py",
        "dlkernels/reference/{}.py",
        "dlkernels/triton/{}.py",
        "csrc/math/{}.h",
        "csrc/cpu/{}.cpp",
        "csrc/cpu/{}_kernel.cpp",
        "tests/optim/test_{}.py",
        "benchmarks/bench_{}.py",
    ],
)
def test_mirrored_files_of_optimizers(path: str, family: str) -> None:
    assert (ROOT / path.format(family)).is_file(), f"{path.format(family)} is missing"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_or_a_reason(family: str) -> None:
    assert (PACKAGE / "nn" / f"{family}.py").is_file() or family in WITHOUT_MODULES


IN_CUDA = [f for f in [*FAMILIES, *OPTIMIZERS] if list((ROOT / "csrc" / "cuda").glob(f"{f}*_kernel.cu"))]


@pytest.mark.parametrize("family", IN_CUDA)
def test_mirrored_files_of_cuda(family: str) -> None:
    """The host side, its tests on the host, and faults that these must notice."""
    host_side = "optimizer_table" if family in OPTIMIZERS else family
    assert (ROOT / "csrc" / "cuda" / f"{host_side}.cpp").is_file(), f"{family} has no host side"
    on_host = ROOT / "tests" / "cuda_host"
    tested = "optimizers" if family in OPTIMIZERS else family
    assert (on_host / f"test_{tested}_on_host.py").is_file(), f"{family} is not run on the host"
    assert (on_host / f"mutations_{tested}.py").is_file(), f"{family} names no faults"


@pytest.mark.parametrize("family", [*FAMILIES, *OPTIMIZERS])
def test_readme_says_what_serves_a_family_on_gpus(family: str) -> None:
    text = (ROOT / "README.md").read_text()
    assert re.search(r"served on GPU by", text, re.IGNORECASE), "README.md has no table `served on GPU by`"
    rows = [line for line in text.splitlines() if line.lstrip().startswith("|") and f"`{family}`" in line]
    served_by = "CUDA C++" if family in IN_CUDA else "Triton"
    assert any(served_by in row for row in rows), f"README.md has no row for {family} that says {served_by}"


def test_kernels_are_torch_free() -> None:
    """What a CUDA compiler reads has no torch, nor anything of CUDA that the host twin has not."""
    for path in files("csrc/cuda/*_kernel.cu", "csrc/cuda/*_kernel.h"):
        text = path.read_text()
        for word in ("ATen/", "torch/", "c10/", "<<<", "__global__", "__shared__", "asm volatile", "atomicAdd"):
            assert word not in text, f"{short(path)} has {word}"


def test_nothing_is_orphaned() -> None:
    """No reference, kernel, test or benchmark of a family that no public op belongs to."""
    for pattern, prefix in (
        ("dlkernels/reference/*.py", ""),
        ("csrc/math/*.h", ""),
        ("tests/ops/test_*.py", "test_"),
        ("benchmarks/bench_*.py", "bench_"),
    ):
        for path in files(pattern):
            name = path.stem.removeprefix(prefix)
            if not name.startswith("_"):
                shared = {"philox", "models"}  # by the optimizers; by all: training steps of whole models
                known = {*FAMILIES, *OPTIMIZERS, *shared}
                assert any(name == f or name.startswith(f + "_") for f in known), short(path)


def is_kernel_file(path: Path) -> bool:
    return path.suffix in (".cpp", ".cu", ".h", ".cuh") or path.parent.name == "triton"


@pytest.mark.parametrize("path", files("dlkernels/**/*.py", "csrc/**/*.*", "setup.py"), ids=short)
def test_file_length(path: Path) -> None:
    """400 lines, 500 for a kernel file: what one reads in one sitting."""
    limit = 500 if is_kernel_file(path) else 400
    lines = len(path.read_text().splitlines())
    assert lines <= limit, f"{short(path)} has {lines} lines, more than {limit}"


def test_top_level() -> None:
    """The top of the repository holds what was agreed, dotfiles, and what tools leave behind."""
    extra = {
        p.name
        for p in ROOT.iterdir()
        if p.name not in TOP_LEVEL | LEFT_BEHIND and not p.name.startswith(".") and p.suffix != ".egg-info"
    } - {"__pycache__"}
    assert not extra, f"at the top level: {', '.join(sorted(extra))}"
    missing = {"setup.py", "csrc", "dlkernels", "tests", "benchmarks", "README.md", "LICENSE"} - {
        p.name for p in ROOT.iterdir()
    }
    assert not missing, f"missing at the top level: {', '.join(sorted(missing))}"


TEXT = files("dlkernels/**/*.py", "tests/**/*.py", "benchmarks/**/*.py", "csrc/**/*.*", "*.py", "*.md", "*.toml")


@pytest.mark.parametrize("path", TEXT, ids=short)
def test_text_files(path: Path) -> None:
    """UTF-8, one newline at the end, no tabs in Python, no trailing blanks."""
    text = path.read_text(encoding="utf-8")
    if not text:
        return
    assert text.endswith("\n") and not text.endswith("\n\n"), "one newline at the end"
    for number, line in enumerate(text.splitlines(), 1):
        where = f"{short(path)}:{number}"
        assert line == line.rstrip() or path.suffix == ".md", f"{where} ends in blanks"
        if path.suffix == ".py":
            assert "\t" not in line, f"{where} has a tab"


# Names and words ------------------------------------------------------------------------------------------------------


def public(module: object) -> list[tuple[str, object]]:
    return [(name, getattr(module, name)) for name in vars(module)["__all__"] if not name.startswith("__")]


FUNCTIONS = [(f"{m.__name__}.{n}", o) for m in (dk.ops, testing) for n, o in public(m) if inspect.isfunction(o)]
MODULES = [(f"dlkernels.nn.{n}", o) for n, o in public(dk.nn) if inspect.isclass(o)]


def test_public_names_are_there() -> None:
    for name in dk.__all__:
        assert hasattr(dk, name), name
    for name, op in public(dk.ops):
        assert getattr(dk, name) is op, f"dlkernels.ops.{name} is not importable from dlkernels"
    assert sorted(dk.__all__) == sorted(set(dk.__all__))


@pytest.mark.parametrize(("name", "function"), FUNCTIONS, ids=[n for n, _ in FUNCTIONS])
def test_function_docstrings(name: str, function: object) -> None:
    """One line, then Args naming every argument, Returns, Raises; ops also Note and Reference."""
    text = inspect.getdoc(function)
    assert text, f"{name} has no docstring"
    first, *rest = text.splitlines()
    assert first.endswith((".", ":")) and (not rest or not rest[0]), f"{name}: the docstring begins with one sentence"
    signature = inspect.signature(function)  # type: ignore[arg-type]
    wanted = ["Returns:", "Raises:", "Note:", "Reference:"] if name.startswith("dlkernels.ops") else []
    if len(signature.parameters) > 1:
        wanted = ["Args:", *wanted]
    for heading in wanted:
        assert f"\n{heading}" in text, f"{name}: no {heading}"
    if wanted:
        args = text.split("\nArgs:")[1].split("\nReturns:")[0]
        for parameter in signature.parameters:
            assert re.search(rf"\b{parameter}\b", args), f"{name}: `{parameter}` is not under Args"


@pytest.mark.parametrize(("name", "optimizer"), public(dk.optim), ids=[n for n, _ in public(dk.optim)])
def test_optimizer_docstrings(name: str, optimizer: object) -> None:
    text = inspect.getdoc(optimizer)
    assert text and text.splitlines()[0].endswith((".", ":")), f"{name}: the docstring begins with one sentence"
    for heading in ("Args:", "Raises:", "Reference:"):
        assert f"\n{heading}" in text, f"{name}: no {heading}"
    made = optimizer.__init__ if inspect.isclass(optimizer) else optimizer
    for parameter in inspect.signature(made).parameters:
        if parameter != "self":
            assert re.search(rf"\b{parameter}\b", text), f"{name}: `{parameter}` is not described"


@pytest.mark.parametrize(("name", "module"), MODULES, ids=[n for n, _ in MODULES])
def test_module_docstrings(name: str, module: type) -> None:
    text = inspect.getdoc(module) if module.__doc__ else None
    assert text and text.splitlines()[0].endswith("."), f"{name}: the docstring begins with one sentence"
    for heading in ("Args:", "Shape:"):
        assert f"\n{heading}" in text, f"{name}: no {heading}"
    for parameter in list(inspect.signature(module.__init__).parameters)[1:]:
        if parameter not in ("size_average", "reduce"):
            assert re.search(rf"\b{parameter}\b", text), f"{name}: `{parameter}` is not described"


def test_every_file_says_what_it_is() -> None:
    for path in files("dlkernels/**/*.py", "tests/**/*.py", "benchmarks/**/*.py"):
        text = path.read_text()
        assert not text or text.lstrip("r").startswith(('"""', "#!")), f"{short(path)} has no module docstring"


def test_functions_and_modules_agree_on_options() -> None:
    """What a function takes beside tensors, its module takes under the same name with the same default, or says why."""
    pairs = {"SigmoidFocalLoss": "sigmoid_focal_loss", "SoftmaxFocalLoss": "softmax_focal_loss"}
    pairs["CrossEntropyLoss"] = "cross_entropy"
    different = {("SigmoidFocalLoss", "reduction")}  # a training module reduces; the function is torchvision's
    for module, function in pairs.items():
        ours = inspect.signature(getattr(dk.nn, module)).parameters
        theirs = inspect.signature(getattr(dk, function)).parameters
        for name, parameter in theirs.items():
            if name in ("input", "inputs", "target", "targets", "normalizer") or (module, name) in different:
                continue
            assert name in ours, f"{module} lacks {name}"
            assert ours[name].default == parameter.default, f"{module}.{name} has another default than {function}"


# Importing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["dlkernels", "dlkernels.testing"])
def test_import_is_light(module: str) -> None:
    """`import dlkernels` brings in neither Triton nor a plotting library nor a test framework."""
    code = (
        f"import sys, torch; before = set(sys.modules); import {module}\n"
        "print([m for m in ('triton', 'matplotlib', 'pytest', 'hypothesis', 'numpy.testing', 'torch._dynamo', "
        "'torch._inductor') if m in sys.modules and m not in before])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]", f"import {module} also imports {result.stdout.strip()}"


def test_import_without_triton_installed() -> None:
    """Every module above the kernels imports without Triton; the launchers are imported on first use."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, dlkernels as dk, dlkernels.testing\n"
        "print(dk.sigmoid_focal_loss(torch.zeros(3), torch.zeros(3)).shape, dk.build_info()['triton'])"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr[-1500:]
    assert "torch.Size([3])" in result.stdout and "triton" in result.stdout


def test_launchers_import_without_a_gpu() -> None:
    names = [f"dlkernels.triton.{path.stem}" for path in files("dlkernels/triton/*.py") if path.stem != "__init__"]
    code = f"import dlkernels.triton, {', '.join(names)}"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT, env=env
    )
    assert result.returncode == 0 or "No module named 'triton'" in result.stderr, result.stderr[-1500:]


# The helpers and the rule for skips -----------------------------------------------------------------------------------


def test_a_required_check_is_never_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """DLKERNELS_REQUIRE turns the skips that it names into failures, and no others."""
    monkeypatch.setenv("DLKERNELS_REQUIRE", "cpp, interpreter")
    assert must_not_skip({"cpp"}, "any reason")
    assert must_not_skip(set(), "needs interpreter: TRITON_INTERPRET=1 is not set")
    assert not must_not_skip({"gpu"}, "needs gpu: no CUDA device is visible")
    assert not must_not_skip({"gpu", "cpp"}, "needs gpu: no CUDA device is visible")
    monkeypatch.setenv("DLKERNELS_REQUIRE", "all")
    assert must_not_skip(set(), "too slow")
    monkeypatch.delenv("DLKERNELS_REQUIRE")
    assert not must_not_skip(set(NEEDS), "any reason")
    monkeypatch.setenv("DLKERNELS_REQUIRE", "cppp")
    with pytest.raises(pytest.UsageError, match="cppp"):
        must_not_skip(set(), "")


def test_a_required_check_fails_in_a_run(tmp_path: Path) -> None:
    """The whole way: a skipped test, a skipped module and a plain pass, with and without the variable."""
    for name in ("conftest.py", "needs.py"):
        (tmp_path / name).write_text((ROOT / "tests" / name).read_text())
    (tmp_path / "test_skips.py").write_text(
        "import pytest\n"
        "@pytest.mark.needs('gpu')\ndef test_marked(): raise AssertionError('ran without a GPU')\n"
        "def test_said(): pytest.skip('needs gpu: none')\n"
        "def test_other(): pytest.skip('too slow')\n"
        "@pytest.mark.xfail\ndef test_expected(): raise AssertionError\n"
        "def test_passes(): pass\n"
    )
    (tmp_path / "test_module.py").write_text("import pytest\npytest.skip('needs gpu', allow_module_level=True)\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    env.pop("DLKERNELS_REQUIRE", None)
    plain = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
    assert plain.returncode == 0 and "1 passed, 4 skipped, 1 xfailed" in plain.stdout, plain.stdout[-1500:]
    env["DLKERNELS_REQUIRE"] = "gpu"
    command.append("--continue-on-collection-errors")
    strict = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
    assert "1 failed, 1 passed, 1 skipped, 1 xfailed, 2 errors" in strict.stdout, strict.stdout[-1500:]
    assert strict.returncode == 1 and strict.stdout.count("DLKERNELS_REQUIRE=gpu forbids that") >= 3


def test_poisoned_empty_reaches_every_way_of_making_a_tensor() -> None:
    x = torch.zeros(3, 5)
    with testing.poisoned_empty():
        for made in (
            torch.empty(3),
            torch.empty_like(x),
            x.new_empty(4),
            torch.empty_strided((2, 2), (1, 2)),
            torch.empty(2, dtype=torch.bfloat16),
            torch.empty(2, dtype=torch.float64),
        ):
            assert made.isnan().all()
        assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_canary_and_unmodified_notice() -> None:
    canary = testing.Canary(torch.arange(5.0))
    canary.check()
    inside = canary.tensor
    torch.as_strided(inside, (1,), (1,), inside.storage_offset() + 5).fill_(0)
    with pytest.raises(AssertionError, match="memory around x"):
        canary.check("x")
    x = torch.zeros(3)
    with pytest.raises(AssertionError, match="input 1"), testing.unmodified(None, x):
        x[1] = -0.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="guard pages are made with Linux' mprotect")
@pytest.mark.parametrize("side", ["after", "before"])
def test_guard_page_stops_a_read(side: str) -> None:
    code = (
        "import ctypes, sys, torch; from dlkernels import testing\n"
        f"x = testing.guard_page(torch.arange(5.0), {side!r}); assert x.tolist() == [0, 1, 2, 3, 4]\n"
        f"print('made', flush=True); ctypes.string_at(x.data_ptr() + {20 if side == 'after' else -4}, 4); print('read')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.stdout == "made\n" and result.returncode < 0, (result.returncode, result.stdout, result.stderr)


def test_layouts_hold_the_same_values() -> None:
    for shape in ((), (3,), (3, 4), (2, 3, 4), (2, 3, 4, 5), (2, 3, 2, 3, 2)):
        x = torch.randn(shape)
        seen = dict(testing.layouts(x))
        assert all(torch.equal(t, x) for t in seen.values())
        assert len({(t.stride(), t.storage_offset()) for t in seen.values()}) >= min(len(seen), 2)
