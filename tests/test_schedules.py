"""Schedules equal their papers' formulas at every step."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import graphprune as gp
from graphprune.schedules import agp


@given(st.integers(0, 20), st.integers(1, 12), st.integers(1, 7), st.floats(0, 0.5), st.floats(0.5, 0.99))
def test_agp_equals_the_papers_formula(start: int, times: int, frequency: int, initial: float, final: float) -> None:
    """At t_0 + k dt the sparsity is s_f + (s_i - s_f) (1 - k/n)^3; in between it stays, before it is 0, after it is s_f."""
    end = start + times * frequency
    for step in range(end + 5):
        count = min((step - start) // frequency, times)
        expected = final + (initial - final) * (1 - count / times) ** 3 if step >= start else 0.0
        assert agp(step, start, end, initial, final, frequency) == pytest.approx(expected, abs=1e-12)


def test_agp_ends_where_it_is_told_to() -> None:
    """A frequency that does not divide the span ends at the last step all the same, and a span of nothing jumps."""
    assert [agp(t, 0, 10, 0.0, 0.8, 4) for t in (8, 9)] == pytest.approx([0.8 - 0.8 * 0.2**3] * 2)
    assert agp(10, 0, 10, 0.0, 0.8, 4) == 0.8
    assert [agp(t, 3, 3, 0.2, 0.8) for t in (2, 3)] == [0.0, 0.8]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((-1, 0, 10, 0.0, 0.8), "step of the schedule is -1.*at least 0"),
        ((0.5, 0, 10, 0.0, 0.8), "step of the schedule is 0.5"),
        ((0, -1, 10, 0.0, 0.8), "start of the schedule is -1"),
        ((0, 5, 4, 0.0, 0.8), "end of the schedule is 4.*at least 5"),
        ((0, 0, 10, 0.0, 0.8, 0), "frequency of the schedule is 0.*at least 1"),
        ((0, 0, True, 0.0, 0.8), "end of the schedule is True"),
        ((0, 0, 10, 0.0, 1.0), r"final of the schedule is 1.0, outside \[0, 1\)"),
        ((0, 0, 10, "none", 0.5), "initial of the schedule is 'none', not a number"),
        ((0, 0, 10, 0.6, 0.5), "goes down, from sparsity 0.6 to 0.5"),
    ],
)
def test_schedules_that_cannot_be_followed_are_refused(arguments: Any, words: str) -> None:
    """Each wrong argument is one clear error."""
    with pytest.raises(gp.ConfigError, match=words):
        agp(*arguments)
