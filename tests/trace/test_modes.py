"""Modes, aggregation, scope and the report: what is masked where, by which scores, and what is told of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.cost.count import count_by_module
from graphprune.pruners.budgets import kept_count
from tests.support.handmade import residual
from tests.support.operators import Network, conv, filled, images, words
from tests.support.outputs import relative_error
from tests.support.untouched import changes, same_bits, snapshot

Config = Sequence[Mapping[str, Any]]

HALF: Config = [{"sparsity": 0.5, "op_types": ["default"]}]
CONVS = ("stem", "inner", "outer")


def absolute(model: nn.Module, name: str, dim: int = 0) -> list[float]:
    """Returns the sum of absolute weights of every position of one dimension, added up one by one."""
    weight = model.get_parameter(f"{name}.weight").detach().movedim(dim, 0).flatten(1).tolist()
    return [sum(abs(w) for w in row) for row in weight]


def euclidean(model: nn.Module, name: str, dim: int = 0) -> list[float]:
    """Returns the Euclidean norm of every position of one dimension."""
    weight = model.get_parameter(f"{name}.weight").detach().movedim(dim, 0).flatten(1).tolist()
    return [sum(w * w for w in row) ** 0.5 for row in weight]


def lowest(scores: Sequence[float], count: int) -> list[int]:
    """Returns the positions of the lowest scores, in order; of equal ones the last."""
    return sorted(sorted(range(len(scores)), key=lambda i: (scores[i], -i))[:count])


def rows_gone(masks: gp.ElementMasks, parameter: str) -> list[int]:
    """Returns the rows of which nothing is kept, after checking that all others are kept whole."""
    rows = masks[parameter].reshape(masks[parameter].shape[0], -1)
    assert torch.equal(rows.any(1), rows.all(1))
    return (~rows.any(1)).nonzero().flatten().tolist()


def gone(masks: gp.Masks, group: str) -> list[int]:
    """Returns the channels of a group that go."""
    return [int(channel) for channel in np.flatnonzero(~masks[group])]


# -- normal --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["floor", "ceil"])
@pytest.mark.parametrize(("pruner", "norm"), [("L1NormPruner", absolute), ("L2NormPruner", euclidean)])
def test_normal_masks_every_layer_by_itself(pruner: str, norm: Any, rounding: Any) -> None:
    """Each layer loses its own lowest rows, coupled or not, and the entries of its bias with them; norms and the head lose nothing."""
    model, x = residual()
    before = snapshot(model)
    masked, masks = getattr(gp, pruner)(model, [{"sparsity": 0.3}], x, mode="normal", rounding=rounding).compress()
    assert isinstance(masks, gp.ElementMasks)
    assert set(masks) == {"stem.weight", "stem.bias", "inner.weight", "outer.weight"}
    for name in CONVS:
        scores = norm(model, name)
        count = len(scores) - kept_count(len(scores), 0.3, rounding)
        assert rows_gone(masks, f"{name}.weight") == lowest(scores, count)
    assert rows_gone(masks, "stem.bias") == rows_gone(masks, "stem.weight")
    assert changes(before, snapshot(model)) == []
    for name, parameter in model.named_parameters():
        kept = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert same_bits(masked.get_parameter(name), parameter.masked_fill(~kept, 0.0))


def test_normal_without_inputs_warns_and_masks_the_same() -> None:
    """There is nothing to find groups with: every layer that has rows is masked by itself, the last included; a warning says so."""
    model, x = residual()
    with pytest.warns(UserWarning, match=r"was given no example inputs.*'normal'"):
        pruner = gp.L1NormPruner(model, HALF)
    masks, known = pruner.layer_masks(), gp.L1NormPruner(model, HALF, x, mode="normal").layer_masks()
    assert set(masks) == {*known, "head.weight", "head.bias"}
    assert all(torch.equal(masks[name], known[name]) for name in known)
    assert rows_gone(masks, "head.weight") == rows_gone(masks, "head.bias") == lowest(absolute(model, "head"), 3)
    with pytest.raises(gp.ConfigError, match=r"no example inputs.*example_inputs="):
        _ = pruner.graph


def test_normal_that_is_asked_for_does_not_warn() -> None:
    """Whoever writes mode="normal" knows; the config list picks layers by name, type and exclusion, the last match wins."""
    model, _ = residual()
    config: Config = [{"sparsity": 0.5, "op_types": ["Conv2d"]}, {"sparsity": 0.25, "op_names": ["inner"]}]
    config = [*config, {"exclude": True, "op_names": ["stem"]}]
    masks = gp.L1NormPruner(model, config, mode="normal").layer_masks()
    assert set(masks) == {"inner.weight", "outer.weight"}
    assert (rows_gone(masks, "inner.weight"), rows_gone(masks, "outer.weight")) == (
        lowest(absolute(model, "inner"), 1),
        lowest(absolute(model, "outer"), 3),
    )


def test_normal_ranks_the_rows_of_a_total_together() -> None:
    """A total sparsity is one ranking of the rows of its layers, relative to their layer's mean; a maximum holds."""
    model, x = residual()
    config: Config = [{"total_sparsity": 0.5, "op_types": ["Conv2d"], "max_sparsity_per_layer": {"inner": 0.5}}]
    pruner = gp.L1NormPruner(model, config, x, mode="normal")
    masks = pruner.layer_masks()
    scores = {name: absolute(model, name) for name in CONVS}
    order = sorted((s / (sum(v) / len(v)), name) for name, v in scores.items() for s in v)
    taken: dict[str, int] = dict.fromkeys(CONVS, 0)
    for _, name in order:
        room = taken[name] < (2 if name == "inner" else 5)
        taken[name] += int(room and sum(taken.values()) < 8)
    assert {name: len(rows_gone(masks, f"{name}.weight")) for name in CONVS} == taken
    assert sum(taken.values()) == 8


