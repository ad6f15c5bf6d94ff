"""One safetensors file per shrunk model: its tensors by name, the recipe's arrays under a reserved prefix, the rest as JSON metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from graphprune.errors import FileError, MaskError
from graphprune.runs.atomic import atomic
from graphprune.surgery.recipe import Recipe, Step, recipe_of
from graphprune.trace.turns import in_turn

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
_KEY = "graphprune"
_KEPT = "graphprune.kept"
_MASK = "graphprune.mask"
_REWRITE = "Pass a file written by graphprune.save"


@in_turn
def save(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a shrunk model with its current weights and its recipe to one safetensors file, atomically.

    Args:
        module: what `speedup`, `prune` or `load` returned, possibly trained since.
        path: where to; an existing file is replaced.

    Raises:
        MaskError: the module was not made by graphprune, or its tensors are no longer those that the pruning left.
        FileError: the folder does not exist or is not writable, or a tensor is of a type that safetensors cannot hold.
    """
    recipe = recipe_of(module)
    state = module.state_dict()
    _require_unchanged(type(module).__name__, state, recipe)
    tensors, aliases = _distinct(state)
    metadata = {"format": "pt", _KEY: json.dumps(_header(recipe, aliases))}
    target = Path(path)
    try:
        with atomic(target) as temporary:
            save_file({**tensors, **_arrays(recipe)}, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot write a model to {str(target)!r}: {error}", "Choose a folder that exists and is writable") from error
    except (KeyError, ValueError, RuntimeError) as error:
        raise FileError(f"safetensors cannot hold the model's tensors: {error}", "Convert them to a plain dense type first") from error


def read(path: str | os.PathLike[str]) -> tuple[Recipe, dict[str, torch.Tensor]]:
    """Returns the recipe and the state dict in a file, tied tensors under each of their names.

    Raises:
        FileError: the file is missing, is no safetensors file, has no recipe, or has one that cannot be read.
    """
    where = repr(str(path))
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot read a model from {where}: {error}", _REWRITE) from error
    if _KEY not in metadata:
        raise FileError(f"{where} holds tensors but no recipe", f"{_REWRITE}; load plain weights with safetensors itself")
    try:
        header = json.loads(metadata[_KEY])
        if header["format"] != FORMAT:
            what = (
                f"{where} is of format {header['format']!r}, written by graphprune {header.get('version')}; this one reads format {FORMAT}"
            )
            raise FileError(what, "Install the graphprune that wrote it")
        recipe = _recipe(header, tensors)
        state = {name: tensor for name, tensor in tensors.items() if not name.startswith((f"{_KEPT}/", f"{_MASK}/"))}
        state |= {alias: state[name] for alias, name in header["aliases"].items()}
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise FileError(f"the recipe in {where} is damaged: {type(error).__name__}: {error}", _REWRITE) from error
    return recipe, state


def _require_unchanged(class_name: str, state: dict[str, Any], recipe: Recipe) -> None:
    """Raises if the state dict has other names or shapes than the pruning left: a file of it could not be loaded again."""
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            what = f"{name!r} in the state of {class_name} is a {type(value).__name__}, and the file holds tensors only"
            raise FileError(what, "Keep such state elsewhere, or turn it into a tensor")
        if value.is_meta:
            raise FileError(f"{name!r} of {class_name} is on the meta device and has no values", "Load the weights first")
    for name in dict.fromkeys([*recipe.small, *state]):
        now, then = (tuple(state[name].shape) if name in state else "missing"), recipe.small.get(name, "missing")
        if now != then:
            what = f"{name!r} of {class_name} is {now} now and was {then} after pruning: the model was changed by something else since"
            raise MaskError(what, "Save the model as graphprune returned it, or trained; make other changes after loading")


def _distinct(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Returns each tied tensor once, with memory of its own, and the other names that it goes by."""
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    owners: dict[object, str] = {}
    memory: set[int] = set()
    for name, value in state.items():
        owner = owners.setdefault(identity(value), name)
        if owner != name:
            aliases[name] = owner
            continue
        tensor = value.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if pointer in memory else tensor
        memory.add(pointer)
    return tensors, aliases


def identity(tensor: torch.Tensor) -> object:
    """Returns what two tensors have in common exactly if they are one: the same elements in the same memory."""
    if not tensor.numel() or tensor.is_meta or tensor.layout != torch.strided:
        return object()
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _header(recipe: Recipe, aliases: dict[str, str]) -> dict[str, Any]:
    plain = recipe.to_dict()
    for step in plain["steps"]:
        step["masks"] = list(step["masks"])
        del step["kept"]
    return {"format": FORMAT, "fingerprint": recipe.fingerprint, "aliases": aliases, **plain}


def _arrays(recipe: Recipe) -> dict[str, torch.Tensor]:
    """Returns kept positions as "graphprune.kept/<step>/<name>/<dim>" (int64), masks as "graphprune.mask/<step>/<group>" (bool)."""
    out: dict[str, torch.Tensor] = {}
    for number, step in enumerate(recipe.steps):
        for name, dims in step.kept.items():
            out |= {f"{_KEPT}/{number}/{name}/{dim}": torch.from_numpy(keep).clone() for dim, keep in dims.items()}
        out |= {f"{_MASK}/{number}/{name}": torch.from_numpy(mask).clone() for name, mask in step.masks.items()}
    return out


def _recipe(header: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Recipe:
    steps = tuple(_step(plain, number, tensors) for number, plain in enumerate(header["steps"]))
    shapes = [{name: tuple(int(n) for n in shape) for name, shape in header[key].items()} for key in ("dense", "small")]
    if not steps:
        raise ValueError("it has no steps")
    return Recipe(str(header["class_name"]), shapes[0], shapes[1], steps, str(header["version"]))


def _step(plain: dict[str, Any], number: int, tensors: dict[str, torch.Tensor]) -> Step:
    kept: dict[str, dict[int, np.ndarray[Any, np.dtype[np.int64]]]] = {}
    prefix = f"{_KEPT}/{number}/"
    for key, tensor in tensors.items():
        if key.startswith(prefix):
            name, _, dim = key.removeprefix(prefix).rpartition("/")
            kept.setdefault(name, {})[int(dim)] = tensor.numpy().astype(np.int64)
    masks = {name: tensors[f"{_MASK}/{number}/{name}"].numpy().astype(bool) for name in plain["masks"]}
    if plain["kind"] not in ("module", "graph"):
        raise ValueError(f"step {number} is of kind {plain['kind']!r}")
    return Step(plain["kind"], str(plain["fingerprint"]), kept, plain["aliases"], plain["attributes"], masks, plain["inputs"])
