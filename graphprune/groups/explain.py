"""Where things come from: why each frozen position is frozen, and which layer's result reaches which layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from graphprune.groups.graph import Frozen, Group
from graphprune.ops.labels import NO_REASON, Ids
from graphprune.ops.registry import UNBOUND
from graphprune.torch_private import name_of
from graphprune.trace.program import info

if TYPE_CHECKING:
    from torch import fx

    from graphprune.groups.propagate import Analysis


def frozen_positions(groups: list[Group], analysis: Analysis) -> list[Frozen]:
    """Returns every position of every parameter dimension that is in no group, with the reason."""
    owned: dict[tuple[str, int], list[Ids]] = {}
    for group in groups:
        for s in group.slices:
            owned.setdefault((s.parameter, s.dim), []).append(s.index.ravel())
    out: list[Frozen] = []
    users = _first_users(analysis)
    for name, value in analysis.parameters.items():
        for d, size in enumerate(value.shape):
            free = np.ones(size, dtype=bool)
            for index in owned.get((name, d), ()):
                free[index] = False
            if free.any():
                out += _explained(name, d, np.flatnonzero(free), value.labels[d], analysis, users)
    for name in analysis.program.unused:
        shape = analysis.program.modules[""].get_parameter(name).shape
        out += [Frozen(name, d, np.arange(n), "takes no part in the forward pass that was recorded") for d, n in enumerate(shape)]
    return out


def _explained(name: str, d: int, index: Ids, labels: Any, analysis: Analysis, users: dict[str, tuple[str, str]]) -> list[Frozen]:
    if labels is None or labels is UNBOUND:
        why = analysis.unbound.get((name, d))
        operator_, module = users.get(name, ("", ""))
        shape = analysis.parameters[name].shape
        text = why.text if why else _why_unlabelled(shape, d)
        return [Frozen(name, d, index, text, why.operator if why else operator_, module, why.remedy if why else "")]
    numbers = analysis.table.reasons(labels[index])
    out = []
    for number in np.unique(numbers).tolist():
        where = index[numbers == number]
        if number == NO_REASON:
            text = "meets positions that are made of nothing removable (padding, an input, a literal)"
            out.append(Frozen(name, d, where, text, *users.get(name, ("", ""))))
        else:
            why = analysis.reasons[number]
            out.append(Frozen(name, d, where, why.text, why.operator, why.module, why.remedy))
    return out


def _why_unlabelled(shape: tuple[int, ...], d: int) -> str:
    if shape[d] == 1:
        return "has size 1"
    if d > 1:
        return "is a kernel position, or meets batch or space"
    return "meets an input of the model, batch, space or a literal"


def _first_users(analysis: Analysis) -> dict[str, tuple[str, str]]:
    """Returns parameter -> (operator, module) that reads it first."""
    out: dict[str, tuple[str, str]] = {}
    for node in analysis.program.graph.nodes:
        if node in analysis.notes:
            target: Any = node.target
            for source in node.all_input_nodes:
                if source.op == "get_attr":
                    out.setdefault(str(source.target), (name_of(target), info(node).module))
    return out


def dataflow(analysis: Analysis) -> list[tuple[str, str, str]]:
    """Returns layer-level dataflow: which layer's result reaches which layer without passing through another."""
    sources: dict[fx.Node, tuple[str, ...]] = {}
    edges: dict[tuple[str, str], str] = {}
    for node in analysis.program.graph.nodes:
        if node.op != "call_function":
            continue
        incoming = tuple(dict.fromkeys(s for n in node.all_input_nodes for s in sources.get(n, ())))
        read = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        owners = [name.rpartition(".")[0] for name in read if name in analysis.parameters]
        if owners and node in analysis.notes:
            for source in incoming:
                if source != owners[0]:
                    target: Any = node.target
                    edges.setdefault((source, owners[0]), name_of(target))
            incoming = (owners[0],)
        sources[node] = incoming
    return [(a, b, o) for (a, b), o in edges.items()]
