"""Every network that torchvision registers, but the quantized ones.

What a network is fed follows from the module that defines it: images, videos, pairs of images, or a list of images of different sizes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final
from unittest.mock import patch

import torch

from tests.support.torchvision_shim import import_torchvision
from tests.support.zoo_sources import Blueprint, Shape, images

# By defining module. What is purely convolutional with adaptive pooling runs at 96 pixels: the last map is then at least 2 x 2, so that
# space and channels cannot be mixed up, and BatchNorm has more than one value per channel in train mode.
_SMALL: Final = 96
_PIXELS: Final[Mapping[str, int]] = {
    "inception": 299,  # the auxiliary classifier needs a 17 x 17 map in train mode
    "swin_transformer": 224,  # windows of 7 that need no padding
    "maxvit": 224,  # partitions of 7, fixed when built
    "regnet": 64,  # the largest has 645 million parameters
    "segmentation.deeplabv3": 72,  # a stride of 8 leaves 9 x 9
    "segmentation.fcn": 72,
}
_VIDEOS: Final[Mapping[str, Shape]] = {
    "video.resnet": (9, 56, 56),  # frames, height, width
    "video.s3d": (13, 209, 209),  # pools over 2 x 7 x 7 in the end
    "video.mvit": (8, 96, 96),
    "video.swin_transformer": (8, 96, 96),
}
_PATCHES: Final = 5  # per side of a vision transformer's image, whose positions are fixed when it is built
_SLOW_START: Final = frozenset({"inception", "googlenet"})  # their default initialisation draws from scipy

# Detectors with random weights are sure of nothing. Without a least score there are always boxes to compare; with the usual number of
# candidates there would be 90 classes times a thousand.
_DETECTIONS: Final[Mapping[str, Any]] = {"weights_backbone": None}
_SMALL_IMAGES: Final[Mapping[str, Any]] = {"min_size": 96, "max_size": 192}
_TWO_STAGES: Final[Mapping[str, Any]] = {
    **_DETECTIONS,
    **_SMALL_IMAGES,
    "rpn_score_thresh": 0.0,
    "rpn_pre_nms_top_n_test": 60,
    "rpn_post_nms_top_n_test": 12,
    "rpn_pre_nms_top_n_train": 60,
    "rpn_post_nms_top_n_train": 24,
    "box_batch_size_per_image": 8,
    "box_score_thresh": 0.0,
    "box_detections_per_img": 4,  # each goes through the deep heads for masks and keypoints
}
_ONE_STAGE: Final[Mapping[str, Any]] = {**_DETECTIONS, "score_thresh": 0.0, "detections_per_img": 20}
_ARGUMENTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "detection.faster_rcnn": _TWO_STAGES,
    "detection.mask_rcnn": _TWO_STAGES,
    "detection.keypoint_rcnn": _TWO_STAGES,
    "detection.retinanet": {**_ONE_STAGE, **_SMALL_IMAGES, "topk_candidates": 40},  # of every level
    "detection.fcos": {**_ONE_STAGE, **_SMALL_IMAGES, "topk_candidates": 40},
    "detection.ssd": {**_ONE_STAGE, "topk_candidates": 2},  # of every class
    "detection.ssdlite": {**_ONE_STAGE, "topk_candidates": 2},
}
_CORNERS: Final = ((90, 120), (80, 100), (100, 84))  # height and width of the images of a batch, in turn


def names() -> tuple[str, ...]:
    """Returns the names of the registered networks."""
    return tuple(name for name in import_torchvision().models.list_models() if not name.startswith("quantized_"))


def blueprint(name: str, size: int | None) -> Blueprint:
    """Returns how to build a network, see `zoo_sources.blueprint`."""
    builder = import_torchvision().models.get_model_builder(name)
    module: str = builder.__module__.partition(".models.")[2]
    return _recipe(name, module, size, partial(builder, weights=None))


def _recipe(name: str, module: str, size: int | None, builder: Callable[..., Any]) -> Blueprint:
    family = module.partition(".")[0]
    if family == "detection":
        return Blueprint(partial(builder, **_ARGUMENTS[module]), ((3,),), _pictures, partial(_pictures_and_targets, module))
    if family == "optical_flow":
        pixels = size or 128  # the least that its pyramid of correlations takes
        return Blueprint(builder, ((3, pixels, pixels + 8),), _two_images)
    if family == "video":
        frames, height, width = _VIDEOS[module]
        height, width = size or height, size or width
        make = partial(_smaller_mvit, builder, (height, width), frames) if module == "video.mvit" else builder
        return Blueprint(make, ((3, frames, height, width),), images)
    options: dict[str, Any] = {}
    pixels = size or _PIXELS.get(module, _SMALL)
    if family == "segmentation":
        options = {"weights_backbone": None}
    elif module == "vision_transformer":
        pixels = size or _PATCHES * int(re.findall(r"\d+", name)[-1])
        options = {"image_size": pixels}
    elif module in _SLOW_START:
        options = {"init_weights": False}
    return Blueprint(partial(builder, **options), ((3, pixels, pixels),), images)


def _smaller_mvit(builder: Callable[..., Any], size: tuple[int, int], frames: int) -> Any:
    """Returns what the builder makes, for smaller videos: it leaves their size to nobody, though the class takes any."""
    module = sys.modules[builder.func.__module__ if isinstance(builder, partial) else builder.__module__]
    original = module.MViT
    with patch.object(module, "MViT", lambda **options: original(**{**options, "spatial_size": size, "temporal_size": frames})):
        return builder()


def _two_images(batch: int, shape: Shape, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return images(batch, shape, generator), images(batch, shape, generator)


def _pictures(batch: int, shape: Shape, generator: torch.Generator) -> tuple[list[torch.Tensor]]:
    """Returns a list of pictures of different sizes, with values from 0 to 1, as the one argument."""
    sizes = (_CORNERS[number % len(_CORNERS)] for number in range(batch))
    return ([torch.rand(*shape, *size, generator=generator, dtype=torch.float64) for size in sizes],)


def _pictures_and_targets(module: str, batch: int, shape: Shape, generator: torch.Generator) -> tuple[Any, Any]:
    """Returns pictures, and two things to find in each, described for every kind of detector."""
    (pictures,) = _pictures(batch, shape, generator)
    boxes = torch.tensor([[5.0, 10.0, 60.0, 70.0], [30.0, 15.0, 80.0, 75.0]], dtype=torch.float64)
    targets = []
    for picture in pictures:
        target = {"boxes": boxes.clone(), "labels": torch.ones(2, dtype=torch.int64)}
        if module == "detection.mask_rcnn":
            target["masks"] = (torch.rand(2, *picture.shape[1:], generator=generator) > 0.5).to(torch.uint8)
        if module == "detection.keypoint_rcnn":
            inside = boxes[:, None, :2].float() + torch.rand(2, 17, 2, generator=generator) * 45
            target["keypoints"] = torch.cat([inside, torch.ones(2, 17, 1)], dim=2)  # float32, else they are refused
        targets.append(target)
    return pictures, targets
