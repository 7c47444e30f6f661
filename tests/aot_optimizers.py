"""What tests/test_triton_aot.py compiles of the fused optimizers, and how it calls their launcher."""

from __future__ import annotations

import dataclasses
from typing import Any

TABLES = {"items_ptr": "*i64", "grads_ptr": "*i64", "pieces_ptr": "*i32", "rows_ptr": "*fp64", "steps": "i32"}


@dataclasses.dataclass
class Item:
    param: Any
    grad: Any
    slots: tuple[Any, ...]
    master: Any = None
    average: Any = None
    row: int = 0
    norm_set: int = 0
    index: int = 0
    offset: int = 0
    period: int = 1 << 40
    full_period: int = 1 << 40


@dataclasses.dataclass
class Row:
    values: tuple[Any, ...]
    step: Any


def specialisations() -> dict[str, Any]:
    """Each pair of widths, state, rounding, and what prepares a step. Aligned full blocks move 16 bytes a thread."""
    import torch
    import triton.language as tl

    from dlkernels.triton import _multi_tensor, _norm
    from dlkernels.triton.adamw import adamw_kernel
    from dlkernels.triton.sgdw import sgdw_kernel

    f32, f64, f16, bf16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
    cases: dict[str, Any] = {}

    def step(name, param, slot, slots, ldg, stg, master=False, average=False, seed=None, **place):
        adamw = name.startswith("adamw")
        p, wide = torch.zeros(9, dtype=param), torch.zeros(9, dtype=f64 if param == f64 else f32)
        state = tuple(torch.zeros(9, dtype=slot) if has else None for has in slots)
        item = Item(p, p, state, wide if master else None, wide if average else None, **place)
        runner = _multi_tensor.Runner(name.split()[0], [item], rounding_seed=seed, average_decay=0.5)
        (launch,) = runner._launches
        constants = {**launch.constants, "BLOCK": _multi_tensor.BLOCK, "TAIL": _multi_tensor.TAIL}
        width = {"ldg": ldg, "stg": stg}
        cases[name] = (adamw_kernel if adamw else sgdw_kernel, TABLES, constants, launch.num_warps, width)

    two, three, one, none = (True, True, False), (True, True, True), (True,), (False,)
    step("adamw float32", f32, f32, two, 8, 6)
    step("adamw float32 amsgrad average", f32, f32, three, 12, 10, average=True)
    step("adamw float64", f64, f64, two, 16, 12)
    step("adamw bfloat16", bf16, bf16, two, 4, 3)
    step("adamw float16 float32 moments master", f16, f32, two, 3, 3, master=True)
    step("adamw bfloat16 float32 moments master", bf16, f32, two, 3, 3, master=True)
    step("adamw bfloat16 rounded", bf16, bf16, two, 4, 3, seed=1)
    step("adamw bfloat16 rounded amsgrad average", bf16, bf16, three, 7, 6, average=True, seed=1)
    step("adamw bfloat16 rounded float32 moments", bf16, f32, two, 6, 5, seed=1)
    step("adamw bfloat16 rounded odd shard", bf16, bf16, two, 4, 3, seed=1, offset=3)
    step("adamw bfloat16 rounded columns", bf16, bf16, two, 4, 3, seed=1, period=8, full_period=16)
    step("adamw float32 bfloat16 moments rounded", f32, bf16, two, 6, 4, seed=1)
    step("sgdw float32", f32, f32, one, 6, 4)
    step("sgdw float32 no momentum", f32, f32, none, 4, 2)
    step("sgdw bfloat16 master average", bf16, f32, one, 3, 3, master=True, average=True)
    step("sgdw bfloat16 rounded", bf16, bf16, one, 3, 2, seed=1)

    for name, dtype in (("float32", tl.float32), ("bfloat16", tl.bfloat16), ("float64", tl.float64)):
        acc = tl.float64 if name == "float64" else tl.float32
        types = {
            "partial_ptr": "*fp64",
            **{k: TABLES[k] for k in ("grads_ptr", "pieces_ptr", "steps")},
            "numels_ptr": "*i64",
        }
        constants = {"DTYPE": dtype, "BLOCK": _multi_tensor.SQUARES_BLOCK, "TAIL": _multi_tensor.TAIL, "ACC": acc}
        cases[f"squares {name}"] = (_norm.squares_kernel, types, constants, 8, {"ldg": 1})
    types = {"partial_ptr": "*fp64", "bounds_ptr": "*i64", "out_ptr": "*fp64"}
    cases["squares sums"] = (_norm.sum_sets_kernel, types, {"BLOCK": _multi_tensor.SET_BLOCK}, 4, {})
    for adamw in (True, False):
        types = {
            "table_ptr": "*i64", "inv_scale_ptr": "*fp32", "found_inf_ptr": "*fp32", "norm_squares_ptr": "*fp64",
            "rows_ptr": "*fp64", "norm_ptr": "*fp32", "rows": "i32",
        }  # fmt: skip
        flags = ("INV_SCALE", "FOUND_INF", "NORM", "CLIP", "SKIP_NONFINITE")
        for groups in (1, 1000) if adamw else (1,):
            block, num_warps = _multi_tensor.prepare_block(groups)
            constants = {"ADAMW": adamw, **dict.fromkeys(flags, True), "BLOCK_R": block}
            name = f"prepare {'adamw' if adamw else 'sgdw'}" + (f" {groups} groups" if groups > 1 else "")
            cases[name] = (_norm.prepare_kernel, types, constants, num_warps, {})
    return cases


def bind() -> None:
    """Step with other sizes, scalars, seeds and places of scalars: nothing but dtypes decides what is compiled."""
    import torch

    from dlkernels.triton._multi_tensor import Runner

    for dtype, n in ((torch.float32, 1), (torch.float32, 5000), (torch.float64, 70)):
        p, counter = torch.zeros(n, dtype=dtype), torch.zeros(())
        for seed, lr in ((None, 0.1), (3, torch.tensor(0.1)), (1 << 63, 1e-3)):
            rest = {"adamw": (0.0, 1.0, 0.9, 0.99, 1e-8), "sgdw": (n, -1.0, 0.9, True, False)}
            for family in rest:
                slots = (p, p, None) if family == "adamw" else (p,)
                item = Item(p, p, slots, average=p, index=n, offset=n, norm_set=n % 2)
                runner = Runner(family, [item], rounding_seed=seed, average_decay=0.1 * lr)
                total = runner.squares(2 + n)
                options = {"norm_squares": total[n % 2], "inv_scale": torch.ones(3)[n % 3], "found_inf": torch.ones(1)}
                runner.run([Row((lr, *rest[family]), counter)], **options, max_norm=1.0 + n, skip_nonfinite=True)


# Binaries of one dtype that `bind` makes of each kernel. What prepares a step differs by family instead.
BINARIES = {"adamw_kernel": 1, "sgdw_kernel": 1, "squares_kernel": 1, "prepare_kernel": 1}
