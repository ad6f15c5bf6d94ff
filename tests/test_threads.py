"""Several threads at once give, to the last bit, what one after the other gives, and do not see each other."""

from __future__ import annotations

import io
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import graphprune as gp
from graphprune.cost.count import count
from graphprune.data.sources import source
from tests.support.threads import (
    Heads,
    Listing,
    Noisy,
    convolutions,
    digest,
    disturbed,
    encoder,
    example,
    networks,
    pruned,
    rounds,
    talk,
    together,
)
from tests.support.untouched import changes, snapshot


@pytest.fixture(autouse=True)
def often() -> Iterator[None]:
    """Lets threads take turns far more often than they do otherwise."""
    before, threads = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-4)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(before)
    torch.set_num_threads(threads)


def errors(results: list[Any]) -> list[str]:
    """Returns the exceptions among results."""
    return [f"{type(r).__name__}: {r}" for r in results if isinstance(r, Exception)]


# -- several models ----------------------------------------------------------------------------------------------------------------


def test_many_models_in_many_threads() -> None:
    """Eight threads prune five kinds of models while another takes values and runs models: nothing differs from one after the other."""
    assert rounds(8, 2) == (80, [])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_watched_sizes_are_each_thread_s_own() -> None:
    """With `keep_class`, models that share one configuration object too; another thread scripts functions that look for modes."""
    expected = {width: pruned(Configured(Widths(width)), keep_class=True, sparsity=0.4) for width in (4, 2)}
    shared = Widths(4)
    models = [Configured(shared), Configured(shared), Configured(Widths(2)), Configured(shared)]

    def script() -> None:
        torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Softmax(-1)))

    with disturbed(script) as wrong:
        found = together([lambda m=m: [pruned(m, keep_class=True, sparsity=0.4) for _ in range(3)] for m in models])  # type: ignore[misc]
    assert not errors(found)
    assert found == [[expected[m.config.heads]] * 3 for m in models]
    assert wrong == []
    assert type(shared.heads) is int
    assert shared.heads == 4


class Widths:
    """A configuration."""

    def __init__(self, heads: int) -> None:
        self.heads = heads


class Configured(Heads):
    """Takes the number of its heads from a configuration."""

    def __init__(self, config: Widths) -> None:
        torch.manual_seed(3)
        super().__init__()
        self.config = config
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Returns (batch, 4) for (batch, steps, 16)."""
        self.heads = self.config.heads
        return super().forward(x)


@pytest.mark.parametrize("criterion", ["taylor", "apoz", "hessian"])
def test_data_is_drawn_as_by_one_alone(criterion: str) -> None:
    """Loaders that shuffle with the global generators give each thread what they give one alone."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(80, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    data = TensorDataset(torch.randn(12, 5, 16, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 4)

    def run() -> str:
        pruner = gp.Pruner(model, [{"sparsity": 0.5, "op_types": ["Linear"]}], criterion, example(), source=shuffled(data))
        return str([(name, scores.tolist()) for name, scores in pruner.scores().items()])

    torch.manual_seed(2)
    before = torch.get_rng_state()
    expected = run()
    found = together([run] * 4)
    assert not errors(found)
    assert found == [expected] * 4
    assert torch.equal(torch.get_rng_state(), before)


def shuffled(data: TensorDataset) -> Any:
    """Returns batches in an order that the global generator decides."""
    return source(data=DataLoader(data, 4, shuffle=True), loss=F.cross_entropy, limit=2)


def test_random_numbers_of_others_go_on() -> None:
    """Pruning models that draw nothing leaves another thread the numbers that it draws."""
    torch.manual_seed(5)
    expected = [torch.rand(2) for _ in range(400)]
    torch.manual_seed(5)
    found: list[Tensor] = []
    models = [convolutions().eval(), Heads().eval()]
    torch.manual_seed(5)
    with disturbed(lambda: found.append(torch.rand(2))) as wrong:
        results = together([lambda m=m: [pruned(m) for _ in range(4)] for m in models])  # type: ignore[misc]
    assert not errors(results)
    assert wrong == []
    assert len(found) > 10
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=False))


