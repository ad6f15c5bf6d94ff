"""The rows of published tables of pruned networks: recipe, widths, parameters and multiply-accumulates.

Sources, and how each turns a fraction p of n filters into a number:

- Li et al., "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710), table 1: int(n (1 - p)) are kept, our "floor". Of a residual
  block only the first convolution is pruned, except in ResNet-34-C, where the residual stream of a whole stage is (0.8 * 256 = 204.8
  channels; figures are known for 204 and for 205). Which layers are skipped is said in the paper, section 4.
- Distiller's schedules of L1 ranking (examples/pruning_filters_for_efficient_convnets, examples/agp-pruning): int(n p) are removed, our
  "ceil". Only weights are counted. Its channel ranking removes inputs of the layers that it names; here the layers that produce these
  are named. What its element-wise pruning zeroes afterwards, int(n p) of n weights, changes no size: weights are counted before it, and
  non-zeros after it (rows of the last layer that it zeroes are as many weights).
- Torch-Pruning's logs of DepGraph (arXiv 2301.12900, reproduce/run): training decided the widths, so they are asked for one by one. Its
  latency table has even widths and prunes the classifier too. As a model's output is nobody's to narrow, that network is pruned with
  a sum over its logits behind it (`published.SummedLogits`), through the library like all others, and the network inside is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch

from tests.support import published
from tests.support.published import outputs

Config = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        network: a name in `published.NETWORKS`.
        figures: name of a counter in `published.COUNTERS` -> what it must give, to the last digit.
        widths: layer -> outputs that it keeps; the others keep all.
        config: the config list; by default, the widths are asked for one by one.
        rounding: of the kept counts.
        round_to: kept counts are multiples of this.
        part: the submodule that the figures are of.
        printed: counter -> what the source prints, to fewer digits.
        less: counter -> by how many percent it fell, as the source prints it.
        level: a config list for `LevelPruner`, to be applied to the shrunk network.
        non_zeros: how many weights of convolutions and linear layers are left after that.
    """

    network: str
    figures: Mapping[str, int]
    widths: Mapping[str, int] = field(default_factory=dict)
    config: Config | None = None
    rounding: Literal["floor", "ceil"] = "floor"
    round_to: int = 1
    part: str = ""
    printed: Mapping[str, str] = field(default_factory=dict)
    less: Mapping[str, str] = field(default_factory=dict)
    level: Config | None = None
    non_zeros: int = 0


# -- Li et al. -----------------------------------------------------------------------------------------------------------------------


def first_convs(blocks: Iterable[int], sparsities: Iterable[float], skip: Iterable[int]) -> Config:
    """Returns the config list of a recipe of Li et al.: one sparsity per stage, for the first convolution of each block but some.

    Layers are numbered as in the paper: the stem is 1, the two convolutions of the first block are 2 and 3.
    """
    numbers = iter(range(2, 1000, 2))
    config: Config = []
    for stage, (count, sparsity) in enumerate(zip(blocks, sparsities, strict=True), start=1):
        names = [f"layer{stage}.{block}.conv1" for block in range(count) if next(numbers) not in skip]
        config += [{"sparsity": sparsity, "op_names": names}] if names and sparsity else []
    return config


def at_stages(config: Config, kept: Mapping[int, int]) -> dict[str, int]:
    """Returns the width of each layer that a config list names, given one per stage."""
    return {name: kept[int(name[len("layer")])] for entry in config for name in entry["op_names"]}


STAGES_34: Final = (3, 4, 6, 3)
SKIP_34: Final = (2, 8, 14, 16, 26, 28, 30, 32)
R56_A: Final = first_convs((9, 9, 9), (0.1, 0.1, 0.1), (16, 20, 38, 54))
R56_B: Final = first_convs((9, 9, 9), (0.6, 0.3, 0.1), (16, 18, 20, 34, 38, 54))
R34_A: Final = first_convs(STAGES_34, (0.3, 0.3, 0.3, 0.3), SKIP_34)
STREAM_34: Final = [f"layer3.{block}.conv2" for block in range(6)] + ["layer3.0.downsample.0"]
R34_C: Final[Config] = [{"sparsity": 0.2, "op_names": STREAM_34}]
VGG_A: Final = [f"features.conv{number}" for number in (1, *range(8, 14))]
R110_A: Final = first_convs((18, 18, 18), (0.5, 0, 0), (36,))
R110_B: Final = first_convs((18, 18, 18), (0.5, 0.4, 0.3), (36, 38, 74))
R34_B: Final = first_convs(STAGES_34, (0.5, 0.6, 0.4, 0), SKIP_34)

