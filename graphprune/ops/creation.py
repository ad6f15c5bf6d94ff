"""Operators that make tensors out of nothing, and those that take values out of the program: no labels, or frozen ones."""

from __future__ import annotations

from graphprune.ops.registry import Labels, Op, aten, rule


@rule(aten.zeros, aten.ones, aten.full, aten.empty, aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty)
def filled(op: Op) -> Labels:
    """A tensor filled with one number: it may be as long as what it meets."""
    op.constant = True
    labels = [op.uniform(d) for d in range(len(op.shape))]
    op.zero = op.name in {"aten::zeros", "aten::new_zeros"} or op["fill_value"] == 0
    op.sizes("size", op["size"], labels)
    return labels


@rule(aten.eye)
def eye(op: Op) -> Labels:
    """`eye(n)`: rows and columns with one number go together, and what is left is the identity of that size."""
    op.constant = True
    if op.shape[0] != op.shape[1]:
        return [None, None]
    labels = op.uniform(0) if op.open >= {0, 1} else None
    op.offered = True
    op.zero = True
    op.extent("n", labels)
    if op["m"] is not None:
        op.extent("m", labels)
    return [labels, labels]


@rule(aten.arange, aten.linspace, aten.scalar_tensor, aten.rand, aten.randn, aten.randint, aten.randperm, aten.tril_indices,
      aten.triu_indices, aten.hann_window, aten.hamming_window, aten.new_tensor)  # fmt: skip
def made(op: Op) -> Labels:
    """A tensor made from literals, whose values differ from position to position."""
    op.constant = True
    return [None] * len(op.shape)


@rule(aten.item, aten._local_scalar_dense, aten.is_nonzero, aten.equal)
def leaves(op: Op) -> Labels:
    """A value that becomes a Python number: what it decides cannot be followed."""
    for value in op.values():
        op.freeze_value(value, "is read as a Python number", "Compute it with tensor operators")
    return []


@rule(aten.nonzero, aten.nonzero_numpy, aten.unique_dim, aten._unique2, aten.bincount, aten.histc, aten.masked_select, aten.one_hot)
def data_dependent(op: Op) -> Labels | list[Labels]:
    """Output sizes or values that depend on the data."""
    for value in op.values():
        op.freeze_value(value, "decides a size or a position at run time")
    return [None] * len(op.shape) if len(op.outputs) == 1 else [[None] * len(s) for s in op.outputs]


@rule("torchvision::nms")
def suppression(op: Op) -> Labels:
    """Non-maximum suppression chooses boxes at run time."""
    return data_dependent(op)
