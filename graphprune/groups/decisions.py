"""Channels that are mixed into a number that Python reads, or into a size: what they are reduced by freezes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from graphprune.ops.registry import Why
from graphprune.torch_private import name_of
from graphprune.trace.data_dependent import decisions_of
from graphprune.trace.program import info

if TYPE_CHECKING:
    from torch import fx

    from graphprune.groups.propagate import Analysis
    from graphprune.trace.program import Program

_REMEDY = "Compute it with tensor operators"


def freeze_decided(analysis: Analysis, program: Program) -> None:
    """Freezes the channels over which a statistic was taken on the way to a number that Python reads, or to a size.

    A channel that still has an index of its own where a number is read was frozen by the operator's rule. Here are those that were
    reduced before: a sum over zeros is the same without them, a maximum or a mean is not. The way back ends at layers, which mix channels
    by weights.
    """
    seen: set[fx.Node] = set()
    for node in decisions_of(program, ("number", "size")):
        decides = "is read as a Python number" if info(node).decides == "number" else "decides a size"
        todo = list(node.all_input_nodes)
        while todo:
            current = todo.pop()
            if current in seen or any(n.op == "get_attr" and str(n.target) in analysis.parameters for n in current.all_input_nodes):
                continue
            seen.add(current)
            todo += current.all_input_nodes
            _freeze_statistics(current, f"is reduced before it {decides}", analysis)


def _freeze_statistics(node: fx.Node, text: str, analysis: Analysis) -> None:
    notes = analysis.notes.get(node)
    for labels in notes.statistics if notes is not None else ():
        target: Any = node.target
        analysis.reasons.append(Why(text, name_of(target), info(node).module, _REMEDY))
        analysis.table.freeze(labels, len(analysis.reasons) - 1)
