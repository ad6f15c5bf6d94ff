"""Unstructured pruning removes exactly as many weights as asked for, the smallest ones, and says where fewer went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphprune as gp
from graphprune.pruners.level import lamp_scores, smallest, whole
from tests.support.handmade import residual
from tests.support.operators import Network
from tests.support.untouched import changes, snapshot

DEFAULT = [{"sparsity": 0.5, "op_types": ["default"]}]
SPARSITIES = st.integers(1, 40).flatmap(lambda d: st.integers(0, d - 1).map(lambda n: Fraction(n, d)))
SMALL_VALUES = st.lists(st.integers(-3, 3), min_size=2, max_size=40)


def network(**weights: Sequence[float]) -> Network:
    """Returns a network of linear layers with one output each and the given weights."""
    parts = {}
    for name, values in weights.items():
        parts[name] = nn.Linear(len(values), 1)
        parts[name].weight.data = torch.tensor([list(values)], dtype=torch.float32)
    return Network(lambda _, x: x, parts)


def kept(masks: gp.ElementMasks, layer: str) -> list[int]:
    """Returns the positions of a flat weight that stay."""
    return [i for i, flag in enumerate(masks[f"{layer}.weight"].reshape(-1).tolist()) if flag]


def by_loop(values: Sequence[float], count: int) -> list[int]:
    """Returns what stays when `count` of the values go one by one: always the smallest magnitude, of equal ones the last."""
    left = list(range(len(values)))
    for _ in range(count):
        left.remove(min(left, key=lambda i: (abs(values[i]), -i)))
    return left


# -- one layer -----------------------------------------------------------------------------------------------------------------------


@given(SMALL_VALUES, SPARSITIES)
def test_exactly_the_smallest_go_and_of_equal_ones_the_last(values: list[int], sparsity: Fraction) -> None:
    """floor(n s) weights go, chosen as by taking the smallest one after the other, however many are equal."""
    masks = gp.LevelPruner(network(a=values), [{"sparsity": float(sparsity)}]).masks()
    assert kept(masks, "a") == by_loop(values, math.floor(len(values) * sparsity))


@pytest.mark.parametrize("value", [0.0, -0.5])
def test_equal_weights_are_not_all_pruned(value: float) -> None:
    """Of ten equal weights exactly seven go: the last."""
    assert kept(gp.LevelPruner(network(a=[value] * 10), [{"sparsity": 0.7}]).masks(), "a") == [0, 1, 2]


@pytest.mark.parametrize(
    ("elements", "share", "count"),
    [(10, 0.7, 7), (10, 0.79, 7), (100, 0.29, 29), (5, 0.7, 3), (3, 0.3, 0), (7, 0.0, 0), (10**9, 0.3, 3 * 10**8)],
)
def test_counts_are_rounded_down_but_not_by_the_last_bit(elements: int, share: float, count: int) -> None:
    """The product n s is rounded down to whole weights, and 100 x 0.29, which is a little below 29 in floats, counts as 29."""
    assert whole(elements, share) == count


def test_at_least_one_weight_stays() -> None:
    """A sparsity so close to one that rounding would take all weights leaves the largest, of the layer or of each block."""
    model, config = network(a=[1.0, 3.0, 2.0, 9.0, 4.0, 5.0]), [{"sparsity": 1 - 1e-12}]
    assert kept(gp.LevelPruner(model, config).masks(), "a") == [3]
    assert kept(gp.LevelPruner(model, config, "balance", [3]).masks(), "a") == [1, 3]


def test_each_layer_loses_its_own_share_and_biases_nothing() -> None:
    """Per layer, any number of dimensions, 0.8 of the weights are zero afterwards; biases, norms and the model itself are untouched."""
    model, _ = residual()
    before = snapshot(model)
    pruner = gp.LevelPruner(model, [{"sparsity": 0.8, "op_types": ["default"]}])
    masked, masks = pruner.compress()
    assert changes(before, snapshot(model)) == []
    assert list(masks) == ["stem.weight", "inner.weight", "outer.weight", "head.weight"]
    for name, tensor in masked.named_parameters():
        original = model.get_parameter(name)
        if name in masks:
            zeros = math.floor(original.numel() * Fraction(4, 5))
            assert int((tensor == 0).sum()) == int((~masks[name]).sum()) == zeros
            assert original[~masks[name]].abs().max() <= original[masks[name]].abs().min()
            assert torch.equal(tensor[masks[name]], original[masks[name]])
        else:
            assert torch.equal(tensor, original)
    assert masks.sparsity == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_type_is_ranked(dtype: torch.dtype) -> None:
    """Half precision is ranked as well; in float64 differences that float32 cannot see count."""
    values = torch.tensor([[1.0, 1 + 1e-12, 3.0, 4.0]] if dtype == torch.float64 else [[1.0, 2.0, 3.0, 4.0]], dtype=dtype)
    model = network(a=[0.0] * 4)
    model.get_parameter("a.weight").data = values
    assert kept(gp.LevelPruner(model, [{"sparsity": 0.25}]).masks(), "a") == [1, 2, 3]


def test_which_layers_can_be_selected() -> None:
    """Convolutions (also transposed), linear, bilinear layers and embeddings can; norms and what computes its weight cannot."""
    parts = {
        "conv": nn.Conv1d(2, 2, 2),
        "up": nn.ConvTranspose2d(2, 2, 2),
        "linear": nn.Linear(2, 2),
        "pair": nn.Bilinear(2, 2, 2),
        "table": nn.Embedding(3, 2),
        "bag": nn.EmbeddingBag(3, 2),
        "norm": nn.BatchNorm2d(2),
        "slope": nn.PReLU(2),
        "computed": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    }
    masks = gp.LevelPruner(Network(lambda _, x: x, parts), DEFAULT).masks()
    assert list(masks) == [f"{name}.weight" for name in ("conv", "up", "linear", "pair", "table", "bag")]


def test_the_config_list_selects_layers() -> None:
    """Types, names, parts of names and exclusion act as for every pruner; the last match wins."""
    model, _ = residual()
    config = [
        {"sparsity": 0.5, "op_types": "default"},
        {"sparsity": 0.25, "op_names": ["head"]},
        {"exclude": True, "op_partial_names": ["inn"]},
    ]
    pruner = gp.LevelPruner(model, config)
    masks = pruner.masks()
    assert list(masks) == ["stem.weight", "outer.weight", "head.weight"]
    assert {name: record.achieved for name, record in pruner.achieved.items()} == {"stem": 0.5, "outer": 0.5, "head": 0.25}


# -- balance -------------------------------------------------------------------------------------------------------------------------


def test_blocks_of_five_at_70_percent_lose_exactly_60() -> None:
    """A block of five gives up whole weights only: three of five."""
    model = Network(lambda _, x: x, {"conv": nn.Conv2d(3, 4, 5)})
    pruner = gp.LevelPruner(model, [{"sparsity": 0.7}], mode="balance", balance_gran=[5])
    masks = pruner.masks()
    assert masks.sparsity == pytest.approx(0.6)
    assert (masks["conv.weight"].sum(3) == 2).all()
    record = pruner.achieved["conv"]
    assert (record.requested, record.achieved, record.removed, record.elements) == (0.7, 0.6, 180, 300)
    assert record.reason == "whole weights of every block of 5"


@pytest.mark.parametrize(("block", "sparsity"), [((4,), 0.5), ((3, 2), 0.4), ((1, 1), 0.9), ((2, 1, 3, 2), 0.75), ((6, 2, 3, 4), 0.3)])
def test_every_block_loses_its_smallest(block: tuple[int, ...], sparsity: float) -> None:
    """Blocks are aligned with the last dimensions; the same number goes from each, as in a loop over blocks."""
    torch.manual_seed(0)
    model = Network(lambda _, x: x, {"conv": nn.Conv2d(2, 6, (3, 4))})
    weight = model.get_parameter("conv.weight").data
    weight.copy_(torch.randint(-3, 4, weight.shape).float())
    found = gp.LevelPruner(model, [{"sparsity": sparsity}], "balance", list(block)).masks()["conv.weight"]
    full = (1,) * (4 - len(block)) + block
    expected = torch.zeros_like(found)
    for corner in torch.cartesian_prod(*(torch.arange(0, n, part) for n, part in zip(weight.shape, full, strict=True))).tolist():
        window = tuple(slice(start, start + part) for start, part in zip(corner, full, strict=True))
        values = weight[window].reshape(-1).tolist()
        flags = torch.zeros(len(values), dtype=torch.bool)
        flags[by_loop(values, min(math.floor(len(values) * sparsity), len(values) - 1))] = True
        expected[window] = flags.reshape(full)
    assert torch.equal(found, expected)


# -- many layers ---------------------------------------------------------------------------------------------------------------------


@given(st.lists(SMALL_VALUES, min_size=2, max_size=3), SPARSITIES, st.sampled_from([1.0, 0.7, 0.5]))
def test_a_total_sparsity_ranks_all_weights_together(layers: list[list[int]], total: Fraction, most: float) -> None:
    """The smallest weights of all layers go one by one, except where a layer has given what it may; then others give more."""
    total = min(total, Fraction(most).limit_denominator(10))
    names = [f"l{i}" for i in range(len(layers))]
    entry = {"total_sparsity": float(total), "max_sparsity_per_layer": most}
    masks = gp.LevelPruner(network(**dict(zip(names, layers, strict=True))), [entry]).masks()
    room = {name: min(whole(len(values), most), len(values) - 1) for name, values in zip(names, layers, strict=True)}
    left = {name: list(range(len(values))) for name, values in zip(names, layers, strict=True)}
    values_of = dict(zip(names, layers, strict=True))
    for _ in range(math.floor(sum(map(len, layers)) * total)):
        open_ = [(abs(values_of[n][i]), -names.index(n), -i) for n in names if room[n] for i in left[n]]
        if open_:
            _, layer, position = min(open_)
            left[names[-layer]].remove(-position)
            room[names[-layer]] -= 1
    assert {name: kept(masks, name) for name in names} == left


def test_a_layer_of_small_weights_is_not_wiped_out() -> None:
    """What a layer may not lose is taken from the others, so that the total is met; the record says why."""
    torch.manual_seed(0)
    model = Network(lambda _, x: x, {"a": nn.Conv2d(3, 16, 3), "b": nn.Conv2d(16, 16, 3)})
    model.get_parameter("a.weight").data *= 1e-3
    pruner = gp.LevelPruner(model, [{"total_sparsity": 0.5, "max_sparsity_per_layer": 0.6}], mode="global")
    assert pruner.masks().sparsity == 0.5
    assert pruner.achieved["a"].removed == whole(432, 0.6)
    assert pruner.achieved["b"].removed == (432 + 2304) // 2 - whole(432, 0.6)
    assert pruner.achieved["b"].reason == "ranked together with the other layers of config_list[0]"
    assert gp.LevelPruner(model, [{"total_sparsity": 0.5}]).masks()["a.weight"].sum() == 1


def test_caps_of_single_layers_lower_what_they_are_asked_for() -> None:
    """A maximum for one layer lowers its sparsity, or its share of a total; the record keeps what was asked and names the maximum."""
    caps = {"max_sparsity_per_layer": {"a": 0.2}}
    model = network(a=range(1, 11), b=range(11, 21))
    for key in ("sparsity", "total_sparsity"):
        pruner = gp.LevelPruner(model, [{key: 0.5, **caps}])
        pruner.masks()
        a, b = pruner.achieved["a"], pruner.achieved["b"]
        assert (a.requested, a.achieved, a.reason) == (0.5, 0.2, "max_sparsity_per_layer is 0.2")
        assert b.achieved == (0.5 if key == "sparsity" else 0.8)


def test_entries_are_ranked_apart() -> None:
    """Two entries with totals are two rankings, and a third with a sparsity of its own stays out of both."""
    model = network(a=[1, 2, 3, 4], b=[5, 6, 7, 8], c=[1, 2, 3, 4], d=[5, 6, 7, 8], e=[1, 2, 3, 4])
    config = [
        {"total_sparsity": 0.5, "op_names": ["a", "b"]},
        {"total_sparsity": 0.25, "op_names": ["c", "d"]},
        {"sparsity": 0.5, "op_names": ["e"]},
    ]
    masks = gp.LevelPruner(model, config).masks()
    assert {n: kept(masks, n) for n in "abcde"} == {"a": [3], "b": [1, 2, 3], "c": [2, 3], "d": [0, 1, 2, 3], "e": [2, 3]}


# -- LAMP ----------------------------------------------------------------------------------------------------------------------------


@given(SMALL_VALUES)
def test_lamp_scores_equal_the_papers_formula(values: list[int]) -> None:
    """In ascending order of magnitude each square is divided by the sum from there upwards; the largest scores one."""
    order = sorted(range(len(values)), key=lambda i: (abs(values[i]), -i))
    expected = [0.0] * len(values)
    for rank, position in enumerate(order):
        above = sum(values[i] ** 2 for i in order[rank:])
        expected[position] = values[position] ** 2 / above if above else 0.0
    found = lamp_scores(torch.tensor(values, dtype=torch.float32).reshape(1, -1))
    assert found.dtype == torch.float64
    assert found.shape == (1, len(values))
    assert found.reshape(-1).tolist() == pytest.approx(expected, abs=1e-12)
    assert max(expected) == (1.0 if any(values) else 0.0)


def test_lamp_ranks_layers_of_different_scale_together() -> None:
    """Scaling one layer changes the magnitude ranking but not that of LAMP scores."""
    a, b = [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 9.0]
    config = [{"total_sparsity": 0.5}]
    plain = gp.LevelPruner(network(a=a, b=b), config, criterion="lamp").masks()
    scaled = gp.LevelPruner(network(a=[v / 1000 for v in a], b=b), config, criterion="lamp").masks()
    scores = [(float(s), name, i) for name, v in (("a", a), ("b", b)) for i, s in enumerate(lamp_scores(torch.tensor(v)))]
    expected = {name: sorted(i for _, n, i in sorted(scores)[4:] if n == name) for name in ("a", "b")}
    assert {n: kept(plain, n) for n in ("a", "b")} == {n: kept(scaled, n) for n in ("a", "b")} == expected
    assert kept(gp.LevelPruner(network(a=[v / 1000 for v in a], b=b), config).masks(), "a") == [3]


def test_within_a_layer_lamp_is_magnitude() -> None:
    """A sparsity per layer removes the same weights with both criteria."""
    model, _ = residual()
    one, two = (gp.LevelPruner(model, DEFAULT, criterion=criterion).masks() for criterion in ("magnitude", "lamp"))
    assert all(torch.equal(one[name], two[name]) for name in one)


# -- shared weights ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "removed", "reason"),
    [
        ([{"sparsity": 0.5}], 4, ""),
        ([{"sparsity": 0.5, "op_names": ["a"]}, {"sparsity": 0.25, "op_names": ["b"]}], 2, "shared with b, which asks for least"),
        ([{"sparsity": 0.5, "op_names": ["a"]}], 0, "shared with b, which is excluded or matched by no config entry"),
        ([{"sparsity": 0.5}, {"exclude": True, "op_names": ["b"]}], 0, "shared with b, which is excluded or matched by no config entry"),
        (
            [{"sparsity": 0.5, "op_names": ["a"]}, {"total_sparsity": 0.5, "op_names": ["b", "c"]}],
            0,
            "shared by layers of different config entries, one of them with a total sparsity",
        ),
    ],
)
def test_a_shared_weight_loses_what_the_least_demanding_layer_asks_for(config: Any, removed: int, reason: str) -> None:
    """A weight of two layers is pruned once; a layer that keeps its weights keeps them for both."""
    model = network(a=range(1, 9), b=range(1, 9), c=range(1, 9))
    model.get_submodule("b").weight = model.get_parameter("a.weight")
    pruner = gp.LevelPruner(model, config)
    masked, masks = pruner.compress()
    assert int((~masks["b.weight"]).sum()) == removed
    assert pruner.achieved["a"] == gp.WeightSparsity("a", 0.5, removed, 8, reason)
    assert masked.get_parameter("a.weight") is masked.get_parameter("b.weight")


# -- selection -----------------------------------------------------------------------------------------------------------------------


@given(st.lists(SMALL_VALUES.map(lambda v: [*v, *([0] * 40)][:12]), min_size=1, max_size=4), st.integers(0, 12))
def test_smallest_takes_exactly_count_of_every_row(rows: list[list[int]], count: int) -> None:
    """Every row loses exactly `count` values, the smallest ones, of equal ones the last; infinite values come last."""
    values = torch.tensor(rows, dtype=torch.float32)
    values[values == 3] = math.inf
    found = smallest(values, count)
    assert found.sum(1).tolist() == [count] * len(rows)
    for row, flags in zip(values.tolist(), found.tolist(), strict=True):
        order = sorted(range(12), key=lambda i: (row[i], -i))
        assert sorted(order[:count]) == [i for i, flag in enumerate(flags) if flag]


# -- errors --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "block"}, "mode is 'block'.*'normal', 'balance', 'global'"),
        ({"criterion": "l1"}, "criterion is 'l1'.*'magnitude', 'lamp'"),
        ({"balance_gran": [4]}, "balance_gran is given, but mode is 'normal'.*mode='balance'"),
        ({"mode": "balance"}, "balance_gran is None.*balance_gran="),
        ({"mode": "balance", "balance_gran": [0]}, r"balance_gran is \[0\]"),
        ({"mode": "balance", "balance_gran": []}, r"balance_gran is \[\]"),
        ({"mode": "balance", "balance_gran": 4}, "balance_gran is 4"),
        ({"mode": "balance", "balance_gran": [2.0]}, r"balance_gran is \[2.0\]"),
        ({"mode": "balance", "balance_gran": [5]}, r"blocks of shape \(5,\) do not divide the weight of 'stem', which is \(6, 3, 3, 3\)"),
        ({"mode": "balance", "balance_gran": [1, 1, 1, 1, 3]}, r"\(1, 1, 1, 1, 3\) do not divide the weight of 'stem'"),
        ({"mode": "global"}, r"config_list\[0\] gives a sparsity per layer.*'total_sparsity'"),
    ],
)
def test_options_that_cannot_be_used_are_refused(options: Any, words: str) -> None:
    """Each wrong option is one clear error that says what to write instead."""
    with pytest.raises(gp.ConfigError, match=words):
        gp.LevelPruner(residual()[0], DEFAULT, **options)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ([{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}], "'BatchNorm2d', but .* have no weight of two or more dimensions of their own"),
        ([{"sparsity": 0.5, "op_names": ["stem_norm"]}], "'stem_norm', a BatchNorm2d, which has no weight of two or more dimensions"),
        ([{"sparsity": 0.5, "op_names": ["steem"]}], "did you mean 'stem'.*Name a layer that has a weight of two or more dimensions"),
        ([{"sparsity": 0.5, "op_partial_names": ["_norm"]}], "only occurs in modules that have no weight of two or more dimensions"),
        ([{"sparsity": 1.0}], r"outside \[0, 1\)"),
        ([{"initial_sparsity": 0, "final_sparsity": 0.5}], "describes a schedule over time"),
        ([], "config_list is empty"),
    ],
)
def test_config_lists_that_cannot_be_used_are_refused(config: Any, words: str) -> None:
    """What is wrong with a config list is said in words that fit weights."""
    with pytest.raises(gp.ConfigError, match=words):
        gp.LevelPruner(residual()[0], config)


class _Spare(nn.Module):
    """Two layers, of which the second waits for a training that never comes."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(4, 4)
        self.spare = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Uses the first."""
        result: torch.Tensor = self.norm(self.spare(x) if self.training else self.used(x))
        return result


@pytest.mark.parametrize("amount", ["sparsity", "total_sparsity"])
def test_example_inputs_say_which_weights_are_read(amount: str) -> None:
    """Weights that the model does not read stay, and are no part of a ranking; the model is as it was."""
    model, x = _Spare().train(), torch.randn(3, 4)
    nn.init.zeros_(model.spare.weight)
    before = snapshot(model)
    pruner = gp.LevelPruner(model, [{amount: 0.5}], example_inputs=x)
    masks = pruner.masks()
    assert changes(before, snapshot(model)) == []
    assert (int(masks["used.weight"].sum()), int(masks["spare.weight"].sum())) == (8, 16)
    assert "not read by the model" in pruner.achieved["spare"].reason
    assert pruner.achieved["used"].reason == ""
    without = gp.LevelPruner(model, [{amount: 0.5}]).masks()
    assert int(without["spare.weight"].sum()) < 16
    with pytest.raises(gp.InputError, match=r"_Spare cannot be run on .*Pass example inputs of the shapes"):
        gp.LevelPruner(model, [{amount: 0.5}], example_inputs=torch.randn(3, 5))


def test_models_that_cannot_be_used_are_refused() -> None:
    """No weights, weights without values or shapes, and weights that are not finite are each one clear error."""
    with pytest.raises(gp.ConfigError, match="no layer that has a weight of two or more dimensions"):
        gp.LevelPruner(nn.Sequential(nn.BatchNorm1d(3)), DEFAULT)
    with pytest.raises(gp.InputError, match=r"LevelPruner needs the values of .* meta device"):
        gp.LevelPruner(nn.Linear(2, 2, device="meta"), DEFAULT)
    with pytest.raises(gp.InputError, match="the weight of '0' has no shape yet"):
        gp.LevelPruner(nn.Sequential(nn.LazyLinear(2)), DEFAULT)
    with pytest.raises(gp.InputError, match="the weight of 'a' has values that are not finite"):
        gp.LevelPruner(network(a=[1.0, math.nan]), DEFAULT)
    with pytest.raises(gp.ConfigError, match=r"mode 'balance' takes the same number .* total_sparsity.*'sparsity' instead"):
        gp.LevelPruner(network(a=[1.0, 2.0]), [{"total_sparsity": 0.5}], "balance", [2])
