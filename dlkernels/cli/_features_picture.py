"""The picture of `demo --features`: one column per loss; features as they are above, 64 features by t-SNE below."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Ten colours that stay apart with red-green blindness too (Paul Tol's "muted", and one more); digits name the classes.
COLOURS = ("#332288", "#88ccee", "#44aa99", "#117733", "#999933", "#ddcc77", "#cc6677", "#882255", "#aa4499", "#2f62f5")
GREY = "#555555"
NOTE = """\
scikit-learn's digits, {count} test images. Percentages: accuracy. ratio: mean distance to the mean of the own class /
mean distance between class means, in all 2, 10 or 64 dimensions; less is better. cos: the largest cosine between two
class means, which island loss pushes down. Circles: class means. The scales of the upper panels differ. GCCS acts on as
many numbers as there are classes: above, the network's features are these 10, drawn in a plane in which the means that
it aims at are the corners of a regular decagon; below, they are a linear map of the 64."""
EMPTY = 0.08  # share of a panel left free around the features


def draw(plane: list[Any], wide: list[Any], targets: Tensor, labels: Tensor, path: Path) -> Path:
    """Write the picture. `plane` and `wide`: a result for each loss, of which `shown` is drawn.

    `targets` (K, 2): where the loss that acts on its own space wants the class means.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(plane), figsize=(13, 9.2))
    figure.subplots_adjust(left=0.012, right=0.988, top=0.89, bottom=0.15, wspace=0.06, hspace=0.27)
    side = max(_square(result.shown)[1] for result in wide)
    for above, below, result, tsne in zip(*axes, plane, wide, strict=True):
        _heading(above, result)
        above.set_title(f"{_percent(result)} · ratio {result.ratio:.3f}", fontsize=13.5)
        _dots(above, result.shown, labels, *_square(result.shown))
        _means(above, result.shown, labels)
        above.locator_params(nbins=5)
        above.set_yticks([])  # one scale for both axes
        above.tick_params(labelsize=10.5, length=3, colors=GREY)
        if result.loss.own_space:
            above.fill(*targets.T, fill=False, edgecolor=GREY, linewidth=1.2, zorder=2)
        what = "2 features" if result.dim == 2 else f"{result.dim} features, projected"
        above.set_xlabel(what, fontsize=11.5, color=GREY)

        below.set_title(f"{_percent(tsne)} · ratio {tsne.ratio:.3f} · cos {tsne.cosine:.2f}", fontsize=13.5)
        _dots(below, tsne.shown, labels, _square(tsne.shown)[0], side)
        _names(below, tsne.shown, labels)
        below.set_xticks([])
        below.set_yticks([])
        below.set_xlabel(f"{tsne.dim} features, t-SNE", fontsize=11.5, color=GREY)
    figure.text(
        0.012,
        0.105,
        textwrap.fill(NOTE.format(count=len(labels)), 155),
        fontsize=11.5,
        color=GREY,
        va="top",
        linespacing=1.4,
    )
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return path


def _square(shown: Tensor) -> tuple[tuple[float, float], float]:
    """Middle and side of the square that holds them."""
    low, high = shown.min(0).values, shown.max(0).values
    x, y = ((low + high) / 2).tolist()
    return (x, y), (high - low).max().item() * (1 + 2 * EMPTY)


def _dots(axes: Any, shown: Tensor, labels: Tensor, middle: tuple[float, float], side: float) -> None:
    """A dot for each test image, in a square panel."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # no class covers another
    colours = [COLOURS[c] for c in labels[order]]
    axes.scatter(*shown[order].T, s=14, c=colours, linewidths=0, alpha=0.8)
    axes.set_xlim(middle[0] - side / 2, middle[0] + side / 2)
    axes.set_ylim(middle[1] - side / 2, middle[1] + side / 2)
    axes.set_aspect("equal")
    for spine in axes.spines.values():
        spine.set_color("#bbbbbb")


def _means(axes: Any, shown: Tensor, labels: Tensor) -> None:
    """A circle with the class's digit at the mean of its features."""
    for c, colour in enumerate(COLOURS):
        mean = shown[labels == c].mean(0).tolist()
        axes.scatter(*mean, s=150, c="white", edgecolors=colour, linewidths=2, alpha=0.95, zorder=3)
        axes.text(*mean, str(c), ha="center", va="center_baseline", fontsize=11.5, fontweight="bold", zorder=4)


def _names(axes: Any, shown: Tensor, labels: Tensor) -> None:
    """The class's digit above most of its dots."""
    from matplotlib.patheffects import withStroke

    for c in range(len(COLOURS)):
        x, y = shown[labels == c].T
        axes.annotate(str(c), (x.median().item(), y.quantile(0.88).item()), (0, 5), textcoords="offset points",
                      ha="center", fontsize=12.5, fontweight="bold",
                      path_effects=[withStroke(linewidth=2.5, foreground="white")])  # fmt: skip


def _heading(axes: Any, result: Any) -> None:
    for text, height, options in (
        (result.loss.name, 1.225, {"fontsize": 18, "fontweight": "bold"}),
        (result.loss.formula, 1.145, {"fontsize": 12.5, "color": GREY}),
    ):
        axes.text(0.5, height, text, transform=axes.transAxes, ha="center", **options)


def _percent(result: Any) -> str:
    return f"{100 * result.accuracy:.1f} %"
