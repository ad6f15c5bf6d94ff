"""What a search looks for: the score of a model whose groups have lost given shares of their channels, under a budget.

A point of the search space says of every group which share of its channels goes; which channels those are, a criterion decides, whose
scores are computed once. A point is brought onto the budget by one scale for all shares, found by forecasts that take milliseconds, so
that a search spends its time on scores alone.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypedDict

from graphprune.cost.count import Cost
from graphprune.cost.predict import Forecast
from graphprune.criteria import criterion_named
from graphprune.criteria.base import Criterion
from graphprune.errors import ConfigError, nearest
from graphprune.masks.channels import Masks
from graphprune.pruners.base import Pruner
from graphprune.pruners.budgets import Budget, Ranking, keep_highest, kept_count, least_kept
from graphprune.pruners.config import AMOUNTS, check_sparsity
from graphprune.pruners.options import SeenOptions, check_names, showing_data, split
from graphprune.pruners.requests import requests
from graphprune.repair.rebuilding import Reconstruction
from graphprune.runs.checkpoint import digest
from graphprune.runs.records import Column
from graphprune.sensitivity.bench import finite
from graphprune.sizes.watch import Demand, demands
from graphprune.sizes.widths import stated_widths
from graphprune.speedup.speedup import speedup

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn
    from typing_extensions import Unpack

    from graphprune.data.sources import Source

Sparsities: TypeAlias = Mapping[str, float]
"""Group name -> share of its channels that goes, in [0, 1); groups left out are whole."""

_SLOWEST = 1e-9  # pace of a group of sparsity 0: it loses channels when all others are at their limits


@dataclass(frozen=True)
class Trial:
    """One evaluation.

    Attributes:
        number: which one, from 0.
        sparsities: group name -> share of its channels that went.
        score: what the evaluator said, higher = better.
        cost: parameters and MACs of the shrunk model.
        seconds: wall time of shrinking, fine-tuning and evaluating; trials that differ only in this are equal.
    """

    columns: ClassVar[tuple[Column, ...]] = (
        Column("trial", "trial", value=attrgetter("number")),
        Column("score", "score", ".4f"),
        Column("", "sparsity", ".1%", value=attrgetter("sparsity")),
        Column("params", "parameters", ",", value=attrgetter("cost.params")),
        Column("macs", "MACs", ",", value=attrgetter("cost.macs")),
        Column("seconds", "seconds", ".1f"),
    )
    number: int
    sparsities: dict[str, float]
    score: float
    cost: Cost
    seconds: float = field(compare=False)

    @property
    def sparsity(self) -> float:
        """The mean of the groups' sparsities."""
        return sum(self.sparsities.values()) / len(self.sparsities) if self.sparsities else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns the trial as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Trial:
        """Returns the trial that `to_dict` wrote down."""
        return cls(**{**plain, "cost": Cost(**plain["cost"])})


@dataclass(frozen=True)
class Constraint:
    """Groups that lose channels until a cost is low enough.

    Attributes:
        names: the groups.
        cost: from the counts that are left to the cost; of the whole model, or of these groups.
        target: the highest cost that is admissible.
        words: what is asked for, for errors.
    """

    names: tuple[str, ...]
    cost: Callable[[Mapping[str, int]], float]
    target: float
    words: str

    def of(self, counts: Mapping[str, int]) -> float:
        """Returns the cost where groups, others among them, are left with so many channels."""
        return self.cost({name: counts[name] for name in self.names})


class _TrialOptions(TypedDict, total=False):
    """How candidates are tried.

    Attributes:
        finetune: trains the shrunk copy in place, before it is evaluated.
        reconstruct: batches, or a `graphprune.Reconstruction` with its options: layers that read channels that go are fitted to what they
            computed before, by least squares, before a model is shrunk (see `graphprune.reconstruct`). It takes time with every trial.
        physical: evaluate shrunk models (the default); else masked ones, of the original shapes, masked again after fine-tuning.
        max_sparsity: the largest share of its channels that a group may lose, in [0, 1), by default 0.95; entries may say less.
    """

    finetune: Callable[[nn.Module], object] | None
    reconstruct: Reconstruction | Iterable[Any] | Source | None
    physical: bool
    max_sparsity: float


