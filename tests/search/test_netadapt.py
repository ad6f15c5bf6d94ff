"""NetAdapt: each step is the smallest that saves its share and scores best, weights are carried on, and interruptions change nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.errors import ConfigError, FileError, InputError
from graphprune.search.netadapt import NetAdaptPruner
from graphprune.search.objective import Trial
from tests.support.analytic import DAMAGE, Analytic, Stopped, network
from tests.support.operators import images
from tests.support.untouched import changes, snapshot

FULL = {"a": 12, "b": 20, "c": 16}
EVERYWHERE = [{"op_types": ["Conv2d"]}]


def formula(model: nn.Module) -> float:
    """Scores a shrunk model by what each layer lost, as `Analytic` does."""
    module: Any = model
    lost = {name: 1.0 - getattr(module, name).out_channels / full for name, full in FULL.items()}
    return math.exp(-sum(DAMAGE[name] * value**2 for name, value in lost.items()))


class Killed:
    """Scores, and dies at one of its calls."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, model: nn.Module) -> float:
        """Returns the score."""
        self.left -= 1
        if self.left < 0:
            raise Stopped
        return formula(model)


def halve(model: nn.Module) -> None:
    """Trains: every weight becomes half as large."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)


def noise(model: nn.Module) -> None:
    """Trains with random numbers."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def weighed(model: nn.Module) -> float:
    """Scores by widths and by weights, so that what training did matters."""
    return formula(model) + 1e-3 * float(sum(p.detach().double().sum() for p in model.parameters()))


def pruner(config: Any = None, tuner: Any = None, evaluator: Any = formula, **options: Any) -> NetAdaptPruner:
    """Returns a pruner of the network, to half of its MACs unless something else is asked for."""
    if config is None and "cost" not in options:
        options.setdefault("budget", gp.Budget(macs=0.5))
    return NetAdaptPruner(network(), config or EVERYWHERE, tuner, evaluator, example_inputs=images(1), **options)


@pytest.mark.parametrize("budget", [gp.Budget(macs=0.5), gp.Budget(params=0.6), gp.Budget(macs=0.8)])
def test_result_is_close_to_the_best_of_all_points(budget: gp.Budget) -> None:
    """Ends within a hundredth of the best of thousands of admissible points, far above uniform sparsity."""
    oracle = Analytic(budget=budget)
    found = pruner(budget=budget)
    assert oracle.optimum - 0.01 <= found.best.score <= oracle.optimum
    assert found.best.score > oracle.uniform + 0.05
    assert found.reason == "the budget is met"
    assert getattr(found.best.cost, budget.unit) <= oracle.constraints[0].target < getattr(found.history[0].cost, budget.unit)


def test_every_proposal_is_the_smallest_that_saves_the_step_and_the_best_is_kept() -> None:
    """One channel more would cost too much, and no other proposal scores more; costs are those of models that are really shrunk."""
    found = pruner(decay=0.95)
    found.search()
    dense = gp.count(network(), images(1)).macs
    left, first, before = dict(FULL), 0, dense
    for number, step in enumerate(found.steps):
        trials = found.history[first : first + 3]
        assert step.asked == pytest.approx(max(before - 0.05 * 0.95**number * dense, dense / 2))
        assert step.before == before
        assert step.score == max(t.score for t in trials) == found.history[step.trial].score
        for trial, name in zip(trials, found.objective.groups, strict=True):  # each proposal takes channels of another group
            sizes = counts(trial)
            assert {n for n, k in sizes.items() if k != left[n]} == {name[0]}
            one_more = {**trial.sparsities, name: 1 - (sizes[name[0]] + 1) / FULL[name[0]]}
            assert trial.cost.macs <= step.asked < found.objective.cost(one_more).macs
        first, before, left = first + 3, int(step.after), counts(found.history[step.trial])
        assert step.after == gp.count(found.objective.small(found.history[step.trial].sparsities), images(1)).macs
    assert first == len(found.history)
    assert found.last == found.history[found.steps[-1].trial]


def counts(trial: Trial) -> dict[str, int]:
    """Returns layer -> how many channels are left."""
    return {n[0]: round(FULL[n[0]] * (1 - s)) for n, s in trial.sparsities.items()}


@pytest.mark.parametrize("physical", [True, False])
def test_weights_of_the_kept_proposals_are_carried_on(physical: bool) -> None:
    """Training that halves every weight in every step leaves kept weights 1/2^steps as large; what once was removed never comes back."""
    found = pruner(tuner=halve, evaluator=formula if physical else weighed, physical=physical)
    before = snapshot(found.model)
    masked, masks = found.compress()
    original, sparse = dict(found.model.named_parameters()), dict(masks.masked(found.model).named_parameters())
    factor = 0.5 ** len(found.steps)
    for name, parameter in masked.named_parameters():
        assert torch.allclose(parameter, sparse[name] * factor, rtol=1e-4), name
        assert original[name].shape == parameter.shape
    small, _ = gp.speedup(masked, masks)
    assert gp.count(small, images(1)) == found.best.cost
    assert torch.allclose(small.eval()(images(1)), masked.eval()(images(1)), atol=1e-4)
    assert not changes(before, snapshot(found.model))


