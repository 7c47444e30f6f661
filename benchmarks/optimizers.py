"""One optimizer step on a set of parameters: what bench_adamw.py and bench_sgdw.py share.

The inputs of a case are the parameters and then their gradients. A candidate is a function of them that makes a `Step`:
copies of its own, an optimizer, and `run`, which is what is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from harness import Case, Function, Peer, layer
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)
LR = 1e-2
Shapes = tuple[tuple[int, ...], ...]
Build = Callable[[Case, Sequence[Tensor]], torch.optim.Optimizer]


# Sets of parameters ---------------------------------------------------------------------------------------------------


def resnet50() -> Shapes:
    """The parameters of torchvision's ResNet-50."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            convolutions += [(4 * width, channels, 1, 1)] if block == 0 else []
            for convolution in convolutions:  # each with the scale and the shift of its batch norm
                shapes += [convolution, (convolution[0],), (convolution[0],)]
            channels = 4 * width
    return (*shapes, (1000, channels), (1000,))


def vit_b16() -> Shapes:
    """The parameters of torchvision's ViT-B/16."""
    d, hidden = 768, 3072
    block = ((d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,), (d,), (d,), (hidden, d), (hidden,), (d, hidden), (d,))
    return ((1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,), *block * 12, (d,), (d,), (1000, d), (1000,))


MODELS: dict[str, Shapes] = {
    "resnet50": resnet50(),
    "vit_b16": vit_b16(),
    "lenet5": ((6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), (120, 400), (120,), (84, 120), (84,), (10, 84), (10,)),
    "ragged": ((), (1,), (7,), (33, 3), (5, 3, 3, 3), (1023,), (4, 1025), (70_001,)),
}


