"""The integers that modules hold, in attributes, tuples, lists, dicts, partials and configuration objects: tracking and setting them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from graphprune.sizes.expressions import Attribute, Place, Tracked, Trail

_DEEPEST = 4
_CONTAINERS = (list, tuple, dict, torch.Size)

Undo = Callable[[], None]


@contextmanager
def tracked_attributes(model: nn.Module, trail: Trail) -> Iterator[None]:
    """Replaces the integers that modules hold by tracked ones inside the block."""
    undo: list[Undo] = []
    seen: set[int] = set()
    try:
        for path, module in model.named_modules():
            _track_object(vars(module), (path, ()), trail, seen, undo)
            _track_class(module, path, trail, undo)
        yield
    finally:
        for step in reversed(undo):
            step()


def _track_class(module: nn.Module, path: str, trail: Trail, undo: list[Undo]) -> None:
    """Shadows integers of the module's class, and of its bases outside PyTorch, by tracked ones of the module."""
    for kind in type(module).__mro__:
        if kind.__module__.partition(".")[0] in {"torch", "builtins"}:
            continue
        for name, value in vars(kind).items():
            if type(value) is int and value > 0 and not name.startswith("_") and name not in vars(module):
                vars(module)[name] = Tracked.of(Attribute((path, (name,)), value), trail)
                undo.append(functools.partial(vars(module).pop, name))


def _track_object(attributes: dict[Any, Any], place: Place, trail: Trail, seen: set[int], undo: list[Undo]) -> None:
    """Replaces integers among the values of a dict (an object's attributes, or a partial's keywords) by tracked ones."""
    if id(attributes) in seen:
        return
    seen.add(id(attributes))
    path, way = place
    for name, value in list(attributes.items()):
        if not isinstance(name, (str, int)):
            continue
        made = _tracked(value, (path, (*way, name)), trail, seen, undo)
        if made is not value:
            undo.append(functools.partial(attributes.__setitem__, name, value))
            attributes[name] = made


def _tracked(value: Any, place: Place, trail: Trail, seen: set[int], undo: list[Undo]) -> Any:
    """Returns a value with its integers tracked, or the value itself where it has none; plain objects are changed in place."""
    path, way = place
    if type(value) is int:
        return Tracked.of(Attribute(place, value), trail) if value > 0 else value
    if len(way) >= _DEEPEST:
        return value
    if type(value) in _CONTAINERS or (isinstance(value, tuple) and hasattr(value, "_fields")):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        made = {k: _tracked(value[k], (path, (*way, k)), trail, seen, undo) for k in keys if isinstance(k, (str, int))}
        changed = {k: v for k, v in made.items() if v is not value[k]}
        return with_items(value, changed) if changed else value
    inner = _attributes_of(value)
    if inner is not None:
        step = ("keywords",) if isinstance(value, functools.partial) else ()
        _track_object(inner, (path, (*way, *step)), trail, seen, undo)
    return value


def _attributes_of(value: Any) -> dict[str, Any] | None:
    """Returns what a plain object holds: a configuration, a partial; None for modules, tensors, classes and functions."""
    if isinstance(value, functools.partial):
        return value.keywords
    if isinstance(value, (nn.Module, torch.Tensor, type)) or callable(value) or type(value).__module__.startswith("torch"):
        return None
    found = getattr(value, "__dict__", None)
    return found if type(found) is dict else None


def with_items(container: Any, items: dict[Any, Any]) -> Any:
    """Returns a copy of a tuple, list or dict with some items replaced, of the same type."""
    if isinstance(container, dict):
        return {**container, **items}
    replaced = [items.get(i, v) for i, v in enumerate(container)]
    return type(container)(*replaced) if hasattr(container, "_fields") else type(container)(replaced)


def assign(model: nn.Module, values: dict[Place, int]) -> list[Undo]:
    """Sets integers that modules hold; returns what undoes it, last first."""
    undo: list[Undo] = []
    for (path, way), value in values.items():
        _assign(vars(model.get_submodule(path)), way, value, undo)
    return undo[::-1]


def _assign(owner: dict[Any, Any], way: tuple[str | int, ...], value: int, undo: list[Undo]) -> None:
    first, rest = way[0], way[1:]
    current = owner.get(first)
    if rest and type(current) not in _CONTAINERS and not hasattr(current, "_fields"):
        inner = _attributes_of(current)
        if inner is not None:
            _assign(inner, rest[1:] if isinstance(current, functools.partial) else rest, value, undo)
        return
    undo.append(functools.partial(owner.__setitem__, first, current) if first in owner else functools.partial(owner.pop, first))
    owner[first] = _replaced(current, rest, value, undo)


def _replaced(container: Any, way: tuple[str | int, ...], value: int, undo: list[Undo]) -> Any:
    """Returns a container with the integer at the end of the way replaced (plain objects on the way are changed in place)."""
    if not way:
        return value
    if type(container) not in _CONTAINERS and not hasattr(container, "_fields"):
        inner = _attributes_of(container)
        if inner is not None:
            _assign(inner, way[1:] if isinstance(container, functools.partial) else way, value, undo)
        return container
    return with_items(container, {way[0]: _replaced(container[way[0]], way[1:], value, undo)})
