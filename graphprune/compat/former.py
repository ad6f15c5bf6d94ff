"""What the pruners of the first version have in common: how they called a trainer, and the files that they wrote."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from graphprune.errors import ConfigError, FileError
from graphprune.export import export_onnx
from graphprune.masks.channels import Masks
from graphprune.masks.elements import ElementMasks
from graphprune.runs.atomic import atomic

_EPOCH = ("epoch", "callback")


class Former:
    """In front of a pruner: `compress` remembers what it returned, and `export_model` writes it.

    `compress` returns (model, masks), as everywhere in graphprune; the first version returned the model alone.
    """

    _exportable: tuple[nn.Module, Masks | ElementMasks] | None = None
    _smaller = False  # whether the model that compress returns has lost its channels physically

    def compress(self) -> Any:
        """Returns (the model, the masks); see the pruner of that name in `graphprune`."""
        pruner: Any = super()
        self._exportable = pruner.compress()
        return self._exportable

    def export_model(
        self,
        model_path: str | os.PathLike[str],
        mask_path: str | os.PathLike[str] | None = None,
        onnx_path: str | os.PathLike[str] | None = None,
        input_shape: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Writes the model that `compress` returned, with what has been trained since; what is masked is zeroed first.

        Args:
            model_path: of the state dict; `torch.load` reads it.
            mask_path: of the masks, layer -> parameter -> tensor of ones and zeros; `torch.load` reads it.
            onnx_path: of the model as ONNX.
            input_shape: of the inputs that are needed for that.
            device: of these inputs.

        Raises:
            ConfigError: `compress` has not been called, or there is an onnx_path and no input_shape.
            ExportError: no ONNX file reproduces the model.
            FileError: a file cannot be written.
        """
        if self._exportable is None:
            raise ConfigError(f"{type(self).__name__} has nothing to export yet", "Call pruner.compress() first")
        model, masks = self._exportable
        if not self._smaller:
            masks.apply(model)
        exported(model, masks, model_path, mask_path, onnx_path, input_shape, device)


def exported(
    model: nn.Module,
    masks: Masks | ElementMasks,
    model_path: str | os.PathLike[str],
    mask_path: str | os.PathLike[str] | None = None,
    onnx_path: str | os.PathLike[str] | None = None,
    input_shape: Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Writes a model, its masks and its ONNX file, see `Former.export_model`; each file is there as a whole or not at all.

    Raises:
        ConfigError: there is an onnx_path and no input_shape.
        ExportError: no ONNX file reproduces the model.
        FileError: a file cannot be written.
    """
    if onnx_path is not None and input_shape is None:
        raise ConfigError("export_model is given an onnx_path and no input_shape", "Pass input_shape=, such as (1, 3, 224, 224)")
    _written(model_path, model.state_dict())
    if mask_path is not None:
        own = {name.rpartition(".")[::2] for name, _ in model.named_parameters(remove_duplicate=False)}
        layers = dict.fromkeys(name.rpartition(".")[0] for name in (masks if isinstance(masks, ElementMasks) else masks.positions()))
        kept = {layer: masks.for_module(layer) for layer in layers}
        _written(mask_path, {a: {n: flags.float() for n, flags in kept[a].items() if (a, n) in own} for a in layers})
    if onnx_path is not None and input_shape is not None:
        inputs = torch.randn(tuple(input_shape), generator=torch.Generator().manual_seed(0))
        export_onnx(model, inputs.to(device or "cpu"), onnx_path)


def _written(path: str | os.PathLike[str], tensors: Mapping[str, Any]) -> None:
    try:
        with atomic(path) as temporary:
            torch.save(tensors, temporary)
    except (OSError, RuntimeError) as error:
        raise FileError(f"cannot write {os.fspath(path)!r}: {error}", "Choose a folder that can be written to") from error


def epoch_trainer(trainer: Callable[..., Any] | None, epochs: int | None = None) -> Callable[..., Any] | None:
    """Returns a trainer of that time as a trainer(model, optimizer, criterion).

    It may take the number of the epoch, `epoch`, and a `callback` to call between backward and step: that does nothing here, as
    penalties are added when the optimizer steps.

    Args:
        trainer: takes the model first, and then `optimizer`, `criterion`, and perhaps `epoch` and `callback`.
        epochs: after so many, numbers begin with 0 again.
    """
    if not callable(trainer):
        return trainer
    try:
        known = inspect.signature(trainer).parameters
    except ValueError:  # of some built-in functions, whose names nobody knows
        return trainer
    needed = [name for name in _EPOCH if name in known and (name == "epoch" or known[name].default is inspect.Parameter.empty)]
    named = "optimizer" in known and "criterion" in known
    if not needed and (not named or list(known)[1:3] == ["optimizer", "criterion"]):
        return trainer
    done = 0

    def trains(model: nn.Module, optimizer: Any, criterion: Any) -> Any:
        nonlocal done
        values = {"epoch": done if epochs is None else done % epochs, "callback": _nothing}
        given = {"optimizer": optimizer, "criterion": criterion} if named else {}
        made = trainer(model, *(() if named else (optimizer, criterion)), **given, **{name: values[name] for name in needed})
        done += 1  # epochs that are broken off, when only the first batch is wanted, do not count
        return made

    return trains


def _nothing() -> None:
    """What trainers are given to call between backward and step."""


def today(options: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """Returns keyword arguments by their names of today: dummy_input is example_inputs, and what `names` says."""
    return {{"dummy_input": "example_inputs", **names}.get(name, name): value for name, value in options.items()}
