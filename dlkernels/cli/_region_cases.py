"""The region biased losses that `check` and `profile` run: one line per case."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

import dlkernels as dk

from . import _eager
from ._budget import Sample


@dataclass(frozen=True)
class RegionCase:
    """One call of `region_biased_loss(attention, **options)` and its eager counterpart."""

    shape: tuple[int, int]
    masked: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    op: str = "region_biased_loss"

    @property
    def name(self) -> str:
        words = ["x".join(map(str, self.shape)), *(["masked"] if self.masked else [])]
        return " ".join([*words, *(f"{k}={v}" for k, v in self.options.items())])

    def sample(self, dtype: torch.dtype, device: str, seed: int) -> Sample:
        """One draw: weights that differ within a row in every dtype, and a gradient for unreduced losses."""
        generator = torch.Generator().manual_seed(seed)
        n, regions = self.shape
        x = (torch.rand(self.shape, generator=generator).argsort(1) + 0.5) / regions
        mask = (torch.rand(self.shape, generator=generator) < 0.7).to(device) if self.masked else None
        grad_output = torch.rand(n, generator=generator).to(device, dtype)

        def bound(function: Any) -> Any:
            return lambda x: function(x, mask=mask, **self.options)

        return Sample(
            bound(dk.region_biased_loss), bound(_eager.region_biased_loss), x.to(device, dtype), grad_output
        )  # fmt: skip


def _case(shape: tuple[int, int], masked: bool = False, **options: Any) -> RegionCase:
    return RegionCase(shape, masked, options)


# No margin is a difference of two weights: rounding would decide whether a row just reaches it.
CASES: list[RegionCase] = [
    _case((257, 6)),
    _case((257, 6), margin=0.1, normalize="softmax", origin_index=-1),
    _case((257, 6), margin=0.31, reduction="none", origin_index=2),
    _case((257, 6), True, margin=0.31, reduction="none"),
    _case((257, 6), True, margin=0.1, normalize="softmax", reduction="sum"),
    _case((65, 33), True, margin=0.31, normalize="softmax", reduction="none", origin_index=-1),
    _case((5, 130), margin=0.31, reduction="sum"),
    _case((33, 2), margin=0.31),
    _case((0, 6), reduction="sum"),
]
