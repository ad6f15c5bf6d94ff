"""How ``sensitivity`` and ``search`` score models: on the user's data, all by names, so that other processes can make the same anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, cast

import typer

from graphprune.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from graphprune.cli.loading import Loaded, Request
    from graphprune.pruners.budgets import Budget
    from graphprune.search.evaluators import DataEvaluator, Metric
    from graphprune.search.objective import Objective


class MetricName(str, Enum):
    """How a model is scored, higher = better."""

    accuracy = "accuracy"
    loss = "loss"


Data: TypeAlias = Annotated[
    str, typer.Option("--data", metavar="NAME", help="Batches to score on: package.module:callable or path/file.py:callable.")
]
MetricOption: TypeAlias = Annotated[
    MetricName | None, typer.Option("--metric", help="Score by accuracy, or by minus the loss. Default: the loss where one is given.")
]
Limit: TypeAlias = Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Score on the first N batches alone.")]
Config: TypeAlias = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Config list, a JSON file: which layers, and the most that each may lose.")
]
Processes: TypeAlias = Annotated[int, typer.Option("--processes", min=1, metavar="N", help="How many processes evaluate at once.")]


@dataclass(frozen=True)
class Scoring:
    """How models are scored.

    Attributes:
        data: name of the batches, see `data.batches`.
        metric: "accuracy" or "loss".
        loss: name of the loss, see `data.loss_named`, or None.
        limit: use so many batches and no more.
        seed: of what the user's modules draw.
    """

    data: str
    metric: str
    loss: str | None
    limit: int | None
    seed: int

    @classmethod
    def asked(cls, data: str, metric: MetricName | None, loss: str | None, limit: int | None, seed: int) -> Scoring:
        """Returns what the options ask for: the loss is the metric where one is given and nothing else is said.

        Raises:
            ConfigError: the metric is a loss, and there is none.
        """
        kind = (metric or (MetricName.loss if loss else MetricName.accuracy)).value
        if kind == "loss" and loss is None:
            raise ConfigError("--metric loss is given without a loss", "Name one, as in --loss cross_entropy")
        return cls(data, kind, loss, limit, seed)

    def evaluator(self) -> DataEvaluator:
        """Returns the evaluator, which holds the batches and the loss.

        Raises:
            InputError, ConfigError: there is nothing of these names, or it cannot be used.
        """
        from graphprune.cli.data import batches, loss_named
        from graphprune.search.evaluators import DataEvaluator

        lost = loss_named(self.loss, self.seed) if self.loss else None
        return DataEvaluator(batches(self.data, self.seed), cast("Metric", self.metric), lost, self.limit)

    def facts(self) -> dict[str, Any]:
        """Returns what was asked for, for JSON."""
        return {"data": self.data, "metric": self.metric, "loss": self.loss, "limit": self.limit}


class Scorer:
    """Scores models, here or in another process, where the batches are made anew.

    A process that unpickles it imports the file that the model's class is defined in, which it could not find by itself.

    Args:
        model: the name of the model, see `sources.find`.
        scoring: how models are scored.

    Attributes:
        evaluator: what does the work.
    """

    def __init__(self, model: str, scoring: Scoring) -> None:
        from graphprune.cli.sources import find

        find(model, scoring.seed)
        self.evaluator = scoring.evaluator()
        self._names = (model, scoring)

    def __call__(self, model: nn.Module) -> float:
        """Returns the score of a model, higher = better."""
        return self.evaluator(model)

    def __reduce__(self) -> tuple[type[Scorer], tuple[str, Scoring]]:
        """Returns the names alone."""
        return Scorer, self._names


@dataclass(frozen=True)
class Recalibration:
    """Re-estimates a model's BatchNorm statistics in place, see `graphprune.recalibrate`.

    Attributes:
        batches: as of `DataEvaluator`.
        limit: use so many batches and no more.
    """

    batches: Iterable[Any]
    limit: int | None = None

    def __call__(self, model: nn.Module) -> None:
        """Does so."""
        from graphprune.data.sources import split_batch
        from graphprune.training.calibration import recalibrate

        recalibrate(model, (split_batch(batch)[0] for batch in islice(self.batches, self.limit)))


@dataclass(frozen=True)
class Space:
    """What is searched, by names; every process makes its own `Objective` of it.

    Attributes:
        request: the model.
        scoring: how it is scored.
        criterion: says which channels go first.
        budget: what must go, or None.
        entries: the config list, or None for all layers.
        recalibrates: whether BatchNorm statistics are re-estimated before a model is scored.
    """

    request: Request
    scoring: Scoring
    criterion: str
    budget: Budget | None
    entries: list[Any] | None
    recalibrates: bool

    def __call__(self) -> Objective:
        """Returns the objective."""
        return self.objective(self.request.load(), self.scoring.evaluator())

    def objective(self, loaded: Loaded, evaluator: DataEvaluator) -> Objective:
        """Returns the objective of a model that is built already."""
        from graphprune.search.objective import Objective

        return Objective(
            loaded.model, loaded.inputs, evaluator, config_list=self.entries, criterion=self.criterion, **self.options(evaluator)
        )

    def options(self, evaluator: DataEvaluator) -> dict[str, Any]:
        """Returns what searches by any name take by keyword."""
        tune = Recalibration(evaluator.batches, evaluator.limit) if self.recalibrates else None
        return {"budget": self.budget, "data": evaluator.batches, "loss": evaluator.loss, "finetune": tune}

    @property
    def demanding(self) -> bool:
        """Whether the budget or the config list says how much is to go."""
        from graphprune.pruners.config import AMOUNTS

        amounts = any(key in entry for entry in self.entries or () if isinstance(entry, Mapping) for key in AMOUNTS)
        return self.budget is not None or amounts

    def prepare(self, model: nn.Module, evaluator: DataEvaluator) -> None:
        """Does to a shrunk model what was done to it before it was scored."""
        tune = self.options(evaluator)["finetune"]
        if tune is not None:
            tune(model)
