"""Writes a model as an ONNX file, and proves the file against the model before it takes its place.

PyTorch has two exporters: "torchscript" records one run, "dynamo" goes through `torch.export`. Where both work, their files compute the
same and run equally fast. The former is several times faster, but fixes whatever Python did with a tensor's value during the run, and
only warns. So it is believed when it has nothing to warn of and ONNX Runtime reproduces the model from its file at two batch sizes;
otherwise the latter is tried, and then both with a fixed batch. The report says what was tried in vain.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
from torch import nn

from graphprune.errors import ConfigError, ExportError, FileError, nearest
from graphprune.export.job import Job, jobs
from graphprune.export.proof import Facts, prove
from graphprune.export.writers import WRITERS, GuessedError, RefusedError, cause, write
from graphprune.trace.inputs import normalise
from graphprune.trace.meta_device import require_values
from graphprune.trace.turns import in_turn

__all__ = ["ExportReport", "export_onnx"]

_PUBLISHING = threading.Lock()  # a file and the weights beside it are of one export
_OLDEST_OPSET = 9  # no exporter writes an older one


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written, by which exporter, and how far ONNX Runtime is from the model.

    Attributes:
        path: the ONNX file; weights of more than 1.5 GiB lie beside it, in a file whose name ends in ".data".
        opset: version of the ai.onnx operator set that the file uses.
        exporter: "torchscript" or "dynamo".
        nodes: operators in the main graph.
        bytes: size of the file and of the weights beside it.
        inputs: names of the inputs, in order.
        outputs: names of the outputs, in order.
        error: max|a - b| / max|a| of the worst output at any batch size tried; None when unchecked.
        dynamic_batch: whether the file takes any batch size.
        notes: what did not go as asked, a sentence each.
    """

    path: Path
    opset: int
    exporter: str
    nodes: int
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    error: float | None
    dynamic_batch: bool
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values for JSON."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


@in_turn
def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    opset: int | None = None,
    check: bool = True,
    tolerance: float = 1e-3,
    exporter: str | None = None,
) -> ExportReport:
    """Writes the model in eval mode to an ONNX file; model and random numbers stay as they were, and a failure leaves no file.

    Args:
        model: exported where it lies; only its buffers are copied for the time being.
        example_inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or (args, kwargs).
        path: where to write; an existing file is replaced once the new one is finished and checked.
        dynamic_batch: leave dimension 0 free in every input that has the batch size there.
        opset: version of the ai.onnx operator set; None lets the exporter choose.
        check: compare ONNX Runtime with the model on the example inputs, and on other values, of a larger batch where it is dynamic.
        tolerance: largest relative error of an output, max|a - b| / max|a|.
        exporter: "torchscript" or "dynamo"; None tries both.

    Raises:
        InputError: if the model cannot be run on the example inputs.
        ConfigError: if an option is unusable.
        ExportError: if no exporter gives a file that ONNX Runtime can run and that reproduces the model.
        FileError: if the file cannot be written.
    """
    target = _checked_target(Path(path))
    exporters = _checked_options(opset, tolerance, exporter, check=check)
    notes: list[str] = []
    require_values(model, "export_onnx")
    wanted = jobs(model, normalise(example_inputs), notes, opset=opset, check=check, dynamic_batch=dynamic_batch)
    failures: list[Exception] = []
    with _folder_beside(target) as folder:
        for number, (name, job, trust) in enumerate(_attempts(wanted, exporters)):
            if trust and exporter is None and not any(isinstance(failure, GuessedError) for failure in failures):
                continue  # the recording failed for another reason, and would do so again
            file = folder / str(number) / target.name
            try:
                file.parent.mkdir()
                guesses = write(model, name, job, file, trust=trust)
                facts = prove(job, file, tolerance)
            except Exception as error:  # noqa: BLE001 - exporters raise whatever they like, and the next one may succeed
                failures.append(error)
                notes.append(f"{name} with a {'dynamic' if job.free else 'fixed'} batch: {cause(error)}")
                continue
            _publish(file, target)
            fixed = ["the batch is fixed at that of the example inputs"] if dynamic_batch and not job.free else []
            return _report(target, name, job, facts, (*notes, *guesses, *fixed))
    first = next((failure for failure in failures if not isinstance(failure, GuessedError)), failures[0])
    fix = first.fix if isinstance(first, RefusedError) else RefusedError.fix
    raise ExportError(f"{type(model).__name__} cannot be exported to ONNX: {cause(first)}", fix) from first


def _checked_target(path: Path) -> Path:
    """Returns the path if its folder exists and it is no folder itself."""
    if not path.parent.is_dir():
        raise FileError(f"there is no folder {str(path.parent)!r} to write {path.name!r} into", "Create it, or choose another path")
    if path.is_dir():
        raise FileError(f"{str(path)!r} is a folder", "Give the name of a file in it")
    return path


def _checked_options(opset: int | None, tolerance: float, exporter: str | None, *, check: bool) -> tuple[str, ...]:
    """Returns the exporters to try, in order."""
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not _OLDEST_OPSET <= opset <= newest:
        raise ConfigError(f"opset {opset} is not between {_OLDEST_OPSET} and {newest}", "Leave it out to get the exporter's choice")
    if not tolerance > 0:
        raise ConfigError(f"tolerance {tolerance} is not above 0", "Pass a relative error, such as 1e-3")
    if exporter is None:  # a recording that nothing is going to prove comes second
        return ("torchscript", "dynamo") if check else ("dynamo", "torchscript")
    if exporter not in WRITERS:
        hint = nearest(exporter, WRITERS)
        what = f"there is no exporter {exporter!r}{f' ({hint})' if hint else ''}"
        raise ConfigError(what, f"Pass one of {', '.join(WRITERS)}, or leave it out to try both")
    return (exporter,)


def _attempts(wanted: Iterator[Job], exporters: tuple[str, ...]) -> Iterator[tuple[str, Job, bool]]:
    """Yields exporter, job, and whether to trust a recording that looked at values, which is done for want of anything better."""
    for job in wanted:
        if len(exporters) == 1:
            yield exporters[0], job, True
        else:
            yield from ((name, job, False) for name in exporters)
            yield "torchscript", job, True


def _report(path: Path, exporter: str, job: Job, facts: Facts, notes: tuple[str, ...]) -> ExportReport:
    """Returns the report on the file that took its place."""
    return ExportReport(
        path=path,
        opset=facts.opset,
        exporter=exporter,
        nodes=facts.nodes,
        bytes=facts.bytes,
        inputs=facts.inputs,
        outputs=facts.outputs,
        error=facts.error,
        dynamic_batch=bool(job.free),
        notes=notes,
    )


@contextmanager
def _folder_beside(target: Path) -> Iterator[Path]:
    """Yields an empty folder on the file system of the target, removed with its contents afterwards."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent, ignore_cleanup_errors=True)
    except OSError as error:
        raise FileError(f"cannot write into {str(target.parent)!r}: {error.strerror}", "Choose a folder that is writable") from error
    with folder as name:
        yield Path(name)


def _publish(file: Path, target: Path) -> None:
    """Moves a finished file and the weights beside it into place, the weights first, so that the model never lacks them."""
    try:
        with _PUBLISHING:
            for part in sorted(file.parent.iterdir(), key=lambda part: part == file):
                part.replace(target.parent / part.name)
    except OSError as error:
        raise FileError(f"cannot write {str(target)!r}: {error.strerror}", "Check that the file and its folder are writable") from error
