"""Times graphprune against Torch-Pruning 1.6.1 on the same networks, in one run on one machine.

    python tools/compare_peers.py                                                     # every network; five to ten minutes
    python tools/compare_peers.py --only resnet50 --repeats 9 --out comparison.json   # every single run, as JSON

Both remove half of the channels of every layer by L1 magnitude, for one 224 x 224 float32 image, on one torch thread. Timed are
    graphprune: `gp.prune(..., verify=False)`: trace + groups + score + shrink; once more with `inplace=True`, once more verified;
    Torch-Pruning: construction of `MagnitudePruner` + `step()`.
Every timed run works on a fresh deep copy of the network, made outside the timer. One process per network runs the sides in turn,
after a warm-up of each, so that whatever slows the machine slows both. A ratio is graphprune's CPU seconds over Torch-Pruning's of the
same round; printed are the median and the range of the rounds.

Exit code: 0; 1 where one of `BOUNDS` does not hold or could not be measured; 2 where the comparison could not be run.
"""

# ruff: noqa: PLC0415 - before the environment is entered there is nothing but the standard library

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _environment import ROOT, enter

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import torch

    Pruned = tuple[torch.nn.Module, dict[str, Any]]  # the pruned network and what its record holds besides

NETWORKS = (
    *("resnet50", "convnext_tiny", "resnet18", "mobilenet_v2", "efficientnet_b0", "vit_b_16"),
    *("densenet201", "mobilenet_v3_large", "swin_t"),
)
# Largest allowed ratios graphprune / Torch-Pruning of CPU seconds, without and with verification; the others are only reported.
_LARGE, _SMALL = (0.7, 2.0), (1.0, 2.0)
BOUNDS = {
    "resnet50": _LARGE,
    "convnext_tiny": _LARGE,
    "resnet18": _SMALL,
    "mobilenet_v2": _SMALL,
    "efficientnet_b0": _SMALL,
    "vit_b_16": _SMALL,
    "densenet201": (0.1, 0.2),
}
PEERS = ("torchvision==0.28.0", "torch-pruning==1.6.1")
SIDES = PEER, OURS, IN_PLACE, VERIFIED = "torch-pruning", "graphprune", "graphprune in place", "graphprune verified"
CLASSES = 1000  # outputs of the last layer of every network
SLOW_SECONDS, SLOW_REPEATS = 10.0, 3  # a network with a side this slow gets no more rounds than this
SETUP_SECONDS = 180.0  # for imports, and between two runs for copies and checks
MEMORY_SHARE = 0.8  # of the machine's memory; a side that wants more fails
SAME_WORK = 0.01  # largest difference of the shares of parameters kept

Record = dict[str, Any]  # one run: seconds, cpu_seconds, warm_up, parameters_kept, stages; after verification also error and effect


@dataclass
class Outcome:
    """What one network gave."""

    runs: dict[str, list[Record]] = field(default_factory=dict)  # side -> one record per timed round, in order
    failures: dict[str, str] = field(default_factory=dict)  # side -> why it has no runs
    unfinished: list[str] = field(default_factory=list)  # the failures that reached the time limit

    def medians(self, side: str) -> dict[str, float]:
        """Returns the medians over a side's rounds of CPU seconds, parameters kept and every stage; empty without rounds."""
        rows = [{"seconds": run["cpu_seconds"], "kept": run["parameters_kept"], **run["stages"]} for run in self.runs.get(side, [])]
        return {key: statistics.median(row[key] for row in rows) for key in (rows[0] if rows else ())}

    def ratio(self, side: str, limit: float) -> tuple[float | None, str]:
        """Returns a side's CPU seconds over the peer's, median and text; an upper limit where the peer did not finish."""
        ours, theirs = ([run["cpu_seconds"] for run in self.runs.get(one, [])] for one in (side, PEER))
        pairs = zip(ours, [limit] * len(ours) if PEER in self.unfinished else theirs, strict=False)
        ratios = [mine / peer for mine, peer in pairs]
        if not ratios:
            return None, "-"
        middle = statistics.median(ratios)
        return middle, f"< {middle:.3f}" if PEER in self.unfinished else f"{middle:.3f} ({min(ratios):.3f}-{max(ratios):.3f})"


