"""The call shapes of all three versions of NNI, as they are written there: they work, or one error names what to write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune import compat
from tests.support.handmade import residual
from tests.support.noise import epochs_trainer as trainer
from tests.support.noise import score
from tests.support.untouched import changes, snapshot

CONVS = [{"sparsity": 0.5, "op_types": ["Conv2d"]}]
NORMS = [{"sparsity": 0.5, "op_types": ["BatchNorm2d"]}]
EVERYWHERE = [{"sparsity": 0.5, "op_types": ["default"]}]


class TorchEvaluator:
    """What the second and third version take in the place of a trainer, an evaluator and data: no function."""


@dataclass(frozen=True)
class Call:
    """One call shape.

    Attributes:
        version: of NNI.
        name: of the pruner there.
        arguments: as they stand there, in their order.
        named: those that can only be given by name.
        error: the words that say what to write; "" where it works.
    """

    version: int
    name: str
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    error: str = ""

    @property
    def title(self) -> str:
        """For the test's name."""
        return f"V{self.version}-{self.name}"


def call(version: int, name: str, *arguments: Any, error: str = "", **named: Any) -> Call:
    """Returns a call shape; strings of `GIVEN` stand for what there is of each when it is made."""
    return Call(version, name, arguments, named, error)


TRAINER = r"the trainer of {name} is a TorchEvaluator.*Pass a function trainer\(model, optimizer, criterion\).*or data= and loss="
EVALUATOR = "evaluator of {name} is a TorchEvaluator.*Pass a function from a model to its score; finetune="
ROUNDS = r"{name} is given a L1NormPruner in place of a model.*Write {name}\(model, config_list, pruning_algorithm, total_iteration\)"
TICKETS = [{"sparsity": 0.75, "prune_iterations": 2, "op_types": ["Conv2d"]}]
PLACES = [{"op_types": ["Conv2d"]}]
SHAPES = (
    call(1, "LevelPruner", "model", EVERYWHERE, False, None),
    call(1, "LevelPruner", "model", EVERYWHERE, "optimizer", error="single weights depend on nothing.*L1FilterPruner"),
    *(call(1, f"{name}Pruner", "model", CONVS, True, "x") for name in ("L1Filter", "L2Filter", "FPGM")),
    call(1, "SlimPruner", "model", NORMS, "optimizer", "trainer", "criterion", 1, 1e-4, False, None),
    *(
        call(1, f"Activation{name}RankFilterPruner", "model", CONVS, "optimizer", "trainer", "criterion", "relu", 1, False, None)
        for name in ("APoZ", "Mean")
    ),
    call(1, "TaylorFOWeightFilterPruner", "model", CONVS, "optimizer", "trainer", "criterion", 1, True, "x", False),
    call(1, "ADMMPruner", "model", CONVS, "trainer", "criterion", 2, 1, 1e-4, "l1"),
    call(1, "ADMMPruner", "model", CONVS, "trainer", "criterion", 2, 1, 1e-4, "fpgm", error="nothing can be projected.*'l1' or 'l2'"),
    call(1, "AGPPruner", "model", EVERYWHERE, "optimizer", "trainer", "criterion", 2, 1, "level"),
    call(1, "LotteryTicketPruner", "model", TICKETS, "optimizer", None, True),
    call(1, "LotteryTicketPruner", "model", CONVS, "optimizer", error="has no 'prune_iterations'.*total_iteration="),
    call(1, "SimulatedAnnealingPruner", "model", CONVS, "score", "maximize", "l1", 100, 20, 0.5, 0.35, None, dummy_input="x"),
    call(1, "SimulatedAnnealingPruner", "model", CONVS, "score", error="no example inputs.*Pass example_inputs="),
    call(1, "SimulatedAnnealingPruner", "model", CONVS, "score", "maximize", "level", error="Write base_algo='l1'.*LevelPruner"),
    call(1, "AutoCompressPruner", "model", CONVS, "trainer", "score", "x", "criterion", 2, "maximize", "l1", 100, 20, 0.5, 0.3, 1, 1, 0.1),
    call(1, "AMCPruner", "model", PLACES, "val_score", "loader", model_type="any", flops_ratio=0.5, lbound=0.2, rbound=1.0,
         reward="acc_reward", n_calibration_batches=60, n_points_per_layer=10, channel_round=1, train_episode=2),
    call(1, "AMCPruner", "model", PLACES, "val_score", "loader", rbound=0.9, error="no argument rbound=.*Write lbound="),
    call(1, "AMCPruner", "model", PLACES, "val_score", "loader", reward="acc_flops_reward", error="Write the reward into the evaluator"),
    call(1, "AMCPruner", "model", PLACES, "val_score", "loader", n_calibration_batches=-1, error="batches of a reconstruction is -1"),
    call(1, "NetAdaptPruner", "model", CONVS, None, "score", "maximize", "l1", 0.3, dummy_input="x"),
    call(1, "SensitivityPruner", "model", CONVS, "score", None, "l1", None, 0.3, 1e9, None, dummy_input="x"),
    # -- the second version: the pruners of graphprune itself
    call(2, "LevelPruner", "model", EVERYWHERE, "normal", None),
    call(2, "LevelPruner", "model", EVERYWHERE, "balance", [3]),
    *(call(2, f"{name}Pruner", "model", CONVS, "dependency_aware", "x") for name in ("L1Norm", "L2Norm", "FPGM")),
    *(call(2, f"{name}Pruner", "model", CONVS, "normal", None) for name in ("L1Norm", "L2Norm", "FPGM")),
    call(2, "SlimPruner", "model", NORMS, "evaluator", 1, 1e-4, "global", error=TRAINER),
    *(
        call(2, f"Activation{name}RankPruner", "model", CONVS, "evaluator", 20, "relu", "normal", None, error=TRAINER)
        for name in ("APoZ", "Mean")
    ),
    call(2, "TaylorFOWeightPruner", "model", CONVS, "evaluator", 20, "normal", None, error=TRAINER),
    call(2, "ADMMPruner", "model", CONVS, "evaluator", 2, 1, "fine-grained", error=TRAINER),
    *(call(2, f"{name}Pruner", "model", EVERYWHERE, "level", 2, None, False, "score", False, {}) for name in ("AGP", "Linear")),
    *(call(2, f"{name}Pruner", "model", CONVS, "l1", 2, ".", True, "evaluator", False, {}, error=EVALUATOR) for name in ("AGP", "Linear")),
    call(2, "LotteryTicketPruner", "model", EVERYWHERE, "level", 2, None, False, "score", False, {}),
    call(2, "LotteryTicketPruner", "model", EVERYWHERE, "level", 2, ".", False, None, False, True, {},
         error="no argument reset_weight=.*Write rewind="),
    call(2, "LotteryTicketPruner", "model", EVERYWHERE, "level", 2, reset_weight=False, error="Write rewind=.*rewind='nothing'"),
    call(2, "SimulatedAnnealingPruner", "model", CONVS, "score", 100, 20, 0.5, 0.35, example_inputs="x"),
    call(2, "SimulatedAnnealingPruner", "model", CONVS, "score", 100, 20, 0.9, 0.35, "l1", {}, ".", False, False,
         error="no argument pruning_algorithm=.*Write base_algo="),
    call(2, "SimulatedAnnealingPruner", "model", CONVS, "evaluator", 100, 20, 0.5, 0.35, example_inputs="x", error=EVALUATOR),
    call(2, "AutoCompressPruner", "model", CONVS, 2, "admm_params", {"trials": 3}, None, False, "score", True, example_inputs="x"),
    call(2, "AutoCompressPruner", "model", CONVS, 2, {"evaluator": 1, "iterations": 1}, {}, ".", False, error="evaluator.*trainer="),
    call(2, "AMCPruner", 2, "model", CONVS, "score", "l1", example_inputs="x"),
    call(2, "AMCPruner", 2, "model", CONVS, "score", "l1", ".", False, {}, {}, "flops", error="no argument log_dir=.*Write folder="),
    call(2, "AMCPruner", 2, "model", CONVS, "score", target="flops", error="no argument target=.*Write budget="),
    call(2, "MovementPruner", "model", CONVS, "evaluator", 1, 2, 3, None, None, "hard", "finegrained", error=TRAINER),
    # -- the third version
    *(call(3, f"{name}Pruner", "model", CONVS) for name in ("Level", "L1Norm", "L2Norm", "FPGM")),
    *(call(3, f"{name}Pruner", "model", CONVS, evaluator="evaluator", error="no argument evaluator=") for name in ("Level", "L1Norm")),
    *(call(3, f"{name}Pruner", "model", CONVS, existed_wrappers={}, error="no argument existed_wrappers=") for name in ("Level", "L1Norm")),
    call(3, "L1NormPruner", "model", CONVS, "evaluator", {}, error="1 positional argument more than it takes.*by name"),
    call(3, "SlimPruner", "model", NORMS, "evaluator", 100, 1.0, error=TRAINER),
    call(3, "TaylorFOWeightPruner", "model", CONVS, "evaluator", 100, error=TRAINER),  # TaylorPruner there
    *(call(3, f"{name}Pruner", "pruner", 10, 5, error=ROUNDS) for name in ("AGP", "Linear")),
    *(call(3, f"{name}Pruner", "pruner", 10, 5, "evaluator", error=ROUNDS) for name in ("AGP", "Linear")),
    call(3, "MovementPruner", "model", CONVS, "evaluator", 1, 2, 1.0, error=TRAINER),
    call(3, "LevelPruner", "model", [{"sparse_ratio": 0.5, "op_types": ["Conv2d"]}], error="'sparse_ratio' .did you mean 'sparsity'"),
)  # fmt: skip


