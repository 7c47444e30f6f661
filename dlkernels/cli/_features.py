"""`python -m dlkernels demo --features`: what the losses that shape features do to them, in a picture and in numbers.

A small network is trained on scikit-learn's digits from one seed with each loss, twice: so that its features can be
drawn as they are, and with 64 features. The picture is in `_features_picture.py`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dlkernels as dk

from .. import _backend
from ..testing import num_threads
from . import need, output_folder, print_table

CLASSES, SEED = 10, 0
STEPS, QUICK_STEPS = 480, 60
BATCH = 128
TEST_PER_CLASS, QUICK_TEST_PER_CLASS = 70, 25
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 1e-2
PLANE, WIDE = 2, 64  # features of the network whose features are drawn, and of the one that t-SNE shows
THRESHOLD = 0.85
CENTER_WEIGHT, ISLAND_WEIGHT, TARGET_MEAN, TARGET_STD = 0.1, 10.0, 40.0, 1.0
RATIO = (
    "mean distance of a feature to the mean of its class / mean distance between two class means, on the test images"
)
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]  # of features (N, D), outputs (N, 10) and labels (N,)

# Losses ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """A loss to train with. `own_space`: it acts on the outputs, which are its features where those are drawn."""

    name: str
    formula: str
    make: Callable[[int], Objective]  # of the number of features
    own_space: bool = False


def softmax(dim: int) -> Objective:
    return lambda features, outputs, labels: dk.cross_entropy(outputs, labels)


def center(dim: int) -> Objective:
    return _beside_softmax(dk.nn.CenterLoss(CLASSES, dim))


def island(dim: int) -> Objective:
    return _beside_softmax(dk.nn.IslandLoss(CLASSES, dim, ISLAND_WEIGHT))


def gccs(dim: int) -> Objective:
    return lambda features, outputs, labels: dk.gccs_loss(
        outputs, labels, target_mean=TARGET_MEAN, target_std=TARGET_STD
    )


def _beside_softmax(loss: nn.Module) -> Objective:
    return lambda features, outputs, labels: (
        dk.cross_entropy(outputs, labels) + CENTER_WEIGHT * loss.to(features.device)(features, labels)
    )


LOSSES = (
    Loss("Softmax", "cross entropy (CE)", softmax),
    Loss("Center loss", f"CE + {CENTER_WEIGHT:g} · center loss", center),
    Loss("Island loss", f"CE + {CENTER_WEIGHT:g} · island loss, λ₁ = {ISLAND_WEIGHT:g}", island),
    Loss("GCCS loss", f"GCCS alone, μ = {TARGET_MEAN:g}, σ = {TARGET_STD:g}", gccs, own_space=True),
)

# Data and network -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """scikit-learn's digits, images (N, 1, 8, 8): equally many of each class for testing, all others for training."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load_data(device: str, test_per_class: int = TEST_PER_CLASS) -> Data:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
    members = [order[labels[order] == c] for c in range(CLASSES)]
    test = torch.cat([m[:test_per_class] for m in members])
    train = torch.cat([m[test_per_class:] for m in members])
    images = (images - images[train].mean()) / images[train].std()
    return Data(*(t.to(device) for t in (images[train], labels[train], images[test], labels[test])))


class Network(nn.Module):
    """Two convolutions and a hidden layer; then the features, and outputs that are a linear map of them.

    Without a head the outputs are the features.
    """

    def __init__(self, dim: int, head: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1), nn.PReLU(),
            nn.Conv2d(24, 32, 3, stride=2, padding=1), nn.PReLU(), nn.Flatten(),
            nn.Linear(512, 128), nn.PReLU(), nn.Linear(128, dim),
        )  # fmt: skip
        self.head = nn.Linear(dim, CLASSES) if head else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return features, self.head(features)


# Training and measures ------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What one network makes of the test images."""

    loss: Loss
    features: Tensor  # (N, D)
    accuracy: float
    ratio: float
    cosine: float
    shown: Tensor | None = None  # (N, 2), what is drawn

    @property
    def dim(self) -> int:
        return self.features.shape[1]


