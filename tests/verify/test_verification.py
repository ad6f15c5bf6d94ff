"""A removal that went wrong is noticed, named and refused; a removal that went right is measured honestly."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graphprune as gp
from graphprune.ops.registry import RULES, Labels, Op
from graphprune.speedup import speedup as surgery
from graphprune.trace.outputs import output_tensors
from graphprune.trace.recorder import record
from graphprune.verify.replay import Check, difference, tolerance_for
from tests.support.handmade import residual
from tests.support.invariants import coverage_faults, evaluate, permutation_error
from tests.support.operators import Network, conv, filled, images
from tests.support.outputs import relative_error
from tests.support.untouched import changes, snapshot

# -- a network of five blocks --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block with a bottleneck: plain, with a depthwise convolution, with a gate, or with two joined branches."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inner, self.norm = conv(8, 6), nn.BatchNorm2d(6)
        self.middle = conv(6, 6, groups=6 if kind == "depthwise" else 1)
        self.gate = conv(6, 6, 1)
        self.outer = conv(12 if kind == "joined" else 6, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map of the same shape."""
        hidden = torch.relu(self.norm(self.inner(x)))
        if self.kind == "joined":
            hidden = torch.cat([torch.tanh(self.middle(hidden)), self.gate(hidden)], 1)
        elif self.kind == "gated":
            hidden = hidden * torch.sigmoid(self.gate(hidden.mean((2, 3), keepdim=True)))
        elif self.kind == "depthwise":
            hidden = torch.tanh(self.middle(hidden))
        return x + functional.silu(self.outer(hidden))


