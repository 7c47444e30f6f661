"""A swapped model lives the life of any other: trained, copied, saved, hooked, checkpointed, compiled, exported.

Each check is made beside the model as it was, which goes through the same.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _entry import tensors
from _training import LIMIT, NETS, assert_close, gradients, loss, pair, train
from _zoo import ZOO
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dlkernels as dk
from dlkernels import testing

pytestmark = [pytest.mark.needs("real"), pytest.mark.needs("cpp")]


@pytest.fixture(params=NETS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def outputs(name: str, model: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    args, kwargs = ZOO[name].inputs(dtype, torch.Generator().manual_seed(seed))
    return tensors(model(*args, **kwargs))[0]


# Training -------------------------------------------------------------------------------------------------------------


def test_training(name: str) -> None:
    """The same losses step by step: dropout and stochastic depth drop the same samples from the same seed."""
    entry, theirs, ours = pair(name)
    expected = train(entry, theirs)
    assert_close(train(entry, ours), expected)
    assert_close(
        torch.cat([b.flatten() for b in ours.buffers() if b.is_floating_point()] or [expected]),
        torch.cat([b.flatten() for b in theirs.buffers() if b.is_floating_point()] or [expected]),
        "running statistics",
    )
    with torch.no_grad():  # the comparison sees other masks
        args, _ = entry.inputs(torch.float64, torch.Generator().manual_seed(1))
        torch.manual_seed(1)
        one = tensors(theirs(*args))[0]
        torch.manual_seed(2)
        other = tensors(ours(*args))[0]
    assert (one - other).norm() > 1e-3 * one.norm()


def test_swapped_in_the_middle_of_training(name: str) -> None:
    """An optimizer made before the swap goes on with the same parameters; and after undo."""
    entry, theirs, _ = pair(name)
    found = []
    for model, swaps in ((copy.deepcopy(theirs), False), (theirs, True)):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        report = None
        for step in range(4):
            if swaps and step == 1:
                report = dk.swap(model)
            if report is not None and step == 3:
                report.undo()
            optimizer.zero_grad()
            value = loss(entry, model, step)
            value.backward()
            optimizer.step()
        found.append(value.detach())
    assert_close(found[1], found[0])


def checkpointed(forward: Callable[..., Any], reentrant: bool) -> Callable[..., Any]:
    """The reentrant kind takes positional arguments only."""

    def call(*args: Any, **kwargs: Any) -> Any:
        def again(*values: Any) -> Any:
            return forward(*values[: len(args)], **dict(zip(kwargs, values[len(args) :])))

        return checkpoint(again, *args, *kwargs.values(), use_reentrant=reentrant)

    return call


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    """Forward again in the backward pass, with the same draws, around each large block."""
    entry, theirs, ours = pair(name)
    for model in (theirs, ours):
        model.train()
        blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1]
        assert blocks
        for block in {id(child): child for child in blocks[0]}.values():
            block.forward = checkpointed(block.forward, reentrant)
        loss(entry, model, 3).backward()
    assert_close(gradients(ours), gradients(theirs))


def test_gradient_checkpointing_of_diffusers() -> None:
    """The library's own switch."""
    entry, theirs, ours = pair("unet2d_scale_shift")
    for model in (theirs, ours):
        model.enable_gradient_checkpointing()
        model.train()
        loss(entry, model, 3).backward()
    assert_close(gradients(ours), gradients(theirs))


def test_autocast(name: str) -> None:
    """bfloat16 under autocast: no further from float32 than the model as it was."""
    entry, theirs, ours = pair(name, torch.float32)
    exact = copy.deepcopy(theirs).double()
    found = []
    for seed in (1, 2, 3):
        args, _ = entry.inputs(torch.float32, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            right = tensors(exact(*[a.double() if a.is_floating_point() else a for a in args]))[0]
            with torch.autocast("cpu", torch.bfloat16):
                a, b = tensors(ours(*args))[0], tensors(theirs(*args))[0]
        assert a.dtype == b.dtype
        found.append([testing.relative_error(t.float(), right) ** 2 for t in (a, b)])
    error, eager = (sum(column) ** 0.5 for column in zip(*found))
    assert error <= 2 * eager + 4 * torch.finfo(torch.bfloat16).eps, (error, eager)
    for model in (theirs, ours):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(entry, model, 1, torch.float32)
        value.backward()
        assert all(p.grad is None or (p.grad.isfinite().all() and p.grad.dtype == p.dtype) for p in model.parameters())


# Copies and files -----------------------------------------------------------------------------------------------------


def test_copies(name: str) -> None:
    """deepcopy, pickle, torch.save of the whole module: swapped as they were, and of their own."""
    _, theirs, ours = pair(name)
    expected = outputs(name, theirs)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(ours),
        "pickle": pickle.loads(pickle.dumps(ours)),
        "torch.save": torch.load(file, weights_only=False),
    }
    for what, made in copies.items():
        assert [type(m) for m in made.modules()] == [type(m) for m in ours.modules()], what
        assert not {id(p) for p in made.parameters()} & {id(p) for p in ours.parameters()}, what
        assert_close(outputs(name, made), expected, what)
    for what, made in copies.items():
        assert dk.unswap(made) > 0
        assert [type(m) for m in made.modules()] == [type(m) for m in theirs.modules()], what
        assert_close(outputs(name, made), expected, f"{what}, swapped back")
    with torch.no_grad():
        next(iter(copies["deepcopy"].parameters())).add_(1)
    assert_close(outputs(name, ours), expected, "the original, after its copy changed")


