"""NNI's own tests and its documented defects: the exact masks that it publishes, and what it should have given where it fails.

Rows B1 to B23 are reproductions of what NNI 3.0 does wrong; each test says what happens here. Rows about tracing and about training
with a penalty are tested where these are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.cost.count import count_by_module
from graphprune.criteria.base import Criterion
from tests.support.networks import build
from tests.support.operators import Network, conv, filled, images, normal
from tests.support.outputs import relative_error
from tests.support.torchvision_shim import import_torchvision
from tests.support.untouched import changes, snapshot

ConfigList = Sequence[dict[str, Any]]


class TorchModel(nn.Module):
    """The network of NNI's tests: two convolutions with batch norms, two linear layers, 28 x 28 pixels."""

    def __init__(self, wide: int = 10) -> None:
        """Makes the layers."""
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 5, 5), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, wide, 5), nn.BatchNorm2d(wide)
        self.fc1, self.fc2 = nn.Linear(4 * 4 * wide, 100), nn.Linear(100, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns ten logits."""
        x = torch.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 2)
        x = torch.max_pool2d(torch.relu(self.bn2(self.conv2(x))), 2)
        logits: torch.Tensor = self.fc2(torch.relu(self.fc1(x.flatten(1))))
        return logits


DIGIT = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def levels(weight: torch.Tensor, values: Iterable[float]) -> None:
    """Gives every filter one value."""
    filters = torch.tensor([float(value) for value in values])
    with torch.no_grad():
        weight.copy_(filters.reshape(-1, *[1] * (weight.dim() - 1)).expand_as(weight))


def gone(masks: gp.Masks, group: str) -> set[int]:
    """Returns the channels of a group that go."""
    return set(np.flatnonzero(~masks[group]).tolist())


def each(first: float, second: float, kind: str = "Conv2d", names: tuple[str, str] = ("conv1", "conv2")) -> ConfigList:
    """Returns NNI's config list with one sparsity per layer."""
    pairs = zip((first, second), names, strict=True)
    return [{"sparsity": sparsity, "op_types": [kind], "op_names": [name]} for sparsity, name in pairs]


@pytest.fixture
def model() -> TorchModel:
    """Returns NNI's network."""
    torch.manual_seed(0)
    return TorchModel().eval()


# -- exact masks ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dependency_aware", "normal"])
def test_l1_of_filters_with_one_value_each(model: TorchModel, mode: Any) -> None:
    """Filters of weight i: 20 % of five are {0}, 60 % of ten are {0, ..., 5}; masks of single layers say the same, bias included."""
    levels(model.conv1.weight, range(5))
    levels(model.conv2.weight, range(10))
    pruner = gp.L1NormPruner(model, each(0.2, 0.6), DIGIT, mode=mode)
    if mode == "dependency_aware":
        masks = pruner.masks()
        assert (gone(masks, "conv1"), gone(masks, "conv2")) == ({0}, {0, 1, 2, 3, 4, 5})
        return
    rows = pruner.layer_masks()
    assert rows["conv1.weight"].sum((1, 2, 3)).tolist() == [0, 25, 25, 25, 25]
    assert rows["conv2.weight"].sum((1, 2, 3)).tolist() == [0] * 6 + [125] * 4
    assert rows["conv1.bias"].tolist() == [False, True, True, True, True]
    assert rows["conv2.bias"].tolist() == [False] * 6 + [True] * 4


@pytest.mark.parametrize(("sparsity", "removed"), [(0.2, {4, 5}), (0.6, {2, 3, 4, 5, 6, 7})])
def test_fpgm_of_filters_with_one_value_each(model: TorchModel, sparsity: float, removed: set[int]) -> None:
    """Of ten filters of weight i + 1 those in the middle are the nearest to all others."""
    levels(model.conv2.weight, range(1, 11))
    masks = gp.FPGMPruner(model, [{"sparsity": sparsity, "op_names": ["conv2"]}], DIGIT).masks()
    assert gone(masks, "conv2") == removed
    assert gone(masks, "conv1") == set()


@pytest.mark.parametrize("key", ["sparsity", "total_sparsity"])
@pytest.mark.parametrize(("share", "sign", "removed"), [(0.2, -1.0, {0}), (0.6, 1.0, {0, 1, 2}), (0.6, -1.0, {0, 1, 2})])
def test_slim_of_scales_from_0_to_4(key: str, share: float, sign: float, removed: set[int]) -> None:
    """Scales 0, 1, 2, 3, 4 of one batch norm and the same of the other sign: the smallest absolute ones go, by layer or in all."""
    model = TorchModel(wide=5).eval()
    gamma = torch.arange(5.0)
    for norm, factor in ((model.bn1, 1.0), (model.bn2, sign)):
        norm.weight.data = factor * gamma
    masks = gp.Pruner(model, [{key: share, "op_types": ["Conv2d"]}], gp.BNScale(), DIGIT).masks()
    assert gone(masks, "conv1") == gone(masks, "conv2") == removed


class GivenProducts:
    """The Taylor criterion on gradients that are given by hand."""

    sees = "weights"
    comparable = gp.Taylor.comparable

    def __init__(self, gradients: dict[str, torch.Tensor]) -> None:
        """Takes gradients by parameter."""
        self.gradients = gradients

    def __call__(self, part: gp.Part) -> torch.Tensor:
        """Returns the scores of Taylor."""
        products = (self.gradients[part.owner.parameter] * part.tensor) ** 2
        return gp.Taylor()(gp.Part(part.tensor, part.owner, {"products": products}))


def taylor(model: TorchModel) -> Criterion:
    """Sets NNI's weights and returns Taylor with NNI's gradients: weights 0..4 and 10..1, gradients of alternating sign."""
    levels(model.conv1.weight, range(5))
    levels(model.conv2.weight, range(10, 0, -1))
    gradients = {f"{n}.weight": torch.zeros_like(getattr(model, n).weight) for n in ("conv1", "conv2", "fc1", "fc2")}
    levels(gradients["conv1.weight"], [-1, 1, -1, 1, -1])
    levels(gradients["conv2.weight"], [(-1) ** i for i in range(10)])
    return GivenProducts(gradients)


def test_taylor_of_given_gradients(model: TorchModel) -> None:
    """20 % of weights 0..4 are {0}, 60 % of weights 10..1 are {4, ..., 9}: the sign of a gradient does not count."""
    masks = gp.Pruner(model, each(0.2, 0.6), taylor(model), DIGIT).masks()
    assert (gone(masks, "conv1"), gone(masks, "conv2")) == ({0}, {4, 5, 6, 7, 8, 9})


@pytest.mark.parametrize(("share", "second"), [(6 / 15, {8, 9}), (7 / 15, {7, 8, 9})])
@pytest.mark.parametrize("spelling", ["mode", "total"])
def test_taylor_in_one_ranking(model: TorchModel, share: float, second: set[int], spelling: str) -> None:
    """One ranking of both layers, in NNI's order: the first layer keeps {4}, of the second the last go.

    Scores are 25 w^2 and 125 w^2, and the last channel of a layer stays. Here a share is one of channels: 0.4 of 15 are 6, which is
    {0, 1, 2, 3} and {8, 9}. NNI counts weights, and of 1375 takes the channels that fit into 0.4: one more of the second layer, {7, 8, 9}.
    """
    config = [{"total_sparsity": share, "op_types": ["Conv2d"]}] if spelling == "total" else [{"sparsity": share, "op_types": ["Conv2d"]}]
    mode: Any = None if spelling == "total" else "global"
    masks = gp.Pruner(model, config, taylor(model), DIGIT, mode=mode).masks()
    assert (gone(masks, "conv1"), gone(masks, "conv2")) == ({0, 1, 2, 3}, second)


# -- metric units --------------------------------------------------------------------------------------------------------------------


def shown(tensor: torch.Tensor, **extra: torch.Tensor) -> gp.Part:
    """Returns the part of a tensor with one channel per position of its first dimension."""
    return gp.Part(tensor, gp.Slice("weight", 0, np.arange(tensor.shape[0])[:, None], produces=True), extra)


def test_the_l2_norm_of_ones() -> None:
    """Each of three filters of 3 x 3 ones has the norm 3."""
    assert gp.L2()(shown(torch.ones(3, 3, 3))).tolist() == [3.0, 3.0, 3.0]


def test_the_distance_of_two_filters() -> None:
    """(1, 2) and (4, 6) are 5 apart, so each has 5 as its sum of distances."""
    assert gp.FPGM()(shown(torch.tensor([[1.0, 2.0], [4.0, 6.0]]))).tolist() == pytest.approx([5.0, 5.0], abs=1e-6)


@pytest.mark.parametrize(("sums", "batches", "scores"), [([[1, 1], [1, 1]], 2, [0.5, 0.5]), ([[0, 0, 1], [0, 0, 0]], 2, [1.0, 1.0, 0.75])])
def test_the_share_of_activations_that_are_not_zero(sums: list[list[int]], batches: int, scores: list[float]) -> None:
    """NNI's buffers hold how often each of two positions was zero (or was not) in two samples; half of all zero is 0.5."""
    zeros = torch.tensor(sums, dtype=torch.float64).sum(0)
    elements = torch.full_like(zeros, batches * len(sums))
    assert gp.APoZ()(shown(elements, zeros=zeros, elements=elements)).tolist() == scores


@pytest.mark.parametrize("criterion", [gp.L1(), gp.L2(), gp.FPGM(), gp.LAMP(), gp.Random(3)])
def test_one_ranking_keeps_exactly_its_share(criterion: Criterion) -> None:
    """A total of 80 % keeps exactly 20 % of the channels of all layers together."""
    model = filled(Network(lambda net, x: net.c(net.b(net.a(x).relu()).relu()), {"a": conv(3, 30), "b": conv(30, 20), "c": conv(20, 2)}))
    masks = gp.Pruner(model, [{"total_sparsity": 0.8, "op_types": ["default"]}], criterion, images(1)).masks()
    assert sum(int(masks[name].sum()) for name in masks) == 10


# -- whole networks ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet18() -> tuple[nn.Module, torch.Tensor, gp.DependencyGraph]:
    """Returns ResNet-18, two images and its graph."""
    import_torchvision()
    network, make_inputs = build("torchvision:resnet18", size=64)
    return network, make_inputs(2), gp.trace(network, make_inputs(2))


@pytest.mark.parametrize("pruner", ["L1NormPruner", "L2NormPruner", "FPGMPruner", "TaylorFOWeightPruner"])
def test_dependency_aware_widths(pruner: str, resnet18: tuple[nn.Module, torch.Tensor, gp.DependencyGraph]) -> None:
    """At 70 %, widths 64, 128, 256 and 512 come within one channel of their int(0.3 n), the same in all coupled layers."""
    network, batch, graph = resnet18
    config = [{"sparsity": 0.7, "op_types": ["Conv2d"]}]
    data: dict[str, Any] = {"data": [(batch, torch.tensor([1, 2]))], "loss": nn.functional.cross_entropy} if "Taylor" in pruner else {}
    masks = getattr(gp, pruner)(network, config, graph=graph, mode="dependency_aware", **data).masks()
    kept = masks.positions()
    sizes = {(m.out_channels, kept[f"{name}.weight"][0].size) for name, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    assert {old for old, _ in sizes} == {64, 128, 256, 512}
    assert all(abs(new - int(old * 0.3)) <= 1 for old, new in sizes), sizes
    assert sizes == {(64, 19), (128, 38), (256, 76), (512, 153)}
    if pruner == "L1NormPruner":
        small, _ = gp.speedup(network, masks, verify=False)
        convs = zip(network.modules(), small.modules(), strict=True)
        assert {(m.out_channels, n.out_channels) for m, n in convs if isinstance(m, nn.Conv2d) and isinstance(n, nn.Conv2d)} == sizes
        with torch.no_grad():
            assert small(batch).shape == (2, 1000)


def test_a_grouped_convolution_beside_a_plain_one() -> None:
    """SimpleTorchModel at 75 % in mode "balance": widths 4, 8, 8 and 25; the grouped convolution keeps its four groups."""

    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(net.conv1(x))
        out: torch.Tensor = net.fc2(torch.relu(net.fc1(torch.relu(net.conv2(x) + net.conv3(x)).flatten(1))))
        return out

    parts = {"conv1": nn.Conv2d(1, 16, 3), "conv2": nn.Conv2d(16, 32, 3, groups=4), "conv3": nn.Conv2d(16, 32, 3)}
    parts_of_all = parts | {"fc1": nn.Linear(32 * 24 * 24, 100), "fc2": nn.Linear(100, 10)}
    network = Network(run, parts_of_all)
    masked, masks = gp.L1NormPruner(network, [{"sparsity": 0.75, "op_types": ["default"]}], DIGIT, mode="balance").compress()
    assert isinstance(masks, gp.Masks)
    for name, kept in (("conv2", masks.for_module("conv2")), ("conv3", masks.for_module("conv3"))):
        rows = kept["weight"].flatten(1).any(1)
        assert torch.equal(rows, kept["bias"]), name
        assert torch.equal(rows, masks.for_module("conv3")["bias"]), name
    small, report = gp.speedup(network, masks)
    widths = {name: small.get_parameter(f"{name}.weight").shape[0] for name in parts_of_all}
    assert widths == {"conv1": 4, "conv2": 8, "conv3": 8, "fc1": 25, "fc2": 10}
    grouped = small.get_submodule("conv2")
    assert isinstance(grouped, nn.Conv2d)
    assert grouped.groups == 4
    assert small(DIGIT).shape == (1, 10)
    assert relative_error([masked(DIGIT)], [small(DIGIT)]) < 1e-5
    assert report.verified


# -- what NNI does wrong -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [None, 0.6])
def test_b1_small_weights_do_not_empty_a_layer(cap: float | None) -> None:
    """B1: a first layer with weights x 1e-3 in one ranking at 50 %: NNI prunes it whole (even capped); here it loses its share."""
    model = filled(nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 16), nn.ReLU(), conv(16, 2)))
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(1e-3)
    config: dict[str, Any] = {"sparsity": 0.5, "op_types": ["Conv2d"]} | ({"max_sparsity_per_layer": cap} if cap else {})
    masks = gp.L1NormPruner(model, [config], images(1), mode="global").masks()
    assert len(gone(masks, "0")) + len(gone(masks, "2")) == 16
    assert max(len(gone(masks, "0")), len(gone(masks, "2"))) <= (9 if cap else 11)


