"""Cosine annealing with warm restarts, and the weight decay that goes with the length of a run: AdamWR, SGDWR."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .. import _checks

DECOUPLINGS = {None: 0, "lr": 1, "schedule": 2}

# An epoch this close to a restart, relatively, is the restart: with T_0 = 0.1 the third is at 0.30000000000000004,
# and a loop of batches comes to 3 / 10. Above the rounding of `_start`, far below the length of any batch.
_SNAP = 1e-12

# First cycles in a run, and T_mult, at most: _SNAP times this is still a small part of a cycle.
_MOST = 1e9


def normalized_weight_decay(weight_decay_norm: float, batch_size: float, dataset_size: float, epochs: float) -> float:
    r"""The weight decay that a normalised one stands for: one setting for runs of any length.

        lambda = lambda_norm * sqrt(b / (B * T))

    Args:
        weight_decay_norm: lambda_norm, a finite number >= 0. The authors use 0.025 to 0.05 on CIFAR-10.
        batch_size: b, the samples of one update over all processes, > 0.
        dataset_size: B, the samples of the training set, > 0; b / B may also be 1 / (batches of an epoch).
        epochs: T, the epochs of the run, or of the current cycle T_i under warm restarts, > 0.

    Returns:
        lambda, a float: what the paper's update takes per step, theta -= eta_t * lambda * theta, with eta_t in [0, 1].

    Raises:
        TypeError: an argument that is not a number.
        ValueError: a negative norm; a size or a number of epochs that is not positive; NaN and infinities.

    Note:
        `torch.optim.AdamW` multiplies its decay with the learning rate, which the paper does not: it needs
        lambda / lr as its `weight_decay`. So do dlkernels' optimizers with decoupling="lr"; with decoupling="schedule"
        they take lambda itself. `CosineWarmRestarts` sets the right one.

    Reference:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Appendix B.

    Example:
        >>> f"{normalized_weight_decay(0.025, batch_size=128, dataset_size=50_000, epochs=100):.6e}"
        '1.264911e-04'
    """
    norm = _checks.non_negative("weight_decay_norm", weight_decay_norm)
    b, size = _positive("batch_size", batch_size), _positive("dataset_size", dataset_size)
    return norm * math.sqrt(b / (size * _positive("epochs", epochs)))


class CosineWarmRestarts(LRScheduler):
    r"""Cosine annealing with warm restarts and, when asked, the decay of each cycle: what makes AdamW an AdamWR.

        lr_t  = eta_t * base_lr
        eta_t = eta_min + (1 - eta_min) * (1 + cos(pi * T_cur / T_i)) / 2
        T_{i+1} = T_mult * T_i,   and with weight_decay_norm   lambda_i = weight_decay_norm * sqrt(b / (B * T_i))

    T_cur counts the epochs since the last restart, in fractions; the moments of the optimizer are kept at a restart.

    Args:
        optimizer: any `torch.optim.Optimizer`, ours included. A learning rate that is a tensor is written in place.
        T_0: epochs of the first cycle, a number > 0.
        T_mult: what a cycle is longer than the one before, a number >= 1.
        eta_min: the smallest *multiplier*, in [0, 1], as in the paper. (The `eta_min` of
            `torch.optim.lr_scheduler.CosineAnnealingWarmRestarts` is a learning rate, one for all groups: where that
            one takes 1e-5 with lr=1e-3, this one takes 1e-2. With 0, the default, the two schedulers agree.)
        last_epoch: -1 to begin; else the number of the last call of `step` to go on from, which counts epochs, or
            batches with `steps_per_epoch`. The optimizer's groups must then have their "initial_lr".
        steps_per_epoch: calls of `step()` in an epoch, for loops and trainers that call it after each update: a bare
            `step()` goes on by 1 / steps_per_epoch epochs, instead of by one epoch. (A scheduler prepared by accelerate
            is called once per process for each update, unless split_batches=True: all these count.)
        weight_decay_norm: lambda_norm. A number is for all groups whose `weight_decay` is not 0: groups made with 0,
            as usual for biases and norms, stay without decay. A list or tuple gives each group its own, 0 included;
            groups added later then keep the decay that they come with. None leaves every decay alone.
        batch_size: b, the samples of one update over all processes.
        dataset_size: B, the samples of the training set. Without the two sizes b / B is 1 / steps_per_epoch.
        decoupling: what the optimizer multiplies `weight_decay` with. "lr": with the learning rate, as all of
            `torch.optim`; the groups get lambda / base_lr, so that a step decays by the paper's eta_t * lambda.
            "schedule": with eta_t; the groups get lambda. None takes what the group, else the optimizer's defaults,
            call `decoupling` (dlkernels' optimizers), else "lr".

    Raises:
        TypeError: not an Optimizer, not a number.
        ValueError: T_0 <= 0, T_mult < 1, eta_min outside [0, 1], steps_per_epoch <= 0; a norm without sizes, without
            a group that it could act on, or with another number of entries than groups.
        KeyError: last_epoch >= 0 and a group without "initial_lr".

    Note:
        * The rates are a closed form of the epoch: jumps both ways, no drift, and a restart is never missed by rounding
          (torch's scheduler misses the one at epoch 121 after `step(121)` for T_0=1, T_mult=3).
        * The decay is written at the start, at each restart and by `load_state_dict`; in between it is yours. A
          tensor `weight_decay` is filled in place; a number that a CUDA graph has recorded is not seen to change.
        * Coupled penalties get the same lambda / base_lr. For `torch.optim.SGD` without momentum that is the decay
          (Proposition 1 of the paper); for `torch.optim.Adam` none is (Proposition 2). A group whose base_lr is 0 keeps
          its decay: there is nothing to divide by.
        * It sets the rates, as torch's scheduler does, and does not multiply the present ones: put a warm-up before it
          with `SequentialLR`, whose milestone is then epoch 0; the decay of the first cycle holds during the warm-up
          too. In a `ChainedScheduler` it overrides the schedulers in front of it.
        * Groups added later begin at the current epoch; their base_lr is their "initial_lr", else their "lr".
        * Attributes, to be read: `T_cur`, `T_i`, and `cycle`, which counts the restarts.

    Reference:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, eq. 14 and 15 and Appendix B;
        "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, eq. 5.

    Example:
        >>> import torch
        >>> from dlkernels.optim import CosineWarmRestarts
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        >>> scheduler = CosineWarmRestarts(
        ...     optimizer, T_0=2, T_mult=2, steps_per_epoch=2, weight_decay_norm=0.05, batch_size=8, dataset_size=16
        ... )
        >>> for batch in range(6):
        ...     optimizer.step()
        ...     group = optimizer.param_groups[0]
        ...     print(f"lr {group['lr']:.4f}  eta * lambda {group['lr'] * group['weight_decay']:.4f}")
        ...     scheduler.step()
        lr 0.1000  eta * lambda 0.0250
        lr 0.0854  eta * lambda 0.0213
        lr 0.0500  eta * lambda 0.0125
        lr 0.0146  eta * lambda 0.0037
        lr 0.1000  eta * lambda 0.0177
        lr 0.0962  eta * lambda 0.0170
    """

    def __init__(
        self,
        optimizer: Optimizer,
        T_0: float,
        T_mult: float = 1,
        eta_min: float = 0.0,
        last_epoch: int = -1,
        *,
        steps_per_epoch: float | None = None,
        weight_decay_norm: float | Sequence[float] | None = None,
        batch_size: float | None = None,
        dataset_size: float | None = None,
        decoupling: str | None = None,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"`optimizer` must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.T_0 = _positive("T_0", T_0)
        self.T_mult = _checks.finite("T_mult", T_mult)
        if not 1.0 <= self.T_mult <= _MOST:
            raise ValueError(f"`T_mult` must be in [1, {_MOST:g}], got {T_mult}")
        self.eta_min = _checks.in_unit_interval("eta_min", eta_min)
        if _checks.integer("last_epoch", last_epoch) < -1:
            raise ValueError(f"`last_epoch` must be -1 or more, got {last_epoch}")
        self.steps_per_epoch = None if steps_per_epoch is None else _positive("steps_per_epoch", steps_per_epoch)
        _checks.one_of("decoupling", decoupling, DECOUPLINGS)
        self.decoupling = decoupling
        self.batch_size = None if batch_size is None else _positive("batch_size", batch_size)
        self.dataset_size = None if dataset_size is None else _positive("dataset_size", dataset_size)
        self.weight_decay_norm = self._checked_norm(weight_decay_norm, optimizer)
        self.T_cur, self.T_i, self.cycle = 0.0, self.T_0, 0
        # One for each group seen so far: its lambda_norm, or None where the decay is not ours to set.
        self._norms: list[float | None] = []
        # The epoch is counted from the last jump, which keeps `step(epoch)` exact and bare steps free of drift.
        self._jump_epoch, self._jump_step = 0.0, 0
        super().__init__(optimizer, last_epoch)

    def step(self, epoch: float | None = None) -> None:
        """Goes on after an update: by one epoch, by 1 / steps_per_epoch where that was given, or to an epoch.

        Args:
            epoch: the epoch to go to, in fractions and in either direction: `step(epoch + i / len(loader))`. Bare
                steps go on from there.

        Raises:
            TypeError: `epoch` is not a number.
            ValueError: `epoch` is negative, not finite, or further than 1e9 T_0 away.
        """
        if epoch is None:
            super().step()
        else:
            self._update_lr(epoch)
            self._step_count += 1

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates at the current epoch, one for each group; tensors are new ones."""
        eta = self.eta_min + (1.0 - self.eta_min) * ((1.0 + math.cos(math.pi * self.T_cur / self.T_i)) / 2.0)
        return [base_lr * eta for base_lr in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """The whole state but the optimizer: numbers, lists of them, and tensors where learning rates are tensors."""
        state = super().state_dict()
        return {key: list(value) if isinstance(value, list) else value for key, value in state.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a saved state, the options of the saved scheduler included, and writes the decay of its cycle.

        Args:
            state_dict: what `state_dict` gave. Learning rates come back with the optimizer's own state.

        Raises:
            ValueError: the state of another kind of scheduler, or of an optimizer with more groups.
        """
        missing = [key for key in ("cycle", "_norms", "_jump_epoch", "base_lrs") if key not in state_dict]
        if missing:
            raise ValueError(f"`state_dict` must be that of a CosineWarmRestarts, got one without {', '.join(missing)}")
        saved, present = len(state_dict["base_lrs"]), len(self.optimizer.param_groups)
        if saved > present:
            raise ValueError(f"`state_dict` must be for at most {present} groups, those of the optimizer, got {saved}")
        super().load_state_dict({k: list(v) if isinstance(v, list) else v for k, v in state_dict.items()})
        self._write_decay(0)

    def _update_lr(self, epoch: float | None = None) -> None:
        """One step, or a jump: also what `SequentialLR` calls, with 0, when this scheduler's turn comes."""
        per_epoch = self.steps_per_epoch or 1.0
        if epoch is None:
            step = self.last_epoch + 1
            now = max(self._jump_epoch + (step - self._jump_step) / per_epoch, 0.0)
            cycle, T_cur, T_i = self._position(now)
        else:
            now = _checks.non_negative("epoch", epoch)
            cycle, T_cur, T_i = self._position(now)
            step = math.floor(now * per_epoch)
            self._jump_epoch, self._jump_step = now, step
        started = cycle != self.cycle or now == 0.0
        self.last_epoch, self.cycle, self.T_cur, self.T_i = step, cycle, T_cur, T_i

        known = len(self._norms)
        self._adopt_groups()
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            _write(group, "lr", lr)
        self._last_lr = [_copy(group["lr"]) for group in self.optimizer.param_groups]
        self._write_decay(0 if started else known)

    def _position(self, epoch: float) -> tuple[int, float, float]:
        """The cycle that an epoch is in, the epochs since it began, and its length."""
        if epoch > _MOST * self.T_0:
            raise ValueError(f"`epoch` must be at most {_MOST:g} * T_0, got {epoch} with T_0={self.T_0}")
        m, cycles = self.T_mult, epoch / self.T_0
        n = math.floor(cycles if m == 1.0 else math.log1p(cycles * (m - 1.0)) / math.log1p(m - 1.0))
        # The logarithm is only near the number of the cycle: rounding may put it on the wrong side of a restart.
        late = epoch * (1.0 + _SNAP)
        while n > 0 and self._start(n) > late:
            n -= 1
        while self._start(n + 1) <= late:
            n += 1
        return n, max(epoch - self._start(n), 0.0), self.T_0 * m**n

    def _start(self, n: int) -> float:
        """The epoch at which cycle n begins: T_0 (1 + m + ... + m^(n-1)), exact for whole numbers below 2^53."""
        m = self.T_mult
        if m == 1.0:
            return self.T_0 * n
        powers = m**n - 1.0 if m > 1.1 else math.expm1(n * math.log1p(m - 1.0))  # m^n - 1 cancels for m near 1
        return self.T_0 * powers / (m - 1.0)

    def _adopt_groups(self) -> None:
        """Takes in the groups that were added since the last step."""
        groups, norm = self.optimizer.param_groups, self.weight_decay_norm
        for group in groups[len(self.base_lrs) :]:
            self.base_lrs.append(_copy(group.setdefault("initial_lr", _copy(group["lr"]))))
        for index, group in enumerate(groups[len(self._norms) :], len(self._norms)):
            if isinstance(norm, list):
                self._norms.append(norm[index] if index < len(norm) else None)
            else:
                self._norms.append(norm if group.get("weight_decay", 0) != 0 else None)

    def _write_decay(self, first: int) -> None:
        """Gives the groups from number `first` on the decay of the current cycle."""
        b, size = self.batch_size, self.dataset_size
        if b is None or size is None:
            b, size = 1.0, self.steps_per_epoch
        rows = list(zip(self.optimizer.param_groups, self.base_lrs, self._norms))
        for group, base_lr, norm in rows[first:]:
            if norm is None:
                continue
            decay = normalized_weight_decay(norm, b, size, self.T_i)
            if _decoupling(self.decoupling, group, self.optimizer) == "lr":
                if float(base_lr) == 0.0:
                    continue
                decay /= float(base_lr)
            _write(group, "weight_decay", decay)

    def _checked_norm(self, norm: Any, optimizer: Optimizer) -> float | list[float] | None:
        """Everything that can be wrong with the normalised decay, before anything is written."""
        if (self.batch_size is None) != (self.dataset_size is None):
            given, lacking = (
                ("batch_size", "dataset_size") if self.dataset_size is None else ("dataset_size", "batch_size")
            )
            raise ValueError(f"`{lacking}` must be given together with `{given}`, got None")
        if norm is None:
            return None
        if self.batch_size is None and self.steps_per_epoch is None:
            raise ValueError(
                "`weight_decay_norm` needs `batch_size` and `dataset_size`, or `steps_per_epoch`, got none"
            )
        groups = optimizer.param_groups
        for index, group in enumerate(groups):
            if "weight_decay" not in group:
                raise ValueError(f"`optimizer` must have groups with a `weight_decay`, got group {index} without one")
            _decoupling(self.decoupling, group, optimizer)
        if isinstance(norm, (list, tuple)):
            if len(norm) != len(groups):
                raise ValueError(
                    f"`weight_decay_norm` must have one entry for each of {len(groups)} groups, got {len(norm)}"
                )
            return [_checks.non_negative(f"weight_decay_norm[{i}]", x) for i, x in enumerate(norm)]
        norm = _checks.non_negative("weight_decay_norm", norm)
        if not any(group["weight_decay"] != 0 for group in groups):
            raise ValueError(
                "`weight_decay_norm` needs a group with `weight_decay` > 0, or one entry per group, got 0 in all"
            )
        return norm


def _decoupling(option: str | None, group: dict[str, Any], optimizer: Optimizer) -> str:
    """What the optimizer multiplies the decay of a group with: "lr" or "schedule"."""
    if option is None:
        option = group.get("decoupling", optimizer.defaults.get("decoupling", getattr(optimizer, "decoupling", "lr")))
        _checks.one_of("decoupling of the optimizer", option, {"lr": 1, "schedule": 2})
    return option


def _write(group: dict[str, Any], key: str, value: float | Tensor) -> None:
    """A new value for a group's option; an option that is a tensor stays that tensor."""
    if isinstance(group[key], Tensor):
        group[key].fill_(value.reshape(()) if isinstance(value, Tensor) else value)
    else:
        group[key] = value


def _copy(value: float | Tensor) -> float | Tensor:
    return value.clone() if isinstance(value, Tensor) else value


def _positive(name: str, value: Any) -> float:
    x = _checks.number(name, value)
    if not 0.0 < x < math.inf:
        raise ValueError(f"`{name}` must be a finite number > 0, got {value}")
    return x
