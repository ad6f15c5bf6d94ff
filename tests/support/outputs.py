"""Comparing what two networks return, whatever the structure."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def flatten_outputs(output: object) -> list[torch.Tensor]:
    """Returns the tensors in nested tuples, lists, dicts, named tuples and dataclasses, in order."""
    return list(_tensors(output))


def _tensors(output: object) -> Iterator[torch.Tensor]:
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])


def shapes(outputs: Sequence[torch.Tensor]) -> list[tuple[int, ...]]:
    """Returns the shapes of the tensors."""
    return [tuple(tensor.shape) for tensor in outputs]


def relative_error(expected: Sequence[torch.Tensor], actual: Sequence[torch.Tensor]) -> float:
    """Returns max|a - b| / max|a| of the tensor where that is largest; where a is all zero, max|a - b|.

    Infinite where number or shapes of the tensors differ, or where one is not finite and the other does not hold the same there.
    """
    if shapes(expected) != shapes(actual):
        return math.inf
    return max((_error(a, b) for a, b in zip(expected, actual, strict=True)), default=0.0)


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    kind = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    a, b = a.detach().to(kind), b.detach().to(kind)
    difference = (a - b).abs()
    difference = torch.where((a == b) | (a.isnan() & b.isnan()), torch.zeros_like(difference), difference)
    if difference.numel() == 0:
        return 0.0
    if not bool(difference.isfinite().all()):
        return math.inf
    scale = float(torch.where(a.isfinite(), a.abs(), torch.zeros_like(difference)).max())
    return float(difference.max()) / (scale or 1.0)
