"""Training with a penalty: every step takes the gradient of loss plus penalty, on a copy, and nothing of the user's changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from torch.optim import Optimizer

from graphprune.errors import ConfigError, InputError
from graphprune.training.session import Course, Session, course
from tests.support.untouched import changes, same_bits, snapshot

LR, MOMENTUM, STRENGTH = 0.05, 0.9, 0.02


def small(seed: int = 0) -> nn.Sequential:
    """Returns a linear layer, a batch norm and a classifier in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).double()


def batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Returns batches of six samples with their classes."""
    generator = torch.Generator().manual_seed(7)
    vectors = torch.randn(count, 6, 3, generator=generator, dtype=torch.float64)
    return [(x, torch.randint(0, 2, (6,), generator=generator)) for x in vectors]


def train(model: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
    """One epoch, as users write it."""
    for inputs, target in batches():
        optimizer.zero_grad()
        criterion(model(inputs), target).backward()
        optimizer.step()


def train_with_closures(model: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
    """One epoch with closures, by keyword and by position in turn."""
    for number, (inputs, target) in enumerate(batches()):

        def closure(inputs: Tensor = inputs, target: Tensor = target) -> float:
            optimizer.zero_grad()
            loss: Tensor = criterion(model(inputs), target)
            loss.backward()
            return loss.item()

        _ = optimizer.step(closure) if number % 2 else optimizer.step(closure=closure)


def absolute(weights: Mapping[str, Tensor]) -> Tensor:
    """Returns the penalty STRENGTH * sum |w|."""
    return STRENGTH * torch.stack([w.abs().sum() for w in weights.values()]).sum()


def sgd(model: nn.Module) -> torch.optim.SGD:
    """Returns SGD with momentum over all parameters."""
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def adam(model: nn.Sequential) -> torch.optim.Adam:
    """Returns Adam with two parameter groups, over the linear layers only."""
    groups: list[dict[str, Any]] = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[3].parameters()}]
    return torch.optim.Adam(groups, amsgrad=True)


def by_hand(model: nn.Module, epochs: int, penalised: Iterable[str], clip: bool = False) -> dict[str, Tensor]:
    """Returns the parameters after SGD with momentum on loss + STRENGTH * sum |w|, written out: v = m v + g, w = w - lr v."""
    model = copy.deepcopy(model).train()
    velocity: dict[str, Tensor] = {}
    for _ in range(epochs):
        for inputs, target in batches():
            loss = F.cross_entropy(model(inputs), target)
            named = dict(model.named_parameters())
            gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
            for name, weight in named.items():
                gradient = torch.zeros_like(weight) if clip else gradients[name]
                if name in penalised:
                    gradient = gradient + STRENGTH * torch.sign(weight.detach())
                velocity[name] = MOMENTUM * velocity[name] + gradient if name in velocity else gradient
                with torch.no_grad():
                    weight.sub_(LR * velocity[name])
    return {name: weight.detach() for name, weight in model.named_parameters()}


def assert_close(model: nn.Module, expected: Mapping[str, Tensor]) -> None:
    """Asserts that all parameters are the expected ones up to rounding."""
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-12, atol=1e-14, msg=name)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dicts and lists by their paths."""
    items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    nested = {k: v for key, inner in items for k, v in flat(inner, f"{path}/{key}").items()}
    return nested if isinstance(value, (dict, list)) else {path: value}


# -- steps ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", [train, train_with_closures])
@pytest.mark.parametrize("penalised", [["1.weight"], ["0.weight", "3.bias"]])
def test_every_step_takes_the_gradient_of_loss_plus_penalty(trainer: Callable[..., None], penalised: list[str]) -> None:
    """Three epochs give the weights of SGD written out with scale * sign(w) added to the penalised gradients, with closures too."""
    model = small()
    session = Session(model, course("test", trainer, sgd(model), F.cross_entropy), penalised, absolute)
    session.epochs(2)
    session.epochs(1)
    assert_close(session.model, by_hand(model, 3, penalised))
    assert session.steps == 3 * len(batches())
    unpenalised = by_hand(model, 3, [])
    assert not torch.allclose(session.weights[penalised[0]], unpenalised[penalised[0]], rtol=0, atol=1e-3)


