"""What is left after a removal computes what the masked model computes, says the truth about itself, and stays a model like any other."""

from __future__ import annotations

import copy
import gc
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils import prune as prune_utilities

import graphprune as gp
from graphprune.speedup import speedup as surgery
from graphprune.verify import reference as references
from tests.support.handmade import residual, shrink_by_hand
from tests.support.invariants import evaluate, masked_outputs, train_step
from tests.support.operators import Network, check_shapes, conv, filled, images, normal, sequences, table, vectors, words
from tests.support.outputs import relative_error
from tests.support.untouched import assert_same, changes, same_bits, snapshot

EXACT = 1e-9
HALF = [{"sparsity": 0.5, "op_types": ["default"]}]


# -- ten small networks --------------------------------------------------------------------------------------------------------------


def squeezed(net: Any, x: Tensor) -> Tensor:
    """Scales channels by what a bottleneck makes of their means."""
    hidden = functional.silu(net.first(x))
    scale = torch.sigmoid(net.up(torch.relu(net.down(hidden.mean((2, 3), keepdim=True)))))
    result: Tensor = net.last(hidden * scale)
    return result


def attended(net: Any, tokens: Tensor) -> Tensor:
    """Runs one pre-norm transformer block with four heads on embedded words, and a classifier on their mean."""
    x = net.words(tokens) + net.positions
    y = net.norm1(x)
    q, k, v = (layer(y).unflatten(-1, (-1, 3)).transpose(1, 2) for layer in (net.query, net.key, net.value))
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(3), dim=-1)
    x = x + net.out((weights @ v).transpose(1, 2).flatten(2))
    x = x + net.shrink(functional.gelu(net.grow(net.norm2(x))))
    result: Tensor = net.head(x.mean(1))
    return result


