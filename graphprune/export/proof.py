"""Proves that an ONNX file is what was asked for, is valid, and computes what the model computes."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from torch import Tensor

from graphprune.export.job import Job
from graphprune.export.writers import RefusedError

_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")


class _UnrunnableError(RefusedError):
    """ONNX Runtime cannot run the file."""

    fix = "Convert model and inputs to float32, which every operator of ONNX Runtime takes, or pass check=False to get the file"


class _InexactError(RefusedError):
    """ONNX Runtime gives something else than the model."""

    fix = "Raise tolerance if the difference does not matter, or pass check=False to get the file and look into it"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What was found in a file, see `graphprune.export.ExportReport`."""

    opset: int
    nodes: int
    bytes: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    error: float | None


def prove(job: Job, file: Path, tolerance: float) -> Facts:
    """Returns the facts about a file that passes.

    Args:
        job: what the file is to be.
        file: lies in a folder that holds nothing but its own parts.
        tolerance: largest relative error of an output.

    Raises:
        RefusedError: if the file is something else, or ONNX Runtime does not reproduce the job's runs from it.
        Exception: whatever onnx.checker complains of.
    """
    proto = onnx.load(file, load_external_data=False)
    opset = next(entry.version for entry in proto.opset_import if entry.domain in {"", "ai.onnx"})
    if job.opset not in {None, opset}:
        raise RefusedError(f"opset {opset} was written where {job.opset} was asked for")
    for value in proto.graph.input:
        if value.name in job.free and not value.type.tensor_type.shape.dim[0].dim_param:
            raise RefusedError(f"the batch of input {value.name!r} became a constant")
    onnx.checker.check_model(file)
    return Facts(
        opset=opset,
        nodes=len(proto.graph.node),
        bytes=sum(part.stat().st_size for part in file.parent.iterdir()),
        inputs=tuple(value.name for value in proto.graph.input),
        outputs=tuple(value.name for value in proto.graph.output),
        error=_largest_error(job, file, tolerance) if job.runs else None,
    )


def relative_error(expected: np.ndarray[Any, Any], actual: np.ndarray[Any, Any]) -> float:
    """Returns max|a - b| / max|a|, max|a - b| where a is all zero, and infinity where shapes or non-finite values differ."""
    if expected.shape != actual.shape:
        return math.inf
    kind = np.complex128 if np.iscomplexobj(expected) else np.float64
    a, b = expected.astype(kind), actual.astype(kind)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - b))
    if not np.isfinite(difference).all():
        return math.inf
    largest = np.where(np.isfinite(a), np.abs(a), 0.0).max(initial=0.0)
    return float(difference.max(initial=0.0) / (largest or 1.0))


def _largest_error(job: Job, file: Path, tolerance: float) -> float:
    """Returns the largest relative error over all runs and outputs."""
    largest = 0.0
    for run, results in zip(job.runs, _results(job, file), strict=True):
        for name, actual in results.items():
            expected = _array(run.outputs[name])
            error = relative_error(expected, actual)
            if error > tolerance:
                shape = f"shape {list(actual.shape)}" + ("" if actual.shape == expected.shape else f" instead of {list(expected.shape)}")
                what = f"ONNX Runtime gives another {name!r} than the model, {shape}"
                raise _InexactError(f"{what}: relative error {error:.2g}, above the tolerance of {tolerance:g}")
            largest = max(largest, error)
    return largest


def _results(job: Job, file: Path) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Returns the outputs of ONNX Runtime by name, on one thread, for each run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors come as exceptions
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        wanted = [value.name for value in session.get_inputs()]
        feeds = [{name: _array(run.inputs[name]) for name in wanted} for run in job.runs]
        found = [session.run(list(job.outputs), feed) for feed in feeds]
    except Exception as error:
        reason = _CODE.sub("", str(error))
        raise _UnrunnableError(f"ONNX Runtime cannot run it: {reason}") from error
    return [dict(zip(job.outputs, (np.asarray(value) for value in values), strict=True)) for values in found]


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Returns the tensor's values in the computer's own memory."""
    return tensor.detach().cpu().numpy()
