"""What a search shows of itself: a bar while it runs, a table and a plot when it is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from rich.table import Table

from graphprune.runs.progress import new_figure, ticking, written, written_csv
from graphprune.search.objective import Trial

Shows: TypeAlias = Callable[[Trial, Trial], None]
"""Is told the last trial and the best one so far."""


@contextmanager
def bar(what: str, total: int, history: Sequence[Trial], *, shown: bool) -> Iterator[Shows]:
    """Shows a bar with the last and the best score, the last sparsity and the time left on stderr, while the block runs.

    Args:
        what: is being run.
        total: how many trials there will be.
        history: those that there are already.
        shown: whether to show anything; nothing is shown where stderr is no terminal either.
    """
    with ticking(what, total, len(history), shown=shown) as tick:

        def shows(last: Trial, top: Trial) -> None:
            tick(f"score {last.score:.4g}, best {top.score:.4g}, sparsity {mean_sparsity(last):.1%}")

        yield shows


def mean_sparsity(trial: Trial) -> float:
    """Returns the mean of the groups' sparsities."""
    return sum(trial.sparsities.values()) / len(trial.sparsities) if trial.sparsities else 0.0


def table(history: Sequence[Trial]) -> Table:
    """Returns the trials as a table; those that were better than all before are marked."""
    out = Table(title="Trials")
    for heading in ("trial", "score", "", "sparsity", "parameters", "MACs", "seconds"):
        out.add_column(heading, justify="right" if heading else "left")
    top = float("-inf")
    for trial in history:
        mark = "best so far" if trial.score > top else ""
        top = max(top, trial.score)
        sizes = (f"{mean_sparsity(trial):.1%}", f"{trial.cost.params:,}", f"{trial.cost.macs:,}", f"{trial.seconds:.1f}")
        out.add_row(str(trial.number), f"{trial.score:.4f}", mark, *sizes)
    return out


def tabulated(history: Sequence[Trial], path: str | os.PathLike[str], measured: Mapping[int, float]) -> None:
    """Writes one line per trial under a line of headings: its number, score, what was measured, cost, seconds, and every sparsity.

    Args:
        history: the trials.
        path: of the file, which appears when it is complete.
        measured: number of a trial -> what was measured of it; where there is nothing, there is no such column.

    Raises:
        FileError: the file cannot be written.
    """
    groups = list(dict.fromkeys(name for trial in history for name in trial.sparsities))
    rows: list[list[Any]] = [["trial", "score", *(["measured"] if measured else []), "params", "macs", "seconds", *groups]]
    for t in history:
        sparsities = [t.sparsities.get(name, 0.0) for name in groups]
        extra = [measured.get(t.number, "")] if measured else []
        rows.append([t.number, t.score, *extra, t.cost.params, t.cost.macs, t.seconds, *sparsities])
    written_csv(path, "the trials", rows)


def plotted(history: Sequence[Trial], path: str | os.PathLike[str], measured: Mapping[int, float], front: Sequence[Trial]) -> None:
    """Draws score over trial, with the best so far, and score over MACs or over what was measured; the file appears when it is complete.

    Args:
        history: the trials.
        path: of the file.
        measured: number of a trial -> what was measured of it; MACs where there is nothing.
        front: trials that are joined by a line, the smallest measure first.

    Raises:
        ConfigError: matplotlib is not installed.
        FileError: the file cannot be written.
    """
    figure = new_figure(10, 4)
    over_trials, over_cost = figure.subplots(1, 2, sharey=True)
    scores = [t.score for t in history]
    tops = [max(scores[: n + 1]) for n in range(len(scores))]
    over_trials.plot([t.number for t in history], scores, ".", label="score")
    over_trials.step([t.number for t in history], tops, where="post", label="best so far")
    over_trials.set(xlabel="trial", ylabel="score")
    over_trials.legend()
    over_cost.plot([measured.get(t.number, t.cost.macs) for t in history], scores, ".")
    if front:
        over_cost.step([measured[t.number] for t in front], [t.score for t in front], where="post", label="front")
        over_cost.legend()
    over_cost.set(xlabel="measured" if measured else "MACs")
    written(path, "the plot", figure.savefig)