VGG_COUNTS: Final = ("conv_macs", "params_without_norms")
CIFAR_COUNTS: Final = ("conv_macs", "weights")
IMAGENET_COUNTS: Final = ("block_macs", "block_weights")


def said(counters: tuple[str, str], *texts: str) -> dict[str, str]:
    """Returns what the paper says about multiply-accumulates and about parameters, by counter; an empty text is left out."""
    return {counter: text for counter, text in zip(counters, texts, strict=True) if text}


LI: Final = {
    "VGG-16": Row(
        "vgg16",
        {"conv_macs": 313_196_544, "macs": 313_463_808, "params_without_norms": 14_978_250, "params": 14_987_722},
        printed=said(VGG_COUNTS, "3.13e8", "1.5e7"),
    ),
    "VGG-16-A": Row(
        "vgg16",
        {"conv_macs": 206_143_488, "macs": 206_279_680, "params_without_norms": 5_390_698, "params": 5_397_034},
        {name: 32 if name == "features.conv1" else 256 for name in VGG_A},
        [{"sparsity": 0.5, "op_names": VGG_A}],
        printed=said(VGG_COUNTS, "2.06e8", "5.4e6"),
        less=said(VGG_COUNTS, "34.2", "64.0"),
    ),
    "ResNet-56": Row(
        "resnet56",
        {"conv_macs": 125_485_056, "params": 853_018, "weights": 853_018 - 4_064 - 10},
        printed=said(CIFAR_COUNTS, "1.25e8", "8.5e5"),
    ),
    "ResNet-56-A": Row(
        "resnet56",
        {"conv_macs": 112_435_200, "params": 773_336},
        at_stages(R56_A, {1: 14, 2: 28, 3: 57}),
        R56_A,
        printed=said(CIFAR_COUNTS, "1.12e8", "7.7e5"),
        less=said(CIFAR_COUNTS, "10.4", "9.4"),
    ),
    "ResNet-56-B": Row(
        "resnet56",
        {"conv_macs": 90_906_624, "params": 735_712},
        at_stages(R56_B, {1: 6, 2: 22, 3: 57}),
        R56_B,
        printed=said(CIFAR_COUNTS, "9.09e7", "7.3e5"),
        less=said(CIFAR_COUNTS, "27.6", "13.7"),
    ),
    "ResNet-110": Row("resnet110", {"conv_macs": 252_887_040, "params": 1_727_962}, printed=said(CIFAR_COUNTS, "2.53e8", "1.72e6")),
    "ResNet-110-A": Row(
        "resnet110",
        {},
        at_stages(R110_A, {1: 8}),
        R110_A,
        printed=said(CIFAR_COUNTS, "2.13e8", "1.68e6"),
        less=said(CIFAR_COUNTS, "15.9", "2.3"),
    ),
    "ResNet-110-B": Row(
        "resnet110",
        {},
        at_stages(R110_B, {1: 8, 2: 19, 3: 44}),
        R110_B,
        printed=said(CIFAR_COUNTS, "1.55e8", "1.16e6"),
        less=said(CIFAR_COUNTS, "38.6", "32.4"),
    ),
    "ResNet-34": Row("resnet34", {"macs": 3_663_761_408, "params": 21_797_672}, printed=said(IMAGENET_COUNTS, "3.64e9", "2.16e7")),
    "ResNet-34-A": Row(
        "resnet34",
        {"macs": 3_100_184_576, "params": 20_151_764},
        at_stages(R34_A, {1: 44, 2: 89, 3: 179}),
        R34_A,
        printed=said(IMAGENET_COUNTS, "3.08e9", "1.99e7"),
        less=said(IMAGENET_COUNTS, "15.5", "7.6"),
    ),
    "ResNet-34-B": Row(
        "resnet34",
        {},
        at_stages(R34_B, {1: 32, 2: 51, 3: 153}),
        R34_B,
        printed=said(IMAGENET_COUNTS, "2.76e9", "1.93e7"),
        less=said(IMAGENET_COUNTS, "24.2", "10.8"),
    ),
    "ResNet-34-C, 204": Row(
        "resnet34",
        {"macs": 3_391_105_024, "params": 20_206_160},
        dict.fromkeys(STREAM_34, 204),
        R34_C,
        printed=said(IMAGENET_COUNTS, "3.37e9", "2.01e7"),
        less=said(IMAGENET_COUNTS, "", "7.2"),  # its 7.5 % of multiply-accumulates contradict its own 3.37e9 of 3.64e9, which are 7.4 %
    ),
    "ResNet-34-C, 205": Row("resnet34", {"macs": 3_396_348_416, "params": 20_236_766}, dict.fromkeys(STREAM_34, 205), R34_C, "ceil"),
}

