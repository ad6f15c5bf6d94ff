"""Config lists select the layers they say, the last match wins, and every slip is one clear error."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphprune.errors import ConfigError
from graphprune.pruners.config import LayerConfig, ResolvedConfig, check_sparsity, resolve

LAYERS = {
    "conv1": "Conv2d",
    "layer1.0.conv1": "Conv2d",
    "layer1.0.conv2": "Conv2d",
    "layer1.0.downsample.0": "Conv2d",
    "embed": "Embedding",
    "fc": "Linear",
}
OTHERS = {"": "Net", "relu": "ReLU", "layer1": "Sequential", "layer1.0": "Block", "layer1.0.downsample": "Sequential"}


def chosen(*entries: dict[str, Any]) -> dict[str, float | None]:
    """Returns the sparsity per layer that the entries lead to."""
    return {name: layer.sparsity for name, layer in resolve(entries, LAYERS, OTHERS).layers.items()}


def refused(config_list: Any, layers: dict[str, str] | None = None) -> str:
    """Returns the message of the ConfigError that the config list must raise."""
    with pytest.raises(ConfigError) as caught:
        resolve(config_list, LAYERS if layers is None else layers, OTHERS)
    assert caught.value.fix, "every error says how to fix it"
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("entry", "names"),
    [
        ({"op_types": ["Conv2d"], "op_names": ["conv1", "layer1.0.conv2"]}, ["conv1", "layer1.0.conv2"]),
        ({"op_types": ["Conv2d", "Linear"]}, ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.0.downsample.0", "fc"]),
        ({"op_types": ["default"]}, list(LAYERS)),
        ({"op_types": "default"}, list(LAYERS)),
        ({"op_types": ["Linear", "default"]}, list(LAYERS)),
        ({}, list(LAYERS)),
        ({"op_names": ("fc",)}, ["fc"]),
        ({"op_partial_names": ["conv"]}, ["conv1", "layer1.0.conv1", "layer1.0.conv2"]),
        ({"op_partial_names": ["downsample"], "op_names": ["fc", "fc"]}, ["layer1.0.downsample.0", "fc"]),
        ({"op_partial_names": ["e"], "op_types": ["Embedding"]}, ["embed"]),
        ({"op_names": ["conv1", "fc"], "op_types": ["Linear"]}, ["fc"]),
        ({"exclude": False, "op_names": ["fc"]}, ["fc"]),
    ],
)
def test_selectors_choose_the_layers_they_say(entry: dict[str, Any], names: list[str]) -> None:
    """Names and parts of names add up, types narrow them down, no selector means all; the order is the model's."""
    assert list(chosen({"sparsity": 0.8, **entry})) == names


def test_the_seeds_config_lists_resolve() -> None:
    """The keys and spellings of the documents that users come from are understood."""
    assert chosen({"sparsity": 0.8, "op_types": ["Conv2d"], "op_names": ["conv1"]}) == {"conv1": 0.8}
    assert chosen({"sparsity_per_layer": 0.8, "op_types": "default"}) == dict.fromkeys(LAYERS, 0.8)


def test_last_match_wins() -> None:
    """A later entry replaces an earlier one, an exclude removes a layer, and a later entry brings it back."""
    every, exclude, back = {"sparsity": 0.5}, {"exclude": True, "op_types": ["Conv2d"]}, {"sparsity": 0.2, "op_names": ["conv1"]}
    assert chosen(every, back)["conv1"] == 0.2
    assert chosen(back, every)["conv1"] == 0.5
    assert chosen(every, exclude) == {"embed": 0.5, "fc": 0.5}
    assert chosen(every, exclude, back) == {"conv1": 0.2, "embed": 0.5, "fc": 0.5}


def test_exclude_takes_the_intersection_of_its_types_and_names() -> None:
    """An exclude with types and names leaves layers that match only one of the two alone."""
    resolved = resolve(
        [{"sparsity": 0.5}, {"exclude": True, "op_types": ["Conv2d"], "op_names": ["conv1", "fc"]}],
        LAYERS,
    )
    assert resolved.excluded == {"conv1"}
    assert "fc" in resolved.layers


def test_unmatched_and_excluded_layers_are_told_apart() -> None:
    """A layer that nothing matches is in neither collection, an excluded one is remembered."""
    resolved = resolve([{"sparsity": 0.5, "op_names": ["conv1"]}, {"exclude": True, "op_names": ["fc"]}], LAYERS)
    assert resolved == ResolvedConfig(layers={"conv1": LayerConfig(entry=0, sparsity=0.5)}, excluded=frozenset({"fc"}))


def test_total_sparsity_remembers_its_entry() -> None:
    """Layers that share one ranking carry the index of their entry, and no sparsity of their own."""
    resolved = resolve(
        [
            {"total_sparsity": 0.5, "op_types": ["Conv2d"], "max_sparsity_per_layer": 0.9},
            {"total_sparsity": 0.3, "op_names": ["fc"], "max_sparsity_per_layer": {"fc": 0.4, "conv1": 0.1}},
        ],
        LAYERS,
    )
    assert resolved.layers["conv1"] == LayerConfig(entry=0, total=0.5, max_sparsity=0.9)
    assert resolved.layers["fc"] == LayerConfig(entry=1, total=0.3, max_sparsity=0.4)


