"""Budgets: one ranking against a brute-force reference, costs that are met to one channel, and forecasts that equal what is counted."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import graphprune as gp
from graphprune.cost.count import count_by_module
from graphprune.cost.predict import Forecast
from graphprune.pruners.budgets import Ranking, Rounding
from tests.support.handmade import residual
from tests.support.networks import build
from tests.support.operators import Network, conv, filled, images, normal, sequences, table, words
from tests.support.torchvision_shim import import_torchvision

# -- the ranking ---------------------------------------------------------------------------------------------------------------------

Order = Literal["global", "even"]


@dataclass(frozen=True)
class Drawn:
    """Groups with integer scores, how much each may lose, and what counts must be multiples of."""

    scores: dict[str, list[int]]
    most: dict[str, Fraction]
    round_to: int

    def ranking(self, order: Order = "global", *, comparable: bool = True) -> Ranking:
        """Returns the ranking of these groups."""
        arrays = {name: np.array(values, dtype=np.float64) for name, values in self.scores.items()}
        caps = {name: float(most) for name, most in self.most.items()}
        return Ranking(arrays, caps, self.round_to, order, comparable=comparable)

    def floor(self, name: str) -> int:
        """Returns the fewest channels that a group may keep."""
        size = len(self.scores[name])
        return max(1, size - math.floor(size * self.most.get(name, Fraction(1))), min(self.round_to, size))

    def following(self, name: str, kept: int) -> int | None:
        """Returns the next count below `kept` that a group may have, or None."""
        return next((n for n in range(kept - 1, self.floor(name) - 1, -1) if n % self.round_to == 0), None)


FRACTIONS = st.integers(1, 12).flatmap(lambda d: st.integers(1, d).map(lambda n: Fraction(n, d)))


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    """Draws up to five groups of up to twenty channels, some with a cap."""
    names = [f"g{i}" for i in range(draw(st.integers(1, 5)))]
    scores = {name: draw(st.lists(st.integers(0, 6), min_size=1, max_size=20)) for name in names}
    return Drawn(scores, {name: draw(FRACTIONS) for name in names if draw(st.booleans())}, draw(st.integers(1, 6)))


def by_hand(groups: Drawn, order: Order, *, comparable: bool = True) -> list[dict[str, int]]:
    """Returns the counts after 0, 1, 2, ... steps, taking the cheapest next step every time.

    In one ranking a step costs the mean score of the channels that it takes, but never less than the step before it in the group;
    otherwise the share of the group that is gone after it. Of equal steps that of the first group comes first.
    """
    counts = {name: len(values) for name, values in groups.scores.items()}
    highest = dict.fromkeys(counts, 0.0)
    out = [dict(counts)]
    while True:
        best: tuple[float, int, str, int] | None = None
        for number, (name, kept) in enumerate(counts.items()):
            below = groups.following(name, kept)
            if below is None:
                continue
            values = groups.scores[name]
            mean = sum(values) / len(values)
            rising = [v / mean for v in sorted(values)] if not comparable and mean > 0 else [float(v) for v in sorted(values)]
            size = len(values)
            taken = rising[size - kept : size - below]
            key = (size - below) / size if order == "even" else max(highest[name], sum(taken) / len(taken))
            if best is None or (key, number) < best[:2]:
                best = (key, number, name, below)
        if best is None:
            return out
        counts[best[2]], highest[best[2]] = best[3], best[0]
        out.append(dict(counts))


@given(drawn(), st.sampled_from(["global", "even"]))
def test_the_ranking_takes_the_cheapest_step_every_time(groups: Drawn, order: Order) -> None:
    """After any number of steps the counts are those of a search by hand; the last channels, caps and multiples are never crossed."""
    ranking = groups.ranking(order)
    expected = by_hand(groups, order)
    assert len(ranking) == len(expected) - 1
    assert [ranking.counts(steps) for steps in range(len(ranking) + 1)] == expected
    for counts in expected:
        for name, kept in counts.items():
            size = len(groups.scores[name])
            assert groups.floor(name) <= kept <= size
            assert kept == size or kept % groups.round_to == 0
    assert ranking.least == {name: expected[-1][name] for name in groups.scores}


@given(drawn().filter(lambda g: all(sum(v) for v in g.scores.values())))
def test_scores_of_other_scales_are_divided_by_their_mean(groups: Drawn) -> None:
    """Where scores do not compare as they are, each group's are taken relative to their mean; a common factor changes nothing."""
    single = Drawn(groups.scores, groups.most, 1)
    ranking = single.ranking(comparable=False)
    assert [ranking.counts(steps) for steps in range(len(ranking) + 1)] == by_hand(single, "global", comparable=False)
    scaled = {name: [v * 4**i for v in values] for i, (name, values) in enumerate(groups.scores.items())}
    other = Drawn(scaled, groups.most, 1).ranking(comparable=False)
    assert [other.counts(steps) for steps in range(len(other) + 1)] == [ranking.counts(steps) for steps in range(len(ranking) + 1)]


