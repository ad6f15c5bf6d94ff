"""What channels are like when data flows: criteria of activations behind the nonlinearity.

`Part.extra` holds "zeros" (how many elements are exactly zero), "total" (the sum of all) and "elements" (how many there were), each of
shape (channels,), over all samples and positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch

    from graphprune.criteria.base import Part, Sees


@dataclass(frozen=True)
class APoZ:
    """One less the average percentage of zeros: the channel that is zero most often goes first.

    APoZ_c = sum over samples and positions of [activation = 0] / (samples x positions) (Hu et al., Network Trimming, arXiv 1607.03250,
    section 3). The paper removes high APoZ; a score is the higher the more a channel should be kept.
    """

    sees: ClassVar[Sees] = "activations"
    comparable: ClassVar[bool] = True

    def __call__(self, part: Part) -> torch.Tensor:
        """Returns 1 - APoZ of each channel, of shape (channels,)."""
        return 1.0 - part.extra["zeros"] / part.extra["elements"]


@dataclass(frozen=True)
class MeanActivation:
    """The mean activation: behind a rectifier, the mean of what passes. The channel with the smallest goes first.

    Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference, ICLR 2017, arXiv 1611.06440, section 2.2.
    """

    sees: ClassVar[Sees] = "activations"

    def __call__(self, part: Part) -> torch.Tensor:
        """Returns the mean of each channel, of shape (channels,)."""
        return part.extra["total"] / part.extra["elements"]
