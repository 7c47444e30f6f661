"""What goes into copies, pickles and checkpoints of the optimizers, and how it comes back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._options import OPTIONS
from ._sharding import local_of

HALF = (torch.bfloat16, torch.float16)


class SavedOptimizer(torch.optim.Optimizer):
    """What FusedOptimizer does about them."""

    _slots: tuple[str, ...]  # names of the moments in the state
    _own: tuple[str, ...] = ()  # further attributes to pickle

    def _forget_plan(self) -> None:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        more = {name: getattr(self, name) for name in (*OPTIONS, "decoupling", *self._own)}
        return {**super().__getstate__(), **more, "_averages": self._averages, "_norm": self._norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_plan()
        if self.fused_unscale:
            self._step_supports_amp_scaling = True

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's optimizer has it: every parameter with a `step` of its own."""
        self._refuse_while_swapped("state_dict()")
        before_other_hooks = self.register_state_dict_post_hook(SavedOptimizer._own_counters, prepend=True)
        try:
            return super().state_dict()
        finally:
            before_other_hooks.remove()

    def _own_counters(self, state_dict: dict[str, Any]) -> None:
        """Counters are shared here; whoever gets a state_dict may count each parameter up by itself."""
        capturable = {
            i for g in state_dict["param_groups"] if g.get("capturable") or g.get("fused") for i in g["params"]
        }
        on_cpu: dict[int, Tensor] = {}  # each counter is waited for once
        for i, state in list(state_dict["state"].items()):
            if isinstance(state, dict) and isinstance(state.get("step"), Tensor):
                step = state["step"].detach()
                if i not in capturable:
                    if id(state["step"]) not in on_cpu:
                        on_cpu[id(state["step"])] = step.cpu()
                    step = on_cpu[id(state["step"])]
                state_dict["state"][i] = {**state, "step": step.clone()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` of this class or of torch's optimizer gave.

        Moments get `state_dtype`, or keep their dtype where it is None; master copies and averages keep float32. What
        is missing is made from the parameters.
        """
        self._refuse_while_swapped("load_state_dict()")
        base_lrs = [group.get("base_lr") for group in self.param_groups]
        adapted: list[dict[str, Any]] = []  # by the hooks of others, which may replace it
        after_other_hooks = self.register_load_state_dict_pre_hook(lambda _, given: adapted.append(given))
        before_other_hooks = self.register_load_state_dict_post_hook(
            lambda _: self._take_loaded(adapted[-1], base_lrs), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            after_other_hooks.remove()
            before_other_hooks.remove()

    def _take_loaded(self, state_dict: dict[str, Any], base_lrs: list[Any]) -> None:
        """What torch has not loaded as it was: dtypes, one counter for equal steps, what its groups do not say."""
        for group, base_lr in zip(self.param_groups, base_lrs, strict=True):
            if base_lr is not None:
                group.setdefault("base_lr", base_lr)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        counters: dict[Any, Tensor] = {}
        for i, p in zip(ids, params, strict=True):
            saved, state = state_dict["state"].get(i), self.state.get(p)
            if not saved or not state:
                continue
            for name, value in saved.items():  # torch has cast everything to the parameter's dtype
                if isinstance(value, Tensor) and value.is_floating_point() and name != "step":
                    wanted = self._dtype_on_load(name, value, p)
                    state[name] = value.detach().to(device=p.device, dtype=wanted, copy=True)
            if "step" in state:
                step = state["step"]
                key = (float(step), local_of(p).device)
                if key not in counters:
                    counters[key] = torch.tensor(key[0], dtype=torch.float32, device=self._counter_device(p))
                state["step"] = counters[key]
        self._forget_plan()

    def _dtype_on_load(self, name: str, value: Tensor, p: Tensor) -> torch.dtype:
        if p.dtype == torch.float64:
            return torch.float64
        if name in self._slots:
            kept = value.dtype if value.dtype in (p.dtype, torch.float32, torch.bfloat16) else p.dtype
            return self.state_dtype or (torch.float32 if self.master_weights and p.dtype in HALF else kept)
        return torch.float32 if name in ("master_param", "ema") else p.dtype

    def _counter_device(self, p: Tensor) -> torch.device:
        """On GPUs the kernel counts, so that a step can be captured, or skipped without waiting."""
        device = local_of(p).device
        return device if device.type == "cuda" else torch.device("cpu")

    def _refuse_while_swapped(self, what: str) -> None:
        if self._averages is not None:
            raise RuntimeError(f"{what} needs the parameters, and their averages are in their place: swap_ema() first")
