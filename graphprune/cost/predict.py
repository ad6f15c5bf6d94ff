"""What a model will cost once channels are gone, from its recording alone: parameters and MACs exactly as `count` finds them afterwards.

Every multiplying operator's MACs are a product of dimensions of its tensors; what survives of a dimension is known from its labels. So
the cost of any masks takes milliseconds, and a search for a budget need not shrink anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch.utils.flop_counter import flop_registry

from graphprune.cost.count import Cost, count
from graphprune.ops.registry import Value, named_arguments
from graphprune.torch_private import is_composite, is_operator, name_of
from graphprune.trace.members import Members
from graphprune.trace.program import info
from graphprune.trace.threads import generators_kept
from graphprune.trace.turns import turn

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import fx, nn

    from graphprune.groups.graph import DependencyGraph
    from graphprune.ops.labels import Ids
    from graphprune.torch_private import OpOverload
    from graphprune.trace.program import Program

_MULTIPLIES = re.compile(
    r"mm|dot|matmul|einsum|bilinear|linear|conv|attention|lstm|gru|rnn|inner|cdist|cov|corrcoef|matrix|linalg|pinverse"
)
_RESIZES = re.compile(r"aten::(upsample|_upsample|grid_sample)")  # "bilinear" there is a way to interpolate

Dims: TypeAlias = "list[tuple[Value, int]]"
Formula: TypeAlias = "Callable[[dict[str, Any], Value], list[Dims]]"


@dataclass(frozen=True)
class _Product:
    """A number that is a product of dimensions: elements of a parameter, or MACs of an operator.

    Attributes:
        layer: qualified name of the module that it belongs to.
        fixed: the product of the dimensions without labels.
        arrays: numbers of the label arrays whose surviving lengths are multiplied with it.
    """

    layer: str
    fixed: int
    arrays: tuple[int, ...]

    def value(self, lengths: list[int]) -> int:
        """Returns the product at given lengths."""
        return self.fixed * math.prod(lengths[a] for a in self.arrays)


class Forecast:
    """Predicts parameters and MACs of a model whose channels are partly gone.

    Args:
        model: the model of the graph; it is run once when a total is asked for and the recording holds what no formula covers.
        graph: its groups.
    """

    def __init__(self, model: nn.Module, graph: DependencyGraph) -> None:
        self.model = model
        self.graph = graph
        self._table = graph.engine.table
        self._arrays: list[tuple[int, Ids, Ids]] = []  # of each label array its length, and every (position, cause)
        self._numbers: dict[int, int] = {}
        weights = {n: p for n, p in Members.of(model).parameters if n not in graph.aliases}
        self._sizes = [self._product(n.rpartition(".")[0], _every(v)) for n, v in graph.engine.parameters.items() if n in weights]
        self._unread = [_Product(n.rpartition(".")[0], v.numel(), ()) for n, v in weights.items() if n not in graph.engine.parameters]
        self._works = [self._product(layer, dims) for layer, dims in _multiplications(graph)]

    @cached_property
    def dense(self) -> Cost:
        """The cost of the whole model."""
        macs = macs_of(self.graph.engine.program)
        if macs is not None:
            return Cost(sum(parameter.numel() for parameter in self.model.parameters()), macs)
        with turn(self.model), generators_kept():  # whoever asks for costs first must not decide about anybody's random numbers
            return count(self.model, self.graph.engine.program.inputs)

    @cached_property
    def _rest(self) -> Cost:
        """What no formula covers: parameters that the forward pass does not read, and operators of other kinds."""
        nothing = self._lengths({})
        return self.dense - Cost(_sum(self._sizes, nothing), _sum(self._works, nothing))

    def cost(self, kept: Mapping[str, NDArray[np.bool_]]) -> Cost:
        """Returns the cost of the model once the channels that masks do not keep are gone.

        Args:
            kept: group name -> boolean array of shape (channels,), True = kept; groups left out are whole.
        """
        lengths = self._lengths(kept)
        return self._rest + Cost(_sum(self._sizes, lengths), _sum(self._works, lengths))

    def by_layer(self, kept: Mapping[str, NDArray[np.bool_]]) -> dict[str, Cost]:
        """Returns layer -> its cost once the channels that masks do not keep are gone, as `count_by_module` finds it."""
        lengths = self._lengths(kept)
        out: dict[str, Cost] = {}
        for product in (*self._sizes, *self._unread):
            out[product.layer] = out.get(product.layer, Cost(0, 0)) + Cost(product.value(lengths), 0)
        for product in self._works:
            out[product.layer] = out.get(product.layer, Cost(0, 0)) + Cost(0, product.value(lengths))
        return out

    def _product(self, layer: str, dims: Dims) -> _Product:
        fixed, arrays = 1, []
        for value, d in dims:
            labels = value.labels[d]
            if isinstance(labels, np.ndarray):
                arrays.append(self._number(labels))
            else:
                fixed *= value.shape[d]
        return _Product(layer, fixed, tuple(arrays))

    def _number(self, labels: Ids) -> int:
        if id(labels) not in self._numbers:
            self._numbers[id(labels)] = len(self._arrays)
            self._arrays.append((labels.size, *self._table.expand(labels)))
        return self._numbers[id(labels)]

    def _lengths(self, kept: Mapping[str, NDArray[np.bool_]]) -> list[int]:
        """Returns of each label array how many of its positions survive."""
        gone = np.zeros(self._table.size, dtype=bool)
        for name, mask in kept.items():
            gone[self.graph[name].causes[~mask]] = True
        return [size - np.unique(positions[gone[causes]]).size for size, positions, causes in self._arrays]


def _sum(products: Iterable[_Product], lengths: list[int]) -> int:
    return sum(p.value(lengths) for p in products)


# -- what operators multiply ---------------------------------------------------------------------------------------------------------


def macs_of(program: Program) -> int | None:
    """Returns the MACs of a recorded forward pass, from its shapes; None where it holds an operator that no formula covers.

    They are those that `count` finds: the formulas are those of `torch.utils.flop_counter`, for operators that were recorded whole.
    """
    total = 0
    for node in program.graph.nodes:
        if not is_operator(node.target):
            continue
        formula = FORMULAS.get(name_of(node.target))
        if formula is None and not may_multiply(node.target):
            continue
        arguments = named_arguments(node.target, node.args, node.kwargs)
        if formula is None or not _covers(node.target, arguments):
            return None
        dims = formula({name: _shaped(a) for name, a in arguments.items()}, _shaped(node))
        total += sum(math.prod(value.shape[d] for value, d in product) for product in dims)
    return total


class MacCounter:
    """Counts the MACs of operators as they run, by the same formulas.

    Attributes:
        macs: of the operators until now; None once one was met that no formula covers.
    """

    def __init__(self) -> None:
        """Starts with nothing."""
        self.macs: int | None = 0

    def __call__(self, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Counts an operator, given its arguments and its result."""
        formula = FORMULAS.get(name_of(target))
        if self.macs is None or (formula is None and not may_multiply(target)):
            return
        arguments = named_arguments(target, args, kwargs)
        if formula is None or not _covers(target, arguments):
            self.macs = None
            return
        dims = formula(arguments, result[0] if isinstance(result, (list, tuple)) else result)
        self.macs += sum(math.prod(tensor.shape[d] for tensor, d in product) for product in dims)