def test_the_subgradient_at_zero_is_zero() -> None:
    """Where a penalised weight is exactly 0 and the loss does not move it, it stays exactly 0; others lose lr * strength per step."""
    model = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(model.weight[:, :1])
    nn.init.constant_(model.weight[:, 1:], -1.0)

    def trainer(model: nn.Module, optimizer: Optimizer, _: Any) -> None:
        optimizer.zero_grad()
        model(torch.zeros(1, 3, dtype=torch.float64)).sum().backward()
        optimizer.step()

    session = Session(model, course("test", trainer, torch.optim.SGD(model.parameters(), lr=LR), None), ["weight"], absolute)
    session.epochs(5)
    expected = torch.tensor([[0.0, -1 + 5 * LR * STRENGTH, -1 + 5 * LR * STRENGTH]], dtype=torch.float64)
    torch.testing.assert_close(session.weights["weight"].detach(), expected, rtol=0, atol=1e-15)
    assert session.weights["weight"][0, 0] == 0


def test_the_penalty_is_added_behind_gradient_clipping() -> None:
    """A trainer that clips all gradients to nothing leaves the penalty's gradient alone to train."""
    model = small()

    def clipping(model: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
        for inputs, target in batches():
            optimizer.zero_grad()
            criterion(model(inputs), target).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.0)
            optimizer.step()

    session = Session(model, course("test", clipping, sgd(model), F.cross_entropy), ["1.weight"], absolute)
    session.epochs(1)
    assert_close(session.model, by_hand(model, 1, ["1.weight"], clip=True))


def test_a_weight_that_the_loss_does_not_reach_is_penalised_too() -> None:
    """A parameter without a gradient of its own follows the penalty's gradient."""
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})

    def trainer(model: Any, optimizer: Optimizer, _: Any) -> None:
        optimizer.zero_grad()
        model["used"](torch.ones(1, 2)).sum().backward()
        optimizer.step()

    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    session = Session(model, course("test", trainer, optimizer, None), ["unused.weight"], absolute)
    session.epochs(1)
    weight = model.get_parameter("unused.weight").detach()
    torch.testing.assert_close(session.weights["unused.weight"].detach(), weight - LR * STRENGTH * weight.sign())


def test_line_searches_see_the_value_and_the_gradient_of_the_penalty() -> None:
    """LBFGS with a line search takes the very path that it takes on an objective with the penalty written into it."""
    weight = torch.tensor([[3.0, -2.0]], dtype=torch.float64)

    def minimise(model: nn.Module, optimizer: Optimizer, extra: Callable[[], Tensor]) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = (model(torch.eye(2, dtype=torch.float64)) - 1).pow(4).sum() + extra()
            loss.backward()
            return loss.detach()

        for _ in range(3):
            optimizer.step(closure)  # type: ignore[arg-type] # the stub of step knows closures that return floats

    def squares(weights: Mapping[str, Tensor]) -> Tensor:
        return 0.7 * weights["weight"].pow(2).sum()

    model, reference = nn.Linear(2, 1, bias=False).double(), nn.Linear(2, 1, bias=False).double()
    for one in (model, reference):
        one.weight.data.copy_(weight)

    def lbfgs(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return torch.optim.LBFGS(parameters, max_iter=4, line_search_fn="strong_wolfe")

    minimise(reference, lbfgs(reference.parameters()), lambda: squares({"weight": reference.weight}))
    for optimizer in (lbfgs, lbfgs(model.parameters())):
        session = Session(model, course("test", minimise, optimizer, lambda: torch.zeros(())), ["weight"], squares)
        session.epochs(1)
        torch.testing.assert_close(session.weights["weight"].detach(), reference.weight.detach(), rtol=1e-12, atol=0)


def test_gradients_that_are_scaled_for_half_precision_get_a_scaled_penalty() -> None:
    """A fused optimizer behind a gradient scaler unscales inside its step: the result is that of training without a scaler."""

    def scaled(model: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for inputs, target in batches():
            optimizer.zero_grad()
            scaler.scale(criterion(model(inputs), target)).backward()
            scaler.step(optimizer)
            scaler.update()

    results = []
    for trainer in (scaled, train):
        model = small()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, fused=True)
        session = Session(model, course("test", trainer, optimizer, F.cross_entropy), ["1.weight"], absolute)
        assert vars(session.optimizer)["_step_supports_amp_scaling"]
        session.epochs(2)
        results.append({name: weight.detach() for name, weight in session.model.named_parameters()})
    for name, weight in results[1].items():
        torch.testing.assert_close(results[0][name], weight, rtol=1e-10, atol=1e-12)


# -- copies --------------------------------------------------------------------------------------------------------------------------


def test_the_users_model_and_optimizer_stay_bit_identical() -> None:
    """Weights, gradients, buffers, flags and hooks of the model and groups and state of the optimizer are untouched."""
    model = small()
    optimizer = adam(model)
    train(model, optimizer, F.cross_entropy)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict())
    session = Session(model, course("test", train, optimizer, F.cross_entropy), ["0.weight"], absolute)
    session.epochs(2)
    assert not changes(before, snapshot(model))
    one, two = flat(state), flat(optimizer.state_dict())
    assert one.keys() == two.keys()
    assert all(same_bits(one[k], two[k]) if isinstance(one[k], Tensor) else one[k] == two[k] for k in one)
    assert not optimizer._optimizer_step_pre_hooks  # noqa: SLF001 (no public way to look)