# -- one model ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [Listing, Noisy, encoder])
def test_one_model_in_several_threads(build: Callable[[], nn.Module]) -> None:
    """The model is left as it was: flags, buffers, hooks, attributes, gradients."""
    torch.manual_seed(0)
    model = build().train()
    model.register_forward_hook(lambda *_: None)
    model(example())[0].sum().backward()
    before = snapshot(model)
    expected = [pruned(model), digest([], dict(model.state_dict()))]
    part = next(m for m in model.modules() if isinstance(m, nn.Linear))

    def work() -> str:
        return pruned(model)

    def look() -> str:
        gp.trace(part, torch.randn(2, part.in_features, generator=torch.Generator().manual_seed(0)))
        return str(count(model, example()))

    found = together([work, work, look, work])
    assert not errors(found)
    assert {found[0], found[1], found[3]} == {expected[0]}
    assert not changes(before, snapshot(model))


def test_one_model_pruned_in_place() -> None:
    """A thread that shrinks a model in place waits for those that look at it, and they for it."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(80, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    found = together([partial(gp.prune, model, example(), 0.5, inplace=True) for _ in range(3)])
    assert not errors(found)
    assert all(small is model for small, _ in found)
    assert model[1].out_features == 1  # 12, 6, 3, 1


# -- files -------------------------------------------------------------------------------------------------------------------------


def test_one_path_for_several_threads(tmp_path: Path) -> None:
    """The file is one of those that were saved, whole, and nothing else is left."""
    smalls = [gp.prune(model, example(), 0.25 * (1 + at))[0] for at, model in enumerate([Listing().eval(), Listing().eval()])]
    path = tmp_path / "small.safetensors"
    found = together([lambda m=m: [gp.save(m, path) for _ in range(8)] for m in [*smalls, *smalls]])  # type: ignore[misc]
    assert not errors(found)
    assert list(tmp_path.iterdir()) == [path]
    loaded = gp.load(Listing().eval(), path)
    assert digest([], dict(loaded.state_dict())) in {digest([], dict(m.state_dict())) for m in smalls}


def test_exports_are_silent_and_nobody_else_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """While two threads export, and one prunes, what a third logs, warns of and prints arrives, and nothing of theirs."""
    warnings.simplefilter("always")
    log, path, stream = logging.getLogger("tests.threads"), tmp_path / "model.onnx", io.StringIO()
    spoken: list[str] = []
    models = [Warning_(), Warning_()]

    def speak() -> None:
        spoken.append("x")
        talk(log)
        sys.stderr.write("printed\n")

    torch.manual_seed(4)
    plain = Listing().eval()
    expected = pruned(plain)
    with redirect_stderr(stream), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with disturbed(speak) as wrong:
            exports = [partial(gp.export_onnx, model, example(), path, exporter="torchscript") for model in models]
            found = together([*exports, lambda: [pruned(plain) for _ in range(3)]])
    assert not errors(found)
    assert wrong == []
    assert found[2] == [expected] * 3
    assert [str(w.message) for w in warned if w.category is RuntimeWarning] == ["warned"] * len(spoken)
    assert not [str(w.message) for w in warned if "the model's own" in str(w.message)]
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == ["logged"] * len(spoken)
    assert stream.getvalue() == "printed\n" * len(spoken)
    assert list(tmp_path.iterdir()) == [path]
    onnx.checker.check_model(path)
    assert not any(type(entry[1]).__module__.startswith("graphprune") for entry in warnings.filters)


class Warning_(nn.Module):  # noqa: N801 (a Warning is something else)
    """Warns whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (batch, 4) for (batch, steps, 16)."""
        warnings.warn("the model's own", UserWarning, stacklevel=2)
        logging.getLogger("tests.threads").warning("the model's own")
        result: Tensor = self.last(x.mean(1))
        return result


# -- a model that another thread changes -----------------------------------------------------------------------------------------


class Open(nn.Module):
    """Lets another thread do something in the middle of its `at`-th pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 24), nn.Linear(24, 4)
        self.register_buffer("scale", torch.ones(24))
        self.door = Door()

    def forward(self, x: Tensor) -> Tensor:
        """Returns (batch, 4) for (batch, steps, 16)."""
        self.door.passes += 1
        if self.door.passes == self.door.at:
            self.door.open.set()
            assert self.door.done.wait(20)
        result: Tensor = self.last(self.first(x.mean(1)).relu() * self.scale)
        return result


