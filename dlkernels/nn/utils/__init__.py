"""What `torch.nn.utils` holds, on fused ops."""

from . import parametrizations

__all__ = ["parametrizations"]
