"""The contexts in which a forward pass is recorded: below autograd, attention whole, module paths known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import nn

from graphprune.torch_private import AutoDispatchBelowAutograd, DisableTorchFunction, TorchDispatchMode, add_hooks
from graphprune.trace.inputs import tensors_in
from graphprune.trace.threads import Asked, patched


@contextmanager
def module_paths(
    modules: Iterable[nn.Module], paths: Mapping[int, str], entered: Callable[[str], None], left: Callable[[str], None]
) -> Iterator[None]:
    """Says which modules run inside the block, by their paths; also when a module raises. Other threads may run them unnoticed.

    Args:
        modules: those to watch.
        paths: from ids of modules to their paths.
        entered: is called with the path of a module before it runs, and before its own hooks do.
        left: likewise afterwards.
    """
    me = get_ident()
    depth = 0

    def enter(module: nn.Module, _args: object) -> None:
        nonlocal depth
        if get_ident() == me and id(module) in paths:
            depth += 1
            entered(paths[id(module)])

    def leave(module: nn.Module, _args: object, _output: object) -> None:
        nonlocal depth
        if depth and get_ident() == me and id(module) in paths:
            depth -= 1
            left(paths[id(module)])

    remove = add_hooks(modules, enter, leave)
    try:
        yield
    finally:
        remove()


@contextmanager
def below_autograd() -> Iterator[None]:
    """Lets operators reach the recorder before PyTorch decomposes them, which it does on the way through autograd.

    `torch.inference_mode` has that effect too, but its tensors could never be trained with if a cache outside the model kept one.
    """
    with torch.no_grad(), AutoDispatchBelowAutograd():
        yield


@contextmanager
def whole_attention() -> Iterator[None]:
    """Turns off the fused inference path of `nn.MultiheadAttention`, which hides the operators that it runs, for this thread."""
    with patched(torch.backends.mha, "get_fastpath_enabled", lambda _: False, _fastpath):
        yield


def _fastpath(original: Callable[[], bool], asked: Asked) -> Callable[[], bool]:
    """Returns what says whether the fused path may be taken: of a form that another thread may script meanwhile."""

    def get_fastpath_enabled() -> bool:
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]  # is public, and documented
            return get_ident() not in asked and original()
        return True

    return get_fastpath_enabled


@contextmanager
def values_taken(note: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Calls `note` with every tensor whose values Python takes out as a whole; what it returns is taken instead.

    `tolist` and `numpy` read memory, so that no operator tells of it. What other threads take passes by.
    """

    def read(method: Callable[..., object], tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
        taken = note(tensor)
        with DisableTorchFunction():  # (a mode would call what stands here in the method's place again)
            return method(taken, *args, **kwargs)

    with patched(torch.Tensor, "tolist", read), patched(torch.Tensor, "numpy", read):
        yield


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
