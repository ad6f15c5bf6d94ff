"""The one-shot pruners by the names that NNI gave them, made anew for every round."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import torch

from graphprune.criteria.distances import FPGM
from graphprune.errors import ConfigError, nearest
from graphprune.masks.channels import Masks
from graphprune.pruners.admm import ADMMPruner
from graphprune.pruners.base import Pruner
from graphprune.pruners.data import ActivationAPoZRankPruner, ActivationMeanRankPruner, TaylorFOWeightPruner
from graphprune.pruners.level import LevelPruner
from graphprune.pruners.norms import FPGMPruner, L1NormPruner, L2NormPruner
from graphprune.pruners.slim import SlimPruner

if TYPE_CHECKING:
    from torch import nn

    from graphprune.criteria.base import Part
    from graphprune.criteria.scoring import Scores
    from graphprune.groups.graph import DependencyGraph
    from graphprune.masks.elements import ElementMasks

OneShot: TypeAlias = "LevelPruner | ADMMPruner | Pruner"

ALGORITHMS: Mapping[str, type[OneShot]] = {
    "level": LevelPruner,
    "l1": L1NormPruner,
    "l2": L2NormPruner,
    "fpgm": FPGMPruner,
    "slim": SlimPruner,
    "apoz": ActivationAPoZRankPruner,
    "mean_activation": ActivationMeanRankPruner,
    "taylorfo": TaylorFOWeightPruner,
    "admm": ADMMPruner,
}
_DATA = ("trainer", "optimizer", "criterion", "data", "loss")


@dataclass(frozen=True)
class Algorithm:
    """A one-shot pruner and how to make it.

    Attributes:
        kind: its class.
        params: further arguments.
        who: the pruner that drives it, for errors.
    """

    kind: type[OneShot]
    params: Mapping[str, Any]
    who: str

    @classmethod
    def of(cls, algorithm: str | type[OneShot], params: Mapping[str, Any] | None, shared: Mapping[str, Any], who: str) -> Algorithm:
        """Returns it by name or class.

        Args:
            algorithm: one of `ALGORITHMS`, or a class with the call shape of one of them.
            params: arguments of the one-shot pruner besides model, config list and example inputs.
            shared: `trainer`, `optimizer`, `criterion`, `data` and `loss` of the rounds, taken where `params` says nothing of data.
            who: the pruner that drives it.

        Raises:
            ConfigError: there is no such pruner, or an argument is the rounds' own.
        """
        if isinstance(algorithm, str) and algorithm not in ALGORITHMS:
            hint = nearest(algorithm, ALGORITHMS)
            raise ConfigError(f"pruning_algorithm of {who} is {algorithm!r}", hint or f"Use one of {', '.join(map(repr, ALGORITHMS))}")
        kind: Any = ALGORITHMS[algorithm] if isinstance(algorithm, str) else algorithm
        if not inspect.isclass(kind) or not issubclass(kind, (LevelPruner, ADMMPruner, Pruner)):
            raise ConfigError(f"pruning_algorithm of {who} is {kind!r}", "Pass a name such as 'l1', or the class of a one-shot pruner")
        given = dict(params or {})
        for name in ("model", "config_list", "example_inputs", "dummy_input", "graph", "budget", "source"):
            if name in given:
                raise ConfigError(f"pruning_params of {who} gives {name!r}", f"Pass it to {who} itself, or leave it out")
        if "trainer" in inspect.signature(kind).parameters and not any(given.get(name) is not None for name in ("trainer", "data")):
            given = {**{name: value for name, value in shared.items() if name in _DATA and value is not None}, **given}
        return cls(kind, given, who)

    @property
    def single(self) -> bool:
        """Whether it masks single weights, or layers by themselves, whatever the example inputs."""
        fine = issubclass(self.kind, ADMMPruner) and self.params.get("granularity", "fine-grained") == "fine-grained"
        return issubclass(self.kind, LevelPruner) or fine or self.params.get("mode") == "normal"

    @property
    def trains(self) -> bool:
        """Whether it changes weights before it chooses."""
        return issubclass(self.kind, (SlimPruner, ADMMPruner))

    def pruner(
        self,
        model: nn.Module,
        entries: Sequence[Mapping[str, Any]],
        graph: DependencyGraph | None = None,
        optimizer: Any = None,
        example_inputs: object = None,
        gone: Masks | ElementMasks | None = None,
    ) -> OneShot:
        """Makes the pruner.

        Args:
            model: to prune.
            entries: the config list.
            graph: the model's, if there is one.
            optimizer: over the model's parameters, in place of the one in the arguments; None leaves that.
            example_inputs: where there is no graph.
            gone: what is masked already: channels among it score lowest, so that they go before all others.
        """
        given = dict(self.params)
        if optimizer is not None and isinstance(given.get("optimizer"), torch.optim.Optimizer):
            given["optimizer"] = optimizer
        given |= {"graph": graph} if graph is not None else {"example_inputs": example_inputs}
        nested = isinstance(gone, Masks) and issubclass(self.kind, Pruner)
        make: Any = type(self.kind.__name__, (_Nested, self.kind), {"gone": gone}) if nested else self.kind
        made: OneShot = make(model, entries, **given)
        return made


class _Nested(Pruner):
    """A pruner of a masked model, by whose criterion the masked channels might be better than some that are left."""

    gone: ClassVar[Masks]

    def scored(self) -> Scores:
        """Returns the scores, with those of masked channels below all others."""
        found = super().scored()
        lowest = min((float(scores.min()) for scores in found.groups.values()), default=0.0)
        floor = lowest - 1.0 if lowest < 0.0 else 0.0
        groups = {name: np.where(self.gone[name], scores, floor) for name, scores in found.groups.items()}
        return replace(found, groups=groups)


def chooser(pruner: OneShot) -> Pruner | None:
    """Returns what knows the groups: the pruner itself, or what ADMM projects with; None for one of single weights or layers."""
    inner = pruner.projection if isinstance(pruner, ADMMPruner) else pruner
    return inner if isinstance(inner, Pruner) and inner.mode != "normal" else None


def masks_of(pruner: OneShot) -> tuple[nn.Module, Masks | ElementMasks]:
    """Returns the model with the weights that the pruner chose by (a trained copy, for those that train), and the masks.

    Channels without a weight left count as gone for FPGM, too: no other channel is near to them.
    """
    if isinstance(pruner, Pruner) and isinstance(pruner.criterion, FPGM):
        pruner.criterion = FPGMOfKept()
    _, masks = pruner.compress()
    return pruner.model, masks


@dataclass(frozen=True)
class FPGMOfKept(FPGM):
    """FPGM among the channels that have a weight left; the others score 0."""

    def __call__(self, part: Part) -> torch.Tensor:
        """Returns the sum of distances of each channel to those that have a weight left, of shape (channels,), float64."""
        rows = part.rows()
        gone = ~rows.any(dim=1)
        if not bool(gone.any()):
            return super().__call__(part)
        distances = super().__call__(part) - gone.sum() * rows.double().norm(dim=1)
        kept: torch.Tensor = distances.clamp(min=0.0)
        return kept.masked_fill(gone, -1.0)
