"""Scores equal plain loops, counts equal closed formulas, and config lists are heeded group by group."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphprune as gp
from graphprune.pruners.budgets import keep_highest, kept_count
from tests.support.handmade import residual
from tests.support.operators import Network, conv, filled, images, normal, sequences
from tests.support.untouched import changes, same_bits, snapshot

# -- counts --------------------------------------------------------------------------------------------------------------------------

SPARSITIES = st.integers(1, 64).flatmap(lambda d: st.integers(0, d - 1).map(lambda n: Fraction(n, d)))


@given(st.integers(1, 2048), SPARSITIES)
def test_floor_keeps_and_ceil_removes_whole_channels(channels: int, sparsity: Fraction) -> None:
    """Rounding "floor" keeps floor(n (1 - s)), "ceil" removes floor(n s); neither keeps less than one, whatever float s becomes."""
    assert kept_count(channels, float(sparsity), "floor") == max(math.floor(channels * (1 - sparsity)), 1)
    assert kept_count(channels, float(sparsity), "ceil") == channels - math.floor(channels * sparsity)


@given(st.integers(1, 600), SPARSITIES.filter(bool), st.integers(1, 64))
def test_round_to_gives_multiples_where_there_are_enough(channels: int, sparsity: Fraction, multiple: int) -> None:
    """The kept count is the multiple below or above the exact one, at least one multiple, and never more channels than there are."""
    exact = channels * (1 - sparsity)
    below = math.floor(exact / multiple) * multiple
    above = math.ceil(exact / multiple) * multiple
    assert kept_count(channels, float(sparsity), "floor", multiple) == (max(below, multiple) if channels >= multiple else channels)
    assert kept_count(channels, float(sparsity), "ceil", multiple) == min(above, channels)


@given(st.integers(1, 300), st.floats(0, 1, exclude_max=True), st.integers(1, 20))
def test_no_layer_is_emptied_or_grows(channels: int, sparsity: float, multiple: int) -> None:
    """For any float in [0, 1) at least one channel stays, at most all, "ceil" keeps no fewer than "floor", and 0 keeps all."""
    low, high = kept_count(channels, sparsity, "floor", multiple), kept_count(channels, sparsity, "ceil", multiple)
    assert 1 <= low <= high <= channels
    assert kept_count(channels, 0.0, "floor", multiple) == channels


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_of_equal_scores_the_first_stay(scores: list[int], data: st.DataObject) -> None:
    """Exactly k channels stay: the highest scores, and among equal ones those with the smaller index."""
    count = data.draw(st.integers(1, len(scores)))
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    mask = keep_highest(np.array(scores, dtype=np.float64), count)
    assert np.flatnonzero(mask).tolist() == sorted(ranked[:count])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounding": "round"}, "rounding is 'round'.*'floor' or 'ceil'"),
        ({"round_to": 0}, "round_to is 0.*at least 1"),
        ({"round_to": 2.0}, r"round_to is 2\.0"),
        ({"round_to": True}, "round_to is True"),
        ({"cut": "heads"}, "cut is 'heads'.*'within'"),
        ({"criterion": "l11"}, "no criterion is called 'l11'.*did you mean 'l1'"),
        ({"sparsity": 1.0}, r"sparsity is 1\.0, outside \[0, 1\)"),
        ({"sparsity": -0.1}, "outside"),
        ({"sparsity": math.nan}, "outside"),
        ({"sparsity": "half"}, "not a number"),
        ({"exclude": ["convv"]}, "convv"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], words: str) -> None:
    """Each unusable option raises one ConfigError that says what to use."""
    with pytest.raises(gp.ConfigError, match=words):
        gp.prune(chain(), images(2), **options)


# -- scores --------------------------------------------------------------------------------------------------------------------------


def chain() -> Network:
    """Returns two convolutions and a linear layer."""
    parts = {"first": conv(3, 8), "second": conv(8, 6), "head": nn.Linear(6, 4)}
    model = Network(lambda net, x: net.head(torch.relu(net.second(torch.relu(net.first(x)))).mean((2, 3))), parts)
    filled(model)
    return model


def masks_of(model: nn.Module, config: Sequence[Mapping[str, Any]], inputs: object, **options: Any) -> gp.Masks:
    """Returns the masks of the L1 pruner."""
    return gp.L1NormPruner(model, config, example_inputs=inputs, **options).masks()


def scores_of(model: nn.Module, inputs: object) -> dict[str, list[float]]:
    """Returns the L1 scores of every group."""
    pruner = gp.L1NormPruner(model, [{"sparsity": 0.5}], example_inputs=inputs)
    return {name: scores.tolist() for name, scores in pruner.scores().items()}


def total(values: Any) -> float:
    """Adds up absolute values in nested lists, one by one."""
    return sum(total(value) for value in values) if isinstance(values, list) else abs(values)


def rows(weight: torch.Tensor) -> list[float]:
    """Returns the sum of absolute values of every row of a weight (of every filter)."""
    return [total(row) for row in weight.tolist()]


def weight_of(model: nn.Module, name: str) -> torch.Tensor:
    """Returns the weight of a layer."""
    return model.get_parameter(f"{name}.weight").detach()


def added(*parts: list[float]) -> list[float]:
    """Adds lists of scores."""
    return [sum(column) for column in zip(*parts, strict=True)]


def test_a_layer_alone_scores_the_sum_of_its_kernels() -> None:
    """A filter's score is the sum of its absolute weights; its bias, its BatchNorm and its readers count nothing."""
    model = chain()
    expected = {name: pytest.approx(rows(weight_of(model, name)), rel=1e-12) for name in ("first", "second")}
    assert scores_of(model, images(2)) == expected
    with torch.no_grad():
        model.get_parameter("first.bias").mul_(100)
        model.get_parameter("head.weight").mul_(100)
    assert scores_of(model, images(2)) == expected


