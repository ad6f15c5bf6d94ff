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


def global_counts(
    scores: Mapping[str, NDArray[np.float64]], sparsity: float, most: Mapping[str, float], rounding: Rounding = "floor", round_to: int = 1
) -> dict[str, int]:
    """Returns how many channels of each group stay when one ranking over all of them decides.

    Scores are divided by their group's mean first, as raw norms of layers of different shapes cannot be compared.

    Args:
        scores: group name -> score per channel, higher = keep.
        sparsity: fraction of all channels to remove, in [0, 1).
        most: group name -> the largest fraction that this group may lose, in [0, 1]; at least one channel stays whatever it says.
        rounding: as in `kept_count`.
        round_to: as in `kept_count`.
    """
    names = list(scores)
    sizes = np.array([scores[n].size for n in names])
    floors = [max(1, scores[n].size - int(round(scores[n].size * most.get(n, 1.0), 9))) for n in names]
    relative = np.concatenate([scores[n] / scores[n].mean() if scores[n].mean() > 0 else scores[n] for n in names])
    owner = np.repeat(np.arange(len(names)), sizes)
    remaining = int(sizes.sum()) - kept_count(int(sizes.sum()), sparsity, rounding)
    left = sizes.tolist()
    for position in np.argsort(relative, kind="stable").tolist():
        group = int(owner[position])
        if remaining and left[group] > floors[group]:
            left[group] -= 1
            remaining -= 1
    return {n: kept_count(int(sizes[i]), 1.0 - left[i] / sizes[i], rounding, round_to) for i, n in enumerate(names)}


def keep_highest(scores: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Returns a mask that keeps exactly `count` channels, those with the highest scores; of equal ones the first."""
    order = np.argsort(-scores, kind="stable")
    mask = np.zeros(scores.size, dtype=bool)
    mask[order[:count]] = True
    return mask
