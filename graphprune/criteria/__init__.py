"""Criteria: how important a channel is, higher = keep. A criterion sees weights, never layer types."""

from __future__ import annotations

from graphprune.criteria.base import Criterion, ProducerWeights, group_scores
from graphprune.criteria.norms import L1
from graphprune.errors import ConfigError, nearest

CRITERIA: dict[str, type[L1]] = {"l1": L1}


def criterion_named(name: str | Criterion) -> Criterion:
    """Returns the criterion of that name (or the criterion itself).

    Raises:
        ConfigError: there is no such criterion; the nearest is suggested.
    """
    if not isinstance(name, str):
        return name
    try:
        return CRITERIA[name]()
    except KeyError:
        hint = nearest(name, CRITERIA) or f"Choose one of {', '.join(CRITERIA)}"
        raise ConfigError(f"no criterion is called {name!r}", hint) from None


__all__ = ["CRITERIA", "L1", "Criterion", "ProducerWeights", "criterion_named", "group_scores"]
