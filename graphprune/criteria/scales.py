"""Scales of batch norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from graphprune.criteria.base import Part, Sees


@dataclass(frozen=True)
class BNScale:
    """The absolute scale |gamma| of the batch norm behind a channel (Liu et al., Network Slimming, arXiv 1708.06519, section 3).

    Scales of different layers are compared as they are, as in the paper: one threshold over all of them. Where a channel has several (of
    a norm behind a flattened map), their mean counts.
    """

    sees: ClassVar[Sees] = "scales"
    comparable: ClassVar[bool] = True

    def __call__(self, part: Part) -> torch.Tensor:
        """Returns |gamma| of each channel, of shape (channels,)."""
        return part.rows().double().abs().mean(dim=1)
