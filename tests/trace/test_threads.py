"""What is replaced is replaced for one thread, and whoever draws random numbers, exports or works on a model has that alone."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import graphprune as gp
from graphprune.trace.contexts import module_paths, values_taken, whole_attention
from graphprune.trace.threads import exporting, forked_generators, patched, running, warning_filters
from graphprune.trace.turns import turn
from tests.support.threads import together


def elsewhere(task: Callable[[], Any]) -> Any:
    """Returns what a task gives in another thread, while this one waits."""
    return together([task])[0]


def blocked(task: Callable[[], object]) -> tuple[threading.Thread, threading.Event]:
    """Starts a task in another thread, and shows that it waits; returns the thread, and what is set once it is done."""
    done = threading.Event()

    def work() -> None:
        task()
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    assert not done.wait(0.1)
    return thread, done


def enter(context: Any) -> None:
    """Enters and leaves a context."""
    with context:
        pass


@contextmanager
def company() -> Iterator[None]:
    """Lets another thread be alive: one alone takes no trouble."""
    leave = threading.Event()
    thread = threading.Thread(target=leave.wait)
    thread.start()
    try:
        yield
    finally:
        leave.set()
        thread.join()


def test_patches_are_each_thread_s_own() -> None:
    """Calls of other threads pass through; the innermost of several replacements counts; in the end all is as before."""
    owner = SimpleNamespace(name=lambda value: value)
    original = owner.name
    with patched(owner, "name", lambda real, value: real(value) + 1):
        with patched(owner, "name", lambda real, value: real(value) + 10):
            assert (owner.name(0), elsewhere(lambda: owner.name(0))) == (10, 0)
        assert owner.name(0) == 1
    assert owner.name is original


def test_overlapping_patches() -> None:
    """What two threads replace at once is put back by the last of them, whichever began."""
    entered, leave = threading.Event(), threading.Event()
    owner = SimpleNamespace(name=lambda: "real")
    original = owner.name

    def other() -> str:
        with patched(owner, "name", lambda _: "theirs"):
            entered.set()
            leave.wait(10)
            return str(owner.name())

    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(other()))
    with patched(owner, "name", lambda _: "mine"):
        thread.start()
        entered.wait(10)
        assert owner.name() == "mine"
    assert owner.name() == "real"
    assert owner.name is not original
    leave.set()
    thread.join()
    assert said == ["theirs"]
    assert owner.name is original


def test_a_patch_upon_a_patch_stays() -> None:
    """Whoever replaces the function in between keeps it, and it still reaches the original."""
    owner = SimpleNamespace(name=lambda: "real")
    with patched(owner, "name", lambda _: "mine"):
        inner = owner.name
        owner.name = lambda: f"<{inner()}>"
    assert owner.name() == "<real>"


def test_other_threads_pass_recordings_by() -> None:
    """Values that others take, the fused attention that others run, and modules that others call, are not noticed."""
    seen: list[Any] = []
    model, x = nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2)
    paths = {id(m): n for n, m in model.named_modules()}
    before = {name: vars(torch.Tensor).get(name) for name in ("tolist", "numpy")}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        seen.append(tensor)
        return tensor

    def other() -> tuple[bool, Any]:
        model(x)
        return torch.backends.mha.get_fastpath_enabled(), (x.tolist(), x.numpy().tolist())

    with values_taken(note), whole_attention(), module_paths(model.modules(), paths, seen.append, seen.append):
        assert elsewhere(other) == (True, ([[1.0, 1.0]], [[1.0, 1.0]]))
        assert seen == []
        assert not torch.backends.mha.get_fastpath_enabled()
        model(x)
        assert seen == ["", "0", "0", ""]
        x.tolist()
        assert seen[4] is x
    assert before == {name: vars(torch.Tensor).get(name) for name in ("tolist", "numpy")}
    assert torch.backends.mha.get_fastpath_enabled()


def test_filters_of_warnings_are_each_thread_s_own() -> None:
    """An error here is an ordinary warning elsewhere; filters that were there before stay, and no other."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = list(warnings.filters)

        def warn(text: str) -> None:
            warnings.warn(text, UserWarning, stacklevel=1)

        with warning_filters(("error", UserWarning, "this")):
            assert elsewhere(partial(warn, "this")) is None
            warn("that")
            with pytest.raises(UserWarning, match="this"):
                warn("this")
        assert list(warnings.filters) == before
    assert [str(w.message) for w in caught] == ["this", "that"]


def test_one_thread_draws_at_a_time() -> None:
    """Who wants to draw waits, who runs a model without drawing does not; what is drawn is put back."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with forked_generators():
        torch.rand(3)
        assert elsewhere(lambda: enter(running())) is None
        with forked_generators():
            torch.rand(3)
        thread, done = blocked(lambda: enter(forked_generators()))
    thread.join()
    assert done.is_set()
    assert torch.equal(torch.get_rng_state(), before)


def test_exporters_are_alone() -> None:
    """Who runs a model waits for who exports, and who exports for them, unless they wait to draw, in the middle of a pass."""
    with exporting(), running():
        thread, done = blocked(lambda: enter(running()))
    thread.join()
    assert done.is_set()
    with running():
        thread, done = blocked(lambda: enter(exporting()))
        enter(running())
        assert not done.is_set()
        with forked_generators():
            assert done.is_set()
    thread.join()
    assert elsewhere(lambda: enter(exporting())) is None


def test_turns_on_models() -> None:
    """A model, its parts, and what it shares with others are one thread's at a time; other models are free."""
    part, config = nn.Linear(2, 2), SimpleNamespace(width=3)
    model = nn.Sequential(nn.Linear(2, 2), part)
    vars(model[0])["config"] = config
    sharing, tied, free = nn.Sequential(part), nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))
    tied.weight = part.weight
    configured = nn.ReLU()
    vars(configured)["config"] = config
    with company(), turn(model):
        assert elsewhere(lambda: enter(turn(free))) is None
        enter(turn(part))
        waiting = [blocked(lambda m=m: enter(turn(m))) for m in (model, part, sharing, tied, configured)]  # type: ignore[misc]
    for thread, done in waiting:
        thread.join()
        assert done.is_set()


def test_turns_end_with_errors() -> None:
    """A block that raises gives its model back."""
    model = nn.Linear(2, 2)
    with pytest.raises(KeyError), turn(model):
        raise KeyError
    assert elsewhere(lambda: enter(turn(model))) is None


def test_lazy_modules_are_refused_beside_other_threads() -> None:
    """What has no shape yet is told as when there is no other thread, and stays as it was."""
    model, done = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()), threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        with pytest.raises(gp.InputError, match="has no shape yet"):
            gp.trace(model, torch.ones(2, 4))
    finally:
        done.set()
        other.join()
    assert isinstance(model[0], nn.LazyLinear)
