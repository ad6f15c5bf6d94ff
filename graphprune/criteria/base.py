"""What a criterion is given and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from graphprune.errors import MaskError
from graphprune.masks import slice_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from graphprune.graph import DependencyGraph, Slice


@dataclass(frozen=True, eq=False)
class ProducerWeights:
    """One producing slice together with its tensor.

    Attributes:
        tensor: the whole parameter.
        owner: which positions of it each channel owns.
    """

    tensor: torch.Tensor
    owner: Slice

    def rows(self) -> torch.Tensor:
        """Returns the weights of each channel, of shape (channels, elements)."""
        return slice_tensor(self.tensor, self.owner)

    def sums(self, elementwise: torch.Tensor) -> torch.Tensor:
        """Returns per channel the sum of a tensor of the parameter's shape over what the channel owns."""
        others = [d for d in range(elementwise.dim()) if d != self.owner.dim]
        per_position = elementwise.sum(dim=others) if others else elementwise
        return per_position[torch.from_numpy(self.owner.index).to(per_position.device)].sum(dim=1)


class Criterion(Protocol):
    """Scores channels: weights in, one number per channel out, higher = keep."""

    def __call__(self, weights: ProducerWeights) -> torch.Tensor:
        """Returns scores of shape (channels,) for one producing slice."""


def group_scores(graph: DependencyGraph, tensors: Mapping[str, torch.Tensor], criterion: Criterion) -> dict[str, NDArray[np.float64]]:
    """Returns group name -> scores of shape (channels,): the sum of the criterion over the group's producing slices.

    Raises:
        MaskError: a score is not a number (the weights hold NaN).
    """
    out: dict[str, NDArray[np.float64]] = {}
    with torch.no_grad():
        for group in graph.groups:
            total = np.zeros(group.channels, dtype=np.float64)
            for s in group.producers:
                total += criterion(ProducerWeights(tensors[s.parameter].detach(), s)).double().cpu().numpy()
            if np.isnan(total).any():
                culprits = ", ".join(s.parameter for s in group.producers)
                raise MaskError(f"scores of group {group.name!r} are not numbers: {culprits} hold NaN", "Check the weights")
            out[group.name] = total
    return out
