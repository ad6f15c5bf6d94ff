"""What a round of AutoCompress works with: the channels that are left, and how many of each group are to stay."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from graphprune.criteria import criterion_named
from graphprune.criteria.base import Criterion
from graphprune.criteria.distances import FPGM
from graphprune.masks.channels import Masks
from graphprune.pruners.budgets import keep_highest
from graphprune.schedules.algorithms import FPGMOfKept
from graphprune.schedules.state import places
from graphprune.search.objective import Objective, Sparsities, Trial

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from graphprune.groups.graph import DependencyGraph, Slice
    from graphprune.surgery.recipe import Kept


class Remaining(Objective):
    """An objective over the channels that earlier rounds have left: sparsities are shares of these, and what has gone stays gone.

    Args:
        model: of the original shapes, zero where channels have gone; left bit-identical.
        evaluator: see `Objective`.
        alive: which channels are left, or None for all.
        shows: is told of every trial.
        criterion: see `Objective`.
        given: further arguments of `Objective`. Amounts and limits are shares of the ORIGINAL model's channels.
    """

    def __init__(
        self,
        model: nn.Module,
        evaluator: Callable[[nn.Module], float],
        alive: Masks | None = None,
        shows: Callable[[Trial], None] | None = None,
        criterion: str | Criterion = "l1",
        **given: Any,
    ) -> None:
        self._alive: Masks | None = None  # until costs of the original model were compared with the limits
        self._shows = shows
        chosen = criterion_named(criterion)
        chosen = FPGMOfKept() if alive is not None and isinstance(chosen, FPGM) else chosen
        super().__init__(model, given.pop("example_inputs", None), evaluator, criterion=chosen, **given)
        if alive is None:
            return
        fewest = {name: self.fewest(name) for name in self.groups}
        left = {name: int(alive[name].sum()) for name in self.groups}
        self.scores = {name: scores[alive[name]] for name, scores in self.scores.items()}
        self.most = {name: 1.0 - fewest[name] / left[name] for name in self.groups}
        self._alive = alive

    def _kept(self, counts: Mapping[str, int]) -> dict[str, NDArray[np.bool_]]:
        """Returns the masks of the original groups that lose or have lost channels."""
        if self._alive is None:
            return super()._kept(counts)
        out = {}
        for name, mask in self._alive.items():
            kept = mask.copy()
            if name in counts and name in self.most:
                kept[mask] = keep_highest(self.scores[name], counts[name])
            out[name] = kept
        return out

    def __call__(self, sparsities: Sparsities, number: int = 0) -> Trial:
        """Returns the trial of these sparsities, see `Objective`."""
        trial = super().__call__(sparsities, number)
        if self._shows is not None:
            self._shows(trial)
        return trial

    @property
    def met(self) -> bool:
        """Whether what is left costs no more than it may."""
        return all(c.of(self.sizes) <= c.target for c in self.constraints)


class Projection:
    """What ADMM projects onto: of every group, as many channels as an allocation leaves, those of the largest norm.

    The norm is the L2 norm over all weights that produce the channel, all layers of a coupled group together, as in `ADMMPruner`.

    Args:
        graph: of the original model.
        counts: group name -> how many channels are to stay.
        alive: which channels are left.
        present: parameter -> dim -> which positions of the original parameter the model that is trained has; those left out are whole.
        weights: names of that model's parameters.
    """

    def __init__(self, graph: DependencyGraph, counts: Mapping[str, int], alive: Masks, present: Kept, weights: Collection[str]) -> None:
        self._graph, self._alive, self._present = graph, alive, present
        self._counts = {n: k for n, k in counts.items() if k < int(alive[n].sum())}
        self._slices = {n: [s for s in graph[n].producers if s.parameter in weights] for n in self._counts}

    def layers(self) -> dict[str, str]:
        """Returns name of a parameter that loses channels -> name of its layer."""
        return {s.parameter: s.module or s.parameter for slices in self._slices.values() for s in slices}

    def entries(self) -> dict[str, int]:
        """Returns name of a parameter that loses channels -> 0, as this is one request."""
        return dict.fromkeys(self.layers(), 0)

    def project(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Masks]:
        """Returns the values with the weakest channels zeroed, and the masks of the original model."""
        kept = dict(self._alive)
        for name, slices in self._slices.items():
            energy = np.zeros(self._graph[name].channels)
            for s in slices:
                energy += self._energy(values[s.parameter], s)
            kept[name] = keep_highest(np.where(kept[name], energy, -np.inf), self._counts[name])
        masks = Masks(self._graph, kept)
        positions = masks.positions()
        out = {name: value.clone() for name, value in values.items()}
        for parameter, dim in {(s.parameter, s.dim) for slices in self._slices.values() for s in slices}:
            gone = np.flatnonzero(~np.isin(self._places(parameter, dim), positions[parameter][dim]))
            out[parameter].index_fill_(dim, torch.from_numpy(gone).to(out[parameter].device), 0)
        return out, masks

    def _energy(self, value: Tensor, s: Slice) -> NDArray[np.float64]:
        """Returns the squared norm of what each channel has of a parameter."""
        rows = value.detach().double().square().movedim(s.dim, 0).reshape(value.shape[s.dim], -1).sum(dim=1)
        full = np.zeros(self._graph.shapes[s.parameter][s.dim])
        full[self._places(s.parameter, s.dim)] = rows.cpu().numpy()
        energy: NDArray[np.float64] = full[s.index].sum(axis=1)
        return energy

    def _places(self, parameter: str, dim: int) -> NDArray[np.int64]:
        return places(self._graph, self._present, parameter, dim)
