"""The oracles pass on a correct hand-made graph and fail on broken ones."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.support.handmade import Frozen, Graph, Group, Slice, residual, residual_graph, shrink_by_hand, without_slice
from tests.support.invariants import coverage_faults, evaluate, masked_copy, masked_outputs, permutation_error, shares_positions, train_step
from tests.support.kept_statistics import KeptStatistics
from tests.support.networks import randomise
from tests.support.outputs import relative_error
from tests.support.untouched import assert_same, changes, snapshot


def test_permutation_of_right_graph_changes_nothing() -> None:
    """On the right graph the error is rounding, and the control is large."""
    model, images = residual()
    error, control = permutation_error(model, residual_graph(), images)
    assert error < 1e-13
    assert control > 1e-2


@pytest.mark.parametrize(("group", "number"), [(g, n) for g, group in enumerate(residual_graph().groups) for n in range(len(group.slices))])
def test_permutation_finds_each_missing_slice(group: int, number: int) -> None:
    """Leaving any single slice out of its group gives a large error."""
    model, images = residual()
    error, _ = permutation_error(model, without_slice(residual_graph(), group, number), images)
    assert error > 1e-3


def test_permutation_finds_wrong_rows() -> None:
    """Rows of a flattened map that are dealt to the wrong channels give a large error."""
    model, images = residual()
    graph = residual_graph()
    wrong = Slice("head.weight", 1, np.arange(96).reshape(16, 6).T)
    stream = replace(graph.groups[0], slices=(*graph.groups[0].slices[:-1], wrong))
    error, _ = permutation_error(model, replace(graph, groups=(stream, graph.groups[1])), images)
    assert error > 1e-3


def test_permutation_of_joint_groups() -> None:
    """Two groups that own the same positions jointly (heads and widths) are permuted one after the other, without error."""

    class Heads(nn.Module):
        """Scores of 3 heads of width 2."""

        def __init__(self) -> None:
            """Builds queries and keys."""
            super().__init__()
            self.query, self.key, self.value = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Returns a weighted sum over heads."""
            q, k = self.query(x).unflatten(-1, (3, 2)), self.key(x).unflatten(-1, (3, 2))
            return torch.tanh((q * k).sum(-1) * self.value(x)).sum(-1)

    torch.manual_seed(0)
    heads, widths = np.arange(6).reshape(3, 2), np.arange(6).reshape(3, 2).T
    shared = [f"{layer}.{tensor}" for layer in ("query", "key") for tensor in ("weight", "bias")]
    one = np.arange(3)[:, None]
    by_head = [Slice(name, 0, heads) for name in shared] + [Slice("value.weight", 0, one), Slice("value.bias", 0, one)]
    by_width = [Slice(name, 0, widths) for name in shared]
    graph = Graph((Group("heads", 3, tuple(by_head)), Group("widths", 2, tuple(by_width))))
    error, control = permutation_error(Heads().double(), graph, torch.randn(2, 4, dtype=torch.float64))
    assert error < 1e-13
    assert control > 1e-2


def test_permutation_leaves_model_alone() -> None:
    """The model keeps its tensors and its training flags."""
    model, images = residual()
    model.stem_norm.train()
    before = snapshot(model)
    permutation_error(model, residual_graph(), images)
    assert changes(before, snapshot(model)) == []


def test_masked_copy_equals_network_shrunk_by_hand() -> None:
    """Zeroing the removed slices computes what a smaller network computes, and differs from the original."""
    model, images = residual()
    masks = {"stem": np.array([1, 0, 1, 1, 0, 0], dtype=bool), "inner": np.array([0, 1, 1, 0], dtype=bool)}
    masked = evaluate(masked_copy(model, residual_graph(), masks), images)
    small = evaluate(shrink_by_hand(model, [0, 2, 3], [1, 2]), images)
    assert relative_error(masked, small) < 1e-13
    assert relative_error(masked, evaluate(shrink_by_hand(model, [0, 2, 4], [1, 2]), images)) > 1e-3
    assert relative_error(masked, evaluate(model, images)) > 1e-3


