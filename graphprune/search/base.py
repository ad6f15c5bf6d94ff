"""One interface for every search: it proposes sparsities and is told their scores; what runs it keeps the history, on disk if asked to.

propose ──▶ project onto the budget ──▶ shrink, fine-tune, evaluate ──▶ tell ──▶ save ──▶ propose ...
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from graphprune.errors import ConfigError
from graphprune.runs.checkpoint import Run
from graphprune.runs.progress import ticking
from graphprune.runs.records import Column, Records, spread
from graphprune.search.objective import Sparsities, Trial
from graphprune.training.packing import load, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Search(Protocol):
    """Decides what to try next."""

    def propose(self) -> Sparsities:
        """Returns what to try next; it need not meet the budget."""
        ...

    def tell(self, sparsities: Sparsities, score: float) -> None:
        """Hears the score of what was proposed last, higher = better.

        Args:
            sparsities: what was evaluated: the proposal, brought onto the budget.
            score: its score.
        """
        ...

    def state(self) -> dict[str, Any]:
        """Returns all that the next proposals depend on, random numbers included; for what can be kept see `Packer.pack`."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Puts the search where it was when `state` returned this."""
        ...


class Target(Protocol):
    """What a search needs of an `Objective`."""

    def project(self, sparsities: Sparsities) -> dict[str, float]:
        """Returns the sparsities, brought onto the budget."""
        ...

    def __call__(self, sparsities: Sparsities, number: int = 0) -> Trial:
        """Returns the trial of these sparsities."""
        ...

    def settings(self) -> dict[str, Any]:
        """Returns what must be as it was where a run is continued."""
        ...


@dataclass(frozen=True)
class SearchResult(Records[Trial]):
    """What a search found; see `Records` for its table, CSV and plot.

    Attributes:
        best: the trial with the highest score, the first of equal ones.
        last: the last trial.
        history: all trials, in order.
    """

    what: ClassVar[str] = "the trials"
    inches: ClassVar[tuple[float, float]] = (10, 4)
    best: Trial
    last: Trial
    history: tuple[Trial, ...]

    @classmethod
    def of(cls, history: Iterable[Trial]) -> SearchResult:
        """Returns the result of these trials.

        Raises:
            ConfigError: there is none.
        """
        trials = tuple(history)
        if not trials:
            raise ConfigError("a search without trials has no result", "Run at least one")
        return cls(best(trials), trials[-1], trials)

    def _measures(self) -> tuple[Mapping[int, float], Sequence[Trial]]:
        """Returns what was measured, by the number of a trial, and the trials that no other beats in score and measure both."""
        return {}, ()

    @property
    def _rows(self) -> Sequence[Trial]:
        return self.history

    @property
    def _columns(self) -> Sequence[Column]:
        """Those of trials, with a mark where one was better than all before, what was measured, and every sparsity."""
        measured, _ = self._measures()
        scores = [t.score for t in self.history]
        marked = {t.number for n, t in enumerate(self.history) if t.score > max(scores[:n], default=-math.inf)}
        mark = Column("", "", value=lambda t: "best so far" if t.number in marked else "")
        extra = [Column("measured", value=lambda t: measured.get(t.number))] if measured else []
        return (*Trial.columns[:2], mark, *extra, *Trial.columns[2:], *spread(self.history, "sparsities"))

    def _draw(self, figure: Figure) -> None:
        """Draws score over trial, with the best so far, and score over MACs or over what was measured, with the front."""
        over_trials, over_cost = figure.subplots(1, 2, sharey=True)
        (measured, front), scores = self._measures(), [t.score for t in self.history]
        numbers = [t.number for t in self.history]
        over_trials.plot(numbers, scores, ".", label="score")
        over_trials.step(numbers, list(accumulate(scores, max)), where="post", label="best so far")
        over_trials.set(xlabel="trial", ylabel="score")
        over_trials.legend()
        over_cost.plot([measured.get(t.number, t.cost.macs) for t in self.history], scores, ".")
        if front:
            over_cost.step([measured[t.number] for t in front], [t.score for t in front], where="post", label="front")
            over_cost.legend()
        over_cost.set(xlabel="measured" if measured else "MACs")


def best(trials: Iterable[Trial]) -> Trial:
    """Returns the trial with the highest score, the first of equal ones."""
    return max(trials, key=lambda trial: (trial.score, -trial.number))


def said(last: Trial, top: Trial) -> str:
    """Returns what the last trial and the best one so far come to, for a bar."""
    return f"score {last.score:.4g}, best {top.score:.4g}, sparsity {last.sparsity:.1%}"


def run(
    objective: Target,
    search: Search,
    trials: int,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,  # noqa: FBT001, FBT002 (the flag that all searches have)
    *,
    kind: str = "search",
    settings: Mapping[str, Any] | None = None,
) -> SearchResult:
    """Runs a search until it has had so many trials, and returns all of them.

    With a folder, every trial is written down before the next begins. A run that was interrupted goes on with the last complete trial
    when it is started again, with the same random numbers, and ends as if it had not been interrupted; a finished one returns at once. In
    the end the trials are written there, as CSV and, by matplotlib, as a plot.

    Args:
        objective: scores proposals.
        search: proposes.
        trials: how many there are to be in all, those of earlier runs in the folder included.
        folder: where the run is kept; None keeps nothing.
        progress: show a bar with scores, sparsity and time left on stderr, where that is a terminal.
        kind: the name of the file within the folder.
        settings: what else the result depends on, as plain values: the search's parameters.

    Raises:
        ConfigError: there is nothing to run, or see `Objective`.
        FileError: the folder holds a run with other settings, or cannot be written.
    """
    kept = Run(folder, kind, {**objective.settings(), **(settings or {})})
    saved = load(kept)
    history: list[Trial] = []
    if saved is not None:
        history = saved["history"]
        search.restore(saved["search"])
    known = len(history)
    with ticking(kind, trials, len(history), shown=progress) as tick:
        while len(history) < trials:
            trial = objective(objective.project(search.propose()), len(history))
            search.tell(trial.sparsities, trial.score)
            history.append(trial)
            if folder is not None:
                save(kept, kind, {"history": history, "search": search.state()})
            tick(said(trial, best(history)))
    result = SearchResult.of(history[:trials])
    result.keep(folder, kind, anew=len(history) > known)
    return result
