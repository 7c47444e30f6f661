"""`bench --model`: options, agreement of losses, shares, the table and the JSON, on small models of torch's layers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlkernels as dk
from dlkernels import __main__ as command
from dlkernels.cli import _model_share, _model_steps, _models, models

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_models  # noqa: E402
import model_table  # noqa: E402
import report  # noqa: E402

EAGER = ["eager", "eager-fused-adamw", "swapped", "swapped-adamw"]


def small() -> nn.Module:
    """Two GroupNorms with activations behind them."""
    norms = [layer for act in (nn.SiLU(), nn.ReLU()) for layer in (nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8), act)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *norms)


def plain() -> nn.Module:
    return nn.Linear(5, 2)


SMALL = (f"{__name__}:small", "--input-shape", "2,3,12,12", "--device", "cpu", "--no-compile")


def setting(**changes: Any) -> _model_steps.Setting:
    spec = _models.find(f"{__name__}:small", (2, 3, 12, 12))
    return _model_steps.Setting(**{"spec": spec, "batch": 2, "size": 12, **changes})


def bench(*options: str) -> int:
    return command.main(["bench", "--model", *options])


# Options --------------------------------------------------------------------------------------------------------------


def test_the_models_of_the_table_are_there() -> None:
    assert {name: _models.find(name).library for name in bench_models.MODELS} == bench_models.MODELS
    assert len(bench_models.MODELS) - len(bench_models.NOT_COMPILED) == 6
    assert len({spec.name for spec in _models.SPECS}) == len(_models.SPECS)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["bench", "--list"]) == 0
    shown = capsys.readouterr().out
    assert all(spec.name in shown and spec.library in shown for spec in _models.SPECS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("nothing",), "unknown model 'nothing': one of seresnet50, "),
        (("torch.nn:Nothing", "--input-shape", "2,5"), "cannot import torch.nn:Nothing"),
        (("torch.nn:Linear",), "needs --input-shape"),
        (("unet2d", "--rounds", "0"), "expected a number of at least 1, got '0'"),
        (("unet2d", "--input-shape", "2,x"), "expected a number of at least 1, got"),
        (("unet2d", "--candidates", "eager,faster"), "expected some of eager,"),
        (("unet2d", "--nonsense"), "unrecognized arguments: --nonsense"),
        (("unet2d", "--device", "cuda"), "no CUDA device is visible"),
        (("unet2d", "--json", "/no/such/folder/x.json"), "no folder to write to"),
    ],
)
def test_mistakes_end_in_one_clear_line(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        bench(*options)
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'timm'"), "needs timm (No module named 'timm'): pip install timm"),
        (RuntimeError("operator torchvision::nms does not exist"), "install the torchvision that was built for torch"),
        (OSError("libx.so: cannot open"), "timm does not import (OSError: libx.so: cannot open)"),
    ],
)
def test_a_library_that_does_not_import_is_named(
    error: Exception, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> Any:
        raise error

    monkeypatch.setattr(_models, "importlib", SimpleNamespace(import_module=broken))
    with pytest.raises(SystemExit) as ended:
        bench("seresnet50", "--device", "cpu")
    lines = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and message in lines[0]


def test_without_a_model_everything_goes_to_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what looks like an option of --model, or like its beginning."""
    seen: list[list[str]] = []
    monkeypatch.setattr(command.subprocess, "run", lambda c, **k: seen.append(c) or SimpleNamespace(returncode=7))
    options = ["--no-compile", "-k", "sigmoid", "--co", "-q", "--lf", "--mod", "--bench-device", "cpu"]
    assert command.main(["bench", *options]) == 7
    assert seen[0][-len(options) :] == options and "-m" in seen[0] and "pytest" in seen[0]