def measure(name: str, sides: tuple[str, ...], repeats: int, pipe: Connection) -> None:
    """Runs the sides in turn; sends ("start", side, None), ("done", side, record), ("failed", side, why) and last ("end", "", None)."""
    sys.path.insert(0, str(ROOT))
    warnings.simplefilter("ignore")
    if sys.platform != "win32":  # there only the time limit ends a side
        import resource

        share = int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * MEMORY_SHARE)
        resource.setrlimit(resource.RLIMIT_DATA, (share, share))
    import torch

    from tests.support.torchvision_shim import import_torchvision

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: torch.nn.Module = import_torchvision().models.get_model(name, weights=None).eval()
    for parameter in model.parameters():
        if not parameter.any():  # an output layer of zeros would hide every error from verification
            torch.nn.init.normal_(parameter, std=0.02)
    image = torch.randn(1, 3, 224, 224)
    # The peer warms up first: a process that has to be ended there has lost nothing yet. Then the order turns round in every round.
    order = [side for side in SIDES if side in sides]
    done = 0
    while done <= repeats:
        for side in tuple(order):
            record = _attempt(side, model, image, pipe, warm_up=done == 0)
            if record is None:
                order.remove(side)
            elif record["seconds"] > SLOW_SECONDS:
                repeats = min(repeats, SLOW_REPEATS)
        order.reverse()
        done += 1
    pipe.send(("end", "", None))


def _attempt(side: str, model: torch.nn.Module, image: torch.Tensor, pipe: Connection, *, warm_up: bool) -> Record | None:
    """Runs one side once on a fresh copy and sends what came of it; returns the record, or None when the side failed."""
    fresh = copy.deepcopy(model)
    gc.collect()
    pipe.send(("start", side, None))
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        flags = {"verify": side == VERIFIED, "inplace": side == IN_PLACE}
        small, details = _prune_peer(fresh, image) if side == PEER else _prune_ours(fresh, image, **flags)
        spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        if warm_up:
            small(image)  # a network that no longer runs is a failure
    except Exception as error:  # noqa: BLE001 - whatever stops a side is what there is to report of it
        pipe.send(("failed", side, f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]))
        return None
    kept, dense = (sum(parameter.numel() for parameter in network.parameters()) for network in (small, model))
    record: Record = {**spent, "warm_up": warm_up, "parameters_kept": kept / dense, **details}
    pipe.send(("done", side, record))
    return record


def _prune_peer(model: torch.nn.Module, image: torch.Tensor) -> Pruned:
    """Prunes with Torch-Pruning, set up as its own examples for torchvision are.

    The output layer is ignored; a VisionTransformer's widths stay multiples of its heads, and its `hidden_dim` is set afterwards.
    (Its option `num_heads` is for attention made of Linear layers: given for nn.MultiheadAttention, the embedding stays unpruned.)
    The dictionaries are given because the pruner writes into its own defaults, which would carry one run's layers into the next.
    """
    from torch.nn import Linear, MultiheadAttention

    peer = importlib.import_module("torch_pruning")
    start = time.perf_counter()
    importance = peer.importance.GroupMagnitudeImportance(p=1)
    ignored = [layer for layer in model.modules() if isinstance(layer, Linear) and layer.out_features == CLASSES]
    heads = next((layer.num_heads for layer in model.modules() if isinstance(layer, MultiheadAttention)), None)
    options = {"pruning_ratio": 0.5, "global_pruning": False, "iterative_steps": 1, "in_channel_groups": {}, "out_channel_groups": {}}
    pruner = peer.pruner.MagnitudePruner(model, image, importance, ignored_layers=ignored, round_to=heads, **options)
    middle = time.perf_counter()
    pruner.step()
    if hasattr(model, "hidden_dim"):
        model.hidden_dim = model.get_submodule("conv_proj").out_channels
    return model, {"stages": {"construction": middle - start, "step": time.perf_counter() - middle}}


def _prune_ours(model: torch.nn.Module, image: torch.Tensor, *, verify: bool, inplace: bool) -> Pruned:
    """Prunes with graphprune; the stages are those of its report."""
    import graphprune as gp

    small, report = gp.prune(model, image, sparsity=0.5, criterion="l1", verify=verify, inplace=inplace)
    return small, {"stages": dict(report.seconds), **({"error": report.error, "effect": report.effect} if verify else {})}


def compare(name: str, repeats: int, limit: float) -> Outcome:
    """Measures one network in a process of its own; from the start again without a side during which the process had to be ended."""
    context = multiprocessing.get_context("spawn")
    ended = Outcome()
    while True:
        outcome = copy.deepcopy(ended)
        receiver, sender = context.Pipe(duplex=False)
        sides = tuple(side for side in SIDES if side not in ended.failures)
        process = context.Process(target=measure, args=(name, sides, repeats, sender), daemon=True)
        process.start()
        sender.close()  # the child's copy is then the last one, and its end ends the pipe
        running, late = _listen(receiver, outcome, limit)
        if late:
            process.kill()
        process.join()
        if running is None:
            return outcome
        why = f"did not finish in {limit:g} s" if late and running else f"its process ended, exit code {process.exitcode}"
        ended.failures |= dict.fromkeys([running] if running else sides, why)
        ended.unfinished += [running] if late and running else []
        if not running:
            return ended


