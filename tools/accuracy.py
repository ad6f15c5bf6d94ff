"""Measures what pruning costs in accuracy: every criterion, against Torch-Pruning 1.6.1 at the same MACs, on trained networks.

    python tools/accuracy.py                                     # the whole table; about half an hour on two processor cores
    python tools/accuracy.py --quick                             # one seed, one budget, three criteria; about two minutes
    python tools/accuracy.py --criteria l2 taylor --with scope=group aggregation=mean      # further rows with other options

A ResNet-20 for each seed learns scikit-learn's digits. Every method removes 30, 50 and 70 % of its MACs. Accuracy is measured right after
pruning, with BatchNorm statistics estimated again from the 1,200 training images, and after one epoch over these images (and the statistics
estimated once more, see `tests.support.accuracy.measure`). Network, data and training are those of `graphprune demo`, with its learning
rate for fine-tuning; images, order and shifts are the same for all methods of a seed. Data criteria of both sides look at the same 8
batches of 64 training images.

graphprune runs with its default options and with mode="global". Torch-Pruning runs with the default options of `MagnitudePruner`
(GroupMagnitudeImportance, p = 2), `BNScalePruner` (BNScaleImportance) and `MagnitudePruner` with GroupTaylorImportance, and with
`global_pruning`; its share of channels is bisected until its MACs just meet the budget, as ours do.

Everything goes into the folder `--out`: the trained networks, `results.jsonl` (one line per cell, so that an interrupted run goes on where
it stopped), `accuracy.md` and `accuracy.png`. Each process computes on one thread.

Exit code: 0; 1 where a cell failed; 2 where the measurement could not be run.
"""

# ruff: noqa: PLC0415 - before the environment is entered there is nothing but the standard library

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import warnings
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _environment import INTERRUPTED, ROOT, enter

sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from tests.support.accuracy import Cell, Record, Settings
    from tests.support.accuracy_report import Table

PEERS = ("torch-pruning==1.6.1",)
BUDGETS, SEEDS = (0.3, 0.5, 0.7), (0, 1, 2)
QUICK: dict[str, Any] = {"budgets": [0.5], "seeds": [0], "criteria": ["l2", "bn_scale", "taylor"]}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(prog="accuracy.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, one budget, three criteria, unless given")
    parser.add_argument("--criteria", nargs="+", metavar="NAME", help="criteria of graphprune (default: all)")
    parser.add_argument("--budgets", nargs="+", type=float, metavar="FRACTION", help="of the MACs to remove (default: 0.3 0.5 0.7)")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="of networks, one each (default: 0 1 2)")
    parser.add_argument("--with", nargs="+", default=[], metavar="KEY=VALUE", dest="options", help="more rows, with options of gp.prune")
    parser.add_argument("--epochs", type=int, default=12, help="of training the networks (default: 12)")
    parser.add_argument("--lr", type=float, help="highest learning rate of fine-tuning (default: the demonstration's)")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("accuracy-out"), help="folder (default: accuracy-out)")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="skip cells that the results hold")
    options = parser.parse_args(arguments)
    for name, default in (("budgets", BUDGETS), ("seeds", SEEDS)):
        if getattr(options, name) is None:
            setattr(options, name, QUICK[name] if options.quick else list(default))
    if options.quick and options.criteria is None:
        options.criteria = QUICK["criteria"]
    if not all(0 < budget < 1 for budget in options.budgets):
        parser.error("--budgets takes fractions between 0 and 1")
    if options.jobs < 1 or options.epochs < 1 or not (options.lr is None or options.lr > 0):
        parser.error("--jobs and --epochs must be at least 1, and --lr above 0")
    if not all("=" in option for option in options.options):
        parser.error("--with takes options of gp.prune as KEY=VALUE, such as scope=group")
    return options


def start_worker() -> None:
    """Makes a process ready for cells."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")


def prepare(folder: Path, settings: Settings, seed: int) -> tuple[float, int, int]:
    """Trains the network of one seed unless it is there; returns its accuracy, its MACs and what its dearest channel costs."""
    import graphprune as gp
    from graphprune.cli.demo import accuracy, load_digits
    from tests.support.accuracy import one_channel, trained

    data = load_digits()
    model = trained(folder, settings, seed, data)
    image = data.test_images[:1]
    return accuracy(model, data), gp.count(model, image).macs, one_channel(model, image)


def work(folder: Path, settings: Settings, cell: Cell) -> Record:
    """Measures one cell."""
    from graphprune.cli.demo import load_digits
    from tests.support.accuracy import measure, trained

    data = load_digits()
    return measure(cell, trained(folder, settings, cell.seed, data), data, settings)


def run(options: argparse.Namespace) -> Table:
    """Measures what is missing and returns the table.

    Raises:
        ValueError: a criterion is unknown, or the folder holds something else.
        BrokenProcessPool: a process ended early.
    """
    from graphprune.criteria import CRITERIA
    from tests.support.accuracy import Cell, Settings, every_method
    from tests.support.accuracy_report import Results, Table

    unknown = set(options.criteria or ()) - set(CRITERIA)
    if unknown:
        message = f"no criterion is called {', '.join(sorted(unknown))}; there are {', '.join(CRITERIA)}"
        raise ValueError(message)
    settings = Settings(epochs=options.epochs, **({} if options.lr is None else {"finetune_lr": options.lr}))
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "results.jsonl", settings)
    extra = tuple(tuple(option.split("=", 1)) for option in options.options)
    methods = every_method(tuple(options.criteria or CRITERIA), extra)
    cells = [Cell(method, removed, seed) for seed in options.seeds for removed in options.budgets for method in methods]
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn"), start_worker) as pool:
        try:
            futures = [pool.submit(prepare, options.out, settings, seed) for seed in options.seeds]
            dense = {seed: future.result() for seed, future in zip(options.seeds, futures, strict=True)}
            missing = [cell for cell in cells if not (options.resume and results.is_done(cell))]
            pending: dict[Future[Record], Cell] = {pool.submit(work, options.out, settings, cell): cell for cell in missing}
            for number, future in enumerate(as_completed(pending), start=1):
                results.add(future.result())
                cell = pending[future]
                where = f"{cell.method.name}, {cell.method.order}, {cell.removed:.0%}, seed {cell.seed}"
                print(f"{number} of {len(missing)}: {where}", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    _, macs, one_channel = dense[options.seeds[0]]
    accuracies = {seed: accuracy for seed, (accuracy, _, _) in dense.items()}
    return Table(results, methods, options.budgets, options.seeds, accuracies, macs, one_channel)


def main() -> int:
    """Measures, prints and writes; returns 1 when a cell failed, else 0."""
    options = parse()
    enter("accuracy", extra="demo", also=PEERS)
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # for the processes that are started from here
    try:
        table = run(options)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on with what {options.out} holds", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, BrokenProcessPool) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from graphprune.runs.atomic import atomic

    text = table.to_markdown()
    print(text)
    with atomic(options.out / "accuracy.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    table.plot(options.out / "accuracy.png")
    return 1 if table.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
