"""Sources hand on every batch and every loss, refuse what they cannot use, and leave model, optimizer and random numbers bit for bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from graphprune.data.sources import Loader, Source, Trainer, source
from graphprune.errors import ConfigError, GraphPruneError, InputError
from graphprune.trace.inputs import Inputs
from tests.support.untouched import changes, snapshot


def ignore(_: object) -> None:
    """Looks at nothing."""


class Net(nn.Module):
    """A network with everything that training changes: BatchNorm, dropout, a frozen layer, a gradient left over."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(6, 4)
        self.fc.bias.requires_grad_(False)
        self.conv.weight.grad = torch.randn(6, 3, 3, 3)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (n, 3, h, w) to logits (n, 4)."""
        self.calls += 1
        y: Tensor = self.fc(self.drop(F.relu_(self.norm(self.conv(x)))).mean((2, 3)))
        return y


IMAGES = torch.randn(10, 3, 5, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(10) % 4


def loader() -> DataLoader[tuple[Tensor, ...]]:
    """Returns ten images in shuffled batches of four, four and two."""
    return DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4, shuffle=True)


def trainer(model: nn.Module, optimizer: Any, criterion: Any) -> None:
    """One epoch, with what trainers do besides: schedules, clipping, weight decay by hand, closures, validation, loose random numbers."""
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    criterion = criterion.to("cpu") if isinstance(criterion, nn.Module) else criterion
    model.train()
    for x, y in loader():
        optimizer.zero_grad(set_to_none=True)
        loss = criterion(model(x + np.random.rand() + random.random()), y)  # noqa: NPY002, S311
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] / 2
            for p in group["params"]:
                p.data.mul_(0.9)
        optimizer.step(lambda: None)
        schedule.step()
    model.eval()
    with torch.no_grad():
        criterion(model(IMAGES), LABELS)


def sources(model: nn.Module) -> dict[str, Source]:
    """Returns both kinds of sources, the trainer with each kind of optimizer and criterion."""
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    return {
        "loader": Loader(loader(), F.cross_entropy),
        "trainer": Trainer(trainer, sgd, nn.CrossEntropyLoss()),
        "function": Trainer(trainer, lambda parameters: torch.optim.Adam(parameters, lr=0.1), F.cross_entropy),
        "nothing": Trainer(trainer, None, F.cross_entropy),
    }


KINDS = ("loader", "trainer", "function", "nothing")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_a_source_leaves_everything_as_it_was(kind: str, training: bool) -> None:
    """Tensors, gradients, flags, attributes, hooks and all random number generators are the same bits afterwards."""
    model = Net().train(training)
    model.norm.eval()
    given = sources(model)[kind]
    before = snapshot(model)
    assert model.conv.weight.grad is not None
    left_over = model.conv.weight.grad.clone()
    python, numpy = random.getstate(), np.random.get_state(legacy=True)  # noqa: NPY002
    given.inputs(model, ignore)
    given.losses(model, ignore)
    assert not changes(before, snapshot(model))
    assert torch.equal(model.conv.weight.grad, left_over)
    assert random.getstate() == python
    assert str(np.random.get_state(legacy=True)) == str(numpy)  # noqa: NPY002


def test_the_users_optimizer_is_left_alone() -> None:
    """Learning rates, momenta and the parameters that it holds are as before, though the trainer changed those that it was given."""
    model = Net()
    optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.1, momentum=0.9)
    before = copy.deepcopy(optimizer.state_dict())
    held = [id(p) for p in optimizer.param_groups[0]["params"]]
    Trainer(trainer, optimizer, F.cross_entropy).losses(model, ignore)
    assert optimizer.state_dict() == before
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == held


def test_the_stand_in_holds_the_copys_parameters() -> None:
    """The optimizer that a trainer is given is of the user's class, holds parameters of the model that it is given, and moves none."""
    model = Net()
    optimizer = torch.optim.AdamW(model.fc.parameters(), lr=0.1)
    told: list[bool] = []

    def looking(model: nn.Module, given: Any, criterion: Any) -> None:
        known = {id(p) for p in model.parameters()}
        told.append(isinstance(given, torch.optim.AdamW) and all(id(p) in known for p in given.param_groups[0]["params"]))
        assert given.step(lambda: 7) == 7
        before = [p.detach().clone() for p in model.parameters()]
        criterion(model(IMAGES), LABELS).backward()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        given.step()
        told.append(all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))

    Trainer(looking, optimizer, F.cross_entropy).losses(model, ignore)
    assert told == [True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_counted(kind: str) -> None:
    """Ten images are ten samples, in inputs and in losses; a limit of two batches of four ends after eight. Validation has no loss."""
    model = Net()
    given: Any = sources(model)[kind]
    validated = 0 if kind == "loader" else 10
    assert given.inputs(model, ignore) == 10 + validated
    assert given.losses(model, ignore) == 10
    shorter = (
        Loader(given.batches, given.loss, 2) if kind == "loader" else Trainer(given.trainer, given.optimizer, given.criterion, limit=2)
    )
    assert shorter.inputs(model, ignore) == 8
    assert shorter.losses(model, ignore) == 8


def test_loader_takes_no_batch_beyond_the_limit() -> None:
    """Of an endless stream exactly `limit` batches are drawn."""
    drawn = 0

    def endless() -> Iterator[Tensor]:
        nonlocal drawn
        while True:
            drawn += 1
            yield IMAGES[:3]

    assert Loader(endless(), limit=4).inputs(Net(), ignore) == 12
    assert drawn == 4


def test_trainer_gradients_are_those_of_the_loader() -> None:
    """What a trainer's losses say of the original's parameters is what plain batches say, to the last bit, and eval mode is in force."""
    model = Net().train()
    batches = [(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])]

    def plain(model: nn.Module, optimizer: Any, criterion: Any) -> None:
        model.train()
        for x, y in batches:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()

    def gradients(given: Source) -> list[Tensor]:
        found: list[Tensor] = []
        parameters = [p for p in model.parameters() if p.requires_grad]
        given.losses(model, lambda loss: found.extend(torch.autograd.grad(loss, parameters)))
        return found

    reference = copy.deepcopy(model).eval()
    expected: list[Tensor] = []
    for x, y in batches:
        loss = F.cross_entropy(reference(x), y)
        expected += torch.autograd.grad(loss, [p for p in reference.parameters() if p.requires_grad])
    for given in (Loader(batches, F.cross_entropy), Trainer(plain, torch.optim.SGD(model.parameters(), lr=9.0), F.cross_entropy)):
        found = gradients(given)
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_recurrent_weights_are_reached_through_a_trainer() -> None:
    """Layers that keep their weights in lists too have the gradients that they have without a trainer."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(2)
            self.lstm = nn.LSTM(4, 5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.lstm(x)[0]
            return y

    model = Recurrent().eval()
    x = torch.randn(2, 3, 4)

    def run(model: nn.Module, optimizer: Any, criterion: Any) -> None:
        criterion(model(x)).backward()
        optimizer.step()

    found: list[Tensor] = []
    Trainer(run, None, torch.Tensor.sum).losses(model, lambda loss: found.extend(torch.autograd.grad(loss, [model.lstm.all_weights[0][1]])))
    assert torch.equal(found[0], torch.autograd.grad(model(x).sum(), [model.lstm.all_weights[0][1]])[0])


def test_forms_of_batches() -> None:
    """Pairs, lists, dicts and bare inputs give the arguments that the model is called with; a loss of a dict is given the whole batch."""
    pair = (IMAGES, LABELS)
    forms: list[tuple[Any, tuple[int, int]]] = [
        (pair, (1, 0)),
        (list(pair), (1, 0)),
        (IMAGES, (1, 0)),
        ([IMAGES], (1, 0)),
        ({"x": IMAGES}, (0, 1)),
        (({"x": IMAGES}, LABELS), (0, 1)),
        ([[IMAGES, IMAGES], LABELS], (2, 0)),
    ]
    for batch, expected in forms:
        seen: list[Inputs] = []
        Loader([batch]).inputs(Net(), seen.append)
        assert [(len(i.args), len(i.kwargs)) for i in seen] == [expected]

    def of_batch(output: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return (output - batch["x"].mean()).square().mean()

    assert Loader([{"x": IMAGES}], of_batch).losses(Net(), ignore) == 10


def test_batches_are_not_written_to() -> None:
    """A model that works in place on its input does so on a copy."""
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(75, 4))
    kept = IMAGES.clone()
    given = Loader([(IMAGES, LABELS)], F.cross_entropy)
    given.losses(model, ignore)
    assert torch.equal(IMAGES, kept)


def never(_model: nn.Module, _optimizer: Any, _criterion: Any) -> None:
    """Calls nothing."""


def uncritical(model: nn.Module, _optimizer: Any, _criterion: Any) -> None:
    """Has a loss of its own."""
    F.cross_entropy(model(IMAGES), LABELS).backward()


def validating(model: nn.Module, _optimizer: Any, criterion: Any) -> None:
    """Computes losses without gradients only."""
    with torch.no_grad():
        criterion(model(IMAGES), LABELS)


def broken(_model: nn.Module, _optimizer: Any, _criterion: Any) -> None:
    """Fails."""
    message = "no such file"
    raise OSError(message)


def pairs(model: nn.Module, _optimizer: Any, criterion: Any) -> None:
    """Uses the criterion's result, which is no number."""
    criterion(model(IMAGES), LABELS).mean().backward()


