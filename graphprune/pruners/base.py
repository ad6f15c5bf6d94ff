"""The shape that all pruners share: config list and example inputs in, masks out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import networkx as nx
import numpy as np

from graphprune.arithmetic.widths import stated_widths
from graphprune.budgets import Plan, Rounding, global_counts, keep_highest, kept_count
from graphprune.config import ResolvedConfig, resolve
from graphprune.criteria import Criterion, group_scores
from graphprune.errors import ConfigError, InputError
from graphprune.groups import trace
from graphprune.masks import Masks, checked_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from graphprune.graph import DependencyGraph, Group

Cut: TypeAlias = Literal["blocks", "within", "both", "query_key", "value"]
CUTS: tuple[Cut, ...] = get_args(Cut)


class Pruner:
    """Scores the groups of a model with one criterion and keeps the best channels of each.

    Args:
        model: left as it is.
        config_list: entries as in the seeds, see `graphprune.config`; a layer that no entry matches is kept whole.
        criterion: scores channels, see `graphprune.criteria`.
        example_inputs: what the model is run on to find its groups: a tensor, a tuple of arguments, a dict of keyword arguments, or
            (arguments, keyword arguments).
        rounding: of the kept count, "floor" or "ceil".
        round_to: kept counts are multiples of this where there are enough channels.
        cut: what goes where a dimension is cut into equal blocks (attention heads, conv groups): whole "blocks" (the default: widths
            of heads, their scale and the width of conv groups stay as they were), positions "within" every block, or "both". Of the
            positions within attention heads, "query_key" takes only those that the product of queries and keys sums over, "value" only
            those that reach the output projection (heads go where a program holds all three in one tensor, which has one width).
            Where keys and values serve several query heads, a block is a key head with all its query heads: their ratio stays.
        graph: the model's graph, if there is one already.
        keep_class: keep more channels where the model's own arithmetic on sizes (`C // num_heads`, equal chunks) could not state what
            was asked for, so that the shrunk model can be of the model's own class.

    Raises:
        ConfigError: the config list or an option is not usable.
        InputError: there are no example inputs, or the model cannot run on them.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        criterion: Criterion,
        example_inputs: object = None,
        *,
        rounding: Rounding = "floor",
        round_to: int = 1,
        cut: Cut = "blocks",
        graph: DependencyGraph | None = None,
        keep_class: bool = False,
    ) -> None:
        if example_inputs is None and graph is None:
            raise InputError(
                f"{type(self).__name__} has no example inputs to find the dependencies of {type(model).__name__} with",
                "Pass example_inputs=, a tensor or a tuple of tensors that model(...) accepts",
            )
        kept_count(1, 0.5, rounding, round_to)
        if cut not in CUTS:
            raise ConfigError(f"cut is {cut!r}", f"Use one of {', '.join(map(repr, CUTS))}")
        self.model = model
        self.criterion = criterion
        self.rounding: Rounding = rounding
        self.round_to = round_to
        self.cut: Cut = cut
        self.graph = graph if graph is not None else trace(model, example_inputs)
        others = {n: t for n, t in self.graph.modules.items() if n not in self.graph.layers}
        self.config = resolve(config_list, self.graph.layers, others)
        self.keep_class = keep_class
        self.plan = Plan()

    def compress(self) -> tuple[nn.Module, Masks]:
        """Returns (a copy of the model with the removed channels zeroed, the masks)."""
        masks = self.masks()
        return masks.masked(self.model), masks

    def masks(self) -> Masks:
        """Returns the masks; `plan` says afterwards what was asked of each group and why some lost less."""
        start = time.perf_counter()
        scores = self.scores()
        requested, notes = wanted(self.graph, self.config, self.cut)
        counts = {g.name: kept_count(g.channels, requested[g.name], self.rounding, self.round_to) for g in self.graph.groups}
        for entry, total in totals(self.config).items():
            members = ranked_together(self.graph, self.config, entry, notes)
            if members:
                ranked = {g.name: scores[g.name] for g in members}
                most = {g.name: min(self.config.layers[layer].max_sparsity for layer in g.layers) for g in members}
                counts |= global_counts(ranked, total, most, self.rounding, self.round_to)
        if self.keep_class:
            stated = stated_widths(self.model, self.graph, counts, self.round_to)
            raised = {n: k for n, k in stated.items() if k > counts[n]}
            notes |= {n: f"{k} kept instead of {counts[n]}, a width that the model's code can state" for n, k in raised.items()}
            counts = stated
        kept = {g.name: keep_highest(scores[g.name], counts[g.name]) for g in self.graph.groups if counts[g.name] < g.channels}
        self.plan = Plan(requested, notes, {"score": time.perf_counter() - start})
        return Masks(self.graph, kept)

    def scores(self) -> dict[str, NDArray[np.float64]]:
        """Returns group name -> score per channel, higher = keep."""
        return group_scores(self.graph, checked_tensors(self.model, self.graph), self.criterion)


