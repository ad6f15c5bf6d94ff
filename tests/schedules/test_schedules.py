"""Schedules equal their papers' formulas at every step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import graphprune as gp
from graphprune.schedules.functions import AGP, Constant, Exponential, Joined, Linear, agp


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


@given(st.integers(0, 9), st.integers(1, 30), st.integers(1, 4), st.floats(0, 0.5), st.floats(0.5, 0.99))
def test_records_equal_their_formulas(start: int, steps: int, frequency: int, initial: float, final: float) -> None:
    """Linear, exponential, constant and AGP at every step, and that they stay from `end` on."""
    end = start + steps
    linear, cubic = Linear(final, end, initial, start), AGP(final, end, initial, start, frequency)
    exponential, constant = Exponential(final, steps), Constant(final)
    for step in range(end + 3):
        share = (step - start) / steps
        expected = 0.0 if step < start else initial + (final - initial) * min(share, 1.0)
        assert linear(step) == pytest.approx(expected, abs=1e-12)
        assert cubic(step) == agp(step, start, end, initial, final, frequency)
        assert 1 - exponential(step) == pytest.approx((1 - final) ** (min(step, steps) / steps), abs=1e-12)
        assert constant(step) == final
    assert (linear.end, cubic.end, exponential.end, constant.end) == (end, end, steps, 0)
    assert linear(end) == cubic(end) == exponential(steps) == final


def test_every_lottery_round_removes_the_same_share_of_what_is_left() -> None:
    """Frankle & Carbin's 20 % per round: after n rounds 0.8^n is left."""
    schedule = Exponential(1 - 0.8**5, 5)
    left = [1 - schedule(i) for i in range(6)]
    assert [after / before for before, after in pairwise(left)] == pytest.approx([0.8] * 5)


def test_the_seeds_ten_epochs_to_eighty_percent() -> None:
    """From 0 % in epoch 1 to 80 % in epoch 10, every epoch: the cubic formula's numbers, written out."""
    schedule = AGP(final=0.8, end=10, initial=0.0, start=1, frequency=1)
    numbers = [0.0, 0.0, 0.2381, 0.4236, 0.5630, 0.6628, 0.7298, 0.7704, 0.7912, 0.7989, 0.8, 0.8]
    assert [schedule(epoch) for epoch in range(12)] == pytest.approx(numbers, abs=1e-4)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_joined_schedules_follow_each_other(first: int, second: int, more: int) -> None:
    """Each counts its own steps from where it takes over."""
    parts = (Linear(0.3, first), Constant(0.3), AGP(0.9, more, 0.3))
    joined = Joined(parts, (first, first + second))
    for step in range(first + second + more + 2):
        number = (step >= first) + (step >= first + second)
        assert joined(step) == parts[number](step - (0, first, first + second)[number])
    assert joined.end == first + second + more
    assert Joined([parts[0]], []).end == first


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Linear(0.5, 3, 0.6), "goes down"),
        (lambda: Linear(1.0, 3), "final of the schedule is 1.0"),
        (lambda: AGP(0.5, 3, start=4), "end of the schedule is 3"),
        (lambda: Exponential(0.5, -1), "end of the schedule is -1"),
        (lambda: Constant(-0.1), "final of the schedule is -0.1"),
        (lambda: Joined((Constant(0.1),), (3,)), "1 schedules are joined at 1 steps"),
        (lambda: Joined((Constant(0.1),) * 3, (3, 3)), "numbers above 0 that rise"),
        (lambda: Exponential(0.5, 3)(-1), "step of the schedule is -1"),
        (lambda: Linear(0.5, 3)(1.5), "step of the schedule is 1.5"),  # type: ignore[arg-type]
    ],
)
def test_records_that_cannot_be_followed_are_refused(make: Any, words: str) -> None:
    """Each wrong number is one clear error."""
    with pytest.raises(gp.ConfigError, match=words):
        make()
