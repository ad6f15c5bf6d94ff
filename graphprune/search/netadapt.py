"""NetAdapt (Yang et al., NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications, arXiv 1804.03230, algorithm 1).

present model ──▶ for every group, the fewest channels whose loss saves the step ──▶ shrink, fine-tune shortly, evaluate each
      ▲                                                                                             │
      └──────────────────────────── the proposal with the best score, its weights included ◀───────┘
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from graphprune.criteria.base import Criterion
from graphprune.criteria.scoring import score_groups
from graphprune.errors import ConfigError
from graphprune.masks.channels import Masks, tensors_of
from graphprune.masks.copying import copied
from graphprune.pruners.budgets import first_met, keep_highest
from graphprune.pruners.config import AMOUNTS
from graphprune.pruners.options import FORMER_RUN
from graphprune.runs.checkpoint import Run
from graphprune.runs.progress import ticking
from graphprune.search.base import SearchResult, said
from graphprune.search.base import best as best_of
from graphprune.search.measured import MeasuredCost
from graphprune.search.objective import Constraint, Trial
from graphprune.search.pruner import Mode, SearchOptions, SearchPruner, require_constraints
from graphprune.search.scattering import filled, scattered
from graphprune.sensitivity.bench import finite, same_random
from graphprune.sensitivity.scoreboard import name_of
from graphprune.speedup.speedup import speedup
from graphprune.training.keeping import held
from graphprune.training.packing import load, save

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from typing_extensions import Unpack

    Kept: TypeAlias = dict[str, NDArray[np.bool_]]

_KIND = "netadapt"
_STATE = ("history", "steps", "reason", "_proposals", "_first", "_admissible", "_kept", "_versions")  # what a run keeps, and the model
_HOW_MUCH = "Pass budget=, such as Budget(macs=0.5), or cost= and target=, or write a 'total_sparsity'"
_HALVINGS = 40  # of a step that no group can save; after so many, no channel saves anything
_ROUNDING = 1e-9  # relative; what a share such as 1 - 0.9 adds in its last bits
_FORMER = {
    **FORMER_RUN,
    "finetune": "short_term_fine_tuner=, which is given every proposal",
    "keep_class": "nothing: the widths of other groups would change with those of one",
    "reconstruct": "short_term_fine_tuner=, which is given every proposal",
}


@dataclass(frozen=True)
class Step:
    """One iteration: the proposal that was kept.

    Attributes:
        number: of the iteration, from 0.
        group: which group lost channels.
        removed: how many.
        asked: the cost that every proposal had to come down to.
        before: the cost at the beginning, in the budget's unit.
        after: the cost of the proposal that was kept.
        trial: its number in the history.
        score: its score, after the short fine-tuning.
    """

    number: int
    group: str
    removed: int
    asked: float
    before: float
    after: float
    trial: int
    score: float


@dataclass(frozen=True)
class _Proposal:
    """What one group would lose: how many channels it is left with, what the model then costs, and what it had to cost at most."""

    group: str
    left: int
    asked: float
    before: float
    after: float


class NetAdaptPruner(SearchPruner):
    """Shrinks a model step by step; each step is taken where the shortly fine-tuned model scores best.

    Every iteration asks for a further share of the whole model's cost. For each group, the fewest channels that save it are removed from a
    copy of the present model, which is fine-tuned shortly and evaluated; the best copy becomes the present model. Where no group alone can
    save the step, it is halved until one can. The search ends when the budget is met. Long-term fine-tuning of the result is the caller's.

    Differs from the pruner of the seeds, which removed weights without any budget in MACs or latency, took the next layer in the order of
    names for the one that reads a layer's channels, and did not end where no layer could save a step.

    Args:
        model, config_list, evaluator, optimize_mode: see `SearchPruner`; with `cost=`, entries say only which layers lose channels.
        short_term_fine_tuner: trains the shrunk copy in place; None trains nothing. Optimizers are made anew from its parameters.
        base_algo: see `SearchPruner`; the criterion is asked anew in every iteration.
        sparsity_per_iteration: the share of the whole cost that the first iteration saves, in (0, 1). What single channels save should be
            less: proposals are compared by their scores alone, which is fair where all save about as much.

    Keyword Args:
        decay: what the step is multiplied with after every iteration, in (0, 1].
        cost: in place of a budget: from a shrunk model to what it costs, such as `graphprune.OnnxLatency`, its measured milliseconds; fewer
            channels should not cost more. It is asked once for every combination of widths that is looked at.
        target: of `cost`: what to come down to, in its unit. A run that is continued must be given the same number.
        options: see `SearchOptions`, without keep_class, reconstruct and finetune. All proposals of one iteration see the same random
            numbers; the bar's total is an estimate.

    Attributes:
        steps: one `Step` per iteration.
        reason: why the search ended.

    Raises:
        ConfigError, InputError: see `SearchPruner`.
    """

    former = _FORMER

    def __init__(  # noqa: PLR0913 (the call shape of the seeds)
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        short_term_fine_tuner: Callable[[nn.Module], object] | None,
        evaluator: Callable[[nn.Module], float],
        optimize_mode: Mode = "maximize",
        base_algo: str | Criterion = "l1",
        sparsity_per_iteration: float = 0.05,
        *,
        decay: float = 1.0,
        cost: Callable[[nn.Module], float] | None = None,
        target: float | None = None,
        **options: Unpack[SearchOptions],
    ) -> None:
        if not (0 < sparsity_per_iteration < 1 and 0 < decay <= 1):
            what = f"sparsity_per_iteration is {sparsity_per_iteration!r} and decay is {decay!r}"
            raise ConfigError(what, "Give a share in (0, 1), such as 0.05, and a factor in (0, 1]")
        if (cost is None) != (target is None) or (cost is not None and options.get("budget") is not None):
            given = {"budget": options.get("budget"), "cost": cost, "target": target}
            what = f"{type(self).__name__} is given {' and '.join(f'{n}=' for n, v in given.items() if v is not None)}"
            raise ConfigError(what, "Give either budget=, or cost= and target= (what to come down to)")
        places = config_list if cost is None else [{k: v for k, v in entry.items() if k not in AMOUNTS} for entry in config_list]
        super().__init__(model, places, evaluator, optimize_mode, base_algo, **options)
        self.finetune = short_term_fine_tuner
        self.step, self.decay = sparsity_per_iteration, decay
        self.history: tuple[Trial, ...] = ()
        self.steps: tuple[Step, ...] = ()
        self.reason = ""
        self._present = copied(model, {})
        self._kept: Kept = {n: np.ones(s.size, dtype=bool) for n, s in self.objective.scores.items()}
        self._versions: dict[str, tuple[Mapping[str, Tensor], Kept]] = {}  # "leader": the best of this iteration; "best": see `_best`
        self._proposals: tuple[_Proposal, ...] = ()
        self._first = 0  # the number of this iteration's first trial
        self._admissible: tuple[int, ...] = ()  # the numbers of the trials that meet the budget
        self._measured = None if cost is None else MeasuredCost(self.objective, cost)
        self.constraints = self.objective.constraints if self._measured is None else (self._measured.constraint(float(target or 0.0)),)
        require_constraints(self.constraints, type(self).__name__, _HOW_MUCH)

    # -- results -----------------------------------------------------------------------------------------------------------------

    def _search(self) -> SearchResult:
        """Runs the trials that are missing.

        The best trial is the best of those that meet the budget; the last one is the one that was kept in the last iteration.
        """
        if not self.reason:
            self._run()
            if not self._met(self._counts()):
                warnings.warn(f"{type(self).__name__} ended before its budget was met: {self.reason}", stacklevel=3)
        if not self.history:
            raise ConfigError("the model meets the budget as it is", "Ask for less")
        return SearchResult(self._best(), self.history[self.steps[-1].trial], self.history)

    def compress(self) -> tuple[nn.Module, Masks]:
        """Returns (the best model with its shortly fine-tuned weights, masked and in its original shapes, the masks)."""
        self.search()
        found, kept = self._version("best") if self._admissible else (self._present, self._kept)
        masks = Masks(self.objective.graph, kept)
        return masks.masked(found), masks

    def _best(self) -> Trial:
        admissible = [self.history[number] for number in self._admissible]
        return best_of(admissible) if admissible else self.history[self.steps[-1].trial]

    # -- the loop ----------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Takes steps until the budget is met or nothing can go."""
        run = Run(self._folder, _KIND, self._settings())
        self._restore(run)
        before = len(self.history)
        steps = max(math.ceil((1.0 - c.target / c.of(self.objective.sizes)) / self.step) for c in self.constraints)
        with ticking(_KIND, steps * len(self.objective.groups), before, shown=self._progress) as tick:
            while not self.reason:
                if not self._proposals:
                    self.reason = "the budget is met" if self._met(self._counts()) else self._propose()
                elif len(self.history) < self._first + len(self._proposals):
                    trial = self._try(self._proposals[len(self.history) - self._first])
                    tick(said(trial, best_of(self.history)))
                else:
                    self._keep_leader()
                self._save(run)
        if self.history:
            SearchResult.of(self.history).keep(self._folder, _KIND, anew=len(self.history) > before)

    def _propose(self) -> str:
        """Finds what each group must lose to save the step; returns why nothing can, or ""."""
        counts, self._first = self._counts(), len(self.history)
        share = self.step * self.decay ** len(self.steps)
        for _ in range(_HALVINGS):
            found = []
            for constraint in self.constraints:
                before = constraint.of(counts)
                if before <= constraint.target * (1.0 + _ROUNDING):
                    continue
                asked = max(before - share * constraint.of(self.objective.sizes), constraint.target)
                found += [p for n in constraint.names if (p := self._smallest(constraint, counts, n, asked, before)) is not None]
            if found:
                self._proposals = tuple(found)
                return ""
            share /= 2.0
        return "no group can lose a channel that saves anything"

    def _smallest(self, constraint: Constraint, counts: Mapping[str, int], name: str, asked: float, before: float) -> _Proposal | None:
        """Returns the smallest loss of one group after which the cost is lower, and low enough; None where there is none."""
        enough = min(asked * (1.0 + _ROUNDING), math.nextafter(before, -math.inf))
        unit, fewest = self.objective.pruner.round_to, self.objective.fewest(name)
        left = [k for k in range(counts[name] - 1, fewest - 1, -1) if k % unit == 0 or k == fewest]
        found = first_met(left, lambda k: constraint.of({**counts, name: k}) <= enough)
        return None if found == len(left) else _Proposal(name, left[found], asked, before, constraint.of({**counts, name: left[found]}))

    def _try(self, proposal: _Proposal) -> Trial:
        """Fine-tunes and evaluates one proposal, and remembers its weights where it is the best so far."""
        start, number = time.perf_counter(), len(self.history)
        kept = self._narrowed({proposal.group: proposal.left})
        masks = Masks(self.objective.graph, kept)
        with same_random(self.seed + len(self.steps), self.objective.model, self._present):
            if self.objective.physical:
                small = speedup(self._present, masks, verify=False)[0]
                if self.finetune is not None:
                    self.finetune(small)
                state = scattered(self._present, small, masks)
            else:
                small = masks.masked(self._present)
                if self.finetune is not None:
                    with held(small, masks):
                        self.finetune(small)
                state = {n: t.detach().clone() for n, t in tensors_of(small, {}).items()}
            score = finite(self.objective.evaluator(small.eval()))
        counts = {**self._counts(), proposal.group: proposal.left}
        sparsities = {n: (kept[n].size - counts[n]) / kept[n].size for n in self.objective.groups}
        trial = Trial(number, sparsities, score, self.objective.cost(sparsities), time.perf_counter() - start)
        if all(t.score < score for t in self.history[self._first :]):
            self._versions["leader"] = (state, kept)
        self.history = (*self.history, trial)
        if self._met(counts):
            self._admissible = (*self._admissible, number)
            if self._best() is trial:
                self._versions["best"] = (state, kept)
        return trial

    def _keep_leader(self) -> None:
        """Makes the best proposal of the iteration the present model."""
        winner = best_of(self.history[self._first :])
        proposal = self._proposals[winner.number - self._first]
        removed = int(self._kept[proposal.group].sum()) - proposal.left
        taken = Step(len(self.steps), proposal.group, removed, proposal.asked, proposal.before, proposal.after, winner.number, winner.score)
        self._present, self._kept = self._version("leader")
        self.steps, self._proposals = (*self.steps, taken), ()

    # -- models ------------------------------------------------------------------------------------------------------------------

    def _version(self, name: str) -> tuple[nn.Module, Kept]:
        """Returns a version: a copy of the model with its weights, and what is kept of it."""
        state, kept = self._versions[name]
        return filled(self.objective.model, state), kept

    def _narrowed(self, left: Mapping[str, int]) -> Kept:
        """Returns what is kept when some groups are left with so many channels, those that score best with the present weights."""
        pruner, graph = self.objective.pruner, self.objective.graph
        how: dict[str, Any] = {"aggregation": pruner.aggregation, "scope": pruner.scope, "source": pruner.source}
        scores = score_groups(self._present, graph, pruner.criterion, **how).groups
        narrowed = {n: keep_highest(np.where(self._kept[n], scores[n], -np.inf), k) for n, k in left.items()}
        return {**self._kept, **narrowed}

    # -- costs -------------------------------------------------------------------------------------------------------------------

    def _counts(self) -> dict[str, int]:
        return {n: int(self._kept[n].sum()) for n in self.objective.groups}

    def _met(self, counts: Mapping[str, int]) -> bool:
        return all(c.of(counts) <= c.target * (1.0 + _ROUNDING) for c in self.constraints)

    # -- the folder --------------------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """Returns what the result depends on, as plain values."""
        pruner = self.objective.pruner
        how: dict[str, Any] = {"step": self.step, "decay": self.decay, "seed": self.seed, "mode": self.mode}
        how |= {"physical": self.objective.physical, "finetuner": name_of(self.finetune)}
        how |= {"round_to": pruner.round_to, "aggregation": pruner.aggregation, "scope": pruner.scope}
        return {**self.objective.settings(), **how, "constraints": [[c.words, c.target] for c in self.constraints]}

    def _save(self, run: Run) -> None:
        """Writes everything down."""
        state = {name: getattr(self, name) for name in _STATE}
        save(run, _KIND, {**state, "present": self._present, "measured": self._measured and self._measured.known})

    def _restore(self, run: Run) -> None:
        """Puts the search where it was when its process ended."""
        state = load(run)
        if state is None:
            return
        for name in _STATE:
            setattr(self, name, state[name])
        state["present"].fill(self._present)
        if self._measured is not None:
            self._measured.known.update(state["measured"])
