"""The parts of the demo: data, losses, and training with parity at every step. A later loss joins in LOSSES."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import dlkernels as dk

from . import _eager
from ._budget import Parity, Sample, compare
from ._demo_model import BATCH, CLASSES, SEED, make_model, make_optimizer

TAIL = 0.75  # class c keeps the share TAIL^c of its training images
TEST_PER_CLASS = 40
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
    """Train a network of this kind with a loss and an optimizer of this kind: same weights, draws and batches.

    The eager run compares both losses at every step.
    """
    device = data.train_x.device.type
    run, model = Run(loss, kind), make_model(device, kind)
    optimizer, function = make_optimizer(model, kind), getattr(loss, kind)
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)  # for the rows that stochastic depth drops
    count = min(EVALUATIONS, max(1, steps // 8))  # a short run is not spent on the test set
    marks = {round(steps * (i + 1) / count) for i in range(count)}
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


def training_step(data: Data, loss: Loss, kind: str) -> Callable[[], None]:
    """A step to call again and again, on one batch; ranges for the profiler around its parts."""
    model = make_model(data.train_x.device.type, kind)
    function = loss.fused if kind == "fused" else loss.eager  # a swap changes the model, not a loss function
    optimizer = make_optimizer(model, kind)
    x, y = data.train_x[:BATCH], data.train_y[:BATCH]
    mark = torch.profiler.record_function

    def step() -> None:
        optimizer.zero_grad()
        with mark("model forward"):
            logits = model(x)
        with mark("loss forward"):
            value = function(logits, y)
        with mark("backward"):
            value.backward()
        optimizer.step()  # marks itself

    return step
