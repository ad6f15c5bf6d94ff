"""The words of AutoCompress: its arguments, with those that other versions had, and the records of its rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, cast

from graphprune.criteria import criterion_named
from graphprune.criteria.base import Criterion, seen_by
from graphprune.criteria.scoring import DATA_FREE
from graphprune.errors import ConfigError, nearest
from graphprune.pruners.admm import Convergence
from graphprune.runs.records import Column, spread
from graphprune.schedules.history import History, Round
from graphprune.search.annealing import Cooling
from graphprune.search.objective import Trial
from graphprune.training.session import Course, check_count, course

if TYPE_CHECKING:
    from torch import nn

_TRAINING = ("trainer", "optimizer", "criterion", "data", "loss")  # in the order of `course`
_ADMM = (*_TRAINING, "iterations", "training_epochs")
_ANNEALING = ("start_temperature", "stop_temperature", "cool_down_rate", "perturbation_magnitude")
_SA = (*_ANNEALING, "trials", "evaluator", "base_algo", "finetune")
_HIGHER = "an evaluator of which higher is better, such as one that returns minus a loss"
_ENTRIES = "'rho' in the entries of the config list"
FORMER = {
    "experiment_data_dir": "folder=",
    "num_iterations": "total_iteration=",
    "optimize_mode": _HIGHER,
    "base_algo": "sa_params={'base_algo': ...}, the name of a criterion",
    "pruning_algorithm": "sa_params={'base_algo': ...}, the name of a criterion",
    **{name: f"sa_params={{{name!r}: ...}}" for name in (*_ANNEALING, "trials")},
    "admm_num_iterations": "admm_params={'iterations': ...}",
    "admm_epochs_per_iteration": "admm_params={'training_epochs': ...}",
    "iterations": "admm_params={'iterations': ...}",
    "training_epochs": "admm_params={'training_epochs': ...}, or finetune_epochs= for training after a round's removal",
    "row": _ENTRIES,
    "rho": _ENTRIES,
}
_FORMER_ADMM = {
    "evaluator": "trainer=, optimizer= and criterion=, or data=, loss= and optimizer=",
    "granularity": "nothing: channels go, which is 'coarse-grained'",
    "num_iterations": "'iterations'",
    "epochs_per_iteration": "'training_epochs'",
    "row": _ENTRIES,
    "rho": _ENTRIES,
}
_FORMER_SA = {
    "pruning_algorithm": "'base_algo', the name of a criterion",
    "pruning_params": "the options as keyword arguments of the pruner",
    "optimize_mode": _HIGHER,
    "finetuner": "'finetune'",
    "log_dir": "folder= of the pruner",
}


@dataclass(frozen=True, eq=False)
class Training:
    """How to train towards sparsities.

    Attributes:
        how: the user's training.
        iterations: of ADMM.
        epochs: calls of the trainer per iteration.
        data: what it is by, where that is no trainer: `data` and `loss`.
    """

    how: Course
    iterations: int
    epochs: int
    data: Mapping[str, Any]

    @classmethod
    def of(cls, given: Mapping[str, Any], admm_params: object, who: str) -> Training:
        """Returns what was given by keyword and as admm_params.

        Raises:
            ConfigError: an argument is unknown, unusable, missing, or given twice.
        """
        params = checked_params(admm_params, _ADMM, _FORMER_ADMM, f"admm_params of {who}")
        for name, value in given.items():
            if params.setdefault(name, value) is not value:
                raise ConfigError(f"{who} is given {name}= and admm_params with another {name!r}", "Pass one of them")
        iterations = check_count(params.get("iterations", 30), "iterations", 1)
        epochs = check_count(params.get("training_epochs", 5), "training_epochs", 1)
        data = {"data": params.get("data"), "loss": params.get("loss")}
        how = course(who, *(params.get(name) for name in _TRAINING))
        return cls(how, iterations, epochs, data if params.get("data") is not None else {})

    def seen_by(self, criterion: str | Criterion) -> Mapping[str, Any]:
        """Returns the data that a criterion looks at, if it looks at any."""
        return {} if seen_by(criterion_named(criterion)) in DATA_FREE else self.data


@dataclass(frozen=True, eq=False)
class Searching:
    """How to search for sparsities, and how to score.

    Attributes:
        evaluator: scores what rounds leave.
        scorer: scores candidates.
        cooling: of the annealing.
        magnitude: the largest change of one group's sparsity at the start.
        criterion: says which channels of a candidate go.
        finetune: trains candidates in place, or None.
    """

    evaluator: Callable[[nn.Module], float]
    scorer: Callable[[nn.Module], float]
    cooling: Cooling
    magnitude: float
    criterion: Any
    finetune: Callable[[nn.Module], object] | None

    @classmethod
    def of(cls, sa_params: object, evaluator: Any, who: str) -> Searching:
        """Returns what was given as sa_params, with the evaluator of rounds.

        Raises:
            ConfigError: an argument is unknown or unusable, or there is no evaluator.
        """
        params = checked_params(sa_params, _SA, _FORMER_SA, f"sa_params of {who}")
        own = params.get("evaluator")
        scorers: tuple[Any, Any] = (own if evaluator is None else evaluator, evaluator if own is None else own)
        for function in scorers:
            if not callable(function):
                what = f"{who} has no evaluator" if function is None else f"the evaluator of {who} is a {type(function).__name__}"
                raise ConfigError(what, "Pass evaluator=, a function from a model to its score, higher = better")
        finetune = params.get("finetune")
        if finetune is not None and not callable(finetune):
            raise ConfigError(f"'finetune' in sa_params of {who} is a {type(finetune).__name__}", "Pass a function of a model")
        falls = (params.get("start_temperature", 100.0), params.get("stop_temperature", 20.0), params.get("cool_down_rate", 0.9))
        cooling = Cooling.of(*falls, params.get("trials"))
        return cls(*scorers, cooling, params.get("perturbation_magnitude", 0.35), params.get("base_algo", "l1"), finetune)


def checked_params(given: object, known: Iterable[str], former: Mapping[str, str], where: str) -> dict[str, Any]:
    """Returns the arguments of a part of a pruner, given as a dict.

    Args:
        given: the dict, or None for nothing.
        known: the names that there are.
        former: name of an argument that there is not -> what to write instead.
        where: the dict's name, for errors.

    Raises:
        ConfigError: it is no dict, or has another name in it.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is a {type(given).__name__}", "Pass a dict of arguments by name")
    for name in given:
        if name not in known:
            fix = f"Write {former[name]}" if name in former else nearest(str(name), known)
            raise ConfigError(f"{where} has no argument {name!r}", fix or f"Use {', '.join(known)}")
    return dict(given)


