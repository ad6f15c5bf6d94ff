"""Recording follows whatever a forward pass does, and leaves nothing behind; what it finds can be asked for and is complete."""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graphprune as gp
from graphprune.trace.program import info
from tests.support.handmade import residual
from tests.support.invariants import coverage_faults, evaluate, permutation_error
from tests.support.networks import build
from tests.support.operators import Network, conv, described, filled, images, normal, sequences, table, vectors, words
from tests.support.outputs import flatten_outputs, relative_error
from tests.support.untouched import assert_same, changes, same_bits, snapshot

Uses = Callable[[nn.Module, Any], object]

USES: dict[str, Uses] = {
    "trace": gp.trace,
    "prune": gp.prune,
    "prune unverified": lambda model, inputs: gp.prune(model, inputs, verify=False),
    "compress": lambda model, inputs: gp.L1NormPruner(model, [{"sparsity": 0.5}], inputs).compress(),
    "graph": lambda model, inputs: gp.speedup(model, gp.L1NormPruner(model, [{"sparsity": 0.5}], inputs).masks(), result="graph"),
}


def two_convs(run: Callable[..., Any], **parts: nn.Module | Tensor) -> nn.Module:
    """Returns a network with convolutions `a` (3 to 8 channels) and `b` (8 to 2), and whatever else."""
    return filled(Network(run, {"a": conv(3, 8), "b": conv(8, 2), **parts}))


def assert_prunes(model: nn.Module, inputs: object, *groups: str, error: float = 1e-9) -> nn.Module:
    """Asserts that the groups are these (as `described` writes them), interchangeable, and that half of them goes exactly."""
    graph = gp.trace(model, inputs)
    assert described(graph) == sorted(groups)
    assert permutation_error(model, graph, inputs)[0] < error
    assert coverage_faults(model, graph) == []
    small, report = gp.prune(model, inputs, sparsity=0.5)
    assert report.verified
    assert report.error < error
    assert report.effect > 1e-3
    return small


# -- no side effect ------------------------------------------------------------------------------------------------------------------


class Messy(nn.Module):
    """Leaves traces wherever a forward pass can: statistics, counters, caches, random numbers; its modules are in different modes."""

    counter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.drop, self.b = conv(3, 8), nn.BatchNorm2d(8), nn.Dropout(0.5), conv(8, 2)
        self.register_buffer("counter", torch.zeros(1))
        self.cache: dict[str, Tensor] = {}
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Returns two channels."""
        self.calls += 1
        self.counter += 1
        self.extra = torch.ones(1, dtype=x.dtype)
        self.cache["scale"] = self.extra * 2
        noise = torch.rand(1, dtype=x.dtype) if self.norm.training else 0.0
        result: Tensor = self.b(self.drop(self.norm(self.a(x))) * self.cache["scale"] + noise * self.counter)
        return result


@pytest.mark.parametrize("use", USES)
def test_a_model_is_left_as_it_was(use: str) -> None:
    """State, flags of every module, gradients, hooks, attributes, caches and the random state are as before, bit for bit."""
    model, inputs = Messy().double(), images(2)
    model(inputs).sum().backward()
    model.norm.eval()
    model.a.weight.requires_grad_(False)
    del model.extra
    model.cache.clear()
    before, state = snapshot(model), OrderedDict((k, v.clone()) for k, v in model.state_dict().items())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    attributes, calls = set(vars(model)), model.calls
    USES[use](model, inputs)
    assert changes(before, snapshot(model)) == []
    assert [(m.training, type(m)) for m in (model, model.norm, model.drop)] == [
        (True, Messy), (False, nn.BatchNorm2d), (True, nn.Dropout)]  # fmt: skip
    assert all(same_bits(model.state_dict()[name], tensor) for name, tensor in state.items())
    assert all(same_bits(model.get_parameter(name).grad, gradient) for name, gradient in gradients.items())
    assert (set(vars(model)), model.cache, model.calls) == (attributes, {}, calls)


@pytest.mark.parametrize("use", USES)
def test_the_inputs_are_left_as_they_were(use: str) -> None:
    """A forward that writes into its input does not reach the user's tensor, whose attributes and gradient flag stay too."""
    model = two_convs(lambda net, x: net.b(torch.relu_(net.a(x.add_(1)))))
    inputs = images(2)
    inputs.tag = "mine"  # type: ignore[attr-defined]
    USES[use](model, inputs)
    assert torch.equal(inputs, images(2))
    assert vars(inputs) == {"tag": "mine"}
    assert not inputs.requires_grad