class FiveBlocks(nn.Module):
    """A stem, five residual blocks and a classifier on the flattened map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.blocks = nn.ModuleList(Block(kind) for kind in ("plain", "depthwise", "gated", "joined", "plain"))
        self.head = nn.Linear(8 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Returns five logits per image of 6 x 6 pixels."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(torch.relu(x).flatten(1))
        return logits


def five_blocks() -> tuple[nn.Module, Tensor]:
    """Returns the network with random weights and statistics, and two images."""
    return filled(FiveBlocks()), images(2)


def half(graph: gp.DependencyGraph) -> gp.Masks:
    """Returns masks that keep every second channel of every group."""
    return gp.Masks(graph, {group.name: np.arange(group.channels) % 2 == 0 for group in graph.groups})


def without(graph: gp.DependencyGraph, group: str, number: int) -> gp.DependencyGraph:
    """Returns the graph with one slice of one group left out."""
    broken = replace(graph[group], slices=tuple(s for i, s in enumerate(graph[group].slices) if i != number))
    return replace(graph, groups=tuple(broken if g.name == group else g for g in graph.groups))


GROUPS = {
    "stem": 1 + 5 * 3 + 1 + 1,  # filters and biases of the stem, filters, biases and readers in every block, columns of the head
    "blocks.0.inner": 7,
}


def test_the_five_blocks_are_right_as_they_are() -> None:
    """Unbroken, the network passes every test that the broken ones below must fail."""
    model, inputs = five_blocks()
    graph = gp.trace(model, inputs)
    error, control = permutation_error(model, graph, inputs)
    assert error < 1e-9
    assert control > 1e-3
    assert coverage_faults(model, graph) == []
    assert {name: len(graph[name].slices) for name in GROUPS} == GROUPS
    _, report = gp.speedup(model, half(graph))
    assert report.error < 1e-9
    assert report.effect > 1e-3


@pytest.mark.parametrize(("group", "number"), [(name, number) for name, count in GROUPS.items() for number in range(count)])
def test_one_slice_left_out_of_a_group_is_noticed(group: str, number: int) -> None:
    """Whichever slice is missing: the permutation test fails, and so does speedup, which names the module and leaves the model alone."""
    model, inputs = five_blocks()
    graph = gp.trace(model, inputs)
    missing = graph[group].slices[number]
    broken = without(graph, group, number)
    error, _ = permutation_error(model, broken, inputs)
    assert error > 1e-3
    before = snapshot(model)
    with pytest.raises(gp.VerificationError, match="departs from the masked model by") as caught:
        gp.speedup(model, half(broken))
    assert missing.module in str(caught.value), f"{missing.parameter} is missing, and {missing.module} is not named"
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("result", ["auto", "graph"])
def test_a_result_that_cannot_even_run_is_placed_by_operator_and_module(result: Any) -> None:
    """Where shapes do not fit any more, the error names the operator and the module at which the result stops, for either kind."""
    model, inputs = five_blocks()
    graph = gp.trace(model, inputs)
    number = next(i for i, s in enumerate(graph["stem"].slices) if s.parameter == "blocks.3.inner.weight")
    with pytest.raises(gp.VerificationError, match=r"departs from the masked model.*conv2d in blocks\.3\.inner"):
        gp.speedup(model, half(without(graph, "stem", number)), result=result)


def test_an_invented_slice_is_noticed() -> None:
    """A group that claims positions of a dimension that is none of its business fails as well."""
    model, inputs = five_blocks()
    graph = gp.trace(model, inputs)
    wrong = gp.Slice("head.bias", 0, np.arange(5)[:, None])
    group = replace(graph["stem"], channels=5, slices=(*(replace(s, index=s.index[:5]) for s in graph["stem"].slices), wrong),
                    causes=graph["stem"].causes[:5])  # fmt: skip
    broken = replace(graph, groups=tuple(group if g.name == "stem" else g for g in graph.groups))
    assert permutation_error(model, broken, inputs)[0] > 1e-3
    with pytest.raises(gp.VerificationError, match="head"):
        gp.speedup(model, half(broken))


def test_rows_dealt_to_the_wrong_channels_are_noticed() -> None:
    """Sizes that fit prove nothing: columns of the flattened map in the wrong order keep every shape, and are found by value."""
    model, inputs = five_blocks()
    graph = gp.trace(model, inputs)
    wrong = [replace(s, index=np.arange(288).reshape(36, 8).T) if s.parameter == "head.weight" else s for s in graph["stem"].slices]
    broken = replace(graph, groups=tuple(replace(g, slices=tuple(wrong)) if g.name == "stem" else g for g in graph.groups))
    assert permutation_error(model, broken, inputs)[0] > 1e-3
    with pytest.raises(gp.VerificationError, match=r"at linear in head: relative difference"):
        gp.speedup(model, half(broken))


# -- rules that forget ---------------------------------------------------------------------------------------------------------------


def first_only(op: Op) -> Labels:
    """Couples nothing: the output has the labels of the first tensor."""
    return op.dims(op.values()[0])


def forgetful_norm(op: Op) -> Labels | list[Labels]:
    """Forgets that the running mean belongs to the channels."""
    op.arguments["running_mean"] = None
    return RULES_BEFORE["aten::batch_norm"](op)


def swapped_cat(op: Op) -> Labels | list[Labels]:
    """Puts the parts side by side in the wrong order."""
    op.arguments["tensors"] = op["tensors"][::-1]
    return RULES_BEFORE["aten::cat"](op)


def forgetful_add(op: Op) -> Labels | list[Labels]:
    """Forgets that both terms of a sum have the same channels."""
    return first_only(op) if op.name == "aten::add" else RULES_BEFORE["pointwise"](op)


def forgetful_mul(op: Op) -> Labels | list[Labels]:
    """Forgets that a gate has the channels that it scales."""
    return first_only(op) if op.name == "aten::mul" else RULES_BEFORE["pointwise"](op)


def forgetful_linear(op: Op) -> Labels | list[Labels]:
    """Reads the columns of a linear layer in reverse."""
    labels = op.dims(op["input"])
    op.bind(op["weight"], 1, None if labels[-1] is None else labels[-1][::-1].copy())
    op.produce(op["weight"], 0)
    return [*labels[:-1], op.bind(op["bias"], 0, op.dim(op["weight"], 0))]


RULES_BEFORE = dict(RULES)
BROKEN: dict[str, tuple[str, Callable[[Op], Any], str]] = {
    "sum": ("pointwise", forgetful_add, r"at add in blocks\.0"),
    "gate": ("pointwise", forgetful_mul, r"at mul in blocks\.2"),
    "running mean": ("aten::batch_norm", forgetful_norm, r"blocks\.0\.norm"),
    "order of parts": ("aten::cat", swapped_cat, r"at (cat|conv2d) in blocks\.3"),
    "order of columns": ("aten::linear", forgetful_linear, r"at linear in head"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_rule_that_forgets_a_coupling_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong rule fails the permutation test, and pruning with it is refused with the operator and the module path."""
    key, broken, place = BROKEN[name]
    model, inputs = five_blocks()
    before = snapshot(model)
    monkeypatch.setitem(RULES, key, broken)
    error, _ = permutation_error(model, gp.trace(model, inputs), inputs)
    assert error > 1e-3
    with pytest.raises(gp.VerificationError, match=place) as caught:
        gp.prune(model, inputs, sparsity=0.5)
    assert "departs from the masked model" in str(caught.value)
    assert changes(before, snapshot(model)) == []


