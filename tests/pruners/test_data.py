"""Pruners that look at data: loaders and trainers show the same, batches are counted, and what no batch reaches stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graphprune as gp
from tests.support.networks import randomise

PRUNERS = (gp.ActivationAPoZRankPruner, gp.ActivationMeanRankPruner, gp.TaylorFOWeightPruner)
HALF = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]


class Network(nn.Module):
    """Convolution, norm and rectifier twice, the second with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, 3, h, w) to (n, 4)."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn2(self.conv2(x)))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


@pytest.fixture
def model() -> nn.Module:
    """A network with statistics of its own."""
    torch.manual_seed(3)
    network = Network()
    randomise(network, 3)
    return network


def batches(count: int = 3, size: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Returns random images and labels."""
    generator = torch.Generator().manual_seed(7)
    return [(torch.randn(size, 3, 6, 6, generator=generator), torch.arange(size) % 4) for _ in range(count)]


def trainer(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
    """One epoch, as users write it."""
    model.train()
    for images, labels in batches():
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", PRUNERS)
def test_a_trainer_shows_what_its_data_shows(kind: Any, model: nn.Module) -> None:
    """Masks and scores are the same from trainer(model, optimizer, criterion) as from its batches and loss; the model stays as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    watched = kind(model, HALF, trainer, optimizer, functional.cross_entropy)
    shown = kind(model, HALF, data=batches(), loss=functional.cross_entropy)
    for name, scores in shown.scores().items():
        np.testing.assert_allclose(watched.scores()[name], scores, rtol=1e-5)
        assert scores.std() > 0
    assert all(np.array_equal(watched.masks()[n], m) for n, m in shown.masks().items())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", PRUNERS)
def test_as_many_batches_are_looked_at_as_asked(kind: Any, model: nn.Module) -> None:
    """training_batches=1 scores by the first batch alone."""
    one = kind(model, HALF, data=batches(), loss=functional.cross_entropy, training_batches=1).scores()
    first = kind(model, HALF, data=batches()[:1], loss=functional.cross_entropy).scores()
    every = kind(model, HALF, data=batches(), loss=functional.cross_entropy).scores()
    for name, scores in one.items():
        np.testing.assert_array_equal(scores, first[name])
        assert not np.allclose(scores, every[name])


@pytest.mark.parametrize("kind", PRUNERS[:2])
def test_a_batch_of_another_size_weighs_by_its_samples(kind: Any, model: nn.Module) -> None:
    """Activations are averaged over samples, not over batches: splitting a batch unevenly changes nothing."""
    (images, labels), *_ = batches(1, 9)
    parts = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    whole = kind(model, HALF, data=[(images, labels)]).scores()
    for name, scores in kind(model, HALF, data=parts).scores().items():
        np.testing.assert_allclose(scores, whole[name], rtol=1e-6)


@pytest.mark.parametrize("kind", PRUNERS)
def test_the_masks_make_a_smaller_model(kind: Any, model: nn.Module) -> None:
    """compress() gives a pair that speedup verifies, with an effect."""
    pruner = kind(model, HALF, data=batches(), loss=functional.cross_entropy)
    _, masks = pruner.compress()
    small, report = gp.speedup(model, masks, plan=pruner.plan)
    assert report.error < 1e-5
    assert report.effect > 1e-2
    assert {g.name: g.kept for g in report.groups} == {"conv1": 4}
    assert small(batches()[0][0]).shape == (5, 4)
    asked = {layer.name: layer.requested for layer in report.layers if layer.requested is not None}
    assert asked == {"conv1": 0.5, "conv2": 0.5}


def test_an_iterator_would_lose_its_first_batch(model: nn.Module) -> None:
    """Data that can be gone through once needs example inputs; with them, all of it counts."""
    with pytest.raises(gp.ConfigError, match=r"only once.*example_inputs"):
        gp.ActivationAPoZRankPruner(model, HALF, data=iter(batches()))
    once = gp.ActivationAPoZRankPruner(model, HALF, data=iter(batches()), example_inputs=batches()[0][0]).scores()
    for name, scores in gp.ActivationAPoZRankPruner(model, HALF, data=batches()).scores().items():
        np.testing.assert_array_equal(scores, once[name])


class Chosen(nn.Module):
    """A layer that only positive rows reach."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.rare, self.end = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, 4) to (n, 2)."""
        h = torch.relu(self.first(x))
        rows = torch.nonzero(x[:, 0] > 0)[:, 0]
        more: Tensor = self.end(torch.relu(self.rare(h[rows])))
        out: Tensor = self.last(h)
        return out.index_add(0, rows, more)


def test_what_no_batch_reaches_stays_whole() -> None:
    """A layer that the data never runs has no activations to judge by; the report says why it stays."""
    torch.manual_seed(0)
    model, x = Chosen(), torch.ones(3, 4)
    entries = [{"sparsity": 0.5, "op_types": ["Linear"]}]
    pruner = gp.ActivationMeanRankPruner(model, entries, example_inputs=x, data=[-torch.rand(4, 4) for _ in range(2)])
    scores = pruner.scores()
    masks = pruner.masks()
    assert set(scores) == {"first"}
    assert masks["rare"].all()
    assert not masks["first"].all()
    assert pruner.plan.notes["rare"] == "no activation of its channels was seen"
    everywhere = gp.ActivationMeanRankPruner(model, entries, example_inputs=x, data=[torch.rand(4, 4)])
    assert set(everywhere.scores()) == {g.name for g in pruner.graph.groups}


@pytest.mark.parametrize("kind", PRUNERS)
def test_nothing_to_look_at_is_one_error(kind: Any, model: nn.Module) -> None:
    """Without data and without a trainer the error says what to pass."""
    with pytest.raises(gp.ConfigError, match=f"{kind.__name__} looks at data.*data=.*trainer="):
        kind(model, HALF)
