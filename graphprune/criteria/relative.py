"""Scores relative to the layer, and a baseline without any."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

if TYPE_CHECKING:
    from graphprune.criteria.base import Part


@dataclass(frozen=True)
class LAMP:
    """Layer-adaptive magnitude: a channel's squared norm over the sum of those of the layer that are at least as large.

    score(u) = |W_u|^2 / sum of |W_v|^2 over v >= u, in ascending order of magnitude (Lee et al., Layer-adaptive Sparsity for the
    Magnitude-based Pruning, ICLR 2021, arXiv 2010.07611, with channels in the place of weights). The largest of every layer scores 1,
    so that one global ranking never empties a layer.
    """

    comparable: ClassVar[bool] = True

    def __call__(self, part: Part) -> torch.Tensor:
        """Returns the score of each channel, of shape (channels,), float64."""
        return lamp(part.sums(part.tensor.double().square()))


def lamp(squares: torch.Tensor) -> torch.Tensor:
    """Returns LAMP scores: each square over the sum of those from it upwards in ascending order, of equal ones the last first.

    Args:
        squares: squared magnitudes, of shape (n,), none negative; zeros score zero.
    """
    ordered, order = torch.sort(squares.flip(0), stable=True)
    remaining = ordered.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = torch.where(remaining > 0, ordered / remaining, 0.0)
    return scores.flip(0)


@dataclass(frozen=True)
class Random:
    """Uniform random scores in [0, 1): what every criterion has to beat.

    Attributes:
        seed: equal seeds give equal scores, layer by layer, whatever else the model has.
    """

    seed: int = 0
    comparable: ClassVar[bool] = True

    def __call__(self, part: Part) -> torch.Tensor:
        """Returns random scores of shape (channels,), float64."""
        owner = part.owner
        place = zlib.crc32(f"{owner.parameter} {owner.dim}".encode() + owner.index.tobytes())
        return torch.from_numpy(np.random.default_rng([self.seed, place]).random(owner.index.shape[0]))