def test_inputs_that_want_gradients_are_left_alone() -> None:
    """Inputs with `requires_grad` keep it, receive no gradient, and can be used in a graph of their own afterwards."""
    model = two_convs(lambda net, x: net.b(net.a(x).relu()))
    inputs = images(2).requires_grad_()
    gp.prune(model, inputs)
    assert inputs.grad is None
    model(inputs).sum().backward()
    assert inputs.grad is not None


def test_a_table_cached_outside_the_model_stays_usable() -> None:
    """A tensor that a forward caches where no module can see it carries nothing of ours, and the model can be trained with it."""

    @functools.cache
    def scale(size: int) -> Tensor:
        return torch.arange(1.0, size + 1, dtype=torch.float64)

    model = two_convs(lambda net, x: net.b(net.a(x).relu() * scale(6)))
    small, _ = gp.prune(model, images(2))
    assert not vars(scale(6))
    for network in (model, small):
        network.train()
        network(images(2)).sum().backward()
        assert all(p.grad is not None for p in network.parameters())


def test_a_failing_forward_leaves_the_model_as_it_was() -> None:
    """After an error in forward nothing of the run remains."""

    class Failing(Messy):
        def forward(self, x: Tensor) -> Tensor:
            """Runs, and then fails."""
            super().forward(x)
            raise ValueError("boom")

    model = Failing().double()
    before, attributes = snapshot(model), set(vars(model))
    with pytest.raises(gp.InputError, match="ValueError: boom"):
        gp.trace(model, images(2))
    assert changes(before, snapshot(model)) == []
    assert set(vars(model)) == attributes


def test_a_model_in_train_mode_stays_in_train_mode() -> None:
    """The recording is of eval mode, whatever the mode; the model and what it becomes are in the mode that it was in."""
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.ReLU(), conv(8, 2)).double()
    fingerprints = set()
    for mode in (True, False):
        model.train(mode)
        fingerprints.add(gp.trace(model, images(2)).fingerprint)
        small, report = gp.prune(model, images(2))
        assert {m.training for m in (*model.modules(), *small.modules())} == {mode}
        assert report.error < 1e-9
    assert len(fingerprints) == 1


# -- inputs and outputs --------------------------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    """Adds what two convolutions make of its inputs, which come in any form."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = conv(3, 8), conv(3, 8), conv(8, 2)

    def forward(self, x: Any, y: Any = None, *, double: bool = False) -> Tensor:
        """Returns two channels."""
        if isinstance(x, dict):
            x, y = x["pair"] if "pair" in x else (x["x"], x["y"][0])
        hidden = torch.relu(self.left(x) + self.right(y))
        result: Tensor = self.out(hidden * 2 if double else hidden)
        return result


X, Y = images(2), images(2).flip(1)
FORMS: dict[str, Any] = {
    "tuple": (X, Y),
    "dict": {"x": X, "y": Y},
    "args and kwargs": ((X,), {"y": Y, "double": True}),
    "no args and kwargs": ((), {"x": X, "y": Y}),
    "a dict of lists": ({"x": X, "y": [Y]},),
    "a dict of tuples in args and kwargs": (({"pair": (X, Y), "name": "none"},), {"double": False}),
    "a literal": (X, Y),
}


@pytest.mark.parametrize("result", ["module", "graph"])
@pytest.mark.parametrize("form", FORMS)
def test_inputs_in_every_form(form: str, result: Any) -> None:
    """Every form of inputs gives the same groups, an exact result of either kind, and that result takes the same form."""
    model, inputs = filled(TwoInputs()), FORMS[form]
    graph = gp.trace(model, inputs)
    assert described(graph) == ["8 exact: left.bias/0 left.weight/0 out.weight/1 right.bias/0 right.weight/0"]
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5}], inputs).masks()
    small, report = gp.speedup(model, masks, inputs, result=result)
    assert report.error < 1e-9
    masked = evaluate(masks.masked(model), inputs)
    assert relative_error(masked, evaluate(small, inputs)) < 1e-9


