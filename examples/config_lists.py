"""Different layers, different sparsities: config lists as in NNI, a pruner, masks, and the speedup as a step of its own.

python examples/config_lists.py [--out DIR]
"""

from __future__ import annotations

import argparse
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

import graphprune as gp


def build() -> nn.Module:
    """Returns a small convolutional network with named layers."""
    layers: list[tuple[str, nn.Module]] = [
        ("conv1", nn.Conv2d(3, 16, 3, padding=1)),
        ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(16, 32, 3, padding=1)),
        ("relu2", nn.ReLU()),
        ("pool", nn.AdaptiveAvgPool2d(2)),
        ("flatten", nn.Flatten()),
        ("fc1", nn.Linear(32 * 4, 40)),
        ("relu3", nn.ReLU()),
        ("fc2", nn.Linear(40, 10)),
    ]
    return nn.Sequential(OrderedDict(layers))


def main() -> None:
    """Makes masks from a config list, looks at them, stores them, and removes what they say."""
    parser = argparse.ArgumentParser(description="prune with a config list")
    parser.add_argument("--out", type=Path, help="folder for the masks; a temporary one by default")
    given: Path | None = parser.parse_args().out
    out = given or Path(tempfile.mkdtemp(prefix="graphprune-"))
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    model = build()
    x = torch.randn(2, 3, 16, 16)

    # The last entry that selects a layer wins; a layer that no entry selects keeps all its channels.
    config_list: list[dict[str, object]] = [
        {"sparsity": 0.5, "op_types": ["Conv2d"]},
        {"sparsity": 0.75, "op_names": ["fc1"]},
        {"exclude": True, "op_names": ["conv1"]},
    ]
    pruner = gp.L1NormPruner(model, config_list, example_inputs=x, round_to=8)  # kept counts are multiples of 8
    masked_model, masks = pruner.compress()  # a copy with the removed channels zeroed; `model` is as it was

    for name, keep in masks.items():
        print(f"{name}: keeps {int(keep.sum())} of {keep.size}; {pruner.plan.notes.get(name) or 'as asked'}")

    # Masks are arrays of booleans per group, or tensors per parameter, for those who want to apply them elsewhere.
    for name, keep_weight in masks.for_module("fc1").items():
        print(f"fc1.{name}: {int(keep_weight.sum())} of {keep_weight.numel()} elements kept")

    # They survive a round trip to disk. Masks that were made for another model are refused.
    masks.save(out / "masks.safetensors")
    masks = gp.Masks.load(out / "masks.safetensors", gp.trace(model, x))

    small, report = gp.speedup(model, masks, example_inputs=x)
    with torch.no_grad():
        difference = (small(x) - masked_model(x)).abs().max().item()
    print(small)
    if report.before is not None and report.after is not None:
        print(f"parameters {report.before.params:,} -> {report.after.params:,}, MACs {report.before.macs:,} -> {report.after.macs:,}")
    print(f"small and masked model differ by {difference:.1e}; masks in {out}")

    # A typo is an error that knows better.
    try:
        gp.L1NormPruner(model, [{"sparsity": 0.5, "op_names": ["conv3"]}], example_inputs=x)
    except gp.ConfigError as error:
        print(f"refused: {error}")


if __name__ == "__main__":
    main()
