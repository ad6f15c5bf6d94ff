"""One cell of the accuracy table: a trained network that one method prunes to a budget of MACs, then a short fine-tune.

Two sides prune the same networks: graphprune with every criterion that it names, and Torch-Pruning with its magnitude, BatchNorm scale and
Taylor pruners. Torch-Pruning takes a share of channels and no budget, so its share is found by bisection.
"""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.cli.demo import BATCH, FINETUNE_LR, LR, Digits, accuracy, build, train
from graphprune.criteria import CRITERIA
from graphprune.criteria.base import Criterion
from graphprune.runs.atomic import atomic

Side: TypeAlias = Literal["graphprune", "torch-pruning"]
Order: TypeAlias = Literal["even", "global"]
Record: TypeAlias = dict[str, Any]
Ratio: TypeAlias = Callable[[float], nn.Module]  # from a share of channels to a network that lost it

OURS: Side = "graphprune"
PEER: Side = "torch-pruning"
PEERS = ("magnitude", "bn_scale", "taylor")
MATCHES = {"l2": "magnitude", "bn_scale": "bn_scale", "taylor": "taylor"}  # our criterion -> the peer's nearest
STAGES = ("before", "recalibrated", "after")
FINETUNE_SEED = 1000  # added to the network's seed: neither the order nor the shifts that it was trained with
TIE = 1e-6  # what one layer's share differs from the next one's, so that two layers never lose a channel at the same share
NARROW = 1e-7  # where bisection of the share ends


@dataclass(frozen=True)
class Settings:
    """What all cells of one table share.

    Attributes:
        depth: of the residual network, 6n + 2.
        epochs: of training.
        lr: the highest of training.
        finetune_epochs: after pruning.
        finetune_lr: the highest of fine-tuning: the demonstration's. Of 0.01, 0.02, 0.04 and 0.08, tried on seeds 0 and 1 with random
            channels at half of the MACs and with L1 at 30 % left, the first three end within 0.3 points on average, the last 0.6 lower.
        batches: of 64 training images each that data criteria look at, the first ones of the split, unshifted and in this order.
    """

    depth: int = 20
    epochs: int = 12
    lr: float = LR
    finetune_epochs: int = 1
    finetune_lr: float = FINETUNE_LR
    batches: int = 8

    def to_dict(self) -> dict[str, float]:
        """Returns the settings as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Method:
    """A way to prune.

    Attributes:
        side: whose.
        criterion: a name of `graphprune.criteria.CRITERIA`, or one of `PEERS`.
        order: "even": every layer loses the same share (the default of both sides); "global": one ranking of all layers.
        options: further arguments of `gp.prune`; none are the library's defaults.
    """

    side: Side
    criterion: str
    order: Order = "even"
    options: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """How tables name it, the order aside."""
        extra = " ".join(f"{key}={value}" for key, value in self.options)
        return " ".join(part for part in ("Torch-Pruning" if self.side == PEER else "", self.criterion, extra) if part)

    @property
    def match(self) -> Method | None:
        """The peer's method to compare with, if there is one."""
        return Method(PEER, MATCHES[self.criterion], self.order) if self.side == OURS and self.criterion in MATCHES else None


@dataclass(frozen=True)
class Cell:
    """One measurement to make.

    Attributes:
        method: how to prune.
        removed: fraction of the MACs to remove, in (0, 1).
        seed: of the network.
    """

    method: Method
    removed: float
    seed: int


def every_method(criteria: tuple[str, ...], options: tuple[tuple[str, str], ...] = ()) -> list[Method]:
    """Returns both sides' methods in both orders; with options, further rows of ours that are given them."""
    orders: tuple[Order, ...] = ("even", "global")
    found = [Method(OURS, name, order) for order in orders for name in criteria]
    found += [Method(OURS, name, order, options) for order in orders for name in criteria if options]
    return found + [Method(PEER, name, order) for order in orders for name in PEERS]


