"""Normalisations: per-channel parameters follow their channels; statistics taken across channels change when some go.

batch_norm, instance_norm:   statistics per channel                       exact
layer_norm, rms_norm:        statistics across the normalised dimensions  changed
group_norm:                  C -> (G, C/G), statistics across C/G         whole groups exact, positions within changed
"""

from __future__ import annotations

from graphprune.ops.convolution import cut
from graphprune.ops.pointwise import alone
from graphprune.ops.registry import Labels, Op, Value, aten, rule


@rule(aten.batch_norm, aten.instance_norm, aten.native_batch_norm, aten._native_batch_norm_legit,
      aten._native_batch_norm_legit_no_training, aten.cudnn_batch_norm)  # fmt: skip
def per_channel(op: Op) -> Labels | list[Labels]:
    """Statistics per channel: weight, bias and running statistics follow dimension 1.

    Statistics of what is given here are taken across all other dimensions (of an instance: across space), which have labels where a
    weight is standardised so.
    """
    x, weight, bias = op["input"], op["weight"], op["bias"]
    labels = op.dims(x)
    for value in (weight, bias, op["running_mean"], op["running_var"]):
        if value is not None:
            labels[1] = op.bind(value, 0, labels[1])
    if weight is not None:
        op.scale(weight)
    own = [d for d in range(2 if "instance" in op.name else 0, len(labels)) if d != 1] if op["training"] or op["use_input_stats"] else []
    for d in own:
        op.statistic(labels[d])
    scaled = weight is not None and weight.zero
    op.zero = (scaled or x.zero) and (bias is None or bias.zero) and alone(labels, 1, *own)
    return labels if len(op.outputs) == 1 else [labels, *[[labels[1]] if s == (x.shape[1],) else [None] * len(s) for s in op.outputs[1:]]]


@rule(aten.layer_norm, aten.rms_norm, aten.native_layer_norm, aten._fused_rms_norm)
def across(op: Op) -> Labels | list[Labels]:
    """Statistics across the last dimensions, as many as `normalized_shape` has."""
    x: Value = op["input"]
    labels = op.dims(x)
    normalised: list[int] = op["normalized_shape"]
    start = len(x.shape) - len(normalised)
    for i in range(len(normalised)):
        for name in ("weight", "bias"):
            if op[name] is not None:
                labels[start + i] = op.bind(op[name], i, labels[start + i])
        op.statistic(labels[start + i])
        op.extent(("normalized_shape", i), labels[start + i])
    rms = op.name.endswith("rms_norm")
    op.zero = (rms and x.zero) or (op["weight"] is not None and alone(labels, *range(start, len(labels))))
    return labels if len(op.outputs) == 1 else [labels, *[[*labels[:start], *[None] * len(normalised)] for _ in op.outputs[1:]]]


@rule(aten.group_norm, aten.native_group_norm)
def grouped(op: Op) -> Labels | list[Labels]:
    """Statistics across the positions within each norm group; whole groups may go."""
    x: Value = op["input"]
    labels = op.dims(x)
    groups = op["num_groups"] if op["num_groups"] is not None else op["group"]
    blocks, within = cut(op, labels[1], (groups, x.shape[1] // groups), "is cut into norm groups that cannot shrink")
    op.statistic(within)
    for name in ("weight", "bias"):
        if op[name] is not None:
            labels[1] = op.bind(op[name], 0, labels[1])
    op.extent("num_groups" if op["num_groups"] is not None else "group", blocks)
    if op["C"] is not None:
        op.extent("C", labels[1])
    op.zero = op["weight"] is not None and alone(labels, 1)
    return labels if len(op.outputs) == 1 else [labels, *[[None] * len(s) for s in op.outputs[1:]]]


@rule(aten._weight_norm_interface, aten._weight_norm)
def weight_norm(op: Op) -> Labels | list[Labels]:
    """`g * v / |v|`: the norm is taken over all dimensions of v but one, where g has one number each.

    Removed weights are zero, so the norms of what stays do not change; those of what goes are zero and may not be divided by.
    """
    v, g = op["v"], op["g"]
    dim = op.get("dim", 0) % len(v.shape)
    labels = op.dims(v)
    labels[dim] = op.bind(g, dim, labels[dim])
    for d in range(len(g.shape)):
        if d != dim:
            op.bind(g, d, None)
    op.only_kept(labels[dim])
    op.zero = True
    return labels if len(op.outputs) == 1 else [labels, [labels[d] if d == dim else None for d in range(len(g.shape))]]