@pytest.mark.parametrize("kind", ["layer", "group", "rms"])
def test_masked_outputs_take_statistics_over_kept_channels(kind: str) -> None:
    """Norms across channels agree with the shrunk network inside the reference, and not without it."""
    torch.manual_seed(0)

    def network(width: int, groups: int) -> nn.Sequential:
        norms = {"layer": nn.LayerNorm(width), "group": nn.GroupNorm(groups, width), "rms": nn.RMSNorm(width)}
        return nn.Sequential(nn.Linear(3, width), nn.Tanh(), norms[kind], nn.Linear(width, 2)).double().eval()

    model = network(6, 2)
    randomise(model, 0)
    inputs = torch.randn(4, 3, dtype=torch.float64)
    kept = [0, 2, 3, 4] if kind == "layer" else [0, 2, 4, 5]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
        if name in state:
            state[name] = state[name][kept]
    state["3.weight"] = state["3.weight"][:, kept]
    small = network(4, 2)
    small.load_state_dict(state)
    index = np.arange(6)[:, None]
    names = [("0.weight", 0), ("0.bias", 0), ("2.weight", 0), ("2.bias", 0), ("3.weight", 1)]
    graph = Graph((Group("0", 6, tuple(Slice(name, dim, index) for name, dim in names if name in state)),))
    masks = {"0": np.isin(np.arange(6), kept)}
    expected = evaluate(small, inputs)
    assert relative_error(masked_outputs(model, graph, masks, inputs), expected) < 1e-13
    assert relative_error(evaluate(masked_copy(model, graph, masks), inputs), expected) > 1e-3


def test_kept_statistics_leave_unknown_norms_alone() -> None:
    """A norm whose weight is not listed, or that has none, computes what it always computes."""
    x = torch.randn(2, 4)
    norm = nn.LayerNorm(4)
    expected = norm(x), functional.layer_norm(x, [4])
    with KeptStatistics([(nn.LayerNorm(4).weight, torch.zeros(4, dtype=torch.bool))]):
        actual = norm(x), functional.layer_norm(x, [4])
    assert_same(list(expected), list(actual), "another norm was replaced")


def test_coverage_of_right_graph_has_no_faults() -> None:
    """Every position of the right graph is in a group or frozen."""
    assert coverage_faults(residual()[0], residual_graph()) == []


def test_coverage_names_missing_and_contradictory_positions() -> None:
    """A dimension in no group and a position that is both grouped and frozen are each named."""
    graph = residual_graph()
    broken = replace(without_slice(graph, 1, 0), frozen=(*graph.frozen, Frozen("stem.bias", 0, np.array([2]))))
    faults = coverage_faults(residual()[0], broken)
    assert len(faults) == 2
    assert faults[0].startswith("stem.bias dim 0: 1 of 6")
    assert faults[1].startswith("inner.weight dim 0: 4 of 4")


def test_snapshot_sees_each_kind_of_change() -> None:
    """A changed weight, flag, attribute, hook, gradient flag or random state is reported under its name."""
    model, _ = residual()
    before = snapshot(model)
    with torch.no_grad():
        model.stem.weight[0, 0, 0, 0] += 1e-12
    model.inner_norm.train()
    model.outer.out_channels = 7
    model.head.register_forward_hook(lambda *_: None)
    model.head.bias.requires_grad_(False)
    torch.rand(1)
    expected = ["tensors/stem.weight", "attributes/inner_norm/training", "attributes/outer/out_channels", "hooks/head"]
    expected += ["requires_grad/head.bias", "random state"]
    assert sorted(changes(before, snapshot(model))) == sorted(f"/{path}" for path in expected)


def test_train_step_reports_parameters_without_gradient() -> None:
    """A layer that takes no part receives no gradient; the model itself receives none at all."""
    model, images = residual()
    model.register_module("unused", nn.Linear(2, 2).double())
    assert train_step(model, images) == ["unused.weight", "unused.bias"]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_train_step_rejects_gradients_that_are_no_numbers() -> None:
    """A parameter that is not a number makes the step fail."""
    model, images = residual()
    model.head.bias.data[0] = math.nan
    broken = nn.Sequential(copy.deepcopy(model), nn.Softmax(dim=1))
    with pytest.raises(ArithmeticError, match="not finite"):
        train_step(broken, images)


def test_group_that_shares_positions_with_itself_is_left_alone() -> None:
    """Products of all pairs of channels cannot be permuted slice by slice; such a group is left out, all others are permuted."""

    def group(index: list[list[int]]) -> Group:
        return Group("pairs", len(index), (Slice("head.weight", 1, np.array(index)),))

    pairs = group([[0, 1, 2], [1, 2, 3]])
    assert shares_positions(pairs)
    assert not shares_positions(group([[0, 1], [2, 3]]))
    model, images = residual()
    graph = residual_graph()
    error, control = permutation_error(model, replace(graph, groups=(*graph.groups, pairs)), images)
    assert error < 1e-13
    assert control > 1e-2
