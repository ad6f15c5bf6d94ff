"""Searches against trying everything, on networks of three convolutions that have learned digits.

Annealing, AMC, TPE and random search score a shrunk model with BatchNorm statistics estimated again and nothing trained. Their oracle is
every point: all combinations of widths that meet the budget and in which no layer can have one channel more.

NetAdapt trains for one epoch in every step, carries the weights on, and trains its result for some more epochs in the end (the long-term
fine-tuning of its paper). Its oracle is a grid of points that are each pruned at once and trained for as many epochs in all, by the same
optimizer. The highest of so many scores is high by luck as well: the best points of the grid are trained again in other orders of the
images, and their mean scores are compared with those of NetAdapt's last epochs in as many orders; so is uniform sparsity. Further rows hold
one training against the highest single score, and say what NetAdapt's widths alone are worth: pruned at once and trained like a grid's
point, and pruned and not trained, among every point. Its network is narrower: trained again, half of a wide one scores the same whatever
is removed.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphprune as gp
from graphprune.search.annealing import Move
from graphprune.search.objective import Objective, Trial
from graphprune.sensitivity.bench import same_random

TRAINING = 1200  # of the 1,797 images; the others score
CONVOLUTIONS = [{"op_types": ["Conv2d"]}]
NEAR = 0.01  # of accuracy: what a search may be behind the best
REQUIRED = ("annealing", "AMC", "NetAdapt")
_SLACK = 1e-9


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        widths: of the convolutions of the network that is pruned without training.
        narrow: of the network that NetAdapt prunes.
        removed: the share of the MACs that goes.
        trials: of annealing, TPE and random search, and episodes of AMC.
        step: the share of the MACs that NetAdapt saves in a step.
        longer: epochs that NetAdapt's result is trained for in the end.
        orders: in which NetAdapt's result and the best points of the grid are trained again.
        finalists: how many points of the grid are.
        levels: of each layer's sparsity in the grid.
    """

    widths: tuple[int, ...] = (16, 32, 32)
    narrow: tuple[int, ...] = (8, 16, 16)
    removed: float = 0.5
    trials: int = 150
    step: float = 0.05
    longer: int = 3
    orders: int = 4
    finalists: int = 3
    levels: int = 5

    @property
    def budget(self) -> gp.Budget:
        """What must go."""
        return gp.Budget(macs=self.removed)


@dataclass(frozen=True)
class Oracle:
    """What trying many points found.

    Attributes:
        name: of what was tried.
        points: how many.
        best: the highest score.
        widths: of the best point.
        uniform: the score of the same sparsity everywhere.
        seconds: that it took.
    """

    name: str
    points: int
    best: float
    widths: tuple[int, ...]
    uniform: float
    seconds: float


@dataclass(frozen=True)
class Found:
    """What one search found.

    Attributes:
        seed: of the network and of the search.
        search: its name.
        score: of its best model.
        widths: of that.
        oracle: what it is held against.
        models: how many different models it evaluated.
        needed: after how many of them the first was within `NEAR` of the oracle's best, None where none was.
        seconds: that it took.
        first: share of the candidates that annealing accepted in its first fifth.
        last: and in its last fifth.
        first_worse: share of those that were worse than the present point.
        last_worse: likewise.
    """

    seed: int
    search: str
    score: float
    widths: tuple[int, ...]
    oracle: Oracle
    models: int
    needed: int | None
    seconds: float
    first: float | None = None
    last: float | None = None
    first_worse: float | None = None
    last_worse: float | None = None

    @property
    def behind(self) -> float:
        """By how much it is behind the oracle's best; below 0 where it is ahead."""
        return self.oracle.best - self.score

    @property
    def above(self) -> float:
        """By how much it is above uniform sparsity."""
        return self.score - self.oracle.uniform

    @property
    def holds(self) -> bool:
        """Whether it is near the best, and better than uniform."""
        return self.behind <= NEAR + _SLACK and self.above > 0

    def to_dict(self) -> dict[str, Any]:
        """Returns all of it as plain values."""
        return {**asdict(self), "behind": self.behind, "above": self.above, "holds": self.holds}


