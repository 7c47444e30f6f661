"""Tensors of more than 2^31 elements on a GPU: what lies behind that limit is computed like what lies before it.

pytest tests/test_cuda_large.py --device cuda
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dlkernels as dk

LIMIT = 1 << 31
NEEDED = 40 << 30  # bytes of GPU memory
TAIL = 4096

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _enough_memory() -> Iterator[None]:
    free, _ = torch.cuda.mem_get_info()
    if free < NEEDED:
        pytest.skip(f"by design: needs {NEEDED >> 30} GB of free GPU memory, there are {free >> 30}")
    yield
    torch.cuda.empty_cache()


def random(*shape: int) -> Tensor:
    """bfloat16, made in place: a float32 copy of it would be twice as large."""
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Half precision beside a reference in float32."""
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert error < 1e-2, f"relative error {error:.1e}"


def test_sigmoid_focal_loss() -> None:
    x = random(LIMIT + TAIL).requires_grad_()
    t = torch.randint(2, x.shape, dtype=torch.uint8, device="cuda")
    dk.sigmoid_focal_loss(x, t, reduction="sum").backward()
    for part in (slice(0, TAIL), slice(LIMIT - TAIL, LIMIT), slice(LIMIT, LIMIT + TAIL)):
        small = x.detach()[part].clone().requires_grad_()
        dk.sigmoid_focal_loss(small, t[part], reduction="sum").backward()
        assert_near(x.grad[part], small.grad)
    del x.grad
    rows = dk.sigmoid_focal_loss(x.detach(), t)
    assert_near(rows[LIMIT:], dk.sigmoid_focal_loss(x.detach()[LIMIT:].clone(), t[LIMIT:].clone()))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_group_norm(last: bool) -> None:
    c, s = 64, LIMIT // 64 + TAIL
    x = random(1, s, c).mT if last else random(1, c, s)
    x = x.unsqueeze(-1) if not last else x.unflatten(2, (s, 1))
    x.requires_grad_()
    y = dk.group_norm(x, 32, activation="silu")
    dy = torch.empty_like(y).normal_()
    (dx,) = torch.autograd.grad(y, x, dy)
    group = x.detach()[:, -2:].float().requires_grad_()
    expected = F.silu(F.group_norm(group, 1))
    assert_near(y[:, -2:], expected)
    assert_near(dx[:, -2:], torch.autograd.grad(expected, group, dy[:, -2:].float())[0])


def test_squeeze_excite() -> None:
    n, c, s = 2, 128, LIMIT // 256 + TAIL
    x = random(n, c, s, 1).requires_grad_()
    w1, w2 = random(8, c), random(c, 8)
    y = dk.squeeze_excite(x, w1, None, w2, None)
    dy = torch.empty_like(y).normal_()
    (dx,) = torch.autograd.grad(y, x, dy)
    sample = x.detach()[1:].clone().requires_grad_()
    expected = dk.squeeze_excite(sample, w1, None, w2, None)
    assert_near(y[1:], expected)
    assert_near(dx[1:], torch.autograd.grad(expected, sample, dy[1:])[0])


def test_center_loss() -> None:
    d = 2048
    n = LIMIT // d + 3
    x = random(n, d).requires_grad_()
    centers = torch.randn(1000, d, device="cuda")
    labels = torch.randint(1000, (n,), device="cuda")
    dk.center_loss(x, labels, centers, reduction="sum").backward()
    assert_near(x.grad[-3:], x.detach()[-3:].float() - centers[labels[-3:]])
    before = centers.clone()
    dk.update_centers_(centers, x.detach(), labels, alpha=0.5)
    rows = (labels == 999).nonzero().flatten()
    step = (x.detach()[rows].double() - before[999].double()).sum(0) * 0.5 / (1 + len(rows))
    assert_near(centers[999], before[999] + step.float())


def test_weight_norm() -> None:
    v, g = random(8, LIMIT // 8 + TAIL), random(8, 1)
    w = dk.weight_norm(v, g, 0)
    row = v[-1].float()
    assert_near(w[-1], g[-1].float() * row / row.norm())


def test_adamw() -> None:
    p = random(LIMIT + TAIL).requires_grad_()
    p.grad = torch.empty_like(p).normal_()
    small = p.detach()[-TAIL:].clone().requires_grad_()
    small.grad = p.grad[-TAIL:].clone()
    for parameter in (p, small):
        dk.optim.AdamW([parameter], lr=0.1).step()
    assert torch.equal(p.detach()[-TAIL:], small.detach())
