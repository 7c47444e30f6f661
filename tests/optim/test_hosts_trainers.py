"""The optimizers under Lightning, Hugging Face's Trainer and accelerate: what torch's makes in the same host.

No model or data comes from elsewhere: configurations are made here, and small.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _hosts import KINDS, Given, Make, assert_trains_alike, flat, gradients
from torch import Tensor, nn
from torch.optim import lr_scheduler

import dlkernels as dk
from dlkernels.testing import assert_bitwise, unmodified

pytestmark = [pytest.mark.needs("hosts"), pytest.mark.filterwarnings("ignore")]
both = pytest.mark.parametrize("kind", KINDS)
STEPS = 6


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, no settings of the user, and nothing left of the run before."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY"):
        monkeypatch.setenv(name, "1")
    for name in [n for n in os.environ if n.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


# Lightning ------------------------------------------------------------------------------------------------------------


def lightning_fit(
    make: Make, dtype: torch.dtype, options: dict[str, Any], bad: int | None = None, **trainer: Any
) -> Any:
    """Some steps of a module whose gradients are given. Gives it and its optimizer."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.given = Given(dtype)
            self.seen: list[int] = []

        def training_step(self, batch: Tensor, number: int) -> Tensor:
            loss = self.given(gradients(number, dtype))
            self.seen.append(number)
            return loss * torch.inf if number == bad else loss

        def configure_optimizers(self) -> Any:
            optimizer = make(self.given.groups(), **options)
            schedule = lr_scheduler.OneCycleLR(optimizer, 0.1, STEPS + 1)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = Module()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = pl.Trainer(max_epochs=1, accelerator="cpu", devices=1, enable_model_summary=False, **quiet, **trainer)
    run.fit(module, torch.utils.data.DataLoader(torch.zeros(STEPS, 1)))
    assert module.seen == list(range(STEPS))
    return module.given, run.optimizers[0]


def scaled() -> list[Any]:
    from lightning.pytorch.plugins import MixedPrecision

    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=512.0))]


@both
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("mixed", [False, True], ids=["float32", "16-mixed"])
def test_lightning(kind: str, clip: float | None, mixed: bool) -> None:
    """The step evaluates the model; the host clips, also between unscaling and the step; infinities skip the step."""

    def run(make: Make, dtype: torch.dtype) -> Any:
        more = {"plugins": scaled(), "bad": 2} if mixed else {}
        return lightning_fit(make, dtype, KINDS[kind].options, gradient_clip_val=clip, **more)

    (_, ours), _ = assert_trains_alike(kind, run)
    if kind == "adamw":
        assert {float(s["step"]) for s in ours.state.values()} == {STEPS - 1.0 if mixed else STEPS}


@both
def test_lightning_does_not_clip_what_is_unscaled_in_the_step(kind: str) -> None:
    """With `fused_unscale=True` Lightning says so, and trains without clipping."""
    options = dict(KINDS[kind].options)
    fused = {"fused_unscale": True}
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        lightning_fit(KINDS[kind].ours, torch.float32, {**options, **fused}, gradient_clip_val=0.5, plugins=scaled())

    def run(make: Make, dtype: torch.dtype) -> Any:
        more = fused if make is KINDS[kind].ours and dtype == torch.float32 else {}
        return lightning_fit(make, dtype, {**options, **more}, bad=2, plugins=scaled())

    assert_trains_alike(kind, run)


@both
def test_lightning_fabric(kind: str) -> None:
    """Fabric makes a class of its own out of the optimizer's."""
    from lightning.fabric import Fabric

    def run(make: Make, dtype: torch.dtype) -> Any:
        fabric = Fabric(accelerator="cpu", devices=1)
        bare = Given(dtype)
        model, optimizer = fabric.setup(bare, make(bare.groups(), **KINDS[kind].options))
        assert isinstance(optimizer, make)
        for step in range(STEPS):
            optimizer.zero_grad()
            fabric.backward(model(gradients(step, dtype)))
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
        return bare

    assert_trains_alike(kind, run)


