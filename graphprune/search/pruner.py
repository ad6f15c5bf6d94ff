"""What the pruners that search have in common: the best trial, the last one, and what the best comes to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, get_args

from graphprune.criteria.base import Criterion
from graphprune.errors import ConfigError
from graphprune.pruners.options import InputOptions, RunOptions, check_evaluator, check_names, split
from graphprune.search.objective import Constraint, Objective, ObjectiveOptions, Trial

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Unpack

    from graphprune.masks.channels import Masks
    from graphprune.search.base import SearchResult

Mode: TypeAlias = Literal["maximize", "minimize"]
_HOW_MUCH = "Pass budget=, such as Budget(macs=0.5), or write a 'total_sparsity'"


class SearchOptions(ObjectiveOptions, InputOptions, RunOptions, total=False):
    """What pruners take that search.

    Attributes:
        seed: of the search, and of the random numbers that each evaluation sees, by default 0; the same seed gives the same result if the
            evaluator is deterministic.
    """

    seed: int


class SearchPruner(ABC):
    """A pruner that evaluates many models and keeps the best.

    Args:
        model: left bit-identical.
        config_list: entries as in the seeds, see `pruners.config`. A "sparsity" or "total_sparsity" is that of all channels of its entry
            together; with `budget=`, entries say only which layers lose channels.
        evaluator: from a shrunk model to a number.
        optimize_mode: "minimize" negates what the evaluator returns; scores in the history are then the negated ones.
        base_algo: the criterion that says which channels go first: the name of one, or one.
        options: see `SearchOptions`.

    Attributes:
        model: the user's.
        objective: what is searched; its scores are higher for better models.
        mode: the optimize_mode.
        history: one `Trial` per evaluation, in order.
        best: the best trial.
        last: the last one.

    Raises:
        ConfigError: an argument is not usable, or the budget cannot be met.
        InputError: there are no example inputs, or the model cannot run on them.
    """

    _result: SearchResult | None = None
    former: ClassVar[Mapping[str, str]] = {}  # name of an argument that there is not -> what to write, see `check_names`
    positions: ClassVar[Sequence[str]] = ()  # what comes in NNI behind the positional arguments

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Callable[[nn.Module], float],
        optimize_mode: Mode,
        base_algo: str | Criterion,
        *surplus: object,
        **options: Unpack[SearchOptions],
    ) -> None:
        who = type(self).__name__
        check_names(type(self), options, SearchOptions, self.former, surplus, self.positions)
        if optimize_mode not in get_args(Mode):
            raise ConfigError(f"optimize_mode is {optimize_mode!r}", "Use 'maximize' or 'minimize'")
        check_evaluator(who, evaluator)
        run, others = split(options, RunOptions)
        self.seed, self._folder, self._progress = others.pop("seed", 0), run.get("folder"), run.get("progress", False)
        scored = evaluator if optimize_mode == "maximize" else (lambda small: -evaluator(small))
        self.model, self.mode = model, optimize_mode
        given: dict[str, Any] = {"example_inputs": None, **others, "criterion": base_algo, "config_list": config_list}
        self.objective = Objective(model, evaluator=scored, **given)
        self._result: SearchResult | None = None

    def search(self) -> SearchResult:
        """Returns the trials; runs them on the first call, or those that are missing in the folder.

        Raises:
            ConfigError: the evaluator, or a cost, returns no finite number.
            FileError: the folder holds a run with other settings, or cannot be written.
        """
        if self._result is None:
            self._result = self._search()
        return self._result

    @abstractmethod
    def _search(self) -> SearchResult:
        """Runs the trials that are missing."""

    @property
    def best(self) -> Trial:
        """The best trial; searches where that was not done yet."""
        return self.search().best

    @property
    def last(self) -> Trial:
        """The last trial; searches where that was not done yet."""
        return self.search().last

    def compress(self) -> tuple[nn.Module, Masks]:
        """Returns (a copy of the model with what the best trial removes zeroed, and reconstructed where that is asked for; the masks)."""
        masks = self.objective.masks(self.best.sparsities)
        return self.objective.masked(masks), masks

    def get_best_result(self) -> tuple[int, nn.Module, Masks, float, list[dict[str, Any]]]:
        """Returns of the best trial: its number, the masked copy, the masks, the score, and a config list that says the same.

        Its entries name the layers of each group with the group's sparsity.
        """
        masked, masks = self.compress()
        layers = {g.name: list(g.layers) for g in self.objective.graph.groups}
        entries = [{"op_names": layers[n], "sparsity": s} for n, s in self.best.sparsities.items() if s > 0]
        return self.best.number, masked, masks, self.best.score, entries


def require_constraints(constraints: Sequence[Constraint], who: str, fix: str = _HOW_MUCH) -> None:
    """Raises unless something must be met.

    Args:
        constraints: what must be met.
        who: the pruner.
        fix: how to say how much is to go.

    Raises:
        ConfigError: nothing must.
    """
    if not constraints:
        what = f"{who} is given neither a budget nor sparsities, and nothing scores better than to prune nothing"
        raise ConfigError(what, fix)
