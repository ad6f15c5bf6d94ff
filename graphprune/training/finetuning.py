"""Training between rounds, on a copy of the user's model: by the user's function, trainer or data, with one optimizer throughout."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphprune.data.sources import Loader
from graphprune.errors import ConfigError
from graphprune.masks.copying import copied
from graphprune.trace.threads import warning_filters
from graphprune.training.keeping import held
from graphprune.training.optimizers import slice_optimizer, sliced_state
from graphprune.training.packing import plain_part
from graphprune.training.session import Course, check_count, course, flags_kept, twin_optimizer

if TYPE_CHECKING:
    from graphprune.masks.channels import Masks
    from graphprune.masks.elements import ElementMasks

Finetune: TypeAlias = Callable[[nn.Module], object]
MakeScheduler: TypeAlias = "Callable[[Optimizer], torch.optim.lr_scheduler.LRScheduler]"


@dataclass(frozen=True)
class TrainingConfig:
    """How to train, in the user's words; see `graphprune.schedules.rounds.RoundsOptions`."""

    finetune: Finetune | None = None
    trainer: Any = None
    optimizer: Any = None
    criterion: Any = None
    data: Any = None
    loss: Any = None
    training_epochs: int = 1
    lr_scheduler: MakeScheduler | None = None

    def checked(self, who: str) -> Course | None:
        """Returns how to train, None where it is by `finetune`, or not at all.

        Raises:
            ConfigError: the arguments do not go together.
        """
        check_count(self.training_epochs, "training_epochs", 0)
        if self.finetune is not None:
            if not callable(self.finetune):
                raise ConfigError(
                    f"finetune of {who} is a {type(self.finetune).__name__}", "Pass a function that trains the model it is given"
                )
            if self.lr_scheduler is not None:
                raise ConfigError(f"{who} has a lr_scheduler and finetune=", "Schedule learning rates inside finetune, or pass a trainer")
            return None
        if self.trainer is None and (self.data is None or self.optimizer is None):
            return None
        if self.data is not None and self.trainer is None:
            self._refuse_spent(who)
        return course(who, self.trainer, self.optimizer, self.criterion, self.data if self.trainer is None else None, self.loss)

    def _refuse_spent(self, who: str) -> None:
        batches = self.data.batches if isinstance(self.data, Loader) else self.data
        if iter(batches) is batches:
            raise ConfigError(f"the data of {who} gives every batch only once", "Pass a list or a DataLoader")


@dataclass(eq=False)
class Snapshot:
    """What an optimizer and its scheduler remember, by parameter name.

    Attributes:
        groups: the settings of its parameter groups, plain values only.
        state: parameter name -> key -> tensor or plain value.
        scheduler: the scheduler's state, where there is one.
    """

    groups: list[dict[str, Any]]
    state: dict[str, dict[str, Any]]
    scheduler: dict[str, Any] | None = None

    def cut(self, masks: Masks) -> Snapshot:
        """Returns the snapshot for the model that a speedup by these masks left."""
        return Snapshot(self.groups, sliced_state(self.state, masks), self.scheduler)


