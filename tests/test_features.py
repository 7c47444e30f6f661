"""`python -m dlkernels demo --features`: the files it writes, what its numbers show, its measures."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dlkernels as dk
from dlkernels.__main__ import main
from dlkernels.cli import _features, _features_picture

MISSING = [p for p in ("rich", "matplotlib", "sklearn") if importlib.util.find_spec(p) is None]
needs_packages = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")


@needs_packages
@pytest.mark.slow
def test_features_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "for it"
    assert main(["demo", "--features", "--quick", "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for text in ("Features of the test images", "CE + 0.1 · island loss, λ₁ = 10", "(10-D)", "t-SNE", "PASS"):
        assert text in printed, text
    assert (out / "features.png").read_bytes().startswith(b"\x89PNG")

    numbers = json.loads((out / "features.json").read_text())
    assert numbers["ratio"] == _features.RATIO and numbers["steps"] == _features.QUICK_STEPS
    assert (numbers["train_images"], numbers["test_images"]) == (1547, 250)
    assert [loss["name"] for loss in numbers["losses"]] == ["Softmax", "Center loss", "Island loss", "GCCS loss"]
    for row, dims in (("plane", [2, 2, 2, 10]), ("tsne", [64] * 4)):
        measured = [loss[row] for loss in numbers["losses"]]
        assert [each["dim"] for each in measured] == dims
        for each in measured:
            assert each.keys() == {"dim", "accuracy", "ratio", "largest_cosine"}
            assert 0.3 < each["accuracy"] <= 1 and 0 < each["ratio"] < 1, "better than guessing, whatever the loss"
            assert f"{each['accuracy']:.1%}" in printed and f"{each['ratio']:.3f}" in printed
        softmax, center, island, _ = (each["ratio"] for each in measured)
        assert max(center, island) < 0.95 * softmax, row


@needs_packages
def test_features_are_the_same_again() -> None:
    """A run depends on its loss and its seed alone, and the losses on nothing that another run left."""
    data = _features.load_data("cpu")
    first = _features.train(_features.LOSSES[2], 2, data, 3, lambda: None)
    torch.rand(3)
    again = _features.train(_features.LOSSES[2], 2, data, 3, lambda: None)
    other = _features.train(_features.LOSSES[0], 2, data, 3, lambda: None)
    assert torch.equal(first.features, again.features) and not torch.equal(first.features, other.features)
    train, test = ({tuple(image.tolist()) for image in x.flatten(1)} for x in (data.train_x, data.test_x))
    assert not train & test and torch.bincount(data.test_y).tolist() == [_features.TEST_PER_CLASS] * 10


def test_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three classes of two points, by hand: means (0, 0), (3, 4) and (6, 8), 1 from each of their points."""
    monkeypatch.setattr(_features, "CLASSES", 3)
    labels = torch.tensor([2, 0, 1, 0, 1, 2])
    features = torch.tensor([[0, 0], [3, 4], [6, 8]], dtype=torch.float64)[labels]
    features[:, 0] += torch.tensor([1, 1, 1, -1, -1, -1])
    assert _features.intra_inter_ratio(features, labels) == pytest.approx(1 / ((5 + 5 + 10) / 3))
    assert _features.intra_inter_ratio(7 * features + 3, labels) == pytest.approx(0.15), (
        "neither scale nor origin counts"
    )
    below = features - torch.tensor([0.0, 8.0])  # means (0, -8), (3, -4) and (6, 0): cosines 0.8, 0.6 and 0
    assert _features.cosine(below, labels) == pytest.approx(0.8)
    p = _features.decagon(10)
    assert torch.allclose(p.T @ p, torch.eye(2, dtype=torch.float64)), "an orthogonal projection"
    assert torch.allclose(p.norm(dim=1), torch.tensor(0.2, dtype=torch.float64).sqrt())


@needs_packages
@pytest.mark.parametrize("unwritable", ["a file", "below a file"])
def test_out_that_cannot_be_written(unwritable: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said in one line, before anything is trained."""
    (tmp_path / "taken").write_text("")
    out = tmp_path / "taken" if unwritable == "a file" else tmp_path / "taken" / "folder"
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--features", "--out", str(out)])
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert ended.value.code == 2 and not printed.out
    assert len(lines) == 1 and f"--out {out}: cannot write there: " in lines[0]


def test_failures() -> None:
    """A center loss without effect and a network that has learnt nothing are told."""
    rows = [
        [_features.Result(loss, torch.zeros(1, dim), 0.9, ratio, 0.0)
         for loss, ratio in zip(_features.LOSSES, (0.3, 0.2, 0.2, 0.4), strict=True)]
        for dim in (2, 64)
    ]  # fmt: skip
    assert not _features._failures(*rows, quick=False)
    rows[0][3] = replace(rows[0][3], accuracy=0.5)
    rows[1][1] = replace(rows[1][1], ratio=0.3)
    assert _features._failures(*rows, quick=False) == [
        "GCCS loss, 2-D: accuracy 50.0%, expected more than 85%",
        "center loss, 64-D: ratio 0.300, expected less than softmax's 0.300",
    ]
    assert len(_features._failures(*rows, quick=True)) == 1


def test_ten_colours() -> None:
    assert len(set(_features_picture.COLOURS)) == _features.CLASSES


def test_losses_are_the_packages_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each objective calls, with the weights that the picture states."""
    x, z, y = torch.randn(40, 2), torch.randn(40, 10), torch.arange(40) % 10
    torch.manual_seed(0)
    centers = torch.randn(10, 2)
    want = {
        "Softmax": dk.cross_entropy(z, y),
        "Center loss": dk.cross_entropy(z, y) + 0.1 * dk.center_loss(x, y, centers),
        "Island loss": dk.cross_entropy(z, y) + 0.1 * dk.island_loss(x, y, centers, 10.0),
        "GCCS loss": dk.gccs_loss(z, y, target_mean=40.0, target_std=1.0),
    }
    for loss in _features.LOSSES:
        torch.manual_seed(0)
        objective = loss.make(2)
        assert torch.allclose(objective(x, z, y), want[loss.name]), loss.name
        if loss.name in ("Center loss", "Island loss"):
            assert objective(x, z, y) < want[loss.name], "the centers have moved"
