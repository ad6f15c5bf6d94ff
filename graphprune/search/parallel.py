"""Studies whose trials are evaluated by several processes of one machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch

from graphprune.errors import ConfigError
from graphprune.search.bench import check_processes
from graphprune.search.objective import Objective
from graphprune.search.showing import bar
from graphprune.search.studies import Measure, Sampler, Study, StudyResult

_LOOK_SECONDS = 0.5  # how often the bar is brought up to date


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
        processes: how many; they share PyTorch's threads.
        progress: show a bar with scores, sparsity and time left.

    Raises:
        ConfigError: an argument is not usable, or a process died.
        FileError: see `Study`.
    """
    how: dict[str, Any] = {"name": name, "seed": seed, "minimize": minimize, "options": options}
    if check_processes(processes) == 1:
        made = objective if isinstance(objective, Objective) else objective()
        return Study(made, sampler, storage=storage, **how).run(trials, progress=progress)
    if isinstance(objective, Objective):
        what = "several processes each need an objective of their own, and one that is made already was given"
        raise ConfigError(what, "Pass a function that makes it, or processes=1")
    with ExitStack() as stack:
        if storage is None:
            storage = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="graphprune-study-"))) / "study.db"
        study = Study(objective(), sampler, storage=storage, **how)
        stack.callback(study.close)
        parcel = _packed((objective, sampler, {**how, "storage": storage}))
        threads = max(1, torch.get_num_threads() // processes)
        pool = stack.enter_context(ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")))
        waiting = {pool.submit(_work, parcel, trials, threads) for _ in range(processes)}
        shows = stack.enter_context(bar(name, trials, study.history(), shown=progress))
        shown = len(study.history())
        while waiting:
            done, waiting = wait(waiting, timeout=_LOOK_SECONDS if progress else None)
            for work in done:
                _finish(work.result)
            found = study.history() if progress else []
            for trial in found[shown:]:
                shows(trial, study.result().best)
            shown = max(shown, len(found))
        return study.result()


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


def _work(parcel: bytes, trials: int, threads: int) -> None:
    """Takes part in a study, in a process of its own."""
    torch.set_num_threads(threads)
    factory, sampler, how = pickle.loads(parcel)  # noqa: S301 (our own bytes, from the process that started this one)
    study = Study(factory(), sampler, **how)
    try:
        study.run(trials)
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
        raise ConfigError("a process of the study died", "Look at its last words on stderr; the study goes on where it was") from error
