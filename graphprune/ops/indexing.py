"""Operators that pick indices: literal bounds and constant index tables can be rewritten, anything else freezes what it looks along.

x[:, a:b]        labels[a:b];  a becomes the number of survivors before a, b that before b
x[:, table]      labels[table];  the table is renumbered
x[:, i]          freezes the dimension
"""

from __future__ import annotations

import numpy as np
import torch

from graphprune.labels import Dim
from graphprune.ops.pointwise import alone, broadcast
from graphprune.ops.registry import Labels, Op, Value, aten, rule

LOOKED_UP = "is looked up by position"


@rule(aten.slice)
def slice_(op: Op) -> Labels:
    """`x[start:end:step]` along one dimension."""
    x: Value = op["self"]
    dim, step = op.get("dim", 0) % len(x.shape), op.get("step", 1)
    labels = op.dims(x)
    start, end, _ = slice(op["start"], op["end"], step).indices(x.shape[dim])
    whole = labels[dim]
    if whole is None or (start, end, step) == (0, x.shape[dim], 1):
        return labels
    labels[dim] = whole[start:end:step]
    if step == 1 and (op["start"] or 0) >= 0 and (op["end"] or 0) >= 0:
        if op["start"] is not None:
            op.extent("start", whole[:start])
        if op["end"] is not None:
            op.extent("end", whole[:end])
    else:
        _list(op, x, dim, torch.arange(start, end, step), whole)
    return labels


def _list(op: Op, x: Value, dim: int, positions: torch.Tensor, whole: Dim) -> None:
    """Says that once any of `whole` goes, positions are listed: steps, and bounds counted from the end, shift with what follows."""
    op.become(torch.ops.aten.index_select.default, {"self": x, "dim": dim, "index": positions})
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
            _list(op, x, dim, torch.arange(first, first + length), whole)
        else:
            op.extent("start", whole[:first])
            op.extent("length", whole[first : first + length])
    return labels


@rule(aten.select)
def select(op: Op) -> Labels:
    """`x.select(dim, i)`: the dimension is looked up by a literal position."""
    labels = op.dims(op["self"])
    dim = op["dim"] % len(labels)
    op.freeze(labels[dim], "has one position picked by a literal")
    return [v for d, v in enumerate(labels) if d != dim]


@rule(aten.unbind)
def unbind(op: Op) -> list[Labels]:
    """`x.unbind(dim)`: one output per position, so the dimension stays."""
    labels = op.dims(op["self"])
    dim = op.get("dim", 0) % len(labels)
    op.freeze(labels[dim], "is taken apart position by position")
    return [[v for d, v in enumerate(labels) if d != dim] for _ in op.outputs]


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
    dim = op["dim"] % len(x.shape)
    labels = op.dims(x)
    labels[dim] = pick(op, labels[dim], index, "index")
    return labels


def pick(op: Op, labels: Dim, index: Value, path: str | tuple[str | int, ...]) -> Dim:
    """Returns the labels of a dimension looked up by a vector of positions."""
    if labels is None:
        return op.dims(index)[0] if index.shape else None
    if index.tensor is None or not index.constant or index.tensor.dtype == torch.bool:
        op.freeze(labels, LOOKED_UP + " computed at run time")
        return op.dims(index)[0] if index.shape else None
    op.remap(path, labels)
    return labels[index.tensor.cpu().numpy() % labels.size]  # type: ignore[no-any-return]


@rule(aten.index)
def index(op: Op) -> Labels:
    """`x[i, j, ...]` with index tensors: the looked-up dimensions freeze, labels of the index tensors pass on."""
    x: Value = op["self"]
    indices: list[Value | None] = op["indices"]
    labels = op.dims(x)
    used = [d for d, i in enumerate(indices) if i is not None]
    first = indices[used[0]]
    if len(used) == 1 and first is not None and len(first.shape) == 1 and len(op.shape) == len(x.shape):
        out = list(labels)
        out[used[0]] = pick(op, labels[used[0]], first, ("indices", used[0]))
        return out
    for d in used:
        mask = indices[d]
        width = len(mask.shape) if mask is not None and mask.tensor is not None and mask.tensor.dtype == torch.bool else 1
        for k in range(width):
            op.freeze(labels[d + k], LOOKED_UP)
    return _advanced(op, labels, [i for i in indices if i is not None], used)


def _advanced(op: Op, labels: Labels, indices: list[Value], used: list[int]) -> Labels:
    """Places the broadcast index dimensions: where the first index was, or in front when indices are apart."""
    if any(i.tensor is not None and i.tensor.dtype == torch.bool for i in indices):
        for labels_ in labels:
            op.freeze(labels_, "is selected by a boolean mask")
        return [None] * len(op.shape)
    shape = torch.broadcast_shapes(*(i.shape for i in indices))
    middle = broadcast(op, indices, tuple(shape))
    rest = [v for d, v in enumerate(labels) if d not in used]
    together = used == list(range(used[0], used[-1] + 1))
    at = used[0] if together else 0
    return [*rest[:at], *middle, *rest[at:]]


@rule(aten.embedding)
def embedding(op: Op) -> Labels:
    """`embedding(weight, indices)`: rows are looked up, columns are the channels."""
    weight, indices = op["weight"], op["indices"]
    op.freeze_value(weight, "is a vocabulary: its rows are looked up", keep=(1,))
    op.produce(weight, 1)
    labels = [*op.dims(indices), op.dim(weight, 1)]
    op.zero = alone(labels, -1)
    return labels


@rule(aten.gather, aten.take_along_dim)
def gather(op: Op) -> Labels:
    """`gather(x, dim, index)`: looked up along `dim`; other dimensions couple where the sizes agree."""
    x: Value = op["self"]
    index_: Value = op["index"] if op["index"] is not None else op["indices"]
    dim = op["dim"] % len(x.shape)
    out: Labels = []
    for d in range(len(x.shape)):
        a, b = op.dim(x, d), op.dim(index_, d)
        if d == dim:
            op.freeze(a, LOOKED_UP)
            out.append(b)
        elif x.shape[d] == index_.shape[d]:
            out.append(op.equal(a, b))
        else:
            op.freeze(a, LOOKED_UP)
            out.append(b)
    return out


@rule(aten.index_put, aten.scatter, aten.scatter_add, aten.index_add, aten.index_copy, aten.index_fill)
def put(op: Op) -> Labels:
    """Writing at positions: everything that is addressed or written freezes."""
    for value in op.values():
        op.freeze_value(value, "is written by position")
    return [None] * len(op.shape)


@rule(aten.roll)
def roll(op: Op) -> Labels:
    """`roll(x, shifts, dims)`: the shift becomes the number of survivors that wrap around."""
    x: Value = op["self"]
    labels = op.dims(x)
    dims = op.get("dims", [])
    if not dims:
        return op.decline("rolls the flattened tensor")
    for i, (shift, d) in enumerate(zip(op["shifts"], dims, strict=True)):
        whole = labels[d]
        if whole is not None:
            forward = shift % whole.size
            op.extent(("shifts", i), whole[whole.size - forward :])
            labels[d] = np.roll(whole, forward)
    return labels


@rule(aten.flip)
def flip(op: Op) -> Labels:
    """`flip(x, dims)`."""
    labels = op.dims(op["self"])
    for d in op["dims"]:
        whole = labels[d]
        labels[d] = None if whole is None else whole[::-1]
    return labels
