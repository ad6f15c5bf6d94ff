"""The way back from shrunk models: their weights, at the places that these had in the model that was shrunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from graphprune.errors import MaskError
from graphprune.masks.channels import tensors_of
from graphprune.masks.copying import copied

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from graphprune.masks.channels import Masks

    Kept: TypeAlias = Mapping[str, NDArray[np.bool_]]


def scattered(model: nn.Module, small: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Returns copies of a model's parameters and buffers, by all their names, with the values that a shrunk model has for what was kept.

    What was removed keeps the values that it has in the model, as does what the shrunk model has no tensor for.

    Args:
        model: what was shrunk.
        small: what `speedup` made of it, whatever it was trained to since.
        masks: what `speedup` was given.

    Raises:
        MaskError: a tensor of the shrunk model has another shape than the masks leave.
    """
    positions, out = masks.positions(), {}
    found = tensors_of(small, {})
    for name, full in tensors_of(model, {}).items():
        out[name] = full.detach().clone()
        if name not in found:
            continue
        dims = positions.get(name) or positions.get(masks.graph.aliases.get(name, name), {})
        left = [dims[d] if d in dims else np.arange(size) for d, size in enumerate(full.shape)]
        if tuple(found[name].shape) != tuple(index.size for index in left):
            what = f"{name!r} is {tuple(found[name].shape)} in the shrunk model, but {tuple(i.size for i in left)} by the masks"
            raise MaskError(what, "Train the shrunk model without changing its shapes")
        value = found[name].detach().to(full.device, full.dtype)
        if left:
            out[name][tuple(torch.from_numpy(index).to(full.device) for index in np.ix_(*left))] = value
        else:
            out[name].copy_(value)
    return out


def filled(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Returns a copy of a model with other values in all its parameters and buffers.

    Args:
        model: left as it is.
        values: by all their names.
    """
    made = copied(model, {})
    with torch.no_grad():
        for name, tensor in tensors_of(made, {}).items():
            tensor.copy_(values[name])
    return made
