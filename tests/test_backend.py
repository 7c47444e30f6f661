"""Which implementation serves a call, how to ask for another, and what is said when it cannot."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import dlkernels as dk
from dlkernels import _backend

ROOT = Path(dk.__file__).parents[1]
NO_EXTENSION = "import sys; sys.modules['dlkernels._C'] = None\n"


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, with no DLKERNELS_ or TRITON_INTERPRET setting of ours unless given."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("DLKERNELS_") and k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**clean, **env},
    )


def printed(code: str, **env: str) -> str:
    result = python(code, **env)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


def loss(device: str = "cpu") -> torch.Tensor:
    x = torch.linspace(-2, 2, 35, device=device).view(5, 7)
    return dk.cross_entropy(x, torch.arange(5, device=device))


# backend() ------------------------------------------------------------------------------------------------------------


def test_context_manager_forces_and_restores() -> None:
    assert _backend.state.forced is None
    with dk.backend("reference"):
        assert dk.build_info()["forced"] == "reference"
        inside = loss()
        with dk.backend("triton"):
            assert _backend.state.forced == "triton"
        assert _backend.state.forced == "reference"
    assert _backend.state.forced is None
    torch.testing.assert_close(inside, loss())


def test_context_manager_restores_after_an_error() -> None:
    with pytest.raises(KeyError), dk.backend("reference"):
        raise KeyError
    assert _backend.state.forced is None


def test_reference_really_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from dlkernels.ops import focal_loss

    called = []
    original = focal_loss.reference.softmax_focal_loss
    monkeypatch.setattr(
        focal_loss.reference, "softmax_focal_loss", lambda *a: called.append(1) or original(*a), raising=True
    )
    with dk.backend("reference"):
        loss()
    assert called


@pytest.mark.needs("cpp")
def test_default_on_cpu_is_the_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from dlkernels.ops import focal_loss

    def fail(*_: Any) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(focal_loss.reference, "softmax_focal_loss", fail)
    assert _backend.default_for("cpu") == "cpp"
    assert loss().isfinite()
    with dk.backend("cpp"):
        assert loss().isfinite()


def test_choice_holds_in_the_threads_of_autograd() -> None:
    """The backward pass of a loss forced to one backend runs on it, whatever thread it runs in."""
    x = torch.randn(5, 7, requires_grad=True)
    with dk.backend("reference"):
        out = dk.softmax_focal_loss(x, torch.arange(5), reduction="none")
        grads: list[Any] = []
        thread = threading.Thread(target=lambda: grads.extend(torch.autograd.grad(out.sum(), x)))
        thread.start()
        thread.join()
    assert len(grads) == 1 and grads[0].isfinite().all()


@pytest.mark.parametrize("name", ["C++", "", "Reference", "cpu"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(ValueError) as caught, dk.backend(name):
        pass
    message = str(caught.value)
    assert "reference, cpp, triton, cuda" in message and repr(name) in message and "\n" not in message


# What cannot serve says why -------------------------------------------------------------------------------------------


def one_line_error(name: str, *words: str) -> None:
    with dk.backend(name), pytest.raises(RuntimeError) as caught:
        loss()
    message = str(caught.value)
    assert message.startswith(f"backend {name!r} cannot serve this call: ") and "\n" not in message
    for word in words:
        assert word in message, message


def test_cuda_without_cuda_kernels() -> None:
    one_line_error("cuda", "CPU tensors")


@pytest.mark.skipif(_backend.interpreting(), reason="the interpreter serves CPU tensors")
def test_triton_on_cpu_without_the_interpreter() -> None:
    if _backend.triton_missing():
        one_line_error("triton", "triton")
    else:
        one_line_error("triton", "CPU", "TRITON_INTERPRET=1")


def test_triton_when_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "triton_missing", lambda: "triton is not installed")
    one_line_error("triton", "triton is not installed")


def test_cpp_when_it_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backend, "C", None)
    monkeypatch.setattr(_backend, "C_MISSING", "dlkernels._C is not built: reasons")
    one_line_error("cpp", "dlkernels._C is not built: reasons")


@pytest.mark.needs("cpp")
def test_cpp_on_other_devices() -> None:
    with dk.backend("cpp"), pytest.raises(RuntimeError, match="serves CPU tensors, not meta"):
        loss("meta")


def test_every_public_loss_reports_it() -> None:
    x = torch.zeros(2, 3)
    y = torch.zeros(2, dtype=torch.int64)
    for call in (dk.sigmoid_focal_loss, dk.softmax_focal_loss, dk.cross_entropy):
        for grad in (False, True):
            with dk.backend("cuda"), pytest.raises(RuntimeError, match="cannot serve this call"):
                call(x.clone().requires_grad_(grad), y)


# DLKERNELS_BACKEND ----------------------------------------------------------------------------------------------------


def test_environment_variable() -> None:
    """Read once, at import; the context manager wins over it."""
    code = (
        "import dlkernels as dk\n"
        "print(dk.build_info()['forced'])\n"
        "with dk.backend('triton'): print(dk.build_info()['forced'])\n"
        "print(dk.build_info()['forced'])"
    )
    assert printed(code, DLKERNELS_BACKEND="reference").split() == ["reference", "triton", "reference"]


@pytest.mark.parametrize(("value", "forced"), [("cpp", "cpp"), (" triton ", "triton"), ("", None), (" ", None)])
def test_environment_variable_values(value: str, forced: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLKERNELS_BACKEND", value)
    _backend._from_environment()
    assert _backend.state.forced == forced


def test_environment_variable_with_an_unknown_name() -> None:
    result = python("import dlkernels", DLKERNELS_BACKEND="fastest")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError") and "`DLKERNELS_BACKEND`" in last and "'fastest'" in last and "cpp" in last


# build_info -----------------------------------------------------------------------------------------------------------


def test_build_info() -> None:
    info = dk.build_info()
    assert info["torch"] == torch.__version__
    assert info["python"] == ".".join(map(str, sys.version_info[:3]))
    assert (info["cpp"] is None) == bool(_backend.C_MISSING)
    assert isinstance(info["triton"], str) and info["triton"]
    assert info["forced"] is None
    assert info["ops"], "no op is listed"
    for op, devices in info["ops"].items():
        assert set(devices) >= {"cpu", "cuda"}, op
        for device, served in devices.items():
            assert served["backend"] in ("reference", "cpp", "triton", "cuda")
            assert isinstance(served["why"], str) and "\n" not in served["why"]
            if served["backend"] == "reference" and device == "cpu":
                assert served["why"], f"{op} on {device}: why not something better?"
    json.dumps(info)  # what `info` prints and benchmarks store


@pytest.mark.needs("cpp")
def test_build_info_of_the_extension() -> None:
    cpp = dk.build_info()["cpp"]
    assert _backend._minor(cpp["torch"]) == _backend._minor(torch.__version__)
    text = json.dumps(cpp).lower()
    for word in ("compiler", "avx2" if torch.backends.cpu.get_cpu_capability().startswith("AVX") else "default"):
        assert word in text, f"{word} is not in {text}"
    assert all(served["cpu"]["backend"] == "cpp" for served in dk.build_info()["ops"].values())


# An extension that does not fit, or is not there ----------------------------------------------------------------------


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> None:
    """An extension file is found, whatever is built here."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())


