"""From labels to groups: names, order, footprints, what is frozen and why, and what happens when a coupling is forgotten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.ops import RULES, joining, pointwise
from graphprune.ops.registry import Op
from tests.ops.test_attention import MULTIHEAD
from tests.support.invariants import MIN_CONTROL, coverage_faults, permutation_error
from tests.support.operators import Network, conv, described, filled, images, let, sequences, table


class Blocks(nn.Module):
    """Five blocks: a stem, a residual one, a depthwise one, a concatenation, and a classifier of the flattened map."""

    def __init__(self) -> None:
        """Builds the layers."""
        super().__init__()
        self.stem, self.stem_norm = conv(3, 8), nn.BatchNorm2d(8)
        self.inner, self.inner_norm, self.outer = conv(8, 6), nn.BatchNorm2d(6), conv(6, 8)
        self.deep, self.point = conv(8, 8, groups=8), conv(8, 6, 1)
        self.left, self.right, self.mix = conv(6, 4), conv(6, 4), conv(8, 6, 1)
        self.head = nn.Linear(6 * 9, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns five numbers per image of 6 x 6 pixels."""
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = torch.relu(x + self.outer(torch.relu(self.inner_norm(self.inner(x)))))
        x = torch.relu(self.point(torch.tanh(self.deep(x))))
        x = torch.relu(self.mix(torch.cat([torch.tanh(self.left(x)), self.right(x)], 1)))
        out: torch.Tensor = self.head(nn.functional.max_pool2d(x, 2).flatten(1))
        return out


def blocks() -> nn.Module:
    """Returns the network with random weights in float64."""
    return filled(Blocks())


def halved(model: nn.Module, graph: gp.DependencyGraph) -> gp.Masks:
    """Returns masks that keep the better half of every group."""
    pruner = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], example_inputs=images(2), graph=graph)
    return pruner.masks()


STREAM = "stem.bias/0 stem.weight/0 stem_norm.bias/0 stem_norm.running_mean/0 stem_norm.running_var/0 stem_norm.weight/0"
INNER = "inner_norm.bias/0 inner_norm.running_mean/0 inner_norm.running_var/0 inner_norm.weight/0"
EXPECTED = [
    f"8 exact: deep.bias/0 deep.weight/0 inner.weight/1 outer.bias/0 outer.weight/0 point.weight/1 {STREAM}",
    f"6 exact: inner.bias/0 inner.weight/0 {INNER} outer.weight/1",
    "6 exact: left.weight/1 point.bias/0 point.weight/0 right.weight/1",
    "4 exact: left.bias/0 left.weight/0 mix.weight/1",
    "4 exact: mix.weight/1 right.bias/0 right.weight/0",
    "6 exact: head.weight/1*9 mix.bias/0 mix.weight/0",
]

# -- what a graph says ---------------------------------------------------------------------------------------------------------------


def test_groups_of_five_blocks() -> None:
    """The groups are those that one finds by hand, in the order in which the forward pass produces them."""
    graph = gp.trace(blocks(), images(2))
    assert described(graph) == sorted(EXPECTED)
    assert [g.name for g in graph] == ["stem", "inner", "point", "left", "right", "mix"]
    assert coverage_faults(blocks(), graph) == []


def test_slices_list_positions_per_channel() -> None:
    """An index has one row per channel; producers come first; flattened maps give several positions."""
    graph = gp.trace(blocks(), images(2))
    for group in graph:
        assert all(s.index.shape[0] == group.channels and s.index.dtype == np.int64 for s in group.slices)
        produces = [s.produces for s in group.slices]
        assert produces == sorted(produces, reverse=True)
    head = next(s for s in graph["mix"].slices if s.parameter == "head.weight")
    assert head.index.tolist() == np.arange(54).reshape(6, 9).tolist()
    right = next(s for s in graph["right"].slices if s.parameter == "mix.weight")
    assert right.index.ravel().tolist() == [4, 5, 6, 7]
    assert graph["stem"].layers == ("stem", "outer", "deep")


