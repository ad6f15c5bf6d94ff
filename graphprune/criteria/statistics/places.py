"""Which tensors of a recorded program show what a group's channels are like: the activations behind the weights that compute them.

For every producing weight, the first nonlinearity downstream that the channels pass; where none does, the last tensor that carries them
before another weight reads it. Norms, additions, views and pooling in between or afterwards do not matter: of conv-BN-ReLU it is the
ReLU's output, of conv-BN-add-ReLU that of the ReLU behind the addition. A nonlinearity that is only a factor of what it is computed from
(x * sigmoid(x), written out) counts at the product.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np

from graphprune.criteria.statistics.following import name
from graphprune.groups.footprints import Distinct, Layout
from graphprune.groups.propagate import Analysis
from graphprune.ops.registry import Value
from graphprune.torch_private import is_operator
from graphprune.trace.program import info

if TYPE_CHECKING:
    from torch import fx

    from graphprune.groups.graph import Group
    from graphprune.ops.labels import Ids

NONLINEAR = frozenset(
    f"aten::{n}"
    for n in ("relu", "relu6", "hardtanh", "clamp", "clamp_min", "clip", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish",
              "softplus", "sigmoid", "log_sigmoid", "hardsigmoid", "hardswish", "tanh", "prelu", "_prelu_kernel", "rrelu",
              "rrelu_with_noise", "threshold", "glu", "softshrink", "hardshrink")
)  # fmt: skip
_SCALING = frozenset(f"aten::{n}" for n in ("add", "sub", "rsub", "mul", "div", "neg", "clamp", "hardtanh", "relu6", "to", "_to_copy"))


class Places:
    """Finds the tensors to look at in a recorded program."""

    def __init__(self, analysis: Analysis) -> None:
        """Walks the program once."""
        self.analysis = analysis
        self._nodes: list[fx.Node] = list(analysis.program.graph.nodes)
        self._order = {node: i for i, node in enumerate(self._nodes)}
        self._readers: dict[str, list[fx.Node]] = {}
        self._flowing: set[fx.Node] = set()  # what depends on an input
        for node in self._nodes:
            if node.op == "get_attr":
                self._readers[str(node.target)] = list(node.users)
            elif node.op == "placeholder" or any(n in self._flowing for n in node.all_input_nodes):
                self._flowing.add(node)
        self._distinct = Distinct(analysis.table)
        self._layouts: list[Layout] = []
        self._nonlinear = {n for n in self._flowing if is_operator(n.target) and name(n) in NONLINEAR}

    def of(self, group: Group) -> list[fx.Node]:
        """Returns the nodes whose tensors show a group's channels; nothing where the recorded pass does not compute them.

        The channels of a group have one footprint, so that a tensor carries all of them or none.
        """
        found = (self._behind(parameter, group) for parameter in dict.fromkeys(s.parameter for s in group.producers))
        return list(dict.fromkeys(node for node in found if node is not None))

    def carrier(self, node: fx.Node, group: Group) -> tuple[int, Layout]:
        """Returns the first dimension of the output of one of a group's nodes on which the channels sit, with its positions by cause."""
        value: Value = self.analysis.values[node]
        layouts = ((d, self._layout(labels)) for d, labels in enumerate(value.labels) if isinstance(labels, np.ndarray))
        return next((d, layout) for d, layout in layouts if _owns(layout, group))

    def _layout(self, labels: Ids) -> Layout:
        number = self._distinct.number(labels)
        if number == len(self._layouts):
            self._layouts.append(Layout.of(labels, self.analysis.table))
        return self._layouts[number]

    def _carries(self, node: fx.Node, group: Group) -> bool:
        values = self.analysis.values.get(node)
        parts = values if isinstance(values, list) else [values]
        labels = (each for value in parts if isinstance(value, Value) for each in value.labels)
        return any(isinstance(each, np.ndarray) and _owns(self._layout(each), group) for each in labels)

    def _behind(self, parameter: str, group: Group) -> fx.Node | None:
        """Returns where the channels that one parameter computes are to be looked at."""
        walk = self._walk(parameter, group)
        first = next((n for n in walk if n in self._nonlinear), None)
        if first is not None:
            return self._product(first, walk)
        readers = self._readers.get(parameter, ())
        weights = (w for w in dict.fromkeys(user for n in walk for user in n.users) if w not in readers and self._multiplies(w))
        end = min((self._order[w] for w in weights), default=len(self._nodes))
        before = [n for n in walk if self._order[n] < end and self._shown(n)]
        return before[-1] if before else None

    def _walk(self, parameter: str, group: Group) -> dict[fx.Node, None]:
        """Returns the nodes, in order, that are computed from a parameter and an input along a group's channels."""
        heap = [(self._order[n], n) for n in self._readers.get(parameter, ())]
        heapq.heapify(heap)
        met = {n for _, n in heap}
        walk: dict[fx.Node, None] = {}
        while heap:
            _, node = heapq.heappop(heap)
            if self._carries(node, group):
                walk[node] = None
                fresh = [n for n in node.users if n not in met]
                met.update(fresh)
                for user in fresh:
                    heapq.heappush(heap, (self._order[user], user))
        return {n: None for n in walk if n in self._flowing}

    def _product(self, node: fx.Node, walk: dict[fx.Node, None]) -> fx.Node:
        """Returns the product of a nonlinearity, shifted and scaled, with something that it is computed from; else the nonlinearity."""
        at = node
        while len(at.users) == 1:
            at = next(iter(at.users))
            if at not in walk or not is_operator(at.target):
                return node
            others = [n for n in at.all_input_nodes if n in walk and self._order[n] < self._order[node]]
            if name(at) == "aten::mul" and others:
                return at
            if others or (name(at) not in _SCALING and at not in self._nonlinear):
                return node
        return node

    def _multiplies(self, node: fx.Node) -> bool:
        """Returns whether an operator computes channels by a weight."""
        notes = self.analysis.notes.get(node)
        return notes is not None and bool(notes.produces or notes.derived)

    def _shown(self, node: fx.Node) -> bool:
        """Returns whether a node is one floating-point tensor."""
        return isinstance(self.analysis.values.get(node), Value) and bool(info(node).is_floating)


def _owns(layout: Layout, group: Group) -> bool:
    cause = group.causes[0]
    at = int(np.searchsorted(layout.owners, cause))
    return at < layout.owners.size and bool(layout.owners[at] == cause)
