"""Widths that the model's own arithmetic can state.

A module that computes the width of its heads as `C // num_heads`, or cuts its channels into equal chunks, works only for some widths.
Its demands become equations between the kept counts of groups; counts are raised, never lowered, until all of them hold. Keeping
everything solves them all, so there always is a solution; where a smaller one is not found in so many tries, `Widths.given_up` says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import networkx as nx
import numpy as np

from graphprune.sizes.equations import Equation, definitions
from graphprune.sizes.expressions import Extent, Leaf, Number, Place, evaluate, leaves
from graphprune.sizes.watch import Demand

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from graphprune.groups.graph import DependencyGraph
    from graphprune.ops.labels import Ids
    from graphprune.sizes.expressions import Expression

Counts: TypeAlias = "dict[int, Any]"
"""Number of a group -> how many of its channels stay, or an array of candidates."""

_SAMPLES = 16
_TRIES = 20_000


@dataclass(frozen=True)
class Widths:
    """Kept counts that a model's own code can state.

    Attributes:
        counts: group name -> how many of its channels stay.
        given_up: names of the groups that keep all their channels because the search for smaller counts ended without a result.
        tries: how many combinations of counts that search looked at, for each set of groups that depend on each other.
    """

    counts: dict[str, int]
    given_up: tuple[str, ...]
    tries: int

    def notes(self, asked: Mapping[str, int]) -> dict[str, str]:
        """Returns group name -> why more of its channels stay than the counts that were asked for, for the groups where that is so."""
        raised = {n: k for n, k in self.counts.items() if k > asked[n]}
        out = {n: f"{k} kept instead of {asked[n]}, a width that the model's code can state" for n, k in raised.items()}
        none = f"no fewer that the model's code can state were found in {self.tries:,} tries"
        return out | {n: f"all {k} kept instead of {asked[n]}: {none}" for n, k in raised.items() if n in self.given_up}


def stated_widths(graph: DependencyGraph, found: Sequence[Demand], counts: Mapping[str, int], round_to: int = 1) -> Widths:
    """Returns kept counts, none lower than those given, that the model's own code can state, and where the search for them was given up.

    Args:
        graph: the model's groups.
        found: what the model's code asks of its sizes, see `sizes.watch.demands`.
        counts: group name -> how many channels are to stay.
        round_to: raised counts are multiples of this, or all.
    """
    return _System(graph, found, counts).solve(round_to)


@dataclass(frozen=True, eq=False)
class _Sum:
    """How many labels survive, as a sum over kinds of labels: those that die with one channel of each of some groups.

    Attributes:
        constant: labels that nothing removes.
        terms: (groups, factor): factor times in how many ways one kept channel can be chosen of each group (of a group that is listed
            twice, two different ones: rows and columns of one table).
    """

    constant: int
    terms: tuple[tuple[tuple[int, ...], int], ...]

    def value(self, counts: Counts) -> Number:
        """Returns the sum at given counts."""
        total: Any = self.constant
        for groups, factor in self.terms:
            total = total + factor * _ways(groups, counts)
        return total


def _ways(groups: tuple[int, ...], counts: Counts) -> Number:
    ways: Any = 1
    for g in dict.fromkeys(groups):
        chosen: Any = 1
        for k in range(groups.count(g)):
            chosen = chosen * (counts[g] - k) // (k + 1)
        ways = ways * chosen
    return ways


class _System:
    """The equations of one model, and the counts that were asked for."""

    def __init__(self, graph: DependencyGraph, found: Sequence[Demand], counts: Mapping[str, int]) -> None:
        self.names = [g.name for g in graph.groups]
        self.channels = {i: g.channels for i, g in enumerate(graph.groups)}
        self.asked = {i: counts[n] for i, n in enumerate(self.names)}
        self.table = graph.engine.table
        self.owner = np.full(self.table.size, -1, dtype=np.int64)
        for i, g in enumerate(graph.groups):
            self.owner[g.causes] = i
        self.sums: dict[int, _Sum | None] = {}
        usable, self.whole = self._sorted_out(found)
        asked = self._reader(self.asked, {})
        first = sorted(((c, t) for c, t, required in usable if required), key=lambda e: evaluate(e[1], asked) == _old(e[1]))
        self.meant = definitions(first, asked)
        self.equations = self._open([(c, t) for c, t, _ in usable])
        self.tries = 0

    # -- reading -----------------------------------------------------------------------------------------------------------------

    def _sorted_out(self, found: Sequence[Demand]) -> tuple[list[tuple[Expression | int, Expression | int, bool]], set[int]]:
        """Returns equations with whether they are required, and the groups that stay whole (of required demands that are no equations)."""
        usable, whole = [], set()
        for d in found:
            target = _target(d)
            if self._is_usable(d.code) and self._is_usable(target):
                usable.append((d.code, target, d.required))
            elif d.required and not self._is_plain(d):
                for leaf in (*leaves(d.code), *leaves(target)):
                    if isinstance(leaf, Extent):
                        whole |= set(self.owner[self.table.expand(leaf.labels)[1]].tolist()) - {-1}
        return usable, whole

    def _is_plain(self, demand: Demand) -> bool:
        """Returns whether the code reads the very size that is needed."""
        if not isinstance(demand.code, Extent) or demand.labels is None:
            return False
        return np.array_equal(self.table.signatures(demand.code.labels), self.table.signatures(demand.labels))

    def _is_usable(self, expression: Expression | int) -> bool:
        return all(self._sum(leaf.labels) is not None for leaf in leaves(expression) if isinstance(leaf, Extent))

    def _sum(self, labels: Ids) -> _Sum | None:
        if id(labels) not in self.sums:
            self.sums[id(labels)] = self._count(labels)
        return self.sums[id(labels)]

    def _count(self, labels: Ids) -> _Sum | None:
        """Returns how labels count, or None where that depends on which channels of a group go, not on how many."""
        positions, causes = self.table.expand(labels)
        owners = self.owner[causes]
        if (owners < 0).any():
            return None
        kinds: dict[tuple[int, ...], int] = {}
        seen: dict[tuple[int, ...], set[frozenset[int]]] = {}
        for where in np.split(np.arange(positions.size), np.flatnonzero(np.diff(positions)) + 1) if positions.size else []:
            kind = tuple(sorted(owners[where].tolist()))
            kinds[kind] = kinds.get(kind, 0) + 1
            seen.setdefault(kind, set()).add(frozenset(causes[where].tolist()))
        terms = []
        for kind, number in kinds.items():
            full = int(_ways(kind, self.channels))
            if len(seen[kind]) != full or number % full:
                return None
            terms.append((kind, number // full))
        return _Sum(int(labels.size - np.unique(positions).size), tuple(terms))

    def _reader(self, counts: Counts, meant: Mapping[Place, Expression | int]) -> Any:
        """Returns what leaves are worth at given counts."""

        def value(leaf: Leaf) -> Number:
            if isinstance(leaf, Extent):
                found = self._sum(leaf.labels)
                return found.value(counts) if found is not None else leaf.old
            return evaluate(meant[leaf.place], value) if leaf.place in meant else leaf.old

        return value

    def _variables(self, expression: Expression | int) -> set[int]:
        out: set[int] = set()
        for leaf in leaves(expression):
            if isinstance(leaf, Extent):
                found = self._sum(leaf.labels)
                out |= {g for groups, _ in found.terms for g in groups} if found is not None else set()
            elif leaf.place in self.meant:
                out |= self._variables(self.meant[leaf.place])
        return out

    def _open(self, equations: Sequence[Equation]) -> list[tuple[Equation, set[int]]]:
        """Returns the equations that do not hold whatever the counts are, with the groups that they are about."""
        rng = np.random.default_rng(0)
        samples = {i: rng.integers(1, n + 1, _SAMPLES) for i, n in self.channels.items()}
        value = self._reader(samples, self.meant)
        out = []
        for code, target in equations:
            if not np.all(evaluate(code, value) == evaluate(target, value)):
                variables = self._variables(code) | self._variables(target)
                if variables:
                    out.append(((code, target), variables))
        return out

    # -- solving -----------------------------------------------------------------------------------------------------------------

    def solve(self, round_to: int) -> Widths:
        """Returns the smallest counts that are found."""
        domains = {i: self._candidates(i, round_to) for i in self.channels}
        meeting: nx.Graph[int] = nx.Graph()
        for _, variables in self.equations:
            nx.add_path(meeting, sorted(variables))
            meeting.add_nodes_from(variables)
        counts = {**self.asked, **{i: self.channels[i] for i in self.whole}}
        given_up: set[int] = set()
        for family in nx.connected_components(meeting):
            mine = [e for e in self.equations if e[1] & family]
            self.tries = 0
            found = self._search(mine, {i: domains[i] for i in family})
            counts.update(found if found is not None else {i: self.channels[i] for i in family})
            given_up |= family if found is None else set()
        return Widths({self.names[i]: n for i, n in counts.items()}, tuple(self.names[i] for i in sorted(given_up)), _TRIES)

    def _candidates(self, group: int, round_to: int) -> NDArray[np.int64]:
        low, high = self.asked[group], self.channels[group]
        if group in self.whole:
            return np.array([high])
        every = np.arange(low, high + 1)
        allowed: NDArray[np.int64] = every[(every % round_to == 0) | (every == high) | (every == low)]
        return allowed

    def _search(self, equations: list[tuple[Equation, set[int]]], domains: dict[int, NDArray[np.int64]]) -> dict[int, int] | None:
        """Returns counts from the domains that solve the equations: the smallest for the group that most equations are about.

        None where there are none, or none was found in `_TRIES` calls.
        """
        self.tries += 1
        narrowed = self._narrowed(equations, domains) if self.tries <= _TRIES else None
        if narrowed is None:
            return None
        loose = [i for i, d in narrowed.items() if d.size > 1]
        if not loose:
            return {i: int(d[0]) for i, d in narrowed.items()}
        waiting = [v for _, v in equations if sum(narrowed[i].size > 1 for i in v) > 1]
        if not waiting:
            return {i: int(d[0]) for i, d in narrowed.items()}
        group = max(loose, key=lambda i: (sum(i in v for v in waiting), -narrowed[i].size))
        for candidate in narrowed[group]:
            found = self._search(equations, {**narrowed, group: np.array([candidate])})
            if found is not None:
                return found
        return None

    def _narrowed(
        self, equations: list[tuple[Equation, set[int]]], domains: dict[int, NDArray[np.int64]]
    ) -> dict[int, NDArray[np.int64]] | None:
        """Returns domains without the values that equations with one open group rule out; None where nothing is left."""
        domains = dict(domains)
        waiting = list(equations)
        while True:
            before = len(waiting)
            rest = []
            for equation, variables in waiting:
                unknown = [i for i in variables if domains[i].size > 1]
                if len(unknown) > 1:
                    rest.append((equation, variables))
                    continue
                counts: Counts = {i: int(domains[i][0]) for i in variables if i not in unknown}
                counts |= {i: domains[i] for i in unknown}
                value = self._reader(counts, self.meant)
                fits = np.asarray(evaluate(equation[0], value) == evaluate(equation[1], value))
                if unknown:
                    domains[unknown[0]] = domains[unknown[0]][np.broadcast_to(fits, domains[unknown[0]].shape)]
                    if not domains[unknown[0]].size:
                        return None
                elif not fits.all():
                    return None
            waiting = rest
            if len(waiting) == before:
                return domains


def _target(demand: Demand) -> Expression | int:
    return demand.old if demand.labels is None else Extent(demand.labels, demand.old)


def _old(expression: Expression | int) -> int:
    return expression if isinstance(expression, int) else expression.old
