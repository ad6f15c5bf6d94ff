"""Filter pruners under their former names: the same criteria with the arguments of that time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from graphprune import pruners
from graphprune.compat.former import Former, epoch_trainer
from graphprune.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

ConfigList: TypeAlias = Sequence[Mapping[str, Any]]

_BEFORE_GLOBAL_SORT = 8  # positional arguments of Taylor's pruner that come before it


class _OfWeights(Former):
    """The former arguments of pruners that look at weights alone, before a pruner that has today's.

    Args:
        model: left as it is.
        config_list: see `graphprune.pruners.config`.
        dependency_aware: True prunes coupled groups and needs `dummy_input`; False prunes each layer by itself; left out, groups are
            pruned where there is a `dummy_input` to find them with.
        dummy_input: the example inputs.
        options: those of `graphprune.Pruner`.

    Raises:
        ConfigError: `dependency_aware` lacks its `dummy_input`, or as of `graphprune.Pruner`.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        dependency_aware: bool | None = None,  # noqa: FBT001 (the call shape of that time)
        dummy_input: object = None,
        **options: Any,
    ) -> None:
        if dependency_aware and dummy_input is None:
            what = f"{type(self).__name__} is given dependency_aware=True and no dummy_input to find the dependencies with"
            raise ConfigError(what, "Pass dummy_input=, a tensor that model(...) accepts")
        init: Any = super().__init__
        init(model, config_list, dummy_input, **_with_mode(options, dependency_aware=dependency_aware))


class L1FilterPruner(_OfWeights, pruners.L1NormPruner):
    """`L1NormPruner` by its former name and with its former arguments: (model, config_list, dependency_aware, dummy_input)."""


class L2FilterPruner(_OfWeights, pruners.L2NormPruner):
    """`L2NormPruner` by its former name and with its former arguments: (model, config_list, dependency_aware, dummy_input)."""


class FPGMPruner(_OfWeights, pruners.FPGMPruner):
    """`FPGMPruner` with its former arguments: (model, config_list, dependency_aware, dummy_input)."""


class _OfData(Former):
    """The former arguments of pruners that look at data, before a pruner that has today's.

    Args:
        model: left as it is.
        config_list: see `graphprune.pruners.config`.
        optimizer: given to the trainer; its `step` does nothing.
        trainer: called as trainer(model, optimizer, criterion, epoch), the last if it takes that; it shows the model its data and trains
            nothing.
        criterion: given to the trainer.
        sparsifying_training_batches: how many batches to look at; 1 where nothing is said.
        dependency_aware: False prunes each layer by itself; otherwise coupled groups are pruned.
        dummy_input: the example inputs; by default those of the first batch.
        statistics_batch_num: what `sparsifying_training_batches` was called before.
        options: `data` (and `loss`) in the place of optimizer, trainer and criterion, and those of `graphprune.Pruner`.

    Raises:
        ConfigError: there is neither a trainer nor data, or an argument is not usable.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        optimizer: Optimizer | None = None,
        trainer: Callable[..., Any] | None = None,
        criterion: Callable[..., Tensor] | None = None,
        sparsifying_training_batches: int | None = None,
        dependency_aware: bool | None = None,  # noqa: FBT001 (the call shape of that time)
        dummy_input: object = None,
        *,
        statistics_batch_num: int | None = None,
        **options: Any,
    ) -> None:
        batches = sparsifying_training_batches if sparsifying_training_batches is not None else statistics_batch_num
        if sparsifying_training_batches is not None and statistics_batch_num is not None:
            what = f"{type(self).__name__} is given sparsifying_training_batches and statistics_batch_num, which are the same"
            raise ConfigError(what, "Drop one of them")
        init: Any = super().__init__
        shape = (model, config_list, epoch_trainer(trainer), optimizer, criterion, 1 if batches is None else batches, dummy_input)
        init(*shape, **_with_mode(options, dependency_aware=dependency_aware))


class _OfActivations(_OfData):
    """Those of pruners that look at activations: behind the criterion comes `activation`, "relu" and nothing else.

    The model's own nonlinearity is looked at, whichever it is.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: ConfigList,
        optimizer: Optimizer | None = None,
        trainer: Callable[..., Any] | None = None,
        criterion: Callable[..., Tensor] | None = None,
        activation: str = "relu",
        *others: Any,
        **options: Any,
    ) -> None:
        if activation != "relu":
            what = f"{type(self).__name__} is given activation={activation!r}, but it looks at what the model's own nonlinearity returns"
            raise ConfigError(what, "Leave activation= out")
        super().__init__(model, config_list, optimizer, trainer, criterion, *others, **options)


class ActivationAPoZRankFilterPruner(_OfActivations, pruners.ActivationAPoZRankPruner):
    """`ActivationAPoZRankPruner` by its former name.

    Its former arguments are (model, config_list, optimizer, trainer, criterion, activation, sparsifying_training_batches, dependency_aware,
    dummy_input), and before that `statistics_batch_num`. Without a trainer, `data` is needed.
    """


class ActivationMeanRankFilterPruner(_OfActivations, pruners.ActivationMeanRankPruner):
    """`ActivationMeanRankPruner` by its former name; the arguments are those of `ActivationAPoZRankFilterPruner`."""


class TaylorFOWeightFilterPruner(_OfData, pruners.TaylorFOWeightPruner):
    """`TaylorFOWeightPruner` by its former name.

    Its former arguments are (model, config_list, optimizer, trainer, criterion, sparsifying_training_batches, dependency_aware,
    dummy_input, global_sort); the last makes one ranking of all layers of an entry.
    """

    def __init__(self, *arguments: Any, global_sort: bool = False, **options: Any) -> None:
        if len(arguments) > _BEFORE_GLOBAL_SORT:
            arguments, global_sort = arguments[:-1], arguments[-1]
        if global_sort:
            if options.get("dependency_aware") is False or False in arguments[6:7]:
                what = f"{type(self).__name__} is given global_sort=True, which ranks coupled groups, and dependency_aware=False"
                raise ConfigError(what, "Drop one of them")
            options["mode"] = "global"
        super().__init__(*arguments, **options)


def _with_mode(options: Mapping[str, Any], *, dependency_aware: bool | None) -> dict[str, Any]:
    """Returns the options, with the mode that `dependency_aware` means; a mode that is given goes first."""
    if dependency_aware is None:
        return dict(options)
    return {"mode": "dependency_aware" if dependency_aware else "normal", **options}
