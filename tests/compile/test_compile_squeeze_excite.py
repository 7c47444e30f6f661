"""torch.compile(backend="dlkernels"): squeeze-and-excitation in the ways that libraries write it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _compiled import assert_equal, check, check_left, compiled, found, leaf, left, needs_kernels, randomised
from torch import Tensor, nn

pytestmark = needs_kernels

N, C, R = 2, 8, 3


class Convolutions(nn.Module):
    """Two 1x1 convolutions on the pooled map."""

    def __init__(self, act: Any = F.relu, gate: Any = torch.sigmoid, rank: int = 2, **options: Any) -> None:
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.fc1, self.fc2 = conv(C, R, 1, **options), conv(R, C, 1)
        self.act, self.gate, self.dims = act, gate, tuple(range(2, 2 + rank))
        randomised(self)

    def pool(self, x: Tensor) -> Tensor:
        return x.mean(self.dims, keepdim=True)

    def scale(self, x: Tensor) -> Tensor:
        return self.gate(self.fc2(self.act(self.fc1(self.pool(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale(x)


class Pooled(Convolutions):
    """With an adaptive pool, and the scale first."""

    def pool(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x) * x


class Viewed(nn.Module):
    """Two linear layers between views."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(C, R, bias), nn.ReLU(inplace=True), nn.Linear(R, C, bias), nn.Sigmoid())
        self.pool = nn.AdaptiveAvgPool2d(1)
        randomised(self)

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        y = self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1)
        return x * y.expand_as(x)


class Flattened(Viewed):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.view(x.shape[0], C, -1).mean(dim=-1))[:, :, None, None]


class Unsqueezed(Viewed):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(x, self.fc(x.mean((-1, -2))).unsqueeze(2).unsqueeze(3))


class ChannelsInside(Viewed):
    """(N, H, W, C)"""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean((1, 2), keepdim=True))


class Tokens(Viewed):
    """(B, N, C)"""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x.mean(1)).unsqueeze(1)


class OneLayer(nn.Module):
    def __init__(self, gate: Any = F.hardsigmoid) -> None:
        super().__init__()
        self.fc, self.gate = nn.Conv2d(C, C, 1), gate
        randomised(self)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc(x.mean((2, 3), keepdim=True)))


def hard_sigmoid(z: Tensor) -> Tensor:
    return F.relu6(z + 3) / 6


