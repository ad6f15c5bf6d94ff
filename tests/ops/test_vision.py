"""Torchvision's own operators: channels pass through regions of interest and deformable convolutions; boxes and offsets are data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.support.invariants import assert_invariants
from tests.support.operators import Case, check, check_frozen, conv, described, ordered, table
from tests.support.torchvision_shim import import_torchvision

import_torchvision()
ops: Any = torch.ops.torchvision
A = "a.bias/0 a.weight/0"
PLAIN = [f"8 exact: {A} b.weight/1"]
BOXES = torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0], [1.0, 1.0, 0.0, 5.0, 3.0], [1.0, 2.0, 2.0, 6.0, 6.0]], dtype=torch.float64)


def sampled(image: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns the values of an image (C, H, W) at places given in pixels, zero outside: (C, *places)."""
    size = torch.tensor(image.shape[-2:])
    grid = torch.stack([(2 * x + 1) / size[1] - 1, (2 * y + 1) / size[0] - 1], -1)
    flat = functional.grid_sample(image[None], grid.reshape(1, 1, -1, 2), align_corners=False)
    return flat.reshape(image.shape[0], *y.shape)


def centres(box: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the coordinates of the middle of each part of a region."""
    rows = box[2] + (torch.arange(height, dtype=box.dtype) + 0.5) * (box[4] - box[2]) / height
    columns = box[1] + (torch.arange(width, dtype=box.dtype) + 0.5) * (box[3] - box[1]) / width
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return y, x


def align(image: torch.Tensor, boxes: torch.Tensor, scale: float, height: int, width: int, ratio: int, aligned: bool) -> torch.Tensor:
    """Takes one sample in the middle of each part of each region."""
    del scale, ratio, aligned
    return torch.stack([sampled(image[int(box[0])], *centres(box, height, width)) for box in boxes])


def pool(image: torch.Tensor, boxes: torch.Tensor, scale: float, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the same samples, and says that each is the first."""
    out = align(image, boxes, scale, height, width, 1, aligned=False)
    return out, torch.zeros_like(out, dtype=torch.int32)


def by_position(
    image: torch.Tensor, boxes: torch.Tensor, scale: float, height: int, width: int, ratio: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes each part of each region from the channels that are meant for it."""
    parts = align(image, boxes, scale, height, width, ratio, aligned=False)
    cut = parts.unflatten(1, (-1, height, width))
    out = torch.diagonal(torch.diagonal(cut, 0, 2, 4), 0, 2, 3)
    return out, torch.zeros_like(out, dtype=torch.int32)


def deform(image: torch.Tensor, weight: torch.Tensor, offset: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor, *sizes: int) -> Any:
    """Convolves values that are sampled beside their places; padding 1, everything else 1."""
    groups, sets, use_mask = sizes[6:]
    n, channels, height, width = image.shape
    y, x = (v.double() for v in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    taps = weight.shape[2] * weight.shape[3]
    shifts = offset.view(n, sets, taps, 2, height, width)
    columns = image.new_zeros(n, channels, taps, height, width)
    for i in range(n):
        for s, part in enumerate(image[i].chunk(sets)):
            for k in range(taps):
                dy, dx = k // weight.shape[3] - 1, k % weight.shape[3] - 1
                value = sampled(part, y + dy + shifts[i, s, k, 0], x + dx + shifts[i, s, k, 1])
                at = slice(s * len(part), (s + 1) * len(part))
                columns[i, at, k] = value * mask.view(n, sets, taps, height, width)[i, s, k] if use_mask else value
    flat = columns.view(n, groups, -1, height, width)
    rows = weight.reshape(groups, -1, weight.shape[1] * taps)
    return torch.einsum("ngihw,goi->ngohw", flat, rows).flatten(1, 2) + bias.view(1, -1, 1, 1)


LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
KERNELS: dict[str, Callable[..., Any]] = {
    "roi_align": align, "roi_pool": pool, "ps_roi_align": by_position, "ps_roi_pool": by_position, "deform_conv2d": deform,
}  # fmt: skip
for name, kernel in KERNELS.items():  # where torchvision's compiled part does not load, its operators have no kernels
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"torchvision::{name}", "CPU"):  # noqa: SLF001 (no public spelling)
        LIBRARY.impl(name, kernel, "CompositeImplicitAutograd")


def region(name: str, operator: Any, groups: list[str], channels: int = 8, **options: Any) -> Case:
    """Returns a case that cuts regions out of the outputs of a convolution."""
    parts = {"a": conv(3, channels), "b": conv(options.pop("out", channels), 4), **options.pop("extra", {})}
    return Case(name, lambda m, x: m.b(operator(m, torch.relu(m.a(x)))), parts, groups, **{"kind": "module", **options})


def boxes(m: Any, y: torch.Tensor) -> torch.Tensor:
    """Returns regions whose places are computed from the channels."""
    places = torch.sigmoid(m.p(y.mean((2, 3))))
    return torch.cat([torch.arange(len(y), dtype=y.dtype).unsqueeze(1), places[:, :2], 2 + 3 * places[:, 2:]], 1)


def kept(m: Any, y: torch.Tensor) -> torch.Tensor:
    """Chooses regions by scores that are computed from the channels."""
    out: torch.Tensor = ops.roi_align(y, BOXES[ops.nms(BOXES[:, 1:], m.s(y.mean((0, 2, 3))), 0.9)], 1.0, 2, 3, 1, True)
    return out


def bend(groups: int = 1, sets: int = 1, *, modulated: bool = False) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Returns a deformable convolution with offsets that are computed from the channels."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(m.a(x))
        mask = torch.sigmoid(m.m(y)) if modulated else y.new_zeros(y.shape[0], 1)
        bent = ops.deform_conv2d(y, m.w, torch.tanh(m.o(y)), mask, m.v, 1, 1, 1, 1, 1, 1, groups, sets, modulated)
        out: torch.Tensor = m.b(torch.relu(bent))
        return out

    return run


def bent(name: str, groups: list[str], conv_groups: int = 1, sets: int = 1, *, modulated: bool = False, **options: Any) -> Case:
    """Returns a case of a deformable convolution from 8 channels to 6."""
    parts: dict[str, nn.Module | torch.Tensor] = {"a": conv(3, 8), "o": conv(8, 18 * sets), "w": table(6, 8 // conv_groups, 3, 3),
        "v": table(6), "b": conv(6, 4), **({"m": conv(8, 9 * sets)} if modulated else {})}  # fmt: skip
    return Case(name, bend(conv_groups, sets, modulated=modulated), parts, groups, **options)


OFFSETS = {"o.weight/0": "moves the sampling points"}

CASES = [
    region("roi_align", lambda _, y: ops.roi_align(y, BOXES, 1.0, 2, 3, 1, True), PLAIN),
    region("roi_pool", lambda _, y: ops.roi_pool(y, BOXES, 1.0, 2, 2)[0], PLAIN),
    region("roi_align of computed regions", lambda m, y: ops.roi_align(y, boxes(m, y), 1.0, 2, 2, 1, True),
           [f"8 exact: {A} b.weight/1 p.weight/1"], extra={"p": nn.Linear(8, 4)}, frozen={"p.weight/0": "("}),
    region("ps_roi_align", lambda _, y: ops.ps_roi_align(y, BOXES, 1.0, 2, 2, 1)[0], [f"4 exact: {A} b.weight/1".replace("/0", "/0*4")], 16,
           out=4),
    region("ps_roi_pool", lambda _, y: ops.ps_roi_pool(y, BOXES, 1.0, 2, 2)[0], [f"4 exact: {A} b.weight/1".replace("/0", "/0*4")], 16,
           out=4),
    bent("deformable convolution", [f"8 exact: {A} o.weight/1 w/1", "6 exact: b.weight/1 v/0 w/0"], frozen=OFFSETS),
    bent("deformable convolution with a mask", [f"8 exact: {A} m.weight/1 o.weight/1 w/1", "6 exact: b.weight/1 v/0 w/0"], modulated=True,
         frozen=OFFSETS | {"m.weight/0": "modulates the sampling points"}),
    bent("deformable convolution with two sets of offsets", ["4 exact: a.bias/0*2 a.weight/0*2 o.weight/1*2 w/1*2",
         "6 exact: b.weight/1 v/0 w/0"], sets=2, frozen=OFFSETS),
    bent("deformable convolution with groups", ["2 exact block: a.bias/0*4 a.weight/0*4 b.weight/1*3 o.weight/1*4 v/0*3 w/0*3",
         "3 exact within: b.weight/1*2 v/0*2 w/0*2", "4 exact within: a.bias/0*2 a.weight/0*2 o.weight/1*2 w/1"], 2, frozen=OFFSETS),
]  # fmt: skip

CHOOSING = [
    region("nms", kept, [f"8 exact: {A} b.weight/1 s.weight/1"], extra={"s": nn.Linear(8, 3)},
           frozen={"s.weight/0": "decides a size or a position at run time (torchvision::nms)"}),
    region("nms of channels", lambda _, y: y * ops.nms(BOXES[:, 1:], y.mean((0, 2, 3))[:3], 0.9)[0], [f"5 exact: {A} b.weight/1"],
           frozen={"a.weight/0": "decides a size or a position at run time (torchvision::nms)"}),
]  # fmt: skip


@pytest.mark.parametrize("case", CHOOSING, ids=str)
def test_choosing_boxes(case: Case) -> None:
    """How many boxes are left is decided at run time, so there is no GraphModule; the class is kept, and what the scores are read from."""
    found = assert_invariants(case.build(), case.inputs(2))
    assert described(found.graph) == sorted(ordered(line) for line in case.groups)
    check_frozen(found.graph, case)
    assert found.report.kind == "module"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vision(case: Case) -> None:
    """Groups are what the formula of the operator says, and removal is exact."""
    check(case)
