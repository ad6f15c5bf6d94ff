"""What the pruners that search have in common: the best trial, the last one, and what the best comes to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from graphprune.masks import Masks
    from graphprune.search.base import SearchResult
    from graphprune.search.objective import Objective, Trial


class SearchPruner(ABC):
    """A pruner that evaluates many models and keeps the best.

    Attributes:
        model: the user's, left bit-identical.
        objective: what is searched.
    """

    model: nn.Module
    objective: Objective

    @abstractmethod
    def search(self) -> SearchResult:
        """Returns the trials; runs them on the first call, or those that are missing in the folder."""

    @property
    def best(self) -> Trial:
        """The best trial; searches where that was not done yet."""
        return self.search().best

    @property
    def last(self) -> Trial:
        """The last trial; searches where that was not done yet."""
        return self.search().last

    def compress(self) -> tuple[nn.Module, Masks]:
        """Returns (a copy of the model with what the best trial removes zeroed, the masks)."""
        masks = self.objective.masks(self.best.sparsities)
        return masks.masked(self.model), masks

    def get_best_result(self) -> tuple[int, nn.Module, Masks, float, list[dict[str, Any]]]:
        """Returns of the best trial: its number, the masked copy, the masks, the score, and a config list that says the same.

        Its entries name the layers of each group with the group's sparsity.
        """
        masked, masks = self.compress()
        layers = {g.name: list(g.layers) for g in self.objective.graph.groups}
        entries = [{"op_names": layers[n], "sparsity": s} for n, s in self.best.sparsities.items() if s > 0]
        return self.best.number, masked, masks, self.best.score, entries
