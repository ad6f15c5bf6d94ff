"""How many channels stay, and which: exact counts, ties broken by index, never an empty layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from graphprune.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Rounding: TypeAlias = Literal["floor", "ceil"]


@dataclass(frozen=True)
class Plan:
    """What was asked of each group, for the report.

    Attributes:
        requested: group name -> sparsity asked for.
        notes: group name -> why it lost less than it could.
        seconds: wall time spent before the speedup.
    """

    requested: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


def kept_count(channels: int, sparsity: float, rounding: Rounding = "floor", round_to: int = 1) -> int:
    """Returns how many of `channels` stay at a sparsity, at least one.

    Args:
        channels: how many there are.
        sparsity: fraction removed, in [0, 1).
        rounding: "floor" keeps int(n (1 - s)) as the L1 paper's code does, "ceil" removes int(n s) as Distiller does.
        round_to: the count is rounded, in the same direction, to a multiple of this (and never below it, where there are enough).

    Raises:
        ConfigError: `rounding` or `round_to` is not one of the above.
    """
    if rounding not in ("floor", "ceil"):
        raise ConfigError(f"rounding is {rounding!r}", "Use 'floor' or 'ceil'")
    if type(round_to) is not int or round_to < 1:
        raise ConfigError(f"round_to is {round_to!r}", "Use a whole number of at least 1")
    if sparsity == 0.0:
        return channels
    exact = round(channels * (1.0 - sparsity), 9)
    toward = math.floor if rounding == "floor" else math.ceil
    count = toward(round(toward(exact) / round_to, 9)) * round_to
    return min(max(count, min(round_to, channels), 1), channels)


def keep_highest(scores: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Returns a mask that keeps exactly `count` channels, those with the highest scores; of equal ones the first."""
    order = np.argsort(-scores, kind="stable")
    mask = np.zeros(scores.size, dtype=bool)
    mask[order[:count]] = True
    return mask
