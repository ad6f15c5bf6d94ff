"""Three recipes of "Pruning Filters for Efficient ConvNets" (Li et al., arXiv 1608.08710) as config lists, counted beside the paper.

python examples/published_recipes.py [--out DIR]
"""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp

Config = list[dict[str, object]]


def vgg16() -> nn.Module:
    """Returns VGG-16 for CIFAR-10: 13 convolutions with BatchNorm, two linear layers."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs, number = 3, 0
    for widths in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
        for width in widths:
            number += 1
            layers[f"conv_{number}"] = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
            layers[f"bn_{number}"] = nn.BatchNorm2d(width)
            layers[f"relu_{number}"] = nn.ReLU()
            inputs = width
        layers[f"pool_{number}"] = nn.MaxPool2d(2)
    return nn.Sequential(
        layers
        | {"flatten": nn.Flatten(), "fc_1": nn.Linear(512, 512), "bn": nn.BatchNorm1d(512), "relu": nn.ReLU(), "fc_2": nn.Linear(512, 10)}
    )


class Block(nn.Module):
    """A residual block whose shortcut has no parameters: where the width doubles, every second pixel is taken and zeros are added."""

    def __init__(self, inputs: int, width: int) -> None:
        """Makes two convolutions with BatchNorm."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride=width // inputs, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.new = width - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, inputs, h, w) to (n, width, h, w), or half of h and w."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.new:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.new // 2, self.new // 2))
        return torch.relu(x + y)


def resnet56() -> nn.Module:
    """Returns ResNet-56 for CIFAR-10. Layer 1 is the stem; layers 2, 4, ... 54 are the first convolutions of the 27 blocks."""
    widths = [16] * 10 + [32] * 9 + [64] * 9
    blocks = [(f"block_{2 * i + 2}", Block(a, b)) for i, (a, b) in enumerate(pairwise(widths))]
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    tail = [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("fc", nn.Linear(64, 10))]
    return nn.Sequential(OrderedDict([("stem", stem), *blocks, *tail]))


def stages(sparsities: tuple[float, float, float], skip: tuple[int, ...]) -> Config:
    """Returns the config list of a ResNet-56: one sparsity per stage, for the first convolution of every block but the sensitive ones."""
    config: Config = []
    for stage, sparsity in enumerate(sparsities):
        layers = range(18 * stage + 2, 18 * stage + 20, 2)
        config.append({"sparsity": sparsity, "op_names": [f"block_{layer}.conv1" for layer in layers if layer not in skip]})
    return config


# Recipe -> network, config list, and what table 1 of the paper says: multiply-accumulates, parameters, and by how many percent they fell.
VGG_A: Config = [{"sparsity": 0.5, "op_names": [f"conv_{layer}" for layer in (1, 8, 9, 10, 11, 12, 13)]}]
RECIPES = {
    "VGG-16-A": (vgg16, VGG_A, ("2.06e8", "5.4e6", "34.2 %", "64.0 %")),
    "ResNet-56-A": (resnet56, stages((0.1, 0.1, 0.1), (16, 20, 38, 54)), ("1.12e8", "7.7e5", "10.4 %", "9.4 %")),
    "ResNet-56-B": (resnet56, stages((0.6, 0.3, 0.1), (16, 18, 20, 34, 38, 54)), ("9.09e7", "7.3e5", "27.6 %", "13.7 %")),
}


def main() -> None:
    """Prunes the three networks and prints what is left of them beside the figures of the paper."""
    parser = argparse.ArgumentParser(description="reproduce three rows of a published table")
    parser.add_argument("--out", type=Path, help="folder for recipes.json; nothing is written by default")
    out: Path | None = parser.parse_args().out

    torch.manual_seed(0)
    image = torch.randn(1, 3, 32, 32)
    table = {}
    print(
        f"{'recipe':12} {'':7} {'MACs':>11} {'paper':>7} {'less':>7} {'paper':>7} {'parameters':>11} {'paper':>6} {'less':>7} {'paper':>7}"
    )
    for name, (build, config, (macs, params, fewer_macs, fewer_params)) in RECIPES.items():
        model = build().eval()
        gp.recalibrate(model, [torch.randn(32, 3, 32, 32)])  # in the place of training, which sets the statistics of BatchNorm
        # "floor" keeps int(n (1 - p)) of n filters, as the authors' code does; Distiller removes int(n p), which is "ceil".
        small, report = gp.prune(model, image, config_list=config, rounding="floor")
        before, after = gp.count(model, image), gp.count(small, image)
        left = after.relative_to(before)
        print(f"{name:12} {'before':7} {before.macs:11,} {'':23} {before.params:11,}")
        print(
            f"{'':12} {'after':7} {after.macs:11,} {macs:>7} {1 - left.macs:7.1%} {fewer_macs:>7}"
            f" {after.params:11,} {params:>6} {1 - left.params:7.1%} {fewer_params:>7}"
        )
        print(f"{'':12} verified: error {report.error:.0e}, effect of the mask {report.effect:.0e}")
        table[name] = {"before": before.to_dict(), "after": after.to_dict()}

    print("The paper counts neither BatchNorm nor the MACs of linear layers, and some of its digits are rounded, others cut off.")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipes.json").write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
