"""Triton kernels compiled ahead of time for every architecture, no GPU needed: they compile, nothing spills, loads and
stores of aligned rows are 16 bytes wide, and registers stay below the limits in triton_aot_limits.json.

    pytest tests/test_triton_aot.py
    python tests/test_triton_aot.py --update      raise the limits to what the installed Triton needs, after a change

Each architecture is compiled in a process of its own: a failure inside of the compiler aborts the process.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import aot_center_loss
import aot_layers
import aot_optimizers
import pytest

LIMITS = Path(__file__).with_name("triton_aot_limits.json")
CAPABILITIES = (75, 80, 90, 100)
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16", "float64": "*fp64"}

pytestmark = pytest.mark.needs("aot")


# What is compiled: name -> (kernel, types of arguments, constants, warps, widths that must be there) ------------------


def specialisations() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], int, dict[str, int]]]:
    """Representative ones: every target kind, gamma kind, tile kind and dtype at least once."""
    import triton.language as tl

    from dlkernels.triton import (
        _common,
        _rows,
        focal_loss,
        gccs_loss,
        region_biased_loss,
        stochastic_depth,
        stored_grad,
        weight_norm,
    )

    cases: dict[str, Any] = {}
    scalars = {"normalizer_ptr": "*fp32", "divisor_ptr": "*fp32", "g_ptr": "*fp32", "loss_ptr": "*fp32"}

    def sigmoid(name, dtype, target, kind, split=0, gamma=2, loss=2, grad=1, divisor=2, wide=("ldg", "stg")):
        types = {
            **scalars, "x_ptr": POINTERS[dtype], "t_ptr": target, "dx_ptr": POINTERS[dtype], "alpha_1": "fp32",
            "alpha_0": "fp32", "gamma": "fp32", "ignore_index": "i32", "numel": "i32", "count": "i32",
            "num_classes": "i32", "magic": "i64", "steps": "i32",
        }  # fmt: skip
        constants = {
            "TARGET": kind, "GAMMA": gamma, "LOSS": loss, "GRAD": grad, "DIVISOR": divisor,
            "FOLD": dtype != "float16", "SPLIT": split, "BLOCK": focal_loss.BLOCK, "ACC": tl.float32,
        }  # fmt: skip
        cases[f"sigmoid {name}"] = (focal_loss._sigmoid_focal_kernel, types, constants, 4, dict.fromkeys(wide, 1))

    sigmoid("mean float32", "float32", "*fp32", 0)
    sigmoid("mean bfloat16", "bfloat16", "*bf16", 0)
    sigmoid("mean float16 gamma 3.7", "float16", "*fp16", 0, gamma=-1)
    sigmoid("mean float32 uint8 targets", "float32", "*u8", 1)
    sigmoid("mean bfloat16 class indices", "bfloat16", "*i64", 2, split=1, divisor=3)
    sigmoid("rows float32 gamma 0", "float32", "*i32", 1, gamma=0, loss=1, grad=0, divisor=0)
    sigmoid("backward bfloat16", "bfloat16", "*bf16", 0, loss=0, grad=2, divisor=0)

    def softmax(
        name, dtype, row, c, n=4096, s=1, gamma=2, loss=2, grad=1, divisor=3, weight=False, wide=("ldg", "stg")
    ):
        tile = _rows.plan(n, c, s, _rows.MAX_RESIDENT_DENSE if row else _rows.MAX_RESIDENT)
        types = {
            **scalars, "x_ptr": POINTERS[dtype], "t_ptr": POINTERS[dtype] if row == 2 else "*i64", "w_ptr": "*fp32",
            "dx_ptr": POINTERS[dtype], "gamma": "fp32", "label_smoothing": "fp32", "ignore_index": "i32",
            "count": "i32", "n": "i32", "c_vectors": "i32", "s_vectors": "i32", "blocks_s": "i32",
            "stride_gn": "i32", "stride_gs": "i32",
        }  # fmt: skip
        constants = {
            "C_VECTOR": _rows.vector(c), "S_VECTOR": _rows.vector(s), "ROW": row, "GAMMA": gamma,
            "HAS_WEIGHT": weight, "MEAN_OF_WEIGHTS": weight, "LOSS": loss, "GRAD": grad, "DIVISOR": divisor,
            "FOLD": dtype != "float16", "STRIDED": s > 1, "LOOPED": tile.looped, "WIDE": False,
            "BLOCK_C": tile.block_c, "BLOCK_R": tile.block_r, "ACC": tl.float32,
        }  # fmt: skip
        width = dict.fromkeys(wide, 1)
        cases[f"softmax {name}"] = (_rows.softmax_focal_kernel, types, constants, tile.num_warps, width)

    softmax("mean float32 C=1000", "float32", 0, 1000)
    softmax("mean bfloat16 C=1000 weights", "bfloat16", 0, 1000, gamma=0, weight=True)
    softmax("mean float32 C=10", "float32", 0, 10, wide=())
    softmax("mean float32 C=16384", "float32", 0, 16384)
    softmax("mean bfloat16 C=16384 gamma 0.5", "bfloat16", 0, 16384, gamma=-1)
    softmax("mean bfloat16 C=128000", "bfloat16", 0, 128000, gamma=0)
    softmax("smoothed float32 C=8192", "float32", 1, 8192)
    softmax("probabilities float32 C=8192 gamma 0.5", "float32", 2, 8192, gamma=-1)
    softmax("probabilities bfloat16 C=32000", "bfloat16", 2, 32000)
    softmax("mean float16 C=21 S=4096", "float16", 0, 21, n=8, s=4096)
    softmax("mean float32 C=2000 S=3136", "float32", 0, 2000, n=8, s=3136)
    softmax("backward float32 C=1000 S=3136", "float32", 0, 1000, n=8, s=3136, loss=0, grad=2, divisor=0)

    scale_types = {"g_ptr": "*fp32", "x_ptr": "*bf16", "divisor_ptr": "*fp32", "y_ptr": "*bf16", "numel": "i32"}
    scale = {"HAS_DIVISOR": True, "IN_PLACE": True, "BLOCK": 4096, "ACC": tl.float32}
    cases["scale stored gradient"] = (stored_grad._scale_kernel, scale_types, scale, 8, {"ldg": 1, "stg": 1})
    count_types = {
        "t_ptr": "*i64", "w_ptr": "*fp32", "out_ptr": "*fp32", "numel": "i32", "ignore_index": "i32",
        "num_classes": "i32", "per_label": "i32",
    }  # fmt: skip
    count = {"HAS_WEIGHT": True, "FINAL": False, "BLOCK": 4096, "STEPS": 4, "ACC": tl.float32}
    cases["count labels"] = (_common.count_kernel, count_types, count, 8, {})
    final_types = {
        "partial_ptr": "*fp32", "divisor_ptr": "*fp32", "out_ptr": "*fp32", "num_partials": "i32", "per_label": "i32"
    }  # fmt: skip
    final = {"DIVIDE": True, "BLOCK": 4096, "ACC": tl.float32}
    cases["finalise"] = (_common.finalise_kernel, final_types, final, 8, {})

    def gccs(name, dtype, classes, kurtosis, grad, loss):
        t = gccs_loss.tiles(classes)
        types = {
            "z_ptr": POINTERS[dtype], "order_ptr": "*i64", "bounds_ptr": "*i32", "g_ptr": "*fp32",
            "divisor_ptr": "*fp32", "loss_ptr": "*fp32", "dz_ptr": POINTERS[dtype], "n": "i32", "d_vectors": "i32",
            "slabs": "i32", "stride_g": "i32",
            **dict.fromkeys(("target_mean", "variance", "precision", "eps", "kurtosis_weight"), "fp32"),
        }  # fmt: skip
        constants = {
            "D_VECTOR": _rows.vector(classes), "KURTOSIS": kurtosis, "LOSS": loss, "GRAD": grad, "FOLD": grad == 1,
            "BLOCK_N": t.block_n, "BLOCK_D": t.block_d, "ACC": tl.float32,
        }  # fmt: skip
        cases[f"gccs {name}"] = (gccs_loss._gccs_loss_kernel, types, constants, 4, {"ldg": 1, "stg": 1})

    gccs("mean float32 D=1000", "float32", 1000, False, 1, True)
    gccs("backward bfloat16 D=1000 kurtosis", "bfloat16", 1000, True, 2, False)

    def norm(name, dtype, shape, backward, stage=weight_norm.WHOLE, wide=("ldg", "stg")):
        resident = weight_norm.MAX_RESIDENT_BACKWARD if backward else weight_norm.MAX_RESIDENT
        p = weight_norm.plan(*shape, resident)
        assert (p.segments == 1) == (stage == weight_norm.WHOLE), name
        types = {
            "v_ptr": POINTERS[dtype], "dw_ptr": POINTERS[dtype], "g_ptr": "*fp32", "norm_ptr": "*fp32",
            "out_ptr": POINTERS[dtype], "dg_ptr": "*fp32", "partial_ptr": "*fp32", "outer": "i32", "k_vectors": "i32",
            "b_vectors": "i32", "tiles_b": "i32", "steps": "i32", "segments": "i32",
        }  # fmt: skip
        constants = {
            "K_VECTOR": _rows.vector(shape[1]), "B_VECTOR": _rows.vector(shape[2]), "COLUMNS": shape[2] == 1,
            "BACKWARD": backward, "STAGE": stage, "BLOCK_A": p.block_a, "BLOCK_K": p.block_k, "BLOCK_B": p.block_b,
            "BLOCK_S": max(2, 256 // p.block_k), "ACC": tl.float32,
        }  # fmt: skip
        width = dict.fromkeys(wide, 1)
        cases[f"weight norm {name}"] = (weight_norm._weight_norm_kernel, types, constants, p.num_warps, width)

    norm("forward float32 512x4608", "float32", (1, 512, 4608), False)
    norm("forward bfloat16 256x16384", "bfloat16", (1, 256, 16384), False)
    norm("backward float32 512x4608", "float32", (1, 512, 4608), True)
    norm("backward bfloat16 256x8192", "bfloat16", (1, 256, 8192), True)
    norm("forward float32 256x9", "float32", (1, 256, 9), False, wide=())
    norm("backward float32 columns 256x4096", "float32", (256, 4096, 1), True)
    norm("sums float32 4x262144", "float32", (1, 4, 262144), True, weight_norm.SUM, ("ldg",))
    norm("apply float32 4x262144", "float32", (1, 4, 262144), True, weight_norm.APPLY)
    norm("apply bfloat16 columns 8192x512", "bfloat16", (8192, 512, 1), False, weight_norm.APPLY, ())

    for dtype in ("float32", "bfloat16"):
        depth_types = dict.fromkeys(("x_ptr", "f_ptr", "r_ptr", "y_ptr"), POINTERS[dtype])
        depth_types |= {"vectors": "i32", "blocks": "i32"}
        depth = {"VECTOR": 8, "HAS_RESIDUAL": True, "BLOCK": stochastic_depth.BLOCK, "ACC": tl.float32}
        kernel = stochastic_depth._stochastic_depth_kernel
        cases[f"stochastic depth {dtype}"] = (kernel, depth_types, depth, 4, {"ldg": 2, "stg": 1})

    def region_biased(name, dtype, regions, softmax, mask, loss=2, grad=1, divisor=2, wide=("ldg", "stg")):
        tile, width = region_biased_loss.plan(65536, regions), _rows.vector(regions)
        types = {
            **scalars, "x_ptr": POINTERS[dtype], "mask_ptr": "*u8", "dx_ptr": POINTERS[dtype], "margin": "fp32",
            "origin": "i32", "n": "i32", "vectors": "i32", "stride_g": "i32",
        }  # fmt: skip
        del types["normalizer_ptr"]
        constants = {
            "VECTOR": width, "HAS_MASK": mask, "SOFTMAX": softmax, "LOSS": loss, "GRAD": grad, "DIVISOR": divisor,
            "FOLD": True, "ROWS": tile.rows, "BLOCK_R": tile.block_r, "ACC": tl.float32,
        }  # fmt: skip
        kernel, widths = region_biased_loss._region_biased_loss_kernel, dict.fromkeys(wide, 1)
        cases[f"region biased {name}"] = (kernel, types, constants, tile.num_warps, widths)

    region_biased("mean float32 R=6", "float32", 6, False, False, wide=())
    region_biased("mean bfloat16 R=6 softmax mask", "bfloat16", 6, True, True, wide=())
    region_biased("backward float32 R=8192 softmax", "float32", 8192, True, False, loss=0, grad=2, divisor=0)
    return cases | aot_layers.specialisations() | aot_center_loss.specialisations() | aot_optimizers.specialisations()


# Compiling and reading the machine code -------------------------------------------------------------------------------


def measure(capability: int) -> dict[str, dict[str, int]]:
    """Of every specialisation: registers, spilled bytes, local memory instructions, 16-byte accesses, inexact roots."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    found = {}
    for name, (kernel, types, constants, num_warps, _) in specialisations().items():
        index = {argument: i for i, argument in enumerate(kernel.arg_names)}
        aligned = {(index[a],): [["tt.divisibility", 16]] for a, t in types.items() if t.startswith("*")}
        signature = {a: types.get(a, "constexpr") for a in kernel.arg_names}
        source = ASTSource(kernel, signature, {(index[a],): v for a, v in constants.items()}, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(compiled.asm["cubin"])
            usage, sass = (
                subprocess.run([tool, flag, str(cubin)], capture_output=True, text=True, check=True).stdout
                for flag in ("-res-usage", "-sass")
            )
        operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", sass, re.M)
        found[name] = {
            "registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
            "local": sum(op.startswith(("STL", "LDL")) for op in operations),
            "ldg": sum(op.startswith("LDG") and ".128" in op for op in operations),
            "stg": sum(op.startswith("STG") and ".128" in op for op in operations),
            "instructions": len(operations),
            "flushed": len(re.findall(r"sqrt\.approx\.ftz", compiled.asm["ptx"])),
        }
    return found


def bind() -> dict[str, int]:
    """Call the launchers with a driver that compiles for sm_90 and launches nothing: number of binaries per kernel."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class NoDevice:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda _=None: 0)

    run, binaries = jit.JITFunction.run, {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(self, *args, grid=grid, warmup=True, **options)
        binaries.setdefault(self.__name__, set()).add(compiled.hash)

    driver.set_active(NoDevice())
    jit.JITFunction.run = compile_only

    from dlkernels.triton import focal_loss, gccs_loss, region_biased_loss, stochastic_depth, stored_grad, weight_norm

    for dtype, gamma, n in ((torch.float32, 1.5, 3000), (torch.float32, 0.3, 2999), (torch.float64, 2.5, 3000)):
        x, t = torch.zeros(n, 91, dtype=dtype), torch.zeros(n, dtype=torch.int64)
        one = torch.ones((), dtype=dtype)
        focal_loss.sigmoid_focal_loss_fwd(x, t, None, 0.25 * gamma / 3, gamma, -int(n), 1, True, True)
        focal_loss.sigmoid_focal_loss_bwd(one.expand(n, 91), x, x > 0, 0.25, gamma, -100)
        focal_loss.softmax_focal_loss_fwd(x, t, None, None, gamma, 0.0, -int(n), False, 1, True, True)
        focal_loss.softmax_focal_loss_bwd(one.expand(n), x, x, x[0], gamma, 0.0, -100)
        stored_grad.scale_stored_grad_(x, one, one)
        options = (40.0 * gamma, gamma, 1e-5 * gamma, 0.1 * gamma, -int(n))
        gccs_loss.gccs_loss_fwd(x, t, *options, 1, True, True)
        gccs_loss.gccs_loss_bwd(one.expand(91), x, t, *options)
        stochastic_depth.stochastic_depth_fwd(x, x[:, 0], x)
        region_biased_loss.region_biased_loss_fwd(x, x > 0, n % 91, 0.1 * gamma, True, 1, True, True)
        region_biased_loss.region_biased_loss_bwd(one.expand(n), x, None, n % 7, gamma, False)
    for rows in (3000, 2992):
        for dtype in (torch.float32, torch.float64):
            v, g = torch.zeros(1, rows, 96, dtype=dtype), torch.zeros(rows, dtype=dtype)
            weight_norm.weight_norm_bwd(v, v, g, weight_norm.weight_norm_fwd(v, g)[1])
    aot_layers.bind()
    aot_center_loss.bind()
    aot_optimizers.bind()
    return {name: len(found) for name, found in binaries.items()}


def in_subprocess(*arguments: str | int) -> dict[str, Any]:
    root = str(Path(__file__).parents[1])
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=600)
    assert done.returncode == 0, f"{arguments}: the compiler failed\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def table(capability: int, found: dict[str, dict[str, int]], limits: dict[str, dict[str, int]]) -> str:
    columns = ("registers", "stack", "local", "ldg", "stg", "instructions")
    lines = [f"sm_{capability}".ljust(44) + "".join(c.rjust(13) for c in columns) + "limit".rjust(8)]
    for name, row in found.items():
        limit = limits.get(name, {}).get(str(capability), "none")
        lines.append(name.ljust(44) + "".join(str(row[c]).rjust(13) for c in columns) + str(limit).rjust(8))
    return "\n".join(lines)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles_within_limits(capability: int) -> None:
    limits = json.loads(LIMITS.read_text())
    found = in_subprocess("--measure", capability)
    widths = {name: case[4] for name, case in specialisations().items()}
    wrong = []
    for name, row in found.items():
        limit = limits.get(name, {}).get(str(capability), 0)
        if row["registers"] > limit:
            wrong.append(f"{name}: {row['registers']} registers > {limit}")
        if row["stack"] or row["local"]:
            wrong.append(f"{name}: spills ({row['stack']} bytes of stack, {row['local']} local accesses)")
        if row["flushed"] and name.startswith(("island", "weight norm")):
            wrong.append(f"{name}: a root takes small squares for 0")
        wrong += [f"{name}: no 16-byte {op}" for op, least in widths[name].items() if row[op] < least]
    assert not wrong, "\n".join([*wrong, table(capability, found, limits)])


def test_launchers_compile_once_per_dtype() -> None:
    """Launchers bind their arguments; another gamma, alpha, ignore_index or batch size compiles nothing new."""
    binaries = in_subprocess("--bind")
    # Forward and backward, times float32 and float64.
    assert binaries["_sigmoid_focal_kernel"] == binaries["softmax_focal_kernel"] == 4, binaries
    assert binaries["_gccs_loss_kernel"] == 4 and binaries["_clear_kernel"] == 2, binaries
    assert binaries["_keys_kernel"] == 1 and binaries["_present_kernel"] == 2, binaries
    assert binaries["_stochastic_depth_kernel"] == 2 and binaries["_weight_norm_kernel"] == 4, binaries
    assert binaries["_region_biased_loss_kernel"] == 4, binaries
    # Labels know no dtype of the logits, except in what they write.
    assert binaries["count_kernel"] == binaries["_scale_kernel"] == 2, binaries
    assert binaries["finalise_kernel"] == 4, binaries  # and one for each power of two of partial sums: two here
    # Layers and centers: another batch size, eps or alpha compiles nothing new.
    expected = aot_layers.BINARIES | aot_center_loss.BINARIES | aot_optimizers.BINARIES
    assert {name: binaries[name] for name in expected} == {n: 2 * count for n, count in expected.items()}, binaries


def test_no_number_decides_what_is_compiled() -> None:
    """Triton would turn a 1 into a compile-time constant, which has no `.to` and no shape."""
    from triton.runtime.jit import JITFunction

    import dlkernels.triton

    found, seen = [], 0
    for module in pkgutil.iter_modules(dlkernels.triton.__path__, "dlkernels.triton."):
        for name, kernel in vars(importlib.import_module(module.name)).items():
            if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
                seen += 1
                found += [
                    f"{name}: {p.name}"
                    for p in kernel.params
                    if not (p.is_constexpr or p.do_not_specialize or p.name.endswith("_ptr"))
                ]
    assert seen > 30 and not found, found


# Command line ---------------------------------------------------------------------------------------------------------


def update() -> None:
    """Raise what is too low: the measured registers, rounded up to 8. Run it with each supported Triton."""
    before = json.loads(LIMITS.read_text()) if LIMITS.exists() else {}
    limits: dict[str, dict[str, int]] = {name: {} for name in specialisations()}
    for capability in CAPABILITIES:
        found = in_subprocess("--measure", capability)
        for name, row in found.items():
            wanted = -(-row["registers"] // 8) * 8
            limits[name][str(capability)] = max(wanted, before.get(name, {}).get(str(capability), 0))
        print(table(capability, found, limits))
    rows = (f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in limits.items())
    LIMITS.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if sys.argv[1:] == ["--update"]:
        update()
    elif sys.argv[1:] == ["--bind"]:
        print(json.dumps(bind()))
    elif sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(int(sys.argv[2]))))
    else:
        sys.exit(__doc__)
