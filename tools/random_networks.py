"""Draws random networks and checks on each all that must hold, with other networks on every run.

    python tools/random_networks.py                          # 2,000 draws
    python tools/random_networks.py --draws 10000 --jobs 4
    python tools/random_networks.py --seed 7 --draws 50      # the networks of one batch, as the report of a failure names it
    python tools/random_networks.py --draw "Drawn(Images(...), seed=3)"     # one network, as a failure shows it

The draws are made in batches, each with a seed of its own, which follows from --seed and is shown where the batch fails. In a batch that
fails, the network is made as small as it goes, and the rest of the batch is left out.

Exit code: 0; 1 where any draw failed or was refused; 2 where nothing could be run.
"""

# ruff: noqa: PLC0415 - before the environment is entered there is nothing but the standard library

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from _environment import INTERRUPTED, ROOT, enter

sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from tests.support.random_properties import Tally

BATCH = 50


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options; a seed is drawn where none is given."""
    parser = argparse.ArgumentParser(prog="random_networks.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--draws", type=int, default=2000, help="networks to draw (default 2000)")
    parser.add_argument("--seed", type=int, help="of the first batch (default: another one on every run)")
    parser.add_argument("--jobs", type=int, default=1, help="batches at a time (default 1)")
    parser.add_argument("--no-shrink", action="store_true", help="show failing networks as they were drawn")
    parser.add_argument("--draw", metavar="EXPRESSION", help="check this one network instead, and show how it fails")
    options = parser.parse_args(arguments)
    for option in ("draws", "jobs"):
        if getattr(options, option) < 1:
            parser.error(f"--{option} {getattr(options, option)} is out of range")
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(2**31)
    return options


def batch(seed: int, number: int, *, shrink: bool) -> tuple[Tally, str]:
    """Returns what came of one batch, and how it failed, if it did."""
    import torch

    from tests.support.random_properties import Tally, check_draw, run_draws

    torch.set_num_threads(1)
    tally = Tally()
    try:
        run_draws(seed, number, lambda drawn: check_draw(drawn, tally), shrink=shrink)
    except Exception as error:  # noqa: BLE001 (whatever a draw raises is what this tool is after)
        notes = "\n".join(getattr(error, "__notes__", []))
        return tally, f"{type(error).__name__}: {error}\n{notes}".strip()
    return tally, ""


def one(expression: str) -> int:
    """Checks one network and shows what it is; returns the exit code."""
    from tests.support.random_properties import Tally, again, check_draw

    try:
        drawn = again(expression)
    except Exception as error:  # noqa: BLE001 (the expression is the user's)
        print(f"error: this is no description of a network: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    tally = Tally()
    try:
        check_draw(drawn, tally)
    except Exception:  # noqa: BLE001 (shown as it is)
        traceback.print_exc()
        return 1
    print_tally(tally, {}, 0.0)
    return 0


def print_tally(tally: Tally, failures: dict[int, str], seconds: float) -> None:
    """Prints what the draws were and what came of them."""
    from statistics import median

    from rich.table import Table

    from tests.support.zoo_report import console

    screen = console()
    table = Table(title="Random networks", title_justify="left", show_header=False)
    effects = sorted(tally.effects)
    rows: list[tuple[str, Any]] = [
        ("draws that keep every invariant", tally.draws),
        ("batches that failed", len(failures)),
        ("refused by an error of graphprune", sum(tally.refusals.values())),
        ("draws with groups", tally.groups),
        ("removable channels", tally.channels),
        ("removals by kind of result", ", ".join(f"{kind} {count}" for kind, count in sorted(tally.shrunk.items()))),
        ("removals without a reference of their own", tally.unreferenced),
        ("ways to disk and back", tally.trips),
        ("too little effect to see: permutation control, removal", f"{tally.blind['control']}, {tally.blind['removal']}"),
        ("permutations that cannot judge", tally.crossed),
        (
            "effect of removals, smallest, median, largest",
            f"{effects[0]:.1e}, {median(effects):.1e}, {effects[-1]:.1e}" if effects else "-",
        ),
        ("largest relative error", f"{max(tally.worst.values(), default=0.0):.1e}"),
        ("operators without a rule", ", ".join(f"{name} {count}" for name, count in tally.unknown.most_common()) or "none"),
        ("seconds", f"{seconds:.0f}"),
    ]
    for name, value in rows:
        table.add_row(name, str(value))
    screen.print(table)
    screen.print("blocks: " + ", ".join(f"{name} {count}" for name, count in tally.blocks.most_common()), markup=False)
    for reason, count in tally.refusals.most_common():
        screen.print(f"refused {count} times: {reason}", markup=False)


def main(options: argparse.Namespace) -> int:
    """Runs the batches, prints failures as they come and the tally at the end, and returns the exit code."""
    from tests.support.random_properties import Tally

    sizes = [BATCH] * (options.draws // BATCH) + ([options.draws % BATCH] if options.draws % BATCH else [])
    print(f"{options.draws} draws in {len(sizes)} batches, seeds from {options.seed}", flush=True)
    tally, failures, start = Tally(), {}, time.monotonic()
    pool = ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"))
    try:
        jobs = {pool.submit(batch, options.seed + i, size, shrink=not options.no_shrink): options.seed + i for i, size in enumerate(sizes)}
        for number, job in enumerate(as_completed(jobs), 1):
            found, failure = job.result()
            tally.add(found)
            if failure:
                failures[jobs[job]] = failure
                print(f"seed {jobs[job]} fails:\n{failure}\n", flush=True)
            print(f"[{number}/{len(jobs)}] {tally.draws} draws, {len(failures)} batches failed", flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    print_tally(tally, failures, time.monotonic() - start)
    return 1 if failures or tally.refusals else 0


if __name__ == "__main__":
    if not all(importlib.util.find_spec(name) for name in ("torch", "hypothesis", "rich")):
        enter("dev")
    parsed = parse()
    sys.exit(one(parsed.draw) if parsed.draw else main(parsed))
