"""What was asked of every layer, and what it lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from graphprune.cost.count import Cost
from graphprune.cost.predict import Forecast
from graphprune.speedup.report import LayerReport

if TYPE_CHECKING:
    from torch import nn

    from graphprune.groups.graph import DependencyGraph
    from graphprune.masks.channels import Masks
    from graphprune.pruners.budgets import Plan


def layer_reports(model: nn.Module, masks: Masks, plan: Plan) -> Iterator[LayerReport]:
    """Yields one report per module that has parameters or MACs of its own, in the order of execution.

    Args:
        model: the model before the speedup.
        masks: what is kept.
        plan: what was asked.
    """
    graph = masks.graph
    forecast = Forecast(model, graph)
    before, after = forecast.by_layer({}), forecast.by_layer(masks)
    produced, notes = _produced(graph, masks), _notes(graph, plan)
    for name, cost in before.items():
        channels, kept = produced.get(name, (0, 0))
        requested, note = plan.layers.get(name), "; ".join(notes.get(name, ()))
        if cost != Cost(0, 0):
            yield LayerReport(name, graph.modules.get(name, ""), cost, after[name], channels, kept, requested, note)


def _produced(graph: DependencyGraph, masks: Masks) -> dict[str, tuple[int, int]]:
    """Returns layer -> (how many channels it produces, how many of them are kept)."""
    positions = masks.positions()
    out: dict[str, tuple[int, int]] = {}
    for slot in dict.fromkeys((s.parameter, s.dim) for g in graph.groups for s in g.slices if s.produces):
        parameter, dim = slot
        size = graph.shapes[parameter][dim]
        kept = positions.get(parameter, {}).get(dim, np.arange(size)).size
        out.setdefault(parameter.rpartition(".")[0], (size, kept))
    return out


def _notes(graph: DependencyGraph, plan: Plan) -> dict[str, dict[str, None]]:
    """Returns layer -> why the groups whose channels it produces lost less, each reason once."""
    out: dict[str, dict[str, None]] = {}
    for group in graph.groups:
        if group.name in plan.notes:
            for layer in group.layers:
                out.setdefault(layer, {})[plan.notes[group.name]] = None
    return out