@dataclass(eq=False)
class TrainingCopy:
    """A copy of the user's model and what trains it.

    Attributes:
        model: the copy, replaced by what a speedup makes of it.
        wishes: how to train.
        how: the same, checked; None without a trainer.
        optimizer: the copy's, or None.
        criterion: handed to the trainer.
        idle: whether the optimizer is there for a one-shot pruner alone, and nothing is trained by it here.
        scheduler: of the last training.
    """

    model: nn.Module
    wishes: TrainingConfig
    how: Course | None
    optimizer: Optimizer | None = None
    criterion: Any = None
    idle: bool = False
    scheduler: Any = None
    _settings: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, wishes: TrainingConfig, how: Course | None, *, idle: bool = False) -> TrainingCopy:
        """Copies a model, and the optimizer that is bound to it."""
        memo: dict[int, Any] = {}
        clone = copied(model, memo)
        if how is None:
            return cls(clone, wishes, None)
        criterion = copied(how.criterion, memo) if isinstance(how.criterion, nn.Module) else how.criterion
        made = cls(clone, wishes, how, twin_optimizer(model, clone, how, memo), criterion, idle)
        made._settings = made.snapshot().groups
        return made

    def train(self, masks: Masks | ElementMasks | None, epochs: int | None = None, since: Snapshot | None = None) -> None:
        """Trains the model, held to masks; every module has the training flag of before afterwards, and no gradients stay.

        Args:
            masks: what stays zero, if anything.
            epochs: calls of the trainer; by default as wished.
            since: where a scheduler begins; by default at its beginning.

        Raises:
            ConfigError: the trainer never steps its optimizer.
        """
        with flags_kept(self.model), held(self.model, masks), torch.enable_grad():
            if self.wishes.finetune is not None:
                made = self.wishes.finetune(self.model)
                if isinstance(made, nn.Module) and made is not self.model:
                    what = f"finetune returned another {type(made).__name__} than the one that it was given"
                    raise ConfigError(what, "Train the model that is passed, in place")
            elif self.how is not None and self.optimizer is not None and not self.idle:
                self._epochs(self.wishes.training_epochs if epochs is None else epochs, since)

    def _epochs(self, count: int, since: Snapshot | None) -> None:
        assert self.how is not None  # noqa: S101 (for the type checker; the caller has looked)
        assert self.optimizer is not None  # noqa: S101 (likewise)
        if self.wishes.lr_scheduler is not None:
            _set_groups(self.optimizer, self._settings)
            self.scheduler = self.wishes.lr_scheduler(self.optimizer)
            if since is not None and since.scheduler is not None:
                self.scheduler.load_state_dict(since.scheduler)
                _set_groups(self.optimizer, since.groups)
        steps: list[None] = []
        handle = self.optimizer.register_step_pre_hook(lambda *_: steps.append(None))
        try:
            for _ in range(count):
                self.model.train()
                self.how.trainer(self.model, self.optimizer, self.criterion)
                if self.scheduler is not None:
                    # a step hook or an AMP scaler may hide optimizer.step() from the scheduler
                    with warning_filters(("ignore", Warning, r".*lr_scheduler\.step\(\).*")):
                        self.scheduler.step()
        finally:
            handle.remove()
        if count and not steps:
            what = f"the trainer of {self.how.who} never called step() of the optimizer that it was given, so nothing was trained"
            raise ConfigError(what, "Pass a trainer(model, optimizer, criterion) that trains by its arguments")

    def shrink_to(self, small: nn.Module, masks: Masks) -> None:
        """Goes on with what `speedup` made of the model; the optimizer follows."""
        if self.optimizer is not None:
            slice_optimizer(self.optimizer, self.model, small, masks)
        self.model = small

    def snapshot(self) -> Snapshot:
        """Returns what the optimizer and the scheduler remember, copied."""
        if self.optimizer is None:
            return Snapshot([], {})
        names = {id(p): name for name, p in self.model.named_parameters()}
        groups = [plain_part({k: v for k, v in group.items() if k != "params"}) for group in self.optimizer.param_groups]
        state = {names[id(p)]: copy.deepcopy(values) for p, values in self.optimizer.state.items() if id(p) in names}
        return Snapshot(groups, state, None if self.scheduler is None else plain_part(self.scheduler.state_dict()))

    def restore(self, snapshot: Snapshot) -> None:
        """Puts the optimizer where it was; parameters that the snapshot does not know start anew."""
        if self.optimizer is None:
            return
        _set_groups(self.optimizer, snapshot.groups)
        own = dict(self.model.named_parameters())
        names = {id(p) for p in own.values()}
        others = {p: values for p, values in self.optimizer.state.items() if id(p) not in names}
        self.optimizer.state.clear()
        self.optimizer.state.update(others)
        for name, values in snapshot.state.items():
            if name in own:
                on = own[name].device
                self.optimizer.state[own[name]] = {k: _on(v, own[name], on) for k, v in values.items()}

    def check_optimizer_parameters(self, who: str) -> None:
        """Raises where the optimizer trains parameters that are not the model's.

        Raises:
            ConfigError: it does.
        """
        names = {id(p) for p in self.model.parameters()}
        if self.optimizer is not None and any(id(p) not in names for g in self.optimizer.param_groups for p in g["params"]):
            what = f"the optimizer of {who} trains parameters besides the model's, which are not saved"
            raise ConfigError(what, "Leave folder= out, or move these parameters into the model")


def checked_score(value: object, who: str) -> float:
    """Returns what an evaluator gave, as a number.

    Raises:
        ConfigError: it is none.
    """
    try:
        score = float(value)  # type: ignore[arg-type]  # whatever a user's function returns
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the evaluator of {who} returned a {type(value).__name__}", "Return a number, higher = better") from error
    if math.isnan(score):
        raise ConfigError(f"the evaluator of {who} returned NaN", "Return a number, higher = better")
    return score


def _set_groups(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        group.update(saved)


def _on(value: Any, parameter: Tensor, device: torch.device) -> Any:
    """Returns a copy of one entry of a state, where its parameter is; single numbers such as step counts stay where they are."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if value.numel() == 1 and parameter.numel() != 1 else value.detach().to(device, copy=True)
