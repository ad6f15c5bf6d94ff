"""``graphprune verify``: a second look at a pruned model, from its file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphprune.cli import arguments, files
from graphprune.cli.screen import Screen
from graphprune.errors import MaskError

if TYPE_CHECKING:
    from torch import nn

    from graphprune.masks.channels import Masks
    from graphprune.surgery.recipe import Recipe, Step
    from graphprune.trace.inputs import Inputs
    from graphprune.verify.replay import Check

_TRAINED = (
    "have other values than the dense model's: trained since, or other weights (give those it was pruned with by --weights or --seed)"
)


def verify(
    ctx: typer.Context,
    model: arguments.Model,
    *,
    pruned: Annotated[Path, typer.Option("--pruned", metavar="FILE", help="The pruned model, written by prune.")],
    inputs: arguments.Inputs = None,
    weights: arguments.Weights = None,
    dtype: arguments.DtypeOption = None,
    seed: arguments.Seed = 0,
    tolerance: Annotated[
        float | None, typer.Option("--tolerance", min=0.0, help="Largest relative error. Default: what fits the type of the outputs.")
    ] = None,
) -> None:
    """Compare a pruned model with the masked dense one; exit code 1 when they differ.

    Describe the dense model as it was when it was pruned: the same name, weights and seed.
    """
    from graphprune.cli.loading import Request
    from graphprune.surgery.recipe import recipe_of
    from graphprune.verify.replay import Check

    screen: Screen = ctx.obj
    files.check_readable(pruned, "the pruned model")
    with screen.busy(f"building {model}"):
        loaded = Request(model, inputs or (), weights, dtype and dtype.value, seed).load()
        small = loaded.pruned(pruned)
        loaded = loaded.to(small.dtype)  # a file of doubles is compared in doubles
    with screen.busy("comparing"):
        recipe = recipe_of(small.model)
        check = compared(loaded.model, small.model, recipe, small.inputs)
        other = other_values(loaded.model, small.model, recipe)
    if tolerance is not None:
        check = Check(check.error, check.effect, tolerance)
    notes = ["The mask has no effect on these inputs, so that a comparison says little"] if not check.effect else []
    notes += [*check.remarks]
    notes += [f"{len(other)} tensors {_TRAINED}: {', '.join(other[:3])}{' ...' if other[3:] else ''}"] if other else []
    verdict = "the same" if check.passed else "DIFFERENT"
    line = f"{verdict}: error {check.error:.1e} (at most {check.tolerance:.0e}), effect of the mask {check.effect:.1e}"
    numbers = {"error": check.error, "effect": check.effect, "tolerance": check.tolerance, "passed": check.passed, "changed": other}
    screen.result({**loaded.facts(), "pruned": pruned, "kind": recipe.kind, **numbers}, loaded.title(), line, *notes)
    if not check.passed:
        raise typer.Exit(1)


def compared(dense: nn.Module, small: nn.Module, recipe: Recipe, inputs: Inputs) -> Check:
    """Returns how far a pruned model is from the masked dense one, which is rebuilt from the recipe; earlier prunings are done again.

    Raises:
        MaskError: the recipe was written for another model, or has no masks to rebuild the reference from.
        InputError: a model cannot be run on the inputs.
    """
    from graphprune.speedup.speedup import speedup
    from graphprune.trace.inputs import preserve_state, run
    from graphprune.verify.reference import reference_for
    from graphprune.verify.replay import MaskedModel

    for step in recipe.steps[:-1]:
        dense, _ = speedup(dense, _masks(dense, step, inputs), verify=False, result=step.kind)
    reference = reference_for(MaskedModel.of(dense, _masks(dense, recipe.steps[-1], inputs)))
    with preserve_state(small):
        run(small, inputs.copied())
    return reference.check(small)


def _masks(model: nn.Module, step: Step, inputs: Inputs) -> Masks:
    """Returns the masks of one pruning, on the graph of the model that went into it."""
    from graphprune.groups.build import trace
    from graphprune.masks.channels import Masks

    graph = trace(model, inputs)
    if graph.fingerprint != step.fingerprint:
        what = f"the groups of this {type(model).__name__} are not those of the model that was pruned"
        raise MaskError(what, "Name the model that was pruned, with inputs of the same kind")
    if graph.groups and not step.masks:
        what = "the recipe joins two prunings that found different groups, and has no masks to compare with"
        raise MaskError(what, "Compare after each pruning")
    return Masks(graph, step.masks)


def other_values(dense: nn.Module, small: nn.Module, recipe: Recipe) -> list[str]:
    """Returns the tensors of the pruned model that are no slices of the dense model's."""
    import torch

    from graphprune.recipes.replay import slice_state_dict

    expected = slice_state_dict(recipe, dense.state_dict())
    state = small.state_dict()
    return [name for name, tensor in expected.items() if name in state and not torch.equal(tensor, state[name])]
