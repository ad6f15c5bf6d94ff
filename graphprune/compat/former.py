"""What the pruners of the first version have in common: how they are called, and the files that they write."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from graphprune.compat.shapes import CallShape
from graphprune.errors import ConfigError, FileError
from graphprune.export import export_onnx
from graphprune.masks.channels import Masks
from graphprune.masks.elements import ElementMasks
from graphprune.runs.atomic import atomic


class Exporting:
    """A pruner that writes its result."""

    def export_model(
        self,
        model_path: str | os.PathLike[str],
        mask_path: str | os.PathLike[str] | None = None,
        onnx_path: str | os.PathLike[str] | None = None,
        input_shape: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Writes the model that `compress` returned, with what has been trained since; what is masked is zeroed first.

        Each file is there as a whole or not at all.

        Args:
            model_path: of the state dict; `torch.load` reads it.
            mask_path: of the masks, layer -> parameter -> tensor of ones and zeros; `torch.load` reads it.
            onnx_path: of the model as ONNX.
            input_shape: of the inputs that are needed for that.
            device: of these inputs.

        Raises:
            ConfigError: there is nothing to write yet, or there is an onnx_path and no input_shape.
            ExportError: no ONNX file reproduces the model.
            FileError: a file cannot be written.
        """
        model, masks = self._finished()
        if onnx_path is not None and input_shape is None:
            raise ConfigError("export_model is given an onnx_path and no input_shape", "Pass input_shape=, such as (1, 3, 224, 224)")
        _write(model_path, model.state_dict())
        if mask_path is not None:
            own = {name.rpartition(".")[::2] for name, _ in model.named_parameters(remove_duplicate=False)}
            layers = dict.fromkeys(name.rpartition(".")[0] for name in (masks if isinstance(masks, ElementMasks) else masks.positions()))
            kept = {layer: masks.for_module(layer) for layer in layers}
            _write(mask_path, {a: {n: flags.float() for n, flags in kept[a].items() if (a, n) in own} for a in layers})
        if onnx_path is not None and input_shape is not None:
            inputs = torch.randn(tuple(input_shape), generator=torch.Generator().manual_seed(0))
            export_onnx(model, inputs.to(device or "cpu"), onnx_path)

    def _finished(self) -> tuple[nn.Module, Masks | ElementMasks]:
        """Returns the model, in which what is masked is zero, and its masks.

        Raises:
            ConfigError: there is nothing yet.
        """
        raise NotImplementedError


class Former(Exporting):
    """In front of a pruner of today: takes the arguments of then, and writes what `compress` returned.

    `compress` returns (model, masks), as everywhere in graphprune; the first version returned the model alone.

    Attributes:
        call_shape: how the pruner was called; the class's signature and what its docstring says of arguments are made from it.
    """

    call_shape: ClassVar[CallShape]
    __signature__: ClassVar[inspect.Signature | None]

    _exportable: tuple[nn.Module, Masks | ElementMasks] | None = None
    _smaller = False  # whether the model that compress returns has lost its channels physically

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "call_shape" in cls.__dict__:
            target = cls.__bases__[1]
            cls.__signature__ = cls.call_shape.annotated(target)
            cls.__doc__ = cls.call_shape.documented(cls.__doc__ or "", target)
        elif "__init__" in cls.__dict__:  # a class of the user's, whose signature is its own
            cls.__signature__ = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        init: Any = super().__init__
        init(**self.call_shape.translated(type(self).__name__, arguments, options))

    def compress(self) -> Any:
        """Returns (the model, the masks); see the pruner of that name in `graphprune`."""
        pruner: Any = super()
        self._exportable = pruner.compress()
        return self._exportable

    def _finished(self) -> tuple[nn.Module, Masks | ElementMasks]:
        if self._exportable is None:
            raise ConfigError(f"{type(self).__name__} has nothing to export yet", "Call pruner.compress() first")
        model, masks = self._exportable
        if not self._smaller:
            masks.apply(model)
        return model, masks


def _write(path: str | os.PathLike[str], tensors: Mapping[str, Any]) -> None:
    try:
        with atomic(path) as temporary:
            torch.save(tensors, temporary)
    except (OSError, RuntimeError) as error:
        raise FileError(f"cannot write {os.fspath(path)!r}: {error}", "Choose a folder that can be written to") from error
