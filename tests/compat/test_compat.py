"""The former names prune as today's do, and what is masked in place stays masked while the user trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import graphprune as gp
from graphprune import compat
from graphprune.schedules.functions import agp
from tests.support.handmade import Residual, residual
from tests.support.noise import trainer
from tests.support.operators import Network
from tests.support.untouched import changes, snapshot

CONVS = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
DEFAULT = [{"sparsity": 0.5, "op_types": "default"}]
AGP = [{"initial_sparsity": 0.1, "final_sparsity": 0.8, "start_epoch": 2, "end_epoch": 8, "frequency": 2, "op_types": "default"}]


def training(model: nn.Module, momentum: float = 0.9) -> tuple[Any, Any, Any]:
    """Returns an optimizer, the trainer and a criterion, in the order of the first version."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=momentum, weight_decay=0.01), trainer, nn.CrossEntropyLoss()


def same(one: gp.Masks | gp.ElementMasks, two: gp.Masks | gp.ElementMasks) -> bool:
    """Returns whether two masks are equal."""
    return one.keys() == two.keys() and all(torch.equal(torch.as_tensor(one[name]), torch.as_tensor(two[name])) for name in one)


def masks_of(pruner: Any) -> Any:
    """Returns the masks that a pruner makes."""
    return pruner.compress()[1]


def zeros(model: nn.Module, masks: gp.ElementMasks) -> bool:
    """Returns whether all that the masks remove is zero."""
    return not any(bool(model.get_parameter(name)[~mask].any()) for name, mask in masks.items())


# -- filter pruners ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["L1", "L2", "FPGM"])
def test_norm_pruners_are_those_of_today(name: str) -> None:
    """With a dummy input coupled groups are pruned, with dependency_aware=False single layers, as today's pruners do."""
    model, inputs = residual()
    former = getattr(compat, f"{name}FilterPruner" if name != "FPGM" else "FPGMPruner")
    today = getattr(gp, f"{name}NormPruner" if name != "FPGM" else "FPGMPruner")
    before = snapshot(model)
    groups = masks_of(former(model, CONVS, True, inputs))
    assert isinstance(groups, gp.Masks)
    assert same(groups, masks_of(today(model, CONVS, inputs)))
    assert same(groups, masks_of(former(model, CONVS, dummy_input=inputs)))
    layers = masks_of(former(model, CONVS, False, inputs))
    assert isinstance(layers, gp.ElementMasks)
    assert same(layers, masks_of(today(model, CONVS, inputs, mode="normal")))
    assert same(layers, masks_of(former(model, CONVS, False)))
    assert changes(before, snapshot(model)) == []
    with pytest.raises(gp.ConfigError, match=r"is given dependency_aware=True and no dummy_input.*Pass dummy_input="):
        former(model, CONVS, dependency_aware=True)


@pytest.mark.parametrize("name", ["ActivationAPoZRank", "ActivationMeanRank", "TaylorFOWeight"])
def test_data_pruners_are_those_of_today(name: str) -> None:
    """With optimizer, trainer and criterion in the order of that time the masks are today's, and the model is left alone."""
    model, inputs = residual()
    former, today = getattr(compat, f"{name}FilterPruner"), getattr(gp, f"{name}Pruner")
    before = snapshot(model)
    optimizer, trains, criterion = training(model)
    for count, arguments in ((1, {}), (2, {"sparsifying_training_batches": 2}), (3, {"statistics_batch_num": 3})):
        expected = masks_of(today(model, CONVS, trains, optimizer, criterion, training_batches=count))
        pruner = former(model, CONVS, optimizer, trains, criterion, **arguments)
        assert same(masks_of(pruner), expected)
        assert pruner.source.limit == count
    data = [(inputs, torch.tensor([1, 2]))]
    expected = masks_of(today(model, CONVS, data=data, loss=criterion))
    assert same(masks_of(former(model, CONVS, data=data, loss=criterion)), expected)
    assert isinstance(masks_of(former(model, CONVS, data=data, loss=criterion, dependency_aware=False)), gp.ElementMasks)
    assert changes(before, snapshot(model)) == []
    with pytest.raises(gp.ConfigError, match=r"statistics_batch_num, which are the same.*Drop one"):
        former(model, CONVS, optimizer, trains, criterion, sparsifying_training_batches=1, statistics_batch_num=1)
    with pytest.raises(gp.ConfigError, match=f"{name}FilterPruner looks at data, and there is none"):
        former(model, CONVS)