# -- Distiller -----------------------------------------------------------------------------------------------------------------------

RANK_56: Final[Config] = [
    {"sparsity": 0.6, "op_names": [f"layer1.{block}.conv1" for block in range(9)]},
    {"sparsity": 0.5, "op_names": [f"layer2.{block}.conv1" for block in (1, 2, 3, 4, 6, 7)]},
    {"sparsity": 0.1, "op_names": ["layer3.1.conv1"]},
    {"sparsity": 0.3, "op_names": [f"layer3.{block}.conv1" for block in (2, 3, 5, 6, 7, 8)]},
]
STREAM_56: Final = ["conv1"] + [f"layer1.{block}.conv2" for block in range(9)]
CHANNELS_56: Final[Config] = [
    {"sparsity": 0.7, "op_names": STREAM_56},
    {"sparsity": 0.6, "op_names": RANK_56[1]["op_names"]},
    {"sparsity": 0.2, "op_names": RANK_56[2]["op_names"]},
    {"sparsity": 0.4, "op_names": RANK_56[3]["op_names"]},
]
INNER_50: Final = [f"layer{i}.{block}.conv{j}" for i, count in enumerate(STAGES_34, start=1) for block in range(count) for j in (1, 2)]
FILTERS_50: Final[Config] = [{"sparsity": 0.5, "op_names": INNER_50}]
WHOLE_50: Final = ("layer2.0.conv1", "layer2.1.conv2", "layer3.0.conv1")
FILTERS_50_2: Final[Config] = [*FILTERS_50, {"exclude": True, "op_names": list(WHOLE_50)}]


STREAM_20: Final = [f"layer2.{block}.conv2" for block in range(3)] + ["layer2.0.downsample.0"]
INNER_20: Final = [f"layer2.{block}.conv1" for block in range(3)]
LAST_20: Final = [f"layer3.{block}.conv2" for block in range(3)] + ["layer3.0.downsample.0"]
HYBRID_20: Final[Config] = [{"sparsity": 0.5, "op_names": STREAM_20 + INNER_20}]
FINE_20: Final[Config] = [{"sparsity": 0.7, "op_names": [f"layer3.{block}.conv{i}" for block in (1, 2) for i in (1, 2)]}]
HALF_FC: Final = {"sparsity": 0.5, "op_names": ["fc"]}
HYBRID_20_2: Final = first_convs((3, 3, 3), (0.4, 0.4, 0), ())
HYBRID_20_4: Final[Config] = [*HYBRID_20, {"sparsity": 0.5, "op_names": LAST_20}]


def halves(names: Iterable[str]) -> dict[str, int]:
    """Returns half of the width of inner convolutions of a ResNet-50."""
    return {name: 32 << (int(name[len("layer")]) - 1) for name in names}


