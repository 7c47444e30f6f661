"""torch.compile(backend="dlkernels"): its name, its options, its report, and what happens when something goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _compiled import assert_equal, check, compiled, found, leaf, left, needs_kernels, randomised
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dlkernels as dk
from dlkernels._patterns import measured, rewrite
from dlkernels._patterns.report import GRAPHS_KEPT, CompileReport, Find

ROOT = Path(__file__).parents[2]
LABELS = torch.tensor([0, 3, 1])


class Block(nn.Module):
    """A block of a diffusion model, reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.act = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1), nn.SiLU()
        randomised(self)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.act(self.norm(x)))


# The name -------------------------------------------------------------------------------------------------------------


def python(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*folders, ROOT]))}
    command = [sys.executable, "-W", "ignore", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd="/")


CODE = (
    "import sys, torch; model = torch.nn.GroupNorm(2, 4)\n"
    "assert 'dlkernels' not in sys.modules\n"
    "made = torch.compile(model, backend='dlkernels', options={'then': 'eager'})(torch.zeros(1, 4, 3))\n"
    "print(sys.modules['dlkernels'].compile_report().to_dict()['graphs_seen'])"
)


@pytest.mark.slow
def test_an_install_needs_no_import(tmp_path: Path) -> None:
    """The entry point that setup.py declares is found by name."""
    setup = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    made = subprocess.run(setup, capture_output=True, text=True, check=False, cwd=ROOT)
    assert made.returncode == 0, made.stderr
    result = python(CODE, tmp_path)
    assert result.returncode == 0 and result.stdout.strip() == "1", result.stderr[-1500:]


def test_a_checkout_is_imported_first() -> None:
    result = python(
        "import torch, dlkernels.compile\n"
        "from torch._dynamo.backends.registry import list_backends, lookup_backend\n"
        "assert lookup_backend('dlkernels') is dlkernels.compile.backend and 'dlkernels' in list_backends()"
    )
    assert result.returncode == 0, result.stderr[-1500:]


def test_importing_after_dynamo_is_enough() -> None:
    result = python(
        "import sys, torch, torch._dynamo, dlkernels\n"
        "assert 'dlkernels.compile' not in sys.modules and 'torch._inductor.compile_fx' not in sys.modules\n"
        "from torch._dynamo.backends.registry import lookup_backend\n"
        "print(lookup_backend('dlkernels').__module__)"
    )
    assert result.stdout.strip() == "dlkernels.compile", result.stderr[-1500:]


# Whole models ---------------------------------------------------------------------------------------------------------


@needs_kernels
def test_a_model_compiled_twice() -> None:
    model, x = Block(), leaf(2, 4, 5, 5)
    for _ in range(2):
        check(model, x, replaced=["group_norm + silu"])
    torch.compile(model, backend="dlkernels", options={"then": "eager"})(x)
    assert len(dk.compile_report().graphs) == 2


@needs_kernels
def test_graph_breaks_are_two_graphs() -> None:
    model = Block()

    def function(x: Tensor) -> Tensor:
        y = model(x)
        torch._dynamo.graph_break()
        return model(y)

    torch._dynamo.reset()
    dk.compile_report().clear()
    made = torch.compile(function, backend="dlkernels", options={"then": "aot_eager"})
    assert_equal(function, made, (leaf(2, 4, 5, 5),))
    assert found() == ["group_norm + silu"] * 2 and len(dk.compile_report().graphs) == 2


@needs_kernels
def test_activation_checkpoint() -> None:
    """What is recomputed in the backward pass is replaced too."""
    model = Block()
    check(
        lambda x: checkpoint(model, model(x), use_reentrant=False),
        leaf(2, 4, 5, 5),
        replaced=["group_norm + silu"] * 2,
    )


@needs_kernels
def test_torch_func_transforms_are_left_alone() -> None:
    weight = leaf(4).detach()

    def function(x: Tensor) -> Tensor:
        return torch.func.grad(lambda z: F.silu(F.group_norm(z, 2, weight)).square().sum())(x)

    made = compiled(function)
    x = leaf(2, 4, 5).detach()
    assert torch.allclose(made(x), function(x), rtol=1e-12, atol=1e-12)
    assert not found()


@needs_kernels
def test_training_step_with_an_optimizer() -> None:
    """Three steps of a compiled model end where three eager ones do."""
    ends = []
    for through in (lambda m: m, compiled):
        model = nn.Sequential(Block(), Block(), nn.Flatten(), nn.Linear(100, 5))
        randomised(model)
        step, optimizer = through(model), torch.optim.SGD(model.parameters(), 1e-3)
        for seed in range(3):
            optimizer.zero_grad()
            F.cross_entropy(step(leaf(3, 4, 5, 5, seed=seed).detach()), LABELS).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (ends[0] - ends[1]).norm() <= 1e-12 * ends[0].norm()
    assert found() == ["group_norm + silu"] * 2


# Options --------------------------------------------------------------------------------------------------------------


@needs_kernels
def test_include() -> None:
    model = Block()

    def function(x: Tensor) -> Tensor:
        return F.cross_entropy(model(x), LABELS[:2, None, None].expand(2, 5, 5))

    check(function, leaf(2, 4, 5, 5), replaced=["cross_entropy"], include=["cross_entropy"])
    check(function, leaf(2, 4, 5, 5), replaced=[], include=[])


@pytest.mark.parametrize("include", [["group_norms"], "group_norm"])
def test_unknown_patterns(include: Any) -> None:
    with pytest.raises(Exception, match="`include` must list some of squeeze_excite"):
        compiled(Block(), include=include)(leaf(2, 4, 5, 5))


