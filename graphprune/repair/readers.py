"""Which layers read channels that go, and which of their weights can be fitted anew.

A layer is a weight with all the calls that multiply by it. What can be fitted is the weight of a linear layer, of a convolution (plain,
grouped or transposed) and of a matrix product, where the parameter itself is the factor; everything else is named with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from graphprune.criteria.statistics.following import name, named
from graphprune.groups.propagate import operators
from graphprune.ops.registry import named_arguments
from graphprune.repair.report import LeftAlone
from graphprune.torch_private import is_operator
from graphprune.trace.program import info

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx

    from graphprune.groups.graph import DependencyGraph
    from graphprune.masks.channels import Masks
    from graphprune.ops.labels import Ids

Kind: TypeAlias = Literal["linear", "convolution", "transposed"]
Positions: TypeAlias = "Mapping[str, Mapping[int, Ids]]"  # parameter -> dim -> positions that are kept, where any go

WIDEST = 8192
"""Features of one output, at most: the normal equations are a matrix of that size in double precision, half a gigabyte."""

_CONVOLUTIONS = frozenset(f"aten::{n}" for n in ("conv1d", "conv2d", "conv3d", "convolution", "_convolution"))
_TRANSPOSED = frozenset(f"aten::conv_transpose{d}d" for d in (1, 2, 3))
_MATRICES = {"aten::mm": ("self", "mat2"), "aten::matmul": ("self", "other"), "aten::addmm": ("mat1", "mat2")}
_FITTED = _CONVOLUTIONS | _TRANSPOSED | frozenset(_MATRICES) | {"aten::linear"}
_MULTIPLYING = _FITTED | frozenset(
    f"aten::{n}" for n in ("bmm", "baddbmm", "mv", "dot", "einsum", "bilinear", "conv_tbc", "lstm", "gru", "rnn_tanh", "rnn_relu",
                           "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "_cdist_forward", "_euclidean_dist")
)  # fmt: skip
"""Operators that sum over channels with a weight each."""


@dataclass(frozen=True, eq=False)
class Call:
    """One recorded call of a layer.

    Attributes:
        node: the operator.
        source: the node that made its input.
        kind: "linear" (linear layers and matrix products), "convolution" or "transposed".
        input: argument name of the input.
        outputs_first: whether dimension 0 of the weight is that of the outputs, and not that of the inputs.
        groups: conv groups.
        bias: node of the bias, or None.
    """

    node: fx.Node
    source: fx.Node
    kind: Kind
    input: str
    outputs_first: bool
    groups: int
    bias: fx.Node | None


@dataclass(frozen=True, eq=False)
class Block:
    """The weights between the channels that one conv group (or a whole layer) reads and computes; channels that are left only.

    Attributes:
        columns: channels of the input.
        rows: channels of the output.
        first: positions along dimension 0 of the weight.
        second: positions along dimension 1 of the weight.
    """

    columns: Ids
    rows: Ids
    first: Ids
    second: Ids


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads channels that go, and can be fitted.

    Attributes:
        parameter: its weight.
        layer: what the report calls it.
        calls: in the order of execution.
        blocks: per conv group, what is left of the weight.
        kernel: sizes of the kernel; empty for matrices.
        bias: the bias, where it can be fitted with the weight, or None.
    """

    parameter: str
    layer: str
    calls: tuple[Call, ...]
    blocks: tuple[Block, ...]
    kernel: tuple[int, ...]
    bias: str | None

    @property
    def features(self) -> int:
        """How many numbers of the fit belong to one output."""
        return max(b.columns.size for b in self.blocks) * prod(self.kernel) + (self.bias is not None)


def readers(graph: DependencyGraph, masks: Masks) -> tuple[list[Reader], list[LeftAlone]]:
    """Returns the layers that read channels that go, in the order of their first calls: those that can be fitted, and the others."""
    program = graph.engine.program
    positions = masks.positions()
    order = {node: i for i, node in enumerate(operators(program))}
    flowing = _flowing(program.graph)
    found: list[tuple[int, Reader | LeftAlone]] = []
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target) in positions and len(info(node).shapes[0]) > 1:
            uses = sorted(_uses(node, flowing), key=lambda pair: order[pair[1]])
            made = _reader(node, uses, graph, positions) if any(name(user) in _MULTIPLYING for _, user in uses) else None
            if made is not None:
                found.append((min(order[user] for _, user in uses), made))
    found.sort(key=lambda pair: pair[0])
    return [r for _, r in found if isinstance(r, Reader)], [r for _, r in found if isinstance(r, LeftAlone)]


def _flowing(graph: fx.Graph) -> set[fx.Node]:
    """Returns the nodes that depend on an input."""
    out: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in out for n in node.all_input_nodes):
            out.add(node)
    return out


