"""Sensitivity pruning: what each group can lose without harm decides how much it loses, round by round."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import numpy as np

from graphprune.cost.predict import Forecast
from graphprune.criteria import criterion_named
from graphprune.criteria.base import Criterion
from graphprune.errors import ConfigError, nearest
from graphprune.masks.channels import Masks, tensors_of
from graphprune.masks.copying import copied
from graphprune.pruners.base import Pruner
from graphprune.pruners.budgets import Ranking, kept_count
from graphprune.pruners.config import AMOUNTS, check_sparsity
from graphprune.pruners.options import FORMER_RUN, InputOptions, Options, check_evaluator, check_names, showing_data, split
from graphprune.pruners.thresholds import reaching_threshold
from graphprune.runs.checkpoint import Run, digest
from graphprune.sensitivity.bench import Bench, Evaluator
from graphprune.sensitivity.curves import last_admissible
from graphprune.sensitivity.scoreboard import name_of
from graphprune.sensitivity.sensitivity import AnalysisOptions, Asked, EvaluationOptions, Subject, analysed, places
from graphprune.training.keeping import held
from graphprune.training.packing import load, save

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn
    from typing_extensions import Unpack

    from graphprune.groups.graph import DependencyGraph
    from graphprune.masks.elements import ElementMasks

SensitivityMode: TypeAlias = Literal["greedy", "threshold"]
Proportions: TypeAlias = Callable[[float, float, dict[str, dict[float, float]]], Mapping[str, float]]
MAX_RATIO = 0.95  # of what a group has left, the most that it loses in one round
_KIND = "sensitivity-pruner"
_ROUNDING = 1e-9  # relative; what a share such as 1 - 0.9 adds in its last bits
_REFUSED = {
    **FORMER_RUN,
    "keep_class": "Leave it out: the widths of other groups would change with those of one",
}


@dataclass(frozen=True)
class Round:
    """One round of the greedy loop.

    Attributes:
        number: which one, from 1.
        admissible: group -> the share of its remaining channels that it could lose by itself.
        sparsities: group -> the share of its original channels that is gone after this round.
        removed: the share of the weights (with a budget, of the parameters or MACs) that is gone after this round.
        before: the score at its beginning.
        pruned: the score after pruning.
        score: the score after fine-tuning; without a finetuner, that after pruning.
        params: parameters of the shrunk model.
        macs: its multiply-accumulates.
        seconds: wall time; rounds that differ only in this are equal.
    """

    number: int
    admissible: dict[str, float]
    sparsities: dict[str, float]
    removed: float
    before: float
    pruned: float
    score: float
    params: int
    macs: int
    seconds: float = field(compare=False)


class SensitivityOptions(AnalysisOptions, InputOptions, total=False):
    """What `SensitivityPruner` takes by keyword."""


class SensitivityPruner:
    """Prunes groups in proportion to what each can lose by itself, a little at a time, and looks again after every round.

    Mode "greedy" (NNI 1.8): every round measures how the score falls with the sparsity of each group alone, takes of each group the last
    sparsity before the score has first dropped by more than the threshold, scales these down so that `sparsity_per_iter` of the weights
    goes, prunes and fine-tunes. It ends when the target is met, to within one channel, or when no group can lose more; `reason` says which.
    Drops are from the score at the beginning of the round. The weights of a group are those that compute its channels.

    Mode "threshold" (Han et al., arXiv 1506.02626, section 4): single weights go whose magnitude is below the quality parameter, an entry's
    `sparsity`, times the standard deviation of their layer; no evaluator and no example inputs are needed.

    Args:
        model: left bit-identical.
        config_list: which layers lose channels, and the target: a `sparsity` or `total_sparsity`, the same in all entries, is the share of
            the weights of all selected groups that is to go. With a budget, entries say only where.
        evaluator: from a model in evaluation mode to a finite number, higher = better. It is given copies.
        finetuner: trains the model in place; what has been pruned is zeroed before every forward pass and at the end.
        base_algo: says which channels go first: the name of a criterion, or one.
        sparsity_proportion_calc: from the score of the present model, the threshold and {group: {sparsity: score}} to {group: the share of
            its remaining channels that it may lose}; by default, the last admissible sparsities.
        sparsity_per_iter: what goes in a round at most, to within one channel: a share of the weights, or with a budget of its unit.
        acc_drop_threshold: by how much the score may fall with one group pruned alone.
        folder: where rounds and scores are kept; a run that was interrupted goes on there. None keeps nothing.

    Keyword Args:
        mode: see above.
        options: see `SensitivityOptions`; a budget stands in the place of the amounts of the config list. Mode "threshold" heeds
            `example_inputs` alone.

    Attributes:
        graph: the groups; mode "threshold" has none.
        target: the share of the weights, or of the budget's unit, that is to go; mode "threshold" has none.
        history: the rounds so far.
        reason: why the loop ended, "" before it has.

    Raises:
        ConfigError: an argument is not usable.
        InputError: there are no example inputs, or the model cannot run on them.
    """

    def __init__(  # noqa: PLR0913 (NNI's nine, and how the analysis is made)
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Evaluator | None = None,
        finetuner: Callable[[nn.Module], object] | None = None,
        base_algo: str | Criterion = "l1",
        sparsity_proportion_calc: Proportions | None = None,
        sparsity_per_iter: float = 0.1,
        acc_drop_threshold: float = 0.05,
        folder: str | os.PathLike[str] | None = None,
        *,
        mode: SensitivityMode = "greedy",
        **options: Unpack[SensitivityOptions],
    ) -> None:
        if mode not in get_args(SensitivityMode):
            raise ConfigError(f"mode is {mode!r}", nearest(str(mode), get_args(SensitivityMode)) or "Use 'greedy' or 'threshold'")
        check_names(type(self), options, SensitivityOptions, _REFUSED)
        own, others = split(options, EvaluationOptions)
        self.model, self.config_list, self.mode, self.folder = model, config_list, mode, folder
        self.evaluator, self.finetuner = evaluator, finetuner
        self.calc: Proportions = sparsity_proportion_calc or last_admissible
        self.history: tuple[Round, ...] = ()
        self.reason = ""
        self.budget = options.get("budget")
        self.step = check_sparsity(sparsity_per_iter, "sparsity_per_iter")
        self.threshold = float(acc_drop_threshold)
        if self.step == 0.0 or not self.threshold >= 0.0:
            what = f"sparsity_per_iter is {sparsity_per_iter!r} and acc_drop_threshold is {acc_drop_threshold!r}"
            raise ConfigError(what, "Give a share above 0, and a drop of at least 0")
        self.criterion = criterion_named(base_algo)
        stop = self.threshold if sparsity_proportion_calc is None else None  # a user's function is shown all of the curves
        self.asked = Asked.of(own, evaluator, stop, folder)
        self.options = cast("Options", {**showing_data(others, self.criterion), "mode": "dependency_aware"})
        self._kept: dict[str, NDArray[np.bool_]] = {}
        self._present = model
        self._groups: tuple[DependencyGraph, Forecast, float] | None = None
        if mode == "threshold":
            self._elements()  # says what is wrong with the config list or the example inputs
            return
        check_evaluator(type(self).__name__, evaluator, "finetuner= says how to train")
        if evaluator is None:
            raise ConfigError("SensitivityPruner has no evaluator", "Pass evaluator=, a function from a model to its score")
        graph = Pruner(model, config_list, self.criterion, **self.options).graph
        self.options = cast("Options", {**split(self.options, InputOptions)[1], "graph": graph})
        target = self.budget.removed if self.budget is not None else _target(config_list)
        self._groups = (graph, Forecast(model, graph), target)

    @property
    def graph(self) -> DependencyGraph:
        """The model's graph.

        Raises:
            ConfigError: mode "threshold" has none.
        """
        return self._known[0]

    @property
    def target(self) -> float:
        """The share of the weights, or of the budget's unit, that is to go.

        Raises:
            ConfigError: mode "threshold" has none.
        """
        return self._known[2]

    @property
    def _known(self) -> tuple[DependencyGraph, Forecast, float]:
        """The graph, what forecasts costs by it, and the target."""
        if self._groups is None:
            what = "SensitivityPruner in mode 'threshold' masks single weights layer by layer, and knows neither groups nor one target"
            raise ConfigError(what, "Write mode='greedy' to prune groups")
        return self._groups

    def _elements(self) -> ElementMasks:
        return reaching_threshold(self.model, self.config_list, example_inputs=split(self.options, InputOptions)[0].get("example_inputs"))

    # -- results -----------------------------------------------------------------------------------------------------------------

    def compress(self) -> tuple[nn.Module, Masks | ElementMasks]:
        """Returns (the fine-tuned model, masked and in its original shapes, the masks); `speedup` removes what they name.

        A warning says when no group could lose more before the target was met.

        Raises:
            ConfigError: the evaluator returns no finite number, or see `sensitivity`.
            FileError: the folder holds a run with other settings, or cannot be written.
        """
        if self.mode == "threshold":
            elements = self._elements()
            return elements.masked(self.model), elements
        if not self.reason:
            self._run()
            if not self._met(self._removed(self._counts())):
                warnings.warn(f"SensitivityPruner ended before its target of {self.target:.1%}: {self.reason}", stacklevel=2)
        masks = Masks(self.graph, self._kept)
        return masks.masked(self._present), masks

    @property
    def best(self) -> Round | None:
        """The round with the highest score, the first of equal ones; None before the first."""
        return max(self.history, key=lambda r: (r.score, -r.number), default=None)

    @property
    def last(self) -> Round | None:
        """The last round, whose model `compress` returns; None where there was nothing to do."""
        return self.history[-1] if self.history else None

    # -- the loop ----------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Prunes until the target is met or no group can lose more."""
        self._present = copied(self.model, {})
        subject = self._subject()
        self._kept = {n: np.ones(s.size, dtype=bool) for n, s in subject.scores.items()}
        run = Run(self.folder, _KIND, self._settings(subject))
        saved = load(run)
        if saved is not None:
            self.history, self.reason, self._kept = saved["history"], saved["reason"], saved["kept"]
            saved["model"].fill(self._present)
        while not self.reason:
            self.reason = "the target is met" if self._met(self._removed(self._counts())) else self._round()
            save(run, _KIND, {"history": self.history, "reason": self.reason, "kept": self._kept, "model": self._present})

    def _round(self) -> str:
        """Takes one round; returns why no channel can go, or "" where some went."""
        assert self.evaluator is not None  # noqa: S101 (checked when the pruner was made)
        start = time.perf_counter()
        subject = self._subject()
        known = self.history[-1].score if self.history else None
        found = analysed(self._present, subject, self.evaluator, self.asked, self._kept, known)
        ratios = self._ratios(subject, self.calc(found.dense, self.threshold, found.scores()))
        going = {n: r for n, r in ratios.items() if r > 0.0}
        ranking = Ranking({n: subject.scores[n][self._kept[n]] for n in going}, going, subject.pruner.round_to, "even", pace=going)
        if not len(ranking):
            return f"no group can lose more channels with a drop of the score of at most {self.threshold:g}"
        counts = self._counts()
        goal = (1.0 - min(self.target, self._removed(counts) + self.step)) * self._cost(dict.fromkeys(self._kept, 0), whole=True)
        steps = ranking.reaching(lambda left: self._cost({**counts, **left}), goal * (1.0 + _ROUNDING))
        counts |= ranking.counts(max(steps, 1))
        self._kept = {n: subject.mask(n, counts[n], mask) for n, mask in self._kept.items()}
        masks = Masks(self.graph, self._kept)
        masks.apply(self._present)
        bench = Bench(self._present, self.graph, self.evaluator, physical=self.asked.physical, seed=self.asked.seed)
        pruned = bench(self._kept)[0]
        if self.finetuner is not None:
            with held(self._present, masks):
                self.finetuner(self._present)
        score = bench(self._kept)[0] if self.finetuner is not None else pruned
        cost = self._known[1].cost(self._kept)
        sparsities = {n: (mask.size - counts[n]) / mask.size for n, mask in self._kept.items()}
        taken = (ratios, sparsities, self._removed(counts), found.dense, pruned, score, cost.params, cost.macs)
        self.history = (*self.history, Round(len(self.history) + 1, *taken, time.perf_counter() - start))
        return ""

    def _subject(self) -> Subject:
        """Returns the groups, with the scores that the present weights have."""
        entries = self.config_list if self.budget is not None else places(self.config_list)
        return Subject.of(Pruner(self._present, entries, self.criterion, None, **self.options))

    def _ratios(self, subject: Subject, proportions: Mapping[str, float]) -> dict[str, float]:
        """Returns group -> the share of its remaining channels that it may lose in this round, in whole channels."""
        out = {}
        for name, ratio in proportions.items():
            if name not in self._kept:
                raise ConfigError(f"sparsity_proportion_calc returns {name!r}, which is no group", nearest(name, self._kept))
            present = int(self._kept[name].sum())
            share = min(max(float(ratio), 0.0), MAX_RATIO)
            left = max(kept_count(present, share, subject.pruner.rounding, subject.pruner.round_to), subject.fewest(name))
            out[name] = max(present - left, 0) / present
        return out

    # -- how much is gone --------------------------------------------------------------------------------------------------------

    def _counts(self) -> dict[str, int]:
        return {n: int(mask.sum()) for n, mask in self._kept.items()}

    def _met(self, removed: float) -> bool:
        return removed >= self.target - _ROUNDING

    def _removed(self, counts: Mapping[str, int]) -> float:
        """Returns the share of the weights, or of the budget's unit, that is gone with these counts."""
        return 1.0 - self._cost(counts) / self._cost(counts, whole=True)

    def _cost(self, counts: Mapping[str, int], *, whole: bool = False) -> float:
        """Returns the weights (parameters, MACs) that are left with these counts, or those of the whole."""
        if self.budget is not None:
            kept = {n: np.arange(self._kept[n].size) < k for n, k in counts.items() if not whole}
            return float(getattr(self._known[1].cost(kept) if kept else self._known[1].dense, self.budget.unit))
        return float(sum(self.graph.elements(n) * (self._kept[n].size if whole else k) for n, k in counts.items()))

    def _settings(self, subject: Subject) -> dict[str, Any]:
        """Returns what the result depends on."""
        unit = self.budget.unit if self.budget is not None else "weights"
        pruner = subject.pruner
        criterion: Any = self.criterion
        algorithm = repr(criterion) if is_dataclass(criterion) else name_of(criterion)
        return {"graph": self.graph.fingerprint, "weights": digest(tensors_of(self.model, {})), "evaluator": self.asked.name,
                "finetuner": name_of(self.finetuner), "base_algo": algorithm, "target": [unit, self.target], "most": subject.most,
                "proportions": name_of(self.calc), "sparsity_per_iter": self.step, "acc_drop_threshold": self.threshold,
                "sparsities": self.asked.sparsities, "physical": self.asked.physical, "seed": self.asked.seed,
                "rounding": pruner.rounding, "round_to": pruner.round_to, "aggregation": pruner.aggregation, "scope": pruner.scope,
                "cut": pruner.cut}  # fmt: skip


def _target(config_list: Sequence[Mapping[str, Any]]) -> float:
    """Returns the one amount of a config list that has been found usable."""
    amounts = {float(entry[key]) for entry in config_list if not entry.get("exclude") for key in AMOUNTS if key in entry}
    if len(amounts) != 1:
        what = f"the entries of config_list ask for {', '.join(f'{a:g}' for a in sorted(amounts))}, and SensitivityPruner has one target"
        raise ConfigError(what, "Give all entries the same sparsity; max_sparsity_per_layer limits single layers")
    return amounts.pop()
