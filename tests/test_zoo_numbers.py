"""Numbers that others have published or that arithmetic gives: exact sizes of pruned networks, and which layers depend on each other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import pytest
import torch
from torch import nn

import graphprune as gp
from tests.support.networks import build
from tests.support.operators import Network, conv


def resnet_sets(blocks: tuple[int, ...], last: str, stem: tuple[str, ...], first_downsampled: int) -> set[frozenset[str]]:
    """Returns the layers that a residual sum ties together, stage by stage: the last convolution of every block, and what joins it."""
    sets = set()
    for stage, count in enumerate(blocks, start=1):
        names = [f"layer{stage}.{block}.{last}" for block in range(count)]
        names += [f"layer{stage}.0.downsample.0"] if stage >= first_downsampled else list(stem)
        sets.add(frozenset(names))
    return sets


def mobilenet_sets() -> set[frozenset[str]]:
    """Returns the residual sums of MobileNetV2, and its depthwise convolutions with the convolutions before them."""
    sums = [(2, 3), (4, 5, 6), (7, 8, 9, 10), (11, 12, 13), (14, 15, 16)]
    sets = {frozenset(f"features.{n}.conv.2" for n in numbers) for numbers in sums}
    depthwise = {frozenset({f"features.{n}.conv.0.0", f"features.{n}.conv.1.0"}) for n in range(2, 18)}
    return sets | depthwise | {frozenset({"features.0.0", "features.1.conv.0.0"})}


SETS: Final = {
    "resnet18": resnet_sets((2, 2, 2, 2), "conv2", ("conv1",), 2),
    "resnet34": resnet_sets((3, 4, 6, 3), "conv2", ("conv1",), 2),
    "wide_resnet50_2": resnet_sets((3, 4, 6, 3), "conv3", (), 1),
    "mobilenet_v2": mobilenet_sets(),
    **{name: set[frozenset[str]]() for name in ("alexnet", "vgg11", "vgg11_bn", "vgg13", "vgg19", "squeezenet1_1")},
}


def dependent(graph: gp.DependencyGraph) -> set[frozenset[str]]:
    """Returns the sets of two and more layers that produce the channels of one group."""
    return {frozenset(group.layers) for group in graph.groups if len(group.layers) > 1}


def without_values(name: str, size: int) -> tuple[nn.Module, torch.Tensor]:
    """Returns a network and an image that have shapes and no values: the sets depend on nothing else, and drawing weights takes long."""
    with torch.device("meta"):
        return build(f"torchvision:{name}", size=size)[0], torch.zeros(1, 3, size, size)


@pytest.mark.parametrize("name", SETS)
def test_layers_that_must_lose_the_same_channels(name: str) -> None:
    """The layers that share a group are those that residual sums and depthwise convolutions tie together, and no others."""
    assert dependent(gp.trace(*without_values(name, 64))) == SETS[name]


def test_the_sets_of_a_network_with_values_are_the_same() -> None:
    """Tracing real weights gives the groups that tracing shapes alone gives."""
    model, make_inputs = build("torchvision:resnet18", size=64)
    graph = gp.trace(model, make_inputs(2))
    assert dependent(graph) == SETS["resnet18"]
    assert graph.fingerprint == gp.trace(*without_values("resnet18", 64)).fingerprint


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "squeezenet1_1"])
def test_networks_without_sums_have_one_group_per_layer(name: str) -> None:
    """Where no sum ties layers together, every convolution and linear layer but the last has a group of its own, of its full width."""
    model, image = without_values(name, 64)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    widths = {n: m.out_channels if isinstance(m, nn.Conv2d) else m.out_features for n, m in layers.items()}
    last = "classifier.1" if name == "squeezenet1_1" else "classifier.6"
    del widths[last]
    assert {group.name: group.channels for group in gp.trace(model, image).groups} == widths


# -- sizes ---------------------------------------------------------------------------------------------------------------------------


def test_half_of_resnet18_has_3055880_parameters() -> None:
    """ResNet-18 at 50 % has the parameters of a ResNet-18 of half the width, with all 1000 classes."""
    model, make_inputs = build("torchvision:resnet18", size=64)
    small, report = gp.prune(model, make_inputs(1), sparsity=0.5)
    assert gp.count(model, make_inputs(1)).params == 11_689_512
    assert gp.count(small, make_inputs(1)).params == 3_055_880
    assert report.kind == "module"
    assert report.after == gp.count(small, make_inputs(1))


def test_half_of_resnet50_has_6917640_parameters_and_1052311552_macs() -> None:
    """ResNet-50 at 50 % has, at 224 x 224, the published multiply-accumulates of its convolutions and its linear layer."""
    model, make_inputs = build("torchvision:resnet50", size=64)
    small, _ = gp.prune(model, make_inputs(1), sparsity=0.5, verify=False)
    assert gp.count(model, make_inputs(1)).params == 25_557_032
    assert gp.count(small, torch.zeros(1, 3, 224, 224)) == gp.Cost(6_917_640, 1_052_311_552)


@pytest.mark.parametrize(("rounding", "widths"), [("floor", [19, 38, 76, 153]), ("ceil", [20, 39, 77, 154])])
def test_widths_of_resnet18_at_70_percent(rounding: str, widths: list[int]) -> None:
    """30 % of 64, 128, 256 and 512 channels are kept, rounded down or up, in every layer of every stage."""
    model, make_inputs = build("torchvision:resnet18", size=64)
    small, _ = gp.prune(model, make_inputs(1), sparsity=0.7, rounding=rounding, verify=False)  # type: ignore[arg-type]
    for stage, width in enumerate(widths, start=1):
        convs = [m for n, m in small.named_modules() if n.startswith(f"layer{stage}.") and isinstance(m, nn.Conv2d)]
        assert {m.out_channels for m in convs} == {width}


def widths(model: nn.Module, names: Iterable[str]) -> list[tuple[int, int]]:
    """Returns (inputs, outputs) of layers."""
    layers = [model.get_submodule(name) for name in names]
    return [(m.in_channels, m.out_channels) if isinstance(m, nn.Conv2d) else (m.in_features, m.out_features) for m in layers]  # type: ignore[misc]


def test_two_convolutions_and_a_linear_layer() -> None:
    """Half of 20 and of 50 filters go, and with them half of the 800 columns that read the flattened map of the second."""
    model = nn.Sequential(nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(800, 500))
    small, report = gp.prune(model, torch.randn(2, 1, 28, 28), sparsity=0.5)
    assert widths(small, ["0", "2", "5"]) == [(1, 10), (10, 25), (400, 500)]
    assert report.verified


def test_one_layer_of_lenet() -> None:
    """A config that names the first convolution of LeNet halves it and narrows the next, and leaves the linear layers alone."""
    conv_part = [nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    model = nn.Sequential(*conv_part, nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))
    small, _ = gp.prune(model, torch.randn(2, 1, 28, 28), config_list=[{"sparsity": 0.5, "op_names": ["0"]}])
    assert widths(small, ["0", "3", "7", "9", "11"]) == [(1, 3), (3, 16), (256, 120), (120, 84), (84, 10)]


@pytest.mark.parametrize(("cut", "conv_groups"), [("blocks", 1), ("within", 4)])
def test_a_grouped_convolution_beside_a_plain_one(cut: str, conv_groups: int) -> None:
    """At 75 %, 16, 32 and 100 channels become 4, 8 and 25, whether three of four conv groups go or three quarters of each."""
    model = Network(
        lambda net, x: net.fc2(torch.relu(net.fc1((net.conv2(net.conv1(x)) + net.conv3(net.conv1(x))).flatten(1)))),
        {"conv1": nn.Conv2d(1, 16, 3), "conv2": nn.Conv2d(16, 32, 3, groups=4), "conv3": nn.Conv2d(16, 32, 3),
         "fc1": nn.Linear(512, 100), "fc2": nn.Linear(100, 10)},
    )  # fmt: skip
    small, report = gp.prune(model, torch.randn(2, 1, 8, 8), sparsity=0.75, cut=cut)  # type: ignore[arg-type]
    assert widths(small, ["conv1", "conv2", "conv3", "fc1", "fc2"]) == [(1, 4), (4, 8), (4, 8), (128, 25), (25, 10)]
    assert small.get_submodule("conv2").groups == conv_groups
    assert report.kind == "module"


# -- patterns ------------------------------------------------------------------------------------------------------------------------


def four_convs() -> dict[str, nn.Module]:
    """Returns four convolutions of one width and a consumer."""
    return {f"c{i}": conv(3, 4) for i in range(1, 5)} | {"head": nn.Linear(4, 2)}


def test_concatenated_batches_depend_on_each_other() -> None:
    """Joining along the batch and adding puts all four producers into one group."""

    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        joined = torch.cat([net.c1(x), net.c2(x)]) + torch.cat([net.c3(x), net.c4(x)])
        logits: torch.Tensor = net.head(joined.mean((2, 3)))
        return logits

    assert dependent(gp.trace(Network(run, four_convs()), torch.randn(2, 3, 6, 6))) == {frozenset({"c1", "c2", "c3", "c4"})}


@pytest.mark.parametrize("dim", [1, -3])
def test_concatenated_channels_do_not(dim: int) -> None:
    """Joining along the channels keeps the producers apart."""
    parts = {"c1": conv(3, 4), "c2": conv(3, 4), "head": conv(8, 2)}
    model = Network(lambda net, x: net.head(torch.cat([net.c1(x), net.c2(x)], dim=dim)), parts)
    graph = gp.trace(model, torch.randn(2, 3, 6, 6))
    assert {g.name for g in graph.groups} == {"c1", "c2"}
    assert dependent(graph) == set()


def test_layers_that_are_summed_over_their_channels_do_not() -> None:
    """Two maps whose channels are summed away before they meet stay apart."""
    parts = {"c1": conv(3, 4), "c2": conv(3, 6), "head": nn.Linear(36, 2)}
    model = Network(lambda net, x: net.head((net.c1(x).sum(1) + net.c2(x).sum(1)).flatten(1)), parts)
    graph = gp.trace(model, torch.randn(2, 3, 6, 6))
    assert {(g.name, g.channels) for g in graph.groups} == {("c1", 4), ("c2", 6)}
    assert dependent(graph) == set()