def _uses(node: fx.Node, flowing: set[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yields the operators at which a parameter meets the model's inputs, each after what it gets: the parameter, or what comes of it."""
    todo, met = [node], {node}
    while todo:
        current = todo.pop(0)
        for user in current.users:
            if user in flowing and is_operator(user.target):
                yield current, user
            elif user not in flowing and user not in met:
                met.add(user)
                todo.append(user)


def _reader(node: fx.Node, uses: list[tuple[fx.Node, fx.Node]], graph: DependencyGraph, positions: Positions) -> Reader | LeftAlone | None:
    """Returns a layer, or why it cannot be fitted, or None where it reads nothing that goes."""
    parameter = str(node.target)
    shape = graph.shapes[parameter]
    parsed = [_call(node, given, user) for given, user in uses]
    calls = [c for c in parsed if isinstance(c, Call)]
    cut = [_blocks(shape, positions[parameter], c) for c in calls]
    made = {s.dim for g in graph.groups for s in g.slices if s.parameter == parameter and s.produces}
    if not any(loses for _, loses in cut) and (len(calls) == len(parsed) or all(dim in made for dim in positions[parameter])):
        return None
    reasons = [c for c in parsed if isinstance(c, str)]
    if len({(c.kind, c.outputs_first, c.groups) for c in calls}) > 1:
        reasons.append("is called in several ways that read its weight differently")
    if not info(node).is_floating:
        reasons.append(f"has a weight of type {str(info(node).dtype).removeprefix('torch.')}")
    layer = parameter.rpartition(".")[0] or parameter
    if reasons:
        return LeftAlone(layer, reasons[0])
    made_of = tuple(cut[0][0])
    reader = Reader(parameter, layer, tuple(calls), made_of, tuple(shape[2:]), _bias(calls, shape, graph))
    if reader.features > WIDEST:
        return LeftAlone(layer, f"has {reader.features:,} features per output, more than {WIDEST:,}")
    return reader


def _blocks(shape: tuple[int, ...], positions: Mapping[int, Ids], call: Call) -> tuple[list[Block], bool]:
    """Returns the blocks of which something is left, and whether any of them has lost inputs."""
    kept = [positions.get(d, np.arange(shape[d])) for d in (0, 1)]
    per = shape[0] // call.groups
    blocks = []
    loses = False
    for g in range(call.groups):
        first = kept[0][(kept[0] >= g * per) & (kept[0] < (g + 1) * per)]
        second = g * shape[1] + kept[1]
        columns, rows = (second, first) if call.outputs_first else (first, second)
        if columns.size and rows.size:
            blocks.append(Block(columns, rows, first, kept[1]))
            loses |= columns.size < (shape[1] if call.outputs_first else per)
    return blocks, loses


def _call(parameter: fx.Node, given: fx.Node, user: fx.Node) -> Call | str:
    """Returns a call of a layer, or why it cannot be fitted."""
    operator = name(user)
    if operator not in _FITTED:
        return f"is read by {named(user)}, which is not fitted" if operator in _MULTIPLYING else f"is read by {named(user)} as well"
    target: Any = user.target
    arguments = named_arguments(target, user.args, user.kwargs)
    source, weight = _MATRICES.get(operator, ("input", "weight"))
    straight = given is parameter
    if not straight and not (operator in _MATRICES and _is_turned(given, parameter)):
        return f"gives {named(user)} a weight that is computed from its parameters, by {named(given)}"
    if arguments.get(weight) is not given or arguments.get(source) is given or len(info(parameter).shapes[0]) < 2:
        return f"has its weight as the first factor of {named(user)}"
    if arguments.get("alpha", 1) != 1 or arguments.get("beta", 1) != 1:
        return f"is scaled in {named(user)}"
    bias = arguments.get("self" if operator == "aten::addmm" else "bias")
    if operator in _MATRICES or operator == "aten::linear":
        return Call(user, arguments[source], "linear", source, operator == "aten::linear" or not straight, 1, bias)
    transposed = operator in _TRANSPOSED or bool(arguments.get("transposed"))
    kind: Kind = "transposed" if transposed else "convolution"
    return Call(user, arguments[source], kind, source, not transposed, int(arguments.get("groups", 1)), bias)


def _is_turned(given: fx.Node, parameter: fx.Node) -> bool:
    """Returns whether a tensor is the transpose of a matrix that is a parameter."""
    if given.all_input_nodes != [parameter] or len(info(parameter).shapes[0]) != 2:
        return False
    operator, arguments = name(given), list(given.args[1:])
    turns = operator == "aten::transpose" and arguments in ([0, 1], [1, 0], [-1, -2], [-2, -1])
    return turns or operator in {"aten::t", "aten::numpy_T", "aten::mT"} or (operator == "aten::permute" and arguments == [[1, 0]])


def _bias(calls: list[Call], shape: tuple[int, ...], graph: DependencyGraph) -> str | None:
    """Returns the bias of a layer, if it is a parameter that nothing else reads."""
    first = calls[0]
    bias = first.bias
    if bias is None or bias.op != "get_attr" or any(c.bias is not bias for c in calls) or set(bias.users) != {c.node for c in calls}:
        return None
    outputs = shape[0] if first.outputs_first else shape[1] * first.groups
    target = str(bias.target)
    return target if graph.shapes.get(target) == (outputs,) and info(bias).is_floating else None
