"""The algebra of labels: which indices of which dimensions live and die together.

Every index of a tensor dimension carries a *label*: the set of causes whose removal removes that index. A label is an integer id into a
:class:`LabelTable`. Id 0 is the empty set, *frozen*: nothing removes the index. An *atom* is a set of one cause. A *product* is a set of
several, as when a row (head h, width d) of a linear layer dies with its head or with its width.

All constraints say "label x equals label y" and are solved by substitution (atom by label, never copies), so that what is learnt about a
label anywhere holds everywhere it was seen. A whole dimension without labels is written ``None``.

Everything works on whole arrays. A product keeps its causes in a row of a matrix, padded with 0; causes that have since been united,
refined or frozen are looked up when the row is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]
Hashes: TypeAlias = NDArray[np.uint64]
Dim: TypeAlias = "Ids | None"

FROZEN = 0
NO_REASON = -1


class LabelTable:
    """All labels of one program, and the equalities found between them."""

    def __init__(self) -> None:
        self._size = 1
        self._parent: Ids = np.zeros(1024, dtype=np.int64)
        self._reason: Ids = np.full(1024, NO_REASON, dtype=np.int64)
        self._product: Flags = np.zeros(1024, dtype=bool)
        self._rows: Ids = np.zeros((1024, 3), dtype=np.int64)

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
        a, b = self.roots(a), self.roots(b)
        out = np.where(a == FROZEN, b, a)
        joint = np.flatnonzero((a != FROZEN) & (b != FROZEN) & (a != b))
        if joint.size:
            pairs, where = _unique_pairs(a[joint], b[joint])
            rows = np.concatenate([self._causes(pairs[:, 0]), self._causes(pairs[:, 1])], axis=1)
            out[joint] = self._of_rows(rows)[where]
        return out

    def _of_rows(self, rows: Ids) -> Ids:
        """Returns the label of each row of causes: nothing, an atom, or a new product."""
        rows = _compact(rows)
        count = (rows != FROZEN).sum(axis=1)
        out: Ids = rows[:, 0].copy()
        several = np.flatnonzero(count > 1)
        if several.size:
            ids = self.fresh(several.size)
            self._widen(rows.shape[1])
            self._rows[ids, : rows.shape[1]] = rows[several]
            self._product[ids] = True
            out[several] = ids
        return out

    # -- reading labels --------------------------------------------------------------------------------------------------------------

    def roots(self, ids: Ids) -> Ids:
        """Returns representatives: 0 exactly for frozen labels, one id per atom; equal products may still have different ids."""
        roots = self._find(ids)
        if self._product[roots].any():
            products = _distinct(roots[self._product[roots]])
            rows = self._causes(products)
            small = rows[:, 1] == FROZEN
            if small.any():
                self._parent[products[small]] = rows[small, 0]
                roots = self._find(roots)
        return roots

    def _find(self, ids: Ids) -> Ids:
        """Follows ids to their representatives and shortens the way; what ends at frozen learns why."""
        parent = self._parent
        last, out = ids, parent[ids]
        while True:
            up = parent[out]
            if np.array_equal(up, out):
                break
            last = np.where(out != FROZEN, out, last)
            out = up
        parent[ids] = out
        frozen = (out == FROZEN) & (self._reason[ids] == NO_REASON)
        if frozen.any():
            self._reason[ids[frozen]] = self._reason[last[frozen]]
        return out

    def _causes(self, roots: Ids) -> Ids:
        """Returns the causes of representatives as rows padded with 0, in the order in which each label was put together."""
        rows = np.where(self._product[roots][:, None], self._rows[roots], FROZEN)
        plain = ~self._product[roots]
        rows[plain, 0] = roots[plain]
        found = self._find(rows)
        while self._product[found].any():
            inner = np.where(self._product[found][:, :, None], self._rows[found], FROZEN)
            inner[:, :, 0] = np.where(self._product[found], inner[:, :, 0], found)
            found = self._find(inner.reshape(roots.size, -1))
        if not np.array_equal(found, rows):
            if not found.all():
                self._reason[roots] = np.maximum(self._reason[roots], self._reason[rows].max(axis=1))
            rows = _compact(found)
            self._widen(rows.shape[1])
            products = ~plain
            self._rows[roots[products], : rows.shape[1]] = rows[products]
            self._rows[roots[products], rows.shape[1] :] = FROZEN
        return rows

    def signatures(self, ids: Ids) -> Hashes:
        """Returns a number per label: equal exactly where the sets of causes are equal (but for one chance in 2**64)."""
        roots = self._find(ids)
        out = _mixed(roots)
        where = np.flatnonzero(self._product[roots].ravel())
        if where.size:
            products, back = np.unique(roots.ravel()[where], return_inverse=True)
            out.ravel()[where] = _mixed(self._causes(products)).sum(axis=1)[back]
        return out

    def causes(self, label: int) -> tuple[int, ...]:
        """Returns the causes of one label, in the order in which the label was put together."""
        row = self._causes(self._find(np.array([label], dtype=np.int64)))[0]
        return tuple(int(c) for c in row if c != FROZEN)

    def expand(self, ids: Ids) -> tuple[Ids, Ids]:
        """Returns (positions, causes): every (index into `ids`, cause of its label), positions ascending."""
        roots = self._find(ids)
        if not self._product[roots].any():
            positions = np.flatnonzero(roots != FROZEN)
            return positions, roots[positions]
        rows = self._causes(roots)
        positions, columns = np.nonzero(rows)
        return positions, rows[positions, columns]

    def joint(self, ids: Ids) -> Ids:
        """Returns the causes of the labels that have more than one, a row each, padded with 0."""
        roots = self.roots(ids)
        return self._causes(_distinct(roots[self._product[roots]]))

    def removed(self, ids: Ids, causes: Flags) -> Flags:
        """Returns which indices go when the causes flagged in `causes` (a boolean array over cause ids) go."""
        roots = self._find(ids)
        out: Flags = causes[roots]
        products = np.flatnonzero(self._product[roots])
        if products.size:
            unique, back = np.unique(roots[products], return_inverse=True)
            out[products] = causes[self._causes(unique)].max(axis=1)[back]
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
            a, b = self.roots(a), self.roots(b)
            differ = a != b
            if differ.any() and self._product[a[differ]].any():
                differ = self.signatures(a) != self.signatures(b)
            if not differ.any():
                return frozen
            pairs, _ = _unique_pairs(a[differ], b[differ])
            a, b = pairs[:, 0], pairs[:, 1]
            dead = (a == FROZEN) | (b == FROZEN)
            if dead.any():
                frozen += self.freeze(np.maximum(a[dead], b[dead]), reason)
                continue
            atoms_a, atoms_b = ~self._product[a], ~self._product[b]
            both = atoms_a & atoms_b
            if both.any():
                self._parent[np.maximum(a[both], b[both])] = np.minimum(a[both], b[both])
            elif (atoms_a | atoms_b).any():
                frozen += self._substitute(np.where(atoms_a, a, b), np.where(atoms_a, b, a), atoms_a | atoms_b, reason)
            else:
                frozen += self._unify_products(a, b, reason)

    def _substitute(self, atom: Ids, product: Ids, mixed: Flags, reason: int) -> int:
        """Replaces atoms by the products that they meet, each atom once; returns how many causes were frozen."""
        atoms, first = np.unique(atom[mixed], return_index=True)
        products = product[mixed][first]
        rows = self._causes(products)
        if not np.isin(atoms, rows).any():
            self._parent[atoms] = products
            return 0
        frozen = 0
        for x, p in zip(atoms.tolist(), products.tolist(), strict=True):
            if self._parent[x] != x:
                continue
            causes = self.causes(p)
            if x in causes:
                frozen += self.freeze(np.array([c for c in causes if c != x], dtype=np.int64), reason)
            else:
                self._parent[x] = p
        return frozen

    def _unify_products(self, a: Ids, b: Ids, reason: int) -> int:
        """Makes pairs of products equal: common causes cancel, the rest is matched in order, or merged where it cannot be."""
        rows_a, rows_b = self._causes(a), self._causes(b)
        rest_a = _compact(np.where((rows_a[:, :, None] == rows_b[:, None, :]).any(axis=2), FROZEN, rows_a))
        rest_b = _compact(np.where((rows_b[:, :, None] == rows_a[:, None, :]).any(axis=2), FROZEN, rows_b))
        count_a, count_b = (rest_a != FROZEN).sum(axis=1), (rest_b != FROZEN).sum(axis=1)
        frozen = 0
        emptied = (count_a == 0) | (count_b == 0)
        if emptied.any():
            alone = np.concatenate([rest_a[emptied].ravel(), rest_b[emptied].ravel()])
            frozen += self.freeze(alone, reason)
        equal = (count_a == count_b) & ~emptied
        width = min(rest_a.shape[1], rest_b.shape[1])
        if equal.any():
            x, y = rest_a[equal, :width].ravel(), rest_b[equal, :width].ravel()
            frozen += self.unify(x[x != FROZEN], y[x != FROZEN], reason)
        for i in np.flatnonzero(~equal & ~emptied).tolist():
            frozen += self._unify_unequal(rest_a[i], rest_b[i], reason)
        return frozen

    def _unify_unequal(self, a: Ids, b: Ids, reason: int) -> int:
        """A single cause is refined into several; several against others are merged into one."""
        a, b = a[a != FROZEN], b[b != FROZEN]
        if min(a.size, b.size) == 1:
            single, several = (a, b) if a.size == 1 else (b, a)
            return self.unify(single, self._of_rows(several[None, :]), reason)
        merged = np.concatenate([a, b])
        return self.unify(merged[:-1], merged[1:], reason)

    def freeze(self, ids: Ids, reason: int) -> int:
        """Freezes every cause of the given labels; returns how many there were."""
        atoms = _distinct(self._causes(_distinct(self._find(ids.ravel()))))
        atoms = atoms[atoms != FROZEN]
        self._parent[atoms] = FROZEN
        self._reason[atoms] = reason
        return int(atoms.size)

    def reasons(self, ids: Ids) -> Ids:
        """Returns why each frozen label is frozen (:data:`NO_REASON` for live ones)."""
        self.roots(ids)
        self._find(ids)
        return np.where(self._parent[ids] == FROZEN, self._reason[ids], NO_REASON)

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
        grid, signs = self.roots(flat).reshape(rows, columns), self.signatures(flat).reshape(rows, columns)
        if not grid.any():
            return None, None
        if columns == 1 or (signs == signs[:, :1]).all():
            return grid[:, 0].copy(), None
        if rows == 1 or (signs == signs[:1]).all():
            return None, grid[0].copy()
        common_rows, common_columns = self._common(grid), self._common(grid.T)
        if (self.signatures(self._outer(common_rows, common_columns)) == signs.ravel()).all():
            return common_rows, common_columns
        outer_rows = common_rows if self._structured(grid, common_rows, common_columns) else self.product(common_rows, self.fresh(rows))
        outer_columns = self.product(common_columns, self.fresh(columns))
        self.unify(grid.ravel(), self._outer(outer_rows, outer_columns), reason)
        return self.roots(outer_rows), self.roots(outer_columns)

    def _structured(self, grid: Ids, rows: Ids, columns: Ids) -> bool:
        """Returns whether some entry has two causes or more that neither its row nor its column explains.

        Such entries have been cut another way before (a channel shuffle after a channel shuffle). A new cause per row would be matched
        with one of theirs and tie together what is independent, so only columns get causes.
        """
        known = np.concatenate([self._causes(np.repeat(rows, columns.size)), self._causes(np.tile(columns, rows.size))], axis=1)
        causes = self._causes(grid.ravel())
        unexplained = (causes != FROZEN) & ~(causes[:, :, None] == known[:, None, :]).any(axis=2)
        return bool((unexplained.sum(axis=1) > 1).any())

    def _outer(self, rows: Ids, columns: Ids) -> Ids:
        return self.product(np.repeat(rows, columns.size), np.tile(columns, rows.size))

    def _common(self, grid: Ids) -> Ids:
        """Returns, per row of a grid that holds products, the label of the causes that all its entries share."""
        if not self._product[grid].any():
            return np.zeros(grid.shape[0], dtype=np.int64)
        causes = self._causes(grid.ravel()).reshape(*grid.shape, -1)
        candidates = causes[:, 0, :]
        shared = np.stack([(causes == candidates[:, None, k : k + 1]).any(axis=2).all(axis=1) for k in range(candidates.shape[1])], axis=1)
        return self._of_rows(np.where(shared, candidates, FROZEN))

    def _widen(self, width: int) -> None:
        missing = width - self._rows.shape[1]
        if missing > 0:
            self._rows = np.concatenate([self._rows, np.zeros((self._rows.shape[0], missing), dtype=np.int64)], axis=1)

    def _grow(self, size: int) -> None:
        capacity = self._parent.size
        if size > capacity:
            extra = max(capacity, size - capacity)
            self._parent = _longer(self._parent, extra, 0)
            self._reason = _longer(self._reason, extra, NO_REASON)
            self._product = _longer(self._product, extra, 0)
            self._rows = _longer(self._rows, extra, 0)
        self._size = max(self._size, size)


def _longer(array: Any, extra: int, fill: int) -> Any:
    shape = (array.shape[0] + extra, *array.shape[1:])
    out = np.full(shape, fill, dtype=array.dtype) if fill else np.zeros(shape, dtype=array.dtype)  # zeros cost nothing until written
    out[: array.shape[0]] = array
    return out


def _distinct(ids: Ids) -> Ids:
    """Returns the distinct ids, ascending (`np.unique` takes several times as long)."""
    ids = np.sort(ids, axis=None)
    return ids[np.concatenate([[True], ids[1:] != ids[:-1]])] if ids.size else ids


def _compact(rows: Ids) -> Ids:
    """Returns rows with repeated entries dropped and zeros moved to the end, no wider than needed (at least two)."""
    rows = rows.copy()
    for k in range(1, rows.shape[1]):
        rows[(rows[:, :k] == rows[:, k : k + 1]).any(axis=1), k] = FROZEN
    order = np.argsort(rows == FROZEN, axis=1, kind="stable")
    rows = np.take_along_axis(rows, order, axis=1)
    width = max(int((rows != FROZEN).any(axis=0).sum()), 2)
    if rows.shape[1] < width:
        rows = np.concatenate([rows, np.zeros((rows.shape[0], width - rows.shape[1]), dtype=np.int64)], axis=1)
    return rows[:, :width]


def _mixed(ids: Ids) -> Hashes:
    """Returns a well-spread 64-bit number per id, 0 for 0 (the finaliser of splitmix64, Steele et al. 2014)."""
    x: Hashes = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _unique_pairs(a: Ids, b: Ids) -> tuple[Ids, Ids]:
    """Returns the distinct (a, b) rows and, per input row, which of them it is."""
    key = a * (int(max(a.max(), b.max())) + 1) + b
    _, first, where = np.unique(key, return_index=True, return_inverse=True)
    return np.stack([a[first], b[first]], axis=1), where
