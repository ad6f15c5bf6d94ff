"""The demonstration behind ``graphprune demo``: a real network, pruned end to end.

A small residual network learns scikit-learn's handwritten digits, loses half of its channels, and is measured at each step: accuracy
dense, pruned, with BatchNorm statistics estimated again, and after a short fine-tune; parameters, multiply-accumulates (MACs) and
latency in ONNX Runtime. All files go into one folder. Nothing here is special to the library: the network and its training are
written as any user would write them, and the pruning is done by the public calls only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.errors import ConfigError, FileError, InputError

Progress = Callable[[str, int, int], None]
"""Is told (stage, steps done, steps in total)."""

SPLIT_SEED = 0  # the split of the data is the same for every seed of the training
TRAIN_IMAGES = 1200
BATCH = 64
SHIFT = 2  # augmentation moves an image by up to this many of its 32 pixels


@dataclass(frozen=True, eq=False)
class Digits:
    """Images (n, 1, 32, 32), float32 with mean 0 and deviation 1 over the training part, and their labels (n,), int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def head(self, train: int, test: int) -> Digits:
        """Returns the first `train` and `test` images only."""
        return Digits(self.train_images[:train], self.train_labels[:train], self.test_images[:test], self.test_labels[:test])

    def batches(self, size: int = BATCH) -> list[Tensor]:
        """Returns the training images as batches of at most `size`, without labels."""
        return list(self.train_images.split(size))


def load_digits() -> Digits:
    """Returns scikit-learn's 1,797 digits at 32x32, split into 1,200 for training and 597 for testing.

    Raises:
        InputError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets  # an extra, needed by the demonstration alone
    except ImportError as error:
        what = "the demonstration trains on the digits that come with scikit-learn, which is not installed"
        raise InputError(what, "Install it with `pip install graphprune[demo]`") from error
    raw = datasets.load_digits()
    small = torch.from_numpy(raw.images).float().unsqueeze(1)  # (1797, 1, 8, 8), 0 to 16
    images = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, test = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
    images = (images - images[train].mean()) / images[train].std()
    return Digits(images[train], labels[train], images[test], labels[test])


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, inputs, h, w) to (n, outputs, h / stride, w / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualNetwork(nn.Module):
    """The residual network of He et al. (2015) for small images: depth 6n + 2, three stages of n blocks.

    Args:
        depth: number of weight layers on the longest path; 8, 14, 20, ...
        widths: channels of the three stages.
        inputs: channels of the images.
        classes: number of classes.

    Raises:
        ConfigError: `depth` is not 6n + 2.
    """

    def __init__(self, depth: int = 20, widths: tuple[int, int, int] = (16, 32, 64), inputs: int = 1, classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            what = f"a residual network of depth {depth} has no layout, the depth must be 6n + 2"
            raise ConfigError(what, "Choose 8, 14, 20, 26, ...")
        self.conv1 = nn.Conv2d(inputs, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stage1 = self._stage(widths[0], widths[0], blocks, stride=1)
        self.stage2 = self._stage(widths[0], widths[1], blocks, stride=2)
        self.stage3 = self._stage(widths[1], widths[2], blocks, stride=2)
        self.fc = nn.Linear(widths[2], classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        """Returns `blocks` blocks, the first of which changes the shape."""
        first = ResidualBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(ResidualBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (n, inputs, h, w) to logits (n, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.stage3(self.stage2(self.stage1(x)))
        return self.fc(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def build(depth: int, seed: int) -> ResidualNetwork:
    """Returns a fresh network whose weights depend on `seed` alone; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ResidualNetwork(depth)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Returns each image moved by its own random whole number of pixels, at most `SHIFT` in each direction; edges are repeated."""
    count, _, height, width = images.shape
    padded = F.pad(images, (SHIFT, SHIFT, SHIFT, SHIFT), mode="replicate")
    dy, dx = torch.randint(2 * SHIFT + 1, (2, count, 1), generator=generator)
    rows = (dy + torch.arange(height))[:, None, :, None]
    columns = (dx + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(count)[:, None, None, None], torch.arange(images.shape[1])[None, :, None, None], rows, columns]


def train(
    model: nn.Module, data: Digits, *, epochs: int, lr: float, seed: int, progress: Progress | None = None, stage: str = "train"
) -> list[float]:
    """Trains `model` in place with SGD, a one-cycle learning rate and random shifts.

    Args:
        model: maps images to logits.
        data: only the training part is used.
        epochs: passes over the training images; 0 leaves the model as it is.
        lr: the highest learning rate of the cycle.
        seed: of the order of the images and of their shifts.
        progress: told the number of batches done and in total.
        stage: the name that `progress` is told.

    Returns:
        The mean loss of each epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(data.train_images)
    per_epoch = -(-count // BATCH)
    if not epochs:
        return []
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * per_epoch)
    model.train()
    losses = []
    for epoch in range(epochs):
        total = 0.0
        for batch, chosen in enumerate(torch.randperm(count, generator=generator).split(BATCH), start=1):
            logits = model(shifted(data.train_images[chosen], generator))
            loss = F.cross_entropy(logits, data.train_labels[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item() * len(chosen)
            if progress:
                progress(stage, epoch * per_epoch + batch, epochs * per_epoch)
        losses.append(total / count)
    model.eval()
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Returns the fraction of test images that `model` in evaluation mode classifies correctly."""
    was_training = model.training
    model.eval()
    predicted = torch.cat([model(images).argmax(1) for images in data.test_images.split(256)])
    model.train(was_training)
    return (predicted == data.test_labels).float().mean().item()
