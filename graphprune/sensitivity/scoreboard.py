"""Scores that survive their process: one line per evaluation, appended to a file whose name says what they hold for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from graphprune.errors import FileError
from graphprune.runs.checkpoint import plain

FORMAT = 1


class Scoreboard:
    """Scores by the group that lost channels and how many it kept.

    The file is a line of JSON with the settings, and then one line per score, each flushed to disk before the next evaluation begins. A
    line that a killed process left unfinished is dropped. Other settings have another file, so that a folder can serve many analyses.

    Args:
        folder: made if it is missing; None keeps the scores in memory alone.
        settings: what the scores depend on, as plain values.

    Attributes:
        path: the file, or None.

    Raises:
        ConfigError: a setting is not a plain value.
        FileError: the folder or the file cannot be read or written.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self._scores: dict[tuple[str, int], tuple[float, float]] = {}
        self.path: Path | None = None
        self._header = json.dumps({"format": FORMAT, "settings": plain(settings, "settings")}, sort_keys=True)
        if folder is None:
            return
        self.path = Path(folder) / f"sensitivity-{hashlib.sha256(self._header.encode()).hexdigest()[:16]}.jsonl"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._read()
        except OSError as error:
            raise FileError(f"cannot keep scores in {str(self.path)!r}: {error}", "Choose a folder that can be written to") from error

    def __len__(self) -> int:
        """Returns how many scores there are."""
        return len(self._scores)

    def get(self, group: str, kept: int) -> tuple[float, float] | None:
        """Returns the score of the model whose group kept so many channels, and the seconds that it took; None where it is not known."""
        return self._scores.get((group, kept))

    def put(self, group: str, kept: int, score: float, seconds: float) -> None:
        """Adds a score; it is on disk when this returns.

        Raises:
            FileError: the file cannot be written.
        """
        self._scores[group, kept] = (score, seconds)
        try:
            self._append(json.dumps([group, kept, score, seconds]))
        except OSError as error:
            raise FileError(f"cannot write to {str(self.path)!r}: {error}", "Make room, or choose another folder") from error

    def _read(self) -> None:
        """Reads what there is, and cuts off what is unfinished."""
        assert self.path is not None  # noqa: S101 (for the type checker; the caller has set it)
        text = self.path.read_bytes() if self.path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(self.path, len(whole))
        lines = whole.decode(errors="replace").splitlines()
        try:
            for line in lines[1:]:
                group, kept, score, seconds = json.loads(line)
                self._scores[str(group), int(kept)] = (float(score), float(seconds))
        except (ValueError, TypeError) as error:
            raise FileError(f"the scores in {str(self.path)!r} are damaged: {error}", "Delete the file to measure anew") from error

    def _append(self, line: str) -> None:
        """Writes one line to the end of the file, behind the header if that is the first, and sees it to the disk."""
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n" if file.tell() else f"{self._header}\n{line}\n")
                file.flush()
                os.fsync(file.fileno())


def name_of(function: Callable[..., Any] | None) -> str:
    """Returns by what name a function is known: its module and qualified name, or those of its class."""
    if function is None:
        return ""
    inner = getattr(function, "func", function)  # of a partial, the function that it calls
    known = inner if hasattr(inner, "__qualname__") else type(inner)
    return f"{known.__module__}.{known.__qualname__}"
