"""Movement pruning that is interrupted and started again ends exactly as if nothing had happened."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import graphprune as gp
from graphprune.schedules.history import Movement
from graphprune.schedules.movement import MovementPruner
from graphprune.training.session import Trainer
from tests.support.killing import FORKS, kill, same
from tests.support.versions import TORCH

EPOCHS = 4
KINDS: dict[str, dict[str, Any]] = {
    "hard": {"warm_up_step": 3, "cool_down_beginning_step": 10},
    "soft": {"warm_up_step": 0, "cool_down_beginning_step": 8, "movement_mode": "soft", "regular_scale": 20.0},
    "channels": {"warm_up_step": 3, "cool_down_beginning_step": 11, "sparse_granularity": "channels"},
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": partial(torch.optim.Adam, lr=5e-3),
    "momentum": partial(torch.optim.SGD, lr=2e-2, momentum=0.9, weight_decay=1e-3),
}


class Killed(BaseException):
    """Stands for a process that was killed in the middle of an epoch."""


class Centers(nn.Module):
    """Center loss: a criterion with parameters that the optimizer does not hold, and a buffer that follows what it sees."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Returns cross-entropy, and how far outputs are from their running mean."""
        self.mean = 0.9 * self.mean + 0.1 * output.detach().mean(0)
        return F.cross_entropy(output, target) + 0.1 * (output - self.mean).square().mean()


def seed() -> None:
    """Puts all generators to their beginnings."""
    torch.manual_seed(1)
    random.seed(2)
    np.random.seed(3)  # noqa: NPY002 (the generator that the trainer draws from)


def network() -> nn.Module:
    """Returns a convolution with batch norm, dropout, and two linear layers."""
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 6, 3), nn.ReLU()]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 3))


