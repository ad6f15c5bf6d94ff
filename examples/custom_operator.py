"""An operator of your own: frozen as long as nobody says what it does to channels, pruned once a rule does.

python examples/custom_operator.py [--out DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.ops.registry import Labels, Op, rule

# -- the operator, as a library would ship it ------------------------------------------------------------------------------------------


@torch.library.custom_op("example::channel_gain", mutates_args=())
def channel_gain(x: Tensor, gain: Tensor) -> Tensor:
    """Multiplies channel c of silu(x) (n, channels, h, w) by gain[c]; imagine a hand-written kernel here."""
    return torch.nn.functional.silu(x) * gain[:, None, None]


class Network(nn.Module):
    """Two convolutions with the operator in between."""

    def __init__(self) -> None:
        """Makes the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(16) + 0.5)
        self.conv2 = nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, 3, h, w) to (n, 8, h, w)."""
        y: Tensor = self.conv2(channel_gain(self.conv1(x), self.gain))
        return y


# -- its rule --------------------------------------------------------------------------------------------------------------------------


def channel_gain_rule(op: Op) -> Labels:
    """The output has the labels of x; position c of the gain lives and dies with channel c (dimension 1) of x."""
    labels = op.dims(op["x"])
    labels[1] = op.bind(op["gain"], 0, labels[1])
    return labels


def main() -> None:
    """Traces the network without the rule and with it, then prunes."""
    parser = argparse.ArgumentParser(description="teach graphprune an operator")
    parser.add_argument("--out", type=Path, help="folder for the pruned model; nothing is written by default")
    out: Path | None = parser.parse_args().out

    torch.manual_seed(0)
    model = Network().eval()
    x = torch.randn(2, 3, 16, 16)

    before = gp.trace(model, x)
    print(f"without a rule: {len(before.groups)} groups")
    for unknown in before.unknown:
        print(f"  {unknown.operator} freezes {unknown.channels} channels")
    print(before.explain("conv1"))

    # In a module of your own, write this as a decorator: @rule("example::channel_gain").
    rule("example::channel_gain")(channel_gain_rule)

    after = gp.trace(model, x)
    print(f"with a rule: {len(after.groups)} group of {after.groups[0].channels} channels")
    print(after.explain("conv1"))

    # The speedup compares the small model with the masked one, so a wrong rule is an error here and never a wrong model.
    small, report = gp.prune(model, x, sparsity=0.5)
    print(f"pruned: gain has {small.get_parameter('gain').numel()} of {model.gain.numel()} entries, error {report.error:.1e}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        gp.save(small, out / "small.safetensors")


if __name__ == "__main__":
    main()