def test_b2_a_total_sparsity_is_taken() -> None:
    """B2: `total_sparsity` fails in NNI 3; here it is one ranking of all layers of the entry."""
    model = filled(nn.Sequential(conv(3, 6), nn.ReLU(), conv(6, 8), nn.ReLU(), conv(8, 2)))
    masks = gp.L1NormPruner(model, [{"op_types": ["Conv2d"], "total_sparsity": 0.5}], images(1)).masks()
    assert len(gone(masks, "0")) + len(gone(masks, "2")) == 7


def test_b3_a_transposed_convolution_loses_outputs() -> None:
    """B3: of ConvTranspose2d(8, 4) NNI masks inputs and fails at the bias; here half of the four outputs go, along dim 1."""
    model = filled(nn.Sequential(nn.ConvTranspose2d(8, 4, 3), nn.ReLU(), conv(4, 2)))
    x, config = normal(1, 8, 5, 5), [{"sparsity": 0.5, "op_names": ["0"]}]
    small, report = gp.prune(model, x, config_list=config)
    assert small.get_parameter("0.weight").shape == (8, 2, 3, 3)
    assert report.verified
    scores = model.get_parameter("0.weight").detach().abs().sum((0, 2, 3)).tolist()
    lowest = sorted(sorted(range(4), key=scores.__getitem__)[:2])
    with pytest.warns(UserWarning, match="no example inputs"):
        alone = gp.L1NormPruner(model, config)
    for pruner in (alone, gp.L1NormPruner(model, config, x, mode="normal")):
        rows = pruner.layer_masks()
        assert [o for o in range(4) if not rows["0.weight"][:, o].any()] == lowest
        assert int(rows["0.weight"].sum()) == 8 * 2 * 9
        assert [o for o in range(4) if not rows["0.bias"][o]] == lowest