IMAGE = (N, C, 3, 5)
WRITTEN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "convolutions": (Convolutions, IMAGE, "relu, sigmoid"),
    "1-D": (lambda: Convolutions(rank=1), (N, C, 5), "relu, sigmoid"),
    "3-D": (lambda: Convolutions(rank=3), (N, C, 2, 3, 4), "relu, sigmoid"),
    "silu": (lambda: Convolutions(F.silu), IMAGE, "silu, sigmoid"),
    "in place": (lambda: Convolutions(nn.SiLU(inplace=True)), IMAGE, "silu, sigmoid"),
    "gelu": (lambda: Convolutions(F.gelu), IMAGE, "gelu, sigmoid"),
    "leaky_relu": (lambda: Convolutions(nn.LeakyReLU()), IMAGE, "leaky_relu, sigmoid"),
    "relu gate": (lambda: Convolutions(nn.LeakyReLU(), F.relu), IMAGE, "leaky_relu, relu"),
    "relu6 gate": (lambda: Convolutions(gate=hard_sigmoid), IMAGE, "relu, hard_sigmoid"),
    "clamp gate": (lambda: Convolutions(gate=lambda z: (z + 3).clamp(0, 6) / 6), IMAGE, "relu, hard_sigmoid"),
    "no bias": (lambda: Convolutions(bias=False), IMAGE, "relu, sigmoid"),
    "padding same": (lambda: Convolutions(padding="same"), IMAGE, "relu, sigmoid"),
    "stride": (lambda: Convolutions(stride=2), IMAGE, "relu, sigmoid"),
    "adaptive pool": (Pooled, IMAGE, "relu, sigmoid"),
    "views": (Viewed, IMAGE, "relu, sigmoid"),
    "views, no bias": (lambda: Viewed(bias=False), IMAGE, "relu, sigmoid"),
    "flattened": (Flattened, IMAGE, "relu, sigmoid"),
    "unsqueezed": (Unsqueezed, IMAGE, "relu, sigmoid"),
    "channels inside": (ChannelsInside, (N, 3, 5, C), "relu, sigmoid"),
    "tokens": (Tokens, (N, 5, C), "relu, sigmoid"),
    "one layer": (lambda: OneLayer(hard_sigmoid), IMAGE, "one layer, hard_sigmoid"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_written(name: str) -> None:
    make, shape, what = WRITTEN[name]
    check(make(), leaf(*shape), replaced=[f"squeeze_excite ({what})"])


@pytest.mark.parametrize("make", [lambda: Convolutions(gate=F.hardsigmoid), OneLayer], ids=["two", "one"])
def test_hardsigmoid(make: Callable[[], nn.Module]) -> None:
    """torch's backward pass of hardsigmoid has 1/6 in float32, whatever the dtype: 3e-8 relative."""
    model, x = make(), leaf(*IMAGE)
    made = compiled(model)
    assert_equal(model, made, (x,), limit=1e-7)
    assert torch.allclose(made(x), model(x), rtol=1e-13, atol=1e-13)
    assert len(found()) == 1 and "hard_sigmoid" in found()[0]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_memory_format(memory_format: torch.memory_format) -> None:
    x = leaf(*IMAGE).detach().to(memory_format=memory_format).requires_grad_()
    check(Convolutions(), x, replaced=["squeeze_excite (relu, sigmoid)"])


AFTER: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = {
    "y + r": (lambda y, x, r: y + r, " + residual"),
    "y += r": (lambda y, x, r: y.add_(r), " + residual"),
    "y + x": (lambda y, x, r: y + x, " + residual"),
    "relu(y + r)": (lambda y, x, r: F.relu(y + r), " + residual + relu"),
    "relu_(y += r)": (lambda y, x, r: F.relu(y.add_(r), inplace=True), " + residual + relu"),
    "relu(y)": (lambda y, x, r: F.relu(y), ""),
    "y + y": (lambda y, x, r: y + y, ""),
    "y + (N, C, 1, 1)": (lambda y, x, r: y + r[:, :, :1, :1], ""),
}


@pytest.mark.parametrize("name", AFTER)
def test_after(name: str) -> None:
    after, what = AFTER[name]
    se = Convolutions()

    def function(x: Tensor, r: Tensor) -> Tensor:
        return after(se(x), x, r)

    check(function, leaf(*IMAGE), leaf(*IMAGE, seed=1), replaced=[f"squeeze_excite (relu, sigmoid){what}"])


def test_between_contiguous_convolutions() -> None:
    """The compiler runs these in channels_last, and would copy for the kernel: measured to be slower."""
    model = nn.Sequential(nn.Conv2d(3, C, 3).double(), Convolutions())
    x = leaf(N, 3, 6, 6)
    check_left(model, x, reason="not faster between contiguous convolutions (0.95x)")
    check(model, x, replaced=["squeeze_excite (relu, sigmoid)"], all=True)
    model = model.to(memory_format=torch.channels_last)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    check(model, x, replaced=["squeeze_excite (relu, sigmoid)"])


def test_cse_plus_sse() -> None:
    """x cSE(x) + x sSE(x): the second product is the residual of the first."""
    se, spatial = Convolutions(), nn.Conv2d(C, 1, 1).double()
    check(
        lambda x: se(x) + x * torch.sigmoid(spatial(x)),
        leaf(*IMAGE),
        replaced=["squeeze_excite (relu, sigmoid) + residual"],
        all=True,
    )


# Near misses ----------------------------------------------------------------------------------------------------------


class Grouped(Convolutions):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(C, 4, 1, groups=2).double(), nn.Conv2d(4, C, 1).double()


class Wide(Convolutions):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(C, R, 3, padding=1).double()


class Padded(Convolutions):
    """What is read is the padding: only the bias comes through."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(C, R, 1, padding=1, stride=3).double()


class Normalised(Convolutions):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(R).double().eval()

    def scale(self, x: Tensor) -> Tensor:
        return self.gate(self.fc2(self.act(self.bn(self.fc1(self.pool(x))))))


class OneAxis(Convolutions):
    """A 3-D input pooled over two axes: a gate per slice."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc2(self.act(self.fc1(x.mean((2, 3)).flatten(2)[..., None])))).view(N, C, 1, 1, 4)


class Max(Convolutions):
    def pool(self, x: Tensor) -> Tensor:
        return x.amax((2, 3), keepdim=True)


class OtherInput(Convolutions):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 1) * self.scale(x)


