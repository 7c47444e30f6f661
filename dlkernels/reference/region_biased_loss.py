"""Region biased loss: the best crop of a face is to be weighed more than the whole face, by a margin.

Wang et al., "Region Attention Networks for Pose and Occlusion Robust Facial Expression Recognition":
L = max(0, alpha - (mu_max - mu_0)), mu_max over the crops, mu_0 of the original face.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._activation import compute


def region_biased_loss(
    attention: Tensor, mask: Tensor | None, origin_index: int, margin: float, softmax: bool
) -> Tensor:
    """Per-row loss (N,) of attention (N, R); origin_index in [0, R), mask (N, R) or None.

    A row without a crop costs 0. A NaN in what takes part makes the loss of its row NaN, and that row's gradient.
    """
    x = compute(attention)
    regions = torch.arange(x.shape[1], device=x.device)
    crops = (regions != origin_index).expand(x.shape)
    crops = crops if mask is None else crops & mask
    parts = crops | (regions == origin_index)
    x = torch.where(crops.any(1, keepdim=True), x, 0.0)  # nothing is undefined where nothing counts

    # The crop of the largest weight, the first of several: softmax does not change which one it is.
    largest = torch.where(crops, x, float("-inf")).amax(1, keepdim=True)
    found = torch.where(crops & ((x == largest) | x.isnan()), regions, x.shape[1]).amin(1, keepdim=True)
    mu = torch.where(parts, x, float("-inf")).softmax(1) if softmax else x
    mu_max = mu.gather(1, found.clamp(max=x.shape[1] - 1)).squeeze(1)
    loss = margin - (mu_max - mu[:, origin_index])

    undefined = loss.isnan() | (parts & x.isnan()).any(1)
    everything = torch.where(parts & undefined.unsqueeze(1), x, 0.0).sum(1)  # NaN for every part, 0 in other rows
    loss = torch.where((loss > 0) & ~undefined, loss, 0.0) + everything * torch.where(undefined, float("nan"), 0.0)
    return torch.where(crops.any(1), loss, 0.0)
