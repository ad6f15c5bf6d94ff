"""ADMM: the three updates are those of the paper, they converge where the answer is known, and the masks are what the projection kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import graphprune as gp
from graphprune.masks.elements import ElementMasks
from graphprune.pruners.admm import ADMMPruner
from tests.support.handmade import residual
from tests.support.untouched import changes, same_bits, snapshot

LR = 0.05
RHO = {"0": 0.3, "2": 0.7}
CONFIG = [{"sparsity": 0.6, "op_names": ["0"], "rho": 0.3}, {"sparsity": 0.5, "op_names": ["2"], "rho": 0.7}]


def perceptron() -> nn.Sequential:
    """Returns two linear layers in float64."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    """Returns three batches of a regression."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(3, 8, 4, generator=generator, dtype=torch.float64)
    targets = torch.randn(3, 8, 3, generator=generator, dtype=torch.float64)
    return list(zip(inputs, targets, strict=True))


def train(model: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
    """One epoch, as users write it."""
    for inputs, target in batches():
        optimizer.zero_grad()
        criterion(model(inputs), target).backward()
        optimizer.step()


def sgd(model: nn.Module, lr: float = LR) -> torch.optim.SGD:
    """Returns plain gradient descent."""
    return torch.optim.SGD(model.parameters(), lr=lr)


def largest(values: Tensor, count: int) -> Tensor:
    """Returns which `count` values have the largest magnitudes, by sorting a list; of equal ones the first."""
    flat = values.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))[:count]
    return torch.tensor([i in order for i in range(len(flat))]).reshape(values.shape)


State = dict[str, Tensor]


def by_hand(model: nn.Module, iterations: int, epochs: int) -> tuple[State, State, State, list[tuple[float, float]]]:
    """Returns W, Z, U and the residuals after the three updates in plain loops, starting from Z = W and U = 0."""
    model = copy.deepcopy(model)
    w = dict(model.named_parameters())
    names = {"0.weight": 6 * 4 - math.floor(6 * 4 * 0.6), "2.weight": 3 * 6 - math.floor(3 * 6 * 0.5)}
    rho = {name: RHO[name[0]] for name in names}
    z = {name: w[name].detach().clone() for name in names}
    u = {name: torch.zeros_like(z[name]) for name in names}
    residuals = []
    for _ in range(iterations):
        for inputs, target in batches() * epochs:
            gradients = torch.autograd.grad(F.mse_loss(model(inputs), target), list(w.values()))
            with torch.no_grad():
                for (name, weight), gradient in zip(w.items(), gradients, strict=True):
                    pull = rho[name] * (weight - z[name] + u[name]) if name in names else 0.0
                    weight.sub_(LR * (gradient + pull))
        before = z
        z = {n: torch.where(largest(w[n].detach() + u[n], names[n]), w[n].detach() + u[n], 0.0) for n in names}
        u = {n: u[n] + w[n].detach() - z[n] for n in names}
        size = math.sqrt(sum(v * v for n in names for v in w[n].flatten().tolist()))
        primal = math.sqrt(sum(v * v for n in names for v in (w[n] - z[n]).flatten().tolist()))
        dual = math.sqrt(sum((rho[n] * v) ** 2 for n in names for v in (z[n] - before[n]).flatten().tolist()))
        residuals.append((primal / size, dual / size))
    return {n: t.detach() for n, t in w.items()}, z, u, residuals


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Asserts that tensors of the same names are equal up to rounding."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-10, atol=1e-12, msg=name)


# -- single weights ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("iterations", "epochs"), [(1, 1), (6, 2)])
def test_the_updates_are_those_of_the_paper(iterations: int, epochs: int) -> None:
    """W, Z, U and both residuals of every iteration equal a plain-loop ADMM with a rho per entry, and the masks are the support of Z."""
    model = perceptron()
    pruner = ADMMPruner(model, CONFIG, train, sgd(model), F.mse_loss, iterations=iterations, training_epochs=epochs)
    masked, masks = pruner.compress()
    w, z, u, residuals = by_hand(model, iterations, epochs)
    assert_equal({name: weight.detach() for name, weight in pruner.model.named_parameters()}, w)
    assert_equal(pruner.projected, z)
    assert_equal(pruner.running, u)
    assert [c.iteration for c in pruner.history] == list(range(1, iterations + 1))
    np.testing.assert_allclose([(c.primal, c.dual) for c in pruner.history], residuals, rtol=1e-9)
    assert isinstance(masks, ElementMasks)
    for name, projected in z.items():
        assert masks[name].tolist() == (projected != 0).tolist()
        assert same_bits(masked.get_parameter(name).detach(), torch.where(masks[name], pruner.model.get_parameter(name).detach(), 0.0))
    assert [int(masks[name].sum()) for name in ("0.weight", "2.weight")] == [24 - 14, 18 - 9]


