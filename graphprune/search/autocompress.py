"""AutoCompress (Liu et al., AutoCompress: An Automatic DNN Structured Pruning Framework, arXiv 1907.03141, sections 3 to 5).

                     ┌──────────────────────────────── N rounds ───────────────────────────────┐
present model ──▶ annealing: a sparsity for every group ──▶ ADMM: train towards it ──▶ remove ──▶ fine-tune ──▶ evaluate ──▶ save
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch
from torch import nn

from graphprune.cost.count import Cost, count
from graphprune.cost.predict import Forecast
from graphprune.errors import ConfigError, InputError
from graphprune.groups.build import trace
from graphprune.masks.channels import Masks, tensors_of
from graphprune.pruners.admm import ADMMPruner, Convergence
from graphprune.pruners.budgets import Budget
from graphprune.pruners.config import AMOUNTS, split_rho
from graphprune.pruners.options import InputOptions, Options, RunOptions, TrainingOptions, check_names, kept_folder, split
from graphprune.runs.checkpoint import digest
from graphprune.runs.progress import Tick
from graphprune.schedules.functions import Exponential
from graphprune.schedules.history import said
from graphprune.schedules.state import InRounds, State, narrowed
from graphprune.search.allocation import Projection, Remaining
from graphprune.search.annealing import Annealing
from graphprune.search.base import run
from graphprune.search.compressing import FORMER, Compression, Compressions, Searching, Training
from graphprune.search.pruner import require_constraints
from graphprune.search.scattering import filled, scattered
from graphprune.sensitivity.bench import finite
from graphprune.sensitivity.scoreboard import name_of
from graphprune.training.finetuning import Finetune, TrainingConfig, TrainingCopy
from graphprune.training.keeping import held
from graphprune.training.packing import plain_part, settings_of
from graphprune.training.session import check_count, flags_kept

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from graphprune.search.objective import Trial

_RHO = 1e-4


class _OwnOptions(TypedDict, total=False):
    """What `AutoCompressPruner` takes besides.

    Attributes:
        finetune: trains the model that a round leaves, in place.
        finetune_epochs: in its place, calls of the trainer.
        seed: of the searches.
        max_sparsity: the largest share of its original channels that a group may lose, by default 0.95.
    """

    finetune: Finetune | None
    finetune_epochs: int
    seed: int
    max_sparsity: float


class AutoCompressOptions(_OwnOptions, Options, TrainingOptions, InputOptions, RunOptions, total=False):
    """What `AutoCompressPruner` takes by keyword; a folder keeps every trial and every round."""


class AutoCompressPruner(InRounds):
    """Alternates between searching how much every group loses and training towards it, in rounds of rising sparsity.

    After round i of N, of a sparsity P the share 1 - (1 - P)^(i/N) is reached; of a budget, so much of the MACs or parameters is gone. Each
    round is, on what the rounds before have left,

    1. simulated annealing: it finds a sparsity for every group, under the round's constraint, by the evaluator's
       score of candidates that a criterion prunes at once; see `SimulatedAnnealingPruner` for how it anneals;
    2. ADMM: the weights are trained towards losing exactly as many channels of every group, see `ADMMPruner`, with the
       penalty on the weights of the groups that lose any; the channels that its last projection zeroed are those that go;
    3. speedup: they are removed physically (or masked), checked against the masked model, and the optimizer follows.

    Differs from the pruner of the seeds, whose annealing accepted nearly every candidate, whose penalty was not ADMM's, and which asked
    for the sparsity of the first config entry alone.

    Args:
        model: left bit-identical, as is the optimizer.
        config_list: entries as in the seeds, see `pruners.config`; all of them count. A "sparsity" or "total_sparsity" is that of all
            channels of its entry together; with `budget=`, entries say only which layers lose channels. "rho" is ADMM's, by default 1e-4.
        total_iteration: N, how many rounds.
        admm_params: how to train towards sparsities: `trainer`, `optimizer`, `criterion`, `data` and `loss` (or by keyword, see
            `ADMMPruner`), `iterations` (how often to project, 30 by default) and `training_epochs` (in between, 5 by default). Every
            round's ADMM begins with what the optimizer remembers of the fine-tuning before.
        sa_params: how to search: `start_temperature`, `stop_temperature`, `cool_down_rate` or `trials`, `perturbation_magnitude`,
            `evaluator`, `base_algo` (the criterion that says which channels of a candidate go, by default "l1"; one that needs data
            sees `data`) and `finetune` (trains a candidate in place), see `SimulatedAnnealingPruner`.
        log_dir: another name of `folder`.
        keep_intermediate_result: write the tensors of every round's model into `folder`/rounds, one safetensors file each.
        evaluator: from a model in evaluation mode to its score, higher = better: of rounds, and of candidates where sa_params has none.
        speedup: remove channels physically after every round. Without it they are masked, and stay so: candidates and trained models are
            of the original shapes.
        options: see `AutoCompressOptions`.

    Attributes:
        graph: the original model's.
        total: N.

    Raises:
        ConfigError: an argument is not usable, or what is asked for cannot be met.
        InputError: there are no example inputs, or the model cannot run on them.
    """

    kind = "autocompress"
    records = Compressions

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        total_iteration: int,
        admm_params: Mapping[str, Any] | None = None,
        sa_params: Mapping[str, Any] | None = None,
        log_dir: str | os.PathLike[str] | None = None,
        keep_intermediate_result: bool = False,  # noqa: FBT001, FBT002 (the call shape of the seeds)
        evaluator: Callable[[nn.Module], float] | None = None,
        speedup: bool = True,  # noqa: FBT001, FBT002 (likewise)
        **options: Unpack[AutoCompressOptions],
    ) -> None:
        self._who = who = type(self).__name__
        check_names(type(self), options, AutoCompressOptions, FORMER)
        training, others = split(options, TrainingOptions)
        own, others = split(others, _OwnOptions, RunOptions)
        self.model, self.speedup, self.keep = model, speedup, keep_intermediate_result
        self.seed, self.progress = own.get("seed", 0), own.get("progress", False)
        self.total = check_count(total_iteration, "total_iteration", 1)
        self.folder = kept_folder(who, own.get("folder"), log_dir, keep=self.keep)
        self._training = Training.of(training, admm_params, who)
        self._searching = Searching.of(sa_params, evaluator, who)
        self._wishes = TrainingConfig(finetune=own.get("finetune"), training_epochs=own.get("finetune_epochs", 0))
        self._wishes.checked(who)
        if self._wishes.finetune is not None and self._wishes.training_epochs:
            raise ConfigError(f"{who} has finetune= and finetune_epochs=", "Pass one of them")
        if isinstance(model, torch.jit.ScriptModule):
            raise InputError(f"{who} works on copies, and scripted modules cannot be copied", "Pass the module before scripting")
        entries, self._rho = split_rho(config_list, _RHO)
        self._entries: list[dict[str, Any]] = [dict(entry) for entry in entries]
        limit = own.get("max_sparsity", 0.95)
        self._given: dict[str, Any] = {"physical": speedup, "max_sparsity": limit, "example_inputs": None, **others}
        self._given |= self._training.seen_by(self._searching.criterion)
        self._state: State | None = None
        self._broken = False
        self._whole = self._remaining(model, self.total, None)  # says what cannot be met in the end
        self.graph = self._whole.graph
        self._given["graph"] = self.graph
        require_constraints(self._whole.constraints, who)
        self._annealing(self._whole, 0)  # says what is wrong with its arguments
        self._forecast = Forecast(model, self.graph)

    # -- results -----------------------------------------------------------------------------------------------------------------

    def compress(self) -> tuple[nn.Module, Masks]:
        """Runs the rounds that are missing; see `InRounds.compress`. Returns (the model of the last, the masks of the original model)."""
        model, masks = super().compress()
        return model, cast("Masks", masks)

    @property
    def history(self) -> Compressions:
        """The rounds so far, as a table, CSV or plot."""
        return cast("Compressions", super().history)

    @property
    def _ticks(self) -> int:  # type: ignore[override]  # one per candidate, one for the training
        return self._searching.cooling.trials + 1

    def get_best_result(self) -> tuple[int, nn.Module, Masks, float | None, list[dict[str, Any]]]:
        """Returns of the best round: number, model, masks, score, and a config list with the sparsity of every group, by its layers."""
        found = self.best
        record = cast("Compression", found.round)
        entries = [{"op_names": list(self.graph[n].layers), "sparsity": s} for n, s in record.sparsities.items() if s > 0]
        return record.number, found.model, cast("Masks", found.masks), record.score, entries

    def settings(self) -> dict[str, Any]:
        """Returns what the result depends on, as plain values, for `Run`."""
        plain = plain_part(self._given)
        budget: Budget | None = self._given.get("budget")
        return {
            "entries": self._entries,
            "rho": self._rho,
            "budget": None if budget is None else asdict(budget),
            "total_iteration": self.total,
            "options": plain,
            "base_algo": name_of(self._whole.pruner.criterion),
            "annealing": {**asdict(self._searching.cooling), "magnitude": self._searching.magnitude, "seed": self.seed},
            "candidates": self._searching.finetune is not None,
            "admm": {"iterations": self._training.iterations, "training_epochs": self._training.epochs},
            "finetune": self._wishes.finetune is not None,
            "optimizer": settings_of(self._training.how.optimizer),
            "finetune_epochs": self._wishes.training_epochs,
            "model": digest(self.model.state_dict()),
        }

    # -- one round ---------------------------------------------------------------------------------------------------------------

    def _round(self, number: int, tick: Tick) -> None:
        """Allocates, trains, removes, fine-tunes, evaluates."""
        start, shown = time.perf_counter(), 0

        def show(trial: Trial) -> None:  # those that were evaluated before an interruption count with the first behind it
            nonlocal shown
            tick(f"round {number}: candidate {trial.number}, score {trial.score:.4g}", trial.number + 1 - shown)
            shown = trial.number + 1

        objective = self._remaining(self._present(), number, show)
        trial = convergence = None
        if not objective.met:
            trial = self._allocated(objective, number)
            convergence = self._compressed(objective.counts(trial.sparsities))
        trainee = self.state.trainee
        trainee.train(None if self.speedup else self._masks)
        score = self._score(trainee.model, number)
        cost, gone = self._cost(), {n: float((~self._masks[n]).mean()) for n in self._whole.groups}
        asked, targets = self._asked(number), tuple(c.target for c in objective.constraints)
        seconds, sparsity = time.perf_counter() - start, self._masks.sparsity
        record = Compression(number, asked, sparsity, cost.params, cost.macs, score, seconds, targets, gone, trial, convergence)
        self.state.rounds = (*self.state.rounds, record)
        if self.history.best is record:
            self.state.keep_best(record)
        tick(f"round {number}: {said(record)}", self._ticks - shown)

    def _allocated(self, objective: Remaining, number: int) -> Trial:
        """Returns the best trial of the annealing on what is left."""
        where = None if self.folder is None else Path(self.folder) / "annealing"
        search, settings = self._annealing(objective, number), self.settings()
        return run(objective, search, self._searching.cooling.trials, where, kind=f"round-{number:03d}", settings=settings).best

    def _annealing(self, objective: Remaining, number: int) -> Annealing:
        space = (dict.fromkeys(objective.groups, 0.5), objective.most, objective.project)
        return Annealing(*space, cooling=self._searching.cooling, magnitude=self._searching.magnitude, seed=self.seed + number)

    def _compressed(self, counts: Mapping[str, int]) -> Convergence | None:
        """Trains towards these counts by ADMM and removes what it projected out."""
        state, trainee = self.state, self.state.trainee
        graph = trace(trainee.model, self.graph.engine.program.inputs) if self.speedup else self.graph
        weights = {name for name, _ in trainee.model.named_parameters(remove_duplicate=False)}
        projection = Projection(self.graph, counts, self._masks, state.kept, weights)
        layers = self._whole.pruner.config.layers
        rho = {name: self._rho[layers[layer].entry] for name, layer in projection.layers().items()}
        if not rho:
            return None
        how = (
            self._training.how.trainer,
            trainee.optimizer,
            trainee.criterion,
            self._training.iterations,
            self._training.epochs,
            "coarse-grained",
        )
        with held(trainee.model, None if self.speedup else self._masks):
            admm = ADMMPruner(trainee.model, [{"sparsity": 0.0, "op_types": ["default"]}], *how, graph=graph)  # type: ignore[arg-type]  # in order
            admm.projection, admm.rho = projection, rho  # exactly these counts, of these groups
            masks = cast("Masks", admm.masks())
            trainee.model.load_state_dict(admm.model.state_dict())
        if self.speedup:
            kind = "module" if self._given.get("keep_class") else "auto"
            state.shrink(narrowed(graph, self.graph, state.kept, masks.positions()), kind)
        else:
            masks.apply(trainee.model)
        state.masks = masks
        return admm.history[-1]

    def _present(self) -> nn.Module:
        """Returns the model as it is, in the original shapes, zero where channels have gone."""
        trainee = self.state.trainee
        values = scattered(self.model, trainee.model, self._masks) if self.speedup else tensors_of(trainee.model, {})
        model = filled(self.model, values)
        self._masks.apply(model)
        return model

    def _remaining(self, model: nn.Module, number: int, shows: Callable[[Trial], None] | None) -> Remaining:
        """Returns what is searched in a round: constraints of its sparsity, over what the rounds before have left."""
        given, entries = dict(self._given), self._entries
        if number < self.total:
            entries = [{k: self._reached(v, number) if k in AMOUNTS else v for k, v in entry.items()} for entry in entries]
            budget: Budget | None = given.get("budget")
            if budget is not None:
                given["budget"] = Budget(**{budget.unit: self._reached(budget.removed, number)})
        alive = None if self._state is None else self._masks
        given |= {"config_list": entries, "finetune": self._searching.finetune}
        return Remaining(model, self._searching.scorer, alive, shows, self._searching.criterion, **given)

    def _reached(self, final: float, number: int) -> float:
        """Returns how much of a sparsity a round reaches."""
        return Exponential(float(final), self.total)(number)

    def _asked(self, number: int) -> tuple[float, ...]:
        """Returns the share that a round's budget removes, or the sparsity of every entry that prunes."""
        budget: Budget | None = self._given.get("budget")
        final = [entry[k] for entry in self._entries for k in AMOUNTS if k in entry] if budget is None else [budget.removed]
        return tuple(self._reached(share, number) for share in final)

    def _score(self, model: nn.Module, number: int) -> float:
        with flags_kept(model):
            return finite(self._searching.evaluator(model.eval()), f"the evaluator of {self._who} returned for round {number}")

    def _cost(self) -> Cost:
        """Returns what is left of parameters and MACs."""
        if self.speedup:
            return count(self.state.trainee.model, self.graph.engine.program.inputs)
        return self._forecast.cost(self._masks)

    # -- what is kept ------------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """Where the rounds are; a copy of the model and of its optimizer is made when they begin."""
        if self._state is None:
            trainee = TrainingCopy.of(self.model, self._wishes, self._training.how)
            self._state = State(trainee, self.graph, Masks(self.graph))
        return self._state

    @property
    def _masks(self) -> Masks:
        return cast("Masks", self.state.masks)
