"""Measurements fail one by one, and the counts that they make from slices are right."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.support import measure
from tests.support.handmade import Graph, Group, Slice, residual, residual_graph
from tests.support.measure import Bench, Settings, off_target, reachable_share

BY_HALVES = {"stem": np.array([1, 1, 1, 0, 0, 0], dtype=bool), "inner": np.array([0, 1, 1, 0], dtype=bool)}


def test_reachable_share_is_that_of_the_closed_formula() -> None:
    """A tensor is reached where any of its dimensions is; head.bias alone is not."""
    model, _ = residual()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert reachable_share(model, residual_graph()) == pytest.approx(1 - 5 / total)
    block_only = replace(residual_graph(), groups=residual_graph().groups[1:])
    assert reachable_share(model, block_only) == pytest.approx((4 * 6 * 9 * 2 + 2 * 4) / total)


def test_off_target_names_groups_that_keep_another_number() -> None:
    """Half of six and of four is on target; one channel more or fewer is not, and one channel always stays."""
    graph = residual_graph()
    assert off_target(graph, BY_HALVES, 0.5) == []
    assert off_target(graph, {**BY_HALVES, "inner": np.array([1, 1, 1, 0], dtype=bool)}, 0.5) == ["inner"]
    assert off_target(graph, {**BY_HALVES, "stem": np.array([1, 1, 0, 0, 0, 0], dtype=bool)}, 0.5) == ["stem"]
    one_each = {"stem": np.arange(6) == 2, "inner": np.arange(4) == 1}
    assert off_target(graph, one_each, 0.9) == []


def test_off_target_counts_joint_groups_together() -> None:
    """Of heads and widths it is enough to remove half along one."""
    heads, widths = np.arange(8).reshape(4, 2), np.arange(8).reshape(4, 2).T
    graph = Graph((Group("heads", 4, (Slice("q", 0, heads),)), Group("widths", 2, (Slice("q", 0, widths),))))
    whole = {"heads": np.ones(4, dtype=bool), "widths": np.ones(2, dtype=bool)}
    assert off_target(graph, {**whole, "heads": np.arange(4) < 2}, 0.5) == []
    assert off_target(graph, {**whole, "widths": np.arange(2) < 1}, 0.5) == []
    assert off_target(graph, {**whole, "heads": np.arange(4) < 3}, 0.5) == ["heads", "widths"]


def test_one_failure_leaves_the_other_measurements_standing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure is recorded with its last line, what builds on it is left out without a second failure, and the rest runs."""

    def fail(_bench: Bench) -> dict[str, Any]:
        message = "first line\nlast line\n"
        raise RuntimeError(message)

    stages: list[str] = []
    measurements = {
        "trace": fail,
        "permutation": lambda bench: {"permutation_error": bench.get("graph")},
        "prune": lambda _: {"error": 0.5, "effect": math.inf},
        "shape": lambda _: {"shape_kept": True},
    }
    monkeypatch.setattr(measure, "MEASUREMENTS", measurements)
    record = measure.measure(Settings("torchvision:resnet18"), lambda so_far: stages.append(so_far["stage"]))
    assert stages == list(measurements)
    assert record["failures"] == {"trace": "RuntimeError: last line", "prune": "effect is inf"}
    assert record["error"] == 0.5
    assert record["shape_kept"]
    assert record["finished"]
    assert "permutation_error" not in record
    assert "effect" not in record
    json.dumps(record, allow_nan=False)