def test_frozen_positions_name_their_reason() -> None:
    """Inputs, outputs and kernels stay, each with a reason; `explain` repeats it."""
    graph = gp.trace(blocks(), images(2))
    reasons = {f"{f.parameter}/{f.dim}": str(f) for f in graph.frozen}
    assert "reaches an output" in reasons["head.weight/0"]
    assert "input of the model" in reasons["stem.weight/1"]
    assert "kernel position" in reasons["stem.weight/3"]
    assert "reaches an output" in graph.explain("head")
    assert "outer.weight" in graph.explain("stem")
    with pytest.raises(gp.GraphPruneError, match="steam"):
        graph.explain("steam")


def test_parameters_that_take_no_part_are_frozen() -> None:
    """A layer that the forward pass does not run is listed as such, in all its dimensions."""
    model = Network(lambda m, x: m.a(x), {"a": conv(3, 4), "spare": conv(3, 4)}).double()
    graph = gp.trace(model, images(2))
    unused = [f for f in graph.frozen if f.parameter.startswith("spare")]
    assert sorted((f.parameter, f.dim) for f in unused) == [("spare.bias", 0), *(("spare.weight", d) for d in range(4))]
    assert all("takes no part" in f.reason for f in unused)


def test_channels_with_other_footprints_are_other_groups() -> None:
    """Channels that a second layer sees as well are not interchangeable with those that it does not see."""
    model = Network(
        lambda m, x: let(torch.relu(m.a(x)), lambda y: m.b(y) + m.c(y[:, :3])), {"a": conv(3, 8), "b": conv(8, 4), "c": conv(3, 4)}
    )
    graph = gp.trace(model.double(), images(2))
    assert [(g.name, g.channels) for g in graph] == [("a", 3), ("a#2", 5)]
    assert graph["a#2"].slices[0].index.ravel().tolist() == [3, 4, 5, 6, 7]


def test_a_channel_that_owns_a_whole_layer_stays() -> None:
    """Removing every index of a dimension would leave a layer empty, so what owns them all is frozen, and said to be."""
    model = Network(lambda m, x: m.b(torch.relu(m.a(x)).unflatten(1, (1, 4)).flatten(1, 2)), {"a": conv(3, 4), "b": conv(4, 2)}).double()
    assert [g.channels for g in gp.trace(model, images(2))] == [4]
    narrow = Network(lambda m, x: m.b(torch.relu(m.a(x)).repeat(1, 4, 1, 1)), {"a": conv(3, 1), "b": conv(4, 2)}).double()
    graph = gp.trace(narrow, images(2))
    assert graph.groups == ()
    assert coverage_faults(narrow, graph) == []


def test_statistics_are_named() -> None:
    """A changed verdict says which operator takes the statistic, and where."""
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).double()
    group = gp.trace(model, sequences(2)).groups[0]
    assert group.verdict == "changed"
    assert group.why == ("layer_norm in 1",)


def test_fingerprints_tell_models_apart() -> None:
    """Two traces of one model have one fingerprint, at any batch size; another width has another."""
    assert gp.trace(blocks(), images(2)).fingerprint == gp.trace(blocks(), images(3)).fingerprint
    one, two = (nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2)) for width in (8, 9))
    assert gp.trace(one, torch.ones(2, 4)).fingerprint != gp.trace(two, torch.ones(2, 4)).fingerprint


def test_dataflow_between_layers() -> None:
    """The networkx graph has an edge from each producer to each layer that sees its result first."""
    nodes = gp.trace(blocks(), images(2)).to_networkx()
    assert {"left", "right"} == set(nodes.successors("point"))
    assert {"left", "right"} == set(nodes.predecessors("mix"))
    assert nodes.edges["right", "mix"]["operator"].endswith("conv2d")
    assert "stem" in nodes.nodes["outer"]["groups"]


def test_names_do_not_depend_on_the_batch() -> None:
    """Heads and widths of heads have the same names at every batch size, so that masks for one fit the other."""
    prints = [[(g.name, g.role) for g in gp.trace(MULTIHEAD.build(), MULTIHEAD.inputs(batch))] for batch in range(2, 10)]
    assert all(names == prints[0] for names in prints)


