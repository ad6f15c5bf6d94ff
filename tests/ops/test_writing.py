"""Operators that write at positions: literal positions and constant tables are rewritten, what is computed at run time freezes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from tests.support.operators import Case, check, conv, described, sequences

A, B = "a.bias/0 a.weight/0", "b.bias/0 b.weight/0"
PARTS = {"a": conv(3, 8), "b": conv(3, 4), "c": conv(8, 4)}
OVER = [f"4 exact: {A} {B} c.weight/1", f"4 exact: {A} c.weight/1"]
PLAIN = [f"8 exact: {A} c.weight/1"]
TABLE = {"table": torch.tensor([6, 1, 3, 4])}
ODD = {"chosen": torch.tensor([False, True] * 4)}
LITERAL = torch.tensor([6, 1, 3, 4])


def written(name: str, write: Any, groups: list[str] = OVER, **options: Any) -> Case:
    """Returns a case in which the 4 channels of b are written, or added, to some of the 8 channels of a."""
    parts = {**PARTS, **options.pop("extra", {})}
    return Case(name, lambda m, x: m.c(write(m, torch.relu(m.a(x)), torch.tanh(m.b(x)))), parts, groups, **options)


def filled(name: str, write: Any, groups: list[str] = PLAIN, **options: Any) -> Case:
    """Returns a case in which something is written into the 8 channels of a, and summed up afterwards."""
    parts = {"a": conv(3, 8), "c": conv(8, 4), **options.pop("extra", {})}
    return Case(name, lambda m, x: m.c(write(m, torch.relu(m.a(x)))), parts, groups, **options)


def at(y: torch.Tensor, place: Any, value: Any) -> torch.Tensor:
    """Returns a copy of a tensor, with something written into it in place."""
    y = y.clone()
    y[place] = value
    return y


def added(y: torch.Tensor, place: Any, value: Any) -> torch.Tensor:
    """Returns a copy of a tensor, with something added to a part of it in place."""
    y = y.clone()
    y[place] += value
    return y


def routed(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Returns what an expert makes of the tokens that are routed to it, added to where they came from."""
    x = torch.relu(m.a(x)).flatten(0, 1)
    chosen = (x.detach().sum(1) > x.detach().sum(1).median()).nonzero().squeeze(1)
    out: torch.Tensor = m.c(torch.zeros_like(x).index_add_(0, chosen, m.b(x[chosen])) + x)
    return out


def expanded(m: Any, y: torch.Tensor) -> torch.Tensor:
    """Returns the table, one for every picture and pixel."""
    table: torch.Tensor = m.table.view(1, -1, 1, 1).expand(y.shape[0], -1, *y.shape[2:])
    return table


