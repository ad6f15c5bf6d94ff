"""Nodes of a recording are nodes like any other."""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphprune.trace.program import append_node

ATEN = torch.ops.aten


def built(*, by_hand: bool) -> fx.Graph:
    """Returns one small graph, its nodes appended by us or created by PyTorch."""
    graph = fx.Graph()
    x = graph.placeholder("x")

    def node(op: str, target: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None) -> fx.Node:
        make = append_node if by_hand else fx.Graph.create_node
        made: fx.Node = make(graph, op, target, args, kwargs)  # type: ignore[arg-type]
        return made

    weight = node("get_attr", "layer.weight")
    rows = node("call_function", ATEN.linear.default, (x, weight))
    halves = node("call_function", ATEN.chunk.default, (rows, 2), {"dim": 1})
    parts = [node("call_function", operator.getitem, (halves, i)) for i in range(2)]
    graph.output(node("call_function", ATEN.cat.default, (parts, 1)))
    return graph


def test_appended_nodes_are_those_that_the_graph_would_create() -> None:
    """Names, users, order, length, look-up by kind and the code are the same; erasing works."""
    mine, theirs = built(by_hand=True), built(by_hand=False)
    assert [(n.op, n.target, n.name, str(n.args), str(n.kwargs), len(n.users)) for n in mine.nodes] == [
        (n.op, n.target, n.name, str(n.args), str(n.kwargs), len(n.users)) for n in theirs.nodes
    ]
    assert len(mine.nodes) == len(theirs.nodes) == 8
    mine.lint()
    assert len(mine.find_nodes(op="call_function", target=operator.getitem)) == 2
    assert mine.python_code("self").src == theirs.python_code("self").src
    unused = append_node(mine, "call_function", ATEN.relu.default, (next(iter(mine.nodes)),))
    mine.erase_node(unused)
    assert len(mine.nodes) == 8


def test_a_node_can_be_put_behind_another() -> None:
    """It stands there, and the graph goes on at its end."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    last = append_node(graph, "call_function", ATEN.relu.default, (x,))
    weight = append_node(graph, "get_attr", "weight", after=x)
    assert list(graph.nodes) == [x, weight, last]
    assert len(graph.nodes) == 3
    assert graph.output(last).prev is last
