"""Simulated annealing: as good as trying everything, acceptance that falls, and results that no interruption changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.errors import ConfigError, FileError, InputError
from graphprune.search.annealing import Annealing, Cooling, Move, SimulatedAnnealingPruner
from graphprune.search.base import SearchResult, run
from tests.support.analytic import Analytic, Stopped, network
from tests.support.killing import FORKS, kill
from tests.support.operators import images
from tests.support.untouched import changes, snapshot

ROOT = Path(__file__).resolve().parents[2]


def cooling(trials: int) -> Cooling:
    """Returns the temperatures of a run of so many trials."""
    return Cooling(100.0, 20.0, 0.2 ** (1 / (trials - 1)))


def annealing(target: Analytic, trials: int, seed: int = 0) -> Annealing:
    """Returns a search that starts at the same sparsity everywhere."""
    return Annealing(dict.fromkeys(target.groups, 0.5), target.most, target.project, cooling=cooling(trials), seed=seed)


def anneal(target: Analytic, trials: int, seed: int = 0, folder: Path | None = None) -> tuple[SearchResult, tuple[Move, ...]]:
    """Returns the result and what became of each trial."""
    search = annealing(target, trials, seed)
    return run(target, search, trials, folder), search.moves


@pytest.mark.parametrize("seed", range(3))
def test_best_is_close_to_the_best_of_all_points_and_better_than_uniform(seed: int) -> None:
    """Of thousands of admissible points the best, to within a hundredth, in eighty trials; the even one is far below."""
    target = Analytic()
    result, _ = anneal(target, 80, seed)
    assert target.optimum - 0.01 <= result.best.score <= target.optimum
    assert target.uniform < target.optimum - 0.2
    assert result.history[0].score == target.uniform
    assert all(target.constraints[0].cost(target.counts(t.sparsities)) <= target.constraints[0].target for t in result.history)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e3])
def test_acceptance_falls_from_above_a_half_to_below_a_tenth(scale: float) -> None:
    """In the first and the last fifth of runs of 200 candidates, however large scores are."""
    first, last = [], []
    for seed in range(3):
        _, moves = anneal(Analytic(scale), 201, seed)
        accepted = [move.accepted for move in moves[1:]]
        first.append(np.mean(accepted[:40]))
        last.append(np.mean(accepted[-40:]))
    assert min(first) > 0.5
    assert np.mean(last) < 0.1


def test_temperature_falls_with_every_candidate_and_defaults_make_seventeen_trials() -> None:
    """From 100 by a tenth each, accepted or not, until it is below 20; the spread is the median of the last ten losses."""
    target = Analytic()
    search = Annealing(dict.fromkeys(target.groups, 0.5), target.most, target.project, cooling=Cooling())
    assert Cooling().trials == 17
    history = run(target, search, Cooling().trials).history
    assert [m.temperature for m in search.moves] == pytest.approx([100.0, *(100 * 0.9**n for n in range(16))])
    assert {m.accepted for m in search.moves} == {True, False}
    current, losses = history[0].score, []
    for move, trial in zip(search.moves[1:], history[1:], strict=True):
        if trial.score < current:
            losses.append(current - trial.score)
            assert move.spread == pytest.approx(np.median(losses[-10:]))
            done = np.log(100 / move.temperature) / np.log(5)
            assert move.chance == pytest.approx(np.exp(-losses[-1] / (4 * 0.01**done * move.spread)))
        else:
            assert move.chance == 1.0
        current = trial.score if move.accepted else current


def test_every_candidate_differs_from_the_current_point() -> None:
    """No evaluation is spent on the point that is already known, even where perturbations are smaller than a channel."""
    target = Analytic()
    result, moves = anneal(target, 120)
    current = result.history[0].sparsities
    for trial, move in zip(result.history[1:], moves[1:], strict=True):
        assert trial.sparsities != current
        current = trial.sparsities if move.accepted else current


def test_interrupted_at_any_trial_ends_as_uninterrupted(tmp_path: Path) -> None:
    """Killed in each of eight trials one after the other, the run ends with the same trials and the same records."""
    whole = anneal(Analytic(), 30)
    for stop in (0, 1, 2, 7, 11, 12, 25, 29):
        with pytest.raises(Stopped):
            anneal(Analytic(stop_at=stop), 30, folder=tmp_path)
    assert anneal(Analytic(), 30, folder=tmp_path) == whole
    assert anneal(Analytic(), 30) == whole
    assert anneal(Analytic(), 30, seed=1) != whole


def annealed(folder: Path | None) -> Any:
    """Returns the trials and moves of a run that is kept in a folder; what a process that may be killed does."""
    result, moves = anneal(Analytic(pause=0.02), 60, folder=folder)
    return result.history, moves


@pytest.mark.slow
@FORKS
def test_killed_at_ten_random_moments_ends_as_uninterrupted(tmp_path: Path) -> None:
    """Processes that get SIGKILL at random moments leave a run that ends as one that was left alone."""
    kill("tests.search.test_annealing", "annealed", tmp_path)


# -- the pruner ----------------------------------------------------------------------------------------------------------------------


def widths(model: nn.Module) -> float:
    """Scores a shrunk model by the channels that are left, those of the last convolution most."""
    module: Any = model
    return float(0.1 * module.a.out_channels + 0.3 * module.b.out_channels + module.c.out_channels)


def pruner(config: list[dict[str, Any]], folder: Path | None = None, **options: Any) -> SimulatedAnnealingPruner:
    """Returns a pruner of the network."""
    return SimulatedAnnealingPruner(network(), config, options.pop("evaluator", widths), example_inputs=images(1), folder=folder, **options)


def test_pruner_finds_masks_that_speedup_takes(tmp_path: Path) -> None:
    """The call shape of the seeds: a total sparsity and an evaluator; best and last are kept, and masks make the best model."""
    found = pruner([{"op_types": ["Conv2d"], "total_sparsity": 0.5}], tmp_path)
    before = snapshot(found.model)
    masked, masks = found.compress()
    assert len(found.history) == len(found.moves) == 17
    assert found.best.score == max(t.score for t in found.history) > found.history[0].score
    assert found.last == found.history[-1]
    assert sum(int((~m).sum()) for m in masks.values()) == 24
    small, _ = gp.speedup(found.model, masks)
    assert widths(small) == pytest.approx(found.best.score)
    assert torch.allclose(small.eval()(images(1)), masked.eval()(images(1)), atol=1e-5)
    assert gp.count(small, images(1)) == found.best.cost
    assert not changes(before, snapshot(found.model))
    assert {"simulated-annealing.csv", "simulated-annealing.png"} < {file.name for file in tmp_path.iterdir()}
    again = pruner([{"op_types": ["Conv2d"], "total_sparsity": 0.5}], tmp_path, evaluator=None)
    assert again.best == found.best  # nothing is evaluated again
    with pytest.raises(FileError, match="seed"):
        pruner([{"op_types": ["Conv2d"], "total_sparsity": 0.5}], tmp_path, seed=1).search()


def test_best_result_says_the_same_in_a_config_list() -> None:
    """As in the seeds: number, model, masks, score, config list; the latter gives the same masks."""
    found = pruner([{"op_types": ["Conv2d"], "total_sparsity": 0.4}], trials=12)
    number, _, masks, score, entries = found.get_best_result()
    assert (found.history[number].score, number) == (score, found.best.number)
    _, other = gp.L1NormPruner(network(), entries, example_inputs=images(1)).compress()
    assert isinstance(other, gp.Masks)
    assert all((masks[n] == other[n]).all() for n in masks)


def test_minimising_is_maximising_the_negated_score() -> None:
    """The same evaluator with the other mode finds the smallest."""
    options: dict[str, Any] = {"budget": gp.Budget(params=0.4), "trials": 20}
    most = pruner([{"op_types": ["Conv2d"]}], **options)
    least = pruner([{"op_types": ["Conv2d"]}], optimize_mode="minimize", **options)
    assert -least.best.score < most.best.score
    assert -least.best.score == min(-t.score for t in least.history)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_temperature": 20.0}, "temperatures"),
        ({"cool_down_rate": 1.0}, "cool_down_rate"),
        ({"perturbation_magnitude": 0.0}, "perturbation_magnitude"),
        ({"trials": 1}, "trials"),
        ({"optimize_mode": "max"}, "optimize_mode"),
        ({"log_dir": "."}, "folder="),
    ],
)
def test_unusable_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    """Before anything is evaluated, with what to write instead."""
    with pytest.raises(ConfigError, match=message):
        pruner([{"op_types": ["Conv2d"], "sparsity": 0.5}], **options)


def test_what_is_missing_is_said() -> None:
    """Example inputs, and a budget."""
    with pytest.raises(InputError, match="example_inputs"):
        SimulatedAnnealingPruner(network(), [{"op_types": ["Conv2d"], "sparsity": 0.5}], widths)
    with pytest.raises(ConfigError, match="budget="):
        pruner([{"op_types": ["Conv2d"]}])
