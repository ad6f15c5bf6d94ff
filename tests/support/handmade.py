"""A residual network with its dependency graph written by hand, and shrunk by hand: what the oracles are tested on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from tests.support.networks import randomise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Slice:
    """A slice by hand."""

    parameter: str
    dim: int
    index: NDArray[np.int64]


@dataclass(frozen=True)
class Group:
    """A group by hand."""

    name: str
    channels: int
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Frozen:
    """Frozen positions by hand."""

    parameter: str
    dim: int
    index: NDArray[np.int64]


@dataclass(frozen=True)
class Graph:
    """A dependency graph by hand."""

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...] = ()


class Residual(nn.Module):
    """Three convolutions, a residual sum and a classifier on the flattened 4 x 4 map."""

    def __init__(self, wide: int = 6, narrow: int = 4) -> None:
        """Builds the layers: `wide` channels on the residual stream, `narrow` inside the block."""
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, wide, 3, padding=1), nn.BatchNorm2d(wide)
        self.inner, self.inner_norm = nn.Conv2d(wide, narrow, 3, padding=1, bias=False), nn.BatchNorm2d(narrow)
        self.outer, self.outer_norm = nn.Conv2d(narrow, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide)
        self.head = nn.Linear(wide * 16, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns five logits per image (3 x 4 x 4)."""
        x = functional.relu(self.stem_norm(self.stem(images)))
        y = functional.relu(self.inner_norm(self.inner(x)))
        logits: torch.Tensor = self.head((functional.silu(self.outer_norm(self.outer(y))) + x).flatten(1))
        return logits


def norm_slices(name: str, index: NDArray[np.int64]) -> list[Slice]:
    """Returns the four slices of a BatchNorm."""
    return [Slice(f"{name}.{tensor}", 0, index) for tensor in ("weight", "bias", "running_mean", "running_var")]


def residual_graph(wide: int = 6, narrow: int = 4) -> Graph:
    """Returns the right graph of `Residual`: one group of the stream, one of the block, and the frozen ends."""
    stream, block = np.arange(wide)[:, None], np.arange(narrow)[:, None]
    stream_slices = [Slice("stem.weight", 0, stream), Slice("stem.bias", 0, stream), *norm_slices("stem_norm", stream)]
    stream_slices += [Slice("inner.weight", 1, stream), Slice("outer.weight", 0, stream), *norm_slices("outer_norm", stream)]
    stream_slices += [Slice("head.weight", 1, np.arange(wide * 16).reshape(wide, 16))]
    block_slices = [Slice("inner.weight", 0, block), *norm_slices("inner_norm", block), Slice("outer.weight", 1, block)]
    ends = [("stem.weight", 1, 3), ("head.weight", 0, 5), ("head.bias", 0, 5)]
    kernels = [(f"{name}.weight", dim, 3) for name in ("stem", "inner", "outer") for dim in (2, 3)]
    return Graph(
        (Group("stem", wide, tuple(stream_slices)), Group("inner", narrow, tuple(block_slices))),
        tuple(Frozen(name, dim, np.arange(size)) for name, dim, size in ends + kernels),
    )


def residual(seed: int = 0) -> tuple[Residual, torch.Tensor]:
    """Returns a randomised `Residual` in float64 and a batch of two."""
    torch.manual_seed(seed)
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    model = Residual().double().eval()
    randomise(model, seed, images)
    return model, images


def without_slice(graph: Graph, group: int, number: int) -> Graph:
    """Returns the graph with one slice of one group left out."""
    kept = tuple(piece for position, piece in enumerate(graph.groups[group].slices) if position != number)
    broken = replace(graph.groups[group], slices=kept)
    return replace(graph, groups=tuple(broken if position == group else g for position, g in enumerate(graph.groups)))


def shrink_by_hand(model: Residual, stream: Sequence[int], block: Sequence[int]) -> Residual:
    """Returns a `Residual` with only the given channels, built from its parts."""
    with torch.random.fork_rng(devices=[]):
        small = Residual(len(stream), len(block)).double().eval()
    columns = [channel * 16 + pixel for channel in stream for pixel in range(16)]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("stem_norm", "outer_norm", "inner_norm"):
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{tensor}"] = state[f"{name}.{tensor}"][list(block if name == "inner_norm" else stream)]
    state["stem.weight"], state["stem.bias"] = state["stem.weight"][stream], state["stem.bias"][stream]
    state["inner.weight"] = state["inner.weight"][block][:, stream]
    state["outer.weight"] = state["outer.weight"][stream][:, block]
    state["head.weight"] = state["head.weight"][:, columns]
    small.load_state_dict(state)
    return small
