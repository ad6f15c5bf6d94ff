"""Optimizers and averages that follow a model through a speedup train on as if the removed channels had been masked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import graphprune as gp
from graphprune.training.optimizers import slice_average, slice_optimizer

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-2, amsgrad=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3, momentum=0.5, centered=True),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-2),
}


class Net(nn.Module):
    """A residual pair of convolutions with batch norm, a tied pair of linear layers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.hidden = nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Images (n, 1, 6, 6) to logits (n, 3)."""
        y = F.relu(self.norm(self.stem(x)))
        y = F.relu(y + self.inner(y)).mean((2, 3))
        out: Tensor = self.head(F.relu(self.hidden(y)))
        return out


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Returns two groups of parameters, the second with another learning rate."""
    named = list(model.named_parameters())
    return [{"params": [p for n, p in named if "head" not in n]}, {"params": [p for n, p in named if "head" in n], "lr": 0.02}]


def _network() -> tuple[Net, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(40, 1, 6, 6, dtype=torch.float64), torch.randint(0, 3, (40,))
    return Net().double(), x, y


def _masks(model: nn.Module, x: Tensor) -> gp.Masks:
    graph = gp.trace(model, x[:1])
    chance = np.random.default_rng(1)
    kept = {g.name: np.isin(np.arange(g.channels), chance.permutation(g.channels)[: g.channels // 2]) for g in graph.groups}
    assert len(kept) == 2
    return gp.Masks(graph, kept)


def _gone(model: nn.Module, masks: gp.Masks) -> dict[str, Tensor]:
    """Returns parameter name -> True where masked, by zeroing a model of ones."""
    ones = copy.deepcopy(model)
    for parameter in ones.parameters():
        parameter.data.fill_(1.0)
    masks.apply(ones)
    return {name: parameter == 0 for name, parameter in ones.named_parameters()}


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int, gone: dict[str, Tensor]) -> None:
    """Trains on batches of ten; what is gone has its gradients and its state zeroed."""
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x[10 * (step % 4) :][:10]), y[10 * (step % 4) :][:10]).backward()
        for name, parameter in model.named_parameters():
            if name in gone and parameter.grad is not None:
                parameter.grad[gone[name]] = 0
        optimizer.step()
        for name, parameter in model.named_parameters():
            if name in gone:
                parameter.data[gone[name]] = 0


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("result", ["module", "graph"])
def test_training_goes_on_as_if_masked(kind: str, inplace: bool, result: Any) -> None:
    """Weights after 5 + 8 steps equal those of the network whose masked weights, momentum and gradients stay zero."""
    if inplace and result == "graph":
        return
    model, x, y = _network()
    optimizer = OPTIMIZERS[kind](_groups(model))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    _train(model, optimizer, x, y, 5, {})
    masks = _masks(model, x)
    gone = _gone(model, masks)
    other = copy.deepcopy(model)
    memo = OPTIMIZERS[kind](_groups(other))
    memo.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    masks.apply(other)
    for name, parameter in other.named_parameters():
        for value in memo.state[parameter].values():
            if value.shape == parameter.shape:
                value[gone[name]] = 0

    small, report = gp.speedup(model, masks, inplace=inplace, result=result)
    assert report.kind == result
    slice_optimizer(optimizer, model, small, masks)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] / 2 for group in memo.param_groups]
    for group in memo.param_groups:
        group["lr"] /= 2
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in small.parameters() if p.requires_grad)
    small.train()
    _train(small, optimizer, x, y, 8, {})
    _train(other, memo, x, y, 8, gone)

    positions = masks.positions()
    for name, parameter in small.named_parameters():
        expected = dict(other.named_parameters())[name].detach()
        for dim, keep in positions.get(name, {}).items():
            expected = expected.index_select(dim, torch.from_numpy(keep))
        assert torch.allclose(parameter, expected, rtol=1e-9, atol=1e-12), name
        assert not torch.equal(parameter, torch.zeros_like(parameter)), name


def test_gradients_are_carried_along() -> None:
    """A speedup between backward and step loses no gradient."""
    model, x, y = _network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = _masks(model, x)
    F.cross_entropy(model(x), y).backward()
    small, _ = gp.speedup(model, masks)
    slice_optimizer(optimizer, model, small, masks)
    expected = dict(model.named_parameters())
    for name, parameter in small.named_parameters():
        gradient = expected[name].grad
        assert gradient is not None
        for dim, keep in masks.positions().get(name, {}).items():
            gradient = gradient.index_select(dim, torch.from_numpy(keep))
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)


