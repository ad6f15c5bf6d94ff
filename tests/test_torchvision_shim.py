"""The shim imports torchvision with or without its C extension, and its non-maximum suppression is right."""

from __future__ import annotations

import pytest
import torch

from tests.support.torchvision_shim import SCHEMAS, extension_loads, import_torchvision, nms


def overlap(a: list[float], b: list[float]) -> float:
    """Returns the intersection over union of two boxes (x1, y1, x2, y2)."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def naive_nms(boxes: list[list[float]], scores: list[float], threshold: float) -> list[int]:
    """Returns the kept indices, box by box in plain Python."""
    kept: list[int] = []
    for candidate in sorted(range(len(boxes)), key=lambda index: -scores[index]):
        if all(overlap(boxes[candidate], boxes[index]) <= threshold for index in kept):
            kept.append(candidate)
    return kept


def random_boxes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns `count` overlapping boxes and their scores, in float64."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 4
    size = torch.rand(count, 2, generator=generator, dtype=torch.float64) * 3 + 0.5
    return torch.cat([low, low + size], dim=1), torch.rand(count, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("count", [0, 1, 2, 60])
def test_nms_equals_naive_loop(count: int, threshold: float) -> None:
    """The kernel keeps the boxes that a naive loop keeps, in the same order."""
    boxes, scores = random_boxes(count, seed=count)
    expected = naive_nms(boxes.tolist(), scores.tolist(), threshold)
    assert nms(boxes, scores, threshold).tolist() == expected


def test_nms_comparison_can_fail() -> None:
    """Different thresholds keep different boxes, so the comparison with the naive loop is not vacuous."""
    boxes, scores = random_boxes(60, seed=60)
    assert nms(boxes, scores, 0.1).tolist() != naive_nms(boxes.tolist(), scores.tolist(), 0.6)


def test_operator_runs_through_torchvision() -> None:
    """`torchvision.ops.nms` gives the naive loop's answer, whichever kernel is behind it."""
    boxes, scores = random_boxes(40, seed=3)
    kept = import_torchvision().ops.nms(boxes, scores, 0.3)
    assert kept.tolist() == naive_nms(boxes.tolist(), scores.tolist(), 0.3)


@pytest.mark.skipif(extension_loads(), reason="torchvision's own extension declares the operators that its release has")
def test_all_operators_are_declared() -> None:
    """Every operator of the table has a schema after the import."""
    import_torchvision()
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        assert hasattr(torch.ops.torchvision, name), name


def test_import_twice_gives_one_module() -> None:
    """A second call declares nothing again and returns the same module."""
    assert import_torchvision() is import_torchvision()


def test_roi_align_of_constant_map_is_constant() -> None:
    """`roi_align` averages a constant map to that constant."""
    image = torch.full((1, 2, 8, 8), 3.0, dtype=torch.float64)
    boxes = [torch.tensor([[1.0, 1.0, 6.0, 5.0]], dtype=torch.float64)]
    pooled = import_torchvision().ops.roi_align(image, boxes, output_size=(2, 3), spatial_scale=1.0)
    assert pooled.shape == (1, 2, 2, 3)
    assert torch.allclose(pooled, torch.full_like(pooled, 3.0), rtol=0, atol=1e-12)
