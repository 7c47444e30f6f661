"""Center losses that people wrote for themselves: known by what they compute, and computed without N x K distances.

There are many of them, under one name and with different divisors. So the class says nothing; a copy of the module is
run on small random batches, and its value and gradients tell which of the conventions it follows, or that it follows
none.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops import center_loss
from ._tensors import is_served

LARGEST = 10**7  # elements of centers that a probe makes in float64
TOLERANCE = 1e-12
PROBES = ((6, 1.0), (1, 0.01), (9, 100.0), (300, 0.1))  # rows, and how far they are apart: margins show at one of them
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Convention(NamedTuple):
    """loss = sum_i 1/2 ||x_i - c_{y_i}||^2 / divisor(B, D) + constant(K)."""

    divisor: Callable[[int, int], float]
    floor: float = 0.0  # of every distance, those to the other classes (which are masked to 0) included


CONVENTIONS = {
    "sum of squares / batch, distances of at least 1e-12": Convention(lambda b, d: b / 2, 1e-12),
    "sum of squares / batch": Convention(lambda b, d: b / 2),
    "sum of squares": Convention(lambda b, d: 0.5),
    "half the sum of squares": Convention(lambda b, d: 1.0),
    "half the sum of squares / batch": Convention(lambda b, d: b),
    "mean of squares": Convention(lambda b, d: b * d / 2),
}
LEFT_OUT, WRAPPED, REFUSED = "left out", "counted from the end", "refused"


def recognise(module: nn.Module) -> tuple[Callable[..., Tensor], str] | str:
    """The fused forward of a center loss and what it computes, or the reason why there is none.

    Args:
        module: with `centers` (K, D), a parameter or any tensor, and `forward(x, labels)`. It is not run itself, nor
            are its hooks; no random number is drawn from torch's generators. It may be on the meta device.

    Returns:
        (forward, key): `forward(self, x, labels)` to put into a subclass of the module's class, and the convention;
        `forward_of(key)` makes the same function. Or the reason, in one line.

    Note:
        Equal for distances below 1e12, where the clamping kind saturates, and as long as its flags stay what they are.
        What the fused loss does not take (labels that are not a vector of integers, features that are not a matrix)
        goes to the module's own forward.
    """
    reason = _not_even_alike(module)
    if reason:
        return reason
    try:
        with _apart():
            return _probed(module)
    except _NotAlike as err:
        return str(err)
    except Exception as err:
        return f"its forward failed on a probe: {type(err).__name__}: {str(err).splitlines()[0] if str(err) else ''}"


class _NotAlike(Exception):
    """Carries the reason."""


# What it looks like ---------------------------------------------------------------------------------------------------


def _not_even_alike(module: nn.Module) -> str:
    """Why it is not worth a probe, or ""."""
    holders = (module._parameters, module._buffers, vars(module))
    centers = next((holder["centers"] for holder in holders if "centers" in holder), None)
    if type(centers) not in (Tensor, nn.Parameter) or centers.dim() != 2 or not centers.is_floating_point():
        return "it has no `centers`, a floating-point matrix"
    if centers.numel() == 0 or centers.numel() > LARGEST:
        return f"its centers have {centers.numel()} elements, and a probe takes from 1 to {LARGEST}"
    if module._modules:
        return f"it has a module of its own, `{next(iter(module._modules))}`"
    if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
        return "its forward has been replaced"
    named = [*module._parameters.items(), *module._buffers.items(), *_attributes(module).items()]
    for name, value in named:
        if name != "centers" and not _is_plain(value) and not _is_range(value, centers.shape[0]):
            return f"its `{name}` may take part in what it computes"
    parameters = _parameters_of(type(module).forward)
    required = [p for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(parameters) < 2 or parameters[:2] != required or any(p.kind is p.KEYWORD_ONLY for p in parameters):
        return "its forward does not take features and labels, and nothing else that is required"
    return ""


@functools.lru_cache(maxsize=256)
def _parameters_of(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(forward).parameters.values())[1:]


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What the class has put into the instance: not what nn.Module has."""
    return {name: value for name, value in vars(module).items() if name not in _OF_MODULES}


_OF_MODULES = vars(nn.Module()).keys()


def _is_plain(x: Any) -> bool:
    if isinstance(x, (tuple, list, set, frozenset)):
        return all(map(_is_plain, x))
    return all(map(_is_plain, (*x, *x.values()))) if isinstance(x, dict) else isinstance(x, PLAIN)


def _is_range(x: Any, classes: int) -> bool:
    """Whether x is the classes, which some keep to compare labels with."""
    if type(x) is not Tensor or x.is_meta or x.requires_grad:
        return False
    return x.dim() == 1 and len(x) == classes and x.detach().double().tolist() == list(range(classes))


# What it computes -----------------------------------------------------------------------------------------------------