def test_a_residual_group_scores_the_sum_over_its_producers() -> None:
    """Channels of a residual stream add up the filters of every convolution that writes to it, and nothing else."""
    model, inputs = residual()
    expected = added(rows(weight_of(model, "stem")), rows(weight_of(model, "outer")))
    found = scores_of(model, inputs)
    assert found["stem"] == pytest.approx(expected, rel=1e-12)
    assert found["inner"] == pytest.approx(rows(weight_of(model, "inner")), rel=1e-12)


def test_a_depthwise_convolution_adds_its_own_kernels() -> None:
    """A depthwise convolution produces the channels that it passes on, two filters each where it doubles them."""
    parts = {"point": conv(3, 4, 1), "depth": conv(4, 8, groups=4), "head": conv(8, 2, 1)}
    model = filled(Network(lambda net, x: net.head(torch.relu(net.depth(net.point(x)))), parts))
    doubled = rows(weight_of(model, "depth"))
    depth = [doubled[2 * i] + doubled[2 * i + 1] for i in range(4)]
    found = scores_of(model, images(2))
    assert found["point"] == pytest.approx(added(rows(weight_of(model, "point")), depth), rel=1e-12)


def test_a_transposed_convolution_is_scored_along_its_second_dimension() -> None:
    """The weight of a transposed convolution is (inputs, outputs, ...): channel o adds up weight[:, o]."""
    parts = {"up": nn.ConvTranspose2d(3, 5, 2, stride=2), "head": conv(5, 2)}
    model = filled(Network(lambda net, x: net.head(torch.relu(net.up(x))), parts))
    weight = weight_of(model, "up").tolist()
    expected = [sum(total(weight[i][o]) for i in range(3)) for o in range(5)]
    assert scores_of(model, images(2)) == {"up": pytest.approx(expected, rel=1e-12)}


def test_a_head_scores_all_its_rows_in_queries_keys_and_values() -> None:
    """A head of attention adds up its rows of the query, key and value projections."""
    graph_inputs = sequences(2)
    found = scores_of(attention(), graph_inputs)
    weights = [rows(weight_of(attention(), name)) for name in ("query", "key", "value")]
    per_head = [sum(sum(layer[head * 3 : head * 3 + 3]) for layer in weights) for head in range(4)]
    heads = next(group.name for group in gp.trace(attention(), graph_inputs) if group.role == "block")
    assert found[heads] == pytest.approx(per_head, rel=1e-12)


def attention() -> nn.Module:
    """Returns attention of four heads of width three, between separate projections."""

    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 3)).transpose(1, 2) for layer in (net.query, net.key, net.value))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        logits: torch.Tensor = net.out(attended.transpose(1, 2).flatten(2))
        return logits

    parts = {name: nn.Linear(4, 12) for name in ("query", "key", "value")} | {"out": nn.Linear(12, 4)}
    return filled(Network(run, parts))


