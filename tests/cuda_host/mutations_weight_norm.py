"""Faults of the weight-norm kernels that their tests must notice."""

KERNEL = "csrc/cuda/weight_norm_kernel.cu"
SHARED = "csrc/cuda/weight_norm_shared_kernel.cu"
TESTS = "tests/cuda_host/test_weight_norm_on_host.py"

# (file, text, text in its place, test)
MUTATIONS = [
    (
        KERNEL,
        "if (table.layer[middle].first_unit <= blockIdx.x) at = middle;",
        "if (table.layer[middle].first_unit < blockIdx.x) at = middle;",
        f"{TESTS}::test_many_weights",
    ),
    (
        KERNEL,
        "(kBackward ? out_of_range(n) : !weight_norm_in_range(n))",
        "false",
        f"{TESTS}::test_squares_out_of_range",
    ),
    (
        SHARED,
        "const unsigned begin = part * part_length;",
        "const unsigned begin = part * (part_length - 1);",
        f"{TESTS}::test_units_of_several_blocks",
    ),
    (
        SHARED,
        "squares = !kBackward || exact ?",
        "squares = !kBackward ?",
        f"{TESTS}::test_squares_out_of_range",
    ),
]
