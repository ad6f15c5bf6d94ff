"""The speedup of the first two versions: from a file of masks, on the user's own model."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphprune.errors import ConfigError, FileError, MaskError
from graphprune.groups.build import trace
from graphprune.masks.channels import Masks
from graphprune.masks.elements import ElementMasks
from graphprune.speedup.speedup import speedup

if TYPE_CHECKING:
    from graphprune.speedup.report import SpeedupReport

_RULE = "Register a rule for the operator, see graphprune/ops/README.md"


class ModelSpeedup:
    """Removes from a model, in place, the channels that masks remove entirely; other masked weights become zero.

    Args:
        model: shrunk by `speedup_model`; its class stays.
        dummy_input: what it is run on.
        masks_file: what `export_model` wrote as its masks (NNI's files are of the same form), its contents, or masks as `compress` returns.
        map_location: where tensors of the file go.
        batch_dim: not needed, as what is a batch follows from the operators.
        confidence: not needed, nor `batch_size`: one run on the dummy input is enough.
        customized_replace_func: none.
        options: none but `batch_size`.

    Raises:
        ConfigError: a layer is to be replaced by a function, or an option has no meaning here.
        FileError: the file cannot be read.
        MaskError: the masks are not of this model.
    """

    def __init__(
        self,
        model: nn.Module,
        dummy_input: object,
        masks_file: str | os.PathLike[str] | Mapping[str, Any],
        map_location: Any = None,
        batch_dim: int = 0,
        confidence: int = 8,
        customized_replace_func: Any = None,
        **options: Any,
    ) -> None:
        del batch_dim, confidence
        given = {"customized_replace_func": customized_replace_func, **options}
        for name, value in given.items():
            if value is not None and name != "batch_size":
                raise ConfigError(f"ModelSpeedup has no use for {name}=", _RULE)
        self.model = model
        found = masks_file if isinstance(masks_file, Mapping) else _read(masks_file, map_location)
        self._masks = found if isinstance(found, Masks) else found if isinstance(found, ElementMasks) else _of_layers(model, found)
        self._inputs = dummy_input

    def speedup_model(self) -> SpeedupReport:
        """Shrinks the model and returns the report of `graphprune.speedup`; where that fails, the model is as it was.

        Raises:
            InputError: the model cannot run on the dummy input.
            MaskError: the masks are not of this model.
            VerificationError: the model's own code cannot state the sizes that are left.
        """
        masks = self._masks
        if isinstance(masks, Masks):
            return speedup(self.model, masks, self._inputs, inplace=True, result="module")[1]
        channels = masks.channels(trace(self.model, self._inputs))
        before = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        masks.apply(self.model)
        try:
            return speedup(self.model, channels, inplace=True, result="module")[1]
        except BaseException:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(before[name])
            raise


def _read(path: str | os.PathLike[str], map_location: Any) -> Mapping[str, Any]:
    """Returns the contents of a file of masks."""
    try:
        found = torch.load(path, map_location=map_location, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise FileError(f"cannot read masks from {os.fspath(path)!r}: {reason}", "Give a file that export_model wrote") from error
    if not isinstance(found, Mapping):
        raise FileError(f"{os.fspath(path)!r} holds no masks", "Give a file that export_model wrote")
    return found


def _of_layers(model: nn.Module, found: Mapping[str, Any]) -> ElementMasks:
    """Returns the masks of layer -> parameter -> ones and zeros; parameters without a mask are None."""
    kept: dict[str, Tensor] = {}
    for layer, own in found.items():
        if not isinstance(own, Mapping):
            raise MaskError(f"the mask of {layer!r} is a {type(own).__name__}", "Give layer -> {'weight': ..., 'bias': ...}")
        kept |= {f"{layer}.{name}" if layer else name: mask.bool() for name, mask in own.items() if isinstance(mask, Tensor)}
    return ElementMasks(model, kept)
