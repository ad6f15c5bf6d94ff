"""What a config list asks of each group, and why some are asked for less than their layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from graphprune.pruners.families import Cut, skipped

if TYPE_CHECKING:
    from graphprune.groups.graph import DependencyGraph, Group
    from graphprune.pruners.config import ResolvedConfig

Selectable: TypeAlias = "Callable[[Group], tuple[str, ...]]"


@dataclass(frozen=True)
class Requests:
    """What is asked of each group.

    Attributes:
        sparsity: group name -> fraction of its channels to remove; 0 where a ranking decides, and for groups that stay whole.
        whole: group name -> why it stays whole.
        notes: group name -> why it is asked for less than some of its layers.
        entries: config entry -> (the total sparsity that it asks for, the names of the groups that it ranks together).
        most: group name -> the largest fraction that it may lose, for all groups that are not kept whole.
    """

    sparsity: dict[str, float]
    whole: dict[str, str]
    notes: dict[str, str]
    entries: dict[int, tuple[float, list[str]]]
    most: dict[str, float]


def requests(graph: DependencyGraph, config: ResolvedConfig, cut: Cut, selectable: Selectable, *, together: bool) -> Requests:
    """Returns what is asked of each group.

    A group's sparsity is the smallest that its layers ask for; an excluded or unmentioned one keeps it whole. Where groups overlap (a row
    dies with its head or with its width), `cut` says which are pruned.

    Args:
        graph: the groups.
        config: what is asked of the layers.
        cut: see `graphprune.pruners.families`.
        selectable: from a group to the layers whose config counts.
        together: rank all groups of one entry together, with its sparsity for their total.
    """
    found = Requests({}, dict(skipped(graph, cut)), {}, {}, {})
    for group in graph.groups:
        found.sparsity[group.name] = 0.0
        layers = selectable(group)
        why = found.whole.get(group.name) or _whole(layers, config)
        if why:
            found.whole[group.name] = why
            continue
        configs = [config.layers[layer] for layer in layers]
        found.most[group.name] = min(c.max_sparsity for c in configs)
        total = configs[0].total if configs[0].total is not None or not together else configs[0].asked
        if total is not None and len({c.entry for c in configs}) == 1:
            found.entries.setdefault(configs[0].entry, (total, []))[1].append(group.name)
        elif any(c.total is not None for c in configs) or (together and any(c.asked is not None for c in configs)):
            why = "which are ranked apart" if together else "one of them with a total sparsity"
            found.whole[group.name] = f"its layers are in different config entries, {why}"
        else:
            asked = [c.sparsity or 0.0 for c in configs]
            found.sparsity[group.name] = min(asked)
            least = configs[asked.index(min(asked))]
            if len(set(asked)) > 1 and least.asked == least.sparsity:
                found.notes[group.name] = f"{layers[asked.index(min(asked))]} asks for least"
            elif any(c.asked is not None and c.asked > (c.sparsity or 0.0) for c in configs):
                found.notes[group.name] = f"max_sparsity_per_layer is {found.most[group.name]:g}"
    return found


def _whole(layers: tuple[str, ...], config: ResolvedConfig) -> str:
    """Returns why a group with these layers stays whole, or nothing."""
    if not layers:
        return "nothing that a config entry can name scales its channels"
    for layer in layers:
        if layer in config.excluded:
            return f"{layer} is excluded"
        if layer not in config.layers:
            return f"{layer} is matched by no config entry"
    return ""
