"""AMC (He et al., AMC: AutoML for Model Compression, arXiv 1802.03494): an agent decides group by group.

for every group in turn:  its features ──▶ the actor's sparsity ──▶ clipped to what the budget allows ──▶ the next group
at the end:               shrink, evaluate ──▶ the score is the reward of every step ──▶ the agent learns ──▶ save
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from math import floor
from typing import TYPE_CHECKING, Any

import torch

from graphprune.cost.predict import Forecast
from graphprune.criteria.base import Criterion
from graphprune.pruners.budgets import first_met, keep_highest
from graphprune.pruners.options import FORMER_RUN
from graphprune.runs.checkpoint import Run
from graphprune.runs.progress import ticking
from graphprune.search.base import SearchResult, said
from graphprune.search.base import best as best_of
from graphprune.search.ddpg import DDPG, Agent, Transition
from graphprune.search.objective import Constraint, Objective, Trial
from graphprune.search.pruner import Mode, SearchOptions, SearchPruner, require_constraints
from graphprune.sensitivity.bench import same_random
from graphprune.sensitivity.scoreboard import name_of
from graphprune.training.packing import load, save
from graphprune.training.session import check_count

if TYPE_CHECKING:
    from torch import Tensor, nn
    from typing_extensions import Unpack

    from graphprune.cost.count import Cost

_KIND = "amc"
FEATURES = ("index", "channels", "elements", "params", "macs", "reduced", "rest", "before")
_FORMER = {
    **FORMER_RUN,
    "keep_intermediate_result": "folder=, which keeps every episode",
    "pruning_algorithm": "base_algo=, the name of a criterion",
    "pruning_params": "them as keyword arguments",
    "target": "budget=, such as Budget(macs=0.5) or Budget(params=0.5)",
    "flops_ratio": "budget=, such as Budget(macs=0.5), the share that goes",
    "channel_round": "round_to=",
    "rbound": "max_sparsity=, one minus the smallest share that stays",
    "lbound": "max_sparsity=, one minus the smallest share that stays",
    "keep_class": "nothing: the widths of other groups would change with those of one",
}


@dataclass(frozen=True)
class Episode:
    """What the agent did in one episode.

    Attributes:
        number: which one, from 0; that of its trial.
        noise: the standard deviation of its actions; 1 where they were drawn evenly, as in warm-up.
        wanted: group name -> the sparsity that the agent wanted, before it was clipped.
        loss: the critic's mean loss in the updates after it; 0 in warm-up.
    """

    number: int
    noise: float
    wanted: dict[str, float]
    loss: float


class Course:
    """The groups in turn: what the agent sees of each, and what it may do.

    Args:
        objective: whose budget is to be met.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self._forecast = Forecast(objective.model, objective.graph)

    @cached_property
    def _fixed(self) -> list[tuple[float, float]]:
        """Of every group the channels, and the elements of the weights that compute one of them."""
        graph = self.objective.graph
        return [(float(graph[name].channels), float(graph.elements(name))) for name in self.objective.groups]

    def features(self, at: int, counts: Mapping[str, int], before: float) -> Tensor:
        """Returns what the agent sees before it acts on a group, numbers in [0, 1] by `FEATURES`, float32.

        Index, channels and elements are relative to the largest of all groups. Parameters and MACs are those of the layers that produce or
        read its channels, with earlier groups pruned, as shares of the whole model's. Reduced is the share of the budget that is done,
        rest the share that this group and later ones could do at most, both of the first constraint that is on the group.

        Args:
            at: index of the group.
            counts: what is left of each group so far.
            before: the action on the group before it.
        """
        name, groups = self.objective.groups[at], self.objective.groups
        channels, elements = self._fixed[at]
        modules = {s.module for s in self.objective.graph[name].slices}
        layers = self._forecast.by_layer(self._kept(counts))
        own: list[Cost] = [cost for layer, cost in layers.items() if layer in modules]
        dense = self._forecast.dense
        now, least, goal = 0.0, 0.0, 1.0
        for constraint in [c for c in self.objective.constraints if name in c.names][:1]:
            full = constraint.of(self.objective.sizes)
            goal = max(full - constraint.target, 1e-12)
            present = constraint.of(counts)
            now, least = full - present, present - constraint.of(self._pruned(counts, at))
        numbers = [
            at / max(len(groups) - 1, 1),
            channels / max(c for c, _ in self._fixed),
            elements / max(1.0, *(e for _, e in self._fixed)),
            sum(c.params for c in own) / max(dense.params, 1),
            sum(c.macs for c in own) / max(dense.macs, 1),
            min(now / goal, 1.0),
            min(least / goal, 1.0),
            before,
        ]
        return torch.tensor(numbers, dtype=torch.float32)

    def limits(self, at: int, counts: Mapping[str, int]) -> tuple[int, int]:
        """Returns the fewest and the most channels that a group may be left with.

        So many at most that the budget can still be met when all later groups lose what they may; so few at least that it is not
        undercut while later groups stay whole, to within one step of the channels.
        """
        name, unit = self.objective.groups[at], self.objective.pruner.round_to
        size, fewest = self.objective.scores[name].size, self.objective.fewest(name)
        options = [size, *(k for k in range(size - 1, fewest - 1, -1) if k % unit == 0 or k == fewest)]
        low, high = [fewest], [size]
        for constraint in self.objective.constraints:
            if name in constraint.names:
                high.append(self._first(options, constraint, name, self._pruned(counts, at + 1)))
                low.append(self._first(options, constraint, name, counts))
        most = min(high)
        return min(max(low), most), most

    def left(self, at: int, sparsity: float, counts: Mapping[str, int]) -> int:
        """Returns how many channels a group is left with at a sparsity: the nearest number of whole steps within its limits.

        Rounded down, as elsewhere, no action above 0 would leave a group whole.
        """
        size, unit = self.objective.scores[self.objective.groups[at]].size, self.objective.pruner.round_to
        least, most = self.limits(at, counts)
        return min(max(floor(size * (1.0 - sparsity) / unit + 0.5) * unit, least), most)

    def _pruned(self, counts: Mapping[str, int], start: int) -> dict[str, int]:
        """Returns counts with as little as possible left of all groups from one on."""
        return {**counts, **{n: self.objective.fewest(n) for n in self.objective.groups[start:]}}

    def _kept(self, counts: Mapping[str, int]) -> dict[str, Any]:
        scores = self.objective.scores
        return {n: keep_highest(scores[n], k) for n, k in counts.items() if k < scores[n].size}

    def _first(self, options: Sequence[int], constraint: Constraint, name: str, counts: Mapping[str, int]) -> int:
        """Returns the first of a group's falling options with which a constraint is met, the last one if it never is."""
        return options[first_met(options[:-1], lambda k: constraint.of({**counts, name: k}) <= constraint.target)]


