"""Models without weights: the same graph as with weights, true answers where a model decides in Python, clear errors where it cannot be."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.cost.count import count_by_module
from graphprune.trace.meta_device import LARGEST, shapes_suffice
from graphprune.trace.program import info
from tests.support.networks import call, load
from tests.support.zoo_sources import blueprint

Decision = Callable[[torch.Tensor], object]


def without_weights(make: Callable[[], nn.Module]) -> nn.Module:
    """Returns a model built on the meta device."""
    with torch.device("meta"):
        model = make().eval()
    assert all(tensor.is_meta for tensor in model.parameters())
    return model


def frozen(graph: gp.DependencyGraph) -> list[tuple[Any, ...]]:
    """Returns everything that is frozen with everything that is said about it."""
    return [(f.parameter, f.dim, f.index.tolist(), str(f), f.remedy) for f in graph.frozen]


def positions(graph: gp.DependencyGraph) -> list[tuple[Any, ...]]:
    """Returns what is frozen without the reasons."""
    return [entry[:3] for entry in frozen(graph)]


def verdicts(graph: gp.DependencyGraph) -> list[tuple[Any, ...]]:
    """Returns what is said of each group beside its slices."""
    return [(g.name, g.verdict, g.role, g.why) for g in graph]


def operators(graph: gp.DependencyGraph) -> list[str]:
    """Returns the recorded operators in order, but for those that decide."""
    nodes = graph.engine.program.graph.nodes
    return [f"{n.target} in {info(n).module}" for n in nodes if n.op == "call_function" and not info(n).decides]


# -- the same graph ------------------------------------------------------------------------------------------------------------------

NETWORKS = [
    *("torchvision:resnet18", "torchvision:vit_b_16", "torchvision:shufflenet_v2_x1_0"),
    *("transformers:bert", "transformers:llama", "transformers:gpt2", "transformers:t5", "transformers:vit", "transformers:segformer"),
]


@pytest.mark.parametrize("name", NETWORKS)
def test_graph_is_that_of_the_model_with_weights(name: str) -> None:
    """Groups, their order, verdicts, frozen positions with their reasons, and dataflow do not depend on weights being there."""
    network = load(name)
    inputs = network.make_inputs(2)
    there = gp.trace(network.model, inputs)
    model = without_weights(blueprint(name, None).make)
    here = gp.trace(model, inputs)
    assert here.fingerprint == there.fingerprint
    assert verdicts(here) == verdicts(there)
    assert frozen(here) == frozen(there)
    assert here.edges == there.edges
    assert len(here.groups) > 1
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("name", ["transformers:swin", "torchvision:swin_t"])
def test_index_tables_without_values_are_frozen_alike(name: str) -> None:
    """Where the positions of a lookup are in a buffer without values, the same positions are frozen, for the reason that is known."""
    network = load(name)
    inputs = network.make_inputs(1)
    there, here = gp.trace(network.model, inputs), gp.trace(without_weights(blueprint(name, None).make), inputs)
    assert here.fingerprint == there.fingerprint
    assert positions(here) == positions(there)
    assert "computed at run time" in str(next(f for f in here.frozen if "relative_position_bias_table" in f.parameter))


def test_inputs_may_be_on_the_meta_device_too() -> None:
    """Inputs without values give the same graph where nothing is decided on them."""
    network = load("torchvision:resnet18")
    images = network.make_inputs(2)
    model = without_weights(blueprint("torchvision:resnet18", None).make)
    assert gp.trace(model, images.to("meta")).fingerprint == gp.trace(network.model, images).fingerprint


def test_cost_is_that_of_the_model_with_weights() -> None:
    """Parameters and MACs, in all and by module, do not depend on weights or inputs being there."""
    network = load("transformers:llama")
    inputs = network.make_inputs(2)
    model = without_weights(blueprint("transformers:llama", None).make)
    assert gp.count(model, inputs) == gp.count(network.model, inputs)
    assert count_by_module(model, inputs) == count_by_module(network.model, inputs)


def test_explain_and_networkx_need_no_weights() -> None:
    """What a graph says about a layer is the same."""
    network = load("transformers:llama")
    inputs = network.make_inputs(2)
    there, here = gp.trace(network.model, inputs), gp.trace(without_weights(blueprint("transformers:llama", None).make), inputs)
    layer = "model.layers.0.self_attn.k_proj"
    assert here.explain(layer) == there.explain(layer)
    assert dict(here.to_networkx().nodes) == dict(there.to_networkx().nodes)


# -- decisions in Python -------------------------------------------------------------------------------------------------------------


class Deciding(nn.Module):
    """Two layers in sequence, or side by side where `decide` says so."""

    def __init__(self, decide: Callable[[Deciding, torch.Tensor], object]) -> None:
        """Builds the layers."""
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
        self.last = nn.Linear(6, 2)
        self.decide = decide

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns two numbers per row."""
        y = self.first(x)
        z = self.second(y)
        out: torch.Tensor = self.last(y + z if self.decide(self, x) else z)
        return out

    @property
    def where(self) -> torch.device:
        """The device that a model makes its tensors on."""
        return self.first.weight.device


