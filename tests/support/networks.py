"""Networks to test on, with weights and statistics under which nothing cancels by accident.

Freshly built networks hide defects: a BatchNorm with mean 0, variance 1, weight 1 and bias 0 is the identity, and a layer scale whose
entries are all equal looks the same under any permutation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from tests.support.torchvision_shim import import_torchvision

# Everything else that build() knows is purely convolutional with adaptive pooling and runs at 96 pixels: the last map is then at least
# 2 x 2, so that space and channels cannot be mixed up, and BatchNorm has more than one value per channel in train mode.
SMALL_SIZE: Final = 96
FULL_SIZE: Final = 224
SIZES: Final = {
    "inception_v3": 299,  # the auxiliary classifier needs a 17 x 17 map in train mode
    "vit_b_16": 224,  # one position embedding per patch
    "swin_t": 224,  # windows of 7 that need no padding
    "maxvit_t": 224,  # partitions of 7, fixed when built
}
ARGUMENTS: Final[dict[str, dict[str, Any]]] = {
    "googlenet": {"init_weights": False},  # the default draws from scipy, slowly
    "inception_v3": {"init_weights": False},
}

_NORMS: Final = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # noqa: SLF001 (the only common base)
_FLAT: Final = 1e-3  # entries that spread less than this are as good as equal

MakeInputs = Callable[[int], torch.Tensor]


def build(name: str, *, size: int | None = None, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, MakeInputs]:
    """Builds a network by name, in eval mode, with its default random weights.

    Args:
        name: "torchvision:" and the name of a classification model.
        size: height and width of its input images in pixels; None takes the smallest suitable one (see `SIZES`).
        dtype: of parameters, buffers and inputs.

    Returns:
        The network, and a function from a batch size to input images of that number (always the same ones).

    Raises:
        ValueError: the name is not of that form, or torchvision has no such model.
    """
    source, _, model_name = name.partition(":")
    if source != "torchvision" or not model_name:
        message = f"no network is called {name!r}; names look like 'torchvision:resnet50'"
        raise ValueError(message)
    model: nn.Module = import_torchvision().models.get_model(model_name, weights=None, **ARGUMENTS.get(model_name, {}))
    pixels = size or SIZES.get(model_name, SMALL_SIZE)

    def make_inputs(batch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(batch)
        return torch.randn(batch, 3, pixels, pixels, generator=generator, dtype=torch.float64).to(dtype)

    return model.to(dtype).eval(), make_inputs


def build_randomised(
    name: str, seed: int = 0, *, size: int | None = None, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, MakeInputs]:
    """Builds a network as `build` does, with all weights reproducible from `seed`, randomised and calibrated on four inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, make_inputs = build(name, size=size, dtype=dtype)
    return randomise(model, seed, make_inputs(4)), make_inputs


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

    Weights keep their default initialisation where it is random. Affine parameters of norms, biases and tensors whose entries are all
    (nearly) equal are drawn anew. Running statistics are those of the activations on `inputs`, off by a random factor of 0.7 to 1.3 and
    a random shift of 0.1 standard deviations, so that deep networks neither explode nor vanish; layers that `inputs` do not reach, or
    all where there are none, get statistics near mean 0 and variance 1.

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
    if inputs is not None:
        _calibrate(model, inputs, generator)
    return model


def _normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _uniform(like: torch.Tensor, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return (low + (high - low) * torch.rand(like.shape, generator=generator, dtype=torch.float64)).to(like)


def _randomise_parameter(owner: nn.Module, name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    is_norm = isinstance(owner, _NORMS) or "Norm" in type(owner).__name__
    if is_norm and name == "weight":
        parameter.copy_(_uniform(parameter, 0.5, 1.5, generator))
    elif is_norm:
        parameter.copy_(0.2 * _normal(parameter, generator))
    elif parameter.numel() > 1 and float(parameter.std()) < _FLAT:
        parameter.copy_(_instead_of_constant(name, parameter, generator))


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
