"""What movement pruning keeps scores for: single weights, rows, blocks, or the channels of coupled groups.

Each kind says how many scores there are, how kept scores become masks of weights, how the gradients of these masks become gradients of
scores, and which scores are kept at a stage of the schedule: the highest ones ("hard"), or all above a threshold ("soft").
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from graphprune.criteria.base import Part
from graphprune.criteria.norms import L1
from graphprune.errors import ConfigError, nearest
from graphprune.masks.channels import Masks
from graphprune.masks.elements import ElementMasks
from graphprune.pruners.base import Pruner
from graphprune.pruners.budgets import Plan, kept_count, least_kept
from graphprune.pruners.counts import Counting
from graphprune.pruners.level import LevelPruner, smallest, whole
from graphprune.pruners.requests import requests
from graphprune.torch_private import ConvTransposeNd

if TYPE_CHECKING:
    from graphprune.groups.graph import Group, Slice
    from graphprune.pruners.config import LayerConfig

_OPTIONS = ("example_inputs", "mode", "rounding", "round_to", "cut", "graph", "source")


class Scored(Protocol):
    """Scores by name, and the weights that they decide about.

    Attributes:
        shapes: name -> shape of its scores.
        parameters: the weights that are masked.
        plan: what was asked of each group, for the report of `speedup`.
        settings: what masks depend on besides the config list, as plain values.
    """

    shapes: Mapping[str, tuple[int, ...]]
    parameters: tuple[str, ...]
    plan: Plan
    settings: Mapping[str, Any]

    def spread(self, kept: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Writes ones and zeros into the masks of weights (parameter -> tensor of its shape) in place."""
        ...

    def gathered(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns name -> gradient of its scores, sums of the masks' gradients over the weights that each score decides about."""
        ...

    def highest(self, scores: Mapping[str, Tensor], stage: float) -> dict[str, Tensor]:
        """Returns name -> boolean tensor of the scores that stay where `stage` (in [0, 1]) of the sparsity asked for is reached."""
        ...

    def above(self, scores: Mapping[str, Tensor], stage: float) -> dict[str, Tensor]:
        """Returns name -> which scores have a sigmoid above `stage` times the threshold asked for; never none, nor fewer than allowed."""
        ...

    def masks(self, kept: Mapping[str, Tensor]) -> Masks | ElementMasks:
        """Returns the masks that say the same."""
        ...


@dataclass(frozen=True)
class _Weight:
    """A weight that is cut into equal blocks with one score each.

    Attributes:
        parameter: its name.
        shape: of the weight.
        block: of one block, of as many dimensions.
        config: what is asked of it.
    """

    parameter: str
    shape: tuple[int, ...]
    block: tuple[int, ...]
    config: LayerConfig

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many blocks there are along each dimension."""
        return tuple(length // part for length, part in zip(self.shape, self.block, strict=True))

    @property
    def most(self) -> int:
        """How many blocks may go: up to the weight's maximum, and never all."""
        count = math.prod(self.blocks)
        return min(whole(count, self.config.max_sparsity), count - 1)

    @property
    def paired(self) -> list[int]:
        """The shape with every dimension parted into blocks and positions within a block."""
        return [n for pair in zip(self.blocks, self.block, strict=True) for n in pair]

    def sums(self, values: Tensor) -> Tensor:
        """Returns the sum of a tensor of the weight's shape over each block."""
        return values.reshape(self.paired).sum(dim=[2 * d + 1 for d in range(len(self.block))])

    def dense(self, values: Tensor) -> Tensor:
        """Returns a value per block as a tensor of the weight's shape."""
        ones = [n for count in self.blocks for n in (count, 1)]
        return values.reshape(ones).expand(self.paired).reshape(self.shape)


class Blocks:
    """One score per block of each selected weight; a block is a single weight, an output row, or [height, width] of a matrix.

    Of a weight with n blocks exactly floor(n * sparsity) go, and at least one stays; a `total_sparsity` ranks the blocks of all weights of
    its entry together.

    Args:
        model: whose weights they are.
        config_list: entries, see `graphprune.pruners.config`; a layer can be selected when it has a weight of two or more dimensions.
        shape: "finegrained", "rows", or the height and width of a block.
        example_inputs: see `LevelPruner`.

    Raises:
        ConfigError: the config list is unusable, or blocks do not divide a weight.
    """

    def __init__(
        self, model: nn.Module, config_list: Sequence[Mapping[str, Any]], shape: str | tuple[int, int], example_inputs: object = None
    ) -> None:
        self.model = model
        modules = dict(model.named_modules())
        self._weights: dict[str, _Weight] = {}
        for weight in LevelPruner(model, config_list, example_inputs=example_inputs).weights:
            layer, size = weight.layers[0], tuple(weight.tensor.shape)
            block = _block(size, shape, layer, modules[layer])
            self._weights[weight.parameter] = _Weight(weight.parameter, size, block, weight.config)
        self.shapes: Mapping[str, tuple[int, ...]] = {name: w.blocks for name, w in self._weights.items()}
        self.parameters = tuple(self._weights)
        self.plan = Plan()
        self.settings: Mapping[str, Any] = {}

    def spread(self, kept: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Writes ones and zeros into the masks of weights in place."""
        for name, flags in kept.items():
            masks[name].copy_(self._weights[name].dense(flags))

    def gathered(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns name -> gradient of its scores."""
        return {name: self._weights[name].sums(gradient) for name, gradient in gradients.items()}

    def highest(self, scores: Mapping[str, Tensor], stage: float) -> dict[str, Tensor]:
        """Returns name -> which scores stay where `stage` of the sparsity asked for is reached."""
        out: dict[str, Tensor] = {}
        together: dict[int, list[_Weight]] = {}
        for name, weight in self._weights.items():
            if weight.config.total is not None:
                together.setdefault(weight.config.entry, []).append(weight)
                continue
            gone = min(whole(scores[name].numel(), (weight.config.sparsity or 0.0) * stage), weight.most)
            out[name] = _without(scores[name], gone)
        for members in together.values():
            out |= self._ranked(members, scores, stage)
        return {name: out[name] for name in scores}

    def _ranked(self, members: list[_Weight], scores: Mapping[str, Tensor], stage: float) -> dict[str, Tensor]:
        """Returns which scores of one entry stay, by one ranking over all that each weight may lose."""
        first = scores[members[0].parameter]
        parts = []
        for weight in members:
            values = scores[weight.parameter].detach().reshape(-1)
            parts.append(values.masked_fill(_without(values, weight.most), math.inf).to(first.device))
        every = torch.cat(parts)
        gone = min(whole(every.numel(), (members[0].config.total or 0.0) * stage), sum(w.most for w in members))
        kept = torch.split(_without(every, gone), [part.numel() for part in parts])
        return {w.parameter: k.reshape(w.blocks).to(scores[w.parameter].device) for w, k in zip(members, kept, strict=True)}

    def above(self, scores: Mapping[str, Tensor], stage: float) -> dict[str, Tensor]:
        """Returns name -> which scores have a sigmoid above `stage` times the threshold."""
        out = {}
        for name, values in scores.items():
            weight = self._weights[name]
            below = int((values.sigmoid() <= stage * (weight.config.asked or 0.0)).sum())
            out[name] = _without(values, min(below, weight.most))
        return out

    def masks(self, kept: Mapping[str, Tensor]) -> ElementMasks:
        """Returns the masks of the weights."""
        return ElementMasks(self.model, {name: self._weights[name].dense(flags).cpu() for name, flags in kept.items()})


class Channels:
    """One score per channel of each group that the config list selects; its gradient comes from the weights that produce the channel.

    Where a batch norm follows, that gradient is 0, whatever the channel is worth: the norm undoes every scaling of these weights. There it
    comes from the norm's own scales in their stead, and these are masked.

    Counts are those of the other pruners (`rounding`, `round_to`, `max_sparsity_per_layer`, `total_sparsity`, mode "global"), so that the
    same config list gives the same sizes.

    Args:
        who: the pruner, as messages name it.
        model: as of `Pruner`.
        config_list: as of `Pruner`.
        options: as of `Pruner`, example inputs among them, without those that say how to score.

    Attributes:
        graph: the model's graph.

    Raises:
        ConfigError: an argument is unusable, or the config list selects no group that can be scored.
        InputError: there is nothing to trace the model with, or it cannot run on it.
    """

    def __init__(self, who: str, model: nn.Module, config_list: Sequence[Mapping[str, Any]], **options: Any) -> None:
        for name in options:
            if name not in _OPTIONS:
                hint = nearest(name, _OPTIONS) or f"Use {', '.join(_OPTIONS)}"
                raise ConfigError(f"{who} learns its scores, and has no argument {name}=", hint)
        if options.setdefault("mode", "dependency_aware") == "normal":
            raise ConfigError(f"{who} has no mode 'normal'", "Write sparse_granularity='rows' for rows of layers by themselves")
        pruner = Pruner(model, config_list, L1(), **options)  # whose scores are never asked for
        self.graph = pruner.graph
        parameters = dict(model.named_parameters(remove_duplicate=False))
        asked = requests(pruner.graph, pruner.config, pruner.cut, pruner.selectable, together=pruner.mode == "global")
        deciding = {g.name: [s for s in self._deciding(g) if s.parameter in parameters] for g in self.graph.groups}
        self._slices = {name: slices for name, slices in deciding.items() if slices and name not in asked.whole}
        if not self._slices:
            raise ConfigError(f"{who} finds no channels to prune in what the config list selects", "Select more layers")
        self._pruner, self._asked = pruner, asked
        self._most = {name: asked.most[name] for name in self._slices}
        self.shapes: Mapping[str, tuple[int, ...]] = {name: (self.graph[name].channels,) for name in self._slices}
        self.parameters = tuple(dict.fromkeys(s.parameter for slices in self._slices.values() for s in slices))
        ranked = {name for _, members in asked.entries.values() for name in members}
        requested = {name: amount for name, amount in asked.sparsity.items() if name not in ranked}
        self.plan = Plan(requested, {**asked.notes, **asked.whole})
        how = {"mode": pruner.mode, "rounding": pruner.rounding, "round_to": pruner.round_to, "graph": self.graph.fingerprint}
        self.settings: Mapping[str, Any] = {**how, "scores": {name: list(shape) for name, shape in self.shapes.items()}}

    def _deciding(self, group: Group) -> tuple[Slice, ...]:
        """Returns the slices that a group's scores mask, and learn from."""
        return tuple(s for s in group.slices if s.parameter in self.graph.scales) or group.producers

    def spread(self, kept: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Writes ones and zeros into the masks of weights in place."""
        for mask in masks.values():
            mask.fill_(1)
        for name, slices in self._slices.items():
            gone = (~kept[name]).nonzero().reshape(-1).cpu()
            for s in slices:
                index = torch.from_numpy(s.index)[gone].reshape(-1)
                masks[s.parameter].index_fill_(s.dim, index.to(masks[s.parameter].device), 0)

    def gathered(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns name -> gradient of its scores."""
        out = {}
        for name, slices in self._slices.items():
            parts = [Part(gradients[s.parameter], s) for s in slices if s.parameter in gradients]
            if parts:
                sums = [part.sums(part.tensor) for part in parts]
                out[name] = torch.stack([total.to(sums[0].device) for total in sums]).sum(0)
        return out

    def highest(self, scores: Mapping[str, Tensor], stage: float) -> dict[str, Tensor]:
        """Returns name -> which channels stay where `stage` of the sparsity asked for is reached."""
        values = {name: score.detach().double().cpu().numpy() for name, score in scores.items()}
        counting = Counting(values, self._most, self._pruner.rounding, self._pruner.round_to, comparable=True, notes={})
        counts = counting.each({name: self._asked.sparsity[name] * stage for name in values})
        for total, members in self._asked.entries.values():
            names = [name for name in members if name in values]
            counts |= counting.together(names, total * stage) if names else {}
        return {name: _without(score, score.numel() - counts[name]) for name, score in scores.items()}

    def above(self, scores: Mapping[str, Tensor], stage: float) -> dict[str, Tensor]:
        """Returns name -> which channels' scores have a sigmoid above `stage` times the threshold."""
        out, multiple = {}, self._pruner.round_to
        for name, values in scores.items():
            size = values.numel()
            layers = self._pruner.selectable(self.graph[name])
            threshold = min(self._pruner.config.layers[layer].asked or 0.0 for layer in layers)
            count = int((values.sigmoid() > stage * threshold).sum())
            count = max(kept_count(size, 1.0 - count / size, "ceil", multiple), least_kept(size, self._most[name], multiple))
            out[name] = _without(values, size - count)
        return out

    def masks(self, kept: Mapping[str, Tensor]) -> Masks:
        """Returns the masks of groups."""
        return Masks(self.graph, {name: flags.cpu().numpy() for name, flags in kept.items()})


def _without(scores: Tensor, count: int) -> Tensor:
    """Returns all but the `count` lowest scores as a boolean tensor; of equal ones the first stay."""
    return ~smallest(scores.detach().reshape(1, -1), count).reshape(scores.shape)


def _block(size: tuple[int, ...], shape: str | tuple[int, int], layer: str, module: nn.Module) -> tuple[int, ...]:
    """Returns the shape of one block of a weight.

    Raises:
        ConfigError: the weight cannot be cut like this.
    """
    if shape == "finegrained":
        return (1,) * len(size)
    if shape == "rows":
        dim = 1 if isinstance(module, (ConvTransposeNd, nn.Embedding, nn.EmbeddingBag)) else 0
        return tuple(1 if d == dim else length for d, length in enumerate(size))
    block = tuple(int(n) for n in shape)
    if len(size) != 2 or any(length % part for length, part in zip(size, block, strict=True)):
        what = f"blocks of shape {block} do not divide the weight of {layer!r}, which is {size}"
        raise ConfigError(what, f"Choose another sparse_granularity, or leave {layer!r} out of the config list")
    return block
