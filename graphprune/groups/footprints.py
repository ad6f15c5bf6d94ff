"""Footprints: which cause of removal owns which positions of which dimensions.

Most dimensions of a program share their labels with others, so everything is worked out once per distinct array of labels, a *layout*.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.sparse.csgraph import connected_components

from graphprune.groups.graph import Slice
from graphprune.ops.labels import FROZEN, Ids, LabelTable
from graphprune.ops.registry import UNBOUND

if TYPE_CHECKING:
    from graphprune.groups.propagate import Analysis

_NOBODY = -1


@dataclass(frozen=True)
class Slot:
    """One dimension of one parameter with labels.

    Attributes:
        parameter: its name.
        dim: the dimension.
        produces: whether its positions hold the weights that compute the channels.
    """

    parameter: str
    dim: int
    produces: bool


@dataclass(eq=False)
class Layout:
    """A distinct array of labels, by cause.

    Attributes:
        positions: the positions that some cause owns, those of one cause together and ascending.
        owners: the causes, ascending.
        starts: where the positions of each begin in `positions`.
        counts: how many positions each owns.
        labels: the array.
        slots: numbers of the parameter dimensions that have these labels.
    """

    labels: Ids
    positions: Ids
    owners: Ids
    starts: Ids
    counts: Ids
    slots: list[int] = field(default_factory=list)

    @staticmethod
    def of(labels: Ids, table: LabelTable) -> Layout:
        """Sorts an array of labels by cause."""
        positions, causes = table.expand(labels)
        if (causes[1:] < causes[:-1]).any():
            order = np.argsort(causes, kind="stable")
            positions, causes = positions[order], causes[order]
        starts = np.flatnonzero(np.concatenate([[True], causes[1:] != causes[:-1]])) if causes.size else np.zeros(0, dtype=np.int64)
        return Layout(labels, positions, causes[starts], starts, np.diff(starts, append=causes.size))

    def owned(self, causes: Ids) -> Ids:
        """Returns the positions of causes that own equally many, one row each."""
        where = np.searchsorted(self.owners, causes)
        return self.positions[self.starts[where][:, None] + np.arange(self.counts[where[0]])]


@dataclass(eq=False)
class Footprints:
    """The layouts of a program's parameters and of everything computed between them.

    Attributes:
        slots: the parameter dimensions with labels.
        layouts: the distinct layouts, those of parameters first.
        causes: every cause that owns something of a parameter, ascending.
        signature: one number per cause: causes with equal numbers own equally many positions of the same dimensions, of parameters and
            of everything computed between them.
    """

    slots: list[Slot]
    layouts: list[Layout]
    causes: Ids
    signature: np.ndarray[Any, np.dtype[np.uint64]]

    @staticmethod
    def of(slots: list[tuple[Slot, Ids]], analysis: Analysis) -> Footprints:
        """Sorts the labels of a finished analysis."""
        distinct = Distinct(analysis.table)
        layouts: list[Layout] = []
        for number, (_, labels) in enumerate(slots):
            which = distinct.number(labels)
            if which == len(layouts):
                layouts.append(Layout.of(labels, analysis.table))
            layouts[which].slots.append(number)
        owners = np.zeros(analysis.table.size, dtype=bool)
        for layout in layouts:
            owners[layout.owners] = True
        causes = np.flatnonzero(owners)
        place = np.full(analysis.table.size, _NOBODY, dtype=np.int32)
        place[causes] = np.arange(causes.size)
        for labels in _intermediate(analysis):
            if distinct.number(labels) == len(layouts):
                layouts.append(Layout.of(labels, analysis.table))
        signature = np.zeros(causes.size, dtype=np.uint64)
        for number, layout in enumerate(layouts):
            where = place[layout.owners]
            member = where != _NOBODY
            signature[where[member]] += _spread(number, layout.counts[member])
        return Footprints([slot for slot, _ in slots], layouts, causes, signature)

    def members(self) -> list[Ids]:
        """Returns the causes with equal footprints, ascending."""
        if not self.causes.size:
            return []
        order = np.argsort(self.signature, kind="stable")
        ends = np.flatnonzero(np.diff(self.signature[order])) + 1
        return np.split(self.causes[order], ends)

    def layouts_of(self, causes: Ids) -> list[list[Layout]]:
        """Returns, per cause, the parameters' layouts in which it owns something."""
        out: list[list[Layout]] = [[] for _ in range(causes.size)]
        for layout in self.layouts:
            if layout.slots and layout.owners.size:
                where = np.minimum(np.searchsorted(layout.owners, causes), layout.owners.size - 1)
                for i in np.flatnonzero(layout.owners[where] == causes).tolist():
                    out[i].append(layout)
        return out

    def slices(self, causes: Ids, layouts: list[Layout], order: dict[str, int]) -> tuple[Ids, list[Slice]]:
        """Returns a group's causes in the order of their first positions, and its slices, producers first.

        Args:
            causes: causes with equal footprints.
            layouts: the layouts in which they own something.
            order: parameter -> when it is first read.
        """
        found = sorted((number, layout) for layout in layouts for number in layout.slots)
        found.sort(key=lambda item: (not self.slots[item[0]].produces, order.get(self.slots[item[0]].parameter, 0)))
        causes = causes[np.argsort(found[0][1].owned(causes)[:, 0], kind="stable")]
        index = {id(layout): layout.owned(causes) for layout in layouts}
        slots = ((self.slots[number], index[id(layout)]) for number, layout in found)
        return causes, [Slice(s.parameter, s.dim, positions, produces=s.produces) for s, positions in slots]


