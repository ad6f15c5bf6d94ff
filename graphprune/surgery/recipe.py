"""The record itself, how it comes onto a module, and how two prunings in a row become one record.

A recipe is a chain of steps. A step of kind "module" needs only kept positions and attribute values to be done again; a step of kind
"graph" is done again by recording the model and applying its masks. Two module steps in a row are merged into one, so a model that
is pruned little by little keeps a recipe of one step, whose positions are those in the dense model.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch

from graphprune.errors import MaskError
from graphprune.surgery.arguments import described
from graphprune.surgery.numbers import changed_numbers, numbers_of
from graphprune.trace.members import Members

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from graphprune.masks.channels import Masks

Kind: TypeAlias = Literal["module", "graph"]
Kept: TypeAlias = "Mapping[str, Mapping[int, NDArray[np.int64]]]"
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Attributes: TypeAlias = Mapping[str, Mapping[str, Any]]

ATTRIBUTE = "_graphprune_recipe"


@dataclass(frozen=True, eq=False)
class Step:
    """One pruning.

    Attributes:
        kind: "module" where the model kept its class, "graph" where it became a GraphModule.
        fingerprint: of the graph of the model that went in.
        kept: parameter or buffer name -> dim -> kept positions (sorted), in the model that went in; only dims that lose any.
        aliases: other names of tied tensors -> the name used in `kept`.
        attributes: module name -> way to a number (or sequence of numbers) -> new value, see `graphprune.surgery.numbers`
            ("module" only).
        masks: group name -> which channels are kept; empty where two merged steps found different groups.
        inputs: specification of the example inputs, see `graphprune.surgery.arguments`.
    """

    kind: Kind
    fingerprint: str
    kept: Kept
    aliases: Mapping[str, str]
    attributes: Attributes
    masks: Mapping[str, NDArray[np.bool_]]
    inputs: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain lists, dicts, numbers and strings."""
        return {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "kept": {name: {str(dim): keep.tolist() for dim, keep in dims.items()} for name, dims in self.kept.items()},
            "aliases": dict(self.aliases),
            "attributes": {name: dict(values) for name, values in self.attributes.items()},
            "masks": {name: mask.tolist() for name, mask in self.masks.items()},
            "inputs": dict(self.inputs),
        }