def test_a_maximum_of_one_layer_lowers_its_sparsity() -> None:
    """A per-layer maximum caps the sparsity of the layers it names and of no other."""
    assert chosen({"sparsity": 0.8, "max_sparsity_per_layer": {"fc": 0.5}, "op_names": ["conv1", "fc"]}) == {"conv1": 0.8, "fc": 0.5}


def test_records_are_frozen_and_the_input_stays_as_it_was() -> None:
    """The result cannot be changed by accident, and resolving changes neither list nor dicts."""
    entries = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
    resolved = resolve(entries, LAYERS)
    with pytest.raises(FrozenInstanceError):
        resolved.layers["conv1"].sparsity = 0.1  # type: ignore[misc]
    assert entries == [{"sparsity": 0.5, "op_types": ["Conv2d"]}]


@pytest.mark.parametrize(
    ("config_list", "words"),
    [
        (None, ["config_list is a NoneType", "Pass a list"]),
        ({"sparsity": 0.5}, ["config_list is a dict", "Pass a list"]),
        ("default", ["config_list is a str"]),
        ([], ["config_list is empty", "at least one entry"]),
        ([{"sparsity": 0.5}, 0.3], ["config_list[1] is a float"]),
        ([{"sparsty": 0.5}], ["unknown key 'sparsty'", "did you mean 'sparsity'?"]),
        ([{"sparsity": 0.5, 3: 4}], ["unknown key 3"]),
        ([{"final_sparsity": 0.5, "op_types": ["Conv2d"]}], ["'final_sparsity'", "schedule", "'sparsity'"]),
        ([{"op_types": ["Conv2d"]}], ["config_list[0] gives no sparsity", "'exclude': True"]),
        ([{}], ["config_list[0] gives no sparsity"]),
        ([{"sparsity": 0.5, "total_sparsity": 0.5}], ["both sparsity and total_sparsity", "Keep one"]),
        ([{"sparsity": 0.5, "sparsity_per_layer": 0.5}], ["both sparsity and sparsity_per_layer"]),
        ([{"exclude": True, "sparsity": 0.5, "op_names": ["fc"]}], ["excludes layers and gives sparsity"]),
        ([{"exclude": True, "max_sparsity_per_layer": 0.5, "op_names": ["fc"]}], ["gives max_sparsity_per_layer"]),
        ([{"exclude": True}], ["excludes every layer", "op_names"]),
        ([{"exclude": 1, "op_names": ["fc"]}], ["['exclude'] is 1"]),
        ([{"sparsity": 0.8, "max_sparsity_per_layer": 0.5}], ["sparsity 0.8", "max_sparsity_per_layer of 0.5"]),
        ([{"total_sparsity": 0.8, "max_sparsity_per_layer": 0.5}], ["total_sparsity 0.8", "max_sparsity_per_layer of 0.5"]),
        ([{"sparsity": 0.1, "max_sparsity_per_layer": 0}], ["is 0, outside (0, 1]"]),
        ([{"sparsity": 0.1, "max_sparsity_per_layer": "much"}], ["'much', not a number"]),
        ([{"sparsity": 0.1, "max_sparsity_per_layer": {"fc": 1.5}}], ["['max_sparsity_per_layer']['fc'] is 1.5"]),
        ([{"sparsity": 0.1, "max_sparsity_per_layer": {"fcc": 0.5}}], ["'fcc'", "did you mean 'fc'?"]),
        ([{"sparsity": 0.5, "op_names": ["conv2"]}], ["['op_names'] names 'conv2'", "did you mean 'conv1'?"]),
        ([{"sparsity": 0.5, "op_names": ["zzz"]}], ["names 'zzz', which the model does not have", "and 1 more"]),
        ([{"sparsity": 0.5, "op_names": ["relu"]}], ["'relu', a ReLU, which produces no channels", "conv1"]),
        ([{"sparsity": 0.5, "op_names": ["layer1"]}], ["'layer1', a Sequential", "'op_partial_names': ['layer1.']"]),
        ([{"sparsity": 0.5, "op_names": "fc"}], ["is the string 'fc', not a list", "['fc']"]),
        ([{"sparsity": 0.5, "op_names": [1]}], ["[1], not a list of names"]),
        ([{"sparsity": 0.5, "op_names": []}], ["is empty and so selects nothing"]),
        ([{"sparsity": 0.5, "op_types": "Conv2d"}], ["is the string 'Conv2d'", "['Conv2d']"]),
        ([{"sparsity": 0.5, "op_types": ["Conv2D"]}], ["lists 'Conv2D'", "did you mean 'Conv2d'?"]),
        ([{"sparsity": 0.5, "op_types": ["Conv2d", "ReLU"]}], ["lists 'ReLU', but", "produce no channels", "Linear"]),
        ([{"sparsity": 0.5, "op_types": ["default", "Lineer"]}], ["did you mean 'Linear'?"]),
        ([{"sparsity": 0.5, "op_partial_names": ["downsampel"]}], ["lists 'downsampel'", "did you mean 'downsample'?"]),
        ([{"sparsity": 0.5, "op_partial_names": ["relu"]}], ["only occurs in modules that produce no channels: relu"]),
        ([{"sparsity": 0.5, "op_partial_names": [""]}], ["not a list of names"]),
        ([{"sparsity": 0.5, "op_names": ["fc"], "op_types": ["Conv2d"]}], ["config_list[0] selects no layer", "Conv2d"]),
        ([{"sparsity": 0.5}, {"exclude": True, "op_names": ["fcc"]}], ["config_list[1]['op_names']", "did you mean 'fc'?"]),
    ],
)
def test_slips_are_named_with_their_place_and_their_fix(config_list: Any, words: list[str]) -> None:
    """Each malformed config list raises one ConfigError that says where the slip is and what was probably meant."""
    message = refused(config_list)
    assert all(word in message for word in words), message


