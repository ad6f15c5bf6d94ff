"""The trainers of the first version, which took the number of an epoch, as those of today."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

_EPOCH = ("epoch", "callback")


def epoch_trainer(trainer: Callable[..., Any] | None, epochs: int | None = None) -> Callable[..., Any] | None:
    """Returns a trainer of that time as a trainer(model, optimizer, criterion).

    It may take the number of the epoch, `epoch`, and a `callback` to call between backward and step: that does nothing here, as
    penalties are added when the optimizer steps.

    Args:
        trainer: takes the model first, and then `optimizer`, `criterion`, and perhaps `epoch` and `callback`.
        epochs: after so many, numbers begin with 0 again.
    """
    if not callable(trainer):
        return trainer
    try:
        known = inspect.signature(trainer).parameters
    except ValueError:  # of some built-in functions, whose names nobody knows
        return trainer
    needed = [name for name in _EPOCH if name in known and (name == "epoch" or known[name].default is inspect.Parameter.empty)]
    named = "optimizer" in known and "criterion" in known
    if not needed and (not named or list(known)[1:3] == ["optimizer", "criterion"]):
        return trainer
    done = 0

    def trains(model: nn.Module, optimizer: Any, criterion: Any) -> Any:
        nonlocal done
        values = {"epoch": done if epochs is None else done % epochs, "callback": _nothing}
        given = {"optimizer": optimizer, "criterion": criterion} if named else {}
        made = trainer(model, *(() if named else (optimizer, criterion)), **given, **{name: values[name] for name in needed})
        done += 1  # epochs that are broken off, when only the first batch is wanted, do not count
        return made

    return trains


def _nothing() -> None:
    """What trainers are given to call between backward and step."""
