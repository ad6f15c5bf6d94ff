"""Pooling and resampling: batch and channels pass, space does not shrink.

out[n, c] = pool(x[n, c])          labels: leading dimensions pass
"""

from __future__ import annotations

from graphprune.ops.registry import Labels, Op, Value, aten, rule

_SPATIAL = {
    1: (aten.max_pool1d, aten.avg_pool1d, aten.adaptive_avg_pool1d, aten.adaptive_max_pool1d, aten.max_pool1d_with_indices,
        aten.upsample_nearest1d, aten.upsample_linear1d, aten.reflection_pad1d, aten.replication_pad1d, aten._upsample_nearest_exact1d),
    2: (aten.max_pool2d, aten.avg_pool2d, aten.adaptive_avg_pool2d, aten.adaptive_max_pool2d, aten.max_pool2d_with_indices,
        aten._adaptive_avg_pool2d, aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d,
        aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa, aten._upsample_nearest_exact2d, aten.reflection_pad2d,
        aten.replication_pad2d, aten.fractional_max_pool2d, aten.grid_sampler_2d),
    3: (aten.max_pool3d, aten.avg_pool3d, aten.adaptive_avg_pool3d, aten.adaptive_max_pool3d, aten.max_pool3d_with_indices,
        aten._adaptive_avg_pool3d, aten.upsample_nearest3d, aten.upsample_trilinear3d, aten.reflection_pad3d,
        aten.replication_pad3d, aten._upsample_nearest_exact3d, aten.grid_sampler_3d),
}  # fmt: skip


def _pool(op: Op, spatial: int) -> Labels | list[Labels]:
    x: Value = op["self"] if op["self"] is not None else op["input"]
    labels = op.dims(x)
    for d in range(len(labels) - spatial, len(labels)):
        op.freeze(labels[d], "is a spatial dimension of a pooling or resampling operator")
        labels[d] = None
    for other in op.values():
        if other is not x:
            op.freeze_value(other, "says where to sample")
    return labels if len(op.outputs) == 1 else [list(labels) for _ in op.outputs]


@rule(*_SPATIAL[1])
def pool1d(op: Op) -> Labels | list[Labels]:
    """Pooling, padding or resampling along the last dimension."""
    return _pool(op, 1)


@rule(*_SPATIAL[2])
def pool2d(op: Op) -> Labels | list[Labels]:
    """Pooling, padding or resampling along the last two dimensions."""
    return _pool(op, 2)


@rule(*_SPATIAL[3])
def pool3d(op: Op) -> Labels | list[Labels]:
    """Pooling, padding or resampling along the last three dimensions."""
    return _pool(op, 3)


@rule(aten.grid_sampler)
def grid_sampler(op: Op) -> Labels | list[Labels]:
    """Sampling at given places: batch and channels pass."""
    return _pool(op, len(op["input"].shape) - 2)


@rule("torchvision::roi_align", "torchvision::roi_pool")
def regions(op: Op) -> Labels | list[Labels]:
    """Regions of interest: the batch is re-drawn, channels pass, space is frozen."""
    x: Value = op["input"]
    labels = op.dims(x)
    for d in (0, 2, 3):
        op.freeze(labels[d], "is a dimension that regions of interest are cut from")
    op.freeze_value(op["rois"], "says where the regions are")
    out: Labels = [None, labels[1], None, None]
    return out if len(op.outputs) == 1 else [list(out) for _ in op.outputs]
