"""The networks of published pruning recipes, written as their users would write them, and how each source counts.

Sources: Li et al., "Pruning Filters for Efficient ConvNets" (arXiv 1608.08710); Distiller's schedules; Torch-Pruning's benchmarks
(DepGraph, arXiv 2301.12900). The networks for ImageNet are torchvision's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune.cost.count import count_by_module
from tests.support.networks import randomise
from tests.support.torchvision_shim import import_torchvision

Shortcut = Literal["pad", "conv"]


class Vgg16(nn.Module):
    """VGG-16 for 32 x 32 images: 13 convolutions without biases, each with BatchNorm, and two linear layers, the first with BatchNorm."""

    BLOCKS: Final = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        inputs, number = 3, 0
        for widths in self.BLOCKS:
            for width in widths:
                number += 1
                layers[f"conv{number}"] = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
                layers[f"bn{number}"] = nn.BatchNorm2d(width)
                layers[f"relu{number}"] = nn.ReLU()
                inputs = width
            layers[f"pool{number}"] = nn.MaxPool2d(2)
        self.features = nn.Sequential(layers)
        self.classifier = nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (n, 3, 32, 32) to logits (n, 10)."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


class Vgg19(nn.Module):
    """VGG-19 for 100 classes of 32 x 32 images: biases in the convolutions, blocks at 32, 16, 8, 4 and 4 pixels.

    The last ReLU of a block is a function and no module; Torch-Pruning counts only modules.
    """

    BLOCKS: Final = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)

    def __init__(self) -> None:
        super().__init__()
        inputs = 3
        for number, widths in enumerate(self.BLOCKS):
            layers: list[nn.Module] = []
            for width in widths:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            self.add_module(f"block{number}", nn.Sequential(*layers[:-1]))
        self.pool = nn.MaxPool2d(2)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(512, 100)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (n, 3, 32, 32) to logits (n, 100)."""
        for number in range(len(self.BLOCKS)):
            if number in (1, 2, 3):
                x = self.pool(x)
            x = F.relu(self.get_submodule(f"block{number}")(x))
        logits: Tensor = self.classifier(self.average(x).flatten(1))
        return logits


class CifarBlock(nn.Module):
    """Two convolutions with BatchNorm around a shortcut; where the width grows, it is padded with zeros ("pad") or projected ("conv")."""

    def __init__(self, inputs: int, width: int, shortcut: Shortcut) -> None:
        super().__init__()
        stride = 1 if inputs == width else 2
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.more = width - inputs
        self.downsample: nn.Module | None = None
        if self.more and shortcut == "conv":
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, inputs, h, w) to (n, width, h / stride, w / stride)."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            x = self.downsample(x)
        elif self.more:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet of 6 n + 2 layers for 32 x 32 images: three stages of n blocks, 16, 32 and 64 wide."""

    def __init__(self, blocks: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        inputs = 16
        for stage, width in enumerate((16, 32, 64), start=1):
            widths = [inputs, *[width] * blocks]
            self.add_module(f"layer{stage}", nn.Sequential(*(CifarBlock(a, b, shortcut) for a, b in pairwise(widths))))
            inputs = width
        self.avgpool = nn.AvgPool2d(8)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (n, 3, 32, 32) to logits (n, 10)."""
        x = self.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


class SummedLogits(nn.Module):
    """A classifier and, after it, one number per image, so that the number of classes is nobody's output and may shrink."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to the sum of their logits, (n,)."""
        logits: Tensor = self.network(x)
        return logits.sum(1)


def torchvision_resnet(layers: int) -> nn.Module:
    """Returns torchvision's ResNet of so many layers, untrained, for 1000 classes."""
    network: nn.Module = getattr(import_torchvision().models, f"resnet{layers}")()
    return network


NETWORKS: Final[dict[str, Callable[[], nn.Module]]] = {
    "vgg16": Vgg16,
    "vgg19": Vgg19,
    "resnet56": lambda: CifarResNet(9, "pad"),
    "resnet110": lambda: CifarResNet(18, "pad"),
    "resnet20 projected": lambda: CifarResNet(3, "conv"),
    "resnet56 projected": lambda: CifarResNet(9, "conv"),
    "resnet18": lambda: torchvision_resnet(18),
    "resnet34": lambda: torchvision_resnet(34),
    "resnet50": lambda: torchvision_resnet(50),
    "resnet50 summed": lambda: SummedLogits(torchvision_resnet(50)),
}
"""Name -> how it is built. The resnets of 18, 34 and 50 layers take images of 224 x 224, the others of 32 x 32."""

