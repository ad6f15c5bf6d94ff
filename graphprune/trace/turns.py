"""Taking turns: one thread at a time works on a model, and notices where another changes it all the same.

While a model is looked at, its training flags, attributes and buffers are not what they are otherwise. So threads of ours that work on
models with a module, a tensor or a configuration object in common wait for each other. Threads that know nothing of this, a training loop
for one, may still write to a model meanwhile: its tensors, flags and modules are compared at the begin and end of every pass.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from graphprune.errors import ConfigError, ModelChangedError
from graphprune.torch_private import DisableTorchFunction, version_of
from graphprune.trace.members import Members
from graphprune.trace.threads import alone

State: TypeAlias = "dict[str, Any]"
"""What nobody else may change: name of a module or tensor, and what is looked at -> what it was."""

P = ParamSpec("P")
T = TypeVar("T")

_SAMPLED = 16  # parameters of which some values are compared, for writes that PyTorch does not count (through `.data`)
_VALUES = 4


class Turn:
    """One thread's work on a model.

    Attributes:
        thread: its number.
        model: the model.
        watched: whether changes by other threads are looked for.
    """

    def __init__(self, model: nn.Module, *, watched: bool) -> None:
        self.thread = get_ident()
        self.model = model
        self.watched = watched
        self._expected: State = {}
        self._in_passes: dict[bool, frozenset[str]] = {}  # training -> what a pass in that mode changes: some models write to themselves
        self._repeated: set[bool] = set()  # modes in which several passes changed the same
        self._passes: list[State] = []  # those begun and not ended, as they began; empty where another pass has begun inside
        self._suspect = ""

    def settle(self) -> None:
        """Takes the model as it is now for what it should be."""
        if self.watched:
            self._expected = _state(self.model)

    def check(self) -> None:
        """Raises if the model is not what it was when it was last let alone (within a pass, what it is says nothing).

        Raises:
            ModelChangedError: naming the first tensor or module that was changed.
        """
        if not self.watched or self._passes:
            return
        if self._suspect:
            raise _changed(self.model, self._suspect)
        own = {name for training in self._repeated for name in self._in_passes[training]}
        different = next((name for name in _differences(self._expected, _state(self.model)) if name not in own), "")
        if different:
            raise _changed(self.model, different)

    def begin(self) -> None:
        """Begins a pass over the model, whose training flags are set."""
        self._passes = [{} for _ in (*self._passes, self)]
        if self.watched:
            self._passes[-1] = _state(self.model)

    def end(self, *, training: bool) -> None:
        """Ends a pass, before anything is put back: what every pass changes is the model's own doing, what one alone changes is not."""
        before = self._passes.pop() if self._passes else {}
        if not before:
            return
        found = frozenset(name for name in _differences(before, _state(self.model)) if not name.endswith(_BUFFER))
        usual = self._in_passes.get(training)
        if usual is None:
            self._in_passes[training] = found
        elif found == usual:
            self._repeated.add(training)
        else:
            self._suspect = self._suspect or min(found ^ usual)

    def unconfirmed(self, *, training: bool) -> bool:
        """Returns whether the only pass in a mode changed something: another pass then tells whether it was the model itself."""
        return bool(self._in_passes.get(training)) and training not in self._repeated

    def suspect(self) -> str:
        """Returns what may explain an error: what changed since the model was last let alone, or during the only pass; or ""."""
        if not self.watched:
            return ""
        once = [found for training, found in self._in_passes.items() if training not in self._repeated]
        shape = [name for found in once for name in sorted(found) if not name.endswith(_VERSION)]
        different = _differences(self._expected, _state(self.model))
        return self._suspect or next(iter([*different, *shape]), "")


_OWNERS: dict[int, Turn] = {}
_CHANGED = threading.Condition()


@contextmanager
def turn(model: nn.Module, *, writes: bool = False) -> Iterator[Turn]:
    """Waits until no other thread works on a model, on a part of it, or on one that shares a part with it; then it is this thread's.

    Turns may be nested. Locks of other kinds are taken within turns, not around them.

    Args:
        model: any module.
        writes: whether this thread itself changes the model for good, so that changes are no surprise.

    Raises:
        ModelChangedError: a thread that takes no turns changed the model within the block. All that the block did is put back; what the
            other thread did stays, apart from flags and attributes that it set during a pass.
    """
    held = _OWNERS.get(id(model))
    if held is not None and held.thread == get_ident():
        yield held
        if writes:
            held.settle()
        return
    mine = Turn(model, watched=not writes and not alone())
    taken = _taken([id(model)], mine)
    try:
        if mine.watched or not alone():
            taken += _taken(_parts(model), mine)
        mine.settle()
        try:
            yield mine
        except (ModelChangedError, ConfigError):
            raise
        except Exception as error:
            what = mine.suspect()
            if what:
                raise _changed(model, what) from error
            raise
        mine.check()
    finally:
        with _CHANGED:
            for key in taken:
                del _OWNERS[key]
            _CHANGED.notify_all()


