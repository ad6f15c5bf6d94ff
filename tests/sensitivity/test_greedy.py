"""The sensitivity pruner: its greedy loop against the closed form of its evaluator, its threshold, and what it keeps on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune import compat
from graphprune.pruners.budgets import keep_highest
from graphprune.sensitivity.curves import last_admissible
from graphprune.sensitivity.sensitivity import SPARSITIES
from tests.sensitivity.test_sensitivity import interrupted
from tests.support.sensitivity_cases import INPUTS, WIDTHS, Chain, Mass, Training, masses, pruner, uneven
from tests.support.untouched import changes, snapshot

HALF = [{"sparsity": 0.5, "op_types": ["Linear"]}]
FAN_IN = {"a": 4, "b": 10, "c": 8}  # of the rows of each layer, which are the channels of its group
WEIGHTS = sum(WIDTHS[name] * FAN_IN[name] for name in WIDTHS)


def share(masks: gp.Masks) -> float:
    """Returns the share of the weights of a, b and c whose rows are gone."""
    return sum(int((~masks[name]).sum()) * FAN_IN[name] for name in WIDTHS) / WEIGHTS


def compressed(pruner: gp.SensitivityPruner) -> tuple[nn.Module, gp.Masks]:
    """Returns what a pruner of channels returns."""
    model, masks = pruner.compress()
    assert isinstance(masks, gp.Masks)
    return model, masks


# -- the greedy loop -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_target_is_met_and_better_than_uniform(seed: int) -> None:
    """Where groups differ in how many of their channels weigh next to nothing, those go, and little of the mass goes with them."""
    model = uneven(seed)
    evaluator = Mass(masses(model))
    fan_in = {"a": 4, "b": 40, "c": 40}
    before = snapshot(model)
    made = gp.SensitivityPruner(model, HALF, evaluator, acc_drop_threshold=100.0, example_inputs=INPUTS)
    masked, masks = compressed(made)
    assert changes(before, snapshot(model)) == []
    assert made.reason == "the target is met"
    removed = sum(int((~masks[name]).sum()) * fan_in[name] for name in fan_in) / (40 * sum(fan_in.values()))
    assert 0.5 <= removed < 0.5 + 40 / (40 * sum(fan_in.values()))
    uniform, _ = gp.L1NormPruner(model, HALF, example_inputs=INPUTS).compress()
    assert evaluator(masked) > 0.1 * evaluator(uniform)
    assert made.last is not None
    assert made.last.score == pytest.approx(evaluator(masked), rel=1e-6)
    assert made.last.removed == pytest.approx(removed)
    assert made.last.sparsities == {name: pytest.approx(float((~masks[name]).mean())) for name in fan_in}


def test_each_round_takes_its_share_in_proportion_to_what_is_admissible() -> None:
    """A round takes a tenth of the weights to within a channel, and of no group more than its last admissible sparsity."""
    made = gp.SensitivityPruner(Chain(), HALF, Mass(), acc_drop_threshold=100.0, example_inputs=INPUTS)
    compressed(made)
    removed, present = 0.0, dict(WIDTHS)
    for number, taken in enumerate(made.history, start=1):
        assert taken.number == number
        assert min(0.5, removed + 0.1) - 1e-9 <= taken.removed <= removed + 0.1 + max(FAN_IN.values()) / WEIGHTS
        for name, width in WIDTHS.items():
            left = round(width * (1.0 - taken.sparsities[name]))
            assert present[name] - left <= taken.admissible[name] * present[name] + 1e-9
            present[name] = left
        removed = taken.removed
    first = gp.sensitivity(Chain(), INPUTS, Mass()).admissible(100.0)
    exact = {n: (WIDTHS[n] - max(1, int(round(WIDTHS[n] * (1 - s), 9)))) / WIDTHS[n] if s else 0.0 for n, s in first.items()}
    assert made.history[0].admissible == pytest.approx(exact)
    assert made.history[0].before == 0.0
    assert [r.before for r in made.history[1:]] == [r.score for r in made.history[:-1]]


def test_proportions_are_those_of_the_admissible_ratios() -> None:
    """With wide layers, what the groups lose in the only round are to each other as their ratios, not scaled past them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 400), nn.ReLU(), nn.Linear(400, 300), nn.ReLU(), nn.Linear(300, 2))
    ratios = {"0": 0.2, "2": 0.4}
    options: dict[str, Any] = {"sparsity_proportion_calc": lambda *_: ratios, "example_inputs": torch.randn(2, 4)}
    made = gp.SensitivityPruner(model, [{"sparsity": 0.1, "op_types": ["Linear"]}], lambda model: 0.0, **options)  # noqa: ARG005
    _, masks = compressed(made)
    scale = 0.1 * (4 * 400 + 400 * 300) / (0.2 * 4 * 400 + 0.4 * 400 * 300)
    assert {name: float((~masks[name]).mean()) for name in ratios} == {n: pytest.approx(scale * r, abs=1 / 300) for n, r in ratios.items()}


