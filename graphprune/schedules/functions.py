"""Schedules: how sparse a network is meant to be at which step of its training. A step is an epoch, a round, a batch: the caller counts.

Each is a frozen record that is called with a step and returns a sparsity in [0, 1); `end` is the step from which it no longer changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from graphprune.errors import ConfigError
from graphprune.pruners.config import check_sparsity


class Schedule(Protocol):
    """From a step, at least 0, to a sparsity in [0, 1)."""

    @property
    def end(self) -> int:
        """The step from which the sparsity no longer changes."""
        ...

    def __call__(self, step: int) -> float:
        """Returns the sparsity at a step.

        Raises:
            ConfigError: the step is no whole number of at least 0.
        """
        ...


def agp(step: int, start: int, end: int, initial: float, final: float, frequency: int = 1) -> float:
    """Returns the sparsity of automated gradual pruning: s = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3.

    Zhu & Gupta, To prune, or not to prune, arXiv 1710.01878, eq. 1, for t in {t_0, t_0 + dt, ..., t_0 + n dt}: in between the sparsity
    stays as it was at the last of these, before t_0 it is 0, and from t_0 + n dt on it is s_f.

    Args:
        step: t, at least 0.
        start: t_0, the step of the first pruning, at least 0.
        end: t_0 + n dt, the step of the last, at least `start`.
        initial: s_i, the sparsity at `start`, in [0, 1).
        final: s_f, the sparsity from `end` on, in [0, 1) and not below `initial`.
        frequency: dt, how many steps lie between two prunings, at least 1.

    Raises:
        ConfigError: an argument is not one of these.
    """
    _check_step(step)
    first, last = _check_span(start, end, initial, final, frequency)
    if step < start:
        return 0.0
    if step >= end:
        return last
    pruned = (step - start) // frequency * frequency
    return last + (first - last) * (1.0 - pruned / (end - start)) ** 3


@dataclass(frozen=True)
class AGP:
    """Automated gradual pruning: fast at first, slower and slower towards the end; see `agp` for the formula and the source.

    Attributes:
        final: s_f, the sparsity from `end` on.
        end: the step of the last pruning.
        initial: s_i, the sparsity at `start`.
        start: the step of the first pruning; before it the sparsity is 0.
        frequency: how many steps lie between two prunings.

    Raises:
        ConfigError: see `agp`.
    """

    final: float
    end: int
    initial: float = 0.0
    start: int = 0
    frequency: int = 1

    def __post_init__(self) -> None:
        _check_span(self.start, self.end, self.initial, self.final, self.frequency)

    def __call__(self, step: int) -> float:
        """Returns the sparsity at a step."""
        return agp(step, self.start, self.end, self.initial, self.final, self.frequency)


@dataclass(frozen=True)
class Linear:
    """s = s_i + (s_f - s_i) (t - t_0) / (t_1 - t_0), as in NNI's LinearPruner: 0 before t_0, s_f from t_1 on.

    Attributes:
        final: s_f.
        end: t_1, at least `start`.
        initial: s_i, not above `final`.
        start: t_0.

    Raises:
        ConfigError: an attribute is not one of these.
    """

    final: float
    end: int
    initial: float = 0.0
    start: int = 0

    def __post_init__(self) -> None:
        _check_span(self.start, self.end, self.initial, self.final, 1)

    def __call__(self, step: int) -> float:
        """Returns the sparsity at a step."""
        _check_step(step)
        if step < self.start:
            return 0.0
        if step >= self.end:
            return float(self.final)
        return self.initial + (self.final - self.initial) * (step - self.start) / (self.end - self.start)


@dataclass(frozen=True)
class Exponential:
    """s = 1 - (1 - P)^(i/n): every step removes the same share of what is left (Frankle & Carbin, arXiv 1803.03635, section 1).

    The paper's iterative pruning removes p^(1/n) per round so that p^(1/n * n) is left behind in the end; with P the share to remove,
    (1 - P)^(1/n) of the weights survive each round.

    Attributes:
        final: P, the sparsity from step n on, in [0, 1).
        end: n, at least 0.

    Raises:
        ConfigError: an attribute is not one of these.
    """

    final: float
    end: int

    def __post_init__(self) -> None:
        _check_span(0, self.end, 0.0, self.final, 1)

    def __call__(self, step: int) -> float:
        """Returns the sparsity at a step."""
        _check_step(step)
        return float(self.final) if step >= self.end else 1.0 - (1.0 - self.final) ** (step / self.end)


@dataclass(frozen=True)
class Constant:
    """The same sparsity at every step: one-shot pruning.

    Attributes:
        final: in [0, 1).

    Raises:
        ConfigError: it is not.
    """

    final: float

    def __post_init__(self) -> None:
        check_sparsity(self.final, "final of the schedule")

    @property
    def end(self) -> int:
        """0: it never changes."""
        return 0

    def __call__(self, step: int) -> float:
        """Returns the sparsity."""
        _check_step(step)
        return float(self.final)


@dataclass(frozen=True)
class Joined:
    """One schedule after another: from step `at[k]` on the (k+1)-th, which counts its own steps from there.

    Attributes:
        schedules: at least one.
        at: the step at which each but the first takes over, rising; one fewer than there are schedules.

    Raises:
        ConfigError: the numbers do not fit, or do not rise.

    >>> both = Joined((Linear(final=0.4, end=2), AGP(initial=0.4, final=0.8, end=4)), at=(3,))
    >>> [round(both(step), 3) for step in range(8)]
    [0.0, 0.2, 0.4, 0.4, 0.631, 0.75, 0.794, 0.8]
    """

    schedules: Sequence[Schedule]
    at: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedules", tuple(self.schedules))
        object.__setattr__(self, "at", tuple(self.at))
        if len(self.schedules) != len(self.at) + 1:
            what = f"{len(self.schedules)} schedules are joined at {len(self.at)} steps"
            raise ConfigError(what, "Give one step fewer than schedules, the step at which each but the first takes over")
        before = 0
        for step in self.at:
            if type(step) is not int or step <= before:
                raise ConfigError(f"schedules are joined at steps {self.at}", "Give whole numbers above 0 that rise")
            before = step

    @property
    def end(self) -> int:
        """The end of the last schedule."""
        return (self.at[-1] if self.at else 0) + self.schedules[-1].end

    def __call__(self, step: int) -> float:
        """Returns the sparsity at a step."""
        _check_step(step)
        number = sum(step >= at for at in self.at)
        return self.schedules[number](step - (self.at[number - 1] if number else 0))


def _check_step(step: object) -> None:
    """Raises unless a step is a whole number of at least 0."""
    if type(step) is not int or step < 0:
        raise ConfigError(f"step of the schedule is {step!r}", "Give a whole number of at least 0")


def _check_span(start: object, end: object, initial: object, final: object, frequency: object) -> tuple[float, float]:
    """Returns the first and the last sparsity after checking them and the steps."""
    _check_whole("start", start, 0)
    _check_whole("end", end, start)
    _check_whole("frequency", frequency, 1)
    first, last = check_sparsity(initial, "initial of the schedule"), check_sparsity(final, "final of the schedule")
    if first > last:
        raise ConfigError(
            f"the schedule goes down, from sparsity {first:g} to {last:g}", "Give an initial one no larger than the final one"
        )
    return first, last


def _check_whole(name: str, value: object, least: object) -> None:
    if type(value) is not int or not isinstance(least, int) or value < least:
        raise ConfigError(f"{name} of the schedule is {value!r}", f"Give a whole number of at least {least}")
