"""From labels to groups: walks a recorded program with the operators' rules, then gathers causes with one footprint.

record ──▶ label (rules, forward order) ──▶ causes per parameter position ──▶ groups, frozen positions
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from graphprune.errors import GraphPruneError
from graphprune.groups.decisions import freeze_decided
from graphprune.groups.explain import dataflow, frozen_positions
from graphprune.groups.footprints import Distinct, Footprints, Layout, Slot, split_overlapping, whole_dim_causes
from graphprune.groups.graph import DependencyGraph, Group, Role, Slice
from graphprune.groups.other_paths import RandomBranches
from graphprune.groups.propagate import Analysis, extend, label
from graphprune.ops.labels import FROZEN, Ids
from graphprune.ops.registry import UNBOUND, Value, Why
from graphprune.torch_private import name_of
from graphprune.trace.data_dependent import decisions_of, operators_of
from graphprune.trace.program import Program, info
from graphprune.trace.recorder import record
from graphprune.trace.turns import in_turn

if TYPE_CHECKING:
    from torch import fx, nn


_ROLES: tuple[Role, ...] = ("", "within", "block")
_WITHIN, _BLOCK = 1, 2
_BRANCHES = 3  # passes with other decisions, where Python reads numbers
_EXPLORED = 8  # the same, where one pass leaves parameters unread


@in_turn
def trace(model: nn.Module, example_inputs: object) -> DependencyGraph:
    """Returns the dependency graph of a model: its groups, and what is frozen and why.

    Args:
        model: any module; it is run once, in eval mode, and left as it was.
        example_inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or (arguments, keyword arguments).

    Raises:
        InputError: there are no inputs, or the model's own forward raises on them.
        TraceError: the forward pass does something that cannot be followed.
    """
    start = time.perf_counter()
    program = record(model, example_inputs)
    recorded = time.perf_counter()
    graph = gather(analyse(model, program))
    seconds = {"trace": recorded - start, "groups": time.perf_counter() - recorded}
    object.__setattr__(graph, "seconds", seconds)
    return graph


# -- groups ----------------------------------------------------------------------------------------------------------------------


def analyse(model: nn.Module, program: Program) -> Analysis:
    """Returns the labels of a program; where it leaves parameters unread, other passes that read them are labelled along with it.

    Auxiliary heads run only in training, experts and later exits only for some inputs. Their channels depend on the trunk's all the same.
    """
    analysis = label(program)
    freeze_decided(analysis, program)
    recorded = [operators_of(program)]
    for options, only_unread in _other_passes(program):
        if only_unread and not program.unused:
            continue
        try:
            more = record(model, program.inputs, **options)
        except GraphPruneError:
            continue
        found = operators_of(more)
        if any(n not in more.unused for n in program.unused) if only_unread else found not in recorded:
            recorded.append(found)
            extend(analysis, more)
            freeze_decided(analysis, more)
            program.unused = [n for n in program.unused if n in more.unused]
    return analysis


def _other_passes(program: Program) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yields options of passes that may do other things than one pass did, and whether they are of use only for what that left unread.

    One is in training mode; others decide otherwise, where Python has numbers to decide by, or sizes.
    """
    yield {"training": True}, True
    branches = decisions_of(program, ("number",))
    if branches or decisions_of(program, ("size",)):
        for seed in range(_EXPLORED):
            yield {"runner": RandomBranches(seed)}, not branches or seed >= _BRANCHES


def gather(analysis: Analysis) -> DependencyGraph:
    """Gathers causes with one footprint into groups, and names what is frozen."""
    produces = {slot for notes in analysis.notes.values() for slot in notes.produces} | _derived(analysis)
    slots = [
        (Slot(name, d, (name, d) in produces), labels)
        for name, value in analysis.parameters.items()
        for d, labels in enumerate(value.labels)
        if labels is not None and labels is not UNBOUND
    ]
    _freeze_whole(slots, analysis)
    groups = _groups(Footprints.of(slots, analysis), analysis)
    program = analysis.program
    owners = {name.rpartition(".")[0] or name for name, _ in produces} | {layer for group in groups for layer in group.layers}
    ordered = {n: type(m).__name__ for n, m in program.modules.items() if n in owners}
    ordered |= {n: "Parameter" for n in analysis.parameters if n in owners}
    return DependencyGraph(
        groups=tuple(groups),
        frozen=tuple(frozen_positions(groups, analysis)),
        unknown=tuple(analysis.unknown),
        layers=ordered,
        modules={n: type(m).__name__ for n, m in program.modules.items()},
        shapes={n: v.shape for n, v in analysis.parameters.items()}
        | {n: tuple(program.modules[""].get_parameter(n).shape) for n in program.unused},
        aliases=program.aliases,
        edges=tuple(dataflow(analysis)),
        seconds={},
        engine=analysis,
        scales=frozenset(name for notes in analysis.notes.values() for name in notes.scales),
    )


def _derived(analysis: Analysis) -> set[tuple[str, int]]:
    """Returns the parameter dimensions behind weights that are computed (scaled, standardised, detached): those with equal labels."""
    nodes = {node.name: node for node in analysis.notes}
    out: set[tuple[str, int]] = set()
    for notes in list(analysis.notes.values()):
        for name, dim in notes.derived:
            node = nodes.get(name)
            labels = analysis.values[node].labels[dim] if node is not None and isinstance(analysis.values[node], Value) else None
            if node is None or labels is None:
                continue
            signs = analysis.table.signatures(labels)
            for value in _parameters_behind(node, analysis):
                for d, own in enumerate(value.labels):
                    if isinstance(own, np.ndarray) and np.array_equal(analysis.table.signatures(own), signs):
                        out.add((value.name, d))
    return out


