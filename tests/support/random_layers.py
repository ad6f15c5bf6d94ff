"""The parts of random networks: a module whose forward is a function, activations, norms, and ways to write the same thing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import nn
from torch.nn import functional

Shape: TypeAlias = tuple[int, ...]  # without the batch: (C, H, W) of images, (L, C) of tokens, (C,) of vectors

ACTIVATIONS = ("relu", "silu", "gelu", "tanh", "sigmoid", "leaky", "hardswish", "softplus", "prelu", "relu_", "elu_", "silu_", "none")
NORMS = ("none", "batch", "layer", "group", "instance", "rms", "plain")


class Described(Protocol):
    """A description of a block: a frozen dataclass that builds a module for inputs of a shape."""

    def build(self, shape: Shape) -> nn.Module:
        """Returns the module."""


class Layer(nn.Module):
    """Modules, parameters and numbers by keyword; the forward pass is a function of the layer and its inputs."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        """Sets every part as an attribute, descriptions as copies: like configurations, they change when a model is shrunk in place."""
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, copy.copy(part) if is_dataclass(part) else part)

    def forward(self, *inputs: Any) -> Any:
        """Runs the function."""
        return self.run(self, *inputs)


@torch.no_grad()
def shape_after(module: nn.Module, shape: Shape) -> Shape:
    """Returns the shape that a module makes of a shape, found by running it in eval mode."""
    training = module.training
    found: torch.Tensor = module.eval()(torch.zeros(2, *shape, dtype=next((p.dtype for p in module.parameters()), torch.float32)))
    module.train(training)
    return tuple(found.shape[1:])


def chain(blocks: Sequence[Described], shape: Shape) -> tuple[nn.Sequential, Shape]:
    """Returns the blocks built one on another, and the shape that they end with."""
    built = nn.Sequential()
    for block in blocks:
        module = block.build(shape)
        built.append(module)
        shape = shape_after(module, shape)
    return built, shape


def conv(inputs: int, outputs: int, size: int = 1, **options: Any) -> nn.Conv2d:
    """Returns a convolution that keeps the height and the width."""
    return nn.Conv2d(inputs, outputs, size, **{"padding": size // 2, **options})


def table(*shape: int) -> nn.Parameter:
    """Returns a parameter of normal values around 1."""
    return nn.Parameter(1 + torch.randn(shape) / 2)


def weight(*shape: int) -> nn.Parameter:
    """Returns a parameter that maps its last dimensions to its first one."""
    return nn.Parameter(torch.randn(shape) / math.sqrt(math.prod(shape[1:])))


def activation(kind: str, width: int) -> nn.Module:
    """Returns an activation; those that end in an underscore work in place."""
    made: dict[str, Callable[[], nn.Module]] = {
        "none": nn.Identity,
        "relu": nn.ReLU,
        "silu": nn.SiLU,
        "gelu": nn.GELU,
        "tanh": nn.Tanh,
        "sigmoid": nn.Sigmoid,
        "softplus": nn.Softplus,
        "hardswish": nn.Hardswish,
        "leaky": lambda: nn.LeakyReLU(0.2),
        "prelu": lambda: nn.PReLU(width),
        "relu_": lambda: nn.ReLU(inplace=True),
        "elu_": lambda: nn.ELU(inplace=True),
        "silu_": lambda: Layer(lambda _, x: x.mul_(torch.sigmoid(x))),
    }
    return made[kind]()


def token_activation(kind: str) -> nn.Module:
    """Returns an activation for channels in the last dimension (a PReLU with one slope for all)."""
    return nn.PReLU() if kind == "prelu" else activation(kind, 1)


def image_norm(kind: str, width: int) -> nn.Module:
    """Returns a norm for (B, C, H, W); GroupNorm takes the smallest number of groups above one that divides the width."""
    groups = next((n for n in range(2, width + 1) if width % n == 0), 1)
    made: dict[str, Callable[[], nn.Module]] = {
        "none": nn.Identity,
        "batch": lambda: nn.BatchNorm2d(width),
        "instance": lambda: nn.InstanceNorm2d(width, affine=True),
        "plain": lambda: nn.BatchNorm2d(width, affine=False),
        "group": lambda: nn.GroupNorm(groups if groups < width else 1, width),
        "layer": lambda: Layer(_channels_last, norm=nn.LayerNorm(width)),
        "rms": lambda: Layer(_channels_last, norm=nn.RMSNorm(width)),
    }
    return made[kind]()


def _channels_last(m: Any, x: torch.Tensor) -> Any:
    return m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def token_norm(kind: str, width: int) -> nn.Module:
    """Returns a norm for (B, L, C)."""
    made: dict[str, Callable[[], nn.Module]] = {
        "none": nn.Identity,
        "layer": lambda: nn.LayerNorm(width),
        "rms": lambda: nn.RMSNorm(width),
        "plain": lambda: nn.LayerNorm(width, bias=False),
        "batch": lambda: Layer(_middle, norm=nn.BatchNorm1d(width)),
        "group": lambda: Layer(_middle, norm=nn.GroupNorm(1, width)),
        "instance": lambda: Layer(_middle, norm=nn.InstanceNorm1d(width, affine=True)),
    }
    return made[kind]()


def _middle(m: Any, x: torch.Tensor) -> Any:
    return m.norm(x.transpose(1, 2)).transpose(1, 2)


def resized(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Returns images of that height and width."""
    return x if x.shape[2:] == (height, width) else functional.adaptive_avg_pool2d(x, (height, width))