def test_normal_of_shared_weights() -> None:
    """A weight that two layers share has one mask, with groups and without: of the rows of the first layer that holds it."""
    embed, last = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    last.weight = embed.weight
    model = filled(Network(lambda n, x: n.last(torch.relu(n.mid(n.embed(x)))), {"embed": embed, "mid": nn.Linear(6, 6), "last": last}))
    for inputs in (words(2), None):
        masks = gp.L1NormPruner(model, HALF, inputs, mode="normal").layer_masks()
        kept = masks["last.weight"]
        assert torch.equal(kept, masks["embed.weight"])
        assert (~kept.any(0)).nonzero().flatten().tolist() == lowest(absolute(model, "embed", 1), 3)
        assert torch.equal(kept.any(0), kept.all(0))


def test_normal_refuses_weights_that_are_not_numbers() -> None:
    """NaN cannot be ranked, with groups or without."""
    model, x = residual()
    with torch.no_grad():
        model.inner.weight[1, 0, 0, 0] = torch.nan
    for inputs in (None, x):
        with pytest.raises(gp.MaskError, match=r"inner.*NaN"):
            gp.L1NormPruner(model, HALF, inputs, mode="normal").layer_masks()


def test_normal_is_no_mode_for_groups() -> None:
    """Masks of groups, physical pruning and criteria that see groups are refused with what to do instead."""
    model, x = residual()
    with pytest.raises(gp.ConfigError, match=r"normal.*layer_masks\(\)"):
        gp.L1NormPruner(model, HALF, x, mode="normal").masks()
    with pytest.raises(gp.ConfigError, match=r"normal.*compress\(\)"):
        gp.prune(model, x, mode="normal")
    with pytest.raises(gp.InputError, match="no example inputs"):
        gp.Pruner(model, HALF, gp.BNScale())
    with pytest.raises(gp.InputError, match="no example inputs"):
        gp.prune(model, None)
    with pytest.raises(gp.ConfigError, match=r"mode is 'dependency'.*'dependency_aware'"):
        gp.L1NormPruner(model, HALF, x, mode="dependency")  # type: ignore[arg-type]


# -- element masks are removed -------------------------------------------------------------------------------------------------------


def test_channels_whose_every_producer_is_masked_are_removed() -> None:
    """Of masks of single layers, what went in all coupled layers shrinks; the rest stays zero, and the function is the masked one."""
    model, x = residual()
    config: Config = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
    masked, masks = gp.L1NormPruner(model, config, x, mode="normal").compress()
    assert isinstance(masks, gp.ElementMasks)
    both = set(rows_gone(masks, "stem.weight")) & set(rows_gone(masks, "outer.weight"))
    small, report = gp.speedup(model, masks, x)
    assert 0 < len(both) < 3
    assert small.get_parameter("stem.weight").shape[0] == small.get_parameter("outer.weight").shape[0] == 6 - len(both)
    assert small.get_parameter("inner.weight").shape[:2] == (2, 6 - len(both))
    assert sum(not row.any() for row in small.get_parameter("stem.weight")) == 3 - len(both)
    groups = masks.channels(gp.trace(model, x))
    assert set(gone(groups, "stem")) == both
    assert relative_error([groups.masked(masked)(x)], [small(x)]) < 1e-9
    assert report.verified
    with pytest.raises(gp.InputError):
        gp.speedup(model, masks)


