"""Studies whose trials are evaluated by several processes of one machine.

this process:  start the others ──▶ make the objective ──▶ open the storage ──▶ trial, trial, trial ... ──▶ wait for the others ──▶ result
each other:    import, make an objective ──▶ wait for the storage ─────────────▶ trial, trial ...

Starting a process takes seconds, in which this one has its first trials behind it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Literal

import torch

from graphprune.errors import ConfigError
from graphprune.search.objective import Objective
from graphprune.search.studies import Measure, Sampler, Study, StudyResult
from graphprune.sensitivity.bench import end_with_parent
from graphprune.training.session import check_count


def run_study(  # noqa: PLR0913 (the study, and how it is run)
    objective: Objective | Callable[[], Objective],
    trials: int,
    sampler: Sampler = "tpe",
    *,
    storage: str | os.PathLike[str] | None = None,
    name: str = "graphprune",
    seed: int = 0,
    minimize: Literal["macs", "params"] | Measure | None = None,
    options: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    processes: int = 1,
    progress: bool = False,
) -> StudyResult:
    """Runs a study until it has so many trials, in one process or several; see `Study` for what is not said here.

    To use more than one machine, or processes of your own, run this in each of them with the same storage.

    Args:
        objective: what is searched. For several processes a function that makes it, which can be pickled: one at the top of a module, or
            `functools.partial` of one; every process makes its own.
        trials: how many there are to be in all, those of earlier runs included.
        sampler: "tpe", "cma-es", "nsga-ii" or "random".
        storage: the path of a SQLite file, or a database's URL. Without one, several processes share a temporary file.
        name: of the study.
        seed: of the sampler.
        minimize: a second measure that is to be small.
        options: of the optuna sampler.
        settings: what else the scores depend on, see `Study`.
        processes: how many work, this one among them; they share PyTorch's threads.
        progress: show a bar with scores, sparsity and time left.

    Raises:
        ConfigError: an argument is not usable, or a process died.
        FileError: see `Study`.
    """
    how: dict[str, Any] = {"name": name, "seed": seed, "minimize": minimize, "options": options, "settings": settings}
    if check_count(processes, "processes", 1) == 1:
        made = objective if isinstance(objective, Objective) else objective()
        return Study(made, sampler, storage=storage, **how).run(trials, progress=progress)
    if isinstance(objective, Objective):
        what = "several processes each need an objective of their own, and one that is made already was given"
        raise ConfigError(what, "Pass a function that makes it, or processes=1")
    with ExitStack() as stack:
        if storage is None:
            storage = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graphprune-study-"))) / "study.db"
        parcel = _packed((objective, sampler, {**how, "storage": storage}))
        threads = max(1, torch.get_num_threads() // processes)
        others = stack.enter_context(_started(processes - 1, (parcel, trials, threads)))
        study = Study(objective(), sampler, storage=storage, **how)
        stack.callback(study.close)
        others.opened.set()
        with _with_threads(threads):
            study.run(trials, progress=progress, between=others.check)
        others.wait()
        return study.result()


@dataclass(frozen=True)
class _Others:
    """The processes that work beside this one.

    Attributes:
        work: what they do.
        opened: is set when the storage is there.
        stopped: is set when they are to start no further trial.
    """

    work: frozenset[Future[None]]
    opened: Event
    stopped: Event

    def check(self) -> None:
        """Raises what one of them raised.

        Raises:
            ConfigError: one died.
        """
        for future in self.work:
            if future.done():
                _finish(future.result)

    def wait(self) -> None:
        """Waits until all are done, and raises what one of them raised.

        Raises:
            ConfigError: one died.
        """
        wait(self.work)
        self.check()


@contextmanager
def _started(count: int, job: tuple[bytes, int, int]) -> Iterator[_Others]:
    """Starts processes that work on a job; where the block fails, they end after the trials that they are in, and are waited for."""
    context = multiprocessing.get_context("spawn")
    opened, stopped = context.Event(), context.Event()
    pool = ProcessPoolExecutor(count, context, _remember, (opened, stopped))
    try:
        yield _Others(frozenset(pool.submit(_work, *job) for _ in range(count)), opened, stopped)
    except BaseException:
        stopped.set()
        opened.set()
        pool.shutdown(wait=True)
        raise
    pool.shutdown(wait=False)  # the work is done: that the processes take a second to end is no reason to wait


@contextmanager
def _with_threads(threads: int) -> Iterator[None]:
    """Gives PyTorch so many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _packed(what: object) -> bytes:
    """Returns an object as bytes.

    Raises:
        ConfigError: it cannot be pickled.
    """
    try:
        return pickle.dumps(what)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        text = f"what makes the objective cannot be sent to other processes: {error}"
        raise ConfigError(text, "Define it at the top of a module, and minimize= too, or use processes=1") from error


_EVENTS: list[Event] = []  # of a process that works beside another: storage opened, stopped


def _remember(*events: Event) -> None:
    """Keeps the events, which can be handed over only when a process starts; it ends with the one that started it."""
    _EVENTS[:] = events
    end_with_parent()


def _work(parcel: bytes, trials: int, threads: int) -> None:
    """Takes part in a study, in a process of its own."""
    torch.set_num_threads(threads)
    factory, sampler, how = pickle.loads(parcel)  # noqa: S301 (our own bytes, from the process that started this one)
    opened, stopped = _EVENTS
    objective = factory()
    opened.wait()
    if stopped.is_set():
        return
    study = Study(objective, sampler, **how)
    try:
        for _ in study.trials(trials):
            if stopped.is_set():
                return
    finally:
        study.close()


def _finish(result: Callable[[], None]) -> None:
    """Raises what a process raised.

    Raises:
        ConfigError: it died.
    """
    try:
        result()
    except BrokenProcessPool as error:
        fix = (
            "Guard the script's own calls by `if __name__ == '__main__':` and see its last words on stderr; the study goes on where it was"
        )
        raise ConfigError("a process of the study died", fix) from error
