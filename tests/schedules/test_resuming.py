"""Rounds that are killed and started again end exactly as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune as gp
from graphprune.schedules.gradual import AGPPruner
from graphprune.schedules.lottery import LotteryTicketPruner
from graphprune.schedules.rounds import LinearPruner
from tests.support.killing import FORKS, kill


def run_of(folder: Path | None, kind: str) -> Any:
    """Returns all that a run of one kind leaves; what a process that may be killed does."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(192, 3))
    x, y = torch.randn(64, 1, 8, 8), torch.randint(0, 3, (64,))

    def train(now: nn.Module, optimizer: torch.optim.Optimizer, criterion: Any) -> None:
        order = torch.randperm(64)
        for i in range(0, 64, 16):
            optimizer.zero_grad()
            criterion(now(x[order[i : i + 16]]), y[order[i : i + 16]]).backward()
            optimizer.step()

    @torch.no_grad()
    def evaluator(now: nn.Module) -> float:
        return -float(F.cross_entropy(now.eval()(x), y))

    extra: dict[str, Any] = {"trainer": train, "optimizer": torch.optim.Adam(model.parameters(), lr=1e-2), "criterion": F.cross_entropy}
    extra |= {"evaluator": evaluator, "example_inputs": x[:1], "folder": folder, "training_epochs": 2}
    entries = [{"sparsity": 0.7, "op_types": ["default"]}]
    pruner: AGPPruner | LotteryTicketPruner
    if kind == "agp":
        pruner = AGPPruner(model, entries, "level", 10, **extra)
    elif kind == "agp physical":
        pruner = AGPPruner(model, entries, "taylorfo", 6, speedup=True, **extra)
    else:
        extra["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        pruner = LotteryTicketPruner(model, entries, "l1", 4, speedup=True, rewind_epoch=1, **extra)
    last, masks = pruner.compress()
    best = pruner.best
    return {
        "model": last.state_dict(),
        "masks": {name: torch.as_tensor(masks[name]) for name in masks},
        "best": best.model.state_dict(),
        "best masks": {name: torch.as_tensor(best.masks[name]) for name in best.masks},
        "history": [{k: v for k, v in record.items() if k != "seconds"} for record in pruner.history.to_dicts()],
        "number": best.round.number,
    }


@FORKS
def test_killed_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    """After three SIGKILLs weights, masks, scores and the best round are bit-identical to an uninterrupted run's."""
    kill("tests.schedules.test_resuming", "run_of", tmp_path, "agp physical", kills=3)


@FORKS
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["agp", "agp physical", "lottery"])
def test_runs_killed_at_ten_moments_end_like_uninterrupted_ones(kind: str, tmp_path: Path) -> None:
    """So they are after ten at random moments, with masks, with channels removed, and with rewound weights."""
    kill("tests.schedules.test_resuming", "run_of", tmp_path, kind)


def test_a_folder_of_another_run_is_refused_and_a_finished_one_is_read(tmp_path: Path) -> None:
    """Other weights, sparsities or algorithms do not go on with a run; the same call again returns its result without training."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)
    entries = [{"sparsity": 0.5, "op_names": ["0"]}]
    calls: list[nn.Module] = []

    def pruner(now: nn.Module = model, share: float = 0.5, algorithm: str = "l1", **options: Any) -> LinearPruner:
        given: dict[str, Any] = {"example_inputs": x, "folder": tmp_path, "finetune": calls.append, **options}
        return LinearPruner(now, [{**entries[0], "sparsity": share}], algorithm, 2, **given)

    small, masks = pruner(speedup=True).compress()
    assert len(calls) == 2
    again = pruner(speedup=True)
    read, read_masks = again.compress()
    assert len(calls) == 2
    assert {n: masks[n].tolist() for n in masks} == {n: read_masks[n].tolist() for n in read_masks}
    assert torch.equal(read(x), small(x))
    assert len(again.history) == 2
    with pytest.raises(gp.FileError, match="other settings: speedup was true and is false now"):
        pruner().compress()
    with pytest.raises(gp.FileError, match="other settings: entries was"):
        pruner(speedup=True, share=0.25).compress()
    with pytest.raises(gp.FileError, match='algorithm was "L1NormPruner" and is "L2NormPruner" now'):
        pruner(speedup=True, algorithm="l2").compress()
    other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(gp.FileError, match="other settings: model was"):
        pruner(other, speedup=True).compress()


class _Counting(nn.Module):
    """Scales by how often it was called in training, which no state dict says, and by a number that only its extra state holds."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1), persistent=False)
        self.drift = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the scaled input."""
        if self.training:
            self.calls.add_(1)
            self.drift += 0.01
        return x * (1 + 0.01 * self.calls) * self.drift

    def get_extra_state(self) -> dict[str, float]:
        """Returns the number."""
        return {"drift": self.drift}

    def set_extra_state(self, state: dict[str, float]) -> None:
        """Takes it over."""
        self.drift = state["drift"]


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_what_no_state_dict_holds_is_kept(optimizer: str, tmp_path: Path) -> None:
    """Buffers that are not persistent, extra states and LBFGS's history are as they were; other learning rates are refused."""
    x, y = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2
    rounds: list[int] = []

    def pruner(folder: Path | None, stop: int = 99, rate: float = 0.1) -> AGPPruner:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), _Counting(), nn.ReLU(), nn.Linear(8, 2))
        kinds: dict[str, Any] = {"adam": torch.optim.Adam, "lbfgs": torch.optim.LBFGS}
        rounds.clear()

        def train(now: nn.Module, own: Any, criterion: Any) -> None:
            rounds.append(len(rounds))
            if len(rounds) > stop:
                raise KeyboardInterrupt

            def closure() -> torch.Tensor:
                own.zero_grad()
                loss: torch.Tensor = criterion(now(x), y)
                loss.backward()
                return loss

            own.step(closure)

        own = kinds[optimizer](model.parameters(), lr=rate)
        options: dict[str, Any] = {"trainer": train, "optimizer": own, "criterion": nn.functional.cross_entropy, "folder": folder}
        return AGPPruner(model, [{"sparsity": 0.5, "op_types": ["Linear"]}], "level", 4, **options)

    whole, masks = pruner(None).compress()
    with pytest.raises(KeyboardInterrupt):
        pruner(tmp_path, stop=2).compress()
    with pytest.raises(gp.FileError, match="other settings: optimizer was"):
        pruner(tmp_path, rate=0.2).compress()
    again, masks_again = pruner(tmp_path).compress()
    assert len(rounds) == 2
    assert all(torch.equal(torch.as_tensor(masks[name]), torch.as_tensor(masks_again[name])) for name in masks)
    for name, value in whole.state_dict().items():
        found = again.state_dict()[name]
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
    assert torch.equal(again.get_buffer("1.calls"), whole.get_buffer("1.calls"))
