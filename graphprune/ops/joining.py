"""Operators that put tensors side by side.

cat along d:     labels are put side by side; the other dimensions meet
stack:           a new dimension that stays; the others meet
pad:             padding stays, the rest keeps its labels
"""

from __future__ import annotations

import numpy as np

from graphprune.ops.indexing import list_positions
from graphprune.ops.labels import Dim
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
    """`stack(tensors, dim)`: a new dimension that stays, unless it puts together what was taken apart along the same one."""
    tensors: list[Value] = op["tensors"]
    out = broadcast(op, tensors, tensors[0].shape)
    dim = op.get("dim", 0) % (len(out) + 1)
    pieces = [t.piece for t in tensors if t.piece is not None and t.piece.dim == dim]
    if len(pieces) == len(tensors) and all(p.source is pieces[0].source for p in pieces):
        source = pieces[0].source
        whole, positions = op.dim(source, dim), np.array([p.position for p in pieces], dtype=np.int64)
        list_positions(op, source, dim, positions, whole)
        out.insert(dim, None if whole is None else whole[positions])
    else:
        for tensor in tensors:
            op.keep(tensor)
        out.insert(dim, None)
    return out


@rule(aten.block_diag)
def block_diag(op: Op) -> Labels:
    """`block_diag(a, b, ...)`: rows side by side, columns side by side."""
    tensors: list[Value] = op["tensors"]
    parts: list[tuple[list[Dim], tuple[int, int]]] = []
    for t in tensors:
        size = (1, 1) if not t.shape else (1, t.shape[0]) if len(t.shape) == 1 else (t.shape[0], t.shape[1])
        parts.append(([*[None] * (2 - len(t.shape)), *op.dims(t)], size))
    return [side_by_side([labels[d] for labels, _ in parts], [size[d] for _, size in parts]) for d in range(2)]


@rule(aten.pad, aten.constant_pad_nd)
def pad(op: Op) -> Labels:
    """`pad(x, (last left, last right, ...))`: constant padding stays; other modes freeze what they copy from; negative amounts crop."""
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
        if not constant:
            op.freeze(whole, "is padded with its own values")
            labels[d] = None
            continue
        first, last = max(-before, 0), whole.size - max(-after, 0)
        op.crop(("pad", 2 * k), whole[:first] if first else None)
        op.crop(("pad", 2 * k + 1), whole[last:] if last < whole.size else None)
        labels[d] = side_by_side([None, whole[first:last], None], [max(before, 0), last - first, max(after, 0)])
    op.zero = x.zero and constant and not op.get("value", 0)
    return labels


@rule(aten.meshgrid)
def meshgrid(op: Op) -> list[Labels]:
    """Coordinate grids: each tensor runs along one dimension of all of them."""
    labels: Labels = [op.dims(t)[0] if t.shape else None for t in op["tensors"]]
    if op["indexing"] == "xy" and len(labels) > 1:
        labels[:2] = labels[1::-1]
    op.zero = False
    return [list(labels) for _ in op.outputs]
