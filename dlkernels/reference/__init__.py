"""Plain PyTorch in the papers' symbols: slow, obvious, differentiable any number of times. Ground truth and last resort."""
