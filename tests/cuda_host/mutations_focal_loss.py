"""Faults of the sigmoid focal loss that its tests must notice."""

KERNEL = "csrc/cuda/focal_loss_kernel.cu"
HOST = "csrc/cuda/focal_loss.cpp"
TESTS = "tests/cuda_host/test_focal_loss_on_host.py"

# (file, text, text in its place, test)
MUTATIONS = [
    (
        KERNEL,
        "if (own >= packs) continue;\n      x_of",
        "if (own > packs) continue;\n      x_of",
        f"{TESTS}::test_sizes",
    ),
    (
        KERNEL,
        "if (row.first >= a.classes) ++row.row, ",
        "if (row.first >= a.classes) ",
        f"{TESTS}::test_a_grid_that_goes_round",
    ),
    (
        KERNEL,
        "grads[i] = judged(grads[i], bits, begin + i);",
        "grads[i] += 0.0f;",
        f"{TESTS}::test_left_out_elements_are_zero_whatever_they_meet",
    ),
    (KERNEL, "} else if (all_hard(t_of[u])) {", "} else if (true) {", f"{TESTS}::test_is_the_reference"),
    (
        KERNEL,
        "i < gridDim.x; i += kThreads) {\n      total",
        "i < gridDim.x - 1; i += kThreads) {\n      total",
        f"{TESTS}::test_a_grid_that_goes_round",
    ),
    (HOST, "args.fold = stored && args.dtype != Float::kFloat16;", "args.fold = stored;", f"{TESTS}::test_normalizer"),
    (HOST, "args.labels * args.label_bytes <= kCountHereBytes", "true", f"{TESTS}::test_launches"),
]
