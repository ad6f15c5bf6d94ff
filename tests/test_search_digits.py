"""Searches on a network that has learned digits, against a dense grid: as good at the same budget, and better than uniform sparsity."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp

pytestmark = pytest.mark.slow
TRAINING = 1200
HALF = gp.Budget(macs=0.5)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Returns shuffled images (1797, 1, 8, 8) and labels."""
    raw = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(0))
    return (torch.from_numpy(raw.images).float().unsqueeze(1) / 8 - 1)[order], torch.from_numpy(raw.target)[order]


def trained(seed: int) -> nn.Module:
    """Returns a network of three convolutions that has learned the training part."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((1, 8, 1), (8, 16, 2), (16, 16, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(8):
        for batch in torch.randperm(TRAINING, generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Returns the share of the other images that are classified correctly."""
    images, labels = digits()
    return float((model(images[TRAINING:]).argmax(1) == labels[TRAINING:]).float().mean())


def recalibrated(model: nn.Module) -> None:
    """Estimates the statistics of BatchNorm again."""
    gp.recalibrate(model, list(digits()[0][:512].split(256)))


@pytest.mark.parametrize("seed", range(3))
def test_searches_are_within_a_point_of_a_dense_grid(seed: int) -> None:
    """At half of the MACs, annealing and TPE come within one point of accuracy of the best of a grid, and above uniform sparsity."""
    model, example = trained(seed), digits()[0][:1]
    target = gp.Objective(model, example, accuracy, budget=HALF, finetune=recalibrated)
    shares = itertools.product(np.linspace(0.0, 0.9, 10), repeat=len(target.groups))
    points = {tuple(target.project(dict(zip(target.groups, wish, strict=True))).items()) for wish in shares}
    best = max(target(dict(point)).score for point in points)
    uniform = target(target.project(dict.fromkeys(target.groups, 0.5))).score
    annealing = gp.SimulatedAnnealingPruner(
        model, [{"op_types": ["Conv2d"]}], accuracy, example_inputs=example, budget=HALF, finetune=recalibrated, trials=80, seed=seed
    )
    found = {"annealing": annealing.best.score, "tpe": gp.run_study(target, 60, seed=seed).best.score}
    assert len(points) > 60
    for name, score in found.items():
        assert score >= best - 0.01, f"{name}: {score:.3f}, the grid's best is {best:.3f}"
        assert score > uniform, f"{name}: {score:.3f}, uniform sparsity has {uniform:.3f}"
