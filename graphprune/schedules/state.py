"""Where a pruner that works in rounds is: the model that is worked on and all that goes along with it, as it is saved and put back."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor, nn

from graphprune.errors import ConfigError
from graphprune.groups.build import trace
from graphprune.masks.channels import Masks
from graphprune.masks.copying import copied
from graphprune.masks.elements import ElementMasks
from graphprune.runs.checkpoint import Run
from graphprune.runs.progress import Tick, ticking
from graphprune.schedules.history import History, Round
from graphprune.speedup.speedup import speedup
from graphprune.surgery.recipe import composed
from graphprune.training.finetuning import Snapshot, TrainingCopy
from graphprune.training.optimizers import slice_average
from graphprune.training.packing import load, save

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from graphprune.groups.graph import DependencyGraph
    from graphprune.surgery.recipe import Kept as Positions


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a round left.

    Attributes:
        round: its record.
        model: trained; with what the masks remove zeroed, or removed.
        masks: of the original model.
    """

    round: Round
    model: nn.Module
    masks: Masks | ElementMasks


@dataclass(eq=False)
class State:
    """Where the rounds are.

    Attributes:
        trainee: the copy of the model that is worked on.
        graph: the original model's, or None where single weights or layers are masked.
        masks: of the original model; None before the first pruning of single weights.
        rounds: the records so far.
        best: what the best round left, where there is an evaluator.
        checkpoint: what weights are rewound to, cut like the model; None where nothing is rewound.
        snapshot: what the optimizer is rewound to.
        chain: the speedups so far: the kind of result, and the masks of the model at that time.
        kept: parameter -> dim -> which positions of the original model the speedups have left.
    """

    trainee: TrainingCopy
    graph: DependencyGraph | None
    masks: Masks | ElementMasks | None = None
    rounds: tuple[Round, ...] = ()
    best: Outcome | None = None
    checkpoint: dict[str, Tensor] | None = None
    snapshot: Snapshot | None = None
    chain: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    kept: Positions = field(default_factory=dict)
    _best_after: int = 0  # how many speedups there had been

    def shrink(self, masks: Masks, kind: Any = "auto", *, verify: bool = True) -> None:
        """Removes channels from the model that is worked on; optimizer, checkpoint and snapshot follow.

        Args:
            masks: of the model as it is.
            kind: of the result, see `speedup`.
            verify: compare with the masked model.

        Raises:
            VerificationError: the shrunk model does not compute what the masked one computes.
        """
        small, report = speedup(self.trainee.model, masks, verify=verify, result=kind)
        self.trainee.shrink_to(small, masks)
        if self.checkpoint is not None:
            self.checkpoint = slice_average(self.checkpoint, small, masks)
        if self.snapshot is not None:
            self.snapshot = self.snapshot.cut(masks)
        self.chain.append((report.kind, {name: masks[name].copy() for name in masks}))
        if self.graph is not None:
            self.kept = composed(self.kept, masks.positions(), self.graph.aliases)
            self.masks = narrowed(self.graph, self.graph, {}, self.kept)

    def keep_best(self, record: Round) -> None:
        """Takes what is there now as what the best round left."""
        assert self.masks is not None  # noqa: S101 (for the type checker; rounds have masks)
        self.best, self._best_after = Outcome(record, copied(self.trainee.model, {}), self.masks), len(self.chain)

    def saved(self) -> dict[str, Any]:
        """Returns everything, for `graphprune.training.packing.save`."""
        best = None
        if self.best is not None:
            best = {"round": self.best.round, "model": self.best.model, "masks": dict(self.best.masks.items()), "after": self._best_after}
        return {
            "rounds": self.rounds,
            "model": self.trainee.model,
            "optimizer": self.trainee.optimizer,
            "masks": None if self.masks is None else dict(self.masks.items()),
            "chain": self.chain,
            "best": best,
            "checkpoint": self.checkpoint,
            "snapshot": self.snapshot,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Puts a fresh state where it was when `saved` was written: speedups are done again, then tensors are filled in."""
        self.rounds, self.checkpoint, self.snapshot = saved["rounds"], None, None
        chain, best = saved["chain"], saved["best"]
        for number in range(len(chain) + 1):
            if best is not None and best["after"] == number:
                model = copied(self.trainee.model, {})
                best["model"].fill(model)
                self.best, self._best_after = Outcome(best["round"], model, self._masks_from(best["masks"])), number
            if number < len(chain):
                assert self.graph is not None  # noqa: S101 (only groups are removed)
                kind, masks = chain[number]
                self.shrink(Masks(trace(self.trainee.model, self.graph.engine.program.inputs), masks), kind, verify=False)
        saved["model"].fill(self.trainee.model)
        if self.trainee.optimizer is not None:
            saved["optimizer"].fill(self.trainee.optimizer)
        if saved["masks"] is not None:
            self.masks = self._masks_from(saved["masks"])
        self.checkpoint, self.snapshot = saved["checkpoint"], saved["snapshot"]

    def _masks_from(self, flags: Mapping[str, Any]) -> Masks | ElementMasks:
        return ElementMasks(self.trainee.model, flags) if self.graph is None else Masks(self.graph, flags)


class InRounds(ABC):
    """What works in rounds, each of which is saved; the same call goes on from there, with the random numbers of then.

    Attributes:
        total: the number of the last round.
        folder: where the run is kept, or None.
        keep: whether every round's model is kept there, too.
        progress: show a bar with score, sparsity and time left.
    """

    kind: ClassVar[str]  # names the files
    first: ClassVar[int] = 1  # the first round
    records: ClassVar[type[History]] = History
    total: int
    folder: str | os.PathLike[str] | None
    keep: bool
    progress: bool
    _state: State | None
    _broken: bool  # whether an exception left a round half done
    _ticks = 1  # of the bar, per round

    @property
    @abstractmethod
    def state(self) -> State:
        """Where the rounds are; made when they begin."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Returns what the result depends on, as plain values, for `Run`."""

    @abstractmethod
    def _round(self, number: int, tick: Tick) -> None:
        """Does a round and adds its record; `tick` moves the bar by one step and says what is next to it."""

    def compress(self) -> tuple[nn.Module, Any]:
        """Runs the rounds that are missing; returns (the model of the last, the masks of the original model).

        Raises:
            ConfigError: the trainer never steps its optimizer, or an evaluator returns no usable number.
            FileError: the folder holds a run with other settings, or cannot be written.
            InputError: the training diverged.
            VerificationError: a shrunk model does not compute what its masked model computes.
        """
        who, rounds = type(self).__name__, self.total + 1 - self.first
        if len(self.history) < rounds:
            run = Run(self.folder, self.kind, self.settings())
            if self._state is None or self._broken:
                self._state = None
                self._begin(run)
            self._broken = True  # until all rounds are done: what an exception leaves is no round
            with ticking(who, rounds * self._ticks, len(self.history) * self._ticks, shown=self.progress) as tick:
                for number in range(self.first + len(self.history), self.total + 1):
                    self._round(number, tick)
                    save(run, who, self.state.saved())
                    if self.keep and self.folder is not None:
                        own = Run(Path(self.folder) / "rounds", f"{self.kind}-{number:03d}", run.settings)
                        own.save({"round": self.history.to_dicts()[-1]}, self.state.trainee.model.state_dict())
            self._broken = False
            self.history.keep(self.folder, self.kind)
        last = self.last
        return last.model, last.masks

    def _begin(self, run: Run) -> None:
        """Starts, or goes on where the run was."""
        saved = load(run)
        if saved is not None:
            self.state.restore(saved)
            run.load()  # for its random numbers, of which tracing the model may have used some
        elif run.path is not None:
            self.state.trainee.check_optimizer_parameters(type(self).__name__)

    @property
    def history(self) -> History:
        """The rounds so far, as a table, CSV or plot."""
        return self.records(() if self._state is None else self._state.rounds, type(self).__name__)

    @property
    def last(self) -> Outcome:
        """What the last round left.

        Raises:
            ConfigError: there was none yet.
        """
        if self._state is None or not self._state.rounds or self._state.masks is None:
            raise ConfigError(f"{type(self).__name__} has no result yet", "Call compress() first")
        return Outcome(self._state.rounds[-1], self._state.trainee.model, self._state.masks)

    @property
    def best(self) -> Outcome:
        """What the round with the highest score left, of equal ones the sparser; without an evaluator, the last.

        Raises:
            ConfigError: there was none yet.
        """
        return self.last if self._state is None or self._state.best is None else self._state.best


def narrowed(small: DependencyGraph, graph: DependencyGraph, present: Positions, left: Positions) -> Masks:
    """Returns the masks of a shrunk model by which some positions of the original parameters are left.

    Args:
        small: the groups of the shrunk model.
        graph: those of the original one.
        present: parameter -> dim -> which positions of the original parameter the shrunk model has; those left out are whole.
        left: likewise, which are to be left; nothing that is gone already.
    """
    found = {}
    for group in small.groups:
        alive = np.ones(group.channels, dtype=bool)
        for s in group.producers or group.slices:
            name = graph.aliases.get(s.parameter, s.parameter)
            keep = left.get(name, {}).get(s.dim)
            if keep is not None:
                stays = np.isin(places(graph, present, name, s.dim), keep)
                alive &= stays[s.index].any(axis=1)  # of a head, some rows may go with the width of all heads
        found[group.name] = alive
    return Masks(small, found)


def places(graph: DependencyGraph, present: Positions, parameter: str, dim: int) -> NDArray[np.int64]:
    """Returns which positions of an original parameter there are."""
    found = present.get(parameter, {}).get(dim)
    return np.arange(graph.shapes[parameter][dim], dtype=np.int64) if found is None else found
