"""Scaled dot-product attention.

    out[b, h, t] = sum_s softmax_s(scale * sum_d q[b, h, t, d] k[b, h, s, d]) v[b, h, s]

labels: heads of q, k, v meet (with grouped queries, several query heads share one key head); widths of q and k meet; the width of v
passes; `scale` defaults to 1/sqrt(width) and is made explicit when widths go.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from graphprune.ops.linear import contract
from graphprune.ops.pointwise import broadcast, covers
from graphprune.ops.registry import Labels, Op, Value, aten, rule


@rule(aten.scaled_dot_product_attention, aten._scaled_dot_product_attention_math, aten._scaled_dot_product_flash_attention,
      aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_efficient_attention,
      aten._scaled_dot_product_cudnn_attention)  # fmt: skip
def attention(op: Op) -> Labels | list[Labels]:
    """`scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa)`, and the kernels behind it by name."""
    q, k, v = op["query"], op["key"], op["value"]
    mask = op["attn_mask"] if op["attn_mask"] is not None else op["attn_bias"]
    width = contract(op, q, -1, k, -1)
    if op["scale"] is None:
        op.explicit("scale", 1.0 / math.sqrt(q.shape[-1]), width)
    source = op.equal(op.dim(k, -2), op.dim(v, -2))
    op.statistic(source)
    if op.get("is_causal", default=False):
        op.freeze(source, "is masked by position in causal attention")
        op.freeze(op.dim(q, -2), "is masked by position in causal attention")
    batch = _batch(op, q, k, v)
    target = op.dim(q, -2)
    if mask is not None:
        scores = Value((*op.shape[:-2], q.shape[-2], k.shape[-2]), [*batch, target, source], op.name)
        batch = broadcast(op, [scores, mask], scores.shape)[:-2]
    op.zero = v.zero and target is None and covers(_lead(op, v), batch)
    out = [*batch, target, op.dim(v, -1)]
    rest = [[*batch, target] if s == op.shape[:-1] else [None] * len(s) for s in op.outputs[1:]]
    return [out, *rest] if rest else out


def _batch(op: Op, q: Value, k: Value, v: Value) -> Labels:
    """Couples batch and head dimensions; with grouped queries the key heads are repeated."""
    lead_k = broadcast(op, [_lead(op, k), _lead(op, v)], torch.broadcast_shapes(k.shape[:-2], v.shape[:-2]))
    shape_k = list(torch.broadcast_shapes(k.shape[:-2], v.shape[:-2]))
    if op.get("enable_gqa", default=False) and q.shape[-3] != k.shape[-3]:
        times = q.shape[-3] // k.shape[-3]
        if lead_k[-1] is None:
            op.freeze(op.dim(q, -3), "is a query head of a key head that stays")
        else:
            lead_k[-1] = np.repeat(lead_k[-1], times)
        shape_k[-1] *= times
    keys = Value(tuple(shape_k), list(lead_k), k.name)
    return broadcast(op, [_lead(op, q), keys], op.shape[:-2])


def _lead(op: Op, value: Value) -> Value:
    return Value(value.shape[:-2], op.dims(value)[:-2], value.name)
