"""Operators that pick indices: bounds and constant tables are rewritten, positions that are computed or named one by one freeze."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphprune as gp
from tests.support.operators import Case, check, conv, sequences, table, words

A = "a.bias/0 a.weight/0"


def pick(take: Any, width: int, groups: list[str], name: str, **options: Any) -> Case:
    """Returns a case in which `take` picks some of the 8 channels of a convolution; another one sees them all."""
    parts = {"a": conv(3, 8), "b": conv(width, 4), "c": conv(8, 4), **options.pop("extra", {})}

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(m.a(x))
        out: torch.Tensor = m.b(take(m, x)) + m.c(x)
        return out

    return Case(name, run, parts, groups, **options)


def split_batch(name: str, first: int, run: Any, groups: list[str], **options: Any) -> Case:
    """Returns a case in which `run` works with the 8 channels of a convolution, `first` of which go into the layer b, the rest into c."""
    parts = {"a": conv(3, 8), "b": conv(first, 4), "c": conv(8 - first, 4), **options.pop("extra", {})}
    return Case(name, lambda m, x: run(m, torch.relu(m.a(x))), parts, groups, **options)


def both(m: Any, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the sum of what two layers make of two pieces."""
    first, second = pieces
    out: torch.Tensor = m.b(first) + m.c(second)
    return out


def halves(first: int) -> list[str]:
    """Returns the groups of a cut into two pieces that go separate ways."""
    return [f"{first} exact: {A} b.weight/1", f"{8 - first} exact: {A} c.weight/1"]


SEVEN = [f"7 exact: {A} c.weight/1"]
ALL = [f"8 exact: {A} b.weight/1 c.weight/1"]
ODD, EVEN = [False, True] * 4, [True, False] * 4
INNER = [f"4 exact: {A} b.weight/1 c.weight/1", f"4 exact: {A} c.weight/1"]
TWO_OF_8 = [f"2 exact: {A} b.weight/1 c.weight/1", f"6 exact: {A} c.weight/1"]

