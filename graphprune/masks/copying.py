"""Deep copies of modules, with other tensors in place of some."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from graphprune.torch_private import own_modules, own_parameters
from graphprune.trace.members import Members
from graphprune.trace.turns import in_turn

_ATOMIC = frozenset({bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size})
_DICTS = (dict, OrderedDict)
_OWN = frozenset(name for name, value in vars(nn.Module()).items() if type(value) in _DICTS)  # PyTorch's own dicts, most of them empty


@in_turn
def copied(model: nn.Module, memo: dict[int, Any], members: Members | None = None) -> nn.Module:
    """Returns a deep copy of a module; `memo` maps ids of tensors to what stands in their place.

    Tensors that hooks compute anew on every forward pass (pruning and weight normalisation of older PyTorch), or that a model keeps
    from an earlier run, are detached first, as PyTorch copies no results of computations.

    It is what `copy.deepcopy` makes. But modules that leave their copying to Python, as nearly all do, are made here, attribute by
    attribute: `deepcopy` takes five times as long for a model of many small modules.
    """
    seen: set[int] = set()
    modules = (members or Members.of(model)).distinct
    for module in modules:
        of_leaves = own_parameters(module), own_modules(module)
        for name, value in vars(module).items():
            if type(value) not in _ATOMIC and not (name in _OWN and (not value or any(value is held for held in of_leaves))):
                for tensor in _held(value, seen):
                    if not tensor.is_leaf:
                        memo.setdefault(id(tensor), tensor.detach().clone())
    plain = [module for module in modules if id(module) not in memo and _copies_by_attributes(_class(module))]
    for module in plain:
        memo[id(module)] = module.__new__(type(module))
    for module in plain:
        _fill(memo[id(module)], module.__getstate__(), memo)
    return copy.deepcopy(model, memo)


def _fill(made: nn.Module, held: dict[str, Any], memo: dict[int, Any]) -> None:
    """Gives a new module copies of the attributes of another."""
    state: dict[str, Any] = {}
    for name, value in held.items():
        kind = type(value)
        if kind in _ATOMIC or (kind is tuple and all(type(item) in _ATOMIC for item in value)):
            state[name] = value
        elif name in _OWN and kind in _DICTS:
            state[name] = _copied_dict(value, memo) if value else kind()
        else:
            state[name] = copy.deepcopy(value, memo)
    if type(made).__setstate__ is nn.Module.__setstate__:  # which adds what modules of older releases lack
        vars(made).update(state)
    else:
        made.__setstate__(state)


def _copied_dict(held: dict[Any, Any], memo: dict[int, Any]) -> dict[Any, Any]:
    """Returns a deep copy of a dict of PyTorch's own: of parameters, buffers, modules or hooks, of which most are copied already."""
    made = memo[id(held)] = type(held)()
    for key, item in held.items():
        known = memo.get(id(item))
        made[key] = copy.deepcopy(item, memo) if known is None else known
    return made


def _class(module: nn.Module) -> Any:
    """Returns a module's class (annotated as anything: a type checker takes the `__hash__` of its instances for its own)."""
    return type(module)


@cache
def _copies_by_attributes(kind: Any) -> bool:
    """Returns whether `copy.deepcopy` of a module of this class copies its attributes, and does nothing else."""
    own = ("__new__", "__getstate__", "__reduce__", "__reduce_ex__")
    plain = all(getattr(kind, name) is getattr(nn.Module, name) for name in own)
    return plain and not hasattr(kind, "__deepcopy__") and not any(vars(base).get("__slots__") for base in kind.__mro__)


def _held(value: object, seen: set[int]) -> Iterator[torch.Tensor]:
    """Yields the tensors in a value: also in containers and in plain objects, but not those of modules."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    inner: Iterable[object] = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, (list, tuple, set)):
        inner = value
    elif type(getattr(value, "__dict__", None)) is dict and not isinstance(value, (type, nn.Module)):
        inner = vars(value).values()
    if id(value) not in seen:
        seen.add(id(value))
        for item in list(inner):
            if type(item) not in _ATOMIC:
                yield from _held(item, seen)
