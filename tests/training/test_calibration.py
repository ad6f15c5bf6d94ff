"""BatchNorm statistics become the average over the batches, in modules and in graphs, and nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from graphprune.errors import InputError
from graphprune.training.calibration import recalibrate
from tests.support.untouched import changes, snapshot

STATISTICS = ("running_mean", "running_var")


def average_statistics(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the mean of the batches' means and of their unbiased variances, per channel (dimension 1)."""
    flat = [batch.transpose(0, 1).flatten(1) for batch in batches]
    return torch.stack([x.mean(1) for x in flat]).mean(0), torch.stack([x.var(1, correction=1) for x in flat]).mean(0)


class Net(nn.Module):
    """Two convolutions with BatchNorm, dropout between them, and an auxiliary BatchNorm that is reached only on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.bn1 = nn.BatchNorm2d(8, momentum=0.3)
        self.drop = nn.Dropout(0.5)
        self.conv2 = nn.Conv2d(8, 4, 3)
        self.bn2 = nn.BatchNorm2d(4, affine=False)
        self.spare = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, spare: bool = False) -> Tensor:
        """Returns the features; with `spare`, normalised once more."""
        x = self.conv2(self.drop(F.relu(self.bn1(self.conv1(x)))))
        y: Tensor = self.spare(self.bn2(x).mean((2, 3))) if spare else self.bn2(x)
        return y


def make_batches(count: int = 3, channels: int = 3) -> list[Tensor]:
    """Returns batches of different sizes and spreads, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2 + index, channels, 6, 6, generator=generator, dtype=torch.float64) * (index + 1) + index for index in range(count)
    ]


def make_net() -> Net:
    """Returns a network in double precision whose statistics describe nothing."""
    torch.manual_seed(1)
    net = Net().double()
    for name, buffer in net.named_buffers():
        if name.endswith(STATISTICS):
            buffer.uniform_(0.5, 1.5)
    return net


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Returns copies of all running means and variances."""
    return {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(STATISTICS)}


def trained_statistics(net: Net, batches: list[Tensor]) -> dict[str, Tensor]:
    """Returns the statistics that PyTorch's own cumulative average arrives at, with only the BatchNorms in train mode."""
    net = copy.deepcopy(net).eval()
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.momentum = None
            module.train()
    with torch.no_grad():
        for batch in batches:
            net(batch)
    return statistics(net)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(2, 5), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 10**6))
def test_statistics_are_the_average_over_the_batches(sizes: list[int], dims: int, seed: int) -> None:
    """Mean and variance are the plain averages of the batches' means and unbiased variances, for 0 to 3 spatial dimensions."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(size, 3, *(2,) * dims) for size in sizes]
    batches = [torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 7 for shape in shapes]
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims](3).double()
    assert recalibrate(norm, batches) is norm
    mean, var = average_statistics(batches)
    torch.testing.assert_close((norm.running_mean, norm.running_var), (mean, var), rtol=1e-12, atol=1e-12)


def test_a_network_gets_the_statistics_of_train_mode() -> None:
    """Later layers see earlier ones normalised by the batch, and dropout stays off: the same as PyTorch's cumulative average."""
    net, batches = make_net(), make_batches()
    expected = trained_statistics(net, batches)
    before = statistics(net)
    recalibrate(net, iter(batches))
    after = statistics(net)
    for name in after:
        if name.startswith("spare"):
            assert torch.equal(after[name], before[name]), "a layer that was not reached keeps its statistics"
        else:
            torch.testing.assert_close(after[name], expected[name], rtol=1e-12, atol=1e-12)
            assert not torch.allclose(after[name], before[name], rtol=0.05)


def test_nothing_but_the_statistics_changes() -> None:
    """Flags, momentum, counters, parameters, gradients, random numbers and the batches themselves are as before."""
    net, batches = make_net(), make_batches()
    net(batches[0]).sum().backward()
    net.bn1.eval()
    net.conv1.weight.requires_grad_(False)
    copies = [batch.clone() for batch in batches]
    before = snapshot(net)
    recalibrate(net, batches)
    names = {f"{layer}.{statistic}" for layer in ("bn1", "bn2") for statistic in STATISTICS}
    assert set(changes(before, snapshot(net))) == {f"/tensors/{name}" for name in names}
    assert all(torch.equal(batch, saved) for batch, saved in zip(batches, copies, strict=True))
    assert not net.bn1.training
    assert net.drop.training