CASES = [
    pick(lambda _, x: x[:, 2:6], 4, INNER, "slice"),
    pick(lambda _, x: x[:, -6:-2], 4, INNER, "slice from the end"),
    pick(lambda _, x: x[:, :4], 4, INNER, "slice head"),
    pick(lambda _, x: x[:, 4:], 4, INNER, "slice tail"),
    pick(lambda _, x: x[:, ::2], 4, INNER, "slice with a step", kind="graph"),
    pick(lambda _, x: x[:, 1:7:3], 2, [f"2 exact: {A} b.weight/1 c.weight/1", f"6 exact: {A} c.weight/1"], "slice with bounds and a step"),
    pick(lambda _, x: x[:, -7:-1:2], 3, [f"3 exact: {A} b.weight/1 c.weight/1", f"5 exact: {A} c.weight/1"], "step from the end"),
    pick(lambda _, x: functional.pad(x[..., 1:5], (1, 1)), 8, [f"8 exact: {A} b.weight/1 c.weight/1"], "slice of space", kind="module"),
    pick(lambda _, x: x.narrow(1, 2, 4), 4, INNER, "narrow"),
    pick(lambda _, x: x.narrow(1, -5, 4), 4, INNER, "narrow from the end"),
    pick(lambda _, x: x[:, 5].unsqueeze(1), 1, SEVEN, "select", frozen={"a.weight/0": "picked by a literal position (aten::select)"}),
    pick(lambda _, x: x[:, -3].unsqueeze(1), 1, SEVEN, "select from the end", kind="graph"),
    pick(lambda _, x: x[:, 0].unsqueeze(1), 1, SEVEN, "select the first", kind="module"),
    pick(lambda _, x: x.select(1, 2).unsqueeze(1) + x[:, 6:7], 1, [f"6 exact: {A} c.weight/1"], "select and a slice",
         frozen={"a.weight/0": "only position of a dimension, which would be left empty (aten::slice)"}),
    pick(lambda _, x: x[:, 2:3] * x[:, 5:6], 1, [f"6 exact: {A} c.weight/1"], "slices of one channel"),
    pick(lambda _, x: x[:, :, 0:1].expand(-1, -1, 6, -1), 8, [f"8 exact: {A} b.weight/1 c.weight/1"], "slice of rows"),
    pick(lambda _, x: x[:, :, 2].unsqueeze(2).expand(-1, -1, 6, -1), 8, [f"8 exact: {A} b.weight/1 c.weight/1"], "select of space"),
    pick(lambda _, x: x.unbind(1)[3].unsqueeze(1), 1, [], "unbind",
         frozen={"a.weight/0": "taken apart position by position (aten::unbind)"}),
    pick(lambda _, x: torch.stack(x.unbind(1)[::-1], 1), 8, ALL, "unbind and stack", kind="module"),
    pick(lambda _, x: torch.stack([*x.unbind(1)[2:5], x.unbind(1)[3]], 1), 4, ["1 exact: a.bias/0 a.weight/0 b.weight/1*2 c.weight/1",
         f"2 exact: {A} b.weight/1 c.weight/1", f"5 exact: {A} c.weight/1"], "unbind and stack some", kind="graph"),
    pick(lambda _, x: torch.stack(x.unbind(1), -1).movedim(-1, 1), 8, [], "unbind and stack elsewhere",
         frozen={"a.weight/0": "taken apart position by position (aten::unbind)"}),
    pick(lambda _, x: torch.stack(x.unbind(1), 1) + x.unbind(1)[0][:, None], 8, [], "unbind, stack, and one used by itself",
         frozen={"a.weight/0": "taken apart position by position (aten::unbind)"}),
    pick(lambda _, x: torch.stack([x[:, i] for i in (7, 0, -3)], 1), 3, ["3 exact: a.bias/0 a.weight/0 b.weight/1 c.weight/1",
         "5 exact: a.bias/0 a.weight/0 c.weight/1"], "select and stack", kind="graph"),
    pick(lambda _, x: torch.stack([torch.ops.aten.slice(x, 0).select(1, i) for i in (7, 0, -3)], 1), 3,
         ["3 exact: a.bias/0 a.weight/0 b.weight/1 c.weight/1", "5 exact: a.bias/0 a.weight/0 c.weight/1"],
         "select from slices of everything and stack", kind="graph"),
    pick(lambda _, x: torch.stack([x[:, 7], x[:, 0], x[:, 3].tanh()], 1), 3, [f"5 exact: {A} c.weight/1"],
         "select and stack with another", frozen={"a.weight/0": "picked by a literal position (aten::select)"}),
    pick(lambda _, x: sum(x.unbind(2)).unsqueeze(2).expand(-1, -1, 6, -1), 8, [f"8 exact: {A} b.weight/1 c.weight/1"], "unbind of space"),
    split_batch("chunk", 4, lambda m, x: m.b(x.chunk(2, 1)[0]) + m.c(x.chunk(2, 1)[1]), halves(4)),
    split_batch("chunk of unequal pieces", 3, lambda m, x: m.b(x.chunk(3, 1)[0]) + m.c(torch.cat(x.chunk(3, 1)[1:], 1)),
           [f"3 exact: {A} b.weight/1", f"3 exact: {A} c.weight/1", f"2 exact: {A} c.weight/1"]),
    split_batch("chunk along a negative dimension", 4, lambda m, x: both(m, x.chunk(2, -3)), halves(4)),
    split_batch("split", 3, lambda m, x: both(m, x.split([3, 5], 1)), halves(3), kind="graph"),
    split_batch("split into equal pieces", 4, lambda m, x: both(m, x.split(4, 1)), halves(4)),
    split_batch("tensor_split", 4, lambda m, x: both(m, torch.tensor_split(x, 2, 1)), halves(4)),
    split_batch("tensor_split at places", 3, lambda m, x: both(m, torch.tensor_split(x, [3], 1)), halves(3)),
    split_batch("unsafe_split", 4, lambda m, x: both(m, torch.unsafe_split(x, 4, 1)), halves(4)),
    split_batch("unsafe_chunk", 4, lambda m, x: both(m, torch.unsafe_chunk(x, 2, 1)), halves(4)),
    split_batch("chunk, swap, cat", 4, lambda m, x: m.d(torch.cat(x.chunk(2, 1)[::-1], 1)) + m.b(x[:, 4:]),
           [f"4 exact: {A} d.weight/1", f"4 exact: {A} b.weight/1 d.weight/1"], extra={"d": conv(8, 4), "c": nn.Identity()}),
    pick(lambda m, x: x.index_select(1, m.table), 4, INNER, "index_select with a buffer", extra={"table": torch.tensor([6, 1, 3, 4])}),
    pick(lambda m, x: x.index_select(-3, m.table), 4, INNER, "index_select, negative dimension", extra={"table": torch.tensor([6, 1, 3,
         4])}),
    pick(lambda _, x: x[:, [6, 1, 3, -4]], 4, INNER, "list of positions", kind="graph"),
    pick(lambda _, x: x[:, [6, 1, 6, 1]], 4, [f"2 exact: {A} b.weight/1*2 c.weight/1", f"6 exact: {A} c.weight/1"], "repeated positions"),
    pick(lambda m, x: x[:, m.table], 8, [f"8 exact: {A} b.weight/1 c.weight/1"], "permutation by a buffer",
         extra={"table": torch.tensor([3, 1, 0, 2, 7, 5, 6, 4])}, kind="graph"),
    pick(lambda _, x: x[:, EVEN], 4, INNER, "mask of positions", kind="graph"),
    pick(lambda m, x: x[:, m.chosen], 4, INNER, "mask by a buffer", extra={"chosen": torch.tensor(ODD)}),
    pick(lambda m, x: x[:, m.chosen, :, :][:, :2], 2, [f"2 exact: {A} b.weight/1 c.weight/1", f"2 exact: {A} c.weight/1",
         f"4 exact: {A} c.weight/1"], "part of a mask", extra={"chosen": torch.tensor(ODD)}),
    pick(lambda _, x: x[:, x.detach().mean((0, 2, 3)) > -1], 8, [], "mask computed at run time",
         frozen={"a.weight/0": "computed at run time (aten::index)"}),
    pick(lambda m, x: x[:, m.table].flatten(1, 2), 6,
         ["2 exact block: a.bias/0*3 a.weight/0*3 b.weight/1*3 c.weight/1*3", f"2 exact: {A} c.weight/1",
          "3 exact within: a.bias/0*2 a.weight/0*2 b.weight/1*2 c.weight/1*2"], "table with rows and columns", interchangeable=False,
         extra={"table": torch.tensor([[6, 1, 3], [4, 0, 7]])}),
    pick(lambda m, x: x[:, m.table].sum(2), 2, TWO_OF_8, "table with equal columns", extra={"table": torch.tensor([[6, 6], [3, 3]])}),
    pick(lambda _, x: x[:, x.mean((0, 2, 3)).argsort()], 8, [], "computed positions", frozen={"a.weight/0": "("}),
    pick(lambda _, x: x[:, [0, 1], [2, 3]].unsqueeze(3).expand(-1, -1, -1, 6), 2, [], "two lists",
         frozen={"a.weight/0": "looked up by position (aten::index)"}),
    pick(lambda _, x: x[:, :, [5, 4, 3, 2, 1, 0]], 8, [f"8 exact: {A} b.weight/1 c.weight/1"], "list of rows", kind="module"),
    Case("embedding", lambda m, x: m.b(torch.relu(m.e(x))), {"e": nn.Embedding(11, 8), "b": nn.Linear(8, 4)},
         ["8 exact: b.weight/1 e.weight/1"], {"e.weight/0": "aten::embedding in e"}, inputs=words, kind="module"),
    Case("embedding of computed positions", lambda m, x: m.b(torch.relu(m.e(x.long().abs() % 11))).mean(2),
         {"e": nn.Embedding(11, 8), "b": nn.Linear(8, 4)}, ["8 exact: b.weight/1 e.weight/1"], inputs=sequences, kind="module"),
    Case("table of positions", lambda m, x: m.b(torch.relu(m.a(x) + m.p[m.i])), {"a": nn.Linear(4, 8), "b": nn.Linear(8, 4),
         "p": table(9, 8), "i": torch.tensor([3, 1, 4, 1, 5])},
         [f"8 exact: {A} b.weight/1 p/1"], {"p/0": "do not look up"}, inputs=sequences),
    pick(lambda m, x: x.gather(1, m.table.expand(x.shape[0], 2, 6, 6)), 2, TWO_OF_8, "gather",
         extra={"table": torch.tensor([[[[1]], [[3]]]])}, kind="graph"),
    pick(lambda m, x: x.gather(1, m.table), 2, [], "gather by a table that varies in space", any_batch=False,
         extra={"table": torch.arange(144).view(2, 2, 6, 6) % 8}, frozen={"a.weight/0": "looked up by position (aten::gather)"}),
    pick(lambda _, x: x.gather(1, (x.mean(1, keepdim=True) > 0.3).long()), 1, [], "gather by computed positions",
         frozen={"a.weight/0": "computed at run time (aten::gather)"}),
    pick(lambda _, x: x.gather(3, torch.arange(6).flip(0).expand(x.shape)), 8, ALL, "gather in space"),
    pick(lambda _, x: x.gather(3, torch.arange(6).flip(0).expand(x.shape[0], 8, 6, 6)), 8, ALL, "gather in space, sizes stated",
         kind="graph"),
    pick(lambda _, x: torch.take_along_dim(x, torch.tensor([1, 3]).view(1, 2, 1, 1), 1), 2, TWO_OF_8, "take_along_dim"),
    pick(lambda _, x: torch.take_along_dim(x, torch.tensor([1, 2]).view(1, 1, 1, 2), 3).repeat(1, 1, 1, 3), 8, ALL,
         "take_along_dim in space"),
    pick(lambda _, x: x.roll(3, 1), 8, [f"8 exact: {A} b.weight/1 c.weight/1"], "roll"),
    pick(lambda _, x: x.roll((-2, 1), (-3, 3)), 8, [f"8 exact: {A} b.weight/1 c.weight/1"], "roll of channels and space"),
    pick(lambda _, x: x.roll(5), 8, [], "roll of everything", frozen={"a.weight/0": "left empty"}),
    pick(lambda _, x: x.roll(72), 8, ALL, "roll of everything by whole channels", interchangeable=False),
    pick(lambda _, x: x.mean((0, 2, 3)).roll(4).view(1, -1, 1, 1) * x, 8, ["4 exact: a.bias/0*2 a.weight/0*2 b.weight/1*2 c.weight/1*2"],
         "roll of a vector"),
    pick(lambda _, x: x.flip(1), 8, [f"8 exact: {A} b.weight/1 c.weight/1"], "flip", kind="module"),
    pick(lambda _, x: x.flip((-1, -3)), 8, [f"8 exact: {A} b.weight/1 c.weight/1"], "flip of channels and space", kind="module"),
    *(pick(lambda _, x, k=k: x.rot90(k, (1, 2)).rot90(-k, (1, 2)), 8, ALL, f"turned by {k} quarters and back") for k in range(1, 4)),
    pick(lambda _, x: x.flip(2).rot90(-1, (1, 2)).transpose(1, 2), 8, ALL, "turned clockwise"),
    pick(lambda _, x: x.rot90(1, (1, 3)).transpose(1, 3), 8, ALL, "turned anticlockwise"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_indexing(case: Case) -> None:
    """Groups are what the formula of the operator says, and removal is exact."""
    check(case)


def test_table_that_depends_on_the_batch() -> None:
    """A literal table that has other numbers at another batch size cannot follow it, which the report says."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        flat = torch.relu(m.a(x)).flatten(0, 1).t().flatten()
        out: torch.Tensor = m.c(flat[torch.arange(8) * 5 * x.shape[0]].view(1, 8))
        return out

    model = Case("table", run, {"a": nn.Linear(4, 8), "c": nn.Linear(8, 4)}, [], inputs=sequences).build()
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5}], example_inputs=sequences(2)).masks()
    _, report = gp.speedup(model, masks, result="graph")
    assert report.verified
    assert "only at batch 2: a table of positions depends on the batch size" in report.reason


class _Window(torch.nn.Module):
    """A learnt bias per offset between two positions, looked up by a constant table of which short inputs need a part."""

    offsets: torch.Tensor

    def __init__(self) -> None:
        """Makes the layers and the table."""
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 8), torch.nn.Linear(8, 3)
        self.table = torch.nn.Parameter(torch.randn(9, 8))
        self.register_buffer("offsets", torch.arange(5)[:, None] - torch.arange(5)[None, :] + 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (n, length <= 5, 4) to (n, length, 3)."""
        length = x.shape[1]
        bias = self.table[self.offsets[:length, :length].reshape(-1)].view(length, length, -1)
        out: torch.Tensor = self.b((self.a(x)[:, None] + bias).mean(2))
        return out


def test_rows_that_the_example_does_not_look_up_stay() -> None:
    """Longer inputs need them: a network pruned with short ones still computes what the masked network computes on long ones."""
    torch.manual_seed(0)
    model = _Window().double().eval()
    short, long = (torch.randn(2, n, 4, dtype=torch.float64) for n in (3, 5))
    graph = gp.trace(model, short)
    assert "do not look up" in graph.explain("table")
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], graph=graph).masks()
    small, report = gp.speedup(model, masks)
    assert report.kind == "module"
    assert torch.allclose(small(long), masks.masked(model)(long), rtol=1e-12)
