"""Network Slimming: the scales are those of training with the L1 penalty, and the channels with the smallest ones go."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import graphprune as gp
from graphprune.pruners.slim import SlimPruner
from tests.support.handmade import residual
from tests.support.operators import Network
from tests.support.untouched import changes, snapshot

LR, MOMENTUM, SCALE = 0.05, 0.9, 0.03
ALL = [{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}]


def chain(seed: int = 0) -> nn.Sequential:
    """Returns three convolutions with batch norms of 5, 4 and 6 channels, and a classifier, in float64."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 5), (5, 4), (4, 6)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for norm in (layer for layer in layers if isinstance(layer, nn.BatchNorm2d)):
            norm.weight.uniform_(0.2, 1.0)[::2] *= -1
            norm.bias.normal_()
    return model


def batches(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Returns batches of four images with their classes."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(count, 4, 3, 6, 6, generator=generator, dtype=torch.float64)
    return [(x, torch.randint(0, 3, (4,), generator=generator)) for x in images]


def train(model: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
    """One epoch, as users write it."""
    for inputs, target in batches():
        optimizer.zero_grad()
        criterion(model(inputs), target).backward()
        optimizer.step()


def sgd(model: nn.Module) -> torch.optim.SGD:
    """Returns SGD with momentum over all parameters."""
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def by_hand(model: nn.Module, epochs: int, penalised: Iterable[str]) -> dict[str, Tensor]:
    """Returns the parameters after momentum SGD in plain loops, with scale * sign(gamma) added gamma by gamma."""
    model = copy.deepcopy(model).train()
    named = dict(model.named_parameters())
    velocity = {name: torch.zeros_like(weight) for name, weight in named.items()}
    for _ in range(epochs):
        for inputs, target in batches():
            gradients = torch.autograd.grad(F.cross_entropy(model(inputs), target), list(named.values()))
            with torch.no_grad():
                for (name, weight), gradient in zip(named.items(), gradients, strict=True):
                    for i in range(len(gradient)) if name in penalised else ():
                        gradient[i] += SCALE if weight[i] > 0 else -SCALE if weight[i] < 0 else 0.0
                    velocity[name] = MOMENTUM * velocity[name] + gradient
                    weight.sub_(LR * velocity[name])
    return {name: weight.detach() for name, weight in named.items()}


def with_scales(model: nn.Module, scales: Mapping[str, Sequence[float]]) -> nn.Module:
    """Gives batch norms their scales."""
    with torch.no_grad():
        for name, values in scales.items():
            model.get_parameter(f"{name}.weight").copy_(torch.tensor(values))
    return model


def masks_of(model: nn.Module, config: Sequence[Mapping[str, Any]], inputs: object = None, **options: Any) -> gp.Masks:
    """Returns the masks that follow from the scales as they are."""
    inputs = batches()[0][0] if inputs is None else inputs
    return SlimPruner(model, config, training_epochs=0, example_inputs=inputs, **options).masks()


def compressed(pruner: SlimPruner) -> tuple[nn.Module, gp.Masks]:
    """Returns the masked model and the masks, which are those of groups."""
    masked, masks = pruner.compress()
    assert isinstance(masks, gp.Masks)
    return masked, masks


def gone(masks: gp.Masks) -> list[set[int]]:
    """Returns the channels that go, group by group."""
    return [set(np.flatnonzero(~masks[name]).tolist()) for name in masks]


# -- training ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selected", [["1", "4", "7"], ["4"]])
def test_scales_are_trained_with_the_l1_penalty(selected: list[str]) -> None:
    """After two epochs all weights equal those of a plain loop that adds scale * sign(gamma) of the selected norms alone."""
    model = chain()
    config = [{"sparsity": 0.5, "op_names": selected}]
    pruner = SlimPruner(model, config, train, sgd(model), F.cross_entropy, training_epochs=2, scale=SCALE)
    pruner.compress()
    expected = by_hand(model, 2, [f"{name}.weight" for name in selected])
    for name, weight in pruner.model.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-10, atol=1e-12, msg=name)
    free = by_hand(model, 2, [])
    assert all(expected[f"{name}.weight"].abs().sum() < free[f"{name}.weight"].abs().sum() - 0.05 for name in selected)


def test_the_masks_are_those_of_the_trained_scales() -> None:
    """What goes are the smallest |gamma| after training, in each norm or over all norms."""
    model = chain()
    for config, all_together in ((ALL, False), ([{"total_sparsity": 0.4, "op_types": ["BatchNorm2d"]}], True)):
        masked, masks = compressed(SlimPruner(model, config, train, sgd(model), F.cross_entropy, training_epochs=2, scale=SCALE))
        trained = by_hand(model, 2, ["1.weight", "4.weight", "7.weight"])
        scales = {name: trained[f"{name}.weight"].abs().numpy() for name in ("1", "4", "7")}
        everything = np.sort(np.concatenate(list(scales.values())))
        for name, kept in zip(scales, masks.values(), strict=True):
            ordered = np.sort(scales[name])
            limit = everything[6] if all_together else ordered[(len(ordered) + 1) // 2]
            assert kept.tolist() == (scales[name] >= limit).tolist()
            assert masked.get_parameter(f"{name}.weight")[torch.from_numpy(~kept)].abs().sum() == 0


def test_trainer_and_plain_data_give_the_same() -> None:
    """A loader and a loss train to the same scales and masks as the trainer that loops over them."""
    model = chain()
    one = SlimPruner(model, ALL, train, sgd(model), F.cross_entropy, training_epochs=2, scale=SCALE)
    two = SlimPruner(model, ALL, optimizer=sgd(model), data=batches(), loss=F.cross_entropy, training_epochs=2, scale=SCALE)
    assert gone(one.masks()) == gone(two.masks())
    assert not changes(dict(one.model.state_dict()), dict(two.model.state_dict()))


def test_the_users_model_and_optimizer_stay_as_they_are() -> None:
    """Neither making the pruner nor compressing changes a bit of the model, nor the optimizer's state."""
    model = chain()
    optimizer = sgd(model)
    train(model, optimizer, F.cross_entropy)
    model.eval()
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    pruner = SlimPruner(model, ALL, train, optimizer, F.cross_entropy)
    assert pruner.model is model
    pruner.compress()
    assert not changes({"model": before}, {"model": snapshot(model)})
    after = optimizer.state_dict()
    assert state["param_groups"] == after["param_groups"]
    assert not changes(state["state"], after["state"])
    assert pruner.model is not model
    assert not any(module.training for module in pruner.model.modules())


def test_it_trains_once() -> None:
    """Masks and compress, called again, neither train again nor give other masks."""
    model, epochs = chain(), []

    def counting(model: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
        epochs.append(1)
        train(model, optimizer, criterion)

    pruner = SlimPruner(model, ALL, counting, sgd(model), F.cross_entropy, training_epochs=2, example_inputs=batches()[0][0])
    first = pruner.masks()
    trained = pruner.model
    _, second = compressed(pruner)
    assert len(epochs) == 2
    assert pruner.model is trained
    assert gone(first) == gone(second)


def test_what_it_returns_can_be_made_smaller() -> None:
    """Speedup of the trained model and its masks is verified, and its outputs are those of the masked model."""
    model = chain()
    pruner = SlimPruner(model, ALL, train, sgd(model), F.cross_entropy, scale=SCALE)
    masked, masks = compressed(pruner)
    small, report = gp.speedup(pruner.model, masks)
    assert report.verified
    assert [small.get_parameter(f"{i}.weight").shape[0] for i in (0, 3, 6)] == [2, 2, 3]
    images = batches()[0][0]
    torch.testing.assert_close(small.eval()(images), masked.eval()(images), rtol=1e-10, atol=1e-12)


# -- masks ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("sparsity", "expected"), [(0.2, {0}), (0.6, {0, 1, 2})])
def test_the_smallest_magnitudes_go_whatever_their_sign(sign: float, sparsity: float, expected: set[int]) -> None:
    """Scales 0 to 4, and their negatives, lose channel 0 at 0.2 and channels 0, 1 and 2 at 0.6."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 3))
    with_scales(model, {"1": [sign * i for i in range(5)]})
    masks = masks_of(model, [{"sparsity": sparsity, "op_types": ["BatchNorm2d"]}], torch.randn(2, 3, 8, 8))
    assert gone(masks) == [expected]


def test_a_total_sparsity_is_one_threshold_for_raw_scales() -> None:
    """A total sparsity removes what lies below the quantile of |gamma| over all norms, although their sizes differ a thousandfold."""
    scales = {"1": [0.001, 0.002, 0.003, 0.004, 5.0], "4": [3.0, -0.0005, 4.0, -2.0], "7": [1.0, 6.0, -7.0, 0.5, 8.0, -0.0015]}
    model = with_scales(chain(), scales)
    masks = masks_of(model, [{"total_sparsity": 0.4, "op_types": ["BatchNorm2d"]}], rounding="ceil")
    everything = np.sort(np.abs(np.concatenate([np.array(v) for v in scales.values()])))
    threshold = everything[int(0.4 * len(everything))]
    assert gone(masks) == [{i for i, v in enumerate(values) if abs(v) < threshold} for values in scales.values()]
    assert gone(masks) == [{0, 1, 2, 3}, {1}, {5}]


def test_no_group_loses_everything_to_the_threshold() -> None:
    """A norm all of whose scales lie below the threshold keeps its largest, and the others make up for it."""
    scales = {"1": [0.001, 0.002, 0.005, 0.004, 0.003], "4": [1.0, 2.0, 3.0, 4.0], "7": [5.0, 6.0, 7.0, 8.0, 9.0, 10.0]}
    masks = masks_of(with_scales(chain(), scales), [{"total_sparsity": 0.4, "op_types": ["BatchNorm2d"]}], rounding="ceil")
    assert gone(masks) == [{0, 1, 3, 4}, {0, 1}, set()]


def test_default_is_every_norm_whose_channels_can_go() -> None:
    """The type "default" selects the same norms as naming their class; a norm before the output's is not among them."""
    torch.manual_seed(0)
    model = nn.Sequential(*chain(), nn.BatchNorm1d(3).double())
    pruner = SlimPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], training_epochs=0, example_inputs=batches()[0][0])
    assert list(pruner.config.layers) == ["1", "4", "7"]
    assert gone(pruner.masks()) == gone(masks_of(model, ALL))


def test_coupled_norms_are_averaged_and_the_least_demanding_decides() -> None:
    """Of a residual stream the mean of |gamma| over its norms ranks, the smallest sparsity holds, and one norm alone prunes nothing."""
    model, images = residual()
    stem, outer = [6.0, 1.0, 3.0, 4.0, -5.0, 6.0], [0.0, 3.0, 3.0, -4.0, 0.5, 4.0]
    with_scales(model, {"stem_norm": stem, "outer_norm": outer})
    means = [(abs(a) + abs(b)) / 2 for a, b in zip(stem, outer, strict=True)]
    smallest = set(sorted(range(6), key=means.__getitem__)[:2])
    config = [{"sparsity": 2 / 3, "op_names": ["stem_norm"]}, {"sparsity": 1 / 3, "op_names": ["outer_norm"]}]
    assert gone(masks_of(model, config, images)) == [smallest, set()]
    assert gone(masks_of(model, config[:1], images)) == [set(), set()]
    largest = [max(abs(a), abs(b)) for a, b in zip(stem, outer, strict=True)]
    by_largest = set(sorted(range(6), key=largest.__getitem__)[:2])
    assert gone(masks_of(model, config, images, aggregation="max")) == [by_largest, set()]
    assert by_largest != smallest


def test_coupled_and_single_norms_meet_one_threshold() -> None:
    """Under a total sparsity the mean of |gamma| over the norms of a coupled group is compared with |gamma| of a single norm."""
    model, images = residual()
    scales = {
        "stem_norm": [6.0, 1.0, 3.0, 4.0, -5.0, 6.0],
        "outer_norm": [0.0, 3.0, 3.0, -4.0, 0.5, 4.0],
        "inner_norm": [3.5, -2.5, 6.0, 7.0],
    }
    config = [{"total_sparsity": 0.3, "op_types": ["default"]}]
    assert gone(masks_of(with_scales(model, scales), config, images)) == [{1, 4}, {1}]


def test_a_scale_of_the_model_itself_is_selected_by_its_name() -> None:
    """Where batch_norm is called with a parameter of the model, the entry names the parameter."""
    torch.manual_seed(0)

    def run(net: Any, x: Tensor) -> Any:
        return net.last(F.batch_norm(net.first(x), net.mean, net.var, net.gamma, net.beta))

    parts: dict[str, nn.Module | Tensor] = {
        "first": nn.Conv2d(3, 4, 1),
        "last": nn.Conv2d(4, 2, 1),
        "gamma": nn.Parameter(torch.tensor([4.0, 1.0, 3.0, 2.0])),
    }
    model = Network(run, {**parts, "beta": nn.Parameter(torch.zeros(4)), "mean": torch.zeros(4), "var": torch.ones(4)})
    masks = masks_of(model, [{"sparsity": 0.5, "op_names": ["gamma"]}], torch.randn(2, 3, 4, 4))
    assert gone(masks) == [{1, 3}]


# -- refusals ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"training_steps": 10}, "SlimPruner has no argument training_steps=.*training_epochs="),
        ({"training_batches": 10}, "no argument training_batches=.*training_epochs="),
        ({"sparsifying_training_epochs": 10}, "training_epochs="),
        ({"regular_scale": 1.0}, "scale="),
        ({"mode": "normal"}, "no mode 'normal'.*total_sparsity"),
        ({"evaluator": object()}, "no argument evaluator=.*trainer="),
        ({"training_epochs": -1}, "training_epochs is -1.*at least 0"),
        ({"training_epochs": 1.5}, r"training_epochs is 1\.5"),
        ({"scale": -1e-4}, r"scale is -0\.0001"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"optimizer": None}, "SlimPruner trains, and has no optimizer"),
        ({"trainer": None}, "neither a trainer nor data"),
        ({"config_list": [{"sparsity": 0.5, "rho": 1e-3}]}, "'rho', which only ADMMPruner understands"),
        ({"config_list": [{"sparsity": 0.5, "op_types": ["Conv2d"]}]}, "'Conv2d', but .* scale no channels of their own.*BatchNorm2d"),
    ],
)
def test_unusable_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    """Each raises a ConfigError that says what to write instead."""
    model = chain()
    given = {"config_list": ALL, "trainer": train, "optimizer": sgd(model), "criterion": F.cross_entropy, **arguments}
    with pytest.raises(gp.ConfigError, match=words):
        SlimPruner(model, **given)


def test_a_model_without_batch_norm_is_refused() -> None:
    """Where no batch norm scales channels that can go, the error says which pruners to use."""
    with pytest.raises(gp.ConfigError, match=r"finds no batch norm in Sequential.*L1NormPruner"):
        SlimPruner(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), ALL, training_epochs=0, example_inputs=torch.randn(2, 3))
