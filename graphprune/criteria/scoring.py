"""From a criterion to one score per channel of every group: what the criterion sees, and how a coupled group's parts are put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import torch

from graphprune.criteria.base import Part, seen_by
from graphprune.criteria.statistics.activations import observe_activations
from graphprune.criteria.statistics.curvature import observe_curvature
from graphprune.criteria.statistics.gradients import observe_joint, observe_products
from graphprune.criteria.statistics.inputs import observe_inputs
from graphprune.data.distributed import broadcast_from_first
from graphprune.errors import ConfigError, MaskError
from graphprune.groups.graph import Slice
from graphprune.masks.channels import checked_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import nn

    from graphprune.criteria.base import Criterion
    from graphprune.data.sources import Source
    from graphprune.groups.graph import DependencyGraph, Group

Aggregation: TypeAlias = Literal["sum", "mean", "max", "producer"]
Scope: TypeAlias = Literal["producers", "group"]

AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)
SCOPES: tuple[Scope, ...] = get_args(Scope)
DATA_FREE = ("weights", "scales")
NEEDS_LOSS = ("products", "joint", "curvature")

_PUT_TOGETHER: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "sum": lambda parts: parts.sum(axis=0),
    "mean": lambda parts: parts.mean(axis=0),
    "max": lambda parts: parts.max(axis=0),
    "producer": lambda parts: parts[0],
}


@dataclass(frozen=True, eq=False)
class PartScore:
    """What a criterion made of one part of a group.

    Attributes:
        owner: the slice, or what stands for the place where activations were seen.
        scores: one per channel, float64.
    """

    owner: Slice
    scores: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of all groups.

    Attributes:
        groups: group name -> score per channel, float64, higher = keep.
        parts: group name -> the scores of its parts, before they were put together.
        unscored: group name -> why the criterion has nothing to go by there; such groups stay whole.
    """

    groups: Mapping[str, NDArray[np.float64]]
    parts: Mapping[str, tuple[PartScore, ...]]
    unscored: Mapping[str, str]


def score_groups(
    model: nn.Module,
    graph: DependencyGraph,
    criterion: Criterion,
    *,
    aggregation: Aggregation = "sum",
    scope: Scope = "producers",
    source: Source | None = None,
) -> Scores:
    """Returns the scores of all groups.

    Args:
        model: the model of the graph; as it was afterwards, bit for bit.
        graph: its groups.
        criterion: scores parts.
        aggregation: of the parts of a coupled group: their "sum" (the default: what removal takes away in all), "mean" or "max", or the
            first "producer" alone (the layer after which the group is named).
        scope: which slices are parts: the weights that compute the channels ("producers"), or all of the "group"'s weights, those that
            read the channels included.
        source: where criteria that need data take it from.

    Raises:
        ConfigError: an option is unknown, or the criterion needs data and there is no source.
        MaskError: a score is not a number (the weights hold NaN, or a batch overflows).
        InputError: the data cannot be used.
    """
    if aggregation not in AGGREGATIONS:
        raise ConfigError(f"aggregation is {aggregation!r}", f"Use one of {', '.join(map(repr, AGGREGATIONS))}")
    if scope not in SCOPES:
        raise ConfigError(f"scope is {scope!r}", f"Use one of {', '.join(map(repr, SCOPES))}")
    parts, unscored = _Evidence(model, graph, criterion, scope, source).gathered()
    groups: dict[str, NDArray[np.float64]] = {}
    detail: dict[str, tuple[PartScore, ...]] = {}
    with torch.no_grad():
        for name, found in parts.items():
            detail[name] = tuple(PartScore(p.owner, criterion(p).double().cpu().numpy()) for p in found)
            total = broadcast_from_first(_PUT_TOGETHER[aggregation](np.stack([p.scores for p in detail[name]])))
            if np.isnan(total).any():
                culprits = ", ".join(p.owner.parameter for p in found)
                raise MaskError(f"scores of group {name!r} are not numbers: {culprits} hold NaN", "Check the weights and the data")
            groups[name] = total
    return Scores(groups, detail, unscored)


