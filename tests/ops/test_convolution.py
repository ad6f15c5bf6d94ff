"""Convolutions: plain, grouped, depthwise, transposed, in one to three dimensions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.support.operators import Case, check, conv, normal, sequences, table

PLAIN = "8 exact: a.bias/0 a.weight/0 b.weight/1"


def chain(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Runs the layers one after the other, with a ReLU after the first ones."""
    layers = list(m.children())
    for layer in layers[:-1]:
        x = functional.relu(layer(x))
    out: torch.Tensor = layers[-1](x)
    return out


def grouped(groups: int, inputs: int = 8, outputs: int = 8, size: int = 3) -> nn.Conv2d:
    """Returns a grouped convolution."""
    return conv(inputs, outputs, size, groups=groups)


CASES = [
    Case("plain", chain, {"a": conv(3, 8), "b": conv(8, 4)}, [PLAIN], {"a.weight/1": "input of the model", "a.weight/2": "kernel",
         "b.weight/0": "reaches an output"}, kind="module"),
    Case("stride and dilation", chain, {"a": conv(3, 8, stride=2), "b": conv(8, 4, dilation=2, padding=2)}, [PLAIN], kind="module"),
    Case("padding same", chain, {"a": conv(3, 8, 3, padding="same"), "b": conv(8, 4, 3, padding="valid")}, [PLAIN], kind="module"),
    Case("padding mode", chain, {"a": conv(3, 8, padding_mode="reflect"), "b": conv(8, 4, padding_mode="circular")},
         ["8 exact: a.bias/0 a.weight/0 b.weight/1"], kind="module"),
    Case("no bias", chain, {"a": conv(3, 8, bias=False), "b": conv(8, 4)}, ["8 exact: a.weight/0 b.weight/1"], kind="module"),
    Case("1d", chain, {"a": nn.Conv1d(3, 8, 3), "b": nn.Conv1d(8, 4, 1)}, [PLAIN], inputs=lambda n: normal(n, 3, 7), kind="module"),
    Case("3d", chain, {"a": nn.Conv3d(3, 8, 3), "b": nn.Conv3d(8, 4, 1)}, [PLAIN], inputs=lambda n: normal(n, 3, 4, 4, 4), kind="module"),
    Case("without batch", chain, {"a": conv(3, 8), "b": conv(8, 4)}, [PLAIN], inputs=lambda _: normal(3, 6, 6), any_batch=False),
    Case("depthwise", chain, {"a": conv(3, 8), "d": grouped(8), "b": conv(8, 4)},
         ["8 exact: a.bias/0 a.weight/0 b.weight/1 d.bias/0 d.weight/0"], kind="module"),
    Case("depthwise multiplier 2", chain, {"a": conv(3, 8), "d": grouped(8, 8, 16), "b": conv(16, 4)},
         ["8 exact block: a.bias/0 a.weight/0 b.weight/1*2 d.bias/0*2 d.weight/0*2",
          "2 exact within: b.weight/1*8 d.bias/0*8 d.weight/0*8"], kind="module"),
    Case("grouped", chain, {"a": conv(3, 8), "g": grouped(4), "b": conv(8, 4)},
         ["2 exact within: a.bias/0*4 a.weight/0*4 g.weight/1", "2 exact within: b.weight/1*4 g.bias/0*4 g.weight/0*4",
          "4 exact block: a.bias/0*2 a.weight/0*2 b.weight/1*2 g.bias/0*2 g.weight/0*2"], kind="module"),
    Case("grouped, unequal", chain, {"a": conv(3, 12), "g": grouped(2, 12, 8), "b": conv(8, 4)},
         ["2 exact block: a.bias/0*6 a.weight/0*6 b.weight/1*4 g.bias/0*4 g.weight/0*4",
          "4 exact within: b.weight/1*2 g.bias/0*2 g.weight/0*2", "6 exact within: a.bias/0*2 a.weight/0*2 g.weight/1"], kind="module"),
    Case("grouped twice", chain, {"a": conv(3, 8), "g": grouped(4), "h": grouped(2), "b": conv(8, 4)},
         ["2 exact block: a.bias/0*4 a.weight/0*4 b.weight/1*4 g.bias/0*4 g.weight/0*4 h.bias/0*4 h.weight/0*4",
          "2 exact block: a.bias/0*4 a.weight/0*4 g.bias/0*4 g.weight/0*4 h.weight/1*2",
          "2 exact within: g.bias/0*4 g.weight/0*4 h.weight/1*2",
          "2 exact within: a.bias/0*4 a.weight/0*4 g.weight/1", "4 exact within: b.weight/1*2 h.bias/0*2 h.weight/0*2"], kind="module"),
    Case("grouped on the input", lambda m, x: m.b(torch.relu(m.g(x))), {"g": grouped(3, 3, 12), "b": conv(12, 4)},
         ["4 exact: b.weight/1*3 g.bias/0*3 g.weight/0*3"], {"g.weight/1": "size 1"}),
    Case("grouped output", chain, {"a": conv(3, 8), "g": grouped(4)}, ["2 exact: a.bias/0*4 a.weight/0*4 g.weight/1"],
         {"g.weight/0": "reaches an output"}, kind="module"),
    Case("depthwise output", chain, {"a": conv(3, 8), "g": grouped(8)}, [], {"a.weight/0": "reaches an output"}),
    Case("transposed", chain, {"a": conv(3, 8), "t": nn.ConvTranspose2d(8, 6, 2, 2), "b": conv(6, 4)},
         ["6 exact: b.weight/1 t.bias/0 t.weight/1", "8 exact: a.bias/0 a.weight/0 t.weight/0"], kind="module"),
    Case("transposed grouped", chain, {"a": conv(3, 8), "t": nn.ConvTranspose2d(8, 12, 2, 2, groups=4), "b": conv(12, 4)},
         ["2 exact within: a.bias/0*4 a.weight/0*4 t.weight/0*4", "3 exact within: b.weight/1*4 t.bias/0*4 t.weight/1",
          "4 exact block: a.bias/0*2 a.weight/0*2 b.weight/1*3 t.bias/0*3 t.weight/0*2"], kind="module"),
    Case("transposed depthwise", chain, {"a": conv(3, 8), "t": nn.ConvTranspose2d(8, 8, 2, 2, groups=8), "b": conv(8, 4)},
         ["8 exact: a.bias/0 a.weight/0 b.weight/1 t.bias/0 t.weight/0"], kind="module"),
    Case("transposed 1d", chain, {"a": nn.Conv1d(3, 8, 1), "b": nn.ConvTranspose1d(8, 4, 2, 2)},
         ["8 exact: a.bias/0 a.weight/0 b.weight/0"], inputs=lambda n: normal(n, 3, 5), kind="module"),
    Case("transposed 3d", chain, {"a": nn.Conv3d(3, 8, 1), "b": nn.ConvTranspose3d(8, 4, 2, 2)},
         ["8 exact: a.bias/0 a.weight/0 b.weight/0"], inputs=lambda n: normal(n, 3, 2, 3, 3), kind="module"),
    Case("general operator", lambda m, x: torch.convolution(torch.relu(m.a(x)), m.w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1),
         {"a": conv(3, 8), "w": nn.Parameter(torch.ones(4, 8, 3, 3))}, ["8 exact: a.bias/0 a.weight/0 w/1"], kind="module"),
    Case("general operator, transposed",
         lambda m, x: torch.convolution(torch.relu(m.a(x)), m.w, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1),
         {"a": conv(3, 8), "w": nn.Parameter(torch.ones(8, 4, 2, 2))}, ["8 exact: a.bias/0 a.weight/0 w/0"], kind="module"),
    Case("time first", lambda m, x: m.b(torch.relu(torch.conv_tbc(torch.relu(m.a(x)), m.w, m.v, 1))), {"a": nn.Linear(4, 8),
         "w": table(3, 8, 6), "v": table(6), "b": nn.Linear(6, 4)}, ["8 exact: a.bias/0 a.weight/0 w/1", "6 exact: b.weight/1 v/0 w/2"],
         inputs=sequences, kind="module"),
    Case("time first, along the channels", lambda m, x: m.b(torch.conv_tbc(torch.relu(m.a(x)).permute(2, 0, 1).contiguous(), m.w, m.v, 1)),
         {"a": nn.Linear(4, 8), "w": table(3, 5, 6), "v": table(6), "b": nn.Linear(6, 4)}, ["6 exact: b.weight/1 v/0 w/2"],
         {"a.weight/0": "spatial dimension of a convolution"}, inputs=sequences),
    Case("computed weight and values that are not zero", lambda m, x: m.b(functional.conv2d(torch.sigmoid(m.a(x)), m.w.exp())),
         {"a": conv(3, 8), "w": table(6, 8, 3, 3), "b": conv(6, 4)}, ["8 changed: a.bias/0 a.weight/0 w/1", "6 exact: b.weight/1 w/0"]),
    Case("computed weight, then a sum", lambda m, x: m.b(functional.conv2d(torch.relu(m.a(x)), m.w.exp()).sum(1, keepdim=True)),
         {"a": conv(3, 8), "w": table(6, 8, 3, 3), "b": conv(1, 4)}, ["8 exact: a.bias/0 a.weight/0 w/1", "6 changed: w/0"]),
    Case("shared convolution", lambda m, x: m.b(m.s(m.s(torch.relu(m.a(x))))), {"a": conv(3, 8), "s": conv(8, 8), "b": conv(8, 4)},
         ["8 exact: a.bias/0 a.weight/0 b.weight/1 s.bias/0 s.weight/0 s.weight/1"], kind="module"),
    Case("residual", lambda m, x: m.b(torch.relu(m.a(x) + m.c(torch.relu(m.a(x))))), {"a": conv(3, 8), "c": conv(8, 8), "b": conv(8, 4)},
         ["8 exact: a.bias/0 a.weight/0 b.weight/1 c.bias/0 c.weight/0 c.weight/1"], kind="module"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolution(case: Case) -> None:
    """Groups are what the formula of the operator says, and removal is exact."""
    check(case)
