"""`dlkernels.swap` on models of torch's own layers: what it changes, what it leaves, and that numbers stay."""

from __future__ import annotations

import copy
import gc
import io
import json
import pickle
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlkernels as dk

TIGHT = 1e-12


def error(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm().clamp(min=1e-30)).detach())


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return model


class Drop(nn.Module):
    """Not known to swap, though its name says what it does."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Block(nn.Module):
    """A residual block with a modulation, as diffusion models have them."""

    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(c, c, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = nn.GroupNorm(2, c), nn.GroupNorm(4, c)
        self.act = nn.SiLU()
        self.drop = nn.Dropout(0.0)
        self.time = nn.Linear(5, 2 * c)
        self.none = None

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        h = self.act(self.norm1(x))
        h = self.conv1(h)
        if t is not None:
            scale, shift = self.time(t)[:, :, None, None].chunk(2, 1)
            h = self.norm2(h)
            h = h * (1 + scale) + shift
        else:
            h = self.norm2(h)
        h = self.act(h)
        h = self.drop(h)
        return x + self.conv2(h)


class Net(nn.Module):
    def __init__(self, c: int = 8) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, c, 3), nn.GroupNorm(2, c), nn.LeakyReLU(), nn.Identity())
        self.blocks = nn.ModuleList(Block(c) for _ in range(2))
        self.norm_out, self.act_out, self.out = nn.GroupNorm(1, c), nn.ReLU(inplace=True), nn.Conv2d(c, 2, 1)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, t)
        x = self.norm_out(x)
        x = self.act_out(x)
        return self.out(x)


def net() -> Net:
    torch.manual_seed(0)
    return randomised(Net().double()).train()


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 7, 6, generator=g).double(), torch.randn(2, 5, generator=g).double()


def same(model: nn.Module, reference: nn.Module, *args: Any) -> None:
    """Outputs and all gradients."""
    x, *rest = args
    results = []
    for m in (model, reference):
        x = x.detach().clone().requires_grad_()
        y = m(x, *rest)
        gs = torch.autograd.grad(
            (y * torch.linspace(0.5, 2, y.numel(), dtype=y.dtype).view_as(y)).sum(),
            [x, *m.parameters()],
            allow_unused=True,
        )
        results.append([y, *gs])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        assert a is None or error(a, b) < TIGHT


# Whole models ---------------------------------------------------------------------------------------------------------


def test_numbers_stay() -> None:
    model, reference = net(), net()
    x, t = batch()
    report = dk.swap(model)
    assert report.counts() == {"group_norm": 6, "blocks": 4}
    for modulation in (t, None):
        same(model, reference, x, modulation)


def test_what_stays() -> None:
    """Keys, parameters, names, isinstance, hooks on the swapped modules."""
    model = net()
    keys, parameters = list(model.state_dict()), {n: id(p) for n, p in model.named_parameters()}
    names, classes = [n for n, _ in model.named_modules()], [type(m) for m in model.modules()]
    seen: list[str] = []
    model.norm_out.register_forward_hook(lambda *_: seen.append("norm"))
    model.blocks[0].register_forward_pre_hook(lambda *_: seen.append("block"))
    dk.swap(model)
    assert list(model.state_dict()) == keys
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert [n for n, _ in model.named_modules()] == names
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), classes, strict=True))
    model(batch()[0])
    assert seen == ["block", "norm"]


def test_undo() -> None:
    model, reference = net(), net()
    report = dk.swap(model)
    assert report.undo() == len(report.swapped) == 10
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    assert [m.__dict__.keys() for m in model.modules()] == [m.__dict__.keys() for m in reference.modules()]
    assert report.undo() == 0


def test_twice_is_once() -> None:
    model = net()
    dk.swap(model)
    classes = [type(m) for m in model.modules()]
    again = dk.swap(model)
    assert not again.swapped and not again.skipped
    assert [type(m) for m in model.modules()] == classes
    assert str(again) == "swapped 0 modules"


def test_norms_first_and_blocks_later() -> None:
    """A second swap goes on from where the first stopped."""
    model, reference = net(), net()
    dk.swap(model, filter_fn=lambda m, path: isinstance(m, nn.GroupNorm))
    assert dk.swap(model).counts() == {"blocks": 4}
    same(model, reference, *batch())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copied: Callable[[Any], Any]) -> None:
    model, reference = net(), net()
    report = dk.swap(model)
    twin = copied(model)
    report.undo()
    assert [m._get_name() for m in twin.modules()].count("FusedBlock") == 2
    same(twin, reference, *batch())
    assert dk.unswap(twin) == 10
    assert [type(m) for m in twin.modules()] == [type(m) for m in reference.modules()]


def test_saved_whole() -> None:
    model, reference = net(), net()
    dk.swap(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    same(torch.load(file, weights_only=False), reference, *batch())


def test_root_and_shared_modules() -> None:
    """The model itself may be what is swapped, and a module that two have is swapped once."""
    norm = nn.GroupNorm(2, 4)
    assert dk.swap(norm).swapped == [("", "torch.nn.modules.normalization.GroupNorm", "FusedGroupNorm")]
    shared = nn.GroupNorm(2, 4)
    two = nn.ModuleDict({"a": nn.Sequential(shared, nn.ReLU()), "b": nn.Sequential(shared, nn.SiLU())})
    report = dk.swap(two)
    assert report.counts() == {"group_norm": 1, "blocks": 2}
    assert two["a"][0] is two["b"][0] is shared
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(two["a"](x), F.relu(F.group_norm(x, 2)))
    torch.testing.assert_close(two["b"](x), F.silu(F.group_norm(x, 2)))


def test_meta_then_materialised() -> None:
    with torch.device("meta"):
        model = Net().double()
    dk.swap(model)
    model.to_empty(device="cpu")
    reference = net()
    model.load_state_dict(reference.state_dict())
    same(model, reference, *batch())


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compiled_and_exported(backend: str) -> None:
    model, reference = net(), net()
    dk.swap(model)
    x, t = batch()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert error(compiled(x, t), reference(x, t)) < TIGHT
    program = torch.export.export(model.eval(), (x, t))
    assert sum("group_norm" in str(n.target) for n in program.graph.nodes) == 6
    assert error(program.module()(x, t), reference.eval()(x, t)) < TIGHT


def test_traced_is_torchs() -> None:
    """torch.jit.trace sees the original operators, so that its file needs nothing of ours."""
    model, reference = net().eval(), net().eval()
    dk.swap(model)
    x, t = batch()
    traced = torch.jit.trace(model, (x, t))
    assert "dlkernels::" not in str(traced.inlined_graph)
    assert error(traced(x, t), reference(x, t)) < TIGHT


def test_fast_enough() -> None:
    """Below 50 ms for 1000 modules, and what is not to be swapped costs less."""
    model = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.ReLU()) for _ in range(250))
    times = []
    gc.disable()
    try:
        for _ in range(9):
            start = time.perf_counter()
            report = dk.swap(model)
            times.append(time.perf_counter() - start)
            assert len(report.swapped) == 500
            report.undo()
    finally:
        gc.enable()
    assert min(times) < 0.05


# What the surroundings change -----------------------------------------------------------------------------------------


def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Calls of group_norm by swapped modules, with what they take along."""
    from dlkernels._swap import _group_norm

    calls: list[dict[str, Any]] = []
    original = _group_norm.group_norm

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        calls.append({k: v for k, v in kwargs.items() if v is not None})
        return original(*args, **kwargs)

    monkeypatch.setattr(_group_norm, "group_norm", watched)
    return calls


