"""Unstructured pruning: single weights of small magnitude go, one layer at a time, in balanced blocks, or ranked over many layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch

from graphprune.criteria.relative import lamp
from graphprune.errors import ConfigError, InputError
from graphprune.masks.elements import ElementMasks
from graphprune.pruners.config import LayerConfig, resolve
from graphprune.pruners.options import InputOptions, check_names
from graphprune.pruners.selectors import Trait
from graphprune.torch_private import own_parameters
from graphprune.trace.contexts import tensors_read
from graphprune.trace.inputs import normalise, preserve_state, run
from graphprune.trace.meta_device import require_values

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Unpack

LevelMode: TypeAlias = Literal["normal", "balance", "global"]
LevelCriterion: TypeAlias = Literal["magnitude", "lamp"]

_FORMER = {
    "dependency_aware": "nothing: single weights depend on nothing; L1NormPruner prunes coupled groups",
    "evaluator": "nothing: weights are chosen by their magnitudes alone",
}
_WEIGHTS = Trait(
    "has a weight of two or more dimensions", "has no weight of two or more dimensions", "have no weight of two or more dimensions"
)


@dataclass(frozen=True)
class WeightSparsity:
    """What was asked of one weight and what it lost.

    Attributes:
        layer: the layer that holds the weight (the first, where several share it).
        requested: share of its elements to remove, in [0, 1); for a total sparsity, that of all layers ranked together; for a weight that
            several layers share, the most that any of them asks for.
        removed: how many elements go.
        elements: how many there are.
        reason: why fewer go than were asked for, "" where none are missing.
    """

    layer: str
    requested: float
    removed: int
    elements: int
    reason: str = ""

    @property
    def achieved(self) -> float:
        """The share of elements that go."""
        return self.removed / self.elements


@dataclass(frozen=True)
class _Weight:
    """A weight to prune, with all layers that hold it and what the config list asks of it."""

    layers: tuple[str, ...]
    tensor: torch.Tensor
    config: LayerConfig
    requested: float
    reason: str

    @property
    def parameter(self) -> str:
        """The parameter's qualified name."""
        return f"{self.layers[0]}.weight" if self.layers[0] else "weight"

    @property
    def most(self) -> int:
        """How many elements it may lose: up to its maximum, and never all."""
        return min(whole(self.tensor.numel(), self.config.max_sparsity), self.tensor.numel() - 1)