def _shaped(argument: Any) -> Any:
    """Returns an argument with tensors in place of nodes that have a shape and no labels; of several, the first."""
    if isinstance(argument, (list, tuple)):
        return [_shaped(a) for a in argument]
    if hasattr(argument, "all_input_nodes"):
        shapes = info(argument).shapes
        return Value(shapes[0], [None] * len(shapes[0]), "") if shapes else None
    return argument


def _covers(target: OpOverload, arguments: dict[str, Any]) -> bool:
    """Returns whether the formula of an operator holds for a call of it: that of `einsum` is one for two operands."""
    return name_of(target) != "aten::einsum" or len(arguments["tensors"]) < 3


@cache
def may_multiply(target: OpOverload) -> bool:
    """Returns whether `count` may find multiplications in an operator: it has a formula itself, or PyTorch takes it apart into others.

    Of ATen's, those that are taken apart are told by their names: which ones multiply matrices does not change from call to call.
    """
    name = name_of(target)
    if name in FORMULAS or target.overloadpacket in flop_registry:
        return True
    if not is_composite(target):
        return False
    if torch.Tag.pointwise in target.tags or _RESIZES.match(name):
        return False
    return not name.startswith("aten::") or bool(_MULTIPLIES.search(name))


def _multiplications(graph: DependencyGraph) -> list[tuple[str, Dims]]:
    """Returns for every multiplying operator of the recording its layer and the dimensions whose product is its MACs."""
    values = graph.engine.values
    out = []
    for node in graph.engine.program.graph.nodes:
        formula = FORMULAS.get(name_of(node.target)) if is_operator(node.target) else None
        if formula is not None:
            result = values.get(node)
            arguments = {name: _value(a, values) for name, a in named_arguments(node.target, node.args, node.kwargs).items()}
            first = result[0] if isinstance(result, list) else result
            out += [(info(node).module, dims) for dims in formula(arguments, first)]
    return out


