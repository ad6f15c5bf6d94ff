"""Operators that write at positions: literal positions and constant tables are rewritten, anything else freezes what it writes along.

out[table] = y, x elsewhere      out has the labels of x; y has labels[table]
out[a:b] = y, x elsewhere        y has labels[a:b]
"""

from __future__ import annotations

import numpy as np
import torch

from graphprune.ops.indexing import bounds, column, literal, looked_up
from graphprune.ops.labels import Dim, Ids
from graphprune.ops.registry import Labels, Op, Value, aten, rule
from graphprune.torch_private import is_mutable

WRITTEN = "is written by position"
AT_RUN_TIME = WRITTEN + " computed at run time"
NOT_THERE = "is written into a dimension that cannot shrink"


@rule(aten.index_copy, aten.index_add, aten.index_reduce, aten.index_fill)
def index_copy(op: Op) -> Labels:
    """`index_copy(x, dim, index, source)` and its kin: a constant table renumbers, a computed one freezes."""
    x, index, source = op["self"], op["index"], op["source"]
    labels = op.dims(x)
    op.zero = _both_zero(x, source if source is not None else op["value"])
    if not x.shape:
        return labels
    dim = op["dim"] % len(x.shape)
    there: Dim = None
    table = literal(op, index) if len(index.shape) == 1 else None
    if labels[dim] is not None and table is None:
        op.freeze(labels[dim], AT_RUN_TIME)
        labels[dim] = None
    elif labels[dim] is not None:
        op.remap("index", labels[dim])
        there = labels[dim][table % labels[dim].size]
    if isinstance(source, Value):
        _meet(op, source, [*labels[:dim], there, *labels[dim + 1 :]])
    op.freeze_value(index, WRITTEN)
    return labels


def _both_zero(x: Value, written: object) -> bool:
    """Returns whether a removed channel is zero after writing: it was zero before, and zero is written."""
    return x.zero and (written.zero if isinstance(written, Value) else not written)


def _meet(op: Op, source: Value, labels: Labels) -> None:
    """Says that what is written has the labels of the place that it is written to."""
    if len(source.shape) == len(labels):
        for d, there in enumerate(labels):
            op.bind(source, d, there, NOT_THERE)
    else:
        op.freeze_value(source, WRITTEN)


@rule(aten.scatter, aten.scatter_add, aten.scatter_reduce)
def scatter(op: Op) -> Labels:
    """`scatter(x, dim, index, src)`: a constant table along `dim` alone is one of `index_copy`; any other one freezes `dim`."""
    x, index = op["self"], op["index"]
    src: Value | None = op["src"]
    labels = op.dims(x)
    op.zero = _both_zero(x, src if src is not None else op["value"])
    if not x.shape:
        return labels
    dim = op["dim"] % len(x.shape)
    others = [index, *([src] if src is not None else [])]
    table = _whole_column(op, x, others, dim) if labels[dim] is not None else None
    there: Dim = None
    if table is None:
        op.freeze(labels[dim], AT_RUN_TIME if index.tensor is None else WRITTEN)
    else:
        there = _listed(op, x, dim, table, labels[dim])
    for d in range(len(labels)):
        for value in others:
            if d == dim:
                if value is not index:
                    op.bind(value, d, there, NOT_THERE)
            elif value.shape[d] == x.shape[d]:
                labels[d] = op.equal(labels[d], op.dim(value, d), NOT_THERE)
            else:
                op.freeze(labels[d], WRITTEN)
                op.freeze(op.dim(value, d), WRITTEN)
    if table is None:
        op.freeze(op.dim(index, dim), WRITTEN)
    return labels


def _whole_column(op: Op, x: Value, others: list[Value], dim: int) -> Ids | None:
    """Returns the table of a call that `index_copy`, `index_add` or `index_fill` can stand in for, or None."""
    if op["reduce"] is not None or any(len(v.shape) != len(x.shape) or v.shape != others[0].shape for v in others):
        return None
    if any(a != b for d, (a, b) in enumerate(zip(x.shape, others[0].shape, strict=True)) if d != dim):
        return None
    return column(op, others[0], dim)


def _listed(op: Op, x: Value, dim: int, table: Ids, whole: Ids) -> Ids:
    """Says which call writes whole channels, once any of them goes; returns the labels of what is written."""
    positions = table % whole.size
    arguments = {"self": x, "dim": dim, "index": torch.from_numpy(np.ascontiguousarray(positions))}
    in_place = is_mutable(op.target)
    calls = torch.ops.aten
    if op["src"] is None:
        target = calls.index_fill_.int_Scalar if in_place else calls.index_fill.int_Scalar
        op.become(target, {**arguments, "value": op["value"]})
    elif op.name.removesuffix("_") == "aten::scatter_add":
        op.become(calls.index_add_.default if in_place else calls.index_add.default, {**arguments, "source": op["src"]})
    else:
        op.become(calls.index_copy_.default if in_place else calls.index_copy.default, {**arguments, "source": op["src"]})
    op.remap("index", whole)
    found: Ids = whole[positions]
    return found


@rule(aten.index_put, aten._unsafe_index_put)
def index_put(op: Op) -> Labels:
    """`x[i, j, ...] = values`: what is written has the labels of the place, as `x[i, j, ...]` has them."""
    x, values = op["self"], op["values"]
    indices: list[Value | None] = op["indices"]
    labels = op.dims(x)
    op.zero = x.zero and values.zero
    mask = _mask(indices, x)
    if mask is not None and all(size == 1 for size in values.shape):
        for d in range(len(mask.shape)):
            labels[d] = op.equal(labels[d], op.dim(mask, d), "is written where a mask says that cannot shrink")
        return labels
    place = looked_up(op, labels, indices, "indices")
    place = place[len(place) - len(values.shape) :] if len(values.shape) <= len(place) else place
    for d, there in enumerate(place):
        back = d - len(place)
        if -back <= len(values.shape) and values.shape[back] != 1:
            op.bind(values, len(values.shape) + back, there, NOT_THERE)
    return labels


def _mask(indices: list[Value | None], x: Value) -> Value | None:
    """Returns the one mask that covers the first dimensions of x, or None."""
    first = indices[0] if indices else None
    alone_ = first is not None and all(i is None for i in indices[1:])
    return first if alone_ and first is not None and first.boolean and first.shape == x.shape[: len(first.shape)] else None


@rule(aten.slice_scatter)
def slice_scatter(op: Op) -> Labels:
    """`slice_scatter(x, src, dim, start, end, step)`: src is written over a part of one dimension of x."""
    x, src = op["self"], op["src"]
    labels = op.dims(x)
    dim, step = op.get("dim", 0) % len(x.shape), op.get("step", 1)
    start, end, _ = slice(op["start"], op["end"], step).indices(x.shape[dim])
    end = max(start, end)
    whole = labels[dim]
    _meet(op, src, [*labels[:dim], None if whole is None else whole[start:end:step], *labels[dim + 1 :]])
    if whole is None:
        return labels
    if step != 1:
        positions = torch.arange(start, end, step)
        op.become(torch.ops.aten.index_copy.default, {"self": x, "dim": dim, "index": positions, "source": src})
        op.remap("index", whole)
        return labels
    if (op["start"] or 0) < 0 or (op["end"] or 0) < 0:
        op.become(torch.ops.aten.slice_scatter.default, {"self": x, "src": src, "dim": dim, "start": start, "end": end})
    bounds(op, whole, op["start"], op["end"], start, end)
    return labels