def test_loaded_in_another_process(name: str, tmp_path: Path) -> None:
    """A file of a whole swapped module needs nothing but dlkernels and the library to be importable."""
    import subprocess
    import sys

    _, theirs, ours = pair(name)
    torch.save(ours, tmp_path / "model.pt")
    torch.save(outputs(name, theirs).detach(), tmp_path / "expected.pt")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import _libraries, torch\n"
        "model = torch.load(sys.argv[2] + '/model.pt', weights_only=False)\n"
        "from _entry import tensors; from _zoo import ZOO\n"
        "args, _ = ZOO[sys.argv[3]].inputs(torch.float64, torch.Generator().manual_seed(1))\n"
        "got, expected = tensors(model(*args))[0], torch.load(sys.argv[2] + '/expected.pt')\n"
        "assert any(m._get_name().startswith('Fused') for m in model.modules())\n"
        "print(float((got - expected).norm() / expected.norm()))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parent), str(tmp_path), name]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert float(result.stdout) <= LIMIT


def test_state_dicts(name: str) -> None:
    """Both ways between a swapped model and one that is not."""
    entry, theirs, ours = pair(name)
    plain, swapped = entry.build().double().eval(), entry.build().double().eval()
    dk.swap(swapped)
    for model in (plain, swapped):
        missing = model.load_state_dict(ours.state_dict())
        assert not missing.missing_keys and not missing.unexpected_keys
        assert_close(outputs(name, model), outputs(name, theirs))
        model.load_state_dict(entry.build().double().state_dict())
        model.load_state_dict(theirs.state_dict(), assign=True)
        assert_close(outputs(name, model), outputs(name, theirs), "assigned")


# Hooks, replaced modules, memory formats ------------------------------------------------------------------------------


def test_hooks_fire(name: str) -> None:
    """On every module, in the same order, with the same values, whether registered before the swap or after."""
    entry, theirs, ours = pair(name)
    hooked = copy.deepcopy(theirs)
    seen: dict[str, list[Any]] = {}

    def watch(key: str, model: nn.Module) -> list[Any]:
        seen[key] = []
        return [
            m.register_forward_hook(
                lambda module, args, output, path=path: seen[key].append(
                    (path, [t.detach().clone() for t in tensors(output)])
                )
            )
            for path, m in model.named_modules()
        ]

    hooks = [watch("theirs", theirs), watch("before", hooked), watch("after", ours)]
    dk.swap(hooked)
    losses = [loss(entry, model, 1) for model in (theirs, hooked, ours)]
    for value in losses:
        value.backward()
    assert len(seen["theirs"]) > 20
    for key in ("before", "after"):
        assert [path for path, _ in seen[key]] == [path for path, _ in seen["theirs"]], key
        for (path, got), (_, expected) in zip(seen[key], seen["theirs"]):
            for a, b in zip(got, expected, strict=True):
                assert a.shape == b.shape and (a - b).norm() <= 1e-11 * b.norm() + 1e-30, (key, path)
    for model in (hooked, ours):
        assert_close(gradients(model), gradients(theirs))
    for hook in [h for group in hooks for h in group]:
        hook.remove()
    assert_close(outputs(name, ours), outputs(name, theirs), "without the hooks")


