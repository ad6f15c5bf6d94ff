"""Footprints: causes are gathered as one would by hand, equal dimensions share their positions, and emptying a layer is noticed."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.groups.footprints import Distinct, Footprints, Layout, Slot, split_overlapping, whole_dim_causes
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


# -- footprints that overlap -----------------------------------------------------------------------------------------------------------


def families(table: LabelTable, *arrays: Ids) -> list[list[int]]:
    """Returns the families of all causes in some arrays, which must have equal footprints, as the engine splits them."""
    layouts = [Layout.of(labels, table) for labels in arrays]
    causes = np.unique(np.concatenate([layout.owners for layout in layouts]))
    assert all(np.unique(layout.counts).size == 1 for layout in layouts)
    return [family.tolist() for family in split_overlapping(causes, layouts)]


def test_blocks_of_two_cuts_are_two_families() -> None:
    """Rows and columns of a square own equally much, but each row shares a position with each column and none with another row."""
    table = LabelTable()
    rows, columns = table.fresh(3), table.fresh(3)
    square = table.merge([rows, columns], (3, 3))
    assert square is not None
    assert families(table, square) == [rows.tolist(), columns.tolist()]
    assert families(table, square, square[::-1].copy()) == [rows.tolist(), columns.tolist()]


def test_three_cuts_are_three_families() -> None:
    """So with a cube, where a row meets every column and every layer, in no more than some positions."""
    table = LabelTable()
    parts = [table.fresh(2), table.fresh(2), table.fresh(2)]
    cube = table.merge(parts, (2, 2, 2))
    assert cube is not None
    assert families(table, cube) == [part.tolist() for part in parts]


def test_causes_that_share_nothing_are_one_family() -> None:
    """Channels that own positions of their own stay together, as do those that share positions in one dimension but not in another."""
    table = LabelTable()
    a = table.fresh(4)
    assert families(table, a, np.repeat(a, 2)) == [a.tolist()]
    rows, columns = table.fresh(2), table.fresh(2)
    square = table.merge([rows, columns], (2, 2))
    assert square is not None
    assert families(table, square, np.concatenate([rows, columns])) == [[*rows.tolist(), *columns.tolist()]]
    assert families(table, a[:1]) == [a[:1].tolist()]


def test_causes_that_share_differently_in_two_dimensions_are_one_family() -> None:
    """Causes are apart only if all that share positions in one dimension share some in every other, too."""
    table = LabelTable()
    rows, columns = table.fresh(2), table.fresh(2)
    square = table.merge([rows, columns], (2, 2))
    assert square is not None
    pairs = np.concatenate([table.product(rows[:1], rows[1:]), table.product(columns[:1], columns[1:])])
    for arrays in ((square, pairs), (pairs, square)):
        assert families(table, *arrays) == [[*rows.tolist(), *columns.tolist()]]


@pytest.mark.parametrize("size", [2, 4])
def test_a_square_cut_gives_two_groups(size: int) -> None:
    """As many heads as each is wide: heads and widths are two groups, each of which can lose all but one, and removal is exact."""
    torch.manual_seed(0)
    inner = nn.Linear(5, size * size)
    model = nn.Sequential(inner, nn.ReLU(), nn.Unflatten(1, (size, size)), nn.Flatten(), nn.Linear(size * size, 3)).double().eval()
    x = torch.randn(4, 5, dtype=torch.float64)
    graph = gp.trace(model, x)
    found = {group.role: next(s.index for s in group.slices if s.parameter == "0.weight") for group in graph.groups}
    assert [group.channels for group in graph.groups] == [size, size]
    heads, widths = found["block"], found["within"]
    assert heads.tolist() == [[h * size + w for w in range(size)] for h in range(size)]
    assert widths.tolist() == heads.T.tolist()
    one = np.arange(size) == 0
    small, report = gp.speedup(model, gp.Masks(graph, {group.name: one for group in graph.groups}))
    assert report.error < 1e-12 < report.effect
    assert small.get_parameter("0.weight").shape == (1, 5)


def test_as_many_norm_groups_as_each_is_wide() -> None:
    """Four norm groups of four channels own what the four positions within them own, everywhere: they are two groups all the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 3, 3)).double().eval()
    graph = gp.trace(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    assert {(group.role, group.channels) for group in graph.groups} == {("block", 4), ("within", 4)}
    one = np.arange(4) == 0
    small, report = gp.speedup(model, gp.Masks(graph, {group.name: one for group in graph.groups}))
    assert report.error < 1e-12 < report.effect
    assert small.get_parameter("0.weight").shape[0] == 1
