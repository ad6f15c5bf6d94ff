"""Measures how much sooner a search ends when two processes share its study.

    python tools/two_processes.py                                   # three repetitions of 30 trials; about five minutes
    python tools/two_processes.py --trials 8 --repetitions 1        # a look

A residual network learns scikit-learn's handwritten digits. A study (`graphprune.run_study`, optuna's TPE, a SQLite file) then searches
the sparsity of every group at half of the MACs. A trial shrinks the network, re-estimates its BatchNorm statistics, fine-tunes it for
`--epochs` on the training images, and scores it on those that were held out: one to two seconds on one thread.

Each repetition runs the same number of trials with one process and with two, one thread each, from an empty storage; the order changes
from one repetition to the next. Times are those of the whole call: the one process has everything imported, the second one that joins it
starts from nothing. The ratio is that of the medians. Other work on the machine disturbs it, so the load is printed beside every time.

The folder `--out` keeps the trained network, so that a second run starts from it, and holds `two_processes.json`.

Exit code: 0; 1 where the ratio is above `--most`; 2 where it could not be measured.
"""

# ruff: noqa: PLC0415 - before the environment is entered there is nothing but the standard library

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from _environment import INTERRUPTED, ROOT, UNUSABLE, enter

sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from torch import nn

    from graphprune.cli.demo import Digits
    from graphprune.search.objective import Objective

EPOCHS = 12  # of the training before the search


@dataclass(frozen=True)
class Timed:
    """One search.

    Attributes:
        processes: how many shared it.
        seconds: how long the call took.
        shares: how many trials each process finished, the most first.
        trial: median seconds of a trial.
        load: processes that ran or waited on this machine in the minute before it and in that at its end, on average.
        best: the best score.
    """

    processes: int
    seconds: float
    shares: tuple[int, ...]
    trial: float
    load: tuple[float, float]
    best: float


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=30, help="of each search")
    parser.add_argument("--repetitions", type=int, default=3, help="of both searches")
    parser.add_argument("--depth", type=int, default=8, help="of the network: 8, 14, 20, ...")
    parser.add_argument("--epochs", type=int, default=1, help="of fine-tuning in each trial")
    parser.add_argument("--most", type=float, default=0.65, help="the highest ratio that is good enough")
    parser.add_argument("--out", type=Path, default=Path("two-processes-out"), help="folder for the files")
    return parser.parse_args(arguments)


def trained(path: Path, depth: int) -> None:
    """Trains the network, unless there is one."""
    from safetensors.torch import save_file

    from graphprune.cli.demo import LR, build, load_digits, train
    from graphprune.runs.atomic import atomic

    if path.exists():
        return
    model = build(depth, 0)
    train(model, load_digits(), epochs=EPOCHS, lr=LR, seed=0)
    with atomic(path) as temporary:
        save_file(model.state_dict(), temporary)


def finetune(data: Digits, epochs: int, model: nn.Module) -> None:
    """Re-estimates the statistics of a shrunk model and trains it for a short time."""
    import graphprune as gp
    from graphprune.cli.demo import BATCH, FINETUNE_LR, train

    gp.recalibrate(model, data.train_images.split(BATCH))
    train(model, data, epochs=epochs, lr=FINETUNE_LR, seed=1)


def objective(path: Path, depth: int, epochs: int) -> Objective:
    """Returns what is searched; every process makes its own."""
    from safetensors.torch import load_file

    import graphprune as gp
    from graphprune.cli.demo import accuracy, build, load_digits

    data, model = load_digits(), build(depth, 0)
    model.load_state_dict(load_file(path))
    tune = functools.partial(finetune, data, epochs)
    return gp.Objective(model, data.test_images[:1], lambda m: accuracy(m, data), budget=gp.Budget(macs=0.5), finetune=tune)


def timed(make: functools.partial[Objective], trials: int, processes: int) -> Timed:
    """Runs one search from an empty storage."""
    import optuna

    import graphprune as gp

    with tempfile.TemporaryDirectory(prefix="two-processes-") as folder:
        storage = Path(folder) / "study.db"
        before, start = os.getloadavg()[0], time.perf_counter()
        found = gp.run_study(make, trials, storage=storage, processes=processes)
        seconds = time.perf_counter() - start
        stored = optuna.load_study(study_name="graphprune", storage=f"sqlite:///{storage}").get_trials(
            states=[optuna.trial.TrialState.COMPLETE]
        )
    shares = Counter(trial.user_attrs["graphprune.owner"] for trial in stored)
    middle = statistics.median(trial.seconds for trial in found.history)
    load = (before, os.getloadavg()[0])
    return Timed(processes, seconds, tuple(sorted(shares.values(), reverse=True)), middle, load, found.best.score)


def said(result: Timed) -> str:
    """Returns a search in one line."""
    shares, load = " + ".join(map(str, result.shares)), " to ".join(f"{value:.2f}" for value in result.load)
    who = "one process:  " if result.processes == 1 else f"{result.processes} processes:"
    return f"{who} {result.seconds:6.1f} s, trials {shares} of {result.trial:.2f} s, load {load}, best score {result.best:.4f}"


def measured(options: argparse.Namespace) -> list[Timed]:
    """Returns all searches, each printed when it is done."""
    path = options.out / f"digits-{options.depth}.safetensors"
    trained(path, options.depth)
    make = functools.partial(objective, path.resolve(), options.depth, options.epochs)
    timed(make, 1, 1)  # what is imported and set up on first use is not charged to either
    results: list[Timed] = []
    for repetition in range(options.repetitions):
        for processes in (1, 2) if repetition % 2 == 0 else (2, 1):
            results.append(timed(make, options.trials, processes))
            print(said(results[-1]), flush=True)
        one, two = sorted(results[-2:], key=lambda result: result.processes)
        print(f"ratio {two.seconds / one.seconds:.3f}", flush=True)
    return results


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit code."""
    import torch

    from graphprune.runs.atomic import atomic

    options = parse(arguments)
    torch.set_num_threads(1)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        results = measured(options)
        one, two = (statistics.median(r.seconds for r in results if r.processes == processes) for processes in (1, 2))
        with atomic(options.out / "two_processes.json") as temporary:
            record = {"one": one, "two": two, "ratio": two / one, "runs": [asdict(result) for result in results]}
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        return INTERRUPTED
    print(f"medians of {options.repetitions}: one process {one:.1f} s, two {two:.1f} s, ratio {two / one:.3f}")
    return int(two > options.most * one)


if __name__ == "__main__":
    enter("dev")
    sys.exit(main())