CASES = [
    written("index_copy", lambda m, x, y: x.index_copy(1, m.table, y), extra=TABLE, kind="graph"),
    written("index_copy, negative dimension", lambda _, x, y: x.index_copy(-3, LITERAL, y)),
    written("index_add", lambda m, x, y: x.index_add(1, m.table, y, alpha=2), extra=TABLE),
    written("index_add at one position twice", lambda _, x, y: x.index_add(1, torch.tensor([5, 2, 5, 0]), y),
            ["1 exact: a.bias/0 a.weight/0 b.bias/0*2 b.weight/0*2 c.weight/1", f"2 exact: {A} {B} c.weight/1",
             f"5 exact: {A} c.weight/1"]),
    written("index_copy at computed positions", lambda _, x, y: x.index_copy(1, (x.mean((0, 2, 3)) > 9).long()[:4], y), [],
            frozen={"a.weight/0": "("}, trainable=False),
    written("index_copy of space", lambda _, x, y: x.index_copy(3, torch.tensor([5, 0]), torch.cat([y, y], 1)[..., :2]),
            ["4 exact: a.bias/0*2 a.weight/0*2 b.bias/0 b.weight/0 c.weight/1*2"], kind="module"),
    filled("index_fill with zero", lambda m, x: x.index_fill(1, m.table, 0.0).sum(1, keepdim=True) * x, extra=TABLE, interchangeable=False),
    filled("index_fill", lambda _, x: x.index_fill(1, LITERAL, 0.3), kind="graph", interchangeable=False),
    filled("index_fill, then sum", lambda _, x: x.index_fill(1, LITERAL, 0.3).sum(1, keepdim=True) * x,
           [f"8 changed: {A} c.weight/1"], kind="graph", interchangeable=False),
    written("scatter", lambda m, x, y: x.scatter(1, expanded(m, y), y), extra=TABLE, kind="graph"),
    written("scatter_add", lambda m, x, y: x.scatter_add(1, expanded(m, y), y), extra=TABLE, kind="graph"),
    written("scatter_add in place", lambda m, x, y: x.clone().scatter_add_(1, expanded(m, y), y), extra=TABLE, kind="graph"),
    written("scatter in place", lambda m, x, y: x.clone().scatter_(1, expanded(m, y), y), extra=TABLE, kind="graph"),
    filled("scatter of a number", lambda m, x: x.scatter(1, expanded(m, x), 0.3), extra=TABLE, kind="graph", interchangeable=False),
    filled("scatter of a number in place", lambda m, x: x.clone().scatter_(1, expanded(m, x), 0.3), extra=TABLE, kind="graph",
           interchangeable=False),
    written("scatter_reduce", lambda m, x, y: x.scatter_reduce(1, expanded(m, y), y, "amax"), [], extra=TABLE,
            frozen={"a.weight/0": "by position (aten::scatter_reduce)"}),
    written("scatter to computed positions", lambda _, x, y: x.scatter(1, (y > 0).long(), y), [],
            frozen={"a.weight/0": "by position computed at run time", "b.weight/0": "cannot shrink (aten::scatter)"}),
    filled("scatter of space", lambda _, x: x.scatter(3, x.new_zeros(x.shape, dtype=torch.long), x), kind="module"),
    written("list of positions", lambda _, x, y: at(x, (slice(None), [6, 1, 3, 4]), y), kind="graph"),
    written("mask of positions", lambda m, x, y: at(x, (slice(None), m.chosen), y), extra=ODD, kind="graph"),
    written("added to a list of positions", lambda _, x, y: added(x, (slice(None), [6, 1, 3, 4]), y), kind="graph"),
    filled("number at a list of positions", lambda _, x: at(x, (slice(None), [6, 1, 3, 4]), 0.3), kind="graph", interchangeable=False),
    filled("number where a computed mask says", lambda _, x: at(x, x > 0.5, 0.3), kind="module"),
    filled("number at pixels where a computed mask says", lambda _, x: at(x.permute(0, 2, 3, 1), x.mean(1) > 0.1, 0.3).permute(0, 3, 1, 2),
           [f"8 changed: {A} c.weight/1"], kind="module"),
    filled("pixels by two lists", lambda _, x: at(x.permute(2, 3, 0, 1), ([0, 5], [1, 1]), 0.3).permute(2, 3, 0, 1), kind="module"),
    written("two lists", lambda _, x, y: at(x, (slice(None), [6, 1, 3, 4], [0, 1, 2, 3]), y[:, :, 0]), [],
            frozen={"a.weight/0": "looked up by position (aten::index_put_)"}),
    written("into a slice", lambda _, x, y: at(x, (slice(None), slice(2, 6)), y)),
    written("into a slice from the end", lambda _, x, y: at(x, (slice(None), slice(-5, -1)), y), kind="graph"),
    written("into a slice with a step", lambda _, x, y: at(x, (slice(None), slice(1, None, 2)), y),
            ["4 exact: a.bias/0*2 a.weight/0*2 b.bias/0 b.weight/0 c.weight/1*2"], kind="module"),
    written("into a slice with a step and an end", lambda _, x, y: at(x, (slice(None), slice(0, 8, 2)), y),
            ["4 exact: a.bias/0*2 a.weight/0*2 b.bias/0 b.weight/0 c.weight/1*2"]),
    filled("into a slice with a step that stops early", lambda _, x: at(x, (slice(None), slice(0, 6, 2)), 0.3), [],
           frozen={"a.weight/0": "written through a view with a step"}),
    filled("into a slice with a step that starts late", lambda _, x: at(x, (slice(None), slice(3, None, 2)), 0.3), [],
           frozen={"a.weight/0": "written through a view with a step"}),
    written("into a narrowed part from the end", lambda _, x, y: x.clone().narrow(1, -6, 4).copy_(y).repeat(1, 2, 1, 1),
            [f"4 exact: {A} {B} c.weight/1*2", f"4 exact: {A}"], interchangeable=False),
    filled("number into one channel", lambda _, x: at(x, (slice(None), 5), 0.3), [f"7 exact: {A} c.weight/1"], kind="graph"),
    written("slice_scatter", lambda _, x, y: torch.slice_scatter(x, y, 1, 3, 7), kind="graph"),
    written("slice_scatter, end left out", lambda _, x, y: torch.slice_scatter(x, y, -3, 4)),
    written("slice_scatter, end beyond the size", lambda _, x, y: torch.slice_scatter(x, y, 1, 4, 100)),
    written("slice_scatter from the end", lambda _, x, y: torch.slice_scatter(x, y, 1, -6, -2), kind="graph"),
    written("slice_scatter with a step", lambda _, x, y: torch.slice_scatter(x, y, 1, 0, 8, 2), kind="graph"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_writing(case: Case) -> None:
    """Groups are what the formula of the operator says, and removal is exact."""
    check(case)


def test_tokens_of_an_expert() -> None:
    """Rows that are picked and written at computed positions leave the channels alone; their number forbids a GraphModule."""
    parts = {"a": nn.Linear(4, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 4)}
    model = Case("tokens", routed, parts, [], inputs=sequences).build()
    assert described(gp.trace(model, sequences(2))) == ["8 exact: a.bias/0 a.weight/0 b.bias/0 b.weight/0 b.weight/1 c.weight/1"]
    small, report = gp.prune(model, sequences(2), sparsity=0.5)
    assert report.verified
    assert report.kind == "module"
    assert small.get_parameter("b.weight").shape == (4, 4)