def test_b4_one_output_channel_couples_nothing() -> None:
    """B4: Conv(3, 8) and Conv(8, 1) are one set in NNI; here the first has eight channels of its own, the second is an output."""
    graph = gp.trace(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3)), images(1).float())
    assert [(g.name, g.channels, g.layers) for g in graph] == [("0", 8, ("0",))]


def test_b5_a_depthwise_convolution_that_doubles_its_channels() -> None:
    """B5: Conv(3, 8) then Conv(8, 16, groups=8) cannot be pruned in NNI; here eight channels of one filter and of two."""
    model = filled(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 16, groups=8), nn.ReLU(), conv(16, 2)))
    graph = gp.trace(model, images(1))
    assert [(g.channels, g.layers, g.role) for g in graph] == [(8, ("0", "2"), "block"), (2, ("2",), "within")]
    assert {(s.parameter, s.index.shape) for s in graph.groups[0].producers} == {("0.weight", (8, 1)), ("2.weight", (8, 2))}
    small, report = gp.prune(model, images(1), sparsity=0.5)
    assert [tuple(small.get_parameter(f"{n}.weight").shape[:2]) for n in (0, 2, 4)] == [(4, 3), (8, 1), (2, 8)]
    assert report.verified


def test_b7_the_last_entry_for_a_layer_wins() -> None:
    """B7: of 0.25 and then 0.75 for one layer NNI 3 takes the first; here, as documented and as in NNI 2, the last."""
    model = filled(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 2)))
    config = [{"sparsity": 0.25, "op_names": ["0"]}, {"sparsity": 0.75, "op_names": ["0"]}]
    assert len(gone(gp.L1NormPruner(model, config, images(1)).masks(), "0")) == 6


