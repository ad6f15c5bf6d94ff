"""Operators that move dimensions, cut them and join them, without touching values.

view (A*B) -> (A, B):    label of (a, b) becomes {row a, column b}, everywhere it was seen; dims that do not vary get none
view (A, B) -> (A*B):    labels unite
"""

from __future__ import annotations

import numpy as np

from graphprune.ops.indexing import list_positions, literal
from graphprune.ops.labels import Dim
from graphprune.ops.registry import Labels, Op, Value, aten, rule


@rule(aten.view, aten.reshape, aten._unsafe_view, aten._reshape_copy, aten.view_copy, aten.unflatten, aten.flatten, aten.ravel)
def reshape(op: Op) -> Labels:
    """Any reshape: blocks of dimensions with equal products are joined and cut."""
    x: Value = op["self"]
    if x.shape == op.shape:
        labels = op.dims(x)
    else:
        labels = []
        for old, new in blocks(x.shape, op.shape):
            labels += _block(op, x, old, [op.shape[d] for d in new])
    if op["size"] is not None and isinstance(op["size"], list):
        op.sizes("size", op["size"], labels)
    elif op["shape"] is not None:
        op.sizes("shape", op["shape"], labels)
    elif op["sizes"] is not None:
        op.sizes("sizes", op["sizes"], labels[op["dim"] % len(x.shape) :])
    return labels


def _block(op: Op, x: Value, old: list[int], new: list[int]) -> list[Dim]:
    if not old:
        return [None] * len(new)
    dims = [op.dim(x, d) for d in old]
    if all(d is None for d in dims):
        return [None] * len(new)
    merged = dims[0] if len(dims) == 1 else op.table.merge(dims, [x.shape[d] for d in old])
    wide = [i for i, size in enumerate(new) if size != 1]
    cut = op.table.split(merged, [new[i] for i in wide], op.reason("is cut into blocks that cannot shrink"))
    out: list[Dim] = [None] * len(new)
    for i, labels in zip(wide, cut, strict=True):
        out[i] = labels
    return out


