"""Which attributes of the user's modules feed the sizes that must change, found rather than guessed.

The forward pass is watched with tracked integers (`graphprune.sizes`); what arrives at `view`, `split` ... says what the attributes
behind it must become. What is set here is only ever a proposal: the shrunk module is compared with the masked model afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphprune.sizes.equations import definitions
from graphprune.sizes.expressions import Attribute, Extent, Place, evaluate, leaves
from graphprune.sizes.watch import Demand, demands

if TYPE_CHECKING:
    from torch import nn

    from graphprune.sizes.expressions import Leaf
    from graphprune.surgery.rewriting import Removal


@dataclass(frozen=True)
class Discovery:
    """What was found out about a model's code.

    Attributes:
        values: the attributes that must change, and what they must become.
        broken: demands that no attribute can meet, as phrases.
    """

    values: dict[Place, int]
    broken: tuple[str, ...] = ()


def discover(model: nn.Module, removal: Removal, found: Sequence[Demand] | None = None) -> Discovery:
    """Returns the attributes that must change, and what cannot be had by changing any, as far as a forward pass tells.

    Args:
        model: left as it is.
        removal: its recording, and what goes.
        found: what the model's code asks of its sizes, if that has been found out already.
    """
    return solved(demands(model, removal.analysis) if found is None else found, removal)


def solved(found: Sequence[Demand], removal: Removal) -> Discovery:
    """Returns attribute values that meet demands."""
    counts: dict[int, int] = {}

    def count(labels: Extent) -> int:
        key = id(labels.labels)
        if key not in counts:
            counts[key] = removal.count(labels.labels)
        return counts[key]

    def wanted(demand: Demand) -> int:
        return demand.old if demand.labels is None else count(Extent(demand.labels, demand.old))

    required = [d for d in found if d.required]
    equations = [(d.code, wanted(d)) for d in sorted(required, key=lambda d: wanted(d) == d.old)]
    meant = definitions(equations, lambda leaf: count(leaf) if isinstance(leaf, Extent) else leaf.old)
    values: dict[Place, int] = {}

    def value(leaf: Leaf) -> int:
        if isinstance(leaf, Extent):
            return count(leaf)
        return values.get(leaf.place, leaf.old)

    for place, expression in meant.items():
        values[place] = max(int(evaluate(expression, value)), 1)
    old = {leaf.place: leaf.old for d in required for leaf in _attributes(d)}
    given = [(d, int(evaluate(d.code, value)), wanted(d)) for d in required]
    broken = [f"{d}, which gives {gives} where {needed} is needed" for d, gives, needed in given if gives != needed]
    return Discovery({p: v for p, v in values.items() if v != old[p]}, tuple(dict.fromkeys(broken)))


def _attributes(demand: Demand) -> list[Attribute]:
    return [leaf for leaf in leaves(demand.code) if isinstance(leaf, Attribute)]
