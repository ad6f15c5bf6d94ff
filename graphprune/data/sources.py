"""Where data comes from that criteria look at: batches, or the user's own training loop, watched without being allowed to train.

Both run the model in eval mode (BatchNorm frozen, no dropout) and leave no trace: afterwards the state dict, the `.grad` fields, the
training flags and the random number generators of PyTorch, NumPy and Python are as they were, bit for bit. Nothing is stored: every batch
is handed on as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from graphprune.data.dry_run import DryRun
from graphprune.errors import ConfigError, InputError
from graphprune.trace.contexts import whole_attention
from graphprune.trace.inputs import Inputs, normalise, preserve_state, run
from graphprune.trace.threads import generators_kept

_BATCHES = "Pass data=, an iterable of batches such as a DataLoader of (inputs, targets)"
_LOSS = "Pass loss=, a function of output and target such as torch.nn.functional.cross_entropy"
_TRAINING = "trainer=, a function trainer(model, optimizer, criterion), with its optimizer= and criterion="


class Source(Protocol):
    """Batches to look at, each given to `visit` as it comes."""

    def inputs(self, model: nn.Module, visit: Callable[[Inputs], None]) -> int:
        """Calls `visit` with the inputs of every batch, model in eval mode and without gradients; returns how many samples there were."""
        ...

    def losses(self, model: nn.Module, visit: Callable[[Tensor], None]) -> int:
        """Calls `visit` with the loss of every batch, whose autograd graph reaches the model's parameters; returns how many samples."""
        ...


@dataclass(frozen=True, eq=False)
class Loader:
    """Batches from an iterable.

    A tuple or list of two is (inputs, target), and its loss is loss(output, target). A dict holds keyword arguments of the model, and its
    loss is loss(output, batch). Anything else is the inputs alone.

    Attributes:
        batches: what is iterated over once per call.
        loss: from a batch's output and target to one number.
        limit: use so many batches and no more.
    """

    batches: Iterable[Any]
    loss: Callable[..., Any] | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        """Refuses what is not several batches, and an impossible limit.

        Raises:
            ConfigError: the batches are one tensor or dict, or nothing that can be iterated over, or the limit is below 1.
        """
        if isinstance(self.batches, (Tensor, Mapping)) or not isinstance(self.batches, Iterable):
            what = f"data is a {type(self.batches).__name__}, not several batches"
            raise ConfigError(what, "Pass a list of batches or a DataLoader; a single batch as [batch]")
        _check_limit(self.limit)

    def inputs(self, model: nn.Module, visit: Callable[[Inputs], None]) -> int:
        """Calls `visit` with the inputs of every batch, model in eval mode and without gradients; returns how many samples there were.

        Raises:
            InputError: there are no batches, or the model cannot run on one.
        """
        samples = 0
        with preserve_state(model), generators_kept(), _numbered() as position:
            for batch in self._taken(position):
                inputs, _ = split_batch(batch)
                visit(inputs)
                samples += _samples(inputs)
        return samples

    def losses(self, model: nn.Module, visit: Callable[[Tensor], None]) -> int:
        """Calls `visit` with the loss of every batch, whose autograd graph reaches the model's parameters; returns how many samples.

        Raises:
            ConfigError: there is no loss.
            InputError: there are no batches, one has no target, the model cannot run on one, or a loss is not one number with a gradient.
        """
        if self.loss is None:
            raise ConfigError("the data has no loss, and gradients are needed", _LOSS)
        samples = 0
        with preserve_state(model), generators_kept(), whole_attention(), torch.enable_grad(), _numbered() as position:
            for batch in self._taken(position):
                samples += self._one_loss(model, batch, visit)
        return samples

    def _one_loss(self, model: nn.Module, batch: Any, visit: Callable[[Tensor], None]) -> int:
        """Visits the loss of one batch; nothing of its autograd graph outlives the call."""
        inputs, target = split_batch(batch)
        if target is None:
            what = f"the batch ({inputs}) has no target to compute a loss with"
            raise InputError(what, "Let the data yield (inputs, target), or dicts of keyword arguments with loss(output, batch)")
        output = run(model, inputs.copied())
        assert self.loss is not None  # noqa: S101 (checked by the caller)
        try:
            loss = self.loss(output, target)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(".")
            fix = "Pass a loss= that takes the model's output and the target"
            raise InputError(f"the loss cannot be computed: {reason}", fix) from error
        visit(checked_loss(loss))
        return _samples(inputs)

    def _taken(self, position: list[int]) -> Iterator[Any]:
        """Yields the batches up to the limit, and notes the number of each.

        Raises:
            InputError: there are none.
        """
        for position[0], batch in enumerate(islice(self.batches, self.limit), start=1):
            yield batch
        if not position[0]:
            raise InputError("the data has no batches", "Pass at least one; an iterator that was used up has none left")


