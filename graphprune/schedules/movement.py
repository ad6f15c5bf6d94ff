"""Movement pruning: while a model is fine-tuned, what its weights move away from stays and what they move towards zero goes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphprune.data.distributed import processes
from graphprune.errors import ConfigError, nearest
from graphprune.masks.channels import tensors_of
from graphprune.pruners.budgets import Plan
from graphprune.pruners.options import (
    DataOptions,
    InputOptions,
    RunOptions,
    TrainedOptions,
    check_evaluator,
    check_names,
    split,
    traceable,
)
from graphprune.runs.checkpoint import Run, digest
from graphprune.runs.progress import ticking
from graphprune.schedules.history import Movement, Movements, said
from graphprune.schedules.moving import MovementSettings, Moving
from graphprune.schedules.scored import Blocks, Channels, Scored
from graphprune.training.packing import load, save
from graphprune.training.session import check_count, course, refuse_evaluator

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from graphprune.masks.channels import Masks
    from graphprune.masks.elements import ElementMasks
from graphprune.training.session import MakeOptimizer, Trainer

MovementMode: TypeAlias = Literal["hard", "soft"]
_KINDS = ("finegrained", "rows", "channels", "auto")
_KIND = "movement"
_SCORE_LR = 1e-2
_FORMER = {
    "training_steps": "training_epochs=, the number of calls of the trainer",
    "warmup_step": "warm_up_step=",
    "cooldown_begin_step": "cool_down_beginning_step=",
}


class _OwnOptions(TypedDict, total=False):
    """What `MovementPruner` takes besides.

    Attributes:
        score_optimizer: from the scores to the optimizer that trains them; by default Adam with a learning rate of 0.01.
        evaluator: from the masked model to its score, higher = better, asked behind every epoch.
    """

    score_optimizer: MakeOptimizer | None
    evaluator: Callable[[nn.Module], float] | None


class MovementOptions(_OwnOptions, TrainedOptions, RunOptions, total=False):
    """What `MovementPruner` takes by keyword; of the options of `Pruner`, mode, rounding, round_to, cut and graph, for "channels" alone."""


class MovementPruner:
    """Learns which weights to keep during fine-tuning (Sanh et al., Movement Pruning, arXiv 2005.07683, section 3).

    A copy of the model computes with W' = W * M(S) in place of W. Scores S start at 0 and are trained together with the weights, by
    gradients that pass straight through M: dL/dS = dL/dM = dL/dW' * W, also where M is 0, so that what was masked can return. Where one
    score decides about several weights, its gradient is the sum over them. Masks are computed anew after every step, from the scores
    alone:

        t < warm_up_step                              M = 1; scores are learned
        warm_up_step <= t < cool_down_beginning_step  "hard": of the scores, the share r_t * sparsity that is lowest is masked
                                                      "soft": M = sigmoid(S) > r_t * threshold, and the loss has the term
                                                      r_t * regular_scale * mean over score tensors of mean sigmoid(S)
        t >= cool_down_beginning_step                 the masks of that step stay; only weights are trained

    with r_t = 1 - (1 - (t - warm_up_step) / (cool_down_beginning_step - warm_up_step))^3, the cubic schedule of the paper, where t counts
    the steps that the optimizer has taken. In the cool-down all that belongs to a channel that goes is zeroed after each step, biases too,
    so that what is trained there is what `speedup` makes small. While it trains, the copy's masked weights are parametrizations of
    `torch.nn.utils.parametrize` (a state dict taken by the trainer says so); the copy that is returned has none.

    Args:
        model: left bit-identical, as is the optimizer.
        config_list: entries as in the seeds, see `pruners.config`. Sparsities are shares of what there is a score for. In mode "soft",
            as in NNI, `sparsity` is the threshold that the sigmoid of scores is compared with, usually 0.1.
        trainer, optimizer, criterion: see `graphprune.pruners.options.TrainingOptions`.
        warm_up_step: t at which masking begins.
        cool_down_beginning_step: t from which masks stay as they are; training must reach it.
        training_epochs: how many epochs to train, at least 1.
        regular_scale: lambda of the regulariser; mode "soft" needs it (NNI recommends 1 to 30).
        movement_mode: "hard" or "soft".
        sparse_granularity: what has one score: "finegrained", a single weight; "rows", an output row of a weight; (height, width), a block
            of a matrix (Lagunas et al., arXiv 2109.04838); "channels" or "auto", a channel of a coupled group, such as a neuron of a
            feed-forward layer or a whole attention head, whose score masks all weights that produce it (where a batch norm follows, its
            scale, as scores of whole rows learn nothing in front of one), and which `speedup` removes.
        options: see `MovementOptions`. A folder keeps the copy, scores, masks and what both optimizers remember; what the trainer keeps by
            itself is not saved, but in a parameter group of the optimizer it is.

    Attributes:
        model: after `masks` or `compress` the trained copy, not masked, with the training flags of the model that was given.
        scores: after training, name of a weight (of "channels", of a group) -> its scores.
        achieved: after training, the same names -> the share of their scores whose weights went.
        history: one `Movement` per epoch, as a table, CSV or plot.

    Raises:
        ConfigError: an argument is unusable or missing.
        InputError: of "channels", there is nothing to trace the model with, or it cannot run on it.
    """

    def __init__(  # noqa: PLR0913, PLR0917 (the call shape of the seeds)
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        trainer: Trainer | None = None,
        optimizer: Optimizer | MakeOptimizer | None = None,
        criterion: Any = None,
        warm_up_step: int = 0,
        cool_down_beginning_step: int | None = None,
        training_epochs: int = 1,
        regular_scale: float | None = None,
        movement_mode: MovementMode = "hard",
        sparse_granularity: str | Sequence[int] = "finegrained",
        **options: Unpack[MovementOptions],
    ) -> None:
        who = type(self).__name__
        refuse_evaluator(who, trainer)
        check_names(type(self), options, MovementOptions, _FORMER)
        given, others = split(options, DataOptions, RunOptions, _OwnOptions)
        training = {"trainer": trainer, "optimizer": optimizer, "criterion": criterion, **split(given, DataOptions)[0]}
        self.warm_up_step = check_count(warm_up_step, "warm_up_step", 0)
        self.cool_down_beginning_step = check_count(cool_down_beginning_step, "cool_down_beginning_step", self.warm_up_step + 1)
        self.training_epochs = check_count(training_epochs, "training_epochs", 1)
        self.movement_mode: MovementMode = _checked_mode(who, movement_mode, regular_scale)
        self.regular_scale = float(regular_scale or 0.0)
        self.course = course(who, **training)
        self.score_optimizer: MakeOptimizer = given.get("score_optimizer") or _adam
        kind = _checked_granularity(sparse_granularity)
        self.scored: Scored
        if kind == "channels":
            self.scored = Channels(who, model, config_list, **traceable(who, others, training))
        else:
            inputs, groups = split(others, InputOptions)
            if groups:
                what = f"{who} masks weights of single layers (sparse_granularity {sparse_granularity!r}) and has no argument"
                raise ConfigError(f"{what} {next(iter(groups))}=", "Leave it out, or write sparse_granularity='channels'")
            self.scored = Blocks(model, config_list, kind, **inputs)
        if movement_mode == "soft" and any("total_sparsity" in entry for entry in config_list):
            what = f"the config list of {who} has a 'total_sparsity', but movement_mode 'soft' compares every score with a threshold"
            raise ConfigError(what, "Write the threshold as 'sparsity', such as 0.1, or movement_mode='hard'")
        self.evaluator, self.folder, self.progress = given.get("evaluator"), given.get("folder"), given.get("progress", False)
        check_evaluator(who, self.evaluator, "what trains is given as trainer= and optimizer=, or data= and loss=")
        if self.folder is not None and processes() > 1:
            what = f"{who} has a folder, and {processes()} processes train, whose random numbers it does not keep"
            raise ConfigError(what, "Leave folder= out")
        self.model = model
        self.scores: dict[str, Tensor] = {}
        self.achieved: dict[str, float] = {}
        self.history = Movements((), who)
        self._config_list = config_list
        self._kind = kind
        self._masks: Masks | ElementMasks | None = None

    @property
    def settings(self) -> MovementSettings:
        """What is trained, and how."""
        return MovementSettings(
            type(self).__name__,
            self.course,
            self.scored,
            self.score_optimizer,
            self.warm_up_step,
            self.cool_down_beginning_step,
            self.movement_mode,
            self.regular_scale,
            self.evaluator,
        )

    @property
    def plan(self) -> Plan:
        """What was asked of each group and why some lost less (of "channels"), for the report of `speedup`."""
        return self.scored.plan

    def stage(self, step: int) -> float:
        """Returns r_t, the part of the sparsity or threshold asked for that holds behind `step` steps, in [0, 1]."""
        return self.settings.stage(step)

    def compress(self) -> tuple[nn.Module, Masks | ElementMasks]:
        """Returns (a copy of the trained model with what the masks remove zeroed, the masks)."""
        masks = self.masks()
        return masks.masked(self.model), masks

    def masks(self) -> Masks | ElementMasks:
        """Returns the masks of the cool-down; trains on the first call, or the epochs that are missing in the folder.

        Raises:
            ConfigError: the optimizer does not hold what is masked, the trainer never steps it, training ends before the cool-down, a
                masked weight takes no part in the loss, or something that training depends on cannot be kept in the folder.
            FileError: the folder holds a run with other settings, or cannot be written.
            InputError: weights or scores are no longer finite.
        """
        if self._masks is None:
            moving = Moving(self.model, self.settings)
            self._train(moving)
            moving.check_reached()
            self.scores = {name: score.detach() for name, score in moving.scores.items()}
            self.achieved = {name: 1.0 - float(flags.double().mean()) for name, flags in moving.kept.items()}
            self.model, self._masks = moving.session.model, self.scored.masks(moving.kept)
            self.history.keep(self.folder, _KIND)
        return self._masks

    def _train(self, moving: Moving) -> None:
        """Trains the epochs that are missing, and saves each."""
        run = Run(None, _KIND, {}) if self.folder is None else Run(self.folder, _KIND, self._settings(moving))
        saved, done = load(run), list[Movement]()
        if saved is not None:
            moving.restore(saved)
            done = saved["epochs"]
        self.history = Movements(done, type(self).__name__)
        with moving.masked(), ticking(type(self).__name__, self.training_epochs, len(done), shown=self.progress) as tick:
            for epoch in range(1 + len(done), self.training_epochs + 1):
                record = moving.epoch(epoch)
                self._check_length(record)
                done.append(record)
                self.history = Movements(done, type(self).__name__)
                if run.path is not None:
                    save(run, type(self).__name__, {**moving.saved(), "epochs": done})
                tick(said(record))

    def _settings(self, moving: Moving) -> dict[str, Any]:
        """Returns what the result depends on, as plain values."""
        return {
            "pruner": type(self).__name__,
            "entries": [dict(entry) for entry in self._config_list],
            "warm_up_step": self.warm_up_step,
            "cool_down_beginning_step": self.cool_down_beginning_step,
            "training_epochs": self.training_epochs,
            "regular_scale": self.regular_scale,
            "movement_mode": self.movement_mode,
            "sparse_granularity": self._kind,
            **self.scored.settings,
            **moving.settings(),
            "model": digest(tensors_of(self.model, {})),
        }

    def _check_length(self, record: Movement) -> None:
        """Warns behind the first epoch, and raises behind the last, where training does not reach the cool-down."""
        last = record.epoch == self.training_epochs
        if record.steps * (1 if last else self.training_epochs) >= self.cool_down_beginning_step or not (last or record.epoch == 1):
            return
        begins = f"but masks are final at step {self.cool_down_beginning_step} (cool_down_beginning_step)"
        if last:
            what = f"the training of {type(self).__name__} took {record.steps} steps, {begins}"
            raise ConfigError(what, "Lower cool_down_beginning_step, or raise training_epochs")
        warnings.warn(
            f"the first of {self.training_epochs} epochs of {type(self).__name__} took {record.steps} steps, {begins}: with epochs of this "
            "length, training ends before that. Lower it, or raise training_epochs.",
            stacklevel=5,
        )


def _adam(scores: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.Adam(scores, lr=_SCORE_LR)


def _checked_mode(who: str, mode: object, scale: object) -> MovementMode:
    """Returns the mode.

    Raises:
        ConfigError: it is unknown, or the regulariser that belongs to it is missing, or given with the other.
    """
    if mode not in get_args(MovementMode):
        raise ConfigError(f"movement_mode is {mode!r}", f"Use one of {', '.join(map(repr, get_args(MovementMode)))}")
    if mode == "hard":
        if scale is not None:
            raise ConfigError(f"{who} has a regular_scale, but movement_mode 'hard' has no regulariser", "Leave it out, or write 'soft'")
        return "hard"
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        what = f"regular_scale is {scale!r}, and movement_mode 'soft' needs a regulariser to make anything go"
        raise ConfigError(what, "Pass a number above 0, such as 10")
    return "soft"


def _checked_granularity(value: object) -> str | tuple[int, int]:
    """Returns a granularity; "auto" is "channels".

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, str) and value in _KINDS:
        return "channels" if value == "auto" else value
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(type(n) is int and n > 0 for n in value):
        return (value[0], value[1])
    kinds = ", ".join(map(repr, _KINDS))
    hint = nearest(value, _KINDS) if isinstance(value, str) else ""
    raise ConfigError(
        f"sparse_granularity is {value!r}", hint or f"Use one of {kinds}, or the height and width of a block such as (32, 32)"
    )