class LevelPruner:
    """Prunes the single weights of smallest magnitude (Han et al., arXiv 1506.02626, section 3).

    Of a layer with n weights exactly floor(n * sparsity) go; of equal ones the first stay, and at least one stays. A `total_sparsity` ranks
    all weights of the entry's layers together, and what one layer may not lose (`max_sparsity_per_layer`) others lose in its stead. Biases
    stay. A layer can be selected when it has a `weight` parameter of two or more dimensions. A weight that several layers share loses
    what the least demanding of them asks for.

    Args:
        model: left as it is.
        config_list: entries as in the seeds, see `graphprune.pruners.config`; sparsities are shares of a layer's weights.
        mode: "normal"; "balance" removes the same number of weights from every block; "global" insists on `total_sparsity` in all entries.
        balance_gran: for "balance", the shape of a block, aligned with the last dimensions of the weight: [4] at 0.5 keeps 2 of 4.
        criterion: "magnitude" ranks by |w|. "lamp" makes magnitudes of different layers comparable (see `lamp_scores`), which matters to
            a total sparsity only, as the order within a layer is the same.
        options: `example_inputs` (see `graphprune.pruners.options.InputOptions`) are not needed; the model is run on them in evaluation
            mode where they are given, and weights that it does not read then keep all their elements.

    Attributes:
        achieved: layer -> `WeightSparsity`, filled in by `masks` and `compress`.

    Raises:
        ConfigError: the config list or an option is not usable, or a block does not divide a weight.
        InputError: the model is on the meta device or cannot run on the example inputs, or a weight has values that are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        mode: LevelMode = "normal",
        balance_gran: Sequence[int] | None = None,
        *,
        criterion: LevelCriterion = "magnitude",
        **options: Unpack[InputOptions],
    ) -> None:
        check_names(type(self), options, InputOptions, _FORMER)
        if criterion not in get_args(LevelCriterion):
            raise ConfigError(f"criterion is {criterion!r}", f"Use one of {', '.join(map(repr, get_args(LevelCriterion)))}")
        _check_mode(mode, balance_gran)
        require_values(model, "LevelPruner")
        self.model = model
        self.mode: LevelMode = mode
        self.criterion: LevelCriterion = criterion
        self.weights = _read(model, _selected(model, config_list), options.get("example_inputs"))
        self.balance_gran = tuple(balance_gran or ())
        self.achieved: dict[str, WeightSparsity] = {}
        for weight in self.weights:
            _check_weight(weight, mode, self.balance_gran)

    def compress(self) -> tuple[nn.Module, ElementMasks]:
        """Returns (a copy of the model with the removed weights zeroed, the masks)."""
        masks = self.masks()
        return masks.masked(self.model), masks

    def masks(self) -> ElementMasks:
        """Returns the masks of all selected weights; `achieved` says afterwards what each lost."""
        removed: dict[str, torch.Tensor] = {}
        together: dict[int, list[_Weight]] = {}
        for weight in self.weights:
            if weight.config.total is not None:
                together.setdefault(weight.config.entry, []).append(weight)
            else:
                removed[weight.parameter] = self._of_layer(weight)
        for members in together.values():
            removed |= self._of_entry(members)
        kept = {w.parameter: ~removed[w.parameter].cpu() for w in self.weights}
        self.achieved = {w.layers[0]: self._record(w, int(removed[w.parameter].sum())) for w in self.weights}
        return ElementMasks(self.model, kept)

    def _of_layer(self, weight: _Weight) -> torch.Tensor:
        """Returns which elements of one weight go."""
        magnitudes, sparsity = weight.tensor.detach().abs(), weight.config.sparsity or 0.0
        if self.mode == "balance":
            return _in_blocks(magnitudes, self.balance_gran, sparsity)
        return smallest(magnitudes.reshape(1, -1), min(whole(magnitudes.numel(), sparsity), weight.most)).reshape(magnitudes.shape)

    def _of_entry(self, members: list[_Weight]) -> dict[str, torch.Tensor]:
        """Returns which elements of the weights of one entry go, by one ranking over all that each of them may lose."""
        score = lamp_scores if self.criterion == "lamp" else torch.abs
        device = members[0].tensor.device
        scores = torch.cat([score(w.tensor.detach()).reshape(-1).to(device, _ranking_type(w.tensor)) for w in members])
        parts = torch.split(scores, [w.tensor.numel() for w in members])
        for part, weight in zip(parts, members, strict=True):
            part[~smallest(part.reshape(1, -1), weight.most).reshape(-1)] = math.inf
        total = members[0].config.total or 0.0
        count = min(whole(scores.numel(), total), sum(w.most for w in members))
        gone = torch.split(smallest(scores.reshape(1, -1), count).reshape(-1), [part.numel() for part in parts])
        return {w.parameter: part.reshape(w.tensor.shape) for w, part in zip(members, gone, strict=True)}

    def _record(self, weight: _Weight, removed: int) -> WeightSparsity:
        """Returns what one weight lost, with the reason where that is less than was asked for."""
        config, elements, asked = weight.config, weight.tensor.numel(), weight.requested
        reason = weight.reason
        if not reason and removed < round(elements * asked, 9):
            if removed == whole(elements, config.max_sparsity):
                reason = f"max_sparsity_per_layer is {config.max_sparsity:g}"
            elif config.total is not None:
                reason = f"ranked together with the other layers of config_list[{config.entry}]"
            elif self.mode == "balance":
                reason = f"whole weights of every block of {math.prod(self.balance_gran)}"
            else:
                reason = "whole weights, and at least one stays"
        return WeightSparsity(weight.layers[0], asked, removed, elements, reason)


def whole(elements: int, share: float) -> int:
    """Returns how many whole elements a share of them is, rounded down; 0.29 of 100 is 29, although 100 * 0.29 is a little less."""
    return math.floor(round(elements * share, 9))


def smallest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Returns which `count` values are the smallest of each row, of equal ones the last.

    Args:
        values: (rows, elements), floating point.
        count: how many, from 0 to all.

    Returns:
        A boolean tensor of the same shape with exactly `count` True per row.
    """
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    wide = values.to(_ranking_type(values))  # the selection below is not there for 16-bit numbers on every device
    threshold = torch.kthvalue(wide, count, dim=1, keepdim=True).values
    below, level = wide < threshold, wide == threshold
    staying = level.sum(1, keepdim=True) + below.sum(1, keepdim=True) - count
    return below | (level & (level.cumsum(1) > staying))


def lamp_scores(weight: torch.Tensor) -> torch.Tensor:
    """Returns the LAMP scores of single weights in float64, of any shape: w_u^2 over the sum of w_v^2 from w_u upwards, see `LAMP`."""
    return lamp(weight.detach().reshape(-1).double().square()).reshape(weight.shape)


