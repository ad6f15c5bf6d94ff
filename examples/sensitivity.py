"""How much each group of channels matters, and a pruner that goes by it, against one that takes the same share of every group.

python examples/sensitivity.py [--out DIR]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

import graphprune as gp
from graphprune.search.evaluators import DataEvaluator

LAYERS = [{"op_types": ["Conv2d"]}]  # with a budget, a config list says only where


class Network(nn.Module):
    """Three convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 64, 3, padding=1)
        self.fc = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, 1, h, w) to (n, 4)."""
        for layer in (self.first, self.second, self.third):
            x = functional.relu(layer(x))
        return self.fc(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def batches(seed: int, count: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Returns images of bars in one of four directions, with noise, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        labels = torch.randint(4, (32,), generator=generator)
        images = 0.7 * torch.randn(32, 1, 12, 12, generator=generator)
        for image, label in zip(images, labels.tolist(), strict=True):
            line = torch.arange(12)
            rows, columns = [(line, line * 0 + 6), (line * 0 + 6, line), (line, line), (line, 11 - line)][label]
            image[0, rows, columns] += 2.0
        out.append((images, labels))
    return out


def train(model: nn.Module, epochs: int = 1, rate: float = 2e-3) -> None:
    """Trains a model in place, as any user would."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    model.train()
    for _ in range(epochs):
        for images, labels in batches(seed=0):
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()


def main() -> None:
    """Trains a network, measures its groups, and prunes it by what was measured and evenly."""
    parser = argparse.ArgumentParser(description="sensitivity analysis and the pruner that goes by it")
    parser.add_argument("--out", type=Path, help="folder for the results; a temporary one by default")
    given: Path | None = parser.parse_args().out
    out = given or Path(tempfile.mkdtemp(prefix="graphprune-"))
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, example = Network(), batches(seed=0)[0][0][:1]
    train(model, epochs=15)
    accuracy = DataEvaluator(batches(seed=1))
    minus_loss = DataEvaluator(batches(seed=1), "loss", functional.cross_entropy)
    print(f"trained: {accuracy(model):.1%}, loss {-minus_loss(model):.3f}")

    found = gp.sensitivity(model, example, minus_loss, config_list=LAYERS, early_stop=1.0, folder=out / "scores")
    Console(width=120).print(found)
    print(f"with a loss at most 0.05 higher: { {name: f'{share:.0%}' for name, share in found.admissible(0.05).items()} }")
    again = gp.sensitivity(model, example, minus_loss, config_list=LAYERS, early_stop=1.0, folder=out / "scores")
    print(f"evaluations: {found.evaluations}, and {again.evaluations} the second time")
    found.to_csv(out / "curves.csv")
    found.plot(out / "curves.png")

    budget = gp.Budget(macs=0.6)
    pruner = gp.SensitivityPruner(model, LAYERS, minus_loss, acc_drop_threshold=1.0, example_inputs=example, budget=budget)
    masked, masks = pruner.compress()  # a finetuner, a function that trains a model, would be called after every round
    for taken in pruner.history:
        gone = ", ".join(f"{name} {share:.0%}" for name, share in taken.sparsities.items())
        print(f"round {taken.number}: {taken.removed:.1%} of the MACs gone ({gone}), loss {-taken.score:.3f}")
    small, _ = gp.speedup(masked, masks)
    even, _ = gp.prune(model, example, config_list=LAYERS, budget=budget)
    for name, pruned in {"by sensitivity": small, "uniform": even}.items():
        left, before = gp.count(pruned, example).macs / gp.count(model, example).macs, -minus_loss(pruned)
        train(pruned, epochs=12)
        print(f"{name}: {left:.1%} of the MACs left, loss {before:.3f}, trained {-minus_loss(pruned):.3f}, {accuracy(pruned):.1%} right")
    gp.save(small, out / "small.safetensors")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