def two_inputs(net: Any, picture: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Adds a map and a vector, and returns two heads."""
    hidden = torch.relu(net.norm(net.picture(picture)) + net.vector(scale)[:, :, None, None])
    return net.one(hidden), {"two": net.two(hidden.mean((2, 3)))}


NETWORKS: dict[str, tuple[Callable[..., Any], dict[str, Any], Callable[[int], Any]]] = {
    "residual": (
        lambda n, x: n.head(torch.relu(n.norm(n.outer(torch.relu(n.inner(n.stem(x))))) + n.stem(x)).flatten(1)),
        {"stem": conv(3, 6), "inner": conv(6, 4), "outer": conv(4, 6), "norm": nn.BatchNorm2d(6), "head": nn.Linear(216, 3)},
        images,
    ),
    "concatenation": (
        lambda n, x: n.last(torch.cat([n.left(x), x, torch.tanh(n.right(x))], 1)),
        {"left": conv(3, 4), "right": conv(3, 6, 1), "last": conv(13, 2)},
        images,
    ),
    "squeeze and excitation": (squeezed, {"first": conv(3, 8), "down": conv(8, 4, 1), "up": conv(4, 8, 1), "last": conv(8, 2)}, images),
    "depthwise": (
        lambda n, x: n.point(functional.relu6(n.depth(functional.relu6(n.norm(n.grow(x)))))),
        {"grow": conv(3, 8, 1), "norm": nn.BatchNorm2d(8), "depth": conv(8, 8, groups=8), "point": conv(8, 2, 1)},
        images,
    ),
    "grouped": (
        lambda n, x: n.last(torch.relu(n.grouped(torch.relu(n.first(x))))),
        {"first": conv(3, 8), "grouped": conv(8, 12, groups=4), "last": conv(12, 2)},
        images,
    ),
    "transposed": (
        lambda n, x: n.last(n.slope(n.up(torch.relu(n.down(x))))),
        {"down": nn.Conv2d(3, 8, 2, stride=2), "up": nn.ConvTranspose2d(8, 6, 2, stride=2), "slope": nn.PReLU(6), "last": conv(6, 2)},
        images,
    ),
    "norms": (
        lambda n, x: n.head(n.rms(n.wide(n.layer(n.instance(n.group(n.first(x))).mean((2, 3)))))),
        {"first": conv(3, 8), "group": nn.GroupNorm(4, 8), "instance": nn.InstanceNorm2d(8, affine=True), "layer": nn.LayerNorm(8),
         "wide": nn.Linear(8, 10), "rms": nn.RMSNorm(10), "head": nn.Linear(10, 3)},
        images,
    ),
    "attention": (
        attended,
        {"words": nn.Embedding(11, 12), "positions": table(5, 12), "norm1": nn.LayerNorm(12), "norm2": nn.LayerNorm(12),
         **{name: nn.Linear(12, 12) for name in ("query", "key", "value", "out")},
         "grow": nn.Linear(12, 16), "shrink": nn.Linear(16, 12), "head": nn.Linear(12, 3)},
        words,
    ),
    "several inputs and outputs": (
        two_inputs,
        {"picture": conv(3, 8), "norm": nn.BatchNorm2d(8), "vector": nn.Linear(4, 8), "one": conv(8, 2), "two": nn.Linear(8, 3)},
        lambda batch: (images(batch), vectors(batch)),
    ),
    "a shared layer": (
        lambda n, x: n.head(n.shared(torch.relu(n.shared(torch.relu(n.first(x)))))),
        {"first": nn.Linear(4, 8), "shared": nn.Linear(8, 8), "head": nn.Linear(8, 3)},
        vectors,
    ),
    "one dimension": (
        lambda n, x: n.last(torch.relu(n.norm(n.first(x.transpose(1, 2))))),
        {"first": nn.Conv1d(4, 8, 3, padding=1), "norm": nn.BatchNorm1d(8), "last": nn.Conv1d(8, 2, 1)},
        sequences,
    ),
    "bilinear": (
        lambda n, x: n.head(torch.tanh(n.both(torch.tanh(n.left(x)), torch.tanh(n.right(x))))),
        {"left": nn.Linear(4, 6), "right": nn.Linear(4, 8), "both": nn.Bilinear(6, 8, 10), "head": nn.Linear(10, 3)},
        vectors,
    ),
}  # fmt: skip


def built(name: str) -> tuple[nn.Module, Any, Callable[[int], Any]]:
    """Returns a network with random weights and strong statistics, its inputs of batch 2, and how to make inputs."""
    run, parts, make_inputs = NETWORKS[name]
    return filled(Network(run, copy.deepcopy(parts))), make_inputs(2), make_inputs


def masks_for(model: nn.Module, inputs: Any, **options: Any) -> gp.Masks:
    """Returns masks that remove half of everything by L1."""
    return gp.L1NormPruner(model, HALF, inputs, **options).masks()


@pytest.mark.parametrize("result", ["module", "graph"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_shrunk_network_is_the_masked_network(name: str, result: Any) -> None:
    """Half of all channels go; class or graph, the result equals the network with zeroed slices, also on other inputs and batches."""
    model, inputs, make_inputs = built(name)
    masks = masks_for(model, inputs)
    before = snapshot(model)
    small, report = gp.speedup(model, masks, result=result)
    assert changes(before, snapshot(model)) == []
    assert report.kind == result
    assert report.verified
    assert report.error < EXACT
    assert report.effect > 1e-3
    check_shapes(small, masks.graph, masks)
    for others in (inputs, make_inputs(5)):
        expected = masked_outputs(model, masks.graph, masks, others)
        assert relative_error(expected, evaluate(small, others)) < EXACT
        assert relative_error(evaluate(model, others), evaluate(small, others)) > 1e-3
    train_step(small, make_inputs(3))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_default_result_is_the_users_own_class(name: str) -> None:
    """Without being asked, the result has the model's class and the names of its state, in their order."""
    model, inputs, _ = built(name)
    small, report = gp.prune(model, inputs)
    assert (report.kind, report.reason, type(small)) == ("module", "", type(model))
    assert list(small.state_dict()) == list(model.state_dict())
    assert [n for n, _ in small.named_modules()] == [n for n, _ in model.named_modules()]
    assert report.before is not None
    assert report.after is not None
    assert report.after.params == sum(p.numel() for p in small.parameters()) < report.before.params
    assert report.after.macs < report.before.macs


def test_a_network_shrunk_by_hand_is_the_same() -> None:
    """The result has, bit for bit, the tensors that a network built anew with the kept channels has."""
    model, inputs = residual()
    masks = masks_for(model, inputs)
    small, _ = gp.speedup(model, masks)
    stream, block = (np.flatnonzero(masks[name]).tolist() for name in ("stem", "inner"))
    expected = shrink_by_hand(model, stream, block)
    assert list(small.state_dict()) == list(expected.state_dict())
    assert all(same_bits(small.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    assert_same(evaluate(expected, inputs), evaluate(small, inputs), "the network built by hand differs")


# -- the truth about itself ----------------------------------------------------------------------------------------------------------

ATTRIBUTES: list[tuple[str, str, dict[str, Any]]] = [
    ("residual", "stem", {"in_channels": 3, "out_channels": 3, "groups": 1}),
    ("residual", "norm", {"num_features": 3}),
    ("residual", "head", {"in_features": 108, "out_features": 3}),
    ("concatenation", "last", {"in_channels": 2 + 3 + 3, "out_channels": 2}),
    ("depthwise", "depth", {"in_channels": 4, "out_channels": 4, "groups": 4}),
    ("grouped", "grouped", {"in_channels": 4, "out_channels": 6, "groups": 2}),
    ("transposed", "up", {"in_channels": 4, "out_channels": 3}),
    ("transposed", "slope", {"num_parameters": 3}),
    ("norms", "group", {"num_groups": 2, "num_channels": 4}),
    ("norms", "instance", {"num_features": 4}),
    ("norms", "layer", {"normalized_shape": (4,)}),
    ("norms", "rms", {"normalized_shape": (5,)}),
    ("attention", "words", {"num_embeddings": 11, "embedding_dim": 6}),
    ("attention", "query", {"in_features": 6, "out_features": 6}),
    ("one dimension", "first", {"in_channels": 4, "out_channels": 4}),
    ("one dimension", "norm", {"num_features": 4}),
    ("bilinear", "both", {"in1_features": 3, "in2_features": 4, "out_features": 5}),
]


@pytest.mark.parametrize(("name", "layer", "truth"), ATTRIBUTES)
def test_attributes_tell_the_truth(name: str, layer: str, truth: dict[str, Any]) -> None:
    """Every attribute that restates a size says what is left, with its old type."""
    model, inputs, _ = built(name)
    small, _ = gp.prune(model, inputs)
    found = {attribute: getattr(small.get_submodule(layer), attribute) for attribute in truth}
    assert found == truth
    assert {k: type(v) for k, v in found.items()} == {k: type(getattr(model.get_submodule(layer), k)) for k in truth}


def test_group_norm_positions_within_groups_keep_the_groups() -> None:
    """Removing positions within every norm group keeps their number."""
    model, inputs, _ = built("norms")
    small, report = gp.prune(model, inputs, cut="within")
    group: Any = small.get_submodule("group")
    assert (group.num_groups, group.num_channels, report.error < EXACT) == (4, 4, True)


def test_embedding_rows_and_vectors() -> None:
    """A table of embeddings whose vectors narrow still has all its words, and an EmbeddingBag says so as well."""
    model = filled(Network(lambda n, x: n.head(torch.tanh(n.bag(x))), {"bag": nn.EmbeddingBag(11, 8), "head": nn.Linear(8, 3)}))
    small, report = gp.prune(model, words(2))
    bag: Any = small.get_submodule("bag")
    if report.unknown:
        assert (bag.num_embeddings, bag.embedding_dim) == (11, 8)
    else:
        assert (bag.num_embeddings, bag.embedding_dim) == (11, 4)
        assert report.error < EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    """Half precision stays half precision in every tensor, verified with a tolerance that fits it."""
    model, inputs, _ = built("residual")
    small, report = gp.prune(model.to(dtype), inputs.to(dtype))
    assert {t.dtype for t in small.state_dict().values() if t.is_floating_point()} == {dtype}
    assert report.error <= report.tolerance < 0.2
    assert small(inputs.to(dtype)).dtype == dtype


def test_flags_and_attributes_of_parameters_are_kept() -> None:
    """`requires_grad`, Python attributes and the class of parameters survive; gradients of the old shape do not."""

    class Special(nn.Parameter):
        pass

    residual_model, inputs = residual()
    model: Any = residual_model
    model.inner.weight = Special(model.inner.weight.detach().clone())
    model.stem.weight.requires_grad_(False)
    model.outer.weight.no_decay = True
    model.head.bias.tag = "head"
    model(inputs).sum().backward()
    for result in ("module", "graph"):
        small, _ = gp.speedup(model, masks_for(model, inputs), result=result)
        wants = {name: parameter.requires_grad for name, parameter in small.named_parameters()}
        assert wants == {name: name != "stem.weight" for name, _ in model.named_parameters()}
        assert small.get_parameter("outer.weight").no_decay is True  # type: ignore[attr-defined]
        assert small.get_parameter("head.bias").tag == "head"  # type: ignore[attr-defined]
        assert isinstance(small.get_parameter("inner.weight"), Special)
        assert all(p.grad is None or p.grad.shape == p.shape for p in small.parameters())


def test_hooks_training_flags_and_attributes_of_modules_are_kept() -> None:
    """Module hooks run on the shrunk model, each module is in the mode that it was in, and other attributes are as they were."""
    model, inputs = residual()
    model.train()
    model.inner_norm.eval()
    model.stem.note = {"who": "user"}  # type: ignore[assignment]
    seen: list[tuple[int, ...]] = []
    model.inner.register_forward_hook(lambda _module, _arguments, output: seen.append(tuple(output.shape)))
    small, _ = gp.prune(model, inputs)
    assert {n: m.training for n, m in small.named_modules()} == {n: m.training for n, m in model.named_modules()}
    seen.clear()
    small(inputs)
    assert seen == [(2, 2, 4, 4)]
    assert small.get_submodule("stem").note == {"who": "user"}


def test_memory_is_not_shared() -> None:
    """Training the result in place does not touch the model, also where a tensor lost nothing."""
    model, inputs = residual()
    before = snapshot(model)
    for result in ("module", "graph"):
        small, _ = gp.speedup(model, masks_for(model, inputs), result=result)
        with torch.no_grad():
            for tensor in [*small.parameters(), *small.buffers()]:
                tensor.zero_()
    assert changes(before, snapshot(model)) == []


@pytest.mark.parametrize("result", ["module", "graph"])
def test_removing_nothing_changes_nothing(result: Any) -> None:
    """With masks that keep everything the result gives the same bits, and has the same state."""
    for model, inputs in (residual(), (built("attention")[:2])):
        masks = gp.Masks(gp.trace(model, inputs))
        small, report = gp.speedup(model, masks, result=result)
        assert (report.error, report.effect) == (0.0, 0.0)
        assert_same(evaluate(model, inputs), evaluate(small, inputs), "removing nothing changes the output")
        state = small.state_dict()
        assert all(same_bits(state[name], tensor) for name, tensor in model.state_dict().items() if name in state)


@pytest.mark.parametrize("result", ["auto", "module", "graph"])
def test_a_network_without_groups_stays_as_it_is(result: Any) -> None:
    """Where nothing can be removed, speedup returns an equal model instead of failing."""
    model, inputs = filled(nn.Sequential(nn.Linear(4, 3))), vectors(2)
    graph = gp.trace(model, inputs)
    assert graph.groups == ()
    small, report = gp.speedup(model, gp.Masks(graph), result=result)
    assert_same(evaluate(model, inputs), evaluate(small, inputs), "removing nothing changes the output")
    assert report.sparsity == 0


# -- in place ------------------------------------------------------------------------------------------------------------------------


def test_in_place_keeps_the_identity_of_parameters() -> None:
    """The given model itself shrinks: an optimizer that holds its parameters still holds them."""
    model, inputs = residual()
    expected, _ = gp.prune(model, inputs)
    tensors = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    model(inputs).sum().backward()
    small, report = gp.prune(model, inputs, inplace=True)
    assert small is model
    assert report.error < EXACT
    assert {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]} == tensors
    assert all(same_bits(model.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())
    assert (model.inner.in_channels, model.inner.out_channels, model.inner_norm.num_features) == (3, 2, 2)
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    train_step(model, inputs)


@pytest.mark.parametrize("broken", ["difference", "set_attributes", "layer_reports", "shrink_in_place"])
def test_in_place_restores_on_failure(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When any step fails, the model is as it was: tensors, gradients, attributes, bit for bit."""
    model, inputs = residual()
    masks = masks_for(model, inputs)
    model(inputs).sum().backward()
    before = snapshot(model)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    where: Any = references if broken == "difference" else surgery
    original, calls = getattr(where, broken), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        calls.append(result)
        if broken == "difference" and len(calls) < 2:
            return result
        raise RuntimeError("forced")

    monkeypatch.setattr(where, broken, failing)
    with pytest.raises((RuntimeError, gp.GraphPruneError)):
        gp.speedup(model, masks, inplace=True)
    assert changes(before, snapshot(model)) == []
    assert all(same_bits(model.get_parameter(name).grad, gradient) for name, gradient in gradients.items())


def test_in_place_restores_when_verification_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that departs from the masked model is undone before the error is raised."""
    model, inputs = residual()
    masks = masks_for(model, inputs)
    before = snapshot(model)
    original: Any = vars(references)["difference"]
    monkeypatch.setattr(references, "difference", lambda a, b: original(a, b) + 1)
    with pytest.raises(gp.VerificationError):
        gp.speedup(model, masks, inplace=True)
    assert changes(before, snapshot(model)) == []


def test_in_place_is_refused_where_only_a_graph_would_do() -> None:
    """A forward with sizes of its own cannot be kept: the error says so, and the model is as it was."""
    model = literal_model()
    before = snapshot(model)
    with pytest.raises(gp.VerificationError, match=r"cannot be shrunk in place.*Use inplace=False"):
        gp.prune(model, vectors(2), inplace=True)
    with pytest.raises(gp.VerificationError, match=r"own class cannot be kept.*Use result='auto'"):
        gp.speedup(model, masks_for(model, vectors(2)), result="module")
    assert changes(before, snapshot(model)) == []


# -- GraphModules --------------------------------------------------------------------------------------------------------------------


def literal_sizes(net: Any, x: Tensor) -> Tensor:
    """Writes its widths down as literals: a view into 8 x 4, and a split in two halves of 4."""
    wide = net.wide(x)
    hidden = net.drop(net.norm(wide.view(wide.shape[0], 8, 4)))
    left, right = torch.split(hidden, [4, 4], 1)
    result: Tensor = net.head(torch.relu(left * torch.sigmoid(right)).flatten(1))
    return result


def literal_model() -> nn.Module:
    """Returns a network whose forward states sizes as literals."""
    parts = {"wide": nn.Linear(4, 32), "norm": nn.BatchNorm1d(8), "drop": nn.Dropout(0.5), "head": nn.Linear(16, 3)}
    return filled(Network(literal_sizes, parts))


def test_literal_sizes_give_a_graph_and_a_reason() -> None:
    """A forward with sizes of its own becomes a GraphModule; the report says why and where, and the graph runs at any batch size."""
    model = literal_model()
    small, report = gp.prune(model, vectors(2))
    assert isinstance(small, fx.GraphModule)
    assert report.kind == "graph"
    assert "sizes of its own" in report.reason
    assert report.error < EXACT
    masks = masks_for(model, vectors(2))
    for batch in (1, 2, 7):
        expected = masked_outputs(model, masks.graph, masks, vectors(batch))
        assert relative_error(expected, evaluate(small, vectors(batch))) < EXACT


@pytest.mark.parametrize("cut", ["blocks", "within", "both"])
def test_a_split_alone(cut: Any) -> None:
    """Literal sections of a split shrink to what is left of each."""

    def run(net: Any, x: Tensor) -> Tensor:
        left, right = torch.split(net.a(x), [4, 4], 1)
        result: Tensor = net.b(torch.relu(left) * torch.sigmoid(right))
        return result

    small, report = gp.prune(filled(Network(run, {"a": conv(3, 8), "b": conv(4, 2)})), images(2), cut=cut)
    assert report.kind == "graph"
    assert report.error < EXACT
    assert small(images(3)).shape == (3, 2, 6, 6)


def test_a_graph_has_the_names_of_the_models_state() -> None:
    """State dict and parameters of a graph have the names of the model's, in their order, so that checkpoints fit."""
    model = literal_model()
    small, _ = gp.prune(model, vectors(2))
    assert list(small.state_dict()) == list(model.state_dict())
    assert [name for name, _ in small.named_parameters()] == [name for name, _ in model.named_parameters()]
    other, _ = gp.prune(filled(model, seed=4), vectors(2))
    other.load_state_dict(small.state_dict())
    assert_same(evaluate(small, vectors(3)), evaluate(other, vectors(3)), "the loaded state gives another output")


def test_a_graph_trains_as_the_model_does() -> None:
    """In train mode dropout draws and batch-norm statistics move; in eval mode neither happens; modes can be switched back and forth."""
    model = literal_model().train()
    small, _ = gp.prune(model, vectors(2))
    assert small.training
    mean = small.get_buffer("norm.running_mean")
    before = mean.clone()
    first, second = small(vectors(8)), small(vectors(8))
    assert not torch.equal(first, second)
    assert not torch.equal(mean, before)
    small.eval()
    moved = mean.clone()
    assert torch.equal(small(vectors(8)), small(vectors(8)))
    assert torch.equal(mean, moved)
    small.train()
    train_step(small, vectors(8))


def test_statistics_of_a_graph_move_as_the_models_own_would() -> None:
    """One training pass moves the running statistics as batch norm in a module would (mean of the batch, momentum 0.1)."""
    model = filled(Network(lambda n, x: n.head(n.norm(n.wide(x).view(x.shape[0], 8))),
                           {"wide": nn.Linear(4, 8), "norm": nn.BatchNorm1d(8), "head": nn.Linear(8, 2)})).train()  # fmt: skip
    small, report = gp.speedup(model, masks_for(model, vectors(2)), result="graph")
    assert report.error < EXACT
    batch = vectors(16)
    with torch.no_grad():
        hidden = functional.linear(batch, small.get_parameter("wide.weight"), small.get_parameter("wide.bias"))
        expected = 0.9 * small.get_buffer("norm.running_mean") + 0.1 * hidden.mean(0)
        small(batch)
    assert torch.allclose(small.get_buffer("norm.running_mean"), expected, rtol=1e-12, atol=0)


def test_a_graph_can_be_copied_and_pruned_again() -> None:
    """A deep copy gives the same output and follows its own mode; the graph can be traced and pruned like any module."""
    small, _ = gp.prune(literal_model(), vectors(2))
    twin = copy.deepcopy(small)
    assert_same(evaluate(small, vectors(3)), evaluate(twin, vectors(3)), "the copy differs")
    twin.train()
    assert not small.training
    assert not torch.equal(twin(vectors(8)), twin(vectors(8)))
    smaller, report = gp.prune(small, vectors(2), sparsity=0.5)
    assert report.error < EXACT
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in small.parameters())


def test_batches_that_cannot_vary_are_said_to_be_fixed() -> None:
    """Where the forward states the batch as a literal, the graph runs at that batch, and the report says that it runs at no other."""
    model = filled(Network(lambda n, x: n.head(torch.relu(n.wide(x).view(2, 8, 4)).flatten(1)),
                           {"wide": nn.Linear(4, 32), "head": nn.Linear(32, 3)}))  # fmt: skip
    small, report = gp.prune(model, vectors(2))
    assert report.kind == "graph"
    assert "only at batch 2" in report.reason
    assert small(vectors(2)).shape == (2, 3)


# -- what is asked and refused -------------------------------------------------------------------------------------------------------


def test_unverified_results_are_exact_all_the_same() -> None:
    """`verify=False` measures nothing, says so, and gives the same model."""
    for model, inputs in (residual(), (literal_model(), vectors(2))):
        expected, _ = gp.prune(model, inputs)
        small, report = gp.prune(model, inputs, verify=False)
        assert (report.verified, report.error, report.before, report.after) == (False, 0.0, None, None)
        assert "Not verified" in str(report)
        assert_same(evaluate(expected, inputs), evaluate(small, inputs), "the unverified model differs")


def test_a_masked_model_that_was_trained_on_is_shrunk_with_its_new_weights() -> None:
    """The usual way: compress, fine-tune the masked copy, then shrink that copy with the same masks and the same inputs."""
    model, inputs = residual()
    masks = gp.L1NormPruner(model, HALF, inputs).masks()
    masked = masks.masked(model)
    with torch.no_grad():
        for parameter in masked.parameters():
            parameter.mul_(1.5)
    small, report = gp.speedup(masked, masks, example_inputs=inputs)
    assert report.error < EXACT
    assert relative_error(masked_outputs(masked, masks.graph, masks, inputs), evaluate(small, inputs)) < EXACT


@pytest.mark.parametrize("result", ["module", "graph"])
def test_masks_fit_every_model_of_the_same_structure(result: Any) -> None:
    """Masks made for one model shrink another with the same shapes: the reference is the model that is given."""
    model, inputs = residual(0)
    other, _ = residual(1)
    masks = masks_for(model, inputs)
    small, report = gp.speedup(other, masks, result=result)
    assert report.error < EXACT
    assert relative_error(masked_outputs(other, masks.graph, masks, inputs), evaluate(small, inputs)) < EXACT


def test_parameters_replaced_after_tracing() -> None:
    """A parameter object that was replaced between making masks and shrinking is the one that counts."""
    model, inputs = residual()
    masks = masks_for(model, inputs)
    model.inner.weight = nn.Parameter(2 * model.inner.weight.detach())
    small, report = gp.speedup(model, masks)
    assert report.error < EXACT
    assert same_bits(small.get_parameter("inner.weight"), model.inner.weight[masks["inner"]][:, masks["stem"]].detach())


def test_other_example_inputs() -> None:
    """Inputs of another size are recorded anew; such as the model cannot take are one clear error, and the model is as it was."""
    model, inputs, _ = built("depthwise")
    masks = masks_for(model, inputs)
    small, report = gp.speedup(model, masks, normal(3, 3, 9, 9))
    assert report.error < EXACT
    assert small(inputs).shape == (2, 2, 6, 6)
    before = snapshot(model)
    with pytest.raises(gp.InputError, match=r"\(3, 5, 9, 9\)"):
        gp.speedup(model, masks, normal(3, 5, 9, 9))
    assert changes(before, snapshot(model)) == []


def test_masks_of_another_model_are_refused() -> None:
    """Masks made for other shapes are refused with the first parameter that differs."""
    model, inputs = residual()
    masks = masks_for(model, inputs)
    with pytest.raises(gp.MaskError, match=r"is missing in Network, but \(\d.*\) where the masks were made"):
        gp.speedup(built("grouped")[0], masks)
    small, _ = gp.speedup(model, masks)
    with pytest.raises(gp.MaskError, match="in Residual, but"):
        gp.speedup(small, masks)


def test_pruned_models_of_the_old_prune_utilities() -> None:
    """A module whose weight is an attribute computed by a hook (`torch.nn.utils.prune`) can be shrunk, or one clear error says why not."""
    first = conv(3, 8).double()
    prune_utilities.l1_unstructured(first, "weight", 0.3)
    model = nn.Sequential(first, nn.ReLU(), conv(8, 2).double())
    try:
        _, report = gp.prune(model, images(2))
    except gp.GraphPruneError:
        return
    assert report.error < EXACT


def test_scripted_models_are_shrunk_or_refused_without_blame() -> None:
    """A scripted module cannot change its shapes: the result is a graph, or an error that does not call it a defect of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is on its way out, and its users are still there
        model = torch.jit.script(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 2)).double())
    try:
        _, report = gp.prune(model, images(2))
    except gp.GraphPruneError as error:
        assert "defect in graphprune" not in str(error)  # noqa: PT017 (either of two outcomes will do)
        return
    assert report.kind == "graph"
    assert report.error < EXACT


def test_nothing_of_the_recording_stays_behind() -> None:
    """Once graph and report are dropped, neither the model nor the result holds on to the recording."""
    from graphprune.trace.program import Program  # noqa: PLC0415 (only this test looks behind the curtain)

    def alive() -> set[int]:
        gc.collect()
        return {id(thing) for thing in gc.get_objects() if type(thing) is Program}

    before = alive()
    model, inputs = residual()
    small, _ = gp.prune(model, inputs)
    assert alive() <= before
    assert small is not model


class _ScaledByWidth(nn.Module):
    """Scales by a number that follows from the width that it meets."""

    def __init__(self) -> None:
        """Makes the layers."""
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps (n, 4) to (n, 3)."""
        y = self.a(x)
        out: torch.Tensor = self.b(y * y.shape[1] ** -0.5)
        return out


@pytest.mark.parametrize("verify", [True, False])
def test_a_scale_that_follows_the_width_is_stated_with_and_without_verification(verify: bool) -> None:
    """The masked network has the old scale; a module that would compute a new one is not returned, compared or not."""
    torch.manual_seed(0)
    model, x = _ScaledByWidth().double().eval(), torch.randn(2, 4, dtype=torch.float64)
    small, report = gp.prune(model, x, 0.5, verify=verify)
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], example_inputs=x).masks()
    assert report.kind == "graph"
    assert torch.allclose(small(x), masks.masked(model)(x), rtol=1e-12)