@contextmanager
def _apart() -> Iterator[None]:
    """Run something whatever the surroundings are, and leave no trace in them."""
    dtype = torch.get_default_dtype()
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
    ):
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def _probed(module: nn.Module) -> tuple[Callable[..., Tensor], str]:
    draw = torch.Generator().manual_seed(0)
    left = list(CONVENTIONS)
    classes, features = module.centers.shape
    for rows, scale in PROBES:
        if rows > 9 and rows * max(classes, features) > LARGEST:
            continue
        labels = torch.randint(classes, (rows,), generator=draw)
        if 6 <= rows <= 9:  # the first and the last class, and some more than once
            labels[:4] = torch.tensor([classes - 1, 0, 0, min(1, classes - 1)])
        for training in (True, False) if rows == PROBES[0][0] else (True,):
            copied = _copy(module, draw, scale, training)
            x = (torch.randn(rows, features, generator=draw) * scale).requires_grad_()
            said = _run(copied, x, labels)
            left = [key for key in left if _same(said, _expected(key, copied.centers, x, labels))]
            if not left:
                raise _NotAlike(_why(said, copied, x, labels))
    convention = left[0]
    _refuse_weights(module, convention, draw)
    negative, beyond = (_outside(module, convention, draw, label) for label in (-1, classes))
    if (negative, beyond) not in _PREPARE:
        raise _NotAlike(f"it has a use of its own for labels outside of 0 to {classes - 1}")
    key = f"{convention}; labels below 0 {negative}, above {beyond}"
    return forward_of(key), key


def _refuse_weights(module: nn.Module, convention: str, draw: torch.Generator) -> None:
    """Raise where a number of the instance takes part: a weight of 1, a margin of 0 that may be another one later."""
    for name, value in _attributes(module).items():
        if type(value) is float:
            copied = _copy(module, draw, 1.0, True)
            setattr(copied, name, value + 0.5)
            x = torch.randn(6, module.centers.shape[1], generator=draw).requires_grad_()
            labels = torch.randint(module.centers.shape[0], (6,), generator=draw)
            if not _same(_run(copied, x, labels), _expected(convention, copied.centers, x, labels)):
                raise _NotAlike(f"its `{name}` takes part in what it computes, and may change")


def _copy(module: nn.Module, draw: torch.Generator, scale: float, training: bool) -> Any:
    """The module with random centers in float64 on the CPU, without hooks."""
    centers = torch.randn(module.centers.shape, generator=draw) * scale
    if isinstance(module.centers, nn.Parameter):
        centers = nn.Parameter(centers)
    elif module.centers.requires_grad:
        centers.requires_grad_()
    copied = object.__new__(type(module))
    nn.Module.__init__(copied)
    for name, value in (*_attributes(module).items(), *module._buffers.items()):
        if name != "centers":
            value = value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
            (copied._buffers if name in module._buffers else copied.__dict__)[name] = value
    for holder, theirs in ((copied._parameters, module._parameters), (copied._buffers, module._buffers)):
        if "centers" in theirs:
            holder["centers"] = centers
    if "centers" in vars(module):
        copied.__dict__["centers"] = centers
    if "use_gpu" in vars(copied):
        copied.use_gpu = False
    copied.training = training
    return copied


def _state(module: nn.Module) -> dict[str, Any]:
    named = {**_attributes(module), **module._buffers, **module._parameters}
    return {name: x.detach().clone() if isinstance(x, Tensor) else copy.deepcopy(x) for name, x in named.items()}


def _run(copied: nn.Module, x: Tensor, labels: Tensor) -> list[Tensor]:
    """The loss and its gradients."""
    before, rows, classes = _state(copied), x.detach().clone(), labels.clone()
    loss = type(copied).forward(copied, x, labels)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise _NotAlike(f"its forward gives {_kind(loss)}, not a scalar")
    wanted = [x, copied.centers] if copied.centers.requires_grad else [x]
    found = torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else [None] * len(wanted)
    after = _state(copied)
    same = before.keys() == after.keys() and all(_equal(after[name], x) for name, x in before.items())
    if not (same and torch.equal(rows, x.detach()) and torch.equal(classes, labels)):
        raise _NotAlike("its forward changes its state or its arguments")
    return [loss.detach(), *(torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True))]


def _kind(x: Any) -> str:
    return f"a tensor of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else type(a) is type(b) and a == b


def _expected(key: str, centers: Tensor, x: Tensor, labels: Tensor) -> list[Tensor]:
    """What a convention gives, with negative labels left out."""
    (classes, features), convention = centers.shape, CONVENTIONS[key]
    rows = [i for i, label in enumerate(labels.tolist()) if 0 <= label < classes]
    difference = x.detach()[rows] - centers.detach()[labels[rows]]
    divisor = convention.divisor(len(x), features)
    loss = 0.5 * difference.square().sum() / divisor + convention.floor * (classes - len(rows) / len(x))
    gradients = [torch.zeros_like(x).index_add(0, torch.tensor(rows, dtype=torch.long), difference / divisor)]
    if centers.requires_grad:
        gradients.append(torch.zeros_like(centers).index_add(0, labels[rows], -difference / divisor))
    return [loss, *gradients]


