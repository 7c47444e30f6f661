"""Bytes that the kernels move, counted in the interpreter, against the least that the formula needs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dlkernels._traffic import eager_traffic, interpreter_traffic
from dlkernels.triton import (
    center_loss,
    focal_loss,
    gccs_loss,
    group_norm,
    region_biased_loss,
    squeeze_excite,
    stored_grad,
)

MEAN = 1


def sigmoid_eager(x: Tensor, t: Tensor) -> Tensor:
    """As the widespread implementation computes it."""
    p = torch.sigmoid(x)
    ce = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    p_t = p * t + (1 - p) * (1 - t)
    return ((0.25 * t + 0.75 * (1 - t)) * ce * (1 - p_t) ** 2).mean()


def softmax_eager(x: Tensor, t: Tensor) -> Tensor:
    ce = F.cross_entropy(x, t, reduction="none")
    return ((1 - torch.exp(-ce)) ** 2 * ce).mean()


def report(name: str, ours: int, least: int, eager: int | None = None) -> None:
    line = f"{name}: {ours} bytes, {ours / least:.3f} of the minimum"
    print(line + (f", eager moves {eager / ours:.1f} times as much" if eager else ""))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("rows", (37, 33))
def test_sigmoid_mean_moves_three_passes(rows: int, dtype: torch.dtype) -> None:
    """Read x, read t, write dx; the backward pass with a factor of 1 reads two numbers per program."""
    x = torch.randn(rows, 1001).to(dtype)
    t = (torch.rand(rows, 1001) < 0.2).to(dtype)
    with interpreter_traffic(x=x, t=t) as traffic:
        _, grad, divisor = focal_loss.sigmoid_focal_loss_fwd(x, t, None, 0.25, 2.0, -100, MEAN, True, True)
        stored_grad.scale_stored_grad_(grad, torch.ones(()), divisor if dtype == torch.float16 else None)
    least = 3 * x.numel() * x.element_size()
    assert traffic.by_tensor == {"x": [least // 3, 0], "t": [least // 3, 0]}

    z = x.detach().requires_grad_()
    with eager_traffic() as eager:
        sigmoid_eager(z, t).backward()
    report(f"sigmoid mean {dtype}", traffic.total, least, eager.total)
    assert least <= traffic.total <= 1.05 * least
    assert eager.total > 10 * traffic.total


def test_sigmoid_class_indices_are_not_expanded() -> None:
    x, t = torch.randn(50, 91), torch.randint(-1, 91, (50,))
    with interpreter_traffic(t=t) as traffic:
        focal_loss.sigmoid_focal_loss_fwd(x, t, None, 0.25, 2.0, -100, MEAN, True, True)
    least = 2 * x.numel() * 4 + t.numel() * 8
    report("sigmoid class indices", traffic.total, least)
    assert least <= traffic.total <= 1.05 * least


@pytest.mark.parametrize("shape", ((40, 1000), (2, 21, 700)))
def test_softmax_mean_moves_two_passes(shape: tuple[int, ...]) -> None:
    """Read x, write dx, while a row fits the tile; labels are read by the divisor and by the rows."""
    x = torch.randn(shape)
    t = torch.randint(0, shape[1], shape[:1] + shape[2:])
    with interpreter_traffic(x=x) as traffic:
        _, grad, _ = focal_loss.softmax_focal_loss_fwd(x, t, None, None, 2.0, 0.0, -100, False, MEAN, True, True)
        stored_grad.scale_stored_grad_(grad, torch.ones(()), None)
    least = 2 * x.numel() * 4 + t.numel() * 8
    assert traffic.by_tensor["x"] == [x.numel() * 4, 0]

    z = x.detach().requires_grad_()
    with eager_traffic() as eager:
        softmax_eager(z, t).backward()
    report(f"softmax mean {shape}", traffic.total, least, eager.total)
    assert least <= traffic.total <= 1.05 * least
    assert eager.total > 2 * traffic.total


def test_softmax_probabilities_move_three_passes() -> None:
    x, q = torch.randn(20, 1000), torch.rand(20, 1000)
    with interpreter_traffic(x=x, q=q) as traffic:
        focal_loss.softmax_focal_loss_fwd(x, q, None, None, 2.0, 0.0, -100, False, MEAN, True, True)
    assert traffic.by_tensor == {"x": [x.numel() * 4, 0], "q": [x.numel() * 4, 0]}
    least = 3 * x.numel() * 4
    report("softmax probabilities", traffic.total, least)
    assert least <= traffic.total <= 1.05 * least


@pytest.mark.parametrize("ignored", (False, True))
def test_long_rows_are_read_twice_or_not_at_all(ignored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that does not fit is read by the statistics and by the gradient; one that is left out is not."""
    from dlkernels.triton import _rows

    c = 4097
    monkeypatch.setattr(_rows, "MAX_RESIDENT", 4096)
    x, t = torch.randn(3, c), torch.tensor([5, -100 if ignored else 1, 4096])
    with interpreter_traffic(x=x) as traffic:
        focal_loss.softmax_focal_loss_fwd(x, t, None, None, 2.0, 0.0, -100, False, MEAN, True, True)
    rows = 2 if ignored else 3
    assert traffic.by_tensor["x"] == [2 * rows * c * 4 + rows * 4, 0]  # and the logit of the label


