"""What a node's call becomes once channels are gone: integers that count channels, index tables, implicit defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from graphprune.groups.propagate import Analysis
from graphprune.ops.registry import Value, named_arguments
from graphprune.torch_private import schema_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import fx

    from graphprune.ops.labels import Dim, Ids
    from graphprune.ops.registry import Path


@dataclass(frozen=True, eq=False)
class Removal:
    """An analysed program together with the causes that go.

    Attributes:
        analysis: the program and its labels.
        flags: boolean array over cause ids, True = goes.
    """

    analysis: Analysis
    flags: NDArray[np.bool_]
    _counts: dict[int, tuple[Ids, int]] = field(default_factory=dict, repr=False)  # id of labels -> them (so that the id stays), survivors

    def kept(self, value: Value, dim: int) -> Ids:
        """Returns the positions of a value's dimension that survive."""
        return self.analysis.kept(value.labels[dim], value.shape[dim], self.flags)

    def count(self, labels: Ids) -> int:
        """Returns how many of `labels` survive."""
        known = self._counts.get(id(labels))
        if known is None:
            survivors = labels.size - int(self.analysis.table.removed(labels, self.flags).sum()) if labels.size else 0
            known = self._counts[id(labels)] = (labels, survivors)
        return known[1]

    def loses(self, labels: Ids) -> bool:
        """Returns whether any of `labels` goes."""
        return self.count(labels) < labels.size


@dataclass(frozen=True, eq=False)
class Call:
    """A call with named arguments; tensors are nodes, or tensors where an index table was renumbered."""

    target: Any
    arguments: dict[str, Any]

    def split(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns positional and keyword arguments as the operator's schema asks for them."""
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        gap = False
        for a in schema_of(self.target).arguments:
            if a.name not in self.arguments:
                gap = True
            elif a.kwarg_only or gap:
                keywords[a.name] = self.arguments[a.name]
            else:
                positional.append(self.arguments[a.name])
        return tuple(positional), keywords


def rewrite(node: fx.Node, removal: Removal) -> tuple[Call, list[Path]]:
    """Returns the call of a node after the removal, and the paths of the arguments that changed."""
    notes = removal.analysis.notes[node]
    target: Any = node.target
    arguments = named_arguments(target, node.args, node.kwargs)
    changed = [p for p, labels in notes.extents.items() if removal.loses(labels)]
    cropped = [p for p, labels in notes.crops.items() if removal.loses(labels)]
    renumbered = [p for p, labels in notes.remaps.items() if removal.loses(labels)]
    explicit = {k: v for k, (v, labels) in notes.constants.items() if removal.loses(labels)}
    if notes.become is not None and (changed or cropped or renumbered):
        target, arguments = notes.become[0], {k: _lowered(v, node, removal) for k, v in notes.become[1].items()}
    for path in changed:
        arguments = _replaced(arguments, path, removal.count(notes.extents[path]))
    for path in cropped:
        arguments = _replaced(arguments, path, -removal.count(notes.crops[path]))
    for path in renumbered:
        table = _at(arguments, path)
        literal = table if isinstance(table, torch.Tensor) else removal.analysis.values[table].tensor
        arguments = _replaced(arguments, path, _renumbered(literal, notes.remaps[path], notes.tables.get(path), removal))
    arguments.update(explicit)
    return Call(target, arguments), [*changed, *cropped, *renumbered, *((k,) for k in explicit)]


def _lowered(value: Any, node: fx.Node, removal: Removal) -> Any:
    """Replaces a rule's value by the node behind it: a tensor argument of the original call, or what these were taken out of."""
    if not isinstance(value, Value):
        return value
    values = removal.analysis.values
    return next(n for n in (*node.all_input_nodes, *removal.analysis.program.graph.nodes) if values.get(n) is value)


def _renumbered(table: torch.Tensor, labels: Ids, own: list[Dim] | None, removal: Removal) -> torch.Tensor:
    """Returns the index table without its removed entries, the rest pointing at where their targets are now.

    Args:
        table: positions, or truth values of which those that are set name positions.
        labels: labels of the dimension that is indexed.
        own: labels of the table's own dimensions; None for a vector, whose entries have the labels of their targets.
        removal: what goes.
    """
    gone = removal.analysis.table.removed(labels, removal.flags)
    position = np.cumsum(~gone) - 1
    entries = (table.nonzero().squeeze(1) if table.dtype == torch.bool else table).cpu().numpy() % labels.size
    if own is None:
        entries = entries[~gone[entries]]
    else:
        for d, dim in enumerate(own):
            entries = np.take(entries, removal.analysis.kept(dim, entries.shape[d], removal.flags), axis=d)
    return torch.from_numpy(position[entries]).to(table.device)


def _at(arguments: Any, path: Path) -> Any:
    for step in path:
        arguments = arguments[step]
    return arguments


def _replaced(container: Any, path: Path, value: Any) -> Any:
    """Returns a copy of nested arguments with one entry replaced (missing entries of lists are left alone)."""
    if not path:
        return value
    step, rest = path[0], path[1:]
    if isinstance(container, dict):
        return {**container, step: _replaced(container.get(step), rest, value)}
    items = list(container)
    items[int(step)] = _replaced(items[int(step)], rest, value)
    return items
