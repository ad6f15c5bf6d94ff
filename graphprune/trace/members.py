"""What a model is made of, gathered in one walk: its modules, parameters and buffers, by all their names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from graphprune.torch_private import own_buffers, own_modules, own_parameters

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Members:
    """The modules and tensors of a model. PyTorch's own iterators walk through the whole model for each kind of them.

    Attributes:
        modules: (qualified name, module), in the order of `named_modules`; a module that stands in several places under each name.
        parameters: (qualified name, parameter), likewise.
        buffers: (qualified name, buffer), likewise.
    """

    modules: list[tuple[str, nn.Module]]
    parameters: list[tuple[str, Tensor]]
    buffers: list[tuple[str, Tensor]]

    @staticmethod
    def of(model: nn.Module) -> Members:
        """Walks through a model."""
        modules: list[tuple[str, nn.Module]] = []
        _gather(model, "", modules)
        parameters: list[tuple[str, Tensor]] = []
        buffers: list[tuple[str, Tensor]] = []
        for path, module in modules:
            prefix = f"{path}." if path else ""
            for held, found in ((own_parameters(module), parameters), (own_buffers(module), buffers)):
                if held:
                    found += [(prefix + name, tensor) for name, tensor in held.items() if tensor is not None]
        return Members(modules, parameters, buffers)

    @cached_property
    def tensors(self) -> list[tuple[str, Tensor]]:
        """Parameters, then buffers."""
        return [*self.parameters, *self.buffers]

    @cached_property
    def first_names(self) -> dict[str, nn.Module]:
        """First name -> module, every module once."""
        seen: set[int] = set()
        first: dict[str, nn.Module] = {}
        for name, module in self.modules:
            if id(module) not in seen:
                seen.add(id(module))
                first[name] = module
        return first

    @property
    def distinct(self) -> list[nn.Module]:
        """Every module once."""
        return list(self.first_names.values())


def _gather(module: nn.Module, path: str, found: list[tuple[str, nn.Module]]) -> None:
    """Appends a module and all inside it, as `named_modules(remove_duplicate=False)` yields them."""
    found.append((path, module))
    for name, child in own_modules(module).items():
        if child is not None:
            _gather(child, f"{path}.{name}" if path else name, found)
