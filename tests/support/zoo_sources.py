"""The three zoos: which networks each lists, and how one of them is built and fed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

Shape = tuple[int, ...]
Draw = Callable[[int, Shape, torch.Generator], object]

SOURCES: Final[Mapping[str, str]] = {
    "torchvision": "tests.support.zoo_torchvision",
    "timm": "tests.support.zoo_timm",
    "transformers": "tests.support.zoo_transformers",
}


@dataclass(frozen=True)
class Blueprint:
    """How to build a network and what to feed it.

    Attributes:
        make: builds the network with its default random weights.
        shapes: shapes of one example, smallest first; the first that the network accepts is taken, the last untried.
        draw: (batch size, shape of one example, generator) -> inputs, in any form that `networks.call` takes.
        draw_training: the same for train mode, where a network wants other inputs there (targets); None for the same.
    """

    make: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]
    draw: Draw
    draw_training: Draw | None = None


def images(batch: int, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """Returns a batch of normal random values, float64."""
    return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)


def names(zoo: str) -> tuple[str, ...]:
    """Returns the full names, "torchvision:resnet50", of the networks that a zoo lists."""
    listed: Callable[[], tuple[str, ...]] = importlib.import_module(SOURCES[zoo]).names
    return tuple(f"{zoo}:{name}" for name in listed())


def blueprint(name: str, size: int | None = None) -> Blueprint:
    """Returns how to build a network.

    Args:
        name: source and name, "timm:resnet50"; the name may be any that the source registers.
        size: height and width of images in pixels; None takes the smallest suitable one.

    Raises:
        ValueError: the name is not of that form, or the source has no such network.
    """
    source, _, network = name.partition(":")
    if source not in SOURCES or not network:
        message = f"no network is called {name!r}; names look like 'torchvision:resnet50', the sources are {', '.join(SOURCES)}"
        raise ValueError(message)
    find: Callable[[str, int | None], Blueprint] = importlib.import_module(SOURCES[source]).blueprint
    return find(network, size)