def per_sample(output: Tensor, target: Tensor) -> Tensor:
    """Returns one loss per sample."""
    return F.cross_entropy(output, target, reduction="none")


CE = F.cross_entropy
REFUSED: tuple[tuple[str, Callable[[], Source], str, type[GraphPruneError], str], ...] = (
    ("no batches", lambda: Loader([]), "inputs", InputError, "no batches"),
    ("no batches for losses", lambda: Loader([], CE), "losses", InputError, "no batches"),
    ("no loss", lambda: Loader([(IMAGES, LABELS)]), "losses", ConfigError, "loss="),
    ("no target", lambda: Loader([IMAGES], CE), "losses", InputError, "batch 1 cannot be used: .* no target"),
    ("loss that fails", lambda: Loader([(IMAGES, LABELS[:3])], CE), "losses", InputError, "loss cannot be computed: ValueError"),
    ("loss of many", lambda: Loader([(IMAGES, LABELS)], per_sample), "losses", InputError, r"shape \(10,\), not one number"),
    ("detached loss", lambda: Loader([(IMAGES, LABELS)], lambda o, t: CE(o.detach(), t)), "losses", InputError, "does not depend"),
    ("wrong channels", lambda: Loader([(IMAGES[:, :2], LABELS)], CE), "losses", InputError, "cannot be run on"),
    ("trainer without calls", lambda: Trainer(never, None, CE), "inputs", InputError, "never calls the model"),
    ("no criterion", lambda: Trainer(trainer), "losses", ConfigError, "criterion="),
    ("criterion not called", lambda: Trainer(uncritical, None, CE), "losses", InputError, "never calls the criterion"),
    ("criterion in vain", lambda: Trainer(validating, None, CE), "losses", InputError, "only calls the criterion where nothing"),
    ("trainer that fails", lambda: Trainer(broken, None, CE), "losses", InputError, "trainer fails .* OSError: no such file"),
    ("criterion of many", lambda: Trainer(pairs, None, per_sample), "losses", InputError, "not one number"),
)


