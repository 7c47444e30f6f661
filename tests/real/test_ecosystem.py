"""What libraries do with models beside calling them: saving, pipelines, tracing, functional transforms, surgery.

Each is done with a swapped model and has to give what it gives with the model as it was.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _entry import loss_of, tensors
from _training import NETS, assert_close, gradients, loss, pair
from _zoo import ZOO
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import dlkernels as dk

pytestmark = [pytest.mark.needs("real"), pytest.mark.needs("cpp")]

HUGGING_FACE = [name for name, entry in ZOO.items() if entry.library in ("transformers", "diffusers")]
SMALL = ["seresnet18", "tv_regnet_y", "nnunet_2d", "unet2d_default", "resnet_group_norm", "convnext", "hf_bit"]


@pytest.fixture(autouse=True)
def _libraries() -> None:
    importlib.import_module("_libraries")


def output(name: str, model: nn.Module, seed: int = 1) -> Tensor:
    dtype = next(model.parameters()).dtype
    args, kwargs = ZOO[name].inputs(dtype, torch.Generator().manual_seed(seed))
    return torch.cat([t.flatten() for t in tensors(model(*args, **kwargs))])


# Files of the libraries -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_save_pretrained(name: str, tmp_path: Path) -> None:
    """The files of a swapped model are those of the model as it was, and its class loads them."""
    model = ZOO[name].build().eval()
    original = type(model)
    model.save_pretrained(tmp_path / "before")
    assert dk.swap(model).swapped
    model.save_pretrained(tmp_path / "after")
    files = sorted(p.name for p in (tmp_path / "before").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "after").iterdir())
    for file in files:
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "after" / file).read_bytes(), file
    loaded = original.from_pretrained(tmp_path / "after").eval()
    assert type(loaded) is original
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values()))


def test_pipeline(tmp_path: Path) -> None:
    """A pipeline of diffusers with a swapped model in it: its index names the library's class, and it loads."""
    from diffusers import DDPMPipeline, DDPMScheduler

    model = ZOO["unet2d_default"].build().eval()
    plain = copy.deepcopy(model)
    dk.swap(model)
    for folder, net in (("before", plain), ("after", model)):
        DDPMPipeline(unet=net, scheduler=DDPMScheduler(num_train_timesteps=10)).save_pretrained(tmp_path / folder)
    index = "model_index.json"
    assert (tmp_path / "after" / index).read_text() == (tmp_path / "before" / index).read_text()
    loaded = DDPMPipeline.from_pretrained(tmp_path / "after")
    assert type(loaded.unet) is type(plain)
    assert_close(output("unet2d_default", loaded.unet), output("unet2d_default", model), limit=1e-4)


# Tracing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["seresnet18", "regnety_002", "tv_efficientnet_b0", "resnet_group_norm", "convnext"])
def test_symbolic_trace(name: str) -> None:
    """torch.fx takes a swapped model where it takes the model as it was."""
    entry, theirs, ours = pair(name)
    graph = torch.fx.symbolic_trace(ours)
    assert_close(output(name, graph), output(name, theirs))
    assert entry.library in ("timm", "torchvision")


def test_feature_extraction() -> None:
    """torchvision's names of nodes, by which features are asked for."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    _, theirs, ours = pair("tv_efficientnet_b0")
    assert get_graph_node_names(ours) == get_graph_node_names(theirs)
    nodes = {"features.3": "a", "features.5": "b"}
    args, _ = ZOO["tv_efficientnet_b0"].inputs(torch.float64, torch.Generator().manual_seed(1))
    found = [create_feature_extractor(model.eval(), nodes)(*args) for model in (theirs, ours)]
    for key in ("a", "b"):
        assert_close(found[1][key], found[0][key])


@pytest.mark.parametrize("name", ["seresnet18", "tv_regnet_y", "convnext", "resnet_group_norm"])
def test_jit_trace(name: str) -> None:
    """A trace of a swapped model is one of PyTorch's operators: its file needs no dlkernels."""
    _, theirs, ours = pair(name)
    args, _ = ZOO[name].inputs(torch.float64, torch.Generator().manual_seed(1))
    with torch.no_grad():
        traced = torch.jit.trace(ours, args)
    assert "dlkernels::" not in str(traced.inlined_graph)
    assert_close(tensors(traced(*args))[0], tensors(theirs(*args))[0])


# Functional transforms ------------------------------------------------------------------------------------------------


def weighed(name: str, model: nn.Module, values: dict[str, Tensor], *args: Tensor) -> Tensor:
    return loss_of_values(torch.func.functional_call(model, values, args))


def loss_of_values(result: Any) -> Tensor:
    flat = torch.cat([t.flatten() for t in tensors(result)])
    return (flat * torch.linspace(-1, 1, flat.numel(), dtype=flat.dtype)).sum()


