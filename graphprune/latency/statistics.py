"""Medians, quantiles, and the interval of a ratio of two medians."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Milliseconds = npt.NDArray[np.float64]

_RESAMPLES = 2000
_CONFIDENCE = 0.95
_BLOCK = 1 << 20  # numbers that are drawn at a time


def summary(times: Milliseconds) -> tuple[float, float, float]:
    """Returns median, 90 % quantile and interquartile range of times of shape (runs,), quantiles interpolated linearly."""
    lower, median, upper, high = np.quantile(times, (0.25, 0.5, 0.75, 0.9))
    return float(median), float(high), float(upper - lower)


def ratio_interval(reference: Milliseconds, own: Milliseconds, seed: int) -> tuple[float, float]:
    """Returns the 95 % percentile-bootstrap interval of median(reference) / median(own).

    Args:
        reference: times of shape (rounds,).
        own: times of another model in the same rounds, in the same order.
        seed: of the drawing.
    """
    generator = np.random.default_rng(seed)
    rounds, ratios = len(own), np.empty(0)
    while len(ratios) < _RESAMPLES:
        drawn = generator.integers(rounds, size=(min(_RESAMPLES, 1 + _BLOCK // rounds), rounds))
        ratios = np.append(ratios, np.median(reference[drawn], axis=1) / np.median(own[drawn], axis=1))
    low, high = np.quantile(ratios, (0.5 - _CONFIDENCE / 2, 0.5 + _CONFIDENCE / 2))
    return float(low), float(high)
