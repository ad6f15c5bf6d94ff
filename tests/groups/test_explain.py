"""Why positions stay: also for dimensions that had met nothing when an operator fixed them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.ops import RULES
from graphprune.ops.registry import Labels, Op


class Words(nn.Module):
    """A table of words, two layers, and a table of the model's own that some operator takes whole."""

    def __init__(self, last: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """Builds the tables and layers."""
        super().__init__()
        self.words, self.inner, self.outer = nn.Embedding(50, 16), nn.Linear(16, 24), nn.Linear(24, 8)
        self.table = nn.Parameter(torch.randn(7, 5))
        self.last = last

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns eight numbers per word."""
        return self.last(self.outer(self.inner(self.words(ids))), self.table)


IDS = torch.zeros(2, 7, dtype=torch.int64)


def test_rows_of_a_vocabulary_say_why_they_stay() -> None:
    """The operator, its place, the reason and the remedy are given for the rows; the columns are in a group."""
    lines = gp.trace(Words(lambda x, _: x), IDS).explain("words").splitlines()
    assert "  frozen: words.weight dim 0, 50 of 50: is a vocabulary: its rows are looked up (aten::embedding in words)" in lines
    assert lines[lines.index(next(line for line in lines if "frozen" in line)) + 1].startswith("    remedy: ")
    assert "  group 'words': 16 channels, exact" in lines


def test_a_rule_that_freezes_a_whole_parameter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each dimension of a parameter that an operator takes as it is says which operator that is, where it ran, and what to do."""

    def whole(op: Op) -> Labels:
        op.freeze_value(op["self"], "is taken whole", "Do without")
        return [None] * len(op.shape)

    monkeypatch.setitem(RULES, "aten::relu", whole)
    graph = gp.trace(Words(lambda x, table: x + torch.relu(table).sum()), IDS)
    found = {f.dim: f for f in graph.frozen if f.parameter == "table"}
    assert sorted(found) == [0, 1]
    for entry in found.values():
        assert (entry.operator, entry.module, entry.reason, entry.remedy) == ("aten::relu", "", "is taken whole", "Do without")
    text = graph.explain("table")
    assert text.count("is taken whole (aten::relu)") == 2
    assert text.count("remedy: Do without") == 2


def test_dimensions_that_met_labels_say_why_as_before() -> None:
    """An output's channels are frozen by the output, not by the layer that makes them."""
    graph = gp.trace(Words(lambda x, _: x), IDS)
    assert {(f.operator, f.reason) for f in graph.frozen if f.parameter.startswith("outer") and f.dim == 0} == {
        ("output", "reaches an output of the model")
    }
