"""ONNX files made ready to run: a session of ONNX Runtime each, and something to feed it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from graphprune.errors import FileError, InputError, nearest

Array = npt.NDArray[Any]

LEVELS = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int8)": np.int8,
    "tensor(int16)": np.int16,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(uint8)": np.uint8,
    "tensor(uint16)": np.uint16,
    "tensor(uint32)": np.uint32,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}
_INTEGERS = 2  # random integers are below this, so that they can be tokens or indices of anything
_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model that is ready to run."""

    name: str
    session: onnxruntime.InferenceSession
    feeds: dict[str, Array]

    def run(self) -> None:
        """Runs the model once."""
        self.session.run(None, self.feeds)


def load(paths: Mapping[str, Path], inputs: Mapping[str, Any], *, batch: int, threads: int, optimization: str, seed: int) -> list[Loaded]:
    """Returns the models, each of which has run once.

    Args:
        paths: ONNX files by name.
        inputs: arrays or tensors by input name.
        batch: size of open dimensions 0 of all other inputs.
        threads: threads within an operator.
        optimization: one of LEVELS.
        seed: of random inputs.

    Raises:
        FileError: if a file is missing or is no ONNX file that ONNX Runtime can load.
        InputError: if an input is unknown, its shape is open or its type cannot be made up, or a model cannot be run.
    """
    sessions = {name: _session(name, path, threads, optimization) for name, path in paths.items()}
    given = _checked_inputs(inputs, sessions)
    loaded = [Loaded(name, session, _feeds(name, session, given, batch, seed)) for name, session in sessions.items()]
    for model in loaded:
        _try_out(model)
    return loaded


def hint(name: str, known: Iterable[str]) -> str:
    """Returns the suggestion of the nearest known name in parentheses, or nothing."""
    suggestion = nearest(name, known)
    return f" ({suggestion})" if suggestion else ""


def _session(name: str, path: Path, threads: int, optimization: str) -> onnxruntime.InferenceSession:
    """Returns ONNX Runtime with the file loaded."""
    if not path.is_file():
        raise FileError(f"there is no file {str(path)!r} for model {name!r}", "Check the path, or export the model first")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = LEVELS[optimization]
    options.log_severity_level = 4  # errors come as exceptions
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else one model's waiting threads slow the next model down
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        what = f"{str(path)!r} (model {name!r}) is no ONNX file that ONNX Runtime can load: {_reason(error)}"
        raise FileError(what, "Pass a file written by export_onnx") from error


def _checked_inputs(inputs: Mapping[str, Any], sessions: Mapping[str, onnxruntime.InferenceSession]) -> dict[str, Array]:
    """Returns the user's inputs as arrays if each is an input of some model."""
    known = {value.name for session in sessions.values() for value in session.get_inputs()}
    arrays = {}
    for name, value in inputs.items():
        if name not in known:
            raise InputError(f"no model has an input {name!r}{hint(name, known)}", f"The inputs are {', '.join(sorted(known))}")
        try:
            arrays[name] = np.asarray(value)
        except (TypeError, ValueError, RuntimeError) as error:
            what = f"the input {name!r} is a {type(value).__name__} that cannot be made an array: {_reason(error)}"
            raise InputError(what, "Pass a NumPy array, or a tensor on the CPU without gradient") from error
    return arrays


def _feeds(name: str, session: onnxruntime.InferenceSession, given: Mapping[str, Array], batch: int, seed: int) -> dict[str, Array]:
    """Returns an array for each input of a model: the given one in the model's own precision, or a random one."""
    generator = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for value in session.get_inputs():
        kind = _TYPES.get(value.type)
        if value.name in given:
            array = given[value.name]
            feeds[value.name] = array.astype(kind) if kind and array.dtype.kind == np.dtype(kind).kind else array
            continue
        if kind is None:
            what = f"input {value.name!r} of model {name!r} is a {value.type}, for which no random values can be made"
            raise InputError(what, f"Pass inputs={{{value.name!r}: ...}}")
        first = not any(array.ndim for array in feeds.values())
        feeds[value.name] = _random(_shape(name, value.name, value.shape, batch, first=first), np.dtype(kind), generator)
    return feeds


def _shape(model: str, name: str, dims: Sequence[int | str | None], batch: int, *, first: bool) -> tuple[int, ...]:
    """Returns the shape of a random input; `first` says that its dimension 0 is the batch even where it is fixed."""
    if first and dims and isinstance(dims[0], int) and dims[0] != batch:
        what = f"model {model!r} was exported for a batch of {dims[0]}, not {batch} (dimension 0 of its input {name!r})"
        raise InputError(what, f"Pass batch={dims[0]}, or export the model with a dynamic batch")
    shape = []
    for position, dim in enumerate(dims):
        if isinstance(dim, int):
            shape.append(dim)
        elif position == 0 or dim == "batch":
            shape.append(batch)
        else:
            what = f"dimension {position} of input {name!r} of model {model!r} is open ({dim or 'without a name'})"
            raise InputError(what, f"Pass inputs={{{name!r}: array of the shape to measure}}")
    return tuple(shape)


def _random(shape: tuple[int, ...], kind: np.dtype[Any], generator: np.random.Generator) -> Array:
    """Returns normally distributed values, or small integers, that are valid as tokens or indices of anything."""
    if kind.kind == "f":
        return generator.standard_normal(shape).astype(kind)
    return generator.integers(_INTEGERS, size=shape).astype(kind)


def _try_out(model: Loaded) -> None:
    """Runs a model once, so that inputs that do not fit are reported before anything is timed."""
    try:
        model.run()
    except Exception as error:
        shapes = ", ".join(f"{name} {list(array.shape)} {array.dtype}" for name, array in model.feeds.items())
        raise InputError(f"model {model.name!r} cannot be run on {shapes}: {_reason(error)}", "Pass other inputs") from error


def _reason(error: Exception) -> str:
    """Returns what ONNX Runtime says, on one line, without its code."""
    return _CODE.sub("", " ".join(str(error).split())).rstrip(".")
