"""The two exporters of PyTorch behind one signature, and what they may fail with."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from torch import nn
from torch.jit import TracerWarning  # type: ignore[attr-defined] # is public, and documented

from graphprune.export.job import Job
from graphprune.export.quiet import quiet
from graphprune.trace.contexts import whole_attention
from graphprune.trace.inputs import preserve_state
from graphprune.trace.threads import exporting

_SINGLE_FILE_BYTES = 3 << 29  # a protobuf message ends at 2 GiB; beyond 1.5 GiB the weights go into a file of their own
_LONGEST_CAUSE = 240  # characters of an exporter's own message that are repeated in ours
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


class RefusedError(Exception):
    """One attempt gave no usable file; the next may."""

    fix = "Replace the operation at fault by one that ONNX has, or try another opset"


class GuessedError(RefusedError):
    """The file holds for the recorded run, but Python looked at a tensor's value during it."""


def cause(error: Exception) -> str:
    """Returns the innermost cause of an error on one line."""
    innermost = error if isinstance(error, RefusedError) else _innermost(error)
    text = " ".join(_ANSI.sub("", str(innermost)).split()) or "no reason given"
    text = f"{text[:_LONGEST_CAUSE].rstrip('. ')} ..." if len(text) > _LONGEST_CAUSE else text.rstrip(".")
    return text if isinstance(innermost, RefusedError) else f"{type(innermost).__name__}: {text}"


def _innermost(error: BaseException) -> BaseException:
    """Returns what the error was raised from in the end."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def write(model: nn.Module, exporter: str, job: Job, file: Path, *, trust: bool) -> list[str]:
    """Writes the file, in a folder of its own, and leaves the model as it was.

    Returns:
        What is constant in the file because Python looked at a tensor's value.

    Raises:
        GuessedError: as soon as Python looks at such a value, unless `trust`.
        Exception: whatever the exporter fails with.
    """
    try:
        with exporting(), preserve_state(model), whole_attention(), quiet(*([] if trust else [TracerWarning])) as caught:
            WRITERS[exporter](job, file)
    except Exception as error:
        warning = _innermost(error)
        if not isinstance(warning, TracerWarning):
            raise
        frame = traceback.extract_tb(warning.__traceback__ or error.__traceback__)[-1]
        raise GuessedError(f"Python looked at a value while the run was recorded, at {_place(frame.filename, frame.lineno)}") from error
    guesses = [warning for warning in caught if issubclass(warning.category, TracerWarning)]
    if not guesses:
        return []
    first = _place(guesses[0].filename, guesses[0].lineno)
    return [f"Python looked at values that are constants in the file, {len(guesses)} in all, the first at {first}"]


def _place(path: str, line: int | None) -> str:
    """Returns a place in a source file, without its folder."""
    return f"{Path(path).name}:{line}"


def _write_torchscript(job: Job, file: Path) -> None:
    """Writes what one run records."""
    torch.onnx.export(
        job.module,
        tuple(job.inputs.values()),
        str(file),  # only a string may have weights beside it
        dynamo=False,
        verbose=False,
        input_names=list(job.inputs),
        output_names=list(job.outputs),
        opset_version=job.opset,
        dynamic_axes=job.free,
    )
    apart = [part for part in file.parent.iterdir() if part != file]
    if apart:  # large weights come in a file each: put them together
        proto = onnx.load(file)
        for part in apart:
            part.unlink()
        onnx.save_model(proto, file, save_as_external_data=True, location=f"{file.name}.data")


def _write_dynamo(job: Job, file: Path) -> None:
    """Writes through `torch.export`."""
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} if name in job.free else None for name in job.inputs)
    program = torch.onnx.export(
        job.module,
        tuple(job.inputs.values()),
        dynamo=True,
        verbose=False,
        input_names=list(job.inputs),
        output_names=list(job.outputs),
        opset_version=job.opset,
        dynamic_shapes=((shapes,) if job.spread else shapes) if job.free else None,
    )
    if program is None:
        raise RefusedError("the exporter returned nothing")
    weights = sum(tensor.nbytes for tensor in (*job.module.parameters(), *job.module.buffers()))
    program.save(file, external_data=weights > _SINGLE_FILE_BYTES)


WRITERS: dict[str, Callable[[Job, Path], None]] = {"torchscript": _write_torchscript, "dynamo": _write_dynamo}
