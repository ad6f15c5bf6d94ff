"""What the pruners that search have in common: the best trial, the last one, and what the best comes to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from graphprune.criteria.base import Criterion
from graphprune.errors import ConfigError
from graphprune.search.objective import Constraint, Objective, Trial

if TYPE_CHECKING:
    from torch import nn

    from graphprune.masks.channels import Masks
    from graphprune.search.base import SearchResult

Mode: TypeAlias = Literal["maximize", "minimize"]
_HOW_MUCH = "Pass budget=, such as Budget(macs=0.5), or write a 'total_sparsity'"


class SearchPruner(ABC):
    """A pruner that evaluates many models and keeps the best.

    Args:
        model: left bit-identical.
        config_list: which layers lose channels, see `Objective`.
        evaluator: from a shrunk model to a number.
        optimize_mode: "minimize" negates what the evaluator returns.
        example_inputs: what the model is run on to find its groups.
        base_algo: the criterion that says which channels go first.
        options: further arguments of `Objective`.

    Attributes:
        model: the user's.
        objective: what is searched; its scores are higher for better models.
        mode: the optimize_mode.

    Raises:
        ConfigError: an argument is not usable, or the budget cannot be met.
        InputError: there are no example inputs, or the model cannot run on them.
    """

    _result: SearchResult | None = None

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        evaluator: Callable[[nn.Module], float],
        optimize_mode: Mode,
        example_inputs: object,
        base_algo: str | Criterion,
        **options: Any,
    ) -> None:
        if optimize_mode not in get_args(Mode):
            raise ConfigError(f"optimize_mode is {optimize_mode!r}", "Use 'maximize' or 'minimize'")
        given: object = evaluator  # None for a search that is over, or that only allocates
        if given is not None and not callable(given):
            what = f"evaluator of {type(self).__name__} is a {type(given).__name__}"
            raise ConfigError(what, "Pass a function from a model to its score; finetune= says how to train")
        scored = evaluator if optimize_mode == "maximize" else (lambda small: -evaluator(small))
        self.model, self.mode = model, optimize_mode
        self.objective = Objective(model, example_inputs, scored, criterion=base_algo, config_list=config_list, **options)

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