class AMCPruner(SearchPruner):
    """Finds the sparsity of every group under a budget by an agent that learns from the scores of whole episodes.

    Differs from the pruner of the seeds in that the state is that of the group to come, the replay memory holds a hundred episodes (not a
    hundred steps), all config entries count, and no group needs a limit of its own: actions are clipped to what leaves the budget within
    reach of the later groups, and to what leaves nothing to do for them, so that every episode ends on the budget. Models are shrunk once
    per episode; widths that were evaluated before are not evaluated again. Weights are reconstructed by least squares, as by the paper's
    authors, where `reconstruct` is given.

    Args:
        total_episode: how many episodes there are in all.
        model, config_list, base_algo: see `SearchPruner`.
        evaluator: from a shrunk model to a number, the reward of the episode.
        former: none; what comes here in NNI is refused by name.

    Keyword Args:
        ddpg_params: parameters of the agent by name, see `graphprune.search.ddpg.DDPG`.
        optimize_mode: see `SearchPruner`.
        options: see `SearchOptions`.

    Attributes:
        course: the groups as the agent sees them.
        episodes: one `Episode` per episode, and so per `Trial` of the history.

    Raises:
        ConfigError, InputError: see `SearchPruner`.
    """

    former, positions = _FORMER, ("log_dir",)

    def __init__(
        self,
        total_episode: int,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Callable[[nn.Module], float],
        base_algo: str | Criterion = "l1",
        *former: object,
        ddpg_params: Mapping[str, Any] | None = None,
        optimize_mode: Mode = "maximize",
        **options: Unpack[SearchOptions],
    ) -> None:
        self.total = check_count(total_episode, "total_episode", 1)
        how = DDPG.of(ddpg_params)
        self.how = how if how.warm_up is not None else replace(how, warm_up=max(self.total // 8, 1))
        super().__init__(model, config_list, evaluator, optimize_mode, base_algo, *former, **options)
        require_constraints(self.objective.constraints, type(self).__name__)
        self.course = Course(self.objective)
        self.history: tuple[Trial, ...] = ()
        self.episodes: tuple[Episode, ...] = ()
        self._agent = Agent(len(FEATURES), len(self.objective.groups), self.how, self.seed)
        self._settings = {
            "ddpg": asdict(self.how),
            "seed": self.seed,
            "mode": optimize_mode,
            "finetune": name_of(self.objective.finetune),
            "physical": self.objective.physical,
        }

    # -- episodes ----------------------------------------------------------------------------------------------------------------

    def _search(self) -> SearchResult:
        """Runs all episodes, or those that are missing."""
        run = Run(self._folder, _KIND, {**self.objective.settings(), **self._settings})
        saved = load(run)
        if saved is not None:
            self.history, self.episodes = saved["history"], saved["episodes"]
            self._agent.restore(saved["agent"])
        known, before = {tuple(t.sparsities.values()): t for t in self.history}, len(self.history)
        with ticking(_KIND, self.total, before, shown=self._progress) as tick:
            while len(self.history) < self.total:
                self._episode(known)
                save(run, _KIND, {"history": self.history, "episodes": self.episodes, "agent": self._agent.state()})
                tick(said(self.history[-1], best_of(self.history)))
        SearchResult.of(self.history).keep(self._folder, _KIND, anew=len(self.history) > before)
        return SearchResult.of(self.history[: self.total])

    def _episode(self, known: dict[tuple[float, ...], Trial]) -> None:
        """Goes through all groups once, scores the result and learns."""
        number, objective = len(self.history), self.objective
        warm = self.how.warm_up or 0
        noise = self.how.noise * self.how.noise_decay ** (number - warm) if number >= warm else 1.0
        counts = objective.sizes
        steps: list[Transition] = []
        wanted: dict[str, float] = {}
        state = self.course.features(0, counts, 0.0)
        for at, name in enumerate(objective.groups):
            share = self._agent.act(state, noise) if number >= warm else self._agent.random()
            wanted[name] = share * objective.most[name]
            counts[name] = self.course.left(at, wanted[name], counts)
            done = min((1.0 - counts[name] / objective.scores[name].size) / max(objective.most[name], 1e-12), 1.0)
            last = at + 1 == len(objective.groups)
            following = state if last else self.course.features(at + 1, counts, done)
            steps.append(Transition(state, done, following, last))
            state = following
        trial = self._tried(counts, number, known)
        self._agent.remember(steps, trial.score)
        updates = len(steps) * self.how.updates if number >= warm else 0
        losses = [self._agent.learn() for _ in range(updates)]
        self.history = (*self.history, trial)
        self.episodes = (*self.episodes, Episode(number, noise, wanted, sum(losses) / max(len(losses), 1)))

    def _tried(self, counts: Mapping[str, int], number: int, known: dict[tuple[float, ...], Trial]) -> Trial:
        """Returns the trial of these counts; of widths that were evaluated before, with their score."""
        sparsities = {n: (size - counts[n]) / size for n, size in self.objective.sizes.items()}
        key = tuple(sparsities.values())
        if key in known:
            return replace(known[key], number=number, seconds=0.0)
        with same_random(self.seed, self.objective.model):
            known[key] = self.objective(sparsities, number)
        return known[key]
