"""The shrunk model is of the user's own class: attributes are found wherever they are, and widths chosen that its code can state."""

from __future__ import annotations

import copy
import functools
import json
import math
import operator
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from typer.testing import CliRunner

import graphprune as gp
from graphprune.cli.app import app
from graphprune.sizes import widths
from graphprune.sizes.expressions import Arithmetic, Attribute, Extent, Tracked, Trail, evaluate, inverse
from graphprune.sizes.watch import demands
from graphprune.sizes.widths import stated_widths
from tests.support.invariants import train_step
from tests.support.operators import conv, filled, images, normal
from tests.support.threads import together
from tests.support.torchvision_shim import import_torchvision
from tests.support.untouched import changes, snapshot

EXACT = 1e-9


# -- modules whose own arithmetic states sizes -----------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention whose head width is `C // num_heads`, read from the shape, and whose output is reshaped to C."""

    def __init__(self, width: int, heads: int) -> None:
        """Builds the projections; the scale is a number from then on."""
        super().__init__()
        self.num_heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attends."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-2, -1) * self.scale, dim=-1)
        result: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))
        return result


class ChannelAttention(Attention):
    """Attention across the channels of each head, scaled by the number of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Attends."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax((q * n**-0.5).transpose(-2, -1) @ k, dim=-1)
        result: Tensor = self.proj((weights @ v.transpose(-2, -1)).transpose(-2, -1).transpose(1, 2).reshape(b, n, c))
        return result


class Fused(Attention):
    """Attention by the fused operator, whose scale is one over the root of the head width."""

    def forward(self, x: Tensor) -> Tensor:
        """Attends."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        result: Tensor = self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        return result