# -- what happens when a coupling is forgotten ---------------------------------------------------------------------------------------

PLACES = [(g, s) for g, line in enumerate(EXPECTED) for s in range(len(line.partition(": ")[2].split()))]


def without(graph: gp.DependencyGraph, group: int, number: int) -> gp.DependencyGraph:
    """Returns a graph in which one group has lost one of its slices."""
    broken = replace(graph.groups[group], slices=tuple(s for i, s in enumerate(graph.groups[group].slices) if i != number))
    return replace(graph, groups=tuple(broken if i == group else g for i, g in enumerate(graph.groups)))


@pytest.mark.parametrize(("group", "number"), PLACES)
def test_a_slice_left_out_is_found(group: int, number: int) -> None:
    """Permutation and speedup both fail on a group that lacks any one slice, and speedup names a layer of it."""
    model = blocks()
    whole = gp.trace(model, images(2))
    graph = without(whole, group, number)
    error, _ = permutation_error(model, graph, images(2))
    assert error > MIN_CONTROL
    if not graph.groups[group].slices:
        return
    masks = gp.Masks(graph, {graph.groups[group].name: np.arange(graph.groups[group].channels) % 2 == 0})
    with pytest.raises(gp.GraphPruneError) as raised:
        gp.speedup(model, masks)
    layers = {s.module for s in whole.groups[group].slices} | {"cat", "add", "view", "batch_norm"}
    assert any(layer in str(raised.value) for layer in layers), str(raised.value)


def swapped(op: Op) -> Any:
    """A rule of `cat` that takes the tensors in the wrong order."""
    return joining.cat(replace_argument(op, "tensors", op["tensors"][::-1]))


def replace_argument(op: Op, name: str, value: object) -> Op:
    """Changes one argument of an operator call, as its rule will see it."""
    op.arguments[name] = value
    return op


def uncoupled(op: Op) -> Any:
    """A rule of `add` that forgets the second argument."""
    return op.dims(op.values()[0]) if len(op.values()) > 1 else pointwise.pointwise(op)


def forgetful(op: Op) -> Any:
    """A rule of `batch_norm` that leaves the scale out."""
    labels = op.dims(op["input"])
    for name in ("bias", "running_mean", "running_var"):
        labels[1] = op.bind(op[name], 0, labels[1])
    return labels


@pytest.mark.parametrize(
    ("operator", "rule"),
    [("aten::cat", swapped), ("aten::add", uncoupled), ("aten::batch_norm", forgetful)],
    ids=["cat", "add", "batch_norm"],
)
def test_a_wrong_rule_is_found(operator: str, rule: Callable[[Op], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Permutation and speedup both fail when a rule forgets a coupling, or makes a wrong one."""
    monkeypatch.setitem(RULES, operator, rule)
    model = blocks()
    graph = gp.trace(model, images(2))
    error, _ = permutation_error(model, graph, images(2))
    assert error > MIN_CONTROL
    with pytest.raises(gp.GraphPruneError):
        gp.speedup(model, halved(model, graph))


def test_right_rules_pass_the_same() -> None:
    """With the rules as they are, neither of the two finds anything."""
    model = blocks()
    graph = gp.trace(model, images(2))
    error, control = permutation_error(model, graph, images(2))
    assert error < 1e-9
    assert control > MIN_CONTROL
    _, report = gp.speedup(model, halved(model, graph))
    assert report.error < 1e-9
    assert report.effect > MIN_CONTROL


def test_tied_tables_are_one_tensor() -> None:
    """A parameter under two names is in a group once, under the first of them."""
    shared = table(8)
    model = Network(
        lambda m, x: m.b(torch.relu(m.a(x)) * m.p + m.q), {"a": nn.Linear(4, 8), "p": shared, "q": shared, "b": nn.Linear(8, 2)}
    )
    graph = gp.trace(model.double(), sequences(2))
    assert described(graph) == ["8 exact: a.bias/0 a.weight/0 b.weight/1 p/0"]
    assert dict(graph.aliases) == {"q": "p"}
