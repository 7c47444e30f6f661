"""The parts of the demo: data, model, losses, training with parity at every step, timings. A later op joins in LOSSES
(what is trained with it) and `timing_cases` (what is timed)."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import dlkernels as dk

from . import _eager
from ._budget import Parity, Sample, compare

CLASSES, BATCH, SEED = 10, 64, 0
TAIL = 0.75  # class c keeps the share TAIL^c of its training images
TEST_PER_CLASS = 40
LEARNING_RATE = 2e-3
EVALUATIONS = 20
LossFunction = Callable[[Tensor, Tensor], Tensor]

# Data -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """scikit-learn's digits: a long-tailed training set and a balanced test set; images (N, 1, 8, 8)."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def counts(self) -> Tensor:
        return torch.bincount(self.train_y, minlength=CLASSES)


def load_data(device: str) -> Data:
    """Hold out TEST_PER_CLASS images of every class first, then thin the rest out to a long tail."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target).long()
    generator = torch.Generator().manual_seed(SEED)
    train, test = [], []
    for c in range(CLASSES):
        members = (labels == c).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        test.append(members[:TEST_PER_CLASS])
        rest = members[TEST_PER_CLASS:]
        train.append(rest[: round(len(rest) * TAIL**c)])
    chosen, held_out = torch.cat(train), torch.cat(test)
    images = (images - images[chosen].mean()) / images[chosen].std()
    return Data(*(t.to(device) for t in (images[chosen], labels[chosen], images[held_out], labels[held_out])))


# Model ----------------------------------------------------------------------------------------------------------------


def make_model(device: str) -> nn.Module:
    """MONAI's ResNet, small enough for 8 x 8 images; the same weights at every call."""
    from monai.networks.nets import ResNet

    torch.manual_seed(SEED)
    return ResNet(
        block="basic", layers=[1, 1, 1, 1], block_inplanes=[8, 16, 32, 64], spatial_dims=2, n_input_channels=1,
        conv1_t_size=3, conv1_t_stride=1, no_max_pool=True, num_classes=CLASSES,
    ).to(device)  # fmt: skip


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


# Losses ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """A loss of (logits, labels) as people write it in plain PyTorch, and the fused one that takes its place."""

    name: str
    eager: LossFunction
    fused: LossFunction


def focal(data: Data) -> Loss:
    """Balanced softmax focal loss, gamma = 2: alpha_c = N / (K n_c), as rare classes need."""
    counts = data.counts
    alpha = counts.sum() / (CLASSES * counts.float())
    eager = functools.partial(_eager.softmax_focal_loss, alpha=alpha)
    return Loss("focal", eager, dk.nn.SoftmaxFocalLoss(alpha).to(alpha.device))


def cross_entropy(data: Data) -> Loss:
    return Loss("cross entropy", nn.functional.cross_entropy, dk.nn.CrossEntropyLoss())


LOSSES: list[Callable[[Data], Loss]] = [focal, cross_entropy]


# Training and parity --------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One training run. `parity`: (loss, gradient) of the worst step each, and its number; eager runs only."""

    loss: Loss
    kind: str  # "eager" or "fused"
    losses: list[float] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    parity: dict[str, tuple[int, Parity]] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    logits: Tensor | None = None
    labels: Tensor | None = None