def _ranking_type(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _in_blocks(values: torch.Tensor, block: tuple[int, ...], sparsity: float) -> torch.Tensor:
    """Returns the smallest values of every block, the same number in each."""
    inner = (1,) * (values.dim() - len(block)) + block
    outer = [length // part for length, part in zip(values.shape, inner, strict=True)]
    dims = range(values.dim())
    split = values.reshape([n for pair in zip(outer, inner, strict=True) for n in pair])
    order = [2 * d for d in dims] + [2 * d + 1 for d in dims]
    rows = split.permute(order).reshape(-1, math.prod(inner))
    chosen = smallest(rows, min(whole(rows.shape[1], sparsity), rows.shape[1] - 1))
    back = [n for d in dims for n in (d, values.dim() + d)]
    return chosen.reshape([*outer, *inner]).permute(back).reshape(values.shape)


def _check_mode(mode: object, balance_gran: object) -> None:
    if mode not in get_args(LevelMode):
        raise ConfigError(f"mode is {mode!r}", f"Use one of {', '.join(map(repr, get_args(LevelMode)))}")
    if mode != "balance":
        if balance_gran is not None:
            raise ConfigError(f"balance_gran is given, but mode is {mode!r}", "Write mode='balance', or drop balance_gran")
    elif not isinstance(balance_gran, (list, tuple)) or not balance_gran or not all(type(n) is int and n > 0 for n in balance_gran):
        what = f"mode 'balance' needs the shape of a block, but balance_gran is {balance_gran!r}"
        raise ConfigError(what, "Pass positive whole numbers, such as balance_gran=[4] for blocks of four along the last dimension")


def _check_weight(weight: _Weight, mode: LevelMode, block: tuple[int, ...]) -> None:
    """Raises unless a weight can be pruned in the mode that was asked for."""
    layer, shape, entry = weight.layers[0], tuple(weight.tensor.shape), f"config_list[{weight.config.entry}]"
    if not bool(weight.tensor.isfinite().all()):
        raise InputError(f"the weight of {layer!r} has values that are not finite", "Train or load the model first")
    if mode == "global" and weight.config.total is None and weight.config.sparsity:
        what = f"mode 'global' ranks all layers of an entry together, but {entry} gives a sparsity per layer"
        raise ConfigError(what, "Write 'total_sparsity' instead of 'sparsity', or mode='normal'")
    if mode == "balance" and weight.config.total is not None:
        what = f"mode 'balance' takes the same number of weights from every block, but {entry} gives a total_sparsity"
        raise ConfigError(what, "Write 'sparsity' instead of 'total_sparsity', or mode='normal'")
    aligned = shape[len(shape) - len(block) :]
    if len(block) > len(shape) or any(length % part for length, part in zip(aligned, block, strict=True)):
        what = f"blocks of shape {block} do not divide the weight of {layer!r}, which is {shape}"
        raise ConfigError(what, f"Choose another balance_gran, or leave {layer!r} out of the config list")


def _selected(model: nn.Module, config_list: Sequence[Mapping[str, Any]]) -> list[_Weight]:
    """Returns the weights that the config list selects, each once, in the model's order."""
    modules = dict(model.named_modules())
    types = {name: type(module).__name__ for name, module in modules.items()}
    holders: dict[int, list[str]] = {}
    found: dict[int, torch.Tensor] = {}
    for name, module in modules.items():
        weight = own_parameters(module).get("weight")  # a weight that is computed, as by weight_norm, is no parameter
        if isinstance(weight, torch.nn.parameter.UninitializedParameter):
            raise InputError(f"the weight of {name!r} has no shape yet", "Run the model once, so that its lazy layers take their shapes")
        if weight is not None and weight.dim() > 1 and weight.is_floating_point() and weight.numel():
            holders.setdefault(id(weight), []).append(name)
            found[id(weight)] = weight
    names = {name for group in holders.values() for name in group}
    layers = {name: kind for name, kind in types.items() if name in names}
    resolved = resolve(config_list, layers, {n: t for n, t in types.items() if n not in names}, _WEIGHTS)
    out = []
    for key, group in holders.items():
        asked = [resolved.layers[name] for name in group if name in resolved.layers]
        if asked:
            config, reason = _of_shared(group, resolved.layers)
            out.append(_Weight(tuple(group), found[key], config, max(map(_asked, asked)), reason))
    return out


def _read(model: nn.Module, weights: list[_Weight], example_inputs: object) -> list[_Weight]:
    """Returns the weights, with nothing asked of those that the model does not read on the example inputs, if there are any."""
    if example_inputs is None:
        return weights
    inputs = normalise(example_inputs).copied()
    with preserve_state(model), tensors_read() as read:
        run(model, inputs)
    unread = "not read by the model on the example inputs"
    asked = {id(w.tensor): LayerConfig(w.config.entry, 0.0) for w in weights if id(w.tensor) not in read}
    return [replace(w, config=asked[id(w.tensor)], reason=unread) if id(w.tensor) in asked else w for w in weights]


def _of_shared(group: list[str], configs: Mapping[str, LayerConfig]) -> tuple[LayerConfig, str]:
    """Returns what is asked of a weight that the layers of a group share, and why that is less than some of them ask for."""
    chosen = [configs[name] for name in group if name in configs]
    least = min(chosen, key=_asked)
    missing = [name for name in group if name not in configs]
    if missing:
        return LayerConfig(least.entry, 0.0), f"shared with {missing[0]}, which is excluded or matched by no config entry"
    if len({c.entry for c in chosen}) > 1 and any(c.total is not None for c in chosen):
        return LayerConfig(least.entry, 0.0), "shared by layers of different config entries, one of them with a total sparsity"
    differ = len({_asked(c) for c in chosen}) > 1
    return least, f"shared with {group[chosen.index(least)]}, which asks for least" if differ else ""


def _asked(config: LayerConfig) -> float:
    """Returns the sparsity that a config entry asks for, before any maximum."""
    return config.asked or config.sparsity or config.total or 0.0
