"""Files that are there as a whole or not at all."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_NUMBERS = itertools.count()  # tell apart what the threads of one process write


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path in the same folder and with the same ending, for the block to write; it replaces `path` once that is done.

    What was written is on the disk before it gets its name: after a crash of the process or of the machine there is the old file or the
    new one. Of several threads or processes that write one path, the last to finish wins. Where the block raises, the old one stays, and
    nothing else is left. See `leftovers` for processes that are killed.

    Args:
        path: of the file; its folder must exist.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.{next(_NUMBERS)}.part{target.suffix}")
    try:
        yield temporary
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        _flush(target.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def leftovers(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields what processes that were killed while they wrote `path` have left; those still alive keep theirs."""
    target = Path(path)
    before, after = f".{target.stem}.", f".part{target.suffix}"
    for leftover in target.parent.glob(f"{before}*{after}"):
        pid, _, number = leftover.name.removeprefix(before).removesuffix(after).partition(".")
        if pid.isdigit() and number.isdigit() and not alive(int(pid)):
            yield leftover


def _flush(folder: Path) -> None:
    """Makes sure that the names in a folder are on the disk and not only in its cache, where the system lets folders be opened."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def alive(pid: int) -> bool:
    """Returns whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