def totals(config: ResolvedConfig) -> dict[int, float]:
    """Returns config entry -> total sparsity, for the entries that ask for one ranking over all their layers."""
    return {c.entry: c.total for c in config.layers.values() if c.total is not None}


def ranked_together(graph: DependencyGraph, config: ResolvedConfig, entry: int, notes: Mapping[str, str]) -> list[Group]:
    """Returns the groups all of whose producing layers a total sparsity's entry matches (those kept whole for a reason left out)."""
    return [
        g for g in graph.groups if g.name not in notes and all(n in config.layers and config.layers[n].entry == entry for n in g.layers)
    ]


def wanted(graph: DependencyGraph, config: ResolvedConfig, cut: Cut) -> tuple[dict[str, float], dict[str, str]]:
    """Returns what is asked of each group, and why some are asked for less.

    A group's sparsity is the smallest that its producing layers ask for; an excluded or unmentioned producer keeps it whole. Where
    groups overlap (a row dies with its head or with its width), `cut` says which are pruned.
    """
    requested: dict[str, float] = {}
    notes: dict[str, str] = {}
    skipped = _skipped(graph, cut)
    for group in graph.groups:
        requested[group.name], notes[group.name] = _of_group(group, config)
        if group.name in skipped:
            requested[group.name], notes[group.name] = 0.0, skipped[group.name]
    return requested, {k: v for k, v in notes.items() if v}


def _of_group(group: Group, config: ResolvedConfig) -> tuple[float, str]:
    asked: dict[str, float] = {}
    for layer in group.layers:
        if layer in config.excluded:
            return 0.0, f"{layer} is excluded"
        if layer not in config.layers:
            return 0.0, f"{layer} is matched by no config entry"
        entry = config.layers[layer]
        asked[layer] = entry.sparsity if entry.sparsity is not None else 0.0
    found = [config.layers[layer] for layer in group.layers]
    if len({c.entry for c in found}) > 1 and any(c.total is not None for c in found):
        return 0.0, "its layers are in different config entries, one of them with a total sparsity"
    lowest = min(asked, key=lambda n: asked[n])
    note = f"{lowest} asks for least" if len(set(asked.values())) > 1 else ""
    return asked[lowest], note


def _skipped(graph: DependencyGraph, cut: Cut) -> dict[str, str]:
    """Returns the groups that stay whole because an overlapping one is pruned instead, with the reason."""
    if cut == "both":
        return {}
    out: dict[str, str] = {}
    for family in _overlapping(graph):
        blocks = [g for g in family if g.role == "block"]
        within = [g for g in family if g.role == "within"]
        blocks = blocks if any(g.channels > 1 for g in blocks) else []  # one block is all there is: none can go
        if blocks and within:
            chosen, words = _chosen(blocks, within, cut, graph)
            names = {g.name for g in chosen}
            out |= {g.name: f"{words} go instead (cut={cut!r})" for g in (*blocks, *within) if g.name not in names}
    return out


def _chosen(blocks: list[Group], within: list[Group], cut: Cut, graph: DependencyGraph) -> tuple[list[Group], str]:
    """Returns which groups of one family `cut` asks for, and in words what they are."""
    summed = [g for g in within if not _is_read(g, graph)]
    read = [g for g in within if _is_read(g, graph)]
    if cut == "within":
        return within, "positions within"
    if cut in ("query_key", "value") and summed and read:
        return (summed, "positions of queries and keys") if cut == "query_key" else (read, "positions of values")
    return blocks, "whole blocks"


def _is_read(group: Group, graph: DependencyGraph) -> bool:
    """Returns whether some weight reads these channels; those of queries and keys are summed over by their own product."""
    return any(not s.produces and len(graph.shapes.get(s.parameter, ())) > 1 for s in group.slices)


def _overlapping(graph: DependencyGraph) -> list[list[Group]]:
    """Returns families of groups that own the same positions jointly."""
    owners: dict[tuple[str, int], list[Group]] = {}
    meeting: nx.Graph[str] = nx.Graph()
    for group in graph.groups:
        if group.role:
            meeting.add_node(group.name)
            for s in group.slices:
                owners.setdefault((s.parameter, s.dim), []).append(group)
    for (parameter, dim), groups in owners.items():
        meeting.add_edges_from((a.name, b.name) for a, b in itertools.combinations(groups, 2) if _share(a, b, parameter, dim))
    return [[graph[name] for name in graph.ordered(family)] for family in nx.connected_components(meeting)]


def _share(a: Group, b: Group, parameter: str, dim: int) -> bool:
    owned_a = [s.index.ravel() for s in a.slices if (s.parameter, s.dim) == (parameter, dim)]
    owned_b = [s.index.ravel() for s in b.slices if (s.parameter, s.dim) == (parameter, dim)]
    return bool(np.intersect1d(np.concatenate(owned_a), np.concatenate(owned_b)).size)