DISTILLER: Final = {
    "Distiller ResNet-56": Row("resnet56 projected", {"weights": 851_504, "macs": 125_747_840}),
    "Distiller filter_rank": Row(
        "resnet56 projected",
        {"weights": 634_640, "macs": 78_856_832},
        {name: kept for entry, kept in zip(RANK_56, (7, 16, 58, 45), strict=True) for name in entry["op_names"]},
        RANK_56,
        "ceil",
    ),
    "Distiller channel_rank": Row(
        "resnet56 projected",
        {"weights": 566_887, "macs": 66_592_384},
        {name: kept for entry, kept in zip(CHANNELS_56, (5, 13, 52, 39), strict=True) for name in entry["op_names"]},
        CHANNELS_56,
        "ceil",
    ),
    "Distiller ResNet-50": Row("resnet50", {"weights": 25_502_912, "params": 25_502_912 + 53_120 + 1_000, "macs": 4_089_184_256}),
    "Distiller filters": Row(
        "resnet50",
        {"weights": 12_335_296, "macs": 1_822_031_872},
        halves(INNER_50),
        FILTERS_50,
        "ceil",
        level=[{"sparsity": 0.7, "op_names": ["fc"]}],
        non_zeros=10_901_696,
    ),
    "Distiller filters_2": Row(
        "resnet50",
        {"weights": 12_671_168, "macs": 2_037_186_560},
        halves(name for name in INNER_50 if name not in WHOLE_50),
        FILTERS_50_2,
        "ceil",
    ),
    "Distiller ResNet-20": Row("resnet20 projected", {"weights": 270_896, "macs": 40_813_184}),
    "Distiller hybrid ResNet-20": Row(
        "resnet20 projected",
        {"weights": 223_536, "macs": 30_655_104},
        dict.fromkeys(STREAM_20 + INNER_20, 16),
        HYBRID_20,
        "ceil",
        level=[*FINE_20, HALF_FC],
        non_zeros=120_000,
    ),
    "Distiller hybrid ResNet-20, 2": Row(
        "resnet20 projected",
        {"weights": 246_704, "macs": 30_638_720},
        at_stages(HYBRID_20_2, {1: 10, 2: 20}),
        HYBRID_20_2,
        "ceil",
        level=FINE_20,
        non_zeros=143_488,
    ),
    "Distiller hybrid ResNet-20, 4": Row(
        "resnet20 projected",
        {"weights": 130_544, "macs": 24_723_776},
        dict.fromkeys(STREAM_20 + INNER_20, 16) | dict.fromkeys(LAST_20, 32),
        HYBRID_20_4,
        "ceil",
        level=[*FINE_20, HALF_FC],
        non_zeros=78_776,
    ),
}

# -- Torch-Pruning -------------------------------------------------------------------------------------------------------------------


def resnet56_widths(streams: tuple[int, int, int], inner: str) -> dict[str, int]:
    """Returns layer -> outputs of a ResNet-56: of the three residual streams, and of the first convolutions of the 27 blocks in turn."""
    widths = {"conv1": streams[0]}
    kept = iter(inner.split())
    for stage, stream in enumerate(streams, start=1):
        widths |= {f"layer{stage}.{block}.conv1": int(next(kept)) for block in range(9)}
        widths |= {f"layer{stage}.{block}.conv2": stream for block in range(9)}
        widths |= {f"layer{stage}.0.downsample.0": stream} if stage > 1 else {}
    return widths


def vgg19_widths(kept: str) -> dict[str, int]:
    """Returns layer -> outputs of the 16 convolutions of a VGG-19."""
    names = [f"block{block}.{3 * i}" for block, widths in enumerate(published.Vgg19.BLOCKS) for i in range(len(widths))]
    return dict(zip(names, map(int, kept.split()), strict=True))


