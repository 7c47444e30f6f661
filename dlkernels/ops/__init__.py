"""The functions that users call, one module per family."""

from .focal_loss import cross_entropy, sigmoid_focal_loss, softmax_focal_loss

__all__ = ["cross_entropy", "sigmoid_focal_loss", "softmax_focal_loss"]
