"""Pooling and resampling: batch and channels pass, space does not shrink.

out[n, c] = pool(x[n, c])          labels: leading dimensions pass
"""

from __future__ import annotations

from graphprune.ops.pointwise import broadcast
from graphprune.ops.registry import Labels, Op, Value, aten, rule

SPATIAL = "is a spatial dimension of a pooling or resampling operator"
_SPATIAL = {
    1: (aten.max_pool1d, aten.avg_pool1d, aten.adaptive_avg_pool1d, aten.adaptive_max_pool1d, aten.max_pool1d_with_indices,
        aten.upsample_nearest1d, aten.upsample_linear1d, aten.reflection_pad1d, aten.replication_pad1d, aten._upsample_nearest_exact1d),
    2: (aten.max_pool2d, aten.avg_pool2d, aten.adaptive_avg_pool2d, aten.adaptive_max_pool2d, aten.max_pool2d_with_indices,
        aten._adaptive_avg_pool2d, aten.upsample_nearest2d, aten.upsample_bilinear2d, aten.upsample_bicubic2d,
        aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa, aten._upsample_nearest_exact2d, aten.reflection_pad2d,
        aten.replication_pad2d),
    3: (aten.max_pool3d, aten.avg_pool3d, aten.adaptive_avg_pool3d, aten.adaptive_max_pool3d, aten.max_pool3d_with_indices,
        aten._adaptive_avg_pool3d, aten.upsample_nearest3d, aten.upsample_trilinear3d, aten.reflection_pad3d,
        aten.replication_pad3d, aten._upsample_nearest_exact3d),
}  # fmt: skip


def _pool(op: Op, spatial: int) -> Labels | list[Labels]:
    x: Value = op["self"] if op["self"] is not None else op["input"]
    labels = op.dims(x)
    for d in range(len(labels) - spatial, len(labels)):
        op.freeze(labels[d], SPATIAL)
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


@rule(aten.fractional_max_pool2d, aten.fractional_max_pool3d)
def fractional(op: Op) -> list[Labels]:
    """Pooling over random regions: every channel has random numbers of its own, so it stays where those are made anew."""
    x, random = op["self"], op["random_samples"]
    spatial = 2 if op.name.endswith("2d") else 3
    lead = len(x.shape) - spatial
    op.freeze_value(x, SPATIAL, keep=range(lead))
    own = op.dims(random)[2 - lead : 2]
    labels = [op.equal(dim, r, "has random numbers of its own") for dim, r in zip(op.dims(x)[:lead], own, strict=True)]
    op.zero = x.zero
    return [[*labels, *[None] * spatial] for _ in op.outputs]


@rule(aten.max_unpool2d, aten.max_unpool3d)
def unpool(op: Op) -> Labels:
    """`max_unpool(x, positions)`: every value goes where it came from, channel by channel."""
    x, positions = op["self"], op["indices"]
    lead = len(x.shape) - (2 if op.name.endswith("2d") else 3)
    op.freeze_value(x, SPATIAL, keep=range(lead))
    op.freeze_value(positions, SPATIAL, keep=range(lead))
    op.zero = x.zero
    meets = broadcast(op, [Value(v.shape[:lead], op.dims(v)[:lead], v.name) for v in (x, positions)], op.shape[:lead])
    return [*meets, *[None] * (len(op.shape) - lead)]


@rule(aten.grid_sampler, aten.grid_sampler_2d, aten.grid_sampler_3d)
def grid_sampler(op: Op) -> Labels:
    """Sampling at given places: channels pass, and what is in the batch goes with its places."""
    x, grid = op["input"], op["grid"]
    op.freeze_value(grid, "says where to sample", keep=(0,))
    op.freeze_value(x, SPATIAL, keep=(0, 1))
    batch = op.equal(op.dim(x, 0), op.dim(grid, 0))
    op.zero = x.zero
    return [batch, op.dim(x, 1), *[None] * (len(op.shape) - 2)]