def blocks(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Returns the smallest runs of old and new dimensions with equal products, in order.

    >>> blocks((2, 12, 5), (2, 3, 4, 5))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    out: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = [i] if i < len(old) else [], [j] if j < len(new) else []
        size_a, size_b = old[i] if a else 1, new[j] if b else 1
        i, j = i + len(a), j + len(b)
        while size_a != size_b:
            if (size_a < size_b and i < len(old)) or j >= len(new):
                a.append(i)
                size_a *= old[i]
                i += 1
            else:
                b.append(j)
                size_b *= new[j]
                j += 1
        out.append((a, b))
    return out


@rule(aten.permute)
def permute(op: Op) -> Labels:
    """`permute(x, dims)`."""
    x: Value = op["self"]
    labels = op.dims(x)
    return [labels[d] for d in op["dims"]]


@rule(aten.view_as_real)
def view_as_real(op: Op) -> Labels:
    """`view_as_real(x)`: a new last dimension of (real, imaginary)."""
    return [*op.dims(op["self"]), None]


@rule(aten.view_as_complex)
def view_as_complex(op: Op) -> Labels:
    """`view_as_complex(x)`: the last dimension of (real, imaginary) stays."""
    labels = op.dims(op["self"])
    op.freeze(labels[-1], "is real and imaginary part")
    return labels[:-1]


@rule(aten.transpose, aten.swapaxes, aten.swapdims)
def transpose(op: Op) -> Labels:
    """`transpose(x, a, b)`."""
    labels = op.dims(op["self"])
    a, b = (v for k, v in op.arguments.items() if k != "self")
    labels[a], labels[b] = labels[b], labels[a]
    return labels


@rule(aten.t, aten.numpy_T, aten.mT)
def turn(op: Op) -> Labels:
    """`x.t()`, `x.T`, `x.mT`."""
    labels = op.dims(op["self"])
    if op.name == "aten::mT":
        return [*labels[:-2], labels[-1], labels[-2]]
    return labels[::-1]


@rule(aten.squeeze)
def squeeze(op: Op) -> Labels:
    """`squeeze`: dimensions of size 1 go."""
    x: Value = op["self"]
    labels = op.dims(x)
    dim = op["dim"]
    dims = range(len(x.shape)) if dim is None else [d % max(len(x.shape), 1) for d in (dim if isinstance(dim, list) else [dim])]
    gone = {d for d in dims if x.shape and x.shape[d] == 1}
    return [v for d, v in enumerate(labels) if d not in gone]


@rule(aten.unsqueeze)
def unsqueeze(op: Op) -> Labels:
    """`unsqueeze(x, dim)`."""
    labels = op.dims(op["self"])
    labels.insert(op["dim"] % (len(labels) + 1), None)
    return labels


@rule(aten.expand, aten.broadcast_to, aten.expand_as)
def expand(op: Op) -> Labels:
    """`expand(x, size)`: widened dimensions repeat one index, so nothing removes them."""
    x: Value = op["self"]
    added = len(op.shape) - len(x.shape)
    out: Labels = [None] * added
    for d, size in enumerate(x.shape):
        out.append(op.dim(x, d) if size == op.shape[d + added] else None)
    widened = [d for d, size in enumerate(op.shape) if d < added or x.shape[d - added] != size]
    other = op["other"]
    if other is not None:
        op.zero = x.zero and x.shape == op.shape
        from graphprune.ops.pointwise import broadcast  # noqa: PLC0415 (families share this helper)

        return broadcast(op, [Value(op.shape, [v if v is not None or s != 1 else None for v, s in zip(out, op.shape, strict=True)],
                                    x.name), other], op.shape) if x.shape == op.shape else _expand_as(op, x, other, out)  # fmt: skip
    for d in widened:
        out[d] = op.uniform(d)
        op.zero = False if out[d] is not None else op.zero
    if op["size"] is not None:
        op.sizes("size", op["size"], out)
    return out


def _expand_as(op: Op, x: Value, other: Value, out: Labels) -> Labels:
    """Widened dimensions take the other tensor's labels: they have its size whatever that is."""
    added = len(op.shape) - len(x.shape)
    for d, labels in enumerate(op.dims(other)):
        widened = d < added or x.shape[d - added] == 1 != op.shape[d]
        out[d] = labels if widened else op.equal(out[d], labels)
    return out


@rule(aten.repeat, aten.tile)
def repeat(op: Op) -> Labels:
    """`repeat(x, times)`: every copy has the labels of the original."""
    x: Value = op["self"]
    times = op["repeats"] if op["repeats"] is not None else op["dims"]
    rank = len(op.shape)
    times = [1] * (rank - len(times)) + list(times)
    labels: Labels = [None] * (rank - len(x.shape)) + op.dims(x)
    return [None if v is None else np.tile(v, n) for v, n in zip(labels, times, strict=True)]


@rule(aten.repeat_interleave)
def repeat_interleave(op: Op) -> Labels:
    """`repeat_interleave(x, n, dim)` with a literal number or a constant table of them: neighbours share a label."""
    x: Value | None = op["self"]
    times, dim = op["repeats"], op["dim"]
    if x is None:
        return op.decline("lists positions, as often as it is told at run time")
    labels = op.dims(x)
    if dim is None:
        labels, dim = [op.table.merge(labels, x.shape)], 0
    dim %= max(len(labels), 1)
    if labels[dim] is None or isinstance(times, int):
        labels[dim] = None if labels[dim] is None else np.repeat(labels[dim], times)
        return labels
    table = literal(op, times)
    if table is None or len(x.shape) != len(labels) or (op["dim"] is None and len(x.shape) != 1):
        return op.decline("repeats a number of times that is not known beforehand")
    positions = np.repeat(np.arange(labels[dim].size), table)
    whole = labels[dim]
    list_positions(op, x, dim, positions, whole)
    labels[dim] = whole[positions]
    return labels


@rule(aten.pixel_shuffle)
def pixel_shuffle(op: Op) -> Labels:
    """`pixel_shuffle(x, r)`: channels (C, r, r) become C channels of r times the height and width."""
    x: Value = op["self"]
    factor = op["upscale_factor"]
    labels = op.dims(x)
    channel = len(x.shape) - 3
    size = x.shape[channel] // factor**2
    cut = op.table.split(labels[channel], (size, factor, factor), op.reason("becomes space in a pixel shuffle"))
    for part in (*cut[1:], *labels[channel + 1 :]):
        op.freeze(part, "is space in a pixel shuffle")
    return [*labels[:channel], cut[0], None, None]


@rule(aten.pixel_unshuffle)
def pixel_unshuffle(op: Op) -> Labels:
    """`pixel_unshuffle(x, r)`: every channel becomes r*r neighbours."""
    x: Value = op["self"]
    factor = op["downscale_factor"]
    labels = op.dims(x)
    channel = len(x.shape) - 3
    for part in labels[channel + 1 :]:
        op.freeze(part, "is space in a pixel unshuffle")
    wide = labels[channel]
    return [*labels[:channel], None if wide is None else np.repeat(wide, factor**2), None, None]


@rule(aten.channel_shuffle, aten.native_channel_shuffle)
def channel_shuffle(op: Op) -> Labels:
    """`channel_shuffle(x, g)`: (g, C/g) is transposed; the same position goes in every block."""
    x: Value = op["self"]
    groups = op["groups"]
    labels = op.dims(x)
    per_group = x.shape[1] // groups
    rows, columns = op.table.split(labels[1], (groups, per_group), op.reason("is shuffled in blocks"))
    labels[1] = op.table.merge([columns, rows], [per_group, groups])
    op.extent("groups", rows)
    return labels


@rule(aten.unfold)
def unfold(op: Op) -> Labels:
    """`x.unfold(dim, size, step)`: windows along a dimension freeze it; the others pass."""
    labels = op.dims(op["self"])
    dim = op["dimension"] % len(labels)
    op.freeze(labels[dim], "is cut into sliding windows")
    return [*(v if d != dim else None for d, v in enumerate(labels)), None]


@rule(aten.im2col)
def im2col(op: Op) -> Labels:
    """`F.unfold`: (N, C, H, W) becomes (N, C * kernel, positions)."""
    x: Value = op["self"]
    labels = op.dims(x)
    channel = len(x.shape) - 3
    for part in labels[channel + 1 :]:
        op.freeze(part, "is cut into sliding windows")
    kernel = int(np.prod(op["kernel_size"]))
    wide = labels[channel]
    return [*labels[:channel], None if wide is None else np.repeat(wide, kernel), None]


@rule(aten.col2im)
def col2im(op: Op) -> Labels:
    """`F.fold`: (N, C * kernel, positions) becomes (N, C, H, W): all the taps of a channel go with it."""
    x: Value = op["self"]
    labels = op.dims(x)
    kernel = int(np.prod(op["kernel_size"]))
    channel = len(x.shape) - 2
    op.freeze(labels[channel + 1], "is put together from sliding windows")
    cut = op.table.split(labels[channel], (x.shape[channel] // kernel, kernel), op.reason("is put together from sliding windows"))
    op.freeze(cut[1], "is a tap of sliding windows")
    return [*labels[:channel], cut[0], None, None]


@rule(aten.tril, aten.triu)
def triangle(op: Op) -> Labels:
    """`tril(x)`, `triu(x)`: rows and columns with one number go together, for the diagonal to stay where it is."""
    labels = op.dims(op["self"])
    _same_numbers(op, labels, -2, -1, op.get("diagonal", 0))
    return labels


@rule(aten.diagonal)
def diagonal(op: Op) -> Labels:
    """`diagonal(x, offset, dim1, dim2)`: rows and columns with one number go together; the diagonal comes last."""
    labels = op.dims(op["self"])
    a, b = op.get("dim1", 0) % len(labels), op.get("dim2", 1) % len(labels)
    along = _same_numbers(op, labels, a, b, op.get("offset", 0))
    return [*(v for d, v in enumerate(labels) if d not in {a, b}), along]


def _same_numbers(op: Op, labels: Labels, a: int, b: int, offset: int) -> Dim:
    """Makes the rows and columns of a square matrix live and die together; those of any other one, or off the diagonal, stay."""
    x: Value = op["self"]
    if offset == 0 and x.shape[a] == x.shape[b]:
        labels[a] = labels[b] = op.equal(labels[a], labels[b], "has a diagonal with a dimension that cannot shrink")
        return labels[a]  # type: ignore[no-any-return]
    for d in (a, b):
        op.freeze(labels[d], "is counted along a diagonal beside the main one")
        labels[d] = None
    return None


@rule(aten.as_strided)
def as_strided(op: Op) -> Labels:
    """`as_strided(x, size, stride)` addresses memory by itself: nothing that it looks into can shrink."""
    op.freeze_value(op["self"], "is addressed by literal strides")
    return [None] * len(op.shape)
