"""Operators that make tensors out of nothing, and those that take values out of the program: no labels, or frozen ones."""

from __future__ import annotations

from graphprune.ops.registry import Labels, Op, aten, rule


@rule(aten.zeros, aten.ones, aten.full, aten.empty, aten.arange, aten.linspace, aten.eye, aten.scalar_tensor, aten.rand, aten.randn,
      aten.randint, aten.randperm, aten.tril_indices, aten.triu_indices, aten.hann_window, aten.hamming_window)  # fmt: skip
def made(op: Op) -> Labels:
    """A tensor made from literals."""
    op.constant = True
    return [None] * len(op.shape)


@rule(aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty, aten.new_tensor)
def made_like(op: Op) -> Labels:
    """A tensor made from literals, with another's dtype and device."""
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
