"""The optimizers in the commands of `python -m dlkernels`: what is shown, compared and noticed."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks

import dlkernels as dk
from dlkernels import _backend
from dlkernels.__main__ import main
from dlkernels.cli import _demo_model, _demo_parts, demo
from dlkernels.cli._optimizer_cases import CASES, OptimizerCase
from dlkernels.cli._profile_bytes import bytes_per_step
from dlkernels.optim._runners import FAMILIES, make_runner

ROOT = Path(__file__).resolve().parent.parent
CLASSES = {"adamw": "AdamW", "sgdw": "SGDW"}


def altered(name: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]) -> None:
    """The class `name` of dk.optim, made with other arguments than the caller's."""
    right = getattr(dk.optim, name)

    def wrong(params: Any, **options: Any) -> Any:
        change(options)
        return right(params, **options)

    monkeypatch.setattr(dk.optim, name, wrong)


# info -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("forced", [None, "reference"])
def test_info_names_the_runner_of_the_cpu(family: str, forced: str | None) -> None:
    names = {"cpp": "CppRunner", "reference": "ReferenceRunner", "triton": "Runner"}
    before, _backend.state.forced = _backend.state.forced, forced
    try:
        optimizer = getattr(dk.optim, CLASSES[family])([torch.ones(3, requires_grad=True)])
        optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
        optimizer.step()
        told = dk.build_info()["ops"][family]["cpu"]["backend"]
        assert type(optimizer._plan.parts[0].runner).__name__ == names[told]
        assert told == "reference" or forced is None
    finally:
        _backend.state.forced = before


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("missing", ["", "triton is not installed"])
def test_info_names_the_runner_of_cuda(family: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("dlkernels.triton._multi_tensor")
    module.Runner = lambda *a, **k: "triton"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(_backend, "triton_missing", lambda: missing)
    monkeypatch.setattr(_backend, "_warn_reference", lambda device: None)
    monkeypatch.setattr(_backend.state, "forced", None)
    item: Any = SimpleNamespace(param=SimpleNamespace(device=torch.device("cuda")))
    runner = make_runner(family, [item], [], [], rounding_seed=None, average_decay=None)
    told = dk.build_info()["ops"][family]["cuda"]["backend"]
    assert told == ("reference" if missing else "triton")
    assert (runner if told == "triton" else type(runner).__name__) == {"reference": "ReferenceRunner"}.get(told, told)


# check ----------------------------------------------------------------------------------------------------------------


def left(case: OptimizerCase, dtype: torch.dtype) -> Tensor:
    sample = case.sample(dtype, "cpu", 0)
    return sample.eager(sample.x, *sample.parameters).double()


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op} {c.name}")
def test_all_of_a_case_counts(case: OptimizerCase) -> None:
    """The steps move the parameters by their own size, and without any one option they end elsewhere."""
    value, start = left(case, torch.float32), case.sample(torch.float32, "cpu", 0).x.double()
    assert (value - start).norm() > (0.01 if "decades" in case.extras else 0.2) * start.norm()
    for option in case.options.keys() - {"master_weights", "nesterov"}:
        others = {k: v for k, v in case.options.items() if k not in (option, "nesterov")}
        without = left(replace(case, options=others), torch.float32)
        assert (
            without - left(replace(case, options={**others, option: case.options[option]}), torch.float32)
        ).norm() > (1e-3 * value.norm()), option
    if "nesterov" in case.options:
        without = left(replace(case, options={**case.options, "nesterov": False}), torch.float32)
        assert (without - value).norm() > 1e-3 * value.norm()
    if "master_weights" in case.options:
        without = left(replace(case, options={**case.options, "master_weights": False}), torch.bfloat16)
        assert not torch.allclose(without, left(case, torch.bfloat16), rtol=1e-4, atol=0)
    if "schedule" in case.extras:
        constant = replace(case, extras=tuple(e for e in case.extras if e != "schedule"))
        assert (left(constant, torch.float32) - value).norm() > 1e-3 * value.norm()


def _drop(*names: str) -> Callable[[dict[str, Any]], None]:
    return lambda options: [options.pop(name, None) for name in names] and None  # type: ignore[func-returns-value]


