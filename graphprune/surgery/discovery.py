"""Which attributes of the user's modules feed the sizes that must change, found rather than guessed.

The forward pass is recorded once more with every integer attribute replaced by an integer that remembers where it came from and passes
that through arithmetic. Sizes that still carry an origin when they arrive at `view`, `split` ... say what their attribute must become.
What is set here is only ever a proposal: the shrunk module is compared with the masked model afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from graphprune.errors import GraphPruneError
from graphprune.tracing import record

if TYPE_CHECKING:
    from graphprune.inputs import Inputs
    from graphprune.surgery.rewriting import Removal

Place: TypeAlias = tuple[str, str, "int | None"]
"""Module path, attribute name (`config.num_heads` for one of a configuration object), position within it where it is a tuple or list."""


@dataclass(frozen=True)
class Origin:
    """Where an integer came from: an attribute, or arithmetic on two integers of which one is tracked.

    Attributes:
        place: the attribute, or None for arithmetic.
        function: the arithmetic.
        left: first operand.
        right: second operand.
    """

    place: Place | None = None
    function: Callable[[int, int], int] | None = None
    left: int = 0
    right: int = 0

    def places(self) -> set[Place]:
        """Returns all attributes that take part."""
        if self.place is not None:
            return {self.place}
        return set().union(*(o.origin.places() for o in (self.left, self.right) if isinstance(o, Tracked)))

    def value(self, known: dict[Place, int], old: int) -> int:
        """Returns the integer that these attribute values give (`old` where the attribute is unknown)."""
        if self.place is not None:
            return known.get(self.place, old)
        a, b = (o.origin.value(known, int(o)) if isinstance(o, Tracked) else o for o in (self.left, self.right))
        return self.function(a, b) if self.function is not None and not (self.function is operator.floordiv and b == 0) else old


class Tracked(int):
    """An integer that remembers its origin through addition, subtraction, multiplication and floor division."""

    origin: Origin

    @classmethod
    def of(cls, value: int, origin: Origin) -> Tracked:
        """Returns the integer with its origin."""
        made = cls(value)
        made.origin = origin
        return made

    def _with(self, function: Callable[[int, int], int], left: Any, right: Any) -> Any:
        if not isinstance(left, int) or not isinstance(right, int):
            return NotImplemented
        return Tracked.of(function(int(left), int(right)), Origin(None, function, left, right))

    def __add__(self, other: Any) -> Any:
        return self._with(operator.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return self._with(operator.add, other, self)

    def __sub__(self, other: Any) -> Any:
        return self._with(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return self._with(operator.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        return self._with(operator.mul, self, other)

    def __rmul__(self, other: Any) -> Any:
        return self._with(operator.mul, other, self)

    def __floordiv__(self, other: Any) -> Any:
        return self._with(operator.floordiv, self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._with(operator.floordiv, other, self)

    def __reduce__(self) -> Any:
        return int, (int(self),)


def discover(model: nn.Module, removal: Removal) -> dict[Place, int]:
    """Returns the attributes that must change, and what they must become, as far as recording tells."""
    calls = _tracked_calls(model, removal.analysis.program.inputs)
    nodes = [n for n in removal.analysis.program.graph.nodes if n in removal.analysis.notes]
    if len(calls) != len(nodes):
        return {}
    wanted: list[tuple[Tracked, int]] = []
    for node, integers in zip(nodes, calls, strict=True):
        if integers:
            wanted += _wanted(node, integers, removal)
    return _solve(wanted)


def _wanted(node: Any, integers: list[int], removal: Removal) -> Iterator[tuple[Tracked, int]]:
    """Yields tracked integers of a call together with what they must become, those that count no channels with what they are."""
    counted: set[int] = set()
    for path, labels in removal.analysis.notes[node].extents.items():
        found = _at(integers, path, int(labels.size))
        if found is not None:
            counted.add(id(found))
            yield found, removal.count(labels)
    for integer in integers:
        if isinstance(integer, Tracked) and id(integer) not in counted:
            yield integer, int(integer)


def _at(integers: list[int], path: tuple[Any, ...], size: int) -> Tracked | None:
    """Returns the tracked integer at a path of a call: by position in the list of sizes, else by value."""
    if len(path) > 1 and path[1] < len(integers):
        found = integers[path[1]]
        if isinstance(found, Tracked) and int(found) == size:
            return found
    return next((i for i in integers if isinstance(i, Tracked) and int(i) == size), None)


def _solve(wanted: list[tuple[Tracked, int]]) -> dict[Place, int]:
    """Finds attribute values that give the wanted sizes.

    Attributes that are used as they are come first, those that must change before those that must not; then arithmetic with one unknown.
    """
    known: dict[Place, int] = {}
    for integer, new in sorted(wanted, key=lambda item: int(item[0]) == item[1]):
        if integer.origin.place is not None:
            known.setdefault(integer.origin.place, new)
    for integer, new in wanted:
        unknown = [p for p in integer.origin.places() if p not in known]
        if integer.origin.place is None and len(unknown) == 1:
            old = _old_value(integer, unknown[0])
            for candidate in range(old, 0, -1):
                if integer.origin.value({**known, unknown[0]: candidate}, int(integer)) == new:
                    known[unknown[0]] = candidate
                    break
    return known


def _old_value(integer: Tracked, place: Place) -> int:
    if integer.origin.place == place:
        return int(integer)
    for operand in (integer.origin.left, integer.origin.right):
        if isinstance(operand, Tracked) and place in operand.origin.places():
            return _old_value(operand, place)
    return 0


def apply(small: nn.Module, values: dict[Place, int]) -> None:
    """Sets attributes of a shrunk module to what was found."""
    modules = dict(small.named_modules())
    for (path, name, position), value in values.items():
        owner: Any = modules[path]
        holder, _, last = name.rpartition(".")
        attributes = vars(getattr(owner, holder)) if holder else vars(owner)
        current = attributes[last]
        made = value if position is None else type(current)([*current[:position], value, *current[position + 1 :]])
        attributes[last] = made


# -- recording with tracked integers -----------------------------------------------------------------------------------------------


class _Watch(TorchFunctionMode):
    """Knows the integers that the torch function now running was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.integers: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, self.integers = self.integers, list(_integers((args, kwargs or {})))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.integers = before


