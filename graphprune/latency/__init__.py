"""Times ONNX files against each other in ONNX Runtime, on the CPU.

A machine gets faster and slower while one waits: other programs, heat, memory. So all models live in one process and take turns, in a
new random order in each round; what disturbs one round disturbs all models in it. What counts is the ratio of two medians, and its
interval comes from drawing whole rounds again (a paired bootstrap). Times of two different calls are not comparable.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from rich.table import Table

from graphprune.errors import ConfigError
from graphprune.latency.sessions import LEVELS, Loaded, hint, load
from graphprune.latency.statistics import Milliseconds, ratio_interval, summary

__all__ = ["LatencyReport", "LatencyRow", "measure_latency"]

PathLike = str | os.PathLike[str]

_FEWEST_ROUNDS = 5  # however short the time


@dataclass(frozen=True)
class LatencyRow:
    """The times of one model.

    Attributes:
        name: as the caller called it.
        path: the ONNX file.
        shapes: shape of each input that was fed.
        runs: timed runs, warm-up not among them.
        median_ms: half of the runs took at most this long, in milliseconds.
        p90_ms: nine of ten runs took at most this long.
        spread_ms: interquartile range, the width of the middle half of the runs.
        ratio: median of the baseline over median of this model: how many times faster this model is.
        ratio_low: lower end of the 95 % confidence interval of the ratio.
        ratio_high: upper end.
    """

    name: str
    path: str
    shapes: dict[str, tuple[int, ...]]
    runs: int
    median_ms: float
    p90_ms: float
    spread_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float


@dataclass(frozen=True)
class LatencyReport:
    """How fast models are, and under which conditions that was measured; rich prints it as a table.

    Attributes:
        rows: one per model, in the order given.
        baseline: the model that ratios refer to.
        batch: dimension 0 of the first input.
        threads: threads within an operator; operators run one after the other.
        optimization: graph-optimisation level of ONNX Runtime: "none", "basic", "extended" or "all".
        warmup: rounds that were run first and not counted.
        seconds: what the rounds took together, warm-up included.
        seed: of inputs, order and bootstrap.
        onnxruntime: version of ONNX Runtime.
        cpus: logical processors of the machine.
    """

    rows: tuple[LatencyRow, ...]
    baseline: str
    batch: int
    threads: int
    optimization: str
    warmup: int
    seconds: float
    seed: int
    onnxruntime: str
    cpus: int

    def __getitem__(self, name: str) -> LatencyRow:
        """Returns the row of a model."""
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values for JSON."""
        return asdict(self)

    def __rich__(self) -> Table:
        """Returns the table that rich prints."""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''} of {self.cpus}"
        conditions = f"batch {self.batch}, {threads}, graph optimisation {self.optimization!r}, ONNX Runtime {self.onnxruntime}"
        table = Table(title="Latency", caption=f"{conditions}, {self.rows[0].runs} rounds after {self.warmup} to warm up")
        for heading in ("model", "median ms", "90 % ms", "spread ms", f"speedup over {self.baseline}", "95 % interval"):
            table.add_column(heading, justify="left" if heading == "model" else "right")
        for row in self.rows:
            times = [f"{value:.3f}" for value in (row.median_ms, row.p90_ms, row.spread_ms)]
            interval = "" if row.name == self.baseline else f"{row.ratio_low:.2f} to {row.ratio_high:.2f}"
            table.add_row(row.name, *times, f"{row.ratio:.2f}", interval)
        return table


