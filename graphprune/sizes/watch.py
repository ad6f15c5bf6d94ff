"""One forward pass with tracked integers: what the model's code computes sizes from, and what they must count.

Every integer that arrives at an operator becomes a *demand*: the expression that the code computed it by, and the labels whose survivors
it must count (none: it must stay what it is). A model of the user's own class can be had exactly where all demands hold.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from graphprune.errors import GraphPruneError
from graphprune.ops.labels import Ids
from graphprune.ops.registry import Value, named_arguments
from graphprune.sizes.attributes import tracked_attributes
from graphprune.sizes.expressions import Arithmetic, Expression, Extent, Tracked, Trail, combined, expression_of
from graphprune.torch_private import name_of
from graphprune.trace.program import info
from graphprune.trace.recorder import node_behind, record
from graphprune.trace.turns import turn

if TYPE_CHECKING:
    from torch import fx, nn

    from graphprune.groups.propagate import Analysis
    from graphprune.ops.registry import Path

_LAST = ("groups", "num_groups", "group")  # the last integer of a call, after strides and paddings of perhaps equal value


@dataclass(frozen=True, eq=False)
class Demand:
    """What an integer of the model's code must become.

    Attributes:
        code: the expression that computes it, or a number written in the code.
        labels: what it counts, or None where it must stay.
        old: what it is.
        module: path of the module that ran it.
        operator: the operator that it arrived at, or "a comparison".
        required: False where the code may do without (a comparison, a number that is only read as a float).
        default: the argument that the code leaves to a default depending on this width, or "".
    """

    code: Expression | int
    labels: Ids | None
    old: int
    module: str
    operator: str
    required: bool = True
    default: str = ""

    def __str__(self) -> str:
        """The demand as a phrase for reports."""
        where = f"`{self.module}`" if self.module else "the model itself"
        if self.default:
            return f"{where} leaves the {self.default} of {self.operator} to a default for {self.old} channels"
        what = f"the number {self.code}" if isinstance(self.code, int) else f"`{self.code}`"
        return f"{where} states {what} at {self.operator}"


def demands(model: nn.Module, analysis: Analysis) -> list[Demand]:
    """Returns what the code of a model asks of its sizes, as far as a forward pass tells; nothing where it cannot be watched."""
    nodes = [n for n in analysis.program.graph.nodes if n in analysis.notes]
    for shapes in (True, False):
        trail = Trail()
        calls = _watched(model, analysis, trail, shapes=shapes)
        if calls is not None and len(calls) == len(nodes):
            break
    else:
        return []
    out = [d for node, integers in zip(nodes, calls, strict=True) for d in _of_call(node, integers, analysis)]
    paths = [info(n).module for n in nodes] or [""]
    for c in trail.comparisons:
        code = Arithmetic(c.function, c.left, c.right, int(c.outcome))
        out.append(Demand(code, None, code.old, paths[min(c.moment, len(paths) - 1)], "a comparison", required=False))
    for expression, moment in trail.floats:
        out.append(
            Demand(expression, None, expression.old, paths[min(moment, len(paths) - 1)], "floating-point arithmetic", required=False)
        )
    return _distinct(out)


def _distinct(found: list[Demand]) -> list[Demand]:
    out: dict[Any, Demand] = {}
    for d in found:
        out.setdefault((_key(d.code), id(d.labels), d.old, d.required), d)
    return list(out.values())


def _key(expression: Expression | int) -> Any:
    if isinstance(expression, Arithmetic):
        return (expression.function, _key(expression.left), _key(expression.right))
    return id(expression.labels) if isinstance(expression, Extent) else expression


# -- demands of one call -----------------------------------------------------------------------------------------------------------


def _of_call(node: fx.Node, integers: list[int], analysis: Analysis) -> Iterator[Demand]:
    """Yields the demands of one recorded operator, given the integers of the Python call that ran it."""
    notes = analysis.notes[node]
    target: Any = node.target
    name = name_of(target).removeprefix("aten::")
    module = info(node).module
    counted: set[int] = set()
    for path, labels in notes.extents.items():
        position = _position(node, integers, path, int(labels.size))
        if position is not None:
            counted.add(position)
            yield Demand(expression_of(integers[position]), labels, int(labels.size), module, name)
    for path, labels in notes.crops.items():
        position = _position(node, integers, path, -int(labels.size))
        if position is not None:
            counted.add(position)
            code = combined(operator.sub, 0, expression_of(integers[position]), int(labels.size))
            yield Demand(code, labels, int(labels.size), module, name)
    for argument, (_, labels) in notes.constants.items():
        yield Demand(int(labels.size), labels, int(labels.size), module, name, default=argument)
    if name.endswith(("split", "chunk")) and notes.extents:
        for positions, demand in _pieces(node, integers, notes.extents, module, name):
            counted |= positions
            yield demand
    for position, integer in enumerate(integers):
        if isinstance(integer, Tracked) and position not in counted:
            yield Demand(integer.origin, None, int(integer), module, name)


def _position(node: fx.Node, integers: list[int], path: Path, size: int) -> int | None:
    """Returns which of a call's integers is the argument at `path`: by its list, else by value, tracked ones first."""
    target: Any = node.target
    whole = named_arguments(target, node.args, node.kwargs).get(str(path[0]))
    if len(path) > 1 and isinstance(whole, (list, tuple)):
        for start in range(len(integers) - len(whole) + 1):
            if all(a == b for a, b in zip((int(i) for i in integers[start : start + len(whole)]), whole, strict=True)):
                return start + int(path[1])
    if whole is None:
        return None
    found = [i for i, v in enumerate(integers) if int(v) == size]
    if path[0] in _LAST:
        found.reverse()
    return next((i for i in found if isinstance(integers[i], Tracked)), found[0] if found else None)


