"""Integers that remember where they came from, and the expressions that they remember.

Tracked(4) from `attn.num_heads`          Attribute(("attn", ("num_heads",)))
Tracked(96) from `x.shape[-1]`            Extent(labels of that dimension)
x.shape[-1] // self.num_heads             Arithmetic(floordiv, Extent, Attribute)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any, TypeAlias, Union

import numpy as np

from graphprune.ops.labels import Ids

Place: TypeAlias = tuple[str, tuple["str | int", ...]]
"""Module path, then the way from the module to the integer: attribute names, keys and positions."""

Leaf: TypeAlias = Union["Attribute", "Extent"]
Expression: TypeAlias = Union["Attribute", "Extent", "Arithmetic"]
Number: TypeAlias = Any
"""An integer, or an integer array of candidates."""


@dataclass(frozen=True)
class Attribute:
    """An integer that a module holds.

    Attributes:
        place: where.
        old: its value.
    """

    place: Place
    old: int

    def __str__(self) -> str:
        """The attribute as its owner writes it."""
        return "self." + ".".join(str(step) for step in self.place[1])


@dataclass(frozen=True, eq=False)
class Extent:
    """The size of a tensor's dimension, as its shape says it.

    Attributes:
        labels: of that dimension; as many as survive is what the shape will say.
        old: its size.
        dim: of the tensor, for reports.
    """

    labels: Ids
    old: int
    dim: int = 0

    def __str__(self) -> str:
        """The size as Python reads it."""
        return f"shape[{self.dim}]"


@dataclass(frozen=True, eq=False)
class Arithmetic:
    """Arithmetic on two integers of which one is tracked at least.

    Attributes:
        function: of the `operator` module.
        left: first operand.
        right: second operand.
        old: the result.
    """

    function: Callable[[Any, Any], Any]
    left: Expression | int
    right: Expression | int
    old: int

    def __str__(self) -> str:
        """The expression as Python writes it."""
        return f"{_bracketed(self.left)} {_SIGNS[self.function]} {_bracketed(self.right)}"


_SIGNS: dict[Any, str] = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.pow: "**",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}


def _bracketed(operand: Expression | int) -> str:
    return f"({operand})" if isinstance(operand, Arithmetic) else str(operand)


def leaves(expression: Expression | int) -> Iterator[Leaf]:
    """Yields the attributes and sizes that take part."""
    if isinstance(expression, Arithmetic):
        yield from leaves(expression.left)
        yield from leaves(expression.right)
    elif not isinstance(expression, int):
        yield expression


def places(expression: Expression | int) -> set[Place]:
    """Returns the attributes that take part."""
    return {leaf.place for leaf in leaves(expression) if isinstance(leaf, Attribute)}


def evaluate(expression: Expression | int, value: Callable[[Leaf], Number]) -> Number:
    """Returns what an expression gives for values of its leaves (arrays are taken elementwise; dividing by zero gives 0)."""
    if isinstance(expression, int):
        return int(expression)
    if not isinstance(expression, Arithmetic):
        return value(expression)
    left, right = evaluate(expression.left, value), evaluate(expression.right, value)
    if expression.function in (operator.floordiv, operator.mod):
        safe = np.where(np.asarray(right) == 0, 1, right)
        result = np.where(np.asarray(right) == 0, 0, expression.function(left, safe))
        return result if result.ndim else int(result)
    return expression.function(left, right)


def inverse(expression: Expression | int, place: Place, target: Expression | int) -> Expression | int | None:
    """Returns what an attribute must be for the expression to give `target`, or None where it takes part more than once.

    Division need not come out even: whoever uses the inverse checks the equation again.
    """
    while isinstance(expression, Arithmetic):
        on_left, on_right = _mentions(expression.left, place), _mentions(expression.right, place)
        rule = _UNDONE.get((expression.function, bool(on_left)))
        if on_left + on_right != 1 or rule is None:
            return None
        expression, other = (expression.left, expression.right) if on_left else (expression.right, expression.left)
        function, swapped = rule
        target = combined(function, other, target, _old(target)) if swapped else combined(function, target, other, _old(target))
    return target if isinstance(expression, Attribute) and expression.place == place else None


_UNDONE: dict[tuple[Any, bool], tuple[Callable[[Any, Any], Any], bool]] = {
    (operator.add, True): (operator.sub, False),
    (operator.add, False): (operator.sub, False),
    (operator.sub, True): (operator.add, False),
    (operator.sub, False): (operator.sub, True),
    (operator.mul, True): (operator.floordiv, False),
    (operator.mul, False): (operator.floordiv, False),
    (operator.floordiv, True): (operator.mul, False),
    (operator.floordiv, False): (operator.floordiv, True),
}
"""(arithmetic, whether the unknown is its left operand) -> (what undoes it on target and other operand, whether those are swapped)."""


def _mentions(expression: Expression | int, place: Place) -> int:
    return sum(isinstance(leaf, Attribute) and leaf.place == place for leaf in leaves(expression))


def combined(function: Callable[[Any, Any], Any], left: Expression | int, right: Expression | int, old: int = 0) -> Expression | int:
    """Returns the expression of two operands, worked out where both are plain numbers."""
    if isinstance(left, int) and isinstance(right, int):
        return 0 if right == 0 and function in (operator.floordiv, operator.mod) else int(function(left, right))
    return Arithmetic(function, left, right, old)


def _old(value: Expression | int) -> int:
    return value if isinstance(value, int) else value.old


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two integers that the code compared, on the way to a decision that must fall the same way.

    Attributes:
        function: of the `operator` module.
        left: first operand.
        right: second operand.
        outcome: what it gave.
        moment: how many operators had been recorded by then.
    """

    function: Callable[[Any, Any], Any]
    left: Expression | int
    right: Expression | int
    outcome: bool
    moment: int


