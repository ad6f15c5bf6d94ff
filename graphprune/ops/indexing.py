"""Operators that pick indices: literal bounds and constant index tables can be rewritten, anything else freezes what it looks along.

x[:, a:b]        labels[a:b];  a becomes the number of survivors before a, b that before b
x[:, table]      labels[table];  the table is renumbered
x[:, i]          i stays, and becomes the number of survivors before it
"""

from __future__ import annotations

import numpy as np
import torch

from graphprune.ops.labels import Dim, Ids
from graphprune.ops.pointwise import alone, broadcast
from graphprune.ops.registry import Labels, Op, Path, Piece, Value, aten, rule

LOOKED_UP = "is looked up by position"
AT_RUN_TIME = LOOKED_UP + " computed at run time"


@rule(aten.slice)
def slice_(op: Op) -> Labels:
    """`x[start:end:step]` along one dimension."""
    x: Value = op["self"]
    dim, step = op.get("dim", 0) % len(x.shape), op.get("step", 1)
    labels = op.dims(x)
    start, end, _ = slice(op["start"], op["end"], step).indices(x.shape[dim])
    whole = labels[dim]
    if (start, end, step) == (0, x.shape[dim], 1):  # older releases of PyTorch slice the batch like this for `x[:, i]`
        op.whole_of = x.whole_of or x
        return labels
    if whole is None:
        return labels
    if step != 1 and op.written(x):
        labels[dim] = _in_step(op, whole, start, end, step)
        return labels
    labels[dim] = whole[start:end:step]
    if step != 1:
        list_positions(op, x, dim, np.arange(start, end, step), whole)
        return labels
    if (op["start"] or 0) < 0 or (op["end"] or 0) < 0:
        op.become(torch.ops.aten.slice.Tensor, {"self": x, "dim": dim, "start": start, "end": max(start, end)})
    bounds(op, whole, op["start"], op["end"], start, max(start, end))
    return labels


def bounds(op: Op, whole: Ids, stated_start: int | None, stated_end: int | None, start: int, end: int) -> None:
    """Says what the arguments `start` and `end` count, where they are stated; one that counts from the end makes both be stated."""
    both = (stated_start or 0) < 0 or (stated_end or 0) < 0
    if both or stated_start is not None:
        op.extent("start", whole[:start])
    if both or stated_end is not None:
        op.extent("end", whole[:end])


