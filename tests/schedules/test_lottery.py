"""Lottery tickets: weights go back to the checkpoint bit for bit where kept, and optimizers and learning rates with them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.pruners.budgets import kept_count
from graphprune.recipes.replay import slice_state_dict
from graphprune.schedules.lottery import LotteryTicketPruner
from graphprune.surgery.recipe import recipe_of

Batches = list[tuple[Tensor, Tensor]]
EVERYTHING = [{"sparsity": 0.7, "op_types": ["default"]}]


def network() -> tuple[nn.Sequential, Tensor, Batches]:
    """Returns a model with batch norm, example inputs and data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3))
    x, y = torch.randn(24, 1, 6, 6), torch.randint(0, 3, (24,))
    return model, x[:1], [(x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)]


def epoch_over(batches: Batches, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Trains for one epoch."""
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def equal(mine: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Returns whether tensors have the same names and bits."""
    return set(mine) == set(other) and all(torch.equal(mine[name], value) for name, value in other.items())


@pytest.mark.parametrize("algorithm", ["level", "l1"])
@pytest.mark.parametrize("given", [False, True])
def test_masked_weights_are_rewound_bit_for_bit(algorithm: str, given: bool) -> None:
    """When a round's training begins, weights and buffers equal the checkpoint where kept and are zero elsewhere; round 0 is untouched."""
    model, x, batches = network()
    checkpoint = {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in model.state_dict().items()} if given else None
    begun: list[dict[str, Tensor]] = []

    def finetune(now: nn.Module) -> None:
        begun.append(copy.deepcopy(now.state_dict()))
        epoch_over(batches, now.train(), torch.optim.SGD(now.parameters(), lr=0.1, momentum=0.9))

    masks: list[Any] = []

    def evaluator(_: nn.Module) -> float:
        masks.append(pruner.state.masks)
        return 0.0

    pruner = LotteryTicketPruner(
        model, EVERYTHING, algorithm, 4, evaluator=evaluator, finetune=finetune, example_inputs=x, checkpoint=checkpoint
    )
    result, _ = pruner.compress()
    assert equal(begun[0], model.state_dict())
    target = model.state_dict() if checkpoint is None else checkpoint
    for found, mask in zip(begun[1:], masks[1:], strict=True):
        expected = copy.deepcopy(model)
        expected.load_state_dict(target)
        mask.apply(expected)
        assert equal(found, expected.state_dict())
        zeros = {name: value == 0 for name, value in found.items() if name.endswith("weight")}
        assert sum(int(z.sum()) for z in zeros.values()) > 0
    asked = [1 - 0.3 ** (i / 4) for i in range(5)]
    assert [r.asked[0] for r in pruner.history] == pytest.approx(asked, abs=1e-12)
    sizes = (72, 864, 144) if algorithm == "level" else (8, 12)
    left = [sum(kept_count(n, a, "ceil" if algorithm == "level" else "floor") for n in sizes) for a in asked]
    assert [r.sparsity for r in pruner.history] == pytest.approx([1 - n / sum(sizes) for n in left], abs=1e-12)
    assert not equal(begun[-1], result.state_dict())


def test_masks_are_computed_anew_from_trained_weights() -> None:
    """A round keeps the largest of the weights as they were trained, not of those rewound to, and never one that was masked before."""
    model, _, batches = network()
    trained: list[dict[str, Tensor]] = []

    def finetune(now: nn.Module) -> None:
        epoch_over(batches, now.train(), torch.optim.SGD(now.parameters(), lr=0.3))

    def evaluator(now: nn.Module) -> float:
        trained.append(copy.deepcopy(now.state_dict()))
        masks.append(pruner.state.masks)
        return 0.0

    masks: list[Any] = []
    pruner = LotteryTicketPruner(model, EVERYTHING, "level", 3, evaluator=evaluator, finetune=finetune)
    pruner.compress()
    for number in (1, 2, 3):
        for name, mask in masks[number].items():
            weight = trained[number - 1][name].abs().flatten()
            gone = int(round(weight.numel() * (1 - 0.3 ** (number / 3)), 9))
            order = torch.argsort(weight, stable=True)
            assert set(torch.nonzero(~mask.flatten())[:, 0].tolist()) == set(order[:gone].tolist())


def test_physical_rounds_rewind_the_slice_of_the_checkpoint() -> None:
    """With speedup, what a round begins with is the original state dict cut to what is left, bit for bit."""
    model, x, batches = network()
    before = copy.deepcopy(model.state_dict())
    begun: list[tuple[dict[str, Tensor], Any]] = []

    def finetune(now: nn.Module) -> None:
        begun.append((copy.deepcopy(now.state_dict()), None if not begun else recipe_of(now)))
        epoch_over(batches, now.train(), torch.optim.SGD(now.parameters(), lr=0.1))

    pruner = LotteryTicketPruner(model, EVERYTHING, "l1", 3, speedup=True, finetune=finetune, example_inputs=x)
    pruner.compress()
    for found, recipe in begun[1:]:
        assert equal(found, slice_state_dict(recipe, before))
    widths = [found["0.weight"].shape[0] for found, _ in begun]
    assert widths == [8, *(int(np.floor(8 * 0.3 ** (i / 3) + 1e-9)) for i in (1, 2, 3))]


@pytest.mark.parametrize("physical", [False, True])
@pytest.mark.parametrize("rewind", ["weights", "learning rate", "nothing"])
def test_late_rewinding_of_weights_optimizer_and_learning_rate(physical: bool, rewind: Any) -> None:
    """Rounds begin with the weights, momentum and learning rate that round 0 had after one epoch, as far as they are rewound."""
    model, x, batches = network()
    log: list[tuple[float, dict[str, Tensor], dict[str, Tensor]]] = []

    def train(now: nn.Module, optimizer: torch.optim.Optimizer, _: Any) -> None:
        momentum = {n: optimizer.state[p].get("momentum_buffer") for n, p in now.named_parameters() if p in optimizer.state}
        log.append((optimizer.param_groups[0]["lr"], copy.deepcopy(now.state_dict()), copy.deepcopy(momentum)))
        epoch_over(batches, now, optimizer)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.08, momentum=0.9)
    pruner = LotteryTicketPruner(
        model,
        EVERYTHING,
        "l1",
        2,
        speedup=physical,
        example_inputs=x,
        trainer=train,
        optimizer=optimizer,
        training_epochs=3,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
        rewind=rewind,
        rewind_epoch=0 if rewind == "nothing" else 1,
    )
    _, masks = pruner.compress()
    rates = [0.08, 0.04, 0.02]
    assert [rate for rate, *_ in log] == pytest.approx(rates * 3 if rewind == "nothing" else rates + rates[1:] * 2)
    if rewind == "nothing":
        return
    _, weights, momentum = log[1]
    _, last_weights, last_momentum = log[-2]
    assert isinstance(masks, gp.Masks)
    kept = masks.positions()
    for name, now in last_momentum.items():
        expected = momentum[name]
        for dim, keep in kept.get(name, {}).items() if physical else ():
            expected = expected.index_select(dim, torch.from_numpy(keep))
        assert torch.equal(now, expected), name
    target = copy.deepcopy(model)
    target.load_state_dict(weights)
    masks.apply(target)
    for name, now in last_weights.items():
        expected = target.state_dict()[name]
        for dim, keep in kept.get(name, {}).items() if physical else ():
            expected = expected.index_select(dim, torch.from_numpy(keep))
        if rewind == "weights" or name.endswith("weight"):
            assert torch.equal(now, expected) == (rewind == "weights"), name
    assert not optimizer.state