def test_hooks_change_results(name: str) -> None:
    """A hook that changes what an inner module returns changes the model by as much as before."""
    _, theirs, ours = pair(name)
    kinds = (nn.Conv2d, nn.GroupNorm, nn.SiLU, nn.Sigmoid, nn.BatchNorm2d)
    expected = outputs(name, theirs)
    for kind in kinds:
        paths = [path for path, m in theirs.named_modules() if isinstance(m, kind)]
        for path in paths[:: max(len(paths) // 4, 1)]:
            hooks = [
                model.get_submodule(path).register_forward_hook(lambda module, args, output: output * 1.25)
                for model in (theirs, ours)
            ]
            changed = outputs(name, theirs)
            assert_close(outputs(name, ours), changed, f"{kind.__name__} {path}")
            assert (changed - expected).norm() > 1e-9 * expected.norm(), f"nothing changes by a hook of {path}"
            for hook in hooks:
                hook.remove()


def test_replaced_activations(name: str) -> None:
    """An inner activation that is replaced after the swap is the one that is used."""
    _, theirs, ours = pair(name)
    expected = outputs(name, theirs)
    replaced = 0
    for kind, other in ((nn.SiLU, nn.Tanh), (nn.Sigmoid, nn.Hardsigmoid)):
        for path, module in [(p, m) for p, m in theirs.named_modules() if type(m) is kind][:12]:
            for model in (theirs, ours):
                parent, _, attribute = path.rpartition(".")
                setattr(model.get_submodule(parent), attribute, other())
            replaced += 1
            assert type(theirs.get_submodule(path)) is not type(module)
    assert replaced >= 4
    changed = outputs(name, theirs)
    assert (changed - expected).norm() > 1e-3 * expected.norm()
    assert_close(outputs(name, ours), changed)


def test_channels_last(name: str) -> None:
    """Values, and the memory format of outputs and gradients."""
    entry, theirs, ours = pair(name)
    for model in (theirs, ours):
        model.to(memory_format=torch.channels_last)
    args, _ = entry.inputs(torch.float64, torch.Generator().manual_seed(1))
    found = []
    for model in (theirs, ours):
        strides: list[Any] = []
        x = args[0].clone().to(memory_format=torch.channels_last).requires_grad_()
        hooks = [
            m.register_forward_hook(
                lambda module, a, out, strides=strides: strides.extend(t.stride() for t in tensors(out))
            )
            for m in model.modules()
            if next(m.children(), None) is not None
        ]
        output = tensors(model(x, *args[1:]))[0]
        for hook in hooks:
            hook.remove()
        plain = tensors(model(x, *args[1:]))[0]
        (plain * torch.linspace(-1, 1, plain.numel(), dtype=plain.dtype).view_as(plain)).sum().backward()
        found.append((output, plain, x.grad, gradients(model), strides))
    for what, a, b in zip(("hooked", "output", "gradient of x", "gradients"), found[1], found[0]):
        assert_close(a, b, what)
        assert a.stride() == b.stride(), what
    assert found[1][-1] == found[0][-1]


# Compilers ------------------------------------------------------------------------------------------------------------


def test_compile(name: str) -> None:
    """In one graph, forward and backward, the same numbers."""
    entry, theirs, ours = pair(name)
    loss(entry, theirs, 1).backward()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        loss(entry, compiled, 1).backward()
    assert_close(gradients(ours), gradients(theirs))
    torch._dynamo.reset()


@pytest.mark.needs("compiler")
def test_inductor() -> None:
    """A block of each kind: for the time that whole models take to compile."""
    _, theirs, ours = pair("seresnet18")
    x = torch.randn(2, 16, 8, 8, dtype=torch.float64)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(ours.layer2, fullgraph=True)
        found = []
        for block in (theirs.layer2, compiled):
            leaf = x.clone().requires_grad_()
            y = block(leaf)
            (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
            found.append((y, leaf.grad))
    for what, a, b in zip(("y", "gradient of x"), found[1], found[0]):
        assert_close(a, b, what)
    assert_close(gradients(ours.layer2), gradients(theirs.layer2), "gradients")
    torch._dynamo.reset()


def test_export(name: str) -> None:
    """torch.export has our operators in its graph, and gives the same numbers."""
    entry, theirs, ours = pair(name)
    args, kwargs = entry.inputs(torch.float64, torch.Generator().manual_seed(1))
    with torch.no_grad():
        program = torch.export.export(ours, args, kwargs)
    ops = {str(node.target) for node in program.graph.nodes if "dlkernels" in str(node.target)}
    assert any(NETS[name] in op for op in ops), ops
    args, kwargs = entry.inputs(torch.float64, torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert_close(tensors(program.module()(*args, **kwargs))[0], tensors(theirs(*args, **kwargs))[0])
