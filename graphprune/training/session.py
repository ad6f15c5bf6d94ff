"""Training with a penalty, on a copy: what pruners need that change the weights before they choose.

The user's training stays the user's: `trainer(model, optimizer, criterion)`, one epoch per call, is given a copy of the model and a copy
of the optimizer whose parameter groups and state refer to the copy's parameters. The objective becomes L(w) + P(w): the gradient of the
penalty P is added to what backward passes have left in `.grad`, right before `optimizer.step` takes it (so behind gradient clipping and
unscaling), once per step. Where step is given a closure, every evaluation of the closure has the penalty's gradient and value added,
as line searches need both.

Where several processes train (`torch.distributed`), each on its own batches, gradients are averaged over them before every step, as
DistributedDataParallel does (a trainer may use that too: the average of equal gradients is the same again), and running statistics are
averaged behind every epoch, so that all end with one and the same model. All must take the same number of steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphprune.data.distributed import all_reduce_sum, processes
from graphprune.data.sources import Loader, checked_loss, split_batch
from graphprune.errors import ConfigError, InputError
from graphprune.masks.copying import copied
from graphprune.trace.inputs import run

Trainer: TypeAlias = Callable[[nn.Module, Optimizer, Any], object]
MakeOptimizer: TypeAlias = Callable[[Iterable[nn.Parameter]], Optimizer]
Penalty: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]
"""From the penalised parameters by name to the penalty's value, a scalar with its autograd graph."""

_TRAINER = "trainer(model, optimizer, criterion) that trains for one epoch"


@dataclass(frozen=True, eq=False)
class Course:
    """How a model is trained, in the user's own words.

    Attributes:
        who: the pruner that trains, as messages name it.
        trainer: trains the model that it is given for one epoch, by the optimizer that it is given.
        optimizer: bound to the user's model, or a function from parameters to an optimizer.
        criterion: handed to the trainer; a module is copied together with the model, as it may have parameters of its own.
    """

    who: str
    trainer: Trainer
    optimizer: Optimizer | MakeOptimizer
    criterion: Any = None


def course(
    who: str, trainer: Trainer | None, optimizer: Optimizer | MakeOptimizer | None, criterion: Any, data: Any = None, loss: Any = None
) -> Course:
    """Returns how to train: by the user's trainer, or over plain data by a loop of zero_grad, forward, loss, backward and step.

    Args:
        who: the pruner that asks.
        trainer: `trainer(model, optimizer, criterion)`, one epoch per call.
        optimizer: an optimizer over the model's parameters, or a function from parameters to one.
        criterion: what the trainer is given as its criterion; with plain data, the loss if there is no other.
        data: in place of a trainer: batches that can be iterated over once per epoch, see `graphprune.data.sources.Loader`.
        loss: of plain data.

    Raises:
        ConfigError: there is nothing to train with, there are two things, or one is of the wrong kind.
    """
    refuse_evaluator(who, trainer)
    if optimizer is None:
        what = f"{who} trains, and has no optimizer"
        raise ConfigError(what, "Pass optimizer=, such as torch.optim.SGD(model.parameters(), lr=0.01), or training_epochs=0")
    if not callable(optimizer) and not isinstance(optimizer, Optimizer):
        what = f"the optimizer of {who} is a {type(optimizer).__name__}"
        raise ConfigError(what, "Pass a torch.optim.Optimizer, or a function from parameters to one")
    if (trainer is None) == (data is None):
        what = f"{who} has {'neither' if trainer is None else 'both'} a trainer {'nor' if trainer is None else 'and'} data to train with"
        raise ConfigError(what, f"Pass either a {_TRAINER}, or data= (batches of inputs and targets) and loss=")
    if trainer is not None:
        return Course(who, trainer, optimizer, criterion)
    loader = data if isinstance(data, Loader) else Loader(data)
    loss = next((one for one in (loader.loss, loss, criterion) if one is not None), None)
    if not callable(loss):
        what = f"{who} has data to train with and no loss"
        raise ConfigError(what, "Pass loss=, a function of output and target such as torch.nn.functional.cross_entropy")
    return Course(who, _Loop(who, loader), optimizer, loss)


