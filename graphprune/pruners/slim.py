"""Network Slimming: batch-norm scales are trained towards zero, and channels whose scale came closest to it go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphprune.criteria.scales import BNScale
from graphprune.errors import ConfigError
from graphprune.pruners.base import Pruner
from graphprune.pruners.options import DataOptions, TrainedOptions, check_names, split, traceable
from graphprune.pruners.selectors import Trait
from graphprune.training.session import Session, added, check_count, course, refuse_evaluator

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from typing_extensions import Unpack

    from graphprune.groups.graph import Group, Slice
    from graphprune.training.session import MakeOptimizer, Trainer

_FORMER = {
    "training_steps": "training_epochs=, the number of calls of the trainer",
    "training_batches": "training_epochs=, the number of calls of the trainer",
    "sparsifying_training_epochs": "training_epochs=",
    "regular_scale": "scale=",
}


class SlimPruner(Pruner):
    """Trains a copy with the loss L + scale * sum |gamma| and prunes the channels with the smallest |gamma| (Liu et al., arXiv 1708.06519).

    The sum is over the scales of the batch norms that the config list selects (eq. 1 of the paper, g(s) = |s|); the subgradient
    scale * sign(gamma), 0 at 0, is added to what `optimizer.step` takes. An entry's `sparsity` is a threshold per group, its
    `total_sparsity` one threshold for |gamma| as it is over all groups of the entry, as in the paper. No group loses everything.

    Entries select batch norms: `op_types` names their classes, and "default" is every norm whose scale belongs to channels that can go.
    Where a group has several norms, it is asked for the smallest sparsity that they ask for, and is kept whole if one of them is not
    selected; a channel's score is then the mean of |gamma| over them, unless `aggregation` says otherwise.

    Args:
        model: left bit-identical, as is the optimizer.
        config_list: entries as in the seeds, see `graphprune.pruners.config`.
        trainer, optimizer, criterion: see `graphprune.pruners.options.TrainingOptions`.
        training_epochs: how many epochs to train; 0 prunes by the scales as they are, and needs no trainer.
        scale: the weight of the penalty (lambda of the paper), at least 0.
        options: see `graphprune.pruners.options.TrainedOptions`.

    Attributes:
        model: after `masks` or `compress` the trained copy, with the training flags of the model that was given.

    Raises:
        ConfigError: an argument is unusable or missing, or the model has no batch norm whose channels can go.
        InputError: there is nothing to trace the model with, or it cannot run on it.
    """

    trait = Trait("scales channels as a batch norm does", "scales no channels", "scale no channels")

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        trainer: Trainer | None = None,
        optimizer: Optimizer | MakeOptimizer | None = None,
        criterion: Any = None,
        training_epochs: int = 1,
        scale: float = 1e-4,
        **options: Unpack[TrainedOptions],
    ) -> None:
        who = type(self).__name__
        refuse_evaluator(who, trainer)
        check_names(type(self), options, TrainedOptions, _FORMER)
        if options.get("mode") == "normal":
            what = f"{who} has no mode 'normal': a batch norm's scale belongs to all layers that are coupled through it"
            raise ConfigError(
                what, "Leave mode= out for a threshold per group, or write 'total_sparsity' in the config list for one over all"
            )
        self.training_epochs = check_count(training_epochs, "training_epochs", 0)
        self.scale = _check_scale(scale)
        data, others = split(options, DataOptions)
        training = {"trainer": trainer, "optimizer": optimizer, "criterion": criterion, **data}
        self.course = course(who, **training) if self.training_epochs else None
        super().__init__(model, config_list, BNScale(), **{"aggregation": "mean", **traceable(who, others, training)})

    def selectable(self, group: Group) -> tuple[str, ...]:
        """Returns the names of the batch norms that scale the group's channels."""
        return tuple(dict.fromkeys(_owner(s) for s in group.slices if s.parameter in self.graph.scales))

    def names(self) -> tuple[dict[str, str], dict[str, str]]:
        """Returns name -> class name of the batch norms whose channels can go, and of all other modules.

        Raises:
            ConfigError: there is no such batch norm.
        """
        modules = self.graph.modules
        found = {name for group in self.graph.groups for name in self.selectable(group)}
        if not found:
            what = f"{type(self).__name__} finds no batch norm in {type(self.model).__name__} that scales channels which can go"
            raise ConfigError(what, "Use a pruner that looks at weights, such as L1NormPruner")
        norms = {name: kind for name, kind in modules.items() if name in found}
        norms |= dict.fromkeys(sorted(found - set(norms)), "Parameter")
        return norms, {name: kind for name, kind in modules.items() if name not in found}

    def prepare(self) -> None:
        """Trains a copy with the penalty and puts it in place of `model`."""
        if self.course is not None:
            session = Session(self.model, self.course, self._penalised(), self._penalty)
            session.epochs(self.training_epochs)
            self.model = session.model

    def _penalised(self) -> list[str]:
        """Returns the scales of the selected batch norms, in the model's order."""
        slices = [s for group in self.graph.groups for s in group.slices]
        return list(dict.fromkeys(s.parameter for s in slices if s.parameter in self.graph.scales and _owner(s) in self.config.layers))

    def _penalty(self, weights: Mapping[str, Tensor]) -> Tensor:
        return self.scale * added(gamma.abs().sum() for gamma in weights.values())


def _check_scale(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ConfigError(f"scale is {value!r}, not a finite number of at least 0", "Pass a small number, such as 1e-4")
    return float(value)


def _owner(s: Slice) -> str:
    """Returns the module that owns a slice's parameter, or the parameter where that is the model itself."""
    return s.module or s.parameter