@pytest.mark.parametrize(("sparsity", "removed"), [(0.2, {0, 1}), (0.6, {0, 1, 2, 3, 4, 5}), (0.95, set(range(9))), (0.0, set())])
def test_filters_of_growing_weight_go_from_the_first(sparsity: float, removed: set[int]) -> None:
    """Where every weight of filter i is i, the filters with the smallest indices go, exactly as many as asked for."""
    model = nn.Sequential(nn.Conv2d(1, 10, 5), nn.ReLU(), nn.Conv2d(10, 2, 1))
    with torch.no_grad():
        model[0].get_parameter("weight").copy_(torch.arange(10.0)[:, None, None, None].expand(10, 1, 5, 5))
    masks = masks_of(model, [{"sparsity": sparsity}], normal(1, 1, 8, 8).float())
    assert set(np.flatnonzero(~masks["0"]).tolist()) == removed


def test_equal_filters_go_from_the_last() -> None:
    """Where all filters are equal, exactly half of them go, and the first half stays."""
    model = chain()
    nn.init.ones_(model.get_parameter("first.weight"))
    assert masks_of(model, [{"sparsity": 0.5}], images(2))["first"].tolist() == [True] * 4 + [False] * 4


def test_weights_that_are_not_numbers_are_refused() -> None:
    """NaN in a producing weight cannot be ranked: the error names the group and the parameter."""
    model = chain()
    nn.init.constant_(model.get_parameter("second.weight"), math.nan)
    with pytest.raises(gp.MaskError, match=r"group 'second' are not numbers: second\.weight hold NaN"):
        masks_of(model, [{"sparsity": 0.5}], images(2))


def test_a_criterion_of_the_users_own() -> None:
    """Any callable from producing weights to scores is a criterion: here the first filters score highest."""
    small, _ = gp.prune(chain(), images(2), criterion=lambda weights: -torch.arange(weights.owner.index.shape[0], dtype=torch.float64))
    assert same_bits(small.get_parameter("first.weight"), chain().get_parameter("first.weight")[:4])


# -- configs -------------------------------------------------------------------------------------------------------------------------


def kept_and_notes(model: nn.Module, config: Sequence[Mapping[str, Any]], inputs: object) -> dict[str, tuple[int, str]]:
    """Returns group -> (channels kept, note) as the report of `prune` tells them."""
    _, report = gp.prune(model, inputs, config_list=config)
    return {group.name: (group.kept, group.note) for group in report.groups}


def test_the_smallest_sparsity_among_producers_wins() -> None:
    """Layers that share channels lose what the most careful of them asks for, and the note names it."""
    model, inputs = residual()
    config: list[dict[str, Any]] = [{"sparsity": 0.5}, {"sparsity": 0.2, "op_names": ["outer"]}]
    assert kept_and_notes(model, config, inputs) == {"stem": (4, "outer asks for least"), "inner": (2, "")}


def test_an_excluded_producer_keeps_its_group_whole() -> None:
    """Excluding one layer keeps all channels that it shares, and the note says so."""
    model, inputs = residual()
    config: list[dict[str, Any]] = [{"sparsity": 0.5}, {"exclude": True, "op_names": ["outer"]}]
    assert kept_and_notes(model, config, inputs) == {"stem": (6, "outer is excluded"), "inner": (2, "")}
    _, report = gp.prune(model, inputs, sparsity=0.5, exclude=["outer"])
    assert [(group.kept, group.note) for group in report.groups] == [(6, "outer is excluded"), (2, "")]


def test_an_unmentioned_producer_keeps_its_group_whole() -> None:
    """A layer that no entry matches keeps all channels that it shares, and the note says so."""
    model, inputs = residual()
    config = [{"sparsity": 0.5, "op_names": ["stem", "inner"]}]
    assert kept_and_notes(model, config, inputs) == {"stem": (6, "outer is matched by no config entry"), "inner": (2, "")}


def test_the_last_match_wins() -> None:
    """A later entry overrides an earlier one, also an exclusion."""
    model = chain()
    config: list[dict[str, Any]] = [{"exclude": True, "op_names": ["first", "second"]}, {"sparsity": 0.25, "op_types": ["Conv2d"]}]
    assert kept_and_notes(model, config, images(2)) == {"first": (6, ""), "second": (4, "")}
    assert kept_and_notes(model, [*config, {"sparsity": 0.75, "op_partial_names": ["sec"]}], images(2))["second"] == (1, "")


