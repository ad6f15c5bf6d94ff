"""Every one-shot pruner on one trained network: what each leaves of its size and of its accuracy. Criteria at half of the MACs.

python examples/pruners.py [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import graphprune as gp

EVERYWHERE = [{"sparsity": 0.3, "op_types": ["Conv2d"]}]
NORMS = [{"total_sparsity": 0.3, "op_types": ["BatchNorm2d"]}]


class Network(nn.Module):
    """Two convolutions with a shortcut, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, 1, h, w) to (n, 4)."""
        y = functional.relu(self.bn1(self.stem(x)))
        y = functional.relu(y + self.bn2(self.inner(y)))
        return self.fc(y.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def batches(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Returns images of bars in one of four directions, with noise, and their labels."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(count):
        labels = torch.randint(4, (32,), generator=generator)
        images = 0.5 * torch.randn(32, 1, 12, 12, generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            line = torch.arange(12)
            rows, columns = [(line, line * 0 + 6), (line * 0 + 6, line), (line, line), (line, 11 - line)][label]
            image[0, rows, columns] += 2.0
        out.append((images, labels))
    return out


def trainer(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
    """One epoch, as any user would write it, and as the pruners that train or watch a training are given it."""
    model.train()
    for images, labels in batches():
        optimizer.zero_grad()
        criterion(model(images), labels).backward()
        optimizer.step()


def accuracy(model: nn.Module) -> float:
    """Returns the share of labels that are right."""
    model.eval()
    with torch.no_grad():
        right = [int((model(images).argmax(1) == labels).sum()) for images, labels in batches()]
    return sum(right) / sum(len(labels) for _, labels in batches())


def pruners(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    """Yields one pruner after the other; each leaves model and optimizer as they are."""
    x, loss = batches(1)[0][0], functional.cross_entropy
    training = (trainer, optimizer, loss)
    yield gp.L1NormPruner(model, EVERYWHERE, example_inputs=x)
    yield gp.L2NormPruner(model, EVERYWHERE, example_inputs=x)
    yield gp.FPGMPruner(model, EVERYWHERE, example_inputs=x)
    yield gp.ActivationAPoZRankPruner(model, EVERYWHERE, *training, training_batches=4)
    yield gp.ActivationMeanRankPruner(model, EVERYWHERE, data=batches())
    yield gp.TaylorFOWeightPruner(model, EVERYWHERE, data=batches(), loss=loss)
    yield gp.SlimPruner(model, NORMS, *training, training_epochs=2, scale=1e-2)
    yield gp.ADMMPruner(model, EVERYWHERE, *training, iterations=3, training_epochs=1, granularity="coarse-grained", example_inputs=x)
    yield gp.LevelPruner(model, [{"sparsity": 0.8, "op_types": ["default"]}])


def main() -> None:
    """Trains a network, then lets every pruner loose on it."""
    parser = argparse.ArgumentParser(description="every one-shot pruner")
    parser.add_argument("--out", type=Path, help="folder for the summary; a temporary one by default")
    given: Path | None = parser.parse_args().out
    out = given or Path(tempfile.mkdtemp(prefix="graphprune-"))
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        trainer(model, optimizer, functional.cross_entropy)
    print(f"trained: {accuracy(model):.1%}")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    summary: dict[str, float] = {}
    for pruner in pruners(model, optimizer):
        masked, masks = pruner.compress()
        line = f"{type(pruner).__name__}: sparsity {masks.sparsity:.1%}, accuracy {accuracy(masked):.1%}"
        if isinstance(masks, gp.Masks):  # masks of channels make a smaller model, those of single weights only zeros
            small, report = gp.speedup(pruner.model, masks)
            recalibrated = accuracy(gp.recalibrate(small, (images for images, _ in batches())))
            left = gp.count(small, batches(1)[0][0]).macs / gp.count(model, batches(1)[0][0]).macs
            line += f", {left:.1%} of the MACs left, recalibrated {recalibrated:.1%}, error {report.error:.0e}"
        print(line)
        summary[type(pruner).__name__] = accuracy(masked)
    same = all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    print(f"the trained model is as it was: {same}")

    x, _ = batches(1)[0]
    for name in ("l1", "lamp", "taylor", "hessian", "wanda"):
        options: dict[str, Any] = {"criterion": name, "data": batches(), "loss": functional.cross_entropy}
        small, report = gp.prune(model, x, budget=gp.Budget(macs=0.5), mode="global", **options)
        summary[name] = accuracy(gp.recalibrate(small, (images for images, _ in batches())))
        left = gp.count(small, x).macs / gp.count(model, x).macs
        print(f"{name}: {report.budget} asked, {1 - left:.1%} gone; {summary[name]:.1%} recalibrated")
    (out / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
