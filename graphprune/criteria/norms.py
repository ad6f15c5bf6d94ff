"""Norms of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from graphprune.criteria.base import ProducerWeights


@dataclass(frozen=True)
class L1:
    """The sum of absolute kernel weights, sum |K| (Li et al., Pruning Filters for Efficient ConvNets, arXiv 1608.08710, section 3.1)."""

    def __call__(self, weights: ProducerWeights) -> torch.Tensor:
        """Returns the L1 norm of each channel's weights, of shape (channels,)."""
        return weights.sums(weights.tensor.abs())
