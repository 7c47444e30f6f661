"""The sigmoid focal loss as detectors write it: binary cross entropy, (1 - p_t)^gamma, and alpha_t."""

from __future__ import annotations

from torch.fx import Node

from . import calls
from .calls_of_torch import Call, call_of
from .graph import Facts, Left, Match, following, is_number, one_minus, other_operand, same_shape, tensor, with_constant


class _Formula:
    """The factors of one loss: logits x and targets t are known, the rest is recognised piece by piece."""

    def __init__(self, x: Node, t: Node) -> None:
        self.x, self.t = x, t
        self.gamma: float | None = None
        self.alpha: float | None = None
        self.nodes: list[Node] = []

    def take(self, node: object) -> bool:
        """Take a factor: (1 - p_t)^gamma, alpha_t, or a product of such."""
        before = (self.gamma, self.alpha, list(self.nodes))
        if self._modulation(node) or self._balance(node) or self._product(node):
            return True
        self.gamma, self.alpha, self.nodes = before
        return False

    def _product(self, node: object) -> bool:
        call = call_of(node)
        if call is None or call.kind != "mul" or call.in_place:
            return False
        left, right = call.operands
        if not (isinstance(left, Node) and isinstance(right, Node) and self.take(left) and self.take(right)):
            return False
        self.nodes.append(node)  # type: ignore[arg-type]
        return True

    def _modulation(self, node: object) -> bool:
        call = call_of(node)
        if self.gamma is not None or call is None:
            return False
        base, gamma = (call.get("input"), 2) if call.kind == "square" else call.operands
        if call.kind not in ("pow", "square") or not is_number(gamma) or gamma < 0:
            return False
        parts = self._probability_of_target(one_minus(base))
        if parts is None:
            return False
        self.gamma = float(gamma)
        self.nodes += [*parts, base, node]
        return True

    def _probability_of_target(self, node: Node | None) -> list[Node] | None:
        """p t + (1 - p) (1 - t) with p = sigmoid(x)"""
        sides = _sides(node, "add")
        for first, second in (sides, sides[::-1]) if sides else ():
            of_positive, of_negative = _sides(first, "mul"), _sides(second, "mul")
            if not of_positive or not of_negative or self.t not in of_positive:
                continue
            p = of_positive[0] if of_positive[1] is self.t else of_positive[1]
            call = call_of(p)
            if call is None or call.kind != "sigmoid" or call.in_place or call.get("input") is not self.x:
                continue
            rest = {one_minus(of_negative[0]), one_minus(of_negative[1])}
            if rest == {p, self.t}:
                return [p, *of_negative, first, second, node]  # type: ignore[list-item]
        return None

    def _balance(self, node: object) -> bool:
        """alpha t + (1 - alpha) (1 - t)"""
        sides = _sides(node, "add") if self.alpha is None else None
        for first, second in (sides, sides[::-1]) if sides else ():
            positive, negative = with_constant(first, "mul"), with_constant(second, "mul")
            if positive is None or negative is None or positive[0] is not self.t:
                continue
            if one_minus(negative[0]) is self.t and negative[1] == 1 - positive[1] and 0 <= positive[1] <= 1:
                self.alpha = float(positive[1])
                self.nodes += [negative[0], first, second, node]  # type: ignore[list-item]
                return True
        return False


def _sides(node: object, kind: str) -> tuple[Node, Node] | None:
    call = call_of(node)
    if call is None or call.kind != kind or call.in_place:
        return None
    left, right = call.operands
    return (left, right) if isinstance(left, Node) and isinstance(right, Node) else None


def find(node: Node, facts: Facts) -> Match | None:
    call = call_of(node)
    if call is None or call.kind != "bce":
        return None
    x, t = call.get("input"), call.get("target")
    if tensor(x) is None or tensor(t) is None or not same_shape(tensor(x).shape, tensor(t).shape):
        return None
    formula, last = _Formula(x, t), node
    taken: list[Node] = [node]
    while (product := following(last, "mul")) is not None:
        if not formula.take(other_operand(product[1], last)):
            break
        taken = [*taken, *formula.nodes, product[0]]
        formula.nodes = []
        last = product[0]
    if formula.gamma is None:
        return None
    _plain(call)
    if tensor(t).requires_grad:
        raise Left("a gradient in the targets")
    reduction = "none"
    total = following(last, "mean", "sum")
    if total is not None and total[1].get("dim") is None and total[1].get("dtype") is None:
        reduction, last = total[1].kind, total[0]
        taken.append(last)
    unique = list(dict.fromkeys(taken))
    # 1 - t and the balance belong to the targets alone: another loss may use them as well.
    inside = set(unique)
    shared = [n for n in unique if not set(n.users) <= inside and n is not last and one_minus(n) is t]
    unique = [n for n in unique if n not in shared]
    return Match(
        "sigmoid_focal_loss",
        f"sigmoid_focal_loss, {reduction}",
        "none" if reduction == "none" else "",
        sorted(unique, key=facts.position.__getitem__),
        calls.sigmoid_focal_loss,
        (x, t, formula.alpha, formula.gamma, reduction, tensor(last).dtype),
        shared,
        op="sigmoid_focal_loss_fwd",
    )


def _plain(call: Call) -> None:
    if call.get("weight") is not None or call.get("pos_weight") is not None:
        raise Left("weights inside of the binary cross entropy")
    if call.get("size_average") is not None or call.get("reduce") is not None:
        raise Left("the deprecated arguments size_average and reduce")
    if call.get("reduction", "mean") != "none":
        raise Left("the binary cross entropy is reduced before it is modulated")
