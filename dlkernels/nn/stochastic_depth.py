"""Module of stochastic depth, and the rates of the layers of a network."""

from __future__ import annotations

from torch import Tensor, nn

from .. import _checks
from ..ops.stochastic_depth import MODES, stochastic_depth

SCHEDULES = {"linspace": 0, "huang": 1, "efficientnet": 2}


class StochasticDepth(nn.Module):
    """Stochastic depth as a module, `torchvision.ops.StochasticDepth` drop-in, with the residual in the same pass.

    Args:
        p: probability of a drop, in [0, 1].
        mode: "row" draws for each sample, "batch" once for all.

    Shape:
        input: (N, ...) in any layout; the output has its shape, dtype and layout.
        forward also takes `residual`, of the shape of input, and `noise`, as `dlkernels.stochastic_depth`.
    """

    def __init__(self, p: float, mode: str = "row") -> None:
        super().__init__()
        self.p = _checks.in_unit_interval("p", p)
        _checks.one_of("mode", mode, MODES)
        self.mode = mode

    def forward(self, input: Tensor, residual: Tensor | None = None, *, noise: Tensor | None = None) -> Tensor:
        return stochastic_depth(input, self.p, self.mode, self.training, residual=residual, noise=noise)

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode!r}"


def stochastic_depth_rates(p: float, depth: int, schedule: str = "linspace") -> list[float]:
    """Drop rates of the residual branches of a network, from the first to the last.

    Args:
        p: the rate that the schedule leads to, in [0, 1].
        depth: number of branches, L.
        schedule: "linspace" from 0 to p, both included (timm, T2T-ViT); "huang" p l / L with l = 1 ... L, the linear
            rule of Huang et al., 2016; "efficientnet" p l / L with l = 0 ... L - 1, which never reaches p
            (EfficientNet, noisy student).

    Returns:
        A list of L numbers.

    Raises:
        ValueError: `p` outside of [0, 1], a negative depth, an unknown schedule.
    """
    p = _checks.in_unit_interval("p", p)
    code = _checks.one_of("schedule", schedule, SCHEDULES)
    if _checks.integer("depth", depth) < 0:
        raise ValueError(f"`depth` must be a number of branches >= 0, got {depth}")
    first, over = ((0, max(depth - 1, 1)), (1, depth), (0, depth))[code]
    return [p * (index + first) / over for index in range(depth)]
