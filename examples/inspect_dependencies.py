"""Which channels of a network live and die together, which may not be removed, and why.

python examples/inspect_dependencies.py [--out DIR]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import networkx as nx
import torch
from torch import Tensor, nn

import graphprune as gp


class Network(nn.Module):
    """A shortcut, a concatenation and a gate whose channel is picked by its position."""

    def __init__(self) -> None:
        """Makes the layers."""
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner = nn.Conv2d(16, 24, 3, padding=1)
        self.outer = nn.Conv2d(24, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm = nn.BatchNorm2d(32)
        self.gate = nn.Conv2d(32, 4, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, 3, h, w) to (n, 10)."""
        x = self.stem(x)
        y = x + self.outer(torch.relu(self.inner(x)))
        z = self.norm(torch.cat([y, self.depthwise(y)], dim=1))
        z = z * torch.sigmoid(self.gate(z)[:, 0].unsqueeze(1))  # one channel of four, picked by a literal position
        head: Tensor = self.head(z.mean((2, 3)))
        return head


def main() -> None:
    """Traces the network and asks the graph what it knows."""
    parser = argparse.ArgumentParser(description="show the dependencies of a small network")
    parser.add_argument("--out", type=Path, help="folder for dependencies.json; nothing is written by default")
    out: Path | None = parser.parse_args().out

    torch.manual_seed(0)
    graph = gp.trace(Network(), torch.randn(2, 3, 16, 16))

    print("Groups: channels that are removed together")
    for group in graph.groups:
        print(f"  {group.name}: {group.channels} channels, {group.verdict}")
        for s in group.slices:
            # index has one row per channel: the positions along `dim` that the channel owns
            print(f"    {s.parameter} dim {s.dim}, {s.index.shape[1]} per channel, first {s.index[0].tolist()}" + " produces" * s.produces)

    # Every position of every parameter is in a group or here. Dimension 0 of a weight is what its layer produces.
    print("Frozen: what layers produce and may not lose")
    for item in graph.frozen:
        if item.dim == 0:
            print(f"  {item.parameter}: {item.index.size} of {graph.shapes[item.parameter][0]}, {item}")

    # The same from the point of view of one layer.
    print(graph.explain("depthwise"))
    print(graph.explain("gate"))

    # One node per layer: the tools of networkx apply. Layers that share a group name must keep the same channels.
    layers = graph.to_networkx()
    print(f"Order of the layers: {' '.join(nx.lexicographical_topological_sort(layers))}")
    print(f"What reaches the head directly: {', '.join(layers.predecessors('head'))}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        everything = {"layers": dict(layers.nodes(data=True)), "edges": nx.to_dict_of_dicts(layers)}
        (out / "dependencies.json").write_text(json.dumps(everything, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
