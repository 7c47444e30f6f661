"""What `torch.compile(model, backend="dlkernels")` looks for in a captured graph, one module per op."""
