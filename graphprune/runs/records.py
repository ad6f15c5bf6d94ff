"""Records of a long run, one per round or epoch: a sequence that becomes a table, CSV or a plot, and a bar while it runs."""

from __future__ import annotations

import io
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from graphprune.runs.progress import new_figure, ticking, written, written_csv

if TYPE_CHECKING:
    from rich.table import Table


class Record(Protocol):
    """What records have in common; they are dataclasses."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def sparsity(self) -> float:
        """What is gone."""
        ...

    @property
    def score(self) -> float | None:
        """What the evaluator said, None without one."""
        ...


R = TypeVar("R", bound=Record)


class Records(Sequence[R]):
    """Records, in order.

    Args:
        records: one per round or epoch.
        title: above the table and the plot.
    """

    kind: ClassVar[type]  # of the records
    counted: ClassVar[str]  # which of their fields says which one it is
    axis: ClassVar[str]  # what that counts, in a word

    def __init__(self, records: Sequence[R], title: str) -> None:
        self._records = tuple(records)
        self._title = title

    def __getitem__(self, index: Any) -> Any:
        """Returns a record, or a tuple of them for a slice."""
        return self._records[index]

    def __iter__(self) -> Iterator[R]:
        """Iterates over the records."""
        return iter(self._records)

    def __len__(self) -> int:
        """Returns how many there are."""
        return len(self._records)

    def __eq__(self, other: object) -> bool:
        return self._records == (other._records if isinstance(other, Records) else other)

    def __hash__(self) -> int:
        return hash(self._records)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Returns plain values, for JSON."""
        return [asdict(r) for r in self._records]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes one line per record under a line of headings; the file appears when it is complete.

        Raises:
            FileError: it cannot be written.
        """
        lines = ([_cell(value) for value in asdict(r).values()] for r in self._records)
        written_csv(path, "the history", ([f.name for f in fields(self.kind)], *lines))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws sparsity and score over the records into a file (PNG, SVG or PDF, by its ending).

        Raises:
            ConfigError: matplotlib is not installed.
            FileError: the file cannot be written.
        """
        figure = new_figure(7, 4)
        left = figure.subplots()
        numbers = [getattr(r, self.counted) for r in self._records]
        left.plot(numbers, [r.sparsity for r in self._records], "o-", color="tab:blue", label="sparsity")
        left.set(xlabel=self.axis, ylabel="sparsity", title=self._title)
        scores = [(number, r.score) for number, r in zip(numbers, self._records, strict=True) if r.score is not None]
        if scores:
            right = left.twinx()
            right.plot([number for number, _ in scores], [score for _, score in scores], "s-", color="tab:orange", label="score")
            right.set_ylabel("score")
        figure.legend(loc="outside lower center", ncols=2)
        written(path, "the plot", figure.savefig)

    @abstractmethod
    def __rich__(self) -> Table:
        """Returns the table for the terminal."""

    def __str__(self) -> str:
        """The table as plain text."""
        from rich.console import Console  # noqa: PLC0415 (only where something is shown)

        text = io.StringIO()
        Console(width=140, file=text).print(self)
        return text.getvalue().rstrip()


def _cell(value: Any) -> Any:
    if isinstance(value, tuple):
        return " ".join(f"{item:g}" for item in value)
    return "" if value is None else value


@contextmanager
def bar(what: str, total: int, done: int, *, shown: bool) -> Iterator[Callable[[Record], None]]:
    """Shows a bar with score, sparsity and time left on stderr while the block runs, if asked to and stderr is a terminal.

    Args:
        what: is being run.
        total: how many rounds or epochs there will be.
        done: how many there were already.
        shown: whether to show it.
    """
    with ticking(what, total, done, shown=shown) as tick:

        def advance(last: Record) -> None:
            score = "" if last.score is None else f", score {last.score:.4g}"
            tick(f"sparsity {last.sparsity:.1%}{score}")

        yield advance