def test_b8_excluding_one_layer_excludes_one_layer() -> None:
    """B8: excluding one named convolution excludes all of them in NNI 3; here that one, and the others are pruned."""
    model = filled(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 2)))
    config = [{"sparsity": 0.5, "op_types": ["Conv2d"]}, {"exclude": True, "op_types": ["Conv2d"], "op_names": ["0"]}]
    masks = gp.L1NormPruner(model, config, images(1)).masks()
    assert (len(gone(masks, "0")), len(gone(masks, "2"))) == (0, 4)


def test_b9_a_shift_behind_a_removed_channel_is_not_lost() -> None:
    """B9: conv-BN-ReLU-conv: what BN adds to a masked channel makes NNI's small model another one; here both agree to 1e-5."""
    parts = [conv(3, 8, bias=False), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = filled(nn.Sequential(*parts, nn.Linear(6, 4))).float()
    nn.init.uniform_(model.get_parameter("1.bias"), 0.5, 1.0)
    masked, masks = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_names": ["0"]}], images(2).float()).compress()
    assert isinstance(masks, gp.Masks)
    small, report = gp.speedup(model, masks)
    with torch.no_grad():
        assert float((masked(images(2).float()) - small(images(2).float())).abs().max()) <= 1e-5
    assert report.error <= 1e-5 < report.effect


def test_b10_a_statistic_across_channels_is_stated() -> None:
    """B10: Linear-LayerNorm-Linear changes silently in NNI; here the verdict is "changed" and names the norm."""
    model = filled(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)))
    group = gp.trace(model, torch.randn(3, 4, dtype=torch.float64)).groups[0]
    assert (group.verdict, [why.split()[0] for why in group.why]) == ("changed", ["layer_norm"])


