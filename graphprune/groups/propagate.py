"""Labelling: walks a recorded program with the operators' rules, in the order of execution."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from graphprune import ops
from graphprune.groups.aliasing import Memory
from graphprune.groups.graph import Unknown
from graphprune.ops.labels import Dim, Ids, LabelTable
from graphprune.ops.registry import UNBOUND, Notes, Op, Value, Why
from graphprune.torch_private import argument_names, is_operator, name_of
from graphprune.trace.probe import REMEDY, probe
from graphprune.trace.program import info

if TYPE_CHECKING:
    from torch import fx

    from graphprune.trace.program import Program


_NONE: frozenset[int] = frozenset()


@dataclass(eq=False)
class Analysis:
    """A program with labels.

    Attributes:
        program: the recording.
        table: the label algebra.
        values: node -> its value (a list for operators with several outputs).
        notes: node -> what its rule said.
        parameters: name -> labels of each parameter and member buffer.
        reasons: why labels were frozen, by number.
        unknown: operators without a rule.
        unbound: (parameter name, dim) -> why a dimension stays that had met nothing when it was frozen.
        open: node -> dimensions of its output along which it repeats one value as often as is asked for.
        origins: node -> the nodes that could have such dimensions, among those that it is made of.
        refused: those of them that had none when something with labels met them.
    """

    program: Program
    table: LabelTable = field(default_factory=LabelTable)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    notes: dict[fx.Node, Notes] = field(default_factory=dict)
    parameters: dict[str, Value] = field(default_factory=dict)
    reasons: list[Why] = field(default_factory=list)
    unknown: list[Unknown] = field(default_factory=list)
    unbound: dict[tuple[str, int], Why] = field(default_factory=dict)
    open: dict[fx.Node, frozenset[int]] = field(default_factory=dict)
    origins: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)
    refused: set[fx.Node] = field(default_factory=set)

    def removed(self, causes: Ids) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Returns flags over cause ids, set for `causes`."""
        flags = np.zeros(self.table.size, dtype=bool)
        flags[causes] = True
        return flags

    def kept(self, labels: Dim, size: int, flags: np.ndarray[Any, np.dtype[np.bool_]]) -> Ids:
        """Returns the indices of a dimension that survive the removal of the flagged causes."""
        if not isinstance(labels, np.ndarray):
            return np.arange(size)
        return np.flatnonzero(~self.table.removed(labels, flags))


def operators(program: Program) -> Iterator[fx.Node]:
    """Returns the operators of a recording, in order."""
    return (n for n in program.graph.nodes if n.op == "call_function" and info(n).operator and is_operator(n.target))


def label(program: Program) -> Analysis:
    """Runs the operators' rules over a program, in the order of execution.

    A tensor that repeats one value (zeros, an expanded dimension) has no labels, unless that freezes what it meets: then the program is
    labelled anew, with labels for those of its dimensions that really take part.
    """
    analysis = _labelled(program, {})
    if not analysis.refused:
        return analysis
    trial = _labelled(program, _wide_open(analysis.refused))
    if trial.refused:  # what is not frozen any more meets others (in the second step of a recurrent layer)
        trial = _labelled(program, _wide_open(n for n, origins in trial.origins.items() if n in origins))
    taking_part = _taking_part(trial)
    if not taking_part:
        return analysis
    analysis = _labelled(program, taking_part)
    _freeze_filling(analysis)
    return analysis


def _freeze_filling(analysis: Analysis) -> None:
    """Freezes what only fills a place: positions that repeat one value and that nothing computes, though a layer reads them."""
    produced = {slot for notes in analysis.notes.values() for slot in notes.produces}
    made = {name for name, _ in produced}
    slots = [(name, d, labels) for name, value in analysis.parameters.items() for d, labels in enumerate(value.labels)]
    kept = [labels for name, d, labels in slots if isinstance(labels, np.ndarray) and ((name, d) in produced or name not in made)]
    owned = np.concatenate([analysis.table.expand(labels)[1] for labels in kept]) if kept else np.zeros(0, dtype=np.int64)
    for node, dims in analysis.open.items():
        target: Any = node.target
        analysis.reasons.append(Why("repeats one value that no layer computes", name_of(target), info(node).module))
        for d in dims:
            causes = np.unique(analysis.table.expand(analysis.values[node].labels[d])[1])
            analysis.table.freeze(causes[~np.isin(causes, owned)], len(analysis.reasons) - 1)


