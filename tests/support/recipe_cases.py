"""The networks and inputs that the tests of recipes share: one per kind of result, and one with tied tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from graphprune import prune
from tests.support.networks import call, randomise
from tests.support.outputs import flatten_outputs


class Residual(nn.Module):
    """A small residual network with a grouped and a depthwise convolution, and a buffer that the state dict leaves out."""

    def __init__(self, width: int = 16) -> None:
        """Builds the layers."""
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.grouped = nn.Conv2d(width, width, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.expand, self.outer = nn.Conv2d(width, 12, 1), nn.Conv2d(12, width, 1)
        self.head = nn.Linear(width, 5)
        self.ramp: torch.Tensor
        self.register_buffer("ramp", torch.linspace(0.5, 1.5, 12).reshape(1, 12, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns class scores."""
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.outer(torch.relu(self.expand(x)) * self.ramp)
        x = x + torch.relu(self.depthwise(torch.relu(self.grouped(x))))
        scores: torch.Tensor = self.head(x.mean((2, 3)))
        return scores


class Shuffled(nn.Module):
    """Literal sizes in the forward: a channel shuffle, a split and an index table, so that the shrunk model is a GraphModule."""

    def __init__(self) -> None:
        """Builds the layers."""
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.third, self.inner = nn.Conv2d(16, 16, 3, groups=4), nn.Conv2d(16, 12, 1), nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns class scores."""
        x = torch.relu(self.norm(self.first(x)))
        x = x.reshape(-1, 4, 4, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        one, two = torch.relu(self.third(torch.relu(self.second(x)))).split(6, 1)
        x = torch.cat([torch.relu(self.inner(one)), two[:, [5, 4, 3, 2, 1, 0]]], 1)
        scores: torch.Tensor = self.head(x.mean((2, 3)))
        return scores


class Tied(nn.Module):
    """A language model in small: embedding and output layer are one tensor, LayerNorm and RMSNorm between."""

    def __init__(self) -> None:
        """Builds the layers."""
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 16), nn.LayerNorm(16)
        self.up, self.inner, self.down = nn.Linear(16, 24), nn.RMSNorm(24), nn.Linear(24, 16)
        self.output = nn.Linear(16, 11, bias=False)
        self.output.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, *, scale: float = 1.0) -> dict[str, torch.Tensor]:
        """Returns scores per token."""
        x = self.embed(tokens)
        x = x + self.down(self.inner(torch.relu(self.up(self.norm(x)))))
        return {"scores": self.output(x) * scale}


IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.arange(10).reshape(2, 5)
CASES: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "residual": (Residual, IMAGES, "module"),
    "shuffled": (Shuffled, IMAGES, "graph"),
    "tied": (Tied, ((TOKENS,), {"scale": 2.0}), "module"),
}
every_case = pytest.mark.parametrize("case", CASES)


def built(case: str, seed: int) -> nn.Module:
    """Returns a network in eval mode whose weights and statistics depend on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CASES[case][0]()
    return randomise(model, seed).eval()


def shrunk(case: str, seed: int = 0, sparsity: float = 0.5) -> nn.Module:
    """Returns a network without half of its channels, after checking that it is of the kind that the case is about."""
    small, report = prune(built(case, seed), CASES[case][1], sparsity)
    assert report.kind == CASES[case][2]
    return small


def outputs(model: nn.Module, case: str) -> list[torch.Tensor]:
    """Returns a model's outputs."""
    with torch.no_grad():
        return flatten_outputs(call(model, CASES[case][1]))


def metadata_of(path: Path) -> dict[str, str]:
    """Returns the metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())