@dataclass(frozen=True, eq=False)
class Trainer:
    """Batches from the user's own `trainer(model, optimizer, criterion)`.

    The trainer is run on a copy in eval mode whose `train` does nothing, with an optimizer whose `step` does nothing. Inputs are taken
    where it calls the model; losses where it calls the criterion that it is given (each call counts as one loss; calls whose result has no
    gradient, as in validation, are passed over).

    Attributes:
        trainer: the user's function.
        optimizer: one bound to the model, a function from parameters to one, or None where the trainer does not care.
        criterion: the user's loss, handed to the trainer.
        limit: end the trainer after so many batches.
    """

    trainer: Callable[..., Any]
    optimizer: Any = None
    criterion: Any = None
    limit: int | None = None

    def __post_init__(self) -> None:
        """Refuses a trainer that cannot be called, and an impossible limit.

        Raises:
            ConfigError: one of these.
        """
        if not callable(self.trainer):
            raise ConfigError(f"the trainer is a {type(self.trainer).__name__}", f"Pass {_TRAINING}")
        _check_limit(self.limit)

    def inputs(self, model: nn.Module, visit: Callable[[Inputs], None]) -> int:
        """Calls `visit` with the inputs of every call of the model; returns how many samples there were.

        Raises:
            InputError: the trainer fails, or never calls the model that it is given.
        """
        samples = 0

        def called(inputs: Inputs) -> None:
            nonlocal samples
            visit(inputs)
            samples += _samples(inputs)

        self._rehearsed(model, called, None)
        return samples

    def losses(self, model: nn.Module, visit: Callable[[Tensor], None]) -> int:
        """Calls `visit` with every loss, whose autograd graph reaches the model's parameters; returns how many samples there were.

        Raises:
            ConfigError: there is no criterion.
            InputError: the trainer fails, never calls the model or the criterion that it is given, or a loss is not one number.
        """
        if self.criterion is None:
            raise ConfigError("the trainer has no criterion, and gradients of its loss are needed", "Pass criterion=, the trainer's loss")
        samples = 0
        last: Inputs | None = None

        def called(inputs: Inputs) -> None:
            nonlocal last
            last = inputs

        def lost(value: Any) -> None:
            nonlocal samples, last
            visit(checked_loss(value))
            samples += 0 if last is None else _samples(last)
            last = None

        self._rehearsed(model, called, lost)
        return samples

    def _rehearsed(self, model: nn.Module, called: Callable[[Inputs], None], lost: Callable[[Any], None] | None) -> None:
        with preserve_state(model), generators_kept(), whole_attention(), torch.enable_grad():
            DryRun(model, called, lost, self.limit).run(self.trainer, self.optimizer, self.criterion)


def source(
    *,
    data: Any = None,
    loss: Callable[..., Any] | None = None,
    trainer: Callable[..., Any] | None = None,
    optimizer: Any = None,
    criterion: Any = None,
    limit: int | None = None,
    who: str = "the criterion",
) -> Source:
    """Returns where data comes from, of what a user passed.

    Args:
        data: an iterable of batches, see `Loader`, or a source as it is.
        loss: of a batch's output and target; `criterion` stands in for it.
        trainer: in place of data: `trainer(model, optimizer, criterion)`, see `Trainer`.
        optimizer: the trainer's.
        criterion: the trainer's.
        limit: use so many batches and no more.
        who: what needs the data, as messages name it.

    Raises:
        ConfigError: there is neither data nor a trainer, or both, or one of them is unusable.
    """
    if data is not None and trainer is not None:
        raise ConfigError(f"{who} has both data and a trainer to look at", "Pass one of them")
    if isinstance(data, (Loader, Trainer)):
        return data
    if data is not None:
        return Loader(data, loss if loss is not None else criterion, limit)
    if trainer is not None:
        return Trainer(trainer, optimizer, criterion if criterion is not None else loss, limit)
    raise ConfigError(f"{who} looks at data, and there is none", f"{_BATCHES}, or {_TRAINING}")


def split_batch(batch: Any) -> tuple[Inputs, Any]:
    """Returns the inputs of a batch and its target: the batch itself where it is a dict, None where there is none.

    Raises:
        InputError: the inputs are of no known form.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        first = batch[0]
        return normalise(tuple(first) if isinstance(first, list) else first), batch[1]
    if isinstance(batch, Mapping):
        return normalise(batch), batch
    return normalise(tuple(batch) if isinstance(batch, list) else batch), None


def checked_loss(value: Any) -> Tensor:
    """Returns a loss, which must be one number that depends on the model.

    Raises:
        InputError: it is not.
    """
    if not isinstance(value, Tensor) or value.numel() != 1:
        found = f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise InputError(f"the loss is {found}, not one number", "Pass a loss that returns a scalar tensor, such as reduction='mean'")
    if not value.requires_grad:
        raise InputError("the loss does not depend on the model's parameters", "Pass a loss that is computed from the output, not detached")
    return value.reshape(())


def _samples(inputs: Inputs) -> int:
    return 1 if inputs.batch is None else inputs.batch


def _check_limit(limit: int | None) -> None:
    given: object = limit
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
        raise ConfigError(f"the number of batches to use is {limit!r}", "Pass a whole number of at least 1, or None for all batches")


@contextmanager
def _numbered() -> Iterator[list[int]]:
    """Says in errors which batch they are about; the block keeps its number in the list."""
    position = [0]
    try:
        yield position
    except InputError as error:
        if not position[0]:
            raise
        raise InputError(f"batch {position[0]} cannot be used: {error.what}", error.fix) from error