def test_the_penalty_is_nothing_at_the_start() -> None:
    """Where W = Z and U = 0 its gradient is exactly 0: a loss that moves nothing leaves every weight as it was, bit for bit."""
    model = perceptron()

    def still(model: nn.Module, optimizer: Optimizer, _: Any) -> None:
        optimizer.zero_grad()
        (model(batches()[0][0]).sum() * 0).backward()
        optimizer.step()

    pruner = ADMMPruner(model, [{"sparsity": 0.5, "rho": 100.0}], still, sgd(model), None, iterations=1, training_epochs=3)
    pruner.compress()
    for name, weight in model.named_parameters():
        assert same_bits(pruner.model.get_parameter(name).detach(), weight.detach())


def test_the_projection_is_no_alias_of_the_weights() -> None:
    """In the first iteration already, weights are pulled back to where they began: two steps of constant gradient, written out."""
    model = nn.Linear(3, 1, bias=False).double()
    start = model.weight.detach().clone()

    def push(model: nn.Module, optimizer: Optimizer, _: Any) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(1, 3, dtype=torch.float64)).sum().backward()
            optimizer.step()

    pruner = ADMMPruner(model, [{"sparsity": 0.3, "rho": 2.0}], push, sgd(model), None, iterations=1, training_epochs=1)
    pruner.masks()
    first = start - LR
    second = first - LR * (1 + 2.0 * (first - start))
    torch.testing.assert_close(pruner.model.get_parameter("weight").detach(), second, rtol=0, atol=1e-15)


def test_it_converges_to_the_best_sparse_weights() -> None:
    """Least squares with orthonormal inputs: the optimum keeps the largest entries of the answer, and both residuals vanish."""
    torch.manual_seed(0)
    inputs = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    answer = torch.randn(5, 12, dtype=torch.float64)
    model = nn.Linear(12, 5, bias=False).double()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (output - target).pow(2).sum()

    pruner = ADMMPruner(
        model,
        [{"sparsity": 0.75, "rho": 1.0}],
        optimizer=sgd(model, 0.4),
        data=[(inputs, inputs @ answer.T)],
        loss=loss,
        iterations=30,
        training_epochs=8,
    )
    masked, masks = pruner.compress()
    kept = largest(answer, 15)
    assert masks["weight"].tolist() == kept.tolist()
    assert pruner.history[0].primal > 0.1
    assert pruner.history[-1].primal < 1e-2
    assert pruner.history[-1].dual < 1e-2
    torch.testing.assert_close(masked.get_parameter("weight").detach(), torch.where(kept, answer, 0.0), rtol=0, atol=1e-3)


def test_pruning_after_it_costs_less_than_pruning_at_once() -> None:
    """After as many epochs without a penalty, masking the smallest weights raises the loss three times as much, to above ADMM's."""
    model = perceptron()
    config = [{"sparsity": 0.6, "rho": 0.3}]
    pruner = ADMMPruner(model, config, train, sgd(model), F.mse_loss, iterations=20, training_epochs=5)
    masked, _ = pruner.compress()
    plain = copy.deepcopy(model)
    for _ in range(100):
        train(plain, sgd(plain), F.mse_loss)
    config[0].pop("rho")
    level, _ = gp.LevelPruner(plain, config).compress()
    nets = {"trained": pruner.model, "masked": masked, "plain": plain, "level": level}
    losses = {name: sum(F.mse_loss(net(x), y).item() for x, y in batches()) for name, net in nets.items()}
    assert losses["masked"] < losses["level"]
    assert 3 * (losses["masked"] - losses["trained"]) < losses["level"] - losses["plain"]


def test_the_users_model_and_optimizer_stay_as_they_are() -> None:
    """Neither making the pruner nor compressing changes a bit of the model or of its optimizer's state; it trains once."""
    model = perceptron().eval()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, F.mse_loss)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    pruner = ADMMPruner(model, CONFIG, train, optimizer, F.mse_loss, iterations=2, training_epochs=1)
    assert pruner.history == ()
    masks = pruner.masks()
    assert pruner.compress()[1] is masks
    assert len(pruner.history) == 2
    assert not changes({"model": before}, {"model": snapshot(model)})
    assert state["param_groups"] == optimizer.state_dict()["param_groups"]
    for number, values in state["state"].items():
        assert not changes(values, optimizer.state_dict()["state"][number])
    assert not any(module.training for module in pruner.model.modules())


# -- channels ------------------------------------------------------------------------------------------------------------------------


