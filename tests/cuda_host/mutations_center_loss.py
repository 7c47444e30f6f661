"""Faults of the center-loss kernels that their tests must notice."""

ROWS, SORT, SUMS = (f"csrc/cuda/center_loss_{part}_kernel.cu" for part in ("rows", "sort", "sums"))
TESTS = "tests/cuda_host/test_center_loss_on_host.py"

# (file, text, text in its place, test)
MUTATIONS = [
    (ROWS, "keeps && label < t.k", "keeps && label <= t.k", f"{TESTS}::test_labels_out_of_range"),
    (ROWS, "if (each >= kThreads / 2 || (each > kWarp && few))", "if (false && few)", f"{TESTS}::test_long_rows"),
    (SORT, "base + before + 1;", "base + before;", f"{TESTS}::test_many_rows"),
    (SORT, "if (n <= kSortHere && 8 * n <= room)", "if (n <= kSortHere)", f"{TESTS}::test_many_rows"),
    (
        SUMS,
        "after = label(end);\n    Floats<N> center;",
        "after = label(end + 1);\n    Floats<N> center;",
        f"{TESTS}::test_by_class",
    ),
    (SUMS, "if (first || last) keep(s, first);", "if (first) keep(s, first);", f"{TESTS}::test_by_class"),
]
