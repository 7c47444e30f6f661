"""What tests/test_triton_aot.py compiles of the center-loss family, and how it calls its launchers."""

from __future__ import annotations

import os
from typing import Any

POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}
FIXED = {
    **dict.fromkeys(("t_ptr", "sorted_ptr", "order_ptr", "slot_ptr", "in_ptr"), "*i64"),
    **dict.fromkeys(("count_ptr", "nonzero_ptr"), "*i32"),
    **dict.fromkeys(("g_ptr", "loss_ptr", "divisor_ptr", "partial_ptr"), "*fp32"),
    **dict.fromkeys(("inverse_ptr", "total_ptr", "step_ptr", "value_ptr"), "*fp32"),
    **dict.fromkeys(("alpha", "factor"), "fp32"),
}


def _case(
    kernel: Any, dtype: str, constants: dict[str, Any], num_warps: int, wide: dict[str, int], **given: str
) -> Any:
    """(kernel, types, constants, warps, widths); given: types of single arguments."""
    types = {}
    for name in kernel.arg_names:
        if name not in constants:
            types[name] = given.get(name, FIXED.get(name, POINTERS[dtype] if name.endswith("_ptr") else "i32"))
    return kernel, types, constants, num_warps, wide


def specialisations() -> dict[str, Any]:
    """Each kernel in float32 and bfloat16; attention of every kind; every use of a class's sum."""
    import triton.language as tl

    from dlkernels.triton import _center_loss_atomics as atomics
    from dlkernels.triton import _center_loss_island as island
    from dlkernels.triton import _center_loss_rows as kernels
    from dlkernels.triton import _center_loss_segments as segments
    from dlkernels.triton import center_loss

    cases: dict[str, Any] = {}
    vector = {"D_VECTOR": 8, "ACC": tl.float32}

    def rows(name, dtype, n, d, attention=0, loss=2, grad=1, divisor=3, wide=None, **given):
        p = center_loss.plan(n, d, center_loss.TILE // (2 if attention else 1))
        constants = {
            **vector, "ATTENTION": attention, "LOSS": loss, "GRAD": grad, "DIVISOR": divisor,
            "BLOCK_R": p.block_r, "BLOCK_D": p.block_d,
        }  # fmt: skip
        wide = wide or {"ldg": 4 if attention else 2, "stg": 2 if attention else 1}
        cases[f"center rows {name}"] = _case(
            kernels.center_rows_kernel, dtype, constants, p.num_warps, wide, **given
        )  # fmt: skip

    rows("mean float32 2048x512", "float32", 2048, 512)
    rows("mean float16 beside float32 64x2048", "float16", 64, 2048, divisor=4, c_ptr="*fp32")
    rows("mean bfloat16 logits 2048x512", "bfloat16", 2048, 512, attention=2, wide={"ldg": 3, "stg": 2})
    rows("backward float32 logits 4096x512", "float32", 4096, 512, attention=2, loss=0, grad=2, divisor=0)

    def sums(name, dtype, n, k, d, attention=0, out=0, wide=None, **given):
        p = segments.plan(n, k, d)
        constants = {
            **vector, "ATTENTION": attention, "OUT": out, "EMA": False, "BY_CLASS": out == 2 and k <= n,
            "PIECE": p.piece, "STEPS": p.steps, "BLOCK_R": p.block_r, "BLOCK_D": p.block_d,
        }  # fmt: skip
        cases[f"center segments {name}"] = _case(
            segments.segments_kernel, dtype, constants, p.num_warps, wide or {"ldg": 2}, **given
        )  # fmt: skip

    # Whole tiles take several 16-byte loads of x.
    sums("gradient float32 2048x512 of 100", "float32", 2048, 100, 512)
    sums("gradient bfloat16 logits 2048x512 of 1000", "bfloat16", 2048, 1000, 512, attention=2)
    sums("update bfloat16 2^20x256 of 1000", "bfloat16", 1 << 20, 1000, 256, out=1, c_ptr="*fp32", out_ptr="*fp32")
    sums("step float32 2048x512 of 100000", "float32", 2048, 100_000, 512, attention=1, out=2, out_ptr="*fp32")
    merge = {
        **vector, "OUT": 1, "EMA": True, "BY_CLASS": False, "PIECE": 1024, "BLOCK_D": 128,
        "BLOCK_S": segments.MERGE_BLOCK,
    }  # fmt: skip
    cases["center merge update float32"] = _case(segments.merge_kernel, "float32", merge, 8, {"ldg": 1})
    # Triton 3.7 compiles no tile of a row per thread whose int32 labels are widened before they are compared.
    tall = {**vector, "ATTENTION": 0, "OUT": 1, "BLOCK_R": 128, "BLOCK_D": 16}
    types = {"t_ptr": "*i32", "count_ptr": "*i32", "sum_ptr": "*fp32"}
    cases["center atomic rows float32 int32 labels D=8"] = _case(
        atomics.atomic_rows_kernel, "float32", tall, 4, {"ldg": 2}, **types
    )  # fmt: skip
    tile = {**vector, "BLOCK_R": 16, "BLOCK_D": 128}
    for dtype, out in (("float32", 1), ("bfloat16", 0)):
        rows_of = {**tile, "ATTENTION": 2 * out, "OUT": out}
        cases[f"center atomic rows {dtype}"] = _case(
            atomics.atomic_rows_kernel, dtype, rows_of, 4, {"ldg": 2}, count_ptr="*i32", sum_ptr="*fp32"
        )  # fmt: skip
        apply = {**tile, "OUT": out, "EMA": False}
        cases[f"center atomic apply {dtype}"] = _case(
            atomics.atomic_apply_kernel, dtype, apply, 4, {"ldg": 1, "stg": 1}, count_ptr="*i32", sum_ptr="*fp32"
        )  # fmt: skip
    count = {"MERGE": False, "FINAL": False, "BLOCK": center_loss.COUNT_BLOCK, "ACC": tl.float32}
    cases["center count"] = _case(kernels.count_rows_kernel, "float32", count, 8, {}, out_ptr="*i64")

    whole, norms, columns = (stage.value for stage in (island.SUM_WHOLE, island.SUM_NORMS, island.SUM_COLUMNS))

    def islands(name, kernel, dtype, k, d, wide, **option):
        p = island.plan(k, d)
        assert p.whole == option.get("WHOLE", option.get("STAGE") == whole), name
        tile = {**vector, "BLOCK_K": p.block_k, "BLOCK_D": p.block_d, **option}
        cases[f"island {name}"] = _case(kernel, dtype, tile, p.num_warps, wide)

    islands("sums float32 1000x512", island.island_sums_kernel, "float32", 1000, 512, {"ldg": 4}, STAGE=whole)
    islands("sums bfloat16 100000x512", island.island_sums_kernel, "bfloat16", 100_000, 512, {"ldg": 2}, STAGE=whole)
    islands("norms float32 100x10000", island.island_sums_kernel, "float32", 100, 10_000, {"ldg": 2}, STAGE=norms)
    islands("columns float32 100x10000", island.island_sums_kernel, "float32", 100, 10_000, {"ldg": 2}, STAGE=columns)
    both, part = {"ldg": 2, "stg": 2}, island.island_rows_kernel
    islands("gradient bfloat16 100000x512", part, "bfloat16", 100_000, 512, both, WHOLE=True, MOVE=False)
    islands("move float32 100x10000", part, "float32", 100, 10_000, both, WHOLE=False, MOVE=True)
    islands("move float32 1000x512", part, "float32", 1000, 512, both, WHOLE=True, MOVE=True)
    cases["island value"] = _case(island.island_value_kernel, "float32", {"BLOCK": 256}, 4, {})
    return cases


def bind() -> None:
    """Call every launcher, with two batch sizes and two alphas per dtype: nothing else may decide what is compiled."""
    import torch

    from dlkernels.triton import center_loss

    for dtype, n, alpha in ((torch.float32, 2100, 0.5), (torch.float32, 2999, 0.25), (torch.float64, 2100, 0.5)):
        x, c = torch.zeros(n, 24, dtype=dtype), torch.ones(7, 24, dtype=dtype)
        y = torch.zeros(n, dtype=torch.int64)
        center_loss.center_loss_fwd(x, y, c, None, False, -n, 1, True, True)
        center_loss.center_loss_fwd(x, y, c, x, True, -n, 1, True, True)
        center_loss.center_loss_bwd(x[:, 0].contiguous(), x, y, c, None, False, -n, True)
        center_loss.island_pairs_bwd(c[0, 0], c, *center_loss.island_pairs_fwd(c)[1:])
        for atomics in ("0", "1"):
            os.environ["DLKERNELS_ATOMICS"] = atomics
            for weight in (0.0, alpha):
                center_loss.update_centers_(c, x, y, None, False, alpha, False, weight, -n)
        os.environ["DLKERNELS_ATOMICS"] = "0"


# Binaries of one dtype that `bind` makes of each kernel.
BINARIES = {
    "center_rows_kernel": 3,  # forward without and with attention, backward
    "segments_kernel": 3,  # gradient, update, step
    "merge_kernel": 3,
    "atomic_rows_kernel": 2,  # update, step
    "atomic_apply_kernel": 2,
    "island_sums_kernel": 1,
    "island_rows_kernel": 2,  # gradient, update
    "island_value_kernel": 1,
    "count_rows_kernel": 1,
}
