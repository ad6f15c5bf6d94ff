"""Medians, quantiles, and the interval of a ratio of two medians."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Milliseconds = npt.NDArray[np.float64]

_RESAMPLES = 2000
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
    from scipy.stats import bootstrap  # noqa: PLC0415 (takes half a second, which a command that times nothing need not spend)

    def ratio(first: Milliseconds, second: Milliseconds, axis: int = -1) -> Any:
        return np.median(first, axis=axis) / np.median(second, axis=axis)

    if len(own) == 1:  # nothing to draw from
        return float(ratio(reference, own)), float(ratio(reference, own))
    batch = 1 + _BLOCK // len(own)
    drawing: dict[str, Any] = {"paired": True, "vectorized": True, "n_resamples": _RESAMPLES, "batch": batch, "rng": seed}
    found = bootstrap((reference, own), ratio, method="percentile", **drawing).confidence_interval  # of 95 %, its default
    return float(found.low), float(found.high)