def _value(argument: Any, values: Mapping[fx.Node, Any]) -> Any:
    if isinstance(argument, (list, tuple)):
        return [_value(a, values) for a in argument]
    return values.get(argument) if hasattr(argument, "all_input_nodes") else argument


def _every(value: Value) -> Dims:
    return [(value, d) for d in range(len(value.shape))]


def _linear(arguments: dict[str, Any], out: Value) -> list[Dims]:
    weight = arguments["weight"]
    return [[*_every(out), (weight, len(weight.shape) - 1)]]


def _product(first: str, second: str) -> Formula:
    """Returns the formula of a matrix product; products with vectors are not counted, as in `torch.utils.flop_counter`."""

    def formula(arguments: dict[str, Any], out: Value) -> list[Dims]:
        a, b = arguments[first], arguments[second]
        return [[*_every(out), (a, len(a.shape) - 1)]] if min(len(a.shape), len(b.shape)) > 1 else []

    return formula


def _convolution(arguments: dict[str, Any], out: Value) -> list[Dims]:
    weight = arguments["weight"]
    sums = [(weight, d) for d in range(1, len(weight.shape))]
    return [[*_every(arguments["input"] if arguments.get("transposed") else out), *sums]]


def _transposed(arguments: dict[str, Any], _out: Value) -> list[Dims]:
    return _convolution({**arguments, "transposed": True}, _out)


def _attention(arguments: dict[str, Any], _out: Value) -> list[Dims]:
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    scores = [*_every(query)[:-1], (key, len(key.shape) - 2)]
    return [[*scores, (query, len(query.shape) - 1)], [*scores, (value, len(value.shape) - 1)]]


def _recurrent(arguments: dict[str, Any], _out: Value) -> list[Dims]:
    """Every matrix of weights multiplies the state, or what enters, at every time."""
    x = arguments["input"] if arguments.get("input") is not None else arguments["data"]
    return [[*_every(x)[:-1], *_every(weight)] for weight in arguments["params"] if len(weight.shape) == 2]


def _cell(arguments: dict[str, Any], _out: Value) -> list[Dims]:
    """One time step: each matrix of weights multiplies every sample once."""
    batch = _every(arguments["input"])[:-1]
    return [[*batch, *_every(arguments[weight])] for weight in ("w_ih", "w_hh")]


def _einsum(arguments: dict[str, Any], out: Value) -> list[Dims]:
    """Of two operands: every letter counts once; letters of one operand alone that are summed over are summed before."""
    operands, equation = arguments["tensors"], str(arguments["equation"]).replace(" ", "")
    if len(operands) != 2:
        return []
    first, second = (_spelled(letters, len(o.shape)) for letters, o in zip(equation.split("->")[0].split(","), operands, strict=True))
    kept = _output(equation)
    summed = [(operands[0], d) for d, sign in enumerate(first) if sign in second and sign not in kept and sign not in first[:d]]
    return [[*_every(out), *summed]]


def _spelled(letters: str, dims: int) -> str:
    """Returns one sign per dimension of an operand; those that an ellipsis stands for are numbered from the last."""
    covered = dims - len(letters.replace("...", ""))
    return letters.replace("...", "".join(map(str, reversed(range(covered)))))


def _output(equation: str) -> str:
    """Returns the signs of the output: those stated, or else those that occur once and the ellipsis."""
    left, arrow, right = equation.partition("->")
    stated = right if arrow else "".join(letter for letter in left if left.count(letter) == 1) + "..."
    return stated.replace("...", "0123456789")


FORMULAS: dict[str, Formula] = {
    "aten::linear": _linear,
    "aten::matmul": _product("self", "other"),
    "aten::mm": _product("self", "mat2"),
    "aten::bmm": _product("self", "mat2"),
    "aten::addmm": _product("mat1", "mat2"),
    "aten::baddbmm": _product("batch1", "batch2"),
    "aten::einsum": _einsum,
    "aten::convolution": _convolution,
    "aten::_convolution": _convolution,
    **{f"aten::conv{n}d": _convolution for n in (1, 2, 3)},
    **{f"aten::conv_transpose{n}d": _transposed for n in (1, 2, 3)},
    "aten::scaled_dot_product_attention": _attention,
    **{f"aten::{kind}": _recurrent for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    **{f"aten::{kind}_cell": _cell for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
}
