"""Measurements fail one by one, and the counts that they make from slices are right."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from graphprune.groups.graph import Frozen
from tests.support import measure, zoo_timm
from tests.support.handmade import Graph, Group, Slice, residual, residual_graph
from tests.support.measure import Bench, Settings, rounding
from tests.support.zoo_arithmetic import in_double
from tests.support.zoo_findings import beyond_reference, held_by, off_target, reachable_share
from tests.support.zoo_sources import Blueprint, images

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
    shared = Group("widths", 2, (Slice("v", 0, np.arange(2)[:, None]), Slice("q", 0, widths)))  # one value head for all query heads
    graph = Graph((graph.groups[0], shared))
    assert off_target(graph, {**whole, "heads": np.arange(4) < 2}, 0.5) == []
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


def test_measurements_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left out does not run and is no failure."""
    monkeypatch.setattr(measure, "MEASUREMENTS", {"one": lambda _: {"a": 1}, "two": lambda _: {"b": 2}})
    record = measure.measure(Settings("torchvision:resnet18"), leave_out=["one"])
    assert "a" not in record
    assert record["b"] == 2
    assert record["failures"] == {}


class Rounding(nn.Module):
    """Casts to float32 on its way, as norms and rotations of transformers do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns its input through a narrower type, its sum taken there."""
        return x.float().to(x.dtype) + x.sum(dtype=torch.float32).to(x.dtype)


def test_double_precision_leaves_nothing_rounded() -> None:
    """Inside, casts and reductions that ask for float32 give float64; outside they round."""
    x = torch.full((2,), 1 / 3, dtype=torch.float64)
    assert float((Rounding()(x) - 1).abs().max()) > 1e-9
    assert float((in_double(lambda: Rounding()(x)) - 1).abs().max()) < 1e-15


def test_what_does_not_run_in_double_precision_runs_as_it_is() -> None:
    """A table of a type of its own makes a matrix product fail inside; the result is then that of the plain run."""
    table = torch.eye(2)
    result = in_double(lambda: table @ torch.ones(2, 2, dtype=torch.float64).float())
    assert torch.equal(result, torch.ones(2, 2))


@pytest.mark.parametrize(
    ("name", "throughout", "ran_in"), [("mixed", True, "float64"), ("narrow", False, "float32"), ("plain", False, "float64")]
)
def test_a_network_runs_in_float64_wherever_it_can(name: str, *, throughout: bool, ran_in: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that mixes types runs in double precision throughout, one whose kernels refuse float64 runs in float32 and says why."""

    class Mixed(nn.Module):
        """Multiplies with what it has cast."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Returns a product of its own type, of a cast type, or of one type only."""
            if name == "narrow" and x.dtype == torch.float64:
                message = "not for Double"
                raise RuntimeError(message)
            product: torch.Tensor = (x.float() if name == "mixed" else x) @ self.weight
            return product

    plan = Blueprint(Mixed, ((3,),), images)
    monkeypatch.setattr("tests.support.networks.blueprint", lambda *_: plan)
    bench = Bench(Settings("any:name"))
    record = measure.build_network(bench)
    assert (record["throughout"], record["ran_in"]) == (throughout, ran_in)
    assert ("not for Double" in record["refused"]) == (name == "narrow")
    assert bench.get("inputs").dtype == getattr(torch, ran_in)


def test_what_holds_parameters_is_named_with_its_share() -> None:
    """Of a layer of 4 x 3 whose rows are frozen for two reasons, each holds its rows; kernel positions say nothing beside them."""
    model = nn.Conv1d(3, 4, 2, bias=False)
    frozen = [
        Frozen("weight", 0, np.arange(3), "meets mul_tensor_5, which cannot shrink", "aten::mul"),
        Frozen("weight", 0, np.arange(3, 4), "reaches an output of the model", "output"),
        Frozen("weight", 2, np.arange(2), "is a kernel position", "aten::conv1d"),
    ]
    reached = Graph((Group("inputs", 1, (Slice("weight", 1, np.array([[0]])),)),))
    shares = held_by(model, SimpleNamespace(groups=reached.groups, frozen=frozen))
    assert shares == [
        ["meets mul_tensor, which cannot shrink (mul)", 0.5],
        ["reaches an output of the model (output)", pytest.approx(4 / 24)],
    ]


def test_reference_knows_norm_modules_only() -> None:
    """A statistic of a norm whose weight the group owns is known to the masked reference; a mean, or a norm without it, is not."""
    slices = (Slice("norm.weight", 0, np.arange(4)[:, None]),)
    whys = {"known": ("layer_norm in norm",), "mean": ("mean in norm",), "bare": ("layer_norm in other",), "exact": ()}
    groups = [SimpleNamespace(name=name, why=why, slices=slices) for name, why in whys.items()]
    assert beyond_reference(SimpleNamespace(groups=groups)) == {"mean", "bare"}


def test_smallest_networks_of_timm_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each module the network with the fewest parameters is kept; one that cannot be built is said and left out."""
    widths = {"one": {"wide": 9, "slim": 2}, "two": {"broken": 0, "only": 4}}

    def create(name: str, *, pretrained: bool) -> nn.Module:
        del pretrained
        width = {key: value for sizes in widths.values() for key, value in sizes.items()}[name]
        if not width:
            message = "no such thing"
            raise ValueError(message)
        return nn.Linear(width, 1, bias=False)

    fake = SimpleNamespace(
        __version__="0", create_model=create, list_modules=lambda: list(widths), list_models=lambda module: list(widths[module])
    )
    monkeypatch.setattr(zoo_timm, "library", lambda: fake)
    monkeypatch.setattr(zoo_timm, "SMALLEST", tmp_path / "smallest.json")
    said: list[str] = []
    zoo_timm.refresh(said.append)
    assert zoo_timm.names() == ("slim", "only")
    assert any("broken cannot be built: no such thing" in line for line in said)


def test_rounding_tells_chaos_from_calm() -> None:
    """A linear map passes one unit in the last place on as it is; a steep chain amplifies it."""
    calm = nn.Linear(4, 3, dtype=torch.float64)
    steep = nn.Sequential(*(Steep() for _ in range(30)))
    inputs = torch.rand(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert 0 < rounding(calm, inputs) < 1e-14
    assert rounding(steep, inputs) > 1e-9


class Steep(nn.Module):
    """The logistic map, which doubles differences on average."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [0, 1] to itself."""
        return 4 * x * (1 - x)
