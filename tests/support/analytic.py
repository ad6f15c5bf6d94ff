"""A search problem that is solved exactly by trying every point: scores are a formula of the sparsities, costs are those of a network."""

from __future__ import annotations

import itertools
import math
import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune.search.objective import Objective, Sparsities, Trial
from tests.support.operators import Network, conv, filled, images

if TYPE_CHECKING:
    from collections.abc import Iterator

DAMAGE = {"a": 0.2, "b": 1.0, "c": 3.0}  # what losing a group would cost; the MACs that it saves go another way


def network() -> nn.Module:
    """Returns three convolutions and a classifier."""

    def forward(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.fc(F.relu(m.c(F.relu(m.b(F.relu(m.a(x)))))).mean((2, 3)))
        return y

    return filled(Network(forward, {"a": conv(3, 12), "b": conv(12, 20), "c": conv(20, 16, 1), "fc": nn.Linear(16, 5)}))


class Stopped(BaseException):
    """Stands for a process that was killed in the middle of a trial."""


class Analytic(Objective):
    """Scores exp(-sum of damage x sparsity^2), as an accuracy that falls ever faster.

    Args:
        scale: what scores are multiplied with.
        stop_at: the trial in which the process is killed.
        pause: seconds that each trial takes besides.
        options: of the objective.
    """

    def __init__(self, scale: float = 1.0, stop_at: int | None = None, pause: float = 0.0, **options: Any) -> None:
        super().__init__(network(), images(1), lambda _: 0.0, **{"budget": gp.Budget(macs=0.5), **options})
        self.scale, self.stop_at, self.pause = scale, stop_at, pause

    def formula(self, sparsities: Sparsities) -> float:
        """Returns the score."""
        return self.scale * math.exp(-sum(DAMAGE[name[0]] * value**2 for name, value in sparsities.items()))

    def __call__(self, sparsities: Sparsities, number: int = 0) -> Trial:
        """Returns the trial, without shrinking anything."""
        if number == self.stop_at:
            raise Stopped
        time.sleep(self.pause)
        return Trial(number, dict(sparsities), self.formula(sparsities), self.cost(sparsities), self.pause)

    def points(self) -> Iterator[dict[str, float]]:
        """Yields every point of the search space."""
        shares = [[(n, gone / size) for gone in range(size - self.fewest(n) + 1)] for n in self.groups for size in [self.scores[n].size]]
        yield from (dict(point) for point in itertools.product(*shares))

    @cached_property
    def optimum(self) -> float:
        """The best score of all points that meet the budget."""
        target = self.constraints[0]
        ordered = sorted(self.points(), key=self.formula, reverse=True)
        return self.formula(next(p for p in ordered if target.cost(self.counts(p)) <= target.target))

    @property
    def uniform(self) -> float:
        """The score of the same sparsity everywhere."""
        return self.formula(self.project(dict.fromkeys(self.groups, 0.5)))
