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
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch.utils import _pytree as pytree

import graphprune as gp
from tests.support.invariants import (
    coverage_faults,
    evaluate,
    masked_outputs,
    permutation_error,
    train_step,
)
from tests.support.memory import peak_bytes
from tests.support.networks import Network, cast, load_randomised
from tests.support.outputs import relative_error, shapes
from tests.support.zoo_arithmetic import DoublePrecision, in_double
from tests.support.zoo_findings import beyond_reference, held_by, off_target, reachable_share

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from torch import nn

Record = dict[str, Any]
_Result = TypeVar("_Result")
_MOST: Final = 1e6  # stands for an infinite relative difference


class NotReachedError(Exception):
    """A measurement cannot run because an earlier one, which is on record, failed."""


@dataclass(frozen=True)
class Settings:
    """What to measure, and how.

    Attributes:
        name: as `networks.load` takes it.
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
    throughout: bool = False

    def arithmetic(self) -> AbstractContextManager[object]:
        """Returns the context to measure in: double precision throughout for a network that does not run in float64 otherwise."""
        return DoublePrecision() if self.throughout else nullcontext()

    def get(self, piece: str) -> Any:
        """Returns a piece that an earlier measurement left."""
        if piece not in self.pieces:
            message = f"no {piece}: an earlier measurement failed"
            raise NotReachedError(message)
        return self.pieces[piece]

    def precisely(self, function: Callable[[], _Result]) -> _Result:
        """Returns what the function gives, in double precision throughout where the network runs in float64."""
        return in_double(function) if self.get("exact") else function()


def build_network(bench: Bench) -> Record:
    """Builds and randomises the network, in the type that was asked for, or in float32 where it does not run in that."""
    settings = bench.settings
    network, output, refused = _built(bench)
    inputs = network.make_inputs(settings.batch)
    bench.pieces.update(model=network.model, inputs=inputs, training_inputs=network.make_training_inputs(settings.batch))
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    spreads = [float(tensor.std(correction=0)) for tensor in output if tensor.is_floating_point() and tensor.numel()]
    bench.pieces["exact"] = not refused and settings.dtype == "float64"
    return {
        "input_shape": list(tensors[0].shape),
        "inputs": len(tensors),
        "outputs": len(output),
        "lifeless_outputs": sum(map(lifeless, output)),
        "output_std": max(spreads, default=0.0),
        "ran_in": "float32" if refused else settings.dtype,
        "throughout": bench.throughout,
        "refused": refused,
    }


def _built(bench: Bench) -> tuple[Network, list[torch.Tensor], str]:
    """Returns the network, its outputs, and what it complained of in float64 if it runs in float32 only."""
    settings = bench.settings

    def attempt(dtype: torch.dtype) -> tuple[Network, list[torch.Tensor]]:
        network = load_randomised(settings.name, settings.seed, size=settings.size, dtype=dtype, context=bench.arithmetic())
        with bench.arithmetic():
            return network, evaluate(network.model, network.make_inputs(settings.batch))

    dtype = getattr(torch, settings.dtype)
    try:
        return *attempt(dtype), ""
    except RuntimeError as error:
        refused = error
    if dtype == torch.float64:
        bench.throughout = True  # where it mixes types, its own casts are at fault
        with suppress(RuntimeError):
            return *attempt(dtype), ""
        bench.throughout = False
    with suppress(Exception):
        return *attempt(torch.float32), last_line(refused)
    raise refused  # it is not the type, then


def lifeless(output: torch.Tensor) -> bool:
    """Returns whether an output says nothing when it is compared: empty, not finite, or the same everywhere."""
    if not output.numel():
        return True
    if not output.is_floating_point():
        return False
    return not bool(output.isfinite().all()) or (output.numel() > 1 and float(output.std()) == 0.0)


def trace_network(bench: Bench) -> Record:
    """Finds the groups, and counts what they cover."""
    model = bench.get("model")
    graph = bench.pieces["graph"] = gp.trace(model, bench.get("inputs"))
    return {
        "groups": len(graph.groups),
        "channels": sum(group.channels for group in graph.groups),
        "verdicts": dict(Counter(group.verdict for group in graph.groups)),
        "reach": reachable_share(model, graph),
        "held_by": held_by(model, graph),
        "unknown": sorted({item.operator for item in graph.unknown}),
    }


def check_coverage(bench: Bench) -> Record:
    """Counts the parameter dimensions with positions that are neither grouped nor frozen, or both."""
    return {"coverage_faults": len(coverage_faults(bench.get("model"), bench.get("graph")))}


def check_permutation(bench: Bench) -> Record:
    """Permutes the channels of every group."""
    model, graph, inputs, seed = bench.get("model"), bench.get("graph"), bench.get("inputs"), bench.settings.seed
    error, control = bench.precisely(lambda: permutation_error(model, graph, inputs, seed))
    return {"permutation_error": error, "control": _capped(control), "rounding": bench.precisely(lambda: rounding(model, inputs))}


def rounding(model: nn.Module, inputs: object) -> float:
    """Returns how much the outputs change, relative, when each input is rounded otherwise: what no comparison can fall below.

    Deep networks with random weights may be chaotic: they amplify one unit in the last place a million times.
    """

    def shaken(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        signs = torch.randint(-1, 2, tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor.dtype)
        return tensor * (1 + signs * torch.finfo(tensor.dtype).eps)

    before = evaluate(model, inputs)
    after = evaluate(model, pytree.tree_map_only(torch.Tensor, shaken, inputs))
    return relative_error(before, after) if shapes(before) == shapes(after) else 0.0


def _capped(difference: float) -> float:
    """Returns a difference that JSON can hold: another number of boxes is as different as outputs can be."""
    return min(difference, _MOST)


def prune_network(bench: Bench) -> Record:
    """Prunes, verified; where verification fails, the error is raised after pruning again without it for the measurements to come."""
    model, graph = bench.get("model"), bench.get("graph")
    config = [{"sparsity": bench.settings.sparsity, "op_types": ["default"]}]
    pruner = gp.L1NormPruner(model, config, graph=graph)
    masks = bench.pieces["masks"] = pruner.masks()
    off = {"off_target": off_target(graph, masks, bench.settings.sparsity)}
    try:
        small, report = gp.speedup(model, masks, plan=pruner.plan)
    except Exception:
        bench.pieces["small"], bench.pieces["report"] = gp.speedup(model, masks, verify=False)
        raise
    bench.pieces.update(small=small, report=report)
    return {**off, "error": report.error, "tolerance": report.tolerance, "effect": _capped(report.effect)}


def read_report(bench: Bench) -> Record:
    """Reads kind, cost and times from the report."""
    report = bench.get("report")
    return {
        "kind": report.kind,
        "reason": report.reason,
        "params_before": report.before.params if report.before else None,
        "params_after": report.after.params if report.after else None,
        "macs_before": report.before.macs if report.before else None,
        "macs_after": report.after.macs if report.after else None,
        "seconds": {**bench.get("graph").seconds, **report.seconds},
    }


def check_reference(bench: Bench) -> Record:
    """Compares the shrunk network with the masked one, by an oracle that is independent of the engine's own verification.

    Groups that the oracle knows nothing of (see `beyond_reference`) stay whole in both.
    """
    model, graph, inputs, masks, small = (bench.get(piece) for piece in ("model", "graph", "inputs", "masks", "small"))
    beyond = beyond_reference(graph)
    if beyond:
        masks = gp.Masks(graph, {name: masks[name] for name in masks if name not in beyond})
        small, _ = gp.speedup(model, masks, verify=False)
    expected, actual = bench.precisely(lambda: (masked_outputs(model, graph, masks, inputs), evaluate(small, inputs)))
    return {
        "reference_groups": len(graph.groups) - len(beyond),
        "shape_kept": shapes(expected) == shapes(actual),
        "reference_error": relative_error(expected, actual),
    }


def check_training(bench: Bench) -> Record:
    """Runs forward and backward of the shrunk network in train mode; a GraphModule takes what it was recorded with."""
    small = bench.get("small")
    inputs = bench.get("inputs" if bench.get("report").kind == "graph" else "training_inputs")
    return {"train_ok": True, "without_gradient": len(train_step(small, inputs))}


def check_own_class(bench: Bench) -> Record:
    """Where the result is a GraphModule, asks for one of the network's own class, at the price of other counts (`keep_class`)."""
    if bench.get("report").kind == "module":
        return {}
    try:
        _, report = gp.prune(bench.get("model"), bench.get("inputs"), sparsity=bench.settings.sparsity, keep_class=True)
    except gp.GraphPruneError as error:
        return {"own_class_refused": last_line(error)}
    kept = report.after.params / report.before.params if report.after and report.before else None
    return {"own_class_error": report.error, "own_class_effect": _capped(report.effect), "own_class_params": kept}


