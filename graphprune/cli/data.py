"""Data and losses by name, for criteria that look at data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from graphprune.cli.sources import named_object
from graphprune.errors import InputError
from graphprune.trace.threads import forked_generators

_DATA = "package.module:callable or path/file.py:callable"
_LOSS = f"the name of a loss in torch.nn.functional (cross_entropy), {_DATA}"


def batches(name: str, seed: int = 0) -> Iterable[Any]:
    """Returns the batches that a name stands for: an iterable, or a callable without arguments that returns one.

    Args:
        name: of the batches.
        seed: of what is drawn while they are made; the global random state stays as it was.

    Raises:
        InputError: there is nothing of that name, or it gives no batches.
    """
    value, _ = named_object(name, "data", _DATA, seed)
    if callable(value) and not isinstance(value, Iterable):
        try:
            with forked_generators():
                torch.manual_seed(seed)
                value = value()
        except Exception as error:
            what = f"{name} raises {type(error).__name__}: {error}"
            raise InputError(what.rstrip("."), "Name a callable that takes no arguments and returns batches") from error
    if not isinstance(value, Iterable):
        raise InputError(f"{name} gives a {type(value).__name__}, not batches", "Name an iterable of batches, such as a DataLoader")
    return value


def loss_named(name: str, seed: int = 0) -> Callable[[Any, Any], Any]:
    """Returns the loss function that a name stands for.

    Raises:
        InputError: there is none of that name.
    """
    value = getattr(F, name, None) if ":" not in name else named_object(name, "a loss", _LOSS, seed)[0]
    if not callable(value):
        raise InputError(f"{name!r} is no loss function", f"Write {_LOSS}")
    function: Callable[[Any, Any], Any] = value
    return function
