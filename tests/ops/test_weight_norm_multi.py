"""All weights of a model at once: the operators on lists, and the hook that hands their results to the layers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from _layers import backend_fixture
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dlkernels as dk
from dlkernels import _backend
from dlkernels.nn.utils.parametrizations import fuse_weight_norm, init_data_dependent, weight_norm
from dlkernels.ops import _weight_norm_multi as multi
from dlkernels.testing import assert_bitwise, poisoned_empty

pytestmark = pytest.mark.needs("cpp")
served_by = backend_fixture("weight_norm", plain=False, interpreted=True, ops="weight_norm_multi")


@pytest.fixture
def backend(served_by: str) -> Iterator[str]:
    with poisoned_empty():
        yield served_by


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The operators on lists that were called, and on how many weights."""
    made: list[tuple[str, int]] = []
    kernel = multi._kernel

    def counted(name: str, *lists: list[Tensor]) -> Any:
        made.append((name.removeprefix("weight_norm_multi_"), len(lists[0])))
        return kernel(name, *lists)

    monkeypatch.setattr(multi, "_kernel", counted)
    return made


# (shape of v, dim)
LAYERS = [
    ((4, 3, 3, 3), 0),
    ((8, 16), 0),
    ((5, 7), 1),
    ((3, 4, 5), 1),
    ((6, 5), None),
    ((5,), 0),
    ((1, 1), 0),
    ((40, 3, 2), 2),
    ((3, 300), 0),
    ((0, 4), 0),
]


def weights(dtypes: tuple[torch.dtype, ...], device: torch.device) -> tuple[list[Tensor], ...]:
    torch.manual_seed(0)
    v, g, dw = [], [], []
    for i, (shape, dim) in enumerate(LAYERS):
        dtype = dtypes[i % len(dtypes)]
        form = [1] * len(shape) if dim is None else [n if d == dim else 1 for d, n in enumerate(shape)]
        v.append((torch.randn(shape) + 0.2).to(dtype).to(device))
        g.append(torch.randn(form).to(dtype).to(device))
        dw.append((torch.randn(shape) + 0.5).to(dtype).to(device))
    v[0] = v[0].contiguous(memory_format=torch.channels_last)
    return v, g, dw


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors]


DTYPES = [(torch.float32,), (torch.float32, torch.bfloat16, torch.float16), (torch.float64, torch.float32)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=["float32", "mixed", "double"])
def test_is_the_layers_by_themselves(dtypes: tuple[torch.dtype, ...], backend: str, device: torch.device) -> None:
    """Bitwise, values and gradients, and every layout and dtype."""
    v, g, dw = weights(dtypes, device)
    dims = [d for _, d in LAYERS]
    a, b = leaves(v), leaves(g)
    together = multi.weight_norm_multi(a, b, dims)
    grads = torch.autograd.grad(together, a + b, dw)
    c, d = leaves(v), leaves(g)
    alone = [dk.weight_norm(x, y, dim) for x, y, dim in zip(c, d, dims, strict=True)]
    for x, y in zip(together, alone, strict=True):
        assert_bitwise(x, y)
        assert x.stride() == y.stride() and x.dtype == y.dtype
    for x, y in zip(grads, torch.autograd.grad(alone, c + d, dw), strict=True):
        assert_bitwise(x, y)