def test_what_cannot_be_rewound_is_refused() -> None:
    """Wrong words, checkpoints of other models, and epochs that nobody counts are clear errors."""
    model, x, batches = network()
    state = model.state_dict()

    def pruner(**options: Any) -> LotteryTicketPruner:
        return LotteryTicketPruner(model, EVERYTHING, "l1", 2, example_inputs=x, **options)

    data: dict[str, Any] = {"data": batches, "loss": F.cross_entropy, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    refused: list[tuple[dict[str, Any], str]] = [
        ({"rewind": "all"}, "rewind is 'all'"),
        ({"reset_weight": False}, "Write rewind='weights', or rewind='nothing'"),
        ({"checkpoint": {"a": torch.ones(1)}}, r"'0.weight' is missing in the checkpoint of LotteryTicketPruner, but \(8, 1, 3, 3\)"),
        ({"checkpoint": {**state, "0.bias": torch.ones(3)}}, r"'0.bias' is \(3,\) in the checkpoint"),
        ({"checkpoint": state, "rewind": "nothing"}, "has a checkpoint and rewinds 'nothing'"),
        ({"checkpoint": state, "rewind_epoch": 1, **data}, "a checkpoint and a rewind_epoch"),
        ({"rewind_epoch": 1}, "sees no epochs"),
        ({"rewind_epoch": 2, "training_epochs": 2, **data}, "is to rewind to epoch 2 of 2"),
    ]
    for options, words in refused:
        with pytest.raises(gp.ConfigError, match=words):
            pruner(**options)
