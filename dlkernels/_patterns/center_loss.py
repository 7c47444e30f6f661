"""The center loss as people write it: squared distances to gathered centers, or a masked matrix of all distances."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from . import calls
from .calls_of_torch import call_of
from .graph import Facts, Left, Match, following, is_number, same_shape, same_size, shape, surely, tensor


def _gathered(node: Any) -> tuple[Node, Node, bool] | None:
    """(centers, labels, whether negative labels count from the end) of centers[labels]."""
    call = call_of(node)
    if call is None or call.in_place:
        return None
    if call.kind == "getitem":
        centers, labels = call.operands
        labels = labels[0] if isinstance(labels, (tuple, list)) and len(labels) == 1 else labels
        wraps = True
    elif call.kind == "embedding":
        plain = call.get("padding_idx") is None and call.get("max_norm") is None
        if not plain or call.get("scale_grad_by_freq") or call.get("sparse"):
            return None
        centers, labels, wraps = call.get("input"), call.get("index"), False
    elif call.kind == "index_select" and call.get("dim") == 0:
        centers, labels, wraps = call.get("input"), call.get("index"), False
    else:
        return None
    c, y = tensor(centers), tensor(labels)
    if c is None or y is None or c.dim() != 2 or y.dim() != 1 or str(y.dtype) not in ("torch.int64", "torch.int32"):
        return None
    return centers, labels, wraps


def _sides(x: Any, gathered: Any) -> tuple[Node, Node, Node, bool] | None:
    for features, other in ((x, gathered), (gathered, x)):
        found = _gathered(other)
        if found is not None and tensor(features) is not None and same_shape(shape(features), shape(other)):
            if tensor(features).dtype != tensor(other).dtype:
                return None
            return features, *found
    return None


def _squared_difference(node: Node) -> tuple[Node, list[Node]] | None:
    """(x - c, [that, its square]) of (x - c)^2."""
    call = call_of(node)
    if call is None or call.in_place:
        return None
    left, right = call.operands
    squared = call.kind == "square" or (call.kind == "pow" and is_number(right) and right == 2)
    squared = squared or (call.kind == "mul" and left is right)
    return (left, [left, node]) if squared and isinstance(left, Node) else None


def find(node: Node, facts: Facts) -> Match | None:
    call = call_of(node)
    if call is not None and call.kind == "mse":
        return _mean_squared(node, facts)
    squared = _squared_difference(node)
    if squared is None:
        return _distance_matrix(node, facts)
    difference, nodes = squared
    inner = call_of(difference)
    if inner is None or inner.kind != "sub" or inner.in_place:
        return None
    found = _sides(*inner.operands)
    if found is None:
        return None
    x, centers, labels, wraps = found
    gathered = inner.operands[0] if _gathered(inner.operands[0]) is not None else inner.operands[1]
    nodes = [gathered, *nodes]

    total = following(node, "sum", "mean")
    if total is None:
        raise Left("the squared differences are not summed")
    last, summed = total
    dims = _dims(summed.get("dim"), 2)
    if summed.get("dtype") is not None or summed.get("*"):
        raise Left("a sum in another dtype")
    nodes.append(last)
    reduction, per = "sum", ""
    if dims is None:
        per = "element" if summed.kind == "mean" else ""
    elif dims == (1,) and summed.kind == "sum" and not summed.get("keepdim"):
        reduction = "none"
        whole = following(last, "sum", "mean")
        if whole is not None and _dims(whole[1].get("dim"), 1) in (None, (0,)) and not whole[1].get("keepdim"):
            reduction, per, last = "sum", "row" if whole[1].kind == "mean" else "", whole[0]
            nodes.append(last)
    else:
        raise Left("summed over other dimensions than the features'")
    return _match(nodes, (x, labels, centers, reduction, wraps, per), facts)


def _mean_squared(node: Node, facts: Facts) -> Match | None:
    call = call_of(node)
    if call is None:
        return None
    found = _sides(call.get("input"), call.get("target"))
    if found is None:
        return None
    x, centers, labels, wraps = found
    reduction = call.get("reduction", "mean")
    if call.get("size_average") is not None or call.get("reduce") is not None or call.get("weight") is not None:
        raise Left("arguments of mse_loss that the op has not")
    if reduction not in ("mean", "sum"):
        return None
    gathered = call.get("target") if x is call.get("input") else call.get("input")
    options = (x, labels, centers, "sum", wraps, "element" if reduction == "mean" else "")
    return _match([gathered, node], options, facts)


def _match(nodes: list[Node], options: tuple[Any, ...], facts: Facts) -> Match:
    nodes = sorted(dict.fromkeys(nodes), key=facts.position.__getitem__)
    dtype = tensor(nodes[-1]).dtype
    if any(tensor(n).dtype != dtype for n in nodes):
        raise Left("autocast: the steps run in different dtypes")
    reduction = options[3]
    return Match(
        "center_loss",
        f"center_loss, {reduction}",
        "none" if reduction == "none" else "",
        nodes,
        calls.squared_distances,
        (*options, dtype),
        op="center_loss_fwd",
    )


def _dims(dim: Any, rank: int) -> tuple[int, ...] | None:
    if dim is None:
        return None
    several = dim if isinstance(dim, (tuple, list)) else (dim,)
    return tuple(sorted(d % rank for d in several)) if all(type(d) is int for d in several) else ()


# The matrix of all distances, masked ----------------------------------------------------------------------------------


def _distance_matrix(node: Node, facts: Facts) -> Match | None:
    """clamp((||x||^2 + ||c||^2 - 2 x c^T) * (labels == arange(K)), least, most).sum()"""
    clamped = call_of(node)
    if clamped is None or clamped.kind != "clamp" or clamped.in_place:
        return None
    masked = call_of(clamped.get("input"))
    if masked is None or masked.kind != "mul" or masked.in_place:
        return None
    for distances, mask in (masked.operands, masked.operands[::-1]):
        read = _Matrix()
        if read.distances(distances) and read.mask(mask):
            break
    else:
        return None
    least, most = clamped.get("min"), clamped.get("max")
    if not is_number(least) or not is_number(most) or least > most:
        raise Left("the limits of the clamp are not constants")
    total = following(node, "sum")
    if total is None or total[1].get("dim") is not None or total[1].get("dtype") is not None:
        raise Left("the clamped distances are not summed")
    nodes = [*read.nodes, clamped.get("input"), node, total[0]]
    nodes = sorted(dict.fromkeys(nodes), key=facts.position.__getitem__)
    inside = set(nodes)
    shared = [n for n in nodes[:-1] if not set(n.users) <= inside and n in read.of_labels]
    nodes = [n for n in nodes if n not in shared]
    dtype = tensor(total[0]).dtype
    if tensor(read.x).dtype != dtype or tensor(read.centers).dtype != dtype:
        raise Left("autocast: the steps run in different dtypes")
    return Match(
        "center_loss",
        "center_loss, from the matrix of all distances",
        "",
        nodes,
        calls.clamped_center_loss,
        (read.x, read.labels, read.centers, float(least), float(most), dtype),
        shared,
        op="center_loss_fwd",
    )


class _Matrix:
    """The pieces of the masked matrix of distances."""

    x: Node
    centers: Node
    labels: Node

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.of_labels: list[Node] = []

    def distances(self, node: Any) -> bool:
        """addmm(squares, x, c^T, beta=1, alpha=-2), squares = ||x||^2 (N, 1) + ||c||^2 (1, K)."""
        call = call_of(node)
        if call is None or call.kind != "addmm" or call.get("beta", 1) != 1 or call.get("alpha", 1) != -2:
            return False
        turned = call_of(call.get("mat2"))
        if turned is None or turned.kind != "transpose":
            return False
        self.x, self.centers = call.get("mat1"), turned.get("input")
        self.nodes += [call.get("mat2"), node]
        return self._squares(call.get("input"))

    def _squares(self, node: Any) -> bool:
        call = call_of(node)
        if call is None or call.kind != "add" or call.in_place:
            return False
        if tensor(self.x) is None or tensor(self.centers) is None:
            return False
        self.nodes.append(node)
        left, right = call.operands
        one = self._norms(left), self._norms(right)
        n, k = shape(self.x)[0], shape(self.centers)[0]
        return one == (self.x, self.centers) and same_shape(shape(node), (n, k))

    def _norms(self, node: Any) -> Node | None:
        """What the squared row norms are of, past `expand` and `t`; shapes say which way they lie."""
        while (call := call_of(node)) is not None and call.kind in ("expand", "transpose"):
            self.nodes.append(node)
            node = call.get("input")
        if call is None or call.kind != "sum" or _dims(call.get("dim"), 2) != (1,) or not call.get("keepdim"):
            return None
        squares = _squared(call.get("input"))
        if squares is None:
            return None
        self.nodes += [call.get("input"), node]
        return squares

    def mask(self, node: Any) -> bool:
        """labels[:, None] == arange(K), as numbers."""
        call = call_of(node)
        if call is not None and call.kind == "cast":
            self.nodes.append(node)
            node = call.get("input")
            call = call_of(node)
        if call is None or call.kind != "eq":
            return False
        self.nodes.append(node)
        n, k = shape(self.x)[0], shape(self.centers)[0]
        for labels, classes in (call.operands, call.operands[::-1]):
            if self._is_range(classes, k) and self._is_column(labels, n):
                return same_shape(shape(node), (n, k))
        return False

    def _past(self, node: Any, *kinds: str) -> Any:
        while (call := call_of(node)) is not None and call.kind in kinds and not call.in_place:
            self.of_labels.append(node)
            self.nodes.append(node)
            node = call.get("input")
        return node

    def _is_range(self, node: Any, k: Any) -> bool:
        last = shape(node)[-1] if tensor(node) is not None else None
        source = self._past(node, "expand", "cast")
        call = call_of(source)
        if call is None or call.kind != "arange" or len(call.get("*")) != 1 or last is None:
            return False
        self.of_labels.append(source)
        self.nodes.append(source)
        return tensor(source).dtype.is_floating_point is False and same_size(shape(source)[0], k) and same_size(last, k)

    def _is_column(self, node: Any, n: Any) -> bool:
        source = self._past(node, "expand")
        call = call_of(source)
        if call is None or call.kind != "reshape" or tensor(call.get("input")) is None:
            return False
        labels = call.get("input")
        y = tensor(labels)
        if y.dim() != 1 or not same_shape(shape(source), (n, 1)) or str(y.dtype) not in ("torch.int64", "torch.int32"):
            return False
        self.of_labels.append(source)
        self.nodes.append(source)
        self.labels = labels
        return surely(y.shape[0] == n)


def _squared(node: Any) -> Node | None:
    call = call_of(node)
    if call is None or call.in_place:
        return None
    left, right = call.operands
    squared = call.kind == "square" or (call.kind == "pow" and is_number(right) and right == 2)
    return left if squared or (call.kind == "mul" and left is right) else None