def test_batches_are_copied_before_they_are_overwritten() -> None:
    """A model that works in place on its input does so on a copy."""
    batch = -torch.ones(2, 3, 2, 2)
    recalibrate(nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(3)), [batch])
    assert batch.max() < 0


def test_the_same_batches_give_the_same_statistics_again() -> None:
    """Re-estimation depends on weights and batches, not on what the statistics were."""
    net, batches = make_net(), make_batches()
    first = statistics(recalibrate(net, batches))
    second = statistics(recalibrate(net, batches))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "batch",
    [
        (make_batches(1)[0], True),
        {"x": make_batches(1)[0], "spare": True},
        ((make_batches(1)[0],), {"spare": True}),
    ],
)
def test_batches_come_in_every_form_of_example_inputs(batch: Any) -> None:
    """Tuples, dicts and (args, kwargs) reach the model as they are meant."""
    net = make_net()
    before = net.spare.running_mean
    assert before is not None
    old = before.clone()
    recalibrate(net, [batch])
    assert not torch.equal(before, old)


def test_a_shared_layer_averages_over_all_its_calls() -> None:
    """A BatchNorm that is called twice per batch gives each call the same weight."""
    norm, (x, y) = nn.BatchNorm2d(3).double(), make_batches(2)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
            return self.norm(one), self.norm(two)

    recalibrate(Twice(), [(x, y), (y, y)])
    torch.testing.assert_close((norm.running_mean, norm.running_var), average_statistics([x, y, y, y]), rtol=1e-12, atol=1e-12)


def test_the_counter_follows_where_it_is_a_weight() -> None:
    """With momentum None the number of batches weighs the average in further training, so it is the number averaged here."""
    norm, batches = nn.BatchNorm2d(3, momentum=None).double(), make_batches(4)
    norm(batches[0] * 50)
    recalibrate(norm, batches[:3])
    norm(batches[3])
    torch.testing.assert_close((norm.running_mean, norm.running_var), average_statistics(batches), rtol=1e-12, atol=1e-12)


def test_layers_without_statistics_and_models_without_layers_are_left_alone() -> None:
    """BatchNorm that tracks nothing, other norms and models without any norm pass through unchanged."""
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3, track_running_stats=True), nn.ReLU()).double()
    before = snapshot(model)
    recalibrate(model, make_batches())
    assert not changes(before, snapshot(model))


def test_half_precision_is_averaged_in_single_precision() -> None:
    """Many batches in bfloat16 are averaged without losing the late ones to rounding."""
    norm = nn.BatchNorm1d(1).bfloat16()
    ones = torch.tensor([[1.0], [1.0]], dtype=torch.bfloat16)
    recalibrate(norm, [ones] * 300 + [ones * 3] * 300)
    assert norm.running_mean is not None
    assert norm.running_mean.tolist() == [2.0]


def test_synchronised_layers_work_without_a_process_group() -> None:
    """SyncBatchNorm averages its own batches on any device, though it refuses to train on the CPU."""
    norm, batches = nn.SyncBatchNorm(3).double(), make_batches()
    recalibrate(norm, batches)
    torch.testing.assert_close((norm.running_mean, norm.running_var), average_statistics(batches), rtol=1e-12, atol=1e-12)


