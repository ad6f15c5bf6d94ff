"""Pruners that mask the user's own model in place and keep it masked while the user trains it.

Here, and nowhere else in the package, a model that is passed in is changed: that is what these call shapes mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

from torch import nn

from graphprune import pruners
from graphprune.compat import searches, trained
from graphprune.errors import ConfigError
from graphprune.masks.elements import ElementMasks
from graphprune.pruners.thresholds import reaching_threshold
from graphprune.schedules import agp
from graphprune.training.keeping import Keeper

ConfigList: TypeAlias = Sequence[Mapping[str, Any]]

_SCHEDULE = {"initial_sparsity": 0.0, "final_sparsity": None, "start_epoch": 0, "end_epoch": None, "frequency": 1}  # None: must be given


class _InPlace:
    """What these pruners share: bound to a model by a call, they mask its weights until `finish`.

    Args:
        config_list: see `graphprune.pruners.config`; checked against the model when the pruner is called with it.

    Raises:
        ConfigError: something else than a config list comes first.
    """

    _instead = "Write {name}(config_list), and then pruner(model)"

    def __init__(self, config_list: ConfigList, *others: object) -> None:
        name = type(self).__name__
        if others or isinstance(config_list, nn.Module):
            what = f"graphprune.compat.{name} takes a config list alone"
            raise ConfigError(what, self._instead.format(name=name))
        self.config_list = config_list
        self._model: nn.Module | None = None
        self._masks: ElementMasks | None = None
        self._keeper: Keeper | None = None

    def __call__(self, model: nn.Module) -> nn.Module:
        """Masks the weights of a model in place, and keeps them masked in every forward pass from here on; returns the same model.

        Raises:
            ConfigError: it is no PyTorch model, the pruner is at work on another one, or the config list does not fit the model.
        """
        name = type(self).__name__
        if not isinstance(model, nn.Module):
            what = f"{name} is called with a {type(model).__name__}, and only PyTorch models can be pruned here, not TensorFlow graphs"
            raise ConfigError(what, "Write pruner(model) with a torch.nn.Module")
        if self._model is not None:
            raise ConfigError(f"{name} is at work on a {type(self._model).__name__} already", "Call pruner.finish() first, or make another")
        masks = self._first(model)
        self._model = model
        self._put(masks)
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
        model, masks = self._bound()
        if self._keeper is not None:
            self._keeper.release()
        self._model, self._masks, self._keeper = None, None, None
        return model, masks

    def _first(self, model: nn.Module) -> ElementMasks:
        """Returns the masks to begin with."""
        raise NotImplementedError

    def _bound(self) -> tuple[nn.Module, ElementMasks]:
        if self._model is None or self._masks is None:
            raise ConfigError(f"{type(self).__name__} is at work on no model", "Call pruner(model) first")
        return self._model, self._masks

    def _put(self, masks: ElementMasks) -> None:
        """Masks the model, and holds it and its layers to the masks, as training loops call either."""
        assert self._model is not None  # noqa: S101 (the caller has set it)
        self._masks = masks
        self._keeper = self._keeper or Keeper(self._model)
        self._keeper.hold(masks)


class _EitherWay(_InPlace):
    """One that has another call shape as well, in which the model comes first: then that pruner is made in its place."""

    _of_model: ClassVar[Callable[..., Any]]

    def __new__(cls, config_list: ConfigList | nn.Module, *others: Any, **options: Any) -> Any:
        """Returns a pruner in place of a config list, and one of a copy of a model."""
        if isinstance(config_list, nn.Module):
            return cls._of_model(config_list, *others, **options)
        return super().__new__(cls)


class LevelPruner(_EitherWay):
    """Zeroes the smallest weights of each layer when it is called with a model, as `graphprune.LevelPruner` chooses them.

    With a model in front of the config list, as later in the first version, it is `graphprune.compat.trained.LevelPruner`.

    Args:
        config_list: entries with a `sparsity` or a `total_sparsity`, see `graphprune.pruners.config`.

    Raises:
        ConfigError: something else than a config list comes first.
    """

    _of_model = trained.LevelPruner

    def _first(self, model: nn.Module) -> ElementMasks:
        return pruners.LevelPruner(model, self.config_list).masks()


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
        model, masks = self._bound()
        masks.apply(model)
        fresh = self._at(model, epoch)
        if fresh is not None:
            self._put(fresh)

    def _at(self, model: nn.Module, epoch: int) -> ElementMasks | None:
        """Returns the masks of an epoch, or None where they stay; what is masked so far is zero."""
        raise NotImplementedError


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
        self._sparsities: list[float] = []
        self._at_epoch(0)

    def _first(self, model: nn.Module) -> ElementMasks:
        pruners.LevelPruner(model, [_with_sparsity(entry, entry.get("final_sparsity")) for entry in self.config_list])  # does the last fit
        self._sparsities = []
        masks = self._at(model, 0)
        assert masks is not None  # noqa: S101 (nothing was masked before)
        return masks

    def _at(self, model: nn.Module, epoch: int) -> ElementMasks | None:
        sparsities = self._at_epoch(epoch)
        if sparsities == self._sparsities:
            return None
        self._sparsities = sparsities
        entries = [_with_sparsity(entry, sparsity) for entry, sparsity in zip(self.config_list, sparsities, strict=True)]
        return pruners.LevelPruner(model, entries).masks()

    def _at_epoch(self, epoch: int) -> list[float]:
        """Returns the sparsity of every entry in an epoch, 0 for those that exclude."""
        if not isinstance(self.config_list, (list, tuple)) or not all(isinstance(entry, Mapping) for entry in self.config_list):
            example = "[{'final_sparsity': 0.8, 'end_epoch': 10, 'op_types': ['default']}]"
            raise ConfigError("config_list of AGP_Pruner is not a list of dicts", f"Pass one such as {example}")
        return [0.0 if entry.get("exclude") else _planned(index, entry, epoch) for index, entry in enumerate(self.config_list)]


class SensitivityPruner(_ByEpoch, _EitherWay):
    """Prunes weights below a threshold per layer: a quality parameter times the standard deviation of the layer's weights.

    With a model in front of the config list, as later in the first version, it is `graphprune.compat.searches.SensitivityPruner`.

    Han et al., Learning both Weights and Connections, arXiv 1506.02626, section 4. An entry's `sparsity` is the quality parameter, in
    [0, 1), and not the share of weights that go. The deviation is taken over all weights of a layer as they are, masked ones as zeros, when
    the pruner is called with the model and in every `update_epoch`. Weights that were masked stay so.

    Args:
        config_list: entries with a `sparsity`, see `graphprune.pruners.config`.

    Raises:
        ConfigError: something else than a config list comes first.
    """

    _of_model = searches.SensitivityPruner

    def _first(self, model: nn.Module) -> ElementMasks:
        return reaching_threshold(model, self.config_list)

    def _at(self, model: nn.Module, epoch: int) -> ElementMasks | None:
        del epoch  # the threshold follows from the weights alone
        return reaching_threshold(model, self.config_list, self._masks)


def _planned(index: int, entry: Mapping[str, Any], epoch: int) -> float:
    """Returns what the schedule of an entry says for an epoch."""
    surplus = [key for key in ("sparsity", "sparsity_per_layer", "total_sparsity") if key in entry]
    if surplus:
        what = f"config_list[{index}] of AGP_Pruner gives {surplus[0]!r}, which is one sparsity and no schedule"
        raise ConfigError(what, "Write 'final_sparsity' and 'end_epoch'")
    missing = [key for key, default in _SCHEDULE.items() if default is None and key not in entry]
    if missing:
        raise ConfigError(f"config_list[{index}] of AGP_Pruner has no {missing[0]!r}", "Add it to the entry's schedule")
    initial, final, start, end, frequency = (entry.get(key, default) for key, default in _SCHEDULE.items())
    try:
        return agp(epoch, start, end, initial, final, frequency)
    except ConfigError as error:
        raise ConfigError(f"config_list[{index}] of AGP_Pruner cannot be followed: {error.what}", error.fix) from error


def _with_sparsity(entry: Mapping[str, Any], sparsity: float | None) -> dict[str, Any]:
    """Returns a config entry with a sparsity in the place of its schedule."""
    if entry.get("exclude"):
        return dict(entry)
    return {**{key: value for key, value in entry.items() if key not in _SCHEDULE}, "sparsity": sparsity}
