"""Faults of GroupNorm's kernels that its tests must notice."""

KERNEL = "csrc/cuda/group_norm_kernel.cu"
LAST = "csrc/cuda/group_norm_last_kernel.cu"
GRADS = "csrc/cuda/group_norm_grads_kernel.cu"
TESTS = "tests/cuda_host/test_group_norm_on_host.py"

# (file, text, text in its place, test)
MUTATIONS = [
    (KERNEL, "piece.there = tile < a.tiles;", "piece.there = tile <= a.tiles;", f"{TESTS}::test_shapes"),
    (
        KERNEL,
        "const float off = load_one<Use::kAgain>(parts + 2 * i) - mean;",
        "const float off = load_one<Use::kAgain>(parts + 2 * i) - origin;",
        f"{TESTS}::test_regimes",
    ),
    (
        LAST,
        "for (unsigned i = lane; there && i < a.plan.parts; i += team.width()) {\n      sums[0]",
        "for (unsigned i = lane; there && i + 1 < a.plan.parts; i += team.width()) {\n      sums[0]",
        f"{TESTS}::test_regimes",
    ),
    (
        LAST,
        "if (a.sums != nullptr) {",
        "if (a.sums != nullptr && p.part == 0) {",
        f"{TESTS}::test_clusters",
    ),
    (
        GRADS,
        "for (unsigned other = row; there && other < a.splits; other += kRows) {",
        "for (unsigned other = row + 1; there && other < a.splits; other += kRows) {",
        f"{TESTS}::test_many_samples",
    ),
]