def test_a_model_without_channels_is_refused() -> None:
    """A config list for a model that produces no channels says so instead of blaming a name."""
    assert "no layer that produces channels" in refused([{"sparsity": 0.5}], layers={})


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1, 1.0, 50, 10**400, Fraction(10**30 - 1, 10**30), np.float32(1.5)])
def test_numbers_outside_the_range_are_refused(value: Any) -> None:
    """NaN, infinities, negative numbers, one and above are no sparsities."""
    with pytest.raises(ConfigError, match=r"^--sparsity is .*, outside \[0, 1\)\. Give the fraction"):
        check_sparsity(value, "--sparsity")
    assert "config_list[0]['sparsity'] is" in refused([{"sparsity": value}])


@pytest.mark.parametrize("value", [True, False, "0.5", None, [0.5], 0.5j, np.bool_(1)])
def test_values_that_are_no_numbers_are_refused(value: Any) -> None:
    """Booleans, strings and containers are no sparsities, even where Python could convert them."""
    with pytest.raises(ConfigError, match="not a number"):
        check_sparsity(value, "sparsity")


@given(st.floats(0, 1, exclude_max=True))
def test_fractions_pass_unchanged(value: float) -> None:
    """Every float in [0, 1) is a sparsity, and comes back as it is, also from NumPy."""
    assert check_sparsity(value, "sparsity") == value
    converted = check_sparsity(np.float64(value), "sparsity")
    assert (converted, type(converted)) == (value, float)


def matches(entry: dict[str, Any], name: str) -> bool:
    """Returns whether an entry selects a layer: the documented meaning of the selectors, for one layer at a time."""
    by_type = "op_types" not in entry or LAYERS[name] in entry["op_types"] or "default" in entry["op_types"]
    if "op_names" not in entry and "op_partial_names" not in entry:
        return by_type
    by_name = name in entry.get("op_names", ()) or any(part in name for part in entry.get("op_partial_names", ()))
    return by_name and by_type


@st.composite
def config_entries(draw: st.DrawFn) -> dict[str, Any]:
    """Draws an entry that selects at least one layer."""
    selectors: dict[str, st.SearchStrategy[Any]] = {
        "op_types": st.lists(st.sampled_from([*LAYERS.values(), "default"]), min_size=1),
        "op_names": st.lists(st.sampled_from(list(LAYERS)), min_size=1),
        "op_partial_names": st.lists(st.sampled_from(["conv", "layer1", "0", "fc", "e"]), min_size=1),
    }
    entry: dict[str, Any] = draw(st.fixed_dictionaries({}, optional=selectors).filter(bool))
    amount: dict[str, Any] = draw(
        st.one_of(
            st.just({"exclude": True}),
            st.floats(0, 0.99).map(lambda value: {"sparsity": value}),
            st.floats(0, 0.99).map(lambda value: {"total_sparsity": value}),
        ),
    )
    return entry | amount


@given(st.lists(config_entries().filter(lambda entry: any(matches(entry, name) for name in LAYERS)), min_size=1, max_size=5))
def test_last_match_wins_for_every_layer_of_any_list(entries: list[dict[str, Any]]) -> None:
    """For any list of valid entries, each layer gets what the last entry that matches it says."""
    resolved = resolve(entries, LAYERS, OTHERS)
    for name in LAYERS:
        last = next((index for index in reversed(range(len(entries))) if matches(entries[index], name)), None)
        excluded = last is not None and "exclude" in entries[last]
        assert (name in resolved.excluded) == excluded
        assert (name in resolved.layers) == (last is not None and not excluded)
        if last is not None and not excluded:
            entry = entries[last]
            assert resolved.layers[name] == LayerConfig(last, entry.get("sparsity"), entry.get("total_sparsity"))
