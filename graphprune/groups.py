"""From labels to groups: walks a recorded program with the operators' rules, then gathers causes with one footprint.

record ──▶ label (rules, forward order) ──▶ causes per parameter position ──▶ groups, frozen positions
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from graphprune.errors import GraphPruneError
from graphprune.graph import DependencyGraph, Group, Role, Slice
from graphprune.labelling import Analysis, extend, label
from graphprune.labels import FROZEN, Ids, LabelTable
from graphprune.ops.registry import UNBOUND, Value, Why
from graphprune.provenance import dataflow, frozen_positions
from graphprune.tracing import Program, record

if TYPE_CHECKING:
    from torch import fx, nn


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


@dataclass(frozen=True)
class _Slot:
    """One dimension of one parameter with labels."""

    parameter: str
    dim: int
    produces: bool


def analyse(model: nn.Module, program: Program) -> Analysis:
    """Returns the labels of a program; where it leaves parameters unread, a training pass is labelled along with it.

    Auxiliary heads run only in training. Their channels depend on the trunk's all the same.
    """
    analysis = label(program)
    if program.unused:
        try:
            more = record(model, program.inputs, training=True)
        except GraphPruneError:
            return analysis
        if len(more.unused) < len(program.unused):
            extend(analysis, more)
            program.unused = [n for n in program.unused if n in more.unused]
    return analysis


def gather(analysis: Analysis) -> DependencyGraph:
    """Gathers causes with one footprint into groups, and names what is frozen."""
    produces = {slot for notes in analysis.notes.values() for slot in notes.produces} | _derived(analysis)
    slots = [
        (_Slot(name, d, (name, d) in produces), labels)
        for name, value in analysis.parameters.items()
        for d, labels in enumerate(value.labels)
        if labels is not None and labels is not UNBOUND
    ]
    _freeze_whole(slots, analysis)
    footprint = _Footprint.of(slots, analysis)
    groups = _groups(footprint, analysis)
    program = analysis.program
    owners = {name.rpartition(".")[0] or name for name, _ in produces}
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


def _freeze_whole(slots: list[tuple[_Slot, Ids]], analysis: Analysis) -> None:
    """Freezes causes that own every index of some parameter dimension: removing one would empty a layer."""
    while True:
        doomed: list[tuple[int, int]] = []
        for slot, labels in slots:
            _, causes = analysis.table.expand(labels)
            if causes.size < labels.size:
                continue
            unique, counts = np.unique(causes, return_counts=True)
            for cause in unique[counts == labels.size].tolist():
                why = Why(f"owns all of {slot.parameter} dim {slot.dim}, which would be left empty", "", slot.parameter.rpartition(".")[0])
                analysis.reasons.append(why)
                doomed.append((cause, len(analysis.reasons) - 1))
        if not doomed:
            return
        for cause, number in doomed:
            analysis.table.freeze(np.array([cause], dtype=np.int64), number)


@dataclass(eq=False)
class _Footprint:
    """Which cause owns what: parallel arrays (slot, position, cause), sorted by cause, then slot, then position.

    `signature` has one number per cause: causes with equal numbers own equally much of the same dimensions, of parameters and of
    everything computed between them.
    """

    slots: list[_Slot]
    slot: Ids
    position: Ids
    cause: Ids
    causes: Ids
    signature: np.ndarray[Any, np.dtype[np.uint64]]

    @staticmethod
    def of(slots: list[tuple[_Slot, Ids]], analysis: Analysis) -> _Footprint:
        parts = [_expanded(i, labels, analysis.table) for i, (_, labels) in enumerate(slots)]
        slot, position, cause = (np.concatenate(p) if p else np.zeros(0, dtype=np.int64) for p in zip(*parts, strict=True)) if parts else (
            np.zeros(0, dtype=np.int64),) * 3  # fmt: skip
        order = np.lexsort((position, slot, cause))
        slot, position, cause = slot[order], position[order], cause[order]
        causes = np.unique(cause)
        between = [_expanded(len(slots) + i, labels, analysis.table) for i, labels in enumerate(_intermediate(analysis, slots))]
        all_slots = np.concatenate([slot, *(b[0] for b in between)])
        all_causes = np.concatenate([cause, *(b[2] for b in between)])
        member = np.isin(all_causes, causes)
        where = np.searchsorted(causes, all_causes[member]) if causes.size else np.zeros(0, dtype=np.int64)
        signature = _signature(all_slots[member], where, causes.size)
        return _Footprint([s for s, _ in slots], slot, position, cause, causes, signature)


def _expanded(number: int, labels: Ids, table: LabelTable) -> tuple[Ids, Ids, Ids]:
    positions, causes = table.expand(labels)
    return np.full(positions.size, number, dtype=np.int64), positions, causes


def _intermediate(analysis: Analysis, slots: list[tuple[_Slot, Ids]]) -> list[Ids]:
    """Returns the distinct label arrays of what is computed between parameters."""
    seen = {id(labels) for _, labels in slots}
    out: list[Ids] = []
    for value in analysis.values.values():
        for v in value if isinstance(value, list) else (value,):
            if v is None or v.parameter:
                continue
            for labels in v.labels:
                if labels is not None and labels is not UNBOUND and id(labels) not in seen:
                    seen.add(id(labels))
                    out.append(labels)
    return out


def _signature(slot: Ids, cause: Ids, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Returns per cause a hash of {(slot, how many positions)}: a sum of random numbers, one per (slot, count) pair."""
    if not slot.size:
        return np.zeros(count, dtype=np.uint64)
    width = int(slot.max()) + 1
    pair, rows = np.unique(cause * width + slot, return_counts=True)
    key = (pair % width).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + rows.astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
    key ^= key >> np.uint64(29)
    key *= np.uint64(0xBF58476D1CE4E5B9)
    key ^= key >> np.uint64(32)
    key *= np.uint64(0x94D049BB133111EB)
    out = np.zeros(count, dtype=np.uint64)
    np.add.at(out, pair // width, key)
    return out


def _groups(footprint: _Footprint, analysis: Analysis) -> list[Group]:
    """Returns the groups in the order in which the program produces them."""
    if not footprint.causes.size:
        return []
    _, first, which = np.unique(footprint.signature, return_index=True, return_inverse=True)
    members: list[Ids] = [footprint.causes[which == i] for i in range(first.size)]
    changed = _changed(analysis)
    roles = _roles(analysis)
    starts = np.searchsorted(footprint.cause, footprint.causes)
    ends = np.searchsorted(footprint.cause, footprint.causes, side="right")
    spans = dict(zip(footprint.causes.tolist(), zip(starts.tolist(), ends.tolist(), strict=True), strict=True))
    order = _slot_order(analysis)
    raw: list[tuple[int, Ids, list[Slice]]] = []
    for causes in members:
        slices = _slices(causes, spans, footprint)
        slices.sort(key=lambda s: (not s.produces, order.get(s.parameter, 0)))
        position = order.get(slices[0].parameter, 0)
        raw.append((position, _by_position(causes, slices[0]), [_reordered(s, slices[0]) for s in slices]))
    raw.sort(key=_rank)
    names: dict[str, int] = {}
    return [_group(causes, slices, names, changed, roles) for _, causes, slices in raw]


def _rank(item: tuple[int, Ids, list[Slice]]) -> tuple[Any, ...]:
    """Orders groups by the program, then by position, then wide channels first: the same at every batch size."""
    first, _, slices = item
    return first, int(slices[0].index.min()), [(s.parameter, s.dim, -s.index.shape[1]) for s in slices], slices[0].index[:, 0].tolist()


def _slices(causes: Ids, spans: dict[int, tuple[int, int]], footprint: _Footprint) -> list[Slice]:
    """Returns the slices of a group; all its causes own equally many positions of the same slots."""
    where = np.concatenate([np.arange(*spans[c]) for c in causes.tolist()]).reshape(causes.size, -1)
    slot, position = footprint.slot[where], footprint.position[where]
    out = []
    for number in np.unique(slot[0]).tolist():
        s = footprint.slots[number]
        columns = slot[0] == number
        out.append(Slice(s.parameter, s.dim, position[:, columns], produces=s.produces))
    return out


def _by_position(causes: Ids, first: Slice) -> Ids:
    return causes[np.argsort(first.index[:, 0], kind="stable")]


def _reordered(s: Slice, first: Slice) -> Slice:
    return Slice(s.parameter, s.dim, s.index[np.argsort(first.index[:, 0], kind="stable")], s.produces)


def _group(causes: Ids, slices: list[Slice], names: dict[str, int], changed: dict[int, list[str]], roles: dict[int, Role]) -> Group:
    base = slices[0].module if slices[0].produces else slices[0].parameter
    base = base or slices[0].parameter
    names[base] = names.get(base, 0) + 1
    name = base if names[base] == 1 else f"{base}#{names[base]}"
    why = tuple(dict.fromkeys(w for c in causes.tolist() for w in changed.get(c, ())))
    role = roles.get(int(causes[0]), "")
    return Group(name, int(causes.size), "changed" if why else "exact", tuple(slices), role, causes, why)


def _changed(analysis: Analysis) -> dict[int, list[str]]:
    """Returns cause -> the operators that take a statistic across it."""
    out: dict[int, list[str]] = {}
    for node, notes in analysis.notes.items():
        if notes.statistics:
            target: Any = node.target
            text = target._schema.name.removeprefix("aten::") + (f" in {node.meta['module']}" if node.meta["module"] else "")  # noqa: SLF001
            for labels in notes.statistics:
                for cause in np.unique(analysis.table.expand(labels)[1]).tolist():
                    out.setdefault(cause, []).append(text)
    return out


def _roles(analysis: Analysis) -> dict[int, Role]:
    """Returns cause -> its role, for causes that own an index jointly with others: blocks first, positions within second."""
    out: dict[int, Role] = {}
    seen: set[int] = set()
    for value in analysis.parameters.values():
        for labels in value.labels:
            if labels is None or labels is UNBOUND or id(labels) in seen:
                continue
            seen.add(id(labels))
            rows = analysis.table.joint(labels)
            last = (rows != FROZEN).sum(axis=1) - 1
            inner = rows[np.arange(rows.shape[0]), last]
            for cause in np.unique(inner).tolist():
                out.setdefault(cause, "within")
            for cause in np.setdiff1d(rows, [FROZEN, *inner]).tolist():
                out.setdefault(cause, "block")
    return out


def _slot_order(analysis: Analysis) -> dict[str, int]:
    """Returns parameter -> the number of the first node that reads it."""
    order: dict[str, int] = {}
    for i, node in enumerate(analysis.program.graph.nodes):
        if node.op == "call_function":
            for source in node.all_input_nodes:
                if source.op == "get_attr":
                    order.setdefault(str(source.target), i)
    return order
