"""One interface for every search: it proposes sparsities and is told their scores; what runs it keeps the history, on disk if asked to.

propose ──▶ project onto the budget ──▶ shrink, fine-tune, evaluate ──▶ tell ──▶ save ──▶ propose ...
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from graphprune.errors import ConfigError
from graphprune.runs.checkpoint import Run
from graphprune.runs.progress import keep_history
from graphprune.search.objective import Sparsities, Trial
from graphprune.search.showing import bar, plotted, table, tabulated

if TYPE_CHECKING:
    from rich.table import Table


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
        """Returns all that the next proposals depend on, random numbers included, as plain values."""
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
class SearchResult:
    """What a search found.

    Attributes:
        best: the trial with the highest score, the first of equal ones.
        last: the last trial.
        history: all trials, in order.
    """

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

    def table(self) -> Table:
        """Returns the trials as a table for the terminal: score, cost, seconds, and which were better than all before."""
        return table(self.history)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws score over trial and score over MACs into a file (PNG, SVG or PDF, by its ending).

        Raises:
            ConfigError: matplotlib is not installed.
            FileError: the file cannot be written.
        """
        plotted(self.history, path, {}, ())

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes one line per trial: its number, score, cost, seconds, and the sparsity of every group.

        Raises:
            FileError: the file cannot be written.
        """
        tabulated(self.history, path, {})

    def __rich__(self) -> Table:
        """Returns the table."""
        return self.table()


def best(trials: Iterable[Trial]) -> Trial:
    """Returns the trial with the highest score, the first of equal ones."""
    return max(trials, key=lambda trial: (trial.score, -trial.number))


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
    saved = kept.load()
    history: list[Trial] = []
    if saved is not None:
        history = [Trial.from_dict(plain) for plain in saved.state["history"]]
        search.restore(saved.state["search"])
    known = len(history)
    with bar(kind, trials, history, shown=progress) as shows:
        while len(history) < trials:
            trial = objective(objective.project(search.propose()), len(history))
            search.tell(trial.sparsities, trial.score)
            history.append(trial)
            if folder is not None:
                kept.save({"history": [t.to_dict() for t in history], "search": search.state()})
            shows(trial, best(history))
    result = SearchResult.of(history[:trials])
    keep_history(result, folder, kind, anew=len(history) > known)
    return result
