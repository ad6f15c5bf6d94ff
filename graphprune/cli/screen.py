"""Where results and progress go: tables or JSON on stdout, progress on stderr."""

from __future__ import annotations

import dataclasses
import json as json_format
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_WIDTH = 140  # characters of a line in a file or a pipe


@dataclasses.dataclass(frozen=True)
class Screen:
    """The two streams of one run of the program, bound when it starts: exporters redirect `sys.stderr` while they work.

    Attributes:
        json: print the result as JSON and nothing else.
        quiet: print nothing but the JSON that was asked for.
        stdout: receives the JSON.
        console: shows results on stdout.
        progress: shows progress on stderr.
    """

    json: bool
    quiet: bool
    stdout: TextIO
    console: Console
    progress: Console

    @classmethod
    def open(cls, *, json: bool, quiet: bool) -> Screen:
        """Returns a screen on the present `sys.stdout` and `sys.stderr`."""
        return cls(json, quiet, sys.stdout, _console(sys.stdout), _console(sys.stderr))

    def show(self, *parts: RenderableType) -> None:
        """Prints parts of a result, one under the other, unless JSON or nothing was asked for."""
        if not self.json and not self.quiet:
            for part in parts:
                self.console.print(part)

    def result(self, facts: Mapping[str, Any], *parts: RenderableType) -> None:
        """Prints a finished result: the facts as JSON where that was asked for, else the parts."""
        if self.json:
            self.stdout.write(to_json(facts))
        self.show(*parts)

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Shows on stderr that something is being done, for as long as the block runs; nothing where stderr is no terminal."""
        if self.quiet or not self.progress.is_terminal:
            yield
            return
        with self.progress.status(f"{what} ..."):
            yield

    @contextmanager
    def bars(self) -> Iterator[Bars]:
        """Shows progress bars on stderr for as long as the block runs; nothing where stderr is no terminal."""
        columns = (TextColumn("{task.description:12}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TimeElapsedColumn())
        hidden = self.quiet or not self.progress.is_terminal
        with Progress(*columns, console=self.progress, disable=hidden, transient=True) as progress:
            yield Bars(progress)


def _console(stream: TextIO) -> Console:
    """Returns a console that takes names of layers and messages literally; where there is no terminal to fill, tables get room."""
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


class Bars:
    """One bar per stage; call it with (stage, steps done, steps in total)."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Moves the bar of a stage, which is added when it is first heard of."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage)
        self._progress.update(self._tasks[stage], completed=done, total=total)


def to_json(value: Any) -> str:
    r"""Returns a value as JSON text that every parser accepts: numbers that are not finite become null.

    >>> to_json({"error": float("inf"), "files": ("a", "b")})
    '{\n  "error": null,\n  "files": [\n    "a",\n    "b"\n  ]\n}\n'
    """
    return json_format.dumps(_plain(value), indent=2, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """Returns a value in the types that JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return str(value)
    return value