class Named(NamedTuple):
    """Two outputs by name."""

    first: Tensor
    second: Any


@dataclasses.dataclass
class Record:
    """Two outputs of a dataclass."""

    first: Tensor
    second: Any


OUTPUTS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"first": a, "second": b},
    "ordered dict": lambda a, b: OrderedDict(first=a, second=b),
    "named tuple": Named,
    "dataclass": Record,
    "nested": lambda a, b: {"all": [a, (b, {"again": a})], "none": None, "number": 3},
    "named tuple in a dataclass": lambda a, b: Record(a, Named(b, [a])),
}


@pytest.mark.parametrize("result", ["module", "graph"])
@pytest.mark.parametrize("form", OUTPUTS)
def test_outputs_in_every_form(form: str, result: Any) -> None:
    """Whatever structure holds the outputs, both heads are frozen, and either kind of result returns the same structure."""

    def run(net: Any, x: Tensor) -> object:
        hidden = torch.relu(net.a(x))
        return OUTPUTS[form](net.b(hidden), net.c(hidden))

    model = two_convs(run, c=conv(8, 3))
    graph = gp.trace(model, X)
    assert described(graph) == ["8 exact: a.bias/0 a.weight/0 b.weight/1 c.weight/1"]
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5}], X, graph=graph).masks()
    small, report = gp.speedup(model, masks, result=result)
    assert report.error < 1e-9
    before, after = model(X), small(X)
    assert type(after) is type(before)
    assert [t.shape for t in flatten_outputs(after)] == [t.shape for t in flatten_outputs(before)]
    assert relative_error(flatten_outputs(masks.masked(model)(X)), flatten_outputs(after)) < 1e-9
    assert str(torch.utils._pytree.tree_map(type, after)) == str(torch.utils._pytree.tree_map(type, before))  # noqa: SLF001


# -- parameters wherever they are ----------------------------------------------------------------------------------------------------


def test_tied_parameters_are_one_tensor() -> None:
    """An embedding that is the output layer as well has one group for its width, and stays tied in the result."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.hidden, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.words.weight

        def forward(self, tokens: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.tanh(self.hidden(self.words(tokens))))
            return logits

    model = filled(Tied())
    small = assert_prunes(model, words(2), "8 exact: hidden.bias/0 hidden.weight/0 hidden.weight/1 words.weight/1")
    assert small.get_parameter("head.weight") is small.get_parameter("words.weight")
    assert list(small.state_dict()) == list(model.state_dict())
    assert gp.trace(model, words(2)).aliases == {"head.weight": "words.weight"}


def test_parameters_used_outside_modules() -> None:
    """A scale, a position table and a weight that the model itself owns follow the channels that they meet."""

    def run(net: Any, x: Tensor) -> Tensor:
        hidden = functional.linear(x, net.weight) * net.scale + net.positions
        logits: Tensor = net.head(torch.tanh(hidden))
        return logits

    parts: dict[str, nn.Module | Tensor] = {"weight": table(8, 4), "scale": table(8), "positions": table(5, 8), "head": nn.Linear(8, 3)}
    model = filled(Network(run, parts))
    small = assert_prunes(model, sequences(2), "8 exact: head.weight/1 positions/1 scale/0 weight/0")
    assert [tuple(small.get_parameter(n).shape) for n in ("weight", "scale", "positions")] == [(4, 4), (4,), (5, 4)]


class Parent(nn.Module):
    """Owns a weight that only its child uses."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = table(8, 4)
        self.child = Child(self)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Returns three logits."""
        logits: Tensor = self.head(torch.tanh(self.child(x)))
        return logits


class Child(nn.Module):
    """Uses a weight of its parent, which it finds through the list that the copy of the parent brings along."""

    def __init__(self, parent: Parent) -> None:
        super().__init__()
        self.found = [parent]

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies by the parent's weight."""
        return functional.linear(x, self.found[0].weight)


