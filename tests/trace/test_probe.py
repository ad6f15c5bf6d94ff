"""Operators without a rule: what running them proves is used, everything else is frozen and named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphprune as gp
from tests.support.invariants import coverage_faults, permutation_error
from tests.support.networks import randomise

# name -> (schema, what it computes); none of these has a rule.
OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "reversed": ("(Tensor x) -> Tensor", lambda x: x.flip(1) * 2),
    "gain": ("(Tensor x, Tensor w) -> Tensor", lambda x, w: x * w[None, :, None, None]),
    "pair": ("(Tensor x, Tensor y) -> (Tensor, Tensor)", lambda x, y: (x + y, x * y.mean((2, 3), keepdim=True))),
    "pooled": ("(Tensor x, int size) -> Tensor", torch.nn.functional.adaptive_avg_pool2d),
    "doubled": ("(Tensor x) -> Tensor", lambda x: torch.cat([x, x], 1)),
    "listed": ("(Tensor[] xs) -> Tensor", lambda xs: xs[0] - xs[1].exp()),
    "rows": ("(Tensor x, Tensor w) -> Tensor", lambda x, w: torch.einsum("bchw,oc->bohw", x, w)),
    "softmaxed": ("(Tensor x) -> Tensor", lambda x: x.softmax(1)),
    "by_the_sum": ("(Tensor x) -> Tensor", lambda x: x * x.sum(1, keepdim=True)),
    "largest": ("(Tensor x) -> Tensor", lambda x: x * (x == x.amax(1, keepdim=True))),
    "by_position": ("(Tensor x) -> Tensor", lambda x: x * torch.arange(x.shape[1], dtype=x.dtype)[None, :, None, None]),
    "first": ("(Tensor x, int n) -> Tensor", lambda x, n: x[:, :n].clone()),
    "halves": ("(Tensor x) -> Tensor", lambda x: x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :]),
    "noisy": ("(Tensor x) -> Tensor", lambda x: x + torch.randn_like(x)),
    "fixed": ("(Tensor x, int n) -> Tensor", lambda x, n: x.reshape(x.shape[0], n, *x.shape[2:]).clone()),
    "fussy": ("(Tensor x) -> Tensor", lambda x: _only_once(x)),  # noqa: PLW0108 (defined below)
}


def _only_once(x: Tensor) -> Tensor:
    if bool((x == 0).all(dim=(0, 2, 3)).any()) or x.shape[1] != 8:
        message = "eight channels, please, none of them empty"
        raise ValueError(message)
    return x + 1


Body = Callable[[Any, Tensor, Tensor], Tensor]
PROVEN: dict[str, Body] = {
    "reversed": lambda _, a, b: torch.ops.probing.reversed(a) + b,
    "gain": lambda m, a, b: torch.ops.probing.gain(a, m.gain) + b,
    "pair": lambda _, a, b: sum(torch.ops.probing.pair(a, b)),
    "pooled": lambda _, a, b: torch.ops.probing.pooled(a, 3) * torch.ops.probing.pooled(b, 3),
    "doubled": lambda m, a, _: torch.ops.probing.doubled(a)[:, :8] + m.narrow(torch.ops.probing.doubled(a)),
    "listed": lambda _, a, b: torch.ops.probing.listed([a, b]),
}
FROZEN: dict[str, Body] = {
    "softmaxed": lambda _, a, b: torch.ops.probing.softmaxed(a) + 0 * b,
    "by_the_sum": lambda _, a, b: torch.ops.probing.by_the_sum(a) + 0 * b,
    "largest": lambda _, a, b: torch.ops.probing.largest(a) + 0 * b,
    "by_position": lambda _, a, b: torch.ops.probing.by_position(a) + 0 * b,
    "first": lambda _, a, b: torch.cat([torch.ops.probing.first(a, 5), b[:, :3]], 1),
    "halves": lambda _, a, b: torch.cat([torch.ops.probing.halves(a), b[:, :4]], 1),
    "noisy": lambda _, a, b: torch.ops.probing.noisy(a) + 0 * b,
    "fixed": lambda _, a, b: torch.ops.probing.fixed(a, 8) + 0 * b,
    "fussy": lambda _, a, b: torch.ops.probing.fussy(a) + 0 * b,
}


class Network(nn.Module):
    """conv_out(body(conv_a(x), conv_b(x)))."""

    def __init__(self, body: Body) -> None:
        """Makes the layers."""
        super().__init__()
        self.body = body
        self.a, self.b, self.out = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.narrow = nn.Conv2d(16, 8, 1)
        self.gain, self.rows = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to maps."""
        out: Tensor = self.out(self.body(self, self.a(x).relu(), self.b(x).tanh()))
        return out