def test_takes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Block().double()
    dk.swap(model)
    calls = fused_calls(monkeypatch)
    x, t = torch.randn(2, 8, 4, 4).double(), torch.randn(2, 5).double()
    model(x, t)
    assert [set(c) for c in calls] == [{"activation"}, {"activation", "scale", "shift"}]
    assert calls[0]["activation"] == "silu"


@pytest.mark.parametrize("where", ["norm2", "act", "drop"])
def test_hooks_on_inner_modules_fire(where: str) -> None:
    model, reference = Block().double(), Block().double()
    reference.load_state_dict(model.state_dict())
    dk.swap(model)
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        getattr(m, where).register_forward_hook(lambda _, i, o: seen.append((i[0], o))) for m in (model, reference)
    ]
    x, t = torch.randn(2, 8, 4, 4).double(), torch.randn(2, 5).double()
    same(model, reference, x, t)
    half = len(seen) // 2
    assert half
    for (i, o), (i_ref, o_ref) in zip(seen[:half], seen[half:], strict=True):
        assert error(i, i_ref) < TIGHT and error(o, o_ref) < TIGHT
    for handle in handles:
        handle.remove()
    same(model, reference, x, t)


def test_global_hooks_see_all_modules() -> None:
    model = Block()
    dk.swap(model)
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m._get_name()))
    try:
        model(torch.randn(2, 8, 4, 4))
    finally:
        handle.remove()
    assert seen.count("SiLU") == 2 and seen.count("FusedGroupNorm") == 2