def test_a_parents_parameter_used_by_a_child() -> None:
    """The weight keeps its own qualified name, and the operator the path of the module that ran it."""
    model = filled(Parent())
    small = assert_prunes(model, vectors(2), "8 exact: head.weight/1 weight/0")
    assert small.get_parameter("weight").shape == (4, 4)
    assert "(aten::linear in child)" in gp.trace(model, vectors(2)).explain("weight")


def test_a_weight_of_the_model_itself_can_be_left_out_of_a_config() -> None:
    """The note of a group that the model's own weight keeps whole names something that the reader can find."""
    _, report = gp.prune(filled(Parent()), vectors(2), config_list=[{"sparsity": 0.5, "op_types": ["Linear"]}])
    (group,) = report.groups
    assert group.kept == 8
    assert group.note.split()[0] in {"weight", "Parent", "'weight'", "the"}, group.note


@pytest.mark.parametrize("way", ["data", "detach", "transposed data"])
def test_parameters_taken_by_their_data(way: str) -> None:
    """Reading `weight.data` or a detached weight is reading the parameter."""
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "data": lambda w: w.data,
        "detach": lambda w: w.detach(),
        "transposed data": lambda w: w.data.t().contiguous().t(),
    }
    model = filled(Network(lambda net, x: net.head(torch.tanh(functional.linear(x, ways[way](net.weight)))),
                           {"weight": table(8, 4), "head": nn.Linear(8, 3)}))  # fmt: skip
    assert_prunes(model, vectors(2), "8 exact: head.weight/1 weight/0")


def test_layers_that_scale_their_weight_before_they_use_it() -> None:
    """A layer whose weight is computed from its parameter (scaled, standardised) still produces its channels, and is pruned."""

    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return functional.conv2d(x, self.weight * 0.7, self.bias, padding=1)

    model = filled(nn.Sequential(Scaled(3, 8, 3), nn.ReLU(), Scaled(8, 2, 3)))
    small = assert_prunes(model, X, "8 exact: 0.bias/0 0.weight/0 2.weight/1")
    assert small.get_submodule("0").out_channels == 4


def test_a_view_of_a_weight_made_beforehand_is_refused() -> None:
    """A view that was stored before forward cannot be followed: the error says which weight, who reads it, and what to do."""
    model = filled(Network(lambda net, x: net.head(x @ net.plain["view"]), {"weight": table(8, 4), "head": nn.Linear(8, 3)}))
    model.plain = {"view": model.get_parameter("weight").data.t()}  # type: ignore[assignment]
    with pytest.raises(gp.TraceError, match=r"^\S.* reads a view of 'weight' made outside the forward pass") as caught:
        gp.trace(model, vectors(2))
    assert not str(caught.value).startswith("''"), "the reader is named by an empty string"


def test_parameters_that_take_no_part_are_frozen_with_that_reason() -> None:
    """A layer that forward never calls is frozen as a whole, kept as it is, and explained."""
    model = two_convs(lambda net, x: net.b(net.a(x).relu()), unused=conv(8, 8))
    graph = gp.trace(model, X)
    assert {(f.dim, f.index.size) for f in graph.frozen if f.parameter == "unused.weight"} == {(0, 8), (1, 8), (2, 3), (3, 3)}
    assert "takes no part in the forward pass" in graph.explain("unused")
    small, _ = gp.prune(model, X)
    assert same_bits(small.get_parameter("unused.weight"), model.get_parameter("unused.weight"))


def test_a_parametrised_weight_is_frozen_or_followed() -> None:
    """Weight normalisation computes the weight from two parameters: the layer is pruned exactly, or its channels count as frozen."""
    model = filled(nn.Sequential(nn.utils.parametrizations.weight_norm(conv(3, 8)), nn.ReLU(), conv(8, 2)))
    graph = gp.trace(model, X)
    _, report = gp.prune(model, X)
    assert report.error < 1e-9
    assert bool(graph.groups) == (not graph.unknown)
    assert all(item.channels == 8 for item in graph.unknown), "the report says that the operator without a rule costs nothing"


# -- control flow, aliases and calls -------------------------------------------------------------------------------------------------