def _parameters_behind(node: fx.Node, analysis: Analysis) -> list[Value]:
    """Returns the parameters that a weight is computed from (nothing when an input of the model takes part)."""
    seen: set[fx.Node] = set()
    todo, out = [node], []
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "placeholder":
            return []
        if current.op == "get_attr" and str(current.target) in analysis.parameters:
            out.append(analysis.parameters[str(current.target)])
        todo += current.all_input_nodes
    return out


def _freeze_whole(slots: list[tuple[Slot, Ids]], analysis: Analysis) -> None:
    """Freezes causes that own every index of some parameter dimension: removing one would empty a layer."""
    while found := whole_dim_causes(slots, analysis.table):
        for cause, slot in found:
            why = Why(f"owns all of {slot.parameter} dim {slot.dim}, which would be left empty", "", slot.parameter.rpartition(".")[0])
            analysis.reasons.append(why)
            analysis.table.freeze(np.array([cause], dtype=np.int64), len(analysis.reasons) - 1)


def _groups(footprints: Footprints, analysis: Analysis) -> list[Group]:
    """Returns the groups in the order in which the program produces them."""
    members = footprints.members()
    if not members:
        return []
    order = _slot_order(analysis)
    raw: list[tuple[int, Ids, list[Slice]]] = []
    for causes, layouts in zip(members, footprints.layouts_of(np.array([causes[0] for causes in members])), strict=True):
        for family in split_overlapping(causes, layouts):
            ordered, slices = footprints.slices(family, layouts, order)
            raw.append((order.get(slices[0].parameter, 0), ordered, slices))
    raw.sort(key=_rank)
    changed = _changed(analysis, [causes for _, causes, _ in raw])
    roles = _roles(footprints, analysis)
    names: dict[str, int] = {}
    return [_group(causes, slices, names, why, roles) for (_, causes, slices), why in zip(raw, changed, strict=True)]


def _rank(item: tuple[int, Ids, list[Slice]]) -> tuple[Any, ...]:
    """Orders groups by the program, then by position, then wide channels first: the same at every batch size."""
    first, _, slices = item
    return first, int(slices[0].index.min()), [(s.parameter, s.dim, -s.index.shape[1]) for s in slices], slices[0].index[:, 0].tolist()


def _group(causes: Ids, slices: list[Slice], names: dict[str, int], why: tuple[str, ...], roles: Ids) -> Group:
    base = slices[0].module if slices[0].produces else slices[0].parameter
    base = base or slices[0].parameter
    names[base] = names.get(base, 0) + 1
    name = base if names[base] == 1 else f"{base}#{names[base]}"
    return Group(name, int(causes.size), "changed" if why else "exact", tuple(slices), _ROLES[int(roles[causes[0]])], causes, why)


def _changed(analysis: Analysis, groups: list[Ids]) -> list[tuple[str, ...]]:
    """Returns, per group, the operators that take a statistic across its causes: those of the first cause first."""
    group_of = np.full(analysis.table.size, -1, dtype=np.int64)
    place = np.zeros(analysis.table.size, dtype=np.int64)
    for number, causes in enumerate(groups):
        group_of[causes] = number
        place[causes] = np.arange(causes.size)
    distinct = Distinct(analysis.table)
    touched: list[list[tuple[int, int]]] = []  # per distinct array of labels: the groups that it holds, with their first place in it
    found: list[list[tuple[int, int, str]]] = [[] for _ in groups]
    entries = 0
    for node, notes in analysis.notes.items():
        for labels in notes.statistics:
            target: Any = node.target
            text = name_of(target).removeprefix("aten::") + (f" in {info(node).module}" if info(node).module else "")
            which = distinct.number(labels)
            if which == len(touched):
                owners = Layout.of(labels, analysis.table).owners
                touched.append(_firsts(group_of[owners], place[owners]))
            for group, first in touched[which]:
                found[group].append((first, entries, text))
            entries += 1
    return [tuple(dict.fromkeys(text for _, _, text in sorted(texts))) for texts in found]


def _firsts(groups: Ids, places: Ids) -> list[tuple[int, int]]:
    """Returns (group, least place) for every group, -1 left out."""
    order = np.lexsort((places, groups))
    groups, places = groups[order], places[order]
    first = np.flatnonzero(np.diff(groups, prepend=-1))
    return list(zip(groups[first].tolist(), places[first].tolist(), strict=True))


def _roles(footprints: Footprints, analysis: Analysis) -> Ids:
    """Returns per cause its role, for causes that own an index jointly with others: blocks first, positions within second."""
    roles = np.zeros(analysis.table.size, dtype=np.int64)
    for layout in footprints.layouts:
        if layout.slots:
            rows = analysis.table.joint(layout.labels)
            last = (rows != FROZEN).sum(axis=1) - 1
            for role, causes in ((_WITHIN, rows[np.arange(rows.shape[0]), last]), (_BLOCK, rows[rows != FROZEN])):
                roles[causes[roles[causes] == 0]] = role
    return roles


def _slot_order(analysis: Analysis) -> dict[str, int]:
    """Returns parameter -> the number of the first node that reads it; what only other passes read comes last, in the model's order."""
    order: dict[str, int] = {}
    for i, node in enumerate(analysis.program.graph.nodes):
        if node.op == "call_function":
            for source in node.all_input_nodes:
                if source.op == "get_attr":
                    order.setdefault(str(source.target), i)
    last = len(analysis.program.graph.nodes)
    if all(name in order for name in analysis.parameters):
        return order
    named = {name: last + i for i, (name, _) in enumerate(analysis.program.modules[""].named_parameters())}
    return {name: named.get(name, last) for name in analysis.parameters} | order
