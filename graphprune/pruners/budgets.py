"""How many channels stay, and which: exact counts, ties broken by index, never an empty layer."""

from __future__ import annotations

import math
import numbers
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from graphprune.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from graphprune.sizes.watch import Demand

Rounding: TypeAlias = Literal["floor", "ceil"]


@dataclass(frozen=True)
class Budget:
    """How much of the model's cost is to go: exactly one of the two.

    Attributes:
        macs: fraction of the MACs to remove, in (0, 1).
        params: fraction of the parameters to remove, in (0, 1).

    Raises:
        ConfigError: none or both are given, or one is no such fraction.
    """

    macs: float | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in (("macs", self.macs), ("params", self.params)) if value is not None}
        if len(given) != 1:
            raise ConfigError(f"a budget of {' and '.join(given) or 'nothing'}", "Give one of macs= and params=, such as Budget(macs=0.5)")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < 1:
                raise ConfigError(f"a budget of {name}={value!r}", "Give the fraction to remove, between 0 and 1, such as 0.5 for one half")

    @property
    def unit(self) -> str:
        """What is counted: "macs" or "params"."""
        return "macs" if self.macs is not None else "params"

    @property
    def removed(self) -> float:
        """The fraction to remove."""
        return float(self.macs if self.macs is not None else self.params or 0.0)

    def left(self, dense: float) -> float:
        """Returns what stays of a cost, without what a fraction such as 1 - 0.9 adds to a whole number in its last bits."""
        target = dense * (1.0 - self.removed)
        nearest = float(round(target))
        return nearest if math.isclose(target, nearest, rel_tol=1e-12, abs_tol=1e-9) else target

    def __str__(self) -> str:
        """In words."""
        return f"{self.removed:.1%} of the {'MACs' if self.unit == 'macs' else 'parameters'}"


@dataclass(frozen=True)
class Plan:
    """What was asked of each group, for the report.

    Attributes:
        requested: group name -> sparsity asked for.
        layers: layer -> sparsity asked for by its config entry.
        notes: group name -> why it lost less than it could.
        seconds: wall time spent before the speedup.
        budget: what was asked of the whole model, if that was not sparsities.
        demands: what the model's code asks of its sizes, if the pruner had to find out.
    """

    requested: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    budget: Budget | None = None
    layers: Mapping[str, float] = field(default_factory=dict)
    demands: Sequence[Demand] | None = None


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


class Ranking:
    """The order in which channels of several groups go, and how many each group has left after any number of steps.

    A step takes one channel of one group, or as many as lead to the next multiple of `round_to`. Within a group the lowest scores go
    first.

    Args:
        scores: group name -> score per channel, higher = keep.
        most: group name -> the largest fraction that this group may lose, in [0, 1]; at least one channel (where there are enough,
            `round_to`) stays whatever it says.
        round_to: kept counts are multiples of this, or all.
        order: "global" compares scores of different groups; "even" lets all groups lose the same fraction.
        comparable: whether scores of different groups compare as they are; otherwise they are divided by their group's mean magnitude
            first, as raw norms of layers of different shapes cannot be compared.
        pace: order "even": group name -> how fast it loses channels, above 0: fractions lost are as these numbers to each other. By
            default all are equal.
    """

    def __init__(
        self,
        scores: Mapping[str, NDArray[np.float64]],
        most: Mapping[str, float],
        round_to: int = 1,
        order: Literal["global", "even"] = "global",
        *,
        comparable: bool = False,
        pace: Mapping[str, float] | None = None,
    ) -> None:
        self.names = list(scores)
        self.sizes = np.array([scores[n].size for n in self.names], dtype=np.int64)
        self.least: dict[str, int] = {}  # the fewest channels that each group can be left with
        keys, owners, taken = [], [], []
        for number, name in enumerate(self.names):
            values = scores[name]
            left = _steps(values.size, most.get(name, 1.0), round_to)
            self.least[name] = left[-1]
            if len(left) > 1:
                gone = values.size - np.array(left)
                keys.append(_keys(values, gone, order, comparable=comparable) / (pace[name] if pace else 1.0))
                owners.append(np.full(gone.size - 1, number))
                taken.append(np.diff(gone))
        self._owners = np.concatenate(owners) if owners else np.zeros(0, dtype=np.int64)
        self._taken = np.concatenate(taken) if taken else np.zeros(0, dtype=np.int64)
        ordered = np.argsort(np.concatenate(keys), kind="stable") if keys else np.zeros(0, dtype=np.int64)
        self._owners, self._taken = self._owners[ordered], self._taken[ordered]

    def __len__(self) -> int:
        """The number of steps there are."""
        return int(self._owners.size)

    def counts(self, steps: int) -> dict[str, int]:
        """Returns group name -> how many channels are left after some steps."""
        gone = np.bincount(self._owners[:steps], weights=self._taken[:steps], minlength=len(self.names)).astype(np.int64)
        return dict(zip(self.names, (self.sizes - gone).tolist(), strict=True))

    def reaching(self, cost: Callable[[dict[str, int]], float], target: float, rounding: Rounding = "floor") -> int:
        """Returns after how many steps a cost first is at most `target` ("floor"), or how many can be taken before it is less ("ceil").

        Args:
            cost: from the counts that are left to the cost, which no step raises.
            target: what to come down to.
            rounding: which side of the target to end on; both are within one step of it.
        """
        low = first_met(range(len(self)), lambda steps: cost(self.counts(steps)) <= target)
        return low if rounding == "floor" or low == 0 or cost(self.counts(low)) >= target else low - 1


def first_met(options: Sequence[int], met: Callable[[int], bool]) -> int:
    """Returns the index of the first option that meets a condition, which all behind it meet as well; how many there are if none does."""
    return bisect_left(options, True, key=met)  # noqa: FBT003 (false comes before true)


def least_kept(size: int, most: float, round_to: int = 1) -> int:
    """Returns how many of `size` channels must stay where at most the fraction `most` may go, and at least one multiple of `round_to`."""
    floor = max(1, size - int(round(size * most, 9)), min(round_to, size))
    return min(-(-floor // round_to) * round_to, size)


def _steps(size: int, most: float, round_to: int) -> list[int]:
    """Returns the counts that a group may be left with, falling."""
    floor = least_kept(size, most, round_to)
    return [size, *(n for n in range(size - 1, floor - 1, -1) if n % round_to == 0)]


def _keys(values: NDArray[np.float64], gone: NDArray[np.int64], order: str, *, comparable: bool) -> NDArray[np.float64]:
    """Returns by what each step of one group is ranked, never falling: what its channels score on average, or what is gone after it."""
    if order == "even":
        even: NDArray[np.float64] = gone[1:] / values.size
        return even
    mean = np.abs(values).mean()
    ascending = np.sort(values if comparable or mean <= 0 else values / mean)
    sums = np.concatenate([[0.0], np.cumsum(ascending)]) if gone.size - 1 < ascending.size and (np.diff(gone) > 1).any() else None
    if sums is None:
        single: NDArray[np.float64] = ascending[gone[1:] - 1]
        return single
    mixed: NDArray[np.float64] = np.maximum.accumulate(np.diff(sums[gone]) / np.diff(gone))
    return mixed


def keep_highest(scores: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Returns a mask that keeps exactly `count` channels, those with the highest scores; of equal ones the first."""
    order = np.argsort(-scores, kind="stable")
    mask = np.zeros(scores.size, dtype=bool)
    mask[order[:count]] = True
    return mask