def in_place(net: Any, x: Tensor) -> Tensor:
    """Uses every kind of in-place operator between two convolutions."""
    hidden = net.a(x)
    hidden.relu_()
    hidden += net.c(x)
    hidden[:, :4].mul_(2)
    torch.sigmoid_(hidden)
    logits: Tensor = net.b(hidden)
    return logits


def test_in_place_operators() -> None:
    """In-place operators couple as their out-of-place forms do."""
    model = two_convs(in_place, c=conv(3, 8))
    graph = gp.trace(model, X)
    assert {layer for group in graph.groups for layer in group.layers} == {"a", "c"}
    assert all(set(group.layers) == {"a", "c"} for group in graph.groups)
    _, report = gp.prune(model, X)
    assert report.error < 1e-9
    assert report.effect > 1e-3


def test_a_module_called_twice() -> None:
    """A convolution applied to its own output has one group for its inputs and its outputs."""
    model = two_convs(lambda net, x: net.b(net.c(net.c(net.a(x)).relu())), c=conv(8, 8))
    assert_prunes(model, X, "8 exact: a.bias/0 a.weight/0 b.weight/1 c.bias/0 c.weight/0 c.weight/1")


def test_a_module_under_two_names() -> None:
    """One layer registered under two names is one layer, under its first name."""
    shared = conv(8, 8)
    model = filled(nn.Sequential(conv(3, 8), shared, nn.ReLU(), shared, conv(8, 2)))
    small = assert_prunes(model, X, "8 exact: 0.bias/0 0.weight/0 1.bias/0 1.weight/0 1.weight/1 4.weight/1")
    assert small.get_submodule("1") is small.get_submodule("3")


def test_control_flow_on_values() -> None:
    """Loops and branches on the values of tensors are followed as they ran."""

    def run(net: Any, x: Tensor) -> Tensor:
        hidden = net.a(x)
        for _ in range(2):
            if x.abs().max() > 0:
                hidden = net.c(hidden) + hidden
        logits: Tensor = net.b(hidden)
        return logits

    model = two_convs(run, c=conv(8, 8))
    assert_prunes(model, X, "8 exact: a.bias/0 a.weight/0 b.weight/1 c.bias/0 c.weight/0 c.weight/1")


def test_operators_keep_their_place_after_a_caught_error() -> None:
    """Where forward tries a module, catches its error and goes on, what follows is not attributed to the failed module."""

    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError(f"cannot take {x.ndim} dimensions")

    def run(net: Any, x: Tensor) -> Tensor:
        try:
            hidden = net.failing(x)
        except RuntimeError:
            hidden = net.a(x)
        logits: Tensor = net.b(hidden.relu())
        return logits

    graph = gp.trace(two_convs(run, failing=Failing()), X)
    places = [info(node).module for node in graph.engine.program.graph.nodes if node.op == "call_function"]
    assert places == ["a", "", "b"]


# -- what cannot be traced -----------------------------------------------------------------------------------------------------------


class Raising(nn.Module):
    """Raises in forward."""

    def forward(self, x: Tensor) -> Tensor:
        """Raises an error of two lines."""
        raise ValueError(f"cannot take {x.ndim} dimensions\nat all")


