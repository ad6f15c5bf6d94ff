"""Searches by the samplers of optuna (Akiba et al., arXiv 1907.10902), whose storage many processes and machines can share.

Samplers: "tpe" (tree-structured Parzen estimator, Bergstra et al. 2011), "cma-es" (Hansen, arXiv 1604.00772), "nsga-ii" (Deb et al. 2002;
with a second measure to minimise, a front of scores against it) and "random".

The storage is the only state. Every process asks it for a trial, evaluates that and tells the storage; a process that is killed leaves a
trial unfinished, which the next process on the machine takes over. Proposals depend on the finished trials, the seed and the number of
the trial, and so do the random numbers that a trial sees: a study that was interrupted ends as if it had not been. (Several processes
finish their trials in another order each time, so that only one process by itself gives the same study twice.)
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import numpy as np
from torch import nn

from graphprune.errors import ConfigError, FileError, nearest
from graphprune.runs.checkpoint import plain
from graphprune.runs.progress import ticking
from graphprune.search.base import SearchResult, best, said
from graphprune.search.objective import Objective, Sparsities, Trial
from graphprune.search.storages import INSTALL, NOBODY, is_dead, opened, optuna_package, owner_of_this_process, quietly
from graphprune.sensitivity.bench import finite, same_random
from graphprune.training.session import check_count

if TYPE_CHECKING:
    import optuna

Sampler: TypeAlias = Literal["tpe", "cma-es", "nsga-ii", "random"]
Measure: TypeAlias = Callable[[nn.Module], float]
"""From a shrunk model to what is to be small, such as milliseconds."""

_RECORD, _OWNER, _SETTINGS, _MEASURED = "graphprune.trial", "graphprune.owner", "graphprune.settings", "graphprune.measured"
_WHOLE = 0.5  # below 0, as far as this share of its limit, a parameter says that its group stays whole: good points have such groups


@dataclass(frozen=True)
class Point:
    """A trial on the Pareto front.

    Attributes:
        trial: the trial.
        measured: its MACs, its parameters, or what the measure gave.
    """

    trial: Trial
    measured: float


@dataclass(frozen=True)
class StudyResult(SearchResult):
    """What a study found.

    Attributes:
        front: the trials that no other beats in score and measure both, the smallest measure first; none without a measure.
        measured: number of a trial -> its MACs, its parameters, or what the measure gave; none without a measure.
    """

    front: tuple[Point, ...] = ()
    measured: Mapping[int, float] = field(default_factory=dict)

    def _measures(self) -> tuple[Mapping[int, float], list[Trial]]:
        return self.measured, [point.trial for point in self.front]


class Study:
    """A search by one of optuna's samplers.

    Args:
        objective: what is searched. For a front against MACs or parameters, one without a budget: under a budget these are all the same.
        sampler: see the module.
        storage: where the study is kept: the path of a SQLite file, or the URL of any database that optuna knows, such as
            ``postgresql://...``; None keeps it in memory.
        name: of the study within the storage.
        seed: of the sampler, and of the random numbers that a trial sees.
        minimize: a second measure that is to be small: "macs", "params", or a function of the shrunk model. Makes the study one of two
            objectives, which "tpe", "nsga-ii" and "random" can search.
        options: of the optuna sampler, such as {"n_startup_trials": 20} or {"population_size": 16}.
        settings: what else the scores depend on, as plain values, such as the name of the data: a storage goes on with the same alone.

    Attributes:
        study: the optuna study, for all that optuna can do with it.

    Raises:
        ConfigError: optuna is not installed, or an argument is not usable.
        FileError: the storage cannot be opened, or holds a study of that name with other settings.
    """

    def __init__(
        self,
        objective: Objective,
        sampler: Sampler = "tpe",
        *,
        storage: str | os.PathLike[str] | None = None,
        name: str = "graphprune",
        seed: int = 0,
        minimize: Literal["macs", "params"] | Measure | None = None,
        options: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        if minimize is not None and not callable(minimize) and minimize not in ("macs", "params"):
            raise ConfigError(f"minimize is {minimize!r}", "Use 'macs', 'params', or a function from a model to a number")
        if minimize is not None and sampler == "cma-es":
            raise ConfigError("the sampler 'cma-es' has one objective only, and minimize= is a second", "Use 'nsga-ii' or 'tpe'")
        self.objective, self.sampler, self.minimize = objective, sampler, minimize
        self.seed = check_count(seed, "seed", 0)
        self._options = dict(options or {})
        self._pending: optuna.Trial | None = None
        self._sampler(0)  # says what is wrong with it
        named = minimize if minimize is None or isinstance(minimize, str) else "measured"
        known = {**objective.settings(), "sampler": sampler, "seed": seed, "minimize": named, **(settings or {})}
        with quietly():
            self.study = opened(storage, name, 1 if minimize is None else 2)
            self._require_mine(plain(known, "settings"))

    def _require_mine(self, settings: dict[str, Any]) -> None:
        theirs = self.study.user_attrs.get(_SETTINGS)
        if theirs is None:
            self.study.set_user_attr(_SETTINGS, settings)
            return
        different = next((name for name in {**theirs, **settings} if theirs.get(name) != settings.get(name)), None)
        if different is not None:
            what = f"the storage holds a study {self.study.study_name!r} with other settings: {different} differs"
            raise FileError(what, f"Give the same {different}, or another name=")

    # -- one trial ---------------------------------------------------------------------------------------------------------------

    def propose(self) -> Sparsities:
        """Returns what to try next: the trial of a process that was killed, or a new one; the first has the same sparsity everywhere."""
        with quietly():
            known = self._trials()
            trial = self._abandoned(known)
            if trial is None:
                if not any(t.state.name == "WAITING" for t in known):  # a trial that is asked for has an owner from the start
                    first = {} if known else dict.fromkeys(self.objective.groups, min(0.5, *self.objective.most.values()))
                    self.study.enqueue_trial(first, user_attrs={_OWNER: owner_of_this_process()})
                trial = self.study.ask()
            if trial.user_attrs.get(_OWNER) != owner_of_this_process():
                trial.set_user_attr(_OWNER, owner_of_this_process())
            self._pending = trial
            return self._suggested(trial)

    def _suggested(self, trial: optuna.Trial) -> dict[str, float]:
        """Returns what a trial is to try: the same, whoever asks and however much of it the storage holds already."""
        self.study.sampler = self._sampler(trial.number)
        _ = trial.relative_params  # what is drawn together is drawn here, before what is drawn one by one
        out = {}
        for index, (name, most) in enumerate(self.objective.most.items(), 1):
            self.study.sampler = self._sampler(trial.number, index)
            out[name] = max(0.0, trial.suggest_float(name, -_WHOLE * most, most))
        return out

    def tell(self, sparsities: Sparsities, score: float) -> None:
        """Hears the score of what was proposed last.

        Raises:
            ConfigError: nothing was proposed.
        """
        if self._pending is None:
            raise ConfigError("a study was told a score before it proposed anything", "Call propose() first")
        self._finish(Trial(self._pending.number, dict(sparsities), score, self.objective.cost(sparsities), 0.0))

    def state(self) -> dict[str, Any]:
        """Returns the name of the study: its storage holds the rest."""
        return {"study": self.study.study_name}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Does nothing, as the storage is where it was.

        Raises:
            FileError: the state is of another study.
        """
        if state.get("study") != self.study.study_name:
            raise FileError(f"the state is of the study {state.get('study')!r}, not of {self.study.study_name!r}", "Open that one")

    def _finish(self, trial: Trial) -> None:
        """Writes a trial down."""
        assert self._pending is not None  # noqa: S101 (for the type checker; callers have looked)
        values = [trial.score]
        if self.minimize is not None:
            values.append(self._measured(trial))
            self._pending.set_user_attr(_MEASURED, values[-1])
        self._pending.set_user_attr(_RECORD, trial.to_dict())
        with quietly():
            self.study.tell(self._pending, values, skip_if_finished=True)
        self._pending = None

    def _measured(self, trial: Trial) -> float:
        if callable(self.minimize):
            value = self.minimize(self.objective.small(trial.sparsities).eval())
            return finite(value, f"minimize= returned for trial {trial.number}", "Return a high finite number where a model is of no use")
        return float(getattr(trial.cost, str(self.minimize)))

    def _abandoned(self, known: list[Any]) -> optuna.Trial | None:
        """Returns a trial that a process of this machine did not finish before it died."""
        for frozen in known:
            if frozen.state.name == "RUNNING" and is_dead(frozen.user_attrs.get(_OWNER, "")):
                return cast("optuna.Trial", optuna_package().Trial(self.study, frozen._trial_id))  # noqa: SLF001 (what the class is made from)
        return None

    def _sampler(self, number: int, parameter: int = 0) -> Any:
        """Returns the sampler of one trial, or of one of its parameters, with random numbers of its own."""
        samplers = optuna_package().samplers
        if self.sampler == "cma-es" and importlib.util.find_spec("cmaes") is None:
            raise ConfigError("the sampler 'cma-es' needs the package cmaes, which is not installed", INSTALL)
        known = {"tpe": "TPESampler", "cma-es": "CmaEsSampler", "nsga-ii": "NSGAIISampler", "random": "RandomSampler"}
        if self.sampler not in known:
            raise ConfigError(
                f"no sampler is called {self.sampler!r}", nearest(self.sampler, known) or f"Use {', '.join(get_args(Sampler))}"
            )
        try:
            seed = int(np.random.SeedSequence([self.seed, number, parameter]).generate_state(1)[0])
            return getattr(samplers, known[self.sampler])(**{"seed": seed, **self._options})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the sampler {self.sampler!r} cannot be made with these options: {error}", "See optuna.samplers") from error

    # -- many trials -------------------------------------------------------------------------------------------------------------

    def run(self, trials: int, *, progress: bool = False, between: Callable[[], None] | None = None) -> StudyResult:
        """Evaluates until the study has so many trials, those of other processes included, and returns all that are finished.

        Args:
            trials: how many there are to be in all.
            progress: show a bar with scores, sparsity and time left.
            between: is called after every trial; what it raises ends the run.

        Raises:
            ConfigError: see `Objective`.
        """
        seen = len(self.history())
        with ticking(self.study.study_name, trials, seen, shown=progress) as tick:
            for trial in self.trials(trials):
                if progress:
                    found = self.history()
                    tick(said(trial, best(found)), len(found) - seen)  # those of other processes too
                    seen = len(found)
                if between is not None:
                    between()
        return self.result()

    def trials(self, trials: int) -> Iterator[Trial]:
        """Evaluates one trial after the other until the study has so many, those of other processes included, and yields each.

        Args:
            trials: how many there are to be in all.

        Raises:
            ConfigError: see `Objective`.
        """
        check_count(trials, "trials", 1)
        while self._wanted(trials):
            point = self.propose()
            trial = self._pending
            assert trial is not None  # noqa: S101 (propose has set it)
            if not self._counts(trial.number, trials):
                self._give_up(trial)
                return
            try:
                with same_random(int(np.random.SeedSequence([self.seed, trial.number]).generate_state(1)[0]), self.objective.model):
                    found = self.objective(self.objective.project(point), trial.number)
                    self._finish(found)
            except BaseException:
                trial.set_user_attr(_OWNER, NOBODY)  # whoever comes next takes it over
                raise
            yield found

    def _wanted(self, trials: int) -> bool:
        """Returns whether fewer trials than that are finished or being evaluated by the living."""
        known = self._trials("COMPLETE", "RUNNING")
        return len([t for t in known if t.state.name == "COMPLETE" or not is_dead(t.user_attrs.get(_OWNER, ""))]) < trials

    def _counts(self, number: int, trials: int) -> bool:
        """Returns whether a trial is among the first so many: two processes may have asked for the last one."""
        return len([t for t in self._trials("COMPLETE", "RUNNING") if t.number <= number]) <= trials

    def _give_up(self, trial: optuna.Trial) -> None:
        with quietly():
            self.study.tell(trial, state=optuna_package().trial.TrialState.FAIL)
        self._pending = None

    def _trials(self, *states: str) -> list[Any]:
        """Returns the trials in these states, or all."""
        wanted = tuple(optuna_package().trial.TrialState[state] for state in states) or None
        return cast("list[Any]", self.study.get_trials(deepcopy=False, states=wanted))

    def history(self) -> list[Trial]:
        """Returns the finished trials, by their numbers."""
        return [Trial.from_dict(t.user_attrs[_RECORD]) for t in self._trials("COMPLETE")]

    def close(self) -> None:
        """Lets go of the storage."""
        self.study._storage.remove_session()  # noqa: SLF001 (optuna's own processes call it on their storages)
        backend = getattr(self.study._storage, "_backend", None)  # noqa: SLF001 (the storage behind optuna's cache)
        if backend is not None:
            backend.engine.dispose()

    def result(self) -> StudyResult:
        """Returns the finished trials, the best of them, and the front.

        Raises:
            ConfigError: there is none.
        """
        finished = [(Trial.from_dict(t.user_attrs[_RECORD]), t.user_attrs.get(_MEASURED)) for t in self._trials("COMPLETE")]
        found = SearchResult.of(trial for trial, _ in finished)
        points = [Point(trial, float(measured)) for trial, measured in finished if measured is not None]
        return StudyResult(found.best, found.last, found.history, front(points), {p.trial.number: p.measured for p in points})


def front(points: list[Point]) -> tuple[Point, ...]:
    """Returns the points that no other beats in both, the smallest measure first; of equal ones the first."""
    out: list[Point] = []
    for point in sorted(points, key=lambda p: (p.measured, -p.trial.score, p.trial.number)):
        if not out or point.trial.score > out[-1].trial.score:
            out.append(point)
    return tuple(out)