# -- the network ---------------------------------------------------------------------------------------------------------------------


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Returns shuffled images (1797, 1, 8, 8) and labels."""
    raw = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(raw.target), generator=torch.Generator().manual_seed(0))
    return (torch.from_numpy(raw.images).float().unsqueeze(1) / 8 - 1)[order], torch.from_numpy(raw.target)[order]


def trained(seed: int, widths: Sequence[int]) -> nn.Module:
    """Returns a network of convolutions that has learned the training part."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(itertools.pairwise((1, *widths))):
            stride = 2 if number == 1 else 1
            layers += [nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * widths[-1], 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(8):
        for batch in torch.randperm(TRAINING, generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Returns the share of the other images that are classified correctly."""
    images, labels = digits()
    return float((model(images[TRAINING:]).argmax(1) == labels[TRAINING:]).double().mean())


def recalibrated(model: nn.Module) -> None:
    """Estimates the statistics of BatchNorm again."""
    gp.recalibrate(model, list(digits()[0][:512].split(256)))


def one_epoch(model: nn.Module) -> None:
    """Trains for one epoch, in an order that the global generator decides."""
    images, labels = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model.train()
    for batch in torch.randperm(TRAINING).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    model.eval()


def epochs(count: int, order: int = 0) -> Callable[[nn.Module], None]:
    """Returns what trains for so many epochs, each as `one_epoch` does; the same ones for every model, by the number of an order."""

    def train(model: nn.Module) -> None:
        with same_random(order):
            for _ in range(count):
                one_epoch(model)

    return train


# -- oracles -------------------------------------------------------------------------------------------------------------------------


def objective(model: nn.Module, settings: Settings, finetune: Callable[[nn.Module], object] = recalibrated) -> Objective:
    """Returns how points are scored."""
    return gp.Objective(model, digits()[0][:1], accuracy, config_list=CONVOLUTIONS, budget=settings.budget, finetune=finetune)


def widths_of(target: Objective, trial: Trial) -> tuple[int, ...]:
    """Returns the widths of a trial's model."""
    return tuple(target.counts(trial.sparsities).values())


def on_budget(target: Objective) -> list[dict[str, float]]:
    """Returns every point on the budget: it is met, and would not be with one channel more in any group."""
    sizes = {name: target.scores[name].size for name in target.groups}
    constraint = target.constraints[0]

    def admissible(widths: tuple[int, ...]) -> bool:
        return constraint.cost(dict(zip(sizes, widths, strict=True))) <= constraint.target

    found = []
    *others, last = (range(target.fewest(name), size + 1) for name, size in sizes.items())
    for head in itertools.product(*others):
        widths = next(((*head, k) for k in reversed(last) if admissible((*head, k))), None)
        if widths is None:
            continue
        wider = ((*widths[:at], k + 1, *widths[at + 1 :]) for at, k in enumerate(widths) if k < list(sizes.values())[at])
        if not any(map(admissible, wider)):
            found.append({name: (size - k) / size for (name, size), k in zip(sizes.items(), widths, strict=True)})
    return found


def grid(target: Objective, levels: int) -> list[dict[str, float]]:
    """Returns the points that so many evenly spaced sparsities of each group are projected onto, each once."""
    wishes = itertools.product(np.linspace(0.0, 0.9, levels).tolist(), repeat=len(target.groups))
    points = {tuple(target.project(dict(zip(target.groups, wish, strict=True))).items()) for wish in wishes}
    return [dict(point) for point in sorted(points)]


def uniform(target: Objective) -> dict[str, float]:
    """Returns the same sparsity everywhere."""
    return target.project(dict.fromkeys(target.groups, 0.5))


def best_of(name: str, target: Objective, points: list[dict[str, float]]) -> tuple[Oracle, list[Trial]]:
    """Returns what scoring all of these points finds, and the trials, the best one first."""
    start = time.perf_counter()
    trials = sorted((target(point, number) for number, point in enumerate(points)), key=lambda t: (-t.score, t.number))
    even, seconds = target(uniform(target)).score, time.perf_counter() - start
    return Oracle(name, len(points), trials[0].score, widths_of(target, trials[0]), even, seconds), trials


def every_point(target: Objective) -> Oracle:
    """Returns what scoring every point on the budget finds."""
    return best_of("every point", target, on_budget(target))[0]


# -- searches ------------------------------------------------------------------------------------------------------------------------


def judged(seed: int, search: str, target: Objective, oracle: Oracle, trials: Sequence[Trial], seconds: float) -> Found:
    """Returns what trials came to."""
    best = max(trials, key=lambda t: (t.score, -t.number))
    seen: set[tuple[int, ...]] = set()
    needed = None
    for trial in trials:
        seen.add(widths_of(target, trial))
        if needed is None and trial.score >= oracle.best - NEAR - _SLACK:
            needed = len(seen)
    return Found(seed, search, best.score, widths_of(target, best), oracle, len(seen), needed, seconds)


def accepted(moves: Sequence[Move]) -> dict[str, float]:
    """Returns the shares of candidates that annealing accepted in its first and last fifth; of the worse ones, too."""
    fifth = (len(moves) - 1) // 5
    parts = {"first": moves[1 : 1 + fifth], "last": moves[-fifth:]}
    out = {name: float(np.mean([m.accepted for m in part])) for name, part in parts.items()}
    worse = {f"{name}_worse": [m.accepted for m in part if m.chance < 1.0] for name, part in parts.items()}
    return out | {name: float(np.mean(part)) if part else 0.0 for name, part in worse.items()}


def untrained(model: nn.Module, seed: int, settings: Settings, oracle: Oracle) -> list[Found]:
    """Returns what annealing, AMC, TPE and random search found without training."""
    target, trials = objective(model, settings), settings.trials
    how: dict[str, Any] = {"example_inputs": digits()[0][:1], "budget": settings.budget, "finetune": recalibrated, "seed": seed}
    annealing = gp.SimulatedAnnealingPruner(model, CONVOLUTIONS, accuracy, trials=trials, **how)
    runs: dict[str, Callable[[], Any]] = {
        "annealing": annealing.search,
        "AMC": gp.AMCPruner(trials, model, CONVOLUTIONS, accuracy, **how).search,
        "TPE": lambda: gp.run_study(target, trials, seed=seed),
        "random": lambda: gp.run_study(target, trials, sampler="random", seed=seed),
    }
    found = []
    for name, run in runs.items():
        start = time.perf_counter()
        history = run().history
        result = judged(seed, name, target, oracle, history, time.perf_counter() - start)
        found.append(Found(**{**vars(result), **(accepted(annealing.moves) if name == "annealing" else {})}))
    return found


def adapted(model: nn.Module, seed: int, settings: Settings) -> list[Found]:
    """Returns what NetAdapt found, against a grid with as much training; and what its widths are worth without its weights."""
    start, orders = time.perf_counter(), range(1, 1 + settings.orders)
    how: dict[str, Any] = {"sparsity_per_iteration": settings.step, "example_inputs": digits()[0][:1], "seed": seed}
    pruner = gp.NetAdaptPruner(model, CONVOLUTIONS, one_epoch, accuracy, budget=settings.budget, **how)
    history, best = pruner.search().history, pruner.best
    small, _ = gp.speedup(*pruner.compress())
    single, *several = [trained_on(small, settings.longer, order) for order in (0, *orders)]
    seconds, total = time.perf_counter() - start, len(pruner.steps) + settings.longer
    longer = objective(model, settings, epochs(total))
    highest, trials = best_of(f"grid, {total} epochs, once", longer, grid(longer, settings.levels))

    def again(point: Mapping[str, float]) -> float:
        return float(np.mean([trained_on(longer.small(point), total, order) for order in orders]))

    start = time.perf_counter()
    mean, winner = max(((again(t.sparsities), t) for t in trials[: settings.finalists]), key=lambda pair: pair[0])
    even, took = again(uniform(longer)), time.perf_counter() - start
    tuned = Oracle(f"grid, {total} epochs, mean", highest.points, mean, widths_of(longer, winner), even, highest.seconds + took)
    widths, count, plain = widths_of(longer, best), len({widths_of(longer, trial) for trial in history}), objective(model, settings)
    return [
        Found(seed, "NetAdapt", float(np.mean(several)), widths, tuned, count, None, seconds),
        Found(seed, "NetAdapt, once", single, widths, highest, count, None, seconds),
        Found(seed, "NetAdapt's widths", again(best.sparsities), widths, tuned, count, None, seconds),
        Found(seed, "NetAdapt's widths", plain(best.sparsities).score, widths, every_point(plain), count, None, seconds),
    ]


def trained_on(model: nn.Module, count: int, order: int) -> float:
    """Returns the accuracy of a copy that is trained for so many further epochs."""
    own = copy.deepcopy(model)
    epochs(count, order)(own)
    return accuracy(own)


def measured(seed: int, settings: Settings) -> list[Found]:
    """Returns what all searches found on the networks of one seed."""
    model = trained(seed, settings.widths)
    oracle = every_point(objective(model, settings))
    return [*untrained(model, seed, settings, oracle), *adapted(trained(seed, settings.narrow), seed, settings)]