@pytest.fixture(autouse=True, scope="module")
def _operators() -> Iterator[None]:
    library = torch.library.Library("probing", "DEF")
    for name, (schema, function) in OPERATORS.items():
        library.define(name + schema)
        library.impl(name, function, "CompositeExplicitAutograd")
    yield
    library._destroy()  # noqa: SLF001 (there is no public way to take operators back)


def network(body: Body) -> tuple[Network, Tensor]:
    """Returns the network in float64 and its inputs."""
    torch.manual_seed(0)
    model = Network(body).eval()
    randomise(model, 0)
    return model.double(), torch.randn(2, 3, 9, 9, dtype=torch.float64)


def frozen_rows(graph: gp.DependencyGraph, parameter: str) -> set[str]:
    """Returns why rows of a parameter are frozen."""
    return {f.reason for f in graph.frozen if (f.parameter, f.dim) == (parameter, 0)}


@pytest.mark.parametrize("name", PROVEN)
def test_what_running_proves_is_pruned(name: str) -> None:
    """Channels that pass through keep their labels, in whatever order and however many times; the result is exact."""
    model, x = network(PROVEN[name])
    graph = gp.trace(model, x)
    assert not graph.unknown
    assert not frozen_rows(graph, "a.weight")
    assert not coverage_faults(model, graph)
    error, control = permutation_error(model, graph, x)
    assert error < 1e-12
    assert control > 1e-3
    small, report = gp.prune(model, x, sparsity=0.5)
    assert report.error < 1e-12
    assert report.effect > 1e-3
    assert small.get_parameter("a.weight").shape[0] == 4


@pytest.mark.parametrize("name", FROZEN)
def test_what_running_does_not_prove_is_frozen(name: str) -> None:
    """Whatever mixes channels, goes by their position or number, or differs from run to run stays whole and is named."""
    model, x = network(FROZEN[name])
    graph = gp.trace(model, x)
    assert [(item.operator, item.channels) for item in graph.unknown] == [(f"probing::{name}", 8)]
    reasons = frozen_rows(graph, "a.weight")
    assert len(reasons) == 1
    assert f"probing::{name}" in reasons.pop()
    if name != "noisy":
        _, report = gp.prune(model, x, sparsity=0.5)
        assert report.error < 1e-12


def test_rows_of_a_weight_are_produced_by_the_operator() -> None:
    """A product with a weight mixes what it reads; its rows are channels of their own all the same."""
    model, x = network(lambda m, a, _: m.widen(torch.ops.probing.rows(a, m.rows)))
    model.widen = nn.Conv2d(6, 8, 1).double()
    graph = gp.trace(model, x)
    group = graph["rows"]
    assert group.channels == 6
    assert {(s.parameter, s.dim, s.produces) for s in group.slices} >= {("rows", 0, True), ("widen.weight", 1, False)}
    assert frozen_rows(graph, "a.weight")


def test_probing_leaves_no_trace() -> None:
    """Random state and model are as they were."""
    model, x = network(PROVEN["pair"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    gp.trace(model, x)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_wrong_map_would_not_be_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removal is the proof: with the influence read wrongly (channels shifted by one), the map is refused and the channels freeze."""
    from graphprune.trace import probe as probing  # noqa: PLC0415

    right = probing._link  # noqa: SLF001

    def shifted(*arguments: Any) -> Any:
        link = right(*arguments)
        return link and probing._Link(link.operand, link.output, (link.source + 1) % link.source.size)  # noqa: SLF001

    monkeypatch.setattr(probing, "_link", shifted)
    model, x = network(PROVEN["gain"])
    assert {item.operator for item in gp.trace(model, x).unknown} == {"probing::gain"}
