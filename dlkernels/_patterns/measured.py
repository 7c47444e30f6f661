"""Where a replacement pays: our time against torch.compile's, from the committed tables, decides it.

A row is one case of benchmarks/results/amd-epyc-1-thread; tests hold the rows against these files.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    op: str
    kind: str  # of the case: what is fused, or the shape that makes a difference
    training: bool  # forward and backward, else forward only
    case: str  # in the results
    ratio: float  # time of torch.compile over ours


CPU = (
    Row("group_norm", "rows", True, "group_norm 256x512 fp32 groups=32 fwd+bwd", 0.63),
    Row("group_norm", "", True, "group_norm 8x256x28x28 fp32 groups=32 fwd+bwd", 2.29),
    Row("group_norm", "", False, "group_norm 8x256x28x28 fp32 groups=32 fwd", 3.67),
    Row("group_norm", "activation", True, "group_norm 8x256x28x28 fp32 groups=32 activation=silu fwd+bwd", 1.98),
    Row("group_norm", "activation", False, "group_norm 8x256x28x28 fp32 groups=32 activation=silu fwd", 2.46),
    Row("group_norm", "film", True, "group_norm 8x256x28x28 fp32 groups=32 activation=silu film=True fwd+bwd", 2.61),
    Row("group_norm", "residual", True,
        "group_norm 8x256x28x28 fp32 groups=32 activation=relu residual=True fwd+bwd", 11.8),
    Row("squeeze_excite", "", True, "squeeze_excite 8x256x28x28 fp32 hidden=16 fwd+bwd", 3.50),
    Row("squeeze_excite", "", False, "squeeze_excite 8x256x28x28 fp32 hidden=16 fwd", 1.18),
    Row("squeeze_excite", "tokens", True, "squeeze_excite 8x197x384 fp32 hidden=24 tokens=True fwd+bwd", 1.53),
    Row("sigmoid_focal_loss", "", True, "sigmoid_focal_loss 12137x91 fp32 sum float-targets fwd+bwd", 5.58),
    Row("sigmoid_focal_loss", "", False, "sigmoid_focal_loss 12137x91 fp32 sum float-targets fwd", 3.15),
    Row("sigmoid_focal_loss", "none", True, "sigmoid_focal_loss 12137x91 fp32 none float-targets fwd+bwd", 2.99),
    Row("cross_entropy", "", True, "cross_entropy 4096x1000 fp32 mean fwd+bwd", 4.02),
    Row("cross_entropy", "", False, "cross_entropy 4096x1000 fp32 mean fwd", 2.49),
    Row("cross_entropy", "none", True, "cross_entropy 4096x1000 fp32 none fwd+bwd", 2.75),
    Row("cross_entropy", "positions", True, "cross_entropy 4x21x128x128 fp32 mean fwd+bwd", 2.12),
    Row("cross_entropy", "positions", False, "cross_entropy 4x21x128x128 fp32 mean fwd", 1.18),
    Row("center_loss", "", True, "center_loss 4096x128 fp32 mean classes=100 fwd+bwd", 2.58),
    Row("center_loss", "", False, "center_loss 4096x128 fp32 mean classes=100 fwd", 1.36),
    Row("center_loss", "none", True, "center_loss 4096x128 fp32 none classes=100 fwd+bwd", 1.69),
)  # fmt: skip

# What a case alone does not show. The compiler runs the convolutions of a network in channels_last whatever its tensors
# are; a contiguous tensor between them is copied twice for a kernel that takes it as it is. A training step of timm's
# seresnet50, batch 8, 112x112: 571 ms compiled, 601 ms with the replacements; in channels_last 551 and 548.
IN_NETWORKS = {("squeeze_excite", "contiguous network"): 0.95}

# GPUs: no time has been measured, so that the traffic decides. A norm alone is left: the generated code reads the input
# twice as well when a group does not stay on chip, and fuses the norm with whatever comes next.
GPU = {
    ("group_norm", ""): "a norm alone: the compiler fuses it with what follows (no measurement on GPUs)",
    ("group_norm", "rows"): "one value per channel: the compiler fuses it (no measurement on GPUs)",
}


def decide(op: str, kind: str, training: bool, device: str) -> tuple[bool, str]:
    """Whether to replace, and the reason in a few words.

    Args:
        op: the family.
        kind: of the case, as in the rows; one that has no row counts as "".
        training: whether a backward pass follows.
        device: "cpu" or "cuda".
    """
    if device != "cpu":
        left = GPU.get((op, kind))
        return left is None, left or "fewer passes over memory (no measurement on GPUs)"
    in_network = IN_NETWORKS.get((op, kind))
    if in_network is not None and in_network < 1:
        return False, f"not faster between contiguous convolutions ({in_network:.2f}x): channels_last is"
    rows = [row for row in CPU if row.op == op and row.kind == kind] or [
        row for row in CPU if row.op == op and row.kind == ""
    ]
    row = next((row for row in rows if row.training == training), rows[0])
    if row.ratio < 1:
        return False, f"not faster here ({row.ratio:.2f}x)"
    return True, f"{row.ratio:.3g}x measured"