def test_second_derivatives(device: torch.device) -> None:
    v, g, _ = weights((torch.float64,), device)
    keep = [i for i, x in enumerate(v) if x.numel() and x.numel() < 100]
    dims = [LAYERS[i][1] for i in keep]

    def whole(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(multi.weight_norm_multi(tensors[: len(keep)], tensors[len(keep) :], dims))

    inputs = tuple(leaves([v[i] for i in keep] + [g[i] for i in keep]))
    assert torch.autograd.gradcheck(whole, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(whole, inputs, fast_mode=True)


def test_operators(device: torch.device) -> None:
    """The operators by themselves: schema, fake, gradients."""
    torch.manual_seed(0)
    shapes = ((1, 3, 4), (2, 3, 1))
    v = [torch.randn(s, dtype=torch.float64, device=device, requires_grad=True) for s in shapes]
    g = [torch.randn(s[1], dtype=torch.float64, device=device, requires_grad=True) for s in shapes]
    w, norm = torch.ops.dlkernels.weight_norm_multi_fwd(v, g)
    assert all(x.requires_grad for x in w) and not any(x.requires_grad for x in norm)
    dw = [torch.randn_like(x) for x in w]
    grads = torch.autograd.grad(w, v + g, dw, create_graph=True)
    single = [torch.ops.dlkernels.weight_norm_fwd(a, b)[0] for a, b in zip(v, g, strict=True)]
    expected = torch.autograd.grad(single, v + g, dw, create_graph=True)
    for x, y in zip(grads, expected, strict=True):
        assert_bitwise(x, y)
    second = torch.autograd.grad([x.sum() for x in grads], v + g)
    for x, y in zip(second, torch.autograd.grad([x.sum() for x in expected], v + g), strict=True):
        assert torch.allclose(x, y)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dlkernels.weight_norm_multi_fwd.default, (v, g), test_utils=checks)
    torch.library.opcheck(
        torch.ops.dlkernels.weight_norm_multi_bwd.default,
        (dw, [x.detach() for x in v], [x.detach() for x in g], norm),
        test_utils=checks,
    )


# The hook -------------------------------------------------------------------------------------------------------------


def network(**more: Any) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        weight_norm(nn.Conv1d(3, 8, 3, padding=1)),
        nn.Tanh(),
        weight_norm(nn.ConvTranspose1d(8, 4, 3, padding=1), dim=1),
        nn.Tanh(),
        weight_norm(nn.Linear(9, 6), dim=None),
        weight_norm(nn.Linear(6, 5)),
        nn.BatchNorm1d(4),
    ).to(**more)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("original0"):
                p.mul_(1 + torch.rand_like(p))
    return net


def data(device: torch.device) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 9, device=device)


def step(net: nn.Module, x: Tensor) -> list[Tensor]:
    net.zero_grad()
    y = net(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]


def assert_same(some: list[Tensor], others: list[Tensor]) -> None:
    for a, b in zip(some, others, strict=True):
        assert_bitwise(a.detach(), b.detach())


def clean(net: nn.Module) -> bool:
    return all(m._given is None for m in net.modules() if hasattr(m, "_given"))


def test_a_step_is_the_same(backend: str, device: torch.device, calls: list[Any]) -> None:
    """Outputs and gradients bitwise; one operator forward, one backward; nothing is left behind."""
    net, x = network(device=device), data(device)
    plain = step(copy.deepcopy(net), x)
    handle = fuse_weight_norm(net)
    assert handle.layers == 4
    calls.clear()
    for _ in range(2):
        assert_same(step(net, x), plain)
        assert clean(net)
    assert calls == [("fwd", 4), ("bwd", 4)] * 2


def test_changed_parameters_are_seen(device: torch.device, calls: list[Any]) -> None:
    """Optimizer steps, and changes under no_grad, with and without gradients."""
    net, x = network(device=device), data(device)
    other = copy.deepcopy(net)
    fuse_weight_norm(net)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (net, other)]
    for _ in range(3):
        assert_same(step(net, x), step(other, x))
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            assert_bitwise(net(x), other(x))
    assert calls.count(("fwd", 4)) == 6


def test_without_gradients_weights_are_kept(backend: str, device: torch.device, calls: list[Any]) -> None:
    net, x = network(device=device).eval(), data(device)
    other = copy.deepcopy(net)
    fuse_weight_norm(net)
    with torch.no_grad():
        for _ in range(3):
            assert_bitwise(net(x), other(x))
    with torch.inference_mode():
        assert_bitwise(net(x), other(x))
    assert calls == [("fwd", 4)]
    with torch.no_grad():
        for m in (net, other):
            m[0].parametrizations.weight.original1.mul_(-1)
            m[4].parametrizations.weight.original0.add_(1)
        assert_bitwise(net(x), other(x))
    assert calls == [("fwd", 4), ("fwd", 2)]  # the two that changed