def grouped() -> tuple[nn.Module, torch.Tensor]:
    """Returns a convolution before one with two groups of four filters, and an image."""
    return filled(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8, groups=2), nn.ReLU(), conv(8, 2))), images(2)


def test_b13_filters_of_a_grouped_convolution_go_in_equal_numbers() -> None:
    """B13: of masked filters {0, 1} and {5} NNI un-masks one weight and not its bias.

    Here channels of conv groups are one group, so equally many go from each; of masks of single filters, 1 and 5 (one position in
    both conv groups) go, and 0 stays, with its weight and bias zero as the mask says.
    """
    model, x = grouped()
    graph = gp.trace(model, x)
    weight, bias = torch.ones(8, 4, 3, 3, dtype=torch.bool), torch.ones(8, dtype=torch.bool)
    weight[[0, 1, 5]], bias[[0, 1, 5]] = False, False
    masks = gp.ElementMasks(model, {"2.weight": weight, "2.bias": bias})
    removed = {g.name: np.flatnonzero(~masks.channels(graph)[g.name]).tolist() for g in graph if not masks.channels(graph)[g.name].all()}
    assert list(removed.values()) == [[1]]
    small, report = gp.speedup(model, masks, x)
    last = small.get_submodule("2")
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    assert (last.groups, last.out_channels) == (2, 6)
    zero = [i for i in range(6) if not last.weight[i].any()]
    assert zero == [0]
    assert [i for i in range(6) if last.bias[i] == 0] == [0]
    assert relative_error([masks.masked(model)(x)], [small(x)]) < 1e-9
    assert report.verified


