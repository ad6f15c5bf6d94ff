"""The contexts in which a forward pass is recorded: below autograd, attention whole, module paths known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from graphprune.torch_private import AutoDispatchBelowAutograd, DisableTorchFunction, TorchDispatchMode
from graphprune.trace.inputs import tensors_in


@contextmanager
def module_paths(paths: Mapping[int, str], entered: Callable[[str], None], left: Callable[[str], None]) -> Iterator[None]:
    """Says which modules run inside the block, by their paths; `paths` maps ids of modules to them. Also when a module raises."""
    depth = 0

    def enter(module: nn.Module, _args: object) -> None:
        nonlocal depth
        if id(module) in paths:
            depth += 1
            entered(paths[id(module)])

    def leave(module: nn.Module, _args: object, _output: object) -> None:
        nonlocal depth
        if id(module) in paths and depth:
            depth -= 1
            left(paths[id(module)])

    handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def below_autograd() -> Iterator[None]:
    """Lets operators reach the recorder before PyTorch decomposes them, which it does on the way through autograd.

    `torch.inference_mode` has that effect too, but its tensors could never be trained with if a cache outside the model kept one.
    """
    with torch.no_grad(), AutoDispatchBelowAutograd():
        yield


@contextmanager
def whole_attention() -> Iterator[None]:
    """Turns off the fused inference path of `nn.MultiheadAttention`, which hides the operators that it runs."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def values_taken(note: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Calls `note` with every tensor whose values Python takes out as a whole; what it returns is taken instead.

    `tolist` and `numpy` read memory, so that no operator tells of it.
    """
    kind: Any = torch.Tensor
    saved = {name: (vars(kind).get(name), getattr(kind, name)) for name in ("tolist", "numpy")}

    def reading(method: Callable[..., object]) -> Callable[..., object]:
        def read(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
            taken = note(tensor)
            with DisableTorchFunction():  # (a mode would call what stands here in the method's place again)
                return method(taken, *args, **kwargs)

        return read

    try:
        for name, (_, method) in saved.items():
            setattr(kind, name, reading(method))
        yield
    finally:
        for name, (own, _) in saved.items():
            if own is None:
                delattr(kind, name)
            else:
                setattr(kind, name, own)


@contextmanager
def tensors_read() -> Iterator[set[int]]:
    """Gives a set that holds, when the block is left, the ids of all tensors that operators were given in it."""
    with _Reading() as reading:
        yield reading.read


class _Reading(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch left it without annotations
        self.read: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and notes what it was given."""
        self.read.update(map(id, tensors_in((args, kwargs))))
        return func(*args, **(kwargs or {}))