@pytest.mark.parametrize(("make", "method", "kind", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_cannot_be_used_is_refused(make: Callable[[], Source], method: str, kind: type[GraphPruneError], words: str) -> None:
    """The error says what is wrong and what to do, and the model is as it was."""
    model = Net()
    before = snapshot(model)
    with pytest.raises(kind, match=words) as caught:
        getattr(make(), method)(model, ignore)
    assert caught.value.fix
    assert not changes(before, snapshot(model))


def test_a_trainer_that_uses_the_original_is_stopped() -> None:
    """A trainer that closes over the user's model would train it: it is ended before it computes anything, and the model is as it was."""
    model = Net().train()
    before = snapshot(model)

    def outer(_model: nn.Module, _optimizer: Any, criterion: Any) -> None:
        criterion(model(IMAGES), LABELS).backward()

    with pytest.raises(InputError, match="model other than the one"):
        Trainer(outer, None, F.cross_entropy).losses(model, ignore)
    assert not changes(before, snapshot(model))


def test_a_trainer_that_only_uses_its_own_loss_shows_its_inputs() -> None:
    """Inputs need no criterion, and a backward pass of the trainer's own reaches no gradient of the model."""
    model = Net()
    before = snapshot(model)
    assert Trainer(uncritical).inputs(model, ignore) == 10
    assert not changes(before, snapshot(model))


@pytest.mark.parametrize("limit", [0, -1, 2.5, True])
def test_impossible_limits_are_refused(limit: Any) -> None:
    """A number of batches is a whole number of at least one."""
    with pytest.raises(ConfigError, match="number of batches"):
        Loader([IMAGES], limit=limit)
    with pytest.raises(ConfigError, match="number of batches"):
        Trainer(trainer, limit=limit)


def test_source_says_what_to_pass() -> None:
    """Neither data nor a trainer, both, a single batch, or no function: each has its own error; else the right kind is returned."""
    with pytest.raises(ConfigError, match=r"APoZ looks at data, and there is none.*data=.*trainer="):
        source(who="APoZ")
    with pytest.raises(ConfigError, match="both data and a trainer"):
        source(data=[IMAGES], trainer=trainer)
    for single in (IMAGES, {"x": IMAGES}, 3):
        with pytest.raises(ConfigError, match="not several batches"):
            source(data=single)
    not_callable: Any = 3
    with pytest.raises(ConfigError, match="the trainer is a int"):
        source(trainer=not_callable)
    made = source(data=[(IMAGES, LABELS)], criterion=F.cross_entropy, limit=1)
    assert isinstance(made, Loader)
    assert made.loss is F.cross_entropy
    assert source(data=made) is made
    assert isinstance(source(trainer=trainer, criterion=F.cross_entropy), Trainer)
