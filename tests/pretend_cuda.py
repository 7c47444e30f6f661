"""A CUDA device that is not there: the tests of `--device cuda` without a GPU, to find what a GPU would refuse.

    make test-pretended

Tensors "on cuda" lie in CPU memory and carry a mark, by storage, which follows them through every operator: below
autograd, in backward passes too. What a GPU would refuse is refused: tensors of two devices in one operator, numpy() of
a CUDA tensor, a generator of the other device, a wait for the device where `set_sync_debug_mode("error")` or a capture
forbids it. A captured graph is a list of operators, which a replay runs again on the same tensors. The kernels that run
are the CPU's: this says nothing about CUDA's, and all about the code around them, tests and benchmarks included.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

HERE, CPU = torch.device("cuda", 0), torch.device("cpu")
STAND_IN = torch.device("cpu", 0)  # for CUDA, below Python: operators see the index, which tensors on the CPU lack
CASES = 8  # of each test function, about: the code around kernels does not depend on dtypes and shapes

# Tests that a pretended device cannot tell anything by, and why.
BEYOND = {
    "compile": "tracers trace the marks too",
    "export": "tracers trace the marks too",
    "opcheck": "tracers trace the marks too",
    "test_transforms": "inside transforms the marks are not seen from Python",
    "test_update_reads_no_value": "fake tensors have devices of their own",
    "threads": "other threads know nothing of it",
    "checkpoint": "saved tensors are looked at where marks are not",
    "test_full_covariance": "saved tensors are looked at where marks are not",
    "test_weight_norm_multi": "it keeps away from dispatch modes, which the marks are carried by",
    "autocast": "autocast for CUDA does nothing to tensors in CPU memory",
    "test_half_precision": "autocast for CUDA does nothing to tensors in CPU memory",
    "test_module": "a tensor that is pickled loses its mark",
    "test_copies": "a tensor that is pickled loses its mark",
    "test_combinations_of_options": "Triton's interpreter cuts off where a GPU rounds",
    "test_optim_cuda_graphs": "launches of Triton's interpreter are no operators: a capture does not see them",
    "out_of_range": "kernels on the CPU raise where those on a GPU return NaN",
    "test_a_rejected_call": "kernels on the CPU raise where those on a GPU return NaN",
    "memory_pool": "there is no allocator",
    "test_cuda_large": "there is no memory for it",
}


# Marks ----------------------------------------------------------------------------------------------------------------


class State:
    sync = "default"  # of set_sync_debug_mode
    capture: Graph | None = None
    inside = False  # within a call on a marked tensor: what it makes by that tensor's options is marked
    off = False  # within a call that names the CPU
    sweep_at = 10_000


MARKED: dict[int, StorageWeakRef] = {}  # by address, which a weak reference keeps from being used again


def storage(t: Tensor) -> Any:
    for _ in range(20):
        try:
            return t.untyped_storage()
        except (NotImplementedError, RuntimeError):
            if not torch._C._functorch.is_functorch_wrapped_tensor(t):
                return None  # sparse: no memory of its own
            t = torch._C._functorch.get_unwrapped(t)
    return None


def is_marked(t: Tensor) -> bool:
    memory = storage(t)
    return memory is not None and memory._cdata in MARKED


def mark(tensors: Any) -> None:
    for t in tensors_in(tensors):
        if (memory := storage(t)) is not None and memory._cdata not in MARKED:
            MARKED[memory._cdata] = StorageWeakRef(memory)
    if len(MARKED) > State.sweep_at:
        for address in [address for address, reference in MARKED.items() if reference.expired()]:
            del MARKED[address]
        State.sweep_at = 2 * len(MARKED) + 10_000


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


@contextlib.contextmanager
def calling(inside: bool, off: bool) -> Iterator[None]:
    before = State.inside, State.off
    State.inside, State.off = inside, off
    try:
        yield
    finally:
        State.inside, State.off = before


# Below autograd: marks are carried on, what the device refuses is refused ---------------------------------------------

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default,
    aten._unique2.default, aten.unique_consecutive.default, aten.unique_dim.default, aten.is_nonzero.default,
    aten.repeat_interleave.Tensor, aten.bincount.default,
}  # fmt: skip
COPIES = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default, aten._foreach_copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}


def waits(func: Any) -> None:
    if State.sync == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation: {func}")
    if State.capture is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {func}")


def check_devices(func: Any, tensors: list[Tensor], marks: list[bool]) -> None:
    if len(set(marks)) < 2 or func in COPIES:
        return
    if func in INDEXED and marks[0]:  # indices on the CPU are copied
        waits(func)
        return
    numbers = all(m or t.dim() == 0 for m, t in zip(marks, tensors, strict=True))
    if numbers and not func.namespace.startswith("dlkernels"):
        return
    devices = ", ".join("cuda:0" if m else "cpu" for m in marks)
    raise RuntimeError(f"Expected all tensors to be on the same device: {func} got {devices}")


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = tensors_in((args, kwargs))
        if any(t.is_meta or type(t).__name__ in ("FakeTensor", "FunctionalTensor") for t in tensors):
            return func(*args, **kwargs)
        marks = [is_marked(t) for t in tensors]
        check_devices(func, tensors, marks)
        # "cpu" is also what an operator names for "the device of that tensor".
        made_on = kwargs.get("device") == STAND_IN or ((any(marks) if tensors else State.inside) and not State.off)
        if func in WAITS and any(marks):
            waits(func)
        if func in COPIES and len({*marks, made_on}) > 1 and not (kwargs.get("non_blocking") or True in args[2:]):
            waits(func)
        out = func(*args, **kwargs)
        if made_on:
            before = {s._cdata for t in tensors if (s := storage(t)) is not None}
            mark([t for t in tensors_in(out) if (s := storage(t)) is not None and s._cdata not in before])
        if State.capture is not None and (any(marks) or made_on):
            State.capture.calls.append((func, args, kwargs, out))
        return out


# Above autograd: devices by name, and what tensors say of theirs ------------------------------------------------------

T = torch.Tensor


def device_of(value: Any) -> torch.device | None:
    if isinstance(value, torch.device):
        return value
    return torch.device(value) if isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu") else None


def is_cuda(value: Any) -> bool:
    found = device_of(value)
    return found is not None and found.type == "cuda"


class Devices(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if (special := SPECIAL.get(func)) is not None:
            return special(*args, **kwargs)
        kwargs.pop("pin_memory", None)
        named = kwargs.get("device")
        inside = any(is_marked(t) for t in tensors_in((args, kwargs)))
        check_generator(kwargs.get("generator"), is_cuda(named) or inside)
        args, kwargs = tree_map_only(torch.device, lambda d: STAND_IN if d.type == "cuda" else d, (args, kwargs))
        if is_cuda(named):
            kwargs["device"] = STAND_IN
        with calling(inside, device_of(named) == CPU):
            out = func(*args, **kwargs)
        if is_cuda(named) and not isinstance(out, torch.nn.Module):
            mark(out)
        return out


def check_generator(given: Any, on: bool) -> None:
    if given is not None and (given.device.type == "cuda") != on:
        wanted = "cuda" if on else "cpu"
        raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{given.device.type}'")


def to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    other = next((a for a in (*args, kwargs.pop("other", None)) if isinstance(a, Tensor)), None)
    if other is not None:
        args = (HERE if is_marked(other) else CPU, other.dtype)
    found = [device_of(a) for a in (*args, kwargs.pop("device", None))]
    named = next((d for d in found if d is not None), None)
    rest = [a for a in args if a is not None and device_of(a) is None]
    if named is None or named.type not in ("cuda", "cpu") or (named.type == "cuda") == is_marked(x):
        given = [named] if named is not None and named.type not in ("cuda", "cpu") else []
        flags = all(isinstance(a, bool) for a in rest) and kwargs.keys() <= {"non_blocking"}
        return x if flags and not given else T.to(x, *given, *rest, **kwargs)
    dtype = kwargs.pop("dtype", None) or next((a for a in rest if isinstance(a, torch.dtype)), x.dtype)
    flags = [a for a in rest if isinstance(a, bool)]
    kwargs = {"non_blocking": bool(flags and flags[0]), **kwargs, "copy": True}
    with calling(False, named.type == "cpu"):
        return T.to(x, STAND_IN if named.type == "cuda" else CPU, dtype, **kwargs)


def on_cpu_only(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_marked(x):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return function(x, *args, **kwargs)

    return call


def beside(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What it makes is on the device of its tensor."""

    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = function(x, *args, **kwargs)
        if is_marked(x):
            mark(made)
        return made

    return call


