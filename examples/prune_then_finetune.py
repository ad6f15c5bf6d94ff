"""What pruning costs in accuracy, and how it comes back: digits, a quarter of the channels, statistics estimated again, one epoch.

python examples/prune_then_finetune.py [--out DIR]

Needs scikit-learn for its images, which come with it: pip install graphprune[demo].
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import graphprune as gp
from graphprune.cli import demo


def main() -> None:
    """Trains, prunes, recovers, saves and loads."""
    parser = argparse.ArgumentParser(description="prune a network that reads digits, and train it on")
    parser.add_argument("--out", type=Path, help="folder for the pruned model; a temporary one by default")
    given: Path | None = parser.parse_args().out
    out = given or Path(tempfile.mkdtemp(prefix="graphprune-"))
    out.mkdir(parents=True, exist_ok=True)

    # The demo's network and training loop stand for yours: graphprune needs a module and example inputs, and owns no training.
    torch.set_num_threads(1)
    data = demo.load_digits(16)  # pixels: one core is enough
    model = demo.build(depth=8, seed=0)
    demo.train(model, data, epochs=8, lr=demo.LR, seed=0)
    print(f"dense:        {demo.accuracy(model, data):.1%}")

    example = data.test_images[:1]
    small, report = gp.prune(model, example, sparsity=0.25)
    print(f"pruned:       {demo.accuracy(small, data):.1%}")

    # BatchNorm still has the means and variances of activations that are gone. A few batches without labels put that right.
    gp.recalibrate(small, data.train_images.split(demo.BATCH))
    print(f"recalibrated: {demo.accuracy(small, data):.1%}")

    # The result is a module of the same class, so it trains as the original did.
    demo.train(small, data, epochs=1, lr=demo.FINETUNE_LR, seed=1)
    finetuned = demo.accuracy(small, data)
    print(f"fine-tuned:   {finetuned:.1%}")
    if report.before is not None and report.after is not None:
        left = report.after.relative_to(report.before)
        print(f"{left.params:.0%} of the parameters and {left.macs:.0%} of the MACs are left")

    # The file says what was removed: a freshly built dense network becomes the small one again.
    gp.save(small, out / "small.safetensors")
    again = gp.load(demo.build(depth=8, seed=1), out / "small.safetensors")
    print(f"loaded again: {demo.accuracy(again, data):.1%}; {type(again).__name__} in {out / 'small.safetensors'}")


if __name__ == "__main__":
    main()
