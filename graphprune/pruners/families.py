"""Groups that own the same positions jointly, as whole heads and the width of heads do: which of them are pruned.

Where a dimension is cut into equal blocks (attention heads, conv groups), either whole "blocks" go (the default: widths of heads, their
scale and the width of conv groups stay as they were), or positions "within" every block, or "both". Of the positions within attention
heads, "query_key" takes only those that the product of queries and keys sums over, "value" only those that reach the output projection
(heads go where a program holds all three in one tensor, which has one width). Where keys and values serve several query heads, a block
is a key head with all its query heads: their ratio stays.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import networkx as nx
import numpy as np

if TYPE_CHECKING:
    from graphprune.groups.graph import DependencyGraph, Group

Cut: TypeAlias = Literal["blocks", "within", "both", "query_key", "value"]
CUTS: tuple[Cut, ...] = get_args(Cut)


def skipped(graph: DependencyGraph, cut: Cut) -> dict[str, str]:
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
