"""The algebra of labels: which indices of which dimensions live and die together.

Every index of a tensor dimension carries a *label*: the set of causes whose removal removes that index. A label is an integer id into a
:class:`LabelTable`. Id 0 is the empty set, *frozen*: nothing removes the index. An *atom* is a set of one cause. A *product* is the
union of two labels, as when a row (head h, width d) of a linear layer dies with its head or with its width.

All constraints say "label x equals label y" and are solved by substitution (atom by label, never copies), so that what is learnt about a
label anywhere holds everywhere it was seen. A whole dimension without labels is written ``None``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]
Dim: TypeAlias = "Ids | None"

FROZEN = 0
NO_REASON = -1
WIDTH = 4  # causes that a product's row holds; products of more are looked up one by one


class LabelTable:
    """All labels of one program, and the equalities found between them."""

    def __init__(self) -> None:
        self._size = 1
        self._parent: Ids = np.zeros(1024, dtype=np.int64)
        self._left: Ids = np.full(1024, -1, dtype=np.int64)
        self._right: Ids = np.full(1024, -1, dtype=np.int64)
        self._reason: Ids = np.full(1024, NO_REASON, dtype=np.int64)
        self._rows: Ids = np.zeros((1024, WIDTH), dtype=np.int64)
        self._seen: Ids = np.full((1024, WIDTH), -1, dtype=np.int64)
        self._products: dict[bytes, int] = {}
        self._leaves: dict[int, tuple[int, ...]] = {}

    # -- making labels ---------------------------------------------------------------------------------------------------------------

    def fresh(self, count: int) -> Ids:
        """Returns `count` new atoms, equal to nothing yet."""
        start = self._size
        self._grow(start + count)
        ids = np.arange(start, start + count, dtype=np.int64)
        self._parent[start : start + count] = ids
        return ids

    def product(self, a: Ids, b: Ids) -> Ids:
        """Returns the elementwise union of two label arrays of one shape."""
        a, b = self.canonical(a), self.canonical(b)
        out = np.where(a == FROZEN, b, a)
        joint = np.flatnonzero((a != FROZEN) & (b != FROZEN) & (a != b))
        if joint.size:
            pairs, where = _unique_pairs(a[joint], b[joint])
            out[joint] = self._join(pairs[:, 0], pairs[:, 1])[where]
        return out

    def _join(self, a: Ids, b: Ids) -> Ids:
        """Returns one product id per pair of distinct, canonical, live labels."""
        ids = self.fresh(a.size)
        self._left[ids], self._right[ids] = a, b
        row_a, row_b = self._row(a), self._row(b)
        count_a, count_b = (row_a != FROZEN).sum(axis=1), (row_b != FROZEN).sum(axis=1)
        fits = (count_a + count_b <= WIDTH) & (row_a[:, 0] >= 0) & (row_b[:, 0] >= 0)
        rows = row_a.copy()
        for k in range(WIDTH):
            at = np.flatnonzero(fits & (k < count_b))
            rows[at, count_a[at] + k] = row_b[at, k]
        rows[~fits, 0] = -1
        self._rows[ids] = rows
        return self.canonical(ids)

    def _row(self, labels: Ids) -> Ids:
        """Returns the causes of canonical labels as they were put together, padded with 0; -1 first where there are too many."""
        atoms = self._left[labels] < 0
        rows = self._rows[labels]
        if (~atoms).any():
            where = np.flatnonzero(~atoms)
            for i in where[(self._left[self.find(np.maximum(rows[where], 0))] >= 0).any(axis=1)].tolist():
                self._fresh_leaves(int(labels[i]))
            rows = self._rows[labels]
            front = np.argsort(rows[where] == FROZEN, axis=1, kind="stable")
            rows[where] = np.take_along_axis(rows[where], front, axis=1)
        rows[atoms] = FROZEN
        rows[atoms, 0] = labels[atoms]
        return rows

    # -- reading labels --------------------------------------------------------------------------------------------------------------

    def find(self, ids: Ids) -> Ids:
        """Returns the representatives of `ids` (products are not simplified; see :meth:`canonical`)."""
        parent = self._parent
        out = parent[ids]
        while True:
            up = parent[out]
            if np.array_equal(up, out):
                break
            out = up
        parent[ids] = out
        return out

    def canonical(self, ids: Ids) -> Ids:
        """Returns ids such that two labels are the same set exactly if their ids are equal."""
        roots = self.find(ids)
        joint = self._left[roots] >= 0
        if not joint.any():
            return roots
        unique, where = np.unique(roots[joint], return_inverse=True)
        rows, plain = self._sorted_leaves(unique)
        known = plain & (self._seen[unique] == rows).all(axis=1)
        for i in np.flatnonzero(~known).tolist():
            row = rows[i] if plain[i] else self._fresh_leaves(int(unique[i]))
            unique[i] = self._intern(int(unique[i]), row)
        roots[joint] = unique[where]
        return roots

    def _sorted_leaves(self, products: Ids) -> tuple[Ids, Flags]:
        """Returns per product its causes, descending and padded with 0, and for which products that could be told from its row."""
        leaves = self._rows[products]
        wide = leaves[:, 0] < 0
        leaves = self.find(np.maximum(leaves, 0))
        plain = ~wide & (self._left[leaves] < 0).all(axis=1)
        rows = -np.sort(-leaves, axis=1)
        double = rows[:, 1:] == rows[:, :-1]
        if double.any():
            rows[:, 1:][double] = FROZEN
            rows = -np.sort(-rows, axis=1)
        return rows, plain

    def _fresh_leaves(self, root: int) -> Ids:
        """Looks a product's causes up again after one of them was refined; returns them descending (padded when few)."""
        leaves = self.causes(root)
        if len(leaves) > WIDTH:
            self._rows[root, 0] = -1
            return np.array(sorted(leaves, reverse=True), dtype=np.int64)
        self._rows[root] = np.array([*leaves, *[FROZEN] * (WIDTH - len(leaves))], dtype=np.int64)
        return -np.sort(-self._rows[root])

    def _intern(self, root: int, row: Ids) -> int:
        """Returns the one id that stands for a set of causes, and makes `root` point to it."""
        count = int((row != FROZEN).sum())
        if count <= 1:
            target = int(row[0])
        else:
            key = row.tobytes()
            target = self._products.setdefault(key, root)
            if self._parent[target] != target:
                target = self._products[key] = root
            if count <= WIDTH:
                self._seen[target] = row
        if target != root:
            self._parent[root] = target
        return target

    def causes(self, label: int) -> tuple[int, ...]:
        """Returns the causes of one label, in the order in which the label was put together."""
        root = self._root(label)
        if root == FROZEN:
            return ()
        if self._left[root] < 0:
            return (root,)
        known = self._leaves.get(root)
        if known is None:
            parts = self.causes(int(self._left[root])) + self.causes(int(self._right[root]))
            known = self._leaves[root] = tuple(dict.fromkeys(parts))
        return known

    def _root(self, label: int) -> int:
        parent = self._parent
        while parent[label] != label:
            label = int(parent[label])
        return label

    def is_live(self, ids: Ids) -> Flags:
        """Returns which labels are not frozen."""
        live: Flags = self.canonical(ids) != FROZEN
        return live

    def expand(self, ids: Ids) -> tuple[Ids, Ids]:
        """Returns (positions, causes): every (index into `ids`, cause of its label), positions ascending."""
        roots = self.canonical(ids)
        atoms = (self._left[roots] < 0) & (roots != FROZEN)
        positions = [np.flatnonzero(atoms)]
        causes = [roots[atoms]]
        products = np.flatnonzero(self._left[roots] >= 0)
        if products.size:
            unique, where = np.unique(roots[products], return_inverse=True)
            leaves = [self.causes(int(u)) for u in unique]
            lengths = np.array([len(x) for x in leaves], dtype=np.int64)
            starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
            flat = np.fromiter(itertools.chain.from_iterable(leaves), dtype=np.int64, count=int(lengths.sum()))
            counts = lengths[where]
            offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            positions.append(np.repeat(products, counts))
            causes.append(flat[np.repeat(starts[where], counts) + offsets])
        where_all, cause_all = np.concatenate(positions), np.concatenate(causes)
        order = np.argsort(where_all, kind="stable")
        return where_all[order], cause_all[order]

    def joint(self, ids: Ids) -> list[tuple[int, ...]]:
        """Returns the causes of every distinct label that has more than one."""
        roots = self.canonical(ids)
        products = np.unique(roots[self._left[roots] >= 0])
        return [self.causes(int(p)) for p in products]

    def removed(self, ids: Ids, causes: Flags) -> Flags:
        """Returns which indices go when the causes flagged in `causes` (a boolean array over cause ids) go."""
        roots = self.find(ids)
        out = causes[roots]
        products = np.flatnonzero(self._left[roots] >= 0)
        if products.size:
            left, right = self._left[roots[products]], self._right[roots[products]]
            out[products] = self.removed(left, causes) | self.removed(right, causes)
        return out

    @property
    def size(self) -> int:
        """The number of ids in use, frozen included: the length that `causes` flags must have."""
        return self._size

    # -- equalities ------------------------------------------------------------------------------------------------------------------

    def unify(self, a: Ids, b: Ids, reason: int) -> int:
        """Makes two label arrays equal, index by index; returns how many causes were frozen by doing so (`reason` says why)."""
        frozen = 0
        while True:
            a, b = self.canonical(a), self.canonical(b)
            differ = a != b
            if not differ.any():
                return frozen
            pairs, _ = _unique_pairs(a[differ], b[differ])
            a, b = pairs[:, 0], pairs[:, 1]
            dead = (a == FROZEN) | (b == FROZEN)
            if dead.any():
                frozen += self.freeze(np.maximum(a[dead], b[dead]), reason)
                continue
            atoms_a, atoms_b = self._left[a] < 0, self._left[b] < 0
            both = atoms_a & atoms_b
            if both.any():
                self._parent[np.maximum(a[both], b[both])] = np.minimum(a[both], b[both])
                self._leaves.clear()
            elif (atoms_a | atoms_b).any():
                frozen += self._substitute_atoms(a, b, atoms_a, atoms_b, reason)
            else:
                frozen += self._unify_all_products(a, b, reason)

    def _substitute_atoms(self, a: Ids, b: Ids, atoms_a: Flags, atoms_b: Flags, reason: int) -> int:
        """Replaces atoms by the products that they meet, each atom once; returns how many causes were frozen."""
        mixed = atoms_a | atoms_b
        atom, product = np.where(atoms_a, a, b)[mixed], np.where(atoms_a, b, a)[mixed]
        _, first = np.unique(atom, return_index=True)
        left, right, plain = self._plain(product[first])
        if plain.all() and not np.isin(atom[first], np.concatenate([left, right])).any():
            self._parent[atom[first]] = product[first]
            self._leaves.clear()
            return 0
        frozen = 0
        for x, p in zip(atom[first].tolist(), product[first].tolist(), strict=True):
            leaves = self.causes(p)
            if self._root(x) != x:
                continue
            if x in leaves:
                frozen += self.freeze(np.array([c for c in leaves if c != x], dtype=np.int64), reason)
            else:
                self._parent[x] = p
                self._leaves.clear()
        return frozen

    def _plain(self, products: Ids) -> tuple[Ids, Ids, Flags]:
        """Returns the two causes of products in order, and which products have exactly two."""
        rows = self._row(products)
        parts = self.find(np.maximum(rows[:, :2], 0))
        two = (rows[:, 0] > 0) & (rows[:, 1] > 0) & (rows[:, 2] == FROZEN) & (self._left[parts] < 0).all(axis=1)
        return parts[:, 0], parts[:, 1], two & (parts != FROZEN).all(axis=1) & (parts[:, 0] != parts[:, 1])

    def _unify_all_products(self, a: Ids, b: Ids, reason: int) -> int:
        """Makes pairs of products equal: pairs of two atoms each at once, others one by one."""
        (la, ra, plain_a), (lb, rb, plain_b) = self._plain(a), self._plain(b)
        plain = plain_a & plain_b
        frozen = sum(self._unify_products(int(x), int(y), reason) for x, y in zip(a[~plain], b[~plain], strict=True))
        la, ra, lb, rb = la[plain], ra[plain], lb[plain], rb[plain]
        crossed = (la == rb) | (ra == lb)
        lb, rb = np.where(crossed, rb, lb), np.where(crossed, lb, rb)
        if la.size:
            frozen += self.unify(np.concatenate([la, ra]), np.concatenate([lb, rb]), reason)
        return frozen

    def _unify_products(self, x: int, y: int, reason: int) -> int:
        """Makes two products equal: common causes cancel, the rest is matched in order, or merged when it cannot be."""
        all_x, all_y = self.causes(x), self.causes(y)
        rest_x = [c for c in all_x if c not in all_y]
        rest_y = [c for c in all_y if c not in all_x]
        if not rest_x or not rest_y:
            return self.freeze(np.array(rest_x + rest_y, dtype=np.int64), reason) if rest_x or rest_y else 0
        if len(rest_x) == len(rest_y):
            return self.unify(np.array(rest_x, dtype=np.int64), np.array(rest_y, dtype=np.int64), reason)
        if len(rest_x) == 1 or len(rest_y) == 1:
            single, several = (rest_x, rest_y) if len(rest_x) == 1 else (rest_y, rest_x)
            label = np.array(several[:1], dtype=np.int64)
            for cause in several[1:]:
                label = self.product(label, np.array([cause], dtype=np.int64))
            return self.unify(np.array(single, dtype=np.int64), label, reason)
        merged = np.array(rest_x + rest_y, dtype=np.int64)
        return self.unify(merged[:-1], merged[1:], reason)

    def freeze(self, ids: Ids, reason: int) -> int:
        """Freezes every cause of the given labels; returns how many there were."""
        roots = np.unique(self.canonical(ids))
        atoms = roots[(self._left[roots] < 0) & (roots != FROZEN)]
        products = roots[self._left[roots] >= 0]
        if products.size:
            leaves = [c for p in products for c in self.causes(int(p))]
            atoms = np.unique(np.concatenate([atoms, np.array(leaves, dtype=np.int64)]))
        if atoms.size:
            self._parent[atoms] = FROZEN
            self._reason[atoms] = reason
            self._leaves.clear()
        return int(atoms.size)

    def reasons(self, ids: Ids) -> Ids:
        """Returns why each frozen label is frozen (:data:`NO_REASON` for live ones)."""
        return np.array([self._reason_of(int(i)) for i in ids.ravel()], dtype=np.int64).reshape(ids.shape)

    def _reason_of(self, label: int) -> int:
        while self._parent[label] not in (label, FROZEN):
            label = int(self._parent[label])
        if label == FROZEN or self._reason[label] != NO_REASON:
            return int(self._reason[label])
        if self._left[label] < 0:
            return NO_REASON
        return max(self._reason_of(int(self._left[label])), self._reason_of(int(self._right[label])))

    # -- reshaping -------------------------------------------------------------------------------------------------------------------

    def merge(self, dims: Sequence[Dim], sizes: Sequence[int]) -> Dim:
        """Returns the labels of the dimension that row-major flattening of `dims` gives: unions of the merged indices' labels."""
        flat: Dim = None
        total = 1
        for dim, size in zip(dims, sizes, strict=True):
            left = None if flat is None else np.repeat(flat, size)
            right = None if dim is None else np.tile(dim, total)
            flat = left if right is None else right if left is None else self.product(left, right)
            total *= size
        return flat

    def split(self, flat: Dim, sizes: Sequence[int], reason: int) -> list[Dim]:
        """Returns labels per dimension after a dimension is cut row-major into `sizes`, refining labels where a cut crosses them.

        Cut dimensions along which the labels do not vary get none. Where labels vary along rows and columns, each becomes the union
        of a row cause and a column cause, everywhere it was seen.
        """
        if flat is None or not sizes:
            return [None] * len(sizes)
        if len(sizes) == 1:
            return [flat]
        rest = int(np.prod(sizes[1:]))
        rows, columns = self._split_in_two(flat, int(sizes[0]), rest, reason)
        return [rows, *self.split(columns, sizes[1:], reason)]

    def _split_in_two(self, flat: Ids, rows: int, columns: int, reason: int) -> tuple[Dim, Dim]:
        grid = self.canonical(flat).reshape(rows, columns)
        if not grid.any():
            return None, None
        if columns == 1 or (grid == grid[:, :1]).all():
            return grid[:, 0].copy(), None
        if rows == 1 or (grid == grid[:1]).all():
            return None, grid[0].copy()
        common_rows, common_columns = self._common_causes(grid)
        if (self.canonical(self._outer(common_rows, common_columns)) == grid).all():
            return common_rows, common_columns
        outer_rows = self.product(common_rows, self.fresh(rows))
        outer_columns = self.product(common_columns, self.fresh(columns))
        self.unify(grid.ravel(), self._outer(outer_rows, outer_columns).ravel(), reason)
        return self.canonical(outer_rows), self.canonical(outer_columns)

    def _outer(self, rows: Ids, columns: Ids) -> Ids:
        return self.product(np.repeat(rows, columns.size), np.tile(columns, rows.size)).reshape(rows.size, columns.size)

    def _common_causes(self, grid: Ids) -> tuple[Ids, Ids]:
        """Returns, per row and per column of a grid of canonical labels, the label of the causes that all its entries share."""
        rows, columns = np.zeros(grid.shape[0], dtype=np.int64), np.zeros(grid.shape[1], dtype=np.int64)
        if not (self._left[grid] >= 0).any():
            return rows, columns
        for axis, out in ((0, rows), (1, columns)):
            lines = grid if axis == 0 else grid.T
            for i, line in enumerate(lines):
                entries = np.unique(line).tolist()
                shared = set(self.causes(entries[0])).intersection(*(self.causes(e) for e in entries[1:]))
                ordered = [c for c in self.causes(entries[0]) if c in shared]
                label = np.zeros(1, dtype=np.int64)
                for cause in ordered:
                    label = self.product(label, np.array([cause], dtype=np.int64))
                out[i] = label[0]
        return rows, columns

    def _grow(self, size: int) -> None:
        capacity = self._parent.size
        if size > capacity:
            extra = max(capacity, size - capacity)
            self._parent = np.concatenate([self._parent, np.zeros(extra, dtype=np.int64)])
            self._left = np.concatenate([self._left, np.full(extra, -1, dtype=np.int64)])
            self._right = np.concatenate([self._right, np.full(extra, -1, dtype=np.int64)])
            self._reason = np.concatenate([self._reason, np.full(extra, NO_REASON, dtype=np.int64)])
            self._rows = np.concatenate([self._rows, np.zeros((extra, WIDTH), dtype=np.int64)])
            self._seen = np.concatenate([self._seen, np.full((extra, WIDTH), -1, dtype=np.int64)])
        self._size = max(self._size, size)


def _unique_pairs(a: Ids, b: Ids) -> tuple[Ids, Ids]:
    """Returns the distinct (a, b) rows and, per input row, which of them it is."""
    key = a * (int(max(a.max(), b.max())) + 1) + b
    _, first, where = np.unique(key, return_index=True, return_inverse=True)
    return np.stack([a[first], b[first]], axis=1), where