def _in_step(op: Op, whole: Ids, start: int, end: int, step: int) -> Dim:
    """A view with a step that is written through must stay a view: whole runs of `step` neighbours go, so the step stays as it is."""
    if start >= step or end <= whole.size - step + start or whole.size % step:
        op.freeze(whole, "is written through a view with a step")
        return None
    _, within = op.table.split(whole, [whole.size // step, step], op.reason("is written through a view with a step"))
    op.freeze(within, "is written through a view with a step")
    if op["end"] is not None:
        op.extent("end", whole)
    return whole[start:end:step]


def list_positions(op: Op, x: Value, dim: int, positions: Ids, whole: Dim) -> None:
    """Says that once any of `whole` goes, positions are listed: what no bounds can state shifts with what goes."""
    op.become(torch.ops.aten.index_select.default, {"self": x, "dim": dim, "index": torch.from_numpy(np.ascontiguousarray(positions))})
    op.remap("index", whole)


@rule(aten.narrow)
def narrow(op: Op) -> Labels:
    """`x.narrow(dim, start, length)`."""
    x: Value = op["self"]
    dim, start, length = op["dim"] % len(x.shape), op["start"], op["length"]
    labels = op.dims(x)
    whole = labels[dim]
    if not isinstance(start, int):
        op.freeze(whole, LOOKED_UP)
        whole = None
    if whole is not None:
        first = start % x.shape[dim]
        labels[dim] = whole[first : first + length]
        if start < 0:
            op.become(torch.ops.aten.narrow.default, {"self": x, "dim": dim, "start": first, "length": length})
        op.extent("start", whole[:first])
        op.extent("length", whole[first : first + length])
    return labels


@rule(aten.select)
def select(op: Op) -> Labels:
    """`x.select(dim, i)`: the position that is picked stays, unless all of them are stacked again; those before it shift it."""
    x: Value = op["self"]
    labels = op.dims(x)
    dim = op["dim"] % len(labels)
    whole, position = labels.pop(dim), op["index"]
    if whole is None:
        return labels
    if not isinstance(position, int):
        op.freeze(whole, AT_RUN_TIME)
        return labels
    first = position % whole.size
    op.pieces = [Piece(x.whole_of or x, dim, first, whole[first : first + 1], op.reason("is picked by a literal position"))]
    if position < 0:
        op.become(torch.ops.aten.select.int, {"self": x, "dim": dim, "index": first})
    op.extent("index", whole[:first])
    return labels


@rule(aten.unbind)
def unbind(op: Op) -> list[Labels]:
    """`x.unbind(dim)`: one output per position, so the dimension stays, unless they are stacked again."""
    x: Value = op["self"]
    labels = op.dims(x)
    dim = op.get("dim", 0) % len(labels)
    whole = labels.pop(dim)
    if whole is not None:
        reason = op.reason("is taken apart position by position")
        op.pieces = [Piece(x.whole_of or x, dim, i, whole, reason) for i in range(whole.size)]
    return [list(labels) for _ in op.outputs]


@rule(aten.split, aten.split_with_sizes, aten.chunk, aten.unsafe_split, aten.unsafe_chunk, aten.tensor_split)
def split(op: Op) -> list[Labels]:
    """Any cut into consecutive pieces; pieces that no longer have the stated sizes are cut by explicit ones."""
    x: Value = op["self"]
    dim = op.get("dim", 0) % len(x.shape)
    labels = op.dims(x)
    whole = labels[dim]
    sizes = [shape[dim] for shape in op.outputs]
    out: list[Labels] = []
    offset = 0
    for size in sizes:
        piece: Dim = None if whole is None else whole[offset : offset + size]
        out.append([*labels[:dim], piece, *labels[dim + 1 :]])
        offset += size
    if whole is not None:
        if op.name != "aten::split_with_sizes":
            op.become(torch.ops.aten.split_with_sizes.default, {"self": x, "split_sizes": sizes, "dim": dim})
        for i, piece_labels in enumerate(out):
            op.extent(("split_sizes", i), piece_labels[dim])
    return out


@rule(aten.index_select)
def index_select(op: Op) -> Labels:
    """`index_select(x, dim, index)`: a constant index renumbers, a computed one freezes."""
    x, index = op["self"], op["index"]
    labels = op.dims(x)
    dim = op["dim"] % max(len(x.shape), 1)
    if not x.shape:
        return labels
    if not index.shape:
        op.freeze(labels[dim], LOOKED_UP)
        labels[dim] = None
    else:
        labels[dim] = pick(op, labels[dim], index, "index")[0]
    return labels


def literal(op: Op, index: Value) -> Ids | None:
    """Returns the positions that a constant index tensor names, those that are set where it is boolean; None for any other one."""
    if index.tensor is None or not index.constant or op.written(index):
        return None
    table = index.tensor.detach().cpu()
    if table.dtype == torch.bool:
        return table.nonzero().squeeze(1).numpy() if table.ndim == 1 else None
    return None if table.is_floating_point() or table.is_complex() else table.long().numpy()


def pick(op: Op, labels: Dim, index: Value, path: str | Path) -> Labels:
    """Returns the labels of what is looked up in a dimension by an index tensor, one entry per dimension of that."""
    if labels is None:
        return [None] if index.boolean else op.dims(index)
    table = literal(op, index)
    if table is None:
        op.freeze(labels, AT_RUN_TIME)
        return [None] if index.boolean else op.dims(index)
    found: Ids = labels[table % labels.size]
    if table.ndim == 0:
        op.freeze(labels, LOOKED_UP)
        return []
    if table.ndim == 1:
        op.remap(path, labels)
        return [found]
    own = op.table.split(found.ravel(), found.shape, op.reason("is looked up in rows and columns"))
    op.remap(path, labels, own)
    return own


@rule(aten.index, aten._unsafe_index)
def index(op: Op) -> Labels:
    """`x[i, j, ...]` with index tensors: one constant table renumbers, other looked-up dimensions freeze; index labels pass on."""
    x: Value = op["self"]
    labels = op.dims(x)
    _keep_unread(op, x, labels)
    labels = looked_up(op, labels, op["indices"], "indices")
    op.zero = x.zero and all(dim is None for i in op["indices"] if i is not None for dim in i.labels)
    return labels


def _keep_unread(op: Op, x: Value, labels: Labels) -> None:
    """Freezes the rows of a learnt table that these inputs do not look up: other inputs (a larger image) may."""
    for d, i in enumerate(op["indices"]):
        if x.parameter and i is not None and not i.boolean and i.tensor is not None and isinstance(labels[d], np.ndarray):
            unread = np.setdiff1d(np.arange(x.shape[d]), i.tensor.cpu().numpy().ravel() % x.shape[d])
            op.freeze(
                labels[d][unread], "is a row of a table that these inputs do not look up", "Trace with inputs that look up all of them"
            )


def looked_up(op: Op, labels: Labels, indices: list[Value | None], argument: str) -> Labels:
    """Returns the labels of `x[indices]`, where `labels` are those of x: also the labels of what can be written there."""
    used = [d for d, i in enumerate(indices) if i is not None]
    given = [i for i in indices if i is not None]
    if len(used) == 1 and (len(given[0].shape) == 1 or not given[0].boolean):
        at = used[0]
        return [*labels[:at], *pick(op, labels[at], given[0], (argument, at)), *labels[at + 1 :]]
    masks = [len(i.shape) if i.boolean else 1 for i in given]
    starts = _starts(indices)
    gone = {d + k for d, width in zip(starts, masks, strict=True) for k in range(width)}
    for d in sorted(gone):
        op.freeze(labels[d], LOOKED_UP)
    rest = [v for d, v in enumerate(labels) if d not in gone]
    if any(i.boolean for i in given):
        for i in given:
            op.freeze_value(i, "selects positions")
        middle: Labels = [None] if len(given) == 1 else [None] * max(len(i.shape) if not i.boolean else 1 for i in given)
    else:
        middle = broadcast(op, given, tuple(torch.broadcast_shapes(*(i.shape for i in given))))
    at = min(gone) if gone == set(range(min(gone), max(gone) + 1)) else 0
    return [*rest[:at], *middle, *rest[at:]]


def _starts(indices: list[Value | None]) -> list[int]:
    """Returns the first dimension that each index tensor looks along (a mask takes as many dimensions as it has)."""
    out, at = [], 0
    for i in indices:
        if i is not None:
            out.append(at)
        at += len(i.shape) if i is not None and i.boolean else 1
    return out


@rule(aten.embedding)
def embedding(op: Op) -> Labels:
    """`embedding(weight, indices)`: rows are looked up, columns are the channels."""
    weight, indices = op["weight"], op["indices"]
    op.freeze_value(weight, "is a vocabulary: its rows are looked up", "Drop unused tokens and their rows before pruning", keep=(1,))
    op.produce(weight, 1)
    labels = [*op.dims(indices), op.dim(weight, 1)]
    op.zero = alone(labels, -1)
    return labels


@rule(aten.gather, aten.take_along_dim)
def gather(op: Op) -> Labels:
    """`gather(x, dim, index)`: a constant table along `dim` alone renumbers, any other one freezes; other dimensions couple."""
    x: Value = op["self"]
    argument = "index" if op["index"] is not None else "indices"
    index_: Value = op[argument]
    if op["dim"] is None or len(index_.shape) != len(x.shape):
        return op.decline("looks up in the flattened tensor")
    dim = op["dim"] % max(len(x.shape), 1)
    out: Labels = []
    table = column(op, index_, dim) if index_.shape else None
    for d in range(len(x.shape)):
        a, b = op.dim(x, d), op.dim(index_, d)
        if d == dim:
            out.append(_gathered(op, x, dim, table) if table is not None and a is not None else b)
            if table is None:
                op.freeze(a, AT_RUN_TIME if index_.tensor is None else LOOKED_UP)
        elif index_.shape[d] == 1 and argument == "indices":
            out.append(a)
        elif x.shape[d] == 1 and argument == "indices":
            out.append(b)
        elif x.shape[d] == index_.shape[d]:
            out.append(op.equal(a, b))
        else:
            op.freeze(a, LOOKED_UP)
            out.append(b)
    return out


def column(op: Op, index: Value, dim: int) -> Ids | None:
    """Returns the positions in a constant index tensor that varies along one dimension alone, or None."""
    table = literal(op, index)
    if table is None or table.ndim != len(index.shape) or not table.size:
        return None
    first = np.moveaxis(table, dim, 0).reshape(table.shape[dim], -1)
    return first[:, 0] if (first == first[:, :1]).all() else None


def _gathered(op: Op, x: Value, dim: int, table: Ids) -> Dim:
    whole: Ids = x.labels[dim]
    positions = table % whole.size
    list_positions(op, x, dim, positions, whole)
    return whole[positions]


@rule(aten.roll)
def roll(op: Op) -> Labels:
    """`roll(x, shifts, dims)`: the shift becomes the number of survivors that wrap around; without dims, of the flattened tensor."""
    x: Value = op["self"]
    labels = op.dims(x)
    shifts, dims = op["shifts"], op.get("dims", [])
    shifts = [shifts] if isinstance(shifts, int) else shifts
    if not dims:
        return _roll_flat(op, x, labels, shifts[0])
    for i, (shift, d) in enumerate(zip(shifts, dims, strict=True)):
        whole = labels[d]
        if whole is not None:
            forward = shift % whole.size
            op.extent(("shifts", i), whole[whole.size - forward :])
            labels[d] = np.roll(whole, forward)
    return labels


def _roll_flat(op: Op, x: Value, labels: Labels, shift: int) -> Labels:
    """Everything moves on by `shift` in row-major order, from one row into the next."""
    flat = op.table.merge(labels, x.shape)
    if flat is None:
        return labels
    forward = shift % flat.size
    op.extent(("shifts", 0), flat[flat.size - forward :])
    return op.table.split(np.roll(flat, forward), x.shape, op.reason("is rolled from one row into the next"))


@rule(aten.flip)
def flip(op: Op) -> Labels:
    """`flip(x, dims)`."""
    labels = op.dims(op["self"])
    for d in op["dims"]:
        whole = labels[d]
        labels[d] = None if whole is None else whole[::-1]
    return labels


@rule(aten.rot90)
def rot90(op: Op) -> Labels:
    """`rot90(x, k, dims)`: turns by a quarter, which flips and exchanges two dimensions."""
    labels = op.dims(op["self"])
    turns = op.get("k", 1) % 4
    a, b = op.get("dims", [0, 1])
    first, second = labels[a], labels[b]
    if turns in (1, 2):
        second = None if second is None else second[::-1]
    if turns in (2, 3):
        first = None if first is None else first[::-1]
    labels[a], labels[b] = (first, second) if turns % 2 == 0 else (second, first)
    return labels
