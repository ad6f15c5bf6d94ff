"""Masks of single weights: which elements of which parameters are kept. They zero weights; only channels make a network smaller."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from graphprune.errors import MaskError, nearest
from graphprune.masks.channels import Masks, read_flags, slice_tensor, tensors_of, write_flags
from graphprune.masks.copying import copied

if TYPE_CHECKING:
    from torch import nn

    from graphprune.groups.graph import DependencyGraph

_KIND = {"kind": "elements"}  # metadata that tells these files from those of channel masks


class ElementMasks(Mapping[str, torch.Tensor]):
    """Parameter name -> boolean tensor of the parameter's shape on the CPU, True = kept. Parameters that are not listed are kept whole.

    A parameter that goes by several names (tied weights) is listed under the first of them and found under all.

    Args:
        model: the model whose parameters the masks speak of; it is not held.
        kept: parameter name -> boolean tensor or array.

    Raises:
        MaskError: a name is no parameter of the model, is listed twice, or its mask is not boolean or has another shape.
    """

    def __init__(self, model: nn.Module, kept: Mapping[str, torch.Tensor]) -> None:
        first: dict[int, str] = {}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._first = {name: first.setdefault(id(tensor), name) for name, tensor in parameters.items()}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in parameters.items()}
        self._kept: dict[str, torch.Tensor] = {}
        for name, mask in kept.items():
            if name not in self._first:
                what = f"{type(model).__name__} has no parameter called {name!r}"
                raise MaskError(what, nearest(name, self._first) or "Use masks made for this model")
            if self._first[name] in self._kept:
                raise MaskError(f"{name!r} and {self._first[name]!r} are one parameter with two masks", "Give one mask")
            self._kept[self._first[name]] = _checked(name, mask, self._shapes[name])

    def __getitem__(self, name: str) -> torch.Tensor:
        """Returns which elements of a parameter are kept.

        Raises:
            MaskError: no mask is listed for the name.
        """
        try:
            return self._kept[self._first[name]]
        except KeyError:
            hint = nearest(name, self._kept)
            raise MaskError(f"no element mask is listed for {name!r}", hint or "See list(masks) for the parameters that have one") from None

    def __contains__(self, name: object) -> bool:
        """Returns whether a mask is listed for the name."""
        return isinstance(name, str) and self._first.get(name) in self._kept

    def get(self, name: str, default: Any = None) -> Any:
        """Returns which elements of a parameter are kept, or `default` when no mask is listed for it."""
        return self._kept[self._first[name]] if name in self else default

    def __iter__(self) -> Iterator[str]:
        """Iterates over the listed parameters."""
        return iter(self._kept)

    def __len__(self) -> int:
        """Returns the number of listed parameters."""
        return len(self._kept)

    @property
    def sparsity(self) -> float:
        """The share of the listed parameters' elements that go."""
        total = sum(mask.numel() for mask in self._kept.values())
        return sum(mask.numel() - int(mask.sum()) for mask in self._kept.values()) / total if total else 0.0

    def for_module(self, module: str) -> dict[str, torch.Tensor]:
        """Returns parameter name within a module -> boolean tensor of the parameter's shape, True = kept.

        Raises:
            MaskError: the model has no module of that name with parameters.
        """
        prefix = f"{module}." if module else ""
        names = [n for n in self._shapes if n.startswith(prefix) and "." not in n[len(prefix) :]]
        if not names:
            known = [n.rpartition(".")[0] for n in self._shapes]
            raise MaskError(f"no module with parameters is called {module!r}", nearest(module, known) or "See model.named_modules()")
        whole = {n: torch.ones(self._shapes[n], dtype=torch.bool) for n in names if n not in self}
        return {n[len(prefix) :]: whole[n] if n in whole else self[n] for n in names}

    def apply(self, model: nn.Module) -> None:
        """Zeroes the removed elements in place, whatever device they are on.

        Raises:
            MaskError: a listed parameter is missing in the model or has another shape there.
            InputError: the model is on the meta device.
        """
        tensors = tensors_of(model, {name: self._shapes[name] for name in self._kept})
        with torch.no_grad():
            for name, mask in self._kept.items():
                tensors[name].masked_fill_(~mask.to(tensors[name].device), 0)

    def masked(self, model: nn.Module) -> nn.Module:
        """Returns a copy of the model with the removed elements zeroed."""
        clone = copied(model, {})
        self.apply(clone)
        return clone

    def channels(self, graph: DependencyGraph) -> Masks:
        """Returns the masks of the channels of which no producing weight is left, for `speedup` to remove.

        A channel without weights still carries its bias and what a normalisation after it adds; these go with the channel. A group of
        which no channel has a weight left keeps its first.

        Args:
            graph: of the model that these masks were made for.

        Raises:
            MaskError: a listed parameter has another shape in the graph.
        """
        for name, mask in self._kept.items():
            if name in graph.shapes and tuple(graph.shapes[name]) != tuple(mask.shape):
                what = f"{name!r} is {tuple(graph.shapes[name])} in the graph, but {tuple(mask.shape)} where the masks were made"
                raise MaskError(what, "Trace the model that the masks were made for")
        kept = {}
        for group in graph.groups:
            alive = np.zeros(group.channels, dtype=bool)
            for s in group.producers:
                mask = self.get(s.parameter)
                alive |= True if mask is None else slice_tensor(mask, s).any(1).numpy()
            alive[0] |= not alive.any()
            kept[group.name] = alive
        return Masks(graph, kept)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the masks as safetensors; atomically.

        Raises:
            FileError: the folder does not exist or is not writable.
        """
        write_flags(path, {name: mask.numpy() for name, mask in self._kept.items()}, _KIND)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> ElementMasks:
        """Reads masks that were saved for a model with parameters of the same names and shapes.

        Raises:
            FileError: the file is missing or is no safetensors file.
            MaskError: the file holds masks of channels, or masks that do not fit the model.
        """
        kept, metadata = read_flags(path, "ElementMasks.save")
        if metadata.get("kind") != _KIND["kind"]:
            raise MaskError(f"{str(path)!r} holds no element masks", "Read masks of channels with Masks.load")
        return cls(model, {name: torch.from_numpy(mask) for name, mask in kept.items()})


def _checked(name: str, mask: Any, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = torch.as_tensor(mask)
    if tensor.dtype != torch.bool or tuple(tensor.shape) != shape:
        what = f"the mask of {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}, not torch.bool of shape {shape}"
        raise MaskError(what, "Use masks made for this model")
    return tensor.detach().to("cpu", copy=True).contiguous()
