"""ADMM: weights are trained towards a sparse copy of themselves until pruning them to it changes little."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from graphprune.errors import ConfigError
from graphprune.masks.copying import copied
from graphprune.pruners.base import Pruner
from graphprune.pruners.budgets import Plan
from graphprune.pruners.config import split_rho
from graphprune.pruners.level import LevelPruner
from graphprune.pruners.options import DataOptions, InputOptions, TrainedOptions, check_names, split, traceable
from graphprune.training.session import Session, added, check_count, course, refuse_evaluator

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from typing_extensions import Unpack

    from graphprune.criteria.base import Part
    from graphprune.masks.channels import Masks
    from graphprune.masks.elements import ElementMasks
    from graphprune.training.session import MakeOptimizer, Trainer

Granularity: TypeAlias = Literal["fine-grained", "coarse-grained"]

_RHO = 1e-4
_BOTH = "iterations= (how often weights are projected) and training_epochs= (calls of the trainer in between)"
_FORMER = {
    "training_batches": _BOTH,
    "training_steps": _BOTH,
    "num_iterations": "iterations=",
    "epochs_per_iteration": "training_epochs=",
    "row": "'rho' in the entries of the config list",
    "rho": "'rho' in the entries of the config list",
    "base_algo": "granularity='fine-grained' for single weights, or 'coarse-grained' for channels",
}


@dataclass(frozen=True)
class Convergence:
    """How far an iteration was from convergence; norms are over all weights that the penalty is on.

    Attributes:
        iteration: counted from 1.
        primal: ||W - Z|| / ||W||, what pruning to the projection would change.
        dual: ||rho (Z - Z before)|| / ||W||, by how much the projection still moves.
    """

    iteration: int
    primal: float
    dual: float


class ADMMPruner:
    """Minimises the loss f(W) subject to W being sparse (Zhang et al., A Systematic DNN Weight Pruning Framework, arXiv 1804.03294).

    Each of the iterations is, in the scaled form of the paper's section 3 (with Z = W and U = 0 at first):

        W <- argmin f(W) + sum_i rho_i/2 ||W_i - Z_i + U_i||_F^2     training_epochs epochs, with rho (W - Z + U) added to the gradients
        Z <- the projection of W + U onto the sparse weights
        U <- U + W - Z

    The projection keeps, if "fine-grained", the largest magnitudes of each weight as `LevelPruner` does; if "coarse-grained", those
    channels of each coupled group for which the L2 norm of W + U over all weights that produce the channel is largest, so that `speedup`
    can remove the others. What the last projection zeroed is masked in the end.

    Args:
        model: left bit-identical, as is the optimizer.
        config_list: entries as in the seeds, see `graphprune.pruners.config`, with a "rho" above 0 where 1e-4 is not wanted. Fine-grained,
            sparsities are shares of weights; coarse-grained, of channels.
        trainer, optimizer, criterion: see `graphprune.pruners.options.TrainingOptions`.
        iterations: how often to train and project, at least 1.
        training_epochs: how many epochs to train per iteration, at least 1.
        granularity: "fine-grained" or "coarse-grained".
        options: see `graphprune.pruners.options.TrainedOptions`; "fine-grained", `data`, `loss` and `example_inputs` alone.

    Attributes:
        model: after `masks` or `compress` the trained copy, not masked, with the training flags of the model that was given.
        history: one `Convergence` per iteration.
        projection: what projects: a `LevelPruner` or a `Pruner`, whose `achieved` or `plan` say what was asked for and why less went.
        projected: parameter name -> Z after the last iteration.
        running: parameter name -> U after the last iteration.

    Raises:
        ConfigError: an argument is unusable or missing.
        InputError: coarse-grained, there is nothing to trace the model with, or it cannot run on it.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        trainer: Trainer | None = None,
        optimizer: Optimizer | MakeOptimizer | None = None,
        criterion: Any = None,
        iterations: int = 30,
        training_epochs: int = 5,
        granularity: Granularity = "fine-grained",
        **options: Unpack[TrainedOptions],
    ) -> None:
        who = type(self).__name__
        refuse_evaluator(who, trainer)
        check_names(type(self), options, TrainedOptions, _FORMER)
        if granularity not in get_args(Granularity):
            raise ConfigError(f"granularity is {granularity!r}", f"Use one of {', '.join(map(repr, get_args(Granularity)))}")
        self.iterations = check_count(iterations, "iterations", 1)
        self.training_epochs = check_count(training_epochs, "training_epochs", 1)
        data, others = split(options, DataOptions)
        training = {"trainer": trainer, "optimizer": optimizer, "criterion": criterion, **data}
        self.course = course(who, **training)
        entries, rho = split_rho(config_list, _RHO)
        self.projection: _Projection
        if granularity == "fine-grained":
            inputs, groups = split(others, InputOptions)
            if groups:
                what = f"{who} prunes single weights (granularity 'fine-grained') and has no argument {next(iter(groups))}="
                raise ConfigError(what, "Leave it out, or write granularity='coarse-grained'")
            self.projection = _Elements(model, entries, **inputs)
        else:
            self.projection = _Channels(model, entries, who, **traceable(who, others, training))
        self.rho = {name: rho[entry] for name, entry in self.projection.entries().items()}
        if not self.rho:
            raise ConfigError(f"{who} finds no weights to prune in what the config list selects", "Select more layers")
        self.model = model
        self.history: tuple[Convergence, ...] = ()
        self.projected: dict[str, Tensor] = {}
        self.running: dict[str, Tensor] = {}
        self._masks: Masks | ElementMasks | None = None

    @property
    def plan(self) -> Plan:
        """What was asked of each group and why some lost less (coarse-grained), for the report of `speedup`."""
        return self.projection.plan if isinstance(self.projection, Pruner) else Plan()

    def compress(self) -> tuple[nn.Module, Masks | ElementMasks]:
        """Returns (a copy of the trained model with what the masks remove zeroed, the masks)."""
        masks = self.masks()
        return masks.masked(self.model), masks

    def masks(self) -> Masks | ElementMasks:
        """Returns the support of the last projection; trains on the first call.

        Raises:
            ConfigError: the optimizer does not hold what is to be pruned, or the trainer never steps it.
            InputError: the weights are no longer finite.
        """
        if self._masks is None:
            session = Session(self.model, self.course, self.rho, self._penalty)
            self.projected = {name: w.detach().clone() for name, w in session.weights.items()}
            self.running = {name: torch.zeros_like(w) for name, w in self.projected.items()}
            masks = [self._iterate(session) for _ in range(self.iterations)]
            self.model, self._masks = session.model, masks[-1]
        return self._masks

    def _penalty(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Returns sum rho/2 ||W - Z + U||^2."""
        squares = {name: (w - self.projected[name] + self.running[name]).square().sum() for name, w in weights.items()}
        return added(self.rho[name] / 2 * square for name, square in squares.items())

    def _iterate(self, session: Session) -> Masks | ElementMasks:
        """Trains, projects and updates the running residual."""
        session.epochs(self.training_epochs)
        weights = {name: w.detach() for name, w in session.weights.items()}
        before = self.projected
        target = {name: w + self.running[name] for name, w in weights.items()}
        self.projected, masks = self.projection.project(target)
        self.running = {name: target[name] - z for name, z in self.projected.items()}
        size = _norm(weights.values())
        primal = _norm(w - self.projected[name] for name, w in weights.items())
        dual = _norm(self.rho[name] * (z - before[name]) for name, z in self.projected.items())
        record = Convergence(len(self.history) + 1, *(found / size if size else 0.0 for found in (primal, dual)))
        self.history = (*self.history, record)
        return masks


class _Projection(Protocol):
    """Finds the nearest weights that are as sparse as the config list asks for."""

    def entries(self) -> dict[str, int]:
        """Returns name of a parameter that can lose weights -> the config entry that asks for it."""
        ...

    def project(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Masks | ElementMasks]:
        """Returns new tensors, the projections of the values of these parameters, and the masks of their support."""
        ...


class _Elements(LevelPruner):
    """Keeps the largest magnitudes of each weight."""

    def entries(self) -> dict[str, int]:
        """Returns the name of each selected weight and the entry that it is asked by."""
        return {w.parameter: w.config.entry for w in self.weights}

    def project(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], ElementMasks]:
        """Returns the values with the smallest ones zeroed, and the masks."""
        self.weights = [replace(w, tensor=values[w.parameter]) for w in self.weights]
        masks = self.masks()
        return {name: v.masked_fill(~masks[name].to(v.device), 0) for name, v in values.items()}, masks


@dataclass(frozen=True)
class _Energy:
    """The squared L2 norm: what zeroing the weights of a channel would change, squared; it adds up over layers and compares as it is."""

    comparable: ClassVar[bool] = True

    def __call__(self, part: Part) -> Tensor:
        """Returns the sum of squares of each channel's weights, of shape (channels,)."""
        return part.sums(part.tensor.double().square())


class _Channels(Pruner):
    """Keeps the channels whose producing weights have the largest L2 norm, all layers of a coupled group together."""

    def __init__(self, model: nn.Module, entries: Sequence[Mapping[str, Any]], who: str, **options: Any) -> None:
        for name in ("aggregation", "scope"):
            if name in options:
                raise ConfigError(f"{who} projects, which leaves no choice of {name}=", "Leave it out")
        if options.get("mode") == "normal":
            raise ConfigError(f"{who} has no mode 'normal'", "Leave mode= out")
        super().__init__(model, entries, _Energy(), **options)
        self.model = copied(model, {})
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))

    def entries(self) -> dict[str, int]:
        """Returns the name of each parameter that produces channels of a group whose layers are all selected, and its layer's entry."""
        layers = self.config.layers
        groups = [g for g in self.graph.groups if all(name in layers for name in g.layers)]
        slices = [s for g in groups for s in g.producers if s.parameter in self._parameters]
        return {s.parameter: layers[s.module or s.parameter].entry for s in slices}

    def project(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Masks]:
        """Returns the values with the weakest channels zeroed, and the masks."""
        with torch.no_grad():
            for name, value in values.items():
                self._parameters[name].copy_(value)
        masks = self.masks()
        out = {name: value.clone() for name, value in values.items()}
        for group in self.graph.groups:
            gone = np.flatnonzero(~masks[group.name])
            for s in group.producers:
                if gone.size and s.parameter in out:
                    index = torch.from_numpy(s.index[gone].ravel()).to(out[s.parameter].device)
                    out[s.parameter].index_fill_(s.dim, index, 0)
        return out, masks


def _norm(tensors: Iterable[Tensor]) -> float:
    """Returns the L2 norm of all tensors together, in float64."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