def test_positional_arguments_of_that_time() -> None:
    """Behind the criterion come activation (of activations only), batches, dependency_aware, dummy_input and global_sort."""
    model, inputs = residual()
    three = training(model)
    config = [{"sparsity": 0.3, "op_types": ["Conv2d"]}]  # 4 + 2 of 6 + 4 channels stay by group, 7 in one ranking
    apoz = masks_of(compat.ActivationAPoZRankFilterPruner(model, CONVS, *three, "relu", 2, True, inputs))
    assert same(apoz, masks_of(gp.ActivationAPoZRankPruner(model, CONVS, three[1], three[0], three[2], 2, inputs)))
    taylor = masks_of(compat.TaylorFOWeightFilterPruner(model, config, *three, 2, True, inputs, True))
    expected = masks_of(gp.TaylorFOWeightPruner(model, config, three[1], three[0], three[2], 2, inputs, mode="global"))
    assert same(taylor, expected)
    assert same(masks_of(compat.TaylorFOWeightFilterPruner(model, config, *three, 2, global_sort=True)), expected)
    assert not same(masks_of(compat.TaylorFOWeightFilterPruner(model, config, *three, 2, True, inputs, False)), expected)
    with pytest.raises(gp.ConfigError, match=r"activation='gelu'.*the model's own nonlinearity.*Leave activation= out"):
        compat.ActivationMeanRankFilterPruner(model, CONVS, *three, activation="gelu")
    for arguments, options in (((*three, 2, False, inputs, True), {}), (three, {"global_sort": True, "dependency_aware": False})):
        with pytest.raises(gp.ConfigError, match="global_sort=True, which ranks coupled groups, and dependency_aware=False"):
            compat.TaylorFOWeightFilterPruner(model, CONVS, *arguments, **options)


# -- in place ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: compat.LevelPruner(DEFAULT), lambda: compat.SensitivityPruner(DEFAULT)])
def test_masked_weights_stay_zero_while_the_user_trains(make: Callable[[], Any]) -> None:
    """Momentum and weight decay move masked weights, and every forward pass sets them back; the others train on."""
    model, inputs = residual()
    pruner = make()
    assert pruner(model) is model
    masks = pruner.masks()
    assert 0 < masks.sparsity < 1
    assert zeros(model, masks)
    kept = {name: model.get_parameter(name)[mask].clone() for name, mask in masks.items()}
    optimizer, trains, criterion = training(model)
    trains(model, optimizer, criterion)
    assert not zeros(model, masks)  # the last step has moved them
    model(inputs)
    assert zeros(model, masks)
    trains(model, optimizer, criterion)
    finished, final = pruner.finish()
    assert finished is model
    assert same(final, masks)
    assert zeros(model, masks)
    assert all((model.get_parameter(name)[mask] != kept[name]).any() for name, mask in masks.items())
    trains(model, optimizer, criterion)
    model(inputs)
    assert not zeros(model, masks)
    assert not any(module._forward_pre_hooks for module in model.modules())  # noqa: SLF001 (nothing public lists hooks)


def test_level_chooses_as_today() -> None:
    """The masks are those of today's LevelPruner, of the weights at the time of the call."""
    model, _ = residual()
    expected = gp.LevelPruner(copy.deepcopy(model), DEFAULT).masks()
    pruner = compat.LevelPruner(DEFAULT)
    pruner(model)
    assert same(pruner.masks(), expected)