def trained(folder: Path, settings: Settings, seed: int, data: Digits) -> nn.Module:
    """Returns the network of one seed in eval mode, trained the first time and read from `folder` ever after."""
    model = build(settings.depth, seed)
    path = folder / f"resnet{settings.depth}-seed{seed}-epochs{settings.epochs}-lr{settings.lr:g}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    train(model, data, epochs=settings.epochs, lr=settings.lr, seed=seed)
    with atomic(path) as temporary:
        torch.save(model.state_dict(), temporary)
    return model.eval()


def one_channel(model: nn.Module, image: Tensor) -> int:
    """Returns the MACs that the dearest single channel of a network costs: how far from a budget one step may end."""
    graph = gp.trace(model, image)
    dense = gp.count(model, image).macs
    costs = []
    for group in graph.groups:
        small, _ = gp.speedup(model, gp.Masks(graph, {group.name: np.arange(group.channels) > 0}), verify=False)
        costs.append(dense - gp.count(small, image).macs)
    return max(costs)


def measure(cell: Cell, model: nn.Module, data: Digits, settings: Settings) -> Record:
    """Returns what one cell gave; where the method failed, "error" says why and accuracies are missing.

    The record holds "macs" and "params" of the pruned network, the fractions of the test images that it classifies correctly ("before"
    anything else, "recalibrated": with BatchNorm statistics estimated again from the training images, "after": fine-tuned, and the
    statistics estimated again), "ratio" (the share of channels that the peer was given) and "seconds" of "prune" and "finetune".

    Without that last estimate the accuracy would show little but BatchNorm: an epoch is 19 steps, after which running statistics of
    momentum 0.1 are a seventh those of the unpruned network, and for the rest lag behind weights that change with every step.
    """
    record: Record = identity(cell, settings)
    image = data.test_images[:1]
    start = time.perf_counter()
    try:
        small, ratio = (_pruned_by_us if cell.method.side == OURS else _pruned_by_peer)(cell, model, data, settings)
        cost = gp.count(small, image)
        middle = time.perf_counter()
        record |= {"macs": cost.macs, "params": cost.params, "ratio": ratio, "before": accuracy(small, data)}
        gp.recalibrate(small, data.train_images.split(BATCH))
        record["recalibrated"] = accuracy(small, data)
        train(small, data, epochs=settings.finetune_epochs, lr=settings.finetune_lr, seed=FINETUNE_SEED + cell.seed)
        gp.recalibrate(small, data.train_images.split(BATCH))
        record |= {"after": accuracy(small, data), "seconds": {"prune": middle - start, "finetune": time.perf_counter() - middle}}
    except Exception as error:  # noqa: BLE001 - whatever stops a method is what there is to report of it
        record["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return record


def identity(cell: Cell, settings: Settings) -> Record:
    """Returns what tells one measurement from another, as JSON gives it back."""
    method = cell.method
    named = {"side": method.side, "criterion": method.criterion, "order": method.order, "options": dict(method.options)}
    return {**named, "removed": cell.removed, "seed": cell.seed, "settings": settings.to_dict()}


def batches(data: Digits, settings: Settings) -> list[tuple[Tensor, Tensor]]:
    """Returns the (images, labels) that both sides' data criteria look at."""
    count = settings.batches * BATCH
    images, labels = data.train_images[:count].split(BATCH), data.train_labels[:count].split(BATCH)
    return list(zip(images, labels, strict=True))


def bisected(pruned: Ratio, cost: Callable[[nn.Module], int], target: float, most: float) -> tuple[nn.Module, float]:
    """Returns the network of the smallest share of channels whose cost is at most `target`, and that share.

    Args:
        pruned: from a share in [0, 1) to a fresh pruned network.
        cost: of a network; it falls as the share grows.
        target: cost to come down to.
        most: the largest share to try.

    Raises:
        ValueError: the largest share does not reach it.
    """
    low, high = 0.0, most
    best = pruned(high)
    if cost(best) > target:
        message = f"a share of {most:g} of the channels leaves a cost of {cost(best)}, more than {target:g}"
        raise ValueError(message)
    while high - low > NARROW:
        middle = (low + high) / 2
        candidate = pruned(middle)
        if cost(candidate) <= target:
            high, best = middle, candidate
        else:
            low = middle
    return best, high


def _pruned_by_us(cell: Cell, model: nn.Module, data: Digits, settings: Settings) -> tuple[nn.Module, None]:
    """Prunes with graphprune's own options, but for the order and what the method adds."""
    options: dict[str, Any] = {**dict(cell.method.options), **({"mode": "global"} if cell.method.order == "global" else {})}
    criterion = _seeded(CRITERIA[cell.method.criterion](), cell.seed)
    budget = gp.Budget(macs=cell.removed)
    looked_at = batches(data, settings)
    small, _ = gp.prune(model, data.test_images[:1], criterion=criterion, budget=budget, data=looked_at, loss=F.cross_entropy, **options)
    return small, None


def _seeded(criterion: Any, seed: int) -> Criterion:
    """Returns a criterion that draws random numbers with the network's seed, any other as it is."""
    chosen: Criterion = replace(criterion, seed=seed) if hasattr(criterion, "seed") else criterion
    return chosen


def _pruned_by_peer(cell: Cell, model: nn.Module, data: Digits, settings: Settings) -> tuple[nn.Module, float]:
    """Prunes with Torch-Pruning to the largest network within the budget that a share of channels leads to.

    The output layer is ignored, as Torch-Pruning's examples do. Its Taylor importance reads the gradient of the sum of the batches' losses,
    in eval mode. In the even order every convolution is given the share through `pruning_ratio_dict`, each less than the one before by
    `TIE`: all layers of equal width would otherwise lose a channel at once, which is too coarse for a budget.
    """
    peer = importlib.import_module("torch_pruning")
    pruners = {"bn_scale": peer.pruner.BNScalePruner}
    importance = {
        "magnitude": lambda: peer.importance.GroupMagnitudeImportance(p=2),
        "bn_scale": peer.importance.BNScaleImportance,
        "taylor": peer.importance.GroupTaylorImportance,
    }[cell.method.criterion]
    image = data.test_images[:1]
    gradients = _gradients(model, data, settings) if cell.method.criterion == "taylor" else {}

    def pruned(ratio: float) -> nn.Module:
        small = copy.deepcopy(model)
        for name, parameter in small.named_parameters():
            parameter.grad = gradients[name].clone() if name in gradients else None
        outputs = [layer for layer in small.modules() if isinstance(layer, nn.Linear)]
        layers = [layer for layer in small.modules() if isinstance(layer, nn.Conv2d)]
        shares = {layer: max(0.0, ratio - number * TIE) for number, layer in enumerate(layers)}
        even = {"global_pruning": False, "pruning_ratio_dict": shares}
        options = even if cell.method.order == "even" else {"global_pruning": True}
        # The dictionaries are given because the pruner writes into its own defaults, which would carry one run's layers into the next.
        own: dict[str, Any] = {"in_channel_groups": {}, "out_channel_groups": {}, "ignored_layers": outputs}
        pruner = pruners.get(cell.method.criterion, peer.pruner.MagnitudePruner)
        pruner(small, image, importance(), pruning_ratio=ratio, **options, **own).step()
        small.zero_grad()
        return small

    # A larger share would ask for all channels of the narrowest layer, and then the pruner leaves that layer whole.
    most = 1.0 - 1.0 / min(layer.out_channels for layer in model.modules() if isinstance(layer, nn.Conv2d))
    target = gp.count(model, image).macs * (1.0 - cell.removed)
    return bisected(pruned, lambda network: gp.count(network, image).macs, target, most)


def _gradients(model: nn.Module, data: Digits, settings: Settings) -> dict[str, Tensor]:
    """Returns parameter name -> gradient of the sum of the batches' losses, model in eval mode; the model itself keeps none."""
    watched = copy.deepcopy(model).eval()
    watched.zero_grad()
    for images, labels in batches(data, settings):
        F.cross_entropy(watched(images), labels).backward()
    return {name: parameter.grad for name, parameter in watched.named_parameters() if parameter.grad is not None}
