"""Sensitivity analysis: prune one group alone, evaluate, put it back, for every group and a list of sparsities.

Han et al., Learning both Weights and Connections, arXiv 1506.02626, figure 6, and Li et al., Pruning Filters for Efficient ConvNets, arXiv
1608.08710, figure 2(b), for whole groups of coupled channels.
"""

from __future__ import annotations

import hashlib
import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import numpy as np

from graphprune.cost.predict import Forecast
from graphprune.criteria import criterion_named
from graphprune.criteria.base import Criterion
from graphprune.errors import ConfigError
from graphprune.masks.channels import tensors_of
from graphprune.pruners.base import Pruner
from graphprune.pruners.budgets import keep_highest, kept_count, least_kept
from graphprune.pruners.config import AMOUNTS, check_sparsity
from graphprune.pruners.options import DataOptions, GroupOptions, check_names, showing_data, split
from graphprune.pruners.requests import requests
from graphprune.runs.checkpoint import digest
from graphprune.runs.progress import Tick, ticking
from graphprune.sensitivity.bench import Bench, Evaluator, Kept, Walk, drive
from graphprune.sensitivity.curves import Measurement, Sensitivity, exceeds
from graphprune.sensitivity.scoreboard import Scoreboard, name_of
from graphprune.training.session import check_count

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn
    from typing_extensions import Unpack

SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Progress: TypeAlias = Callable[[str, int, int], None]  # is told the stage, the steps done and the steps in total
_STAGE = "sensitivity"
_REFUSED = {
    "mode": "Leave it out: an analysis prunes one group at a time",
    "budget": "Leave it out: an analysis says what could go, and asks for nothing",
    "keep_class": "Leave it out: the widths of other groups would change with those of one",
}


class EvaluationOptions(TypedDict, total=False):
    """How groups are evaluated.

    Attributes:
        sparsities: shares of a group's channels that go, in (0, 1), by default `SPARSITIES`.
        processes: how many evaluate at once, by default 1. With more, the model and the evaluator are sent to others, which start with the
            imports of the script anew: they must be picklable, and the script guarded by ``if __name__ == "__main__":``.
        progress: show a bar on stderr, where that is a terminal; or a function that is told the stage, the steps done and all steps.
        physical: evaluate shrunk models (the default); else masked ones, of the original shapes.
        name: of the evaluator and its data, for scores in the folder; by default the name of the function. Change it with the data.
        seed: of the random numbers that each evaluation sees, by default 0.
    """

    sparsities: Iterable[float]
    processes: int
    progress: bool | Progress
    physical: bool
    name: str | None
    seed: int


class AnalysisOptions(EvaluationOptions, GroupOptions, DataOptions, total=False):
    """What a sensitivity analysis takes; of the options of `Pruner`, all but mode, budget and keep_class."""


def sensitivity(
    model: nn.Module,
    example_inputs: object,
    evaluator: Evaluator,
    *,
    criterion: str | Criterion = "l1",
    config_list: Sequence[Mapping[str, Any]] | None = None,
    early_stop: float | None = None,
    folder: str | os.PathLike[str] | None = None,
    **options: Unpack[AnalysisOptions],
) -> Sensitivity:
    """Returns how the score falls when one group of channels alone is pruned, for every group and sparsity.

    With a folder, every score is on disk before the next evaluation begins, under the groups and weights of the model, the order of its
    channels and the name of the evaluator: what is known is not evaluated again, so that an analysis that was interrupted goes on, and
    further sparsities are added to those there are.

    Args:
        model: left bit-identical; the evaluator is given copies.
        example_inputs: what the model is run on to find its groups, see `Pruner`.
        evaluator: from a model in evaluation mode to a finite number, higher = better. Random numbers start anew for every evaluation.
        criterion: says which channels go first: the name of one, or one.
        config_list: which layers are looked at, and the most that each may lose; amounts in it are not. By default, all layers.
        early_stop: no higher sparsity of a group is evaluated once the score has dropped by more than this.
        folder: where scores are kept; None keeps nothing.
        options: see `AnalysisOptions`.

    Raises:
        ConfigError: an argument is not usable, the evaluator returns no finite number, or cannot be sent to another process.
        InputError: the model cannot run on the example inputs.
        FileError: the folder cannot be written.
    """
    check_names(sensitivity, options, AnalysisOptions, _REFUSED)
    own, others = split(options, EvaluationOptions)
    asked = Asked.of(own, evaluator, early_stop, folder)
    chosen = criterion_named(criterion)
    entries = places(config_list if config_list is not None else [{"op_types": ["default"]}])
    given: dict[str, Any] = {"mode": "dependency_aware", **showing_data(others, chosen)}
    return analysed(model, Subject.of(Pruner(model, entries, chosen, example_inputs, **given)), evaluator, asked)


