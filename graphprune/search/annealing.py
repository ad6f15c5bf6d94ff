"""Simulated annealing over the groups' sparsities, as the search of AutoCompress (Liu et al., arXiv 1907.03141, section 4).

A candidate is the current point, perturbed and brought back onto the budget. One that is not worse becomes the current point; a worse one
does so with the probability exp(-loss / T) of Metropolis et al. (1953), which falls as the temperature does. What a loss is large
against, only the scores can tell: accuracies differ by hundredths, negated latencies by milliseconds. So T is in units of their observed
spread, the median loss of the last ten candidates that were worse, which shrinks with the perturbations.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graphprune.criteria.base import Criterion
from graphprune.errors import ConfigError
from graphprune.pruners.options import FORMER_RUN
from graphprune.search.base import SearchResult, run
from graphprune.search.objective import Sparsities, Trial
from graphprune.search.pruner import Mode, SearchOptions, SearchPruner, require_constraints
from graphprune.training.session import check_count

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Unpack

HOT, COLD = 4.0, 0.04  # temperatures in units of the spread: a median loss is accepted with probability 0.78 at first, 1e-11 at last
_LEAPS = 0.2  # share of the candidates that may be anywhere: small steps alone end in what is best nearby
_MEMORY = 10  # worse candidates that the spread is the median of
_TRIES, _GROWTH = 50, 1.1  # perturbations until one changes a whole channel, each so much larger than the one before
_FORMER = {
    **FORMER_RUN,
    "pruning_algorithm": "base_algo=, the name of a criterion",
    "pruning_params": "them as keyword arguments",
    "speedup": "nothing: candidates are shrunk before they are evaluated unless physical=False",
    "keep_intermediate_result": "folder=, which keeps every trial",
}
_IN_ORDER = ("pruning_algorithm", "pruning_params", "log_dir", "keep_intermediate_result", "speedup")


@dataclass(frozen=True)
class Move:
    """What became of one candidate.

    Attributes:
        number: of its trial; 0 is the starting point.
        temperature: between start and stop temperature.
        spread: the median loss of the last worse candidates, this one included; 0 before there is any.
        chance: the probability with which it was to be accepted.
        accepted: whether it became the current point.
    """

    number: int
    temperature: float
    spread: float
    chance: float
    accepted: bool


@dataclass(frozen=True)
class Cooling:
    """How the temperature falls.

    Attributes:
        start: temperature of the first candidate.
        stop: below it, no candidate is tried.
        rate: what each candidate multiplies it with, in (0, 1).

    Raises:
        ConfigError: they are no numbers with start > stop > 0 and 0 < rate < 1.
    """

    start: float = 100.0
    stop: float = 20.0
    rate: float = 0.9

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and self.start > self.stop > 0):
            raise ConfigError(f"temperatures from {self.start!r} to {self.stop!r}", "Give a start above a stop above 0, such as 100 and 20")
        if not 0 < self.rate < 1:
            raise ConfigError(f"cool_down_rate is {self.rate!r}", "Give a number between 0 and 1, such as 0.9")

    @classmethod
    def of(cls, start: float, stop: float, rate: float, trials: int | None) -> Cooling:
        """Returns how the temperature falls at a rate, or, where there is a number of trials, in so many.

        Raises:
            ConfigError: a number is not usable.
        """
        made = cls(start, stop, rate)
        return made if trials is None else cls(start, stop, (stop / start) ** (1 / (check_count(trials, "trials", 2) - 1)))

    @property
    def trials(self) -> int:
        """How many trials there are, the starting point included."""
        return 1 + math.ceil(round(math.log(self.stop / self.start) / math.log(self.rate), 9))

    def scale(self, temperature: float) -> float:
        """Returns a temperature in units of the spread: from `HOT` at the start to `COLD` at the stop, evenly in logarithms."""
        done = math.log(self.start / temperature) / math.log(self.start / self.stop)
        return float(HOT * (COLD / HOT) ** min(done, 1.0))


class Annealing:
    """Simulated annealing, as a search.

    Args:
        start: the first point, which is tried as it is.
        most: group name -> the largest sparsity that it may have.
        project: brings a point onto the budget.
        cooling: of the temperature.
        magnitude: the largest change of one group's sparsity at the start; it shrinks with the temperature. One candidate in five leaps
            instead, by changes of any size.
        seed: of perturbations and of acceptance.

    Attributes:
        moves: one record per trial.
    """

    def __init__(
        self,
        start: Sparsities,
        most: Mapping[str, float],
        project: Callable[[Sparsities], Sparsities],
        *,
        cooling: Cooling,
        magnitude: float = 0.35,
        seed: int = 0,
    ) -> None:
        if not 0 < magnitude <= 1:
            raise ConfigError(f"perturbation_magnitude is {magnitude!r}", "Give the largest change of a sparsity, in (0, 1]")
        self.cooling, self.magnitude = cooling, magnitude
        self.moves: tuple[Move, ...] = ()
        self._most, self._project = dict(most), project
        self._generator = np.random.default_rng(seed)
        self._temperature = cooling.start
        self._current = {name: float(start.get(name, 0.0)) for name in most}
        self._score: float | None = None
        self._losses: list[float] = []

    def propose(self) -> Sparsities:
        """Returns the start, and from then on the current point perturbed by whole channels."""
        if self._score is None:
            return self._project(self._current)
        leaps = bool(self._generator.uniform() < _LEAPS)
        reach = 1.0 if leaps else self.magnitude * self._temperature / self.cooling.start
        candidate: Sparsities = self._current
        for _ in range(_TRIES):
            shift = self._generator.uniform(-reach, reach, len(self._current))
            moved = [min(max(value + by, 0.0), self._most[name]) for (name, value), by in zip(self._current.items(), shift, strict=True)]
            candidate = self._project(dict(zip(self._current, moved, strict=True)))
            if dict(candidate) != self._current:
                break
            reach = min(_GROWTH * reach, 1.0)
        return candidate

    def tell(self, sparsities: Sparsities, score: float) -> None:
        """Accepts or refuses the candidate, and cools."""
        chance = 1.0
        if self._score is not None and score < self._score:
            self._losses = [*self._losses, self._score - score][-_MEMORY:]
            chance = math.exp((score - self._score) / (self.cooling.scale(self._temperature) * self._spread))
        accepted = chance == 1.0 or bool(self._generator.uniform() < chance)
        self.moves = (*self.moves, Move(len(self.moves), self._temperature, self._spread, chance, accepted))
        if self._score is not None:
            self._temperature *= self.cooling.rate
        if accepted:
            self._current, self._score = {name: float(sparsities[name]) for name in self._current}, score

    @property
    def _spread(self) -> float:
        return statistics.median(self._losses) if self._losses else 0.0

    def state(self) -> dict[str, Any]:
        """Returns the current point and its score, the temperature, the last losses, the records and the generator."""
        return {
            "current": self._current,
            "score": self._score,
            "temperature": self._temperature,
            "losses": self._losses,
            "moves": self.moves,
            "generator": self._generator.bit_generator.state,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts them back."""
        self._current, self._score = dict(state["current"]), state["score"]
        self._temperature, self._losses = state["temperature"], list(state["losses"])
        self.moves = tuple(state["moves"])
        self._generator.bit_generator.state = state["generator"]


