"""Half of the channels of a small residual network, removed and measured in ONNX Runtime.

python examples/prune_residual.py [--out DIR]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import graphprune as gp


class Block(nn.Module):
    """relu(x + conv(relu(conv(x))))."""

    def __init__(self, width: int) -> None:
        """Makes the two convolutions."""
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.conv2 = nn.Sequential(nn.Conv2d(2 * width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, width, h, w) to the same shape."""
        return torch.relu(x + self.conv2(self.conv1(x)))


def main() -> None:
    """Prunes, exports, measures."""
    parser = argparse.ArgumentParser(description="prune a small residual network and time it")
    parser.add_argument("--out", type=Path, help="folder for the ONNX files; a temporary one by default")
    given: Path | None = parser.parse_args().out
    out = given or Path(tempfile.mkdtemp(prefix="graphprune-"))
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
    model = nn.Sequential(stem, Block(32), Block(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
    x = torch.randn(1, 3, 64, 64)

    # The stem and both blocks add into one stream of 32 channels, so these live and die together; the inner ones are free.
    small, report = gp.prune(model, x, sparsity=0.5)
    console = Console(width=120)
    console.print(report)

    # The files take any batch size. Each is checked against its model before it is put in place.
    paths = {"dense": out / "dense.onnx", "small": out / "small.onnx"}
    gp.export_onnx(model, x, paths["dense"])
    gp.export_onnx(small, x, paths["small"])
    latency = gp.measure_latency(paths, threads=1, rounds=30, seconds=3.0)  # both in turns, so that they meet the same machine
    console.print(latency)
    row = latency["small"]
    print(f"small is {row.ratio:.2f} times as fast as dense (95 % interval {row.ratio_low:.2f} to {row.ratio_high:.2f}); files in {out}")


if __name__ == "__main__":
    main()