@pytest.mark.parametrize("name", SMALL)
@sdpa_kernel(SDPBackend.MATH)  # the one that has these derivatives
def test_functional(name: str) -> None:
    """torch.func: the gradient, gradients of each sample, a Jacobian-vector product."""
    _, theirs, ours = pair(name)
    args, _ = ZOO[name].inputs(torch.float64, torch.Generator().manual_seed(1))
    values = {n: p.detach() for n, p in theirs.named_parameters()}
    directions = {n: torch.cos(torch.arange(p.numel(), dtype=p.dtype)).view_as(p) for n, p in values.items()}
    x, rest = args[0], args[1:]

    def transforms(model: nn.Module) -> dict[str, Any]:
        def value(v: dict[str, Tensor], x: Tensor) -> Tensor:
            return weighed(name, model, v, x, *rest)

        def sample(v: dict[str, Tensor], x: Tensor) -> Tensor:
            return weighed(name, model, v, x[None], *[t[:1] for t in rest])

        done = {
            "grad": torch.func.grad(value)(values, x),
            "of each sample": torch.func.vmap(torch.func.grad(sample), in_dims=(None, 0))(values, x),
        }
        if name != "unet2d_default":  # PyTorch's GroupNorm raises there for the strided output of attention
            done["jvp"] = {"": torch.func.jvp(lambda v: value(v, x), (values,), (directions,))[1]}
        return done

    found, expected = transforms(ours), transforms(theirs)
    for what, items in expected.items():
        a = torch.cat([found[what][n].flatten() for n in items])
        assert_close(a, torch.cat([t.flatten() for t in items.values()]), f"{name}: {what}")


@pytest.mark.parametrize("name", SMALL)
@sdpa_kernel(SDPBackend.MATH)
def test_second_derivatives(name: str) -> None:
    """A penalty on the gradient of the input."""
    entry, theirs, ours = pair(name)
    found = []
    for model in (theirs, ours):
        output, leaves = entry.call(model, torch.float64)
        (gradient,) = torch.autograd.grad(loss_of(output), leaves[:1], create_graph=True)
        gradient.square().mean().backward()
        found.append(gradients(model))
    assert_close(found[1], found[0])


# Surgery after the swap -----------------------------------------------------------------------------------------------


def pruned(model: nn.Module) -> None:
    from torch.nn.utils import prune

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            prune.l1_unstructured(module, "weight", 0.4)


def spectral(model: nn.Module) -> None:
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            torch.manual_seed(3)
            torch.nn.utils.parametrizations.spectral_norm(module)


def frozen(model: nn.Module) -> None:
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 == 0)


def without_bias(model: nn.Module) -> None:
    """Biases of norms and gates taken away."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm) or "SE" in type(module).__name__ or "Squeeze" in type(module).__name__:
            for inner in module.modules():
                if getattr(inner, "bias", None) is not None:
                    inner.bias = None


def other_convolution(model: nn.Module) -> None:
    """An inner layer of another kind, as PEFT and quantization put it there."""

    class Scaled(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * 1.5

    for module in list(model.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d | nn.Linear | nn.GroupNorm | nn.SiLU | nn.ReLU | nn.Sigmoid):
                setattr(module, key, Scaled(child))


def subclassed_forward(model: nn.Module) -> None:
    """A forward of its own on instances."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.SiLU | nn.ReLU | nn.Sigmoid | nn.Conv2d):
            forward = module.forward
            module.forward = lambda x, _f=forward: _f(x) * 1.25


@pytest.mark.parametrize("name", ["seresnet18", "tv_regnet_y", "nnunet_2d", "unet2d_default", "resnet_group_norm"])
@pytest.mark.parametrize("change", [pruned, spectral, frozen, without_bias, other_convolution, subclassed_forward])
def test_surgery(name: str, change: Callable[[nn.Module], None]) -> None:
    """What is done to inner layers after the swap counts as much as it did before."""
    entry, theirs, ours = pair(name)
    for model in (theirs, ours):
        change(model)
        loss(entry, model, 1).backward()
    assert_close(output(name, ours), output(name, theirs))
    assert_close(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("name", NETS)
def test_other_shapes(name: str) -> None:
    """No sample, one sample, other sizes, strided inputs."""
    _, theirs, ours = pair(name)
    args, _ = ZOO[name].inputs(torch.float64, torch.Generator().manual_seed(1))
    wide = torch.randn(4, args[0].shape[1], 48, 64, dtype=torch.float64)
    inputs = {
        "one": args[0][:1],
        "wide": wide,
        "strided": wide[::2, :, :, ::2],
        "transposed": wide.transpose(2, 3),
        "expanded": args[0][:1].expand(3, -1, -1, -1),
        "none": args[0][:0],
    }
    for what, x in inputs.items():
        rest = [torch.tensor([5] * x.shape[0]) for _ in args[1:]]
        found = []
        for model in (theirs, ours):
            try:
                found.append(tensors(model(x, *rest))[0])
            except (RuntimeError, ValueError) as error:
                found.append(error)
        assert type(found[0]) is type(found[1]), (what, found)
        if isinstance(found[0], Tensor):
            assert found[1].shape == found[0].shape and found[1].stride() == found[0].stride(), what
            if found[0].numel():
                assert_close(found[1], found[0], what)


@pytest.mark.parametrize("name", NETS)
def test_inference_mode(name: str) -> None:
    _, theirs, ours = pair(name)
    with torch.inference_mode():
        assert_close(output(name, ours), output(name, theirs))


@pytest.mark.parametrize("name", NETS)
def test_named_as_before(name: str) -> None:
    """Modules are chosen by the names of their classes: what FSDP wraps, what a device map keeps whole."""
    _, theirs, ours = pair(name)
    for a, b in zip(ours.modules(), theirs.modules(), strict=True):
        for part in ("__name__", "__qualname__", "__module__"):
            assert getattr(type(a), part) == getattr(type(b), part)
        assert (type(a) is type(b)) == (not a._get_name().startswith("Fused"))
    assert "Fused" in repr(ours)