class SimulatedAnnealingPruner(SearchPruner):
    """Finds the sparsity of every group under a budget by simulated annealing.

    Differs from the pruner of the seeds where that hardly searched: temperatures are in units of the score's observed spread, every
    trial cools (not only those that are accepted), one candidate in five is a leap of any size, no order of sparsities by layer size is
    imposed, and candidates that differ from the current point by no channel are not evaluated. The first trial has the same sparsity
    everywhere, so the best is never worse than that.

    Args:
        model, config_list, evaluator: see `SearchPruner`.
        start_temperature: of the first candidate; only its ratio to the stop temperature counts.
        stop_temperature: when to end.
        cool_down_rate: what the temperature is multiplied with after every candidate.
        perturbation_magnitude: the largest change of one group's sparsity at the start; it shrinks with the temperature.
        former: none; what comes here in NNI is refused by name.

    Keyword Args:
        optimize_mode, base_algo: see `SearchPruner`.
        trials: how many models to evaluate in all, in place of a cooling rate.
        options: see `SearchOptions`.

    Attributes:
        moves: one `Move` per evaluation: temperature, spread, chance, whether it was accepted.

    Raises:
        ConfigError, InputError: see `SearchPruner`.
    """

    former, positions = _FORMER, _IN_ORDER

    def __init__(  # noqa: PLR0913 (the call shape of the seeds)
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Callable[[nn.Module], float],
        start_temperature: float = 100.0,
        stop_temperature: float = 20.0,
        cool_down_rate: float = 0.9,
        perturbation_magnitude: float = 0.35,
        *former: object,
        optimize_mode: Mode = "maximize",
        base_algo: str | Criterion = "l1",
        trials: int | None = None,
        **options: Unpack[SearchOptions],
    ) -> None:
        cooling = Cooling.of(start_temperature, stop_temperature, cool_down_rate, trials)
        super().__init__(model, config_list, evaluator, optimize_mode, base_algo, *former, **options)
        require_constraints(self.objective.constraints, type(self).__name__)
        even = dict.fromkeys(self.objective.groups, 0.5)
        space = (even, self.objective.most, self.objective.project)
        self._annealing = Annealing(*space, cooling=cooling, magnitude=perturbation_magnitude, seed=self.seed)
        self._settings = {"cooling": asdict(cooling), "perturbation": perturbation_magnitude, "seed": self.seed, "mode": optimize_mode}

    def _search(self) -> SearchResult:
        how: dict[str, Any] = {"kind": "simulated-annealing", "settings": self._settings}
        return run(self.objective, self._annealing, self._annealing.cooling.trials, self._folder, self._progress, **how)

    @property
    def history(self) -> tuple[Trial, ...]:
        """All trials, in order; none before the search."""
        return self._result.history if self._result is not None else ()

    @property
    def moves(self) -> tuple[Move, ...]:
        """What became of each trial."""
        return self._annealing.moves