def test_a_cap_lowers_the_sparsity_of_one_layer() -> None:
    """`max_sparsity_per_layer` bounds what a named layer loses."""
    config = [{"sparsity": 0.75, "max_sparsity_per_layer": {"first": 0.25, "second": 0.8}}]
    assert kept_and_notes(chain(), config, images(2)) == {
        "first": (6, "max_sparsity_per_layer is 0.25"),
        "second": (2, "max_sparsity_per_layer is 0.8"),
    }


def test_total_sparsity_is_one_ranking_or_refused() -> None:
    """`total_sparsity` removes that share of all channels in one ranking, or is refused: it is never taken and ignored."""
    try:
        masks = masks_of(chain(), [{"total_sparsity": 0.5}], images(2))
    except gp.ConfigError as error:
        assert "total_sparsity" in str(error)  # noqa: PT017 (either of two outcomes will do)
        return
    assert sum(int((~masks[name]).sum()) for name in masks) == 7


def test_joint_groups_lose_blocks_or_widths() -> None:
    """Of heads and the widths inside them one is pruned, as `cut` says; the note of the other says why it stays."""
    for cut, role, other in (("blocks", "block", "within"), ("within", "within", "block")):
        _, report = gp.prune(attention(), sequences(2), sparsity=0.5, cut=cut)  # type: ignore[arg-type]
        roles = {group.name: group.role for group in gp.trace(attention(), sequences(2))}
        assert {roles[g.name] for g in report.groups if g.kept < g.channels} == {role}
        assert {g.note for g in report.groups if roles[g.name] == other} == {
            ("whole blocks" if cut == "blocks" else "positions within") + f" go instead (cut={cut!r})"
        }


def test_requested_and_kept_are_reported() -> None:
    """The report says for every group what was asked, what stayed, and which layers produce it; as plain values too."""
    _, report = gp.prune(chain(), images(2), sparsity=0.3)
    first = report.groups[0]
    assert (first.name, first.layers, first.channels, first.kept, first.requested) == ("first", ("first",), 8, 5, 0.3)
    assert first.params == 3 * (3 * 9 + 1 + 6 * 9)
    assert report.to_dict()["groups"][0]["kept"] == 5
    assert report.sparsity == pytest.approx(1 - 9 / 14)


# -- the pruner as a whole -----------------------------------------------------------------------------------------------------------


def test_compress_returns_a_masked_copy_and_the_masks() -> None:
    """The masked model has zeros in every removed slice and the old values elsewhere; the given model stays as it was."""
    model, inputs = residual()
    before = snapshot(model)
    masked, masks = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], inputs).compress()
    assert changes(before, snapshot(model)) == []
    gone = ~masks["stem"]
    weight, old = masked.get_parameter("stem.weight"), model.get_parameter("stem.weight")
    assert not weight[gone].any()
    assert same_bits(weight[~gone], old[~gone])
    assert not masked.get_parameter("inner.weight")[:, gone].any()
    assert not masked.get_buffer("outer_norm.running_mean")[gone].any()


def test_the_same_model_gives_the_same_masks() -> None:
    """Pruning is deterministic, and the random state of the caller plays no part."""
    masks = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        masks.append(masks_of(chain(), [{"sparsity": 0.4}], images(2)))
    assert all((masks[0][name] == masks[1][name]).all() for name in masks[0])


def test_a_graph_can_be_shared_between_pruners() -> None:
    """A pruner that is given the graph of a model needs no example inputs, and finds the same masks."""
    model = chain()
    graph = gp.trace(model, images(2))
    shared = gp.L1NormPruner(model, [{"sparsity": 0.5}], graph=graph).masks()
    assert {name: mask.tolist() for name, mask in shared.items()} == {
        name: mask.tolist() for name, mask in masks_of(model, [{"sparsity": 0.5}], images(2)).items()
    }


def test_a_graph_of_another_model_is_refused() -> None:
    """Weights are looked up by name and shape: a graph of a wider model does not fit."""
    graph = gp.trace(residual()[0], residual()[1])
    with pytest.raises(gp.MaskError, match="where the masks were made"):
        gp.L1NormPruner(chain(), [{"sparsity": 0.5}], graph=graph).masks()