@pytest.mark.parametrize("other", [nn.Tanh(), nn.LeakyReLU(0.2), nn.GELU("tanh"), nn.Identity()], ids=repr)
def test_another_activation_later(other: nn.Module) -> None:
    """What is fused is decided when it is called."""
    model, reference = Block().double(), Block().double()
    reference.load_state_dict(model.state_dict())
    dk.swap(model)
    model.act, reference.act = other, copy.deepcopy(other)
    same(model, reference, torch.randn(2, 8, 4, 4).double())


def test_another_norm_later() -> None:
    model, reference = Block().double().eval(), Block().double().eval()
    reference.load_state_dict(model.state_dict())
    dk.swap(model)
    for m in (model, reference):
        m.norm2 = nn.LocalResponseNorm(2)
    same(model, reference, torch.randn(2, 8, 4, 4).double())


def test_dropout_in_training_is_between() -> None:
    model, reference = Block().double(), Block().double()
    reference.load_state_dict(model.state_dict())
    dk.swap(model)
    for m in (model, reference):
        m.drop.p = 0.5
    x = torch.randn(2, 8, 4, 4).double()
    torch.manual_seed(3)
    y = model(x)
    torch.manual_seed(3)
    assert error(y, reference(x)) < TIGHT


def test_low_precision_beside_float32_modulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch would promote, nothing is taken along that would not."""

    class Film(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = nn.GroupNorm(2, 4), nn.SiLU()

        def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
            x = self.norm(x)
            x = x * (1 + s) + t
            return self.act(x)

    model = Film().bfloat16()
    dk.swap(model)
    calls = fused_calls(monkeypatch)
    x, s = torch.randn(2, 4, 3, 3).bfloat16(), torch.randn(2, 4, 1, 1)
    assert model(x, s, s).dtype == torch.float32 and calls == [{}]
    assert model(x, s.bfloat16(), s.bfloat16()).dtype == torch.bfloat16 and set(calls[1]) == {
        "activation",
        "scale",
        "shift",
    }
    broadcast = torch.randn(1, 4, 1, 1).bfloat16()
    model(x, broadcast, broadcast)
    assert calls[2] == {}


@pytest.mark.parametrize("parameters", ["float64", "mixed"])
def test_fallback_to_torch_raises_what_torch_raises(parameters: str) -> None:
    norm = nn.GroupNorm(2, 4)
    dk.swap(norm)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        norm(torch.randint(0, 3, (2, 4, 3)) if parameters == "mixed" else torch.randn(2, 4, 3, dtype=torch.float64))


# What is refused ------------------------------------------------------------------------------------------------------


class Scaled(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.GroupNorm):
    """The same forward under another name."""


def test_subclasses() -> None:
    model = nn.ModuleDict({"scaled": Scaled(2, 4), "renamed": Renamed(2, 4), "drop": nn.ModuleList([Drop()])})
    report = dk.swap(model)
    assert [path for path, *_ in report.swapped] == ["renamed"]
    assert report.skipped == [("scaled", f"{__name__}.Scaled", "a subclass of GroupNorm with a forward of its own")]
    x = torch.randn(2, 4, 3)
    torch.testing.assert_close(model["scaled"](x), 2 * F.group_norm(x, 2))


def test_instance_forward_stays() -> None:
    norm = nn.GroupNorm(2, 4)
    norm.forward = lambda x: x + 1
    report = dk.swap(nn.Sequential(norm))
    assert not report.swapped and "set on the instance" in report.skipped[0][2]


def test_mixed_dtypes() -> None:
    norm = nn.GroupNorm(2, 4)
    norm.bias = nn.Parameter(norm.bias.data.half())
    assert "parameters of several dtypes: torch.float16, torch.float32" in dk.swap(norm).skipped[0][2]


def test_strict_changes_nothing() -> None:
    model = nn.Sequential(nn.GroupNorm(2, 4), Scaled(2, 4))
    with pytest.raises(ValueError, match=r"strict: 1, .*Scaled, is not swapped: a subclass of GroupNorm"):
        dk.swap(model, strict=True)
    assert type(model[0]) is nn.GroupNorm


@pytest.mark.parametrize(
    ("model", "kwargs", "kind", "message"),
    [
        (3, {}, TypeError, "`model` must be an nn.Module, got int"),
        (nn.GroupNorm(1, 2), {"include": "gn"}, ValueError, "`include` must name some of center_loss, .*'gn'"),
        (nn.GroupNorm(1, 2), {"include": ["group_norm", 3]}, ValueError, "`include` must name some of"),
        (nn.Sequential(nn.DataParallel(nn.ReLU())), {}, ValueError, "`model.0` is under DataParallel: swap the model"),
        (torch.jit.script(nn.GroupNorm(1, 2)), {}, ValueError, "`model` is a ScriptModule: swap the model first"),
    ],
    ids=["no module", "unknown family", "no name", "DataParallel", "scripted"],
)  # fmt: skip
def test_bad_input(model: Any, kwargs: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        dk.swap(model, **kwargs)


def test_compiled_first() -> None:
    with pytest.raises(ValueError, match=r"`model` is compiled by torch\.compile: swap the model first"):
        dk.swap(torch.compile(net(), backend="eager"))
    model = net()
    model.blocks[1].compile(backend="eager")
    with pytest.raises(ValueError, match=r"`model.blocks.1` is compiled by module.compile\(\)"):
        dk.swap(model)


def test_include_and_filter() -> None:
    assert dk.swap(net(), "weight_norm").swapped == []
    assert dk.swap(net(), ["group_norm"]).counts()["group_norm"] == 6
    report = dk.swap(net(), filter_fn=lambda module, path: path.startswith("blocks.0"))
    assert {path for path, *_ in report.swapped} == {"blocks.0", "blocks.0.norm1", "blocks.0.norm2"}


def test_report() -> None:
    model = net()
    model.extra = Scaled(2, 4).double()
    report = dk.swap(model)
    text = str(report)
    assert text.startswith("swapped 10 modules (4 blocks, 6 group_norm), left 1")
    for part in ("blocks.*.norm1 x 2", "GroupNorm (torch)", "FusedBlock: norm1, act", "left: a subclass of GroupNorm"):
        assert part in text
    out = json.loads(json.dumps(report.to_dict()))
    assert len(out["swapped"]) == 10 and out["skipped"][0][0] == "extra" and out["counts"]["blocks"] == 4
    assert repr(report) == "<SwapReport: swapped 10 modules (4 blocks, 6 group_norm), left 1>"
