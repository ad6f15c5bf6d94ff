"""Storages of optuna's studies: opened by path or URL, and who in them is still alive."""

from __future__ import annotations

import contextlib
import importlib
import os
import random
import socket
import sqlite3
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphprune.errors import ConfigError, FileError
from graphprune.runs.atomic import alive

if TYPE_CHECKING:
    import optuna

INSTALL = "Install it with `pip install graphprune[search]`"
NOBODY = "nobody"
"""The owner of a trial that its process has given up."""

_PROCESS = uuid.uuid4().hex  # tells this process from an earlier one with the same number
_RACED = ("UNIQUE constraint failed", "already exists", "Duplicate entry", "duplicate key")  # what a database says to the slower process
_BUSY_SECONDS = 60  # how long a process waits while another one writes to a SQLite file


class _Connection(sqlite3.Connection):
    """A connection to a SQLite file with a write-ahead log, where the file system is able to.

    A trial is a dozen commits and more. Each would otherwise wait for the disk, some 20 ms, with the file locked for all processes. What
    is committed to the log survives the process, however it ends; should the machine lose its power, the last trials may be missing.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        with contextlib.suppress(sqlite3.OperationalError):
            if self.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",):
                self.execute("PRAGMA synchronous=NORMAL")


def optuna_package() -> Any:
    """Returns the optuna package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("optuna")  # an extra
    except ImportError as error:
        raise ConfigError("studies are searched by optuna, which is not installed", INSTALL) from error


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keeps optuna from logging every trial."""
    logging = optuna_package().logging
    before = logging.get_verbosity()
    logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def storage_url(storage: str | os.PathLike[str]) -> str:
    """Returns the URL of a storage: a path is that of a SQLite file."""
    text = os.fspath(storage)
    return text if "://" in text else f"sqlite:///{Path(text).absolute().as_posix()}"


def opened(storage: str | os.PathLike[str] | None, name: str, objectives: int, patience: int = 20) -> optuna.Study:
    """Returns the study of that name, a new one where there is none.

    Args:
        storage: the path of a SQLite file, or a database's URL; None keeps the study in memory.
        name: of the study.
        objectives: how many.
        patience: how often to try again where another process is making the same tables at this moment.

    Raises:
        FileError: the storage cannot be opened, or the study has another number of objectives.
    """
    package = optuna_package()
    url = None if storage is None else storage_url(storage)
    directions = ["maximize", "minimize"][:objectives]
    study = _created(package, url, name, directions, patience)
    while study is None:
        time.sleep(random.uniform(0.1, 0.5))  # noqa: S311 (not a secret)
        patience -= 1
        study = _created(package, url, name, directions, patience)
    if len(study.directions) != objectives:
        what = f"the storage holds a study {name!r} of {len(study.directions)} objectives, not {objectives}"
        raise FileError(what, "Give the same minimize=, or another name=")
    return study


def _created(package: Any, url: str | None, name: str, directions: list[str], patience: int) -> optuna.Study | None:
    """Returns the study; None where another process was making the storage's tables and there is patience left.

    Raises:
        FileError: the storage cannot be opened.
    """
    try:
        kept = None
        if url is not None:
            waits = {"connect_args": {"timeout": _BUSY_SECONDS, "factory": _Connection}} if url.startswith("sqlite") else {}
            kept = package.storages.RDBStorage(url, engine_kwargs=waits)
        study: optuna.Study = package.create_study(storage=kept, study_name=name, directions=directions, load_if_exists=True)
    except (package.exceptions.OptunaError, OSError, ImportError, ValueError, RuntimeError) as error:
        raise _unusable(url, error) from error
    except Exception as error:
        if not type(error).__module__.startswith("sqlalchemy"):
            raise
        if patience > 0 and any(words in str(error) for words in _RACED):
            return None
        raise _unusable(url, error) from error
    return study


def _unusable(url: str | None, error: Exception) -> FileError:
    reason = str(error).partition("\n")[0]
    return FileError(f"the storage {url} cannot be opened: {reason}", "Give the path of a SQLite file, or a database's URL")


def owner_of_this_process() -> str:
    """Returns what tells this process from all others."""
    return f"{socket.gethostname()} {os.getpid()} {_PROCESS}"


def is_dead(owner: str) -> bool:
    """Returns whether a trial's process has given it up, or was one of this machine and runs no more."""
    if owner == NOBODY:
        return True
    host, _, rest = owner.partition(" ")
    number, _, process = rest.partition(" ")
    if host != socket.gethostname() or os.name == "nt":
        return False
    if int(number) == os.getpid():
        return process != _PROCESS
    return not alive(int(number))
