"""What a criterion is given and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import torch

from graphprune.masks.channels import slice_tensor

if TYPE_CHECKING:
    from graphprune.groups.graph import Slice

Sees: TypeAlias = Literal["weights", "scales", "activations", "products", "joint", "curvature", "inputs"]
"""What a criterion is shown of a group.

"weights": the slices that produce its channels. "scales": those that scale them after a batch norm. "activations": the tensors that the
channels are in behind their nonlinearity. "products", "joint", "curvature" and "inputs": the slices again, with what was observed of
gradients, of the Hessian or of the layer's inputs.
"""


@dataclass(frozen=True, eq=False)
class Part:
    """What a criterion sees of a group at a time: one slice together with its tensor, and what was observed of it.

    Attributes:
        tensor: the whole parameter (of an activation, the number of its elements per channel).
        owner: which positions of it each channel owns.
        extra: what was observed, by name; see the criteria that ask for it.
    """

    tensor: torch.Tensor
    owner: Slice
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def rows(self) -> torch.Tensor:
        """Returns the weights of each channel, of shape (channels, elements)."""
        return slice_tensor(self.tensor, self.owner)

    def sums(self, elementwise: torch.Tensor) -> torch.Tensor:
        """Returns per channel the sum of a tensor of the parameter's shape over what the channel owns, float64."""
        others = [d for d in range(elementwise.dim()) if d != self.owner.dim]
        per_position = elementwise.sum(dim=others, dtype=torch.float64) if others else elementwise.double()
        return per_position[torch.from_numpy(self.owner.index).to(per_position.device)].sum(dim=1)


class Criterion(Protocol):
    """Scores channels: one number per channel out, higher = keep.

    Two class attributes are read where a criterion has them: `sees` (by default "weights"), and `comparable`: whether scores of different
    groups can be compared as they are (by default not: norms of weights of different shapes cannot).
    """

    def __call__(self, part: Part) -> torch.Tensor:
        """Returns scores of shape (channels,) for one part."""


def seen_by(criterion: Criterion) -> Sees:
    """Returns what a criterion sees."""
    sees: Sees = getattr(criterion, "sees", "weights")
    return sees


def is_comparable(criterion: Criterion) -> bool:
    """Returns whether a criterion's scores of different groups can be compared as they are."""
    return bool(getattr(criterion, "comparable", False))