def test_no_group_loses_more_than_most_of_itself_in_a_round() -> None:
    """Whatever a user's function allows, a round takes at most 95 % of what a group has left."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 2))
    options: dict[str, Any] = {"sparsity_proportion_calc": lambda *_: {"0": 2.0}, "sparsity_per_iter": 0.99, "example_inputs": INPUTS}
    made = gp.SensitivityPruner(model, [{"sparsity": 0.97}], lambda model: 0.0, **options)  # noqa: ARG005 (an evaluator)
    compressed(made)
    assert [r.sparsities["0"] for r in made.history] == [0.95, 0.97]


def smallest_first(part: gp.Part) -> torch.Tensor:
    """A criterion that keeps the smallest channels, and so ranks those that have become zero above all others."""
    return -part.rows().abs().sum(1)


def test_channels_that_are_gone_are_not_ranked_again() -> None:
    """What goes is counted among the channels that are still there, also where the criterion would keep those that are gone."""
    options: dict[str, Any] = {"base_algo": smallest_first, "acc_drop_threshold": 1e3, "example_inputs": INPUTS}
    made = gp.SensitivityPruner(Chain(), HALF, Mass(), **options)
    _, masks = compressed(made)
    assert len(made.history) > 2
    assert made.last is not None
    assert made.last.sparsities == {name: pytest.approx(float((~masks[name]).mean())) for name in WIDTHS}
    assert 0.5 <= share(masks) < 0.5 + max(FAN_IN.values()) / WEIGHTS


def test_it_ends_where_no_group_can_lose_more() -> None:
    """With a threshold that the first sparsity of every group violates, nothing is pruned, and a warning and the reason say why."""
    made = gp.SensitivityPruner(Chain(), HALF, Mass(), acc_drop_threshold=1e-6, example_inputs=INPUTS)
    with pytest.warns(UserWarning, match=r"before its target of 50\.0%: no group can lose more channels"):
        _, masks = compressed(made)
    assert masks.sparsity == 0.0
    assert made.history == ()
    assert made.last is made.best is None


@pytest.mark.parametrize("unit", ["macs", "params"])
def test_a_budget_is_met_by_the_shrunk_model(unit: str) -> None:
    """With a budget, the shrunk model has what is left of it, to within one channel, and entries say only where."""
    model, budget = Chain(), gp.Budget(**{unit: 0.4})
    entries: list[dict[str, Any]] = [{"op_types": ["Linear"]}, {"exclude": True, "op_names": ["a"]}]
    made = gp.SensitivityPruner(model, entries, Mass(), acc_drop_threshold=1e3, example_inputs=INPUTS, budget=budget)
    masked, masks = compressed(made)
    assert masks["a"].all()
    small, _ = gp.speedup(masked, masks)
    dense, left = (getattr(gp.count(m, INPUTS), unit) for m in (model, small))
    channel = max(10 + 6, 8 + 3) * (len(INPUTS) if unit == "macs" else 1)
    assert 0.6 * dense - channel < left <= 0.6 * dense
    assert made.last is not None
    assert getattr(made.last, unit) == left


def test_what_is_gone_stays_gone_while_the_model_is_trained() -> None:
    """In every forward pass of the finetuner the pruned rows are zero, in spite of noise on their gradients; others are trained."""
    seen: list[float] = []

    def finetuner(model: nn.Module) -> None:
        def look(module: nn.Module, _inputs: object) -> None:
            seen.append(min(float(module.get_parameter(f"{n}.weight").detach().abs().sum(1).min()) for n in WIDTHS))

        handle = model.register_forward_pre_hook(look)
        Training()(model)
        handle.remove()

    torch.manual_seed(1)
    model = Chain()
    made = gp.SensitivityPruner(model, HALF, Mass(), finetuner, acc_drop_threshold=100.0, example_inputs=INPUTS)
    masked, masks = compressed(made)
    assert len(seen) == 3 * len(made.history)
    assert set(seen) == {0.0}
    assert not torch.equal(masked.get_parameter("d.weight"), model.get_parameter("d.weight"))
    assert changes(snapshot(masked)["tensors"], snapshot(masks.masked(masked))["tensors"]) == []
    small, report = gp.speedup(masked, masks)
    assert report.verified
    assert Mass()(small) == pytest.approx(made.history[-1].score)
    assert made.best is max(made.history, key=lambda r: r.score)


def test_proportions_of_the_users_own() -> None:
    """The user's function is shown the score, the threshold and every curve to its end; what it returns decides, up to 0.95."""
    seen = []

    def mine(score: float, threshold: float, curves: dict[str, dict[float, float]]) -> dict[str, float]:
        seen.append((score, threshold, {name: tuple(curve) for name, curve in curves.items()}))
        return {"b": 2.0, "a": -1.0}

    options: dict[str, Any] = {"sparsity_proportion_calc": mine, "acc_drop_threshold": 1.0, "example_inputs": INPUTS}
    made = gp.SensitivityPruner(Chain(), [{"sparsity": 0.3, "op_types": ["Linear"]}], Mass(), **options)
    _, masks = compressed(made)
    assert seen[0] == (0.0, 1.0, dict.fromkeys(WIDTHS, SPARSITIES))
    assert masks["a"].all()
    assert masks["c"].all()
    assert int(masks["b"].sum()) == 8 - 6  # the first count at which 30 % of the 168 weights are gone
    assert share(masks) >= 0.3 > share(masks) - 10 / WEIGHTS
    with pytest.raises(gp.ConfigError, match="returns 'e', which is no group"):
        gp.SensitivityPruner(Chain(), HALF, Mass(), **{**options, "sparsity_proportion_calc": lambda *_: {"e": 0.5}}).compress()