class Door:
    """Where two threads meet."""

    __slots__ = ("at", "done", "open", "passes")

    def __init__(self) -> None:
        self.at, self.passes, self.open, self.done = 0, 0, threading.Event(), threading.Event()

    def __deepcopy__(self, memo: object) -> Door:
        """Returns itself: copies meet nobody."""
        return Door()


@contextmanager
def changing(model: Open, at: int, change: Callable[[Open], object]) -> Iterator[None]:
    """Lets another thread change the model during a pass."""
    door = model.door
    door.at = at

    def work() -> None:
        if door.open.wait(20):
            change(model)
        door.done.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        door.open.set()
        thread.join()


@torch.no_grad()
def step(model: Open) -> None:
    """Changes a weight."""
    model.first.weight.mul_(1.5)


def step_uncounted(model: Open) -> None:
    """Changes a weight behind PyTorch's back."""
    model.first.weight.data.mul_(1.5)


def replace(model: Open) -> None:
    """Puts a layer of another width in."""
    model.last = nn.Linear(24, 5)


def reload(model: Open) -> None:
    """Loads other weights."""
    model.load_state_dict({name: tensor + 0.5 for name, tensor in model.state_dict().items()})


CHANGES = {
    "step": (step, "'first.weight' of Open"),
    "data": (step_uncounted, "'first.weight' of Open"),
    "train": (lambda model: model.train(), "'first' of Open|Open"),
    "replace": (replace, "'last'"),
    "load": (reload, "'first.bias' of Open"),
}


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("kind", CHANGES)
def test_a_model_that_another_thread_changes(kind: str, at: int) -> None:
    """There is one clear error; flags and buffers are as they were, weights as the other thread left them."""
    model = Open().eval()
    hooks = snapshot(model)["hooks"]
    change, named = CHANGES[kind]
    text = rf"another thread changed ({named}).* while this one worked on it\. Let that thread wait, or pass a copy"
    with changing(model, at, change), pytest.raises(gp.ModelChangedError, match=text):
        gp.prune(model, example(), 0.5, keep_class=at > 1)  # of one pass and of two over the model
    assert not any(m.training for m in model.modules())
    assert kind == "replace" or snapshot(model)["hooks"] == hooks
    assert type(model.first.in_features) is int
    assert pruned(model)


def test_a_model_that_changes_itself_is_no_other_thread_s_work() -> None:
    """Flags that a model sets in its forward, and weights that it normalises there, are its own affair, whoever else is alive."""
    model = Own().eval()
    pruned(model)  # the first pass normalises its weights, in some releases of PyTorch not all that it can
    expected = pruned(model)
    with disturbed() as wrong:
        assert pruned(model) == expected
    assert wrong == []
    with disturbed(), pytest.raises(gp.InputError, match="cannot run"):
        gp.prune(model, torch.randn(3, 7))
    with disturbed(), pytest.raises(gp.ConfigError):
        gp.prune(model, example(), 1.5)


class Own(nn.Module):
    """Drops in evaluation too, and keeps the rows of a table short."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.drop, self.first, self.last = nn.Dropout(0.0), nn.Linear(16, 24), nn.Linear(24, 4)
        self.table = nn.Embedding(5, 16, max_norm=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns (batch, 4) for (batch, steps, 16)."""
        self.drop.train()
        hidden = self.drop(self.first(x.mean(1) + self.table(torch.arange(5)).mean(0)))
        result: Tensor = self.last(hidden.relu())
        return result


def test_networks_are_the_same_on_every_call() -> None:
    """What the comparisons above rest on."""
    one, two = networks(), networks()
    assert [digest([], dict(m.state_dict())) for m in one] == [digest([], dict(m.state_dict())) for m in two]


def test_passes_within_passes() -> None:
    """Statistics of a model in training mode, which is recorded for each batch, are no change by another thread."""
    model = Listing().train()
    graph = gp.trace(model, example())
    with disturbed() as wrong:
        found = gp.Pruner(
            model, [{"sparsity": 0.5, "op_types": ["Linear"]}], "apoz", graph=graph, source=source(data=[(example(), 0)])
        ).scores()
    assert found
    assert wrong == []
    assert all(m.training for m in model.modules())
