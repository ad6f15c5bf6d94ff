"""The bar that long runs show while they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Tick(Protocol):
    """Moves a bar."""

    def __call__(self, now: str, steps: int = 1) -> None:
        """Moves it by some steps, and shows what was done beside it."""
        ...


@contextmanager
def ticking(what: str, total: int, done: int, *, shown: bool) -> Iterator[Tick]:
    """Shows a bar with the time left on stderr while the block runs, if asked to and stderr is a terminal.

    Args:
        what: is being run.
        total: how many steps there will be.
        done: how many there were already.
        shown: whether to show it.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[now]}"))
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True) as progress:
        task = progress.add_task(what, total=total, completed=done, now="")

        def tick(now: str, steps: int = 1) -> None:
            progress.update(task, advance=steps, now=now)

        yield tick