def measure_latency(  # noqa: PLR0913 - the conditions of a measurement are many, and all are named
    models: Mapping[str, PathLike],
    *,
    inputs: Mapping[str, Any] | None = None,
    batch: int = 1,
    threads: int = 1,
    warmup: int = 3,
    rounds: int = 50,
    seconds: float = 20.0,
    optimization: str = "all",
    baseline: str | None = None,
    seed: int = 0,
) -> LatencyReport:
    """Times models in turns; see the module's description for what the numbers mean.

    Args:
        models: ONNX files by the name that the report gives them.
        inputs: arrays or tensors by input name, for every model that has an input of that name; all other inputs are random.
        batch: size of a dynamic dimension 0 and of every dimension called "batch".
        threads: threads within an operator.
        warmup: rounds to run first and not to count.
        rounds: rounds to time; in each, every model runs once.
        seconds: stop when this time is up, but not before 5 rounds are done.
        optimization: graph-optimisation level, "none", "basic", "extended" or "all".
        baseline: the model that ratios refer to; None for the first.
        seed: of random inputs, order and bootstrap.

    Raises:
        ConfigError: if there is no model, or an option is unusable.
        FileError: if a file is missing or is no ONNX file that ONNX Runtime can load.
        InputError: if an input's shape is open or its type cannot be made up, the batch is fixed otherwise, or a model cannot be run.
    """
    limits = {"batch": (batch, 1), "threads": (threads, 1), "rounds": (rounds, 1), "warmup": (warmup, 0), "seed": (seed, 0)}
    chosen = _checked_options(models, baseline, optimization, seconds, limits)
    paths = {name: Path(path) for name, path in models.items()}
    loaded = load(paths, inputs or {}, batch=batch, threads=threads, optimization=optimization, seed=seed)
    started = time.perf_counter()
    times = dict(zip(models, _timed(loaded, warmup, rounds, seconds, np.random.default_rng(seed)), strict=True))
    elapsed = time.perf_counter() - started
    rows = tuple(_row(model, str(models[model.name]), times[model.name], times[chosen], seed) for model in loaded)
    fed = next(model for model in loaded if model.name == chosen).feeds.values()
    return LatencyReport(
        rows=rows,
        baseline=chosen,
        batch=next((array.shape[0] for array in fed if array.ndim), batch),
        threads=threads,
        optimization=optimization,
        warmup=warmup,
        seconds=elapsed,
        seed=seed,
        onnxruntime=onnxruntime.__version__,
        cpus=os.cpu_count() or 1,
    )


def _checked_options(
    models: Mapping[str, PathLike], baseline: str | None, optimization: str, seconds: float, limits: Mapping[str, tuple[int, int]]
) -> str:
    """Returns the name of the baseline if all options are usable; `limits` has values and the least that each may be."""
    if not hasattr(models, "items") or not models:
        raise ConfigError("there is no model to time", 'Pass at least one, as in {"dense": "dense.onnx"}')
    for name, (value, least) in limits.items():
        if value < least:
            raise ConfigError(f"{name} is {value}", f"Pass at least {least}")
    if not seconds > 0:
        raise ConfigError(f"seconds is {seconds}", "Pass a time above 0")
    if optimization not in LEVELS:
        what = f"there is no graph-optimisation level {optimization!r}{hint(optimization, LEVELS)}"
        raise ConfigError(what, f"Pass one of {', '.join(LEVELS)}")
    chosen = next(iter(models)) if baseline is None else baseline
    if chosen not in models:
        raise ConfigError(f"the baseline {chosen!r} is none of the models{hint(chosen, models)}", f"Pass one of {', '.join(models)}")
    return chosen


def _timed(models: Sequence[Loaded], warmup: int, rounds: int, seconds: float, generator: np.random.Generator) -> Milliseconds:
    """Returns times in milliseconds of shape (models, rounds); each round runs all models, in an order of its own."""
    timed: list[Milliseconds] = []
    end = np.inf
    with _without_garbage_collection():
        for number in range(-warmup, rounds):
            if number == 0:
                end = time.perf_counter() + seconds
            elif number >= _FEWEST_ROUNDS and time.perf_counter() > end:
                break
            times = np.empty(len(models))
            for index in generator.permutation(len(models)):
                run = models[index].run
                start = time.perf_counter_ns()
                run()
                times[index] = (time.perf_counter_ns() - start) / 1e6
            if number >= 0:
                timed.append(times)
    return np.stack(timed, axis=1)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Keeps Python's garbage collector from running in the middle of a measurement."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _row(model: Loaded, path: str, own: Milliseconds, reference: Milliseconds, seed: int) -> LatencyRow:
    """Returns the statistics of one model; `reference` has the baseline's times in the same rounds."""
    median, high, spread = summary(own)
    low, up = ratio_interval(reference, own, seed)
    return LatencyRow(
        name=model.name,
        path=path,
        shapes={name: array.shape for name, array in model.feeds.items()},
        runs=len(own),
        median_ms=median,
        p90_ms=high,
        spread_ms=spread,
        ratio=float(np.median(reference)) / median,
        ratio_low=low,
        ratio_high=up,
    )
