"""How many channels stay, on one path for every criterion: by sparsity, by one ranking, or down to a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from graphprune.cost.predict import Forecast
from graphprune.errors import ConfigError
from graphprune.pruners.budgets import Budget, Ranking, Rounding, keep_highest, kept_count, least_kept

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from graphprune.groups.graph import DependencyGraph


@dataclass(frozen=True, eq=False)
class Counting:
    """Turns scores and requests into counts.

    Attributes:
        scores: name -> score per channel; of groups, or of layers that are masked by themselves.
        most: name -> the largest fraction that it may lose.
        rounding: see `kept_count`.
        round_to: see `kept_count`.
        comparable: whether scores of different names compare as they are.
        notes: name -> why it lost less than was asked for; added to.
    """

    scores: Mapping[str, NDArray[np.float64]]
    most: Mapping[str, float]
    rounding: Rounding
    round_to: int
    comparable: bool
    notes: dict[str, str]

    def each(self, sparsity: Mapping[str, float]) -> dict[str, int]:
        """Returns counts by every name's own sparsity."""
        counts = {name: kept_count(s.size, sparsity[name], self.rounding, self.round_to) for name, s in self.scores.items()}
        for name, most in self.most.items():
            least = least_kept(self.scores[name].size, most, self.round_to) if most < 1.0 else 0
            if counts[name] < least:
                counts[name] = least
                self.notes.setdefault(name, f"max_sparsity_per_layer is {most:g}")
        return counts

    def together(self, names: list[str], sparsity: float) -> dict[str, int]:
        """Returns counts from one ranking of these names, which loses a fraction of all their channels."""
        ranking = self._ranking(names, "global")
        target = kept_count(int(ranking.sizes.sum()), sparsity, self.rounding)
        return self._noted(ranking, ranking.reaching(lambda left: sum(left.values()), target, self.rounding))

    def within(self, budget: Budget, model: nn.Module, graph: DependencyGraph, order: Literal["global", "even"]) -> dict[str, int]:
        """Returns counts of groups that meet a budget, to within one step of the ranking.

        Raises:
            ConfigError: the budget cannot be met by these groups.
        """
        forecast = Forecast(model, graph)
        ranking = self._ranking(list(self.most), order)

        def cost(counts: Mapping[str, int]) -> float:
            kept = {n: keep_highest(self.scores[n], k) for n, k in counts.items() if k < self.scores[n].size}
            return float(getattr(forecast.cost(kept), budget.unit))

        dense = float(getattr(forecast.dense, budget.unit))
        target = budget.left(dense)
        least = cost(ranking.counts(len(ranking)))
        if least > target:
            what = f"the budget removes {budget}, but at most {1.0 - least / dense:.1%} can go from what the config list selects"
            raise ConfigError(what, "Ask for less, select more layers, or raise max_sparsity_per_layer")
        return self._noted(ranking, ranking.reaching(cost, target, self.rounding))

    def _ranking(self, names: list[str], order: Literal["global", "even"]) -> Ranking:
        scores = {name: self.scores[name] for name in names}
        return Ranking(scores, self.most, self.round_to, order, comparable=self.comparable)

    def _noted(self, ranking: Ranking, steps: int) -> dict[str, int]:
        """Returns the counts after some steps, and notes which names have lost all that they may."""
        counts = ranking.counts(steps)
        for name, left in counts.items():
            if left == ranking.least[name]:
                capped = self.most.get(name, 1.0) < 1.0
                self.notes[name] = f"max_sparsity_per_layer is {self.most[name]:g}" if capped else "the last channels of a group stay"
        return counts