def test_tied_parameters_factored_states_and_strangers() -> None:
    """A tied weight follows once, a factored second moment in its long dimension, and parameters of other modules stay."""
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.out = nn.Linear(4, 8, bias=False), nn.Linear(4, 8, bias=False), nn.Linear(8, 2)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(F.relu(self.a(x)) + self.b(x).tanh())
            return out

    model, extra, x = Tied(), nn.Parameter(torch.ones(3)), torch.randn(5, 4)
    optimizer = torch.optim.Adafactor([*model.parameters(), extra], lr=1e-2)
    (model(x).square().sum() + extra.sum()).backward()
    optimizer.step()
    masks = gp.Masks(gp.trace(model, x), {"a": np.arange(8) % 2 == 0})
    small, _ = gp.speedup(model, masks)
    old = optimizer.state[model.a.weight]
    rows, columns = old["row_var"].clone(), old["col_var"].clone()
    stranger = optimizer.state[extra]
    slice_optimizer(optimizer, model, small, masks)
    weight = dict(small.named_parameters())["a.weight"]
    state = optimizer.state[weight]
    assert torch.equal(state["row_var"], rows[::2])
    assert torch.equal(state["col_var"], columns)
    assert optimizer.state[extra] is stranger
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [*(id(p) for p in small.parameters()), id(extra)]


def test_averages_are_cut_like_the_weights() -> None:
    """A dict, a module and an AveragedModel keep the same positions, and averaging goes on as over the masked network."""
    model, x, y = _network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        _train(model, optimizer, x, y, 1, {})
        average.update_parameters(model)
    masks = _masks(model, x)
    small, _ = gp.speedup(model, masks)
    before = copy.deepcopy(average.state_dict())
    shadow = {name: value.clone() for name, value in average.module.state_dict().items()}
    cut = slice_average(average, small, masks)
    assert all(torch.equal(value, before[name]) for name, value in average.state_dict().items())
    assert isinstance(cut, AveragedModel)
    assert int(cut.n_averaged) == 3
    by_name, as_module = slice_average(shadow, small, masks), slice_average(average.module, small, masks)
    positions = masks.positions()
    for name, value in cut.module.state_dict().items():
        expected = shadow[name]
        for dim, keep in positions.get(name, {}).items():
            expected = expected.index_select(dim, torch.from_numpy(keep))
        assert torch.equal(value, expected), name
        assert torch.equal(by_name[name], expected), name
        assert torch.equal(as_module.state_dict()[name], expected), name
    cut.update_parameters(small)
    weight = cut.module.state_dict()["hidden.weight"]
    assert torch.allclose(weight, 0.9 * by_name["hidden.weight"] + 0.1 * small.state_dict()["hidden.weight"], atol=1e-12)
    assert torch.equal(shadow["hidden.weight"], average.module.state_dict()["hidden.weight"])


def test_what_cannot_follow_is_refused() -> None:
    """Strange optimizers, states, masks and averages are clear errors, and leave the optimizer as it was."""
    model, x, y = _network()
    masks = _masks(model, x)
    small, _ = gp.speedup(model, masks)
    with pytest.raises(gp.ConfigError, match="SGD holds no parameter of the Net"):
        slice_optimizer(torch.optim.SGD(Net().parameters(), lr=0.1), model, small, masks)
    with pytest.raises(gp.ConfigError, match="LBFGS remembers whole steps"):
        slice_optimizer(torch.optim.LBFGS(model.parameters()), model, small, masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    _train(model, optimizer, x, y, 1, {})
    with pytest.raises(gp.MaskError, match=r"'stem.weight' is \(8, 1, 3, 3\) in the shrunk model, but \(4, 1, 3, 3\) by the masks"):
        slice_optimizer(optimizer, model, copy.deepcopy(model), masks)
    optimizer.state[model.inner.weight]["odd"] = torch.ones(5)
    with pytest.raises(gp.ConfigError, match=r"state 'odd' of 'inner.weight' is of shape"):
        slice_optimizer(optimizer, model, small, masks)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    with pytest.raises(gp.MaskError, match=r"no tensor 'heed.weight'; did you mean 'head.weight'"):
        slice_average({"heed.weight": torch.ones(3, 6)}, small, masks)
    with pytest.raises(gp.MaskError, match=r"average of 'head.weight' is \(3, 3\), but \(3, 6\)"):
        slice_average({"head.weight": torch.ones(3, 3)}, small, masks)
