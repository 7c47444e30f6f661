"""Faults of squeeze-and-excitation that its tests must notice."""

CUDA = "csrc/cuda/squeeze_excite"
TESTS = "tests/cuda_host/test_squeeze_excite_on_host.py"

# (file, text, text in its place, test)
MUTATIONS = [
    # Gates taken for constant that the kernel before, still running, writes.
    (
        f"{CUDA}_scale_kernel.cu",
        "GlobalValues<Use::kHanded>",
        "GlobalValues<Use::kShared>",
        f"{TESTS}::test_traffic",
    ),
    # Another block's gates left out.
    (f"{CUDA}_cluster_kernel.cu", "if (owner != rank)", "if (owner < rank)", f"{TESTS}::test_clusters"),
    # The end of a sample, one pack too far.
    (
        f"{CUDA}_scale_kernel.cu",
        "if (at < size) values[u] = load_pack<N>(dz + at);",
        "if (at <= size) values[u] = load_pack<N>(dz + at);",
        f"{TESTS}::test_matmul",
    ),
    # Chunks that lie on top of each other.
    (
        f"{CUDA}_sums_kernel.cu",
        "(int64_t{sample} * chunks + chunk) * a.c",
        "int64_t{sample} * chunks * a.c",
        f"{TESTS}::test_walk",
    ),
    # Batches that do not go on.
    (f"{CUDA}.cpp", "std::min(a.plan.batch, a.n - a.first_n)", "a.n - a.first_n", f"{TESTS}::test_batches"),
    # Packs in memory that is not aligned.
    (f"{CUDA}.cpp", "aligned(a.x, a.residual,", "aligned(a.x,", f"{TESTS}::test_unaligned"),
]