def test_help_shows_both(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["bench", "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(text in shown for text in ("--candidates", "--share", "--bench-device", "--model seresnet50"))


# Measuring ------------------------------------------------------------------------------------------------------------


def test_a_run_with_its_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, threads = tmp_path / "small.json", torch.get_num_threads()
    assert bench(*SMALL, "--rounds", "3", "--share", "--json", str(path)) == 0
    shown = capsys.readouterr().out
    for text in (
        "swapped 3 modules (1 blocks, 2 group_norm)",
        "x eager",
        "dk.swap_optimizer",
        "share of the eager step",
    ):
        assert text in shown, text
    (record,) = json.loads(path.read_text())["records"]
    assert list(record["candidates"]) == EAGER == list(record["losses"]) and not record["failed"]
    assert torch.get_num_threads() == threads and record["threads"] == 1
    eager = record["candidates"]["eager"]
    assert eager["rounds"] == 3 and eager["x_eager"] == 1 and eager["min_ms"] <= eager["median_ms"]
    for entry in record["candidates"].values():
        assert entry["x_eager"] == pytest.approx(eager["min_ms"] / entry["min_ms"])
    assert 0 < record["share"]["modules"] < 1 and 0 < record["share"]["optimizer"] < 1
    assert record["parameters"] == sum(p.numel() for p in small().parameters())


def test_candidates_are_copies_of_one_model() -> None:
    """Nothing that one does reaches another; each has what it says."""
    base = setting().model()
    before = [p.detach().clone() for p in base.parameters()]
    made = [_model_steps.make(name, base, setting()) for name in EAGER]
    for candidate in made:
        _model_steps.warm_up(candidate)
        assert candidate.losses[0] == pytest.approx(made[0].losses[0], rel=1e-6)
        assert candidate.losses[2] < candidate.losses[0], "it learns"
    assert all(torch.equal(a, b) for a, b in zip(before, base.parameters(), strict=True))
    assert [c.report is not None for c in made] == [False, False, True, True]
    assert not any(m._get_name().startswith("Fused") for m in (*base.modules(), *made[0].model.modules()))
    assert sum(m._get_name() == "FusedGroupNorm" for m in made[2].model.modules()) == 2


def test_under_autocast_eager_is_not_the_truth() -> None:
    """A candidate may be twice as far from float32 as eager, wherever it is; no further, and never without a number."""

    def judged(loss: float, eager: float = 1.1) -> float:
        made = [SimpleNamespace(norm=1.0, losses=[x, 1.0, 1.0]) for x in (loss, eager, 1.0)]
        return _model_steps.disagreement(*made, torch.bfloat16)[0]  # type: ignore[arg-type]

    assert judged(0.9) < 1 and judged(1.19) < 1 and judged(1.0) == 0
    assert judged(0.78) > 1 and judged(float("nan")) > 1 and judged(1.1, eager=float("nan")) > 1
    assert judged(1e30, eager=1e30) > 1, "eager itself is refused when it computes nonsense"


@pytest.mark.parametrize("fault", ["forward", "gradient", "step", "nan"])
def test_a_wrong_candidate_is_not_measured(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    right = dk.swap

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 1.02 * grad

    def wrong(model: nn.Module) -> dk.SwapReport:
        found = right(model)
        if fault == "forward":
            model[2].register_forward_hook(lambda m, args, out: out * 1.001)
        elif fault == "gradient":
            model.register_forward_hook(lambda m, args, out: Scaled.apply(out))
        elif fault == "nan":
            model.register_forward_hook(lambda m, args, out: out * float("nan"))
        else:
            model[0].weight.register_hook(torch.neg)
        return found

    monkeypatch.setattr(dk, "swap", wrong)
    path = tmp_path / "wrong.json"
    assert bench(*SMALL, "--rounds", "1", "--candidates", "swapped", "--json", str(path)) == 1
    shown = capsys.readouterr().out
    (record,) = json.loads(path.read_text())["records"]
    assert "FAIL: losses do not agree with eager" in shown and "swapped: " in record["refused"]
    assert not record["candidates"], "nothing is measured"
    what = {"forward": "loss after 0", "gradient": "norm of the gradient", "step": "after", "nan": "nan"}[fault]
    assert what in record["refused"]


def test_a_backend_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A compiler that gives up, or computes something else, is no mistake of the user's."""

    def fails(name: str) -> str:
        raise RuntimeError(f"no compiler for {name}\nand more")

    monkeypatch.setattr(_model_steps, "_known", fails)
    assert bench(*SMALL[:-1], "--rounds", "1", "--candidates", "compile") == 0
    shown = capsys.readouterr().out
    assert "no compiler for inductor" in " ".join(shown.split()) and "and more" not in shown


def test_compiled_candidates(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through torch.compile, with a backend that needs no compiler."""
    monkeypatch.setattr(_model_steps, "_known", lambda name: "aot_eager")
    assert bench(*SMALL[:-1], "--rounds", "1", "--candidates", "compile") == 0
    assert "built in" in capsys.readouterr().out


def test_what_the_compile_backend_matched(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this model only: what the report had from before is cleared."""

    class Report:
        replaced, left = [SimpleNamespace(pattern="focal_loss")], []

        def clear(self) -> None:
            self.replaced, self.left = [SimpleNamespace(pattern="group_norm")] * 2, []

    report = Report()
    monkeypatch.setattr(_model_steps, "_known", lambda name: "eager")
    monkeypatch.setattr(_model_steps, "_finds", lambda: report)
    assert bench(*SMALL[:-1], "--rounds", "1", "--candidates", "compile-dlkernels") == 0
    shown = capsys.readouterr().out
    assert "compile replaced 2 group_norm\n" in shown and "compile left nothing" in shown


@pytest.mark.parametrize("changes", [{"dtype": torch.bfloat16}, {"channels_last": True}], ids=["bfloat16", "nhwc"])
def test_precision_and_layout(changes: dict[str, Any]) -> None:
    record = models.measure(setting(**changes), ["swapped-adamw"], 1, share=False)
    assert not record["refused"] and list(record["candidates"]) == ["eager", "swapped-adamw"]
    (x,), _ = setting(**changes).inputs()
    assert x.is_contiguous(memory_format=torch.channels_last) == ("channels_last" in changes)
    weight = setting(**changes).model()[1].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == ("channels_last" in changes)


def test_norms_that_start_at_zero_are_woken() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    nn.init.zeros_(model[0].weight)
    _models.awake(model)
    assert model[0].weight.eq(_models.SCALE).all() and model[1].weight.eq(1).all() and model[0].bias.eq(0).all()


# Shares ---------------------------------------------------------------------------------------------------------------


class Slow(torch.autograd.Function):
    """Takes its time, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        torch.randn(400_000)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        torch.randn(1_600_000)
        return grad.clone()


class SlowModule(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Slow.apply(x)


def test_shares_count_forward_and_backward() -> None:
    """Of two equal modules each has half, both have all; nested ones are counted once."""
    inner = SlowModule()
    model = nn.Sequential(nn.Sequential(inner), SlowModule())
    x = torch.randn(10, requires_grad=True)

    def step() -> None:
        model(x).sum().backward()

    def share(*modules: nn.Module) -> float:
        return _model_share.shares(step, list(modules), "cpu")["modules"]

    assert 0.15 < share(inner) < 0.85
    assert 0.15 < share(model[0], inner) < 0.85
    assert share(inner, model[1]) > max(0.7, share(inner))
    assert share() == 0
    made: list[tuple[int, int]] = []
    with _model_share._ranges([model[0], inner, model[1]], made):
        model(x)
    (first, behind), (second, end) = made
    assert first < behind <= second < end, "one interval each, the inner one is in the outer one"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "nothing is left behind"


def test_what_a_swap_takes_over() -> None:
    """The norms and the activations behind them, in the model that is not swapped."""
    model, swapped = small(), small()
    found = _model_share.owned(model, dk.swap(swapped)._changes)
    assert {id(m) for m in found} == {id(model[i]) for i in (2, 3, 5, 6)}


# The table ------------------------------------------------------------------------------------------------------------


def record(**times: float) -> dict[str, Any]:
    found = {
        name.replace("_", "-"): {
            "min_ms": t,
            "median_ms": t,
            "spread": 0.0,
            "rounds": 20,
            "x_eager": times["eager"] / t,
        }
        for name, t in times.items()
    }
    for name, entry in found.items():
        entry["slower_than"] = _model_steps.slower_than(name, found)
    return {
        "name": "net", "library": "lib 1.0", "batch": 8, "size": 112, "dtype": "float32", "layout": "contiguous",
        "swap": {"summary": "swapped 2 modules", "left": ["it has a BatchNorm"]}, "failed": {}, "refused": "",
        "share": {"modules": 0.123, "optimizer": 0.2, "how": "as told"}, "candidates": found,
    }  # fmt: skip


def test_losing_rows_say_to_whom() -> None:
    winning = record(eager=100, eager_fused_adamw=95, swapped=90, swapped_adamw=80, compile=99, compile_dlkernels=98)
    assert model_table.losing(winning) == ""
    losing = record(eager=100, eager_fused_adamw=85, swapped=102, swapped_adamw=90, compile=80, compile_dlkernels=81)
    assert model_table.losing(losing) == (
        "swapped slower than eager, compile; swapped-adamw slower than eager-fused-adamw, compile; "
        "compile-dlkernels slower than compile"
    )
    noise = record(eager=100, swapped=100.9)
    assert model_table.losing(noise) == "", "no more than 1 %"


def test_report_of_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [record(eager=100, swapped=80, swapped_adamw=50), record(eager=100, swapped=125) | {"name": "other"}]
    doc = report.document("models", "cpu", records, [], "passed")
    (path,) = report.write(doc, tmp_path)  # no plots
    doc = json.loads(path.read_text())
    report.show(doc)
    shown = capsys.readouterr().out
    assert "swapped slower than eager" in shown and "1 with a form of ours slower" in shown
    text = report.markdown(doc, tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1, "a table"
    assert "| net (lib 1.0, 8 x 112) | 100.0 | - | 80.0 (1.25x) | 50.0 (2.00x) | - | - | 12.3 | 20.0 |" in rows[2]
    assert rows[3].endswith("swapped slower than eager |")
    assert "swapped 1.00x, swapped-adamw 2.00x" in text and "left: it has a BatchNorm" in text
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    report.rewrite_readme(readme, [(path, doc)])
    assert "### models" in readme.read_text()
    doc["records"][0]["refused"] = "swapped: loss"
    with pytest.raises(SystemExit, match="refused ops do not go"):
        report.rewrite_readme(readme, [(path, doc)])


@pytest.mark.parametrize("ours", [2.0, 3.0])
def test_a_compiler_that_is_wrong(ours: float) -> None:
    """What torch.compile gets wrong alone is not held against our backend, which goes through it."""

    def candidate(name: str, norm: float) -> Any:
        return SimpleNamespace(name=name, report=None, matches={}, losses=[1.0, 0.9, 0.8], norm=norm)

    made = [candidate("eager", 1.0), candidate("compile", 2.0), candidate("compile-dlkernels", ours)]
    record: dict[str, Any] = {"matches": {}, "losses": {}, "failed": {}, "refused": ""}
    models.agree(record, made, made[0], torch.float32)
    assert "compile" in record["failed"] and bool(record["refused"]) is (ours == 3.0)
    assert ("compile-dlkernels" in record["failed"]) is (ours == 2.0)
