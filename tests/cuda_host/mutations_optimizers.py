"""Faults of the fused optimizer steps that their tests must notice."""

ADAMW, SGDW = "csrc/cuda/adamw_kernel.cu", "csrc/cuda/sgdw_kernel.cu"
SQUARES, TABLE = "csrc/cuda/gradient_squares_kernel.cu", "csrc/cuda/optimizer_table.cpp"
TESTS = "tests/cuda_host/test_optimizers_on_host.py"
TABLES = "tests/cuda_host/test_optimizer_tables_on_host.py"

# (file, text, text in its place, test)
MUTATIONS = [
    (
        ADAMW,
        "now <= largest[i] || largest[i] != largest[i] ?",
        "now <= largest[i] ?",
        f"{TESTS}::test_amsgrad_keeps_nan",
    ),
    (ADAMW, "v = round(2, v);", "used = v = round(2, v);", f"{TESTS}::test_stochastic_rounding_bit_for_bit"),
    (SGDW, "row.nesterov != 0 ? sgdw_nesterov(m[i], g, f) : m[i]", "m[i]", f"{TESTS}::test_forms_of_sgdw"),
    (SQUARES, "if (whole < count) total +=", "if (false) total +=", f"{TESTS}::test_norms_of_sets"),
    (SQUARES, "largest >= 0x1p-40f || largest == 0.0f", "true", f"{TESTS}::test_norms_of_sets"),
    (TABLE, "replayed_ |= capturing;", "", f"{TABLES}::test_replays_are_steps"),
    (TABLE, "captured_ |= is_capturing(queue);", "", f"{TABLES}::test_tables_live_as_long_as_a_graph_may_read_them"),
    (TABLE, "(fixed_ || !(capturing || replayed_))", "true", f"{TABLES}::test_replays_are_steps"),
]
