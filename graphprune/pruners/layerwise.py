"""Mode "normal": every layer's output rows by themselves, whatever they are coupled with.

That is what the papers' own experiments and NNI's mode of that name do. Rows of coupled layers then differ, so that only those channels
can be removed whose rows went in every layer; `ElementMasks.channels` finds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from graphprune.criteria.base import Part
from graphprune.errors import MaskError
from graphprune.groups.graph import Slice
from graphprune.masks.elements import ElementMasks
from graphprune.pruners.budgets import keep_highest
from graphprune.torch_private import ConvTransposeNd

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from graphprune.criteria.base import Criterion
    from graphprune.criteria.scoring import Scores
    from graphprune.groups.graph import DependencyGraph
    from graphprune.pruners.config import ResolvedConfig


@dataclass(frozen=True)
class Rows:
    """The output rows of one weight.

    Attributes:
        parameter: qualified name of the weight.
        dim: the dimension whose positions are the rows.
        positions: those that may go.
    """

    parameter: str
    dim: int
    positions: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Layerwise:
    """Layers that are masked by themselves.

    Attributes:
        model: whose layers they are.
        rows: layer -> its rows.
        scores: layer -> score per row, in the order of `Rows.positions`.
    """

    model: nn.Module
    rows: Mapping[str, Rows]
    scores: Mapping[str, NDArray[np.float64]]

    @staticmethod
    def of_weights(model: nn.Module, config: ResolvedConfig, criterion: Criterion) -> Layerwise:
        """Scores the rows of the selected layers, by their weights alone; of layers that share a weight, the first counts.

        Raises:
            MaskError: a score is not a number.
        """
        rows, scores = {}, {}
        holders: dict[int, str] = {}
        for name in config.layers:
            parameter = model.get_submodule(name).get_parameter("weight")
            if holders.setdefault(id(parameter), name) != name:
                continue
            weight = parameter.detach()
            dim = _producing_dim(model.get_submodule(name))
            positions = np.arange(weight.shape[dim])
            rows[name] = Rows(f"{name}.weight" if name else "weight", dim, positions)
            with torch.no_grad():
                part = Part(weight, Slice(rows[name].parameter, dim, positions[:, None], produces=True))
                scores[name] = criterion(part).double().cpu().numpy()
            if np.isnan(scores[name]).any():
                raise MaskError(f"scores of layer {name!r} are not numbers: {rows[name].parameter} holds NaN", "Check the weights")
        return Layerwise(model, rows, scores)

    @staticmethod
    def of_groups(model: nn.Module, config: ResolvedConfig, graph: DependencyGraph, scored: Scores) -> Layerwise:
        """Scores the rows of the selected layers by what was made of their slices, or of their group where that is all there is."""
        found: dict[str, list[tuple[Slice, NDArray[np.float64]]]] = {name: [] for name in config.layers}
        for group in graph.groups:
            own = {(p.owner.parameter, p.owner.dim): p.scores for p in scored.parts.get(group.name, ())}
            for s in group.producers if group.name in scored.groups else ():
                if (s.module or s.parameter) in found:
                    found[s.module or s.parameter].append((s, own.get((s.parameter, s.dim), scored.groups[group.name])))
        rows, scores = {}, {}
        for name, slices in found.items():
            if slices:
                first = slices[0][0]
                size = graph.shapes[first.parameter][first.dim]
                values = np.full(size, np.nan)
                for s, score in slices:
                    if (s.parameter, s.dim) == (first.parameter, first.dim):
                        values[s.index] = score[:, None]
                rows[name] = Rows(first.parameter, first.dim, np.flatnonzero(~np.isnan(values)))
                scores[name] = values[rows[name].positions]
        return Layerwise(model, rows, scores)

    def masks(self, counts: Mapping[str, int]) -> ElementMasks:
        """Returns masks that keep the highest rows of each layer, and the entries of biases that go with them.

        Args:
            counts: layer -> how many rows stay.
        """
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        kept: dict[str, torch.Tensor] = {}
        for name, rows in self.rows.items():
            gone = rows.positions[~keep_highest(self.scores[name], counts[name])]
            bias = f"{name}.bias" if name else "bias"
            length = parameters[rows.parameter].shape[rows.dim]
            for parameter, dim in ((rows.parameter, rows.dim), (bias, 0)):
                if parameter in parameters and parameters[parameter].shape[dim] == length:
                    mask = torch.ones(parameters[parameter].shape, dtype=torch.bool)
                    kept[parameter] = mask.index_fill_(dim, torch.from_numpy(gone), value=False)
        return ElementMasks(self.model, kept)


def layers_with_rows(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Returns name -> class name of the modules that have a weight with rows, and of all others."""
    modules = dict(model.named_modules())
    having = {name for name, module in modules.items() if _has_rows(module)}
    return _types(modules, having), _types(modules, set(modules) - having)


def _types(modules: Mapping[str, nn.Module], names: Iterable[str]) -> dict[str, str]:
    wanted = set(names)
    return {name: type(module).__name__ for name, module in modules.items() if name in wanted}


def _has_rows(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() > 1


def _producing_dim(module: nn.Module) -> int:
    """Returns the dimension of a layer's weight whose positions compute its output channels."""
    return 1 if isinstance(module, (ConvTransposeNd, nn.Embedding, nn.EmbeddingBag)) else 0
