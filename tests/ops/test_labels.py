"""The label algebra against sets: what is said of labels holds for their sets of causes, and nothing freezes without need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from graphprune.ops.labels import FROZEN, NO_REASON, Dim, Ids, LabelTable
from tests.support.operators import Case, check, vectors

LENGTH = 6
CUTS = ((2, 3), (3, 2), (6, 1), (1, 6))


def sets(table: LabelTable, ids: Dim) -> list[frozenset[int]]:
    """Returns the causes of each label."""
    assert ids is not None
    return [frozenset(table.causes(int(i))) for i in ids]


def ids(*values: int) -> Ids:
    """Returns an array of labels."""
    return np.array(values, dtype=np.int64)


# -- one thing at a time -------------------------------------------------------------------------------------------------------------


def test_fresh_labels_are_different_and_live() -> None:
    """Every new label has itself as its only cause."""
    table = LabelTable()
    new = np.concatenate([table.fresh(3), table.fresh(2000)])
    assert np.unique(new).size == 2003
    assert table.size == 2004
    assert sets(table, new[-3:]) == [frozenset({int(i)}) for i in new[-3:]]


def test_products_are_unions() -> None:
    """A product has the causes of both; one with itself or with nothing is the label itself."""
    table = LabelTable()
    a, b = table.fresh(2), table.fresh(2)
    assert sets(table, table.product(a, b)) == [frozenset({int(x), int(y)}) for x, y in zip(a, b, strict=True)]
    assert sets(table, table.product(a, a)) == sets(table, a)
    assert sets(table, table.product(ids(FROZEN, FROZEN), b)) == sets(table, b)


def test_substitution_reaches_what_was_seen_before() -> None:
    """What is learnt about a label holds in the products that were made of it earlier."""
    table = LabelTable()
    a, b, c = table.fresh(1), table.fresh(1), table.fresh(1)
    both = table.product(a, b)
    later = table.product(c, table.fresh(1))
    table.unify(b, later, 0)
    assert sets(table, both)[0] == sets(table, a)[0] | sets(table, later)[0]


def test_products_unify_in_order() -> None:
    """Rows meet rows and columns meet columns when two grids of one shape meet."""
    table = LabelTable()
    one, two = table.fresh(6), table.fresh(6)
    rows_one, columns_one = table.split(one, (2, 3), 0)
    rows_two, columns_two = table.split(two, (2, 3), 0)
    assert table.unify(one, two, 0) == 0
    assert sets(table, rows_one) == sets(table, rows_two)
    assert sets(table, columns_one) == sets(table, columns_two)
    assert len(set(sets(table, rows_one))) == 2
    assert len(set(sets(table, columns_one))) == 3


def test_three_way_cut() -> None:
    """A cut into three dimensions gives one cause per index of each."""
    table = LabelTable()
    flat = table.fresh(24)
    parts = table.split(flat, (2, 3, 4), 0)
    assert [len(set(sets(table, part))) for part in parts] == [2, 3, 4]
    assert all(len(label) == 3 for label in sets(table, flat))
    merged = table.merge(parts, (2, 3, 4))
    assert sets(table, merged) == sets(table, flat)


def test_cut_along_labels_makes_nothing_new() -> None:
    """A dimension whose labels vary along rows or columns only is cut without new causes."""
    table = LabelTable()
    rows = table.fresh(2)
    assert table.split(np.repeat(rows, 3), (2, 3), 0)[1] is None
    columns = table.fresh(3)
    none, same = table.split(np.tile(columns, 2), (2, 3), 0)
    assert none is None
    assert sets(table, same) == sets(table, columns)
    again = table.split(table.merge([rows, columns], (2, 3)), (2, 3), 0)
    assert [sets(table, part) for part in again] == [sets(table, rows), sets(table, columns)]


def test_other_cuts_of_one_dimension_refine() -> None:
    """(2, 6) and (4, 3) of twelve indices have the cut (2, 2, 3) in common."""
    table = LabelTable()
    flat = table.fresh(12)
    rows, columns = table.split(flat, (2, 6), 0)
    blocks, within = table.split(flat, (4, 3), 0)
    assert len(set(sets(table, rows))) == 2
    assert sets(table, blocks)[0] > sets(table, rows)[0]
    assert sets(table, columns)[0] > sets(table, within)[0]
    causes = frozenset[int]().union(*sets(table, flat))
    assert len(causes) == 2 + 2 + 3


def test_nothing_to_cut_or_merge() -> None:
    """Dimensions without labels stay without labels."""
    table = LabelTable()
    assert table.split(None, (2, 3), 0) == [None, None]
    assert table.merge([None, None], (2, 3)) is None
    frozen = np.zeros(6, dtype=np.int64)
    assert table.split(frozen, (2, 3), 0) == [None, None]
    one = table.fresh(3)
    assert sets(table, table.merge([None, one], (2, 3))) == sets(table, one) * 2


def test_freezing_says_why() -> None:
    """Freezing a product freezes all its causes, counts them, and gives each label the reason."""
    table = LabelTable()
    a, b, c = table.fresh(2), table.fresh(2), table.fresh(2)
    product = table.product(a, b)
    table.unify(c, product, 5)
    assert table.freeze(product[:1], 7) == 2
    assert table.freeze(product[:1], 8) == 0
    assert sets(table, ids(a[0], b[0], c[0], product[0])) == [frozenset()] * 4
    assert table.reasons(ids(a[0], b[0], c[0], product[0], a[1], c[1])).tolist() == [7, 7, 7, 7, NO_REASON, NO_REASON]


def test_meeting_what_is_frozen_freezes() -> None:
    """A label that is made equal to nothing is frozen, with the reason of that meeting."""
    table = LabelTable()
    a = table.fresh(3)
    assert table.unify(a, ids(FROZEN, int(a[1]), FROZEN), 4) == 2
    assert table.reasons(a).tolist() == [4, NO_REASON, 4]


def test_a_label_within_itself() -> None:
    """An equality x = {x, y} can only hold where y is nothing."""
    table = LabelTable()
    x, y = table.fresh(1), table.fresh(1)
    assert table.unify(x, table.product(x, y), 3) == 1
    assert sets(table, ids(x[0], y[0])) == [frozenset({int(x[0])}), frozenset()]


def test_removal_of_causes() -> None:
    """An index goes when any of its causes goes."""
    table = LabelTable()
    a, b = table.fresh(3), table.fresh(1)
    labels = np.concatenate([a, table.product(a[:1], b), ids(FROZEN)])
    flags = np.zeros(table.size, dtype=bool)
    flags[b] = True
    assert table.removed(labels, flags).tolist() == [False, False, False, True, False]
    flags[a[0]] = True
    assert table.removed(labels, flags).tolist() == [True, False, False, True, False]


# -- several causes that meet several ------------------------------------------------------------------------------------------------


def together(table: LabelTable, *causes: Ids) -> Ids:
    """Returns the label with these causes, in this order."""
    label = causes[0]
    for cause in causes[1:]:
        label = table.product(label, cause)
    return label


def test_unions_of_several() -> None:
    """The union of two sets of causes holds each cause once, whichever of them overlap, and leaves both as they were."""
    table = LabelTable()
    a, b, c, d = (table.fresh(1) for _ in range(4))
    left = np.concatenate([together(table, a, b), together(table, a, b), together(table, a, b, c), ids(FROZEN), d])
    right = np.concatenate(
        [together(table, c, d), together(table, b, c, d), together(table, a, c), together(table, a, b), together(table, a, d)]
    )
    before = sets(table, left), sets(table, right)
    assert sets(table, table.product(left, right)) == [x | y for x, y in zip(*before, strict=True)]
    assert [len(label) for label in sets(table, table.product(left, right))] == [4, 4, 3, 2, 2]
    assert (sets(table, left), sets(table, right)) == before


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_as_many_causes_meet_one_by_one(order: tuple[int, ...]) -> None:
    """{a, b, c} = {d, e, f} makes a and d, b and e, c and f equal, in the order in which the labels were put together, and no others."""
    table = LabelTable()
    one, two = [table.fresh(1) for _ in range(3)], [table.fresh(1) for _ in range(3)]
    assert table.unify(together(table, *one), together(table, *(two[i] for i in order)), 1) == 0
    assert [sets(table, x) for x in one] == [sets(table, two[i]) for i in order]
    assert len({int(table.roots(x)[0]) for x in one}) == 3


def test_common_causes_are_no_part_of_the_meeting() -> None:
    """{a, x, b} = {x, c, d} says nothing of x: a and c, b and d are equal."""
    table = LabelTable()
    a, b, c, d, x = (table.fresh(1) for _ in range(5))
    assert table.unify(together(table, a, x, b), together(table, x, c, d), 1) == 0
    assert sets(table, a) == sets(table, c) == [frozenset({int(a[0])})]
    assert sets(table, b) == sets(table, d) == [frozenset({int(b[0])})]
    assert sets(table, x) == [frozenset({int(x[0])})]


def test_one_cause_left_becomes_the_several_that_it_meets() -> None:
    """{a, x} = {x, b, c} refines a into {b, c}, everywhere that a was seen."""
    table = LabelTable()
    a, b, c, x, y = (table.fresh(1) for _ in range(5))
    elsewhere = together(table, a, y)
    assert table.unify(together(table, a, x), together(table, x, b, c), 1) == 0
    assert sets(table, a) == [frozenset({int(b[0]), int(c[0])})]
    assert sets(table, elsewhere) == sets(table, together(table, b, c, y))
    assert len(sets(table, x)[0]) == len(sets(table, b)[0]) == 1


def test_several_that_meet_more_become_one() -> None:
    """{a, b, x} = {c, d, e, x} cannot be matched one by one: all but x are one cause, which lives; nothing else changes."""
    table = LabelTable()
    a, b, c, d, e, x, y = (table.fresh(1) for _ in range(7))
    elsewhere = together(table, b, y)
    assert table.unify(together(table, a, b, x), together(table, c, d, e, x), 1) == 0
    (merged,) = sets(table, a)
    assert len(merged) == 1
    assert [sets(table, label) for label in (b, c, d, e)] == [[merged]] * 4
    assert sets(table, elsewhere) == [merged | {int(y[0])}]
    assert sets(table, together(table, x, y)) == [frozenset({int(x[0]), int(y[0])})]


def test_causes_that_meet_nothing_are_frozen() -> None:
    """{a, b} = {a, b, c, d} can only hold where c and d are nothing, for the reason of this meeting."""
    table = LabelTable()
    a, b, c, d = (table.fresh(1) for _ in range(4))
    assert table.unify(together(table, a, b), together(table, c, a, d, b), 6) == 2
    assert sets(table, np.concatenate([a, b, c, d])) == [frozenset({int(a[0])}), frozenset({int(b[0])}), frozenset(), frozenset()]
    assert table.reasons(np.concatenate([a, b, c, d])).tolist() == [NO_REASON, NO_REASON, 6, 6]


def test_meetings_of_all_kinds_in_one_call() -> None:
    """Rows of one call that match, refine, merge and freeze do so independently of each other."""
    table = LabelTable()
    rows = [[table.fresh(1) for _ in range(6)] for _ in range(4)]
    counts = [(2, 2), (2, 3), (2, 4), (2, 4)]  # causes on the left and on the right
    shared = [[], [0], [], [0, 1]]  # which of the left stand on the right, too
    left, right = [], []
    for row, (few, many), common in zip(rows, counts, shared, strict=True):
        left.append(together(table, *row[:few]))
        right.append(together(table, *(row[i] for i in common), *row[few : few + many - len(common)]))
    assert table.unify(np.concatenate(left), np.concatenate(right), 9) == 2
    assert sets(table, np.concatenate(left)) == sets(table, np.concatenate(right))
    alive = [[len(label) for label in sets(table, np.concatenate(row))] for row in rows]
    assert alive == [[1, 1, 1, 1, 1, 1], [1, 2, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 1, 1]]
    distinct = [len({int(table.roots(x)[0]) for x in row[:4]} - {FROZEN}) for row in rows]
    assert distinct == [2, 4, 1, 2]


def cut_twice(first: tuple[int, ...], second: tuple[int, ...]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Returns a forward pass in which what was cut one way is added to what was cut another way."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        one, two = torch.relu(m.a(x)).view(-1, *first).flatten(1), torch.relu(m.b(x)).view(-1, *second).flatten(1)
        out: torch.Tensor = m.c(one + two)
        return out

    return run


SLICES = "a.bias/0*{0} a.weight/0*{0} b.bias/0*{0} b.weight/0*{0} c.weight/1*{0}"
WHOLE = {"a.weight/0": "owns all of a.weight dim 0"}


@pytest.mark.parametrize(
    ("first", "second", "groups", "frozen"),
    [
        ((2, 6), (2, 6), ["2 exact block: " + SLICES.format(6), "6 exact within: " + SLICES.format(2)], {}),
        ((2, 6), (4, 3), ["2 exact block: " + SLICES.format(6), "3 exact within: " + SLICES.format(4)], {}),
        ((2, 2, 3), (2, 6), [], WHOLE),  # three causes meet two: all are one
    ],
)
def test_cuts_that_meet_in_a_network(first: tuple[int, ...], second: tuple[int, ...], groups: list[str], frozen: dict[str, str]) -> None:
    """What the algebra makes of two cuts that meet are groups whose removal is exact, or none where it can only merge."""
    parts = {"a": nn.Linear(4, 12), "b": nn.Linear(4, 12), "c": nn.Linear(12, 3)}
    check(Case("cut twice", cut_twice(first, second), parts, groups, frozen=frozen, inputs=vectors, kind="graph"))


# -- atoms against a naive partition -------------------------------------------------------------------------------------------------


class Partition:
    """Blocks of equal labels, merged one pair at a time; frozen ones are those equal to 0."""

    def __init__(self, count: int) -> None:
        """Puts 0 (frozen) and every label into a block of its own."""
        self.blocks: list[set[int]] = [{i} for i in range(count + 1)]

    def block(self, label: int) -> set[int]:
        """Returns the block of a label."""
        return next(b for b in self.blocks if label in b)

    def merge(self, a: int, b: int) -> None:
        """Makes two labels equal."""
        one, two = self.block(a), self.block(b)
        if one is not two:
            self.blocks.remove(two)
            one |= two


PAIRS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=25)


@given(st.lists(PAIRS, max_size=4))
def test_atoms_form_the_partition_that_the_pairs_say(rounds: list[list[tuple[int, int]]]) -> None:
    """Equalities between single labels give exactly the blocks of the naive partition, frozen where 0 is among them."""
    table, oracle = LabelTable(), Partition(12)
    table.fresh(12)
    frozen = 0
    for pairs in rounds:
        for a, b in pairs:
            oracle.merge(a, b)
        if pairs:
            frozen += table.unify(ids(*(a for a, _ in pairs)), ids(*(b for _, b in pairs)), 1)
    for a in range(13):
        for b in range(13):
            assert (table.causes(a) == table.causes(b)) == (oracle.block(a) is oracle.block(b))
        assert (table.causes(a) == ()) == (0 in oracle.block(a))
    assert (frozen > 0) == (len(oracle.block(0)) > 1)


# -- everything against sets ---------------------------------------------------------------------------------------------------------


@dataclass
class World:
    """A table, labels of one length made in it, and what was said of them."""

    table: LabelTable = field(default_factory=LabelTable)
    pool: list[Ids] = field(default_factory=list)
    equal: list[tuple[Ids, Ids]] = field(default_factory=list)
    unions: list[tuple[Ids, Ids, Ids]] = field(default_factory=list)
    frozen: list[Ids] = field(default_factory=list)
    made: int = 0

    def add(self, labels: Ids) -> None:
        """Adds labels to the pool."""
        self.pool.append(labels)

    def act(self, verb: str, first: int, second: int, number: int) -> None:
        """Does one thing with labels from the pool, and notes what must hold from then on."""
        if not self.pool or verb == "fresh":
            self.made += LENGTH
            self.add(self.table.fresh(LENGTH))
            return
        a, b = self.pool[first % len(self.pool)], self.pool[second % len(self.pool)]
        if verb == "product":
            self.add(self.table.product(a, b))
            self.unions.append((self.pool[-1], a, b))
        elif verb == "unify":
            self.table.unify(a, b, number)
            self.equal.append((a, b))
        elif verb == "permute":
            self.add(np.random.default_rng(number).permutation(a))
        elif verb == "freeze":
            some = a[: number % 3]
            before = frozenset[int]().union(*sets(self.table, some))
            assert self.table.freeze(some, number) == len(before)
            self.frozen.append(some)
        else:
            self.cut(a, CUTS[number % len(CUTS)], number)

    def cut(self, labels: Ids, shape: tuple[int, int], number: int) -> None:
        """Cuts labels into rows and columns, whose unions they must be."""
        rows, columns = self.table.split(labels, shape, number)
        zeros = np.zeros(LENGTH, dtype=np.int64)
        one = zeros if rows is None else np.repeat(rows, shape[1])
        two = zeros if columns is None else np.tile(columns, shape[0])
        self.unions.append((labels, one, two))
        merged = self.table.merge([rows, columns], shape)
        self.unions.append((zeros if merged is None else merged, one, two))
        self.add(one)
        self.add(two)


VERBS = st.sampled_from(["fresh", "product", "unify", "unify", "permute", "cut", "cut", "freeze"])
ACTS = st.lists(st.tuples(VERBS, st.integers(0, 50), st.integers(0, 50), st.integers(0, 9)), max_size=14)


def union(a: Iterable[frozenset[int]], b: Iterable[frozenset[int]]) -> list[frozenset[int]]:
    """Returns unions, one by one."""
    return [x | y for x, y in zip(a, b, strict=True)]


@given(ACTS)
def test_what_was_said_holds_for_the_sets(acts: list[tuple[str, int, int, int]]) -> None:
    """Equal labels have equal sets, products and cuts are unions, frozen ones are empty, whatever was said before or after."""
    world = World()
    for act in acts:
        world.act(*act)
    table = world.table
    for a, b in world.equal:
        assert sets(table, a) == sets(table, b)
    for whole, a, b in world.unions:
        assert sets(table, whole) == union(sets(table, a), sets(table, b))
    for labels in world.frozen:
        assert sets(table, labels) == [frozenset()] * labels.size
        assert all(r != NO_REASON for r in table.reasons(labels[labels != FROZEN]).tolist())


@given(ACTS, st.integers(0, 2**16))
def test_readers_agree(acts: list[tuple[str, int, int, int]], seed: int) -> None:
    """Causes are causes of themselves; `expand` lists the sets, `removed` says which meet the flags."""
    world = World()
    for act in acts:
        world.act(*act)
    table = world.table
    flags = np.random.default_rng(seed).random(table.size) < 0.3
    flags[FROZEN] = False
    for labels in world.pool:
        expected = sets(table, labels)
        assert all(table.causes(c) == (c,) for label in expected for c in label)
        positions, causes = table.expand(labels)
        assert bool((np.diff(positions) >= 0).all())
        assert [frozenset(causes[positions == i].tolist()) for i in range(labels.size)] == expected
        assert table.removed(labels, flags).tolist() == [any(bool(flags[c]) for c in label) for label in expected]


@given(st.lists(st.sampled_from([(2, 12), (4, 6), (8, 3), (24, 1), (2, 3, 4), (3, 8)]), min_size=1, max_size=3))
def test_cuts_that_are_nested_freeze_nothing(shapes: list[tuple[int, ...]]) -> None:
    """Views of one dimension whose borders nest leave every index removable; others may only merge or freeze causes."""
    table = LabelTable()
    flat = table.fresh(24)
    for shape in shapes:
        table.split(flat, shape, 1)
    borders = {int(np.prod(shape[i:])) for shape in shapes for i in range(1, len(shape))}
    chain = all(max(a, b) % min(a, b) == 0 for a in borders for b in borders)
    live = [bool(label) for label in sets(table, flat)]
    if chain:
        assert all(live)
        factors = np.diff(np.log(sorted({1, 24, *borders})))
        assert len(frozenset[int]().union(*sets(table, flat))) == round(float(np.exp(factors).sum()))


def test_the_oracle_notices_a_lost_equality() -> None:
    """With one equality undone, the properties above do not hold."""
    table = LabelTable()
    a, b = table.fresh(2), table.fresh(2)
    table.unify(a[:1], b[:1], 0)
    with pytest.raises(AssertionError):
        assert sets(table, a) == sets(table, b)
