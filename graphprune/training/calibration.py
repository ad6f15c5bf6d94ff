"""Re-estimates BatchNorm statistics: what a network most needs after channels are gone.

Removing channels changes what every later layer sees, so the running mean and variance collected in training describe activations that
no longer occur. As in universally slimmable networks (Yu and Huang, ICCV 2019: "post-statistics of batch normalization") and in EagleEye
(Li et al., ECCV 2020: "adaptive batch normalization"), they are measured anew: each batch is normalised by its own statistics, as in
training, and mean and unbiased variance are averaged over all batches with equal weight,

    mean_k = mean_{k-1} + (batch mean_k - mean_{k-1}) / k,        and likewise for the variance.

The calls of batch normalisation are caught as they happen, so a graph module that calls the ATen operator on its buffers is treated
exactly as a tree of modules with nn.BatchNorm2d in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from graphprune.errors import InputError
from graphprune.torch_private import BatchNorm
from graphprune.trace.inputs import normalise, preserve_state, run
from graphprune.trace.meta_device import require_values
from graphprune.trace.turns import turn

_ATEN_ARGUMENTS = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: _ATEN_ARGUMENTS,
    torch.ops.aten.batch_norm: _ATEN_ARGUMENTS,
    torch.ops.aten.batch_norm.default: _ATEN_ARGUMENTS,
}


def recalibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Re-estimates the running mean and variance of every BatchNorm in place, as the average over the batches.

    A BatchNorm is any call of batch_norm on a running mean and variance that are buffers of the model: PyTorch's BatchNorm classes and
    what derives from them (SyncBatchNorm without synchronising: each process averages its own batches), functional calls, and graph
    modules. A layer that the batches do not reach keeps its statistics. Nothing else changes: momentum, training flags, parameters,
    gradients, other buffers and PyTorch's random number generators are as before, and all other layers, dropout among them, run in
    inference mode. One exception: where a module's momentum is None, its num_batches_tracked becomes the number of batches averaged
    here, since it is the weight with which training goes on.

    Args:
        model: the model, on the device of the batches.
        batches: each item is the example inputs of one forward pass: a tensor, a tuple of arguments, a dict of keyword arguments, or
            (args, kwargs). For a loader of (images, labels) pass ``(images for images, _ in loader)``. A few hundred samples suffice;
            each batch needs more than one value per channel.

    Returns:
        The same model.

    Raises:
        InputError: if there are no batches, the model has no weights or cannot be run on one, or a statistic is not finite. The
            statistics are then as they were.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise InputError(f"batches is a single {type(batches).__name__}, not several batches", "Pass a list of batches: [batch]")
    require_values(model, "recalibrate")
    with turn(model, writes=True):
        return _recalibrated(model, batches)


def _recalibrated(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    statistics = _Statistics(model)
    done = 0
    with preserve_state(model), statistics:
        for done, batch in enumerate(batches, start=1):
            _run(model, batch, done)
    if not done:
        raise InputError("there are no batches to estimate BatchNorm statistics from", "Pass at least one batch of example inputs")
    statistics.write(model)
    return model


def _run(model: nn.Module, batch: Any, position: int) -> None:
    """Runs the model on a batch, and says which batch it was if that fails."""
    try:
        run(model, normalise(batch).copied())
    except InputError as error:
        pair = isinstance(batch, (tuple, list)) and len(batch) == 2
        hint = "; for a loader of (images, labels) pass (images for images, _ in loader)" if pair else ""
        raise InputError(f"batch {position} cannot be used: {error.what}", f"{error.fix}{hint}") from error


class _Average:
    """The running statistics of one BatchNorm, and the average that will replace them."""

    def __init__(self, mean: Tensor, var: Tensor) -> None:
        self.targets = (mean, var)
        self.averages = tuple(torch.zeros_like(target, dtype=_precise(target)) for target in self.targets)
        self.calls = 0

    def add(self, mean: Tensor, var: Tensor) -> None:
        """Takes the statistics of one more batch into the average."""
        self.calls += 1
        for average, value in zip(self.averages, (mean, var), strict=True):
            average.add_((value - average) / self.calls)

    def finite(self) -> bool:
        """Returns whether the average can be used."""
        return all(bool(average.isfinite().all()) for average in self.averages)

    def write(self) -> None:
        """Puts the average into the running statistics."""
        for target, average in zip(self.targets, self.averages, strict=True):
            target.copy_(average)


class _Statistics(TorchFunctionMode):
    """Makes the model's batch normalisations use the statistics of the batch, and averages these; the model is not written to.

    Attributes:
        buffers: ids of the tensors that can be a running mean.
        found: the averages so far, by the id of the running mean.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.buffers = {id(buffer) for buffer in model.buffers()}
        self.found: dict[int, _Average] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Calls the function, a batch normalisation of the model in training mode."""
        names = _ARGUMENTS.get(func)
        if names is None:
            return func(*args, **(kwargs or {}))
        given: dict[str, Any] = dict(zip(names, args, strict=False)) | dict(kwargs or {})
        mean: Any = given.get("running_mean")
        var: Any = given.get("running_var")
        if id(mean) not in self.buffers or id(var) not in self.buffers:
            return func(*args, **(kwargs or {}))
        if given["input"].numel() <= given["input"].shape[1]:
            shape = list(given["input"].shape)
            raise InputError(f"a BatchNorm sees one value per channel (shape {shape}), which has no variance", "Pass larger batches")
        measured = (torch.zeros_like(mean), torch.ones_like(var))
        given |= {"running_mean": measured[0], "running_var": measured[1], "training": True, "momentum": 1.0}
        output = func(**given)
        if id(mean) not in self.found:
            self.found[id(mean)] = _Average(mean, var)
        self.found[id(mean)].add(*measured)
        return output

    @torch.no_grad()
    def write(self, model: nn.Module) -> None:
        """Puts all averages into the model, or raises InputError and leaves it alone if one is not finite."""
        names = {id(buffer): name for name, buffer in model.named_buffers()}
        broken = [names[key] for key, average in self.found.items() if not average.finite()]
        if broken:
            what = f"the batches lead to statistics that are not finite, first in {broken[0]!r}"
            raise InputError(what, "Look for NaN, infinity or overflow in the batches and in the layers before it")
        for average in self.found.values():
            average.write()
        for module in model.modules():
            average_of = self.found.get(id(module.running_mean)) if isinstance(module, BatchNorm) else None
            if average_of is not None and module.momentum is None and isinstance(module.num_batches_tracked, Tensor):
                module.num_batches_tracked.fill_(average_of.calls)


def _precise(tensor: Tensor) -> torch.dtype:
    """Returns the type to average in: the tensor's own, but never less than single precision."""
    return torch.promote_types(tensor.dtype, torch.float32)