# -- records -------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compression(Round):
    """One round of AutoCompress.

    Attributes:
        targets: what each constraint was to come down to: the MACs or parameters of a budget, or the channels of each config entry.
        sparsities: group name -> which share of the original model's channels is gone.
        trial: the best one of the annealing, whose sparsities are shares of what was left before the round; None where nothing had to go.
        convergence: of the last iteration of ADMM; None where nothing had to go.
    """

    columns: ClassVar[tuple[Column, ...]] = (
        *Round.columns,
        Column("targets"),
        Column("trial_score", value=lambda r: r.trial and r.trial.score),
        Column("primal", value=lambda r: r.convergence and r.convergence.primal),
        Column("dual", value=lambda r: r.convergence and r.convergence.dual),
    )
    targets: tuple[float, ...] = ()
    sparsities: dict[str, float] = field(default_factory=dict)
    trial: Trial | None = None
    convergence: Convergence | None = None


class Compressions(History):
    """The rounds of AutoCompress, in order."""

    kind = Compression

    def __iter__(self) -> Iterator[Compression]:
        """Iterates over the rounds."""
        return iter(cast("tuple[Compression, ...]", self[:]))

    @property
    def _columns(self) -> tuple[Column, ...]:
        return (*super()._columns, *spread(self, "sparsities"))
