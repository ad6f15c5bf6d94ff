"""Convolutions, plain, grouped, depthwise and transposed.

out[n, o] = sum_i  w[o, i] * x[n, i]             labels: x dim 1 = w dim 1, out dim 1 = w dim 0
grouped:  C -> (G, C/G),  O -> (G, O/G)          labels: the G of both meet, w dim 1 is the C/G
transposed: w is (C, O/G, ...)                   labels: x dim 1 = w dim 0
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphprune.ops.labels import Dim
from graphprune.ops.linear import contract
from graphprune.ops.pointwise import alone
from graphprune.ops.registry import UNBOUND, Labels, Op, Value, aten, rule

MOVES_IN_SPACE = "is a spatial dimension of a convolution"
KERNEL = "is a kernel position"


@rule(aten.conv1d, aten.conv2d, aten.conv3d)
def convolution(op: Op) -> Labels:
    """Convolution with any number of conv groups."""
    x, weight, bias = op["input"], op["weight"], op["bias"]
    groups = op.get("groups", 1)
    channel = _channel(op, x, weight)
    labels = op.dims(x)
    freeze_kernel(op, weight)
    if groups == 1:
        labels[channel] = contract(op, x, channel, weight, 1)
        out = op.dim(weight, 0)
    else:
        out = grouped(op, x, channel, weight, groups)
    op.produce(weight, 0)
    return finish(op, labels, channel, out, weight, bias)


@rule(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
def transposed(op: Op) -> Labels:
    """Transposed convolution: the weight is (in channels, out channels / conv groups, kernel)."""
    x, weight, bias = op["input"], op["weight"], op["bias"]
    groups = op.get("groups", 1)
    channel = _channel(op, x, weight)
    labels = op.dims(x)
    freeze_kernel(op, weight)
    if groups == 1:
        labels[channel] = contract(op, x, channel, weight, 0)
        out = op.dim(weight, 1)
    else:
        out = _grouped_transposed(op, x, channel, weight, groups)
    op.produce(weight, 1)
    return finish(op, labels, channel, out, weight, bias)


@rule(aten.convolution, aten._convolution)
def general(op: Op) -> Labels:
    """The operator behind the others: `transposed` is an argument."""
    return transposed(op) if op["transposed"] else convolution(op)


@rule(aten.conv_tbc)
def time_first(op: Op) -> Labels:
    """`conv_tbc(x, w, b, pad)`: x is (time, batch, channels), w is (kernel, in, out)."""
    x, weight, bias = op["self"], op["weight"], op["bias"]
    op.freeze(op.dim(x, 0), MOVES_IN_SPACE)
    op.freeze_value(weight, KERNEL, keep=(1, 2))
    contract(op, x, 2, weight, 1)
    out = op.bind(bias, 0, op.dim(weight, 2))
    op.produce(weight, 2)
    batch = op.dim(x, 1)
    op.zero = weight.zero and bias.zero and batch is None
    return [None, batch, out]


def _inside(op: Op, x: Value, labels: Dim, weight: Value) -> None:
    """Where the removed is zero neither in the input nor in the weight, the sum over a conv group is a statistic."""
    if not (x.zero or weight.zero):
        op.statistic(labels)


def freeze_kernel(op: Op, weight: Value) -> None:
    """Freezes the kernel positions of a convolution weight."""
    op.freeze_value(weight, KERNEL, keep=(0, 1))


def _channel(op: Op, x: Value, weight: Value) -> int:
    """Returns the channel dimension of the input (0 when there is no batch dimension); freezes the spatial ones."""
    channel = len(x.shape) - (len(weight.shape) - 2) - 1
    for d in range(channel + 1, len(x.shape)):
        op.freeze(op.dim(x, d), MOVES_IN_SPACE)
    return channel


def finish(op: Op, labels: Labels, channel: int, out: Dim, weight: Value, bias: Value | None) -> Labels:
    """Returns the labels of the output of a convolution over `labels`, whose output channels have the labels `out`."""
    if bias is not None:
        out = op.bind(bias, 0, out)
    op.zero = weight.zero and (bias is None or bias.zero) and alone(labels[: channel + 1], channel)
    return [*labels[:channel], out, *[None] * (len(labels) - channel - 1)]


def grouped(op: Op, x: Value, channel: int, weight: Value, groups: int) -> Dim:
    """Couples a grouped convolution; returns the labels of its output channels."""
    blocks, within = cut(op, op.dim(x, channel), (groups, weight.shape[1]), "is cut into conv groups that cannot shrink")
    within = op.bind(weight, 1, within)
    _inside(op, x, within, weight)
    return _block_outputs(op, weight, 0, groups, blocks)


def _grouped_transposed(op: Op, x: Value, channel: int, weight: Value, groups: int) -> Dim:
    """The weight's dim 0 is (G, C/G), its dim 1 is O/G shared by all conv groups."""
    op.bind(weight, 0, op.dim(x, channel))
    blocks, inner = cut(op, op.dim(weight, 0), (groups, weight.shape[0] // groups), "is cut into conv groups that cannot shrink")
    _inside(op, x, inner, weight)
    if blocks is not None:
        op.extent("groups", blocks)
    within = op.dim(weight, 1)
    return op.table.merge([blocks, within], [groups, weight.shape[1]])


def _block_outputs(op: Op, weight: Value, out_dim: int, groups: int, blocks: Dim) -> Dim:
    """Returns the labels of the output channels (G, O/G), whose blocks are those of the input."""
    per_group = weight.shape[out_dim] // groups
    if weight.labels[out_dim] is UNBOUND and per_group == 1:
        weight.labels[out_dim] = blocks
    if weight.labels[out_dim] is UNBOUND and blocks is not None:
        within: Dim = op.table.fresh(per_group)
        weight.labels[out_dim] = op.table.merge([blocks, within], [groups, per_group])
    out = op.dim(weight, out_dim)
    out_blocks, _ = cut(op, out, (groups, per_group), "is cut into conv groups that cannot shrink")
    met = _blocks_meet(op, blocks, out_blocks, out, groups)
    op.extent("groups", met)
    return out


def _blocks_meet(op: Op, blocks: Dim, out_blocks: Dim, out: Dim, groups: int) -> Dim:
    """A block may go only if it goes on both sides: an input block that is never cut whole freezes that of the output."""
    if blocks is None and out_blocks is None:
        return None
    if out is None:
        op.freeze(blocks, "is a conv group whose outputs cannot shrink")
        return None
    return op.equal(blocks, out_blocks if out_blocks is not None else np.zeros(groups, dtype=np.int64), "is a conv group that cannot go")


def cut(op: Op, labels: Dim, sizes: tuple[int, ...], why: str) -> list[Any]:
    """Cuts a dimension into blocks, row-major."""
    return op.table.split(labels, sizes, op.reason(why))
