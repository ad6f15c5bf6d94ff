"""Everything that training changes in a module, as plain values and tensors for a run; put back in place, bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphprune.torch_private import own_buffers
from graphprune.training.packing import Packer, Unpacker


class Kept:
    """A module whose parameters, buffers (those that state dicts leave out, too), extra states and frozen parameters are kept.

    Parameters go by the names that they have now, whatever parametrizations are registered later.

    Args:
        module: saved, and filled in place.
        prefix: begins the names of its tensors.

    Attributes:
        parameters: by name, each once.
    """

    def __init__(self, module: nn.Module, prefix: str) -> None:
        self.parameters = dict(module.named_parameters())
        self._module, self._prefix = module, prefix

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Returns plain values and tensors.

        Raises:
            ConfigError: a module has an extra state that cannot be kept.
        """
        packer = Packer(f"{self._prefix}extra/", type(self._module).__name__)
        extra = {name: packer.pack(part.get_extra_state(), f"the extra state of {name!r}") for name, part in self._with_extra().items()}
        buffers = {f"{self._prefix}buffer/{name}": buffer for name, buffer in self._module.named_buffers()}
        tensors = {f"{self._prefix}parameter/{name}": parameter for name, parameter in self.parameters.items()}
        trained = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        return {"extra": extra, "trained": trained}, {**tensors, **buffers, **packer.tensors}

    def restore(self, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Fills the module."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"{self._prefix}parameter/{name}"])
                parameter.requires_grad_(name in plain["trained"])
            for name in (n.removeprefix(f"{self._prefix}buffer/") for n in tensors if n.startswith(f"{self._prefix}buffer/")):
                path, _, attribute = name.rpartition(".")
                _put(self._module.get_submodule(path), attribute, tensors[f"{self._prefix}buffer/{name}"])
        unpacker = Unpacker(tensors)
        for name, part in self._with_extra().items():
            part.set_extra_state(unpacker.unpack(plain["extra"][name]))

    def _with_extra(self) -> dict[str, nn.Module]:
        own = nn.Module.get_extra_state
        return {name: part for name, part in self._module.named_modules() if type(part).get_extra_state is not own}


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """Fills a buffer, or puts another in its place where it cannot be filled: training may have given it another shape."""
    now = own_buffers(module)[name]
    if now is None or now.shape != value.shape or now.dtype != value.dtype or 0 in now.stride():
        own_buffers(module)[name] = value.clone() if now is None else value.to(now.device, copy=True)
    else:
        now.copy_(value)
