"""Faults of the stored gradient's scale that its tests must notice."""

KERNEL = "csrc/cuda/stored_grad_kernel.cu"
TESTS = "tests/cuda_host/test_stored_grad_on_host.py"

# (file, text, text in its place, test)
MUTATIONS = [
    (KERNEL, "if (at + N <= a.numel) values[u] =", "if (at <= a.numel) values[u] =", f"{TESTS}::test_scale"),
    (
        KERNEL,
        "for (int64_t i = at; i < a.numel; ++i)",
        "for (int64_t i = at + 1; i < a.numel; ++i)",
        f"{TESTS}::test_scale",
    ),
    (KERNEL, "if (factor == 1.0f && a.x == a.y) return;", "", f"{TESTS}::test_traffic"),
]
