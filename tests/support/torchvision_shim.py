"""Makes `import torchvision` work where its C extension does not load (a torch build that it was not compiled for).

The extension declares torchvision's own operators; without them the import itself stops at `torchvision::nms`. Here the schemas are
declared instead, `nms` gets a CPU kernel in Python, and `roi_align` runs torchvision's own Python implementation. Nothing is declared
where the extension loads.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from types import ModuleType

_STEMS: Final = ("_C", "_C_stable")  # of the extension's file, until torchvision 0.28 and since
_BOXES: Final = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_POOL: Final = "Tensor input, Tensor rois, float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_CONV: Final = ", ".join(
    f"SymInt {name}" for name in ("stride_h", "stride_w", "pad_h", "pad_w", "dilation_h", "dilation_w", "groups", "offset_groups")
)
SCHEMAS: Final = (
    f"nms{_BOXES}",
    f"qnms{_BOXES}",
    f"roi_align({_POOL}, int sampling_ratio, bool aligned) -> Tensor",
    f"ps_roi_align({_POOL}, int sampling_ratio) -> (Tensor, Tensor)",
    f"roi_pool({_POOL}) -> (Tensor, Tensor)",
    f"ps_roi_pool({_POOL}) -> (Tensor, Tensor)",
    f"deform_conv2d(Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias, {_CONV}, bool use_mask) -> Tensor",
)


@functools.cache
def import_torchvision() -> ModuleType:
    """Returns the module torchvision, imported, with its missing operators declared first where its C extension does not load.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    if "torchvision" in sys.modules:
        return sys.modules["torchvision"]
    if extension_loads():
        return importlib.import_module("torchvision")
    _declare_operators()
    # A failed import leaves submodules behind that were never finished.
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[name]
    torchvision = importlib.import_module("torchvision")
    _use_python_kernels()
    return torchvision


def extension_loads() -> bool:
    """Returns whether torchvision's C extension loads into this torch; torchvision itself is not imported.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        message = "No module named 'torchvision'"
        raise ModuleNotFoundError(message, name="torchvision")
    folder = Path(spec.submodule_search_locations[0])
    libraries = [
        path for stem in _STEMS for suffix in importlib.machinery.EXTENSION_SUFFIXES if (path := folder / f"{stem}{suffix}").exists()
    ]
    if not libraries:
        return False
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError:
        return False
    return True


def nms(dets: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Keeps boxes greedily by falling score, dropping those that overlap a kept box by more than `iou_threshold`.

    Args:
        dets: boxes (x1, y1, x2, y2), shape (N, 4).
        scores: one score per box, shape (N,).
        iou_threshold: largest allowed intersection over union, 0 to 1.

    Returns:
        The indices of the kept boxes, int64, by falling score.
    """
    if not len(dets):
        return torch.empty(0, dtype=torch.int64, device=dets.device)
    order = torch.argsort(scores, descending=True, stable=True)
    boxes = dets[order]
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    alive = torch.ones(len(order), dtype=torch.bool, device=dets.device)
    kept: list[int] = []
    for position in range(len(order)):
        if not bool(alive[position]):
            continue
        kept.append(position)
        box = boxes[position]
        corners_low = torch.maximum(boxes[:, :2], box[:2])
        corners_high = torch.minimum(boxes[:, 2:], box[2:])
        overlap = (corners_high - corners_low).clamp(min=0).prod(dim=1)
        alive &= ~(overlap / (areas + areas[position] - overlap) > iou_threshold)
    return order[torch.tensor(kept, device=dets.device)]


@functools.cache
def _declare_operators() -> torch.library.Library:
    """Declares every schema of `SCHEMAS` that is still missing; the operators live as long as the returned (cached) library."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    library.impl("nms", nms, "CPU")
    return library


def _use_python_kernels() -> None:
    """Lets `torchvision.ops.nms` reach the kernel above, and `roi_align` run uncompiled.

    Without the extension torchvision refuses to call any of its operators and hands `roi_align` to torch.compile, into which no
    tracer can look.
    """
    boxes = sys.modules["torchvision.ops.boxes"]
    vars(boxes)["_assert_has_ops"] = lambda: None
    roi_align = sys.modules["torchvision.ops.roi_align"]
    compiled = vars(roi_align).get("_roi_align")
    vars(roi_align)["_roi_align"] = getattr(compiled, "__wrapped__", compiled)