def places(config_list: Any) -> Any:
    """Returns a config list that says where and how much at most, but asks for nothing."""
    if not isinstance(config_list, (list, tuple)):
        return config_list  # the pruner says what is wrong with it
    return [_place(entry) if isinstance(entry, Mapping) and not entry.get("exclude") else entry for entry in config_list]


def _place(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: value for key, value in entry.items() if key not in AMOUNTS}, "sparsity": 0.0}


@dataclass(frozen=True)
class Asked:
    """How an analysis is made; the attributes are arguments of `sensitivity`.

    Raises:
        ConfigError: one of them is not usable.
    """

    sparsities: tuple[float, ...]
    early_stop: float | None
    folder: str | os.PathLike[str] | None
    processes: int
    progress: bool | Progress
    physical: bool
    name: str
    seed: int

    @classmethod
    def of(
        cls, given: Mapping[str, Any], evaluator: Evaluator | None, early_stop: float | None, folder: str | os.PathLike[str] | None
    ) -> Asked:
        """Returns what `EvaluationOptions` ask for."""
        name = given.get("name") or name_of(evaluator)
        counts = (folder, given.get("processes", 1), given.get("progress", False), given.get("physical", True), name)
        return cls(tuple(given.get("sparsities", SPARSITIES)), early_stop, *counts, given.get("seed", 0))

    def __post_init__(self) -> None:
        found = sorted({check_sparsity(value, f"sparsities[{index}]") for index, value in enumerate(self.sparsities)})
        if not found or found[0] == 0.0:
            raise ConfigError(f"sparsities is {self.sparsities!r}", "Give at least one, and all above 0")
        object.__setattr__(self, "sparsities", tuple(found))
        check_count(self.processes, "processes", 1)
        stop = self.early_stop
        if stop is not None and (isinstance(stop, bool) or not isinstance(stop, numbers.Real) or not stop >= 0):
            raise ConfigError(f"early_stop is {stop!r}", "Give the drop of the score at which to stop, 0 or above, or None")


