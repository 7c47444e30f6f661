"""Triton kernels and their launchers, one module per family. Importable without a GPU; imported on first use."""