def _same(said: list[Tensor], expected: list[Tensor]) -> bool:
    return all(bool((a - b).norm() <= TOLERANCE * b.norm()) for a, b in zip(said, expected, strict=True))


def _why(said: list[Tensor], copied: Any, x: Tensor, labels: Tensor) -> str:
    for key in CONVENTIONS:
        same = [_same([a], [b]) for a, b in zip(said, _expected(key, copied.centers, x, labels), strict=True)]
        if same[0]:
            what = " and ".join(name for ok, name in zip(same[1:], ("features", "centers"), strict=False) if not ok)
            return f"its value is {key}, but its gradient in the {what} is not that of its value"
    return "its value is that of no center loss that is known here"


def _outside(module: nn.Module, convention: str, draw: torch.Generator, label: int) -> str:
    """What becomes of a row whose label is no class."""
    classes, features = module.centers.shape
    copied = _copy(module, draw, 1.0, True)
    x = torch.randn(3, features, generator=draw).requires_grad_()
    labels = torch.tensor([0, label, classes - 1])
    try:
        said = _run(copied, x, labels)
    except (IndexError, RuntimeError, ValueError, AssertionError):
        return REFUSED
    if _same(said, _expected(convention, copied.centers, x, labels)):
        return LEFT_OUT
    if _same(said, _expected(convention, copied.centers, x, labels % classes)):
        return WRAPPED
    return "used"


# What it becomes ------------------------------------------------------------------------------------------------------

# Of labels (N,) int64 and K, those that `center_loss` treats in the same way: it leaves negative ones out, and refuses
# those from K on.
_PREPARE: dict[tuple[str, str], Callable[[Tensor, int], Tensor]] = {
    (LEFT_OUT, LEFT_OUT): lambda y, k: torch.where(y < k, y, -1),
    (LEFT_OUT, REFUSED): lambda y, k: y,
    (REFUSED, LEFT_OUT): lambda y, k: torch.where(y < 0, k, torch.where(y < k, y, -1)),
    (REFUSED, REFUSED): lambda y, k: torch.where(y < 0, k, y),
    (WRAPPED, REFUSED): lambda y, k: torch.where(y < 0, torch.where(y < -k, k, y + k), y),
}


@functools.lru_cache(maxsize=64)
def forward_of(key: str) -> Callable[..., Tensor]:
    """The fused forward of a convention, as `recognise` names it.

    Raises:
        ValueError: for a key that is not of `recognise`.
    """
    for name, convention in CONVENTIONS.items():
        for (negative, beyond), prepare in _PREPARE.items():
            if key == f"{name}; labels below 0 {negative}, above {beyond}":
                return _make_forward(convention, prepare)
    raise ValueError(f"`key` must be what `recognise` returned, got {key!r}")


def _make_forward(convention: Convention, prepare: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    divisor, floor = convention

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        centers = self.centers
        x, labels = args if len(args) == 2 and not kwargs else _by_name(_own_forward(self, forward), args, kwargs)
        if not _is_served(x, labels, centers):
            return _own_forward(self, forward)(self, *args, **kwargs)
        classes, features = centers.shape
        loss = center_loss(x, prepare(labels.long(), classes), centers, reduction="sum")
        loss = loss / divisor(x.shape[0], features)
        if floor:
            loss = loss + floor * (classes - 1)
        autocast = torch.is_autocast_enabled(x.device.type)
        return loss if autocast else loss.to(torch.promote_types(x.dtype, centers.dtype))

    return forward


def _own_forward(module: Any, fused: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of the class below the one that has the fused one."""
    return next(f for cls in type(module).__mro__ if (f := vars(cls).get("forward")) is not None and f is not fused)


def _by_name(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Features and labels where names are given; (None, None) where there is more than these."""
    names = [p.name for p in _parameters_of(forward)[:2]]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    more = len(args) > 2 or len(given) != len(args) + len(kwargs) or given.keys() != set(names)
    return (None, None) if more else (given[names[0]], given[names[1]])


def _is_served(x: Any, labels: Any, centers: Tensor) -> bool:
    """Whether `center_loss` takes them, as the module does: what it does not take, it has its own error for."""
    if not is_served(x) or not isinstance(labels, Tensor) or x.dim() != 2 or labels.dim() != 1:
        return False
    half = x.dtype in (torch.float16, torch.bfloat16) and centers.dtype == torch.float32
    return (
        (x.dtype == centers.dtype or half)
        and x.shape[1] == centers.shape[1]
        and x.shape[0] == labels.shape[0]
        and x.device == centers.device == labels.device
        and labels.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    )
