"""Operators that move, cut and join dimensions without touching values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.support.operators import Case, check, conv, let, normal, sequences

A = "a.bias/0 a.weight/0"
PLAIN = [f"8 exact: {A} b.weight/1"]


def through(name: str, op: Any, width: int = 8, groups: list[str] = PLAIN, **options: Any) -> Case:
    """Returns a case in which 8 channels of a convolution pass an operator on their way into another convolution."""
    return Case(name, lambda m, x: m.b(op(torch.relu(m.a(x)))), {"a": conv(3, 8), "b": conv(width, 4)}, groups, **options)


def flat(name: str, op: Any, groups: list[str], width: int = 288, **options: Any) -> Case:
    """Returns a case in which 8 channels of 6 x 6 pixels are flattened into a linear layer."""
    return Case(name, lambda m, x: m.b(op(torch.relu(m.a(x)))), {"a": conv(3, 8), "b": nn.Linear(width, 4)}, groups, **options)


def shuffle(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Returns the channels dealt out anew, as grouped convolutions need it."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def heads(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Returns products of two heads of width 4 each, with literal sizes."""
    x = m.a(x).view(-1, 5, 2, 4)
    out: torch.Tensor = m.b(torch.tanh(x * x.sum(1, keepdim=True)).reshape(-1, 5, 8))
    return out


ROWS = ["2 exact block: a.bias/0*4 a.weight/0*4 b.weight/1*4", "4 exact within: a.bias/0*2 a.weight/0*2 b.weight/1*2"]
SHUFFLED = ["2 exact block: a.bias/0*4 a.weight/0*4 b.weight/1*4", "4 exact within: a.bias/0*2 a.weight/0*2 b.weight/1*2"]