class OnePlus(Convolutions):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.scale(x))


class Shared(Convolutions):
    def forward(self, x: Tensor) -> Any:
        s = self.scale(x)
        return x * s, s * 2


class SharedPool(Convolutions):
    def forward(self, x: Tensor) -> Any:
        s = self.pool(x)
        return x * self.gate(self.fc2(self.act(self.fc1(s)))), s * 2


class InPlace(Convolutions):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        x *= self.scale(x.detach())
        return x


class Changed(Convolutions):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        s = self.scale(x.detach())
        x += 1
        return x.detach() * s


NEAR: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str | None]] = {
    "groups": (Grouped, IMAGE, "1x1"),
    "3x3": (Wide, IMAGE, "1x1"),
    "padding": (Padded, IMAGE, "1x1"),
    "another pool": (Max, IMAGE, None),
    "another input": (OtherInput, IMAGE, None),
    "1 + gate": (OnePlus, IMAGE, "between"),
    "tanh gate": (lambda: Convolutions(gate=torch.tanh), IMAGE, "tanh"),
    "batch norm": (Normalised, IMAGE, "batch_norm"),
    "hardswish": (lambda: Convolutions(F.hardswish), IMAGE, "hardswish"),
    "another slope": (lambda: Convolutions(nn.LeakyReLU(0.2)), IMAGE, "slope"),
    "tanh approximation": (lambda: Convolutions(nn.GELU(approximate="tanh")), IMAGE, "tanh"),
    "another hard sigmoid": (lambda: Convolutions(gate=lambda z: (0.2 * z + 0.5).clamp(0, 1)), IMAGE, "between"),
    "gate used twice": (Shared, IMAGE, "used elsewhere"),
    "pool used twice": (SharedPool, IMAGE, "used elsewhere"),
    "product in place": (InPlace, IMAGE, None),
    "changed between": (Changed, IMAGE, None),
    "a gate per slice": (OneAxis, (N, C, 2, 3, 4), None),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_miss(name: str) -> None:
    make, shape, reason = NEAR[name]
    check_left(make(), leaf(*shape), reason=reason)


def test_autocast_runs_the_layers_in_another_dtype() -> None:
    model = Convolutions().float()

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    made = compiled(function)
    assert_equal(function, made, (leaf(*IMAGE, dtype=torch.float32),), limit=1e-6)
    assert not found() and any("autocast" in reason for reason in left())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = Convolutions().to(dtype)
    x = leaf(*IMAGE).detach().to(dtype).requires_grad_()
    made = compiled(model)
    assert_equal(model, made, (x,), limit=16 * torch.finfo(dtype).eps)
    assert found() == ["squeeze_excite (relu, sigmoid)"]


def test_dynamic_shapes() -> None:
    model = Convolutions(F.silu)
    made = compiled(lambda x: model(x) + x, dynamic=True)
    for n, h in ((2, 3), (3, 5), (7, 4)):
        assert_equal(lambda x: model(x) + x, made, (leaf(n, C, h, 5),))
    assert found() == ["squeeze_excite (silu, sigmoid) + residual"]


def test_dynamic_views() -> None:
    model = Viewed()
    made = compiled(model, dynamic=True)
    for n, h in ((2, 3), (3, 5)):
        assert_equal(model, made, (leaf(n, C, h, 5),))
    assert found() == ["squeeze_excite (relu, sigmoid)"]


@pytest.mark.slow
def test_inductor() -> None:
    model = Convolutions(F.silu)
    check(lambda x: model(F.relu(x)), leaf(*IMAGE), replaced=["squeeze_excite (silu, sigmoid)"], then="inductor")
