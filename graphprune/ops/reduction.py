"""Reductions, and operators that look along a dimension.

mean, var, max, softmax ... along d:     a statistic across d, if d has channels
sum, norm along d:                       exact where removed channels are zero, else a statistic
"""

from __future__ import annotations

from typing import Any

import torch

from graphprune.ops.pointwise import broadcast, covers, pointwise
from graphprune.ops.registry import Labels, Op, Value, aten, rule

POSITION = "has the position of its extremum looked up"


def _dims(op: Op, rank: int) -> list[int]:
    dim: Any = op["dim"]
    if dim is None or dim == []:
        return list(range(rank))
    return [d % max(rank, 1) for d in (dim if isinstance(dim, (list, tuple)) else [dim])]


def _reduce(op: Op, *, additive: bool) -> Labels | list[Labels]:
    x: Value = op["self"]
    labels = op.dims(x)
    reduced = _dims(op, len(x.shape))
    for d in reduced:
        if not (additive and x.zero):
            op.statistic(labels[d])
    keep = bool(op.get("keepdim", default=False))
    out = [None if d in reduced else dim for d, dim in enumerate(labels) if keep or d not in reduced]
    op.zero = x.zero and op.name != "aten::logsumexp"
    return out if len(op.outputs) == 1 else [list(out) for _ in op.outputs]


@rule(aten.mean, aten.var, aten.std, aten.var_mean, aten.std_mean, aten.amax, aten.amin, aten.logsumexp, aten.prod, aten.nanmean,
      aten.aminmax)  # fmt: skip
def statistic(op: Op) -> Labels | list[Labels]:
    """A statistic across the reduced dimensions."""
    return _reduce(op, additive=False)


@rule(aten.sum, aten.norm, aten.linalg_vector_norm, aten.count_nonzero, aten.nansum)
def additive(op: Op) -> Labels | list[Labels]:
    """A sum (of powers): removed channels that are zero add nothing, unless zero is taken to a negative power."""
    order = op["p"] if op["p"] is not None else op["ord"]
    return _reduce(op, additive=not isinstance(order, (int, float)) or order >= 0)


@rule(aten.max, aten.min, aten.any, aten.all, aten.median, aten.nanmedian, aten.mode)
def extremum(op: Op) -> Labels | list[Labels]:
    """The extremum along a dimension (and its position), or of two tensors elementwise (tagged so by their overload)."""
    values = op.values()
    if len(values) > 1:
        return pointwise(op)
    if len(op.outputs) > 1 and 1 not in op.idle:
        _freeze_looked_along(op, values[0], POSITION)
    return _reduce(op, additive=False)


@rule(aten.argmax, aten.argmin)
def position(op: Op) -> Labels | list[Labels]:
    """The position of an extremum depends on how many channels there are."""
    _freeze_looked_along(op, op["self"], POSITION)
    labels = _reduce(op, additive=False)
    op.zero = False
    return labels


@rule(aten.topk, aten.sort, aten.argsort, aten.kthvalue)
def order(op: Op) -> Labels | list[Labels]:
    """Sorting along a dimension freezes it; the others pass."""
    x: Value = op["self"]
    dim = op.get("dim", -1) % max(len(x.shape), 1)
    labels = op.dims(x)
    if labels:
        op.freeze(labels[dim], "is sorted along")
        labels[dim] = None
    return labels if len(op.outputs) == 1 else [list(labels) for _ in op.outputs]


@rule(aten.softmax, aten.log_softmax, aten._softmax, aten._log_softmax, aten._safe_softmax)
def softmax(op: Op) -> Labels:
    """Normalised across a dimension: a statistic across it."""
    labels = op.dims(op["self"])
    if labels:
        op.statistic(labels[op["dim"]])
    op.zero = False
    return labels


@rule(aten.cumsum, aten.cumprod, aten.logcumsumexp, aten.cummax, aten.cummin)
def cumulative(op: Op) -> Labels | list[Labels]:
    """A running sum or the like: exact where removed channels are zero and are added."""
    x: Value = op["self"]
    labels = op.dims(x)
    along = labels[op["dim"]] if labels else None
    if len(op.outputs) > 1 and 1 not in op.idle:
        op.freeze(along, POSITION)
    elif not (x.zero and op.name == "aten::cumsum"):
        op.statistic(along)
    op.zero = x.zero and along is None and op.name != "aten::logcumsumexp"
    return labels if len(op.outputs) == 1 else [list(labels) for _ in op.outputs]


@rule(aten.renorm)
def renorm(op: Op) -> Labels:
    """`renorm(x, p, dim, maxnorm)`: slices of one dimension are scaled by their norms, across all others."""
    x: Value = op["self"]
    labels = op.dims(x)
    for d, dim in enumerate(labels):
        if d != op["dim"] % len(labels) and not x.zero:
            op.statistic(dim)
    op.zero = x.zero
    return labels


@rule(aten.dist)
def distance(op: Op) -> Labels:
    """`dist(a, b)`: the norm of a difference; what is zero on both sides adds nothing."""
    a, b = op["self"], op["other"]
    for labels in broadcast(op, [a, b], tuple(torch.broadcast_shapes(a.shape, b.shape))):
        if op.get("p", 2) < 0 or not (a.zero and b.zero and a.shape == b.shape):
            op.statistic(labels)
    op.zero = False
    return []


@rule(aten.linalg_cross)
def cross(op: Op) -> Labels:
    """`cross(a, b, dim)`: the three components of vectors stay."""
    labels = broadcast(op, [op["self"], op["other"]], op.shape)
    op.freeze(labels[op.get("dim", -1)], "is a component of vectors in three dimensions")
    labels[op.get("dim", -1)] = None
    op.zero = (op["self"].zero and covers(op["self"], labels)) or (op["other"].zero and covers(op["other"], labels))
    return labels


def _freeze_looked_along(op: Op, x: Value, text: str) -> None:
    labels = op.dims(x)
    for d in _dims(op, len(x.shape)):
        op.freeze(labels[d], text)