def read(name: str, of_cuda: Any) -> tuple[Any, Callable[..., Any]]:
    getter = getattr(T, name).__get__
    return getter, lambda x, *rest: of_cuda if is_marked(x) else getter(x)


SPECIAL: dict[Any, Callable[..., Any]] = {
    torch.device: torch.device,
    torch._C._nn._parse_to: torch._C._nn._parse_to,
    T.to: to,
    T.cpu: lambda x, **kwargs: to(x, CPU, **kwargs),
    T.cuda: lambda x, device=None, non_blocking=False, **kwargs: to(x, HERE, non_blocking=non_blocking),
    T.new_tensor: beside(T.new_tensor),
    T.__deepcopy__: beside(T.__deepcopy__),
    T.numpy: on_cpu_only(T.numpy),
    T.__array__: on_cpu_only(T.__array__),
    T.get_device: lambda x: 0 if is_marked(x) else -1,
    T.pin_memory: lambda x, *args: x.clone(),
    T.is_pinned: lambda x, *args: False,
    T.record_stream: lambda x, stream: None,
    **dict([read("device", HERE), read("is_cuda", True), read("is_cpu", False)]),
}


# torch.cuda -----------------------------------------------------------------------------------------------------------


class Graph:
    """A replay runs the operators again, and writes what they return over what they returned."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        with torch.no_grad(), torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            for func, args, kwargs, out in self.calls:
                for old, new in zip(tensors_in(out), tensors_in(func(*args, **kwargs)), strict=True):
                    if old is not new and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def pool(self) -> tuple[int, int]:
        return 0, 0

    def reset(self) -> None:
        self.calls.clear()


@contextlib.contextmanager
def graph(into: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
    State.capture = into
    try:
        yield
    finally:
        State.capture = None


class Stream:
    cuda_stream, device = 0, HERE

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, other: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, *args: Any) -> Event:
        return Event()


class Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 1.0


_GENERATOR = torch.Generator


class Generator(torch.Generator):
    """Its device is a name, its numbers are the CPU's."""

    def __new__(cls, device: Any = "cpu") -> Any:
        made = _GENERATOR.__new__(cls, "cpu")
        made.named = HERE if is_cuda(device) else torch.device(device)
        return made

    def __init__(self, device: Any = "cpu") -> None: ...

    @property
    def device(self) -> torch.device:
        return self.named