def image_batches() -> list[tuple[Tensor, Tensor]]:
    """Returns two batches of images with their classes."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 4, 3, 4, 4, generator=generator, dtype=torch.float64)
    return [(x, torch.randint(0, 5, (4,), generator=generator)) for x in images]


def coarse(model: nn.Module, config: Sequence[Mapping[str, Any]], iterations: int = 4, **options: Any) -> ADMMPruner:
    """Returns a pruner of channels that trains on images."""
    options |= {"data": image_batches(), "loss": F.cross_entropy, "optimizer": sgd(model), "granularity": "coarse-grained"}
    return ADMMPruner(model, config, iterations=iterations, training_epochs=2, **options)


def channels(pruner: ADMMPruner) -> gp.Masks:
    """Returns the masks, which are those of groups."""
    masks = pruner.masks()
    assert isinstance(masks, gp.Masks)
    return masks


def channel_norms(tensors: Mapping[str, Tensor], names: Sequence[str]) -> list[float]:
    """Returns the L2 norm of each output channel over several weights together, in plain loops."""
    return [math.sqrt(sum(v * v for name in names for v in tensors[name][i].flatten().tolist())) for i in range(len(tensors[names[0]]))]


@pytest.mark.parametrize(("config", "counts"), [([{"sparsity": 0.5}], (3, 2)), ([{"total_sparsity": 0.5}], None)])
def test_channels_are_projected_by_their_joint_norm(config: list[dict[str, Any]], counts: tuple[int, int] | None) -> None:
    """Z keeps the channels with the largest L2 norm of W + U over all layers that produce them, zero elsewhere, and U = W + U - Z."""
    model, images = residual()
    config[0]["rho"] = 0.5
    pruner = coarse(model, config, example_inputs=images)
    masks = channels(pruner)
    target = {name: pruner.projected[name] + pruner.running[name] for name in pruner.projected}
    assert set(target) == {"stem.weight", "outer.weight", "inner.weight"}
    norms = [channel_norms(target, ["stem.weight", "outer.weight"]), channel_norms(target, ["inner.weight"])]
    if counts is None:
        expected = [[norm >= sorted(norms[0] + norms[1])[5] for norm in group] for group in norms]
    else:
        expected = [[norm >= sorted(group, reverse=True)[k - 1] for norm in group] for group, k in zip(norms, counts, strict=True)]
    assert [kept.tolist() for kept in masks.values()] == expected
    for name, projected in pruner.projected.items():
        kept = torch.tensor(expected[1] if name.startswith("inner") else expected[0])
        assert same_bits(projected[kept], target[name][kept])
        assert not projected[~kept].any()


def test_channels_of_different_groups_compare_by_their_raw_l2_norm() -> None:
    """A total sparsity takes what is nearest in the Euclidean sense, spread weights before as large a sum in one place."""
    model, _ = residual()
    with torch.no_grad():
        for name in ("stem.weight", "outer.weight", "inner.weight"):
            model.get_parameter(name).zero_()
        model.stem.weight[:3] = 0.1  # an L1 norm of 2.7, an L2 norm of 0.52
        model.stem.weight[3:, 0, 0, 0] = 1.0
        model.inner.weight[:, 0, 0, 0] = torch.tensor([30.0, 0.55, 2.0, -0.56])
    options: dict[str, Any] = {"data": image_batches(), "loss": F.cross_entropy, "granularity": "coarse-grained"}
    pruner = ADMMPruner(model, [{"total_sparsity": 0.5}], optimizer=sgd(model, 0.0), iterations=1, training_epochs=1, **options)
    assert [np.flatnonzero(~kept).tolist() for kept in channels(pruner).values()] == [[0, 1, 2], [1, 3]]
    assert pruner.projected["inner.weight"].count_nonzero() == 2


def test_the_updates_of_channels_are_those_of_the_paper() -> None:
    """W, Z and U of a residual network equal a plain-loop ADMM whose projection zeroes the weakest channels of each coupled group."""
    model, images = residual()
    pruner = coarse(model, [{"sparsity": 0.5, "rho": 0.5}], example_inputs=images)
    pruner.compress()
    reference = copy.deepcopy(model).train()
    w = dict(reference.named_parameters())
    groups = [["stem.weight", "outer.weight"], ["inner.weight"]]
    z = {name: w[name].detach().clone() for group in groups for name in group}
    u = {name: torch.zeros_like(value) for name, value in z.items()}
    for _ in range(4):
        for inputs, target in image_batches() * 2:
            gradients = torch.autograd.grad(F.cross_entropy(reference(inputs), target), list(w.values()))
            with torch.no_grad():
                for (name, weight), gradient in zip(w.items(), gradients, strict=True):
                    weight.sub_(LR * (gradient + (0.5 * (weight - z[name] + u[name]) if name in z else 0.0)))
        v = {name: w[name].detach() + u[name] for name in z}
        for group in groups:
            norms = channel_norms(v, group)
            weakest = sorted(range(len(norms)), key=norms.__getitem__)[: len(norms) // 2]
            for name in group:
                z[name] = v[name].clone()
                z[name][weakest] = 0.0
                u[name] = v[name] - z[name]
    assert_equal({name: weight.detach() for name, weight in pruner.model.named_parameters()}, {n: t.detach() for n, t in w.items()})
    assert_equal(pruner.projected, z)
    assert_equal(pruner.running, u)


def test_pruned_channels_can_be_removed() -> None:
    """Speedup of the trained model and its masks is verified, and the channels that go are those that the projection zeroed."""
    model, images = residual()
    before = snapshot(model)
    pruner = coarse(model, [{"sparsity": 0.5, "rho": 0.5}], iterations=2, example_inputs=images)
    masked, _ = pruner.compress()
    small, report = gp.speedup(pruner.model, channels(pruner), plan=pruner.plan)
    assert report.verified
    assert [small.get_parameter(f"{name}.weight").shape[0] for name in ("stem", "inner")] == [3, 2]
    torch.testing.assert_close(small.eval()(images), masked.eval()(images), rtol=1e-10, atol=1e-12)
    assert set(pruner.plan.requested.values()) == {0.5}
    assert not changes({"model": before}, {"model": snapshot(model)})


def test_coupled_layers_that_are_not_all_selected_stay_whole() -> None:
    """A group one of whose layers is not selected is neither penalised nor pruned."""
    model, images = residual()
    pruner = coarse(model, [{"sparsity": 0.5, "op_names": ["stem", "inner"]}], iterations=1, example_inputs=images)
    masks = channels(pruner)
    assert set(pruner.projected) == {"inner.weight"}
    assert [int((~kept).sum()) for kept in masks.values()] == [0, 2]


# -- refusals ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"training_batches": 20}, "ADMMPruner has no argument training_batches=.*iterations=.*training_epochs="),
        ({"training_steps": 20}, "iterations=.*training_epochs="),
        ({"num_iterations": 30}, "Write iterations="),
        ({"epochs_per_iteration": 5}, "Write training_epochs="),
        ({"row": 1e-4}, "'rho' in the entries"),
        ({"base_algo": "l1"}, "granularity="),
        ({"round_to": 8}, "single weights.*no argument round_to=.*'coarse-grained'"),
        ({"training_epoch": 5}, "no argument training_epoch="),
        ({"granularity": "fine"}, "granularity is 'fine'.*'coarse-grained'"),
        ({"granularity": "coarse-grained", "aggregation": "max"}, "no choice of aggregation="),
        ({"granularity": "coarse-grained", "mode": "normal"}, "no mode 'normal'"),
        ({"iterations": 0}, "iterations is 0.*at least 1"),
        ({"training_epochs": 0}, "training_epochs is 0.*at least 1"),
        ({"optimizer": None}, "ADMMPruner trains, and has no optimizer"),
        ({"config_list": [{"sparsity": 0.5, "rho": 0}]}, r"config_list\[0\]\['rho'\] is 0, not above 0"),
        ({"config_list": [{"sparsity": 0.5, "rho": math.inf}]}, "not above 0 and finite"),
        ({"config_list": [{"sparsity": 0.5, "rho": "high"}]}, "not a number"),
        ({"config_list": [{"sparsity": 0.5}, {"exclude": True, "rho": 1.0, "op_names": ["0"]}]}, "excludes layers and gives rho"),
        ({"config_list": [{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}]}, "BatchNorm2d"),
        ({"config_list": []}, "empty"),
    ],
)
def test_unusable_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    """Each raises a ConfigError that says what to write instead."""
    model = perceptron()
    given = {"config_list": CONFIG, "trainer": train, "optimizer": sgd(model), "criterion": F.mse_loss, **arguments}
    with pytest.raises(gp.ConfigError, match=words):
        ADMMPruner(model, **given)


def test_rho_is_refused_by_pruners_without_it() -> None:
    """A config entry with a rho, given to another pruner, raises an error that names the pruner which understands it."""
    with pytest.raises(gp.ConfigError, match="'rho', which only ADMMPruner understands"):
        gp.L1NormPruner(perceptron(), CONFIG, example_inputs=batches()[0][0])


def test_training_that_diverges_is_an_error() -> None:
    """Weights that are no longer finite are named; no mask is made of them."""
    model = perceptron()
    with pytest.raises(gp.InputError, match=r"training of ADMMPruner diverged: '0\.weight' is not finite"):
        ADMMPruner(model, CONFIG, train, sgd(model, 1e200), F.mse_loss).masks()