def train(loss: Loss, kind: str, data: Data, steps: int, on_step: Callable[[], None]) -> Run:
    """Train from the same weights over the same batches. The eager run compares both losses at every step."""
    device = data.train_x.device.type
    run, model = Run(loss, kind), make_model(device)
    optimizer, function = make_optimizer(model), getattr(loss, kind)
    generator = torch.Generator().manual_seed(SEED)
    marks = {round(steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    for step in range(1, steps + 1):
        index = torch.randint(len(data.train_y), (BATCH,), generator=generator).to(device)
        labels = data.train_y[index]
        logits = model(data.train_x[index])
        value = function(logits, labels)
        if kind == "eager":
            check_step(run, step, logits.detach(), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        run.losses.append(value.item())
        if step in marks:
            run.recall = recall(model, data)
            run.accuracy.append((step, sum(run.recall) / CLASSES))
        on_step()
    run.logits, run.labels = logits.detach(), labels
    return run


def check_step(run: Run, step: int, logits: Tensor, labels: Tensor) -> None:
    """Both losses and their gradients on the same logits, against float64."""
    sample = Sample(lambda x: run.loss.fused(x, labels), lambda x: run.loss.eager(x, labels), logits)
    for what, parity in zip(("loss", "gradient"), compare([sample]), strict=True):
        if what not in run.parity or parity.ratio > run.parity[what][1].ratio:
            run.parity[what] = (step, parity)
        if parity.ratio > 1:
            run.violations.append(
                f"{run.loss.name}, step {step}: {what} error {parity.error:.2e}, allowed {parity.allowed:.2e}"
            )


def recall(model: nn.Module, data: Data) -> list[float]:
    """Share of each class's test images that are recognised; its mean is the balanced accuracy."""
    model.eval()
    with torch.no_grad():
        right = model(data.test_x).argmax(1) == data.test_y
    model.train()
    return [right[data.test_y == c].float().mean().item() for c in range(CLASSES)]


# Timings --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds per call of the eager and the fused form, and where the case comes from."""

    name: str
    eager: float
    fused: float
    kind: str = "loss"  # "loss" or "step"

    @property
    def speedup(self) -> float:
        return self.eager / self.fused


def timing_cases(data: Data, logits: Tensor, labels: Tensor) -> Iterator[tuple[str, Loss, Tensor, Tensor]]:
    """(name, loss, logits, targets): the training batch, one at the scale of ImageNet, one of a dense detector."""
    device, generator = logits.device, torch.Generator().manual_seed(SEED)
    pair = [make(data) for make in LOSSES]
    for loss in pair:
        yield f"{loss.name}, this batch {BATCH} x {CLASSES}", loss, logits, labels
    x = (2 * torch.randn(4096, 1000, generator=generator)).to(device)
    y = torch.randint(1000, (4096,), generator=generator).to(device)
    for loss in (Loss("focal", _eager.softmax_focal_loss, dk.softmax_focal_loss), pair[1]):
        yield f"{loss.name}, 4096 x 1000", loss, x, y
    x = (2 * torch.randn(1 << 20, generator=generator)).to(device)
    y = (torch.rand(1 << 20, generator=generator) < 0.02).float().to(device)
    mean = {"reduction": "mean"}
    sigmoid = Loss(
        "sigmoid focal",
        functools.partial(_eager.sigmoid_focal_loss, **mean),
        functools.partial(dk.sigmoid_focal_loss, **mean),
    )
    yield "sigmoid focal, 1M elements (dense detector)", sigmoid, x, y


def time_losses(data: Data, logits: Tensor, labels: Tensor, seconds: float) -> Iterator[Timing]:
    """Forward + backward of every case, about `seconds` each."""
    for name, loss, x, target in timing_cases(data, logits, labels):
        yield Timing(name, *interleaved(_forward_backward(loss.eager, x, target),
                                        _forward_backward(loss.fused, x, target), seconds))  # fmt: skip


def time_step(data: Data, loss: Loss, seconds: float) -> Timing:
    """A whole training step: model, loss, backward, optimizer."""
    return Timing(
        f"whole training step ({loss.name})",
        *interleaved(training_step(data, loss.eager), training_step(data, loss.fused), seconds),
        kind="step",
    )


def training_step(data: Data, loss: LossFunction) -> Callable[[], None]:
    """A step to call again and again, on one batch; ranges for the profiler around its parts."""
    model = make_model(data.train_x.device.type)
    optimizer = make_optimizer(model)
    x, y = data.train_x[:BATCH], data.train_y[:BATCH]
    mark = torch.profiler.record_function

    def step() -> None:
        optimizer.zero_grad()
        with mark("model forward"):
            logits = model(x)
        with mark("loss forward"):
            value = loss(logits, y)
        with mark("backward"):
            value.backward()
        with mark("optimizer"):
            optimizer.step()

    return step


def _forward_backward(loss: LossFunction, x: Tensor, target: Tensor) -> Callable[[], None]:
    x = x.detach().clone().requires_grad_(True)

    def call() -> None:
        x.grad = None
        loss(x, target).backward()

    return call


def interleaved(eager: Callable[[], None], fused: Callable[[], None], seconds: float) -> tuple[float, float]:
    """The fastest of many rounds of each, taken in turns: neighbours and clocks hit both alike."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def round_of(call: Callable[[], None], repeat: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(repeat):
            call()
        synchronize()
        return (time.perf_counter() - start) / repeat

    calls = (eager, fused)
    repeats = []
    for call in calls:
        round_of(call, 3)
        repeats.append(max(1, round(2e-3 / round_of(call, 3))))  # a round of about 2 ms, or one call
    best = [float("inf"), float("inf")]
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 5 or time.perf_counter() < end:
        best = [min(b, round_of(c, r)) for b, c, r in zip(best, calls, repeats, strict=True)]
        rounds += 1
    return best[0], best[1]