def test_b13_balance_takes_the_same_number_from_every_conv_group() -> None:
    """B13, asked for by a sparsity: the positions with the smallest sums over all conv groups go from each."""
    model, x = grouped()
    masks = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_names": ["2"]}], x, mode="balance").masks()
    kept = masks.for_module("2")
    filters = model.get_parameter("2.weight").detach().abs().sum((1, 2, 3)).tolist()
    positions = [filters[i] + filters[i + 4] for i in range(4)]
    best = sorted(sorted(range(4), key=positions.__getitem__)[2:])
    assert kept["bias"].nonzero().flatten().tolist() == [*best, *(i + 4 for i in best)]
    assert torch.equal(kept["weight"].flatten(1).any(1), kept["bias"])


def test_b17_the_output_keeps_its_width() -> None:
    """B17: pruning all linear layers narrows NNI's output from 4 to 2; here nothing that leaves the model goes."""
    model = filled(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)))
    x = torch.randn(4, 4, dtype=torch.float64)
    modes: list[Any] = ["dependency_aware", "global", "balance"]
    for mode in modes:
        small, _ = gp.prune(model, x, config_list=[{"sparsity": 0.5, "op_types": ["Linear"]}], mode=mode)
        assert small(x).shape == (4, 4)
        assert small.get_parameter("0.weight").shape == (4, 4)
    rows = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["Linear"]}], x, mode="normal").layer_masks()
    assert list(rows) == ["0.weight", "0.bias"]


def test_b18_masked_costs_are_those_of_the_right_layers() -> None:
    """B18: masking layer 0 halves NNI's figure for layer 1 alone; here both lose what the shrunk model has no more."""
    model = filled(nn.Sequential(conv(3, 16), nn.ReLU(), conv(16, 8)))
    small, report = gp.prune(model, images(1), sparsity=0.5)
    assert {layer.name: layer.before for layer in report.layers} == count_by_module(model, images(1))
    assert {layer.name: layer.after for layer in report.layers} == count_by_module(small, images(1))
    assert [layer.after.macs / layer.before.macs for layer in report.layers] == [0.5, 0.5]


