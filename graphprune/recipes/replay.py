"""Doing again what a recipe says: to a freshly built dense model, or to the tensors of a training checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from graphprune.errors import FileError, MaskError, nearest
from graphprune.groups.build import trace
from graphprune.masks.channels import Masks
from graphprune.recipes.files import identity, read
from graphprune.surgery.arguments import rebuilt
from graphprune.surgery.numbers import put_number
from graphprune.surgery.recipe import Recipe, Step, all_shapes, attach, state_shapes
from graphprune.surgery.slicing import shrunk_copy, sliced

if TYPE_CHECKING:
    from torch import nn

_FRESH = "Build the dense model exactly as before it was pruned, and pass it unpruned"


def load(model: nn.Module, path: str | os.PathLike[str], example_inputs: object = None) -> nn.Module:
    """Returns a shrunk copy of a dense model with the weights in a file, as `save` wrote them.

    The result has the file's dtypes, the given model's device, and its `training` and `requires_grad` flags. A model that kept its class
    is rebuilt by slicing alone; one that became a GraphModule is recorded again, on random inputs of the recorded shapes.

    Args:
        model: the dense model, freshly built, with any weights; never modified.
        path: a file that `save` wrote.
        example_inputs: to record the model on, where it became a GraphModule and inputs of the recorded shapes do not do.

    Raises:
        FileError: the file is missing, is no safetensors file, or has no recipe.
        MaskError: the model is not the one that was pruned: the first parameter that differs is named.
        InputError: the model cannot be run on inputs of the recorded shapes (GraphModule only).
    """
    recipe, state = read(path)
    _require_dense(model, recipe)
    small = model
    for step in recipe.steps:
        small = _sliced_again(small, step, path) if step.kind == "module" else _recorded_again(small, step, example_inputs)
    _fill(small, state, recipe)
    attach(small, recipe)
    return small


def slice_state_dict(recipe: Recipe, dense_state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a dense model's tensors by name, cut to what the shrunk model keeps: for training checkpoints, averages of weights, momenta.

    Names that the shrunk model does not have are left out, and so is what is no tensor. A GraphModule has index tables and literals of
    its own besides: load the result into it with ``strict=False``.

    Args:
        recipe: see `recipe_of`.
        dense_state_dict: tensors under the dense model's names, all or some of them, each with the dense shape; left as they are.

    Raises:
        MaskError: a name is none of the dense model's, or a tensor has another shape.
    """
    out: dict[str, Any] = {}
    for name, tensor in dense_state_dict.items():
        if not isinstance(tensor, torch.Tensor):
            continue
        if name not in recipe.dense:
            hint = nearest(name, recipe.dense)
            raise MaskError(f"the dense {recipe.class_name} has no tensor {name!r}", f"Rename the tensors; {hint}" if hint else _FRESH)
        if tuple(tensor.shape) != recipe.dense[name]:
            what = f"{name!r} is {tuple(tensor.shape)}, but {recipe.dense[name]} in the {recipe.class_name} that was pruned"
            raise MaskError(what, "Pass tensors of the dense model")
        if name in recipe.small:
            dims = recipe.kept.get(recipe.aliases.get(name, name), {})
            out[name] = sliced(tensor, dims) if dims else tensor.detach().clone()
    return out


def _require_dense(model: nn.Module, recipe: Recipe) -> None:
    """Raises unless the model has the names and shapes of the one that was pruned, with values to slice."""
    found = all_shapes(model)
    kind = type(model).__name__
    for name in dict.fromkeys([*recipe.dense, *found]):
        mine, theirs = found.get(name, "missing"), recipe.dense.get(name, "missing")
        if mine != theirs:
            raise MaskError(f"{name!r} is {mine} in this {kind}, but {theirs} in the {recipe.class_name} that was pruned", _FRESH)
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        raise MaskError(f"this {kind} has tensors on the meta device, which cannot be filled", "Build it on a device with memory")


def _sliced_again(model: nn.Module, step: Step, path: str | os.PathLike[str]) -> nn.Module:
    """Returns a copy with tensors sliced and attributes set."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    for name, dims in step.kept.items():
        for dim, keep in dims.items():
            size = tensors[name].shape[dim] if name in tensors and dim < tensors[name].ndim else 0
            if keep.ndim != 1 or not keep.size or keep[0] < 0 or keep[-1] >= size or (np.diff(keep) <= 0).any():
                what = f"the recipe in {str(path)!r} is damaged: the kept positions of {name!r} dim {dim} do not fit its size {size}"
                raise FileError(what, "Pass a file written by graphprune.save")
    tied = {n: o for n, o in step.aliases.items() if n in tensors and o in tensors and identity(tensors[n]) == identity(tensors[o])}
    alone = {n: step.kept[o] for n, o in step.aliases.items() if n in tensors and n not in tied and o in step.kept}
    small = shrunk_copy(model, tensors, {**step.kept, **alone}, tied)
    modules = dict(small.named_modules())
    for where, values in step.attributes.items():
        for name, value in values.items():
            if where not in modules or not put_number(modules[where], name, value):
                raise MaskError(f"module {where!r} of this {type(model).__name__} has no attribute {name!r}", _FRESH)
    return small


def _recorded_again(model: nn.Module, step: Step, example_inputs: object) -> nn.Module:
    """Returns the rewritten program of a model, its masks applied; nothing is verified, for its weights are not the pruned ones."""
    from graphprune.speedup.speedup import speedup  # noqa: PLC0415 (it writes the recipes: at the top the import would be a circle)

    inputs = example_inputs
    if inputs is None:
        inputs = rebuilt(step.inputs, next((p.device for p in model.parameters()), torch.device("cpu")))
    graph = trace(model, inputs)
    if graph.fingerprint != step.fingerprint:
        what = f"this {type(model).__name__} runs another program than the one that was pruned, though its parameters have the same shapes"
        raise MaskError(
            what, f"{_FRESH}; where its forward depends on the values of its inputs, pass example_inputs= as when it was pruned"
        )
    small, _ = speedup(model, Masks(graph, step.masks), verify=False, result="graph")
    return small


def _fill(small: nn.Module, state: dict[str, torch.Tensor], recipe: Recipe) -> None:
    """Gives a rebuilt model the dtypes and values of the file."""
    found = state_shapes(small)
    for name in dict.fromkeys([*found, *state]):
        mine, theirs = found.get(name, "missing"), tuple(state[name].shape) if name in state else "missing"
        if mine != theirs:
            raise MaskError(f"{name!r} is {mine} in the rebuilt {recipe.class_name}, but {theirs} in the file", _FRESH)
    tied: dict[object, str] = {}
    for name, tensor in small.state_dict().items():
        other = tied.setdefault(identity(tensor), name)
        if other != name and not torch.equal(state[other], state[name]):
            raise MaskError(f"{name!r} and {other!r} are tied in this {recipe.class_name}, but differ in the file", _FRESH)
    converted: dict[object, torch.Tensor] = {}
    for name, tensor in [*small.named_parameters(), *small.named_buffers()]:
        if name in state and state[name].dtype != tensor.dtype:  # what is tied by memory stays so
            tensor.data = converted.setdefault(identity(tensor), tensor.data.to(state[name].dtype))
    small.load_state_dict(state)