FAULTS: dict[str, tuple[str, str, Callable[[dict[str, Any]], None]]] = {
    # class, a case that sees it, what is wrong
    "eps": ("AdamW", "decades", lambda o: o.update(eps=1.1e-8)),
    "decay twice": ("AdamW", "4099", lambda o: o.update(weight_decay=2 * o["weight_decay"])),
    "no amsgrad": ("AdamW", "amsgrad=True", _drop("amsgrad")),
    "uphill": ("AdamW", "maximize=True", _drop("maximize")),
    "beta": ("AdamW", "4099", lambda o: o.update(betas=(0.9, 0.998))),
    "unclipped": ("AdamW", "max_grad_norm=30.0", _drop("max_grad_norm")),
    "decay of lr": ("AdamW", "decoupling=schedule", _drop("decoupling")),
    "sgdw, decay twice": ("SGDW", "4099", lambda o: o.update(weight_decay=2 * o["weight_decay"])),
    "sgdw, momentum of gradients": ("SGDW", "4099", lambda o: o.setdefault("momentum_scaling", "gradient")),
    "sgdw, no nesterov": ("SGDW", "nesterov=True", _drop("nesterov")),
    "sgdw, unclipped": ("SGDW", "max_grad_norm=30.0", _drop("max_grad_norm")),
}


