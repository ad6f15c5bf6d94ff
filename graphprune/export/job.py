"""What an exporter is to write: a module from tensors to tensors, the names of both, and runs of the model to compare with."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.errors import InputError
from graphprune.export.quiet import quiet
from graphprune.torch_private import pytree
from graphprune.trace.inputs import Inputs, preserve_state, run

_DAMPING = 0.875  # exact in floating point; also moves what depends on the largest value, and keeps values in their range


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One call of the model: its input and output tensors by name."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
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
    runs: tuple[Run, ...]


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


def jobs(model: nn.Module, inputs: Inputs, notes: list[str], *, opset: int | None, check: bool, dynamic_batch: bool) -> Iterator[Job]:
    """Yields what to try to write: a dynamic batch if it is wanted and the model itself allows it, then a fixed one.

    Args:
        model: run in eval mode, without a trace.
        inputs: the example inputs.
        notes: where to say why a dynamic batch is impossible.
        opset: version of the operator set, None for the exporter's own choice.
        check: whether ONNX Runtime will be compared with the runs.
        dynamic_batch: whether a dynamic batch is wanted.

    Raises:
        InputError: if the model cannot be run on the example inputs, or returns no tensor.
    """
    names = _input_names(model, inputs)
    example, plain_result = _run(model, inputs, names)
    plain = plain_result and not inputs.kwargs and all(isinstance(arg, Tensor) for arg in inputs.args) and not _takes_any_number(model)
    fixed = Job(
        module=model if plain else _Flat(model, inputs),
        spread=not plain,
        inputs=example.inputs,
        outputs=tuple(example.outputs),
        free={},
        opset=opset,
        runs=(example,) if check else (),
    )
    if dynamic_batch:
        yield from _dynamic(fixed, example, model, inputs, notes)
    if check:  # a recording agrees with itself: values that are baked in show on others
        with suppress(InputError):
            fixed = dataclasses.replace(fixed, runs=(example, _run(model, _varied(inputs, inputs.batch), names)[0]))
    yield fixed


def _dynamic(fixed: Job, example: Run, model: nn.Module, inputs: Inputs, notes: list[str]) -> Iterator[Job]:
    """Yields the job with a dynamic batch, or nothing, and notes why."""
    batch = inputs.batch
    if not batch:
        notes.append("no input has a batch dimension")
        return
    recorded = max(batch, 2)  # torch.export takes sizes of 0 and 1 for constants
    try:
        larger, _ = _run(model, _varied(inputs, recorded + 1), list(fixed.inputs))
    except InputError as error:
        notes.append(f"the model itself refuses a batch of {recorded + 1}: {error.what}")
        return
    if larger.outputs.keys() != example.outputs.keys():
        notes.append(f"the model has {len(example.outputs)} outputs for a batch of {batch}, and {len(larger.outputs)} for {recorded + 1}")
        return
    yield dataclasses.replace(
        fixed,
        inputs=dict(zip(fixed.inputs, inputs.with_batch(recorded).tensors(), strict=True)),
        free=_free_dimensions(example, larger, recorded + 1),
        runs=(example, larger) if fixed.runs else (),
    )


def _run(model: nn.Module, inputs: Inputs, names: list[str]) -> tuple[Run, bool]:
    """Returns the model's tensors by name, and whether its result is one tensor, or a tuple or list of nothing but tensors."""
    with preserve_state(model), quiet():
        result = run(model, inputs.copied())
        tensors = [(name, tensor.detach().clone()) for name, tensor in _tensors(result)]
    if not tensors:
        raise InputError(f"{type(model).__name__} returns no tensor for the example inputs", "Export a model that returns tensors")
    plain = isinstance(result, Tensor) or (type(result) in {tuple, list} and all(isinstance(item, Tensor) for item in result))
    labels = [f"output_{name}".rstrip("_") if not name or name[0].isdigit() else name for name, _ in tensors]
    outputs = zip(_distinct(labels, [*names, *_state_names(model)]), (tensor for _, tensor in tensors), strict=True)
    return Run(dict(zip(names, inputs.tensors(), strict=True)), dict(outputs)), plain


def _varied(inputs: Inputs, batch: int | None) -> Inputs:
    """Returns inputs of another batch size, and of other values: floating-point numbers are damped, and moved on in repeated samples.

    A file in which a statistic or the first sample of the example inputs is baked does not reproduce the model on these.
    """
    given = inputs.batch

    def varied(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if given and batch and tensor.ndim and tensor.shape[0] == batch:
            tensor = torch.stack([sample.roll(number // given) for number, sample in enumerate(tensor)])
        return tensor * _DAMPING

    return (inputs.with_batch(batch) if batch else inputs).map(varied)


def _free_dimensions(example: Run, larger: Run, batch: int) -> dict[str, dict[int, str]]:
    """Returns the dimensions in which two runs differ; only those of the same size share a name, for ONNX Runtime relies on it."""
    free = {}
    for before, after in ((example.inputs, larger.inputs), (example.outputs, larger.outputs)):
        for name, tensor in after.items():
            changed = [dim for dim, (old, new) in enumerate(zip(before[name].shape, tensor.shape, strict=False)) if old != new]
            free[name] = {dim: "batch" if tensor.shape[dim] == batch else f"{name}_{dim}" for dim in changed}
    return {name: dims for name, dims in free.items() if dims}


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors in nested containers and dataclasses in order, each with its path, such as "boxes_0"."""
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        label = "_".join(part for part in [name, *(re.sub(r"\W+", "_", str(key)).strip("_") for key in path)] if part)
        if isinstance(leaf, Tensor):
            yield label, leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors({field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}, label)


def _input_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """Returns a name for each input tensor, in order: that of its argument, and its path within it."""
    kinds = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    known = [parameter.name for parameter in _parameters(model) if parameter.kind in kinds]
    labels = [*known, *(f"input_{number}" for number in range(len(known), len(inputs.args)))]
    arguments = {**dict(zip(labels, inputs.args, strict=False)), **inputs.kwargs}
    return _distinct([name for name, _ in _tensors(arguments)], _state_names(model))


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    """Returns the parameters of the model's forward, none where they cannot be known, as in a scripted module."""
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return []


def _takes_any_number(model: nn.Module) -> bool:
    """Returns whether the model's forward has ``*args``."""
    return any(parameter.kind is parameter.VAR_POSITIONAL for parameter in _parameters(model))


def _state_names(model: nn.Module) -> list[str]:
    """Returns the names that parameters and buffers take in the file."""
    return [name for name, _ in (*model.named_parameters(), *model.named_buffers())]


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