def test_channels_of_a_layer_without_a_mask_stay() -> None:
    """A channel that a layer without a mask still computes is not removed, whatever was masked in the layers it is coupled with."""
    model, x = residual()
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_names": ["inner", "outer"]}], x, mode="normal").layer_masks()
    groups = masks.channels(gp.trace(model, x))
    assert (gone(groups, "stem"), gone(groups, "inner")) == ([], rows_gone(masks, "inner.weight"))


# -- dependency aware ----------------------------------------------------------------------------------------------------------------


def test_coupled_layers_lose_the_same_rows_by_default() -> None:
    """With inputs the default is one decision per group, by the sum over the layers that produce it."""
    model, x = residual()
    pruner = gp.L1NormPruner(model, HALF, x)
    masks = pruner.masks()
    assert pruner.mode == "dependency_aware"
    scores = [a + b for a, b in zip(absolute(model, "stem"), absolute(model, "outer"), strict=True)]
    assert gone(masks, "stem") == lowest(scores, 3)
    assert gone(masks, "inner") == lowest(absolute(model, "inner"), 2)
    explicit = gp.L1NormPruner(model, HALF, x, mode="dependency_aware").masks()
    assert all((masks[name] == explicit[name]).all() for name in masks)
    assert gone(masks, "stem") != lowest(absolute(model, "stem"), 3)


# -- global --------------------------------------------------------------------------------------------------------------------------


def wide(small: float = 1.0) -> nn.Module:
    """Returns three convolutions, the weights of the first of which may be small."""
    model = filled(nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 24), nn.ReLU(), conv(24, 2)))
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(small)
    return model


@pytest.mark.parametrize("criterion", [gp.L1(), gp.L2(), gp.FPGM(), gp.LAMP()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_layer_of_tiny_weights_is_ranked_as_any_other(criterion: gp.Criterion, share: float) -> None:
    """A common factor of a layer's weights changes nothing in a global ranking of weights, which removes exactly its share."""
    masks = [gp.Pruner(wide(s), [{"sparsity": share}], criterion, images(1), mode="global").masks() for s in (1.0, 1e-6)]
    assert [gone(masks[0], n) for n in ("0", "2")] == [gone(masks[1], n) for n in ("0", "2")]
    assert sum(len(gone(masks[0], n)) for n in ("0", "2")) == 40 - kept_count(40, share)


def test_scores_that_compare_as_they_are_still_leave_a_channel() -> None:
    """Where a whole layer scores lowest as it is, everything of it may go but the last channel, or what a maximum protects."""
    parts = {"a": conv(3, 8), "an": nn.BatchNorm2d(8), "b": conv(8, 8), "bn": nn.BatchNorm2d(8), "c": conv(8, 2)}
    model = filled(Network(lambda n, x: n.c(n.bn(n.b(n.an(n.a(x)).relu())).relu()), parts))
    with torch.no_grad():
        model.get_parameter("an.weight").copy_(torch.linspace(1e-6, 2e-6, 8))
        model.get_parameter("bn.weight").copy_(torch.linspace(1.0, 2.0, 8))
    for cap, first in ((None, 7), (0.5, 4)):
        config: Config = [{"sparsity": 0.5, **({"max_sparsity_per_layer": cap} if cap else {})}]
        _, report = gp.prune(model, images(1), criterion=gp.BNScale(), config_list=config, mode="global")
        removed = {g.name: g.channels - g.kept for g in report.groups}
        assert removed == {"a": first, "b": 8 - first}
        notes = {g.name: g.note for g in report.groups}
        assert notes["a"] == ("max_sparsity_per_layer is 0.5" if cap else "the last channels of a group stay")


def test_entries_are_ranked_by_themselves() -> None:
    """In mode "global" each entry's sparsity is the share of its own layers; a group with layers of two entries stays whole."""
    model, x = residual()
    config: Config = [{"sparsity": 0.5, "op_names": ["stem", "inner"]}, {"sparsity": 0.4, "op_names": ["outer"]}]
    pruner = gp.L1NormPruner(model, config, x, mode="global")
    masks = pruner.masks()
    assert (gone(masks, "stem"), len(gone(masks, "inner"))) == ([], 2)
    assert pruner.plan.notes["stem"] == "its layers are in different config entries, which are ranked apart"
    first: Config = [{"sparsity": 0.5, "op_names": ["0"]}, {"sparsity": 0.25, "op_names": ["2"]}]
    masks = gp.L1NormPruner(wide(), first, images(1), mode="global").masks()
    assert (len(gone(masks, "0")), len(gone(masks, "2"))) == (8, 6)


# -- balance -------------------------------------------------------------------------------------------------------------------------


def test_balance_takes_the_same_positions_from_every_conv_group() -> None:
    """In mode "balance" a grouped convolution keeps its groups, each of which loses the same positions."""
    model = filled(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 12, groups=4), nn.ReLU(), conv(12, 2)))
    small, report = gp.prune(model, images(2), config_list=[{"sparsity": 0.34, "op_names": ["2"]}], mode="balance")
    grouped = small.get_submodule("2")
    assert isinstance(grouped, nn.Conv2d)
    assert (grouped.groups, grouped.out_channels) == (4, 4)
    scores = absolute(model, "2")
    position = max(range(3), key=lambda i: sum(scores[i::3]))
    assert same_bits(grouped.weight, model.get_parameter("2.weight")[position::3])
    assert report.error < 1e-9 < report.effect
    whole, _ = gp.prune(model, images(2), config_list=[{"sparsity": 0.5, "op_names": ["0", "2"]}])
    assert whole.get_submodule("2").groups == 2