@pytest.mark.parametrize("source", ["trainer", "data"])
def test_b19_looking_at_gradients_trains_nothing(source: str) -> None:
    """B19: five steps of NNI's TaylorPruner move weights by 0.064 and BN means by 0.70; here every bit stays, and so do .grad fields."""
    model = filled(nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))).train()
    batches = [(images(2) + i, torch.tensor([i % 4, (i + 1) % 4])) for i in range(5)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def trainer(net: nn.Module, steps: torch.optim.Optimizer, criterion: Any) -> None:
        net.train()
        for inputs, target in batches:
            steps.zero_grad()
            criterion(net(inputs), target).backward()
            steps.step()

    entropy = nn.CrossEntropyLoss()
    given: dict[str, Any] = {"data": batches, "loss": entropy}
    if source == "trainer":
        given = {"trainer": trainer, "optimizer": optimizer, "criterion": entropy}
    before, settings = snapshot(model), copy.deepcopy(optimizer.state_dict())
    masks = gp.TaylorFOWeightPruner(model, [{"sparsity": 0.5, "op_types": ["Conv2d"]}], **given, example_inputs=images(2)).masks()
    assert len(gone(masks, "0")) == 4
    assert changes(before, snapshot(model)) == []
    assert optimizer.state_dict() == settings


def test_b20_scales_are_the_models_own() -> None:
    """B20: NNI 3 learns factors and drops them; here channels go by the batch norm's gamma, which the small model still has."""
    model = TorchModel().eval()
    with torch.no_grad():
        model.bn1.weight.copy_(torch.tensor([0.5, -0.1, 0.9, 0.2, -0.7]))
    masks = gp.Pruner(model, [{"sparsity": 0.4, "op_names": ["conv1"]}], gp.BNScale(), DIGIT).masks()
    assert gone(masks, "conv1") == {1, 3}
    small, _ = gp.speedup(model, masks)
    assert small.get_parameter("bn1.weight").tolist() == model.bn1.weight[[0, 2, 4]].tolist()


def test_b22_coupling_and_one_ranking_together() -> None:
    """B22: NNI drops the ranking where layers are coupled; here coupled layers rank as one, and the share holds over all groups."""

    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(net.stem(x))
        out: torch.Tensor = net.head(torch.relu(x + net.outer(torch.relu(net.inner(x)))))
        return out

    model = filled(Network(run, {"stem": conv(3, 12), "inner": conv(12, 8), "outer": conv(8, 12), "head": conv(12, 2)}))
    with torch.no_grad():
        model.get_parameter("inner.weight")[:5] *= 0.01
    masks = gp.L1NormPruner(model, [{"sparsity": 0.4, "op_types": ["Conv2d"]}], images(1), mode="global").masks()
    assert len(gone(masks, "stem")) + len(gone(masks, "inner")) == 8
    assert gone(masks, "inner") >= {0, 1, 2, 3, 4}
    assert torch.equal(masks.for_module("stem")["bias"], masks.for_module("outer")["bias"])
    small, report = gp.speedup(model, masks)
    assert small.get_parameter("stem.weight").shape[0] == small.get_parameter("outer.weight").shape[0] == 12 - len(gone(masks, "stem"))
    assert report.verified


@pytest.mark.parametrize("seed", range(20))
def test_b23_squeeze_and_excitation(seed: int) -> None:
    """B23: an SE block at 30 % with 20 random weights: all 20 small models equal their masked models."""

    def run(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(net.stem(x))
        out: torch.Tensor = net.head(x * torch.sigmoid(net.up(torch.relu(net.down(x.mean((2, 3), keepdim=True))))))
        return out

    model = filled(Network(run, {"stem": conv(3, 16), "down": conv(16, 4, 1), "up": conv(4, 16, 1), "head": conv(16, 4)}), seed)
    small, report = gp.prune(model, images(2), sparsity=0.3)
    assert small.get_parameter("stem.weight").shape[0] == small.get_parameter("up.weight").shape[0] == 11
    assert report.kind == "module"
    assert report.error < 1e-9 < report.effect
