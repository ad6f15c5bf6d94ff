"""Slicing the tensors of a module: a copy that never copies what is dropped, or in place with a way back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graphprune.masks.copying import copied

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from graphprune.trace.members import Members

    Positions = Mapping[str, Mapping[int, NDArray[Any]]]


def sliced(tensor: torch.Tensor, dims: Mapping[int, NDArray[Any]]) -> torch.Tensor:
    """Returns the kept positions of a tensor, as new memory."""
    out = tensor.detach()
    for dim, keep in dims.items():
        out = out.index_select(dim, torch.from_numpy(keep).to(out.device))
    return out


def like(original: torch.Tensor, data: torch.Tensor) -> torch.Tensor:
    """Returns `data` as the same kind of tensor as `original`: parameter or buffer, subclass, requires_grad, Python attributes."""
    if isinstance(original, nn.Parameter):
        made: torch.Tensor = nn.Parameter(data, requires_grad=original.requires_grad)
        if type(original) is not nn.Parameter:
            made = data.as_subclass(type(original)).requires_grad_(original.requires_grad)
    else:
        made = data.requires_grad_(original.requires_grad)
    made.__dict__.update(original.__dict__)
    return made


def shrunk_copy(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    positions: Positions,
    aliases: Mapping[str, str] | None = None,
    members: Members | None = None,
) -> nn.Module:
    """Returns a deep copy of a module whose tensors keep only the given positions; the dropped weights are never copied.

    `aliases` names tensors that share the memory of another (which `positions` names) without being it; they still do afterwards.
    """
    memo: dict[int, Any] = {id(tensors[name]): like(tensors[name], sliced(tensors[name], dims)) for name, dims in positions.items()}
    for name, other in (aliases or {}).items():
        if other in positions and id(tensors[name]) not in memo:
            memo[id(tensors[name])] = like(tensors[name], memo[id(tensors[other])].data)
    for tensor in tensors.values():
        if vars(tensor) and id(tensor) not in memo:
            memo[id(tensor)] = like(tensor, tensor.detach().clone())
    return copied(model, memo, members)


Old = tuple[torch.Tensor, "torch.Tensor | None"]
"""The data and the gradient of a tensor before it was sliced in place."""


def shrink_in_place(tensors: Mapping[str, torch.Tensor], positions: Positions, aliases: Mapping[str, str], old: dict[str, Old]) -> None:
    """Slices tensors in place (their identity stays, gradients go), and puts into `old` what they were, one by one."""
    for name, dims in positions.items():
        data = sliced(tensors[name], dims)
        old[name] = (tensors[name].data, tensors[name].grad)
        tensors[name].grad = None
        tensors[name].data = data
    for name, other in aliases.items():
        if other in positions and tensors[name] is not tensors[other]:
            old[name] = (tensors[name].data, tensors[name].grad)
            tensors[name].grad = None
            tensors[name].data = tensors[other].data


def put_back(tensors: Mapping[str, torch.Tensor], old: Mapping[str, Old]) -> None:
    """Undoes :func:`shrink_in_place`."""
    for name, (data, gradient) in old.items():
        tensors[name].data = data
        tensors[name].grad = gradient
