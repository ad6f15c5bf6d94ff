"""Operators that put tensors side by side.

cat along d:     labels are put side by side; the other dimensions meet
stack:           a new dimension that stays; the others meet
pad:             padding stays, the rest keeps its labels
"""

from __future__ import annotations

import numpy as np

from graphprune.labels import Dim
from graphprune.ops.pointwise import broadcast
from graphprune.ops.registry import Labels, Op, Value, aten, rule


@rule(aten.cat, aten.concat, aten.concatenate)
def cat(op: Op) -> Labels:
    """`cat(tensors, dim)`."""
    tensors: list[Value] = [t for t in op["tensors"] if t.shape != (0,)]
    if len(tensors) == 1:
        return op.dims(tensors[0])
    dim = op.get("dim", 0) % len(op.shape)
    out: Labels = []
    for d in range(len(op.shape)):
        if d == dim:
            out.append(side_by_side([op.dim(t, d) for t in tensors], [t.shape[d] for t in tensors]))
        else:
            column = [Value((t.shape[d],), [t.labels[d]], t.name) for t in tensors]
            out += broadcast(op, column, (op.shape[d],))
            for t, c in zip(tensors, column, strict=True):
                t.labels[d] = c.labels[0]
    return out


def side_by_side(parts: list[Dim], sizes: list[int]) -> Dim:
    """Returns the labels of dimensions joined end to end; parts without labels stay."""
    if all(p is None for p in parts):
        return None
    return np.concatenate([np.zeros(n, dtype=np.int64) if p is None else p for p, n in zip(parts, sizes, strict=True)])


@rule(aten.stack)
def stack(op: Op) -> Labels:
    """`stack(tensors, dim)`."""
    tensors: list[Value] = op["tensors"]
    out = broadcast(op, tensors, tensors[0].shape)
    out.insert(op.get("dim", 0) % (len(out) + 1), None)
    return out


@rule(aten.pad, aten.constant_pad_nd)
def pad(op: Op) -> Labels:
    """`pad(x, (last left, last right, ...))`: constant padding stays; other modes freeze what they copy from."""
    x: Value = op["self"]
    amounts = op["pad"]
    labels = op.dims(x)
    constant = op.get("mode", "constant") == "constant"
    for k in range(len(amounts) // 2):
        d = len(x.shape) - 1 - k
        before, after = amounts[2 * k], amounts[2 * k + 1]
        whole = labels[d]
        if whole is None or (before, after) == (0, 0):
            continue
        if not constant or before < 0 or after < 0:
            op.freeze(whole, "is padded with its own values, or cropped")
            labels[d] = None
        else:
            labels[d] = side_by_side([None, whole, None], [before, whole.size, after])
    op.zero = x.zero and constant and not op.get("value", 0)
    return labels


@rule(aten.meshgrid)
def meshgrid(op: Op) -> list[Labels]:
    """Coordinate grids: made from positions, so nothing is removed."""
    for value in op.values():
        op.freeze_value(value, "is a coordinate")
    return [[None] * len(s) for s in op.outputs]