def split_overlapping(causes: Ids, layouts: list[Layout]) -> list[Ids]:
    """Returns causes with equal footprints in families whose members do not share all of their positions.

    Where one dimension is cut into blocks in two ways, the blocks of both may own equally much of everything. But a block of the first
    cut shares positions with every block of the second, everywhere: together they are no channels of one group, which would be left empty
    by removing all the blocks of one cut.

    Args:
        causes: causes with equal footprints.
        layouts: the layouts in which they own something.
    """
    together = np.ones((causes.size, causes.size), dtype=bool) if causes.size > 1 and all(map(_shared, layouts)) else None
    if together is None:
        return [causes]
    for layout in layouts:
        owned = layout.owned(causes)
        meets = np.zeros((causes.size, layout.labels.size), dtype=np.float32)
        np.put_along_axis(meets, owned, 1.0, axis=1)
        together &= meets @ meets.T > 0
    _, family = connected_components(~together, directed=False)
    return [causes[family == number] for number in range(int(family.max()) + 1)]


def _shared(layout: Layout) -> bool:
    """Returns whether some position of a layout has several owners."""
    return bool(np.bincount(layout.positions, minlength=1).max() > 1)


class Distinct:
    """Numbers the distinct arrays of labels in the order in which they are first seen; the table must not change meanwhile."""

    def __init__(self, table: LabelTable) -> None:
        """Starts with none seen."""
        self._table = table
        self._objects: dict[int, tuple[Ids, int]] = {}  # the arrays are kept so that no other gets their ids
        self._contents: dict[bytes, int] = {}

    def number(self, labels: Ids) -> int:
        """Returns the number of an array: that of the first one with the same labels."""
        known = self._objects.get(id(labels))
        if known is None:
            digest = hashlib.blake2b(self._table.roots(labels).tobytes(), digest_size=16).digest()
            known = self._objects[id(labels)] = labels, self._contents.setdefault(digest, len(self._contents))
        return known[1]


def _intermediate(analysis: Analysis) -> Iterable[Ids]:
    """Yields the label arrays of what is computed between parameters."""
    for value in analysis.values.values():
        for v in value if isinstance(value, list) else (value,):
            if v is not None and not v.parameter:
                yield from (labels for labels in v.labels if labels is not None and labels is not UNBOUND)


def _spread(layout: int, counts: Ids) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Returns a well-spread number per (layout, count): the sum of them over the layouts of a cause is its signature."""
    key: np.ndarray[Any, np.dtype[np.uint64]] = np.uint64(layout * 0x9E3779B97F4A7C15 % 2**64) + counts.astype(np.uint64) * np.uint64(
        0xC2B2AE3D27D4EB4F
    )
    key ^= key >> np.uint64(29)
    key *= np.uint64(0xBF58476D1CE4E5B9)
    key ^= key >> np.uint64(32)
    key *= np.uint64(0x94D049BB133111EB)
    return key


def whole_dim_causes(slots: list[tuple[Slot, Ids]], table: LabelTable) -> list[tuple[int, Slot]]:
    """Returns the causes that own every index of some parameter dimension, each with the first such dimension."""
    out: list[tuple[int, Slot]] = []
    seen: set[int] = set()
    for slot, labels in slots:
        if id(labels) in seen:
            continue
        seen.add(id(labels))
        _, first = table.expand(labels[:1])
        _, last = table.expand(labels[-1:])
        common = np.intersect1d(first, last)
        if common.size and common[0] != FROZEN:
            _, causes = table.expand(labels)
            out += [(cause, slot) for cause in common.tolist() if int((causes == cause).sum()) == labels.size]
    return out
