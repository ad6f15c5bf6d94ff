"""Networks to test on, with weights and statistics under which nothing cancels by accident.

Freshly built networks hide defects: a BatchNorm with mean 0, variance 1, weight 1 and bias 0 is the identity, and a layer scale whose
entries are all equal looks the same under any permutation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tests.support.zoo_sources import Blueprint, Shape, blueprint

_NORMS: Final = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # noqa: SLF001 (the only common base)
_FLAT: Final = 1e-3  # entries that spread less than this are as good as equal

MakeInputs = Callable[[int], Any]


@dataclass(frozen=True)
class Network:
    """A network and what it is fed.

    Attributes:
        model: the network, in eval mode.
        make_inputs: batch size -> inputs of that many examples (always the same ones), in any form that `call` takes.
        make_training_inputs: the same for train mode.
    """

    model: nn.Module
    make_inputs: MakeInputs
    make_training_inputs: MakeInputs


def load(name: str, *, size: int | None = None, dtype: torch.dtype = torch.float32) -> Network:
    """Builds a network by name, in eval mode, with its default random weights.

    Args:
        name: source and name, as in "torchvision:resnet50".
        size: height and width of its input images in pixels; None takes the smallest suitable one.
        dtype: of parameters, buffers and inputs.

    Raises:
        ValueError: the name is not of that form, or the source has no such network.
    """
    plan = blueprint(name, size)
    model = plan.make().eval()
    shape = _accepted(model, plan)

    def make_inputs(batch: int) -> Any:
        return cast(plan.draw(batch, shape, torch.Generator().manual_seed(batch)), dtype)

    def make_training_inputs(batch: int) -> Any:
        draw = plan.draw_training or plan.draw
        return cast(draw(batch, shape, torch.Generator().manual_seed(batch)), dtype)

    return Network(model.to(dtype), make_inputs, make_training_inputs)


@torch.no_grad()
def _accepted(model: nn.Module, plan: Blueprint) -> Shape:
    """Returns the first shape of an example that a freshly built network runs on; nobody tries the last."""
    for shape in plan.shapes[:-1]:
        try:
            call(model, cast(plan.draw(1, shape, torch.Generator()), torch.float32))
        except Exception:  # noqa: BLE001, S112 (networks refuse a size in many ways)
            continue
        return shape
    return plan.shapes[-1]


def load_randomised(
    name: str,
    seed: int = 0,
    *,
    size: int | None = None,
    dtype: torch.dtype = torch.float64,
    context: AbstractContextManager[object] | None = None,
) -> Network:
    """Builds a network as `load` does, with all weights reproducible from `seed`, randomised and calibrated on four examples.

    Args:
        name: as for `load`.
        seed: of all weights and statistics.
        size: as for `load`.
        dtype: as for `load`.
        context: to calibrate in, see `zoo_arithmetic`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = load(name, size=size, dtype=dtype)
        with context or nullcontext():
            randomise(network.model, seed, network.make_inputs(4))
    return network


def build(name: str, *, size: int | None = None, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, MakeInputs]:
    """Returns model and `make_inputs` of the network that `load` builds."""
    network = load(name, size=size, dtype=dtype)
    return network.model, network.make_inputs


def cast(inputs: object, dtype: torch.dtype) -> Any:
    """Returns inputs with their float64 tensors, however nested, in another type; what has a type of its own keeps it."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(dtype) if tensor.dtype == torch.float64 else tensor, inputs)


def call(model: nn.Module, inputs: object) -> object:
    """Runs a model on inputs given as a tensor, a tuple of positional or a dict of keyword arguments, or (args, kwargs)."""
    if isinstance(inputs, dict):
        keyword_output: object = model(**inputs)
        return keyword_output
    if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        return model(*inputs[0], **inputs[1])
    output: object = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return output


@torch.no_grad()
def randomise(model: nn.Module, seed: int, inputs: object = None) -> nn.Module:
    """Gives every parameter and every normalisation statistic non-degenerate random values, in place.

    Weights keep their default initialisation where it is random. Affine parameters of norms (also where they are buffers), biases and
    tensors whose entries are all (nearly) equal are drawn anew; those that are equal along one dimension are perturbed.
    Running statistics are those of the activations on `inputs`, off by a random factor of 0.7 to 1.3 and a random shift of 0.1 standard
    deviations, so that deep networks neither explode nor vanish; layers that `inputs` do not reach, or all where there are none, get
    statistics near mean 0 and variance 1.

    Args:
        model: changed in place; its training flags and the global random state stay as they were.
        seed: the same seed draws the same values.
        inputs: what to run the model on, in any form that `call` takes.

    Returns:
        The same model.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point():
                _randomise_parameter(module, name, parameter, generator)
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:  # noqa: SLF001
            _set_statistics(module, torch.zeros(module.num_features), torch.ones(module.num_features), generator)
        elif "Norm" in type(module).__name__:
            _randomise_constants(module, generator)
    if inputs is not None:
        _calibrate(model, inputs, generator)
    return model


