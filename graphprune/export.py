"""Writes a model as an ONNX file, and proves the file against the model before it takes its place.

PyTorch has two exporters: "torchscript" records one run, "dynamo" goes through `torch.export`. Where both work, their files compute the
same and run equally fast. The former is several times faster, but fixes whatever Python did with a tensor's value during the run, and
only warns. So it is believed when it has nothing to warn of and ONNX Runtime reproduces the model from its file at two batch sizes;
otherwise the latter is tried, and then both with a fixed batch. The report says what was tried in vain.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphprune.errors import ConfigError, ExportError, FileError, InputError, nearest
from graphprune.inputs import Inputs, normalise, run, undisturbed

_SINGLE_FILE_BYTES = 3 << 29  # a protobuf message ends at 2 GiB; beyond 1.5 GiB the weights go into a file of their own
_OLDEST_OPSET = 9  # no exporter writes an older one
_LONGEST_CAUSE = 240  # characters of an exporter's own message that are repeated in ours
_FIX = "Replace the operation at fault by one that ONNX has, or try another opset"
_FIX_INEXACT = "Raise tolerance if the difference does not matter, or pass check=False to get the file and look into it"
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


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


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """One call of the model: its input and output tensors by name."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """What an exporter is to write.

    Attributes:
        module: takes the tensors of `inputs` in order, and returns those of `outputs`.
        spread: whether `module` takes its tensors through ``*tensors``.
        inputs: example inputs by name.
        outputs: names of the outputs.
        free: for inputs and outputs, names of the dimensions that change with the batch; empty when the batch is fixed.
        opset: version of the operator set, None for the exporter's own choice.
        runs: what ONNX Runtime must reproduce; none when unchecked.
    """

    module: nn.Module
    spread: bool
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    free: dict[str, dict[int, str]]
    opset: int | None
    runs: tuple[_Run, ...]


class _RefusedError(Exception):
    """One attempt gave no usable file; the next may."""


class _GuessedError(_RefusedError):
    """The file holds for the recorded run, but Python looked at a tensor's value during it."""


class _InexactError(_RefusedError):
    """ONNX Runtime gives something else than the model."""


class _Flat(nn.Module):
    """A model as a function from tensors to tensors: nested arguments are rebuilt inside, nested results flattened."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self.template = inputs
        self.training = False

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Returns the tensors of the model's result in order."""
        remaining = iter(tensors)
        result = self.template.map(lambda _: next(remaining)).call(self.model)
        return tuple(tensor for _, tensor in _tensors(result))


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
        check: compare ONNX Runtime with the model on the example inputs and, if the batch is dynamic, on a larger batch.
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
    jobs = _jobs(model, normalise(example_inputs), notes, opset=opset, check=check, dynamic_batch=dynamic_batch)
    failures: list[Exception] = []
    with _folder_beside(target) as folder:
        for number, (name, job, trust) in enumerate(_attempts(jobs, exporters)):
            if trust and exporter is None and not any(isinstance(failure, _GuessedError) for failure in failures):
                continue  # the recording failed for another reason, and would do so again
            file = folder / str(number) / target.name
            try:
                guesses = _write(model, name, job, file, trust=trust)
                report = _proven(job, file, name, tolerance)
            except Exception as error:  # noqa: BLE001 - exporters raise whatever they like, and the next one may succeed
                failures.append(error)
                notes.append(f"{name} with a {'dynamic' if job.free else 'fixed'} batch: {_cause(error)}")
                continue
            _publish(file, target)
            notes += guesses
            if dynamic_batch and not job.free:
                notes.append("the batch is fixed at that of the example inputs")
            return dataclasses.replace(report, path=target, notes=tuple(notes))
    first = next((failure for failure in failures if not isinstance(failure, _GuessedError)), failures[0])
    what = f"{type(model).__name__} cannot be exported to ONNX: {_cause(first)}"
    raise ExportError(what, _FIX_INEXACT if isinstance(first, _InexactError) else _FIX) from first


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
    if exporter not in _WRITERS:
        hint = nearest(exporter, _WRITERS) or f"there are {' and '.join(_WRITERS)}"
        raise ConfigError(f"there is no exporter {exporter!r}: {hint}", "Leave it out to try both")
    return (exporter,)


def _attempts(jobs: list[_Job], exporters: tuple[str, ...]) -> Iterator[tuple[str, _Job, bool]]:
    """Yields exporter, job, and whether to trust a recording that looked at values; that comes last, for want of anything better."""
    for job in jobs:
        yield from ((name, job, False) for name in exporters)
        if "torchscript" in exporters:
            yield "torchscript", job, True


