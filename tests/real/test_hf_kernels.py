"""Hugging Face `kernels` with our layers: models that are kernelized train, compile and are copied as before."""

from __future__ import annotations

import copy
import importlib
import io
import logging
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dlkernels as dk
from dlkernels import _hf_kernels
from dlkernels.testing import assert_bitwise

kernels = pytest.importorskip("kernels", reason="needs real: Hugging Face kernels is not installed")
F64 = torch.float64
LIMIT = 1e-12


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No mapping, and classes that nobody has named, before and after each test."""
    logging.getLogger("kernels").setLevel(logging.ERROR)
    with kernels.use_kernel_mapping({}, inherit_mapping=False):
        yield
    for name in _hf_kernels._layers():
        cls = _hf_kernels._imported(name)
        for attribute in ("kernel_layer_name", "kernel_condition"):
            if cls is not None and attribute in vars(cls):
                delattr(cls, attribute)


class Net(nn.Module):
    """GroupNorm of several kinds; one is a subclass with a forward of its own."""

    class Doubled(nn.GroupNorm):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Renamed(nn.GroupNorm):
        pass

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norms = nn.Sequential(
            nn.GroupNorm(2, 8), nn.SiLU(), nn.GroupNorm(8, 8, eps=1e-3), nn.GroupNorm(1, 8, affine=False)
        )
        self.others = nn.Sequential(self.Doubled(2, 8), self.Renamed(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.others(self.norms(self.conv(x)))


def randomised(model: nn.Module) -> nn.Module:
    """float64, with parameters at which a mistake shows."""
    draw = torch.Generator().manual_seed(0)
    for p in model.double().parameters():
        with torch.no_grad():
            p.add_(torch.randn(p.shape, generator=draw, dtype=F64) * 0.2)
    return model


def kernelized(model: nn.Module, mode: Any = None) -> nn.Module:
    return kernels.kernelize(copy.deepcopy(model), mode=mode or kernels.Mode.TRAINING, device="cpu")


def run(model: Any, x: Tensor) -> list[Tensor]:
    """The output and the gradients."""
    y = model(x)
    params = [p for p in model.parameters() if p.requires_grad]
    return [
        y.detach(),
        *torch.autograd.grad((y * torch.linspace(0.5, 2, y.numel(), dtype=F64).view_as(y)).sum(), params),
    ]


def assert_equal(ours: list[Tensor], theirs: list[Tensor], limit: float = LIMIT) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= limit * b.norm()


def bound(model: nn.Module) -> dict[str, str]:
    """Modules with a forward of ours in the instance -> where that is from."""
    return {
        name: m.forward.__func__.__qualname__
        for name, m in model.named_modules()
        if "forward" in vars(m) and m.forward.__func__.__module__ == "dlkernels._hf_kernels"
    }


@pytest.mark.needs("cpp")
def test_training() -> None:
    """Outputs and gradients in train mode; keys and parameters are those of the model."""
    model, x = randomised(Net()).train(), torch.randn(4, 3, 9, 9, dtype=F64)
    mapping = dk.register_with_hf_kernels()
    ours = kernelized(model)
    assert set(bound(ours)) == {"norms.0", "norms.2", "norms.3", "others.1"}
    assert ours.state_dict().keys() == model.state_dict().keys() and ours.training
    assert_equal(run(ours, x), run(model, x))
    name = "torch.nn.modules.normalization.GroupNorm"
    assert mapping[name].keys() == {"cpu", "cuda"} and issubclass(mapping[name]["cpu"].load(), nn.Module)
    with torch.no_grad():  # the comparison can fail
        ours.norms[0].weight[0] *= 1 + 1e-9
    with pytest.raises(AssertionError):
        assert_equal(run(ours, x), run(model, x))


def test_it_is_our_op_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = _hf_kernels.group_norm
    monkeypatch.setattr(_hf_kernels, "group_norm", lambda *args: calls.append(1) or original(*args))
    dk.register_with_hf_kernels()
    kernelized(Net())(torch.randn(2, 3, 9, 9))
    assert len(calls) == 4
    Net()(torch.randn(2, 3, 9, 9))
    assert len(calls) == 4


def test_without_registering() -> None:
    """The mapping alone, for the time of a context."""
    mapping = dk.register_with_hf_kernels(register=False)
    assert not bound(kernelized(Net()))
    with kernels.use_kernel_mapping(mapping):
        assert len(bound(kernelized(Net()))) == 4
    assert not bound(kernelized(Net()))


def test_again_and_beside_others() -> None:
    """Twice is once; a class that somebody else has named keeps its name."""
    assert dk.register_with_hf_kernels() == dk.register_with_hf_kernels()
    assert len(bound(kernelized(Net()))) == 4
    kernels.replace_kernel_forward_from_hub(nn.GroupNorm, "TheirGroupNorm")
    dk.register_with_hf_kernels()
    assert nn.GroupNorm.kernel_layer_name == "TheirGroupNorm"
    assert not bound(kernelized(Net()))


def test_a_name_given_to_a_class_that_computes_something_else() -> None:
    """Whoever names it and sets no condition gets its own forward."""
    dk.register_with_hf_kernels()
    kernels.replace_kernel_forward_from_hub(Net.Doubled, nn.GroupNorm.kernel_layer_name)
    try:
        model, x = randomised(Net()), torch.randn(2, 3, 9, 9, dtype=F64)
        ours = kernelized(model)
        assert len(bound(ours)) == 5
        assert_equal(run(ours, x), run(model, x))
    finally:
        del Net.Doubled.kernel_layer_name, Net.Doubled.kernel_condition


@pytest.mark.parametrize("mode", ["INFERENCE", "TRAINING"])
def test_compiled(mode: str) -> None:
    """One graph; `can_torch_compile` is true."""
    mode = kernels.Mode[mode] | kernels.Mode.TORCH_COMPILE
    model, x = randomised(Net()).train(mode=kernels.Mode.TRAINING in mode), torch.randn(4, 3, 9, 9, dtype=F64)
    dk.register_with_hf_kernels()
    ours = kernelized(model, mode)
    assert len(bound(ours)) == 4
    torch._dynamo.reset()
    assert_equal(run(torch.compile(ours, backend="aot_eager", fullgraph=True), x), run(model, x))
    torch._dynamo.reset()


def test_copies() -> None:
    """A deep copy is kernelized, on parameters of its own; what comes out of a file has its original forward."""
    x = torch.randn(2, 3, 9, 9, dtype=F64)
    dk.register_with_hf_kernels()
    ours = kernelized(randomised(Net()))
    expected = run(ours, x)
    other = copy.deepcopy(ours)
    assert bound(other) == bound(ours) and other.norms[0].forward.__self__ is other.norms[0]
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
    for a, b in zip(run(other, x), expected, strict=True):
        assert_bitwise(a, b)
    file = io.BytesIO()
    torch.save(other, file)
    file.seek(0)
    for loaded in (pickle.loads(pickle.dumps(other)), torch.load(file, weights_only=False)):
        assert not bound(loaded)
        assert_equal(run(loaded, x), expected)
        assert len(bound(kernelized(loaded))) == 4


def test_hooks_and_half_precision() -> None:
    dk.register_with_hf_kernels()
    model = Net()
    seen: list[torch.dtype] = []
    model.norms[0].register_forward_hook(lambda m, args, y: seen.append(y.dtype))
    ours = kernelized(model)
    with torch.autocast("cpu", torch.bfloat16):
        ours(torch.randn(2, 3, 9, 9))
        model(torch.randn(2, 3, 9, 9))
    assert len(seen) == 2 and seen[0] == seen[1]
    with pytest.raises(ValueError, match=r"(?i)expected more than 1 value per channel"):
        kernelized(nn.Sequential(nn.GroupNorm(4, 4)))(torch.randn(1, 4))


@pytest.mark.needs("real")
@pytest.mark.needs("cpp")
@pytest.mark.parametrize(
    ("make", "layers", "limit"),
    [
        (lambda: _models("torchvision.models").efficientnet_b0(), 16, LIMIT),
        # The gradient of torch's hard sigmoid has a sixth in float32, also for float64.
        (lambda: _models("torchvision.models").mobilenet_v3_small(), 9, 1e-7),
        (lambda: _models("timm").create_model("regnety_002"), 13, LIMIT),
        (lambda: _models("timm").create_model("efficientnet_b0"), 16, LIMIT),
        (lambda: _models("timm").create_model("rexnet_100"), 0, LIMIT),  # a BatchNorm inside
        (lambda: _regnet(), 2, LIMIT),
    ],
    ids=["torchvision", "torchvision mobilenet", "timm regnet", "timm efficientnet", "timm rexnet", "transformers"],
)
def test_squeeze_excite_of_libraries(make: Any, layers: int, limit: float) -> None:
    """Layer by layer, with the input that each has in the model, in train mode."""
    model = randomised(make()).train()
    dk.register_with_hf_kernels()
    ours = kernelized(model)
    assert len(bound(ours)) == layers
    assert list(ours.state_dict()) == list(model.state_dict())
    draw = torch.Generator().manual_seed(0)
    of_theirs = dict(model.named_modules())
    for name in bound(ours):
        module, original = ours.get_submodule(name), of_theirs[name]
        channels = next(m for m in original.modules() if isinstance(m, nn.Conv2d)).in_channels
        x = torch.randn(2, channels, 5, 6, generator=draw, dtype=F64)
        assert_equal(run(module, x), run(original, x), limit)
        with torch.no_grad():
            next(p for p in original.parameters()).mul_(1.001)
        with pytest.raises(AssertionError):
            assert_equal(run(module, x), run(original, x), limit)


def _models(name: str) -> Any:
    importlib.import_module("_libraries")
    return importlib.import_module(name)


def _regnet() -> nn.Module:
    transformers = _models("transformers")
    config = transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8, layer_type="y"
    )
    return transformers.RegNetModel(config)


# Bad input ------------------------------------------------------------------------------------------------------------


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, with what to do instead."""
    with pytest.raises(ValueError, match="`devices` must be of 'cpu' and 'cuda', got 'mps'"):
        dk.register_with_hf_kernels(devices=("mps",))
    monkeypatch.setattr(kernels, "__version__", "0.18.2")
    with pytest.raises(ImportError, match=r"`kernels` must be 0.17.\*, got 0.18.2: .*dlkernels.swap"):
        dk.register_with_hf_kernels()
    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ImportError, match=r"pip install kernels==0.17.\*, or use dlkernels.swap") as raised:
        dk.register_with_hf_kernels()
    assert "\n" not in str(raised.value)