def test_no_example_inputs_are_one_clear_error() -> None:
    """Without inputs and graph a pruner that is to find groups says what to pass; otherwise it says that it masks layers by themselves."""
    with pytest.raises(gp.InputError, match=r"L1NormPruner has no example inputs.*Pass example_inputs="):
        gp.L1NormPruner(chain(), [{"sparsity": 0.5}], mode="dependency_aware")
    with pytest.warns(UserWarning, match=r"L1NormPruner was given no example inputs.*mode 'normal'.*Pass example_inputs="):
        pruner = gp.L1NormPruner(chain(), [{"sparsity": 0.5}])
    assert pruner.mode == "normal"
    with pytest.raises(gp.InputError, match="no example inputs"):
        gp.prune(chain(), None)


def test_unknown_layers_are_named_with_the_nearest() -> None:
    """A name that the model does not have, or that produces nothing, is refused with a suggestion."""
    with pytest.raises(gp.ConfigError, match="did you mean 'first'"):
        masks_of(chain(), [{"sparsity": 0.5, "op_names": ["frist"]}], images(2))
    model, inputs = residual()
    with pytest.raises(gp.ConfigError, match="'stem_norm', a BatchNorm2d, which produces no channels"):
        masks_of(model, [{"sparsity": 0.5, "op_names": ["stem_norm"]}], inputs)


def test_a_failing_call_leaves_model_and_config_alone() -> None:
    """After an error the model is as it was, and so is the config list."""
    model, config = chain(), [{"sparsity": 0.5, "op_names": ["frist"]}]
    before, listed = snapshot(model), copy.deepcopy(config)
    with pytest.raises(gp.ConfigError):
        gp.prune(model, images(2), config_list=config)
    assert changes(before, snapshot(model)) == []
    assert config == listed


class _Mixed(nn.Module):
    """A parameter of the model's own, between two convolutions, that some channels only come from."""

    def __init__(self) -> None:
        """Makes the layers."""
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(10, 4, 1)
        self.mix = nn.Parameter(torch.linspace(-1, 1, 160).reshape(16, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mixes channels with a product that no layer makes."""
        mixed: torch.Tensor = self.b(torch.einsum("nchw,cd->ndhw", self.a(x), self.mix))
        return mixed


def test_channels_of_a_bare_parameter_are_asked_for_too() -> None:
    """One sparsity for all groups means those as well whose channels come from no layer."""
    small, report = gp.prune(filled(_Mixed()), images(2), sparsity=0.5)
    assert small.get_parameter("mix").shape == (8, 5)
    assert report.error < 1e-5


def test_where_no_block_can_go_positions_within_do() -> None:
    """Channels that form a single block, beside other positions, lose what is within it: the default cut is not left with nothing."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        x = m.a(x)
        x = torch.cat([x.tanh(), m.side(x)], 1)
        n, c, h, w = x.shape
        out: torch.Tensor = m.b(x.view(n, 2, 12, h, w).transpose(1, 2).reshape(n, c, h, w))
        return out

    model = filled(Network(forward, {"a": conv(3, 16), "side": conv(16, 8), "b": conv(24, 4)}))
    _, report = gp.prune(model, images(2), sparsity=0.5)
    kept = {group.name: (group.channels, group.kept) for group in report.groups}
    assert any(channels == 1 for channels, _ in kept.values())
    assert all(after == max(channels // 2, 1) for channels, after in kept.values())
    assert report.effect > 1e-3


def test_criteria_go_by_name() -> None:
    """A pruner takes the name of a criterion or the criterion; a wrong name is an error that says what there is."""
    model, example = residual()
    named, given = (gp.Pruner(model, [{"sparsity": 0.5, "op_types": ["Conv2d"]}], c, example).masks() for c in ("fpgm", gp.FPGM()))
    assert isinstance(named, gp.Masks)
    assert isinstance(given, gp.Masks)
    assert sum(int((~named[name]).sum()) for name in named) > 0
    assert all((named[name] == given[name]).all() for name in named)
    with pytest.raises(gp.ConfigError, match="fpgn"):
        gp.Pruner(model, [{"sparsity": 0.5, "op_types": ["Conv2d"]}], "fpgn", example)
