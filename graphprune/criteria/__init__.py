"""Criteria: how important a channel is, higher = keep. A criterion sees weights and what was observed of them, never layer types."""

from __future__ import annotations

from collections.abc import Callable

from graphprune.criteria.activations import APoZ, MeanActivation
from graphprune.criteria.base import Criterion
from graphprune.criteria.distances import FPGM
from graphprune.criteria.gradients import HessianDiagonal, Taylor, TaylorGroup
from graphprune.criteria.inputs import Wanda
from graphprune.criteria.norms import L1, L2
from graphprune.criteria.relative import LAMP, Random
from graphprune.criteria.scales import BNScale
from graphprune.errors import ConfigError, nearest

CRITERIA: dict[str, Callable[[], Criterion]] = {
    "l1": L1,
    "l2": L2,
    "fpgm": FPGM,
    "bn_scale": BNScale,
    "apoz": APoZ,
    "mean_activation": MeanActivation,
    "taylor": Taylor,
    "taylor_group": TaylorGroup,
    "hessian": HessianDiagonal,
    "wanda": Wanda,
    "lamp": LAMP,
    "random": Random,
}


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
