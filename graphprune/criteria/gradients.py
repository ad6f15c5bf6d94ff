"""How much the loss changes without a channel: expansions of first and second order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from graphprune.criteria.base import Part, Sees


@dataclass(frozen=True)
class Taylor:
    """First-order Taylor expansion on weights, sum of (g w)^2 over a channel's weights, averaged over mini-batches.

    Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, arXiv 1906.10771, section 3. `Part.extra["products"]` is
    the mean over batches of (g w)^2, of the parameter's shape.
    """

    sees: ClassVar[Sees] = "products"
    comparable: ClassVar[bool] = True

    def __call__(self, part: Part) -> torch.Tensor:
        """Returns the score of each channel, of shape (channels,)."""
        return part.sums(part.extra["products"])


@dataclass(frozen=True)
class TaylorGroup:
    """First-order Taylor expansion on a whole group of weights, (sum of g w)^2, averaged over mini-batches.

    Molchanov et al. (as above): the squared change of the loss to first order when all that a channel owns goes at once. Positive
    and negative terms cancel, unlike in `Taylor`. The sum runs over all slices that are in scope, so there is nothing left to aggregate.
    `Part.extra["joint"]` is that mean, of shape (channels,).
    """

    sees: ClassVar[Sees] = "joint"
    comparable: ClassVar[bool] = True

    def __call__(self, part: Part) -> torch.Tensor:
        """Returns the score of each channel, of shape (channels,)."""
        return part.extra["joint"]


@dataclass(frozen=True)
class HessianDiagonal:
    """The loss's second-order change, sum of h w^2 / 2 with h the diagonal of the Hessian (LeCun et al., Optimal Brain Damage, 1989).

    h is estimated as the mean of v (H v) over random signs v (Hutchinson's estimator; Yao et al., AdaHessian, arXiv 2006.00719).
    `Part.extra["curvature"]` is h, of the parameter's shape.

    Attributes:
        probes: vectors v per mini-batch.
        seed: of the random signs.
    """

    probes: int = 1
    seed: int = 0
    sees: ClassVar[Sees] = "curvature"
    comparable: ClassVar[bool] = True

    def __call__(self, part: Part) -> torch.Tensor:
        """Returns the score of each channel, of shape (channels,)."""
        return part.sums(0.5 * part.extra["curvature"] * part.tensor.double().square())
