"""What tests/test_triton_aot.py compiles of GroupNorm and squeeze-and-excitation, and how it calls their launchers."""

from __future__ import annotations

from typing import Any

POINTERS = {"float32": "*fp32", "bfloat16": "*bf16"}
SIZES = {"float32": 4, "bfloat16": 2}
# Written in the accumulator's dtype whatever the input has.
STATISTICS = (
    *("mean_ptr", "rstd_ptr", "partial_ptr", "term_ptr", "dw_ptr", "db_ptr", "a_ptr", "b_ptr", "out_ptr", "sum_a_ptr"),
    *("e_ptr", "hidden_ptr", "dz2_ptr", "dz1_ptr", "ds_ptr"),
)


def _case(kernel: Any, dtype: str, constants: dict[str, Any], num_warps: int, wide: tuple[str, ...]) -> Any:
    """(kernel, types, constants, warps, widths): types by name, constants as far as the kernel takes them."""
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {}
    for name in kernel.arg_names:
        if name.endswith("_ptr"):
            types[name] = "*fp32" if name in STATISTICS else POINTERS[dtype]
        elif name not in constants:
            types[name] = "fp32" if name in ("eps", "factor") else "i32"
    return kernel, types, constants, num_warps, dict.fromkeys(wide, 1)


def specialisations() -> dict[str, Any]:
    """Each kernel; each regime of GroupNorm in both layouts; float32 and bfloat16; with and without options."""
    import triton.language as tl

    from dlkernels.triton import _group_norm_resident, _group_norm_split, _group_norm_tiles, group_norm
    from dlkernels.triton import _squeeze_excite_kernels as kernels
    from dlkernels.triton import squeeze_excite as se

    cases: dict[str, Any] = {}
    both = ("ldg", "stg")

    def norm(name, kernel, dtype, c, s, last=False, groups=32, act=3, every=False, sums=False, wide=both):
        forward = kernel.__name__ in ("group_norm_fwd_kernel", "stats_kernel", "normalise_kernel")
        size = SIZES[dtype]
        plan = (
            group_norm.forward_plan(8, c, groups, s, size, last)
            if forward
            else group_norm.backward_plan(8, c, groups, s, size, last, every)
        )
        assert plan.resident == kernel.__name__.startswith("group_norm"), (name, plan)
        constants = {
            **group_norm._geometry(plan, c, groups, s, tl.float32)[1], "ACT": act, "SUMS": sums, "HAS_WEIGHT": True,
            "HAS_BIAS": True, "HAS_RESIDUAL": every, "HAS_SCALE": every, "HAS_SHIFT": every,
        }  # fmt: skip
        cases[f"group norm {name}"] = _case(kernel, dtype, constants, plan.num_warps, wide)

    resident, split = _group_norm_resident, _group_norm_split
    norm("forward float32 C=256 S=1024", resident.group_norm_fwd_kernel, "float32", 256, 1024)
    norm("forward bfloat16 C=512 S=1024 gelu", resident.group_norm_fwd_kernel, "bfloat16", 512, 1024, act=4, every=True)
    norm("forward bfloat16 C=256 S=64 last", resident.group_norm_fwd_kernel, "bfloat16", 256, 64, last=True)
    norm("backward float32 C=256 S=1024", resident.group_norm_bwd_kernel, "float32", 256, 1024)
    norm("backward bfloat16 C=256 S=512 gelu", resident.group_norm_bwd_kernel, "bfloat16", 256, 512, act=4, every=True)
    norm("backward bfloat16 C=256 S=64 last", resident.group_norm_bwd_kernel, "bfloat16", 256, 64, last=True)
    norm("statistics bfloat16 S=65536", split.stats_kernel, "bfloat16", 128, 65536, wide=("ldg",))
    norm("normalise bfloat16 S=65536", split.normalise_kernel, "bfloat16", 128, 65536)
    norm("normalise float32 S=16384 last", split.normalise_kernel, "float32", 256, 16384, last=True)
    norm("sums float32 S=65536", split.grad_kernel, "float32", 128, 65536, sums=True, wide=("ldg",))
    norm("gradient bfloat16 S=16384 last gelu", split.grad_kernel, "bfloat16", 256, 16384, last=True, act=4, every=True)

    given = dict.fromkeys(("HAS_WEIGHT", "HAS_BIAS", "HAS_SCALE", "HAS_SHIFT", "HAS_A", "HAS_B"), True)
    terms = {**given, "BLOCK_K": 16, "BLOCK_D": 64, "ACC": tl.float32}
    cases["group norm terms"] = _case(split.terms_kernel, "bfloat16", terms, 4, ())
    rows = {**given, "BLOCK_R": 128, "BLOCK_C": 16, "ACC": tl.float32}
    cases["group norm sum rows"] = _case(_group_norm_tiles.sum_rows_kernel, "float32", rows, 4, ())

    def squeeze(name, kernel, dtype, c, s, last=False, wide=both, **options):
        p = se.plan(8, c, s, 16, SIZES[dtype], last)
        constants = {**se._tile(p, c, s, tl.float32)[1], **options}
        cases[f"squeeze {name}"] = _case(kernel, dtype, constants, p.num_warps, wide)

    squeeze("sums float32", kernels.channel_sums_kernel, "float32", 256, 3136, GRAD=False, ACT=0, wide=("ldg",))
    squeeze(
        "sums bfloat16 last gradient", kernels.channel_sums_kernel, "bfloat16", 256, 3136, last=True, GRAD=True, ACT=4,
        wide=("ldg",),
    )  # fmt: skip
    squeeze("scale bfloat16", kernels.scale_channels_kernel, "bfloat16", 256, 3136, HAS_RESIDUAL=True, ACT=1)
    squeeze(
        "scale gradient float32 last", kernels.scale_grad_kernel, "float32", 256, 3136, True, HAS_RESIDUAL=False, ACT=0
    )
    squeeze("scale gradient bfloat16", kernels.scale_grad_kernel, "bfloat16", 96, 784, HAS_RESIDUAL=True, ACT=4)
    p = se.plan(8, 256, 3136, 16, 2, False)
    layers = {**se._layers(p, 256, 16, tl.float32)[1], "HAS_B1": True, "HAS_B2": True, "ACT": 1, "GATE": 0}
    for name, kernel in (("excite", kernels.excite_kernel), ("excite gradient", kernels.excite_grad_kernel)):
        case = _case(kernel, "bfloat16", layers, layers["num_warps"], ())
        case[1].update({name: "*bf16" for name in ("b1_ptr", "b2_ptr") if name in case[1]})
        cases[f"squeeze {name}"] = case
    points = {"KIND": 2, "CODE": 4, "BLOCK": 1024, "ACC": tl.float32}
    cases["squeeze pointwise"] = _case(kernels.pointwise_kernel, "float32", points, 4, ())
    return cases