def _pieces(node: fx.Node, integers: list[int], extents: dict[Path, Ids], module: str, name: str) -> Iterator[tuple[set[int], Demand]]:
    """Yields the demands of cuts into pieces of one size: `chunk` makes as many as are asked for, `split` as large as asked for."""
    pieces = list(extents.values())
    source = np.concatenate(pieces)
    dim: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    total, asked = Extent(source, int(source.size), dim), node.args[1] if len(node.args) > 1 else None
    if not isinstance(asked, int) or len(pieces) < 2:
        return
    if name.endswith("chunk"):
        above = combined(operator.add, total, len(pieces) - 1, total.old + len(pieces) - 1)
        code = combined(operator.floordiv, above, len(pieces), int(pieces[0].size))
        for piece in pieces[:-1]:
            yield set(), Demand(code, piece, int(piece.size), module, name)
        return
    position = next((i for i, v in enumerate(integers) if isinstance(v, Tracked) and int(v) == asked), None)
    size = asked if position is None else expression_of(integers[position])
    for piece in pieces[:-1]:
        yield set() if position is None else {position}, Demand(size, piece, int(piece.size), module, name)
    above = combined(operator.add, total, combined(operator.sub, size, 1, asked - 1), total.old + asked - 1)
    yield set(), Demand(combined(operator.floordiv, above, size, len(pieces)), None, len(pieces), module, name)


# -- recording with tracked integers -----------------------------------------------------------------------------------------------