CASES = [
    flat("flatten", lambda x: x.flatten(1), [f"8 exact: {A} b.weight/1*36"], kind="module"),
    flat("torch.flatten, negative", lambda x: torch.flatten(x, -3), [f"8 exact: {A} b.weight/1*36"], kind="module"),
    flat("view with -1", lambda x: x.view(x.shape[0], -1), [f"8 exact: {A} b.weight/1*36"], kind="module"),
    flat("view with literals", lambda x: x.view(-1, 288), [f"8 exact: {A} b.weight/1*36"], kind="graph"),
    flat("reshape with literals", lambda x: x.reshape(x.shape[0], 288), [f"8 exact: {A} b.weight/1*36"], kind="graph"),
    flat("channels last, then flatten", lambda x: x.permute(0, 2, 3, 1).flatten(1), [f"8 exact: {A} b.weight/1*36"], kind="module"),
    flat("flatten of space", lambda x: x.flatten(2).mean(2), [f"8 exact: {A} b.weight/1"], 8, kind="module"),
    flat("unflatten", lambda x: x.flatten(1).unflatten(1, (8, 36)).mean(2), [f"8 exact: {A} b.weight/1"], 8, kind="graph"),
    flat("two views", lambda x: x.view(-1, 8 * 36).view(-1, 8, 36).sum(2), [f"8 exact: {A} b.weight/1"], 8, kind="graph"),
    flat("view across the batch", lambda x: x.permute(0, 2, 3, 1).reshape(-1, 8), [f"8 exact: {A} b.weight/1"], 8, kind="graph"),
    flat("view_copy", lambda x: torch.view_copy(x, (-1, 288)), [f"8 exact: {A} b.weight/1*36"], kind="graph"),
    flat("view into heads", lambda x: torch.tanh(x.mean((2, 3)).view(-1, 2, 4)).flatten(1), ROWS, 8, kind="graph"),
    flat("sum over heads", lambda x: x.mean((2, 3)).view(-1, 2, 4).sum(1), [f"4 exact within: {A}".replace("/0", "/0*2") + " b.weight/1",
         "2 exact block: a.bias/0*4 a.weight/0*4"], 4, kind="graph"),
    flat("cut across pixels", lambda x: x.view(-1, 16, 18).mean(2), [f"8 exact: {A} b.weight/1*2"], 16, kind="graph"),
    flat("cut into uneven blocks", lambda x: x.flatten(1).view(-1, 3, 96).sum(2), [], 3, frozen={"a.weight/0": "would be left empty"}),
    Case("heads with literals", heads, {"a": nn.Linear(4, 8), "b": nn.Linear(8, 4)}, ROWS, inputs=sequences, kind="graph"),
    Case("ravel", lambda m, x: m.b(torch.relu(m.a(x)).ravel()), {"a": nn.Linear(4, 8), "b": nn.Linear(40, 4)},
         [f"8 exact: {A} b.weight/1*5"],
         inputs=lambda _: normal(5, 4), any_batch=False),
    through("permute and back", lambda x: x.permute(0, 2, 3, 1).sigmoid().permute(0, 3, 1, 2), kind="module"),
    through("permute, negative", lambda x: x.permute(0, -1, 1, -2).permute(0, 2, -1, -3), kind="module"),
    through("transpose", lambda x: x.transpose(1, -1).transpose(-1, 1), kind="module"),
    through("swapaxes and swapdims", lambda x: x.swapaxes(1, 2).swapdims(1, 2), kind="module"),
    through("movedim", lambda x: x.movedim(1, -1).movedim(-1, 1), kind="module"),
    through("mT", lambda x: x.mT, kind="module"),
    Case("t and T", lambda m, x: (torch.relu(m.a(x)).t().T) @ m.b.weight.t(), {"a": nn.Linear(4, 8), "b": nn.Linear(8, 4, bias=False)},
         [f"8 exact: {A} b.weight/1"], inputs=lambda n: normal(n, 4), kind="module"),
    Case("numpy_T", lambda m, x: m.b(torch.ops.aten.numpy_T(torch.relu(m.a(x).t()))), {"a": nn.Linear(4, 8), "b": nn.Linear(8, 4)},
         [f"8 exact: {A} b.weight/1"], inputs=lambda n: normal(n, 4), kind="module"),
    flat("squeeze", lambda x: x.mean((2, 3), keepdim=True).squeeze(), [f"8 exact: {A} b.weight/1"], 8, kind="module"),
    flat("squeeze of dimensions", lambda x: x.mean((2, 3), keepdim=True).squeeze((-1, 2)), [f"8 exact: {A} b.weight/1"], 8, kind="module"),
    flat("squeeze of one", lambda x: x.mean((2, 3), keepdim=True).squeeze(3).squeeze(-1), [f"8 exact: {A} b.weight/1"], 8, kind="module"),
    through("squeeze of nothing", lambda x: x.squeeze(1), kind="module"),
    through("unsqueeze", lambda x: x.unsqueeze(-1).unsqueeze(1).squeeze(1).squeeze(-1), kind="module"),
    through("expand of space", lambda x: x.mean((2, 3), keepdim=True).expand(-1, 8, 6, 6), kind="graph"),
    through("expand with new dimensions", lambda x: x.expand(3, *x.shape).mean(0), kind="module"),
    through("expand_as", lambda x: x.mean((2, 3), keepdim=True).expand_as(x), kind="module"),
    through("expand one channel to all", lambda x: x + x.sum(1, keepdim=True).expand_as(x), kind="module"),
    through("expand one channel by a literal", lambda x: x + x[:, :1].expand(-1, 8, -1, -1), groups=[f"7 exact: {A} b.weight/1"],
            frozen={"a.weight/0": "only position"}, kind="graph"),
    through("expand one value by a literal", lambda x: x + x.sum(1, keepdim=True).expand(-1, 8, -1, -1), kind="graph"),
    through("expand one value, then sum",
            lambda x: x * (x + x.amax((2, 3)).sum(1).view(-1, 1, 1, 1).expand(-1, 8, 6, 6)).sum(1, keepdim=True),
            groups=[f"8 changed: {A} b.weight/1"], kind="graph"),
    through("broadcast_to", lambda x: torch.broadcast_to(x.mean((2, 3), keepdim=True), (x.shape[0], 8, 6, 6)), kind="graph"),
    through("repeat of channels", lambda x: x.repeat(1, 2, 1, 1), 16, [f"8 exact: {A} b.weight/1*2"], kind="module"),
    through("repeat of space", lambda x: x.repeat(1, 1, 2, 2), kind="module"),
    through("tile", lambda x: x.tile(2, 1, 1), 16, [f"8 exact: {A} b.weight/1*2"], kind="module"),
    through("repeat_interleave", lambda x: x.repeat_interleave(3, 1), 24, [f"8 exact: {A} b.weight/1*3"], kind="module"),
    through("repeat_interleave by a table", lambda x: x.repeat_interleave(torch.tensor([1, 2, 0, 1] * 2), 1), 8,
            ["2 exact: a.bias/0 a.weight/0", "2 exact: a.bias/0 a.weight/0 b.weight/1*2", "4 exact: a.bias/0 a.weight/0 b.weight/1"],
            kind="graph", interchangeable=False),
    flat("repeat_interleave of everything", lambda x: x.mean((0, 2, 3)).repeat_interleave(2).view(1, -1), [f"8 exact: {A} b.weight/1*2"],
         16, kind="module"),
    flat("repeat_interleave of a vector by a table", lambda x: x.mean((0, 2, 3)).repeat_interleave(torch.tensor([3, 1] * 4)).view(1, -1),
         [f"4 exact: {A} b.weight/1", f"4 exact: {A} b.weight/1*3"], 16, kind="graph"),
    flat("repeat_interleave of rows and columns", lambda x: x.mean((2, 3)).repeat_interleave(2).view(-1, 16),
         [f"8 exact: {A} b.weight/1*2"], 16),
    through("repeat_interleave as often as computed", lambda x: x.repeat_interleave((x.detach().mean((0, 2, 3)) > -9).long(), 1), groups=[],
            frozen={"a.weight/0": "not known beforehand"}, unknown=[("aten::repeat_interleave", "", 8)]),
    through("shuffle", lambda x: shuffle(x, 2), groups=SHUFFLED),
    through("shuffle and cut", lambda x: shuffle(x, 2)[:, :4], 4, ["2 exact within: a.bias/0*2 a.weight/0*2 b.weight/1*2",
            "2 exact within: a.bias/0*2 a.weight/0*2", "2 exact block: a.bias/0*4 a.weight/0*4 b.weight/1*2"]),
    through("channel_shuffle", lambda x: functional.channel_shuffle(x, 4),
            groups=["4 exact block: a.bias/0*2 a.weight/0*2 b.weight/1*2", "2 exact within: a.bias/0*4 a.weight/0*4 b.weight/1*4"]),
    through("native_channel_shuffle", lambda x: torch.native_channel_shuffle(x, 2), groups=SHUFFLED, trainable=False),
    through("pixel_shuffle", lambda x: functional.pixel_shuffle(x, 2), 2, ["2 exact: a.bias/0*4 a.weight/0*4 b.weight/1"], kind="module"),
    through("pixel_unshuffle", lambda x: functional.pixel_unshuffle(x, 3), 72, [f"8 exact: {A} b.weight/1*9"], kind="module"),
    through("complex numbers", lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(3, (3, 2)))).flatten(3), kind="module"),
    through("complex numbers of channels", lambda x: torch.view_as_complex(x.unflatten(1, (4, 2)).movedim(2, -1).contiguous()).abs(), 4,
            ["4 exact: a.bias/0*2 a.weight/0*2 b.weight/1"], kind="graph"),
    through("unfold of space", lambda x: x.unfold(2, 3, 1).unfold(3, 3, 1).mean((-1, -2)), kind="module"),
    through("unfold of channels", lambda x: x.unfold(1, 2, 2).sum(-1), 4, [], frozen={"a.weight/0": "sliding windows (aten::unfold)"}),
    flat("F.unfold", lambda x: functional.unfold(x, 3, padding=1).mean(2), [f"8 exact: {A} b.weight/1*9"], 72, kind="module"),
    through("F.fold", lambda x: functional.fold(torch.tanh(functional.unfold(x, 3, padding=1)), (6, 6), 3, padding=1), kind="module"),
    through("F.fold of all taps", lambda x: functional.fold(x.flatten(2), (12, 12), 2, stride=2), 2,
            ["2 exact: a.bias/0*4 a.weight/0*4 b.weight/1"], kind="module"),
    flat("triangle of products", lambda x: let(x.mean((2, 3)), lambda y: (y[:, :, None] * y[:, None]).tril()).sum(1),
         [f"8 exact: {A} b.weight/1"], 8,
         interchangeable=False),
    flat("upper triangle beside the diagonal", lambda x: let(x.mean((2, 3)), lambda y: (y[:, :, None] * y[:, None]).triu(1)).sum(1), [], 8,
         frozen={"a.weight/0": "beside the main one (aten::triu)"}),
    through("triangle of space", lambda x: x.tril(1), kind="module"),
    flat("diagonal of products", lambda x: let(x.mean((2, 3)), lambda y: (y[:, :, None] * y[:, None]).diagonal(0, 1, 2)), PLAIN, 8),
    flat("diagonal beside the main one", lambda x: let(x.mean((2, 3)), lambda y: (y[:, :, None] * y[:, None]).diagonal(1, 1, 2)), [], 7,
         frozen={"a.weight/0": "beside the main one (aten::diagonal)"}),
    flat("diagonal of space", lambda x: x.diagonal(1, -2, -1).mean(-1), PLAIN, 8, kind="module"),
    through("as_strided", lambda x: x.as_strided(x.shape, x.stride()), groups=[], frozen={"a.weight/0": "literal strides"}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reshaping(case: Case) -> None:
    """Groups are what the formula of the operator says, and removal is exact."""
    check(case)