def _overwritten(model: Deciding, x: torch.Tensor) -> bool:
    table = torch.zeros(2, 3, device=model.where)
    table[:, 1] = x[:2, 0]
    return bool(table[:, 1].any())


DECISIONS: dict[str, Callable[[Deciding, torch.Tensor], object]] = {
    "an input": lambda _m, x: x.sum() > 0,
    "an input moved": lambda m, x: bool(x.to(m.where).to(torch.float64).gt(0).all()),
    "an input converted like a weight": lambda m, x: bool(x.to(m.first.weight).gt(0).all()) and bool(x.type_as(m.first.weight).gt(0).all()),
    "positions": lambda m, x: torch.arange(x.shape[0], device=m.where).max().item() + x[0, 0] >= x.shape[0],
    "a literal": lambda m, x: torch.tensor([x.shape[0], 0], device=m.where).tolist() == [3, 0] and bool(x.all()),
    "a literal like a weight": lambda m, x: m.first.weight.new_tensor([2.0, 3.0]).sum().item() == 5 and bool(x.all()),
    "filled like a weight": lambda m, x: bool((torch.ones_like(m.first.weight) + m.last.weight.new_zeros(())).all()) and bool(x.all()),
    "shape of a result": lambda m, x: torch.full((2,), 1.0, device=m.where).cumsum(0)[-1].item() == 2 and bool(x.all()),
    "looked up": lambda m, x: torch.arange(9, device=m.where)[x[0].long()].sum().item() == 4,
    "written by values": _overwritten,
}


