"""What training carries along besides the weights, cut like the weights: the state of optimizers, gradients, and averages of weights.

A network that was shrunk trains on exactly as the masked network would have, if what an optimizer remembers of each weight (momentum,
Adam's moments) is sliced by the same positions as the weight. States that have a parameter's shape are sliced in all dimensions; factored
ones, which have length 1 in some (Adafactor), in the others; single numbers (step counts) are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphprune.errors import ConfigError, MaskError, nearest
from graphprune.surgery.slicing import sliced

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from graphprune.masks.channels import Masks

    Dims = Mapping[int, NDArray[np.int64]]

_AGAIN = "Make a new optimizer from the small model's parameters"


def slice_optimizer(optimizer: Optimizer, before: nn.Module, after: nn.Module, masks: Masks) -> None:
    """Makes an optimizer of a model's parameters one of the shrunk model's, in place, with its state and the gradients cut alike.

    Learning-rate schedulers go on working, as the parameter groups stay the same objects. Parameters that the shrunk model no longer
    has are dropped; parameters of other modules stay.

    Args:
        optimizer: holds parameters of `before`.
        before: the model that was shrunk; with `speedup(..., inplace=True)` the same object as `after`.
        after: what `speedup` returned for it.
        masks: what `speedup` was given; of masks of single elements, their `channels(graph)`.

    Raises:
        ConfigError: the optimizer holds none of the model's parameters, or keeps a state that cannot be sliced (such as LBFGS's).
        MaskError: the masks, the model and the shrunk model do not belong together.
    """
    kind = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(f"{kind} remembers whole steps of all parameters together, which cannot be sliced", _AGAIN)
    names: dict[int, list[str]] = {}
    for name, parameter in before.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if not any(id(p) in names for p in held):
        what = f"this {kind} holds no parameter of the {type(before).__name__} that was shrunk"
        raise ConfigError(what, "Pass the optimizer that was made from its parameters")
    cuts, small = _cuts(masks), dict(after.named_parameters(remove_duplicate=False))
    states: dict[Tensor, Any] = {p: optimizer.state[p] for p in held if id(p) not in names and p in optimizer.state}
    successors: dict[int, nn.Parameter | None] = {}
    gradients: list[tuple[nn.Parameter, Tensor]] = []
    for parameter in (p for p in held if id(p) in names):
        found = next((n for n in names[id(parameter)] if n in small), None)
        successors[id(parameter)] = None if found is None else small[found]
        if found is None:
            continue
        new, dims = small[found], cuts.get(found, {})
        shape = _checked(found, new, parameter, dims, masks)
        if parameter in optimizer.state:
            states[new] = {key: _state(value, shape, dims, f"{key!r} of {found!r}") for key, value in optimizer.state[parameter].items()}
        if parameter.grad is not None and new is not parameter:
            gradients.append((new, sliced(parameter.grad, dims)))
    _put(optimizer, states, successors)
    for new, gradient in gradients:
        new.grad = gradient


@overload
def slice_average(average: nn.Module, after: nn.Module, masks: Masks) -> nn.Module: ...


@overload
def slice_average(average: Mapping[str, Tensor], after: nn.Module, masks: Masks) -> dict[str, Tensor]: ...


def slice_average(average: nn.Module | Mapping[str, Tensor], after: nn.Module, masks: Masks) -> nn.Module | dict[str, Tensor]:
    """Returns an average of weights (EMA, SWA) of a model, cut to the shrunk model; the given one is left as it is.

    Args:
        average: tensors by the names of the model that was shrunk, all or some of them; or a module of the same class; or a wrapper
            that holds such a module as `module`, such as `torch.optim.swa_utils.AveragedModel`, whose other state is copied.
        after: what `speedup` returned.
        masks: what `speedup` was given.

    Raises:
        MaskError: a tensor has a name or a shape that the model that was shrunk did not have.
    """
    if not isinstance(average, nn.Module):
        return dict(_averages(average, after, masks))
    held = dict(average.named_children()).get("module", average)
    state: Mapping[str, Tensor] = {name: value for name, value in held.state_dict().items() if isinstance(value, Tensor)}
    small = copy.deepcopy(after)
    small.load_state_dict({**small.state_dict(), **dict(_averages(state, after, masks))})
    trained = any(parameter.requires_grad for parameter in held.parameters())
    for parameter in small.parameters():
        parameter.requires_grad_(parameter.requires_grad and trained)
    small.train(held.training)
    return small if held is average else copy.deepcopy(average, {id(held): small})


def sliced_state(state: Mapping[str, Mapping[str, Any]], masks: Masks) -> dict[str, dict[str, Any]]:
    """Returns what an optimizer remembers, by parameter name and key, cut like the parameters.

    Args:
        state: parameter name -> key, such as "momentum_buffer" -> tensor or plain value.
        masks: made for the model with these parameters.

    Raises:
        ConfigError: a tensor has neither the parameter's shape, nor a factor's, nor one element.
    """
    cuts = _cuts(masks)
    return {
        name: {key: _state(value, masks.graph.shapes[name], cuts.get(name, {}), f"{key!r} of {name!r}") for key, value in values.items()}
        if name in masks.graph.shapes
        else dict(values)
        for name, values in state.items()
    }


def _cuts(masks: Masks) -> dict[str, Dims]:
    """Returns parameter -> dim -> kept positions, under all names that a parameter goes by."""
    positions = masks.positions()
    return {**positions, **{name: positions[other] for name, other in masks.graph.aliases.items() if other in positions}}


def _small(shape: tuple[int, ...], dims: Dims) -> tuple[int, ...]:
    return tuple(dims[dim].size if dim in dims else size for dim, size in enumerate(shape))


def _checked(name: str, new: Tensor, old: Tensor, dims: Dims, masks: Masks) -> tuple[int, ...]:
    """Returns the shape that a parameter had, after checking that it has the shape now that the masks leave."""
    shape = masks.graph.shapes.get(masks.graph.aliases.get(name, name), tuple(old.shape))
    if tuple(new.shape) != _small(shape, dims):
        what = f"{name!r} is {tuple(new.shape)} in the shrunk model, but {_small(shape, dims)} by the masks"
        raise MaskError(what, "Pass the masks that speedup was given, and the model that it returned")
    return tuple(shape)


def _state(value: Any, shape: tuple[int, ...], dims: Dims, where: str) -> Any:
    """Returns one entry of an optimizer's state, sliced where it follows the parameter's shape."""
    if not isinstance(value, Tensor) or not dims or (value.numel() == 1 and tuple(value.shape) != shape):
        return value
    own = tuple(value.shape)
    if len(own) != len(shape) or any(mine not in (size, 1) for mine, size in zip(own, shape, strict=True)):
        what = f"the optimizer's state {where} is of shape {own}, which says nothing of the parameter's {shape}"
        raise ConfigError(what, _AGAIN)
    return sliced(value, {dim: keep for dim, keep in dims.items() if own[dim] == shape[dim]})


def _put(optimizer: Optimizer, states: Mapping[Tensor, Any], successors: Mapping[int, nn.Parameter | None]) -> None:
    """Gives an optimizer new parameters and states, its groups staying the same objects."""
    for group in optimizer.param_groups:
        fresh = [successors.get(id(p), p) for p in group["params"]]
        if "param_names" in group:
            group["param_names"] = [name for name, p in zip(group["param_names"], fresh, strict=True) if p is not None]
        group["params"] = [p for p in fresh if p is not None]
    optimizer.state.clear()
    optimizer.state.update(states)


def _averages(average: Mapping[str, Tensor], after: nn.Module, masks: Masks) -> Iterator[tuple[str, Tensor]]:
    """Yields the averages that the shrunk model has a place for."""
    cuts, found = _cuts(masks), after.state_dict(keep_vars=True)
    shapes = dict(masks.graph.shapes)
    shapes |= {name: shapes[other] for name, other in masks.graph.aliases.items() if other in shapes}
    for name, value in average.items():
        dims = cuts.get(name, {})
        if name not in shapes and name not in found:
            hint = nearest(name, shapes)
            raise MaskError(f"the model that was shrunk has no tensor {name!r}", hint or "Name the averages as the model's state dict does")
        if name in shapes and tuple(value.shape) != tuple(shapes[name]):
            what = f"the average of {name!r} is {tuple(value.shape)}, but {tuple(shapes[name])} in the model that was shrunk"
            raise MaskError(what, "Pass the average as it was before the model was shrunk")
        if name in found:
            yield name, sliced(value, dims) if dims else value.detach().clone()