def images() -> tuple[Tensor, Tensor]:
    """Returns 32 small images and their classes."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 1, 6, 6, generator=generator), torch.randint(0, 3, (32,), generator=generator)


def train(model: nn.Module, optimizer: Optimizer, criterion: Any, stop: int | None = None) -> None:
    """One epoch of four steps over batches in random order, from the generators of torch, numpy and Python."""
    x, y = images()
    order = torch.randperm(32)
    for number, chosen in enumerate(order.split(8)):
        if number == stop:
            raise Killed
        optimizer.zero_grad()
        criterion(model(x[chosen] + 0.01 * float(np.random.rand()) * random.random()), y[chosen]).backward()  # noqa: NPY002, S311 (user code)
        optimizer.step()
    optimizer.param_groups[0]["lr"] *= 0.9


def score(model: nn.Module) -> float:
    """Scores a model by its loss."""
    x, y = images()
    with torch.no_grad():
        return -float(F.cross_entropy(model.eval()(x), y))


def pruner(kind: str, optimizer: str | Callable[..., Optimizer], folder: Path | None, **change: Any) -> MovementPruner:
    """Returns the pruner that every process makes, with random numbers that start anew."""
    model = network()
    seed()
    made = (OPTIMIZERS[optimizer] if isinstance(optimizer, str) else optimizer)(model.parameters())
    entries = [{"sparsity": 0.5 if kind != "soft" else 0.49, "op_types": ["Conv2d", "Linear"]}, {"exclude": True, "op_names": ["9"]}]
    given: dict[str, Any] = {"trainer": train, "criterion": Centers(), **KINDS[kind], **change}
    if kind == "channels":
        given["example_inputs"] = images()[0][:1]
    entries = given.pop("config_list", entries)
    given.setdefault("training_epochs", EPOCHS)
    return MovementPruner(model, entries, optimizer=made, evaluator=score, folder=folder, **given)


def outcome(found: MovementPruner) -> dict[str, Any]:
    """Returns everything that a pruner leaves, the random number generators included."""
    masked, masks = found.compress()
    return {
        "model": found.model.state_dict(),
        "masked": masked.state_dict(),
        "masks": {name: torch.as_tensor(masks[name]) for name in masks},
        "scores": found.scores,
        "achieved": found.achieved,
        "history": tuple(found.history),
        "random": [torch.rand(3), float(np.random.rand()), random.random()],  # noqa: NPY002, S311 (where the generators are)
    }


def stopping(epoch: int, step: int) -> Trainer:
    """Returns a trainer that is killed in one step of one epoch of those that it is asked for."""
    calls = itertools.count()
    return lambda model, optimizer, criterion: train(model, optimizer, criterion, step if next(calls) == epoch else None)


# -- interrupted in one process --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_in_every_epoch_ends_as_uninterrupted(kind: str, optimizer: str, tmp_path: Path) -> None:
    """Killed in every epoch, each process going on with the next: weights, scores, masks, records and random numbers are the same."""
    whole = outcome(pruner(kind, optimizer, None))
    if TORCH < (2, 7) and (kind, optimizer) == ("soft", "adam"):
        pytest.skip(f"PyTorch {torch.__version__}: rounding ends this training beyond the sparsity at which it shows something")
    assert 0.1 < whole["history"][-1].sparsity < 0.9
    assert whole["history"][-1].stage == 1.0
    for epoch in range(EPOCHS):
        stopped = pruner(kind, optimizer, tmp_path, trainer=stopping(min(epoch, 1), epoch))
        with pytest.raises(Killed):
            stopped.masks()
        assert len(stopped.history) == epoch  # this process began with the epoch that the last one saved, and one was finished since
    assert same(outcome(pruner(kind, optimizer, tmp_path)), whole)
    never = pruner(kind, optimizer, tmp_path, trainer=stopping(0, 0))
    assert same(outcome(never), whole)  # the run is finished: nothing is trained
    assert same(outcome(pruner(kind, optimizer, None)), whole)


class Sums(Optimizer):
    """Averages gradients over all steps; keeps a count of its own, one state for all, and another optimizer within."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 0.02) -> None:
        super().__init__(list(parameters), {"lr": lr, "damp": (0.5, np.float32(0.25)), "mapped": abs})
        self.count = 0
        self.inner = torch.optim.RMSprop(self.param_groups, lr=lr)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Takes a step against the mean of all gradients so far, and one of the other optimizer."""
        assert closure is None
        self.count += 1
        everywhere: dict[Any, Any] = self.state
        everywhere["all"]["counts"] = [*everywhere["all"].get("counts", []), {self.count: (self.count, None, True)}]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                sums = self.state[p].setdefault("sums", torch.zeros_like(p, dtype=torch.float64))
                sums += p.grad
                p.sub_(group["lr"] * group["damp"][0] * float(group["damp"][1]) * (sums / self.count).to(p))
        self.inner.step()


def lbfgs(model: nn.Module, optimizer: Optimizer, criterion: Any, stop: int | None = None) -> None:
    """One epoch of three steps with closures."""
    x, y = images()
    for number in range(3):
        if number == stop:
            raise Killed

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = criterion(model.eval()(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]


class Averaged(nn.Sequential):
    """Remembers its batches in an extra state, in a buffer that appears in training, and in one that state dicts leave out."""

    seen: Tensor | None
    steps: Tensor

    def __init__(self) -> None:
        super().__init__(nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))
        self.register_buffer("seen", None)
        self.register_buffer("steps", torch.zeros(()), persistent=False)
        self.extra = [0]

    def forward(self, x: Tensor) -> Tensor:
        """Maps images to logits."""
        x = x.flatten(1)
        if self.training:
            self.seen = x.detach().mean(0) if self.seen is None else 0.5 * self.seen + 0.5 * x.detach().mean(0)
            self.steps += 1
            self.extra[0] += 1
            x = x + self.seen / self.steps + 0.01 * self.extra[0]
        for layer in self:
            x = layer(x)
        return x

    def get_extra_state(self) -> list[int]:
        """Returns the count."""
        return [*self.extra]

    def set_extra_state(self, state: list[int]) -> None:
        """Takes a count."""
        self.extra = list(state)


ALL: dict[str, Callable[..., Optimizer]] = {
    "amsgrad": partial(torch.optim.AdamW, lr=5e-3, amsgrad=True, foreach=False),
    "nadam": partial(torch.optim.NAdam, lr=5e-3),
    "radam": partial(torch.optim.RAdam, lr=5e-3),
    "adagrad": partial(torch.optim.Adagrad, lr=5e-3, initial_accumulator_value=0.1),
    "adadelta": partial(torch.optim.Adadelta, lr=0.5),
    "adamax": partial(torch.optim.Adamax, lr=5e-3),
    "asgd": partial(torch.optim.ASGD, lr=1e-2),
    "rmsprop": partial(torch.optim.RMSprop, lr=2e-3, centered=True, momentum=0.5),
    "rprop": partial(torch.optim.Rprop, lr=1e-3),
    "fused": partial(torch.optim.Adam, lr=5e-3, fused=True),
    "own": Sums,
    "lbfgs": partial(torch.optim.LBFGS, lr=0.1, max_iter=3, history_size=4),
}


@pytest.mark.parametrize("name", ALL)
def test_every_optimizer_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    """PyTorch's optimizers, and one with a state of its own kind, train weights and scores as if there had been no interruption."""

    def go(folder: Path | None, stop: int | None = None) -> dict[str, Any]:
        seed()
        model, epochs = Averaged(), itertools.count()
        inner = lbfgs if name == "lbfgs" else train

        def trainer(now: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
            inner(now, optimizer, criterion, 1 if next(epochs) == stop else None)

        scorer = ALL[name] if name not in {"lbfgs", "own"} else None
        options: dict[str, Any] = {"training_epochs": 3, "score_optimizer": scorer, "folder": folder}
        entries = [{"sparsity": 0.5, "op_types": ["Linear"]}]
        return outcome(MovementPruner(model, entries, trainer, ALL[name](model.parameters()), Centers(), 1, 8, **options))

    whole = go(None)
    for stop in (1, 1):
        with pytest.raises(Killed):
            go(tmp_path, stop)
    assert same(go(tmp_path), whole)


def test_what_cannot_be_kept_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer with an object in its state, one of a tensor that is not its own, and one whose groups change get one clear error."""

    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.state[self.param_groups[0]["params"][0]]["queue"] = iter(())
            return super().step(closure)

    with pytest.raises(gp.ConfigError, match=r"state\['queue'\] of the optimizer Odd is a tuple_iterator, which cannot be kept"):
        pruner("hard", partial(Odd, lr=0.01), tmp_path).masks()
    pruner("hard", partial(Odd, lr=0.01), None).masks()  # without a folder nothing has to be kept

    class Stranger(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.state[nn.Parameter(torch.zeros(1))]["x"] = 1
            return super().step(closure)

    with pytest.raises(gp.ConfigError, match="for a tensor that is in none of its groups"):
        pruner("hard", partial(Stranger, lr=0.01), tmp_path).masks()

    def growing(model: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
        train(model, optimizer, criterion)
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})

    with pytest.raises(gp.ConfigError, match="added parameters to the optimizer"):
        pruner("hard", "adam", tmp_path, trainer=growing).masks()
    monkeypatch.setattr("graphprune.schedules.movement.processes", lambda: 2)
    with pytest.raises(gp.ConfigError, match="2 processes train, whose random numbers it does not keep"):
        pruner("hard", "adam", tmp_path)


# -- settings, files, and what is shown ------------------------------------------------------------------------------------------------


def test_another_runs_folder_is_refused(tmp_path: Path) -> None:
    """Other sparsities, steps, optimizers, learning rates or weights do not go on with a run."""
    pruner("channels", "adam", tmp_path).masks()
    refused: list[tuple[dict[str, Any], str]] = [
        ({"config_list": [{"sparsity": 0.4, "op_types": ["Conv2d"]}]}, "entries was"),
        ({"warm_up_step": 4}, "warm_up_step was 3 and is 4 now"),
        ({"score_optimizer": partial(torch.optim.SGD, lr=0.1)}, "score_optimizer was"),
        ({"round_to": 2}, "round_to was 1 and is 2 now"),
    ]
    for change, words in refused:
        with pytest.raises(gp.FileError, match=f"other settings: {words}"):
            pruner("channels", "adam", tmp_path, **change).masks()
    with pytest.raises(gp.FileError, match="other settings: optimizer was"):
        pruner("channels", "momentum", tmp_path).masks()
    with pytest.raises(gp.FileError, match="other settings: sparse_granularity was"):
        pruner("channels", "adam", tmp_path, sparse_granularity="rows").masks()
    other = pruner("channels", "adam", tmp_path)
    with torch.no_grad():
        other.model.get_parameter("0.weight")[0, 0, 0, 0] += 1e-3
    with pytest.raises(gp.FileError, match="other settings: model was"):
        other.masks()


def test_the_history_is_a_table_a_file_and_a_plot(tmp_path: Path) -> None:
    """One line per epoch, with the evaluator's score, on the terminal, as CSV and as an image; the folder holds no other file."""
    found = pruner("hard", "adam", tmp_path)
    assert found.history == ()
    found.masks()
    lines = (tmp_path / "movement.csv").read_text().splitlines()
    assert lines[0] == "epoch,steps,stage,sparsity,score,seconds"
    assert [line.split(",")[:2] for line in lines[1:]] == [[str(n), str(4 * n)] for n in range(1, EPOCHS + 1)]
    last = found.history[-1]
    assert isinstance(last, Movement)
    assert float(lines[-1].split(",")[4]) == last.score == score(found.compress()[0])
    assert f"{last.score:.4f}" in str(found.history)
    assert (tmp_path / "movement.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"movement.csv", "movement.png", "movement.safetensors"}


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_terminals_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool) -> None:
    """With progress=True a bar with score and sparsity is on stderr if that is a terminal; stdout stays empty."""
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr("rich.console.Console.is_terminal", terminal)
    last = pruner("hard", "adam", None, progress=True)
    last.masks()
    out, err = capsys.readouterr()
    assert not out
    assert (f"sparsity {last.history[-1].sparsity:.1%}, score {last.history[-1].score:.4g}" in err) == terminal


@pytest.mark.parametrize(("value", "words"), [(None, "a NoneType"), (float("nan"), "NaN")])
def test_scores_that_are_none_are_refused(value: Any, words: str) -> None:
    """An evaluator that returns no number is told so, and what is no function is refused before training."""
    given: dict[str, Any] = {"trainer": train, "criterion": F.cross_entropy, "cool_down_beginning_step": 2}
    model = network()
    entries = [{"sparsity": 0.5, "op_types": ["Linear"]}]
    made = OPTIMIZERS["adam"](model.parameters())
    with pytest.raises(gp.ConfigError, match=f"evaluator of MovementPruner returned {words}"):
        MovementPruner(model, entries, optimizer=made, evaluator=lambda _: value, **given).masks()
    with pytest.raises(gp.ConfigError, match=r"evaluator of MovementPruner is a float.*trainer="):
        MovementPruner(model, entries, optimizer=made, evaluator=0.5, **given)  # type: ignore[arg-type]


# -- killed ----------------------------------------------------------------------------------------------------------------------------


def run(folder: Path | None, kind: str, optimizer: str) -> dict[str, Any]:
    """Trains for twelve epochs; what a process that may be killed does."""
    found = outcome(pruner(kind, optimizer, folder, training_epochs=12, cool_down_beginning_step=40))
    return {**found, "history": [asdict(record) | {"seconds": 0.0} for record in found["history"]]}


@FORKS
def test_killed_at_random_moments_ends_as_uninterrupted(tmp_path: Path) -> None:
    """After three SIGKILLs weights, scores, masks, records and random numbers are bit-identical to an uninterrupted run's."""
    kill("tests.schedules.test_movement_resuming", "run", tmp_path, "channels", "adam", kills=3)


@FORKS
@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_ten_random_moments_ends_as_uninterrupted(kind: str, optimizer: str, tmp_path: Path) -> None:
    """So it is after ten, whatever is masked and trained by whichever optimizer."""
    kill("tests.schedules.test_movement_resuming", "run", tmp_path, kind, optimizer)