def _wide_open(nodes: Iterable[fx.Node]) -> dict[fx.Node, frozenset[int]]:
    return {n: frozenset(range(len(info(n).shapes[0]))) for n in nodes}


def _labelled(program: Program, open_: dict[fx.Node, frozenset[int]]) -> Analysis:
    analysis = Analysis(program, open=open_)
    extend(analysis, program)
    return analysis


def _taking_part(analysis: Analysis) -> dict[fx.Node, frozenset[int]]:
    """Returns the open dimensions with labels that some parameter has as well."""
    table = analysis.table
    owned = [labels for value in analysis.parameters.values() for labels in value.labels if isinstance(labels, np.ndarray)]
    causes = np.unique(np.concatenate([table.expand(labels)[1] for labels in owned])) if owned else np.zeros(0, dtype=np.int64)
    out: dict[fx.Node, frozenset[int]] = {}
    for node, dims in analysis.open.items():
        labels = analysis.values[node].labels
        found = frozenset(d for d in dims if labels[d] is not None and np.isin(table.expand(labels[d])[1], causes).any())
        if found:
            out[node] = found
    return out


def extend(analysis: Analysis, program: Program) -> None:
    """Runs the rules over one more program of the same model: parameters that both read keep their labels."""
    memory = Memory(program.graph)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            analysis.values[node] = _input(node)
        elif node.op == "get_attr":
            analysis.values[node] = _tensor(node, analysis, program)
        elif node.op == "output":
            _freeze_outputs(node, analysis)
        elif node.target is operator.getitem:
            analysis.values[node] = _item(node, analysis)
        elif is_operator(node.target):
            _apply_rule(node, analysis, memory)


def _input(node: fx.Node) -> Value | None:
    shapes = info(node).shapes
    return Value(shapes[0], [None] * len(shapes[0]), node.name, boolean=_is_boolean(node)) if shapes else None


def _is_boolean(node: fx.Node) -> bool:
    return info(node).dtype is torch.bool


def _tensor(node: fx.Node, analysis: Analysis, program: Program) -> Value:
    name, shape = str(node.target), info(node).shapes[0]
    if name in analysis.parameters:
        return analysis.parameters[name]
    if name in program.parameters:
        value = Value(shape, [UNBOUND] * len(shape), name, parameter=True, zero=True)
        analysis.parameters[name] = value
        return value
    return Value(shape, [None] * len(shape), name, constant=True, tensor=info(node).tensor, boolean=_is_boolean(node))


def _item(node: fx.Node, analysis: Analysis) -> Value | None:
    if info(node).placeholder:
        return _input(node)
    source: Any = node.args[0]
    position: Any = node.args[1]
    values = analysis.values.get(source)
    if not isinstance(values, list):
        return None
    analysis.origins[node] = analysis.origins.get(source, frozenset())
    return values[position]  # type: ignore[no-any-return]


def _freeze_outputs(node: fx.Node, analysis: Analysis) -> None:
    why = Why("reaches an output of the model", "output", "", "Prune the layers before it, or wrap the model so that this is no output")
    analysis.reasons.append(why)
    number = len(analysis.reasons) - 1
    for source in _flat_nodes(node):
        value = analysis.values.get(source)
        if not isinstance(value, Value):
            continue
        if value.piece is not None:
            analysis.table.freeze(value.piece.needs, value.piece.reason)
        for d, labels in enumerate(value.labels):
            if labels is UNBOUND:
                value.labels[d] = None
                analysis.unbound[(value.name, d)] = why
            elif labels is not None:
                analysis.table.freeze(labels, number)


def _flat_nodes(node: fx.Node) -> Iterable[fx.Node]:
    """Returns the tensor nodes that an output or a rebuilt structure refers to."""
    for source in node.all_input_nodes:
        if source.op == "call_function" and not info(source).shapes and not is_operator(source.target):
            yield from _flat_nodes(source)
        else:
            yield source


def _apply_rule(node: fx.Node, analysis: Analysis, memory: Memory) -> None:
    target: Any = node.target
    known = info(node)
    op = Op(
        name=name_of(target),
        module=known.module,
        arguments=_arguments(node, analysis),
        outputs=known.shapes,
        table=analysis.table,
        reasons=analysis.reasons,
        unbound=analysis.unbound,
        target=target,
        open=analysis.open.get(node, _NONE),
        later=memory.written_after(node, analysis.values) if memory.is_written else _NONE,
        idle=frozenset(int(str(n.args[1])) for n in node.users if n.target is operator.getitem and not n.users)
        if known.dtype is None
        else _NONE,
    )
    if op.name != "aten::stack":
        for value in op.values():
            if value.piece is not None:
                op.keep(value)
    rule = ops.rule_for(target)
    labels: Any = _probed(op, node, analysis) if rule is None else rule(op)
    if op.declined:
        _freeze_entering(op)
        if any(not v.constant for v in op.values()):
            _note_unknown(op, analysis)
    _freeze_single(op, labels)
    analysis.notes[node] = op.notes
    analysis.values[node] = _outputs(node, op, labels)
    _trace_back(node, op, analysis)
    for other in memory.overwritten_by(node):
        _overwrite(analysis.values.get(other), analysis.values[node])


