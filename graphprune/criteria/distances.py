"""How replaceable a channel is by the others of its layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from graphprune.criteria.base import Part

_BLOCK = 2**22  # elements that are worked on at a time


@dataclass(frozen=True)
class FPGM:
    """The sum of Euclidean distances to all other channels of the layer, sum_k |W_j - W_k|.

    The channel with the smallest sum is the nearest to the geometric median, hence the most replaceable (He et al., Filter Pruning via
    Geometric Median, arXiv 1811.00250, section 3). Distances come from products of blocks of rows, in double precision and about
    the mean, so that memory grows with the channels and not with pairs of channels times weights.
    """

    def __call__(self, part: Part) -> torch.Tensor:
        """Returns the sum of distances of each channel, of shape (channels,), float64."""
        rows = part.rows()
        count, width = rows.shape
        mean = rows.mean(dim=0, dtype=torch.float64)
        columns = max(1, _BLOCK // count)
        squares = torch.zeros(count, dtype=torch.float64, device=rows.device)
        for start in range(0, width, columns):
            squares += _centred(rows, mean, start, columns).square().sum(dim=1)
        out = torch.empty(count, dtype=torch.float64, device=rows.device)
        at_once = max(1, _BLOCK // count)
        for first in range(0, count, at_once):
            some = slice(first, first + at_once)
            products = torch.zeros(len(range(count)[some]), count, dtype=torch.float64, device=rows.device)
            for start in range(0, width, columns):
                block = _centred(rows, mean, start, columns)
                products.addmm_(block[some], block.T)
            squared = squares[some, None] + squares[None, :] - 2.0 * products
            own = torch.arange(squared.shape[0], device=rows.device)
            squared[own, own + first] = 0.0
            out[some] = squared.clamp_(min=0.0).sqrt_().sum(dim=1)
        return out


def _centred(rows: torch.Tensor, mean: torch.Tensor, start: int, columns: int) -> torch.Tensor:
    """Returns some columns less their mean, in double precision."""
    return rows[:, start : start + columns].double() - mean[start : start + columns]
