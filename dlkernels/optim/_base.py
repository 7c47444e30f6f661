"""What the optimizers share: options, checks, state and its counters, and the step itself.

A step is planned once (`_build`: every check, state for new parameters, lists for the runner) and then repeated for as
long as nothing but values changes: the same parameters with gradients of the same kind, the same state tensors.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .. import _backend, _checks
from .._library import accumulate_dtype
from ._checkpoints import HALF, SavedOptimizer
from ._items import Found, is_dense, rolled_back
from ._options import OPTIONS, check_options
from ._plan import Plan
from ._sharding import is_sharded, place_of


class FusedOptimizer(SavedOptimizer):
    """Base of AdamW and SGDW."""

    _family: str

    # What a subclass says of a group ----------------------------------------------------------------------------------

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise for a bad hyper-parameter."""
        raise NotImplementedError

    def _values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The scalars of a row, see `_items.Scalars`."""
        raise NotImplementedError

    def _slots_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The moments that parameters of this group have."""
        raise NotImplementedError

    def _counts(self) -> bool:
        """Whether the state has a step counter."""
        raise NotImplementedError

    # Construction -----------------------------------------------------------------------------------------------------

    def _set_options(self, options: dict[str, Any]) -> None:
        o = {**OPTIONS, **options}
        check_options(o)
        self.__dict__.update(o)
        self._forget_plan()
        self._averages: list[tuple[Tensor, Tensor]] | None = None
        self._norm: Any = None
        if o["fused_unscale"]:
            self._step_supports_amp_scaling = True

    def _forget_plan(self) -> None:
        plan: Plan | None = self.__dict__.get("_plan")
        if plan is not None and plan.captured:  # a CUDA graph may be replayed at any time, and reads its tables
            self.__dict__.setdefault("_captured_plans", []).append(plan)
        self._plan: Plan | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with options of its own.

        Raises:
            ValueError: for a bad hyper-parameter, a parameter twice, an option that is not of a group.
            TypeError: for complex, integer or sparse parameters.
        """
        if isinstance(param_group, dict):
            for name in OPTIONS.keys() & param_group.keys():
                raise ValueError(f"`{name}` is an option of the optimizer, not of a parameter group")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="optimizer contains a parameter group with duplicate")
            super().add_param_group(param_group)
        group = self.param_groups.pop()
        if len({id(p) for p in group["params"]}) != len(group["params"]):
            raise ValueError("a parameter must not appear twice in a parameter group")
        for p in group["params"]:
            if p.is_complex():
                raise TypeError(f"parameters must be real, got {p.dtype}: optimize torch.view_as_real of it")
            _checks.floating("params", p)
            if self.stochastic_rounding and not self.master_weights:
                if p.dtype == torch.float16:
                    raise TypeError(
                        "`stochastic_rounding` rounds bfloat16: use `master_weights` for float16 parameters"
                    )
                if place_of(p) is None:
                    raise ValueError("`stochastic_rounding` needs parameters that are sharded in one dimension at most")
        self._check_group(group)
        self._new_group(group)
        self.param_groups.append(group)
        self._forget_plan()

    def _check_common(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor):
            if lr.numel() != 1:
                raise ValueError(f"`lr` must be a number or a tensor of one element, got shape {tuple(lr.shape)}")
            if lr.device.type == "cpu":
                _checks.non_negative("lr", lr.item())
        else:
            _checks.non_negative("lr", lr)
        _checks.non_negative("weight_decay", group["weight_decay"])
        if group["differentiable"]:
            raise ValueError("`differentiable` must be False: a fused step has no gradient; use torch.optim for that")
        decoupling = group.get("decoupling", self.decoupling)
        if decoupling not in ("lr", "schedule"):
            raise ValueError(f"`decoupling` must be 'lr' or 'schedule', got {decoupling!r}")

    def _new_group(self, group: dict[str, Any]) -> None:
        """Note what a group was given at construction, and warn of what cannot be meant."""
        if group.get("decoupling", self.decoupling) == "schedule":
            group.setdefault("base_lr", float(group["lr"]))
            if group["base_lr"] == 0 and float(group["weight_decay"]) != 0:
                self._warn("the lr given at construction is what decay follows, and it is 0: there will be no decay")
        self._warn_of_decay(group)

    @staticmethod
    def _tensor_lr(lr: Tensor) -> Any:
        """A learning rate on the CPU is a number; on a GPU it stays a tensor."""
        if lr.device.type == "cpu":
            return lr.item()
        return lr.detach() if lr.is_floating_point() else lr.detach().double()

    def _decay_rate(self, group: dict[str, Any]) -> float:
        """What lr is multiplied with to give the decay of a step."""
        weight_decay = float(group["weight_decay"])
        if group.get("decoupling", self.decoupling) == "lr":
            return weight_decay
        base_lr = group.get("base_lr")
        if base_lr is None:  # a group of torch's, or one that was given this decoupling later
            base_lr = group["base_lr"] = float(group.get("initial_lr", group["lr"]))
        return weight_decay / base_lr if base_lr else 0.0

    def _warn_of_decay(self, group: dict[str, Any]) -> None:
        lr = group["lr"]
        if isinstance(lr, Tensor) and lr.device.type != "cpu":
            return
        decay = float(lr) * self._decay_rate(group)
        if decay >= 1:
            self._warn(
                f"each step multiplies the parameters by 1 - {decay:.4g}: "
                "the weight decay of a step should be far below 1"
            )

    @staticmethod
    def _warn(text: str) -> None:
        warnings.warn(text, stacklevel=_backend._outside(os.path.dirname(torch.optim.__file__)))

    # State ------------------------------------------------------------------------------------------------------------

    def _moment_dtype(self, p: Tensor) -> torch.dtype:
        if p.dtype == torch.float64:
            return torch.float64
        default = torch.float32 if self.master_weights and p.dtype in HALF else p.dtype
        return self.state_dtype or default

    def _init_state(self, found: list[Found]) -> None:
        """Make what is missing; parameters that begin now share one counter."""
        first: dict[torch.device, Tensor] = {}
        for f in found:
            p, state = f.owner, self.state[f.owner]
            if self._counts() and "step" not in state:
                device = self._counter_device(p)
                if device not in first:
                    first[device] = torch.zeros((), dtype=torch.float32, device=device)
                state["step"] = first[device]
            slots = self._slots_of(self.param_groups[f.group])
            others = [state[name].dtype for name in slots if state.get(name) is not None]
            for name in slots:
                if state.get(name) is None:
                    dtype = others[0] if others else self._moment_dtype(p)
                    state[name] = torch.zeros_like(
                        p, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
                    )
            if self.master_weights and p.dtype in HALF and "master_param" not in state:
                state["master_param"] = p.detach().to(torch.float32, copy=True)
            if self.ema_decay is not None and "ema" not in state:
                state["ema"] = state.get("master_param", p).detach().to(accumulate_dtype(p.dtype), copy=True)
            self._lay_out(state, p)

    def _is_complete(self, state: dict[str, Any], group: dict[str, Any], p: Tensor) -> bool:
        """Whether a step would find all that it needs."""
        wanted = [*self._slots_of(group)]
        wanted += ["step"] if self._counts() else []
        wanted += ["master_param"] if self.master_weights and p.dtype in HALF else []
        wanted += ["ema"] if self.ema_decay is not None else []
        return all(state.get(name) is not None for name in wanted)

    def _lay_out(self, state: dict[str, Any], p: Tensor) -> None:
        """State in the layout of its parameter, which may have changed, or be another than in a checkpoint."""
        if is_sharded(p) or not is_dense(p):
            return
        for name in (*self._slots, "master_param", "ema"):
            x = state.get(name)
            if x is not None and x.shape == p.shape and x.device == p.device and x.stride() != p.stride():
                state[name] = torch.empty_like(p, dtype=x.dtype, requires_grad=False).copy_(x)

    def _split_counters(self, found: list[Found]) -> None:
        """A counter belongs to parameters that were always stepped together: those without a gradient now part."""
        if not self._counts():
            return
        stepped = {id(f.owner) for f in found}
        members: dict[int, list[tuple[bool, dict[str, Any]]]] = {}
        for p, state in self.state.items():
            if isinstance(p, Tensor) and isinstance(state.get("step"), Tensor):
                members.setdefault(id(state["step"]), []).append((id(p) in stepped, state))
        for group in members.values():
            if len({now for now, _ in group}) == 2:
                rest = [state for now, state in group if not now]
                step = rest[0]["step"].clone()
                for state in rest:
                    state["step"] = step

    # The step ---------------------------------------------------------------------------------------------------------

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients of the last step after unscaling and before clipping; None without `max_grad_norm`.

        A 0-d float32 tensor: on the CPU, or where the parameters are, without waiting for it.
        """
        norm = self._norm
        return torch.tensor(norm, dtype=torch.float32, device="cpu") if isinstance(norm, float) else norm

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step for every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss; runs with gradients enabled.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError, ValueError: for a gradient or a hyper-parameter that cannot be used; nothing has changed then.
        """
        if torch.compiler.is_compiling():
            return self._step_outside_graph(closure)
        if type(self).step is not FusedOptimizer.step:  # overridden: torch has put the hooks around that
            return self._closure_and_step(closure)
        if self._has_hooks() or torch.autograd._profiler_enabled():
            return self._step_with_hooks(closure)
        return self._closure_and_step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # torch's wrapper would cost more than a small step

    def _has_hooks(self) -> bool:
        own = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)

    def _step_with_hooks(self, closure: Callable[[], Any] | None) -> Any:
        """What torch.optim.Optimizer.profile_hook_step puts around a step."""
        with torch.autograd.profiler.record_function(f"Optimizer.step#{type(self).__name__}.step"):
            args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
            kwargs: dict[str, Any] = {}
            for hook in (*_global_optimizer_pre_hooks.values(), *self._optimizer_step_pre_hooks.values()):
                result = hook(self, args, kwargs)
                if result is not None:
                    if not isinstance(result, tuple) or len(result) != 2:
                        raise RuntimeError(f"a step pre-hook must return None or (args, kwargs), got {result}")
                    args, kwargs = result
            loss = self._closure_and_step(*args[1:], **kwargs, run=Plan.run_in_range)
            self._optimizer_step_code()
            for hook in (*self._optimizer_step_post_hooks.values(), *_global_optimizer_post_hooks.values()):
                hook(self, args, kwargs)
        return loss

    @torch._disable_dynamo  # torch.compiler.disable would import the compiler with this package
    def _step_outside_graph(self, closure: Callable[[], Any] | None) -> Any:
        return self._step_with_hooks(closure)

    def _closure_and_step(self, closure: Callable[[], Any] | None = None, *, run: Any = Plan.run) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._averages is not None:
            self._refuse_while_swapped("step()")
        plan = self._plan
        if plan is None or not plan.fresh(self):
            self._forget_plan()
            with torch.no_grad():
                plan = self._build()
        if plan is not None:
            run(plan, self)
        return loss

    def _parameters(self) -> Iterator[tuple[int, int, Tensor]]:
        """Every parameter, with its position among all and the number of its group."""
        position = 0
        for g, group in enumerate(self.param_groups):
            for p in group["params"]:
                yield position, g, p
                position += 1

    def _build(self) -> Plan | None:
        """Check everything, then make state and lists. None when there is nothing to do."""
        check_options(self.__dict__)
        for group in self.param_groups:
            self._check_group(group)
        owners = list(self._parameters())
        found = [Found(position, g, p) for position, g, p in owners if p.grad is not None]
        if not found and not any(is_sharded(p) for *_, p in owners):
            return None
        self._refuse_to_begin_in_a_capture(found)
        self._split_counters(found)
        with rolled_back(self.state, found):
            self._init_state(found)
            self._plan = Plan(self, found)
        if not self.master_weights:  # of a checkpoint: they would not follow the parameters from here on
            for f in found:
                self.state[f.owner].pop("master_param", None)
        return self._plan

    def _refuse_to_begin_in_a_capture(self, found: list[Found]) -> None:
        """State made in a graph would be zero again at each replay."""
        new = [f for f in found if f.param.is_cuda and not self._is_complete(
            self.state.get(f.owner, {}), self.param_groups[f.group], f.owner)]  # fmt: skip
        if new and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the first step makes the state of the optimizer: take one step before the capture")

    # Averaged weights -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def swap_ema(self) -> None:
        """Put the moving averages in the place of the parameters, or the parameters back.

        In between, `step`, `state_dict` and `load_state_dict` raise; what is written into the parameters is lost.

        Raises:
            RuntimeError: when the optimizer was built without `ema_decay`.
        """
        if self.ema_decay is None:
            raise RuntimeError("there are no averages: build the optimizer with ema_decay=")
        if self._averages is None:
            self._averages = []
            for p, state in self.state.items():
                if "ema" in state:
                    self._averages.append((p, p.detach().clone()))
                    p.copy_(state["ema"])
        else:
            for p, value in self._averages:
                p.copy_(value)
            self._averages = None

    @contextlib.contextmanager
    def ema_weights(self) -> Iterator[None]:
        """`with optimizer.ema_weights(): evaluate(model)`: the averages in the place of the parameters.

        Raises:
            RuntimeError: when they already are, or the optimizer was built without `ema_decay`.
        """
        self._refuse_while_swapped("ema_weights()")
        self.swap_ema()
        try:
            yield
        finally:
            self.swap_ema()