def test_layers_that_are_called_by_themselves_are_masked_too() -> None:
    """A training loop that calls parts of a model, or reads a weight within the model's forward pass, meets zeros."""
    model = Network(lambda m, x: functional.linear(x, m.a.weight), {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    pruner = compat.LevelPruner(DEFAULT)
    pruner(model)
    masks = pruner.masks()
    for name in ("a", "b"):
        layer = model.get_submodule(name)
        layer.get_parameter("weight").data.fill_(1.0)
        layer(torch.ones(1, 4))
        assert zeros(layer, gp.ElementMasks(layer, {"weight": masks[f"{name}.weight"]}))
    model.get_parameter("a.weight").data.fill_(1.0)
    assert torch.equal(model(torch.ones(1, 4)), masks["a.weight"].float().sum(1)[None])


def test_a_model_that_is_one_layer() -> None:
    """The model itself may be the layer that is masked."""
    model = nn.Linear(4, 2)
    pruner = compat.LevelPruner(DEFAULT)
    pruner(model)
    model.weight.data.fill_(1.0)
    model(torch.ones(1, 4))
    assert int((model.weight == 0).sum()) == 4


def test_two_forward_passes_before_one_backward_pass() -> None:
    """Masking writes past autograd, so losses of several forward passes can be added up."""
    model, inputs = residual()
    compat.LevelPruner(DEFAULT)(model)
    loss = model(inputs).sum() + model(inputs * 2).sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_copy_of_the_model_keeps_its_own_weights_masked() -> None:
    """A copy made during training has the masks of that time and does not touch the model that it was copied from."""
    model, inputs = residual()
    pruner = compat.LevelPruner(DEFAULT)
    pruner(model)
    twin = copy.deepcopy(model)
    for parameter in [*model.parameters(), *twin.parameters()]:
        parameter.data.fill_(1.0)
    twin(inputs)
    assert zeros(twin, pruner.masks())
    assert not zeros(model, pruner.masks())


def test_agp_follows_its_schedule() -> None:
    """Per epoch floor(n s) weights are masked, s by the cubic formula; masks grow and change only where the sparsity does."""
    model, _ = residual()
    optimizer, trains, criterion = training(model)
    pruner = compat.AGP_Pruner(AGP)
    pruner(model)
    before = pruner.masks()
    assert before.sparsity == 0
    for epoch in range(11):
        pruner.update_epoch(epoch)
        masks = pruner.masks()
        sparsity = agp(epoch, 2, 8, 0.1, 0.8, 2)
        assert [int((~mask).sum()) for mask in masks.values()] == [int(round(mask.numel() * sparsity, 9)) for mask in masks.values()]
        assert all(not (mask & ~before[name]).any() for name, mask in masks.items())
        assert (masks is before) == (epoch not in (2, 4, 6, 8))
        assert zeros(model, masks)
        before = masks
        trains(model, optimizer, criterion)
    assert pruner.finish()[1].sparsity == pytest.approx(0.8, abs=0.01)


def test_agp_entries_have_schedules_of_their_own() -> None:
    """Every layer follows the entry that selects it last; excluded layers lose nothing; what a schedule need not say has a default."""
    model, _ = residual()
    config: list[dict[str, Any]] = [
        {"final_sparsity": 0.5, "end_epoch": 1},
        {"initial_sparsity": 0.25, "final_sparsity": 0.75, "end_epoch": 4, "op_names": ["head"]},
        {"exclude": True, "op_names": ["stem"]},
    ]
    pruner = compat.AGP_Pruner(config)
    pruner(model)
    assert pruner.masks().sparsity == pytest.approx(120 / (480 + 2 * 216))
    pruner.update_epoch(1)
    assert "stem.weight" not in pruner.masks()
    assert int((~pruner.masks()["inner.weight"]).sum()) == 108
    assert int((~pruner.masks()["head.weight"]).sum()) == int(480 * (0.75 - 0.5 * 0.75**3))


def test_sensitivity_prunes_below_its_threshold() -> None:
    """The threshold is the quality parameter times the deviation of all the layer's weights; what was masked stays so."""
    model, _ = residual()
    dense = copy.deepcopy(model)
    pruner = compat.SensitivityPruner([{"sparsity": 0.5, "op_types": "default"}, {"sparsity": 0.9, "op_names": ["head"]}])
    pruner(model)
    first = pruner.masks()
    for name, mask in first.items():
        values = dense.get_parameter(name).detach().reshape(-1).tolist()
        mean = sum(values) / len(values)
        deviation = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
        quality = 0.9 if name == "head.weight" else 0.5
        assert mask.reshape(-1).tolist() == [abs(v) >= quality * deviation for v in values]
    with torch.no_grad():
        model.head.weight.mul_(3.0)
        model.inner.weight[0] *= 1e-3
    pruner.update_epoch(1)
    second = pruner.masks()
    assert torch.equal(second["head.weight"], first["head.weight"])
    assert not second["inner.weight"][0].any()
    assert all(not (mask & ~first[name]).any() for name, mask in second.items())


def test_sensitivity_never_masks_a_whole_layer_and_never_unmasks() -> None:
    """No layer's largest weight is below its deviation over all n weights, and weights that all became zero do not come back."""
    model = network_of_one(1.0, -1.0)
    pruner = compat.SensitivityPruner([{"sparsity": 0.99}])
    pruner(model)
    assert pruner.masks().sparsity == 0
    model = network_of_one(1.0, -0.1)
    pruner = compat.SensitivityPruner([{"sparsity": 0.5}])
    pruner(model)
    model.weight.data.zero_()
    pruner.update_epoch(1)
    assert pruner.masks()["weight"].tolist() == [[True, False]]


def network_of_one(*weights: float) -> nn.Linear:
    """Returns a linear layer with one output and these weights."""
    layer = nn.Linear(len(weights), 1)
    layer.weight.data = torch.tensor([weights])
    return layer


def test_a_finished_pruner_can_be_called_anew() -> None:
    """After `finish` the pruner is at work on nothing, and takes another model."""
    pruner = compat.AGP_Pruner([{"final_sparsity": 0.5, "end_epoch": 0}])
    first, second = residual()[0], Residual(6, 8).double()
    pruner(first)
    masks = pruner.finish()[1]
    assert masks.sparsity == 0.5
    pruner(second)
    assert pruner.masks()["inner.weight"].shape == (8, 6, 3, 3)


# -- errors --------------------------------------------------------------------------------------------------------------------------

PRUNERS: dict[str, tuple[Any, Any]] = {
    "LevelPruner": (compat.LevelPruner, DEFAULT),
    "AGP_Pruner": (compat.AGP_Pruner, AGP),
    "SensitivityPruner": (compat.SensitivityPruner, DEFAULT),
}


@pytest.mark.parametrize("name", PRUNERS)
def test_wrong_uses_of_pruners_in_place_are_refused(name: str) -> None:
    """A model where none belongs, no model, another model, one too many: each is one clear error, and nothing is changed."""
    kind, config = PRUNERS[name]
    model, _ = residual()
    first = [(model, config), (model,)] if name == "AGP_Pruner" else []  # the others have a call shape with a model in front
    for arguments in (*first, (config, model)):
        with pytest.raises(gp.ConfigError, match=rf"compat.{name} takes a config list alone.*Write {name}\(config_list\), and then pruner"):
            kind(*arguments)
    pruner = kind(config)
    for call in (pruner.masks, pruner.finish):
        with pytest.raises(gp.ConfigError, match=rf"{name} is at work on no model.*Call pruner\(model\) first"):
            call()
    before = snapshot(model)
    with pytest.raises(gp.ConfigError, match=f"{name} is called with a dict, and only PyTorch models"):
        pruner({})
    with pytest.raises(gp.ConfigError, match="the model has no layer that has a weight of two or more dimensions"):
        pruner(nn.ReLU())
    assert changes(before, snapshot(model)) == []
    pruner(model)
    with pytest.raises(gp.ConfigError, match=rf"{name} is at work on a Residual already.*Call pruner.finish\(\) first"):
        pruner(model)


@pytest.mark.parametrize("name", ["AGP_Pruner", "SensitivityPruner"])
def test_wrong_epochs_are_refused(name: str) -> None:
    """Before the call with a model there is nothing to update; an epoch is a whole number, and there are no sessions."""
    kind, config = PRUNERS[name]
    pruner = kind(config)
    with pytest.raises(gp.ConfigError, match=rf"{name} is at work on no model"):
        pruner.update_epoch(1)
    pruner(residual()[0])
    for epoch in (-1, 1.0, "1", True):
        with pytest.raises(gp.ConfigError, match=rf"{name}.update_epoch is given {epoch!r}.*whole number of at least 0"):
            pruner.update_epoch(epoch)
    with pytest.raises(gp.ConfigError, match=r"is given a session, as TensorFlow has.*Write pruner.update_epoch\(epoch\)"):
        pruner.update_epoch(1, object())


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"sparsity": 0.5}, r"config_list\[0\] of AGP_Pruner gives 'sparsity'.*Write 'final_sparsity' and 'end_epoch'"),
        ({"end_epoch": 3}, r"config_list\[0\] of AGP_Pruner has no 'final_sparsity'"),
        ({"final_sparsity": 0.5}, "has no 'end_epoch'"),
        ({"final_sparsity": 1.5, "end_epoch": 3}, r"config_list\[0\] of AGP_Pruner cannot be followed: final of the schedule is 1.5"),
        ({"final_sparsity": 0.5, "end_epoch": "ten"}, "end of the schedule is 'ten'"),
        ({"final_sparsity": 0.5, "end_epoch": 3, "start_epoch": 4}, "end of the schedule is 3.*at least 4"),
        ("sparse", "config_list of AGP_Pruner is not a list of dicts"),
    ],
)
def test_schedules_that_cannot_be_used_are_refused_at_once(entry: Any, words: str) -> None:
    """An entry without a usable schedule is refused before there is a model."""
    with pytest.raises(gp.ConfigError, match=words):
        compat.AGP_Pruner([entry])


def test_config_lists_are_checked_against_the_model() -> None:
    """Unknown layers and keys are refused when the pruner is called, and the model stays as it was."""
    model, _ = residual()
    before = snapshot(model)
    with pytest.raises(gp.ConfigError, match="did you mean 'head'"):
        compat.AGP_Pruner([{**AGP[0], "op_names": ["haed"]}])(model)
    with pytest.raises(gp.ConfigError, match=r"allows a max_sparsity_per_layer of 0.5"):
        compat.AGP_Pruner([{**AGP[0], "max_sparsity_per_layer": 0.5}])(model)
    with pytest.raises(gp.ConfigError, match="describes a schedule over time"):
        compat.LevelPruner(AGP)(model)
    with pytest.raises(gp.ConfigError, match=r"config_list\[0\] gives a total_sparsity, and SensitivityPruner has a threshold per layer"):
        compat.SensitivityPruner([{"total_sparsity": 0.5}])(model)
    assert changes(before, snapshot(model)) == []
