"""Weights together with what they are multiplied with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from graphprune.criteria.base import Part, Sees


@dataclass(frozen=True)
class Wanda:
    """Weights by the size of their inputs, the sum over a channel's weights of |w_ij| |x_j| (Sun et al., arXiv 2306.11695, eq. 1).

    |x_j| is the Euclidean norm of input j over all samples and positions; `Part.extra["inputs"]` holds it in a shape that broadcasts to
    the weight's. The paper removes single weights; a channel's score is the sum over what it owns. Tables that are looked up have no
    input, their weights count as they are.
    """

    sees: ClassVar[Sees] = "inputs"

    def __call__(self, part: Part) -> torch.Tensor:
        """Returns the score of each channel, of shape (channels,)."""
        weights = part.tensor.abs()
        return part.sums(weights * part.extra["inputs"] if "inputs" in part.extra else weights)
