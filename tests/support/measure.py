"""Everything that is measured on one network of the zoo, each measurement on its own: one that fails leaves the others standing."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

import graphprune as gp
from tests.support.invariants import (
    coverage_faults,
    evaluate,
    masked_outputs,
    permutation_error,
    removed_positions,
    train_step,
)
from tests.support.networks import build_randomised
from tests.support.outputs import relative_error, shapes

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import nn

    from tests.support.protocols import GraphLike, Keep

try:
    import resource
except ImportError:  # Windows: no peak memory there
    resource = None  # type: ignore[assignment]

Record = dict[str, Any]


class NotReachedError(Exception):
    """A measurement cannot run because an earlier one, which is on record, failed."""


@dataclass(frozen=True)
class Settings:
    """What to measure, and how.

    Attributes:
        name: as `networks.build` takes it.
        dtype: name of a torch type, "float64" or "float32".
        sparsity: share of every group's channels to remove.
        size: height and width of the images in pixels; None for the network's own.
        batch: number of images.
        threads: torch threads.
        seed: of weights, statistics and permutations.
    """

    name: str
    dtype: str = "float64"
    sparsity: float = 0.5
    size: int | None = None
    batch: int = 2
    threads: int = 1
    seed: int = 0


@dataclass
class Bench:
    """What the measurements hand on to each other; a missing piece raises `NotReachedError` when asked for."""

    settings: Settings
    pieces: dict[str, Any] = field(default_factory=dict)

    def get(self, piece: str) -> Any:
        """Returns a piece that an earlier measurement left."""
        if piece not in self.pieces:
            message = f"no {piece}: an earlier measurement failed"
            raise NotReachedError(message)
        return self.pieces[piece]


def build_network(bench: Bench) -> Record:
    """Builds and randomises the network."""
    settings = bench.settings
    model, make_inputs = build_randomised(settings.name, settings.seed, size=settings.size, dtype=getattr(torch, settings.dtype))
    inputs = make_inputs(settings.batch)
    output = evaluate(model, inputs)
    bench.pieces.update(model=model, inputs=inputs, output=output)
    return {"input_shape": list(inputs.shape), "output_std": float(output[0].std())}


def trace_network(bench: Bench) -> Record:
    """Finds the groups, and counts what they cover."""
    graph = bench.pieces["graph"] = gp.trace(bench.get("model"), bench.get("inputs"))
    return {
        "groups": len(graph.groups),
        "channels": sum(group.channels for group in graph.groups),
        "verdicts": dict(Counter(group.verdict for group in graph.groups)),
        "reach": reachable_share(bench.get("model"), graph),
        "unknown": sorted({item.operator for item in graph.unknown}),
    }


def reachable_share(model: nn.Module, graph: GraphLike) -> float:
    """Returns the share of the parameter elements that lie in a slice of some group, tied parameters counted once."""
    free: dict[int, list[NDArray[np.bool_]]] = {}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for tensor in tensors.values():
        free[id(tensor)] = [np.ones(size, dtype=bool) for size in tensor.shape]
    for group in graph.groups:
        for piece in group.slices:
            if piece.parameter in tensors:
                free[id(tensors[piece.parameter])][piece.dim][piece.index.ravel()] = False
    total = sum(tensor.numel() for tensor in model.parameters())
    stays = sum(math.prod(int(flags.sum()) for flags in free[id(tensor)]) for tensor in model.parameters())
    return 1.0 - stays / total if total else 0.0


def check_coverage(bench: Bench) -> Record:
    """Counts the parameter dimensions with positions that are neither grouped nor frozen, or both."""
    return {"coverage_faults": len(coverage_faults(bench.get("model"), bench.get("graph")))}


def check_permutation(bench: Bench) -> Record:
    """Permutes the channels of every group."""
    error, control = permutation_error(bench.get("model"), bench.get("graph"), bench.get("inputs"), bench.settings.seed)
    return {"permutation_error": error, "control": control}


def prune_network(bench: Bench) -> Record:
    """Prunes, verified; where verification fails, the error is raised after pruning again without it for the measurements to come."""
    model, inputs, sparsity = bench.get("model"), bench.get("inputs"), bench.settings.sparsity
    try:
        small, report = gp.prune(model, inputs, sparsity=sparsity)
    except Exception:
        bench.pieces["small"], bench.pieces["report"] = gp.prune(model, inputs, sparsity=sparsity, verify=False)
        raise
    bench.pieces.update(small=small, report=report)
    return {"error": report.error, "effect": report.effect}


def read_report(bench: Bench) -> Record:
    """Reads kind, cost and times from the report."""
    report = bench.get("report")
    return {
        "kind": report.kind,
        "reason": report.reason,
        "params_before": report.before.params,
        "params_after": report.after.params,
        "macs_before": report.before.macs,
        "macs_after": report.after.macs,
        "seconds": dict(report.seconds),
    }


def check_shape(bench: Bench) -> Record:
    """Compares the output shapes before and after."""
    return {"shape_kept": shapes(evaluate(bench.get("small"), bench.get("inputs"))) == shapes(bench.get("output"))}


def check_reference(bench: Bench) -> Record:
    """Compares the shrunk network with the masked one, by an oracle that is independent of the engine's own verification."""
    model, inputs = bench.get("model"), bench.get("inputs")
    config = [{"sparsity": bench.settings.sparsity, "op_types": ["default"]}]
    _, masks = gp.L1NormPruner(model, config, example_inputs=inputs).compress()
    expected = masked_outputs(model, bench.get("graph"), masks, inputs)
    return {
        "off_target": off_target(bench.get("graph"), masks, bench.settings.sparsity),
        "reference_error": relative_error(expected, evaluate(bench.get("small"), inputs)),
    }