# Hugging Face's Trainer -----------------------------------------------------------------------------------------------


def classifier(dtype: torch.dtype) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(2)
    sizes = {"vocab_size": 13, "hidden_size": 8, "intermediate_size": 12, "max_position_embeddings": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**sizes, **heads, **off)).to(dtype)


def sentences() -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(4)
    ids, labels = torch.randint(13, (24, 5), generator=draw), torch.randint(3, (24,), generator=draw)
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


def hugging_face(
    make: Make, dtype: torch.dtype, options: dict[str, Any], folder: Path, by_class: bool, stop: int | None = None
) -> Any:
    """Six steps of Trainer; with `stop` in two runs, the second from the checkpoint of the first."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_save = state.global_step == stop
            control.should_training_stop |= state.global_step == stop

    def trainer(*callbacks: Any) -> Any:
        model = classifier(dtype)
        one = {"optimizer_cls_and_kwargs": (make, options)} if by_class else {}
        if not by_class:
            one = {"optimizers": (make(model.parameters(), **options), None)}
        args = TrainingArguments(
            output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, warmup_steps=2, max_grad_norm=0.1, learning_rate=options["lr"],
            gradient_accumulation_steps=2, logging_strategy="no", weight_decay=options.get("weight_decay", 0.0),
        )  # fmt: skip
        return Trainer(model, args, train_dataset=sentences(), callbacks=list(callbacks), **one)

    run = trainer(*([Stop()] if stop else []))
    run.train()
    if stop:
        assert run.state.global_step == stop
        run = trainer()
        run.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
    assert run.state.global_step == STEPS
    return run.model, run.optimizer


@both
@pytest.mark.parametrize("by_class", [False, True], ids=["optimizers", "optimizer_cls_and_kwargs"])
def test_hugging_face_trainer(kind: str, by_class: bool, tmp_path: Path) -> None:
    def run(make: Make, dtype: torch.dtype) -> Any:
        options = {**KINDS[kind].options, "weight_decay": 0.1}
        model, optimizer = hugging_face(make, dtype, options, tmp_path, by_class)
        assert [g["weight_decay"] for g in optimizer.param_groups] == ([0.1, 0.0] if by_class else [0.1])
        return model

    assert_trains_alike(kind, run)


@both
def test_hugging_face_trainer_resumes(kind: str, tmp_path: Path) -> None:
    """From its checkpoint, on to the same bits as without a stop."""
    make, options = KINDS[kind].ours, KINDS[kind].options
    model, _ = hugging_face(make, torch.float32, options, tmp_path, True)
    resumed, _ = hugging_face(make, torch.float32, options, tmp_path, True, stop=3)
    assert_bitwise(flat(resumed), flat(model))


def test_hugging_face_default_options(tmp_path: Path) -> None:
    """What Trainer passes to torch's class for its own default, adamw_torch_fused, goes to ours as well."""
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    assert cls is torch.optim.AdamW and kwargs["fused"]
    optimizer = KINDS["adamw"].ours(Given().parameters(), **kwargs)
    assert optimizer.param_groups[0]["fused"] and optimizer.param_groups[0]["lr"] == args.learning_rate


# accelerate -----------------------------------------------------------------------------------------------------------


