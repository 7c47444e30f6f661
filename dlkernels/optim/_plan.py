"""A plan of a step: the items of each device with their runner, for as long as nothing but values changes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _backend
from .._library import accumulate_dtype
from ._items import MOMENTS, Found, Item, Row, Scalars, follow_parameters, is_dense
from ._sharding import is_sharded, local_of, norm_key, place_of, reduce_squares

if TYPE_CHECKING:
    from ._base import FusedOptimizer


class Part:
    """The items on one device, their rows, and the runner that holds them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.items: list[Item] = []
        self.rows: list[Row] = []
        self.scalars: dict[int, Scalars] = {}  # by group
        self.found: list[Found] = []
        self.runner: Any = None
        self.holds_grads = True
        self._row_of: dict[tuple[int, int], int] = {}

    def forget_grads(self) -> None:
        if self.holds_grads:
            for item in self.items:
                item.grad = None
            self.runner.forget_grads()
            self.holds_grads = False

    def row(self, group: int, step: Tensor | None) -> int:
        at = self._row_of.setdefault((group, id(step)), len(self.rows))
        if at == len(self.rows):
            self.rows.append(Row(self.scalars.setdefault(group, Scalars(group)), step))
        return at


class Plan:
    """One step, repeated for as long as nothing but values changes."""

    def __init__(self, optimizer: FusedOptimizer, found: list[Found]) -> None:
        from ._runners import backend_for, make_runner

        self.repeats = True  # whether the same lists serve the next step
        self.copies: list[tuple[Tensor, Tensor]] = []  # what is not dense, and the dense tensor stepped in its place
        self.owners = [p for *_, p in optimizer._parameters()]
        self.sharded = any(is_sharded(p) for p in self.owners)
        # Of all parameters, whether they have a gradient or not: ranks that differ in that make the same sums together.
        self.keys = list(dict.fromkeys(norm_key(p) for p in self.owners))
        self.states = {f.position: tuple(optimizer.state[f.owner].values()) for f in found}
        self.parts: list[Part] = []
        for f in found:
            part = next((part for part in self.parts if part.device == f.param.device), None)
            if part is None:
                part = Part(f.param.device)
                self.parts.append(part)
            part.found.append(f)
            part.items.append(self._item(optimizer, f, part))
        self.forced = _backend.state.forced
        if (
            len(self.parts) == 1
            and not self.sharded
            and backend_for(optimizer._family, [f.param for f in found]) in ("cpp", "cuda")
        ):
            self._add_waiting(optimizer)
        for part in self.parts:
            part.runner = make_runner(
                optimizer._family,
                part.items,
                part.rows,
                self.owners,
                rounding_seed=optimizer.seed if optimizer.stochastic_rounding else None,
                average_decay=optimizer.ema_decay,
            )
        self.options = self._options(optimizer)
        # The compiled table looks after everything by itself.
        only = self.parts[0].runner if len(self.parts) == 1 and not self.sharded else None
        self.table = getattr(only, "table", None)
        if self.table is not None:
            self.table.watch(optimizer.param_groups, optimizer.state)
        for part in self.parts:
            follow_parameters(part.items)
        self._note_versions()

    def _add_waiting(self, optimizer: FusedOptimizer) -> None:
        """Parameters that have state and no gradient now: once they have one, the table steps them too."""
        from ._runners import backend_for

        part = self.parts[0]
        for position, g, p in optimizer._parameters():
            state = optimizer.state.get(p)
            if position in self.states or not state or not is_dense(p) or p.device != part.device:
                continue
            tensors = [x for x in state.values() if isinstance(x, Tensor) and x.dim() == p.dim()]
            complete = optimizer._is_complete(state, optimizer.param_groups[g], p)
            served = backend_for(optimizer._family, [p, *(item.param for item in part.items[:1])]) in ("cpp", "cuda")
            if complete and served and all(x.stride() == p.stride() for x in tensors):
                with contextlib.suppress(TypeError, ValueError):  # what is wrong is said when it has a gradient
                    part.items.append(self._item(optimizer, Found(position, g, p), part))
        part.items.sort(key=lambda item: item.position)  # the order of sums is that of a plan with all of them

    def _note_versions(self) -> None:
        """Of parameters with a master copy: who else writes them is noticed by it."""
        if self.table is None:
            for part in self.parts:
                for f, item in zip(part.found, part.items, strict=True):
                    if item.master is not None and not f.owner.is_inference():
                        f.version = f.owner._version

    @staticmethod
    def _options(optimizer: FusedOptimizer) -> tuple[Any, ...]:
        """What the lists were made for, and checked; changing one of these between steps needs new ones."""
        return (
            optimizer.ema_decay,
            optimizer.stochastic_rounding,
            optimizer.seed,
            optimizer.master_weights,
            optimizer.max_grad_norm,
            [optimizer._slots_of(group) for group in optimizer.param_groups],
        )

    def _item(self, optimizer: FusedOptimizer, f: Found, part: Part) -> Item:
        state = optimizer.state[f.owner]
        param, grad, f.grad = f.param, f.grad, None
        if not is_dense(param):
            if any(stride == 0 and size > 1 for size, stride in zip(param.shape, param.stride(), strict=True)):
                raise ValueError(f"parameter {f.position} must have an element of memory for each of its own, clone it")
            param = param.clone(memory_format=torch.contiguous_format)
            self._copied(f.param, param)
        if grad is not None and grad.stride() != param.stride() and grad.numel() > 1:
            grad = torch.empty_like(param).copy_(grad)
            self.repeats = False
        slots = optimizer._slots_of(optimizer.param_groups[f.group])
        moments = tuple(self._like(name, state[name], param) if name in slots else None for name in optimizer._slots)
        if len(dtypes := {str(x.dtype) for x in moments if x is not None}) > 1:
            raise TypeError(
                f"the moments of parameter {f.position} must have one dtype, got {' and '.join(sorted(dtypes))}"
            )
        whole = max(1, param.numel())
        return Item(
            f.position,
            param,
            grad,
            moments,
            self._like("master_param", state.get("master_param") if optimizer.master_weights else None, param),
            self._like("ema", state.get("ema") if optimizer.ema_decay is not None else None, param),
            part.row(f.group, self._counter(state.get("step"))),
            self.keys.index(norm_key(f.owner)),
            *(place_of(f.owner) or (0, whole, whole)),
        )

    def _copied(self, original: Tensor, copy: Tensor) -> None:
        self.copies.append((original, copy))
        self.repeats = False

    @staticmethod
    def _counter(step: Any) -> Tensor | None:
        if step is not None and not (isinstance(step, Tensor) and step.dtype == torch.float32 and step.numel() == 1):
            got = f"{step.dtype} {tuple(step.shape)}" if isinstance(step, Tensor) else type(step).__name__
            raise TypeError(f"`step` in the state must be a float32 tensor of one element, got {got}")
        return step

    def _like(self, name: str, x: Tensor | None, param: Tensor) -> Tensor | None:
        """A state tensor in the memory layout of its parameter; written back after the step where that takes a copy."""
        if x is None:
            return None
        part = local_of(x)
        if part.shape != param.shape or part.device != param.device:
            raise ValueError(
                f"a state tensor must have its parameter's shape and device, {tuple(param.shape)} on {param.device}, "
                f"got {tuple(part.shape)} on {part.device}"
            )
        allowed = (accumulate_dtype(param.dtype),) if name in ("master_param", "ema") else MOMENTS[param.dtype]
        if part.dtype not in allowed:
            raise TypeError(
                f"`{name}` of a {param.dtype} parameter must be {' or '.join(map(str, allowed))}, got {part.dtype}"
            )
        if part.stride() == param.stride() or part.numel() <= 1:
            return part
        copy = torch.empty_like(param, dtype=part.dtype).copy_(part)
        self._copied(part, copy)
        return copy

    def fresh(self, optimizer: FusedOptimizer) -> bool:
        """Whether this plan still is what is to be done; takes the gradients of now."""
        if not self.repeats or self.options != self._options(optimizer) or self.forced != _backend.state.forced:
            return False
        if self.table is not None:
            return self.table.refresh(optimizer.param_groups, optimizer.state)
        return self._watch(optimizer)

    def _watch(self, optimizer: FusedOptimizer) -> bool:
        owners = [p for group in optimizer.param_groups for p in group["params"]]
        if len(owners) != len(self.owners) or any(a is not b for a, b in zip(owners, self.owners, strict=True)):
            return False
        if any((p.grad is None) == (position in self.states) for position, p in enumerate(owners)):
            return False
        for part in self.parts:
            for f, item in zip(part.found, part.items, strict=True):
                now, before = tuple(optimizer.state[f.owner].values()), self.states[f.position]
                if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
                    return False
                param = local_of(f.owner.detach())
                if (param.data_ptr(), param.dtype) != (item.param.data_ptr(), item.param.dtype):
                    return False
                if (param.shape, param.stride()) != (item.param.shape, item.param.stride()):
                    return False
                if item.master is not None and not f.owner.is_inference() and f.owner._version != f.version:
                    return False
        for part in self.parts:
            grads = [f.local_grad() for f in part.found]  # may be sums over ranks: after all that can end in a new plan
            for grad, item in zip(grads, part.items, strict=True):
                if grad.stride() != item.param.stride() and grad.numel() > 1:
                    return False
            part.runner.set_grads(grads)
            part.holds_grads = True
        return True

    @property
    def captured(self) -> bool:
        return any(getattr(part.runner, "captured", False) for part in self.parts)

    def run_in_range(self, optimizer: FusedOptimizer) -> None:
        """`run`, with the name that a profiler shows."""
        with torch.autograd.profiler.record_function(f"dlkernels::{optimizer._family}_step"):
            self.run(optimizer)

    def run(self, optimizer: FusedOptimizer) -> None:
        groups, values = optimizer.param_groups, optimizer._values
        for part in self.parts:
            for group, scalars in part.scalars.items():
                lr, *rest = values(groups[group])
                scalars.values = (_move(lr, part) if isinstance(lr, Tensor) else lr, *rest)
        clips = optimizer.max_grad_norm is not None or optimizer.skip_nonfinite
        scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if clips or scale is not None or found_inf is not None:
            optimizer._norm = self._run_scaled(optimizer, clips, scale, found_inf)
        else:
            for part in self.parts:
                part.runner.run(part.rows)
            optimizer._norm = None
        for part in self.parts:
            part.forget_grads()
        for original, copy in self.copies:
            original.copy_(copy)
        if self.table is None:
            torch.autograd.graph.increment_version([f.owner for part in self.parts for f in part.found])
            self._note_versions()

    def _run_scaled(self, optimizer: FusedOptimizer, clips: bool, scale: Any, found_inf: Any) -> Any:
        """With the norm of all gradients, or what a GradScaler says: a number for the CPU, tensors for GPUs."""
        inv_scale = squares = norm = None
        divides = [getattr(part.runner, "takes_numbers", False) for part in self.parts]
        if scale is not None and not (divides and all(divides)):  # somebody wants to multiply
            inv_scale = scale.double().reciprocal() if isinstance(scale, Tensor) else 1.0 / scale
        if clips:
            squares = reduce_squares([part.runner.squares(len(self.keys)) for part in self.parts], self.keys)
            if not self.parts:  # this rank has only helped the others to their norm
                return (squares.sqrt() if inv_scale is None else squares.sqrt() * inv_scale).float()
        for part, of_its_own in zip(self.parts, divides, strict=True):
            scaling = {"scale": _move(scale, part)} if of_its_own else {"inv_scale": _move(inv_scale, part)}
            norm = part.runner.run(
                part.rows,
                **scaling,
                found_inf=_move(found_inf, part),
                norm_squares=_move(squares, part),
                max_norm=optimizer.max_grad_norm,
                skip_nonfinite=optimizer.skip_nonfinite,
            )
        return norm


def _move(x: Any, part: Part) -> Any:
    """A scalar where a runner wants it: a number, or a tensor on its device."""
    if x is None:
        return None
    if part.runner.on_host or (getattr(part.runner, "takes_numbers", False) and not isinstance(x, Tensor)):
        return float(x)
    if isinstance(x, Tensor):
        return x.to(part.device)
    return torch.full((), x, dtype=torch.float64, device=part.device)  # a copy from the host would wait for the device