def test_evaluated_models_are_those_that_are_returned() -> None:
    """Scores that depend on trained weights are those of the returned model, shrunk again; the criterion sees the trained weights."""
    found = pruner(tuner=noise, evaluator=weighed)
    masked, masks = found.compress()
    small, _ = gp.speedup(masked, masks)
    assert weighed(small) == pytest.approx(found.best.score, abs=1e-5)
    _, untrained = gp.L1NormPruner(network(), found.get_best_result()[4], example_inputs=images(1)).compress()
    assert isinstance(untrained, gp.Masks)
    assert {n: int(m.sum()) for n, m in untrained.items()} == {n: int(m.sum()) for n, m in masks.items()}
    assert any((untrained[n] != masks[n]).any() for n in masks)


def test_a_step_that_no_group_can_save_is_halved_until_one_can() -> None:
    """Where groups may lose little, a large step is taken in smaller ones, and the search ends at its budget."""
    found = pruner(budget=gp.Budget(macs=0.4), sparsity_per_iteration=0.4, max_sparsity=0.3)
    found.search()
    dense = gp.count(network(), images(1)).macs
    assert found.reason == "the budget is met"
    assert len(found.steps) > 1
    assert found.steps[0].asked == pytest.approx(dense * (1 - 0.4 / 2))
    assert all(step.before > step.after for step in found.steps)
    assert found.best.cost.macs <= 0.6 * dense


def test_config_list_says_how_much_goes_where_there_is_no_budget() -> None:
    """The call shape of the seeds: a sparsity is that of all channels of its entry together."""
    found = pruner([{"op_names": ["a", "b"], "sparsity": 0.5}, {"op_names": ["c"], "sparsity": 0.25}])
    _, masks = found.compress()
    gone = {n[0]: int((~m).sum()) for n, m in masks.items()}
    assert gone["a"] + gone["b"] == 16
    assert gone["c"] == 4
    assert gone["a"] > gone["b"]


def test_measured_costs_are_come_down_to() -> None:
    """Any function of a shrunk model is a cost; it is asked once for each combination of widths."""
    asked: list[tuple[int, ...]] = []

    def widths(model: nn.Module) -> float:
        module: Any = model
        asked.append((module.a.out_channels, module.b.out_channels, module.c.out_channels))
        return float(sum(asked[-1]))

    found = pruner(cost=widths, target=30.0)
    assert sum(FULL[n[0]] * (1 - s) for n, s in found.best.sparsities.items()) == pytest.approx(30)
    assert len(asked) == len(set(asked))
    assert found.best.sparsities[found.objective.groups[0]] > found.best.sparsities[found.objective.groups[2]]
    with pytest.raises(ConfigError, match="smallest model"):
        pruner(cost=widths, target=2.0)
    with pytest.raises(ConfigError, match="cost= returned nan"):
        pruner(cost=lambda _: math.nan, target=2.0)


def test_interrupted_at_any_proposal_ends_as_uninterrupted(tmp_path: Path) -> None:
    """Killed in proposal after proposal, with random training, the run ends with the same trials, steps and weights."""
    whole = pruner(tuner=noise, seed=3)
    model, masks = whole.compress()
    calls = len(whole.history)
    for stop in (0, 1, 2, 5, 7):
        with pytest.raises(Stopped):
            pruner(tuner=noise, evaluator=Killed(stop), seed=3, folder=tmp_path).search()
    found = pruner(tuner=noise, evaluator=Killed(calls - 15), seed=3, folder=tmp_path)
    other, same = found.compress()
    assert (found.history, found.steps) == (whole.history, whole.steps)
    assert all((masks[n] == same[n]).all() for n in masks)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert len((tmp_path / "netadapt.csv").read_text().splitlines()) == calls + 1
    (tmp_path / "netadapt.csv").unlink()  # as if the process had been killed before it was written
    again = pruner(tuner=noise, evaluator=None, seed=3, folder=tmp_path)
    assert again.search() == whole.search()  # nothing is evaluated again
    assert (tmp_path / "netadapt.csv").exists()
    assert pruner(tuner=noise, seed=4, evaluator=weighed).search() != pruner(tuner=noise, seed=3, evaluator=weighed).search()
    with pytest.raises(FileError, match="seed"):
        pruner(tuner=noise, seed=4, folder=tmp_path).search()


def test_minimising_is_maximising_the_negated_score() -> None:
    """The evaluator's sign and the mode cancel."""
    most, least = pruner(), pruner(evaluator=lambda model: -formula(model), optimize_mode="minimize")
    assert most.search() == least.search()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity_per_iteration": 0.0}, "sparsity_per_iteration"),
        ({"decay": 1.1}, "decay"),
        ({"optimize_mode": "max"}, "optimize_mode"),
        ({"checkpoint_dir": "."}, "folder="),
        ({"cost": formula}, "target="),
        ({"cost": formula, "target": 1.0, "budget": gp.Budget(macs=0.5)}, "budget="),
        ({"budget": None}, "neither a budget"),
    ],
)
def test_unusable_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    """Before anything is evaluated, with what to write instead."""
    with pytest.raises(ConfigError, match=message):
        pruner(**options)


def test_example_inputs_are_asked_for() -> None:
    """Groups cannot be found without."""
    with pytest.raises(InputError, match="example_inputs"):
        NetAdaptPruner(network(), [{"op_types": ["Conv2d"], "sparsity": 0.5}], None, formula)