def _integers(value: Any) -> Iterator[int]:
    """Yields the integers among arguments, in order."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple, dict, slice)):
        parts = (value.start, value.stop, value.step) if isinstance(value, slice) else value.values() if isinstance(value, dict) else value
        for item in parts:
            yield from _integers(item)


def _tracked_calls(model: nn.Module, inputs: Inputs) -> list[list[int]]:
    """Returns, per recorded operator, the integers of the Python call that ran it (empty lists where none is tracked)."""
    watch = _Watch()
    calls: list[list[int]] = []

    def note() -> None:
        calls.append(watch.integers if any(isinstance(i, Tracked) for i in watch.integers) else [])

    try:
        with _tracked_attributes(model), _open_functions(), watch:
            record(model, inputs, on_call=note)
    except GraphPruneError:
        return []
    return calls


@contextmanager
def _tracked_attributes(model: nn.Module) -> Iterator[None]:
    """Replaces integer attributes (and tuples and lists of them) by tracked ones inside the block."""
    saved: list[tuple[dict[str, Any], str, Any]] = []
    seen: set[int] = set()
    try:
        for path, module in model.named_modules():
            for owner, attributes in [("", vars(module)), *_plain_objects(module)]:
                if id(attributes) in seen:
                    continue
                seen.add(id(attributes))
                for name, value in list(attributes.items()):
                    tracked = _tracked(value, path, f"{owner}{name}")
                    if tracked is not None:
                        saved.append((attributes, name, value))
                        attributes[name] = tracked
        yield
    finally:
        for attributes, name, value in saved:
            attributes[name] = value


def _plain_objects(module: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the attributes of configuration objects that a module holds: plain Python objects, no modules, tensors or classes."""
    for name, value in list(vars(module).items()):
        plain = not isinstance(value, (nn.Module, torch.Tensor, type, dict)) and not callable(value)
        if plain and type(getattr(value, "__dict__", None)) is dict and not type(value).__module__.startswith("torch"):
            yield f"{name}.", vars(value)


def _tracked(value: Any, path: str, name: str) -> Any:
    if type(value) is int and value > 0:
        return Tracked.of(value, Origin((path, name, None)))
    if type(value) in (list, tuple) and value and all(type(v) is int for v in value):
        return type(value)(Tracked.of(v, Origin((path, name, i))) for i, v in enumerate(value))
    return None


@contextmanager
def _open_functions() -> Iterator[None]:
    """Lets functions that PyTorch writes in Python run with the watch on, so that it sees the operators inside them.

    They would otherwise hand themselves over to the watch as a whole, `multi_head_attention_forward` for one.
    """
    functional: Any = torch.nn.functional
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    saved = {name: getattr(functional, name) for name in names if hasattr(functional, name)}
    try:
        for name in saved:
            setattr(functional, name, lambda *_: False)
        yield
    finally:
        for name, function in saved.items():
            setattr(functional, name, function)
