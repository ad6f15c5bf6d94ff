"""Evaluations of a model whose groups have lost channels: one after the other here, or several at once in processes of their own."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import random
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import nn

from graphprune.errors import ConfigError
from graphprune.groups.build import trace
from graphprune.masks.channels import Masks
from graphprune.masks.copying import copied
from graphprune.speedup.speedup import speedup
from graphprune.trace.threads import forked_generators, generators_kept
from graphprune.trace.turns import turn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from graphprune.groups.graph import DependencyGraph

Evaluator: TypeAlias = Callable[[nn.Module], float]
Kept: TypeAlias = "Mapping[str, NDArray[np.bool_]]"
Scored: TypeAlias = tuple[float, float]  # the score, and the seconds that it took
_LOW = "Return a low finite number where a model is of no use"
Walk: TypeAlias = Generator[Kept, Scored, None]  # asks for one evaluation after the other, each in the light of those before


class Bench:
    """Evaluates copies of one model.

    Every evaluation starts with the same random numbers, so that scores depend neither on their order nor on the process, and leaves the
    global generators (of torch, numpy and Python) as they were.

    Args:
        model: left bit-identical.
        graph: its groups.
        evaluator: from a model in evaluation mode to a finite number, higher = better. It is given a copy of its own.
        physical: evaluate shrunk models; else masked ones of the original shapes.
        seed: of the random numbers that an evaluation sees.
    """

    def __init__(self, model: nn.Module, graph: DependencyGraph, evaluator: Evaluator, *, physical: bool = True, seed: int = 0) -> None:
        self.model, self.graph, self.evaluator = model, graph, evaluator
        self.physical, self.seed = physical, seed

    def __call__(self, kept: Kept) -> Scored:
        """Returns the score of the model with these channels, and the seconds that shrinking and evaluating took.

        Raises:
            ConfigError: the evaluator returns no finite number.
        """
        start = time.perf_counter()
        with same_random(self.seed, self.model):
            value = self.evaluator(self._small(kept).eval())
        return finite(value), time.perf_counter() - start

    def _small(self, kept: Kept) -> nn.Module:
        if all(mask.all() for mask in kept.values()):
            return copied(self.model, {})
        masks = Masks(self.graph, kept)
        return speedup(self.model, masks, verify=False)[0] if self.physical else masks.masked(self.model)


def drive(bench: Bench, walks: Iterable[Walk], processes: int) -> None:
    """Takes walks to their ends; with several processes as many at a time, each in another process.

    Args:
        bench: evaluates.
        walks: what to evaluate.
        processes: how many; with one, all is done in this process.

    Raises:
        ConfigError: the model, its inputs or the evaluator cannot be sent to another process, or one ended early.
    """
    if processes == 1:
        for walk in walks:
            _in_turn(bench, walk)
        return
    # The evaluator stands first: where it is unpickled, it may import what the model is made of.
    job = (bench.evaluator, bench.model, bench.graph.engine.program.inputs, bench.physical, bench.seed)
    try:
        parcel = pickle.dumps(job)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        what = f"the model, its inputs or the evaluator cannot be sent to another process: {error}"
        raise ConfigError(what, "Use classes and functions of a module's top level, or processes=1") from error
    threads = max(1, torch.get_num_threads() // processes)
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(processes, context, _set_up, (parcel, threads)) as pool:
            _drive(pool, walks)
    except BrokenProcessPool as error:
        fix = "Guard the script's own calls by `if __name__ == '__main__':` and see above what the process said, or use processes=1"
        raise ConfigError("a process of the analysis ended before its work was done", fix) from error


def _in_turn(bench: Bench, walk: Walk) -> None:
    """Takes one walk to its end."""
    kept = _told(walk, None)
    while kept is not None:
        kept = _told(walk, bench(kept))


def _drive(pool: ProcessPoolExecutor, walks: Iterable[Walk]) -> None:
    """Keeps one evaluation of every walk with the processes; what has been scored when one fails is told to its walk all the same."""
    waiting: dict[Future[Scored], Walk] = {}
    asked = [(walk, _told(walk, None)) for walk in walks]
    try:
        while True:
            waiting |= {pool.submit(_evaluate, kept): walk for walk, kept in asked if kept is not None}
            if not waiting:
                return
            done = wait(waiting, return_when=FIRST_COMPLETED).done
            asked = [(waiting[future], _told(waiting[future], future.result())) for future in done if future.exception() is None]
            for future in done:
                future.result()  # raises where it failed
                del waiting[future]
    finally:
        for future in waiting:
            future.cancel()


def _told(walk: Walk, scored: Scored | None) -> Kept | None:
    """Tells a walk the last score, and returns what it asks for next; None where it has ended."""
    try:
        return next(walk) if scored is None else walk.send(scored)
    except StopIteration:
        return None


_BENCHES: list[Bench] = []  # of a process that evaluates: the one that it was started for


def _set_up(parcel: bytes, threads: int) -> None:
    """Makes the bench of this process."""
    end_with_parent()
    torch.set_num_threads(threads)
    evaluator, model, inputs, physical, seed = pickle.loads(parcel)  # noqa: S301 (made by the process that started this one)
    _BENCHES[:] = [Bench(model, trace(model, inputs), evaluator, physical=physical, seed=seed)]


def end_with_parent() -> None:
    """Lets this process end when the one that started it has, also where that was killed: it would wait for work forever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        assert parent is not None  # noqa: S101 (the caller has looked)
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, daemon=True).start()


def _evaluate(kept: Kept) -> Scored:
    return _BENCHES[0](kept)


@contextmanager
def same_random(seed: int, *models: nn.Module) -> Iterator[None]:
    """Seeds the global random number generators for the block, and puts them back where they were.

    Args:
        seed: of all of them.
        models: that the block works on and other threads may work on too: turns are taken before generators.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(turn(model))
        stack.enter_context(generators_kept())
        stack.enter_context(forked_generators(devices))
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (the global generator that evaluators draw from)
        random.seed(seed)
        yield


def finite(
    value: object, what: str = "the evaluator returned", fix: str = "Return a low finite number where a model is of no use"
) -> float:
    """Returns what a user's function gave, as a number.

    Args:
        value: a number, or a tensor of one element.
        what: begins the message, such as "the evaluator returned".
        fix: ends it where the number is not finite.

    Raises:
        ConfigError: it is no finite number.
    """
    try:
        number = float(value.detach() if isinstance(value, torch.Tensor) else value)  # type: ignore[arg-type]  # whatever a user's function returns
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what} a {type(value).__name__}, no number", "Return one finite number") from error
    if not math.isfinite(number):
        raise ConfigError(f"{what} {number}", fix)
    return number