def _trace_back(node: fx.Node, op: Op, analysis: Analysis) -> None:
    """Notes which tensors that repeat one value a node is made of, and whether one of them was refused here."""
    origins = analysis.origins
    behind = frozenset[Any]().union(*(origins.get(n, ()) for n in node.all_input_nodes)) if origins else frozenset[Any]()
    if not behind and not op.offered:
        return
    if op.refused:
        analysis.refused |= behind
    mixes = any(v.parameter and len(v.shape) > 1 for v in op.values())
    if op.offered or (behind and not mixes):
        analysis.origins[node] = (frozenset() if mixes else behind) | (frozenset([node]) if op.offered else frozenset())


def _overwrite(value: Value | list[Value] | None, written: Value | list[Value]) -> None:
    """Tells a tensor that something was written to its memory: it is what it was only as far as that is the same."""
    new = written if isinstance(written, list) else [written]
    for v in value if isinstance(value, list) else [value]:
        if v is not None:
            v.zero = v.zero and all(n.zero for n in new)
            v.constant = v.constant and all(n.constant for n in new)


def _probed(op: Op, node: fx.Node, analysis: Analysis) -> Any:
    """Returns the labels that running an operator without a rule shows; it is declined where that shows nothing."""
    found = probe(op, info(node).recorded)
    if found is None:
        return op.decline("has no rule")
    if op.frozen_causes:
        _note_unknown(op, analysis)
    return found[0] if len(op.outputs) == 1 and info(node).dtype is not None else found


def _freeze_single(op: Op, labels: Any) -> None:
    """Freezes what is the only position of an output dimension: a dimension of size 1 is broadcast, one of size 0 is not."""
    for i, part in enumerate(labels):
        if isinstance(part, list):
            _freeze_single(op, part)
        elif part is not None and part.size == 1:
            op.freeze(part, "is the only position of a dimension, which would be left empty")
            labels[i] = None


def _freeze_entering(op: Op) -> None:
    remedy = REMEDY if op.declined == "has no rule" else ""
    for value in op.values():
        op.freeze_value(value, f"enters {op.name}, which {op.declined}", remedy)


def _note_unknown(op: Op, analysis: Analysis) -> None:
    analysis.unknown.append(Unknown(op.name, op.module, op.frozen_causes))


def _arguments(node: fx.Node, analysis: Analysis) -> dict[str, Any]:
    target: Any = node.target
    names = argument_names(target)
    values = analysis.values

    arguments = {name: _raised(a, values) for name, a in zip(names, node.args, strict=False)}
    for name, a in node.kwargs.items():
        arguments[name] = _raised(a, values)
    return arguments


def _raised(argument: Any, values: dict[fx.Node, Any]) -> Any:
    """Returns an argument with values in place of nodes."""
    if isinstance(argument, (list, tuple)):
        return [_raised(a, values) for a in argument]
    return values[argument] if hasattr(argument, "all_input_nodes") else argument


def _outputs(node: fx.Node, op: Op, labels: Any) -> Any:
    values = op.values()
    zero = op.zero if op.zero is not None else bool(values) and all(v.zero for v in values)
    known = info(node)
    constant = op.constant or known.constant
    pieces: list[Any] = [*op.pieces] or [None] * len(op.outputs)
    if len(op.outputs) == 1 and known.dtype is not None:
        tensor, boolean = known.tensor, known.dtype is torch.bool
        return Value(op.outputs[0], labels, node.name, constant, tensor, zero=zero, boolean=boolean, piece=pieces[0], whole_of=op.whole_of)
    if len(op.outputs) == 1 and not (labels and isinstance(labels[0], list)):  # a list of one tensor, by a rule that spoke of the tensor
        labels = [labels]
    parts = zip(op.outputs, labels, pieces, strict=True)
    return [Value(shape, part, node.name, constant, zero=zero, piece=piece) for shape, part, piece in parts]
