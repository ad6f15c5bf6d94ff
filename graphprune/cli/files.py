"""Folders and files that commands write: proven writable before the work, complete or absent after it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graphprune.errors import ConfigError, FileError


@contextlib.contextmanager
def collected(out: Path) -> Iterator[Path]:
    """Gives a temporary folder inside `out` whose files move to `out` when the block succeeds; otherwise all is as it was.

    `out` is made where it is absent, and removed again when the block fails.

    Raises:
        FileError: the folder cannot be written; before the block, or when the finished files are moved.
    """
    if out.exists() and not out.is_dir():
        raise FileError(f"{str(out)!r} is a file, not a folder", "Choose another folder with --out")
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".graphprune-", dir=out))
    except OSError as error:
        _remove_empty(missing)
        raise FileError(f"the folder {str(out)!r} cannot be written: {error.strerror}", "Choose another folder with --out") from error
    try:
        yield staging
        _move(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _remove_empty(missing)


def _move(staging: Path, out: Path) -> None:
    """Moves all files, each by one rename."""
    files = sorted(staging.iterdir())
    occupied = [file.name for file in files if (out / file.name).is_dir()]
    if occupied:
        raise FileError(f"{str(out / occupied[0])!r} is a folder, where a file is to be written", "Choose another folder with --out")
    try:
        for file in files:
            file.replace(out / file.name)
    except OSError as error:
        raise FileError(f"cannot write into {str(out)!r}: {error.strerror}", "Choose another folder with --out") from error


def _remove_empty(folders: list[Path]) -> None:
    """Removes those of the folders, innermost first, that exist and are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):  # not empty, or never made
            folder.rmdir()


def check_target(path: Path) -> Path:
    """Returns the path if a file can be written there, and leaves no trace of finding out.

    Raises:
        FileError: it is a folder, or its own folder is missing or not writable.
    """
    if path.is_dir():
        raise FileError(f"{str(path)!r} is a folder", "Give --out the name of a file")
    try:
        handle, name = tempfile.mkstemp(prefix=".graphprune-", dir=path.parent)
    except OSError as error:
        what = f"the folder {str(path.parent)!r} cannot be written: {error.strerror}"
        raise FileError(what, "Create it, or choose another file with --out") from error
    os.close(handle)
    Path(name).unlink()
    return path


def check_readable(path: Path, what: str) -> Path:
    """Returns the path if it is a file that can be read; `what` says what it is for, as in "the weights".

    Raises:
        FileError: it is missing, a folder, or not readable.
    """
    try:
        with path.open("rb"):
            return path
    except OSError as error:
        raise FileError(f"cannot read {what} from {str(path)!r}: {error.strerror}", "Check the path") from error


def read_config(path: Path) -> list[Any]:
    """Returns the config list in a JSON file; its entries are checked by the pruner.

    Raises:
        FileError: the file cannot be read.
        ConfigError: it holds no JSON list.
    """
    try:
        config = json.loads(check_readable(path, "the config list").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(
            f"{str(path)!r} is no JSON: {error}", 'Write a list such as [{"sparsity": 0.5, "op_types": ["default"]}]'
        ) from error
    if not isinstance(config, list):
        what = f"{str(path)!r} holds a JSON {type(config).__name__}, not a list of entries"
        raise ConfigError(what, 'Write a list such as [{"sparsity": 0.5, "op_types": ["default"]}]')
    return config
