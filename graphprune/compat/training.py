"""Pruners that mask the user's own model in place and keep it masked while the user trains it.

Here, and nowhere else in the package, a model that is passed in is changed: that is what these call shapes mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

from torch import nn

from graphprune import pruners
from graphprune.compat import table
from graphprune.errors import ConfigError
from graphprune.masks.elements import ElementMasks
from graphprune.pruners.thresholds import reaching_threshold
from graphprune.schedules.entries import planned
from graphprune.training.keeping import Keeper

ConfigList: TypeAlias = Sequence[Mapping[str, Any]]


class _InPlace:
    """What these pruners share: bound to a model by a call, they mask its weights until `finish`.

    Args:
        config_list: see `graphprune.pruners.config`; checked against the model when the pruner is called with it.

    Raises:
        ConfigError: something else than a config list comes first.
    """

    def __init__(self, config_list: ConfigList, *others: object) -> None:
        name = type(self).__name__
        if others or isinstance(config_list, nn.Module):
            what = f"graphprune.compat.{name} takes a config list alone"
            raise ConfigError(what, f"Write {name}(config_list), and then pruner(model)")
        self.config_list = config_list
        self._work: tuple[nn.Module, ElementMasks, Keeper] | None = None

    def __call__(self, model: nn.Module) -> nn.Module:
        """Masks the weights of a model in place, and keeps them masked in every forward pass from here on; returns the same model.

        Raises:
            ConfigError: it is no PyTorch model, the pruner is at work on another one, or the config list does not fit the model.
        """
        name = type(self).__name__
        if not isinstance(model, nn.Module):
            what = f"{name} is called with a {type(model).__name__}, and only PyTorch models can be pruned here, not TensorFlow graphs"
            raise ConfigError(what, "Write pruner(model) with a torch.nn.Module")
        if self._work is not None:
            bound = type(self._work[0]).__name__
            raise ConfigError(f"{name} is at work on a {bound} already", "Call pruner.finish() first, or make another")
        masks, keeper = self._masks_at(model, 0, None), Keeper(model)
        keeper.hold(masks)
        self._work = model, masks, keeper
        return model

    def masks(self) -> ElementMasks:
        """Returns the present masks.

        Raises:
            ConfigError: the pruner has not been called with a model, or has finished.
        """
        return self._bound()[1]

    def finish(self) -> tuple[nn.Module, ElementMasks]:
        """Zeroes the masked weights for good, takes the hooks off the model and returns both; the pruner can then be called anew.

        Raises:
            ConfigError: the pruner has not been called with a model, or has finished.
        """
        model, masks, keeper = self._bound()
        keeper.release()
        self._work = None
        return model, masks

    def _bound(self) -> tuple[nn.Module, ElementMasks, Keeper]:
        if self._work is None:
            raise ConfigError(f"{type(self).__name__} is at work on no model", "Call pruner(model) first")
        return self._work

    def _masks_at(self, model: nn.Module, epoch: int, before: ElementMasks | None) -> ElementMasks:
        """Returns the masks of an epoch; `before` is what is masked, and zero, so far, and is returned itself where nothing changes."""
        raise NotImplementedError


class _ByEpoch(_InPlace):
    """A pruner whose masks change from epoch to epoch."""

    def update_epoch(self, epoch: int, session: object = None) -> None:
        """Masks anew for the epoch that begins; the first is epoch 0, for which the call with the model has masked.

        Raises:
            ConfigError: the pruner is at work on no model, the epoch is no whole number, or there is a session, as TensorFlow has.
        """
        name = type(self).__name__
        if session is not None:
            what = f"{name}.update_epoch is given a session, as TensorFlow has, and only PyTorch models can be pruned here"
            raise ConfigError(what, "Write pruner.update_epoch(epoch)")
        if type(epoch) is not int or epoch < 0:
            raise ConfigError(f"{name}.update_epoch is given {epoch!r}", "Give the number of the epoch, a whole number of at least 0")
        model, before, keeper = self._bound()
        before.apply(model)
        masks = self._masks_at(model, epoch, before)
        if masks is not before:
            keeper.hold(masks)
            self._work = model, masks, keeper


class _EitherWay(_InPlace):
    """One that has another call shape as well, in which the model comes first: then that pruner is made in its place."""

    _of_model: ClassVar[Callable[..., Any]]

    def __new__(cls, config_list: ConfigList | nn.Module, *others: Any, **options: Any) -> Any:
        """Returns a pruner in place of a config list, and one of a copy of a model."""
        return cls._of_model(config_list, *others, **options) if isinstance(config_list, nn.Module) else super().__new__(cls)


class LevelPruner(_EitherWay):
    """Zeroes the smallest weights of each layer when it is called with a model, as `graphprune.LevelPruner` chooses them.

    With a model in front of the config list, as later in the first version, it is `graphprune.compat.table.LevelPruner`.
    """

    _of_model = table.LevelPruner

    def _masks_at(self, model: nn.Module, epoch: int, before: ElementMasks | None) -> ElementMasks:
        del epoch, before  # it is asked once
        return pruners.LevelPruner(model, self.config_list).masks()


class AGP_Pruner(_ByEpoch):  # noqa: N801 (the name of that time)
    """Automated gradual pruning (Zhu & Gupta, arXiv 1710.01878): the smallest weights go, by a sparsity that rises with the epoch.

    Each entry of the config list has `final_sparsity` and `end_epoch`, and may have `initial_sparsity` (0), `start_epoch` (0) and
    `frequency` (1, in epochs); see `graphprune.schedules.agp`. Weights that were masked are zero and so stay the smallest. Once the
    sparsity no longer changes, the masks do not either.

    Args:
        config_list: see above; selectors and `exclude` as in `graphprune.pruners.config`.

    Raises:
        ConfigError: something else than a config list comes first, or an entry's schedule is not usable.
    """

    def __init__(self, config_list: ConfigList, *others: object) -> None:
        super().__init__(config_list, *others)
        self._plan = planned(config_list, "AGP_Pruner", None, own=True)
        self._asked: tuple[float, ...] = ()

    def _masks_at(self, model: nn.Module, epoch: int, before: ElementMasks | None) -> ElementMasks:
        asked = self._plan.asked(epoch)
        if before is None:
            pruners.LevelPruner(model, self._plan.entries)  # says whether what is reached in the end fits the model
        elif asked == self._asked:
            return before
        self._asked = asked
        return pruners.LevelPruner(model, self._plan.at(epoch)).masks()


class SensitivityPruner(_ByEpoch, _EitherWay):
    """Prunes weights below a threshold per layer: a quality parameter times the standard deviation of the layer's weights.

    With a model in front of the config list, as later in the first version, it is `graphprune.compat.table.SensitivityPruner`.

    Han et al., Learning both Weights and Connections, arXiv 1506.02626, section 4. An entry's `sparsity` is the quality parameter, in
    [0, 1), and not the share of weights that go. The deviation is taken over all weights of a layer as they are, masked ones as zeros, when
    the pruner is called with the model and in every `update_epoch`. Weights that were masked stay so.
    """

    _of_model = table.SensitivityPruner

    def _masks_at(self, model: nn.Module, epoch: int, before: ElementMasks | None) -> ElementMasks:
        del epoch  # the threshold follows from the weights alone
        return reaching_threshold(model, self.config_list, before)