def _jobs(model: nn.Module, inputs: Inputs, notes: list[str], *, opset: int | None, check: bool, dynamic_batch: bool) -> list[_Job]:
    """Returns what to try to write: a dynamic batch if it is wanted and the model itself can do it, then a fixed one."""
    names = _input_names(model, inputs)
    plain = not inputs.kwargs and all(isinstance(arg, Tensor) for arg in inputs.args) and not _takes_any_number(model)
    example, flat_result = _run(model, inputs, names)
    plain = plain and flat_result
    fixed = _Job(
        module=model if plain else _Flat(model, inputs),
        spread=not plain,
        inputs=example.inputs,
        outputs=tuple(example.outputs),
        free={},
        opset=opset,
        runs=(example,) if check else (),
    )
    if not dynamic_batch:
        return [fixed]
    batch = inputs.batch
    if batch is None:
        notes.append("no input has a batch dimension")
        return [fixed]
    recorded = max(batch, 2)  # torch.export takes sizes of 0 and 1 for constants
    try:
        larger, _ = _run(model, _varied(inputs.with_batch(recorded + 1), batch), names)
    except InputError as error:
        notes.append(f"the model itself refuses a batch of {recorded + 1}: {error.what}")
        return [fixed]
    if larger.outputs.keys() != example.outputs.keys():
        notes.append(f"the model has {len(example.outputs)} outputs for a batch of {batch}, and {len(larger.outputs)} for {recorded + 1}")
        return [fixed]
    return [
        dataclasses.replace(
            fixed,
            inputs=dict(zip(names, inputs.with_batch(recorded).tensors(), strict=True)),
            free=_free_dimensions(example, larger, recorded + 1),
            runs=(example, larger) if check else (),
        ),
        fixed,
    ]


def _free_dimensions(example: _Run, larger: _Run, batch: int) -> dict[str, dict[int, str]]:
    """Returns the dimensions in which two runs differ; only those of the same size share a name, for ONNX Runtime relies on it."""
    free = {}
    for before, after in ((example.inputs, larger.inputs), (example.outputs, larger.outputs)):
        for name, tensor in after.items():
            changed = [dim for dim, size in enumerate(tensor.shape) if size != before[name].shape[dim]]
            free[name] = {dim: "batch" if tensor.shape[dim] == batch else f"{name}_{dim}" for dim in changed}
    return {name: dims for name, dims in free.items() if dims}


def _run(model: nn.Module, inputs: Inputs, names: list[str]) -> tuple[_Run, bool]:
    """Returns the model's tensors by name, and whether its result is one tensor or a tuple or list of nothing but tensors."""
    with undisturbed(model), _quiet():
        result = run(model, inputs.copied())
        tensors = [(name, tensor.detach().clone()) for name, tensor in _tensors(result)]
    if not tensors:
        raise InputError(f"{type(model).__name__} returns no tensor for the example inputs", "Export a model that returns tensors")
    flat = isinstance(result, Tensor) or (type(result) in {tuple, list} and all(isinstance(item, Tensor) for item in result))
    labels = [f"output_{name}".rstrip("_") if not name or name[0].isdigit() else name for name, _ in tensors]
    taken = [*names, *(name for name, _ in model.named_parameters()), *(name for name, _ in model.named_buffers())]
    outputs = dict(zip(_distinct(labels, taken), (tensor for _, tensor in tensors), strict=True))
    return _Run(dict(zip(names, inputs.tensors(), strict=True)), outputs), flat


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors in nested containers and dataclasses in order, each with its path, such as "boxes_0"."""
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        label = "_".join(part for part in [name, *(re.sub(r"\W+", "_", str(key)).strip("_") for key in path)] if part)
        if isinstance(leaf, Tensor):
            yield label, leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors({field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}, label)


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    """Returns the parameters of the model's forward, none where they cannot be known, as in a scripted module."""
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return []


def _takes_any_number(model: nn.Module) -> bool:
    """Returns whether the model's forward has ``*args``."""
    return any(parameter.kind is parameter.VAR_POSITIONAL for parameter in _parameters(model))


def _input_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """Returns a name for each input tensor, in order: that of its argument, and its path within it."""
    kinds = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    known = [parameter.name for parameter in _parameters(model) if parameter.kind in kinds]
    labels = [*known, *(f"input_{number}" for number in range(len(known), len(inputs.args)))]
    arguments = {**dict(zip(labels, inputs.args, strict=False)), **inputs.kwargs}
    return _distinct([name for name, _ in _tensors(arguments)], [name for name, _ in model.named_parameters()])


def _distinct(names: list[str], taken: list[str]) -> list[str]:
    """Returns the names, each with as many underscores behind it as make it differ from all others and from those taken."""
    used, distinct = set(taken), []
    for name in names:
        free = name
        while free in used:
            free += "_"
        used.add(free)
        distinct.append(free)
    return distinct


