"""Modules over `dlkernels.ops`; constructors take the arguments of the modules that they replace."""

from .focal_loss import CrossEntropyLoss, SigmoidFocalLoss, SoftmaxFocalLoss

__all__ = ["CrossEntropyLoss", "SigmoidFocalLoss", "SoftmaxFocalLoss"]
