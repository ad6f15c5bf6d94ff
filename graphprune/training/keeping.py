"""Keeping a model masked while somebody else trains it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from graphprune.masks.channels import Masks, dense
from graphprune.masks.elements import ElementMasks


class Keeper:
    """Zeroes what masks remove before every forward pass of a model, or of a layer of it, until it is released.

    Optimizers move masked weights (by momentum, by weight decay), which has no effect on what follows, as they are zero again before
    they are used. Zeroes are written past autograd, so that backward passes through earlier forward passes still work.

    Args:
        model: changed in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._masks: Masks | ElementMasks | None = None
        self._handles: list[RemovableHandle] = []

    def hold(self, masks: Masks | ElementMasks) -> None:
        """Applies masks and holds the model to them, in place of those before."""
        self.release()
        self._masks = masks
        masks.apply(self._model)
        gone = removed(dict(self._model.named_parameters(remove_duplicate=False)), masks)
        self._handles = [self._model.register_forward_pre_hook(_Zeroes(gone))]
        for path, module in self._model.named_modules():
            prefix = f"{path}." if path else ""
            own = {n[len(prefix) :]: t for n, t in gone.items() if path and n.startswith(prefix) and "." not in n[len(prefix) :]}
            if own:
                self._handles.append(module.register_forward_pre_hook(_Zeroes(own)))

    def release(self) -> None:
        """Takes the hooks off; what is masked is zero then."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._masks is not None:
            self._masks.apply(self._model)
        self._masks = None


@contextmanager
def held(model: nn.Module, masks: Masks | ElementMasks | None) -> Iterator[None]:
    """Holds a model to masks inside the block, in place; None holds it to nothing."""
    keeper = Keeper(model)
    if masks is not None:
        keeper.hold(masks)
    try:
        yield
    finally:
        keeper.release()


def removed(parameters: Mapping[str, Tensor], masks: Masks | ElementMasks) -> dict[str, Tensor]:
    """Returns the name of a parameter -> boolean tensor of its shape on its device, True = masked, for those that lose anything."""
    if isinstance(masks, ElementMasks):
        return {name: ~mask.to(parameters[name].device) for name, mask in masks.items()}
    found = {name: dims for name, dims in masks.positions().items() if name in parameters}
    return {name: ~dense(tuple(parameters[name].shape), dims).to(parameters[name].device) for name, dims in found.items()}


class _Zeroes:
    """A forward pre-hook that zeroes parameters of the module that it is called with; copies of the module keep theirs zero."""

    def __init__(self, gone: dict[str, Tensor]) -> None:
        self.gone = gone

    def __call__(self, module: nn.Module, _inputs: object) -> None:
        for name, gone in self.gone.items():
            weight = module.get_parameter(name).data
            if gone.device != weight.device:
                self.gone[name] = gone.to(weight.device)
            weight.masked_fill_(self.gone[name], 0)
