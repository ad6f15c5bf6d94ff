"""Costs follow closed formulas, module by module, and counting leaves no trace."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphprune.cost.count import Cost, count, count_by_module, recurrent_flops
from graphprune.errors import InputError
from tests.support.networks import build
from tests.support.untouched import changes, snapshot


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.booleans(),
)
def test_convolutions_follow_the_formula(groups: int, wide: int, high: int, batch: int, stride: int, bias: bool) -> None:
    """A convolution multiplies, per output pixel and sample, out channels x in channels / groups x kernel area times."""
    inside, outside = groups * wide, groups * high
    conv = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, groups=groups, bias=bias)
    pixels = math.ceil(7 / stride) * math.ceil(5 / stride)
    filters = outside * (inside // groups) * 9
    assert count(conv, torch.zeros(batch, inside, 7, 5)) == Cost(filters + bias * outside, batch * pixels * filters)


@pytest.mark.parametrize(
    ("module", "shape", "cost"),
    [
        (nn.Linear(5, 7), (3, 5), Cost(42, 3 * 5 * 7)),
        (nn.Linear(5, 7, bias=False), (3, 2, 5), Cost(35, 6 * 5 * 7)),
        (nn.Conv1d(4, 6, 3), (2, 4, 10), Cost(6 * 4 * 3 + 6, 2 * 8 * 6 * 4 * 3)),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), Cost(3 * 2 * 8 + 3, 27 * 3 * 2 * 8)),
        (nn.ConvTranspose2d(2, 3, 2, stride=2), (1, 2, 5, 5), Cost(2 * 3 * 4 + 3, 25 * 2 * 3 * 4)),
        (nn.BatchNorm2d(4), (2, 4, 3, 3), Cost(8, 0)),
        (nn.ReLU(), (2, 4), Cost(0, 0)),
        (nn.RNN(8, 16), (5, 2, 8), Cost(16 * (8 + 16 + 2), 10 * 16 * (8 + 16))),
        (nn.GRU(8, 16), (5, 2, 8), Cost(48 * (8 + 16 + 2), 10 * 48 * (8 + 16))),
        (nn.LSTM(8, 16), (5, 2, 8), Cost(64 * (8 + 16 + 2), 10 * 64 * (8 + 16))),
    ],
)
def test_layers_follow_the_formula(module: nn.Module, shape: tuple[int, ...], cost: Cost) -> None:
    """The MACs of each layer are those of its matrix products for the whole batch; norms and activations count nothing."""
    assert count(module, torch.zeros(shape)) == cost


class Attention(nn.Module):
    """Attention with the query's width in the values' place."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns the attention of two heads."""
        return F.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize("width", [8, 6])
def test_attention_counts_both_products(width: int) -> None:
    """Scaled-dot-product attention is Q K^T and the product with V, whichever kernel runs: fused, or plain for uneven widths."""
    query, key, value = torch.rand(2, 3, 5, 8), torch.rand(2, 3, 7, 8), torch.rand(2, 3, 7, width)
    assert count(Attention(), (query, key, value)) == Cost(0, 2 * 3 * 5 * 7 * (8 + width))


@pytest.mark.parametrize("enabled", [True, False])
def test_fused_transformer_layers_are_not_overlooked(enabled: bool) -> None:
    """The fast path of nn.TransformerEncoderLayer counts like the slow one, and its switch is as before."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        cost = count(layer, torch.rand(2, 7, 32))
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert cost.macs == 2 * 7 * 32 * (4 * 32 + 2 * 64) + 2 * 2 * 7 * 7 * 32


class Tied(nn.Module):
    """An embedding whose table is the last layer's weight, a module used twice under two names, and work in forward itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.mix = nn.Linear(4, 4)
        self.again = self.mix
        self.inner = nn.ModuleDict({"one": nn.Linear(4, 4, bias=False), "two": nn.Linear(4, 4, bias=False)})
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(4, 4))
        self.register_buffer("table", torch.zeros(1000))

    def forward(self, ids: Tensor, flag: bool = False) -> dict[str, Tensor]:
        """Returns logits in a dict."""
        x = self.again(self.mix(self.embed(ids))) @ self.scale
        x = self.inner["two"](self.inner["one"](x))
        assert flag
        return {"logits": self.head(x)}


def test_tied_parameters_count_once_and_modules_add_up() -> None:
    """Shared tensors and modules count under their first name, buffers never, and all entries add up to the whole."""
    model, inputs = Tied(), ((torch.zeros(3, 2, dtype=torch.int64),), {"flag": True})
    by_module = count_by_module(model, inputs)
    assert by_module == {
        "": Cost(16, 6 * 16),
        "embed": Cost(44, 0),
        "mix": Cost(20, 2 * 6 * 16),
        "inner.one": Cost(16, 6 * 16),
        "inner.two": Cost(16, 6 * 16),
        "head": Cost(0, 6 * 44),
    }
    assert sum(by_module.values(), Cost(0, 0)) == count(model, inputs)