def accelerated(make: Make, dtype: torch.dtype, options: dict[str, Any], folder: Path | None = None) -> Any:
    """Accumulation over two batches, clipping, a schedule; with a folder, state saved, spoiled and loaded half way."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    bare = Given(dtype)
    optimizer = make(bare.groups(), **options)
    batches = torch.utils.data.DataLoader(list(range(2 * STEPS)), batch_size=1)
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.9)
    model, wrapped, batches, schedule = accelerator.prepare(bare, optimizer, batches, schedule)
    for number in map(int, batches):
        with accelerator.accumulate(model):
            accelerator.backward(model(gradients(number, dtype)))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            wrapped.step()
            schedule.step()
            wrapped.zero_grad()
        if folder is not None and number == 5:
            accelerator.save_state(str(folder))
            state = copy.deepcopy(optimizer.state_dict()["param_groups"])
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.load_state(str(folder))
            assert optimizer.state_dict()["param_groups"] == state
    return bare, optimizer


@both
def test_accelerate(kind: str) -> None:
    def run(make: Make, dtype: torch.dtype) -> Any:
        return accelerated(make, dtype, KINDS[kind].options)

    (_, ours), (_, plain) = assert_trains_alike(kind, run)
    assert [g["lr"] for g in ours.param_groups] == [g["lr"] for g in plain.param_groups]
    if kind == "adamw":
        assert {float(s["step"]) for s in ours.state.values()} == {STEPS}


@both
def test_accelerate_saves_and_loads(kind: str, tmp_path: Path) -> None:
    make, options = KINDS[kind].ours, KINDS[kind].options
    model, _ = accelerated(make, torch.float32, options)
    again, _ = accelerated(make, torch.float32, options, tmp_path)
    assert_bitwise(flat(again), flat(model))


@both
@pytest.mark.parametrize("fused", [False, True], ids=["", "fused_unscale"])
def test_accelerate_with_a_scaler(kind: str, fused: bool) -> None:
    """It replaces `step` on the instance to see whether the scaler called it."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    def run(make: Make, dtype: torch.dtype) -> Any:
        Accelerator(cpu=True)
        model = Given(dtype)
        more = {"fused_unscale": True} if fused and make is KINDS[kind].ours and dtype == torch.float32 else {}
        scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
        optimizer = AcceleratedOptimizer(make(model.groups(), **KINDS[kind].options, **more), scaler=scaler)
        for step in range(STEPS):
            scaler.scale(model(gradients(step, dtype)) * (torch.inf if step == 2 else 1.0)).backward()
            if step == 2:
                with unmodified(*model.parameters()):
                    optimizer.step()
                assert optimizer.step_was_skipped or more
            else:
                optimizer.step()
                assert not optimizer.step_was_skipped
            optimizer.zero_grad()
        return model

    assert_trains_alike(kind, run)


# Swapped while they train ---------------------------------------------------------------------------------------------


def swapped_after(steps: int, swapped: list[Any]) -> Make:
    """torch's AdamW, which becomes ours when it has taken some steps, whoever holds it by then."""

    def make(params: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(params, **options)
        taken: list[int] = []

        def count(*_: Any) -> None:
            taken.append(1)
            if len(taken) == steps:
                swapped.append(dk.swap_optimizer(optimizer))

        optimizer.register_step_post_hook(count)
        return optimizer

    return make


@pytest.mark.parametrize("host", ["lightning", "lightning, scaled", "trainer", "accelerate"])
def test_swapped_in_the_middle(host: str, tmp_path: Path) -> None:
    """Each trainer goes on with the object that it has, its schedule, its clipping and its scaler."""
    options, swapped = KINDS["adamw"].options, []

    def run(make: Make, dtype: torch.dtype) -> Any:
        if make is KINDS["adamw"].ours:
            make = swapped_after(3, swapped)
        if host.startswith("lightning"):
            more = {"plugins": scaled(), "bad": 2} if "scaled" in host else {}
            return lightning_fit(make, dtype, options, gradient_clip_val=0.5, **more)
        if host == "trainer":
            return hugging_face(make, dtype, {**options, "weight_decay": 0.1}, tmp_path, False)
        return accelerated(make, dtype, options)

    _, _ = assert_trains_alike("adamw", run)
    assert len(swapped) == 1 and type(swapped[0]) is dk.optim.AdamW
    assert {float(s["step"]) for s in swapped[0].state.values()} == {STEPS - 1.0 if "scaled" in host else STEPS}
