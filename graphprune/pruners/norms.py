"""Pruners that look at weights alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphprune.criteria import FPGM, L1, L2
from graphprune.pruners.base import Options, Pruner

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Unpack


class L1NormPruner(Pruner):
    """Prunes the channels whose producing weights have the smallest L1 norm, sum |K| (Li et al., arXiv 1608.08710).

    A coupled group's score is the sum over the layers that produce its channels. See `Pruner` for the arguments.
    """

    def __init__(
        self, model: nn.Module, config_list: Sequence[Mapping[str, Any]], example_inputs: object = None, **options: Unpack[Options]
    ) -> None:
        super().__init__(model, config_list, L1(), example_inputs, **options)


class L2NormPruner(Pruner):
    """Prunes the channels whose producing weights have the smallest L2 norm. See `Pruner` for the arguments."""

    def __init__(
        self, model: nn.Module, config_list: Sequence[Mapping[str, Any]], example_inputs: object = None, **options: Unpack[Options]
    ) -> None:
        super().__init__(model, config_list, L2(), example_inputs, **options)


class FPGMPruner(Pruner):
    """Prunes the channels nearest to the geometric median of their layer: those whose summed distance to all others is smallest.

    He et al., Filter Pruning via Geometric Median, arXiv 1811.00250. See `Pruner` for the arguments.
    """

    def __init__(
        self, model: nn.Module, config_list: Sequence[Mapping[str, Any]], example_inputs: object = None, **options: Unpack[Options]
    ) -> None:
        super().__init__(model, config_list, FPGM(), example_inputs, **options)
