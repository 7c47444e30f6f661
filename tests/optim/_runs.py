"""One optimizer over all combinations of what its groups may differ in, recorded step by step, and then judged."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from _trajectories import (
    BETAS,
    BF16,
    CHECKPOINTS,
    DTYPES,
    EPS,
    F16,
    F32,
    F64,
    HALF,
    OPTIMIZER_OPTIONS,
    SCALE,
    SLOTS,
    STEPS,
    Layout,
    adamw,
    assert_stored,
    given,
    layout,
    product,
    rounding_bits,
    sgdw,
)
from torch import nn

import dlkernels as dk
from dlkernels import _backend
from dlkernels.testing import assert_within_budget

NEAR = 4 * torch.finfo(F32).eps  # as the error budget has it
LR = {"adamw": 0.02, "sgdw": 0.05}
SEED = 12345678901234567
BAD, FOUND, ABSENT = (6, 61), (9, 100), (4, 5, 30, 31, 150)  # steps with an infinite gradient, an overflow, no gradient


def rates(lay: Layout) -> np.ndarray:
    """The learning rate of each step and group: a schedule that begins below the lr of construction."""
    start = LR[lay.family] * (1 + np.arange(len(lay.groups)) % 4 / 4)
    lr = start * (1 - 0.6 * np.abs(np.cos(np.arange(STEPS) / 9.0)))[:, None]
    tensor = np.array([g["tensor_lr"] for g in lay.groups])
    return np.where(tensor, lr.astype(np.float32).astype(np.float64), lr)


def groups_of(lay: Layout, params: list[nn.Parameter], device: Any) -> list[dict[str, Any]]:
    made = []
    tensors = [
        torch.tensor(LR[lay.family] * (1 + i / 4), device=device) for i in range(4)
    ]  # one for several groups, as callers do
    for g, options in enumerate(lay.groups):
        lr = LR[lay.family] * (1 + g % 4 / 4)
        group = {k: v for k, v in options.items() if k not in ("tensor_lr", "mode")}
        group["lr"] = tensors[g % 4] if options["tensor_lr"] else lr
        if lay.family == "adamw":
            group |= {"betas": BETAS[g % 3], "eps": EPS[g % 3]}
        else:
            group["momentum"], group["momentum_scaling"], group["nesterov"] = options["mode"]
        group["params"] = [p for i, p in enumerate(params) if lay.group_of_position[i] == g]
        made.append(group)
    return made


class Run:
    """An optimizer with options, stepped; `memory[name][s]` is what was stored before step s."""

    def __init__(self, family: str, config: dict[str, Any], backend: str, *, steps: int = STEPS, shift: int = 0,
                 rotate: bool = False, num_groups: int | None = None, device: Any = "cpu",
                 dtypes: tuple[Any, ...] = DTYPES) -> None:  # fmt: skip
        self.config, self.steps, self.device = config, steps, torch.device(device)
        # The interpreter makes bfloat16 of float32 by cutting off, where a GPU rounds to nearest.
        self.cuts_off = backend == "triton" and self.device.type == "cpu"
        c = dict(config)
        self.scaled = c.pop("scaled")
        self.rounds = c["stochastic_rounding"]
        dtypes = tuple(d for d in dtypes if d != F16 or c["master_weights"] or not self.rounds)  # refused otherwise
        self.lay = lay = layout(family, dtypes, rotate, shift, num_groups)
        self.slot_dtype = {
            d: F64 if d == F64 else c["state_dtype"] or (F32 if c["master_weights"] and d in HALF else d)
            for d in dtypes
        }
        self.wide = {d: F64 if d == F64 else F32 for d in dtypes}
        self.has_master = {d: c["master_weights"] and d in HALF for d in dtypes}
        start, self.grads = given(lay, self.scaled)
        self.grads = self.grads[:steps]
        self.lr = rates(lay)[:steps]
        self.flat = {"param": lay.flat({d: d for d in dtypes}, device)}
        for d, s in lay.segments.items():
            self.flat["param"][d].copy_(torch.from_numpy(start[s]))
        self.params = [nn.Parameter(view) for view in lay.views(self.flat["param"])]
        kind = {"adamw": dk.optim.AdamW, "sgdw": dk.optim.SGDW}[family]
        more = {} if family == "adamw" else {"momentum_scaling": "gradient"}
        with dk.backend(backend):
            self.optimizer = kind(groups_of(lay, self.params, device), seed=SEED, **c, **more)
            self._go()

    def _go(self) -> None:
        lay, opt = self.lay, self.optimizer
        grad_flat = lay.flat({d: d for d in lay.segments}, self.device)
        grads = lay.views(grad_flat)
        lrs = [(g, group["lr"]) for g, group in enumerate(opt.param_groups)]
        tensors = {id(lr): (g, lr) for g, lr in lrs if isinstance(lr, torch.Tensor)}
        self.stepped = np.ones((self.steps, lay.n), dtype=bool)
        self.norms: list[torch.Tensor | None] = []
        self.memory: dict[str, np.ndarray] = {}
        self._record(0)
        for s in range(self.steps):
            for g, group in enumerate(opt.param_groups):
                if not lay.groups[g]["tensor_lr"]:
                    group["lr"] = float(self.lr[s, g])
            for g, tensor in tensors.values():
                tensor.fill_(self.lr[s, g])
            for d, part in lay.segments.items():
                grad_flat[d].copy_(torch.from_numpy(self.grads[s, part]))
            if self.scaled:
                opt.grad_scale = torch.tensor(SCALE, device=self.device)
                opt.found_inf = torch.tensor(float(s in FOUND), device=self.device)
            if self.config["skip_nonfinite"] and s in BAD:
                grads[-1 if grads[-1].numel() else -2].fill_(float("inf"))
                self.stepped[s] = False
            if self.scaled and s in FOUND:
                self.stepped[s] = False
            if s in ABSENT:
                self.stepped[s, lay.position % 3 == s % 2] = False
            if s == 0 or s in ABSENT or s - 1 in ABSENT:
                for i, (p, grad) in enumerate(zip(self.params, grads, strict=True)):
                    p.grad = None if s in ABSENT and i % 3 == s % 2 else grad
            opt.step()
            norm = opt.grad_norm
            self.norms.append(None if norm is None else norm.cpu())
            if self.scaled:
                del opt.grad_scale, opt.found_inf
            if s == 0:
                self._adopt()
            self._record(s + 1)
        self.t = np.cumsum(self.stepped, axis=0)

    def _adopt(self) -> None:
        """Move the state that the optimizer made into flat memory: as a caller may, and quick to read."""
        lay, state = self.lay, self.optimizer.state
        wide, slots = self.wide, SLOTS[lay.family]
        kinds = {**dict.fromkeys(slots, self.slot_dtype), "master_param": wide, "ema": wide}
        for name, dtypes in kinds.items():
            if not any(name in state[p] for p in self.params):
                continue
            flat = lay.flat(dtypes, self.device)
            for p, view in zip(self.params, lay.views(flat), strict=True):
                if name in state[p]:
                    old = state[p][name]
                    assert old.dtype == view.dtype, f"{name} of {p.dtype}: {old.dtype}, expected {view.dtype}"
                    assert old.shape == p.shape and (old.stride() == p.stride() or p.numel() <= 1), name
                    state[p][name].data = view.copy_(old)
            self.flat[name] = flat
        for i, p in enumerate(self.params):
            options = lay.groups[lay.group_of_position[i]]
            expected = {"step"} if lay.family == "adamw" or self.rounds else set()
            if lay.family == "adamw":
                expected |= set(slots if options["amsgrad"] else slots[:2])
            elif options["mode"][0]:
                expected |= set(slots)
            expected |= {"master_param"} if self.has_master[p.dtype] else set()
            expected |= {"ema"} if self.config["ema_decay"] is not None else set()
            assert set(state[p]) == expected

    def _record(self, at: int) -> None:
        for name, flat in self.flat.items():
            if name not in self.memory:
                self.memory[name] = np.zeros((self.steps + 1, self.lay.n))
                if name in ("master_param", "ema"):
                    self.memory[name][0] = self.memory["param"][0]
            self.memory[name][at] = self.lay.read(flat)

    # Judged ---------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """What the gradients of each step are multiplied with, and their norm after unscaling, in float64."""
        inv = 1 / SCALE if self.scaled else 1.0
        norm = inv * np.sqrt(np.where(self.absent, 0.0, self.grads**2).sum(1))
        most = self.config["max_grad_norm"]
        return inv * (1.0 if most is None else np.minimum(1.0, most / (norm + 1e-6))) * np.ones_like(norm), norm

    @functools.cached_property
    def absent(self) -> np.ndarray:
        steps = np.arange(self.steps)[:, None]
        return np.isin(steps, ABSENT) & (self.lay.position % 3 == steps % 2)

    @functools.cached_property
    def inputs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """g, lr and decay by step and element, in float64."""
        lay = self.lay
        g = self.grads * self.factors[0][:, None] * np.where(lay.maximize, -1.0, 1.0)
        lr = self.lr[:, lay.group]
        start = LR[lay.family] * (1 + np.arange(len(lay.groups)) % 4 / 4)
        tensor = np.array([o["tensor_lr"] for o in lay.groups])
        start = np.where(tensor, start.astype(np.float32).astype(np.float64), start)
        decay = np.array([o["weight_decay"] for o in lay.groups])
        scheduled = np.array([o["decoupling"] == "schedule" for o in lay.groups])
        return g, lr, np.where(scheduled, self.lr / start * decay, self.lr * decay)[:, lay.group]

    def check_norms(self) -> None:
        if self.config["max_grad_norm"] is None and not self.config["skip_nonfinite"]:
            assert self.norms == [None] * self.steps
            return
        for s, (norm, exact) in enumerate(zip(self.norms, self.factors[1], strict=True)):
            if self.config["skip_nonfinite"] and s in BAD:
                assert norm == float("inf")
            else:
                assert_within_budget(norm, torch.tensor(exact, dtype=F64), scalar=True, what=f"norm of step {s}")

    def check_counters(self) -> None:
        last = dict(zip(self.lay.position, self.t[-1], strict=True))
        for i, p in enumerate(self.params):
            if "step" in self.optimizer.state[p] and i in last:
                assert self.optimizer.state[p]["step"].item() == last[i], f"step of parameter {i}"

    def check_steps(self) -> None:
        """Every step from what was stored before it."""
        lay, stepped = self.lay, self.stepped
        before = {name: x[:-1] for name, x in self.memory.items()}
        after = {name: x[1:] for name, x in self.memory.items()}
        for name in after:
            kept = np.where(stepped, 0, after[name] - before[name])
            assert not kept.any(), f"{name} has changed in a step that was left out"
        g, lr, decay = self.inputs
        theta = before["param"].copy()
        for d, s in lay.segments.items():
            if self.has_master[d]:
                theta[:, s] = before["master_param"][:, s]
        slots = [before.get(name, np.zeros_like(theta)) for name in SLOTS[lay.family]]
        t = np.maximum(self.t, 1)
        h = lay.h
        if lay.family == "adamw":
            new, m, v, v_max, update = adamw(theta, g, *slots, t, lr, decay, h)
            near_m = NEAR * (np.abs(h.beta1 * slots[0]) + np.abs((1 - h.beta1) * g))
            near = {"exp_avg": near_m, "exp_avg_sq": NEAR * v, "max_exp_avg_sq": NEAR * v_max}
            exact = {"exp_avg": m, "exp_avg_sq": v, "max_exp_avg_sq": v_max}
            used = v_max
            if self.rounds and "max_exp_avg_sq" in after:  # rounded at random, what is stored is what counts
                for d, s in lay.segments.items():
                    if self.slot_dtype[d] == BF16:
                        used[:, s] = np.where(
                            h.amsgrad[s], np.maximum(slots[2][:, s], after["exp_avg_sq"][:, s]), v[:, s]
                        )
                        near["max_exp_avg_sq"][:, s] = 0
            c1, c2 = (table[t, h.column].astype(np.float64) for table in h.corrections)
            scale = lr / c1 / (np.sqrt(used / c2) + h.eps)
            update = scale * m
            new = theta * (1 - decay) - update
            near_update = near_m * scale
            has = {"max_exp_avg_sq": h.amsgrad}
        else:
            new, m, update = sgdw(theta, g, slots[0], lr, decay, h)
            gain = np.where(h.paper, lr, 1.0)
            near_m = NEAR * (np.abs(h.momentum * slots[0]) + np.abs(gain * g))
            rate = np.where(h.paper, 1.0, lr)
            near_update = rate * np.where(h.nesterov, h.momentum * near_m + NEAR * np.abs(g), near_m)
            exact, near = {"momentum_buffer": m}, {"momentum_buffer": near_m}
            has = {"momentum_buffer": h.momentum > 0}
        near_theta = NEAR * (np.abs(theta) + np.abs(update)) + near_update
        for d, s in lay.segments.items():
            ok = stepped[:, s]
            for stream, name in enumerate(exact, 1):
                here = ok & has[name][s] if name in has else ok
                bits = None
                if self.rounds and self.slot_dtype[d] == BF16 and stream < 3:
                    bits = rounding_bits(lay, SEED, stream)[self.t[:, s], np.arange(s.start, s.stop)][here]
                self._assert(
                    after[name][:, s], exact[name][:, s], near[name][:, s], here, self.slot_dtype[d], bits, name, d
                )
            name = "master_param" if self.has_master[d] else "param"
            bits = None
            if self.rounds and d == BF16 and not self.has_master[d]:
                bits = rounding_bits(lay, SEED, 0)[self.t[:, s], np.arange(s.start, s.stop)][ok]
            dtype = self.wide[d] if self.has_master[d] else d
            self._assert(after[name][:, s], new[:, s], near_theta[:, s], ok, dtype, bits, name, d)
            if self.has_master[d]:
                master = after["master_param"][:, s]
                self._assert(after["param"][:, s], master, np.zeros_like(master), ok, d, None, "param", d)
            if "ema" in after:
                old, now = before["ema"][:, s], after[name][:, s]
                mean = old + (1 - self.config["ema_decay"]) * (now - old)
                self._assert(
                    after["ema"][:, s], mean, NEAR * (np.abs(old) + np.abs(now)), ok, self.wide[d], None, "ema", d
                )

    def _assert(self, actual: Any, exact: Any, near: Any, where: Any, dtype: Any, bits: Any, name: str, d: Any) -> None:
        if bits is None and dtype == BF16 and self.cuts_off:
            bits = np.uint32(0)
        if d == F64 and dtype == F64:
            near = near * (16 * torch.finfo(F64).eps / NEAR) + np.abs(exact) * 1e-13
        assert_stored(actual[where], exact[where], near[where], dtype, bits, f"{name} of {d}")

    def check_trajectory(self) -> None:
        """All the way, where nothing is stored in half precision."""
        lay = self.lay
        wide = [d for d in lay.segments if self.slot_dtype[d] in (F32, F64) and (d not in HALF or self.has_master[d])]
        exact, eager = self._way(np.longdouble), {F32: self._way(np.float32), F64: self._way(np.float64)}
        for s in CHECKPOINTS:
            if s > self.steps:
                break
            for d in wide:
                part, kind = lay.segments[d], self.wide[d]
                for name in exact[s]:
                    stored_as = "master_param" if name == "param" and self.has_master[d] else name
                    if stored_as not in self.memory:
                        continue
                    actual = torch.from_numpy(self.memory[stored_as][s, part]).to(kind)
                    right = torch.from_numpy(exact[s][name][part].astype(np.float64))
                    theirs = torch.from_numpy(eager[kind][s][name][part]).to(kind)
                    assert_within_budget(actual, right, theirs, what=f"{name} of {d} after {s} steps")

    def _way(self, kind: Any) -> dict[int, dict[str, np.ndarray]]:
        key = (self.lay, kind, self.scaled, self.config["max_grad_norm"], self.config["skip_nonfinite"], self.steps)
        if key not in _WAYS:
            _WAYS[key] = self._walk(kind)
        return _WAYS[key]

    def _walk(self, kind: Any) -> dict[int, dict[str, np.ndarray]]:
        lay = self.lay
        g, lr, decay = (x.astype(kind) for x in self.inputs)
        names = ("param", *SLOTS[lay.family])
        now = {name: np.zeros(lay.n, dtype=kind) for name in names}
        now["param"] = given(lay, self.scaled)[0].astype(kind)
        seen = {}
        for s in range(self.steps):
            if lay.family == "adamw":
                t = np.maximum(self.t[s], 1)
                theta, m, v, v_max, _ = adamw(
                    now["param"], g[s], *(now[k] for k in names[1:]), t, lr[s], decay[s], lay.h
                )
                new = (theta, m, v, np.where(lay.h.amsgrad, v_max, 0))
            else:
                theta, m, _ = sgdw(now["param"], g[s], now["momentum_buffer"], lr[s], decay[s], lay.h)
                new = (theta, np.where(lay.h.momentum > 0, m, 0))
            now = {k: np.where(self.stepped[s], x, now[k]).astype(kind) for k, x in zip(names, new, strict=True)}
            if s + 1 in CHECKPOINTS:
                seen[s + 1] = now
        return seen

    def check(self) -> None:
        self.check_norms()
        self.check_counters()
        self.check_steps()
        self.check_trajectory()


_WAYS: dict[Any, Any] = {}


def backends() -> list[Any]:
    """For pytest.mark.parametrize: all that can take a step on this machine."""
    names: list[Any] = ["reference", pytest.param("cpp", marks=pytest.mark.needs("cpp"))]
    if _backend.interpreting() and importlib.util.find_spec("dlkernels.triton._multi_tensor"):
        names.append(pytest.param("triton", marks=pytest.mark.needs("interpreter")))
    return names


def name_of(options: dict[str, Any]) -> str:
    return "-".join(f"{key}={str(value).removeprefix('torch.')}" for key, value in options.items())


# The tests below run what is in one of these and all combinations of the rest.
OUTER = product(
    {k: v for k, v in OPTIMIZER_OPTIONS.items() if k in ("master_weights", "state_dtype", "stochastic_rounding")}
)
INNER = product({k: v for k, v in OPTIMIZER_OPTIONS.items() if k not in OUTER[0]})