def check_onnx(bench: Bench) -> Record:
    """Writes the shrunk network as float32 ONNX, and compares ONNX Runtime with it."""
    try:
        return {"onnx_error": _onnx_error(copy.deepcopy(bench.get("small")), bench.get("inputs"))}
    except NotReachedError:
        raise
    except Exception as error:  # noqa: BLE001 (what the exporters raise; whether it counts, the next measurement says)
        bench.pieces["no_onnx"] = last_line(error)
        return {"onnx_refused": last_line(error)}


def check_dense_onnx(bench: Bench) -> Record:
    """Where the shrunk network has no ONNX file, tries the original, which is not needed afterwards: only if it has one is it a fault."""
    if "no_onnx" not in bench.pieces:
        return {}
    try:
        _onnx_error(bench.get("model"), bench.get("inputs"))
    except Exception as error:  # noqa: BLE001
        return {"dense_onnx_refused": last_line(error)}
    raise RuntimeError(f"the original exports, the shrunk network does not: {bench.get('no_onnx')}")


def _onnx_error(model: nn.Module, inputs: object) -> float | None:
    """Returns how far ONNX Runtime is from the model, which is turned into float32."""
    with tempfile.TemporaryDirectory() as folder:
        error: float | None = gp.export_onnx(model.float(), cast(inputs, torch.float32), Path(folder) / "model.onnx").error
    return error


