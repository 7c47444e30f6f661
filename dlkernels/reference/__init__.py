"""Plain PyTorch in the papers' symbols: slow, obvious, differentiable. Ground truth and last resort."""
