"""The whole way of an eager call: from the public function through C++ to the launches, and back through its node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dlkernels as dk
from dlkernels import _backend, _library
from dlkernels.testing import assert_bitwise

N, C, S = 6, 8, (5, 7)


def parameter(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


LABELS = torch.arange(N) % 5

# name -> (call of an input (N, C, 5, 7) or (N, C), launches forward, launches backward)
CALLS: dict[str, tuple[Callable[[Tensor], Tensor], int, int]] = {
    "group_norm": (lambda x: dk.group_norm(x, 4, parameter(C), parameter(C), activation="silu"), 1, 2),
    "group_norm without parameters": (lambda x: dk.group_norm(x, 4), 1, 1),
    "group_norm residual": (lambda x: dk.group_norm(x, 4, residual=x, activation="relu"), 1, 1),
    "squeeze_excite": (lambda x: dk.squeeze_excite(x, parameter(4, C), None, parameter(C, 4), None), 1, 2),
    "sigmoid_focal_loss mean": (lambda x: dk.sigmoid_focal_loss(x, (x > 0).float(), reduction="mean"), 1, 1),
    "sigmoid_focal_loss none": (lambda x: dk.sigmoid_focal_loss(x, (x > 0).long()), 1, 1),
    "center_loss": (lambda x: dk.center_loss(x.flatten(1), LABELS, torch.ones(5, C * 35)), 1, 1),
    "center_loss none": (lambda x: dk.center_loss(x.flatten(1), LABELS, torch.ones(5, C * 35), reduction="none"), 1, 1),
    "center_loss centers": (lambda x: dk.center_loss(x.flatten(1), LABELS, parameter(5, C * 35)), 1, 3),
    "CenterLoss with update": (lambda x: dk.nn.CenterLoss(5, C * 35)(x.flatten(1), LABELS), 3, 1),
    "weight_norm": (lambda x: dk.weight_norm(x.flatten(1), parameter(N, 1), 0), 1, 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_launches(name: str, twin: Any) -> None:
    """One launch forward, at most two backward; more only where the centers move or want a gradient too."""
    call, forward, backward = CALLS[name]
    x = torch.randn(N, C, *S, requires_grad=True)
    y = call(x)
    assert len(twin.launches()) == forward
    assert type(y.grad_fn).__name__ in ("CppFunction", "CloneBackward0"), "the node is C++"
    y.backward(torch.ones_like(y))
    assert len(twin.launches()) <= backward
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", CALLS)
def test_is_what_goes_through_python(name: str, twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits as by way of the autograd functions in Python."""
    x = torch.randn(N, C, *S)

    def run() -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        y = CALLS[name][0](leaf)
        y.backward(torch.full_like(y, 0.5))
        return y.detach(), leaf.grad

    in_cpp = run()
    monkeypatch.setattr(_backend, "fast", lambda x: None)
    twin.launches()
    for actual, expected in zip(in_cpp, run(), strict=True):
        assert_bitwise(actual, expected)
    assert twin.launches(), "Python called the kernels too"


def test_a_kept_graph_keeps_its_gradient(twin: Any) -> None:
    x = torch.randn(40, 9).half().requires_grad_()
    loss = dk.sigmoid_focal_loss(x, (x > 0).float(), reduction="mean")
    first, second = (torch.autograd.grad(loss, x, torch.tensor(g), retain_graph=True)[0] for g in (3.0, 1.0))
    torch.testing.assert_close(first, 3 * second, rtol=2e-3, atol=1e-6)
    last = torch.autograd.grad(loss, x)[0]
    assert_bitwise(last, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


def test_second_derivatives_leave_for_the_reference(twin: Any) -> None:
    x = torch.randn(3, 4, 5, requires_grad=True)
    y = dk.group_norm(x, 2)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    exact = x.detach().double().requires_grad_()
    (dx,) = torch.autograd.grad(torch.nn.functional.group_norm(exact, 2).square().sum(), exact, create_graph=True)
    expected = torch.autograd.grad(dx.square().sum(), exact)[0]
    torch.testing.assert_close(second, expected.float(), rtol=1e-3, atol=1e-4)


def test_ops_without_cuda_kernels_say_so(twin: Any) -> None:
    with pytest.raises(RuntimeError, match="no CUDA C\\+\\+ kernel exists for this op: Triton serves it"):
        dk.softmax_focal_loss(torch.randn(3, 4), torch.tensor([0, 1, 2]))
    with pytest.raises(RuntimeError, match="Triton serves it"):
        dk.stochastic_depth(torch.randn(3, 4), 0.5)


def test_float64_goes_to_triton(twin: Any) -> None:
    if not _backend.interpreting():
        pytest.skip("needs interpreter: TRITON_INTERPRET=1 is not set")
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    y = dk.group_norm(x, 2)
    torch.testing.assert_close(y, torch.nn.functional.group_norm(x, 2))
    assert twin.launches() == []


def test_a_refused_launch_names_op_shape_and_device(twin: Any) -> None:
    """Here the machine is one that no plan was made for: it has 16 bytes of shared memory."""
    twin.module.machine(90, 132, 16, 16, 2048, 50 << 20)
    with pytest.raises(RuntimeError, match=r"squeeze_excite_fwd on input \(2, 64, 50\) on cuda:0 \(sm_90\): "):
        dk.squeeze_excite(torch.randn(2, 64, 50), torch.randn(8, 64), None, torch.randn(64, 8), None)


def test_library_has_every_op_of_the_extension(twin: Any) -> None:
    assert {*_library.OPS, *_library.MUTATIONS, *_library.LIST_OPS, "adamw", "sgdw"} >= _backend.CUDA_OPS