PROPERTIES = types.SimpleNamespace(
    name="pretended", major=9, minor=0, multi_processor_count=132, L2_cache_size=1 << 12, total_memory=1 << 30,
    shared_memory_per_block=48 << 10, shared_memory_per_block_optin=227 << 10, warp_size=32,
    shared_memory_per_multiprocessor=228 << 10, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
)  # fmt: skip


@contextlib.contextmanager
def nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def install() -> None:
    """Until the process ends."""
    for name, value in {
        "is_available": lambda: True, "is_initialized": lambda: True, "init": lambda: None, "_lazy_init": lambda: None,
        "device_count": lambda: 1, "current_device": lambda: 0, "set_device": lambda *a: None, "device": nothing,
        "get_device_capability": lambda *a: (9, 0), "get_device_properties": lambda *a: PROPERTIES,
        "get_device_name": lambda *a: PROPERTIES.name, "synchronize": lambda *a: None, "_sleep": lambda *a: None,
        "Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": graph, "stream": nothing,
        "current_stream": lambda *a: Stream(), "default_stream": lambda *a: Stream(),
        "graph_pool_handle": lambda: (0, 0), "is_current_stream_capturing": lambda: State.capture is not None,
        "set_sync_debug_mode": lambda mode: setattr(State, "sync", mode), "get_sync_debug_mode": lambda: State.sync,
        "mem_get_info": lambda *a: (1 << 30, 1 << 30), "empty_cache": lambda: None, "memory_allocated": lambda *a: 0,
        "max_memory_allocated": lambda *a: 0, "reset_peak_memory_stats": lambda *a: None,
        "manual_seed": lambda seed: None, "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda *a: torch.get_rng_state(), "set_rng_state": lambda s, *a: torch.set_rng_state(s),
    }.items():  # fmt: skip
        setattr(torch.cuda, name, value)
    torch.Generator = Generator
    engine = torch.autograd.graph._engine_run_backward

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with Devices():  # off while it handles `backward`; Python's backward passes run within
            return engine(*args, **kwargs)

    torch.autograd.graph._engine_run_backward = torch.autograd._engine_run_backward = run_backward
    Devices().__enter__()
    Operators().__enter__()
    from dlkernels import _backend, _library

    _backend.fast = lambda x: None  # compiled entries do not see marks
    _library.LIBRARY.impl("scale_stored_grad_", _scale_stored_grad_, "CPU")


def _scale_stored_grad_(stored: Tensor, grad_output: Tensor, divisor: Tensor | None) -> None:
    """An operator that the CPU does without."""
    stored.copy_(torch.ops.dlkernels.scale_stored_grad(grad_output, stored, divisor))


# pytest -p pretend_cuda -----------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    if torch.cuda.is_available():
        raise pytest.UsageError("a CUDA device is here: there is nothing to pretend")
    if config.getoption("--device") != "cuda":
        raise pytest.UsageError("a pretended device needs --device cuda")
    install()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        if not any(word in item.nodeid for word in BEYOND):
            groups.setdefault(item.nodeid.split("[")[0], []).append(item)
    kept = {item for group in groups.values() for item in group[:: max(1, len(group) // CASES)]}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