def test_the_copied_optimizer_goes_on_from_the_users_state() -> None:
    """Momentum, step counts and learning rates per group carry over: with no penalty, training goes on as the user's would."""
    model = small()
    optimizer = adam(model)
    train(model, optimizer, F.cross_entropy)
    session = Session(model, course("test", train, optimizer, F.cross_entropy), ["0.weight"], lambda w: w["0.weight"].sum() * 0)
    session.epochs(1)
    train(model, optimizer, F.cross_entropy)
    assert all(same_bits(one, two) for one, two in zip(session.model.parameters(), model.parameters(), strict=True))


def test_a_schedule_of_the_learning_rate_leads_to_no_step_of_the_users_optimizer() -> None:
    """A scheduler wraps the step of the optimizer that it was made for; the copy does not inherit that wrapper."""
    model = small()
    optimizer = sgd(model)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    session = Session(model, course("test", train, optimizer, F.cross_entropy), ["1.weight"], absolute)
    before = snapshot(model)
    session.epochs(2)
    assert not changes(before, snapshot(model))
    assert_close(session.model, by_hand(model, 2, ["1.weight"]))


def test_a_criterion_with_parameters_is_trained_as_a_copy() -> None:
    """A criterion that is a module is copied with the model, so that the optimizer trains the copy's parameters and not the user's."""
    model, criterion = nn.Linear(3, 4).double(), nn.Bilinear(4, 4, 1).double()
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=LR)

    def trainer(model: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
        optimizer.zero_grad()
        hidden = model(batches()[0][0])
        criterion(hidden, hidden).sum().backward()
        optimizer.step()

    before = snapshot(criterion)
    session = Session(model, course("test", trainer, optimizer, criterion), ["weight"], absolute)
    session.epochs(1)
    assert not changes(before, snapshot(criterion))
    trained = dict(session.criterion.named_parameters())["weight"]
    assert not same_bits(trained.detach(), criterion.weight.detach())


def test_the_copy_trains_in_training_mode_and_gets_its_flags_back() -> None:
    """Every epoch begins in training mode whatever the trainer left; afterwards, also after an error, the flags are the user's."""
    seen: list[list[bool]] = []

    def trainer(model: nn.Module, optimizer: Optimizer, criterion: Any) -> None:
        seen.append([module.training for module in model.modules()])
        train(model, optimizer, criterion)
        model.eval()
        if len(seen) == 3:
            raise OSError

    model = small().train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    session = Session(model, course("test", trainer, sgd(model), F.cross_entropy), ["0.weight"], absolute)
    session.epochs(2)
    assert seen == [[True] * 5] * 2
    assert [module.training for module in session.model.modules()] == flags == [True, True, False, True, True]
    with pytest.raises(OSError, match=r"^$"):
        session.epochs(1)
    assert [module.training for module in session.model.modules()] == flags
    assert all(p.grad is None for p in session.model.parameters())


def test_training_works_where_the_caller_records_no_gradients() -> None:
    """Inside torch.no_grad the copy is trained as outside."""
    model = small()
    session = Session(model, course("test", train, sgd(model), F.cross_entropy), ["1.weight"], absolute)
    with torch.no_grad():
        session.epochs(1)
    assert_close(session.model, by_hand(model, 1, ["1.weight"]))


# -- plain data ----------------------------------------------------------------------------------------------------------------------


class Keywords(nn.Module):
    """A model with keyword arguments that returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small()

    def forward(self, vectors: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Returns the loss of its own."""
        return {"loss": F.cross_entropy(self.inner(vectors), labels)}


def test_plain_data_trains_as_a_trainer_does() -> None:
    """Batches and a loss, or dict batches of keyword arguments, give the same weights as the trainer that loops over them."""
    model, keywords = small(), Keywords()
    pairs = course("test", None, lambda p: torch.optim.SGD(p, lr=LR, momentum=MOMENTUM), None, batches(), F.cross_entropy)
    dicts = [{"vectors": x, "labels": y} for x, y in batches()]
    by_name = course("test", None, sgd(keywords), lambda output, _: output["loss"], dicts)
    for how, net, prefix in ((pairs, model, ""), (by_name, keywords, "inner.")):
        session = Session(net, how, [f"{prefix}1.weight"], absolute)
        session.epochs(2)
        trained = session.model if net is model else session.model.get_submodule("inner")
        assert_close(trained, by_hand(model, 2, ["1.weight"]))


def test_data_that_runs_out_is_refused() -> None:
    """A generator that is spent after the first epoch raises an error that says what to pass."""
    model = small()
    session = Session(model, course("test", None, sgd(model), F.cross_entropy, (b for b in batches())), ["1.weight"], absolute)
    session.epochs(1)
    with pytest.raises(InputError, match=r"data of test held no batch.*DataLoader"):
        session.epochs(1)


# -- several processes ---------------------------------------------------------------------------------------------------------------


def trained_on(data: list[tuple[Tensor, Tensor]], model: nn.Sequential) -> nn.Module:
    """Returns the model after two epochs of penalised training on the data."""
    session = Session(model, course("test", None, sgd(model), F.cross_entropy, data), ["0.weight"], absolute)
    session.epochs(2)
    return session.model


def train_half(rank: int, folder: str) -> None:
    """Trains on every other sample in one of two processes, and writes what came of it."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    half = [(x[rank::2], y[rank::2]) for x, y in batches()]
    state = {f"{kind}.{k}": v for kind, net in networks().items() for k, v in trained_on(half, net).state_dict().items()}
    save_file(state, f"{folder}/{rank}.safetensors")
    distributed.destroy_process_group()


def networks() -> dict[str, nn.Sequential]:
    """Returns a network without batch norm and one with it."""
    return {"plain": nn.Sequential(*[layer for layer in small() if not isinstance(layer, nn.BatchNorm1d)]), "norm": small()}


def test_processes_train_one_model(tmp_path: Path) -> None:
    """Two processes with half of every batch each end with the same bits, which are the weights of training on whole batches."""
    spawn(train_half, (str(tmp_path),), nprocs=2)
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert not changes(one, two)
    for name, weight in trained_on(batches(), networks()["plain"]).state_dict().items():
        torch.testing.assert_close(one[f"plain.{name}"], weight, rtol=1e-12, atol=1e-14)
    assert one["norm.1.running_mean"].abs().sum() > 0


# -- refusals ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((train, None, None), "SlimPruner trains, and has no optimizer.*optimizer="),
        ((train, 0.1, None), "optimizer of SlimPruner is a float"),
        ((None, sgd(small()), None), "neither a trainer nor data.*data=.*loss="),
        ((train, sgd(small()), None, batches(), F.cross_entropy), "both a trainer and data"),
        (("train", sgd(small()), None), r"trainer of SlimPruner is a str.*trainer\(model, optimizer, criterion\)"),
        ((None, sgd(small()), None, batches()), "data to train with and no loss"),
    ],
)
def test_training_that_cannot_be_done_is_refused(arguments: tuple[Any, ...], words: str) -> None:
    """Each gap or contradiction raises a ConfigError that says what to pass."""
    with pytest.raises(ConfigError, match=words):
        course("SlimPruner", *arguments)


def test_an_optimizer_of_another_model_is_refused() -> None:
    """An optimizer without any of the model's parameters would train nothing."""
    with pytest.raises(ConfigError, match=r"optimizer of SlimPruner holds no parameter of Sequential.*model\.parameters\(\)"):
        Session(small(), course("SlimPruner", train, sgd(small()), None), ["0.weight"], absolute)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_penalty_on_a_weight_that_is_not_trained_is_refused(frozen: bool) -> None:
    """A penalised weight that is frozen, or in no group of the optimizer, is named."""
    model = small()
    optimizer = sgd(model if frozen else model[3])
    model[0].weight.requires_grad_(not frozen)
    with pytest.raises(ConfigError, match=f"penalty on '0.weight', which {'is frozen' if frozen else 'its optimizer does not hold'}"):
        Session(model, course("test", train, optimizer, None), ["3.weight", "0.weight"], absolute)


def test_a_function_that_makes_no_optimizer_is_refused() -> None:
    """What an optimizer's function returns must be an optimizer."""
    with pytest.raises(ConfigError, match="returned a list"):
        Session(small(), Course("test", train, list), ["0.weight"], absolute)  # type: ignore[arg-type] # wrong on purpose


def test_a_trainer_that_never_steps_is_refused() -> None:
    """A trainer that uses another optimizer than the one it is given is told so, after the first epoch."""
    model = small()
    own = sgd(model)
    epochs = []

    def stubborn(_: nn.Module, __: Optimizer, criterion: Any) -> None:
        epochs.append(1)
        train(model, own, criterion)

    session = Session(model, course("SlimPruner", stubborn, own, F.cross_entropy), ["0.weight"], absolute)
    with pytest.raises(ConfigError, match=r"trainer of SlimPruner never called step\(\) of the optimizer that it was given"):
        session.epochs(3)
    assert len(epochs) == 1