def test_then_cannot_be_itself() -> None:
    with pytest.raises(Exception, match="`then` must be another backend"):
        compiled(Block(), then="dlkernels")(leaf(2, 4, 5, 5))


def test_modes_and_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not this backend's is Inductor's."""
    from torch._dynamo.backends import registry

    seen: list[dict[str, Any]] = []

    def inductor(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return gm.forward

    monkeypatch.setattr(registry, "lookup_backend", lambda name: inductor)
    gm = torch.fx.symbolic_trace(Block())
    dk.compile.backend(gm, [], options={"max_autotune": True, "all": True})
    dk.compile.backend(gm, [], mode="max-autotune-no-cudagraphs")
    dk.compile.backend(gm, [])
    assert [kwargs["config_patches"] and kwargs["config_patches"]["max_autotune"] for kwargs in seen] == [
        True,
        True,
        None,
    ]


@needs_kernels
def test_everything_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.GroupNorm(2, 4).double(), leaf(6, 4)
    check(model, x, replaced=[])
    monkeypatch.setenv("DLKERNELS_COMPILE_ALL", "1")
    check(model, x, replaced=["group_norm"])


def test_the_reference_replaces_nothing() -> None:
    with dk.backend("reference"):
        model = Block()
        assert_equal(model, compiled(model), (leaf(2, 4, 5, 5),))
    assert found() == [] and "reference" in left()[0]


# The report -----------------------------------------------------------------------------------------------------------


@needs_kernels
def test_report() -> None:
    model = nn.Sequential(Block(), Block())
    compiled(lambda x: F.relu(F.group_norm(model(x).mean((2, 3)), 2)))(leaf(2, 4, 5, 5))
    report = dk.compile_report()
    first, second = report.replaced
    assert (first.pattern, first.what, first.replaced) == ("group_norm", "group_norm + silu", True)
    assert first.module.endswith("0.norm") and second.module.endswith("1.norm")
    assert first.line.startswith(f"{__file__}:") and "measured" in first.reason
    (other,) = report.left
    assert other.reason == "not faster here (0.63x)" and other.module == ""
    text = str(report)
    for part in ("group_norm + silu", "not faster here", "test_compile_backend.py:", "1 graphs, 2 replaced, 1 left"):
        assert part in text, text
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == data and data["graphs_seen"] == 1
    assert [find["replaced"] for find in data["graphs"][0]["finds"]] == [True, True, False]
    report.clear()
    assert report.to_dict() == {"graphs_seen": 0, "graphs": []} and "0 graphs" in str(report)


def test_report_is_bounded() -> None:
    report = CompileReport()
    for _ in range(3 * GRAPHS_KEPT):
        report.begin(1).finds.append(Find("group_norm", "group_norm", "a", "b.py:1", True, ""))
    assert len(report.graphs) == GRAPHS_KEPT and report.to_dict()["graphs_seen"] == 3 * GRAPHS_KEPT


@needs_kernels
def test_report_holds_no_tensors() -> None:
    compiled(Block())(leaf(2, 4, 5, 5))
    assert all(isinstance(value, (str, bool)) for find in dk.compile_report().replaced for value in vars(find).values())


# When something goes wrong --------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("where", ["search", "replacement"])
def test_a_failure_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def fails(*args: Any) -> Any:
        raise KeyError("lost")

    if where == "search":
        monkeypatch.setitem(rewrite.PATTERNS, "group_norm", fails)
    else:
        original, calls = rewrite._replace, []

        def second_fails(*args: Any) -> Any:
            calls.append(args)
            return fails() if len(calls) > 1 else original(*args)

        monkeypatch.setattr(rewrite, "_replace", second_fails)
    model, x = nn.Sequential(Block(), Block()), leaf(2, 4, 5, 5)
    made = compiled(model)
    with pytest.warns(UserWarning, match="left a graph as it was, because matching failed: KeyError: 'lost'"):
        made(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_equal(model, made, (x,))
    report = dk.compile_report()
    assert not report.replaced and report.graphs[0].error == "KeyError: 'lost'" and "lost" in str(report)


# What decides ---------------------------------------------------------------------------------------------------------


def test_measured_rows_are_those_of_the_results() -> None:
    """Every ratio that decides stands in a committed result, to within what one run differs from another."""
    folder = ROOT / "benchmarks" / "results" / "amd-epyc-1-thread"
    records = {}
    for path in folder.glob("*.json"):
        records |= {record["name"]: record for record in json.loads(path.read_text())["records"]}
    for row in measured.CPU:
        ratio = records[row.case]["candidates"]["dlkernels"]["x_compile"]
        assert (ratio < 1) == (row.ratio < 1), f"{row.case}: {ratio:.2f} decides otherwise than {row.ratio}"
        assert 0.8 < ratio / row.ratio < 1.25, f"{row.case}: measured {ratio:.2f}, in the table {row.ratio}"
        assert row.training == row.case.endswith("fwd+bwd")


def test_decisions() -> None:
    assert measured.decide("group_norm", "rows", True, "cpu") == (False, "not faster here (0.63x)")
    assert measured.decide("group_norm", "rows", False, "cpu")[0] is False
    assert measured.decide("group_norm", "activation", True, "cpu") == (True, "1.98x measured")
    assert measured.decide("squeeze_excite", "unknown kind", False, "cpu") == (True, "1.18x measured")
    taken, reason = measured.decide("group_norm", "activation", True, "cuda")
    assert taken and "no measurement on GPUs" in reason
    taken, reason = measured.decide("group_norm", "", True, "cuda")
    assert not taken and "no measurement on GPUs" in reason


def test_every_pattern_has_rows() -> None:
    assert {row.op for row in measured.CPU} == set(rewrite.PATTERNS)
