"""What long runs have in common when they show themselves: files that appear when they are complete, plots, and a bar."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from graphprune.errors import ConfigError, FileError
from graphprune.runs.atomic import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def written(path: str | os.PathLike[str], what: str, write: Callable[[Path], object]) -> None:
    """Writes a file under a temporary name with the same ending, and renames it.

    Args:
        path: of the file.
        what: it is, as messages name it.
        write: is given the temporary path.

    Raises:
        FileError: it cannot be written.
    """
    target = Path(path)
    try:
        with atomic(target) as temporary:
            write(temporary)
    except (OSError, ValueError) as error:
        fix = "Choose a folder that exists and is writable, and an ending that fits"
        raise FileError(f"cannot write {what} to {str(target)!r}: {error}", fix) from error


def written_csv(path: str | os.PathLike[str], what: str, rows: Iterable[Iterable[Any]]) -> None:
    """Writes rows of values, the headings first, as CSV.

    Raises:
        FileError: it cannot be written.
    """
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    written(path, what, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8", newline=""))


class Drawn(Protocol):
    """A history that can be written as a table and drawn."""

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes one line per record."""
        ...

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws it."""
        ...


def keep_history(history: Drawn, folder: str | os.PathLike[str] | None, name: str, *, anew: bool = True) -> None:
    """Writes what happened into the folder of a run: `name`.csv and, where matplotlib is installed, `name`.png.

    Args:
        history: what happened.
        folder: where to; None writes nothing.
        name: of the files.
        anew: write them although they are there.

    Raises:
        FileError: they cannot be written.
    """
    if folder is None:
        return
    csv_path, plot_path = Path(folder) / f"{name}.csv", Path(folder) / f"{name}.png"
    if anew or not csv_path.exists():
        history.to_csv(csv_path)
    if (anew or not plot_path.exists()) and find_spec("matplotlib") is not None:
        history.plot(plot_path)


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure of a size in inches.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib import figure  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise ConfigError("plots are drawn by matplotlib, which is not installed", "Install it with `pip install matplotlib`") from error
    return figure.Figure(figsize=(width, height), layout="constrained")


@contextmanager
def ticking(what: str, total: int, done: int, *, shown: bool) -> Iterator[Callable[[str], None]]:
    """Shows a bar with the time left on stderr while the block runs, if asked to and stderr is a terminal.

    Args:
        what: is being run.
        total: how many steps there will be.
        done: how many there were already.
        shown: whether to show it.

    Yields:
        A function to be called after every step with what to show beside the bar.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[now]}"))
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True) as progress:
        task = progress.add_task(what, total=total, completed=done, now="")
        yield lambda now: progress.update(task, advance=1, now=now)
