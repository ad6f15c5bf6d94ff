"""Pruning in rounds: prune a little, train, evaluate, again, by any one-shot pruner; with masks alone, or with physical removal.

config list ──▶ schedule per entry ──▶ one-shot pruner on what is left ──▶ (speedup, the optimizer follows) ──▶ train ──▶ evaluate ──▶ save
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from graphprune.cost.count import count
from graphprune.cost.predict import Forecast
from graphprune.errors import ConfigError, InputError
from graphprune.groups.build import trace
from graphprune.masks.channels import Masks
from graphprune.masks.elements import ElementMasks
from graphprune.pruners.base import Pruner
from graphprune.pruners.options import InputOptions, RunOptions, TrainingOptions, check_evaluator, check_names, kept_folder, split
from graphprune.runs.checkpoint import digest
from graphprune.runs.progress import Tick
from graphprune.schedules.algorithms import Algorithm, OneShot, chooser, masks_of
from graphprune.schedules.entries import Planned, planned, relative
from graphprune.schedules.functions import Linear, Schedule
from graphprune.schedules.history import Round, said
from graphprune.schedules.state import InRounds, State
from graphprune.training.finetuning import TrainingConfig, TrainingCopy, checked_score
from graphprune.training.keeping import held, removed
from graphprune.training.packing import is_plain, settings_of
from graphprune.training.session import Course, check_count, flags_kept

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from graphprune.groups.graph import DependencyGraph
    from graphprune.training.finetuning import Finetune, MakeScheduler


class RoundsOptions(TrainingOptions, InputOptions, RunOptions, total=False):
    """What pruners take that work in rounds.

    Attributes:
        finetune: trains the model that it is given, in place, once per round; in place of what `TrainingOptions` says.
        training_epochs: calls of the trainer per round, by default 1; the optimizer goes through all rounds.
        lr_scheduler: from the optimizer to a learning-rate scheduler that is stepped per epoch; every round begins it anew.
    """

    finetune: Finetune | None
    training_epochs: int
    lr_scheduler: MakeScheduler | None


class RoundsPruner(InRounds):
    """What the pruners that work in rounds share. Round t of n: prune to the sparsities of step t, train, evaluate.

    Sparsities are always shares of the ORIGINAL model: of its channels, or of its weights. What has gone once stays gone (but for ADMM
    without speedup, which chooses anew).

    Args:
        model: left bit-identical, as is the optimizer.
        config_list: entries with the sparsities to reach, see `graphprune.pruners.config`.
        pruning_algorithm: "level", "l1", "l2", "fpgm", "slim", "apoz", "mean_activation", "taylorfo" or "admm", or a pruner's class.
        total_iteration: n, how many rounds.
        log_dir: another name of `folder`.
        keep_intermediate_result: write the tensors of every round's model into `folder`/rounds, one safetensors file each.
        evaluator: from a model to its score, higher = better.
        speedup: remove channels physically in every round; layers are found again in the smaller model, and the optimizer follows.
            Without it they are masked: zeroed before every forward pass.
        pruning_params: further arguments of the one-shot pruner. Those of data are by default the pruner's own.
        options: see `RoundsOptions`.

    Attributes:
        graph: the original model's, or None where single weights or layers are masked.

    Raises:
        ConfigError: an argument is not usable, or some do not go together.
        InputError: the model cannot be traced.
    """

    kind: ClassVar[str] = "rounds"
    own_schedules: ClassVar[bool] = False  # whether entries may have schedules of their own

    def __init__(
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
        **options: Unpack[RoundsOptions],
    ) -> None:
        who = type(self).__name__
        if not isinstance(model, nn.Module):
            what = f"{who} is given a {type(model).__name__} in place of a model"
            raise ConfigError(what, f"Write {who}(model, config_list, pruning_algorithm, total_iteration), such as 'l1' and 10")
        check_names(type(self), options, RoundsOptions)
        self.model, self.evaluator, self.speedup = model, evaluator, speedup
        self.progress, self.keep = options.get("progress", False), keep_intermediate_result
        self.folder = kept_folder(who, options.get("folder"), log_dir, keep=self.keep)
        check_evaluator(who, evaluator, "finetune=, or trainer= and optimizer=, say how to train")
        steps = 10 if total_iteration is None else check_count(total_iteration, "total_iteration", 1)
        self.plan: Planned = planned(config_list, who, lambda final: self.schedule(final, steps), own=self.own_schedules)
        self.total = max(self.plan.end, 1) if total_iteration is None else steps
        self.wishes = TrainingConfig(**split(options, TrainingConfig)[0])
        self._how = self.wishes.checked(who)
        self.algorithm = Algorithm.of(pruning_algorithm, pruning_params, vars(self.wishes), who)
        self._check_optimizers(who)
        self._example_inputs = options.get("example_inputs")
        self._one_shot = self.algorithm.pruner(model, list(self.plan.entries), example_inputs=self._example_inputs)
        self._chooser = chooser(self._one_shot)
        self.graph = None if self._chooser is None else self._chooser.graph
        if speedup and self.graph is None:
            single = "single weights or single layers, which cannot be removed"
            what = f"{who} is to speed up, but {type(self._one_shot).__name__} masks {single}"
            raise ConfigError(what, "Use an algorithm of channels, such as 'l1' with example_inputs=, or speedup=False")
        if self.graph is None and isinstance(self._one_shot, Pruner):
            self.algorithm = replace(self.algorithm, params={**self.algorithm.params, "mode": "normal"})
        self._forecast = None if self.graph is None else Forecast(model, self.graph)
        self._state: State | None = None
        self._broken = False

    def schedule(self, final: float, steps: int) -> Schedule:
        """Returns the schedule that reaches a sparsity in a number of steps."""
        raise NotImplementedError

    # -- results -----------------------------------------------------------------------------------------------------------------

    def get_best_result(self) -> tuple[int, nn.Module, Masks | ElementMasks, float | None, list[dict[str, Any]]]:
        """Returns the best round as NNI does: (number, model, masks, score, config list of that round)."""
        found = self.best
        return found.round.number, found.model, found.masks, found.round.score, self.plan.at(found.round.number)

    def settings(self) -> dict[str, Any]:
        """Returns what the result depends on, as plain values, for `Run`."""
        params = {name: value if is_plain(value) else type(value).__name__ for name, value in self.algorithm.params.items()}
        return {
            "pruner": type(self).__name__,
            "algorithm": self.algorithm.kind.__name__,
            "entries": [self.plan.at(step) for step in range(self.total + 1)],
            "total_iteration": self.total,
            "speedup": self.speedup,
            "training_epochs": self.wishes.training_epochs,
            "optimizer": settings_of(self.wishes.optimizer),
            "pruning_params": params,
            "model": digest(self.model.state_dict()),
        }

    # -- one round ---------------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Where the rounds are; a copy of the model and of its optimizer is made when they begin."""
        if self._state is None:
            params = self.algorithm.params
            idle = self._how is None and isinstance(params.get("optimizer"), Optimizer)
            trainer: Any = params.get("trainer")
            how = Course(type(self).__name__, trainer, params["optimizer"]) if idle else self._how
            trainee = TrainingCopy.of(self.model, self.wishes, how, idle=idle)
            self._state = State(trainee, self.graph, None if self.graph is None else Masks(self.graph))
        return self._state

    def _round(self, number: int, tick: Tick) -> None:
        start = time.perf_counter()
        state = self.state
        if number:
            self.prune(number)
        self.train(number)
        score = None if self.evaluator is None else self._score(state.trainee.model)
        params, macs = self._cost()
        sparsity = 0.0 if state.masks is None else state.masks.sparsity
        record = Round(number, self.plan.asked(number), sparsity, params, macs, score, time.perf_counter() - start)
        state.rounds = (*state.rounds, record)
        if score is not None and number and state.masks is not None and self.history.best is record:
            state.keep_best(record)
        tick(said(record))

    def train(self, number: int) -> None:
        """Trains the model behind the pruning of a round."""
        del number
        self.state.trainee.train(None if self.speedup else self.state.masks)

    def prune(self, number: int) -> None:
        """Prunes to the sparsities of a round."""
        state = self.state
        if self.speedup:
            assert self._chooser is not None  # noqa: S101 (checked when the pruner was made)
            assert isinstance(state.masks, Masks)  # noqa: S101 (likewise)
            entries = relative(self.plan, number, self._chooser, state.masks)
            masks = self._chosen(entries, trace(state.trainee.model, self._chooser.graph.engine.program.inputs))
            assert isinstance(masks, Masks)  # noqa: S101 (of channels, as there is a graph)
            if masks.sparsity:
                state.shrink(masks)
            return
        with held(state.trainee.model, state.masks if self.algorithm.trains else None):
            chosen = self._chosen(self.plan.at(number), self.graph)
        state.masks = chosen
        chosen.apply(state.trainee.model)

    def _chosen(self, entries: list[dict[str, Any]], graph: DependencyGraph | None) -> Masks | ElementMasks:
        """Returns the one-shot pruner's masks; weights that it trained are taken over."""
        trainee = self.state.trainee
        gone = None if self.speedup else self.state.masks
        pruner = self.algorithm.pruner(trainee.model, entries, graph, trainee.optimizer, self._example_inputs, gone)
        model, masks = masks_of(pruner)
        if model is not trainee.model:
            trainee.model.load_state_dict(model.state_dict())
        return masks

    def _score(self, model: nn.Module) -> float:
        assert self.evaluator is not None  # noqa: S101 (the caller has looked)
        with flags_kept(model):
            return checked_score(self.evaluator(model), type(self).__name__)

    def _cost(self) -> tuple[int, int | None]:
        """Returns the parameters and, for channels, the MACs of what is left."""
        model, masks = self.state.trainee.model, self.state.masks
        if self.speedup and self.graph is not None:
            cost = count(model, self.graph.engine.program.inputs)
            return cost.params, cost.macs
        if isinstance(masks, Masks) and self._forecast is not None:
            cost = self._forecast.cost({name: masks[name] for name in masks})
            return cost.params, cost.macs
        gone = {} if masks is None else removed(dict(model.named_parameters(remove_duplicate=False)), masks)
        return sum(p.numel() for p in model.parameters()) - sum(int(g.sum()) for g in gone.values()), None

    # -- checks ------------------------------------------------------------------------------------------------------------------

    def _check_optimizers(self, who: str) -> None:
        own, other = self.wishes.optimizer, self.algorithm.params.get("optimizer")
        if self._how is not None and isinstance(other, Optimizer) and other is not own:
            what = f"pruning_params of {who} has another optimizer than {who}, and only one can go through the rounds"
            raise ConfigError(what, "Pass a function from parameters to an optimizer in pruning_params")
        if isinstance(self.model, torch.jit.ScriptModule):
            raise InputError(f"{who} works on copies, and scripted modules cannot be copied", "Pass the module before scripting")


class LinearPruner(RoundsPruner):
    """Raises sparsity by the same amount in every round: s_t = s_f t / n. See `RoundsPruner` for the arguments."""

    kind = "linear"

    def schedule(self, final: float, steps: int) -> Schedule:
        """Returns the linear schedule."""
        return Linear(final, steps)
