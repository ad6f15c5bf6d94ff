"""What can be counted from a graph and masks: what is reached, what holds the rest, and whether as much goes as was asked for."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tests.support.invariants import removed_positions

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from tests.support.protocols import GraphLike, Keep

# Norms that the masked reference computes over the kept channels; see `KeptStatistics`.
_KNOWN_NORMS: Final = frozenset({"layer_norm", "native_layer_norm", "group_norm", "native_group_norm", "rms_norm"})
_OBVIOUS: Final = ("is a kernel position", "has size 1")  # reasons that say nothing where another dimension has one as well


def free_positions(model: nn.Module, graph: GraphLike) -> dict[str, list[NDArray[np.bool_]]]:
    """Returns for each parameter, by its first name, and each of its dimensions which positions are in no group."""
    named = dict(model.named_parameters(remove_duplicate=False))
    first = {id(tensor): name for name, tensor in model.named_parameters()}
    free = {name: [np.ones(size, dtype=bool) for size in tensor.shape] for name, tensor in model.named_parameters()}
    for group in graph.groups:
        for piece in group.slices:
            if piece.parameter in named:
                free[first[id(named[piece.parameter])]][piece.dim][piece.index.ravel()] = False
    return free


def reachable_share(model: nn.Module, graph: GraphLike) -> float:
    """Returns the share of the parameter elements that lie in a slice of some group, tied parameters counted once."""
    total = sum(tensor.numel() for tensor in model.parameters())
    stays = sum(_elements(flags) for flags in free_positions(model, graph).values())
    return 1.0 - stays / total if total else 0.0


def _elements(flags: list[NDArray[np.bool_]]) -> int:
    return math.prod(int(dim.sum()) for dim in flags)


def held_by(model: nn.Module, graph: Any, most: int = 3) -> list[list[Any]]:
    """Returns [reason, share of all parameter elements that it holds], the largest first.

    An element that no group reaches has a reason in each of its dimensions, and counts for each different one, so that the shares may
    add up to more than is held. Within a dimension the reasons' elements are taken to be spread evenly over those of the others.
    """
    free = free_positions(model, graph)
    first = {id(tensor): name for name, tensor in model.named_parameters()}
    named = dict(model.named_parameters(remove_duplicate=False))
    places: dict[tuple[str, str], dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for item in graph.frozen:
        if item.parameter in named:
            places[first[id(named[item.parameter])], _plain(item)][item.dim] += len(item.index)
    shares: Counter[str] = Counter()
    telling = {name for name, reason in places if not reason.startswith(_OBVIOUS)}
    for (name, reason), counts in places.items():
        if name in telling and reason.startswith(_OBVIOUS):
            continue
        untouched = math.prod(1.0 - min(1.0, count / max(int(free[name][dim].sum()), 1)) for dim, count in counts.items())
        shares[reason] += round(_elements(free[name]) * (1.0 - untouched))
    total = sum(tensor.numel() for tensor in model.parameters())
    return [[reason, count / total] for reason, count in shares.most_common(most) if count]


def _plain(item: Any) -> str:
    """Returns why something is frozen without the numbers of recorded nodes, so that equal causes read alike."""
    reason = re.sub(r"_\d+\b", "", item.reason)
    return f"{reason} ({item.operator.removeprefix('aten::')})" if item.operator else reason


def off_target(graph: GraphLike, masks: Keep, sparsity: float) -> list[str]:
    """Returns the names of the groups that keep other than (1 - sparsity) of their channels, rounded down, and at least 1.

    Where two groups own positions of some slice jointly (heads, and widths within a head), removing along one of them is enough: such a
    group is off target when more than (1 - sparsity) of its positions stay in each of these slices.
    """
    removed = removed_positions(graph, masks)
    owners = Counter((piece.parameter, piece.dim, int(at)) for g in graph.groups for piece in g.slices for at in np.unique(piece.index))
    off = []
    for group in graph.groups:
        kept = int(np.asarray(masks[group.name]).sum())
        hit = kept == max(1, math.floor((1.0 - sparsity) * group.channels + 1e-9))
        for piece in group.slices:
            owned = np.unique(piece.index)
            if not hit and any(owners[piece.parameter, piece.dim, int(at)] > 1 for at in owned):
                hit = 1.0 - np.isin(owned, removed[piece.parameter, piece.dim]).mean() <= 1.0 - sparsity + 1e-9
        off += [] if hit else [group.name]
    return off


def beyond_reference(graph: Any) -> set[str]:
    """Returns the names of the groups across whose channels something other than a norm module takes a statistic.

    Of a mean or a softmax that a network writes out itself, the masked reference does not know that it must skip the removed channels.
    """
    beyond = set()
    for group in graph.groups:
        owned = {piece.parameter for piece in group.slices}
        for why in group.why:
            operator, _, module = why.partition(" in ")
            if operator not in _KNOWN_NORMS or f"{module}.weight" not in owned:
                beyond.add(group.name)
    return beyond