def test_limits_of_the_config_list_hold() -> None:
    """A layer's maximum limits what it loses over all rounds; others lose more in its stead."""
    entries = [{"sparsity": 0.6, "max_sparsity_per_layer": {"b": 0.5}}]
    _, masks = compressed(gp.SensitivityPruner(Chain(), entries, Mass(), acc_drop_threshold=1e3, example_inputs=INPUTS))
    assert int(masks["b"].sum()) == 4
    assert share(masks) >= 0.6


def test_channels_go_in_the_order_of_their_scores() -> None:
    """Without fine-tuning, later rounds take what the criterion ranks next: the weakest channels that are left."""
    model = Chain()
    _, masks = compressed(gp.SensitivityPruner(model, HALF, Mass(), acc_drop_threshold=100.0, example_inputs=INPUTS))
    scores = model.a.weight.detach().abs().sum(1).double().numpy()
    assert np.array_equal(masks["a"], keep_highest(scores, int(masks["a"].sum())))


# -- what is kept ----------------------------------------------------------------------------------------------------------------


def test_a_killed_pruner_goes_on_where_it_was(tmp_path: Path) -> None:
    """Killed in the middle of its second training, it ends with the weights, masks and history of an uninterrupted run."""
    whole = pruner(None)
    model, masks = compressed(whole)
    assert len(whole.history) > 3
    interrupted("pruner", tmp_path, 1)
    resumed = pruner(tmp_path)
    resumed_model, resumed_masks = compressed(resumed)
    assert isinstance(resumed.finetuner, Training)
    assert resumed.finetuner.calls == len(whole.history) - 1
    assert resumed.history == whole.history
    assert all(np.array_equal(masks[name], resumed_masks[name]) for name in WIDTHS)
    assert all(torch.equal(tensor, resumed_model.state_dict()[name]) for name, tensor in model.state_dict().items())
    evaluator = Mass()
    again = pruner(tmp_path)
    again.evaluator = evaluator
    compressed(again)
    assert evaluator.calls == 0
    assert again.history == whole.history


def test_another_run_in_the_folder_is_refused(tmp_path: Path) -> None:
    """A folder with a run of another target is not gone on with, and the error names the setting."""
    compressed(pruner(tmp_path))
    other = [{"sparsity": 0.6, "op_types": ["Linear"]}]
    options: dict[str, Any] = {"acc_drop_threshold": 100.0, "example_inputs": INPUTS, "sparsities": (0.2, 0.5, 0.8), "folder": tmp_path}
    with pytest.raises(gp.FileError, match=r"target was \[\"weights\", 0\.5\]"):
        gp.SensitivityPruner(Chain(), other, Mass(), Training(), **options).compress()


# -- what there is from the start ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["greedy", "threshold"])
def test_nothing_appears_only_later(mode: Any) -> None:
    """All attributes are there once the pruner is made, and none comes with a call."""
    given: dict[str, Any] = {"evaluator": Mass(), "example_inputs": INPUTS, "acc_drop_threshold": 100.0} if mode == "greedy" else {}
    made = gp.SensitivityPruner(Chain(), HALF, mode=mode, **given)
    assert (made.history, made.reason, made.best, made.last, made.step, made.budget) == ((), "", None, None, 0.1, None)
    assert made.threshold == given.get("acc_drop_threshold", 0.05)
    assert made.asked.sparsities == SPARSITIES
    assert made.options["mode"] == "dependency_aware"
    before = set(vars(made))
    made.compress()
    assert set(vars(made)) == before


