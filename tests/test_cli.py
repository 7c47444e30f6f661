"""The commands of `python -m dlkernels`: exit codes, key lines, what a failure looks like."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dlkernels as dk
from dlkernels.__main__ import main
from dlkernels.cli import _demo_model, _demo_parts, _profile_bytes
from dlkernels.cli._budget import Sample, compare, value_and_grads
from dlkernels.cli._center_cases import CenterCase, training_step
from dlkernels.cli._layer_cases import LayerCase
from dlkernels.cli.check import CASES

ROOT = Path(__file__).resolve().parent.parent
FORCING = ("DLKERNELS_BACKEND", "TRITON_INTERPRET")
LOSSES = ("sigmoid_focal_loss", "softmax_focal_loss", "cross_entropy", "region_biased_loss", "gccs_loss")
CENTERS = ("center_loss", "sparse_center_loss", "island_loss", "update_centers_")
LAYERS = ("group_norm", "squeeze_excite", "weight_norm", "stochastic_depth")
OPTIMIZERS = ("adamw", "sgdw")


def cli(*arguments: str, before: str = "", timeout: int = 300) -> subprocess.CompletedProcess[str]:
    """Run a command on the CPU; `before` is Python that runs first, such as the removal of a package."""
    command = ["-m", "dlkernels"]
    if before:
        command = ["-c", f"{before}\nimport sys\nfrom dlkernels.__main__ import main\nsys.exit(main(sys.argv[1:]))"]
    env = {k: v for k, v in os.environ.items() if k not in FORCING}
    env |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command, *arguments],
        capture_output=True, text=True, check=False, cwd=ROOT, env=env, timeout=timeout,
    )  # fmt: skip


def without(*modules: str) -> str:
    return "import sys\n" + "\n".join(f"sys.modules[{m!r}] = None" for m in modules)


# info -----------------------------------------------------------------------------------------------------------------


def test_info() -> None:
    result = cli("info")
    assert result.returncode == 0, result.stderr
    for text in (f"torch       {torch.__version__}", "python", "extension", "triton", "Active backend"):
        assert text in result.stdout
    assert "softmax_focal_loss (fwd, bwd)" in result.stdout and "no CUDA device is visible" in result.stdout
    for op in (*LAYERS, *OPTIMIZERS):
        assert op in result.stdout


def test_info_json() -> None:
    result = cli("info", "--json")
    assert result.returncode == 0, result.stderr
    info = json.loads(result.stdout)
    assert info["ops"].keys() == dk.build_info()["ops"].keys()
    assert info["ops"]["softmax_focal_loss_fwd"]["cpu"]["backend"] in ("cpp", "reference")
    assert json.loads(json.dumps(dk.build_info())) == dk.build_info(), "build_info() must be plain JSON"


def test_info_without_rich() -> None:
    result = cli("info", before=without("rich", "rich.console"))
    assert result.returncode == 0, result.stderr
    assert "softmax_focal_loss (fwd, bwd)" in result.stdout and "┃" not in result.stdout


# check ----------------------------------------------------------------------------------------------------------------


def test_check() -> None:
    result = cli("check")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"PASS: {3 * len(CASES)} cases, 0 failures" in result.stdout
    for op in (*LOSSES, *CENTERS, *LAYERS, *OPTIMIZERS):
        assert op in result.stdout


def test_check_fails_on_a_wrong_loss() -> None:
    """A gradient that is off by 1e-4 must be seen, and an op that raises must not hide the others."""
    wrong = (
        "import dlkernels as dk, torch\nright = dk.cross_entropy\n"
        "dk.cross_entropy = lambda x, *a, **k: right(x + 1e-4 * (x - x.detach()), *a, **k)\n"
        "def raises(*a, **k): raise RuntimeError('no such kernel')\ndk.softmax_focal_loss = raises"
    )
    result = cli("check", "--dtype", "float32", before=wrong)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "FAIL cross_entropy on cpu, float32: 129x10 indices reduction=mean: gradient error" in result.stdout
    assert "RuntimeError: no such kernel" in result.stdout
    assert "FAIL sigmoid_focal_loss" not in result.stdout


def test_check_fails_on_a_wrong_parameter_gradient(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and input's gradient right, the bias's off by 1e-4: an error in any gradient counts."""
    right = dk.group_norm

    def wrong(input: torch.Tensor, num_groups: int, *, bias: torch.Tensor | None = None, **rest: Any) -> torch.Tensor:
        bias = bias if bias is None else bias + 1e-4 * (bias - bias.detach())
        return right(input, num_groups, bias=bias, **rest)

    monkeypatch.setattr(dk, "group_norm", wrong)
    assert main(["check", "--device", "cpu", "--dtype", "float32", "--op", "group_norm", "--op", "weight_norm"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL group_norm on cpu, float32: 2x32x17x13 affine num_groups=8: gradient error 1.0" in printed
    assert "FAIL weight_norm" not in printed and "2x32x17x13 num_groups=32 eps=0.001" not in printed, "it has no bias"


@pytest.mark.parametrize("case", [c for c in CASES if c.op in LAYERS], ids=lambda c: f"{c.op} {c.name}")
def test_layer_cases_differentiate_everything(case: LayerCase) -> None:
    """Every tensor but the fixed noise is an input that takes a gradient, and none of these is zero."""
    sample = case.sample(torch.float64, "cpu", 0)
    assert len(sample.parameters) == len(case.draw(case, torch.Generator())) - len(case.fixed)
    if sample.x.numel() > 0:
        _, *grads = value_and_grads(sample.eager, (sample.x, *sample.parameters), sample.grad_output)
        assert all(g.abs().max() > 0 for g in grads)
    if case.layout != "contiguous":
        assert not sample.x.is_contiguous()


@pytest.mark.parametrize("case", [c for c in CASES if c.op in CENTERS], ids=lambda c: f"{c.op} {c.name}")
def test_center_cases_differentiate_or_move(case: CenterCase) -> None:
    """Features, attention and, where the case says so, centers have gradients; the update has none and moves them."""
    sample = case.sample(torch.float64, "cpu", 0)
    inputs = (sample.x, *sample.parameters)
    out, *grads = value_and_grads(sample.eager, inputs, sample.grad_output)
    if case.op == "update_centers_":
        assert not grads and out.shape == (case.classes, case.shape[1])
        assert (out != sample.parameters[-1]).any() == (sample.x.numel() > 0), "of a copy: the draw itself stays"
        return
    assert len(grads) == 1 + bool(case.attention) + ("centers" in case.extras)
    assert sample.x.numel() == 0 or all(g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("fault", ["nothing moves", "a gradient is missing"])
def test_check_fails_on_a_wrong_center_loss(
    fault: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update has no gradients to compare, but a loss that has lost its own is not taken for one."""
    right = dk.center_loss
    if fault == "nothing moves":
        wrong, whole = "update_centers_", "center_loss"
        monkeypatch.setattr(dk, wrong, lambda centers, *a, **k: centers)
    else:
        wrong, whole = "center_loss", "update_centers_"
        monkeypatch.setattr(dk, wrong, lambda *a, **k: right(*a, **k).detach())
    options = ["--device", "cpu", "--dtype", "float32", "--op", "center_loss", "--op", "update_centers_"]
    assert main(["check", *options]) == 1
    printed = capsys.readouterr().out
    assert f"FAIL {wrong} on cpu, float32: 257x33 K=10" in printed and f"FAIL {whole}" not in printed


@pytest.mark.parametrize("fault", ["nan", "inf", "one element", "shape"])
def test_parity_sees_what_a_norm_would_not(fault: str) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    hole = torch.zeros(1000)
    hole[3] = {"nan": float("nan"), "inf": float("inf")}.get(fault, 1e-3)

    sample = Sample(lambda t: t + hole, lambda t: t + 0, x, torch.ones(1000))
    if fault == "shape":
        sample = Sample(lambda t: t.sum(0, keepdim=True), torch.sum, x, torch.ones(1))
    value, _ = compare([sample])
    assert value.ratio > 1


# profile --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "shape"),
    [
        ("sigmoid_focal_loss", "4096"),
        ("softmax_focal_loss", "64,100"),
        ("cross_entropy", "2,5,8,8"),
    ],
)
def test_profile(op: str, shape: str, tmp_path: Path) -> None:
    result = cli("profile", op, "--shape", shape, "--eager", "--steps", "3", "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    for text in ("fused step", "eager step", "backward", "ncu --clock-control none", "dram__bytes_read.sum"):
        assert text in result.stdout, text
    trace = json.loads((tmp_path / f"profile-{op}.json").read_text())
    assert any(event.get("name") == "fused step" for event in trace["traceEvents"])


@pytest.mark.parametrize(
    ("op", "shape", "name"),
    [
        ("group_norm", "2,24,8,8", "group_norm of 2x24x8x8 affine channels_last num_groups=24 activation=silu float32"),
        ("squeeze_excite", "2,24,8,8", "squeeze_excite of 2x24x8x8 channels_last float32"),
        ("weight_norm", "16,10,3,3", "weight_norm of 16x10x3x3 channels_last float32"),
        ("stochastic_depth", "4,5,6,7", "stochastic_depth of 4x5x6x7 residual channels_last p=0.5 float32"),
    ],
)
def test_profile_a_layer(
    op: str, shape: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ["--layout", "channels_last", "--eager", "--steps", "2", "--out", str(tmp_path)]
    assert main(["profile", op, "--shape", shape, *options]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(name + "\n") and "eager step" in printed and f"regex:{op}" in printed
    assert (tmp_path / f"profile-{op}.json").stat().st_size > 0


@pytest.mark.needs("cpp")
def test_profile_a_region_biased_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 x 600 weights, as many gradients, loss and divisor: 4808 bytes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ["--shape", "100,6", "--eager", "--steps", "2", "--out", str(tmp_path)]
    assert main(["profile", "region_biased_loss", *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("region_biased_loss of 100x6 origin_index=-1 margin=0.1 normalize=softmax reduction=mean")
    assert "eager step" in printed and "regex:region_biased_loss" in printed
    line = next(line for line in printed.splitlines() if "dlkernels::region_biased_loss_fwd" in line)
    assert "4.81 kB" in line


def test_profile_gccs(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """4 x 1000 features, 8 x 100 labels, as many gradients as features, loss and divisor: 8808 bytes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ["--shape", "100,10", "--eager", "--steps", "2", "--out", str(tmp_path)]
    assert main(["profile", "gccs_loss", *options]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("gccs_loss of 100 x 10 float32, class indices, reduction mean")
    assert "eager step" in printed and "regex:gccs_loss" in printed
    assert "8.81 kB" in next(line for line in printed.splitlines() if "dlkernels::gccs_loss_fwd" in line)


@pytest.mark.needs("cpp")
@pytest.mark.parametrize(
    ("op", "least", "kernels"),
    [
        ("center_loss", "9.85 kB", "regex:center_rows "),
        ("sparse_center_loss", "17.8 kB", "regex:center_rows "),
        ("island_loss", "9.85 kB", "'regex:center_rows|island' "),
    ],
)
def test_profile_a_center_loss(
    op: str, least: str, kernels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """4 x 1000 features and as many gradients, 8 x 100 labels, 4 x 260 centers, loss, divisor; attention twice too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = ["--shape", "100,10", "--classes", "26", "--eager", "--steps", "2", "--out", str(tmp_path)]
    assert main(["profile", op, *options]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{op} of 100x10 K=26 reduction=mean with the centers' update float32")
    assert "eager step" in printed and kernels in printed and "--classes 26" in printed
    assert least in next(line for line in printed.splitlines() if "dlkernels::center_loss_fwd" in line)


@pytest.mark.parametrize("op", ["center_loss", "sparse_center_loss", "island_loss"])
def test_profiled_center_losses_take_the_same_steps(op: str) -> None:
    """Loss after loss, fused and eager agree: the centers of both have moved alike."""
    _, sample = training_step(op, (20, 6), 5, "mean", torch.float32, "cpu")
    inputs = (sample.x, *sample.parameters)
    losses = [(sample.fused(*inputs), sample.eager(*inputs)) for _ in range(3)]
    for fused, eager in losses:
        torch.testing.assert_close(fused, eager, rtol=1e-5, atol=0)
    assert abs(losses[0][0] - losses[2][0]) > 0.01 * losses[0][0]


@pytest.mark.needs("cpp")
def test_profile_names_the_op_and_its_bytes(tmp_path: Path) -> None:
    """4 x 6400 logits, 8 x 64 labels, 4 x 6400 gradient, loss and divisor: 51720 bytes."""
    result = cli("profile", "cross_entropy", "--shape", "64,100", "--steps", "3", "--out", str(tmp_path))
    line = next((line for line in result.stdout.splitlines() if "dlkernels::softmax_focal_loss_fwd" in line), "")
    assert "51.7 kB" in line, result.stdout + result.stderr


@pytest.mark.needs("cpp")
def test_bytes_per_step_leaves_the_extension_in_place() -> None:
    from dlkernels import _backend

    x, y = torch.zeros(8, 4, requires_grad=True), torch.zeros(8, dtype=torch.int64)
    before = _backend.C
    moved = _profile_bytes.bytes_per_step(lambda: dk.cross_entropy(x, y, reduction="none").sum().backward())
    assert _backend.C is before
    assert moved["dlkernels::softmax_focal_loss_fwd"] == 4 * 32 + 8 * 8 + 4 * 8 + 4
    assert moved["dlkernels::softmax_focal_loss_bwd"] == 4 * 32 + 8 * 8 + 4 + 4 * 32, (
        "the expanded gradient is one number"
    )


def test_profile_a_model(tmp_path: Path) -> None:
    (tmp_path / "my_models.py").write_text(
        "import torch\nimport dlkernels as dk\n"
        "class Classifier(torch.nn.Linear):\n"
        "    def forward(self, x): return dk.cross_entropy(super().forward(x), torch.arange(len(x)))\n"
        "def make(): return Classifier(16, 8)\n"
    )
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})"
    options = ("--input-shape", "8,16", "--steps", "2", "--eager", "--out", str(tmp_path))
    result = cli("profile", "my_models:make", *options, before=path)
    assert result.returncode == 0, result.stderr
    assert "136 parameters" in result.stdout and "eager step" in result.stdout


@pytest.mark.needs("cpp")
def test_dropped_rows_move_nothing() -> None:
    """Forward 3 of 4 rows, the residual, the output and the noise; backward 3 rows of the gradient, 4 of its result."""
    x, noise = torch.ones(4, 10, requires_grad=True), torch.tensor([1.5, 0.0, 1.5, 1.5])
    residual, row, g = torch.ones(4, 10), 40, torch.ones(4, 10)
    moved = _profile_bytes.bytes_per_step(
        lambda: dk.stochastic_depth(x, 0.25, residual=residual, noise=noise).backward(g)
    )
    assert moved == {"dlkernels::stochastic_depth_fwd": (3 + 4 + 4) * row + 16 + (3 + 4) * row + 16}


def test_kernel_patterns() -> None:
    ops = ["softmax_focal_loss_fwd", "softmax_focal_loss_bwd", "scale_stored_grad"]
    assert _profile_bytes.kernel_pattern(ops) == "softmax_focal"
    assert _profile_bytes.kernel_pattern(["gccs_loss_fwd"]) == "gccs_loss"
    assert _profile_bytes.kernel_pattern(["center_loss_fwd", "update_centers_"]) == "center_rows|segments|merge"


# demo -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_quick(tmp_path: Path) -> None:
    missing = [p for p in ("rich", "matplotlib", "sklearn", "monai") if importlib.util.find_spec(p) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    result = cli("demo", "--quick", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    for text in (
        "The network before training", "Training: eager and fused", "Time of forward + backward",
        "sigmoid focal, 1M elements", "GroupNorm + SiLU, 8 x 256 x 28 x 28", "weight norm, 512 x 4608",
        "The optimizer before training", "AdamW, 300 tensors of 256", "PASS",
        "dlkernels.swap(model)", "ChannelSELayer (monai)", "FusedDropPath",
        "whole training step, plain and after dk.swap",
    ):  # fmt: skip
        assert text in result.stdout, text
    assert "not held to its threshold" in result.stdout
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_names_missing_packages() -> None:
    result = cli("demo", "--quick", before=without("monai", "sklearn"))
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].endswith('pip install "dlkernels[demo]"'), result.stderr
    assert "scikit-learn" in lines[0] and "monai" in lines[0]


def test_demo_networks_agree() -> None:
    """From one state_dict and one seed; training drops rows, and the same ones."""
    pytest.importorskip("monai")
    x, y = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
    found = _demo_model.compare_models(x, y)
    assert [(each.mode, each.dtype) for each in found] == [
        (mode, dtype) for mode in ("eval", "train") for dtype in (torch.float64, torch.float32)
    ]
    assert not any(each.failed for each in found), found
    still, dropped = (_demo_model.outcome("fused", mode, x, y)[0] for mode in ("eval", "train"))
    rows = (still != dropped).any(1)
    assert rows.any() and (still[~rows] == dropped[~rows]).all(), "stochastic depth acts while training only"


def test_demo_network_is_swapped() -> None:
    """All of it: norms with their activations, squeeze-and-excitation, stochastic depth with its residual; in place."""
    pytest.importorskip("monai")
    x, y = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
    for mode in ("eval", "train"):
        plain, eager = (_demo_model.outcome(kind, mode, x, y) for kind in ("plain", "eager"))
        assert all(torch.equal(a, b) for a, b in zip(plain, eager, strict=True)), "one network in two spellings"
    found = _demo_model.compare_models(x, y, "swapped")
    assert len(found) == 4 and not any(each.failed for each in found), found
    assert found[1].output.error != found[1].output.eager_error, "other kernels round otherwise"
    model = _demo_model.make_model("cpu", "plain")
    keys = list(model.state_dict())
    report = dk.swap(model)
    blocks = len(_demo_model.STAGES)
    assert report.counts() == {
        "group_norm": 2 + 2 * blocks, "squeeze_excite": blocks, "stochastic_depth": blocks, "blocks": 2 + blocks
    } and not report.skipped  # fmt: skip
    assert list(model.state_dict()) == keys == list(_demo_model.make_model("cpu", "eager").state_dict())


def test_demo_notices_a_wrong_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    """One norm's eps off by a tenth, after the swap: the comparison of the networks fails."""
    pytest.importorskip("monai")
    right = dk.swap

    def wrong(model: torch.nn.Module) -> dk.SwapReport:
        report = right(model)
        model.norm.eps *= 1.1
        return report

    monkeypatch.setattr(dk, "swap", wrong)
    x, y = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
    assert all(each.failed for each in _demo_model.compare_models(x, y, "swapped") if each.dtype == torch.float64)


@pytest.mark.parametrize("fault", ["eps", "activation", "gate", "rows"])
def test_demo_notices_a_wrong_layer(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of layer, wrong by little: the comparison of the networks fails."""
    pytest.importorskip("monai")
    right = _demo_model.layers
    wrong = {
        "eps": {"norm": lambda groups, channels: dk.nn.GroupNorm(groups, channels, eps=1.1e-5)},
        "activation": {"norm_silu": lambda groups, channels: dk.nn.GroupNorm(groups, channels, activation="gelu")},
        "gate": {"squeeze_excite": lambda channels, r: dk.nn.SqueezeExcite(channels, r, gate="hard_sigmoid")},
        "rows": {"drop": lambda p: dk.nn.StochasticDepth(p, "batch")},
    }[fault]
    monkeypatch.setattr(
        _demo_model, "layers", lambda kind: right(kind) if kind == "eager" else replace(right(kind), **wrong)
    )
    x, y = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
    failed = {each.mode for each in _demo_model.compare_models(x, y) if each.failed}
    assert failed == ({"train"} if fault == "rows" else {"eval", "train"})


def test_demo_parity_notices_a_wrong_gradient() -> None:
    """Off by 1e-5 of itself: the step is recorded, with error and budget."""
    right = torch.nn.functional.cross_entropy
    wrong = _demo_parts.Loss("wrong", right, lambda x, y: right(x + 1e-5 * (x - x.detach()), y))
    logits, labels = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 10
    run = _demo_parts.Run(wrong, "eager")
    _demo_parts.check_step(run, 7, logits, labels)
    assert len(run.violations) == 1 and run.violations[0].startswith("wrong, step 7: gradient error 1.00e-05, allowed")
    run = _demo_parts.Run(_demo_parts.Loss("right", right, dk.cross_entropy), "eager")
    _demo_parts.check_step(run, 1, logits, labels)
    assert not run.violations and run.parity["gradient"][1].error > 0


# help, bench, mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["info", "demo", "check", "profile", "bench"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and "examples:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "COMMAND"),
        (("info", "--nonsense"), "unrecognized arguments: --nonsense"),
        (("profile", "nothing"), "unknown op or model 'nothing'"),
        (("profile", "torch.nn:nothing", "--input-shape", "8,16"), "cannot import torch.nn:nothing"),
        (("profile", "torch.nn:Flatten", "--input-shape", "8,16"), "torch.nn:Flatten has no parameters"),
        (("profile", "cross_entropy", "--shape", "5"), "--shape must have a class dimension"),
        (("profile", "cross_entropy", "--shape", "a,b"), "expected sizes such as 4096,1000"),
        (("profile", "region_biased_loss", "--shape", "5"), "--shape must be N,R, as 4096,6, got 5"),
        (("profile", "region_biased_loss", "--targets", "index"), "region_biased_loss has none"),
        (("profile", "gccs_loss", "--targets", "dense"), "gccs_loss takes features N,D"),
        (("profile", "center_loss", "--shape", "5"), "center_loss takes features N,D, as 4096,128"),
        (("profile", "island_loss", "--classes", "0"), "expected a number of at least 1, got '0'"),
        (
            ("profile", "cross_entropy", "--classes", "5"),
            "--classes is of center_loss, sparse_center_loss, island_loss",
        ),
        (("profile", "group_norm", "--shape", "5"), "--shape must have at least 2 dimensions, got 5"),
        (("profile", "weight_norm", "--reduction", "sum"), "weight_norm has neither"),
        (("profile", "group_norm", "--shape", "2,8", "--layout", "channels_last"), "needs four or five dimensions"),
        (("profile", "adamw", "--layout", "channels_last"), "adamw has none"),
        (("profile", "sgdw", "--shape", "0"), "expected sizes of at least 1"),
        (("check", "--device", "cuda"), "no CUDA device is visible"),
        (("demo", "--steps", "0"), "--steps must be at least 1"),
    ],
)
def test_mistakes_end_in_one_clear_message(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and message in capsys.readouterr().err
