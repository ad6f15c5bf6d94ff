"""Tensors that a model keeps from earlier runs: they hide what they were computed from, and are too wide once channels are gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graphprune.torch_private import OWN_DICTS
from graphprune.trace.inputs import preserve_state
from graphprune.trace.members import Members
from graphprune.trace.meta_device import shapes_suffice
from graphprune.trace.program import Where

if TYPE_CHECKING:
    from graphprune.trace.inputs import Inputs


def caches(model: nn.Module, inputs: Inputs, members: Members | None = None) -> list[Where]:
    """Returns where the model keeps dicts of tensors that it fills again by itself.

    Only a model that has such dicts is run, once, with all of them emptied; where it fails then, they are no caches.
    """
    members = members or Members.of(model)
    found = dict(_candidates(members))
    if not found:
        return []
    keys = {where: list(held) for where, held in found.items()}
    with preserve_state(model, members), shapes_suffice(model, inputs.tensors()):
        for held in found.values():
            held.clear()
        try:
            inputs.copied().call(model)
        except Exception:  # noqa: BLE001 (whatever the model raises without them means that it needs them)
            return []
        return [where for where, held in found.items() if list(held) == keys[where]]


@contextmanager
def without_caches(model: nn.Module, inputs: Inputs, members: Members, known: list[Where] | None = None) -> Iterator[list[Where]]:
    """Empties a model's caches inside the block, and says where they are; whoever calls this puts them back, as `preserve_state` does.

    Args:
        model: any module.
        inputs: to try the model on.
        members: the model's modules.
        known: where the caches are, if that has been found out before.
    """
    held = caches(model, inputs, members) if known is None else known
    clear(model, held)
    yield held


def clear(model: nn.Module, places: list[Where]) -> None:
    """Empties caches."""
    for path, name in places:
        vars(model.get_submodule(path))[name].clear()


def _candidates(members: Members) -> Iterator[tuple[Where, dict[Any, Any]]]:
    """Yields dicts of tensors among the attributes of modules, not those in which PyTorch keeps parameters and buffers."""
    for path, module in members.first_names.items():
        for name, held in vars(module).items():
            if type(held) is not dict or not held or name in OWN_DICTS:
                continue
            if all(isinstance(v, torch.Tensor) and not isinstance(v, nn.Parameter) for v in held.values()):
                yield (path, name), held
