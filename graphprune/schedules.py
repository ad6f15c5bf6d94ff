"""Schedules: how sparse a network is meant to be at which step of its training. A step is whatever the caller counts, epochs or batches."""

from __future__ import annotations

from graphprune.config import check_sparsity
from graphprune.errors import ConfigError


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
    for name, value, least in (("step", step, 0), ("start", start, 0), ("end", end, start), ("frequency", frequency, 1)):
        if type(value) is not int or value < least:
            raise ConfigError(f"{name} of the schedule is {value!r}", f"Give a whole number of at least {least}")
    first, last = check_sparsity(initial, "initial of the schedule"), check_sparsity(final, "final of the schedule")
    if first > last:
        raise ConfigError(
            f"the schedule goes down, from sparsity {first:g} to {last:g}", "Give an initial one no larger than the final one"
        )
    if step < start:
        return 0.0
    if step >= end:
        return last
    pruned = (step - start) // frequency * frequency
    return last + (first - last) * (1.0 - pruned / (end - start)) ** 3
