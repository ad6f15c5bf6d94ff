"""Searches on networks that have learned digits, against every point: as good at the same budget, and better than uniform sparsity."""

from __future__ import annotations

import itertools

import pytest

import graphprune as gp
from tests.support.analytic import Analytic
from tests.support.searches import REQUIRED, Found, Settings, adapted, every_point, objective, on_budget, trained, untrained

SETTINGS = Settings()


def check(found: Found) -> None:
    """Refuses a result that is more than a point behind, or not above uniform sparsity."""
    oracle = found.oracle
    assert found.holds, f"{found.search}: {found.score:.3f}, best of {oracle.points} {oracle.best:.3f}, uniform {oracle.uniform:.3f}"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_searches_are_within_a_point_of_every_point(seed: int) -> None:
    """Annealing, AMC and TPE, in far fewer models; annealing takes over half of the worse candidates at first, and none at last."""
    model = trained(seed, SETTINGS.widths)
    oracle = every_point(objective(model, SETTINGS))
    assert oracle.points > 200
    results = {found.search: found for found in untrained(model, seed, SETTINGS, oracle)}
    for name in ("annealing", "AMC", "TPE"):
        check(results[name])
        assert results[name].models < oracle.points / 2
    annealing = results["annealing"]
    assert annealing.first_worse is not None
    assert annealing.last_worse is not None
    assert annealing.first_worse > 0.5  # of the candidates that score worse: equal ones are always accepted
    assert annealing.last_worse < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_netadapt_is_within_a_point_of_a_grid_that_is_trained_as_long(seed: int) -> None:
    """Against points that are pruned at once and have as many epochs: the model that was trained on, and its widths treated like these."""
    found, _, widths, _ = adapted(trained(seed, SETTINGS.narrow), seed, SETTINGS)
    assert found.search in REQUIRED
    assert found.oracle.points > 50
    assert found.oracle == widths.oracle
    check(found)
    check(widths)


def test_every_point_is_all_that_is_on_the_budget() -> None:
    """Against trying all widths of a small network: the budget is met, and with one channel more in any group it is not."""
    target = Analytic(max_sparsity=0.8, budget=gp.Budget(macs=0.6))
    sizes = [target.scores[name].size for name in target.groups]
    limit = target.constraints[0]
    meets = {
        widths
        for widths in itertools.product(*(range(target.fewest(n), k + 1) for n, k in zip(target.groups, sizes, strict=True)))
        if limit.cost(dict(zip(target.groups, widths, strict=True))) <= limit.target
    }
    full = {w for w in meets if not any((*w[:at], w[at] + 1, *w[at + 1 :]) in meets for at in range(3))}
    assert {tuple(target.counts(point).values()) for point in on_budget(target)} == full
    assert len(full) > 20
