"""Simulated quantisation, as training that is aware of it does: rounding per index, with a scale for all or one per channel.

out = (clamp(round(x / scale) + zero, low, high) - zero) * scale        labels: those of x; scale and zero have those of its channels

Zero points of several channels are integers in a buffer, and integer buffers are literals to graphprune: they stay, with their channels.
"""

from __future__ import annotations

from graphprune.ops.registry import Labels, Op, Value, aten, rule


@rule(aten.fake_quantize_per_tensor_affine, aten.fake_quantize_per_tensor_affine_cachemask,
      aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams, aten._fake_quantize_learnable_per_tensor_affine)  # fmt: skip
def of_tensor(op: Op) -> Labels | list[Labels]:
    """One scale for all."""
    x: Value = op["self"]
    for value in op.values():
        if value is not x:
            op.freeze_value(value, "is the scale or the zero point of a tensor")
    op.zero = x.zero
    labels = op.dims(x)
    return labels if len(op.outputs) == 1 else [list(labels) for _ in op.outputs]


@rule(aten.fake_quantize_per_channel_affine, aten.fake_quantize_per_channel_affine_cachemask,
      aten._fake_quantize_learnable_per_channel_affine)  # fmt: skip
def of_channels(op: Op) -> Labels | list[Labels]:
    """One scale and one zero point per channel."""
    x: Value = op["self"]
    axis = op["axis"] % len(x.shape)
    labels = op.dims(x)
    for name, text in (("scale", "has a scale of its own, in a literal"), ("zero_point", "has a zero point of its own, in a literal")):
        labels[axis] = op.bind(op[name], 0, labels[axis], text)
    op.zero = False
    return labels if len(op.outputs) == 1 else [list(labels) for _ in op.outputs]