def given() -> dict[str, Any]:
    """Returns what the words in `SHAPES` stand for."""
    model, x = residual()
    return {
        "model": model,
        "x": x,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "trainer": trainer,
        "criterion": nn.CrossEntropyLoss(),
        "score": score,
        "val_score": lambda batches, small: score(small) * len(batches),
        "loader": [(x, torch.zeros(2, dtype=torch.long))],
        "evaluator": TorchEvaluator(),
        "pruner": gp.L1NormPruner(model, CONVS, x),
        "admm_params": {"trainer": trainer, "optimizer": lambda p: torch.optim.SGD(p, lr=0.01), "criterion": nn.CrossEntropyLoss(),
                        "iterations": 1, "training_epochs": 1},
    }  # fmt: skip


def filled(value: Any, names: dict[str, Any]) -> Any:
    """Returns what a word stands for, and anything else as it is."""
    return names.get(value, value) if isinstance(value, str) else value


@pytest.mark.filterwarnings("ignore:.*was given no example inputs")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.title)
def test_call_shape(shape: Call) -> None:
    """A call as it is written there prunes what it asks for, or is refused in words that name what to write; the model stays as it is."""
    names = given()
    before = snapshot(names["model"])
    kind = getattr(compat if shape.version == 1 else gp, shape.name)
    arguments = [filled(value, names) for value in shape.arguments]
    named = {name: filled(value, names) for name, value in shape.named.items()}
    if shape.error:
        with pytest.raises(gp.GraphPruneError, match=shape.error.format(name=shape.name)):
            kind(*arguments, **named)
    else:
        model, masks = kind(*arguments, **named).compress()
        if shape.name != "LotteryTicketPruner" or shape.version > 1:  # which masks round by round
            assert 0.3 < masks.sparsity < 0.8
            assert model is not names["model"]
    assert changes(before, snapshot(names["model"])) == []
