"""Pruning little by little: AGP inside a training loop of one's own, a lottery ticket, and movement pruning, on digits.

python examples/schedules.py [--out DIR]

Needs scikit-learn for its images, which come with it: pip install graphprune[demo].
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.cli import demo

EPOCHS = 6
CONVOLUTIONS = {"op_types": ["Conv2d"]}


def trainer_of(data: demo.Digits) -> Callable[..., None]:
    """Returns one epoch of training as any user would write it, in the shape that the pruners which train are given."""
    generator = torch.Generator().manual_seed(0)

    def trainer(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
        model.train()
        for chosen in torch.randperm(len(data.train_images), generator=generator).split(demo.BATCH):
            optimizer.zero_grad()
            criterion(model(data.train_images[chosen]), data.train_labels[chosen]).backward()
            optimizer.step()

    return trainer


def momentum(model: nn.Module, rate: float = 0.05) -> torch.optim.Optimizer:
    """Returns an optimizer that remembers more than the weights."""
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)


def gradually(model: nn.Module, data: demo.Digits, out: Path) -> None:
    """AGP in a loop of one's own: masks grow while the model trains, then they go for good, and training goes on with its momentum."""
    trainer, x = trainer_of(data), data.test_images[:1]
    schedule = {"initial_sparsity": 0.0, "final_sparsity": 0.5, "start_epoch": 0, "end_epoch": EPOCHS - 1, "frequency": 1}
    pruner = gp.AGPPruner(model, [{**schedule, **CONVOLUTIONS}], "l1", example_inputs=x)
    growing = pruner.begin()
    optimizer = momentum(growing)
    for epoch in range(EPOCHS):
        pruner.update_epoch(epoch)
        trainer(growing, optimizer, F.cross_entropy)
        print(f"AGP, epoch {epoch}: {pruner.masks().sparsity:.1%} of the channels masked, {demo.accuracy(growing, data):.1%} right")
    masked, masks = pruner.finish()
    assert isinstance(masks, gp.Masks)  # noqa: S101 (for the type checker: "level" would give masks of single weights)

    small, report = gp.speedup(masked, masks)
    gp.slice_optimizer(optimizer, masked, small, masks)  # its momentum is cut like the weights: training goes on, it does not begin again
    sizes = [sum(t.numel() for t in found.parameters()) for found in (model, small)]
    print(f"AGP: {sizes[0]:,} parameters, {sizes[1]:,} are left, error {report.error:.0e}, {demo.accuracy(small, data):.1%} right")
    trainer(small, optimizer, F.cross_entropy)
    print(f"AGP, one epoch more with the same optimizer: {demo.accuracy(small, data):.1%} right")
    gp.save(small, out / "agp.safetensors")


def ticket(data: demo.Digits, out: Path) -> None:
    """A lottery ticket: train, mask the smallest weights, put the others back to where they began, train again."""
    fresh = demo.build(depth=8, seed=1)
    pruner = gp.LotteryTicketPruner(
        fresh,
        [{"sparsity": 0.9, "op_types": ["default"]}],
        "level",
        4,
        evaluator=lambda found: demo.accuracy(found, data),
        trainer=trainer_of(data),
        optimizer=momentum(fresh),
        criterion=F.cross_entropy,
        training_epochs=3,
        folder=out / "lottery",  # every round is kept: started again, the same command goes on where it was
    )
    pruner.compress()
    Console(width=120).print(pruner.history)
    best, last = pruner.best.round, pruner.last.round
    print(f"lottery ticket: best {best.score:.1%} at {best.sparsity:.1%}, last {last.score:.1%} at {last.sparsity:.1%}")


def movement(model: nn.Module, data: demo.Digits, out: Path) -> None:
    """Movement pruning of channels against the smallest norms, with as many epochs of training."""
    x, config = data.test_images[:1], [{"sparsity": 0.5, **CONVOLUTIONS}]
    steps = -(-len(data.train_images) // demo.BATCH)
    moving = gp.MovementPruner(
        model,
        config,
        trainer_of(data),
        momentum(model),
        F.cross_entropy,
        warm_up_step=steps,
        cool_down_beginning_step=(EPOCHS - 2) * steps,
        training_epochs=EPOCHS,
        sparse_granularity="channels",
        example_inputs=x,
    )
    small, _ = gp.speedup(*moving.compress())
    for record in moving.history:
        print(f"movement, epoch {record.epoch}: {record.sparsity:.1%} of the scores are of masked channels")
    by_norm, _ = gp.prune(model, x, config_list=config)
    optimizer, trainer = momentum(by_norm), trainer_of(data)
    for _ in range(EPOCHS):
        trainer(by_norm, optimizer, F.cross_entropy)
    for name, found in {"movement": small, "smallest norms": by_norm}.items():
        print(f"{name}: {gp.count(found, x).macs:,} MACs, {demo.accuracy(found, data):.1%} right")
    gp.save(small, out / "movement.safetensors")


def main() -> None:
    """Trains a network and prunes it by one schedule after the other."""
    parser = argparse.ArgumentParser(description="pruners that follow a schedule")
    parser.add_argument("--out", type=Path, help="folder for models and histories; a temporary one by default")
    given: Path | None = parser.parse_args().out
    out = given or Path(tempfile.mkdtemp(prefix="graphprune-"))
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    data = demo.load_digits(8)  # pixels, as they come
    model = demo.build(depth=8, seed=0)
    trainer, optimizer = trainer_of(data), momentum(model)
    for _ in range(EPOCHS):
        trainer(model, optimizer, F.cross_entropy)
    print(f"trained: {demo.accuracy(model, data):.1%} right")
    gradually(model, data, out)
    ticket(data, out)
    movement(model, data, out)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
