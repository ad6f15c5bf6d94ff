"""Lottery tickets: train, prune, rewind to an earlier state, and train what is left, round by round."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from graphprune.errors import ConfigError, nearest
from graphprune.runs.checkpoint import digest
from graphprune.schedules.functions import Exponential, Schedule
from graphprune.schedules.rounds import RoundsOptions, RoundsPruner
from graphprune.training.session import check_count

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from graphprune.schedules.algorithms import OneShot
    from graphprune.schedules.state import State

Rewind: TypeAlias = Literal["weights", "learning rate", "nothing"]


class LotteryTicketPruner(RoundsPruner):
    """Finds winning tickets by iterative pruning with rewinding (Frankle & Carbin, The Lottery Ticket Hypothesis, arXiv 1803.03635).

    Round 0 trains the whole model. Round i of n prunes what was trained to the sparsity 1 - (1 - P)^(i/n), masks that are computed anew,
    rewinds what is left, and trains it again, so that the last round leaves a trained model. Rewinding "weights" puts parameters and
    buffers back to the checkpoint, bit for bit where kept and zero elsewhere, and the optimizer and its learning rates with them;
    rewinding the "learning rate" keeps the weights (Renda et al., Comparing Rewinding and Fine-tuning, arXiv 2003.02389, section 2);
    rewinding "nothing" is fine-tuning.

    Args:
        model: as initialised, left as it is. See `RoundsPruner` for the arguments that are not listed here.
        former: none; what comes here in NNI, reset_weight, is refused by name.
        rewind: what goes back in every round: "weights", "learning rate" or "nothing".
        checkpoint: a state dict to rewind the weights to, of the model's names and shapes; by default the model as it was given.
        rewind_epoch: k, rewind to what round 0 had after k epochs of its training (late rewinding, Frankle et al., Stabilizing the Lottery
            Ticket Hypothesis, arXiv 1903.01611), and train for k epochs fewer; needs a trainer or data.

    Raises:
        ConfigError: see `RoundsPruner`; or the checkpoint does not fit the model, or there are two things to rewind to.
    """

    kind: ClassVar[str] = "lottery"
    first: ClassVar[int] = 0

    def __init__(  # noqa: PLR0913 (the call shape of NNI)
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        pruning_algorithm: str | type[OneShot] = "level",
        total_iteration: int | None = None,
        log_dir: str | os.PathLike[str] | None = None,
        keep_intermediate_result: bool = False,  # noqa: FBT001, FBT002 (the call shape of NNI)
        evaluator: Callable[[nn.Module], float] | None = None,
        speedup: bool = False,  # noqa: FBT001, FBT002 (the call shape of NNI)
        pruning_params: Mapping[str, Any] | None = None,
        *former: object,
        rewind: Rewind = "weights",
        checkpoint: Mapping[str, Tensor] | None = None,
        rewind_epoch: int = 0,
        **options: Unpack[RoundsOptions],
    ) -> None:
        who = type(self).__name__
        if "reset_weight" in options or former or isinstance(pruning_params, bool):
            raise ConfigError(f"{who} has no argument reset_weight=", "Write rewind='weights', or rewind='nothing' for reset_weight=False")
        if rewind not in get_args(Rewind):
            raise ConfigError(f"rewind is {rewind!r}", f"Use one of {', '.join(map(repr, get_args(Rewind)))}")
        self.rewind: Rewind = rewind
        self.rewind_epoch = check_count(rewind_epoch, "rewind_epoch", 0)
        self.checkpoint = _checked(checkpoint, model, who, rewind)
        if checkpoint is not None and rewind_epoch:
            raise ConfigError(f"{who} has a checkpoint and a rewind_epoch to rewind to", "Pass one of them")
        given = (model, config_list, pruning_algorithm, total_iteration, log_dir, keep_intermediate_result, evaluator, speedup)
        super().__init__(*given, pruning_params, **options)
        if self.rewind_epoch and self._how is None:
            what = f"{who} is to rewind to epoch {rewind_epoch}, and sees no epochs"
            raise ConfigError(what, "Pass trainer=, optimizer= and criterion=, or data=, loss= and optimizer=; or pass checkpoint=")
        if self.rewind_epoch and self.rewind_epoch >= self.wishes.training_epochs:
            what = f"{who} is to rewind to epoch {rewind_epoch} of {self.wishes.training_epochs}"
            raise ConfigError(what, "Rewind to an epoch before the last, or raise training_epochs")

    def schedule(self, final: float, steps: int) -> Schedule:
        """Returns the exponential schedule."""
        return Exponential(final, steps)

    def settings(self) -> dict[str, Any]:
        """Returns what the result depends on, as plain values."""
        given = None if self.checkpoint is None else digest(self.checkpoint)
        return {**super().settings(), "rewind": self.rewind, "rewind_epoch": self.rewind_epoch, "checkpoint": given}

    def train(self, number: int) -> None:
        """Trains the whole model in round 0; rewinds and trains what is left in the others."""
        state, epochs = self.state, self.wishes.training_epochs
        trainee = state.trainee
        if number == 0:
            if not self.rewind_epoch:
                self._remember(state, self.checkpoint)
                trainee.train(None)
                return
            trainee.train(None, self.rewind_epoch)
            self._remember(state, None)
            trainee.train(None, epochs - self.rewind_epoch, state.snapshot)
            return
        masks = None if self.speedup else state.masks
        if self.rewind == "nothing" or state.snapshot is None:
            trainee.train(masks)
            return
        if state.checkpoint is not None:
            trainee.model.load_state_dict({**trainee.model.state_dict(), **state.checkpoint})
            if masks is not None:
                masks.apply(trainee.model)
        trainee.restore(state.snapshot)
        trainee.train(masks, epochs - self.rewind_epoch, state.snapshot)

    def _remember(self, state: State, given: Mapping[str, Tensor] | None) -> None:
        """Takes what is rewound to: the given checkpoint or the weights of now, and the optimizer of now."""
        if self.rewind == "nothing":
            return
        state.snapshot = state.trainee.snapshot()
        if self.rewind == "weights":
            found = state.trainee.model.state_dict() if given is None else given
            state.checkpoint = {name: value.detach().clone() for name, value in found.items() if isinstance(value, Tensor)}


def _checked(checkpoint: Mapping[str, Tensor] | None, model: nn.Module, who: str, rewind: Rewind) -> dict[str, Tensor] | None:
    """Returns a checkpoint of a model's own names and shapes.

    Raises:
        ConfigError: it is not, or weights are not rewound.
    """
    if checkpoint is None:
        return None
    if rewind != "weights":
        raise ConfigError(f"{who} has a checkpoint and rewinds {rewind!r}", "Write rewind='weights', or leave the checkpoint out")
    own = {name: tuple(value.shape) for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    for name in dict.fromkeys([*own, *checkpoint]):
        theirs = tuple(checkpoint[name].shape) if name in checkpoint and isinstance(checkpoint[name], torch.Tensor) else "missing"
        if own.get(name, "missing") != theirs:
            hint = nearest(name, checkpoint) if theirs == "missing" else ""
            what = f"{name!r} is {theirs} in the checkpoint of {who}, but {own.get(name, 'missing')} in the model"
            raise ConfigError(what, hint or "Pass a state dict of the model")
    return dict(checkpoint)
