"""What all threads of a process share: functions that are replaced for a while, random number generators, the flags of exporters.

A function is replaced for the calls of the thread that asked for it; the calls of all others go where they went before. Whoever draws from
the generators, and puts them back, has them alone meanwhile.
"""

from __future__ import annotations

import functools
import os
import random
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from threading import get_ident
from typing import Any, TypeAlias

import numpy as np
import torch

Replacement: TypeAlias = Any
"""What is called in a function's place: with the function itself, then with its arguments."""

Asked: TypeAlias = "dict[int, list[Replacement]]"
"""Number of a thread -> the replacements that it has asked for, the innermost last."""

Made: TypeAlias = Callable[[Any, Asked], Any]
"""From what is replaced, and what threads have asked for, to what stands in its place."""

_MISSING: Any = object()


def alone() -> bool:
    """Returns whether the process has no other thread of Python's now."""
    return threading.active_count() == 1


# -- functions ---------------------------------------------------------------------------------------------------------------------


class _Patch:
    """One attribute that is replaced while any thread needs it."""

    def __init__(self, owner: Any, name: str, made: Made) -> None:
        self.owner, self.name = owner, name
        self.asked: Asked = {}
        self.own = vars(owner).get(name, _MISSING)
        self.placed = made(getattr(owner, name), self.asked)
        setattr(owner, name, self.placed)

    def remove(self) -> None:
        """Puts back what was there, unless somebody else has replaced it since: then calls merely pass through."""
        if vars(self.owner).get(self.name) is self.placed:
            if self.own is _MISSING:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, self.own)


_PATCHES: dict[tuple[int, str], _Patch] = {}
_PATCHING = threading.Lock()


def _by_thread(original: Callable[..., Any], asked: Asked) -> Callable[..., Any]:
    """Returns a function that calls the replacement of the thread that calls it, the original where there is none."""

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        mine = asked.get(get_ident())
        return original(*args, **kwargs) if mine is None else mine[-1](original, *args, **kwargs)

    return functools.update_wrapper(dispatch, original)


@contextmanager
def patched(owner: Any, name: str, replacement: Replacement, made: Made = _by_thread) -> Iterator[None]:
    """Replaces a function for the calls that this thread makes within the block; those of other threads pass through.

    Args:
        owner: the module or class that has the function.
        name: of the function.
        replacement: called with the function itself, then with the arguments.
        made: makes what stands in the function's place, where its form matters.
    """
    me, key = get_ident(), (id(owner), name)
    with _PATCHING:
        patch = _PATCHES.get(key)
        if patch is None:
            patch = _PATCHES[key] = _Patch(owner, name, made)
        mine = patch.asked.setdefault(me, [])
        mine.append(replacement)
    try:
        yield
    finally:
        with _PATCHING:
            mine.pop()
            if not mine:
                del patch.asked[me]
            if not patch.asked:
                patch.remove()
                del _PATCHES[key]


# -- warnings ----------------------------------------------------------------------------------------------------------------------


class _Said:
    """Stands in a filter of warnings in place of a pattern of their text: matches what one thread says."""

    def __init__(self, pattern: str) -> None:
        self._thread, self._pattern = get_ident(), re.compile(pattern)

    def match(self, text: str) -> bool:
        """Returns whether the thread says it, and it begins with the pattern."""
        return get_ident() == self._thread and self._pattern.match(text) is not None


@contextmanager
def warning_filters(*filters: tuple[str, type[Warning], str]) -> Iterator[None]:
    """Filters the warnings that this thread gives within the block, before all other filters.

    `warnings.catch_warnings` is for the whole process, and the end of one undoes what other threads have begun.

    Args:
        filters: action, kind of warning, and a pattern that its text begins with; the last that matches counts.
    """
    entries: list[Any] = [(action, _Said(pattern), kind, None, 0) for action, kind, pattern in reversed(filters)]
    known: list[Any] = warnings.filters  # type: ignore[assignment]  # a list, whatever its annotation says
    known[:0] = entries
    _forget_given()
    try:
        yield
    finally:
        for held in (known, warnings.filters):
            for entry in entries:
                with suppress(ValueError):  # somebody has put other filters in the place of all
                    held.remove(entry)  # type: ignore[union-attr]
        _forget_given()


