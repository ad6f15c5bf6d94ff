"""How many channels stay: against exact fractions, and by hand where a float is next to a whole number."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest

import graphprune as gp
from graphprune.pruners.budgets import Rounding, kept_count


@pytest.mark.parametrize(
    ("channels", "sparsity", "floor", "ceil"),
    [
        (64, 0.5, 32, 32),
        (7, 0.5, 3, 4),
        (10, 0.25, 7, 8),
        (100, 0.9, 10, 10),  # 100 * (1 - 0.9) is 9.999999999999998
        (10, 0.7, 3, 3),  # 10 * (1 - 0.7) is 3.0000000000000004
        (3, 0.9, 1, 1),  # never none
        (1, 0.99, 1, 1),
        (5, 0.0, 5, 5),
        (1000, 0.0005, 999, 1000),
    ],
)
def test_counts_by_hand(channels: int, sparsity: float, floor: int, ceil: int) -> None:
    """By "floor" int(n (1 - s)) stay, as in the L1 paper's code, by "ceil" int(n s) go, as in Distiller; one channel stays."""
    assert kept_count(channels, sparsity) == kept_count(channels, sparsity, "floor") == floor
    assert kept_count(channels, sparsity, "ceil") == ceil


@pytest.mark.parametrize(
    ("channels", "sparsity", "round_to", "floor", "ceil"),
    [
        (64, 0.3, 8, 40, 48),  # of 44.8
        (64, 0.5, 8, 32, 32),
        (66, 0.5, 8, 32, 40),  # of 33
        (20, 0.9, 8, 8, 8),  # not below one multiple
        (20, 0.1, 8, 16, 20),  # not above all
        (5, 0.5, 8, 5, 5),  # fewer than one multiple: all
        (20, 0.0, 8, 20, 20),  # nothing is asked for
        (30, 0.4, 3, 18, 18),
    ],
)
def test_multiples_by_hand(channels: int, sparsity: float, round_to: int, floor: int, ceil: int) -> None:
    """Counts are multiples of `round_to`, rounded in the same direction, between one multiple and all channels."""
    assert kept_count(channels, sparsity, "floor", round_to) == floor
    assert kept_count(channels, sparsity, "ceil", round_to) == ceil


@pytest.mark.parametrize("round_to", [1, 2, 3, 8])
@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_counts_are_those_of_exact_fractions(rounding: Rounding, round_to: int) -> None:
    """For whole and half percents, the count is that of rational arithmetic, whatever floats make of it."""
    toward = math.floor if rounding == "floor" else math.ceil
    for channels in [*range(1, 70), 96, 100, 128, 192, 255, 256, 384, 512, 1000, 1024, 2048]:
        for percent in range(1, 200):
            left = toward(channels * (1 - Fraction(percent, 200)))
            wanted = min(max(toward(Fraction(left, round_to)) * round_to, min(round_to, channels), 1), channels)
            assert kept_count(channels, percent / 200, rounding, round_to) == wanted, (channels, percent)


@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_more_sparsity_never_keeps_more(rounding: Rounding) -> None:
    """Counts fall as the sparsity rises."""
    counts = [kept_count(37, step / 1000, rounding) for step in range(1000)]
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (37, 1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rounding": "round"}, "rounding is 'round'"),
        ({"round_to": 0}, "round_to is 0"),
        ({"round_to": 2.0}, r"round_to is 2\.0"),
        ({"round_to": True}, "round_to is True"),
    ],
)
def test_other_roundings_are_refused(options: dict[str, Any], match: str) -> None:
    """Neither an unknown direction nor a multiple that is no whole number of at least 1 is guessed at."""
    with pytest.raises(gp.ConfigError, match=match):
        kept_count(8, 0.5, **options)
