"""Torchvision's own operators: regions of interest, boxes, deformable convolution.

roi_align(x, boxes):      channels pass; batch and space are cut up by the boxes, so they stay, and so do the boxes
ps_roi_align(x, boxes):   channels are (C, height, width of a region): the C pass, the rest becomes space
deform_conv2d:            a convolution whose input is sampled at offsets, which are data; sets of channels that share offsets stay equal
"""

from __future__ import annotations

from graphprune.ops.convolution import cut, finish, freeze_kernel, grouped
from graphprune.ops.linear import contract
from graphprune.ops.registry import Labels, Op, Value, rule

REGION = "is a dimension that regions of interest are cut from"


@rule("torchvision::roi_align", "torchvision::roi_pool")
def regions(op: Op) -> Labels | list[Labels]:
    """Regions of interest: the batch is drawn anew, channels pass, space is frozen."""
    x: Value = op["input"]
    op.freeze_value(x, REGION, keep=(1,))
    op.freeze_value(op["rois"], "says where the regions are")
    op.zero = x.zero
    out: Labels = [None, op.dim(x, 1), None, None]
    return out if len(op.outputs) == 1 else [list(out) for _ in op.outputs]


@rule("torchvision::ps_roi_align", "torchvision::ps_roi_pool")
def position_sensitive(op: Op) -> list[Labels]:
    """Regions whose every part is taken from channels of its own."""
    x: Value = op["input"]
    op.freeze_value(x, REGION, keep=(1,))
    op.freeze_value(op["rois"], "says where the regions are")
    parts = (op["pooled_height"], op["pooled_width"])
    channels, *space = cut(op, op.dim(x, 1), (x.shape[1] // (parts[0] * parts[1]), *parts), "is cut into parts of regions")
    for part in space:
        op.freeze(part, "is a part of regions of interest")
    op.zero = x.zero
    return [[None, channels, None, None] for _ in op.outputs]


@rule("torchvision::deform_conv2d")
def deformable(op: Op) -> Labels:
    """Deformable convolution: offsets and modulation masks are spatial, so they stay; input and weight couple as usual."""
    x, weight, bias = op["input"], op["weight"], op["bias"]
    op.freeze_value(op["offset"], "moves the sampling points of a deformable convolution")
    op.freeze_value(op["mask"], "modulates the sampling points of a deformable convolution")
    op.freeze_value(x, "is a spatial dimension of a convolution", keep=(0, 1))
    op.freeze(op.dim(x, 0), "shares its place in the batch with the offsets of a deformable convolution")
    freeze_kernel(op, weight)
    sets = op.get("offset_groups", 1)
    if sets > 1:
        apart = cut(op, op.dim(x, 1), (sets, x.shape[1] // sets), "is cut into sets with offsets of their own")
        op.freeze(apart[0], "has offsets of its own in a deformable convolution")
    if op.get("groups", 1) > 1:
        out = grouped(op, x, 1, weight, op["groups"])
    else:
        contract(op, x, 1, weight, 1)
        out = op.dim(weight, 0)
    op.produce(weight, 0)
    return finish(op, [None, op.dim(x, 1), None, None], 1, out, weight, bias)