def train(loss: Loss, dim: int, data: Data, steps: int, on_step: Callable[[], None]) -> Result:
    """Every run starts from one seed and sees the same batches."""
    torch.manual_seed(SEED)
    own = loss.own_space and dim < CLASSES
    network = Network(CLASSES if own else dim, head=not own).to(data.train_x.device)
    objective = loss.make(dim)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        index = torch.randperm(len(data.train_y), generator=generator)[:BATCH].to(data.train_y.device)
        labels = data.train_y[index]
        optimizer.zero_grad()
        objective(*network(data.train_x[index]), labels).backward()
        optimizer.step()
        schedule.step()
        on_step()
    with torch.no_grad():
        features, outputs = (t.double() for t in network.eval()(data.test_x))
    accuracy = (outputs.argmax(1) == data.test_y).double().mean().item()
    return Result(loss, features, accuracy, intra_inter_ratio(features, data.test_y), cosine(features, data.test_y))


def _rate(done: float) -> float:
    """Share of the learning rate: a rise over the first fifth, then half a cosine down to zero."""
    return min(5 * done + 0.05, 1.0) * (0.5 + 0.5 * math.cos(math.pi * done))


def class_means(features: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([features[labels == c].mean(0) for c in range(CLASSES)])


def intra_inter_ratio(features: Tensor, labels: Tensor) -> float:
    """Mean distance of a feature to the mean of its class / mean distance between two class means."""
    means = class_means(features, labels)
    return ((features - means[labels]).norm(dim=1).mean() / F.pdist(means).mean()).item()


def cosine(features: Tensor, labels: Tensor) -> float:
    """The largest cosine between the means of two classes, seen from the origin."""
    unit = F.normalize(class_means(features, labels))
    return (unit @ unit.T).fill_diagonal_(-1.0).max().item()


def decagon(dim: int) -> Tensor:
    """(dim, 2): orthogonal projection onto the plane in which the unit vectors end on a regular polygon, 0 at noon."""
    angle = math.pi / 2 - 2 * math.pi * torch.arange(dim, dtype=torch.float64) / dim
    return math.sqrt(2 / dim) * torch.stack((angle.cos(), angle.sin()), 1)


def in_the_plane(result: Result) -> Tensor:
    features = result.features.cpu()
    return features if result.dim == PLANE else features @ decagon(result.dim)


def through_tsne(result: Result) -> Tensor:
    from sklearn.manifold import TSNE

    shown = TSNE(init="pca", learning_rate="auto", random_state=SEED, n_jobs=1).fit_transform(result.features.cpu())
    return torch.tensor(shown)


# The command ----------------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, device: str) -> int:
    need("demo --features", "rich", "matplotlib", "sklearn")
    from threadpoolctl import threadpool_limits

    from ._features_picture import draw

    output_folder(args.out)
    steps = args.steps or (QUICK_STEPS if args.quick else STEPS)
    start = time.perf_counter()
    with num_threads(1), threadpool_limits(1):  # all of it is small
        data = load_data(device, QUICK_TEST_PER_CLASS if args.quick else TEST_PER_CLASS)
        _describe(data, steps, device)
        plane, wide = _train_all(data, steps)
        _print(plane, wide)
        targets, path = TARGET_MEAN * decagon(CLASSES), args.out / "features.png"
        picture = draw(plane, wide, targets, data.test_y.cpu(), path)
    numbers = args.out / "features.json"
    numbers.write_text(json.dumps(_numbers(plane, wide, data, steps, device), indent=2, ensure_ascii=False) + "\n")
    print(f"picture  {picture}\nnumbers  {numbers}")
    failures = _failures(plane, wide, args.quick)
    verdict = "FAIL: " + "; ".join(failures) if failures else "PASS"
    print(f"{verdict} ({time.perf_counter() - start:.0f} s)")
    return 1 if failures else 0


def _describe(data: Data, steps: int, device: str) -> None:
    backend = _backend.state.forced or _backend.default_for(device)
    print(f"data     digits 8 x 8, {len(data.train_y)} for training, {len(data.test_y)} for testing")
    print(
        f"device   {device}; fused ops run on {backend}; {steps} steps of {BATCH} images for each network", end="\n\n"
    )


def _train_all(data: Data, steps: int) -> tuple[list[Result], list[Result]]:
    """Results of the two rows of the picture."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        jobs = [(loss, dim) for dim in (PLANE, WIDE) for loss in LOSSES]
        tasks = [progress.add_task(f"{loss.name}, {_space(loss, dim)}", total=steps) for loss, dim in jobs]
        embedding = progress.add_task("t-SNE", total=len(LOSSES))
        results = []
        for (loss, dim), task in zip(jobs, tasks, strict=True):
            results.append(train(loss, dim, data, steps, lambda task=task: progress.advance(task)))
        plane, wide = results[: len(LOSSES)], results[len(LOSSES) :]
        for result in plane:
            result.shown = in_the_plane(result)
        for result in wide:
            result.shown = through_tsne(result)
            progress.advance(embedding)
    return plane, wide


def _space(loss: Loss, dim: int) -> str:
    return f"{CLASSES}-D" if loss.own_space and dim < CLASSES else f"{dim}-D"


def _print(plane: list[Result], wide: list[Result]) -> None:
    rows = []
    for a, b in zip(plane, wide, strict=True):
        space = "" if a.dim == PLANE else f" ({a.dim}-D)"
        rows.append((a.loss.name, a.loss.formula, f"{a.accuracy:.1%}{space}", f"{a.ratio:.3f}{space}",
                     f"{b.accuracy:.1%}", f"{b.ratio:.3f}", f"{b.cosine:.2f}"))  # fmt: skip
    print_table(
        "Features of the test images",
        ("loss", "trained with", ">accuracy 2-D", ">ratio 2-D", ">accuracy 64-D", ">ratio 64-D", ">cosine 64-D"),
        rows,
        f"ratio: {RATIO}.\ncosine: the largest between the means of two classes; island loss pushes it down.\n"
        f"GCCS acts on the network's {CLASSES} outputs, as many as there are classes: a linear map of {WIDE} features, "
        f"as the logits of the other rows.\n{CLASSES} vertices of a simplex do not fit into a plane: in its {PLANE}-D "
        "columns the outputs are the features.",
    )


def _numbers(plane: list[Result], wide: list[Result], data: Data, steps: int, device: str) -> dict[str, Any]:
    def measured(result: Result) -> dict[str, float]:
        return {"dim": result.dim, "accuracy": result.accuracy, "ratio": result.ratio, "largest_cosine": result.cosine}

    losses = [
        {"name": a.loss.name, "formula": a.loss.formula, "plane": measured(a), "tsne": measured(b)}
        for a, b in zip(plane, wide, strict=True)
    ]
    return {
        "seed": SEED, "steps": steps, "batch": BATCH, "device": device,
        "train_images": len(data.train_y), "test_images": len(data.test_y),
        "ratio": RATIO, "largest_cosine": "between the means of two classes, on the test images", "losses": losses,
    }  # fmt: skip


def _failures(plane: list[Result], wide: list[Result], quick: bool) -> list[str]:
    failures = []
    for row in (plane, wide):
        plain, with_centers = row[:2]
        if with_centers.ratio >= plain.ratio:
            failures.append(
                f"center loss, {with_centers.dim}-D: ratio {with_centers.ratio:.3f}, expected less than softmax's "
                f"{plain.ratio:.3f}"
            )
        for each in row:
            if not quick and each.accuracy <= THRESHOLD:
                failures.append(f"{each.loss.name}, {each.dim}-D: accuracy {each.accuracy:.1%}, "
                                f"expected more than {THRESHOLD:.0%}")  # fmt: skip
    return failures
