"""Which tensors of a recorded program share memory, and which operators write to it.

A view and the tensor that it looks into hold the same values: what is written through one of them is read through the other.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from graphprune.torch_private import is_operator, name_of, schema_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx

    from graphprune.torch_private import OpOverload

_HANDS_ON = {"aten::dropout", "aten::alpha_dropout", "aten::feature_dropout"}
"""Operators that return their input itself in eval mode, which their schema does not say."""


class Memory:
    """The families of tensors with shared memory in a program, for those families that some operator writes to."""

    def __init__(self, graph: fx.Graph) -> None:
        """Walks a recorded graph once."""
        first: dict[fx.Node, fx.Node] = {}
        writes: dict[fx.Node, int] = {}
        self._position: dict[fx.Node, int] = {}
        self._written: dict[fx.Node, list[fx.Node]] = {}
        for position, node in enumerate(graph.nodes):
            self._position[node] = position
            written, shared = _aliased(node)
            if written:
                self._written[node] = written
            for argument in (*written, *shared):
                first.setdefault(node, first.get(argument, argument))
            for argument in written:
                writes[first.get(argument, argument)] = position
        self._root = {node: root for node in graph.nodes if (root := first.get(node, node)) in writes}
        self._last_write = writes
        self._members: dict[fx.Node, list[fx.Node]] = {}
        for node, root in self._root.items():
            self._members.setdefault(root, []).append(node)

    @property
    def is_written(self) -> bool:
        """Whether any operator of the program writes to memory that another tensor has as well."""
        return bool(self._last_write)

    def written_after(self, node: fx.Node, values: Mapping[fx.Node, object]) -> frozenset[int]:
        """Returns the ids of the values of a node's arguments whose memory is written by an operator that runs after it."""
        now, root = self._position[node], self._root
        found = ((n, root.get(n)) for n in node.all_input_nodes)
        return frozenset(id(values[n]) for n, r in found if r is not None and self._last_write[r] > now)

    def overwritten_by(self, node: fx.Node) -> list[fx.Node]:
        """Returns the tensors whose memory a node writes to, as far as they exist already."""
        written = self._written.get(node)
        if written is None:
            return []
        members = {m for argument in written for m in self._members[self._root[argument]]}
        return [m for m in members if self._position[m] <= self._position[node]]


def _aliased(node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Returns the arguments that a node writes to, and those whose memory its output may share."""
    if node.op != "call_function":
        return [], []
    target: Any = node.target
    if not is_operator(target):
        return [], node.all_input_nodes[:1]  # one tensor out of a list of them
    written: list[fx.Node] = []
    shared: list[fx.Node] = []
    for i, name, writes in _aliases(target):
        value = node.args[i] if i < len(node.args) else node.kwargs.get(name)
        (written if writes else shared).extend(_nodes(value))
    if name_of(target) in _HANDS_ON:
        shared += node.all_input_nodes[:1]
    return written, shared


@cache
def _aliases(target: OpOverload) -> tuple[tuple[int, str, bool], ...]:
    """Returns (position, name, whether it is written to) of the arguments of an operator whose memory it hands on or writes to."""
    arguments = ((i, a.name, a.alias_info) for i, a in enumerate(schema_of(target).arguments))
    return tuple((i, name, alias.is_write) for i, name, alias in arguments if alias is not None)


def _nodes(value: Any) -> list[fx.Node]:
    """Returns the nodes in an argument: itself, or those in a list."""
    if isinstance(value, (list, tuple)):
        return [v for v in value if hasattr(v, "all_input_nodes")]
    return [value] if hasattr(value, "all_input_nodes") else []
