"""Training on noise for the networks of `tests.support.handmade`: the same at every call, and enough to move the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def trainer(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Callable[..., Tensor]) -> None:
    """Trains for two steps, on the same images in every epoch."""
    epochs_trainer(model, optimizer, criterion, 1)


def epochs_trainer(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Callable[..., Tensor], epoch: int = 0) -> None:
    """Trains for two steps, on other images in every epoch."""
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(2):
        optimizer.zero_grad()
        images = torch.randn(4, 3, 4, 4, dtype=torch.float64, generator=generator)
        criterion(model(images), torch.randint(5, (4,), generator=generator)).backward()
        optimizer.step()


def score(model: nn.Module) -> float:
    """Returns minus the mean square of the outputs on ones."""
    with torch.no_grad():
        return -float(model(torch.ones(1, 3, 4, 4, dtype=torch.float64)).square().mean())