def _forget_given() -> None:
    """Lets the filters be asked again about warnings that have been given before."""
    for name in ("_filters_mutated", "_filters_mutated_lock_held"):  # before and since Python 3.14
        if hasattr(warnings, name):
            getattr(warnings, name)()
            return


# -- random numbers, exporters -------------------------------------------------------------------------------------------------------


class _Gate:
    """Who may run models now: many threads at once, but only one that draws random numbers, and none beside one that exports.

    PyTorch's exporters set flags of the whole process that models ask for (`torch.onnx.is_in_onnx_export`, `torch.compiler.is_compiling`).
    A thread that runs a model and waits to draw has stopped in the middle of it, and is in nobody's way.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: dict[int, int] = {}  # thread -> how many passes it is inside
        self._waiting: set[int] = set()  # threads that wait to draw
        self._drawing: list[int] = []  # the thread that draws, once for each block that it is inside
        self._exporting: list[int] = []  # likewise; empty or of the thread that draws
        self._wanted: list[int] = []  # threads that wait to export

    @contextmanager
    def running(self) -> Iterator[None]:
        """Is entered to run a model without drawing."""
        me = get_ident()
        with self._changed:
            while (self._exporting or self._wanted) and me not in (*self._running, *self._drawing):
                self._changed.wait()
            self._running[me] = self._running.get(me, 0) + 1
        try:
            yield
        finally:
            with self._changed:
                self._running[me] -= 1
                if not self._running[me]:
                    del self._running[me]
                self._changed.notify_all()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Is entered to draw random numbers."""
        me = get_ident()
        with self._changed:
            self._waiting.add(me)
            self._changed.notify_all()
            try:
                while self._drawing and self._drawing[0] != me:
                    self._changed.wait()
                self._drawing.append(me)
            finally:
                self._waiting.discard(me)
        try:
            yield
        finally:
            with self._changed:
                self._drawing.pop()
                self._changed.notify_all()

    @contextmanager
    def exporting(self) -> Iterator[None]:
        """Is entered to export a model."""
        me = get_ident()
        with self.drawing():
            with self._changed:
                self._wanted.append(me)
                try:
                    while any(thread != me and thread not in self._waiting for thread in self._running):
                        self._changed.wait()
                    self._exporting.append(me)
                finally:
                    self._wanted.remove(me)
            try:
                yield
            finally:
                with self._changed:
                    self._exporting.pop()
                    self._changed.notify_all()


_GATE = _Gate()


def running() -> AbstractContextManager[None]:
    """Is entered to run a model; waits for exporters. Turns on models are taken before, see `turns`."""
    return _GATE.running()


def exporting() -> AbstractContextManager[None]:
    """Is entered to export a model; nobody else runs one within graphprune meanwhile."""
    return _GATE.exporting()


@contextmanager
def forked_generators(devices: Iterable[int] = ()) -> Iterator[None]:
    """Puts PyTorch's random number generators back after the block; nobody else draws within graphprune meanwhile.

    Args:
        devices: numbers of the CUDA devices whose generators are put back besides that of the CPU.
    """
    with _GATE.drawing(), torch.random.fork_rng(devices=list(devices)):
        yield


@contextmanager
def generators_kept() -> Iterator[None]:
    """Puts the random number generators of Python and NumPy back after the block; nobody else draws within graphprune meanwhile."""
    with _GATE.drawing():
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (it is the global one that loaders draw from)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def _forked() -> None:
    """Starts anew in a process that was forked while other threads, which it does not have, were in the midst of something."""
    global _PATCHING, _GATE
    _PATCHING, _GATE = threading.Lock(), _Gate()
    for patch in _PATCHES.values():
        for thread in [t for t in patch.asked if t != get_ident()]:
            del patch.asked[thread]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
