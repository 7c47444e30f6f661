"""The protocol of torch.optim.Optimizer: closures, hooks, copies, files, and what users do to groups and state."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _hosts import KINDS, Given, Make, assert_trains_alike, backward, flat, gradients, train
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dlkernels.testing import assert_bitwise, unmodified

pytestmark = pytest.mark.filterwarnings("error")
both = pytest.mark.parametrize("kind", KINDS)
Optimizer = torch.optim.Optimizer

# Calls ----------------------------------------------------------------------------------------------------------------


@both
def test_closure(kind: str) -> None:
    """Called once, with gradients on, its result returned; the step uses the gradients that it makes."""

    def run(make: Make, dtype: torch.dtype) -> Given:
        model = Given(dtype)
        optimizer = make(model.groups(), **KINDS[kind].options)
        for step in range(4):
            calls = []

            def closure(step: int = step, calls: list[Tensor] = calls) -> Tensor:
                assert torch.is_grad_enabled()
                calls.append(backward(model, step))
                return calls[-1]

            with torch.no_grad():
                assert optimizer.step(closure) is calls[0]
            assert len(calls) == 1
            assert optimizer.step(closure=lambda: 3.5) == 3.5
            assert optimizer.step() is None
        return model

    assert_trains_alike(kind, run)


@both
def test_step_hooks(kind: str) -> None:
    """Before and after each step, of the instance and of all optimizers; a pre-hook may change the arguments."""
    model = Given()
    optimizer = KINDS[kind].ours(model.parameters(), **KINDS[kind].options)
    said: list[Any] = []

    def before(o: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        said.append(("before", o is optimizer, flat(model).clone()))
        return (args[0], lambda: 2.5), kwargs

    def after(o: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        said.append(("after", o is optimizer, flat(model).clone()))

    handles = [
        register_optimizer_step_pre_hook(lambda *_: said.append(("all before",))),
        register_optimizer_step_post_hook(lambda *_: said.append(("all after",))),
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
    ]
    backward(model, 0)
    start = flat(model).clone()
    try:
        assert optimizer.step(lambda: 1.5) == 2.5
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(entry[0] for entry in said) == ["after", "all after", "all before", "before"]
    found = {entry[0]: entry for entry in said}
    assert_bitwise(found["before"][2], start)
    assert_bitwise(found["after"][2], flat(model))
    assert not torch.equal(start, flat(model)) and found["before"][1] and found["after"][1]
    assert optimizer.step(lambda: 1.5) == 1.5 and len(said) == 4


@both
def test_state_dict_hooks(kind: str) -> None:
    model = Given()
    optimizer = KINDS[kind].ours(model.parameters(), **KINDS[kind].options)
    train(model, optimizer, range(2))
    said: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: said.append("pre save"))
    optimizer.register_state_dict_post_hook(lambda o, d: {**d, "mark": len(said)})
    optimizer.register_load_state_dict_pre_hook(lambda o, d: {k: v for k, v in d.items() if k != "mark"})
    optimizer.register_load_state_dict_post_hook(lambda o: said.append("post load"))
    saved = optimizer.state_dict()
    assert saved["mark"] == 1 and said == ["pre save"]
    optimizer.load_state_dict(saved)
    assert said == ["pre save", "post load"]


@both
def test_named_parameters(kind: str) -> None:
    """`named_parameters()` instead of `parameters()`: the names come back, and go into the state_dict."""
    saved = []
    for make in (KINDS[kind].ours, KINDS[kind].plain):
        model = Given()
        optimizer = make(model.named_parameters(), **KINDS[kind].options)
        train(model, optimizer, range(2))
        saved.append(optimizer.state_dict())
    names = [[group["param_names"] for group in entry["param_groups"]] for entry in saved]
    assert names[0] == names[1] == [[name for name, _ in Given().named_parameters()]]
    model = Given()
    optimizer = KINDS[kind].ours(model.named_parameters(), **KINDS[kind].options)
    optimizer.load_state_dict(saved[0])
    assert optimizer.state_dict()["param_groups"] == saved[0]["param_groups"]


@both
@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(kind: str, to_none: bool) -> None:
    """With None a parameter stands still; with zeros it decays and its moments go on."""

    def run(make: Make, dtype: torch.dtype) -> Given:
        model = Given(dtype)
        optimizer = make(model.groups(), **KINDS[kind].options)
        train(model, optimizer, range(3))
        optimizer.zero_grad(set_to_none=to_none)
        assert all((p.grad is None) == to_none and (to_none or not p.grad.any()) for p in model.parameters())
        before = flat(model).clone()
        optimizer.step()
        assert torch.equal(before, flat(model)) == to_none
        train(model, optimizer, range(3, 6))
        return model

    assert_trains_alike(kind, run)


@both
def test_add_param_group_in_mid_training(kind: str) -> None:
    """Each parameter counts its own steps, also those that now and then have no gradient."""

    def run(make: Make, dtype: torch.dtype) -> Any:
        model = Given(dtype)
        params = list(model.parameters())
        optimizer = make(params[:2], **KINDS[kind].options)
        for step in range(9):
            if step == 3:
                optimizer.add_param_group({"params": params[2:4], "lr": 0.2})
            if step == 5:
                optimizer.add_param_group({"params": params[4:], "weight_decay": 0.5})
            backward(model, step)
            if step % 4 == 1:
                params[0].grad = None
            optimizer.step()
        return model, [optimizer.state[p].get("step") for p in params]

    (_, steps), (_, expected) = assert_trains_alike(kind, run)
    if kind == "adamw":
        assert steps == expected == [7, 9, 6, 6, 4]


# Copies and files -----------------------------------------------------------------------------------------------------


def saved_and_loaded(model: Given, optimizer: Optimizer, make: Make) -> tuple[Given, Optimizer]:
    """Through torch.save and torch.load(weights_only=True), into an optimizer made with other options."""
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    fresh = Given()
    fresh.load_state_dict(weights)
    other = make(fresh.groups(), lr=9.0)
    other.load_state_dict(state)
    return fresh, other


COPIES: dict[str, Callable[[Given, Optimizer, Make], tuple[Given, Optimizer]]] = {
    "deepcopy": lambda model, optimizer, make: copy.deepcopy((model, optimizer)),
    "pickle": lambda model, optimizer, make: pickle.loads(pickle.dumps((model, optimizer))),
    "file": saved_and_loaded,
}


@both
@pytest.mark.parametrize("way", COPIES)
def test_copy_goes_on_as_the_original_would(kind: str, way: str) -> None:
    make, options = KINDS[kind].ours, KINDS[kind].options
    model = Given()
    optimizer = make(model.groups(), **options)
    train(model, optimizer, range(3))
    before = flat(model).clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        twin, other = COPIES[way](model, optimizer, make)
    assert type(other) is type(optimizer)
    train(twin, other, range(3, 7))
    assert_bitwise(flat(model), before, "the original, after its copy has moved")
    train(model, optimizer, range(3, 7))
    assert_bitwise(flat(twin), flat(model), way)
    mine = {id(t) for state in optimizer.state.values() for t in state.values()}
    assert not mine & {id(t) for state in other.state.values() for t in state.values()}


@pytest.mark.parametrize("into", ["ours", "plain"])
def test_file_of_the_other_adamw(into: str) -> None:
    """A checkpoint of torch's goes on with ours, and one of ours with torch's, as the run would have without."""

    def run(make: Make, dtype: torch.dtype) -> Given:
        first, second = KINDS["adamw"].plain, make
        if into == "plain":
            first, second = second, first
        model = Given(dtype)
        optimizer = first(model.groups(), **KINDS["adamw"].options)
        train(model, optimizer, range(3))
        state = optimizer.state_dict()
        optimizer = second(model.groups(), lr=9.0)
        optimizer.load_state_dict(state)
        train(model, optimizer, range(3, 7))
        return model

    assert_trains_alike("adamw", run)


# What users do between steps ------------------------------------------------------------------------------------------


def new_options(model: Given, optimizer: Optimizer) -> None:
    first, second = optimizer.param_groups
    first["lr"], second["weight_decay"] = 0.2, 0.3
    if "betas" in first:
        first["betas"], second["eps"], second["maximize"] = (0.5, 0.9), 0.1, True
    else:
        second["momentum"] = 0.3


def scaled_state(model: Given, optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            if name != "step":
                value.mul_(0.5)


def other_tensors(model: Given, optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        for name, value in list(state.items()):
            state[name] = value * 0.5 if name != "step" else torch.tensor(40.0)


def no_state(model: Given, optimizer: Optimizer) -> None:
    optimizer.state.clear()


def new_state(model: Given, optimizer: Optimizer) -> None:
    optimizer.state = defaultdict(dict)


def part_of_the_state(model: Given, optimizer: Optimizer) -> None:
    del optimizer.state[model.bias]


def moved(model: Given, optimizer: Optimizer) -> None:
    """Into other memory; what was there before must not be touched again."""
    for p in model.parameters():
        old, p.data = p.data, p.data.clone()
        old.fill_(torch.nan)


def one_vector(model: Given, optimizer: Optimizer) -> None:
    """All parameters become views of one tensor."""
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()) * 0.5, model.parameters())


def other_parameter(model: Given, optimizer: Optimizer) -> None:
    """Another parameter in the place of one, as wrappers do it that shard models."""
    model.weight = nn.Parameter(model.weight.detach() + 1)
    optimizer.param_groups[0]["params"][0] = model.weight


def frozen(model: Given, optimizer: Optimizer) -> None:
    optimizer.param_groups[1]["params"].pop()


def no_gradients(model: Given, optimizer: Optimizer) -> None:
    model.zero_grad()
    optimizer.step()


DEEDS = (new_options, scaled_state, other_tensors, no_state, new_state, part_of_the_state, moved, one_vector)
DEEDS += (other_parameter, frozen, no_gradients)


@both
@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__)
def test_between_steps(kind: str, deed: Callable[[Given, Optimizer], None]) -> None:
    """What was kept from the steps before is of no use then, and the optimizer knows."""

    def run(make: Make, dtype: torch.dtype) -> Given:
        model = Given(dtype)
        optimizer = make(model.groups(), **KINDS[kind].options)
        train(model, optimizer, range(3))
        deed(model, optimizer)
        train(model, optimizer, range(3, 6))
        return model

    assert_trains_alike(kind, run)


@both
@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"state_dtype": torch.bfloat16}], ids=str)
def test_model_made_float64_in_mid_training(kind: str, options: dict[str, Any]) -> None:
    """Its float32 state does not fit: an error, as from torch's, and nothing has moved."""
    model = Given()
    optimizer = KINDS[kind].ours(model.groups(), **KINDS[kind].options, **options)
    train(model, optimizer, range(3))
    model.double()
    backward(model, 3)
    with unmodified(*model.parameters()), pytest.raises(TypeError, match="parameter must be torch"):
        optimizer.step()
    optimizer.state.clear()
    before = flat(model)
    optimizer.step()
    assert (flat(model) != before).all()


@both
def test_steps_inside_of_backward(kind: str) -> None:
    """One optimizer for each parameter, called as soon as its gradient is there, which is gone afterwards."""

    def run(make: Make, dtype: torch.dtype) -> Given:
        model = Given(dtype)
        optimizers = {p: make([p], **KINDS[kind].options) for p in model.parameters()}

        def step(p: Tensor) -> None:
            optimizers[p].step()
            optimizers[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        for number in range(6):
            model(gradients(number, dtype)).backward()
            assert all(p.grad is None for p in model.parameters())
        return model

    assert_trains_alike(kind, run)