def check_count(value: object, name: str, least: int) -> int:
    """Returns a number of epochs or iterations.

    Raises:
        ConfigError: it is not a whole number, or below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} is {value!r}", f"Pass a whole number of at least {least}")
    return value


def refuse_evaluator(who: str, trainer: object) -> None:
    """Raises where something else than a trainer is given as one, such as the evaluator objects of NNI's second and third version.

    Args:
        who: the pruner.
        trainer: what it was given as its trainer.

    Raises:
        ConfigError: it cannot be called.
    """
    if trainer is not None and not callable(trainer):
        what = f"the trainer of {who} is a {type(trainer).__name__}"
        raise ConfigError(what, f"Pass a function {_TRAINER}, with optimizer= and criterion=, or data= and loss=; and options by name")


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Lets a copy be trained or evaluated in the block; afterwards every module has its training flag of before, and no gradients stay."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        for parameter in model.parameters():
            parameter.grad = None


def added(values: Iterable[Tensor]) -> Tensor:
    """Returns the sum of one scalar or more, on the device and in the type of the first."""
    first, *rest = values
    return torch.stack([first, *(value.to(first) for value in rest)]).sum()


class Session:
    """Trains a copy of a model with a penalty.

    Args:
        model: left bit-identical, as is the optimizer.
        how: the user's training.
        penalised: names of the parameters that the penalty is on.
        penalty: from these parameters to a scalar; what it is computed from may change between epochs.
        does: what the pruner does to these parameters, as messages say it.

    Attributes:
        model: the copy. It is in training mode while it trains; afterwards every module has the flag that it was copied with.
        optimizer: the copy's.
        weights: the copy's penalised parameters by name.
        steps: how many steps the optimizer has taken.

    Raises:
        ConfigError: the optimizer holds none of the model's parameters, or lacks one that the penalty is on.
    """

    def __init__(self, model: nn.Module, how: Course, penalised: Iterable[str], penalty: Penalty, does: str = "has a penalty on") -> None:
        memo: dict[int, Any] = {}
        self.model = copied(model, memo)
        self.criterion = copied(how.criterion, memo) if isinstance(how.criterion, nn.Module) else how.criterion
        self.optimizer = twin_optimizer(model, self.model, how, memo)
        self.penalty = penalty
        self.steps = 0
        self._how = how
        known = dict(self.model.named_parameters(remove_duplicate=False))
        self.weights = {name: known[name] for name in penalised}
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        for name, weight in self.weights.items():
            if id(weight) not in held or not weight.requires_grad:
                what = f"{how.who} {does} {name!r}, which {'its optimizer does not hold' if weight.requires_grad else 'is frozen'}"
                raise ConfigError(what, "Let the optimizer train it, or exclude the layer in the config list")
        self.optimizer.register_step_pre_hook(self._before_step)

    def epochs(self, count: int) -> None:
        """Trains for that many epochs.

        Raises:
            ConfigError: an epoch passed without a step of the optimizer.
            InputError: a penalised weight is no longer finite.
        """
        with flags_kept(self.model):
            for _ in range(count):
                before = self.steps
                self.model.train()
                with torch.enable_grad():
                    self._how.trainer(self.model, self.optimizer, self.criterion)
                if self.steps == before:
                    what = f"the trainer of {self._how.who} never called step() of the optimizer that it was given, so nothing was trained"
                    raise ConfigError(what, f"Pass a {_TRAINER}, by the model and the optimizer in its arguments")
                self._share_statistics()
                self._require_finite()

    def _require_finite(self) -> None:
        for name, weight in self.weights.items():
            if not bool(weight.isfinite().all()):
                what = f"the training of {self._how.who} diverged: {name!r} is not finite after {self.steps} steps"
                raise InputError(what, "Lower the learning rate or the strength of the penalty")

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Adds the penalty's gradient now, or makes a closure add it after its own backward pass."""
        self.steps += 1

        def add(scale: Tensor | None) -> Tensor:
            self._share()
            return self._add(scale)

        return behind_closure(optimizer, args, kwargs, add)

    def _share_statistics(self) -> None:
        """Averages floating-point buffers over all processes."""
        buffers = [b for b in self.model.buffers() if b.is_floating_point()] if processes() > 1 else []
        for buffer, total in zip(buffers, all_reduce_sum(buffers), strict=True):
            buffer.copy_(total / processes())

    def _share(self) -> None:
        """Averages the gradients over all processes, so that their copies stay the same ones."""
        if processes() == 1:
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]
        reached = all_reduce_sum([torch.tensor([0.0 if p.grad is None else 1.0 for p in parameters])])[0].tolist()
        used = [p for p, count in zip(parameters, reached, strict=True) if count]
        gradients = all_reduce_sum([torch.zeros_like(p) if p.grad is None else p.grad for p in used])
        for parameter, gradient in zip(used, gradients, strict=True):
            parameter.grad = gradient / processes()

    def _add(self, scale: Tensor | None = None) -> Tensor:
        """Adds the penalty's gradient to `.grad` and returns the penalty's value."""
        with torch.enable_grad():
            value = self.penalty(self.weights)
            gradients = torch.autograd.grad(value, list(self.weights.values()), allow_unused=True)
        with torch.no_grad():
            for weight, gradient in zip(self.weights.values(), gradients, strict=True):
                if gradient is not None:
                    scaled = gradient if scale is None else gradient * scale.to(gradient.device)
                    weight.grad = scaled if weight.grad is None else scaled + weight.grad  # in this order where .grad is sparse
        return value.detach()


