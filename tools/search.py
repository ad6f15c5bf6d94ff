"""Measures the searches against trying everything, on networks that have learned digits, one for each seed.

    python tools/search.py                          # three seeds; a few minutes on one processor core
    python tools/search.py --seeds 0 --trials 60    # a look

Half of the MACs go. Two comparisons, each at the same budget and with the same way of scoring on both sides:

    without training: annealing, AMC, TPE and random search against every point that is on the budget; a shrunk model is scored with
                      BatchNorm statistics estimated again
    with training:    NetAdapt, which trains for one epoch in every step and for some more in the end, against a grid whose points are each
                      pruned at once and trained for as many epochs in all. Besides: NetAdapt's model before the last epochs, which has had
                      fewer than the grid's points; its widths pruned at once and trained like a grid's point; and its widths among every
                      point, not trained at all, which is not what it looks for

"behind" is the oracle's best minus the search's, "above" the search's minus that of uniform sparsity, both in points of accuracy on 597
images. "models" counts the different models that were evaluated, "after" those until one was within a point of the best. "accepted" is the
share of candidates that annealing accepted in its first and last fifth: of all (those that score the same are accepted always), and of the
worse ones.

The folder `--out` holds `searches.json`, `searches.csv` and, while the rest is measured, what is there so far.

Exit code: 0; 1 where annealing, AMC or NetAdapt is over a point behind or not above uniform sparsity; 2 where it could not be measured.
"""

# ruff: noqa: PLC0415 - before the environment is entered there is nothing but the standard library

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from _environment import INTERRUPTED, ROOT, UNUSABLE, enter

sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from rich.table import Table

    from tests.support.searches import Found, Settings


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(prog="search.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="of networks, one each (default: 0 1 2)")
    parser.add_argument("--trials", type=int, default=150, help="trials of a search and episodes of AMC (default: 150)")
    parser.add_argument("--out", type=Path, default=Path("search-out"), help="folder (default: search-out)")
    options = parser.parse_args(arguments)
    if options.trials < 10:
        parser.error("--trials must be at least 10")
    return options


def table(results: list[Found]) -> Table:
    """Returns the results as a table for the terminal."""
    from rich.table import Table

    made = Table(title="Searches against trying everything")
    for name in (
        "seed",
        "search",
        "against",
        "best %",
        "uniform %",
        "found %",
        "behind",
        "above",
        "models",
        "after",
        "s",
        "accepted",
        "holds",
    ):
        made.add_column(name, justify="left" if name in ("search", "against") else "right")
    for found in results:
        oracle = found.oracle
        scores = [f"{100 * score:.2f}" for score in (oracle.best, oracle.uniform, found.score, found.behind, found.above)]
        moves = (found.first, found.last, found.first_worse, found.last_worse)
        first, last, first_worse, last_worse = (f"{share:.2f}" if share is not None else "" for share in moves)
        shares = f"{first} to {last}, worse {first_worse} to {last_worse}" if first else ""
        counts = [str(found.models), str(found.needed or ""), f"{found.seconds:.1f}", shares, "yes" if found.holds else "no"]
        made.add_row(str(found.seed), found.search, f"{oracle.name} ({oracle.points})", *scores, *counts)
    return made


def write(folder: Path, settings: Settings, results: list[Found]) -> None:
    """Writes what there is, each file as a whole or not at all."""
    from graphprune.runs.atomic import atomic

    record = {"settings": asdict(settings), "results": [found.to_dict() for found in results]}
    with atomic(folder / "searches.json") as path:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    rows = [{**found.to_dict(), **{f"oracle_{k}": v for k, v in asdict(found.oracle).items()}} for found in results]
    with atomic(folder / "searches.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "oracle"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints and writes; returns the exit code."""
    import torch
    from rich.console import Console

    from tests.support.searches import REQUIRED, Settings, measured

    options = parse(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    settings = Settings(trials=options.trials)
    results: list[Found] = []
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for seed in options.seeds:
            results += measured(seed, settings)
            write(options.out, settings, results)
            print(f"seed {seed} is measured", file=sys.stderr, flush=True)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        return INTERRUPTED
    Console(width=None if sys.stdout.isatty() else 180).print(table(results))
    return 0 if all(found.holds for found in results if found.search in REQUIRED) else 1


if __name__ == "__main__":
    enter("dev")
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    sys.exit(main())