class ObjectiveOptions(_TrialOptions, SeenOptions, total=False):
    """What an `Objective` takes; of `SeenOptions`, the data is for criteria that look at data, and the mode is no ranking of all groups."""


class Objective:
    """Scores models whose groups have lost given shares of their channels.

    Args:
        model: left bit-identical.
        example_inputs: what the model is run on to find its groups, see `Pruner`.
        evaluator: from a model in evaluation mode to a number, higher = better. It is given a copy of its own.

    Keyword Args:
        criterion: says which channels go first: the name of one, or one.
        config_list: which layers lose channels; by default, all that can. Without a budget, the sparsities of its entries are each that
            of all channels of the entry together, and must be met; without any, every point is admissible.
        options: see `ObjectiveOptions`.

    Attributes:
        model: the model.
        graph: its groups.
        groups: the names of the groups that may lose channels, in the model's order.
        most: group name -> the largest share of its channels that it may lose.
        scores: group name -> score per channel, of all groups.
        budget: as given.

    Raises:
        ConfigError: an argument is not usable, nothing can be pruned, or the budget cannot be met.
        InputError: the model cannot run on the example inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: object,
        evaluator: Callable[[nn.Module], float],
        *,
        criterion: str | Criterion = "l1",
        config_list: Sequence[Mapping[str, Any]] | None = None,
        **options: Unpack[ObjectiveOptions],
    ) -> None:
        check_names(type(self), options, ObjectiveOptions)
        own, others = split(options, _TrialOptions)
        max_sparsity = check_sparsity(own.get("max_sparsity", 0.95), "max_sparsity")
        if options.get("mode") in ("normal", "global"):
            raise ConfigError(f"mode is {options['mode']!r}, but a search decides on every group by itself", "Leave mode= out")
        chosen = criterion_named(criterion)
        budget = options.get("budget")
        entries = list(config_list) if config_list is not None else [{"op_types": ["default"]}]
        self._asked = budget is None and any(key in AMOUNTS for entry in entries for key in entry)
        somewhere = budget or (None if self._asked else Budget(macs=0.5))  # with any budget, entries say where and not how much
        given = {"mode": "dependency_aware", **showing_data(others, chosen), "budget": somewhere}
        self.pruner = Pruner(model, entries, chosen, example_inputs, **given)
        self.model, self.graph, self.budget = model, self.pruner.graph, budget
        self.evaluator, self.finetune, self.physical = evaluator, own.get("finetune"), own.get("physical", True)
        self.reconstruct = None if own.get("reconstruct") is None else Reconstruction.of(own["reconstruct"])
        scored = self.pruner.scored()
        self.scores = scored.groups
        found = requests(self.graph, self.pruner.config, self.pruner.cut, self.pruner.selectable, together=True)
        self.most = {n: min(m, max_sparsity) for n, m in found.most.items() if n not in found.whole and n not in scored.unscored}
        self.groups = tuple(self.most)
        if not self.groups:
            raise ConfigError("no group of channels can be pruned of what the config list selects", "Select more layers")
        self._forecast = Forecast(model, self.graph)
        self.constraints = self._constraints(found.entries)

    def _constraints(self, entries: Mapping[int, tuple[float, list[str]]]) -> tuple[Constraint, ...]:
        """Returns what must be met: the budget, or the sparsity of each config entry."""
        if self.budget is not None:
            dense = self._forecast.dense
            target = self.budget.left(float(getattr(dense, self.budget.unit)))
            unit = self.budget.unit
            words = f"the budget removes {self.budget}"
            made = [Constraint(self.groups, lambda counts: float(getattr(self._cost(counts), unit)), target, words)]
        else:
            made = []
            for index, (total, members) in entries.items() if self._asked else ():
                names = tuple(n for n in members if n in self.most)
                target = float(kept_count(sum(self.scores[n].size for n in names), total, self.pruner.rounding))
                words = f"config_list[{index}] removes {total:.1%} of its channels"
                made.append(Constraint(names, lambda counts: float(sum(counts.values())), target, words))
        for constraint in made:
            least = constraint.cost({n: self.fewest(n) for n in constraint.names})
            if least > constraint.target:
                full = constraint.of(self.sizes)
                what = f"{constraint.words}, but at most {1.0 - least / full:.1%} can go"
                raise ConfigError(what, "Ask for less, select more layers, or raise max_sparsity= or max_sparsity_per_layer")
        return tuple(made)

    # -- from shares to channels -------------------------------------------------------------------------------------------------

    @property
    def sizes(self) -> dict[str, int]:
        """How many channels each group that may lose any has."""
        return {name: self.scores[name].size for name in self.groups}

    def fewest(self, name: str) -> int:
        """Returns the fewest channels that a group may be left with."""
        return least_kept(self.scores[name].size, self.most[name], self.pruner.round_to)

    def counts(self, sparsities: Sparsities) -> dict[str, int]:
        """Returns group name -> how many of its channels stay, for every group that may lose any.

        Raises:
            ConfigError: a name is no such group, or a sparsity is no fraction in [0, 1).
        """
        for name, value in sparsities.items():
            if name not in self.most:
                what = f"a search was given a sparsity for {name!r}, which is no group that may lose channels"
                raise ConfigError(what, nearest(name, self.groups) or f"Use {', '.join(self.groups)}")
            check_sparsity(value, f"the sparsity of {name}")
        out = {}
        for name in self.groups:
            asked = kept_count(self.scores[name].size, sparsities.get(name, 0.0), self.pruner.rounding, self.pruner.round_to)
            out[name] = max(asked, self.fewest(name))
        if not self.pruner.keep_class:
            return out
        stated = stated_widths(self.graph, self._demands, self._all(out), self.pruner.round_to)
        if stated.given_up:
            what = f"{', '.join(stated.given_up)} keep all their channels: of keep_class=, no fewer were found in {stated.tries:,} tries"
            warnings.warn(what, stacklevel=3)
        return stated.counts

    @cached_property
    def _demands(self) -> Sequence[Demand]:
        """What the model's code asks of its sizes: the same for every trial."""
        return demands(self.model, self.graph.engine)

    def project(self, sparsities: Sparsities) -> dict[str, float]:
        """Returns sparsities that meet the budget to within one channel, as close as whole channels come to the same proportions.

        All are multiplied by one factor, and end at what their groups may lose at most. Groups of sparsity 0 lose channels only when all
        others are at their limits. What is returned are exact shares of channels, which are projected onto themselves. Where nothing must
        be met, the sparsities are only rounded and limited.

        Raises:
            ConfigError: see `counts`.
        """
        counts = self.counts(sparsities)
        exact = all(float(sparsities.get(n, 0.0)) == self._share(n, k) for n, k in counts.items() if n in self.most)
        for constraint in self.constraints:
            if exact and self._is_met(constraint, counts):
                continue
            pace = {n: max(float(sparsities.get(n, 0.0)), _SLOWEST) for n in constraint.names}
            scores = {n: self.scores[n] for n in constraint.names}
            ranking = Ranking(scores, self.most, self.pruner.round_to, "even", pace=pace)
            counts |= ranking.counts(ranking.reaching(constraint.cost, constraint.target, self.pruner.rounding))
        return {n: self._share(n, counts[n]) for n in self.groups}

    def _share(self, name: str, left: int) -> float:
        """Returns the share of a group's channels that is gone when so many are left."""
        return (self.scores[name].size - left) / self.scores[name].size

    def _is_met(self, constraint: Constraint, counts: Mapping[str, int]) -> bool:
        """Returns whether counts are on the right side of a target and one step of one group leads to the other."""
        own, step = {n: counts[n] for n in constraint.names}, self.pruner.round_to
        cost = constraint.cost(own)
        if self.pruner.rounding == "floor":
            steps = {n: min((k // step + 1) * step, self.scores[n].size) for n, k in own.items()}
            return cost <= constraint.target and any(constraint.cost({**own, n: k}) > constraint.target for n, k in steps.items())
        steps = {n: max((k - 1) // step * step, self.fewest(n)) for n, k in own.items()}
        return cost >= constraint.target and any(constraint.cost({**own, n: k}) < constraint.target for n, k in steps.items())

    def masks(self, sparsities: Sparsities) -> Masks:
        """Returns the masks that keep each group's best channels.

        Raises:
            ConfigError: see `counts`.
        """
        return Masks(self.graph, self._kept(self.counts(sparsities)))

    def cost(self, sparsities: Sparsities) -> Cost:
        """Returns the cost of the shrunk model, as `count` finds it, without shrinking anything.

        Raises:
            ConfigError: see `counts`.
        """
        return self._cost(self.counts(sparsities))

    def _cost(self, counts: Mapping[str, int]) -> Cost:
        return self._forecast.cost(self._kept(counts))

    def _kept(self, counts: Mapping[str, int]) -> dict[str, NDArray[np.bool_]]:
        return {n: keep_highest(self.scores[n], k) for n, k in counts.items() if k < self.scores[n].size}

    def _all(self, counts: Mapping[str, int]) -> dict[str, int]:
        return {g.name: counts.get(g.name, g.channels) for g in self.graph.groups}

    # -- from shares to scores ---------------------------------------------------------------------------------------------------

    def small(self, sparsities: Sparsities) -> nn.Module:
        """Returns a shrunk (or, where `physical` is off, masked) copy of the model, not fine-tuned.

        Raises:
            ConfigError: see `counts`.
        """
        masks = self.masks(sparsities)
        if not self.physical:
            return self.masked(masks)
        full = self.model if self.reconstruct is None else self.masked(masks)
        return speedup(full, masks, verify=False, result="module" if self.pruner.keep_class else "auto")[0]

    def masked(self, masks: Masks) -> nn.Module:
        """Returns a copy of the model with what masks remove zeroed, and with its layers reconstructed where that is asked for."""
        return masks.masked(self.model) if self.reconstruct is None else self.reconstruct(self.model, masks)[0]

    def __call__(self, sparsities: Sparsities, number: int = 0) -> Trial:
        """Returns the trial of these sparsities, as they are: `project` brings them onto the budget.

        Raises:
            ConfigError: see `counts`; or the evaluator returns no finite number.
        """
        start = time.perf_counter()
        small = self.small(sparsities)
        if self.finetune is not None:
            self.finetune(small)
            if not self.physical:
                self.masks(sparsities).apply(small)
        score = finite(self.evaluator(small.eval()), f"the evaluator returned for trial {number}")
        counts = self.counts(sparsities)
        achieved = {n: self._share(n, counts[n]) for n in self.groups}
        return Trial(number, achieved, score, self._cost(counts), time.perf_counter() - start)

    def settings(self) -> dict[str, Any]:
        """Returns what a run that is continued must find unchanged, as plain values: the model's groups, the budget, the limits."""
        targets = [[c.words, c.target] for c in self.constraints]
        criterion = type(self.pruner.criterion).__name__
        weights = digest(dict(self.model.state_dict()))
        known = {"graph": self.graph.fingerprint, "weights": weights, "constraints": targets, "most": self.most, "criterion": criterion}
        return known if self.reconstruct is None else {**known, "reconstruct": self.reconstruct.settings()}