def gccs_eager(z: Tensor, y: Tensor) -> Tensor:
    """Means and variances of the classes by index_add, gathered back to the rows."""
    classes = z.shape[1]
    n = torch.bincount(y, minlength=classes)[:, None]
    mean = torch.zeros(classes, classes).index_add(0, y, z) / n
    v = torch.zeros(classes, classes).index_add(0, y, (z - mean[y]) ** 2) / n
    return 0.5 * (-torch.log(v + 1e-5) - 1 + v + (mean - 40 * torch.eye(classes)) ** 2).sum()


@pytest.mark.parametrize("ignored", (False, True))
def test_gccs_moves_two_passes_and_two_from_the_cache(ignored: bool) -> None:
    """Read z, write dz; a slab of a class is read twice more, to hit L2. Rows that are left out are only written."""
    z, y = torch.randn(90, 130), torch.arange(90) % 3
    counted = 60 if ignored else 90
    with interpreter_traffic(z=z) as traffic:
        _, grad, _ = gccs_loss.gccs_loss_fwd(z, y, 40.0, 1.0, 1e-5, 0.0, 1 if ignored else -100, MEAN, True, True)
        stored_grad.scale_stored_grad_(grad, torch.ones(()), None)
    origins = (2 if ignored else 3) * 130 * 4  # the first row of each class
    assert traffic.by_tensor == {"z": [3 * counted * 130 * 4 + origins, 0]}
    least = (3 * counted + 90) * 130 * 4
    x = z.detach().requires_grad_()
    with eager_traffic() as eager:
        gccs_eager(x, y).backward()
    report(f"gccs, ignored {ignored}", traffic.total, least, eager.total)
    assert least <= traffic.total <= 1.15 * least
    assert eager.total > 2 * traffic.total


