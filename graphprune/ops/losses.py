"""Losses inside a forward pass: two tensors are compared index by index, or a class is looked up by its number.

loss(x, y):          x = y, per index; then nothing, a mean or a sum
nll_loss(x, class):  x is looked up at the class, so classes stay
"""

from __future__ import annotations

import torch

from graphprune.ops.pointwise import broadcast
from graphprune.ops.registry import Labels, Op, aten, rule

NONE = 0


@rule(aten.mse_loss, aten.smooth_l1_loss, aten.huber_loss, aten.soft_margin_loss, aten.binary_cross_entropy,
      aten.binary_cross_entropy_with_logits)  # fmt: skip
def compared(op: Op) -> Labels:
    """A loss per index; its mean or sum is a statistic across all that it is taken over."""
    values = op.values()
    labels = broadcast(op, values, tuple(torch.broadcast_shapes(*(v.shape for v in values))))
    op.zero = False
    if op.get("reduction", 1) == NONE:
        return labels
    for dim in labels:
        op.statistic(dim)
    return []


@rule(aten.nll_loss, aten.nll_loss_nd, aten.nll_loss_forward, aten.nll_loss2d_forward, aten.multi_margin_loss,
      aten.multilabel_margin_loss_forward, aten._ctc_loss, aten.ctc_loss)  # fmt: skip
def classified(op: Op) -> Labels | list[Labels]:
    """A loss that looks classes up by number, in place and time."""
    for value in op.values():
        op.freeze_value(value, "is a class, or a place, that a loss looks up by number")
    return [None] * len(op.shape) if len(op.outputs) == 1 else [[None] * len(s) for s in op.outputs]