def _normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _uniform(like: torch.Tensor, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return (low + (high - low) * torch.rand(like.shape, generator=generator, dtype=torch.float64)).to(like)


def _randomise_parameter(owner: nn.Module, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    is_norm = (isinstance(owner, _NORMS) or "Norm" in type(owner).__name__) and parameter.squeeze().ndim <= 1
    is_flat = parameter.numel() > 1 and float(parameter.std()) < _FLAT
    if is_norm and (name == "weight" or (is_flat and float(parameter.mean()) > 0.5)):
        parameter.copy_(_uniform(parameter, 0.5, 1.5, generator))
    elif is_norm:
        parameter.copy_(0.2 * _normal(parameter, generator))
    elif is_flat:
        parameter.copy_(_instead_of_constant(name, parameter, generator))
    elif any(size > 1 and bool((parameter.diff(dim=dim).abs() < _FLAT).all()) for dim, size in enumerate(parameter.shape)):
        parameter.mul_(_uniform(parameter, 0.8, 1.2, generator))


def _randomise_constants(norm: nn.Module, generator: torch.Generator) -> None:
    """Randomises weight, bias and statistics of a norm that holds them as buffers."""
    for name, buffer in norm.named_buffers(recurse=False):
        if name in {"weight", "running_var"} and buffer.is_floating_point():
            buffer.copy_(_uniform(buffer, 0.5, 1.5, generator))
        elif name in {"bias", "running_mean"} and buffer.is_floating_point():
            buffer.copy_(0.2 * _normal(buffer, generator))


def _instead_of_constant(name: str, parameter: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns random values in the place of a tensor whose entries are (nearly) equal: a scale, a zeroed matrix, or an offset."""
    if name.endswith("weight") and parameter.ndim > 1:
        return _normal(parameter, generator) / math.sqrt(parameter[0].numel())
    if bool((parameter == parameter.flatten()[0]).all()) and float(parameter.flatten()[0]) != 0:
        return _uniform(parameter, 0.5, 1.5, generator)
    return 0.1 * _normal(parameter, generator)


def _set_statistics(module: nn.modules.batchnorm._NormBase, mean: torch.Tensor, variance: torch.Tensor, generator: torch.Generator) -> None:
    """Sets running statistics to the given ones, perturbed."""
    if module.running_mean is None or module.running_var is None:
        return
    variance = variance.clamp(min=1e-2 * float(variance.mean()) + 1e-6)
    shift = 0.1 * variance.sqrt() * _normal(mean, generator)
    module.running_mean.copy_(mean * _uniform(mean, 0.7, 1.3, generator) + shift)
    module.running_var.copy_(variance * _uniform(variance, 0.7, 1.3, generator))


def _calibrate(model: nn.Module, inputs: object, generator: torch.Generator) -> None:
    """Runs the model once in eval mode and sets each BatchNorm's statistics as its input arrives.

    So every layer is calibrated on what the perturbed layers before it send, and the perturbations do not add up over the depth.
    """

    def on_arrival(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in seen:  # noqa: SLF001
            seen.add(id(module))
            values = arguments[0].detach().transpose(0, 1).flatten(1)
            _set_statistics(module, values.mean(dim=1), values.var(dim=1, correction=0), generator)

    seen: set[int] = set()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]  # noqa: SLF001
    if not norms:
        return
    training = {module: module.training for module in model.modules()}
    handles = [norm.register_forward_pre_hook(on_arrival) for norm in norms]
    try:
        model.eval()
        call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training.items():
            module.training = flag