@pytest.mark.parametrize("channels_last", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_group_norm_moves_two_and_three_passes(dtype: torch.dtype, channels_last: bool) -> None:
    """While a group fits: forward read x, write y; backward read x, dy, write dx, the activation recomputed."""
    n, c, groups, s = 2, 24, 4, 190
    x, dy = (torch.randn((n, s, c) if channels_last else (n, c, s)).to(dtype) for _ in range(2))
    w, b = torch.randn(c).to(dtype), torch.randn(c).to(dtype)
    options = (groups, 1e-5, 3, channels_last)
    assert group_norm.backward_plan(n, c, groups, s, x.element_size(), channels_last, False).resident
    one = x.numel() * x.element_size()
    with interpreter_traffic(x=x) as forward:
        _, mean, rstd = group_norm.group_norm_fwd(x, w, b, None, None, None, *options)
    assert forward.by_tensor["x"] == [one + n * groups * x.element_size(), 0]  # and the first element of each group
    with interpreter_traffic(x=x, dy=dy) as backward:
        group_norm.group_norm_bwd(dy, x, mean, rstd, w, b, None, None, None, *options)
    assert backward.by_tensor == {"x": [one, 0], "dy": [one, 0]}

    with eager_traffic() as eager:
        leaves = [t.detach().requires_grad_() for t in (x.mT if channels_last else x, w, b)]
        out = F.silu(F.group_norm(leaves[0], groups, *leaves[1:]))
        out.backward(dy.mT if channels_last else dy)
    report(f"group norm + silu {dtype}", forward.total + backward.total, 5 * one, eager.total)
    assert 2 * one <= forward.total <= 2.1 * one
    assert 3 * one <= backward.total <= 3.2 * one
    assert eager.total > 1.5 * (forward.total + backward.total)


def test_group_norm_of_large_groups_reads_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group that does not fit: three passes forward, five backward; of each, one read of x (and dy) is to hit L2."""
    from dlkernels.triton import _group_norm_tiles as tiles

    monkeypatch.setattr(tiles, "MAX_RESIDENT", 1024)
    monkeypatch.setattr(tiles, "MAX_RESIDENT_BACKWARD", 1024)
    x, dy = torch.randn(1, 4, 3000), torch.randn(1, 4, 3000)
    with interpreter_traffic(x=x, dy=dy) as traffic:
        _, mean, rstd = group_norm.group_norm_fwd(x, None, None, None, None, None, 2, 1e-5, 3, False)
        one = x.numel() * 4
        assert 2 * one <= traffic.by_tensor["x"][0] <= 2.02 * one and traffic.total <= 3.05 * one
        forward = traffic.total
        group_norm.group_norm_bwd(dy, x, mean, rstd, None, None, None, None, None, 2, 1e-5, 3, False)
    assert traffic.by_tensor["dy"] == [2 * one, 0] and traffic.total - forward <= 5.05 * one


@pytest.mark.parametrize("channels_last", (False, True))
def test_squeeze_excite_moves_three_and_four_passes(channels_last: bool) -> None:
    """Forward read x twice, write y; backward read x once, dy twice, write dx."""
    n, c, hidden, s = 2, 24, 6, 500
    x, dy = (torch.randn((n, s, c) if channels_last else (n, c, s)) for _ in range(2))
    weights = (torch.randn(hidden, c), torch.randn(hidden), torch.randn(c, hidden), torch.randn(c))
    options = (1, 0, 0, channels_last)
    one = x.numel() * 4
    with interpreter_traffic(x=x) as forward:
        _, *saved = squeeze_excite.squeeze_excite_fwd(x, *weights, None, *options)
    with interpreter_traffic(x=x, dy=dy) as backward:
        squeeze_excite.squeeze_excite_bwd(dy, x, *saved, *weights, None, *options)
    assert forward.by_tensor["x"] == [2 * one, 0]
    assert backward.by_tensor == {"x": [one, 0], "dy": [2 * one, 0]}

    with eager_traffic() as eager:
        z, w1, b1, w2, b2 = (t.detach().requires_grad_() for t in (x.mT if channels_last else x, *weights))
        e = torch.sigmoid(F.linear(torch.relu(F.linear(z.mean(2), w1, b1)), w2, b2))
        (z * e.unsqueeze(-1)).backward(dy.mT if channels_last else dy)
    report("squeeze-and-excitation", forward.total + backward.total, 7 * one, eager.total)
    assert 3 * one <= forward.total <= 3.1 * one
    assert 4 * one <= backward.total <= 4.1 * one
    assert eager.total > 1.5 * (forward.total + backward.total)


def center_eager(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    """As the widespread implementation computes it: the distances of all rows to all centers, then a mask."""
    distances = x.square().sum(1, keepdim=True) + c.square().sum(1) - 2 * x @ c.t()
    return (distances * (y[:, None] == torch.arange(c.shape[0]))).clamp(1e-12, 1e12).sum() / x.shape[0]


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows share programs as in large batches: the interpreter's time goes by programs."""
    from dlkernels.triton import _center_loss_segments

    plan = center_loss.plan
    monkeypatch.setattr(center_loss, "plan", lambda n, *a: plan(n, *a)._replace(block_r=8, programs=-(-n // 8)))
    monkeypatch.setattr(_center_loss_segments, "POSITIONS", 0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.usefixtures("few_programs")
def test_center_loss_and_update_move_three_passes(dtype: torch.dtype) -> None:
    """Read x, write dx; read x by class, move the centers. Labels, their order and the partial sums are the rest."""
    n, d, k = 520, 512, 4
    x, y, c = torch.randn(n, d).to(dtype), torch.randint(0, k, (n,)), torch.randn(k, d).to(dtype)
    one = x.numel() * x.element_size()
    with interpreter_traffic(x=x, c=c) as loss:
        _, grad, _, _ = center_loss.center_loss_fwd(x, y, c, None, False, -100, MEAN, True, False)
        stored_grad.scale_stored_grad_(grad, torch.ones(()), None)
    with interpreter_traffic(x=x) as update:
        center_loss.update_centers_(c, x, y, None, False, 0.5, False, 0.0, -100)
    assert loss.by_tensor["x"] == [one, 0] and update.by_tensor == {"x": [one, 0]}
    gathered = loss.by_tensor["c"][0]  # from the L2; at most a row for a row
    assert gathered <= one

    leaves = [t.detach().requires_grad_() for t in (x, c)]
    with eager_traffic() as eager:
        center_eager(leaves[0], y, leaves[1]).backward()
        counts = torch.zeros_like(c[:, :1]).index_add_(0, y, torch.ones_like(x[:, :1]))
        c.sub_(0.5 * torch.zeros_like(c).index_add_(0, y, c[y] - x) / (1 + counts))
    ours = loss.total + update.total - gathered
    report(f"center loss and update {dtype}", ours, 3 * one, eager.total)
    print(f"passes of N D: {ours / one:.3f}, and {gathered / one:.3f} of centers gathered from the L2")
    assert 3 * one <= ours <= 3.3 * one
    assert eager.total > 3 * ours


@pytest.mark.parametrize("logits", (False, True))
@pytest.mark.usefixtures("few_programs")
def test_sparse_center_loss_moves_four_passes(logits: bool) -> None:
    """Forward read x and A, write dx and dA. Backward with the centers' gradient: x and A once more."""
    n, d = 70, 256
    x, a, c = torch.randn(n, d), torch.rand(n, d), torch.randn(3, d)
    y = torch.randint(0, 3, (n,))
    one = x.numel() * 4
    with interpreter_traffic(x=x, a=a, c=c) as forward:
        center_loss.center_loss_fwd(x, y, c, a, logits, -100, 2, True, False)
    assert forward.by_tensor["x"] == forward.by_tensor["a"] == [one, 0]
    assert 4 * one <= forward.total - forward.by_tensor["c"][0] <= 4.1 * one
    with interpreter_traffic(x=x, a=a, c=c) as backward:
        center_loss.center_loss_bwd(torch.ones(()).expand(n), x, y, c, a, logits, -100, True)
    assert backward.by_tensor["x"] == backward.by_tensor["a"] == [2 * one, 0]
    assert 6 * one <= backward.total - backward.by_tensor["c"][0] <= 6.5 * one


def test_island_reads_the_centers_once() -> None:
    """Pairs: read c; their gradient: read c, write dc; the update: read c twice, write it, and the batch's steps."""
    c, x, y = torch.randn(300, 64), torch.randn(20, 64), torch.arange(20)
    one = c.numel() * 4
    with interpreter_traffic(c=c) as pairs:
        value, total, inverse = center_loss.island_pairs_fwd(c)
    assert pairs.by_tensor["c"] == [one, 0]
    with interpreter_traffic(c=c) as gradient:
        center_loss.island_pairs_bwd(value, c, total, inverse)
    assert gradient.by_tensor["c"] == [one, 0] and gradient.stored == one
    with interpreter_traffic(c=c) as update:
        center_loss.update_centers_(c, x, y, None, False, 0.5, False, 1.0, -100)
    assert update.by_tensor["c"] == [2 * one + x.numel() * 4, one]


@pytest.mark.parametrize("softmax", (False, True))
def test_region_biased_loss_moves_two_passes_and_the_mask(softmax: bool) -> None:
    """Read x where it takes part, and the mask; write dx; the backward pass with a factor of 1 reads two numbers."""
    x, mask = torch.randn(500, 6), torch.rand(500, 6) < 0.5
    mask[:, 0] = True
    options = (0, 0.3, softmax, MEAN, True, True)
    with interpreter_traffic(x=x, mask=mask) as traffic:
        _, grad, _ = region_biased_loss.region_biased_loss_fwd(x, mask, *options)
        stored_grad.scale_stored_grad_(grad, torch.ones(()), None)
    kept = int(mask.sum())
    assert traffic.by_tensor == {"x": [4 * kept, 0], "mask": [mask.numel(), 0]}
    least = 4 * kept + mask.numel() + 4 * x.numel()
    assert least <= traffic.total <= 1.05 * least

    with interpreter_traffic(x=x) as traffic:
        region_biased_loss.region_biased_loss_fwd(x, None, *options)
    assert traffic.by_tensor["x"] == [4 * x.numel(), 0]
    z = x.detach().requires_grad_()
    with eager_traffic() as eager:
        mu = z.softmax(1) if softmax else z
        (0.3 - (mu[:, 1:].amax(1) - mu[:, 0])).clamp(min=0).mean().backward()
    report(f"region biased loss, softmax {softmax}", traffic.total, 8 * x.numel(), eager.total)
    assert 8 * x.numel() <= traffic.total <= 1.05 * 8 * x.numel()
    assert eager.total > 3 * traffic.total


def test_eager_traffic_counts_operands_once() -> None:
    """Views are free, a broadcast operand counts as what lies in memory, in place is a read and a write."""
    x, row = torch.zeros(4, 8), torch.zeros(8)
    with eager_traffic() as traffic:
        y = x.view(8, 4).T
        assert traffic.total == 0
        z = x + row.expand(4, 8)
        assert traffic.total == 4 * (32 + 8 + 32)
        z.add_(1.0)
        assert traffic.total == 4 * (32 + 8 + 32) + 4 * (32 + 32)
    assert y.shape == (4, 8) and traffic.calls["aten.add.Tensor"] == 1


def test_interpreter_traffic_sees_a_second_read() -> None:
    """The count would show a kernel that reads its input twice: the same launch twice counts twice."""
    x, t = torch.randn(300), torch.zeros(300)
    counts = []
    for repeats in (1, 2):
        with interpreter_traffic(x=x) as traffic:
            for _ in range(repeats):
                focal_loss.sigmoid_focal_loss_fwd(x, t, None, 0.25, 2.0, -100, MEAN, False, True)
        counts.append(traffic.by_tensor["x"][0])
    assert counts == [1200, 2400]