def tensors(op: str, count: int, size: int, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """A step of `count` parameters of `size` elements each."""
    return layer(op, (count, size), dtype, "step", **options)


def model(op: str, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """A step of the parameters of a network; the shape of the case is the number of their elements."""
    return layer(op, (sum(map(math.prod, MODELS[name])),), dtype, "step", model=name, **options)


def shapes(case: Case) -> Shapes:
    name = case.option("model")
    return ((case.shape[1],),) * case.shape[0] if name is None else MODELS[name]


def inputs(case: Case, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The parameters, then the gradients; so large that the norm of all is above 1 and clipping has something to do."""
    scales = (s for s in (0.05, 0.2) for _ in shapes(case))
    return tuple(
        (s * torch.randn(shape, device=device, generator=generator)).to(case.dtype)
        for s, shape in zip(scales, shapes(case) * 2, strict=True)
    )


def minimal_bytes(case: Case, slots: int) -> int:
    """Read the gradient, read and write everything else; a parameter that has a master copy is written only.

    Args:
        slots: moments per parameter, in the parameter's dtype, or in float32 beside a master copy.
    """
    master = bool(case.option("master_weights")) and case.dtype in HALF
    size, wide = case.itemsize, 4 if master else case.itemsize
    count = size + 2 * slots * wide + (2 * 4 + size if master else 2 * size)
    if case.option("max_grad_norm") is not None or case.option("grad_scale") is not None:
        count += size  # all gradients decide before the first parameter changes
    if case.option("ema_decay") is not None:
        count += 2 * max(4, size)
    return count * case.numel


# Steps ----------------------------------------------------------------------------------------------------------------


class Step:
    """Parameters and gradients of its own, and `run`, which makes one step on them; the first one makes the state."""

    optimizer: torch.optim.Optimizer
    run: Callable[[], Any]

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        half = len(inputs) // 2
        self.params = [nn.Parameter(p.detach().clone()) for p in inputs[:half]]
        self.given = inputs[half:]
        self.grads = [g.detach().clone() for g in self.given]
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g

    def load(self, factor: float) -> None:
        """The given gradients again, times a power of two: clipping and unscaling as people write them change them."""
        for g, given in zip(self.grads, self.given, strict=True):
            torch.mul(given.detach(), factor, out=g)

    def copies(self, name: str) -> list[Tensor]:
        """The master copies or averages ("master_param", "ema")."""
        raise NotImplementedError

    def results(self) -> tuple[Tensor, ...]:
        """What has to agree between candidates."""
        return tuple(t.detach() for t in (*self.params, *self.copies("master_param"), *self.copies("ema")))

    def tensors(self) -> list[Tensor]:
        """All that a step reads or writes."""
        state = [t for p in self.optimizer.state.values() for t in p.values() if isinstance(t, Tensor)]
        every = [*self.results(), *self.grads, *state]
        return list({t.data_ptr(): t.detach() for t in every if t.numel()}.values())

    def become(self, other: Step) -> None:
        """Take the values of another step of the same kind, in place."""
        for mine, theirs in zip(self.tensors(), other.tensors(), strict=True):
            mine.copy_(theirs)


class Ours(Step):
    """Everything is an option of the optimizer."""

    def __init__(self, case: Case, build: Build, *inputs: Tensor) -> None:
        super().__init__(inputs)
        self.case = case
        self.optimizer = build(case, self.params)
        if case.option("grad_scale") is not None:  # as torch.amp.GradScaler hands it to a step that unscales by itself
            self.optimizer.grad_scale = torch.tensor(case.option("grad_scale"), device=self.params[0].device)
        self.run = self.optimizer.step

    def copies(self, name: str) -> list[Tensor]:
        option = {"master_param": "master_weights", "ema": "ema_decay"}[name]
        return [self.optimizer.state[p].get(name, p) for p in self.params] if self.case.option(option) else []


def our_options(case: Case) -> dict[str, Any]:
    """The options of the case that the optimizer takes; a scaler's unscaling checks for what is not finite, too."""
    options = {name: value for name, value in case.options if name not in ("model", "grad_scale")}
    return options | ({} if case.option("grad_scale") is None else {"skip_nonfinite": True})


class Usual(Step):
    """torch's optimizer, and around it what people write: loops, or torch._foreach_* with `multi`."""

    def __init__(self, case: Case, build: Build, multi: bool, decay: float, *inputs: Tensor) -> None:
        super().__init__(inputs)
        self.multi, self.keep = multi, 1.0 - decay
        self.stepped: list[Tensor] = list(self.params)
        self.masters: list[Tensor] = []
        self.averages: list[Tensor] = []
        chain: list[Callable[[], Any]] = []
        half = self.params[0].dtype in HALF
        if case.option("master_weights"):
            self.masters = self.stepped = [nn.Parameter(p.detach().float()) if half else p for p in self.params]
            if half:
                self.wide_grads = [torch.empty_like(p) for p in self.masters] if multi else []
                chain.append(self.widen)
        if case.option("ema_decay") is not None:
            self.weight = 1.0 - case.option("ema_decay")
            self.averages = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in self.params]
        self.optimizer = build(case, self.stepped)
        if case.option("grad_scale") is not None:
            device = self.params[0].device
            self.inv_scale = torch.tensor(1.0 / case.option("grad_scale"), device=device)
            self.found_inf = torch.zeros((), device=device)
            chain.append(self.unscale)
        if case.option("max_grad_norm") is not None:
            chain.append(partial(nn.utils.clip_grad_norm_, self.stepped, case.option("max_grad_norm")))
        chain += [self.decay] if decay else []
        chain.append(self.optimizer.step if case.option("grad_scale") is None else self.step_if_finite)
        chain += [self.narrow] if self.masters and half else []
        chain += [self.average] if self.averages else []

        def run() -> None:
            for function in chain:
                function()

        self.run = chain[0] if len(chain) == 1 else run

    def copies(self, name: str) -> list[Tensor]:
        return self.masters if name == "master_param" else self.averages

    def widen(self) -> None:
        if not self.multi:
            for master, p in zip(self.masters, self.params, strict=True):
                master.grad = p.grad.float()
            return
        torch._foreach_copy_(self.wide_grads, self.grads)
        for master, grad in zip(self.masters, self.wide_grads, strict=True):
            master.grad = grad

    def narrow(self) -> None:
        with torch.no_grad():
            if self.multi:
                torch._foreach_copy_(self.params, self.masters)
                return
            for p, master in zip(self.params, self.masters, strict=True):
                p.copy_(master)

    def unscale(self) -> None:
        """What torch.amp.GradScaler.unscale_ calls."""
        self.found_inf.zero_()
        grads = [p.grad for p in self.stepped]
        torch._amp_foreach_non_finite_check_and_unscale_(grads, self.found_inf, self.inv_scale)

    def step_if_finite(self) -> None:
        """A fused step looks at found_inf by itself; for the others GradScaler does, and waits for it."""
        if self.optimizer.defaults.get("fused"):
            self.optimizer.found_inf = self.found_inf
            self.optimizer.step()
        elif not self.found_inf.item():
            self.optimizer.step()

    def decay(self) -> None:
        with torch.no_grad():
            if self.multi:
                torch._foreach_mul_(self.stepped, self.keep)
                return
            for p in self.stepped:
                p.mul_(self.keep)

    def average(self) -> None:
        with torch.no_grad():
            if self.multi:
                torch._foreach_lerp_(self.averages, [p.detach() for p in self.stepped], self.weight)
                return
            for average, p in zip(self.averages, self.stepped, strict=True):
                average.lerp_(p, self.weight)


def capturable(params: Sequence[Tensor]) -> bool:
    """On a GPU, so that there is a device time; fused steps do the same with it, others some more."""
    return params[0].device.type == "cuda"


def usual(
    build: Callable[..., torch.optim.Optimizer], decay: Callable[[Case], float] = lambda case: 0.0
) -> tuple[Callable[[Case], Function], tuple[Peer, ...]]:
    """torch as it is used by default (eager), and its multi-tensor and fused steps.

    Args:
        build: (case, params, further arguments) -> torch's optimizer.
        decay: what parameters lose of themselves in a step, where that is not torch's own business.
    """

    def candidate(multi: bool, **flags: bool) -> Callable[[Case], Function]:
        return lambda case: partial(Usual, case, partial(build, **flags), multi, decay(case))

    peers = (
        Peer("torch foreach", "torch", candidate(True, foreach=True)),
        Peer("torch fused", "torch", candidate(True, fused=True)),
    )
    return candidate(False), peers
