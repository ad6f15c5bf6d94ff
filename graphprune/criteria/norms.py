"""Norms of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from graphprune.criteria.base import Part


@dataclass(frozen=True)
class L1:
    """The sum of absolute kernel weights, sum |K| (Li et al., Pruning Filters for Efficient ConvNets, arXiv 1608.08710, section 3.1)."""

    def __call__(self, part: Part) -> torch.Tensor:
        """Returns the L1 norm of each channel's weights, of shape (channels,)."""
        return part.sums(part.tensor.abs())


@dataclass(frozen=True)
class L2:
    """The Euclidean norm of a channel's weights, sqrt(sum K^2) (He et al., Soft Filter Pruning, arXiv 1808.06866, section 3, p = 2)."""

    def __call__(self, part: Part) -> torch.Tensor:
        """Returns the L2 norm of each channel's weights, of shape (channels,)."""
        return part.sums(part.tensor.double().square()).sqrt()