def test_scores_of_both_signs_are_divided_by_their_magnitude() -> None:
    """A mean near or below zero neither blows scores up nor leaves them as they are: twice the scores are the same ranking."""
    for values in ([-1.0, 1.001, 0.5], [-0.3, -0.2, 0.05, 0.06, 0.1], [0.0, 0.0, 0.0]):
        scores = {"a": np.array(values), "b": np.array([0.1, 1.0, 2.0])}
        twice = {"a": 2 * scores["a"], "b": scores["b"]}
        rankings = [Ranking(s, {}) for s in (scores, twice)]
        counts = [[r.counts(steps) for steps in range(len(r) + 1)] for r in rankings]
        assert counts[0] == counts[1]
        if values[0] == -1.0:  # -1.2, then 0.1 of the other, 0.6, 1.0 of the other
            assert counts[0] == [{"a": a, "b": b} for a, b in ((3, 3), (2, 3), (2, 2), (1, 2), (1, 1))]


@given(drawn(), st.sampled_from(["global", "even"]), st.data())
def test_a_cost_is_reached_by_the_fewest_steps(groups: Drawn, order: Order, data: st.DataObject) -> None:
    """Floor: the first number of steps after which the cost is at most the target; ceil: the last before it is below."""
    prices = {name: data.draw(st.integers(0, 5)) for name in groups.scores}
    ranking = groups.ranking(order)
    costs = [sum(prices[n] * k for n, k in ranking.counts(steps).items()) for steps in range(len(ranking) + 1)]
    target = data.draw(st.integers(costs[-1], costs[0] + 2))

    def cost(counts: dict[str, int]) -> float:
        return float(sum(prices[n] * k for n, k in counts.items()))

    first = next(steps for steps, found in enumerate(costs) if found <= target)
    assert ranking.reaching(cost, target) == first
    last = ranking.reaching(cost, target, "ceil")
    assert costs[last] >= target or last == 0
    assert last in (first, first - 1)
    assert last == first or costs[first] < target


# -- the record ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given_", [{}, {"macs": 0.5, "params": 0.5}, *({"macs": v} for v in (0, 1, -0.1, 1.5, math.nan, True, "half"))])
def test_a_budget_is_one_fraction(given_: dict[str, Any]) -> None:
    """Exactly one of the two costs, between 0 and 1, is asked for; the error says how to write it."""
    with pytest.raises(gp.ConfigError, match=r"a budget of .*[Gg]ive"):
        gp.Budget(**given_)


# -- budgets of networks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A network to prune, with its graph and its dense cost."""

    model: nn.Module
    inputs: torch.Tensor
    graph: gp.DependencyGraph


@functools.cache
def subject(name: str) -> Subject:
    """Returns a network, traced once."""
    torchvision = import_torchvision()
    if name == "vit":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes = {"image_size": 16, "patch_size": 4, "num_layers": 3, "num_heads": 4, "hidden_dim": 48, "mlp_dim": 96}
            model = torchvision.models.vision_transformer.VisionTransformer(**sizes, num_classes=10).eval()
        inputs = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    else:
        model, make_inputs = build(f"torchvision:{name}", size=32)
        inputs = make_inputs(1)
    return Subject(model, inputs, gp.trace(model, inputs))


Removed = dict[str, np.ndarray[Any, np.dtype[np.bool_]]]