MEASUREMENTS: Final[dict[str, Callable[[Bench], Record]]] = {
    "build": build_network,
    "trace": trace_network,
    "coverage": check_coverage,
    "permutation": check_permutation,
    "prune": prune_network,
    "report": read_report,
    "reference": check_reference,
    "train": check_training,
    "own class": check_own_class,
    "ONNX": check_onnx,
    "dense ONNX": check_dense_onnx,
}
_IN_FLOAT32: Final = ("ONNX", "dense ONNX")


def measure(settings: Settings, on_progress: Callable[[Record], None] = lambda _: None, leave_out: Collection[str] = ()) -> Record:
    """Runs every measurement on one network.

    Args:
        settings: the network, and how to measure it.
        on_progress: called with the record so far, before each measurement; "stage" then names the one that begins.
        leave_out: measurements that do not run.

    Returns:
        JSON-ready: the settings, what was measured, "failures" (measurement -> last line of its exception), "stage_seconds", processor
        time and peak resident memory (MiB) of this process so far, and "finished".
    """
    torch.set_num_threads(settings.threads)
    record: Record = {**dataclasses.asdict(settings), "failures": {}, "stage_seconds": {}, "finished": False}
    bench = Bench(settings)
    for stage, measurement in MEASUREMENTS.items():
        if stage in leave_out:
            continue
        record["stage"] = stage
        on_progress(record)
        start = time.perf_counter()
        try:
            with nullcontext() if stage in _IN_FLOAT32 else bench.arithmetic():
                record.update(_finite(measurement(bench), stage, record["failures"]))
        except NotReachedError:
            pass  # the failure behind it is on record
        except Exception as error:  # noqa: BLE001 (whatever one measurement raises, the others still run)
            record["failures"][stage] = last_line(error)
            traceback.print_exc(file=sys.stderr)
        record["stage_seconds"][stage] = time.perf_counter() - start
        peak = peak_bytes()
        record.update(peak_rss_mib=None if peak is None else peak / 2**20, cpu_seconds=time.process_time())
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