@pytest.mark.parametrize(
    ("fault", "dtype"), [(f, d) for f in FAULTS for d in ("float32", "bfloat16") if (f, d) != ("beta", "bfloat16")]
)
def test_check_notices_a_wrong_optimizer(
    fault: str, dtype: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in half precision, but for what is less than its rounding."""
    name, case, change = FAULTS[fault]
    altered(name, monkeypatch, change)
    assert main(["check", "--device", "cpu", "--dtype", dtype, "--op", "adamw", "--op", "sgdw"]) == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL ")]
    op = name.lower()
    assert all(line.startswith(f"FAIL {op} on cpu, {dtype}: ") and "value error" in line for line in failures), failures
    assert any(case in line for line in failures), failures


def test_check_notices_a_parameter_that_is_not_its_master_copy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = dk.optim.SGDW

    class Wrong(right):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for p in self.param_groups[0]["params"]:
                p.data.mul_(1.01)

    monkeypatch.setattr(dk.optim, "SGDW", Wrong)
    assert main(["check", "--device", "cpu", "--dtype", "float16", "--op", "sgdw"]) == 1
    assert "a parameter is not its master copy, rounded" in capsys.readouterr().out


# profile --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "name", "least", "eager"),
    [
        (
            ("adamw", "--shape", "3,1000"),
            "adamw of 3 tensors of 1000; eager: torch.optim.AdamW, float32", "84 kB", "AdamW",
        ),
        (
            ("sgdw", "--shape", "1000", "--dtype", "bfloat16"),
            "sgdw of 1 tensor of 1000; eager: decay, then torch.optim.SGD, bfloat16", "10 kB", "SGD",
        ),
    ],
)  # fmt: skip
def test_profile_an_optimizer(
    arguments: tuple[str, ...], name: str, least: str, eager: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """AdamW reads parameter, gradient and two moments, and writes all but the gradient: 28 bytes in float32."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["profile", *arguments, "--eager", "--steps", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    op = arguments[0]
    assert printed.startswith(name + "\n") and f"regex:{op} " in printed
    fused, _, other = printed.partition("eager step")
    assert f"Optimizer.step#{CLASSES[op]}.step" in fused and f"Optimizer.step#{eager}.step" in other
    assert least in next(line for line in fused.splitlines() if f"dlkernels::{op}_step" in line)
    assert "dlkernels::" not in other.partition("trace:")[0]


@pytest.mark.parametrize(
    ("make", "dtype", "each"),
    [
        (dk.optim.AdamW, torch.float32, 28),
        (dk.optim.AdamW, torch.float64, 56),
        (functools.partial(dk.optim.AdamW, amsgrad=True, ema_decay=0.9), torch.float32, 28 + 8 + 8),
        (functools.partial(dk.optim.AdamW, master_weights=True), torch.bfloat16, 2 + 2 + 8 + 16),
        (functools.partial(dk.optim.AdamW, state_dtype=torch.bfloat16), torch.float32, 12 + 8),
        (dk.optim.SGDW, torch.float16, 10),
        (functools.partial(dk.optim.SGDW, momentum=0.0), torch.float32, 12),
    ],
)
def test_bytes_of_a_step(make: Callable[..., Any], dtype: torch.dtype, each: int) -> None:
    """Of the parameters that have a gradient; also when the step is the first one."""
    params = [torch.ones(n, dtype=dtype, requires_grad=True) for n in (5, 7, 100)]
    optimizer = make(params)
    for p in params[:2]:
        p.grad = torch.ones_like(p)
    family = optimizer._family
    for _ in range(2):
        assert bytes_per_step(optimizer.step) == {f"dlkernels::{family}_step": 12 * each}
    assert not _global_optimizer_post_hooks


def test_the_range_lies_around_the_step_alone() -> None:
    """Not around the closure, and nothing is marked where nobody profiles."""
    p = torch.ones(4, requires_grad=True)
    p.grad = torch.ones(4)
    optimizer = dk.optim.AdamW([p])

    def closure() -> None:
        with torch.profiler.record_function("closure"):
            pass

    with torch.profiler.profile() as profiler:
        optimizer.step(closure)
    events = {e.name: e for e in profiler.events() if e.is_user_annotation}
    whole = events["Optimizer.step#AdamW.step"]
    assert events["dlkernels::adamw_step"].cpu_parent is whole and events["closure"].cpu_parent is whole


# demo -----------------------------------------------------------------------------------------------------------------

WRONG: dict[str, Callable[[dict[str, Any]], None]] = {
    "eps": lambda o: o.update(eps=1.1e-8),
    "decay twice": lambda o: o.update(weight_decay=0.02),
    "beta": lambda o: o.update(betas=(0.9, 0.998)),
}


def test_demo_optimizers_agree() -> None:
    pytest.importorskip("monai")
    found = _demo_model.compare_optimizers("cpu")
    assert [each.dtype for each in found] == [torch.float64, torch.float32]
    assert not any(each.failed for each in found) and found[1].parameters.error > 0, found


@pytest.mark.parametrize("fault", WRONG)
def test_demo_notices_a_wrong_optimizer(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole demo fails; its networks do not."""
    pytest.importorskip("monai")
    altered("AdamW", monkeypatch, WRONG[fault])
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    shown = demo.Demo(True, 1, 0.1, "cpu", tmp_path, data=SimpleNamespace(train_x=x, train_y=torch.arange(8)))
    demo.compare(shown)
    assert [f.partition(":")[0] for f in shown.failures] == [
        f"the fused optimizer in {dtype}" for dtype in ("float64", "float32")
    ]
    assert all(each.failed for each in shown.optimizers) and not any(each.failed for each in shown.models)


def test_demo_notices_a_step_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("monai")
    right = dk.optim.AdamW.step

    def wrong(self: Any) -> None:
        right(self)
        self.param_groups[0]["params"][0].data.view(-1)[0] = float("nan")

    monkeypatch.setattr(dk.optim.AdamW, "step", wrong)
    assert all(each.failed for each in _demo_model.compare_optimizers("cpu"))


@pytest.mark.parametrize("kind", ["eager", "fused"])
def test_each_run_trains_with_its_own_optimizer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("monai")
    made: list[Any] = []
    make = _demo_model.make_optimizer
    monkeypatch.setattr(_demo_parts, "make_optimizer", lambda *a: made.append(make(*a)) or made[-1])
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    data = _demo_parts.Data(x, torch.arange(8), x, torch.arange(8))
    _demo_parts.train(_demo_parts.cross_entropy(data), kind, data, 1, lambda: None)
    _demo_parts.training_step(data, _demo_parts.cross_entropy(data), kind)()
    assert [type(each) for each in made] == 2 * [dk.optim.AdamW if kind == "fused" else torch.optim.AdamW]


# Triton's interpreter -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(bool(_backend.triton_missing()), reason=_backend.triton_missing())
def test_check_runs_clipped_steps_in_the_interpreter() -> None:
    """Its kernels take the scalars of a step as tensors, on the CPU too."""
    code = (
        "from dlkernels.cli import check\nfrom dlkernels.cli._optimizer_cases import OptimizerCase\n"
        "case = OptimizerCase('sgdw', ((5, 3), (7,)), options={'max_grad_norm': 2.0})\n"
        "result = check.run_case(case, 'float32', 'cpu')\nassert not result.failed, result.explain()\n"
        "assert result.value.error > 0\n"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1", "DLKERNELS_BACKEND": "triton", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    assert ran.returncode == 0, ran.stderr