def test_train_and_eval(device: torch.device) -> None:
    net, x = network(device=device), data(device)
    other = copy.deepcopy(net)
    fuse_weight_norm(net)
    for mode in (False, True, False):
        assert_same(step(net.train(mode), x), step(other.train(mode), x))


def test_remove(device: torch.device, calls: list[Any]) -> None:
    net, x = network(device=device), data(device)
    before = step(net, x)
    handle = fuse_weight_norm(net)
    handle.remove()
    handle.remove()
    assert_same(step(net, x), before)
    assert not calls and not net._forward_pre_hooks and not net._forward_hooks and not net._forward_hooks_always_called


def test_copies_are_fused_and_apart(device: torch.device, calls: list[Any]) -> None:
    """A deepcopy takes the hook along, for its own layers."""
    net, x = network(device=device), data(device)
    handle = fuse_weight_norm(net)
    expected = step(net, x)
    twin = copy.deepcopy(net)
    handle.remove()
    with torch.no_grad():
        net[0].parametrizations.weight.original0.zero_()
    calls.clear()
    assert_same(step(twin, x), expected)
    assert calls == [("fwd", 4), ("bwd", 4)] and clean(twin)
    assert twin.state_dict().keys() == network().state_dict().keys()


def test_partly_frozen(backend: str, device: torch.device, calls: list[Any]) -> None:
    """A frozen layer's weight wants no gradient; v without g, and g without v."""
    net, x = network(device=device), data(device)
    net[0].requires_grad_(False)
    net[2].parametrizations.weight.original1.requires_grad_(False)
    net[4].parametrizations.weight.original0.requires_grad_(False)
    plain = step(copy.deepcopy(net), x)
    fuse_weight_norm(net)
    seen = []
    net[0].register_forward_hook(lambda m, *_: seen.append(m.weight.requires_grad))
    assert_same(step(net, x), plain)
    assert seen == [False] and calls == [("fwd", 4), ("bwd", 3)]
    assert all((p.grad is None) != p.requires_grad for p in net.parameters())
    net.requires_grad_(False)
    assert not net(x).requires_grad


class Branches(nn.Module):
    """One layer twice, one never, one parametrization under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (weight_norm(nn.Linear(4, 4)) for _ in range(3))
        self.same = self.a
        self.fail = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fail:
            raise RuntimeError("stop")
        with torch.no_grad():
            target = self.b(x)
        return self.same(self.a(x)) + self.b(x) - target


def test_shared_and_unused_layers(device: torch.device, calls: list[Any]) -> None:
    net, x = Branches().to(device), torch.randn(3, 4, device=device)
    plain = step(copy.deepcopy(net), x)
    assert fuse_weight_norm(net).layers == 3
    for a, b in zip(step(net, x), plain, strict=True):  # gradients of both uses of a weight are added up first
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert net.c.parametrizations.weight.original0.grad is None
    assert calls == [("fwd", 3), ("bwd", 2)]


def test_a_failed_pass_leaves_nothing(device: torch.device) -> None:
    net, x = Branches().to(device), torch.randn(3, 4, device=device)
    fuse_weight_norm(net)
    net.fail = True
    with pytest.raises(RuntimeError, match="stop"):
        net(x)
    assert clean(net)


def test_nested_models(device: torch.device, calls: list[Any]) -> None:
    net, x = network(device=device), data(device)
    whole = nn.Sequential(net, weight_norm(nn.Linear(5, 2, device=device)))
    plain = step(copy.deepcopy(whole), x)
    fuse_weight_norm(net)
    fuse_weight_norm(whole)
    fuse_weight_norm(whole)
    assert_same(step(whole, x), plain)
    assert calls == [("fwd", 5), ("bwd", 5)] and clean(whole)


def test_a_layer_that_lost_its_parametrization(device: torch.device, calls: list[Any]) -> None:
    net, x = network(device=device), data(device)
    fuse_weight_norm(net)
    torch.nn.utils.parametrize.remove_parametrizations(net[0], "weight")
    plain = step(copy.deepcopy(net), x)
    calls.clear()
    assert_same(step(net, x), plain)
    assert calls == [("fwd", 3), ("bwd", 3)]


@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_in_an_activation_checkpoint(reentrant: bool, device: torch.device) -> None:
    """A checkpointed layer computes its weight in both of its forward passes."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor) -> Tensor:
            x = self.net[1](self.net[0](x))
            x = checkpoint(self.net[2:4], x, use_reentrant=reentrant)
            return self.net[4:](x)

    net, x = Checkpointed().to(device), data(device)
    plain = step(copy.deepcopy(net), x)
    fuse_weight_norm(net)
    assert_same(step(net, x), plain)