@dataclass(frozen=True, eq=False)
class Recipe:
    """What makes the shrunk model of the dense one. Immutable: copies of a model share it.

    Attributes:
        class_name: class of the dense model.
        dense: name -> shape of the dense model's parameters and buffers, tied ones under each name.
        small: name -> shape in the shrunk model's state dict.
        steps: the prunings, first to last.
        version: of the graphprune that pruned last.
    """

    class_name: str
    dense: Shapes
    small: Shapes
    steps: tuple[Step, ...]
    version: str

    @property
    def kind(self) -> Kind:
        """Returns "graph" if the shrunk model is a recorded program, "module" if it is of the dense model's class."""
        return "graph" if any(step.kind == "graph" for step in self.steps) else "module"

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the dense model's graph."""
        return self.steps[0].fingerprint

    @cached_property
    def aliases(self) -> Mapping[str, str]:
        """Other names of tensors that are tied in the dense model -> the name used in `kept`."""
        return self.steps[0].aliases

    @cached_property
    def kept(self) -> Kept:
        """Parameter or buffer name -> dim -> kept positions in the dense model, over all steps."""
        kept = self.steps[0].kept
        for step in self.steps[1:]:
            kept = composed(kept, step.kept, self.aliases)
        return {name: dims for name, dims in kept.items() if name in self.dense}

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as plain lists, dicts, numbers and strings, ready for JSON."""
        return {
            "version": self.version,
            "kind": self.kind,
            "class_name": self.class_name,
            "dense": {name: list(shape) for name, shape in self.dense.items()},
            "small": {name: list(shape) for name, shape in self.small.items()},
            "steps": [step.to_dict() for step in self.steps],
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> Recipe:
        """Returns the recipe itself, which nothing changes."""
        return self


@dataclass(frozen=True, eq=False)
class Before:
    """What must be known of a model before it is pruned, for the recipe to be written afterwards."""

    class_name: str
    shapes: Shapes
    numbers: Attributes | nn.Module
    recipe: Recipe | None

    @classmethod
    def of(cls, model: nn.Module, *, stays: bool = False) -> Before:
        """Looks at a model; an earlier recipe counts only while the model has the shapes that it says.

        Args:
            model: the model that is to be pruned.
            stays: whether it stays as it is, so that its numbers can be read when they are needed.
        """
        recipe = _found(model)
        if recipe is not None and recipe.small != state_shapes(model):
            recipe = None
        return cls(type(model).__name__, all_shapes(model), model if stays else numbers_of(model), recipe)


def remember(small: nn.Module, before: Before, kind: Kind, masks: Masks) -> None:
    """Puts the recipe of a finished pruning onto its result."""
    step = Step(
        kind=kind,
        fingerprint=masks.graph.fingerprint,
        kept=masks.positions(),
        aliases=dict(masks.graph.aliases),
        attributes=changed_numbers(before.numbers, small) if kind == "module" else {},
        masks={name: masks[name].copy() for name in masks},
        inputs=described(masks.graph.engine.program.inputs),
    )
    earlier = before.recipe
    steps = _continued(earlier.steps, step) if earlier else (step,)
    name, dense = (earlier.class_name, earlier.dense) if earlier else (before.class_name, before.shapes)
    attach(small, Recipe(name, dense, state_shapes(small), steps, _version()))


def attach(module: nn.Module, recipe: Recipe) -> None:
    """Puts a recipe onto a module, where copies, moves and training leave it and the state dict does not see it."""
    vars(module)[ATTRIBUTE] = recipe
    if any(kind.__name__ == "GraphModule" for kind in type(module).__mro__):  # its copies keep `meta` and drop other attributes
        vars(module).setdefault("meta", {})[ATTRIBUTE] = recipe


def recipe_of(module: nn.Module) -> Recipe:
    """Returns the recipe of a model that graphprune shrunk or loaded.

    Raises:
        MaskError: the module has no recipe.
    """
    recipe = _found(module)
    if recipe is None:
        what = f"this {type(module).__name__} has no recipe: it is no model that graphprune shrunk, but a dense one, a part or a wrapper"
        raise MaskError(what, "Pass the model that speedup or prune returned; save a dense model with safetensors itself")
    return recipe


def all_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of all parameters and buffers, tied ones under each name, with buffers that the state dict leaves out."""
    return {name: tuple(tensor.shape) for name, tensor in Members.of(model).tensors}


def state_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of all tensors in the state dict."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def composed(first: Kept, second: Kept, aliases: Mapping[str, str]) -> dict[str, dict[int, NDArray[np.int64]]]:
    """Returns the positions kept by two prunings in a row, counted before the first of them."""
    out = {name: dict(dims) for name, dims in first.items()}
    for other, dims in second.items():
        mine = out.setdefault(aliases.get(other, other), {})
        for dim, keep in dims.items():
            mine[dim] = mine[dim][keep] if dim in mine else keep
    return out


def _continued(steps: tuple[Step, ...], step: Step) -> tuple[Step, ...]:
    """Returns the chain with one more step, merged into the last where both are of kind "module"."""
    last = steps[-1]
    if not last.kind == step.kind == "module":
        return (*steps, step)
    paths = dict.fromkeys([*last.attributes, *step.attributes])
    attributes = {path: {**last.attributes.get(path, {}), **step.attributes.get(path, {})} for path in paths}
    kept = composed(last.kept, step.kept, last.aliases)
    masks = _composed_masks(last.masks, step.masks)
    return (*steps[:-1], Step("module", last.fingerprint, kept, last.aliases, attributes, masks, last.inputs))


def _composed_masks(first: Mapping[str, NDArray[np.bool_]], second: Mapping[str, NDArray[np.bool_]]) -> dict[str, NDArray[np.bool_]]:
    """Returns the masks of two prunings in a row, or none where the second found other groups than the first left."""
    if {name: int(mask.sum()) for name, mask in first.items()} != {name: mask.size for name, mask in second.items()}:
        return {}
    out = {name: mask.copy() for name, mask in first.items()}
    for name, mask in out.items():
        mask[mask] = second[name]
    return out


def _found(module: nn.Module) -> Recipe | None:
    meta = vars(module).get("meta")
    recipe = vars(module).get(ATTRIBUTE) or (meta.get(ATTRIBUTE) if isinstance(meta, dict) else None)
    return recipe if isinstance(recipe, Recipe) else None


def _version() -> str:
    try:
        return importlib.metadata.version("graphprune")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