def as_graph(net: Net) -> fx.GraphModule:
    """Returns the network as a graph of ATen calls on its parameters and buffers, reading `training` and a literal momentum."""
    graph, tensors = fx.Graph(), dict([*net.named_parameters(), *net.named_buffers()])
    x = graph.placeholder("x")

    def attribute(name: str) -> fx.Node:
        return graph.create_node("get_attr", name)

    def norm(value: fx.Node, name: str) -> fx.Node:
        affine = [attribute(f"{name}.{part}") if f"{name}.{part}" in tensors else None for part in ("weight", "bias")]
        running = [attribute(f"{name}.{part}") for part in STATISTICS]
        settings = (attribute("training"), 0.1, 1e-5, True)
        return graph.call_function(torch.ops.aten.batch_norm.default, (value, *affine, *running, *settings))

    def conv(value: fx.Node, name: str) -> fx.Node:
        return graph.call_function(torch.ops.aten.conv2d.default, (value, attribute(f"{name}.weight"), attribute(f"{name}.bias")))

    value = graph.call_function(torch.ops.aten.relu.default, (norm(conv(x, "conv1"), "bn1"),))
    value = graph.call_function(torch.ops.aten.dropout.default, (value, 0.5, attribute("training")))
    graph.output(norm(conv(value, "conv2"), "bn2"))
    return fx.GraphModule({**tensors, "training": True}, graph).train()


def test_a_graph_gets_the_statistics_of_the_module() -> None:
    """A GraphModule without BatchNorm modules ends with the same statistics, bit for bit, and keeps flags and everything else."""
    net, batches = make_net(), make_batches()
    graph = as_graph(copy.deepcopy(net))
    assert not any(isinstance(module, _BatchNorm) for module in graph.modules())
    before = snapshot(graph)
    recalibrate(graph, [{"x": batch} for batch in batches])
    after = snapshot(graph)
    expected = statistics(recalibrate(net, batches))
    names = [name for name in statistics(graph) if not name.startswith("spare")]
    assert set(changes(before, after)) == {f"/tensors/{name}" for name in names}
    assert len(names) == 4
    assert all(torch.equal(after["tensors"][name], expected[name]) for name in names)
    assert graph.training


def test_an_exported_program_inside_a_module_is_recalibrated() -> None:
    """A graph made by torch.export, wrapped in a module of the user's, is reached like any other."""
    net, batches = make_net().eval(), make_batches(1)
    wrapped = nn.Sequential(nn.Identity(), torch.export.export(net, (batches[0],)).module())
    recalibrate(wrapped, batches)
    expected = statistics(recalibrate(net, batches))
    for name, value in statistics(wrapped).items():
        torch.testing.assert_close(value, expected[name.removeprefix("1.")], rtol=1e-12, atol=1e-12)


def failing_stream() -> Iterator[Tensor]:
    """Yields a good batch and then fails, as a loader may."""
    yield make_batches(1)[0]
    message = "disk on fire"
    raise OSError(message)


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        ([], InputError, "there are no batches"),
        (iter(()), InputError, "there are no batches"),
        (make_batches(1)[0], InputError, r"batches is a single Tensor.*\[batch\]"),
        ({"x": make_batches(1)[0]}, InputError, "batches is a single dict"),
        ([*make_batches(2), torch.zeros(2, 5, 6, 6)], InputError, r"batch 3 cannot be used: Net cannot be run on \(\[2, 5, 6, 6\]"),
        ([make_batches(1)[0], None], InputError, "batch 2 cannot be used: there are no example inputs"),
        ([[make_batches(1)[0], torch.zeros(2)]], InputError, "batch 1 .* are a list.*pass \\(images for images, _ in loader\\)"),
        ([make_batches(1)[0], make_batches(1)[0] * torch.nan], InputError, "not finite, first in 'bn1.running_mean'"),
        ([torch.zeros(1, 3, 5, 5, dtype=torch.float64)], InputError, r"batch 1 .* one value per channel \(shape \[1, 4, 1, 1\]\)"),
        (failing_stream(), OSError, "disk on fire"),
    ],
)
def test_bad_batches_leave_the_statistics_as_they_were(batches: Any, error: type[Exception], words: str) -> None:
    """No batches, batches that do not fit and statistics that are not finite are refused, and the model is untouched."""
    net = make_net()
    before = snapshot(net)
    with pytest.raises(error, match=words):
        recalibrate(net, batches)
    assert not changes(before, snapshot(net))