@pytest.mark.parametrize(
    ("model", "inputs", "words_of_error"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.ReLU(), Raising())), vectors(2).float(),
         r"^Sequential cannot run on .*\(2, 4\): ValueError in '1\.1': cannot take 2 dimensions.*\. Pass inputs"),
        (nn.Sequential(conv(3, 8), conv(8, 2)), torch.zeros(2, 5, 6, 6), r"\(2, 5, 6, 6\): RuntimeError in '0': .*to have 3 channels"),
        (nn.Sequential(conv(3, 8), conv(8, 2)), None, "no example inputs to"),
        (nn.Sequential(conv(3, 8), conv(8, 2)), [torch.zeros(2, 3, 6, 6)], "are a list.*Pass a tuple"),
        (nn.Sequential(conv(3, 8), conv(8, 2)), {"pixels": torch.zeros(2, 3, 6, 6)}, "unexpected keyword argument 'pixels'"),
        (nn.Sequential(conv(3, 8), conv(8, 2)), (torch.zeros(2, 3, 6, 6),) * 2, "2 positional arguments but 3 were given"),
        (nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2)), vectors(2).float(), r"has no shape yet\. Run the model once"),
        (nn.Sequential(nn.LazyBatchNorm2d(), conv(3, 2)), torch.zeros(2, 3, 6, 6), "has no shape yet"),
        (torch.relu, vectors(2), "a torch.nn.Module is needed"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("use", ["trace", "prune"])
def test_models_and_inputs_that_do_not_fit_are_one_clear_error(use: str, model: Any, inputs: Any, words_of_error: str) -> None:
    """A forward that raises, wrong or missing inputs and lazy modules each raise one InputError that says where and what to do."""
    with pytest.raises(gp.InputError, match=words_of_error):
        USES[use](model, inputs)


@torch.library.custom_op("graphprune_tests::odd", mutates_args=())
def odd(x: Tensor) -> Tensor:
    """Weighs every channel by all the others, which nobody can take apart."""
    return x.softmax(1)


class Odd(nn.Module):
    """Runs an operator that has no rule."""

    def forward(self, x: Tensor) -> Tensor:
        """Runs it."""
        result: Tensor = odd(x)
        return result


# -- what is found -------------------------------------------------------------------------------------------------------------------


def test_explain_a_layer_in_groups() -> None:
    """The explanation of a layer lists its groups, who shares them, and what is frozen, with the operator and its place."""
    model, inputs = residual()
    text = gp.trace(model, inputs).explain("outer")
    assert text.splitlines()[0] == "outer (Conv2d)"
    assert "group 'stem': 6 channels, exact\n    together with stem.weight dim 0 (produces)" in text
    assert "group 'inner': 4 channels, exact" in text
    assert "head.weight dim 1" in text
    assert "frozen: outer.weight dim 2, 3 of 3: is a kernel position" in text


def test_explain_a_frozen_layer_says_why_and_what_to_do() -> None:
    """A layer whose outputs leave the model is frozen for that reason, with a remedy; a parameter can be asked for as well."""
    model, inputs = residual()
    graph = gp.trace(model, inputs)
    assert "frozen: head.weight dim 0, 5 of 5: reaches an output of the model" in graph.explain("head")
    assert "remedy: Prune the layers before it" in graph.explain("head")
    assert graph.explain("head.bias").splitlines()[0] == "head.bias (parameter)"


def test_explain_names_the_statistic_of_a_changed_group() -> None:
    """Where a norm takes its statistics across the channels, the explanation says which one, and where."""
    model = filled(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)))
    graph = gp.trace(model, vectors(2))
    assert graph.groups[0].verdict == "changed"
    assert "statistic taken across the channels by layer_norm in 1" in graph.explain("0")


def test_unknown_names_are_answered_with_the_nearest() -> None:
    """A misspelt layer or group raises one error that suggests the right name."""
    graph = gp.trace(*residual())
    with pytest.raises(gp.ConfigError, match=r"no layer called 'outre'.*did you mean 'outer'"):
        graph.explain("outre")
    with pytest.raises(gp.ConfigError, match=r"no group is called 'stm'.*did you mean 'stem'"):
        graph["stm"]


def test_an_operator_without_a_rule_freezes_and_is_named() -> None:
    """What enters an operator without a rule is frozen, and the graph names the operator, its module and the channels it costs."""
    model = two_convs(lambda net, x: net.b(net.a(x).relu()) + net.d(net.odd(net.c(x))), c=conv(3, 5), d=conv(5, 2), odd=Odd())
    graph = gp.trace(model, X)
    assert [(u.operator, u.module, u.channels) for u in graph.unknown] == [("graphprune_tests::odd", "odd", 5)]
    assert {layer for group in graph.groups for layer in group.layers} == {"a"}
    assert "enters graphprune_tests::odd, which has no rule and, as running it shows," in graph.explain("c")
    assert "No rule for graphprune_tests::odd in odd: 5 channels frozen" in str(gp.prune(model, X)[1])