def behind_closure(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], act: Callable[[Tensor | None], Tensor | None]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Acts on gradients before a step of an optimizer, or, where the step has a closure, behind every call of it; see step pre-hooks.

    Args:
        optimizer: that steps.
        args: of the step, the optimizer first.
        kwargs: likewise.
        act: is given the scale of the gradients, where fused optimizers are given gradients that are still scaled; returns what it adds to
            the loss, or None.

    Returns:
        The arguments of the step.
    """
    this, *rest = args
    closure = kwargs.get("closure", rest[0] if rest else None)
    if closure is None:
        act(getattr(optimizer, "grad_scale", None))
        return args, kwargs

    def acting() -> Any:
        value, added_to_it = closure(), act(None)
        return value if value is None or added_to_it is None else value + added_to_it

    return ((this, acting, *rest[1:]), kwargs) if rest else (args, {**kwargs, "closure": acting})


def twin_optimizer(model: nn.Module, clone: nn.Module, how: Course, memo: dict[int, Any]) -> Optimizer:
    """Returns an optimizer of the copy's parameters."""
    if not isinstance(how.optimizer, Optimizer):
        made = how.optimizer(clone.parameters())
        if not isinstance(made, Optimizer):
            what = f"the function that {how.who} was given as its optimizer returned a {type(made).__name__}"
            raise ConfigError(what, "Pass a function from parameters to a torch.optim.Optimizer")
        return made
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in how.optimizer.param_groups for p in group["params"]):
        what = f"the optimizer of {how.who} holds no parameter of {type(model).__name__}"
        raise ConfigError(what, "Make it from model.parameters() of the model that is pruned, or pass a function from parameters to one")
    twin = copy.deepcopy(how.optimizer, memo)
    missing = {k: v for k, v in vars(how.optimizer).items() if k not in vars(twin)}  # PyTorch copies groups and state alone
    vars(twin).update({k: copy.deepcopy(v, memo) for k, v in missing.items() if not callable(v)})
    return twin


@dataclass(frozen=True, eq=False)
class _Loop:
    """The trainer that stands for plain data: one epoch over the batches."""

    who: str
    data: Loader

    def __call__(self, model: nn.Module, optimizer: Optimizer, loss: Any) -> None:
        """Trains for one epoch.

        Raises:
            InputError: there is no batch, one has no target, the model cannot run on one, or a loss is not one number.
        """
        empty = True
        for batch in islice(self.data.batches, self.data.limit):
            empty = False
            inputs, target = split_batch(batch)
            if target is None:
                what = f"{self.who} cannot train on a batch ({inputs}) without a target"
                raise InputError(what, "Let the data yield (inputs, target), or dicts of keyword arguments with loss(output, batch)")
            optimizer.zero_grad()
            checked_loss(loss(run(model, inputs), target)).backward()
            optimizer.step()
        if empty:
            what = f"the data of {self.who} held no batch when an epoch began"
            raise InputError(what, "Pass what can be iterated once per epoch, such as a DataLoader or a list of batches")