class _Evidence:
    """What a criterion is shown of each group."""

    def __init__(self, model: nn.Module, graph: DependencyGraph, criterion: Criterion, scope: Scope, source: Source | None) -> None:
        self.model = model
        self.graph = graph
        self.criterion: Any = criterion
        self.scope = scope
        self.tensors = {name: tensor.detach() for name, tensor in checked_tensors(model, graph).items()}
        self.sees = seen_by(criterion)
        if source is None and self.sees not in DATA_FREE:
            wanted = "data= (a loader of (inputs, targets)) and loss=" if self.sees in NEEDS_LOSS else "data= (batches of inputs)"
            what = f"the criterion {type(criterion).__name__} needs data, and there is none"
            raise ConfigError(what, f"Pass {wanted}, or trainer=, optimizer= and criterion=")
        self._source = source

    @property
    def source(self) -> Source:
        """Where data comes from."""
        assert self._source is not None  # noqa: S101 (checked above)
        return self._source

    def gathered(self) -> tuple[dict[str, tuple[Part, ...]], dict[str, str]]:
        """Returns group name -> parts, and group name -> why it has none."""
        if self.sees == "activations":
            parts = self._activations()
            why = "no activation of its channels was seen"
        elif self.sees == "scales":
            parts = {g.name: tuple(Part(self.tensors[s.parameter], s) for s in self._scales(g)) for g in self.graph.groups}
            why = "no batch norm scales its channels"
        else:
            slices = {g.name: self._slices(g) for g in self.graph.groups}
            extra = self._observed(slices)
            parts = {
                name: tuple(
                    Part(self.tensors[s.parameter], s, extra.get(name if self.sees == "joint" else s.parameter, {})) for s in owners
                )
                for name, owners in slices.items()
            }
            why = "it has no weights in scope"
        return {n: p for n, p in parts.items() if p}, {n: why for n, p in parts.items() if not p}

    def _slices(self, group: Group) -> tuple[Slice, ...]:
        if self.scope == "producers":
            return group.producers
        readers = [s for s in group.slices if not s.produces and len(self.graph.shapes[s.parameter]) > 1 and s not in group.producers]
        return (*group.producers, *readers)

    def _scales(self, group: Group) -> list[Slice]:
        return [s for s in group.slices if s.parameter in self.graph.scales]

    def _observed(self, slices: dict[str, tuple[Slice, ...]]) -> dict[str, dict[str, torch.Tensor]]:
        """Returns parameter name (of "joint", group name) -> what was observed, by name; the slices of "joint" become one each."""
        names = sorted({s.parameter for owners in slices.values() for s in owners})
        if self.sees == "products":
            return {n: {"products": t} for n, t in observe_products(self.model, names, self.source).items()}
        if self.sees == "inputs":
            return {n: {"inputs": t} for n, t in observe_inputs(self.model, self.graph, names, self.source).items()}
        if self.sees == "curvature":
            found = observe_curvature(self.model, names, self.source, self.criterion.probes, self.criterion.seed)
            return {n: {"curvature": t} for n, t in found.items()}
        if self.sees == "joint":
            joint = observe_joint(self.model, slices, self.source)
            slices.update({name: owners[:1] for name, owners in slices.items()})
            return {n: {"joint": t} for n, t in joint.items()}
        return {}

    def _activations(self) -> dict[str, tuple[Part, ...]]:
        found = observe_activations(self.model, self.graph, self.source)
        out = {}
        for group in self.graph.groups:
            index = np.arange(group.channels)[:, None]
            out[group.name] = tuple(
                Part(o.elements, Slice(o.place, 0, index), {"zeros": o.zeros, "total": o.total, "elements": o.elements})
                for o in found.get(group.name, ())
                if bool((o.elements > 0).all())  # else no batch came here
            )
        return out
