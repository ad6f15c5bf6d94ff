"""Equations between sizes: what attributes must be, given what the code computes from them and what that must count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from graphprune.sizes.expressions import Arithmetic, Attribute, Expression, Leaf, Place, evaluate, inverse, leaves, places

Equation: TypeAlias = tuple["Expression | int", "Expression | int"]
"""What the code computes, and what that must be."""


def definitions(equations: Sequence[Equation], size: Callable[[Leaf], int]) -> dict[Place, Expression | int]:
    """Returns what attributes must be for "code == target" to hold, in an order in which each needs only those before it.

    Attributes that are used as they are come first (the first equation that names one decides), then arithmetic with one unknown
    attribute, until nothing more follows. Where several are unknown, one that can make the equation true is taken to change.

    Args:
        equations: those whose attributes must change first.
        size: what a tensor's size is going to be, to try values out with.
    """
    known: dict[Place, Expression | int] = {}
    for code, target in equations:
        if isinstance(code, Attribute):
            known.setdefault(code.place, target)
    waiting = [(code, target) for code, target in equations if isinstance(code, Arithmetic)]
    while waiting := [(code, target) for code, target in waiting if not places(code) <= known.keys()]:
        if not _deduced(waiting, known, size):
            _decide(*waiting[0], known, size)
    return known


def _deduced(
    waiting: Sequence[tuple[Expression, Expression | int]], known: dict[Place, Expression | int], size: Callable[[Leaf], int]
) -> bool:
    """Adds what follows from equations with one unknown attribute, which stays if it can; returns whether anything did."""
    before = len(known)
    for code, target in waiting:
        unknown = [p for p in places(code) if p not in known]
        if len(unknown) == 1:
            old = next(leaf.old for leaf in leaves(code) if isinstance(leaf, Attribute) and leaf.place == unknown[0])
            stays = isinstance(target, int) and _holds(code, target, {**known, unknown[0]: old}, size)
            found = old if stays else inverse(code, unknown[0], target)
            if found is not None:
                known[unknown[0]] = found
    return len(known) > before


def _decide(code: Expression, target: Expression | int, known: dict[Place, Expression | int], size: Callable[[Leaf], int]) -> None:
    """Takes one unknown attribute of an equation to change and leaves the others as they are."""
    loose = {leaf.place: leaf for leaf in leaves(code) if isinstance(leaf, Attribute) and leaf.place not in known}
    stay: dict[Place, Expression | int] = {place: leaf.old for place, leaf in loose.items()}
    if _holds(code, target, {**known, **stay}, size):
        known.update(stay)
        return
    for place in loose:
        found = inverse(code, place, target)
        if found is not None:
            trial = {**known, **{p: v for p, v in stay.items() if p != place}, place: found}
            if _holds(code, target, trial, size):
                known.update({p: v for p, v in trial.items() if p != place})
                known[place] = found
                return
    known.update(stay)


def _holds(code: Expression, target: Expression | int, known: dict[Place, Expression | int], size: Callable[[Leaf], int]) -> bool:
    def value(leaf: Leaf) -> int:
        if isinstance(leaf, Attribute) and leaf.place in known:
            return int(evaluate(known[leaf.place], value))
        return size(leaf)

    return bool(evaluate(code, value) == evaluate(target, value))
