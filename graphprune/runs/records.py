"""Records of what ran, one per round, epoch, trial or measurement: as a table, as CSV and as a plot, by columns that are declared once.

A record is a dataclass with `columns`; what has records derives from `Records` and says which rows there are and how they are drawn.
"""

from __future__ import annotations

import csv
import io
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from graphprune.errors import ConfigError, FileError
from graphprune.runs.atomic import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

R = TypeVar("R")


@dataclass(frozen=True)
class Column:
    """A column of records.

    Attributes:
        name: heading in CSV files, and the attribute that is shown; "" leaves it out of CSV files.
        head: heading in the table; None leaves it out of tables.
        spec: format specification of a value in the table.
        value: from a record to what is shown, in place of the attribute.
    """

    name: str
    head: str | None = None
    spec: str = ""
    value: Callable[[Any], Any] | None = None

    def of(self, record: object) -> Any:
        """Returns a record's value."""
        return getattr(record, self.name) if self.value is None else self.value(record)

    def shown(self, record: object) -> str:
        """Returns a record's value as it stands in the table: nothing for None, every value of a tuple once."""
        value = self.of(record)
        values = dict.fromkeys(value) if isinstance(value, tuple) else () if value is None else (value,)
        return " ".join(format(item, self.spec) for item in values)

    def written(self, record: object) -> Any:
        """Returns a record's value as it stands in CSV files."""
        value = self.of(record)
        if isinstance(value, tuple):
            return " ".join(item if isinstance(item, str) else f"{item:g}" for item in value)
        return "" if value is None else value


def spread(records: Iterable[Any], attribute: str) -> list[Column]:
    """Returns a column in CSV files for every key of a mapping that records have, 0 where it is not in one."""
    keys = dict.fromkeys(key for record in records for key in getattr(record, attribute))
    return [Column(key, value=lambda record, key=key: getattr(record, attribute).get(key, 0.0)) for key in keys]  # type: ignore[misc]  # key


class Records(Generic[R]):
    """What has records."""

    what: ClassVar[str]  # they are, as messages say it
    inches: ClassVar[tuple[float, float]] = (7, 4)  # of the plot

    @property
    @abstractmethod
    def _rows(self) -> Sequence[R]:
        """The records."""

    @property
    @abstractmethod
    def _columns(self) -> Sequence[Column]:
        """The columns of the table and of CSV files."""

    @property
    def _heading(self) -> str:
        """What stands above the table."""
        return self.what.removeprefix("the ").capitalize()

    @abstractmethod
    def _draw(self, figure: Figure) -> None:
        """Draws the records."""

    def table(self) -> Table:
        """Returns the table for the terminal."""
        from rich.table import Table  # noqa: PLC0415 (only where something is shown)

        out, columns = Table(title=self._heading), [column for column in self._columns if column.head is not None]
        for column in columns:
            out.add_column(column.head or "", justify="right" if column.head else "left")
        for record in self._rows:
            out.add_row(*(column.shown(record) for column in columns))
        return out

    def __rich__(self) -> Table:
        """Returns the table."""
        return self.table()

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes one line per record under a line of headings; the file appears when it is complete.

        Raises:
            FileError: it cannot be written.
        """
        columns, text = [column for column in self._columns if column.name], io.StringIO(newline="")
        lines = ([column.written(record) for column in columns] for record in self._rows)
        csv.writer(text).writerows([[column.name for column in columns], *lines])
        _write(path, self.what, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8", newline=""))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the records into a file (PNG, SVG or PDF, by its ending), which appears when it is complete.

        Raises:
            ConfigError: matplotlib is not installed.
            FileError: the file cannot be written.
        """
        try:
            from matplotlib import figure as figures  # noqa: PLC0415 (an extra)
        except ImportError as error:
            fix = "Install it with `pip install matplotlib`"
            raise ConfigError("plots are drawn by matplotlib, which is not installed", fix) from error
        figure = figures.Figure(figsize=self.inches, layout="constrained")
        self._draw(figure)
        _write(path, "the plot", figure.savefig)

    def keep(self, folder: str | os.PathLike[str] | None, name: str, *, anew: bool = True) -> None:
        """Writes the records into the folder of a run: `name`.csv and, where matplotlib is installed, `name`.png.

        Args:
            folder: where to; None writes nothing.
            name: of the files.
            anew: write them although they are there.

        Raises:
            FileError: they cannot be written.
        """
        if folder is None:
            return
        table, plot = Path(folder) / f"{name}.csv", Path(folder) / f"{name}.png"
        if anew or not table.exists():
            self.to_csv(table)
        if (anew or not plot.exists()) and find_spec("matplotlib") is not None:
            self.plot(plot)


class RecordSequence(Records[R], Sequence[R]):
    """Records with a sparsity and a score, in order: a sequence.

    Args:
        records: one per round or epoch.
        title: above the table and the plot.
    """

    what = "the history"
    kind: ClassVar[Any]  # of the records; its first column says which one it is

    def __init__(self, records: Sequence[R], title: str = "Rounds") -> None:
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
        return self._records == (other._records if isinstance(other, RecordSequence) else other)

    def __hash__(self) -> int:
        return hash(self._records)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Returns plain values, for JSON."""
        return [asdict(record) for record in self._records]  # type: ignore[call-overload]  # they are dataclasses

    @property
    def _rows(self) -> Sequence[R]:
        return self._records

    @property
    def _columns(self) -> Sequence[Column]:
        columns: tuple[Column, ...] = self.kind.columns
        return columns

    @property
    def _heading(self) -> str:
        return self._title

    def _draw(self, figure: Figure) -> None:
        """Draws sparsity and score over the records."""
        left, counted = figure.subplots(), self._columns[0]
        records: list[Any] = list(self._records)
        left.plot([counted.of(r) for r in records], [r.sparsity for r in records], "o-", color="tab:blue", label="sparsity")
        left.set(xlabel=counted.head, ylabel="sparsity", title=self._title)
        scored = [r for r in records if r.score is not None]
        if scored:
            right = left.twinx()
            right.plot([counted.of(r) for r in scored], [r.score for r in scored], "s-", color="tab:orange", label="score")
            right.set_ylabel("score")
        figure.legend(loc="outside lower center", ncols=2)

    def __str__(self) -> str:
        """The table as plain text."""
        from rich.console import Console  # noqa: PLC0415 (only where something is shown)

        text = io.StringIO()
        Console(width=140, file=text).print(self)
        return text.getvalue().rstrip()


def _write(path: str | os.PathLike[str], what: str, write: Callable[[Path], object]) -> None:
    """Writes a file under a temporary name with the same ending, and renames it.

    Raises:
        FileError: it cannot be written.
    """
    try:
        with atomic(path) as temporary:
            write(temporary)
    except (OSError, ValueError) as error:
        fix = "Choose a folder that exists and is writable, and an ending that fits"
        raise FileError(f"cannot write {what} to {str(path)!r}: {error}", fix) from error