def bind() -> None:
    """Call every launcher, with two batch sizes and two eps per dtype: nothing else may decide what is compiled."""
    import torch

    from dlkernels.triton import group_norm, squeeze_excite

    for dtype, n, eps in ((torch.float32, 1, 1e-5), (torch.float32, 5, 0.3), (torch.float64, 3, 1e-3)):
        w, nc = torch.ones(8, dtype=dtype), torch.ones(n, 8, dtype=dtype)
        for s in (64, 9000):  # resident, split
            x = torch.zeros(n, 8, s, dtype=dtype)
            y, mean, rstd = group_norm.group_norm_fwd(x, w, w, x, nc, nc, 4, eps, 3, False)
            group_norm.group_norm_bwd(y, x, mean, rstd, w, w, x, nc, nc, 4, eps, 3, False)
        for s, hidden in ((64, 2), (4, 3)):  # a kernel for the layers, matrix products
            x = torch.zeros(n, 8, s, dtype=dtype)
            w1, w2 = torch.ones(hidden, 8, dtype=dtype), torch.ones(8, hidden, dtype=dtype)
            options = (w1, w1[:, 0], w2, w2[:, 0], x, 1, 0, 3, False)
            y, mean, value, gate = squeeze_excite.squeeze_excite_fwd(x, *options)
            squeeze_excite.squeeze_excite_bwd(y, x, mean, value, gate, *options)


# Binaries of one dtype that `bind` makes of each kernel.
BINARIES = {
    "group_norm_fwd_kernel": 1,
    "group_norm_bwd_kernel": 1,
    "stats_kernel": 1,
    "normalise_kernel": 1,
    "grad_kernel": 2,  # both sweeps
    "terms_kernel": 1,
    "sum_rows_kernel": 1,
    "channel_sums_kernel": 4,  # forward and backward, S = 64 and S = 4
    "scale_channels_kernel": 2,
    "scale_grad_kernel": 2,
    "excite_kernel": 1,
    "excite_grad_kernel": 1,
    "pointwise_kernel": 4,  # each kind
}
