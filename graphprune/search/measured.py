"""A cost that is measured on shrunk models, such as latency, in place of one that is forecast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from graphprune.errors import ConfigError
from graphprune.masks.channels import Masks
from graphprune.pruners.budgets import keep_highest
from graphprune.search.objective import Constraint, Objective
from graphprune.sensitivity.bench import finite
from graphprune.speedup.speedup import speedup

if TYPE_CHECKING:
    from torch import nn


class MeasuredCost:
    """Asks a user's function once for each combination of widths.

    Args:
        objective: whose groups lose channels.
        cost: from a shrunk model in evaluation mode to what it costs; the weights are the original ones.

    Attributes:
        known: channels that are left of each group -> cost; a run that is continued must decide by the same numbers.
    """

    def __init__(self, objective: Objective, cost: Callable[[nn.Module], float]) -> None:
        self.objective, self.cost = objective, cost
        self.known: dict[tuple[int, ...], float] = {}

    def __call__(self, counts: Mapping[str, int]) -> float:
        """Returns the cost of the model whose groups are left with so many channels.

        Raises:
            ConfigError: the function returns no finite number.
        """
        key = tuple(counts[name] for name in self.objective.groups)
        if key not in self.known:
            kept = {name: keep_highest(self.objective.scores[name], left) for name, left in counts.items()}
            small = speedup(self.objective.model, Masks(self.objective.graph, kept), verify=False)[0]
            fix = "Return one finite number, lower for a cheaper model"
            self.known[key] = finite(self.cost(small.eval()), "cost= returned", fix)
        return self.known[key]

    def constraint(self, target: float) -> Constraint:
        """Returns that the cost must come down to the target.

        Raises:
            ConfigError: the smallest model costs more.
        """
        least = self({name: self.objective.fewest(name) for name in self.objective.groups})
        if least > target:
            fix = "Ask for less, select more layers, or raise max_sparsity= or max_sparsity_per_layer"
            raise ConfigError(f"target is {target:g}, but the smallest model costs {least:g}", fix)
        return Constraint(self.objective.groups, self, target, f"the cost comes down to {target:g}")