def test_what_a_mode_does_not_have_says_so() -> None:
    """Mode "threshold" has neither groups nor a target, and says how to get them."""
    made = gp.SensitivityPruner(Chain(), HALF, mode="threshold")
    for name in ("graph", "target"):
        with pytest.raises(gp.ConfigError, match=r"mode 'threshold' masks single weights .*Write mode='greedy' to prune groups"):
            getattr(made, name)
    greedy = gp.SensitivityPruner(Chain(), HALF, Mass(), example_inputs=INPUTS)
    assert (greedy.target, {g.name for g in greedy.graph.groups}) == (0.5, set(WIDTHS))


def test_example_inputs_of_the_threshold_are_checked() -> None:
    """Thresholds need no example inputs, and those that are given must fit."""
    _, masks = gp.SensitivityPruner(Chain(), HALF, mode="threshold", example_inputs=INPUTS).compress()
    expected = gp.SensitivityPruner(Chain(), HALF, mode="threshold").compress()[1]
    assert isinstance(masks, gp.ElementMasks)
    assert isinstance(expected, gp.ElementMasks)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    with pytest.raises(gp.InputError, match="Pass example inputs of the shapes"):
        gp.SensitivityPruner(Chain(), HALF, mode="threshold", example_inputs=torch.zeros(1, 99))


# -- the threshold ---------------------------------------------------------------------------------------------------------------


def test_threshold_mode_is_that_of_the_seed() -> None:
    """Weights below quality times deviation go, as in the pruner of that time, which masks in place."""
    model, quality = Chain(), 0.8
    entries = [{"sparsity": quality, "op_types": "default"}]
    masked, masks = gp.SensitivityPruner(model, entries, mode="threshold").compress()
    assert isinstance(masks, gp.ElementMasks)
    for name in "abcd":
        weight = model.get_parameter(f"{name}.weight").detach().double()
        threshold = quality * float(np.std(weight.numpy()))
        assert torch.equal(masks[f"{name}.weight"], weight.abs() >= threshold)
        assert torch.equal(masked.get_parameter(f"{name}.weight") != 0, masks[f"{name}.weight"])
    there = compat.SensitivityPruner(entries)
    there(Chain())
    assert all(torch.equal(masks[name], there.masks()[name]) for name in masks)


# -- refusals --------------------------------------------------------------------------------------------------------------------

WRONG: tuple[tuple[list[dict[str, Any]], dict[str, Any], type[Exception], str], ...] = (
    (HALF, {"evaluator": None}, gp.ConfigError, "has no evaluator"),
    (HALF, {"mode": "treshold"}, gp.ConfigError, "did you mean 'threshold'"),
    (HALF, {"checkpoint_dir": "here"}, gp.ConfigError, "Write folder="),
    (HALF, {"keep_class": True}, gp.ConfigError, "no argument keep_class="),
    (HALF, {"sparsity_per_iter": 0.0}, gp.ConfigError, "Give a share above 0"),
    (HALF, {"acc_drop_threshold": -0.1}, gp.ConfigError, "a drop of at least 0"),
    (HALF, {"base_algo": "level"}, gp.ConfigError, "level"),
    (HALF, {"budget": gp.Budget(macs=0.5)}, gp.ConfigError, "gives sparsity, and a budget says already"),
    (HALF, {"example_inputs": None}, gp.InputError, "Pass example_inputs="),
    ([{"op_types": ["Linear"]}], {}, gp.ConfigError, "gives no sparsity"),
    (
        [{"sparsity": 0.5}, {"sparsity": 0.25, "op_names": ["a"]}],
        {},
        gp.ConfigError,
        "ask for 0.25, 0.5, and SensitivityPruner has one target",
    ),
    ([{"total_sparsity": 0.5}], {"mode": "threshold"}, gp.ConfigError, "a threshold per layer"),
)


@pytest.mark.parametrize(("entries", "given", "error", "words"), WRONG)
def test_wrong_arguments_are_refused(
    entries: list[dict[str, Any]], given: dict[str, Any], error: type[Exception], words: str, recwarn: pytest.WarningsRecorder
) -> None:
    """Each wrong argument is one clear sentence when the pruner is made."""
    with pytest.raises(error, match=words):
        gp.SensitivityPruner(Chain(), entries, **{"evaluator": Mass(), "example_inputs": INPUTS, **given})
    recwarn.clear()


def test_the_default_calculation_is_the_last_admissible_ratio() -> None:
    """What is used where the user gives no function is what the analysis offers."""
    assert gp.SensitivityPruner(Chain(), HALF, Mass(), example_inputs=INPUTS).calc is last_admissible