@dataclass(eq=False)
class Trail:
    """What tracked integers leave behind while it is open; afterwards they are integers like any other.

    Attributes:
        open: whether arithmetic is remembered.
        comparisons: in order.
        floats: (expression, moment): integers that became floating-point numbers, which the masked network keeps as they were.
        moment: how many operators have been recorded.
        thread: whose arithmetic it is.
    """

    open: bool = True
    comparisons: list[Comparison] = field(default_factory=list)
    floats: list[tuple[Expression, int]] = field(default_factory=list)
    moment: int = 0
    thread: int = field(default_factory=get_ident)

    @property
    def listening(self) -> bool:
        """Whether arithmetic that runs now is remembered: not that of other threads that happen upon tracked integers."""
        return self.open and get_ident() == self.thread


class Tracked(int):
    """An integer that remembers its expression through arithmetic."""

    origin: Expression
    trail: Trail

    @classmethod
    def of(cls, origin: Expression, trail: Trail) -> Tracked:
        """Returns the integer that an expression gives now."""
        made = cls(origin.old)
        made.origin = origin
        made.trail = trail
        return made

    def _with(self, function: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
        if not isinstance(left, int) or not isinstance(right, int):
            return self._as_float(function, left, right)
        result = function(int(left), int(right))
        if not self.trail.listening or type(result) is not int:
            return result
        return Tracked.of(Arithmetic(function, expression_of(left), expression_of(right), result), self.trail)

    def _as_float(self, function: Callable[[Any, Any], Any], left: Any, right: Any) -> Any:
        if isinstance(left, float) or isinstance(right, float):
            return function(*(float(v) if isinstance(v, Tracked) else v for v in (left, right)))
        return NotImplemented

    def __add__(self, other: Any) -> Any:
        return self._with(operator.add, self, other)

    def __radd__(self, other: Any) -> Any:
        return self._with(operator.add, other, self)

    def __sub__(self, other: Any) -> Any:
        return self._with(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Any:
        return self._with(operator.sub, other, self)

    def __mul__(self, other: Any) -> Any:
        return self._with(operator.mul, self, other) if isinstance(other, (int, float)) else NotImplemented

    def __rmul__(self, other: Any) -> Any:
        return self._with(operator.mul, other, self) if isinstance(other, (int, float)) else NotImplemented

    def __floordiv__(self, other: Any) -> Any:
        return self._with(operator.floordiv, self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._with(operator.floordiv, other, self)

    def __neg__(self) -> Any:
        return self._with(operator.sub, 0, self)

    def __mod__(self, other: Any) -> Any:
        return self._with(operator.mod, self, other)

    def __rmod__(self, other: Any) -> Any:
        return self._with(operator.mod, other, self)

    def __pow__(self, other: Any, modulus: Any = None) -> Any:
        if modulus is None and isinstance(other, int) and other >= 0:
            return self._with(operator.pow, self, other)
        return float(self) ** other if modulus is None else int.__pow__(self, other, modulus)

    def __truediv__(self, other: Any) -> Any:
        return float(self) / other if isinstance(other, (int, float)) else NotImplemented

    def __rtruediv__(self, other: Any) -> Any:
        return other / float(self) if isinstance(other, (int, float)) else NotImplemented

    def __float__(self) -> float:
        if self.trail.listening:
            self.trail.floats.append((self.origin, self.trail.moment))
        return float(int(self))

    def _compared(self, function: Callable[[Any, Any], Any], other: Any) -> Any:
        if not isinstance(other, int):
            return function(int(self), other) if isinstance(other, float) else NotImplemented
        outcome = function(int(self), int(other))
        if self.trail.listening:
            trail = self.trail
            trail.comparisons.append(Comparison(function, self.origin, expression_of(other), outcome, trail.moment))
        return outcome

    def __eq__(self, other: object) -> Any:
        return self._compared(operator.eq, other)

    def __ne__(self, other: object) -> Any:
        return self._compared(operator.ne, other)

    def __lt__(self, other: Any) -> Any:
        return self._compared(operator.lt, other)

    def __le__(self, other: Any) -> Any:
        return self._compared(operator.le, other)

    def __gt__(self, other: Any) -> Any:
        return self._compared(operator.gt, other)

    def __ge__(self, other: Any) -> Any:
        return self._compared(operator.ge, other)

    __hash__ = int.__hash__

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return int, (int(self),)


def expression_of(integer: int) -> Expression | int:
    """Returns the expression behind an integer, or the plain integer."""
    return integer.origin if isinstance(integer, Tracked) else int(integer)
