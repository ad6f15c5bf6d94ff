"""Pruners that rank channels by a norm of their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphprune.criteria import L1
from graphprune.pruners.base import Cut, Pruner

if TYPE_CHECKING:
    from torch import nn

    from graphprune.budgets import Rounding
    from graphprune.graph import DependencyGraph


class L1NormPruner(Pruner):
    """Prunes the channels whose producing weights have the smallest L1 norm, sum |K| (Li et al., arXiv 1608.08710).

    A coupled group's score is the sum over the layers that produce its channels. See `Pruner` for the arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        example_inputs: object = None,
        *,
        rounding: Rounding = "floor",
        round_to: int = 1,
        cut: Cut = "blocks",
        graph: DependencyGraph | None = None,
        keep_class: bool = False,
    ) -> None:
        options: dict[str, Any] = {"rounding": rounding, "round_to": round_to, "cut": cut, "graph": graph, "keep_class": keep_class}
        super().__init__(model, config_list, L1(), example_inputs, **options)
