"""Masks: which channels of which groups are kept, tied to the graph that they were made for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from graphprune.errors import FileError, MaskError, nearest
from graphprune.masks.copying import copied
from graphprune.runs.atomic import atomic
from graphprune.trace.members import Members
from graphprune.trace.meta_device import refuse_meta

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from graphprune.groups.graph import DependencyGraph, Group, Slice


class Masks(Mapping[str, "NDArray[np.bool_]"]):
    """Group name -> boolean array of shape (channels,), True = kept. Groups that lose nothing are present too.

    Args:
        graph: the graph whose groups the masks speak of.
        kept: group name -> boolean array; groups left out are kept whole.

    Raises:
        MaskError: a name is no group of the graph, an array has another length, or a group would lose every channel.
    """

    def __init__(self, graph: DependencyGraph, kept: Mapping[str, NDArray[np.bool_]] | None = None) -> None:
        self.graph = graph
        given = dict(kept or {})
        self._kept: dict[str, NDArray[np.bool_]] = {}
        self._positions: dict[str, dict[int, NDArray[np.int64]]] | None = None
        for group in graph.groups:
            self._kept[group.name] = _checked(group, given.pop(group.name, None))
        if given:
            name = next(iter(given))
            raise MaskError(f"no group is called {name!r}", nearest(name, self._kept) or "Use masks made for this model")

    def __getitem__(self, name: str) -> NDArray[np.bool_]:
        """Returns which channels of a group are kept.

        Raises:
            MaskError: no group has the name.
        """
        try:
            return self._kept[name]
        except KeyError:
            raise MaskError(f"no group is called {name!r}", nearest(name, self._kept) or "See graph.groups") from None

    def __contains__(self, name: object) -> bool:
        """Returns whether a group has the name."""
        return name in self._kept

    def __iter__(self) -> Iterator[str]:
        """Iterates over group names."""
        return iter(self._kept)

    def get(self, name: str, default: Any = None) -> Any:
        """Returns which channels of a group are kept, or `default` when no group has the name."""
        return self._kept.get(name, default)

    def __len__(self) -> int:
        """Returns the number of groups."""
        return len(self._kept)

    @property
    def sparsity(self) -> float:
        """The share of all groups' channels that go."""
        total = sum(m.size for m in self._kept.values())
        return sum(int((~m).sum()) for m in self._kept.values()) / total if total else 0.0

    @property
    def removed_causes(self) -> NDArray[np.int64]:
        """The label causes behind the channels that go."""
        parts = [g.causes[~self._kept[g.name]] for g in self.graph.groups]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def positions(self) -> Mapping[str, Mapping[int, NDArray[np.int64]]]:
        """Returns parameter -> dim -> the positions that are kept, for every dimension that loses any."""
        if self._positions is None:
            self._positions = self._find_positions()
        return self._positions

    def _find_positions(self) -> dict[str, dict[int, NDArray[np.int64]]]:
        gone: dict[str, dict[int, list[NDArray[np.int64]]]] = {}
        for group in self.graph.groups:
            removed = ~self._kept[group.name]
            if removed.any():
                for s in group.slices:
                    gone.setdefault(s.parameter, {}).setdefault(s.dim, []).append(s.index[removed].ravel())
        out: dict[str, dict[int, NDArray[np.int64]]] = {}
        for name, dims in gone.items():
            for dim, parts in dims.items():
                keep = np.ones(self.graph.shapes[name][dim], dtype=bool)
                keep[np.concatenate(parts)] = False
                out.setdefault(name, {})[dim] = np.flatnonzero(keep)
        return out

    def for_module(self, module: str) -> dict[str, torch.Tensor]:
        """Returns parameter name within a module -> boolean tensor of the parameter's shape, True = kept.

        Raises:
            MaskError: the model has no module of that name with parameters.
        """
        prefix = f"{module}." if module else ""
        known_as = {**{n: n for n in self.graph.shapes}, **{n: c for n, c in self.graph.aliases.items() if c in self.graph.shapes}}
        names = [n for n in known_as if n.startswith(prefix) and "." not in n[len(prefix) :]]
        if not names:
            known = [n.rpartition(".")[0] for n in self.graph.shapes]
            raise MaskError(f"no module with parameters is called {module!r}", nearest(module, known) or "See graph.layers")
        positions = self.positions()
        return {n[len(prefix) :]: dense(self.graph.shapes[known_as[n]], positions.get(known_as[n], {})) for n in names}

    def apply(self, model: nn.Module) -> None:
        """Zeroes the removed channels' slices in place (running variances stay: a zero there would divide by nothing).

        Raises:
            MaskError: the model's parameters have other shapes than the graph's.
        """
        tensors = checked_tensors(model, self.graph)
        with torch.no_grad():
            for name, dims in self.positions().items():
                if not name.endswith("running_var"):
                    for dim, keep in dims.items():
                        _zero(tensors[name], dim, keep)

    def masked(self, model: nn.Module) -> nn.Module:
        """Returns a copy of the model with the removed channels' slices zeroed."""
        clone = copied(model, {})
        self.apply(clone)
        return clone

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the masks as safetensors, with the graph's fingerprint; atomically.

        Raises:
            FileError: the folder does not exist or is not writable.
        """
        write_flags(path, self._kept, {"fingerprint": self.graph.fingerprint})

    @classmethod
    def load(cls, path: str | os.PathLike[str], graph: DependencyGraph) -> Masks:
        """Reads masks that were saved for a model with an equal graph.

        Raises:
            FileError: the file is missing or is no safetensors file.
            MaskError: the masks were made for another model.
        """
        kept, metadata = read_flags(path, "Masks.save")
        if metadata.get("fingerprint") != graph.fingerprint:
            raise MaskError(f"the masks in {str(path)!r} were made for another model", "Make masks for this model")
        return cls(graph, kept)


def write_flags(path: str | os.PathLike[str], flags: Mapping[str, NDArray[np.bool_]], metadata: dict[str, str]) -> None:
    """Writes boolean arrays by name, of any shapes, as one safetensors file of bytes 0 and 1; atomically.

    Raises:
        FileError: the folder does not exist or is not writable.
    """
    target = Path(path)
    try:
        with atomic(target) as temporary:
            save_file({name: array.astype(np.uint8) for name, array in flags.items()}, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot write masks to {str(target)!r}: {error}", "Choose a folder that exists and is writable") from error


def read_flags(path: str | os.PathLike[str], writer: str) -> tuple[dict[str, NDArray[np.bool_]], dict[str, str]]:
    """Returns what `write_flags` wrote: the arrays and the metadata.

    Args:
        path: the file.
        writer: the call that writes such files, for the error.

    Raises:
        FileError: the file is missing or is no safetensors file.
    """
    try:
        with safe_open(str(path), framework="numpy") as file:
            flags = {name: file.get_tensor(name).astype(bool) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return flags, dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot read masks from {str(path)!r}: {error}", f"Pass a file written by {writer}") from error


def _checked(group: Group, mask: Any) -> NDArray[np.bool_]:
    if mask is None:
        return np.ones(group.channels, dtype=bool)
    array = np.asarray(mask.cpu() if isinstance(mask, torch.Tensor) else mask)
    if array.dtype != np.bool_ or array.shape != (group.channels,):
        what = f"the mask of group {group.name!r} is {array.dtype} of shape {array.shape}, not bool of shape ({group.channels},)"
        raise MaskError(what, "Use masks made for this model")
    if not array.any():
        raise MaskError(f"the mask of group {group.name!r} removes all its {group.channels} channels", "Keep at least one")
    checked: NDArray[np.bool_] = array.copy()
    return checked


def checked_tensors(model: nn.Module, graph: DependencyGraph, members: Members | None = None) -> dict[str, torch.Tensor]:
    """Returns the model's parameters and buffers by name, after checking that the graph's are among them with its shapes.

    Args:
        model: any module.
        graph: the graph that it must fit.
        members: the model's tensors, if they have been gathered already.

    Raises:
        MaskError: a parameter is missing or has another shape.
        InputError: the model is on the meta device.
    """
    return tensors_of(model, graph.shapes, members)


def tensors_of(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], members: Members | None = None) -> dict[str, torch.Tensor]:
    """Returns the model's parameters and buffers by name, after checking that those in `shapes` are among them, of these shapes.

    Raises:
        MaskError: a parameter is missing or has another shape.
        InputError: the model is on the meta device.
    """
    tensors = dict((members or Members.of(model)).tensors)
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != tuple(shape):
            is_ = found if found is not None else "missing"
            what = f"{name!r} is {is_} in {type(model).__name__}, but {tuple(shape)} where the masks were made"
            raise MaskError(what, "Use masks made for this model")
    refuse_meta(model, tensors.items(), "pruning")
    return tensors


def dense(shape: tuple[int, ...], dims: Mapping[int, NDArray[np.int64]]) -> torch.Tensor:
    """Returns a boolean tensor of a shape, True where all of its dimensions are among the positions that are kept."""
    keep = torch.ones(shape, dtype=torch.bool)
    for dim, positions in dims.items():
        _zero(keep, dim, positions)
    return keep


def _zero(tensor: torch.Tensor, dim: int, keep: NDArray[np.int64]) -> None:
    gone = np.ones(tensor.shape[dim], dtype=bool)
    gone[keep] = False
    index = torch.from_numpy(np.flatnonzero(gone)).to(tensor.device)
    tensor.index_fill_(dim, index, 0)


def slice_tensor(tensor: torch.Tensor, s: Slice) -> torch.Tensor:
    """Returns what a slice owns of its tensor, as (channels, elements)."""
    index = torch.from_numpy(s.index.ravel()).to(tensor.device)
    return tensor.detach().index_select(s.dim, index).movedim(s.dim, 0).reshape(s.index.shape[0], -1)