class _Watch(TorchFunctionMode):
    """Knows the integers that the torch function now running was called with, and makes sizes of tensors tracked."""

    def __init__(self, analysis: Analysis, trail: Trail, *, shapes: bool) -> None:
        super().__init__()
        self.integers: list[int] = []
        self.analysis = analysis
        self.trail = trail
        self.nodes = {n.name: n for n in analysis.program.graph.nodes}
        self.names = {id(t): n for n, t in analysis.program.tensors.items()}
        self.shapes = shapes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _SHAPE or func is _SIZE or func is _COUNT:
            found = func(*args, **(kwargs or {}))
            return self._sizes(args[0], found, args, kwargs or {}) if self.shapes else found
        opened = _opened(func)
        if opened is not None:
            with self:
                return opened(*args, **(kwargs or {}))
        before, self.integers = self.integers, list(_integers((args, kwargs or {})))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.integers = before

    def _sizes(self, tensor: torch.Tensor, found: Any, args: Any, kwargs: Any) -> Any:
        """Returns a shape, one of its sizes, or their product, tracked where the tensor has labels."""
        value = self._value(tensor)
        if value is None or tuple(int(s) for s in value.shape) != tuple(tensor.size()):
            return found
        sizes = [self._size(s, labels, d) for d, (s, labels) in enumerate(zip(value.shape, value.labels, strict=True))]
        if not any(isinstance(s, Tracked) for s in sizes):
            return found
        if not isinstance(found, int):
            return torch.Size(sizes)
        if len(args) > 1 or "dim" in kwargs:
            return sizes[int(args[1] if len(args) > 1 else kwargs["dim"])]
        product = 1
        for s in sizes:
            product = product * s
        return product

    def _size(self, size: int, labels: Any, dim: int) -> int:
        if not isinstance(labels, np.ndarray) or not self.analysis.table.roots(labels).any():
            return int(size)
        return Tracked.of(Extent(labels, int(size), dim), self.trail)

    def _value(self, tensor: torch.Tensor) -> Value | None:
        name = self.names.get(id(tensor))
        if name is not None:
            return self.analysis.parameters.get(name)
        node = node_behind(tensor)
        value = self.analysis.values.get(self.nodes.get(node.name)) if node is not None else None  # type: ignore[arg-type]
        return value if isinstance(value, Value) else None


_SHAPE: Any = torch.Tensor.shape.__get__  # type: ignore[attr-defined]
_SIZE: Any = torch.Tensor.size
_COUNT: Any = torch.Tensor.numel


def _integers(value: Any) -> Iterator[int]:
    """Yields the integers among arguments, in order."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple, dict, slice)):
        parts = (value.start, value.stop, value.step) if isinstance(value, slice) else value.values() if isinstance(value, dict) else value
        for item in parts:
            yield from _integers(item)


def _watched(model: nn.Module, analysis: Analysis, trail: Trail, *, shapes: bool) -> list[list[int]] | None:
    """Returns, per recorded operator, the integers of the Python call that ran it; None where the pass fails."""
    watch = _Watch(analysis, trail, shapes=shapes)
    calls: list[list[int]] = []

    def note() -> None:
        calls.append(watch.integers)
        trail.moment = len(calls)

    try:
        with turn(model), tracked_attributes(model, trail), watch:
            record(model, analysis.program.inputs, on_call=note)
    except GraphPruneError:
        return None
    finally:
        trail.open = False
    return calls


_HANDING_OVER = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def _opened(function: Any) -> Callable[..., Any] | None:
    """Returns a twin of a function that PyTorch writes in Python, which runs with the watch on, so that the operators inside are seen.

    The function itself would hand itself over to the watch as a whole, `multi_head_attention_forward` for one. Its twin reads from a copy
    of its module in which nothing is handed over. None for other functions.
    """
    return _twins().get(function) if isinstance(function, FunctionType) else None


@functools.cache
def _twins() -> dict[FunctionType, FunctionType]:
    """Returns function of `torch.nn.functional` -> its twin."""
    functional = vars(torch.nn.functional)
    names = {**functional, **dict.fromkeys(_HANDING_OVER, lambda *_: False)}
    twins: dict[FunctionType, FunctionType] = {}

    def twin(value: Any) -> Any:
        if not isinstance(value, FunctionType) or value.__module__ != torch.nn.functional.__name__:
            return value
        if value not in twins:
            cells = tuple(CellType(twin(cell.cell_contents)) for cell in value.__closure__ or ())
            space = names if value.__globals__ is functional else value.__globals__
            made = twins[value] = FunctionType(value.__code__, space, value.__name__, value.__defaults__, cells)
            made.__kwdefaults__ = value.__kwdefaults__
        return twins[value]

    names.update({name: twin(value) for name, value in names.items()})
    return twins
