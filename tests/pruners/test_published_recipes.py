"""Published pruning recipes, to the last digit: networks are built dense, pruned by L1 norm, shrunk, and counted as their source counts.

Every row of `tests/support/published_rows.py` goes through the library: config list, scores, masks, verified speedup. Left out of the
published tables: Torch-Pruning's second runs of Group-BN and Group-GReg, for lack of their widths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from functools import cache

import numpy as np
import pytest
from torch import Tensor, nn

import graphprune as gp
from tests.support import published
from tests.support.published import COUNTERS, outputs
from tests.support.published_rows import LI, ROWS, Config


@dataclass(frozen=True)
class Dense:
    """An unpruned network with its groups, and an image of the size that its source counts for."""

    model: nn.Module
    graph: gp.DependencyGraph
    image: Tensor


@dataclass(frozen=True)
class Pruned:
    """What a recipe leaves: the shrunk network, its masks and the report; the last two are None where nothing is pruned."""

    model: nn.Module
    masks: gp.Masks | None = None
    report: gp.SpeedupReport | None = None


Build = Callable[[str], Dense]
Prune = Callable[[str], Pruned]


@pytest.fixture(scope="module")
def dense() -> Build:
    """Returns a function that builds and traces a network, once in all tests."""

    @cache
    def once(name: str) -> Dense:
        model, images, image = published.dense(name)
        return Dense(model, gp.trace(model, images), image)

    return once


@pytest.fixture(scope="module")
def prune(dense: Build) -> Prune:
    """Returns a function that prunes the network of a row, once in all tests."""

    @cache
    def once(name: str) -> Pruned:
        row = ROWS[name]
        source = dense(row.network)
        config = row.config if row.config is not None else one_by_one(source.model, row.widths)
        if not config:
            return Pruned(source.model)
        pruner = gp.L1NormPruner(source.model, config, graph=source.graph, rounding=row.rounding, round_to=row.round_to)
        masks = pruner.masks()
        small, report = gp.speedup(source.model, masks)
        return Pruned(small, masks, report)

    return once


def one_by_one(model: nn.Module, widths: Mapping[str, int]) -> Config:
    """Returns a config list that asks for exact widths, whatever the rounding."""
    full = outputs(model)
    return [{"sparsity": 1 - kept / full[name], "op_names": [name]} for name, kept in widths.items() if kept < full[name]]


def prints_as(value: float, text: str, modes: tuple[str, ...]) -> bool:
    """Returns whether a text is a value to as many digits as it has."""
    return Decimal(text) in {Decimal(value).quantize(Decimal(text), rounding=mode) for mode in modes}


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.figures])
def test_parameters_and_macs_are_those_published(name: str, dense: Build, prune: Prune) -> None:
    """The network that the recipe leaves has the published numbers of parameters and multiply-accumulates, to the last digit."""
    row = ROWS[name]
    small = prune(name).model.get_submodule(row.part)
    image = dense(row.network).image
    assert {counter: COUNTERS[counter](small, image) for counter in row.figures} == row.figures


@pytest.mark.parametrize("name", ROWS)
def test_kept_widths_are_those_published(name: str, dense: Build, prune: Prune) -> None:
    """The layers that the recipe prunes keep as many outputs as published, and no other layer loses any."""
    row = ROWS[name]
    assert outputs(prune(name).model) == outputs(dense(row.network).model) | dict(row.widths)


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.level])
def test_non_zeros_are_those_published(name: str, prune: Prune) -> None:
    """Where the recipe prunes single weights after the filters, as many weights as published are left, and no tensor shrinks."""
    row, small = ROWS[name], prune(name).model
    masked, _ = gp.LevelPruner(small, row.level or []).compress()
    assert outputs(masked) == outputs(small)
    assert sum(int(layer.weight.count_nonzero()) for _, layer in published.layers(masked)) == row.non_zeros


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.printed])
def test_figures_print_as_in_the_source(name: str, dense: Build, prune: Prune) -> None:
    """The numbers and the savings in percent that the source prints are ours to as many digits."""
    row = ROWS[name]
    before = dense(row.network)
    modes = (ROUND_HALF_UP, ROUND_DOWN) if name in LI else (ROUND_HALF_UP,)  # some digits of Li et al. are cut off
    small = prune(name).model.get_submodule(row.part)
    counts = {counter: COUNTERS[counter](small, before.image) for counter in row.printed}
    assert {counter: text for counter, text in row.printed.items() if not prints_as(counts[counter], text, modes)} == {}
    saved = {counter: 100 * (1 - counts[counter] / COUNTERS[counter](before.model, before.image)) for counter in row.less}
    assert {counter: text for counter, text in row.less.items() if not prints_as(saved[counter], text, modes)} == {}


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.widths])
def test_the_shrunk_network_computes_what_the_masked_one_does(name: str, prune: Prune) -> None:
    """The result is of the network's own class and verified, against masks that change the output."""
    report = prune(name).report
    assert report is not None
    assert report.kind == "module"
    assert report.verified
    assert report.error < 1e-5
    assert report.effect > 1e-2


@pytest.mark.parametrize("name", ["VGG-16-A", "ResNet-56-B", "ResNet-34-C, 204", "Distiller filter_rank"])
def test_filters_with_the_smallest_sums_of_absolute_weights_go(name: str, dense: Build, prune: Prune) -> None:
    """What is removed ranks lowest by the sum of |w| of its filter, or of its filters where several layers share the channel."""
    model, masks = dense(ROWS[name].network).model, prune(name).masks
    assert masks is not None
    pruned = [group for group in masks.graph.groups if not masks[group.name].all()]
    assert {layer for group in pruned for layer in group.layers} == set(ROWS[name].widths)
    for group in pruned:
        weights = [model.get_parameter(f"{layer}.weight").detach().double().numpy() for layer in group.layers]
        sums = [sum(float(np.abs(weight[channel]).sum()) for weight in weights) for channel in range(group.channels)]
        gone = sorted(range(group.channels), key=sums.__getitem__)[: int((~masks[group.name]).sum())]
        assert sorted(gone) == np.flatnonzero(~masks[group.name]).tolist()