@dataclass(frozen=True, eq=False)
class Subject:
    """What an analysis looks at.

    Attributes:
        pruner: whose graph, rounding and limits hold.
        scores: group name -> score per channel, for the groups that may lose channels.
        most: group name -> the largest share that it may lose.
        whole: group name -> why it stays whole.
    """

    pruner: Pruner
    scores: Mapping[str, NDArray[np.float64]]
    most: Mapping[str, float]
    whole: Mapping[str, str]

    @classmethod
    def of(cls, pruner: Pruner) -> Subject:
        """Returns what a pruner may prune.

        Raises:
            ConfigError: nothing.
        """
        scored = pruner.scored()
        found = requests(pruner.graph, pruner.config, pruner.cut, pruner.selectable, together=False)
        alone = {g.name: "it has one channel" for g in pruner.graph.groups if g.channels == 1}
        whole = {**alone, **scored.unscored, **found.whole}
        most = {n: m for n, m in found.most.items() if n not in whole}
        if not most:
            raise ConfigError("no group of channels can be pruned of what the config list selects", "Select more layers")
        return cls(pruner, {n: scored.groups[n] for n in most}, most, whole)

    def fewest(self, name: str) -> int:
        """Returns how many channels a group must keep."""
        return least_kept(self.scores[name].size, self.most[name], self.pruner.round_to)

    def mask(self, name: str, kept: int, present: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Returns the mask that keeps so many of a group's channels, all of them among those that are present."""
        return keep_highest(np.where(present, self.scores[name], -np.inf), kept) & present

    def settings(self, model: nn.Module, present: Kept, asked: Asked) -> dict[str, Any]:
        """Returns what scores depend on: the model, which channels are gone, in which order others go, and who evaluates."""
        order, gone = hashlib.sha256(), hashlib.sha256()
        for name, scores in sorted(self.scores.items()):
            order.update(name.encode() + np.argsort(-scores, kind="stable").astype("<i8").tobytes())
        for name, mask in sorted(present.items()):
            gone.update(name.encode() + mask.tobytes())
        return {"graph": self.pruner.graph.fingerprint, "weights": digest(tensors_of(model, {})), "order": order.hexdigest(),
                "present": gone.hexdigest(), "evaluator": asked.name, "physical": asked.physical, "seed": asked.seed}  # fmt: skip


def analysed(
    model: nn.Module, subject: Subject, evaluator: Evaluator, asked: Asked, present: Kept | None = None, dense: float | None = None
) -> Sensitivity:
    """Returns the analysis of a model that may have lost channels already.

    Args:
        model: left bit-identical.
        subject: its groups and their scores.
        evaluator: see `sensitivity`.
        asked: see `sensitivity`.
        present: group name -> which channels are there still; sparsities are shares of these. By default all.
        dense: the score of the model without those that are gone, where it is known.
    """
    there = {n: (present or {}).get(n, np.ones(s.size, dtype=bool)) for n, s in subject.scores.items()}
    board = Scoreboard(asked.folder, subject.settings(model, there, asked))
    bench = Bench(model, subject.pruner.graph, evaluator, physical=asked.physical, seed=asked.seed)
    known = board.get("", 0)
    if known is None:
        known = (dense, 0.0) if dense is not None else bench(there)
        board.put("", 0, *known)
        evaluations = int(dense is None)
    else:
        evaluations = 0
    groups = [n for n, mask in there.items() if mask.sum() > 1]
    with _shown(asked.progress, len(groups) * len(asked.sparsities)) as report:
        walks = _Walks(subject, asked, there, board, known[0], Forecast(model, subject.pruner.graph), report)
        drive(bench, [walks.walk(name) for name in groups], asked.processes)
    measurements = tuple(m for name in groups for m in walks.found[name])
    whole = {**subject.whole, **{n: "one channel is left" for n in there if n not in groups}}
    return Sensitivity(known[0], walks.forecast.cost(there), measurements, walks.stopped, whole, evaluations + walks.evaluations)


@dataclass(eq=False)
class _Walks:
    """Goes up the sparsities of one group after the other, and notes what is found."""

    subject: Subject
    asked: Asked
    there: Kept
    board: Scoreboard
    dense: float
    forecast: Forecast
    report: Tick
    found: dict[str, list[Measurement]] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)
    evaluations: int = 0

    def walk(self, name: str) -> Walk:
        """Asks for the scores of one group that are not known, and ends where there is no need to go on."""
        present, pruner = self.there[name], self.subject.pruner
        channels, fewest = int(present.sum()), self.subject.fewest(name)
        self.found[name] = []
        for number, sparsity in enumerate(self.asked.sparsities):
            count = kept_count(channels, sparsity, pruner.rounding, pruner.round_to)
            if count < fewest:
                self.stopped[name] = f"max_sparsity_per_layer is {self.subject.most[name]:g}"
            elif self.found[name] and self.asked.early_stop is not None and exceeds(self.found[name][-1].drop, self.asked.early_stop):
                self.stopped[name] = f"the score drops by more than {self.asked.early_stop:g}"
            if name in self.stopped:
                self.report(f"{name} ends below {sparsity:.0%}", len(self.asked.sparsities) - number)
                return
            kept = {**self.there, name: self.subject.mask(name, count, present)}
            score = (self.dense, 0.0) if count == channels else self.board.get(name, count)
            if score is None:
                score = yield kept
                self.evaluations += 1
                self.board.put(name, count, *score)
            cost = self.forecast.cost(kept)
            layers, drop = pruner.graph[name].layers, self.dense - score[0]
            taken = Measurement(name, layers, channels, count, sparsity, score[0], drop, cost.params, cost.macs, score[1])
            self.found[name].append(taken)
            self.report(f"{name} at {sparsity:.0%}: {score[0]:.4g}")


@contextmanager
def _shown(progress: bool | Progress, total: int) -> Iterator[Tick]:  # noqa: FBT001 (the argument of that name)
    """Gives a function that is told how many steps have been done and what came out, and shows it as `sensitivity` was asked to."""
    done = 0
    if callable(progress):

        def tell(now: str, steps: int = 1) -> None:
            nonlocal done
            del now
            done += steps
            progress(_STAGE, done, total)

        yield tell
        return
    with ticking(_STAGE, total, 0, shown=progress) as tick:
        yield tick
