"""The numbers that modules hold, as a recipe writes them down and puts them back.

A number is named by its way from the module: `num_heads` for an attribute, `config.num_heads` for one of a configuration object, a dict
or a `functools.partial` that the module holds.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable

from graphprune.trace.members import Members

_NUMBERS = (bool, int, float)
_PLAIN = frozenset({bool, int, float, str, tuple, list, set, type(None)})  # what holds nothing by name
_SEQUENCES = (tuple, list, torch.Size)
_DEEPEST = 3  # objects within objects within a module
_OWN = frozenset(vars(nn.Module())) - {"training"}  # in which PyTorch keeps tensors, modules and hooks


def numbers_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns module name -> way -> value, for numbers and (nested) sequences of numbers, sequences as lists."""
    return {path: _numbers(module) for path, module in Members.of(model).first_names.items()}


def changed_numbers(before: Mapping[str, Mapping[str, Any]] | nn.Module, model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns module name -> way -> value of what is another number now, or stands in front of a number of the module's class.

    Args:
        before: what `numbers_of` found, or the model that `model` is a changed copy of.
        model: the model as it is now.
    """
    earlier = Members.of(before).first_names if isinstance(before, nn.Module) else before
    found = {}
    for path, module in Members.of(model).first_names.items():
        old = earlier.get(path, {})
        if isinstance(old, nn.Module):
            if _is_simple(vars(module)):
                found[path] = _changed(old, module)
                continue
            old = _numbers(old)
        found[path] = {
            way: value
            for way, value in _numbers(module).items()
            if old.get(way, value) != value or (way not in old and isinstance(getattr(type(module), way, None), int))
        }
    return {path: values for path, values in found.items() if values}


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Returns way -> value for one module."""
    ways = ((prefix, name, value) for prefix, held in _holders(module).items() for name, value in held.items())
    return {f"{p}{n}": _copied(v) for p, n, v in ways if isinstance(n, str) and _is_plain(v) and (p or n not in _OWN)}


def _is_simple(attributes: dict[str, Any]) -> bool:
    """Returns whether a module holds numbers directly only, in no object of its own."""
    return all(type(value) in _PLAIN or name in _OWN or isinstance(value, (nn.Module, torch.Tensor)) for name, value in attributes.items())


def _changed(before: nn.Module, after: nn.Module) -> dict[str, Any]:
    """Returns the numbers of a simple module that are others than in the one that it is a copy of, or stand in front of its class's."""
    old, kind = vars(before), type(after)
    found = {}
    for name, value in vars(after).items():
        if type(value) in _PLAIN and name not in _OWN and _is_plain(value):
            changed = old[name] != value if name in old else isinstance(getattr(kind, name, None), int)
            if changed:
                found[name] = _copied(value)
    return found


def put_number(module: nn.Module, way: str, value: Any) -> bool:
    """Sets a number of a module, in the type of sequence that stands there; returns whether the module has one of that name."""
    prefix, dot, name = way.rpartition(".")
    holder = _holders(module).get(prefix + dot)
    if holder is None or (name not in holder and not (prefix == "" and hasattr(type(module), name))):
        return False
    holder[name] = _like(holder.get(name), value)
    return True


def _holders(module: nn.Module) -> dict[str, dict[Any, Any]]:
    """Returns the module's attributes under "", and those of each object that it holds under the way there with a final dot."""
    found: dict[str, dict[Any, Any]] = {}
    seen: set[int] = set()
    level: Iterable[tuple[str, dict[Any, Any]]] = [("", vars(module))]
    own = _OWN
    for _ in range(_DEEPEST + 1):
        fresh = [(prefix, held) for prefix, held in level if id(held) not in seen]
        seen.update(id(held) for _, held in fresh)
        found.update(fresh)
        level = [
            (f"{prefix}{name}.", inner)
            for prefix, held in fresh
            for name, value in held.items()
            if type(value) not in _PLAIN and isinstance(name, str) and name not in own and (inner := _inside(value)) is not None
        ]
        own = frozenset()
    return found


def _inside(value: object) -> dict[Any, Any] | None:
    """Returns what a plain object, a dict or a partial holds; None for everything else, modules, tensors and functions among it."""
    if isinstance(value, functools.partial):
        return value.keywords
    if type(value) is dict:
        return value
    if isinstance(value, (nn.Module, torch.Tensor, type)) or callable(value) or type(value).__module__.startswith(("torch", "graphprune")):
        return None
    held = getattr(value, "__dict__", None)
    return held if type(held) is dict else None


def _is_plain(value: object) -> bool:
    return all(_is_plain(item) for item in value) if type(value) in _SEQUENCES else isinstance(value, _NUMBERS)  # type: ignore[attr-defined]


def _copied(value: Any) -> Any:
    return [_copied(item) for item in value] if isinstance(value, _SEQUENCES) else value


def _like(current: Any, value: Any) -> Any:
    """Returns a value whose lists are of the types of sequence that the current one is made of."""
    if not isinstance(value, list) or not isinstance(current, _SEQUENCES):
        return value
    inner = current[0] if len(current) else None
    return type(current)(_like(inner, item) for item in value)
