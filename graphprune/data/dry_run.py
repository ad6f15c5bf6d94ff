"""Running a user's training loop so that it shows its batches and its losses, and trains nothing.

The trainer is given a copy of the model with parameters of its own. The copy is in eval mode, and what it computes when it is called is
computed with the original's parameters, so that autograd graphs reach these. The criterion hands every loss on and gives the trainer
one of the same value whose gradients are zero. Whatever the trainer does to the model, to the optimizer or in backward passes, it does to
things that are thrown away.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from threading import get_ident
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from graphprune.errors import GraphPruneError, InputError
from graphprune.masks.copying import copied
from graphprune.torch_private import forward_hooks
from graphprune.trace.inputs import Inputs

_USE = "Let trainer(model, optimizer, criterion) call"


class EndOfRehearsal(BaseException):
    """Ends the trainer once enough was seen; no Exception, as trainers may catch these."""


class DryRun:
    """One run of a trainer that trains nothing.

    Args:
        model: the user's, in eval mode; its `.grad` fields are as they were afterwards (the rest is the caller's, see `preserve_state`).
        called: is given the inputs of every call of the model, before it runs.
        lost: is given every loss that has a gradient, or None where losses do not matter.
        limit: end the trainer after so many batches (calls of the model, or calls with a loss).
    """

    def __init__(
        self, model: nn.Module, called: Callable[[Inputs], None], lost: Callable[[Any], None] | None, limit: int | None = None
    ) -> None:
        """Copies the model twice: once with parameters of its own, once with the original's."""
        memo: dict[int, Any] = {}
        self._model = model
        self._handed = copied(model, memo)
        self._memo = memo
        shared = [*model.parameters(), *(b for b in model.buffers() if b.requires_grad)]
        self._stage = copied(model, {id(t): t for t in shared})
        self._called = called
        self._lost = lost
        self._limit = limit
        self._looking = False
        self._open = False  # whether the last call of the model has had no loss yet
        self._anchor = torch.zeros((), requires_grad=True)
        self.calls = 0
        self.batches = 0
        self.asked = 0
        _freeze(self._handed)

    def run(self, trainer: Callable[..., Any], optimizer: Any, criterion: Any) -> None:
        """Runs the trainer.

        Raises:
            InputError: it fails, never calls the model that it is given, or, where losses matter, never calls the criterion.
        """
        handed = self._handed
        for hooks in forward_hooks(handed):  # the stage runs its own
            hooks.clear()
        handed.forward = functools.update_wrapper(functools.partial(self._forward), self._model.forward)
        with self._original_untouched():
            try:
                trainer(handed, stand_in(optimizer, handed, self._memo), self._watched(criterion))
            except EndOfRehearsal:
                pass
            except GraphPruneError:
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
                what = f"the trainer fails on a copy of {type(self._model).__name__} in eval mode: {reason}"
                raise InputError(what, "Pass a trainer(model, optimizer, criterion) that runs, or pass data= instead") from error
        self._check()

    def _check(self) -> None:
        if not self.calls:
            raise InputError("the trainer never calls the model that it is given", f"{_USE} model(...) on its batches")
        if self._lost is not None and not self.batches:
            calls = "only calls the criterion where nothing has a gradient" if self.asked else "never calls the criterion that it is given"
            fix = f"{_USE} criterion(...) on the model's output, or pass data= and loss="
            raise InputError(f"the trainer {calls}, so there is no loss", fix)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the handed model computes."""
        if self._limit is not None and self.batches >= self._limit:
            raise EndOfRehearsal
        self.calls += 1
        self._open = True
        self._looking = True
        try:
            with _full_precision():
                self._called(Inputs(args, kwargs))
        finally:
            self._looking = False
        if self._lost is None:
            self.batches += 1
            if self.batches == self._limit:
                raise EndOfRehearsal
        return self._stage(*args, **kwargs)

    def _watched(self, criterion: Any) -> Any:
        """Returns the criterion with an ear on it."""
        if not callable(criterion):
            return criterion
        if isinstance(criterion, nn.Module):
            criterion = copied(criterion, self._memo)
            criterion.forward = functools.update_wrapper(functools.partial(self._heard, criterion.forward), criterion.forward)
            return criterion
        return functools.update_wrapper(functools.partial(self._heard, criterion), criterion)

    def _heard(self, criterion: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        value = criterion(*args, **kwargs)
        self.asked += 1
        if isinstance(value, Tensor) and not value.requires_grad:
            return value
        if self._lost is not None:
            self._lost(value)
            self.batches += self._open
            self._open = False
        if not isinstance(value, Tensor):
            return value
        function: Any = _WithoutEffect.apply
        return function(value.detach(), self._anchor, *(p for p in self._handed.parameters() if p.requires_grad))

    @contextlib.contextmanager
    def _original_untouched(self) -> Iterator[None]:
        """Keeps the trainer from running the original, and puts its gradients back."""
        me = get_ident()
        gradients = [(p, p.grad) for p in self._model.parameters()]
        for p, _ in gradients:
            p.grad = None

        def refuse(_module: nn.Module, _args: Any) -> None:
            if not self._looking and get_ident() == me:  # other threads may use the model for what they like
                raise InputError("the trainer calls a model other than the one that it is given", f"{_USE} its argument model")

        takes_hooks = not isinstance(self._model, torch.jit.ScriptModule)
        handle = self._model.register_forward_pre_hook(refuse) if takes_hooks else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()
            for p, gradient in gradients:
                p.grad = gradient


def stand_in(optimizer: Any, model: nn.Module, memo: dict[int, Any]) -> Any:
    """Returns an optimizer for a copy of a model whose step takes none: a closure given to it is run, nothing moves.

    Args:
        optimizer: bound to the original model, a function from parameters to an optimizer, or None.
        model: the copy.
        memo: id -> what stands in its place, as `copy.deepcopy` left it behind when the model was copied.
    """
    if optimizer is None:
        made: Any = SGD(model.parameters(), lr=1e-3, momentum=0.9)
    elif callable(optimizer) and not isinstance(optimizer, Optimizer) and not hasattr(optimizer, "param_groups"):
        made = optimizer(model.parameters())
    else:
        made = copy.deepcopy(optimizer, memo)
    made.step = MethodType(_standing_still, made)
    return made


def _standing_still(_optimizer: Any, closure: Callable[[], Any] | None = None, *_: Any, **__: Any) -> Any:
    """In place of an optimizer's step."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _freeze(model: nn.Module) -> None:
    """Puts a model into eval mode for good."""
    for module in model.modules():
        module.training = False
        module.train = functools.partial(_stays, module)  # type: ignore[method-assign]


def _stays(module: nn.Module, _mode: bool = True) -> nn.Module:  # noqa: FBT001, FBT002 (the signature of nn.Module.train)
    """In place of a module's train."""
    return module


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Turns autocast off, which a trainer may have turned on around its call of the model."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class _WithoutEffect(torch.autograd.Function):
    """A number whose gradients with respect to the given tensors are zero."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors: Tensor) -> Tensor:
        """Returns the value."""
        ctx.like = tensors
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        """Returns zeros."""
        return (None, *(torch.zeros_like(t) for t in ctx.like))
