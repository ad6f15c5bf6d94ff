"""How much each group is to lose, found by search under one budget: annealing, TPE, NetAdapt; and a front of accuracy against MACs.

python examples/searches.py [--out DIR]

Needs scikit-learn for its images and optuna for its samplers: pip install graphprune[demo,search].
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.cli import demo
from graphprune.search.evaluators import DataEvaluator

CONVOLUTIONS = [{"op_types": ["Conv2d"]}]  # with a budget, a config list says only where
BUDGET = gp.Budget(macs=0.6)  # what goes


class Workshop:
    """The digits, what trains on them, and what scores: searches see one part of the images, and the results are told by another."""

    def __init__(self) -> None:
        data = demo.load_digits(8)  # pixels, as they come
        self.images, self.labels = data.train_images[:800], data.train_labels[:800]
        self.x = self.images[:1]
        self.score = DataEvaluator([(data.train_images[800:], data.train_labels[800:])])
        self.accuracy = DataEvaluator([(data.test_images, data.test_labels)])

    def train(self, model: nn.Module, epochs: int, rate: float) -> None:
        """Trains a model in place; every call begins with the same order of the images."""
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
        model.train()
        for _ in range(epochs):
            for chosen in torch.randperm(len(self.images), generator=generator).split(demo.BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(self.images[chosen]), self.labels[chosen]).backward()
                optimizer.step()

    def recalibrate(self, model: nn.Module) -> None:
        """Estimates the statistics of BatchNorm anew: the least that a pruned model needs before it is scored."""
        gp.recalibrate(model, self.images[:400].split(200))

    def fine_tune(self, model: nn.Module) -> None:
        """Trains for a moment, as NetAdapt asks for after every step."""
        self.train(model, epochs=1, rate=0.02)


def front(model: nn.Module, shop: Workshop, out: Path) -> gp.StudyResult:
    """Returns what NSGA-II finds of accuracy against MACs, which needs no budget."""
    objective = gp.Objective(model, shop.x, shop.score, config_list=CONVOLUTIONS, finetune=shop.recalibrate)
    found = gp.Study(objective, "nsga-ii", minimize="macs", options={"population_size": 10}).run(30)
    with (out / "front.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["macs", "accuracy"], *([p.measured, p.trial.score] for p in found.front)])
    found.plot(out / "front.png")
    return found


def main() -> None:
    """Trains a network, searches, and compares what was found with the same sparsity everywhere."""
    parser = argparse.ArgumentParser(description="searches for the sparsity of every group")
    parser.add_argument("--out", type=Path, help="folder for runs, studies, plots and the table; a temporary one by default")
    given: Path | None = parser.parse_args().out
    out = given or Path(tempfile.mkdtemp(prefix="graphprune-"))
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    shop = Workshop()
    model = demo.build(depth=8, seed=0)
    shop.train(model, epochs=8, rate=0.05)
    print(f"trained: {shop.accuracy(model):.1%} right, {gp.count(model, shop.x).macs:,} MACs")
    objective = gp.Objective(model, shop.x, shop.score, budget=BUDGET, config_list=CONVOLUTIONS, finetune=shop.recalibrate)
    uniform = objective.project(dict.fromkeys(objective.groups, 0.5))
    print(f"{len(objective.groups)} groups; the same sparsity everywhere: {objective(uniform).score:.1%} in the part that searches see")
    found = {"uniform": objective.small(uniform)}

    annealing = gp.SimulatedAnnealingPruner(
        model, CONVOLUTIONS, shop.score, budget=BUDGET, example_inputs=shop.x, finetune=shop.recalibrate, trials=30, folder=out / "runs"
    )
    masked, masks = annealing.compress()
    result = annealing.search()  # what compress() ran
    accepted = [move.accepted for move in annealing.moves]
    print(f"annealing: best {result.best.score:.1%} (trial {result.best.number}), last {result.last.score:.1%}; "
          f"{sum(accepted[:15])} of the first 15 accepted, {sum(accepted[15:])} of the others")  # fmt: skip
    result.plot(out / "annealing.png")
    found["annealing"] = gp.speedup(masked, masks)[0]

    # A study lives in its storage: another process, or this one started again, goes on where it is. Here it stops half way.
    gp.Study(objective, "tpe", storage=out / "study.db").run(12)
    study = gp.Study(objective, "tpe", storage=out / "study.db")
    print(f"TPE: goes on behind {len(study.history())} trials")
    searched = study.run(24)
    print(f"TPE: best {searched.best.score:.1%} (trial {searched.best.number} of {len(searched.history)}), last {searched.last.score:.1%}")
    found["TPE"] = objective.small(searched.best.sparsities)

    adapting = gp.NetAdaptPruner(
        model, CONVOLUTIONS, shop.fine_tune, shop.score, sparsity_per_iteration=0.15, budget=BUDGET, example_inputs=shop.x
    )
    found["NetAdapt"] = gp.speedup(*adapting.compress())[0]
    for step in adapting.steps:
        print(f"NetAdapt, step {step.number}: {step.removed} channels of {step.group}, {step.after:,.0f} MACs, {step.score:.1%}")
    print(f"NetAdapt: best {adapting.best.score:.1%}, last {adapting.last.score:.1%}")

    print("after three epochs of training each:")
    for name, small in found.items():
        shop.recalibrate(small)
        before = shop.accuracy(small)
        shop.train(small, epochs=3, rate=0.02)
        left = gp.count(small, shop.x).macs / gp.count(model, shop.x).macs
        print(f"{name}: {left:.1%} of the MACs left, {before:.1%} recalibrated, {shop.accuracy(small):.1%} trained")
    for point in front(model, shop, out).front:
        print(f"front: {point.measured:,.0f} MACs, {point.trial.score:.1%}")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