def test_the_layer_graph_of_networkx() -> None:
    """Nodes are the layers with their type and groups, edges say who reads what whom produces, through which operator."""
    graph = gp.trace(*residual()).to_networkx()
    assert isinstance(graph, nx.DiGraph)
    assert graph.nodes["outer"] == {"type": "Conv2d", "groups": ["stem", "inner"]}
    assert graph.nodes["head"] == {"type": "Linear", "groups": ["stem"]}
    assert set(graph.edges) == {
        ("stem", "stem_norm"), ("stem_norm", "inner"), ("inner", "inner_norm"), ("inner_norm", "outer"), ("outer", "outer_norm"),
        ("outer_norm", "head"), ("stem_norm", "head")}  # fmt: skip
    assert graph.edges["stem_norm", "inner"] == {"operator": "aten::conv2d"}
    assert next(iter(nx.topological_sort(graph))) == "stem"


def test_reachable_is_the_share_of_elements_in_some_slice() -> None:
    """Of the 1117 parameter elements, all lie in a slice of some group but the five biases of the last layer."""
    model, inputs = residual()
    total = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() for b in model.buffers() if b.is_floating_point())
    assert gp.trace(model, inputs).reachable() == pytest.approx(1 - 5 / (total + buffers))
    assert gp.trace(nn.Linear(4, 3), vectors(2).float()).reachable() == 0


def test_the_fingerprint_tells_models_apart() -> None:
    """Equal structures have equal fingerprints whatever the weights; another width or another coupling has another."""
    plain = two_convs(lambda net, x: net.b(net.a(x).relu()))
    other = filled(Network(lambda net, x: net.b(net.a(x).relu()), {"a": conv(3, 9), "b": conv(9, 2)}))
    coupled = two_convs(lambda net, x: net.b(net.c(net.a(x)) + net.a(x)), c=conv(8, 8))
    apart = two_convs(lambda net, x: net.b(net.c(net.a(x))), c=conv(8, 8))
    prints = [gp.trace(model, X).fingerprint for model in (plain, other, coupled, apart)]
    assert len(set(prints)) == 4
    assert gp.trace(filled(plain, seed=9), X).fingerprint == prints[0]


COVERED = ["mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "densenet121", "mnasnet0_5", "convnext_tiny"]


@pytest.mark.parametrize("name", COVERED)
def test_every_position_is_in_a_group_or_frozen_with_a_reason(name: str) -> None:
    """Every position of every parameter dimension of whole networks is in some group, or frozen with a reason, and never both."""
    with torch.device("meta"):
        model, inputs = build(f"torchvision:{name}", size=64)[0], torch.zeros(1, 3, 64, 64)
    graph = gp.trace(model, inputs)
    assert coverage_faults(model, graph) == []
    assert graph.reachable() > 0.9
    assert all(item.reason for item in graph.frozen)
    assert graph.unknown == ()


def test_indices_of_slices_are_well_formed() -> None:
    """Slices hold int64 positions of shape (channels, rows), within bounds, and each position belongs to one channel of the group."""
    model = filled(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5)))
    graph = gp.trace(model, X)
    (group,) = graph.groups
    assert (group.name, group.layers, group.verdict, group.role) == ("0", ("0",), "exact", "")
    assert graph["0"] is group
    assert list(graph) == [group]
    for piece in group.slices:
        assert piece.index.dtype == np.int64
        assert piece.index.shape[0] == group.channels
        assert len(np.unique(piece.index)) == piece.index.size
        assert piece.index.max() < graph.shapes[piece.parameter][piece.dim]
    flat = next(piece for piece in group.slices if piece.parameter == "3.weight")
    assert np.array_equal(flat.index, np.arange(8 * 36).reshape(8, 36))


def test_values_do_not_matter() -> None:
    """Two recordings of one model with other weights and other inputs of the same shape find the same groups."""
    model = two_convs(lambda net, x: net.b(net.a(x).relu()))
    first = gp.trace(model, X)
    second = gp.trace(filled(model, seed=5), normal(7, 3, 9, 9))
    assert first.fingerprint == second.fingerprint
    assert_same(evaluate(model, X), evaluate(model, X), "evaluation is deterministic")
