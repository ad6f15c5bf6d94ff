"""Footprints: causes are gathered as one would by hand, equal dimensions share their positions, and emptying a layer is noticed."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.groups.footprints import Distinct, Footprints, Layout, Slot, whole_dim_causes
from graphprune.groups.propagate import Analysis
from graphprune.ops.labels import Ids, LabelTable
from graphprune.trace.recorder import record


def table_with_products(seed: int) -> tuple[LabelTable, list[Ids]]:
    """Returns arrays of labels: atoms, unions of two, frozen ones, and atoms that were made equal."""
    draw = np.random.default_rng(seed)
    table = LabelTable()
    a, b, c = table.fresh(6), table.fresh(4), table.fresh(6)
    outer = table.product(np.repeat(a, 4), np.tile(b, 6))
    table.freeze(a[:1], 0)
    table.unify(c[2:4], a[2:4], 0)
    arrays = [a, b, c, outer, draw.permutation(outer), np.concatenate([b, a]), np.zeros(3, dtype=np.int64), a.copy()]
    return table, [arrays[i] for i in draw.permutation(len(arrays))]


def analysis_of(table: LabelTable) -> Analysis:
    """Returns an analysis of a program with nothing between its parameters."""
    return Analysis(record(nn.Linear(2, 2), torch.ones(1, 2)), table=table)


@pytest.mark.parametrize("seed", range(8))
def test_members_and_slices_are_those_gathered_one_by_one(seed: int) -> None:
    """Causes are together exactly where they own equally many positions of every dimension, and own what a loop over all labels finds."""
    table, arrays = table_with_products(seed)
    slots = [(Slot(f"p{i}", 0, produces=i % 2 == 0), labels) for i, labels in enumerate(arrays)]
    owned: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for slot, labels in slots:
        for position, label in enumerate(labels.tolist()):
            for cause in table.causes(label):
                owned[cause][slot.parameter].append(position)
    expected: dict[object, list[int]] = defaultdict(list)
    for cause in sorted(owned):
        expected[frozenset(Counter({p: len(where) for p, where in owned[cause].items()}).items())].append(cause)
    footprints = Footprints.of(slots, analysis_of(table))
    members = footprints.members()
    assert sorted(m.tolist() for m in members) == sorted(expected.values())
    for causes, layouts in zip(members, footprints.layouts_of(np.array([m[0] for m in members])), strict=True):
        ordered, slices = footprints.slices(causes, layouts, {})
        assert sorted(ordered.tolist()) == causes.tolist()
        assert [s.produces for s in slices] == sorted((s.produces for s in slices), reverse=True)
        assert slices[0].index[:, 0].tolist() == sorted(slices[0].index[:, 0].tolist())
        for s in slices:
            assert [sorted(row) for row in s.index.tolist()] == [owned[c][s.parameter] for c in ordered.tolist()]
        assert {s.parameter for s in slices} == set(owned[int(causes[0])])


def test_nothing_owned_gives_no_members() -> None:
    """A program whose dimensions are all frozen has no groups."""
    table = LabelTable()
    footprints = Footprints.of([(Slot("p", 0, produces=True), np.zeros(4, dtype=np.int64))], analysis_of(table))
    assert footprints.members() == []


def test_a_layout_lists_the_positions_of_each_cause() -> None:
    """Owners ascend, and so do the positions of each."""
    table = LabelTable()
    a = table.fresh(3)
    layout = Layout.of(np.array([a[2], a[0], 0, a[2], a[0]]), table)
    assert layout.owners.tolist() == [a[0], a[2]]
    assert layout.owned(layout.owners[::-1]).tolist() == [[0, 3], [1, 4]]
    assert layout.counts.tolist() == [2, 2]


def test_arrays_are_distinct_by_what_their_labels_stand_for() -> None:
    """Arrays that were made equal have one number, whatever ids they hold."""
    table = LabelTable()
    a, b, c = table.fresh(3), table.fresh(3), table.fresh(3)
    table.unify(a, b, 0)
    distinct = Distinct(table)
    assert [distinct.number(x) for x in (a, c, b, c.copy(), a[::-1].copy())] == [0, 1, 0, 1, 2]


def test_equal_dimensions_share_their_positions() -> None:
    """The slices of a residual stream hold one array of positions between them, however many layers it runs through."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    group = gp.trace(model, torch.ones(1, 3, 6, 6))["0"]
    assert len(group.slices) > 5
    assert len({id(s.index) for s in group.slices}) == 1


def test_causes_that_own_a_whole_dimension_are_found() -> None:
    """A cause in every position would empty the layer; one that misses a position, or shares them all with none in common, would not."""
    table = LabelTable()
    a, b = table.fresh(1), table.fresh(3)
    whole = table.product(np.repeat(a, 3), b)
    slots = [(Slot("missing", 0, produces=False), np.array([a[0], 0, a[0]])), (Slot("apart", 0, produces=False), b)]
    assert whole_dim_causes(slots, table) == []
    first, again = Slot("whole", 1, produces=False), Slot("again", 0, produces=False)
    assert whole_dim_causes([*slots, (first, whole), (again, whole)], table) == [(int(a[0]), first)]
