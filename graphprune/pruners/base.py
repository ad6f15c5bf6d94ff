"""The shape that all pruners share: config list and example inputs in, masks out."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from graphprune.criteria import criterion_named
from graphprune.criteria.base import Criterion, is_comparable, seen_by
from graphprune.criteria.scoring import DATA_FREE, Aggregation, Scope, Scores, score_groups
from graphprune.data.sources import Loader
from graphprune.errors import ConfigError, InputError, nearest
from graphprune.groups.build import trace
from graphprune.masks.channels import Masks
from graphprune.pruners.budgets import Plan, Rounding, keep_highest, kept_count
from graphprune.pruners.config import resolve
from graphprune.pruners.counts import Counting
from graphprune.pruners.families import CUTS, Cut
from graphprune.pruners.layerwise import Layerwise, layers_with_rows
from graphprune.pruners.options import MODES, Mode, Options, check_names
from graphprune.pruners.requests import requests
from graphprune.pruners.selectors import CHANNELS, Trait
from graphprune.sizes.watch import demands
from graphprune.sizes.widths import stated_widths

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn
    from typing_extensions import Unpack

    from graphprune.data.sources import Source
    from graphprune.groups.graph import DependencyGraph, Group
    from graphprune.masks.elements import ElementMasks
    from graphprune.trace.inputs import Inputs


class Pruner:
    """Scores the groups of a model with one criterion and keeps the best channels of each.

    Args:
        model: left as it is.
        config_list: entries as in the seeds, see `pruners.config`; a layer that no entry matches is kept whole. With a budget, entries
            say which layers lose channels and not how many.
        criterion: scores channels: the name of one, or one, see `graphprune.criteria`.
        example_inputs: see `graphprune.pruners.options.InputOptions`.
        options: see `graphprune.pruners.options.Options`.

    Raises:
        ConfigError: the config list or an option is not usable.
        InputError: there are no example inputs, or the model cannot run on them.
    """

    trait: ClassVar[Trait] = CHANNELS  # what the layers that entries may select have in common, for errors

    def __init__(
        self,
        model: nn.Module,
        config_list: Sequence[Mapping[str, Any]],
        criterion: str | Criterion,
        example_inputs: object = None,
        **options: Unpack[Options],
    ) -> None:
        check_names(type(self), options, Options)
        kept_count(1, 0.5, options.get("rounding", "floor"), options.get("round_to", 1))
        if options.get("cut", "blocks") not in CUTS:
            raise ConfigError(f"cut is {options['cut']!r}", f"Use one of {', '.join(map(repr, CUTS))}")
        self.model = model
        self.criterion = criterion_named(criterion)
        self.source = options.get("source")
        self.rounding: Rounding = options.get("rounding", "floor")
        self.round_to = options.get("round_to", 1)
        self.aggregation: Aggregation = options.get("aggregation", "sum")
        self.scope: Scope = options.get("scope", "producers")
        self.budget = options.get("budget")
        self.keep_class = options.get("keep_class", False)
        self.mode: Mode = self._mode(options.get("mode"), example_inputs, options.get("graph"))
        self.cut: Cut = "within" if self.mode == "balance" else options.get("cut", "blocks")
        self._graph = options.get("graph")
        if example_inputs is None and self._graph is None and self.source is not None:
            example_inputs = first_inputs(model, self.source, type(self).__name__)
        if example_inputs is not None and self._graph is None:
            self._graph = trace(model, example_inputs)
        names, others = self.names()
        self.config = resolve(config_list, names, others, self.trait, amounts=self.budget is None)
        self.plan = Plan()
        self._prepared = False

    @property
    def graph(self) -> DependencyGraph:
        """The model's graph.

        Raises:
            ConfigError: this pruner has none, as it was given nothing to trace the model with.
        """
        if self._graph is None:
            what = f"{type(self).__name__} masks layer by layer and knows no groups, as it was given no example inputs"
            raise ConfigError(what, "Pass example_inputs=")
        return self._graph

    def _mode(self, mode: Mode | None, example_inputs: object, graph: DependencyGraph | None) -> Mode:
        """Returns the mode to work in."""
        traceable = example_inputs is not None or graph is not None or self.source is not None
        if mode is not None and mode not in MODES:
            raise ConfigError(f"mode is {mode!r}", nearest(str(mode), MODES) or f"Use one of {', '.join(map(repr, MODES))}")
        if mode == "normal" and self.budget is not None:
            raise ConfigError("a budget in mode 'normal', whose masks of single layers save nothing", "Use another mode")
        if mode == "normal" or traceable:
            return mode or "dependency_aware"
        kind = type(self.model).__name__
        if mode is not None or self.budget is not None or seen_by(self.criterion) not in DATA_FREE[:1]:
            what = f"{type(self).__name__} has no example inputs to find the dependencies of {kind} with"
            raise InputError(what, "Pass example_inputs=, a tensor or a tuple of tensors that model(...) accepts")
        warnings.warn(
            f"{type(self).__name__} was given no example inputs, so it masks every layer of {kind} by itself (mode 'normal'): coupled "
            "layers then lose different channels, which cannot all be removed. Pass example_inputs= to prune whole groups.",
            stacklevel=4,
        )
        return "normal"

    # -- what subclasses may change ----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Does what must come before scoring, once: pruners that train put the trained copy in place of `model`."""

    def selectable(self, group: Group) -> tuple[str, ...]:
        """Returns the names by which config entries select a group: by default, those of the layers that produce its channels."""
        return group.layers

    def names(self) -> tuple[dict[str, str], dict[str, str]]:
        """Returns name -> class name of what config entries may select, and of all other modules."""
        if self._graph is None:
            return layers_with_rows(self.model)
        graph = self._graph
        return dict(graph.layers), {n: t for n, t in graph.modules.items() if n not in graph.layers}

    # -- masks -------------------------------------------------------------------------------------------------------------------

    def compress(self) -> tuple[nn.Module, Masks | ElementMasks]:
        """Returns (a copy of the model with what the masks remove zeroed, the masks)."""
        masks = self.layer_masks() if self.mode == "normal" else self.masks()
        return masks.masked(self.model), masks

    def masks(self) -> Masks:
        """Returns the masks of groups; `plan` says afterwards what was asked of each and why some lost less.

        Raises:
            ConfigError: the budget cannot be met, or the mode is "normal".
        """
        if self.mode == "normal":
            raise ConfigError(
                "mode 'normal' masks elements of layers and no groups", "Call layer_masks() or compress(), or use another mode"
            )
        start = time.perf_counter()
        scored = self.scored()
        asked = requests(self.graph, self.config, self.cut, self.selectable, together=self.mode == "global")
        whole = {**scored.unscored, **asked.whole}
        notes = {**asked.notes, **whole}
        most = {n: m for n, m in asked.most.items() if n not in whole}
        counting = Counting(scored.groups, most, self.rounding, self.round_to, is_comparable(self.criterion), notes)
        counts = {g.name: g.channels for g in self.graph.groups}
        if self.budget is not None:
            counts |= counting.within(self.budget, self.model, self.graph, "global" if self.mode == "global" else "even")
        else:
            counts |= counting.each(asked.sparsity)
            for total, members in asked.entries.values():
                counts |= counting.together([n for n in members if n not in whole], total)
        asks = demands(self.model, self.graph.engine) if self.keep_class else None
        if asks is not None:
            stated = stated_widths(self.graph, asks, counts, self.round_to)
            notes |= stated.notes(counts)
            counts = stated.counts
        kept = {g.name: keep_highest(scored.groups[g.name], counts[g.name]) for g in self.graph.groups if counts[g.name] < g.channels}
        seconds = {"score": time.perf_counter() - start}
        ranked = {n for _, members in asked.entries.values() for n in members}  # a ranking decides, no sparsity of their own
        requested = {n: s for n, s in asked.sparsity.items() if n not in ranked and self.budget is None}
        asked_of = {n: c.asked for n, c in self.config.layers.items() if c.asked is not None and self.mode != "global"}
        self.plan = Plan(requested, notes, seconds, self.budget, asked_of, asks)
        return Masks(self.graph, kept)

    def scores(self) -> dict[str, NDArray[np.float64]]:
        """Returns group name -> score per channel, higher = keep; groups that the criterion cannot score are left out."""
        return dict(self.scored().groups)

    def scored(self) -> Scores:
        """Returns the scores of all groups, those of their parts, and why some have none."""
        self._prepare_once()
        options: dict[str, Any] = {"aggregation": self.aggregation, "scope": self.scope, "source": self.source}
        return score_groups(self.model, self.graph, self.criterion, **options)

    def _prepare_once(self) -> None:
        if not self._prepared:
            self.prepare()
            self._prepared = True

    def layer_masks(self) -> ElementMasks:
        """Returns masks of the output rows of every selected layer by itself, as mode "normal" asks for."""
        self._prepare_once()
        if self._graph is None:
            found = Layerwise.of_weights(self.model, self.config, self.criterion)
        else:
            found = Layerwise.of_groups(self.model, self.config, self._graph, self.scored())
        layers = {n: self.config.layers[n] for n in found.scores}
        notes: dict[str, str] = {}
        most = {n: c.max_sparsity for n, c in layers.items()}
        counting = Counting(found.scores, most, self.rounding, self.round_to, is_comparable(self.criterion), notes)
        counts = counting.each({n: c.sparsity or 0.0 for n, c in layers.items()})
        for entry, total in {c.entry: c.total for c in layers.values() if c.total is not None}.items():
            counts |= counting.together([n for n, c in layers.items() if c.entry == entry], total)
        self.plan = Plan({}, notes, layers={n: c.asked for n, c in layers.items() if c.asked is not None})
        return found.masks(counts)


class _Enough(BaseException):
    """One batch was all that was wanted; no Exception, as trainers may catch these."""


def first_inputs(model: nn.Module, source: Source, who: str) -> Inputs:
    """Returns the inputs of the first batch of a source.

    Raises:
        ConfigError: the data can be gone through only once.
        InputError: there is no batch.
    """
    if isinstance(source, Loader) and iter(source.batches) is source.batches:
        what = f"the data of {who} gives every batch only once, and the first would be spent on finding the groups"
        raise ConfigError(what, "Pass a list or a DataLoader, or example_inputs= besides")
    found: list[Inputs] = []

    def take(inputs: Inputs) -> None:
        found.append(inputs)
        raise _Enough

    with contextlib.suppress(_Enough):
        source.inputs(model, take)
    return found[0]
