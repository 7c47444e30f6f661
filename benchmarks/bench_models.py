"""Training steps of real models, of each library one: eager, swapped, with our AdamW; six of them compiled, too.

Each is measured by `python -m dlkernels bench --model NAME` in a process of its own, with the allocator as users have
it. The libraries that bring the models are needed; a model whose library is missing is
skipped. Run as a script, this file is that command, with torchvision made importable beside a CPU build of torch:

python benchmarks/bench_models.py --model seresnet50 --share
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAMILY = "models"
# Of the table, and what brings each; `dlkernels.cli._models` knows the rest.
MODELS = {
    "seresnet50": "timm",
    "efficientnet_b0": "timm",
    "regnety_008": "timm",
    "resnet50_gn": "timm",
    "unet2d": "diffusers",
    "segresnet": "monai",
    "tv_efficientnet_b0": "torchvision",
    "hf_regnety_008": "transformers",
    "smp_unet": "segmentation_models_pytorch",
}
NOT_COMPILED = ("tv_efficientnet_b0", "hf_regnety_008", "smp_unet")  # which takes minutes for each


@pytest.mark.parametrize("name", list(MODELS))
def test_training_step(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, keep: Callable[[str, dict[str, Any]], None]
) -> None:
    if importlib.util.find_spec(MODELS[name]) is None:
        pytest.skip(f"needs real: {MODELS[name]} is not installed")
    option, path = request.config.getoption, tmp_path / f"{name}.json"
    command = [sys.executable, __file__, "--model", name, "--share", "--json", str(path)]
    command += ["--device", option("--bench-device"), "--rounds", str(option("--model-rounds"))]
    command += ["--no-compile"] if option("--no-compile") or name in NOT_COMPILED else []
    command += ["--size", str(option("--model-size"))] if option("--model-size") else []
    done = subprocess.run(command, capture_output=True, text=True)
    if not path.is_file():
        pytest.fail((done.stderr or done.stdout).strip()[-1500:], pytrace=False)
    record = json.loads(path.read_text())["records"][0]
    keep(FAMILY, record)
    if record["refused"]:
        pytest.fail(f"REFUSED: {record['refused']}", pytrace=False)


def main(arguments: list[str]) -> int:
    """`python -m dlkernels bench` where torchvision may be a wheel for another build of torch."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "real")]
    importlib.import_module("_libraries")
    from dlkernels.__main__ import main

    return main(["bench", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