def test_costs_subtract_and_relate() -> None:
    """Differences are per figure, ratios are after over before, and nothing of nothing is all of it."""
    before, after = Cost(100, 10), Cost(25, 5)
    assert before - after == Cost(75, 5)
    assert (after.relative_to(before).params, after.relative_to(before).macs) == (0.25, 0.5)
    assert (Cost(0, 0).relative_to(Cost(0, 0)).params, Cost(1, 0).relative_to(Cost(0, 0)).params) == (1.0, math.inf)
    assert before.to_dict() == {"params": 100, "macs": 10}


class Careless(nn.Module):
    """Overwrites its input, remembers results and counts its calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5))
        self.register_buffer("calls", torch.zeros(()))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Returns the layers' result plus a tensor made here."""
        self.calls.add_(1)
        self.cache["y"] = self.layers(x) + torch.rand(x.shape[0], 2, 1, 1)
        return self.cache["y"]


@pytest.mark.parametrize("function", [count, count_by_module])
def test_counting_leaves_no_trace(function: Any) -> None:
    """Model, input, gradients, hooks, backends and random numbers are as before."""
    model, x = Careless(), -torch.ones(2, 1, 3, 3)
    model(x.clone()).sum().backward()
    model.cache.clear()
    model.layers[3].eval()
    before = snapshot(model)
    backends = (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled())
    function(model, x)
    assert not changes(before, snapshot(model))
    assert not model.cache
    assert x.max() < 0
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled, torch.backends.mha.get_fastpath_enabled()) == backends


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("function", [count, count_by_module])
def test_inputs_that_do_not_fit_are_refused_without_a_trace(function: Any, enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing forward raises InputError with shapes, and hooks, statistics and backends are as before."""
    mkldnn: Any = torch.backends.mkldnn
    monkeypatch.setattr(mkldnn, "enabled", enabled)
    model = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2))
    before = snapshot(model)
    with pytest.raises(InputError, match=r"Sequential cannot be run on \(\[2, 5\] float32\)"):
        function(model, torch.zeros(2, 5))
    with pytest.raises(InputError, match="no example inputs"):
        function(model, None)
    assert not changes(before, snapshot(model))
    assert mkldnn.enabled == enabled


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
def test_scripted_modules_count_as_one() -> None:
    """A scripted module takes no hooks: its MACs belong to the module around it, or to itself as a whole."""
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
    x = torch.zeros(1, 1, 3, 3)
    assert count_by_module(scripted, x) == {"": Cost(0, 18), "0": Cost(4, 0), "1": Cost(4, 0)}
    assert count_by_module(nn.Sequential(scripted, nn.Conv2d(2, 1, 1)), x)[""] == Cost(0, 18)
    assert scripted.training


def test_a_known_network_has_its_known_cost() -> None:
    """ResNet-50 has 25,557,032 parameters and 4,089,184,256 MACs for one image of 224 x 224, found in a few forward passes' time."""
    model, make_inputs = build("torchvision:resnet50", size=224)
    inputs = make_inputs(1)
    start = time.process_time()
    with torch.no_grad():
        model(inputs)
    forward = time.process_time() - start
    assert count(model, inputs) == Cost(25_557_032, 4_089_184_256)
    assert time.process_time() - start < 8 * forward
    by_module = count_by_module(model.to("meta"), make_inputs(2).to("meta"))
    assert sum(by_module.values(), Cost(0, 0)) == Cost(25_557_032, 2 * 4_089_184_256)
    assert by_module["fc"] == Cost(2048 * 1000 + 1000, 2 * 2048 * 1000)


class _TokenThrough(nn.Module):
    """Hands a parameter itself to a layer, as networks with a class token do."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 4))
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.token) + self.layer(x)
        return out


def test_a_parameter_handed_to_a_layer_counts_as_any_tensor() -> None:
    """A class token that is called through a layer is counted, and still wants its gradient afterwards."""
    model = _TokenThrough()
    assert count(model, torch.ones(2, 4)) == Cost(4 + 15, 12 + 24)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_recurrent_layers_are_counted_with_their_fused_kernels_on() -> None:
    """Both directions and all layers count, cuDNN's kernel by its parameters, and no switch of the process is touched."""
    model, x = nn.LSTM(8, 16, 2, bidirectional=True).eval(), torch.zeros(5, 2, 8)
    flags = (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled)
    found = count(model, x).macs
    assert found == 2 * 10 * 64 * (8 + 16) + 2 * 10 * 64 * (32 + 16)
    assert recurrent_flops(torch.Size((5, 2, 8)), [p.shape for p in model.parameters()]) == 2 * found
    assert flags == (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled)