# -- aggregation and scope -----------------------------------------------------------------------------------------------------------

TOGETHER: dict[str, Any] = {"sum": sum, "mean": lambda v: sum(v) / len(v), "max": max, "producer": lambda v: v[0]}


@pytest.mark.parametrize("aggregation", TOGETHER)
@pytest.mark.parametrize(("criterion", "norm"), [(gp.L1(), absolute), (gp.L2(), euclidean)], ids=["l1", "l2"])
@pytest.mark.parametrize("scope", ["producers", "group"])
def test_parts_of_a_group_are_put_together(aggregation: Any, criterion: gp.Criterion, norm: Any, scope: Any) -> None:
    """Scores of coupled layers are summed, averaged, or the highest or the first taken; in scope "group" readers count as well."""
    model, x = residual()
    stream, block = [norm(model, "stem"), norm(model, "outer")], [norm(model, "inner")]
    if scope == "group":
        head = model.head.weight.detach().unflatten(1, (6, 16)).movedim(1, 0).flatten(1)
        power = 1 if norm is absolute else 2
        stream += [norm(model, "inner", 1), (head.abs() ** power).sum(1).pow(1 / power).tolist()]
        block += [norm(model, "outer", 1)]
    scores = gp.Pruner(model, HALF, criterion, x, aggregation=aggregation, scope=scope).scores()
    combine = TOGETHER[aggregation]
    assert scores["stem"].tolist() == pytest.approx([combine(column) for column in zip(*stream, strict=True)], rel=1e-9)
    assert scores["inner"].tolist() == pytest.approx([combine(column) for column in zip(*block, strict=True)], rel=1e-9)


def test_prune_takes_the_same_options() -> None:
    """`prune` hands aggregation and scope on: the channels that stay are those of the pruner with these options."""
    model, x = residual()
    for options in ({"aggregation": "producer"}, {"aggregation": "max", "scope": "group"}):
        small, _ = gp.prune(model, x, **options)  # type: ignore[arg-type]
        masks = gp.L1NormPruner(model, HALF, x, **options).masks()  # type: ignore[arg-type]
        assert same_bits(small.get_parameter("stem.weight"), model.stem.weight[torch.from_numpy(masks["stem"])])
    producer = gp.L1NormPruner(model, HALF, x, aggregation="producer").masks()
    assert gone(producer, "stem") == lowest(absolute(model, "stem"), 3)


@pytest.mark.parametrize("options", [{"aggregation": "median"}, {"scope": "readers"}])
def test_unknown_options_are_refused(options: dict[str, Any]) -> None:
    """The error names the option and lists what there is."""
    model, x = residual()
    (name, value), *_ = options.items()
    with pytest.raises(gp.ConfigError, match=rf"{name} is '{value}'.*'(sum|group)'"):
        gp.L1NormPruner(model, HALF, x, **options).masks()


# -- the report ----------------------------------------------------------------------------------------------------------------------


