"""What happened round by round: records, a table, CSV and a plot."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from graphprune.errors import ConfigError
from graphprune.showing import new_figure, ticking, written, written_csv

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.table import Table


@dataclass(frozen=True)
class Round:
    """One round of pruning and training.

    Attributes:
        number: counted from 1; 0 is the training of the whole model, where there is one.
        asked: the sparsity that each entry of the config list asked for, of the original model.
        sparsity: what is gone of the original model: of the listed weights, or of the channels of all groups.
        params: parameters that are left.
        macs: multiply-accumulates for the example inputs, or None where single weights or single layers are masked, which saves none.
        score: what the evaluator said, higher = better; None without an evaluator.
        seconds: wall time; rounds that differ only in this are equal.
    """

    number: int
    asked: tuple[float, ...]
    sparsity: float
    params: int
    macs: int | None = None
    score: float | None = None
    seconds: float = field(default=0.0, compare=False)


class History(Sequence[Round]):
    """The rounds, in order.

    Args:
        rounds: one record each.
        title: above the table.
    """

    def __init__(self, rounds: Sequence[Round], title: str = "Rounds") -> None:
        self._rounds = tuple(rounds)
        self._title = title

    def __getitem__(self, index: Any) -> Any:
        """Returns a round, or a tuple of them for a slice."""
        return self._rounds[index]

    def __iter__(self) -> Iterator[Round]:
        """Iterates over the rounds."""
        return iter(self._rounds)

    def __len__(self) -> int:
        """Returns how many there are."""
        return len(self._rounds)

    def __eq__(self, other: object) -> bool:
        return self._rounds == (other._rounds if isinstance(other, History) else other)

    def __hash__(self) -> int:
        return hash(self._rounds)

    @property
    def best(self) -> Round:
        """The round with the highest score, of equal ones the sparser; the last where there are no scores. Round 0 is not among them.

        Raises:
            ConfigError: there is no round yet.
        """
        pruned = [r for r in self._rounds if r.number]
        if not pruned:
            raise ConfigError("there is no round yet", "Call compress() first")
        return max(pruned, key=lambda r: (0.0 if r.score is None else r.score, r.number))

    def to_dicts(self) -> list[dict[str, Any]]:
        """Returns plain values, for JSON."""
        return [asdict(r) for r in self._rounds]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes one line per round under a line of headings; the file appears when it is complete.

        Raises:
            FileError: it cannot be written.
        """
        rows = ({**asdict(r), "asked": " ".join(f"{a:g}" for a in r.asked)} for r in self._rounds)
        lines = (["" if value is None else value for value in row.values()] for row in rows)
        written_csv(path, "the history", ([f.name for f in fields(Round)], *lines))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws sparsity and score over the rounds into a file (PNG, SVG or PDF, by its ending).

        Raises:
            ConfigError: matplotlib is not installed.
            FileError: the file cannot be written.
        """
        figure = new_figure(7, 4)
        left = figure.subplots()
        numbers = [r.number for r in self._rounds]
        left.plot(numbers, [r.sparsity for r in self._rounds], "o-", color="tab:blue", label="sparsity")
        left.set(xlabel="round", ylabel="sparsity", title=self._title)
        scores = [(r.number, r.score) for r in self._rounds if r.score is not None]
        if scores:
            right = left.twinx()
            right.plot([number for number, _ in scores], [score for _, score in scores], "s-", color="tab:orange", label="score")
            right.set_ylabel("score")
        figure.legend(loc="outside lower center", ncols=2)
        written(path, "the plot", figure.savefig)

    def __rich__(self) -> Table:
        """Returns the table for the terminal."""
        from rich.table import Table  # noqa: PLC0415 (only where something is shown)

        table = Table(title=self._title)
        for head in ("round", "asked", "sparsity", "parameters", "MACs", "score", "seconds", ""):
            table.add_column(head, justify="right" if head else "left")
        top = self.best.number if any(r.number for r in self._rounds) and any(r.score is not None for r in self._rounds) else None
        for r in self._rounds:
            macs, score = ("" if r.macs is None else f"{r.macs:,}"), ("" if r.score is None else f"{r.score:.4f}")
            asked = " ".join(f"{a:.1%}" for a in dict.fromkeys(r.asked))
            mark = "best" if r.number == top else ""
            table.add_row(str(r.number), asked, f"{r.sparsity:.1%}", f"{r.params:,}", macs, score, f"{r.seconds:.1f}", mark)
        return table

    def __str__(self) -> str:
        """The table as plain text."""
        from rich.console import Console  # noqa: PLC0415 (only where something is shown)

        text = io.StringIO()
        Console(width=140, file=text).print(self)
        return text.getvalue().rstrip()


@contextmanager
def bar(what: str, total: int, done: int, *, shown: bool) -> Iterator[Callable[[Round], None]]:
    """Shows a bar with score, sparsity and time left on stderr while the block runs, if asked to and stderr is a terminal.

    Args:
        what: is being run.
        total: how many rounds there will be.
        done: how many there were already.
        shown: whether to show it.
    """
    with ticking(what, total, done, shown=shown) as tick:

        def advance(last: Round) -> None:
            score = "" if last.score is None else f", score {last.score:.4g}"
            tick(f"sparsity {last.sparsity:.1%}{score}")

        yield advance