# -- naming the place ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameter", "place"),
    [
        ("stem.weight", "conv2d in stem"),
        ("blocks.1.norm.running_var", r"batch_norm in blocks\.1\.norm"),
        ("blocks.1.middle.bias", r"conv2d in blocks\.1\.middle"),
        ("blocks.4.outer.weight", r"conv2d in blocks\.4\.outer"),
        ("head.bias", "linear in head"),
    ],
)
def test_the_first_operator_that_differs_is_named(parameter: str, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When one tensor of the result is spoilt, the error names the operator that reads it, its module, and by how much it differs."""
    original = vars(surgery)["set_attributes"]

    def spoil(small: nn.Module, removal: Any) -> None:
        original(small, removal)
        with torch.no_grad():
            (dict(small.named_parameters()) | dict(small.named_buffers()))[parameter].mul_(1.5)

    monkeypatch.setattr(surgery, "set_attributes", spoil)
    model, inputs = five_blocks()
    with pytest.raises(gp.VerificationError, match=rf"at {place}: relative difference \d.*at most 1e-09|at most 1e-09\), at {place}:"):
        gp.prune(model, inputs)


def test_small_errors_are_noticed_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative error of 1e-6 in one bias is refused in float64, and passes with the tolerance of float32."""
    original = vars(surgery)["set_attributes"]

    def spoil(small: nn.Module, removal: Any) -> None:
        original(small, removal)
        with torch.no_grad():
            small.get_parameter("head.bias").mul_(1 + 1e-6)

    monkeypatch.setattr(surgery, "set_attributes", spoil)
    model, inputs = five_blocks()
    with pytest.raises(gp.VerificationError, match="linear in head"):
        gp.prune(model, inputs)
    _, report = gp.prune(model.float(), inputs.float())
    assert report.error <= report.tolerance == 1e-4


def test_an_unverified_speedup_compares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify=False` lets through what verification refuses: the checks above are what catches it."""
    model, inputs = five_blocks()
    monkeypatch.setitem(RULES, "aten::cat", swapped_cat)
    small, report = gp.prune(model, inputs, verify=False)
    assert not report.verified
    monkeypatch.undo()
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5}], inputs).masks()
    assert relative_error(evaluate(masks.masked(model), inputs), evaluate(small, inputs)) > 1e-3


# -- measuring -----------------------------------------------------------------------------------------------------------------------


def test_error_and_effect_are_those_of_an_independent_comparison() -> None:
    """The report's numbers are the largest differences, relative to the largest output of the model that is departed from."""
    model, inputs = five_blocks()
    graph = gp.trace(model, inputs)
    masks = half(graph)
    small, report = gp.speedup(model, masks)
    masked = evaluate(masks.masked(model), inputs)
    assert report.effect == pytest.approx(relative_error(evaluate(model, inputs), masked), rel=1e-9)
    assert report.error == pytest.approx(relative_error(masked, evaluate(small, inputs)), abs=1e-14)
    assert report.tolerance == 1e-9
    assert report.verified


def test_a_mask_without_effect_is_told_by_its_effect() -> None:
    """Channels that are zero already can go without any effect, and the report says that the comparison proved nothing."""
    model, inputs = residual()
    with torch.no_grad():
        model.outer.weight[:, 1] = 0
    masks = gp.Masks(gp.trace(model, inputs), {"inner": np.array([True, False, True, True])})
    _, report = gp.speedup(model, masks)
    assert (report.effect, report.error < 1e-9) == (0.0, True)


def test_outputs_that_are_not_finite_are_one_clear_error() -> None:
    """Where the model itself gives NaN or infinity on the example inputs, nothing can be compared, and the error says so."""
    for broken in (lambda x: x / 0, lambda x: x * math.nan, torch.sqrt):
        model = filled(Network(lambda net, x, broken=broken: broken(net.b(net.a(x).relu())), {"a": conv(3, 8), "b": conv(8, 2)}))
        before = snapshot(model)
        with pytest.raises(gp.InputError, match=r"not finite, so nothing can be verified"):
            gp.prune(model, images(2))
        assert changes(before, snapshot(model)) == []
        assert not gp.prune(model, images(2), verify=False)[1].verified


def test_a_masked_model_that_is_not_finite_is_not_called_a_defect() -> None:
    """Where zeroed channels are divided by their own norm, the masked model is NaN: the error says that, and blames nobody."""
    model = filled(Network(lambda net, x: net.b(net.unit(net.a(x))), {"a": conv(3, 8), "b": conv(8, 2), "unit": UnitNorm()}))
    try:
        _, report = gp.prune(model, images(2))
    except gp.GraphPruneError as error:
        assert "finite" in str(error)  # noqa: PT017 (either of two outcomes will do)
        return
    assert report.error < 1e-9


class UnitNorm(nn.Module):
    """Divides every channel by its own norm over space."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns maps of norm 1."""
        return x / x.square().sum((2, 3), keepdim=True).sqrt()


def test_integer_outputs_are_compared_too() -> None:
    """A model that returns classes beside its scores is verified on both."""

    def run(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        scores: Tensor = net.b(net.a(x).relu())
        return scores, scores.argmax(1)

    model = filled(Network(run, {"a": conv(3, 8), "b": conv(8, 2)}))
    small, report = gp.prune(model, images(2))
    assert report.error < 1e-9
    assert small(images(2))[1].dtype == torch.int64


def test_differences_are_relative_to_the_largest_value_per_tensor() -> None:
    """The worst tensor counts, each relative to its own scale; zero scale makes the difference absolute."""
    one, two = torch.tensor([1.0, -4.0]), torch.tensor([1.0, -3.0])
    assert difference([one], [two]) == pytest.approx(0.25)
    assert difference([one, 100 * one], [one, 100 * two]) == pytest.approx(0.25)
    assert difference([torch.zeros(2)], [torch.tensor([0.0, 3.0])]) == 3
    assert difference([torch.tensor([True, False])], [torch.tensor([True, True])]) == 1
    assert difference([torch.tensor([3 + 4j])], [torch.tensor([3 + 0j])]) == pytest.approx(1)
    assert difference([], []) == 0
    assert difference([torch.zeros(0, 3)], [torch.zeros(0, 3)]) == 0


def test_what_cannot_be_compared_is_infinitely_different() -> None:
    """Other shapes, another number of tensors, and values that are no numbers are never within any tolerance."""
    one = torch.ones(2)
    assert difference([one], [one, one]) == math.inf
    assert difference([one], [torch.ones(3)]) == math.inf
    assert difference([one], [torch.ones(2, 1)]) == math.inf
    assert difference([one], [torch.tensor([1.0, math.nan])]) == math.inf
    assert difference([one], [torch.tensor([1.0, math.inf])]) == math.inf
    assert not Check(math.nan, 1.0, 1.0).passed


class Pair(NamedTuple):
    """Two outputs."""

    one: Tensor
    two: Any


def test_outputs_are_found_in_any_structure() -> None:
    """Tensors come in order through tuples, lists, dicts and named tuples; everything else is passed over."""
    a, b, c = torch.zeros(1), torch.ones(2), torch.ones(3)
    assert [t.numel() for t in output_tensors(Pair(a, {"x": [b, None, 3], "y": (c, "text")}))] == [1, 2, 3]
    assert output_tensors(None) == []


def test_the_tolerance_is_that_of_the_coarsest_computation() -> None:
    """A program that computes anything in single precision is held against its tolerance, whatever its outputs' precision."""
    x = torch.randn(2, 4)
    single = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    class Widened(nn.Module):
        """Computes in single precision and returns double precision."""

        def __init__(self) -> None:
            super().__init__()
            self.body = single

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Returns the body's result in double precision."""
            out: torch.Tensor = self.body(x).double()
            return out

    assert tolerance_for(record(single, x)) == 1e-4
    assert tolerance_for(record(Widened(), x)) == 1e-4
    assert tolerance_for(record(copy.deepcopy(single).double(), x.double())) == 1e-9
    assert tolerance_for(record(copy.deepcopy(single).half(), x.half())) > 1e-3