def test_other_threads_compute_their_own(device: torch.device) -> None:
    net, x = network(device=device), data(device)
    fuse_weight_norm(net)
    results: list[Any] = []

    def elsewhere(*_: Any) -> None:
        thread = threading.Thread(target=lambda: results.append(net[5].weight))
        thread.start()
        thread.join()
        results.append(net[5].weight)

    net[1].register_forward_hook(elsewhere)
    net(x)
    assert results[0] is not results[1]
    assert_bitwise(results[0].detach(), results[1].detach())


def test_transforms_and_compile(device: torch.device, calls: list[Any]) -> None:
    """functional_call gives other parameters, torch.func and torch.compile see the layers by themselves."""
    net, x = network(device=device).eval(), data(device)
    fused = copy.deepcopy(net)
    fuse_weight_norm(fused)
    other = {k: p.detach() * 1.5 for k, p in net.named_parameters()}
    call = torch.func.functional_call
    assert_bitwise(call(fused, other, (x,)), call(net, other, (x,)))

    def loss(parameters: dict[str, Tensor], m: nn.Module) -> Tensor:
        return call(m, parameters, (x,)).square().sum()

    for a, b in zip(*(torch.func.grad(loss)(other, m).values() for m in (fused, net)), strict=True):
        assert_bitwise(a, b)
    calls.clear()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), net(x), atol=1e-6)
    assert not calls


def test_second_order_training(device: torch.device) -> None:
    """A gradient penalty through the fused weights."""
    net, x = network(device=device, dtype=torch.float64).eval(), data(device).double()
    fused = copy.deepcopy(net)
    fuse_weight_norm(fused)

    def penalty(m: nn.Module) -> list[Tensor]:
        m.zero_grad()
        grads = torch.autograd.grad(m(x).square().sum(), list(m.parameters()), create_graph=True)
        sum(g.square().sum() for g in grads).backward()
        return [p.grad for p in m.parameters()]

    for a, b in zip(penalty(fused), penalty(net), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_initialisation_and_the_hook(device: torch.device) -> None:
    nets = [nn.Sequential(weight_norm(nn.Linear(3, 8)), nn.ReLU(), weight_norm(nn.Linear(8, 4))) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    fuse_weight_norm(nets[0])
    x = torch.randn(20, 3)
    assert_bitwise(init_data_dependent(nets[0], x), init_data_dependent(nets[1], x))


def test_reference_and_strangers(device: torch.device, calls: list[Any]) -> None:
    net, x = network(device=device), data(device)
    fuse_weight_norm(net)
    with dk.backend("reference"):
        net(x)
    assert not calls
    with pytest.raises(ValueError, match="`model` must have a layer"):
        fuse_weight_norm(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))


@pytest.mark.needs("twin")
def test_one_launch() -> None:
    """50 layers, rows and columns, aligned or not: a launch forward, a launch backward."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(weight_norm(nn.Linear(5 + i % 3, 5 + (i + 1) % 3), dim=(0, 1, None)[i % 3]) for i in range(50))
    )
    plain = step(net, torch.randn(2, 5))
    fuse_weight_norm(net)
    with dk.backend("cuda"), poisoned_empty():
        _backend.TWIN.take_launches()
        torch.manual_seed(0)
        actual = step(net, torch.randn(2, 5))
        launches = _backend.TWIN.take_launches()
    assert [x["op"] for x in launches] == ["weight_norm_multi_fwd", "weight_norm_multi_bwd"]
    assert len(plain) == len(actual)
