"""Operators of your own: what running one proves needs no rule; what only its author knows is frozen until a rule says it.

python examples/custom_operator.py [--out DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import graphprune as gp
from graphprune.ops import Labels

# -- the operator, as a library would ship it ------------------------------------------------------------------------------------------


@torch.library.custom_op("example::channel_gain", mutates_args=())
def channel_gain(x: Tensor, gain: Tensor) -> Tensor:
    """Multiplies channel c of silu(x) (n, channels, h, w) by gain[c]; imagine a hand-written kernel here."""
    return torch.nn.functional.silu(x) * gain[:, None, None]


@torch.library.custom_op("example::channel_norm", mutates_args=())
def channel_norm(x: Tensor) -> Tensor:
    """Divides each pixel of x (n, channels, h, w) by the root of its mean square over all channels."""
    return x / x.square().mean(1, keepdim=True).add(1e-6).sqrt()


class Network(nn.Module):
    """Two convolutions with each of the operators before one of them."""

    def __init__(self) -> None:
        """Makes the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(16) + 0.5)
        self.conv2 = nn.Conv2d(16, 24, 3, padding=1)
        self.conv3 = nn.Conv2d(24, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, 3, h, w) to (n, 8, h, w)."""
        y: Tensor = self.conv3(channel_norm(self.conv2(channel_gain(self.conv1(x), self.gain))))
        return y


# -- its rule --------------------------------------------------------------------------------------------------------------------------


def channel_norm_rule(op: gp.Op) -> Labels:
    """The output has the labels of x, and each of its channels depends on a statistic across all of them."""
    labels = op.dims(op["x"])
    op.statistic(labels[1])
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
    # Every channel of the gain passes through on its own: running it proves that. The norm mixes channels, so those that enter it freeze.
    print(f"without a rule: {', '.join(f'{g.name} with {g.channels} channels' for g in before.groups)}")
    for unknown in before.unknown:
        print(f"  {unknown.operator} freezes {unknown.channels} channels")
    print(before.explain("conv2"))

    # In a module of your own, write this as a decorator: @gp.rule("example::channel_norm").
    gp.rule("example::channel_norm")(channel_norm_rule)

    after = gp.trace(model, x)
    print(f"with a rule: {', '.join(f'{g.name} with {g.channels} channels' for g in after.groups)}")
    print(after.explain("conv2"))

    # The speedup compares the small model with the masked one, so a wrong rule is an error here and never a wrong model.
    small, report = gp.prune(model, x, sparsity=0.5)
    print(f"pruned: gain has {small.get_parameter('gain').numel()} of {model.gain.numel()} entries, error {report.error:.1e}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        gp.save(small, out / "small.safetensors")


if __name__ == "__main__":
    main()