def _varied(inputs: Inputs, batch: int) -> Inputs:
    """Returns the inputs with the values of repeated floating-point samples moved on, so that no two samples are the same."""
    size = inputs.batch

    def varied(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.ndim < 2 or tensor.shape[0] != size:
            return tensor
        return torch.stack([sample.roll(number // batch) for number, sample in enumerate(tensor)])

    return inputs.map(varied)


@contextmanager
def _quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Keeps warnings and log records from the user's console; yields the list that the warnings are collected in."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    finally:
        logging.disable(before)


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
        for part in sorted(file.parent.iterdir(), key=lambda part: part == file):
            part.replace(target.parent / part.name)
    except OSError as error:
        raise FileError(f"cannot write {str(target)!r}: {error.strerror}", "Check that the file and its folder are writable") from error


def _write(model: nn.Module, exporter: str, job: _Job, file: Path, *, trust: bool) -> list[str]:
    """Writes the file, and returns what was fixed in it by looking at values; unless trusted, that is an error."""
    file.parent.mkdir()
    with undisturbed(model), _quiet() as caught:
        _WRITERS[exporter](job, file)
    guesses = [warning for warning in caught if issubclass(warning.category, torch.jit.TracerWarning)]
    if not guesses:
        return []
    where = f"{Path(guesses[0].filename).name}:{guesses[0].lineno}"
    message = f"Python looked at {len(guesses)} values that are constants in the file, the first at {where}"
    if not trust:
        raise _GuessedError(message)
    return [message]


def _write_dynamo(job: _Job, file: Path) -> None:
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
        raise _RefusedError("the exporter returned nothing")
    weights = sum(tensor.nbytes for tensor in [*job.module.parameters(), *job.module.buffers()])
    program.save(file, external_data=weights > _SINGLE_FILE_BYTES)


def _write_torchscript(job: _Job, file: Path) -> None:
    """Writes what one run records."""
    torch.onnx.export(
        job.module,
        tuple(job.inputs.values()),
        file,
        dynamo=False,
        verbose=False,
        input_names=list(job.inputs),
        output_names=list(job.outputs),
        opset_version=job.opset,
        dynamic_axes=job.free,
    )
    apart = [part for part in file.parent.iterdir() if part != file]
    if apart:  # one file per parameter: collect them
        proto = onnx.load(file)
        for part in apart:
            part.unlink()
        onnx.save_model(proto, file, save_as_external_data=True, location=f"{file.name}.data")


_WRITERS: dict[str, Callable[[_Job, Path], None]] = {"torchscript": _write_torchscript, "dynamo": _write_dynamo}


def _proven(job: _Job, file: Path, exporter: str, tolerance: float) -> ExportReport:
    """Returns the report on a file that is what the job asks for, is valid, and reproduces the model."""
    proto = onnx.load(file, load_external_data=False)
    opset = next(entry.version for entry in proto.opset_import if entry.domain in {"", "ai.onnx"})
    if job.opset not in {None, opset}:
        raise _RefusedError(f"opset {opset} was written where {job.opset} was asked for")
    for value in proto.graph.input:
        if value.name in job.free and not value.type.tensor_type.shape.dim[0].dim_param:
            raise _RefusedError(f"the batch of input {value.name!r} became a constant")
    onnx.checker.check_model(file)
    return ExportReport(
        path=file,
        opset=opset,
        exporter=exporter,
        nodes=len(proto.graph.node),
        bytes=sum(part.stat().st_size for part in file.parent.iterdir()),
        inputs=tuple(value.name for value in proto.graph.input),
        outputs=tuple(value.name for value in proto.graph.output),
        error=_largest_error(job, file, tolerance) if job.runs else None,
        dynamic_batch=bool(job.free),
    )


def _largest_error(job: _Job, file: Path, tolerance: float) -> float:
    """Returns the largest relative error of ONNX Runtime on one thread, over all runs and outputs."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors arrive as exceptions
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    largest = 0.0
    for run_ in job.runs:
        feeds = {value.name: run_.inputs[value.name].detach().cpu().numpy() for value in session.get_inputs()}
        for name, actual in zip(job.outputs, session.run(list(job.outputs), feeds), strict=True):
            expected = run_.outputs[name].cpu().numpy()
            error = _relative_error(expected, np.asarray(actual))
            if not error <= tolerance:
                what = f"ONNX Runtime gives another {name!r} than the model, of shape {list(actual.shape)}"
                raise _InexactError(f"{what}: relative error {error:.2g}, above the tolerance of {tolerance:g}")
            largest = max(largest, error)
    return largest


def _relative_error(expected: np.ndarray[Any, Any], actual: np.ndarray[Any, Any]) -> float:
    """Returns max|a - b| / max|a|, max|a - b| where a is all zero, and infinity where shapes or non-finite values differ."""
    if expected.shape != actual.shape:
        return float("inf")
    kind = np.complex128 if np.iscomplexobj(expected) else np.float64
    a, b = expected.astype(kind), actual.astype(kind)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - b))
    if not np.isfinite(difference).all():
        return float("inf")
    scale = np.abs(a, where=np.isfinite(a), out=np.zeros(a.shape)).max(initial=0.0)
    return float(difference.max(initial=0.0) / (scale or 1.0))


def _cause(error: BaseException) -> str:
    """Returns the innermost cause of an error on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(_ANSI.sub("", str(error)).split()) or "no reason given"
    text = text if len(text) <= _LONGEST_CAUSE else f"{text[:_LONGEST_CAUSE]} ..."
    return text.rstrip(".") if isinstance(error, _RefusedError) else f"{type(error).__name__}: {text.rstrip('.')}"