@pytest.mark.parametrize("name", DECISIONS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_decisions_on_small_tensors_are_true(name: str, value: float) -> None:
    """What is computed from inputs and literals alone has values, so the branch that runs is the one that would run with weights."""
    decide = DECISIONS[name]
    model = Deciding(decide).eval()
    x = torch.full((3, 4), value)
    there, here = gp.trace(model, x), gp.trace(without_weights(lambda: Deciding(decide)), x)
    assert operators(here) == operators(there)
    assert operators(here) != operators(gp.trace(without_weights(lambda: Deciding(decide)), torch.full((3, 4), 1.0 - value)))
    assert here.fingerprint == there.fingerprint


UNDECIDABLE: dict[str, tuple[str, Decision]] = {
    "truth": ("aten::is_nonzero", lambda y: bool(y.sum() > 0)),
    "item": ("aten::item", lambda y: y[0, 0].item()),
    "list": ("Python code", lambda y: y.tolist()),
    "numpy": ("Python code", lambda y: y.cpu().numpy()),
    "count": ("aten::nonzero", lambda y: y.nonzero().shape[0]),
    "selection": ("aten::index", lambda y: y[y > 0].numel()),
    "comparison": ("aten::equal", lambda y: torch.equal(y, y)),
}


@pytest.mark.parametrize("name", UNDECIDABLE)
def test_a_number_that_is_not_there_is_named(name: str) -> None:
    """Reading what depends on weights names the operator, the module, the tensor and the remedy."""
    operator, decide = UNDECIDABLE[name]
    model = without_weights(lambda: nn.Sequential(Deciding(lambda m, x: decide(m.first(x)))))
    with pytest.raises(gp.errors.TraceError) as caught:
        gp.trace(model, torch.ones(3, 4))
    message = str(caught.value)
    assert message.startswith(f"{operator} in '0' needs the values of a tensor that")
    assert "inputs that have values" in message
    assert "'0.first.weight'" in message


@pytest.mark.parametrize(
    ("reader", "read"), [("aten::is_nonzero", lambda t: bool(t.any())), ("Python code", lambda t: any(t.flatten().tolist()))]
)
def test_a_tensor_overwritten_from_weights_is_not_believed(reader: str, read: Callable[[torch.Tensor], bool]) -> None:
    """A tensor made with values, partly overwritten through a view by a result without values, has none any more."""

    def decide(model: Deciding, x: torch.Tensor) -> bool:
        table = torch.zeros(3, 6, device=model.where)
        assert not read(table)
        table[:, 1:3] = model.first(x)[:, 1:3]
        return read(table)

    with pytest.raises(gp.errors.TraceError, match=f"{reader} in the model needs the values"):
        gp.trace(without_weights(lambda: Deciding(decide)), torch.ones(3, 4))


def test_shapes_of_overwritten_tensors_are_followed() -> None:
    """Operators in place on a tensor that has lost its values return that tensor, in the shape that they give it."""

    def decide(model: Deciding, x: torch.Tensor) -> bool:
        table = torch.zeros(3, 6, device=model.where)
        assert table.add_(model.first(x)) is table
        assert tuple(table.unsqueeze_(0).shape) == (1, 3, 6)
        assert tuple(table.transpose_(1, 2).shape) == (1, 6, 3)
        assert tuple(table.shape) == (1, 6, 3)
        return True

    graph = gp.trace(without_weights(lambda: Deciding(decide)), torch.ones(3, 4))
    assert graph.fingerprint == gp.trace(Deciding(decide).eval(), torch.ones(3, 4)).fingerprint


def test_large_tensors_stay_without_values() -> None:
    """What a model makes on the meta device gets values only up to a size."""
    made: list[bool] = []

    class Making(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for size in (LARGEST // 4, LARGEST // 4 + 1):
                wide = torch.zeros(size, device=self.weight.device)
                made.extend([wide.is_meta, torch.zeros_like(self.weight[:1].expand(size)).is_meta])
            return x * self.weight

    gp.trace(without_weights(Making), torch.ones(2))
    assert made == [False, False, True, True]


def test_wrong_shapes_are_still_the_inputs_fault() -> None:
    """Inputs of a shape that the model refuses are no matter of values."""
    with pytest.raises(gp.errors.InputError, match="cannot run on example inputs of shape"):
        gp.trace(without_weights(lambda: nn.Linear(4, 2)), torch.ones(3, 5))


def test_running_in_the_context_does_not_touch_models_with_weights() -> None:
    """For a model with weights the context does nothing; for one without, results are on the meta device."""
    x = torch.ones(2, 4)
    model = nn.Linear(4, 3)
    with torch.no_grad():
        expected = model(x)
        with shapes_suffice(model, [x]):
            assert torch.equal(model(x), expected)
        empty = copy.deepcopy(model).to("meta")
        with shapes_suffice(empty, [x]):
            out = call(empty, x)
    assert isinstance(out, torch.Tensor)
    assert out.is_meta
    assert out.shape == expected.shape


# -- what needs weights --------------------------------------------------------------------------------------------------------------


def small() -> nn.Module:
    """Returns two convolutions with a norm between them."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))


def halved(graph: gp.DependencyGraph) -> gp.Masks:
    """Returns masks that keep every other channel."""
    return gp.Masks(graph, {g.name: torch.arange(g.channels).numpy() % 2 == 0 for g in graph})


NEEDING: dict[str, Callable[[nn.Module, torch.Tensor, Path], object]] = {
    "prune": lambda m, x, _: gp.prune(m, x, sparsity=0.5),
    "pruner": lambda m, x, _: gp.L1NormPruner(m, [{"sparsity": 0.5, "op_types": ["Conv2d"]}], example_inputs=x).compress(),
    "masked": lambda m, x, _: halved(gp.trace(m, x)).masked(m),
    "speedup": lambda m, x, _: gp.speedup(m, halved(gp.trace(m, x)), example_inputs=x),
    "recalibrate": lambda m, x, _: gp.recalibrate(m, [x]),
    "export": lambda m, x, folder: gp.export_onnx(m, x, folder / "model.onnx"),
}


@pytest.mark.parametrize("name", NEEDING)
def test_what_needs_weights_says_so(name: str, tmp_path: Path) -> None:
    """One error names what needs which tensors, and how to give them values; the model stays as it was."""
    model, x = without_weights(small), torch.randn(2, 3, 9, 9)
    with pytest.raises(gp.errors.InputError) as caught:
        NEEDING[name](model, x, tmp_path)
    message = str(caught.value)
    assert "needs the values of '0.weight' and 8 more tensors of Sequential" in message
    assert "to_empty" in message
    assert all(tensor.is_meta for tensor in model.parameters())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("result", ["module", "graph"])
def test_masks_made_without_weights_fit_the_model_with_weights(result: Any) -> None:
    """A graph traced without weights prunes the same model with weights, verified."""
    torch.manual_seed(0)
    x, model = torch.randn(2, 3, 9, 9), small().eval()
    masks = halved(gp.trace(without_weights(small), x))
    shrunk, report = gp.speedup(model, masks, example_inputs=x, result=result)
    assert report.verified
    assert report.error < 1e-5
    assert sum(math.prod(p.shape) for p in shrunk.parameters()) < sum(math.prod(p.shape) for p in model.parameters())