def one_more(masks: gp.Masks, scores: Mapping[str, Any], multiple: int = 1) -> list[Removed]:
    """Returns the masks with the last channels of one group put back (as many as make one step), for every group that lost some."""
    out = []
    for name in masks:
        kept, size = int(masks[name].sum()), masks[name].size
        if kept < size:
            more = min((kept // multiple + 1) * multiple, size)
            mask = np.zeros(size, dtype=bool)
            mask[np.argsort(-scores[name], kind="stable")[:more]] = True
            out.append({**{n: masks[n] for n in masks}, name: mask})
    return out


CASES: list[tuple[str, gp.Budget, str | None, str]] = [
    ("resnet18", gp.Budget(macs=0.5), None, "l1"),
    ("resnet18", gp.Budget(params=0.7), "global", "lamp"),
    ("mobilenet_v3_small", gp.Budget(macs=0.4), "global", "l1"),
    ("mobilenet_v3_small", gp.Budget(params=0.3), None, "fpgm"),
    ("vit", gp.Budget(macs=0.6), None, "l2"),
    ("vit", gp.Budget(params=0.5), "global", "l2"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1].unit}-{case[2] or 'even'}")
def test_a_budget_is_met_to_one_channel(case: tuple[str, gp.Budget, Any, str]) -> None:
    """What is counted of the shrunk model is within the budget, and with one channel more (of some group that lost one) it is not."""
    name, budget, mode, criterion = case
    found = subject(name)
    pruner = gp.Pruner(found.model, [{"op_types": ["default"]}], gp.criteria.criterion_named(criterion), graph=found.graph,
                       mode=mode, budget=budget)  # fmt: skip
    masks = pruner.masks()
    small, report = gp.speedup(found.model, masks, verify=False, plan=pruner.plan)
    forecast = Forecast(found.model, found.graph)
    assert forecast.cost(masks) == gp.count(small, found.inputs)
    dense, left = (getattr(gp.count(m, found.inputs), budget.unit) for m in (found.model, small))
    target = dense * (1 - budget.removed)
    steps = [getattr(forecast.cost(other), budget.unit) for other in one_more(masks, pruner.scores())]
    assert max(steps) > target >= left
    assert report.budget == budget
    assert {group.requested for group in report.groups} == {None}


@pytest.mark.parametrize("case", [("resnet18", gp.Budget(macs=0.5)), ("vit", gp.Budget(params=0.5))], ids=["resnet18", "vit"])
def test_without_a_ranking_all_groups_lose_the_same_share(case: tuple[str, gp.Budget]) -> None:
    """By default a budget is spread evenly: no group is a whole channel ahead of another's share."""
    found = subject(case[0])
    masks = gp.Pruner(found.model, [{"op_types": ["default"]}], gp.L1(), graph=found.graph, budget=case[1]).masks()
    touched = {name: (int((~masks[name]).sum()), masks[name].size) for name in masks if not masks[name].all()}
    assert len(touched) >= 5
    behind = [gone for gone in touched.values() if gone[0] < gone[1] - 1]  # a group's last channel stays
    assert max((gone - 1) / size for gone, size in touched.values()) <= min((gone + 1) / size for gone, size in behind)


@pytest.mark.parametrize("rounding", ["floor", "ceil"])
@pytest.mark.parametrize("multiple", [1, 4])
def test_rounding_of_a_budget(rounding: Rounding, multiple: int) -> None:
    """With multiples of four every width is one (or whole) and the budget is met to one step; "ceil" ends on the other side of it."""
    found = subject("resnet18")
    options: Any = {"rounding": rounding, "round_to": multiple}
    pruner = gp.Pruner(found.model, [{"op_types": ["default"]}], gp.L1(), graph=found.graph, budget=gp.Budget(macs=0.55),
                       mode="global", **options)  # fmt: skip
    masks = pruner.masks()
    assert all(int(masks[n].sum()) % multiple == 0 or masks[n].all() for n in masks)
    forecast = Forecast(found.model, found.graph)
    target = forecast.dense.macs * 0.45
    left = forecast.cost(masks).macs
    if rounding == "floor":
        assert left <= target < max(forecast.cost(other).macs for other in one_more(masks, pruner.scores(), multiple))
    else:
        assert left >= target


def three(wide: int = 20) -> nn.Module:
    """Returns three convolutions, the last of which is an output."""
    return filled(nn.Sequential(conv(3, wide), nn.ReLU(), conv(wide, 10), nn.ReLU(), conv(10, 2)))


@pytest.mark.parametrize("mode", [None, "global"])
def test_caps_hold_and_are_named(mode: Any) -> None:
    """No layer loses more than its maximum; the others make up for it; the report says which ended there."""
    config = [{"op_types": ["default"], "max_sparsity_per_layer": {"0": 0.33}}]
    small, report = gp.prune(three(), images(1), config_list=config, budget=gp.Budget(macs=0.6), mode=mode)
    assert small.get_parameter("0.weight").shape[0] == 14  # int(20 * 0.33) = 6 go
    assert report.before is not None
    assert report.after is not None
    assert report.after.macs <= 0.4 * report.before.macs
    notes = {group.name: group.note for group in report.groups}
    assert notes == {"0": "max_sparsity_per_layer is 0.33", "2": ""}
    assert {layer.name: layer.note for layer in report.layers}["0"] == "max_sparsity_per_layer is 0.33"


@pytest.mark.parametrize("mode", [None, "global", "balance"])
def test_excluded_layers_are_left_alone(mode: Any) -> None:
    """An excluded layer keeps all its channels, coupled ones with it, and the budget is met by the others."""
    model, x = residual()
    small, report = gp.prune(model, x, budget=gp.Budget(params=0.1), exclude=["outer"], mode=mode)
    assert [(g.name, g.kept == g.channels, g.note) for g in report.groups] == [("stem", True, "outer is excluded"), ("inner", False, "")]
    assert small.get_parameter("outer.weight").shape[0] == model.get_parameter("outer.weight").shape[0]
    assert gp.count(small, x).params <= 0.9 * gp.count(model, x).params
    with pytest.raises(gp.ConfigError, match="at most"):
        gp.prune(model, x, budget=gp.Budget(params=0.6), exclude=["outer"], mode=mode)


@pytest.mark.parametrize("unit", ["macs", "params"])
def test_a_budget_out_of_reach_says_how_much_can_go(unit: str) -> None:
    """What can go at most is what goes when every group is at its maximum, to a tenth of a percent."""
    model = three()
    config = [{"op_types": ["default"], "max_sparsity_per_layer": 0.5}]
    least, _ = gp.prune(model, images(1), sparsity=0.5)
    most = 1 - getattr(gp.count(least, images(1)), unit) / getattr(gp.count(model, images(1)), unit)
    with pytest.raises(gp.ConfigError, match=f"90\\.0%.*at most {re.escape(f'{most:.1%}')} can go"):
        gp.prune(model, images(1), config_list=config, budget=gp.Budget(**{unit: 0.9}))
    small, _ = gp.prune(model, images(1), config_list=config, budget=gp.Budget(**{unit: most - 1e-6}))
    assert gp.count(small, images(1)) == gp.count(least, images(1))


@pytest.mark.parametrize("tenths", range(1, 10))
@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_a_budget_that_can_be_met_exactly_is(tenths: int, rounding: Rounding) -> None:
    """Where every channel costs a tenth, n tenths are n channels, whatever the last bit of 1 - 0.9 is."""
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.ReLU(), nn.Linear(10, 10, bias=False))
    for budget in (gp.Budget(params=tenths / 10), gp.Budget(macs=tenths / 10)):
        small, _ = gp.prune(model, torch.ones(1, 10), budget=budget, rounding=rounding)
        assert small.get_parameter("0.weight").shape[0] == 10 - tenths


@pytest.mark.parametrize(
    ("options", "words_"),
    [
        ({"config_list": [{"sparsity": 0.5, "op_types": ["default"]}]}, "sparsity.*budget"),
        ({"config_list": [{"sparsity_per_layer": 0.5}]}, "sparsity_per_layer.*budget"),
        ({"config_list": [{"op_types": ["default"]}, {"total_sparsity": 0.5}]}, r"config_list\[1\].*total_sparsity.*budget"),
        ({"mode": "normal"}, "normal"),
        ({"exclude": ["0", "2"]}, r"at most 0\.0% can go"),
    ],
)
def test_a_budget_says_how_much_and_the_config_where(options: dict[str, Any], words_: str) -> None:
    """A budget beside a sparsity, or where nothing can shrink, is one clear error."""
    with pytest.raises(gp.ConfigError, match=words_):
        gp.prune(three(), images(1), budget=gp.Budget(macs=0.5), **options)


def test_a_budget_needs_inputs() -> None:
    """Without example inputs there are no groups, and masks of layers save nothing."""
    with pytest.raises(gp.InputError, match="no example inputs"):
        gp.L1NormPruner(three(), [{"op_types": ["default"]}], budget=gp.Budget(macs=0.5))


def test_a_total_that_caps_do_not_allow_ends_at_the_caps() -> None:
    """One ranking of 80 % with at most half of each layer takes half of each, and says why it is no more."""
    config = [{"total_sparsity": 0.8, "op_types": ["default"], "max_sparsity_per_layer": {"0": 0.5, "2": 0.5}}]
    _, report = gp.prune(three(), images(1), config_list=config)
    assert {g.name: (g.kept, g.note) for g in report.groups} == {
        "0": (10, "max_sparsity_per_layer is 0.5"),
        "2": (5, "max_sparsity_per_layer is 0.5"),
    }


# -- the forecast --------------------------------------------------------------------------------------------------------------------


def heads(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Runs attention of four heads between separate projections."""
    q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (net.query, net.key, net.value))
    out: torch.Tensor = net.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return out


def tied(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Reads the table of an embedding again as the last projection."""
    return functional.linear(torch.relu(net.mid(net.embed(x))), net.embed.weight)


def in_a_row(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Runs the layers one after the other."""
    for name, layer in net.named_children():
        x = layer(x) if name.startswith("o") else torch.relu(layer(x))
    return x


def recurrent(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Runs a recurrent layer between two linear ones."""
    out: torch.Tensor = net.out(net.core(net.inner(x))[0])
    return out


def einsums(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Attends and mixes by equations."""
    scores = torch.einsum("btd,bsd->bts", net.q(x), net.k(x))
    out: torch.Tensor = net.out(torch.einsum("...i,ij->...j", torch.einsum("bts,bsd->btd", scores, net.v(x)), net.mix))
    return out


def attended(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Runs MultiheadAttention on one sequence."""
    x = net.inner(x)
    out: torch.Tensor = net.out(net.core(x, x, x)[0])
    return out


L = nn.Linear
Build = Callable[[], tuple[nn.Module, Any]]


def small(run: Callable[..., Any], inputs: Any, **parts: Any) -> Build:
    """Returns a function that builds a small network and its inputs."""
    return lambda: (filled(Network(run, parts)), inputs)


NETWORKS: dict[str, Build] = {
    "residual": residual,
    "grouped": small(in_a_row, images(2), a=conv(3, 8), b=conv(8, 12, groups=4), c=nn.BatchNorm2d(12), out=conv(12, 3)),
    "depthwise": small(in_a_row, images(2), a=conv(3, 8), b=conv(8, 16, groups=8, stride=2), out=conv(16, 3)),
    "transposed": small(in_a_row, images(2), a=conv(3, 8), b=nn.ConvTranspose2d(8, 12, 2, 2, groups=2), out=nn.ConvTranspose2d(12, 3, 3)),
    "one dimension": small(in_a_row, normal(2, 3, 9), a=nn.Conv1d(3, 8, 3), b=nn.ConvTranspose1d(8, 6, 3), out=nn.Conv1d(6, 2, 1)),
    "three dimensions": small(in_a_row, normal(1, 2, 4, 4, 4), a=nn.Conv3d(2, 6, 3, padding=1), out=nn.Conv3d(6, 2, 2)),
    "heads": small(heads, sequences(2), query=L(4, 12), key=L(4, 12), value=L(4, 12), out=L(12, 4)),
    "narrow values": small(heads, sequences(2), query=L(4, 12), key=L(4, 12), value=L(4, 8), out=L(8, 4)),
    "attention": small(attended, sequences(2), inner=L(4, 8), core=nn.MultiheadAttention(8, 2, batch_first=True), out=L(8, 3)),
    "encoder": small(in_a_row, sequences(2), a=L(4, 8), b=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), out=L(8, 3)),
    "lstm": small(recurrent, sequences(2), inner=L(4, 6), core=nn.LSTM(6, 5, 2, bidirectional=True, batch_first=True), out=L(10, 3)),
    "projected lstm": small(recurrent, sequences(2), inner=L(4, 6), core=nn.LSTM(6, 8, proj_size=4), out=L(4, 3)),
    "gru": small(recurrent, sequences(2), inner=L(4, 6), core=nn.GRU(6, 8), out=L(8, 3)),
    "gru cell": small(in_a_row, normal(5, 4), a=L(4, 6), b=nn.GRUCell(6, 8), out=L(8, 3)),
    "lstm cell": small(recurrent, normal(5, 4), inner=L(4, 6), core=nn.LSTMCell(6, 8), out=L(8, 3)),
    "einsum": small(einsums, sequences(2), q=L(4, 8), k=L(4, 8), v=L(4, 6), mix=table(6, 10), out=L(10, 3)),
    "concatenation": small(lambda n, x: n.out(torch.cat([n.a(x), n.b(x)], 1)), images(2), a=conv(3, 5), b=conv(3, 7), out=conv(12, 3)),
    "gated": small(lambda n, x: n.out(functional.glu(n.a(x))), sequences(2), a=L(4, 12), out=L(6, 3)),
    "products": small(lambda n, x: torch.baddbmm(n.c(x), n.q(x), n.k(x).mT @ n.v(x)), sequences(2),
                      q=L(4, 8), k=L(4, 8), v=L(4, 6), c=L(4, 6)),
    "bilinear": small(lambda n, x: n.out(n.b(n.a(x), n.c(x))), normal(5, 4), a=L(4, 8), c=L(4, 6), b=nn.Bilinear(8, 6, 10), out=L(10, 3)),
    "used twice": small(lambda n, x: n.out(n.b(n.b(n.a(x)).relu())), sequences(2), a=L(4, 8), b=L(8, 8), out=L(8, 3)),
    "tied": small(tied, words(2), embed=nn.Embedding(11, 6), mid=L(6, 6)),
    "flattened": small(lambda n, x: n.out(n.a(x).relu().flatten(1)), images(2), a=conv(3, 8), out=L(8 * 36, 5)),
    "not all read": small(lambda n, x: n.out(n.a(x).relu()), sequences(2), a=L(4, 8), out=L(8, 3), idle=L(7, 7), spare=table(5)),
    **{n: functools.partial(lambda n: (subject(n).model, subject(n).inputs), n) for n in ("resnet18", "vit")},
}  # fmt: skip


def random_masks(graph: gp.DependencyGraph, seed: int) -> gp.Masks:
    """Returns masks that take a random share of random channels, of joint groups whole blocks."""
    generator = np.random.default_rng(seed)
    kept = {}
    for group in graph:
        if group.role != "within":
            most = group.channels - 1
            mask = np.arange(group.channels) < (most if most < 3 else generator.integers(2, most))
            kept[group.name] = generator.permutation(mask) if most else ~mask
    return gp.Masks(graph, kept)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_forecast_is_what_is_counted(name: str) -> None:
    """Parameters and MACs, in all and module by module, are exactly those of the dense and of the really shrunk model."""
    model, inputs = NETWORKS[name]()
    graph = gp.trace(model, inputs)
    forecast = Forecast(model, graph)
    assert forecast.cost({}) == forecast.dense == gp.count(model, inputs)
    assert worth(forecast.by_layer({})) == count_by_module(model, inputs)
    large = name in {"resnet18", "vit"}
    every = [gp.L1NormPruner(model, [{"sparsity": 0.5}], graph=graph).masks(), *([] if large else [random_masks(graph, 0)])]
    for masks in every:
        assert not all(masks[n].all() for n in masks)
        shrunk, report = gp.speedup(model, masks, verify=False)
        assert forecast.cost(masks) == gp.count(shrunk, inputs)
        assert forecast.cost(masks) != forecast.dense
        if report.kind == "module":
            assert worth(forecast.by_layer(masks)) == count_by_module(shrunk, inputs)
            assert {layer.name: layer.after for layer in report.layers if layer.after != gp.Cost(0, 0)} == count_by_module(shrunk, inputs)


def worth(costs: Mapping[str, gp.Cost]) -> dict[str, gp.Cost]:
    """Leaves out modules that cost nothing."""
    return {name: cost for name, cost in costs.items() if cost != gp.Cost(0, 0)}
