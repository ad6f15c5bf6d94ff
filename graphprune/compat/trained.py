"""Pruners that train, under their names and with the arguments of the first version."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from graphprune import pruners, schedules
from graphprune.compat.former import Former, epoch_trainer, today
from graphprune.errors import ConfigError
from graphprune.training.session import check_count

ConfigList: TypeAlias = Sequence[Mapping[str, Any]]
Trainer: TypeAlias = Callable[..., Any]

_CHANNELS = ("l1", "l2")
_ADAM_RATE, _ADAM_DECAY = 1e-3, 5e-5  # of the optimizer that ADMM made for itself then


class LevelPruner(Former, pruners.LevelPruner):
    """`graphprune.LevelPruner` with its former arguments.

    Args:
        model: left as it is.
        config_list: see `graphprune.pruners.config`.
        dependency_aware: False, as single weights depend on nothing.
        dummy_input: not needed.
        options: those of today.

    Raises:
        ConfigError: dependencies are asked for, or as of `graphprune.LevelPruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList | None = None,
        dependency_aware: object = False,  # noqa: FBT002 (the call shape of that time)
        dummy_input: object = None,
        **options: Any,
    ) -> None:
        del dummy_input
        if config_list is None:
            raise ConfigError("LevelPruner is given a model and no config list", "Write LevelPruner(model, config_list)")
        if dependency_aware:
            what = f"LevelPruner is given {dependency_aware!r} behind the config list, and single weights depend on nothing"
            raise ConfigError(what, "Leave it out, or use L1FilterPruner for channels")
        super().__init__(model, config_list, **options)


class SlimPruner(Former, pruners.SlimPruner):
    """`graphprune.SlimPruner` with its former arguments: one ranking of all batch norms of an entry, in any case of coupled groups.

    Args:
        model: left bit-identical, as is the optimizer.
        config_list: see `graphprune.pruners.config`.
        optimizer: of the model's parameters.
        trainer: trainer(model, optimizer, criterion, epoch).
        criterion: given to the trainer.
        sparsifying_training_epochs: how many epochs to train.
        scale: of the penalty.
        dependency_aware: either; channels that live and die together go together.
        dummy_input: the example inputs; by default those of the first batch.
        options: those of today.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        optimizer: Any = None,
        trainer: Trainer | None = None,
        criterion: Any = None,
        sparsifying_training_epochs: int = 10,
        scale: float = 1e-4,
        dependency_aware: bool = False,  # noqa: FBT001, FBT002 (likewise)
        dummy_input: object = None,
        **options: Any,
    ) -> None:
        del dependency_aware
        init: Any = super().__init__
        how = (epoch_trainer(trainer), optimizer, criterion, sparsifying_training_epochs, scale)
        init(model, config_list, *how, example_inputs=dummy_input, **{"mode": "global", **options})


class ADMMPruner(Former, pruners.ADMMPruner):
    """`graphprune.ADMMPruner` with its former arguments, and an Adam of its own (1e-3, weight decay 5e-5) as then.

    The penalty is that of the paper, added to the gradients, where the first version moved the weights by `row` past the optimizer.

    Args:
        model: left bit-identical.
        config_list: see `graphprune.pruners.config`.
        trainer: trainer(model, optimizer, criterion, epoch).
        criterion: given to the trainer; cross entropy by default.
        num_iterations: how often to project.
        epochs_per_iteration: how many epochs to train in between.
        row: rho of all entries that have none.
        base_algo: "level" for single weights; "l1" or "l2" for channels, which are projected by their L2 norm, as ADMM demands.
        options: those of today, `optimizer` among them; `dummy_input` is the example inputs, by default the first batch.

    Raises:
        ConfigError: another base_algo, or as of `graphprune.ADMMPruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        trainer: Trainer | None = None,
        criterion: Any = None,
        num_iterations: int = 30,
        epochs_per_iteration: int = 5,
        row: float = 1e-4,
        base_algo: str = "l1",
        **options: Any,
    ) -> None:
        if base_algo not in (*_CHANNELS, "level"):
            what = f"ADMMPruner is given base_algo={base_algo!r}, by which nothing can be projected"
            raise ConfigError(what, "Write 'level' for single weights, or 'l1' or 'l2' for channels")
        granularity = "fine-grained" if base_algo == "level" else "coarse-grained"
        given = {"optimizer": own_adam, **today(options)}
        how = (epoch_trainer(trainer, epochs_per_iteration), given.pop("optimizer"), criterion_or_cross_entropy(criterion))
        init: Any = super().__init__
        init(model, with_rho(config_list, row), *how, num_iterations, epochs_per_iteration, granularity, **given)


class AGPPruner(Former, schedules.AGPPruner):
    """`graphprune.AGPPruner` with its former arguments; masks are computed at the beginning of every iteration, by t/n for the t-th of n.

    Args:
        model: left bit-identical, as is the optimizer.
        config_list: with the `sparsity` to reach, see `graphprune.pruners.config`.
        optimizer: of the model's parameters.
        trainer: trainer(model, optimizer, criterion, epoch).
        criterion: given to the trainer.
        num_iterations: how often the masks change.
        epochs_per_iteration: how many epochs to train after each.
        pruning_algorithm: by name, as of `graphprune.AGPPruner`.
        options: those of today; `dummy_input`, the example inputs, makes algorithms of channels prune coupled groups.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        optimizer: Any = None,
        trainer: Trainer | None = None,
        criterion: Any = None,
        num_iterations: int = 10,
        epochs_per_iteration: int = 1,
        pruning_algorithm: str = "level",
        **options: Any,
    ) -> None:
        check_count(num_iterations, "num_iterations", 1)
        how = {"trainer": epoch_trainer(trainer), "optimizer": optimizer, "criterion": criterion, "training_epochs": epochs_per_iteration}
        init: Any = super().__init__
        init(model, config_list, pruning_algorithm, num_iterations, **how, **today(options))


def own_adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Returns the optimizer that ADMM made for itself."""
    return torch.optim.Adam(parameters, lr=_ADAM_RATE, weight_decay=_ADAM_DECAY)


def criterion_or_cross_entropy(criterion: Any) -> Any:
    """Returns a criterion, cross entropy where there is none."""
    return torch.nn.CrossEntropyLoss() if criterion is None else criterion


def with_rho(config_list: ConfigList, row: float) -> ConfigList:
    """Returns a config list whose entries have a rho."""
    if not isinstance(config_list, (list, tuple)):
        return config_list  # the pruner says what is wrong
    plain = [isinstance(entry, Mapping) and not entry.get("exclude") for entry in config_list]
    return [{"rho": row, **entry} if adds else entry for entry, adds in zip(config_list, plain, strict=True)]