@pytest.mark.parametrize("built_for", ["2.0.1", "1.13.0+cu117", "99.1.0"])
def test_built_for_another_torch(
    built_for: str, present: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Refused before it is loaded, in one line that names both versions and the command."""
    record = tmp_path / "_build_record.json"
    record.write_text(json.dumps({"torch": built_for}))
    monkeypatch.setattr(_backend, "_RECORD", record)
    imported: list[str] = []
    monkeypatch.setattr(_backend.importlib, "import_module", lambda name: imported.append(name))
    module, reason = _backend._load_extension()
    assert module is None and not imported
    assert built_for in reason and torch.__version__ in reason and "pip install" in reason and "\n" not in reason


def test_built_for_a_patch_release_is_taken(present: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = tmp_path / "_build_record.json"
    record.write_text(json.dumps({"torch": _backend._minor(torch.__version__) + ".99+cpu"}))
    monkeypatch.setattr(_backend, "_RECORD", record)
    monkeypatch.setattr(_backend.importlib, "import_module", lambda name: name)
    assert _backend._load_extension() == ("dlkernels._C", "")


@pytest.mark.parametrize("content", [None, "{}", "not json", "[]", ""])
def test_record_that_says_nothing(
    content: str | None, present: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A lost or broken record refuses the extension, and never stops `import dlkernels`."""
    record = tmp_path / "_build_record.json"
    if content is not None:
        record.write_text(content)
    monkeypatch.setattr(_backend, "_RECORD", record)
    module, reason = _backend._load_extension()
    assert module is None and "pip install" in reason and "\n" not in reason


def test_extension_that_does_not_load(present: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = tmp_path / "_build_record.json"
    record.write_text(json.dumps({"torch": torch.__version__}))
    monkeypatch.setattr(_backend, "_RECORD", record)

    def fail(name: str) -> None:
        raise ImportError("undefined symbol: _ZN3c10\nmore\nlines")

    monkeypatch.setattr(_backend.importlib, "import_module", fail)
    module, reason = _backend._load_extension()
    assert module is None and "undefined symbol: _ZN3c10" in reason and "\n" not in reason


def test_without_extension_one_warning_and_right_results() -> None:
    """The losses work, and say once, in the user's own line of code, that they are slow."""
    code = NO_EXTENSION + (
        "import warnings, torch, dlkernels as dk\n"
        "x = torch.linspace(-2, 2, 35).view(5, 7).requires_grad_()\n"
        "y = torch.arange(5)\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for _ in range(3):\n"
        "        out = dk.cross_entropy(x, y); dk.softmax_focal_loss(x, y); dk.sigmoid_focal_loss(x, y)\n"
        "    out.backward()\n"
        "assert len(caught) == 1, [str(w.message) for w in caught]\n"
        "message = str(caught[0].message)\n"
        "assert 'reference' in message and 'dlkernels._C is not built' in message and '\\n' not in message, message\n"
        "assert caught[0].filename == '<string>', caught[0].filename\n"
        "expected = torch.nn.functional.cross_entropy(x, y)\n"
        "torch.testing.assert_close(out, expected)\n"
        "torch.testing.assert_close(x.grad, torch.autograd.grad(expected, x)[0])\n"
        "info = dk.build_info()\n"
        "assert info['cpp'] is None and info['ops']['softmax_focal_loss_fwd']['cpu']['backend'] == 'reference'\n"
        "print('good')\n"
    )  # fmt: skip
    assert printed(code) == "good"


def test_without_extension_compile_and_transforms_work() -> None:
    code = NO_EXTENSION + (
        "import torch, dlkernels as dk\n"
        "x, y = torch.linspace(-2, 2, 35).view(5, 7).requires_grad_(), torch.arange(5)\n"
        "compiled = torch.compile(dk.cross_entropy, backend='aot_eager', fullgraph=True)(x, y)\n"
        "torch.testing.assert_close(compiled, torch.nn.functional.cross_entropy(x, y))\n"
        "compiled.backward()\n"
        "g = torch.func.grad(dk.cross_entropy)(x.detach(), y)\n"
        "torch.testing.assert_close(g, x.grad)\n"
        "print('good')\n"
    )
    assert printed(code) == "good"