IMAGENET: Final = frozenset({"resnet18", "resnet34", "resnet50", "resnet50 summed"})


def dense(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Returns an unpruned network in eval mode, images to prune it with, and one image of the size that its source counts for.

    The images to prune with are 32 x 32 or 64 x 64: no width depends on it. Weights and statistics are random and reproducible.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small, full = (64, 224) if name in IMAGENET else (32, 32)
        model = NETWORKS[name]().eval()
        images = torch.randn(2, 3, small, small)
        return randomise(model, 0, torch.randn(4, 3, small, small)), images, torch.zeros(1, 3, full, full)


# -- how the sources count -----------------------------------------------------------------------------------------------------------


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d | nn.Linear]]:
    """Yields the names of all convolutions and linear layers, and these."""
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            yield name, module


def outputs(model: nn.Module) -> dict[str, int]:
    """Returns layer -> outputs, of all convolutions and linear layers."""
    return {name: layer.weight.shape[0] for name, layer in layers(model)}


def params(model: nn.Module, _: Tensor) -> int:
    """Returns how many parameters there are."""
    return sum(p.numel() for p in model.parameters())


def params_without_norms(model: nn.Module, _: Tensor) -> int:
    """Returns how many parameters convolutions and linear layers have."""
    return sum(p.numel() for _, layer in layers(model) for p in layer.parameters())


def weights(model: nn.Module, _: Tensor) -> int:
    """Returns how many weights convolutions and linear layers have, biases left out (Distiller; ResNets in Li et al.)."""
    return sum(layer.weight.numel() for _, layer in layers(model))


def block_weights(model: nn.Module, _: Tensor) -> int:
    """Returns how many weights convolutions and linear layers have, shortcuts left out (the ResNet-34 of Li et al.)."""
    return sum(layer.weight.numel() for name, layer in layers(model) if "downsample" not in name)


def macs(model: nn.Module, image: Tensor) -> int:
    """Returns the multiply-accumulates of convolutions and linear layers."""
    return gp.count(model, image).macs


def conv_macs(model: nn.Module, image: Tensor) -> int:
    """Returns the multiply-accumulates of convolutions (Li et al.)."""
    return sum(cost.macs for name, cost in count_by_module(model, image).items() if isinstance(model.get_submodule(name), nn.Conv2d))


def block_macs(model: nn.Module, image: Tensor) -> int:
    """Returns the multiply-accumulates of convolutions, shortcuts left out (the ResNet-34 of Li et al.)."""
    costs = {name: cost.macs for name, cost in count_by_module(model, image).items() if "downsample" not in name}
    return sum(cost for name, cost in costs.items() if isinstance(model.get_submodule(name), nn.Conv2d))


def torch_pruning_macs(model: nn.Module, image: Tensor) -> int:
    """Returns what Torch-Pruning's `count_ops_and_params` calls MACs.

    It adds to the multiply-accumulates of convolutions and linear layers their biases, two operations per element that enters a
    BatchNorm, one per element that leaves a ReLU, and one per element that enters a pooling; what is no module counts nothing.
    """
    extra = 0

    def add(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal extra
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            extra += output.numel() if module.bias is not None else 0
        elif isinstance(module, nn.BatchNorm2d):
            extra += 2 * inputs[0].numel()
        elif isinstance(module, nn.ReLU):
            extra += output.numel()
        elif isinstance(module, (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
            extra += inputs[0].numel()

    handles = [module.register_forward_hook(add) for module in model.modules()]
    with torch.inference_mode():
        model(image)
    for handle in handles:
        handle.remove()
    return macs(model, image) + extra


COUNTERS: Final[dict[str, Callable[[nn.Module, Tensor], int]]] = {
    counter.__name__: counter
    for counter in (params, params_without_norms, weights, block_weights, macs, conv_macs, block_macs, torch_pruning_macs)
}