class Transformer(nn.Module):
    """Two pre-norm blocks on vectors, and a head."""

    def __init__(self, kind: type[Attention], width: int, heads: int) -> None:
        """Builds blocks of a kind of attention."""
        super().__init__()
        self.stem = nn.Linear(4, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.blocks = nn.ModuleList(kind(width, heads) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the mean of the tokens, classified."""
        x = self.stem(x)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        result: Tensor = self.head(x.mean(1))
        return result


class Shuffled(nn.Module):
    """Units that keep one half of the channels and convolve the other, with a channel shuffle written by hand behind each."""

    def __init__(self) -> None:
        """Builds three units."""
        super().__init__()
        self.stem = conv(3, 48)
        self.units = nn.ModuleList(nn.Sequential(conv(24, 8, 1), nn.ReLU(), conv(8, 24)) for _ in range(3))
        self.head = conv(48, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a map."""
        x = self.stem(x)
        for unit in self.units:
            kept, changed = x.chunk(2, dim=1)
            x = torch.cat((kept, unit(changed)), dim=1)
            b, c, h, w = x.shape
            x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        result: Tensor = self.head(x)
        return result


def tokens(batch: int) -> Tensor:
    """Returns five vectors of width 4 per example."""
    return normal(batch, 5, 4)


ARITHMETIC: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "head width C // num_heads": (lambda: Transformer(Attention, 12, 3), tokens),
    "channel attention": (lambda: Transformer(ChannelAttention, 15, 3), tokens),
    "fused attention": (lambda: Transformer(Fused, 12, 3), tokens),
    "fused attention with one head": (lambda: Transformer(Fused, 12, 1), tokens),
    "equal chunks": (Shuffled, images),
}


@pytest.mark.parametrize("name", ARITHMETIC)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_arithmetic_becomes_a_constraint_on_the_widths(name: str, sparsity: float) -> None:
    """With keep_class the result is of the model's own class and exact; no group keeps less than was asked, and raised ones say so."""
    build, inputs = ARITHMETIC[name]
    model = filled(build())
    small, report = gp.prune(model, inputs(2), sparsity, keep_class=True)
    assert type(small) is type(model)
    assert (report.kind, report.reason, report.verified) == ("module", "", True)
    assert report.error < EXACT
    assert small(inputs(3)).shape == model(inputs(3)).shape
    for group in report.groups:
        asked = max(int(round(group.channels * (1 - (group.requested or 0)), 9)), 1)
        assert group.kept >= asked
        assert group.kept == asked or f"{group.kept} kept instead of {asked}" in group.note


@pytest.mark.parametrize("name", ["head width C // num_heads", "fused attention"])
def test_heads_keep_their_width(name: str) -> None:
    """Three heads of width 4 on a trunk of 12, of which half is asked for: two heads everywhere, and a trunk of 8."""
    build, inputs = ARITHMETIC[name]
    small: Any = gp.prune(filled(build()), inputs(2), 0.5, keep_class=True)[0]
    assert [block.num_heads for block in small.blocks] == [2, 2]
    assert small.stem.out_features == small.head.in_features == 8
    assert all(block.qkv.weight.shape == (24, 8) for block in small.blocks)
    assert all(block.scale == 0.5 for block in small.blocks)


def test_equal_chunks_lose_the_same_number() -> None:
    """Every unit of the shuffled network gets and keeps one half of what is left."""
    small: Any = gp.prune(filled(Shuffled()), images(2), 0.5, keep_class=True)[0]
    width = small.stem.out_channels
    assert width < 48
    assert all((u[0].in_channels, u[2].out_channels) == (width // 2, width // 2) for u in small.units)


def test_without_keep_class_the_report_names_module_and_integer() -> None:
    """Asked for half of three heads, the default does as told, returns a graph, and says which expression of which module forbids more."""
    small, report = gp.prune(filled(Transformer(Attention, 12, 3)), tokens(2))
    assert isinstance(small, torch.fx.GraphModule)
    assert report.error < EXACT
    assert "`blocks.0` states `shape[2] // self.num_heads` at reshape, which gives 6 where 4 is needed" in report.reason


def test_the_class_is_kept_by_default_where_that_costs_nothing() -> None:
    """With four heads one half of everything fits: the class is kept without being asked for, and no group keeps more."""
    model = filled(Transformer(Attention, 16, 4))
    small, report = gp.prune(model, tokens(2))
    assert type(small) is Transformer
    assert all(2 * group.kept == group.channels for group in report.groups if group.requested)
    same, _ = gp.prune(model, tokens(2), keep_class=True)
    assert torch.equal(small(tokens(2)), same(tokens(2)))


def test_a_default_that_depends_on_a_width_is_named() -> None:
    """A single head of the fused attention loses channels, and with them the scale that the masked network has: the report says so."""
    _, report = gp.prune(filled(Transformer(Fused, 12, 1)), tokens(2))
    assert report.kind == "graph"
    assert "`blocks.0` leaves the scale of scaled_dot_product_attention to a default for 12 channels" in report.reason


def test_literal_widths_are_kept_whole() -> None:
    """A width that the code writes down as a number cannot change with keep_class: its group stays, other groups go."""

    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grow, self.inner, self.last = nn.Linear(4, 12), nn.Linear(12, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            wide = torch.relu(self.grow(x)).view(-1, 5, 12)
            result: Tensor = self.last(torch.relu(self.inner(wide)))
            return result

    small: Any
    small, report = gp.prune(filled(Literal()), tokens(2), keep_class=True)
    assert (small.grow.out_features, small.inner.out_features) == (12, 4)
    assert report.kind == "module"
    assert gp.prune(filled(Literal()), tokens(2))[1].kind == "graph"


def test_decisions_fall_as_before() -> None:
    """A branch that the code takes by a count stays taken: of two paths, neither goes, though one of them was asked for."""

    class Paths(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.paths = 2
            self.wide, self.last = conv(3, 8), conv(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.relu(self.wide(x))
            if self.paths > 1:
                b, c, h, w = hidden.shape
                hidden = hidden.reshape(b, self.paths, c // self.paths, h, w)
                hidden = (hidden * torch.sigmoid(hidden.mean((3, 4), keepdim=True))).sum(1)
            result: Tensor = self.last(hidden)
            return result

    model = filled(Paths())
    small, report = gp.prune(model, images(2), keep_class=True)
    assert type(small) is Paths
    assert report.error < EXACT
    small, report = gp.prune(model, images(2), keep_class=True, cut="within")
    assert type(small) is Paths
    assert small.wide.out_channels == 4


@pytest.mark.parametrize("name", ["swin_t", "shufflenet_v2_x0_5"])
def test_networks_of_torchvision(name: str) -> None:
    """Window attention and channel shuffles as they are found in the wild keep their class."""
    import_torchvision()
    import torchvision  # noqa: PLC0415 (only behind the shim)

    model = filled(getattr(torchvision.models, name)(weights=None, num_classes=5))
    small, report = gp.prune(model, torch.rand(1, 3, 64, 64, dtype=torch.float64), keep_class=True)
    assert type(small) is type(model)
    assert report.error < EXACT < report.effect
    assert report.after is not None
    assert report.before is not None
    assert report.after.params < 0.6 * report.before.params


def test_a_pruner_keeps_the_class() -> None:
    """`L1NormPruner(keep_class=True)` makes masks that speedup can give to the model's own class."""
    model = filled(Transformer(Attention, 12, 3))
    pruner = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], tokens(2), keep_class=True)
    _, masks = pruner.compress()
    small, report = gp.speedup(model, masks, result="module")
    assert type(small) is Transformer
    assert report.error < EXACT


@pytest.mark.parametrize(("tries", "given_up"), [(1, True), (20_000, False)])
def test_a_search_that_is_given_up_says_so(monkeypatch: pytest.MonkeyPatch, tries: int, given_up: bool) -> None:
    """Where no widths are found in the tries that there are, all channels stay, and the plan and the report name the groups."""
    monkeypatch.setattr(widths, "_TRIES", tries)
    model = filled(Transformer(Attention, 12, 3))
    graph = gp.trace(model, tokens(2))
    asked = {g.name: -(-g.channels // 2) for g in graph.groups}
    stated = stated_widths(graph, demands(model, graph.engine), asked)
    assert bool(stated.given_up) is given_up
    assert all(stated.counts[n] == graph[n].channels for n in stated.given_up)
    pruner = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], tokens(2), keep_class=True)
    masks = pruner.masks()
    _, report = gp.speedup(model, masks, plan=pruner.plan)
    said = {g.name: g.note for g in report.groups if "found in 1 tries" in g.note}
    assert set(said) == {n for n in stated.given_up if graph[n].role != "within"}  # which stay whole anyway, as whole heads go
    assert all(
        pruner.plan.notes[name] == note and note.startswith(f"all {graph[name].channels} kept instead") for name, note in said.items()
    )
    assert all(g.kept == g.channels for g in report.groups if g.name in said)
    assert set(stated.notes(stated.counts)) == set()


def test_a_search_warns_where_widths_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """An `Objective` with keep_class warns, as its trials would look as if nothing could go."""
    monkeypatch.setattr(widths, "_TRIES", 1)
    objective = gp.Objective(filled(Transformer(Attention, 12, 3)), tokens(2), lambda _: 0.0, keep_class=True)
    with pytest.warns(UserWarning, match=r"keep all their channels: of keep_class=, no fewer were found in 1 tries"):
        objective.counts(dict.fromkeys(objective.groups, 0.5))


class Halves(nn.Module):
    """Cuts a layer in two and treats the parts apart, so that nothing but the cut itself ties their widths."""

    def __init__(self, way: str) -> None:
        """Builds the layers; `size` is how wide the parts are."""
        super().__init__()
        self.way, self.size = way, 12
        self.first = nn.Linear(4, 24)
        self.left, self.right = nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Adds what the parts give."""
        hidden = torch.relu(self.first(x))
        left, right = hidden.chunk(2, -1) if self.way == "chunk" else hidden.split(self.size, -1)
        result: Tensor = self.left(left) + self.right(right)
        return result


@pytest.mark.parametrize(
    ("way", "round_to", "asked", "kept"),
    [
        ("chunk", 1, (5, 2), (5, 4)),
        ("chunk", 6, (5, 2), (6, 6)),
        ("split", 1, (5, 2), (5, 2)),
        ("split", 1, (2, 5), (5, 5)),
        ("split", 6, (2, 5), (6, 5)),
    ],
)
def test_cuts_are_equations(way: str, round_to: int, asked: tuple[int, int], kept: tuple[int, int]) -> None:
    """Parts become the smallest that the cut makes: chunks differ by one at most, the last part of a split is no larger than others."""
    model = filled(Halves(way))
    graph = gp.trace(model, tokens(2))
    names = [g.name for g in graph.groups]
    counts = stated_widths(graph, demands(model, graph.engine), dict(zip(names, asked, strict=True)), round_to).counts
    assert tuple(counts[n] for n in names) == kept
    masks = gp.Masks(graph, {g.name: np.arange(g.channels) < counts[g.name] for g in graph.groups})
    _, report = gp.speedup(model, masks, result="module")
    assert report.error < EXACT


# -- wherever integers are held --------------------------------------------------------------------------------------------------------


class Shared:
    """A configuration object."""

    def __init__(self, heads: int) -> None:
        """Holds the number of heads."""
        self.heads = heads


def _unflattened(x: Tensor, dim: int, sizes: tuple[int, int]) -> Tensor:
    """Cuts a dimension in two."""
    result: Tensor = x.unflatten(dim, sizes)
    return result


class Holder(nn.Module):
    """Cuts a hidden layer into heads; how many, and how wide, is asked of `sizes`."""

    heads = 4
    width = 6

    def __init__(self, way: str) -> None:
        """Builds the layers, and holds the sizes in one of several ways."""
        super().__init__()
        self.way = way
        self.wide, self.last = nn.Linear(4, 24), nn.Linear(24, 3)
        self.gain = nn.Parameter(torch.ones(4, 1))
        self.nested: Any = {"shape": ((4,), [6]), "name": "x"}
        self.config: Any = SimpleNamespace(inner=Shared(4), other=[1, 2])
        self.partial = functools.partial(_unflattened, sizes=(4, 6))
        self.total = 24
        self.third = 12

    @property
    def pairs(self) -> int:
        """A property computed from an attribute."""
        return self.third // 3

    def sizes(self) -> tuple[int, int]:
        """Returns heads and width."""
        ways: dict[str, Callable[[], tuple[int, int]]] = {
            "class attributes": lambda: (self.heads, self.width),
            "nested containers": lambda: (self.nested["shape"][0][0], self.nested["shape"][1][0]),
            "a configuration in a configuration": lambda: (self.config.inner.heads, 6),
            "a quotient": lambda: (self.total // 6, 6),
            "a property": lambda: (self.pairs, 6),
            "the shape of a parameter": lambda: (self.gain.shape[0], 6),
            "the shape of the input": lambda: (4, 6),
        }
        return ways[self.way]()

    def forward(self, x: Tensor) -> Tensor:
        """Scales heads and joins them."""
        hidden = self.wide(x)
        if self.way == "a partial":
            cut = self.partial(hidden, -1)
        elif self.way == "the shape of the input":
            cut = hidden.reshape(*hidden.shape[:-1], hidden.shape[-1] // 6, 6)
        else:
            cut = hidden.view(*x.shape[:-1], *self.sizes())
        result: Tensor = self.last((cut * self.gain).relu().flatten(-2))
        return result


WAYS = ["class attributes", "nested containers", "a configuration in a configuration", "a partial", "a quotient", "a property",
        "the shape of a parameter", "the shape of the input"]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_integers_are_found_wherever_they_are_held(way: str) -> None:
    """Sizes in class attributes, nested containers, configurations, partials and properties are set; the given model is left alone."""
    model: Any = filled(Holder(way))
    before = snapshot(model)
    nested, inner = copy.deepcopy(model.nested), model.config.inner.heads
    small: Any
    small, report = gp.prune(model, tokens(2))
    assert type(small) is Holder, report.reason
    assert report.error < EXACT < report.effect
    assert small.wide.out_features == 12
    assert not changes(before, snapshot(model))
    assert (model.nested, model.config.inner.heads, Holder.heads) == (nested, inner, 4)
    twice, again = gp.prune(small, tokens(2))
    assert type(twice) is Holder
    assert again.error < EXACT


class SamePadded(nn.Conv2d):
    """A convolution that pads by what its own attributes say."""

    def forward(self, x: Tensor) -> Tensor:
        """Pads left and top by halves, and convolves."""
        pads = []
        for size, stride, kernel, dilation in zip(x.shape[:1:-1], self.stride, self.kernel_size, self.dilation, strict=True):
            amount = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            pads += [amount // 2, amount - amount // 2]
        return nn.functional.conv2d(nn.functional.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation)


def test_integers_that_need_not_change_stay() -> None:
    """Kernel sizes and strides that take part in arithmetic are left alone while a head count next to them is set."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = 4
            self.first, self.last = SamePadded(3, 24, 7, 2), conv(24, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).unflatten(1, (self.heads, -1))
            result: Tensor = self.last((hidden * hidden.mean((3, 4), keepdim=True)).flatten(1, 2))
            return result

    small: Any
    small, report = gp.prune(filled(Both()), images(2))
    assert type(small) is Both, report.reason
    assert (small.first.kernel_size, small.first.stride, small.first.dilation) == ((7, 7), (2, 2), (1, 1))
    assert (small.heads, small.first.out_channels) == (2, 12)


def numbers(value: Any, seen: set[int]) -> Iterator[int]:
    """Yields the integers in a value and everything that it holds."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from numbers(item, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from numbers(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from numbers(vars(value), seen)
        yield from numbers(getattr(value, "keywords", None), seen)


@pytest.mark.parametrize("way", WAYS)
def test_the_result_is_a_model_like_any_other(way: str) -> None:
    """It holds plain integers only, as does the original afterwards; it can be copied, pickled and trained."""
    model = filled(Holder(way))
    small, _ = gp.prune(model, tokens(2))
    for held in (model, small):
        assert not [n for n in numbers(held, set()) if isinstance(n, Tracked)]
    for copied in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):  # noqa: S301 (our own bytes)
        assert torch.equal(copied(tokens(3)), small(tokens(3)))
    train_step(small, tokens(4))


class Remembering(nn.Module):
    """Keeps the head biases that it looked up, per device, and the sizes that it saw, in eval mode."""

    def __init__(self) -> None:
        """Builds the layers and empty caches."""
        super().__init__()
        self.heads = 4
        self.attend, self.last = nn.Linear(4, 24), nn.Linear(24, 3)
        self.bias = nn.Parameter(torch.ones(4, 9))
        self.register_buffer("index", torch.arange(5) + torch.arange(5)[:, None], persistent=False)
        self.index: Tensor
        self.cache: dict[str, Tensor] = {}
        self.seen: dict[tuple[int, ...], int] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Mixes tokens by biases."""
        key = str(x.device)
        if key not in self.cache:
            self.cache[key] = self.bias[:, self.index]
        heads = self.attend(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        self.seen[tuple(heads.shape)] = self.heads * heads.shape[-1]
        result: Tensor = self.last((self.cache[key].softmax(-1) @ heads).transpose(1, 2).flatten(-2))
        return result


def test_caches_do_not_outlive_what_they_were_computed_from() -> None:
    """A model that ran before, and remembers, is pruned as one that never did; its own cache stays, the result's is filled anew."""
    fresh: Any
    used: Any
    fresh, used = filled(Remembering()), filled(Remembering())
    used(tokens(2))
    expected, _ = gp.prune(fresh, tokens(2))
    cached = used.cache["cpu"]
    small: Any
    small, report = gp.prune(used, tokens(2))
    assert type(small) is Remembering
    assert report.error < EXACT < report.effect
    assert used.cache["cpu"] is cached
    assert not small.cache
    assert torch.equal(small(tokens(3)), expected(tokens(3)))
    assert small.cache["cpu"].shape == (2, 5, 5)
    assert not [n for n in numbers(small, set()) if isinstance(n, Tracked)]


def test_what_outlives_the_recording_is_an_integer_like_any_other() -> None:
    """An integer that the forward pass left outside the model no longer remembers anything."""
    left: list[int] = []

    class Leaving(Holder):
        def sizes(self) -> tuple[int, int]:
            left.extend(super().sizes())
            return super().sizes()

    gp.prune(filled(Leaving("class attributes")), tokens(2))
    assert any(isinstance(n, Tracked) for n in left)
    assert all(type(n + 1) is int for n in left)


def test_a_dict_of_constants_is_no_cache() -> None:
    """Tensors in a dict that the model cannot fill by itself are left where they are."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
            self.held = {"shift": torch.ones(1, dtype=torch.float64)}

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(torch.relu(self.first(x) + self.held["shift"]))
            return result

    small: Any
    small, report = gp.prune(filled(Constant()), tokens(2))
    assert report.kind == "module"
    assert torch.equal(small.held["shift"], torch.ones(1, dtype=torch.float64))


def test_a_failure_in_place_puts_configurations_back() -> None:
    """Where the class cannot be kept in place, the model is as it was, objects that its modules hold included."""

    class Configured(Attention):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__(width, heads)
            del self.num_heads
            self.config = Shared(heads)

        @property
        def num_heads(self) -> int:
            return self.config.heads

        @num_heads.setter
        def num_heads(self, value: int) -> None:
            self.config = Shared(value)

        @num_heads.deleter
        def num_heads(self) -> None:
            del self.config

    model = filled(Transformer(Configured, 12, 3))
    before = snapshot(model)
    with pytest.raises(gp.errors.VerificationError, match=r"blocks.0"):
        gp.prune(model, tokens(2), inplace=True)
    assert not changes(before, snapshot(model))
    assert [block.config.heads for block in model.blocks] == [3, 3]  # type: ignore[union-attr]
    small, _ = gp.prune(model, tokens(2), inplace=True, keep_class=True)
    assert small is model
    assert [block.config.heads for block in model.blocks] == [2, 2]  # type: ignore[union-attr]


def test_saved_and_loaded(tmp_path: Any) -> None:
    """A class kept by raised widths survives a round trip to disk."""
    small, _ = gp.prune(filled(Transformer(Attention, 12, 3)), tokens(2), keep_class=True)
    gp.save(small, tmp_path / "small.safetensors")
    loaded = gp.load(filled(Transformer(Attention, 12, 3), seed=5), tmp_path / "small.safetensors")
    assert torch.equal(loaded(tokens(3)), small(tokens(3)))


def test_the_command_line_keeps_the_class(tmp_path: Any) -> None:
    """`graphprune prune --keep-class` says so in its report, and raises widths where it must."""
    source = tmp_path / "net.py"
    source.write_text(
        "from tests.sizes.test_keep_class import Attention, Transformer, filled\n\n\ndef net():\n"
        '    """Returns attention with three heads."""\n    return filled(Transformer(Attention, 12, 3)).float()\n'
    )
    arguments = ["prune", f"{source}:net", "--input", "2,5,4", "--out", str(tmp_path / "out"), "--no-onnx"]
    kinds = []
    for option in ([], ["--keep-class"]):
        done = CliRunner().invoke(app, ["--json", *arguments, *option])
        assert done.exit_code == 0, done.output
        facts = json.loads(done.stdout)
        kinds.append((facts["kind"], facts["asked"]["keep_class"]))
    assert kinds == [("graph", False), ("module", True)]


# -- expressions -----------------------------------------------------------------------------------------------------------------------

FUNCTIONS = [operator.add, operator.sub, operator.mul, operator.floordiv]


@st.composite
def expressions(draw: st.DrawFn) -> Any:
    """Draws arithmetic on one attribute and literals, as a tracked integer with the trail that it leaves."""
    trail = Trail()
    integer: Any = Tracked.of(Attribute(("", ("n",)), draw(st.integers(1, 40))), trail)
    for _ in range(draw(st.integers(0, 4))):
        function, other, swapped = draw(st.sampled_from(FUNCTIONS)), draw(st.integers(1, 9)), draw(st.booleans())
        if swapped and function is operator.floordiv and int(integer) == 0:
            continue
        made = function(other, integer) if swapped else function(integer, other)
        integer = made
    return integer, trail


@given(expressions(), st.integers(1, 60))
def test_expressions_say_what_the_integer_is(drawn: Any, value: int) -> None:
    """An expression gives the integer that carries it; its inverse, where there is one that comes out even, gives the target."""
    integer, _ = drawn
    assert type(integer) is Tracked
    place = ("", ("n",))
    assert evaluate(integer.origin, lambda leaf: leaf.old) == int(integer)
    target = int(evaluate(integer.origin, lambda _: value))
    found = inverse(integer.origin, place, target)
    assert found is not None
    if evaluate(integer.origin, lambda _: evaluate(found, lambda leaf: leaf.old)) != target:
        assert "//" in str(integer.origin) or "*" in str(integer.origin)


@given(expressions())
def test_tracked_integers_are_integers(drawn: Any) -> None:
    """They hash, compare, format, index and pickle as the plain integer does; once the trail ends, arithmetic on them is plain."""
    integer, trail = drawn
    plain = int(integer)
    assert type(plain) is int
    assert (hash(integer), repr(integer), {integer: 1}) == (hash(plain), repr(plain), {plain: 1})
    assert type(pickle.loads(pickle.dumps(integer))) is int  # noqa: S301 (our own bytes)
    assert type(copy.deepcopy(integer)) is int
    assert math.sqrt(abs(plain)) == math.sqrt(abs(integer))
    assert integer / 2 == plain / 2
    trail.open = False
    assert type(integer + 1) is int


def test_arrays_of_candidates_are_evaluated_elementwise() -> None:
    """Expressions take arrays; dividing by zero gives zero instead of failing."""
    size = Extent(np.arange(4), 4)
    code = Arithmetic(operator.floordiv, 12, size, 3)
    assert evaluate(code, lambda _: np.array([0, 1, 4, 5])).tolist() == [0, 12, 3, 2]


def test_demands_name_what_the_code_computes() -> None:
    """Of an attention module: head count and width, the trunk, and that the scale, a number from the start, asks for nothing."""
    model = filled(Transformer(Attention, 12, 3))
    graph = gp.trace(model, tokens(2))
    found = [d for d in demands(model, graph.engine) if d.module == "blocks.0"]
    stated = {str(d.code): d.old for d in found if d.labels is not None and not isinstance(d.code, int)}
    assert stated == {"self.num_heads": 3, "shape[2] // self.num_heads": 4, "shape[2]": 12}


def test_another_thread_leaves_no_trail() -> None:
    """Arithmetic of other threads with integers that one thread tracks is arithmetic with integers."""
    trail = Trail()
    made = Tracked.of(Attribute(("", ("heads",)), 4), trail)
    assert isinstance(made * 2, Tracked)
    found = together([lambda: [type(made * 2), made == 4, float(made)]])
    assert found == [[int, True, 4.0]]
    assert not trail.comparisons
    assert not trail.floats
