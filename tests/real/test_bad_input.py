"""What cannot be swapped gets one line that says what to do instead; what is unusual and can be swapped is."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _training import NETS, assert_close, loss, pair
from _zoo import ZOO
from torch import nn

import dlkernels as dk

pytestmark = [pytest.mark.needs("real"), pytest.mark.needs("cpp")]


@pytest.fixture(autouse=True)
def _libraries() -> None:
    importlib.import_module("_libraries")


def build(name: str) -> nn.Module:
    return ZOO[name].build().eval()


def types(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


def assert_one_line(call: Callable[[], Any], *words: str, error: type[Exception] = ValueError) -> None:
    """An error of one line with these words in it."""
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and "`" in text, text
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"


def assert_refused(model: nn.Module, *words: str) -> None:
    """Nothing is changed where a model is refused."""
    before = types(model)
    assert_one_line(lambda: dk.swap(model), "`model", *words)
    assert types(model) == before


@pytest.mark.parametrize("thing", [3, None, "resnet50", nn.Linear, [nn.Linear(1, 1)]], ids=repr)
def test_not_a_module(thing: Any) -> None:
    assert_one_line(lambda: dk.swap(thing), "`model`", "Module", "got", error=TypeError)


@pytest.mark.parametrize("name", NETS)
def test_unknown_family(name: str) -> None:
    model = build(name)
    before = types(model)
    assert_one_line(lambda: dk.swap(model, include=["group_norm", "squeeze_exite"]), "`include`", "squeeze_exite")
    assert types(model) == before


@pytest.mark.parametrize("name", NETS)
def test_compiled(name: str) -> None:
    model = build(name)
    assert_refused(torch.compile(model, backend="eager"), "torch.compile")
    model.compile(backend="eager")
    assert_refused(model, "compile")


@pytest.fixture
def group(tmp_path: Path) -> Any:
    """A group of one process."""
    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", NETS)
def test_under_ddp(name: str, group: None) -> None:
    assert_refused(nn.parallel.DistributedDataParallel(build(name)), "DistributedDataParallel")


@pytest.mark.parametrize("name", NETS)
def test_under_fsdp2(name: str, group: None) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    model = build(name)
    block = next(m for m in model.modules() if isinstance(m, nn.Sequential | nn.ModuleList))[0]
    fully_shard(block, mesh=mesh)
    assert_refused(model, "fully_shard")
    assert_refused(fully_shard(build(name), mesh=mesh), "fully_shard")


def test_quantized() -> None:
    """torchvision's quantized squeeze-excite is left, with the reason; quantized layers beside others stay."""
    from torchvision.models.quantization.mobilenetv3 import QuantizableSqueezeExcitation

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gate = QuantizableSqueezeExcitation(16, 8, scale_activation=nn.Hardsigmoid).eval()
        model = nn.Sequential(torch.ao.quantization.QuantStub(), gate, torch.ao.quantization.DeQuantStub())
        model.qconfig = torch.ao.quantization.get_default_qconfig("x86")
        prepared = torch.ao.quantization.prepare(model)
        prepared(torch.randn(2, 16, 5, 5))
        converted = torch.ao.quantization.convert(prepared)
        dynamic = torch.ao.quantization.quantize_dynamic(build("seresnet18"), {nn.Linear}, dtype=torch.qint8)
    x = torch.randn(2, 16, 5, 5)
    expected = converted(x)
    report = dk.swap(converted)
    assert not report.swapped and torch.equal(converted(x), expected)
    assert any(path == "1" and "quantiz" in reason for path, _, reason in report.skipped), str(report)

    image = torch.randn(2, 3, 32, 32)
    expected = dynamic(image)
    report = dk.swap(dynamic)
    assert report.counts().get("squeeze_excite") == ZOO["seresnet18"].swapped["squeeze_excite"]
    assert (dynamic(image) - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("name", NETS)
def test_meta_device(name: str) -> None:
    """Swapped before there are values, given memory, then loaded."""
    entry, theirs, _ = pair(name)
    with torch.device("meta"):
        model = entry.build().double()
    report = dk.swap(model)
    assert report.counts() == entry.swapped
    model = entry.mode(model.to_empty(device="cpu"))
    model.load_state_dict(theirs.state_dict())
    assert_close(loss(entry, model, 1), loss(entry, theirs, 1))
    with torch.device("meta"):
        assigned = entry.mode(entry.build().double())
    dk.swap(assigned)
    assigned.load_state_dict(theirs.state_dict(), assign=True)
    assert_close(loss(entry, assigned, 1), loss(entry, theirs, 1))


@pytest.mark.parametrize("name", NETS)
def test_mixed_dtypes(name: str) -> None:
    """Where the model as it was raises, so does the swapped one; where it runs, the dtypes are the same."""
    entry, theirs, ours = pair(name, torch.float32)
    for kind, dtype in ((nn.GroupNorm, torch.bfloat16), (nn.Conv2d, torch.bfloat16), (nn.Linear, torch.bfloat16)):
        results = []
        for model in (copy.deepcopy(theirs), copy.deepcopy(ours)):
            for module in model.modules():
                if isinstance(module, kind):
                    module.to(dtype)
            try:
                results.append(loss(entry, model, 1, torch.float32).dtype)
            except (RuntimeError, TypeError) as error:
                results.append(str(error).splitlines()[0][:40])
        assert type(results[0]) is type(results[1]), (kind, results)
        if isinstance(results[0], torch.dtype):
            assert results[0] == results[1], kind
    half = copy.deepcopy(theirs).bfloat16()
    swapped = copy.deepcopy(ours).bfloat16()
    for model in (half, swapped):  # float32 norms in a bfloat16 model
        for module in model.modules():
            if isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
                module.float()
    a, b = loss(entry, swapped, 1, torch.bfloat16), loss(entry, half, 1, torch.bfloat16)
    assert a.dtype == b.dtype and (a - b).abs() <= 0.1 * b.abs() + 0.1


def test_strict() -> None:
    """What is of a family and cannot be swapped is an error, and nothing is changed."""
    model = build("rexnet")
    before = types(model)
    report = dk.swap(model)
    refused = [path for path, *_ in report.skipped]
    assert refused
    report.undo()
    with pytest.raises(ValueError) as caught:
        dk.swap(model, strict=True)
    assert refused[0] in str(caught.value) and "batch" in str(caught.value).lower(), str(caught.value)
    assert types(model) == before
    assert dk.swap(build("seresnet18"), strict=True).swapped


def test_filter() -> None:
    """filter_fn chooses by module and path; include by family."""
    model = build("seresnet18")
    report = dk.swap(model, filter_fn=lambda module, path: path.startswith("layer2"))
    assert report.swapped and all(path.startswith("layer2") for path, *_ in report.swapped)
    report.undo()
    assert not dk.swap(build("seresnet18"), include=["weight_norm"]).swapped
    only = dk.swap(build("seresnet18"), include=["squeeze_excite"]).counts()
    assert set(only) == {"squeeze_excite"}


def test_shared_and_root() -> None:
    """A module in two places stays one; a model that is itself such a module is swapped in place."""
    model = build("seresnet18")
    model.layer1[0].se, shared = model.layer2[0].se, model.layer2[0].se
    dk.swap(model)
    assert model.layer1[0].se is model.layer2[0].se is shared
    root = nn.GroupNorm(2, 4).double()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    expected = root(x)
    report = dk.swap(root)
    assert [path for path, *_ in report.swapped] == [""] and type(root) is not nn.GroupNorm
    assert_close(root(x), expected)
    report.undo()
    assert type(root) is nn.GroupNorm