def off_target(graph: GraphLike, masks: Keep, sparsity: float) -> list[str]:
    """Returns the names of the groups that keep other than (1 - sparsity) of their channels, rounded down, and at least 1.

    Where two groups own positions jointly (heads, and widths within a head), removing along one of them is enough: such a group is off
    target when more than (1 - sparsity) of its positions in its first slice stay.
    """
    removed = removed_positions(graph, masks)
    owners = Counter((piece.parameter, piece.dim, int(at)) for g in graph.groups for piece in g.slices for at in np.unique(piece.index))
    off = []
    for group in graph.groups:
        first = group.slices[0]
        owned = np.unique(first.index)
        if any(owners[first.parameter, first.dim, int(at)] > 1 for at in owned):
            stays = 1.0 - np.isin(owned, removed[first.parameter, first.dim]).mean()
            hit = stays <= 1.0 - sparsity + 1e-9
        else:
            kept = int(np.asarray(masks[group.name]).sum())
            hit = kept == max(1, math.floor((1.0 - sparsity) * group.channels + 1e-9))
        off += [] if hit else [group.name]
    return off


def check_training(bench: Bench) -> Record:
    """Runs forward and backward of the shrunk network in train mode."""
    missing = train_step(bench.get("small"), bench.get("inputs"))
    return {"train_ok": True, "without_gradient": len(missing)}


def check_onnx(bench: Bench) -> Record:
    """Writes the shrunk network as float32 ONNX, and compares ONNX Runtime with it."""
    small = copy.deepcopy(bench.get("small")).float()
    with tempfile.TemporaryDirectory() as folder:
        report = gp.export_onnx(small, bench.get("inputs").float(), Path(folder) / "small.onnx")
    return {"onnx_error": report.error}


MEASUREMENTS: Final[dict[str, Callable[[Bench], Record]]] = {
    "build": build_network,
    "trace": trace_network,
    "coverage": check_coverage,
    "permutation": check_permutation,
    "prune": prune_network,
    "report": read_report,
    "shape": check_shape,
    "reference": check_reference,
    "train": check_training,
    "onnx": check_onnx,
}


def measure(settings: Settings, on_progress: Callable[[Record], None] = lambda _: None) -> Record:
    """Runs every measurement on one network.

    Args:
        settings: the network, and how to measure it.
        on_progress: called with the record so far, before each measurement; "stage" then names the one that begins.

    Returns:
        JSON-ready: the settings, what was measured, "failures" (measurement -> last line of its exception), "stage_seconds", peak
        resident memory in MiB, and "finished".
    """
    torch.set_num_threads(settings.threads)
    record: Record = {**dataclasses.asdict(settings), "failures": {}, "stage_seconds": {}, "finished": False}
    bench = Bench(settings)
    for stage, measurement in MEASUREMENTS.items():
        record["stage"] = stage
        on_progress(record)
        start = time.perf_counter()
        try:
            record.update(_finite(measurement(bench), stage, record["failures"]))
        except NotReachedError:
            pass  # the failure behind it is on record
        except Exception as error:  # noqa: BLE001 (whatever one measurement raises, the others still run)
            record["failures"][stage] = last_line(error)
            traceback.print_exc(file=sys.stderr)
        record["stage_seconds"][stage] = time.perf_counter() - start
        record["peak_rss_mib"] = peak_rss_mib()
    record.update(stage="", finished=True)
    return record


def _finite(result: Record, stage: str, failures: dict[str, str]) -> Record:
    """Returns the result without numbers that JSON cannot hold; those become failures."""
    bad = {key: value for key, value in result.items() if isinstance(value, float) and not math.isfinite(value)}
    if bad:
        failures[stage] = ", ".join(f"{key} is {value}" for key, value in bad.items())
    return {key: value for key, value in result.items() if key not in bad}


def last_line(error: BaseException) -> str:
    """Returns the type of an exception and the last line of its message, which says most in chained tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__


def peak_rss_mib() -> float | None:
    """Returns the largest resident memory of this process so far in MiB, None where the system does not say."""
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
