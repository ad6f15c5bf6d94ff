"""``graphprune demo``: a real network from training to latency."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphprune.cli.screen import Screen


def demo(
    ctx: typer.Context,
    *,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the files, made when absent.")] = Path("graphprune-demo"),
    sparsity: Annotated[float, typer.Option("--sparsity", help="Share of the channels to remove, in [0, 1).")] = 0.5,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of weights, order of images and shifts.")] = 0,
    depth: Annotated[int, typer.Option("--depth", help="Depth of the network: 8, 14, 20, 26, ...")] = 20,
    epochs: Annotated[int, typer.Option("--epochs", help="Epochs of training.")] = 12,
    finetune_epochs: Annotated[int, typer.Option("--finetune-epochs", help="Epochs of training after pruning.")] = 5,
) -> None:
    """Train a small residual network on handwritten digits, prune it, let it recover, and time it."""
    from graphprune.cli import demo as demonstration

    screen: Screen = ctx.obj
    with screen.bars() as bars:
        summary = demonstration.run(
            out, sparsity=sparsity, seed=seed, depth=depth, epochs=epochs, finetune_epochs=finetune_epochs, progress=bars
        )
    screen.result(summary.to_dict(), summary)