def in_turn(function: Callable[P, T]) -> Callable[P, T]:
    """Returns a function that takes a turn on its first argument, a model; one that is called with `inplace` writes to it."""
    first = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        model: Any = args[0] if args else kwargs.get(first)
        if not isinstance(model, nn.Module):
            return function(*args, **kwargs)
        with turn(model, writes=bool(kwargs.get("inplace"))):
            return function(*args, **kwargs)

    return call


def _taken(keys: list[int], mine: Turn) -> list[int]:
    """Waits until all of these are free or this thread's own; returns those that are taken for it now."""
    with _CHANGED:
        while any(key in _OWNERS and _OWNERS[key].thread != mine.thread for key in keys):
            _CHANGED.wait()
        free = [key for key in dict.fromkeys(keys) if key not in _OWNERS]
        _OWNERS.update(dict.fromkeys(free, mine))
        return free


def _parts(model: nn.Module) -> list[int]:
    """Returns what models can have in common: modules, tensors, and plain objects that modules hold (a configuration, a partial).

    Raises:
        ModelChangedError: modules come and go.
    """
    try:
        members = Members.of(model)
        modules = members.distinct
        held = [value for module in modules for value in list(vars(module).values()) if _is_plain(_kind(value))]
    except RuntimeError as error:  # a dictionary changed its size during iteration
        raise _changed(model, _MODULES) from error
    return [id(part) for part in (*modules, *(tensor for _, tensor in members.tensors), *held)]


def _kind(value: object) -> Any:
    """Returns the type of a value (annotated as anything: a type checker takes the `__hash__` of the value for its own)."""
    return type(value)


@functools.lru_cache(maxsize=4096)
def _is_plain(kind: Hashable) -> bool:
    """Returns whether values of a type are objects with attributes of their own that are no part of PyTorch or Python."""
    if kind is functools.partial:
        return True
    assert isinstance(kind, type)  # noqa: S101 (for the type checker)
    outside = kind.__module__.partition(".")[0] not in {"torch", "builtins", "collections", "typing"}
    return outside and not issubclass(kind, (nn.Module, Tensor, type)) and getattr(kind, "__dictoffset__", 0) != 0


# -- what is compared --------------------------------------------------------------------------------------------------------------

_MODULES, _VERSION, _BUFFER = "the modules", " (values)", " (buffer)"


def _state(model: nn.Module) -> State:
    """Returns what nobody else may change: modules, their training flags, and tensors with their versions, shapes and some values."""
    try:
        members = Members.of(model)
    except RuntimeError as error:
        raise _changed(model, _MODULES) from error
    found: State = {}
    for path, module in members.modules:
        found[path or "the model"] = (module, module.training)
    with DisableTorchFunction():  # (a watch on sizes would take this for the model's own doing)
        for name, tensor in members.parameters:
            found[name] = (tensor, _shape(tensor))
            found[name + _VERSION] = version_of(tensor)
        for name, tensor in members.parameters[:: max(1, len(members.parameters) // _SAMPLED)]:
            found[name + _VERSION] = (found[name + _VERSION], _sample(tensor))
        for name, tensor in members.buffers:
            found[name + _BUFFER] = (tensor, _shape(tensor), version_of(tensor))
    return found


def _shape(tensor: Tensor) -> tuple[int, ...] | None:
    """Returns the shape of a tensor; None for one of a lazy module that has not seen an input yet."""
    return None if is_lazy(tensor) else tuple(tensor.shape)


def _sample(tensor: Tensor) -> object:
    """Returns where the values of a tensor lie, and some of them."""
    if tensor.is_meta or tensor.layout is not torch.strided or type(tensor) not in {Tensor, nn.Parameter} or not tensor.is_contiguous():
        return None
    return tensor.data_ptr(), tensor.detach().view(-1)[:_VALUES].clone()


def _differences(before: State, after: State) -> list[str]:
    """Returns the names of what differs, in order."""
    return [name for name in (*before, *(n for n in after if n not in before)) if not _equal(before.get(name), after.get(name))]


def _equal(a: object, b: object) -> bool:
    """Returns whether two values are the same: objects by identity, numbers and samples by value."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (_is_sample(a) and _is_sample(b) and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8)))
    return a is b or (isinstance(a, int) and a == b)


def _is_sample(tensor: Tensor) -> bool:
    return tensor.ndim == 1 and tensor.numel() <= _VALUES and not isinstance(tensor, nn.Parameter)


def _changed(model: nn.Module, name: str) -> ModelChangedError:
    """Returns the error that names what was changed."""
    which = name.removesuffix(_VERSION).removesuffix(_BUFFER)
    kind = type(model).__name__
    what = kind if which == "the model" else f"{which if which == _MODULES else repr(which)} of {kind}"
    text = f"another thread changed {what} while this one worked on it"
    return ModelChangedError(text, "Let that thread wait, or pass a copy of the model (copy.deepcopy)")


def _forked() -> None:
    """Starts anew in a process that was forked while other threads, which it does not have, had their turns."""
    global _CHANGED  # noqa: PLW0603 (a lock cannot be let go for a thread that is not there)
    _CHANGED = threading.Condition()
    for key in [k for k, held in _OWNERS.items() if held.thread != get_ident()]:
        del _OWNERS[key]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