def scaled(network: str, sparsity: float, classes: Mapping[str, int]) -> dict[str, int]:
    """Returns layer -> outputs of a network of even widths, 2 * floor(floor(n (1 - p)) / 2) of n, but for its classifier."""
    with torch.device("meta"):
        full = outputs(published.NETWORKS[network]())
    return {name: int(width * (1 - sparsity)) // 2 * 2 for name, width in full.items()} | dict(classes)


TORCH_PRUNING: Final = {
    "DepGraph ResNet-56": Row(
        "resnet56 projected",
        {"params": 855_770, "macs": 125_747_840, "torch_pruning_macs": 127_115_914},
        printed={"torch_pruning_macs": "127.12e6"},
    ),
    "DepGraph ResNet-56, Group-L1 2.12x": Row(
        "resnet56 projected",
        {"params": 544_673, "macs": 59_219_072},
        resnet56_widths((15, 10, 64), "10 7 5 11 10 9 8 12 13  32 4 6 1 2 1 4 3 1  64 62 58 53 59 45 34 27 64"),
    ),
    "DepGraph ResNet-56, Group-BN 2.12x": Row(
        "resnet56 projected",
        {"params": 374_804, "macs": 59_015_528},
        resnet56_widths((13, 23, 36), "14 7 7 9 12 11 11 16 15  32 15 25 26 26 6 13 10 4  64 61 55 51 51 41 38 27 62"),
        printed={"torch_pruning_macs": "59.98e6"},
    ),
    "DepGraph ResNet-56, Group-GReg 2.12x": Row(
        "resnet56 projected",
        {"params": 620_435, "macs": 59_314_564},
        resnet56_widths((5, 31, 58), "8 8 5 9 5 12 5 8 7  29 13 26 26 24 3 12 5 4  63 62 58 53 62 60 57 51 62"),
        printed={"torch_pruning_macs": "60.08e6"},
    ),
    "DepGraph ResNet-56, Group-SL 2.11x": Row(
        "resnet56 projected",
        {"params": 426_247, "macs": 58_960_986},
        resnet56_widths((14, 31, 41), "11 3 7 9 6 10 4 10 7  28 9 25 27 24 6 13 11 7  61 57 55 50 59 43 30 36 56"),
    ),
    "DepGraph ResNet-56, Group-SL 2.55x": Row(
        "resnet56 projected",
        {"params": 294_225, "macs": 47_837_242},
        resnet56_widths((12, 30, 25), "9 5 7 9 6 12 4 11 7  27 10 24 27 25 8 11 7 7  61 55 51 47 57 37 36 42 53"),
        printed={"torch_pruning_macs": "48.69e6"},
    ),
    "DepGraph VGG-19": Row(
        "vgg19", {"params": 20_086_692, "macs": 511_428_608, "torch_pruning_macs": 512_731_236}, printed={"torch_pruning_macs": "512.73e6"}
    ),
    "DepGraph VGG-19, Group-SL 8.92x": Row(
        "vgg19",
        {"params": 1_179_889, "macs": 56_697_540},
        vgg19_widths("4 26 46 115 99 163 64 234 245 36 32 16 22 34 28 33"),
        printed={"torch_pruning_macs": "57.16e6"},
    ),
    "ResNet-18": Row("resnet18", {"params": 11_689_512, "torch_pruning_macs": 1_822_177_768}),
    "ResNet-18 of half the width": Row(
        "resnet18",
        {"params": 3_055_880, "torch_pruning_macs": 487_202_536},
        scaled("resnet18", 0.5, {"fc": 1000}),
        [{"sparsity": 0.5, "op_types": ["default"]}],
    ),
}


def latency_row(sparsity: float, classes: int, figures: Mapping[str, int], macs: str, params: str) -> Row:
    """Returns a row of Torch-Pruning's latency table: even widths, and the classifier pruned with the rest."""
    config: Config = [{"sparsity": sparsity, "op_types": ["default"]}]
    widths = scaled("resnet50 summed", sparsity, {"network.fc": classes})
    printed = {"torch_pruning_macs": macs, "params": params}
    return Row("resnet50 summed", figures, widths, config, round_to=2, part="network", printed=printed)


TORCH_PRUNING_50: Final = {
    "ResNet-50, 0.05 with its classifier": latency_row(0.05, 950, {}, "3.68e9", "22.97e6"),
    "ResNet-50, 0.25 with its classifier": latency_row(0.25, 750, {"params": 14_387_742, "macs": 2_322_293_760}, "2.35e9", "14.39e6"),
    "ResNet-50, 0.35 with its classifier": latency_row(0.35, 650, {}, "1.74e9", "10.75e6"),
    "ResNet-50, 0.50 with its classifier": latency_row(0.50, 500, {"params": 6_405_140, "macs": 1_051_799_552}, "1.07e9", "6.41e6"),
    "ResNet-50, 0.75 with its classifier": latency_row(0.75, 250, {"params": 1_609_226, "macs": 277_701_632}, "0.29e9", "1.61e6"),
    "ResNet-50, 0.50 with all classes": Row(
        "resnet50",
        {"params": 6_917_640, "macs": 1_052_311_552},
        scaled("resnet50", 0.5, {"fc": 1000}),
        [{"sparsity": 0.5, "op_types": ["default"]}],
    ),
}

ROWS: Final[dict[str, Row]] = LI | DISTILLER | TORCH_PRUNING | TORCH_PRUNING_50
