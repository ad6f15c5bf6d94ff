"""Labelling: walks a recorded program with the operators' rules, in the order of execution."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from graphprune import ops
from graphprune.graph import Unknown
from graphprune.labels import Dim, Ids, LabelTable
from graphprune.ops.registry import UNBOUND, Notes, Op, Value, Why

if TYPE_CHECKING:
    from torch import fx

    from graphprune.tracing import Program


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
    """

    program: Program
    table: LabelTable = field(default_factory=LabelTable)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    notes: dict[fx.Node, Notes] = field(default_factory=dict)
    parameters: dict[str, Value] = field(default_factory=dict)
    reasons: list[Why] = field(default_factory=list)
    unknown: list[Unknown] = field(default_factory=list)
    unbound: dict[tuple[str, int], Why] = field(default_factory=dict)

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


def label(program: Program) -> Analysis:
    """Runs the operators' rules over a program, in the order of execution."""
    analysis = Analysis(program)
    extend(analysis, program)
    return analysis


def extend(analysis: Analysis, program: Program) -> None:
    """Runs the rules over one more program of the same model: parameters that both read keep their labels."""
    for node in program.graph.nodes:
        if node.op == "placeholder":
            analysis.values[node] = _input(node)
        elif node.op == "get_attr":
            analysis.values[node] = _tensor(node, analysis, program)
        elif node.op == "output":
            _freeze_outputs(node, analysis)
        elif node.target is operator.getitem:
            analysis.values[node] = _item(node, analysis)
        elif isinstance(node.target, torch._ops.OpOverload):  # noqa: SLF001 (the class has no public name)
            _apply_rule(node, analysis)


def _input(node: fx.Node) -> Value | None:
    shapes = node.meta["shapes"]
    return Value(shapes[0], [None] * len(shapes[0]), node.name) if shapes else None


def _tensor(node: fx.Node, analysis: Analysis, program: Program) -> Value:
    name, shape = str(node.target), node.meta["shapes"][0]
    if name in analysis.parameters:
        return analysis.parameters[name]
    if name in program.parameters:
        value = Value(shape, [UNBOUND] * len(shape), name, parameter=True, zero=True)
        analysis.parameters[name] = value
        return value
    return Value(shape, [None] * len(shape), name, constant=True, tensor=node.meta.get("tensor"))


def _item(node: fx.Node, analysis: Analysis) -> Value | None:
    if node.meta.get("placeholder"):
        return _input(node)
    source: Any = node.args[0]
    position: Any = node.args[1]
    values = analysis.values.get(source)
    return values[position] if isinstance(values, list) else None


def _freeze_outputs(node: fx.Node, analysis: Analysis) -> None:
    why = Why("reaches an output of the model", "output", "", "Prune the layers before it, or wrap the model so that this is no output")
    analysis.reasons.append(why)
    number = len(analysis.reasons) - 1
    for source in _flat_nodes(node):
        value = analysis.values.get(source)
        if not isinstance(value, Value):
            continue
        for d, labels in enumerate(value.labels):
            if labels is UNBOUND:
                value.labels[d] = None
                analysis.unbound[(value.name, d)] = why
            elif labels is not None:
                analysis.table.freeze(labels, number)


def _flat_nodes(node: fx.Node) -> Iterable[fx.Node]:
    """Returns the tensor nodes that an output or a rebuilt structure refers to."""
    for source in node.all_input_nodes:
        if source.op == "call_function" and not source.meta.get("shapes") and not isinstance(source.target, torch._ops.OpOverload):  # noqa: SLF001
            yield from _flat_nodes(source)
        else:
            yield source


def _apply_rule(node: fx.Node, analysis: Analysis) -> None:
    target: Any = node.target
    op = Op(
        name=target._schema.name,  # noqa: SLF001 (the schema is the documented identity of an overload)
        module=node.meta["module"],
        arguments=_arguments(node, analysis),
        outputs=node.meta["shapes"],
        table=analysis.table,
        reasons=analysis.reasons,
        target=target,
    )
    rule = ops.rule_for(target)
    labels: Any = op.decline("has no rule") if rule is None else rule(op)
    if op.declined:
        _freeze_entering(op)
        if any(not v.constant for v in op.values()):
            _note_unknown(op, analysis)
    analysis.notes[node] = op.notes
    analysis.values[node] = _outputs(node, op, labels)


def _freeze_entering(op: Op) -> None:
    remedy = f"Register a rule for {op.name}, see graphprune/ops/README.md" if op.declined == "has no rule" else ""
    for value in op.values():
        op.freeze_value(value, f"enters {op.name}, which {op.declined}", remedy)


def _note_unknown(op: Op, analysis: Analysis) -> None:
    analysis.unknown.append(Unknown(op.name, op.module, op.frozen_causes))


_NAMES: dict[Any, list[str]] = {}


def _arguments(node: fx.Node, analysis: Analysis) -> dict[str, Any]:
    target: Any = node.target
    names = _NAMES.get(target)
    if names is None:
        names = _NAMES[target] = [a.name for a in target._schema.arguments]  # noqa: SLF001 (documented)
    values = analysis.values

    def raise_(argument: Any) -> Any:
        if isinstance(argument, (list, tuple)):
            return [raise_(a) for a in argument]
        if hasattr(argument, "all_input_nodes"):
            return values[argument]
        return argument

    arguments = {name: raise_(a) for name, a in zip(names, node.args, strict=False)}
    for name, a in node.kwargs.items():
        arguments[name] = raise_(a)
    return arguments


def _outputs(node: fx.Node, op: Op, labels: Any) -> Any:
    values = op.values()
    zero = op.zero if op.zero is not None else bool(values) and all(v.zero for v in values)
    constant = op.constant or bool(node.meta.get("constant"))
    if len(op.outputs) == 1 and "dtype" in node.meta:
        return Value(op.outputs[0], labels, node.name, constant, node.meta.get("tensor"), zero=zero)
    return [Value(s, part, node.name, constant, zero=zero) for s, part in zip(op.outputs, labels, strict=True)]
