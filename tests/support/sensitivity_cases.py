"""A network, evaluators and trainers for the tests of sensitivity, at the top level so that other processes can be sent them."""

from __future__ import annotations

import os
import signal
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphprune as gp

WIDTHS = {"a": 10, "b": 8, "c": 6}


class Chain(nn.Module):
    """Four linear layers; the channels of a, b and c can go, and differ in how much they weigh."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        sizes, scales = [4, *WIDTHS.values(), 3], (1.0, 0.1, 0.5, 1.0)
        layers = [nn.Linear(fan_in, fan_out, bias=False) for fan_in, fan_out in pairwise(sizes)]
        for layer, scale in zip(layers, scales, strict=True):
            layer.weight = nn.Parameter(scale * torch.randn(layer.weight.shape, generator=generator))
        self.a, self.b, self.c, self.d = layers

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, 4) to (n, 3)."""
        return self.d(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))))  # type: ignore[no-any-return]


def uneven(seed: int) -> nn.Module:
    """Returns a network of four layers in which 9, 30 and 15 of the 40 channels of a, b and c weigh next to nothing."""
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, nn.Module] = {}
    light = torch.zeros(4, dtype=torch.bool)  # of the channels that the next layer reads
    for name, fan_out, count in (("a", 40, 9), ("b", 40, 30), ("c", 40, 15), ("d", 3, 0)):
        layer = nn.Linear(len(light), fan_out, bias=False)
        weight = torch.randn(fan_out, len(light), generator=generator)
        weight[:, light] *= 0.01
        light = torch.zeros(fan_out, dtype=torch.bool)
        light[torch.randperm(fan_out, generator=generator)[:count]] = True
        weight[light] *= 0.01
        layer.weight = nn.Parameter(weight)
        layers |= {name: layer, f"relu_{name}": nn.ReLU()}
    return nn.Sequential(OrderedDict(layers))


INPUTS = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


@dataclass
class Mass:
    """Scores a network by minus the sum over the layers of the squared L1 mass that is gone from each; counts its calls.

    Attributes:
        full: layer -> its mass in the whole network.
        calls: how often it was called.
        deadline: after so many calls, the next one kills the process.
    """

    full: dict[str, float] = field(default_factory=lambda: masses(Chain()))
    calls: int = 0
    deadline: int | None = None

    def __call__(self, model: nn.Module) -> float:
        """Returns the score."""
        if self.calls == self.deadline:
            os.kill(os.getpid(), signal.SIGKILL)
        self.calls += 1
        return -sum((self.full[name] - mass) ** 2 for name, mass in masses(model).items())


@dataclass
class Training:
    """Trains a network for three steps with noise on all gradients, which brings back what is not held at zero.

    Attributes:
        calls: how often it was called.
        deadline: after so many calls, the next one kills the process in the middle of its work.
    """

    calls: int = 0
    deadline: int | None = None

    def __call__(self, model: nn.Module) -> None:
        """Trains it in place, on random numbers from the global generator."""
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
        for step in range(3):
            if self.calls == self.deadline and step == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.zero_grad()
            (model(torch.randn(8, 4)) - 1.0).square().mean().backward()
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter) + (0.0 if parameter.grad is None else parameter.grad)
            optimizer.step()
        self.calls += 1


def masses(model: nn.Module) -> dict[str, float]:
    """Returns layer -> the sum of its absolute weights, in double precision."""
    weights = {name.partition(".")[0]: weight for name, weight in model.named_parameters()}
    return {name: float(weight.detach().double().abs().sum()) for name, weight in weights.items()}


def pruner(folder: Path | None, deadline: int | None = None) -> gp.SensitivityPruner:
    """Returns a pruner that trains between its rounds."""
    torch.manual_seed(5)
    training = Training(deadline=deadline)
    options: dict[str, Any] = {"acc_drop_threshold": 100.0, "example_inputs": INPUTS, "sparsities": (0.2, 0.5, 0.8)}
    return gp.SensitivityPruner(Chain(), [{"sparsity": 0.5, "op_types": ["Linear"]}], Mass(), training, folder=folder, **options)


def interrupted(kind: str, folder: str, limit: int) -> None:
    """Starts an analysis or a pruner that kills its process after so many evaluations or trainings."""
    if kind == "analysis":
        gp.sensitivity(Chain(), INPUTS, Mass(deadline=limit), folder=folder)
    else:
        pruner(Path(folder), limit).compress()
