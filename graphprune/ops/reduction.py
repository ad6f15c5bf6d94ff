"""Reductions, and operators that look along a dimension.

mean, var, max, softmax ... along d:     a statistic across d, if d has channels
sum, norm along d:                       exact where removed channels are zero, else a statistic
"""

from __future__ import annotations

from typing import Any

from graphprune.ops.registry import Labels, Op, Value, aten, rule


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
    op.zero = x.zero
    return out if len(op.outputs) == 1 else [list(out) for _ in op.outputs]


@rule(aten.mean, aten.var, aten.std, aten.var_mean, aten.std_mean, aten.amax, aten.amin, aten.logsumexp, aten.prod, aten.median,
      aten.nanmean)  # fmt: skip
def statistic(op: Op) -> Labels | list[Labels]:
    """A statistic across the reduced dimensions."""
    return _reduce(op, additive=False)


@rule(aten.sum, aten.norm, aten.linalg_vector_norm, aten.count_nonzero, aten.nansum)
def additive(op: Op) -> Labels | list[Labels]:
    """A sum (of powers): removed channels that are zero add nothing."""
    return _reduce(op, additive=True)


@rule(aten.max, aten.min, aten.any, aten.all)
def extremum(op: Op) -> Labels | list[Labels]:
    """The extremum along a dimension (and its position), or of two tensors elementwise (tagged so by their overload)."""
    values = op.values()
    if len(values) > 1:
        from graphprune.ops.pointwise import pointwise  # noqa: PLC0415 (two families share this name)

        return pointwise(op)
    if len(op.outputs) > 1:
        _freeze_looked_along(op, values[0], "has the position of its extremum looked up")
    return _reduce(op, additive=False)


@rule(aten.argmax, aten.argmin)
def position(op: Op) -> Labels | list[Labels]:
    """The position of an extremum depends on how many channels there are."""
    _freeze_looked_along(op, op["self"], "has the position of its extremum looked up")
    return _reduce(op, additive=False)


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


@rule(aten.cumsum, aten.cumprod, aten.logcumsumexp)
def cumulative(op: Op) -> Labels:
    """A running sum: exact where removed channels are zero."""
    x: Value = op["self"]
    labels = op.dims(x)
    if labels and not (x.zero and op.name == "aten::cumsum"):
        op.statistic(labels[op["dim"]])
    op.zero = False
    return labels


def _freeze_looked_along(op: Op, x: Value, text: str) -> None:
    labels = op.dims(x)
    for d in _dims(op, len(x.shape)):
        op.freeze(labels[d], text)