def test_the_report_sets_what_was_asked_against_what_went() -> None:
    """Per layer: what its entry asks, the share that went, parameters and MACs before and after, and why it lost less."""
    model, x = residual()
    config: Config = [{"sparsity": 0.5}, {"sparsity": 0.2, "op_names": ["outer"]}]
    small, report = gp.prune(model, x, config_list=config)
    layers = {layer.name: layer for layer in report.layers}
    assert {n: (v.channels, v.kept, v.requested, v.note) for n, v in layers.items() if n in CONVS} == {
        "stem": (6, 4, 0.5, "outer asks for least"),
        "outer": (6, 4, 0.2, "outer asks for least"),
        "inner": (4, 2, 0.5, ""),
    }
    assert layers["stem"].achieved == pytest.approx(1 / 3)
    assert {n: v.before for n, v in layers.items()} == count_by_module(model, x)
    assert {n: v.after for n, v in layers.items()} == count_by_module(small, x)
    assert (layers["stem"].kind, layers["stem_norm"].kind, layers["stem_norm"].requested) == ("Conv2d", "BatchNorm2d", None)
    assert report.before is not None
    assert sum(v.before.params for v in layers.values()) == report.before.params
    assert report.to_dict()["layers"][0]["achieved"] == layers[report.layers[0].name].achieved
    assert {g.name: g.requested for g in report.groups} == {"stem": 0.2, "inner": 0.5}


@pytest.mark.parametrize(
    ("config", "stem", "inner"),
    [
        ([{"sparsity": 0.5}, {"exclude": True, "op_names": ["outer"]}], (6, 0.5, "outer is excluded"), (2, 0.5, "")),
        ([{"sparsity": 0.5, "op_names": ["stem", "inner"]}], (6, 0.5, "outer is matched by no config entry"), (2, 0.5, "")),
        (
            [{"sparsity": 0.5, "max_sparsity_per_layer": {"stem": 0.2, "outer": 0.4}}],
            (5, 0.5, "max_sparsity_per_layer is 0.2"),
            (2, 0.5, ""),
        ),
        ([{"sparsity": 0.5}, {"total_sparsity": 0.5, "op_names": ["outer"]}], (6, 0.5, "different config entries"), (2, 0.5, "")),
        ([{"total_sparsity": 0.9}], (1, None, "last channels of a group stay"), (1, None, "")),
    ],
)
def test_the_report_says_why_a_layer_lost_less(config: Config, stem: tuple[int, Any, str], inner: tuple[int, Any, str]) -> None:
    """Excluded and unmentioned partners, maxima, rankings and last channels are named; what a ranking decides was not asked for."""
    model, x = residual()
    _, report = gp.prune(model, x, config_list=config)
    layers = {layer.name: layer for layer in report.layers}
    for name, (kept, requested, note) in (("stem", stem), ("inner", inner)):
        assert (layers[name].kept, layers[name].requested) == (kept, requested)
        assert note in layers[name].note
        assert bool(note) == bool(layers[name].note) or note == ""


@pytest.mark.parametrize("how", ["global", "total", "budget"])
def test_what_a_ranking_decides_was_not_asked_of_any_layer(how: str) -> None:
    """Under one ranking or a budget no group and no layer has a sparsity that was asked for."""
    model, x = residual()
    ways: dict[str, dict[str, Any]] = {
        "global": {"mode": "global"},
        "total": {"config_list": [{"total_sparsity": 0.5}]},
        "budget": {"budget": gp.Budget(macs=0.5)},
    }
    _, report = gp.prune(model, x, **ways[how])
    assert {g.requested for g in report.groups} | {layer.requested for layer in report.layers} == {None}
    assert (report.budget is not None) == (how == "budget")


def test_the_report_reads_as_text() -> None:
    """The table of layers has a line per layer; a budget is set against what went."""
    model, x = residual()
    _, report = gp.prune(model, x, budget=gp.Budget(params=0.5))
    assert report.before is not None
    assert report.after is not None
    went = 1 - report.after.params / report.before.params
    assert f"Budget: 50.0% of the parameters to go, {went:.2%} went" in str(report)
    assert report.to_dict()["budget"] == {"unit": "params", "removed": 0.5}
    lines = str(report).partition("Layers")[2].splitlines()
    for layer in report.layers:
        shown = [line for line in lines if f"{layer.name} " in line]
        assert shown or "norm" in layer.name
        assert not layer.channels or f"{layer.achieved:.1%}" in shown[0]


def test_masks_of_elements_are_not_used_in_place() -> None:
    """The elements that stay zero could not be put back on failure, so that is refused; the two steps that the error names work."""
    model, x = residual()
    _, masks = gp.L1NormPruner(model, HALF, x, mode="normal").compress()
    before = snapshot(model)
    with pytest.raises(gp.MaskError, match=r"in place.*masks\.apply\(model\).*masks\.channels\(graph\)"):
        gp.speedup(model, masks, x, inplace=True)
    assert not changes(before, snapshot(model))
    assert isinstance(masks, gp.ElementMasks)
    expected, _ = gp.speedup(model, masks, x)
    masks.apply(model)
    small, _ = gp.speedup(model, masks.channels(gp.trace(model, x)), inplace=True)
    assert small is model
    assert relative_error(expected(x), small(x)) < 1e-12