def _listen(pipe: Connection, outcome: Outcome, limit: float) -> tuple[str | None, bool]:
    """Collects messages; returns what was running at the end ("": no side; None: everything is done), and whether time ran out."""
    running = ""
    while pipe.poll(limit if running else SETUP_SECONDS):
        try:
            kind, side, what = pipe.recv()
        except EOFError:
            return running, False
        running = side if kind == "start" else ""
        if kind == "end":
            return None, False
        if kind == "failed":
            outcome.failures[side] = what
            outcome.runs.pop(side, None)
        elif kind == "done" and not what["warm_up"]:
            outcome.runs.setdefault(side, []).append(what)
    return running, True


def holds(name: str, outcome: Outcome, limit: float) -> bool:
    """Returns whether a network's bounds hold; one that could not be measured, or failed verification, does not."""
    if name not in BOUNDS:
        return True
    ratios = [outcome.ratio(side, limit)[0] for side in (OURS, VERIFIED)]
    return all(ratio is not None and ratio <= bound for ratio, bound in zip(ratios, BOUNDS[name], strict=True))


def show(outcomes: dict[str, Outcome], limit: float) -> None:
    """Prints the table, and below it why a side has no runs and where the others' time went."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="CPU seconds, median of the rounds (parameters kept); ratios to Torch-Pruning with their range")
    for heading in ("network", "Torch-Pruning", "graphprune", "ratio", "ratio in place", "ratio verified", "bounds"):
        table.add_column(heading)
    notes: list[str] = []
    for name, outcome in outcomes.items():
        middle = {side: outcome.medians(side) for side in SIDES}
        cells = [name]
        for side in (PEER, OURS):
            failure = "did not finish" if side in outcome.unfinished else "failed"
            cells.append(f"{middle[side]['seconds']:.3f} ({middle[side]['kept']:.1%})" if middle[side] else failure)
        cells += [outcome.ratio(side, limit)[1] for side in (OURS, IN_PLACE, VERIFIED)]
        verdict = "hold" if holds(name, outcome, limit) else "DO NOT HOLD"
        cells.append(f"<= {BOUNDS[name][0]:g}, {BOUNDS[name][1]:g} {verdict}" if name in BOUNDS else "-")
        table.add_row(*cells)
        notes += [f"{name}, {side}: {why}" for side, why in outcome.failures.items()]
        for side in (PEER, OURS, VERIFIED):
            stages = ", ".join(f"{stage} {spent:.3f}" for stage, spent in list(middle[side].items())[2:] if spent)
            notes += [f"{name}, {side}: {stages}"] if stages else []
        kept = [middle[side]["kept"] for side in (PEER, OURS) if middle[side]]
        if max(kept, default=0.0) - min(kept, default=0.0) > SAME_WORK:
            notes.append(f"{name}: the two keep different shares of the parameters, so the ratio is not one of the same work")
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print("\n".join(notes), markup=False, highlight=False, soft_wrap=True)


def save(outcomes: dict[str, Outcome], limit: float, versions: dict[str, str], path: Path) -> None:
    """Writes every run, what it was measured with, and the verdicts as JSON."""
    from graphprune.runs.atomic import atomic

    machine = {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count(), "torch_threads": 1}
    networks = {}
    for name, outcome in outcomes.items():
        ratios = {side: outcome.ratio(side, limit)[0] for side in (OURS, IN_PLACE, VERIFIED)}
        networks[name] = {**asdict(outcome), "ratios": ratios, "bounds": BOUNDS.get(name), "holds": holds(name, outcome, limit)}
    document = {"versions": versions, "machine": machine, "limit_seconds": limit, "networks": networks}
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=NETWORKS, metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--repeats", type=int, default=5, help=f"rounds per network (5; at most {SLOW_REPEATS} for slow ones)")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds that one run of one side may take (90)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if options.repeats < 1 or options.limit <= 0:
        parser.error("--repeats must be at least 1 and --limit above 0")
    if options.out and not os.access(options.out.parent, os.W_OK):
        parser.error(f"--out: cannot write into {options.out.parent}; name an existing folder that can be written to")
    return options


def main() -> int:
    """Measures, prints and writes; returns 1 when a bound does not hold, else 0."""
    options = _options()
    enter("peers", extra="", also=PEERS)
    try:
        versions = {name: importlib.metadata.version(name) for name in ("graphprune", "torch-pruning", "torch", "torchvision")}
    except importlib.metadata.PackageNotFoundError as error:
        print(f"error: {sys.prefix} lacks {error.name}; install it there, or unset GRAPHPRUNE_PYTHON_ENV.", file=sys.stderr)
        return 2
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    outcomes = {}
    for name in options.only:
        print(f"{name} ...", file=sys.stderr, flush=True)
        outcomes[name] = compare(name, options.repeats, options.limit)
    show(outcomes, options.limit)
    if options.out is not None:
        save(outcomes, options.limit, versions, options.out)
    return 0 if all(holds(name, outcome, options.limit) for name, outcome in outcomes.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
