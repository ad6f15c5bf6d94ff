"""The frozen records that every other room speaks in: slices, groups, what is frozen and why, and the graph that holds them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import networkx as nx
import numpy as np

from graphprune.errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

Verdict: TypeAlias = Literal["exact", "repaired", "changed"]
Role: TypeAlias = Literal["", "block", "within"]


@dataclass(frozen=True, eq=False)
class Slice:
    """What one group owns of one parameter.

    Attributes:
        parameter: qualified name of a parameter, or of a floating-point buffer that takes part in the computation.
        dim: the dimension that shrinks.
        index: int64 array of shape (channels, rows): the positions along `dim` that each channel of the group owns.
        produces: whether these positions hold the weights that compute the channel (a filter, a row of a linear layer), as opposed
            to what follows or consumes it.
    """

    parameter: str
    dim: int
    index: NDArray[np.int64]
    produces: bool = False

    @property
    def module(self) -> str:
        """The qualified name of the module that owns the parameter."""
        return self.parameter.rpartition(".")[0]


@dataclass(frozen=True, eq=False)
class Group:
    """Channels with the same footprint: interchangeable with each other, each removable on its own.

    Attributes:
        name: unique within the graph, after the first layer that produces the channels.
        channels: how many there are.
        verdict: "exact" when removal leaves the masked function as it was, "repaired" when a constant must be folded for that,
            "changed" when an operator takes a statistic across the channels.
        slices: what the group owns, producers first.
        role: "block" when its channels are whole blocks of a dimension that is cut into equal blocks (attention heads, conv groups),
            "within" when they are positions inside every block (head width), "" for ordinary channels.
        causes: the label causes behind the channels, in order (for the engine).
        why: for "changed", the operators that take the statistic.
    """

    name: str
    channels: int
    verdict: Verdict
    slices: tuple[Slice, ...]
    role: Role = ""
    causes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64), repr=False)
    why: tuple[str, ...] = ()

    @cached_property
    def producers(self) -> tuple[Slice, ...]:
        """The slices that compute the channels; all slices where nothing computes them (a learnt table)."""
        return tuple(s for s in self.slices if s.produces) or self.slices

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Qualified names of the modules that produce the channels (the parameter's own name where the model itself owns it)."""
        return tuple(dict.fromkeys(s.module or s.parameter for s in self.producers))


@dataclass(frozen=True, eq=False)
class Frozen:
    """Positions of one parameter dimension that may not be removed.

    Attributes:
        parameter: qualified name.
        dim: dimension of that parameter.
        index: 1-D int64 array of positions along `dim`.
        reason: why they stay, as a phrase.
        operator: name of the operator that says so, or "" when the parameter takes no part.
        module: module path of that operator, "" for the model itself.
        remedy: what the user may do about it, or "".
    """

    parameter: str
    dim: int
    index: NDArray[np.int64]
    reason: str
    operator: str = ""
    module: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        """One line: reason, operator and place."""
        place = f" in {self.module}" if self.module else ""
        by = f" ({self.operator}{place})" if self.operator else ""
        return f"{self.reason}{by}"


@dataclass(frozen=True)
class Unknown:
    """An operator without a rule, met while labelling.

    Attributes:
        operator: its name.
        module: the module path at which it ran.
        channels: how many channels it froze.
    """

    operator: str
    module: str
    channels: int


@dataclass(frozen=True, eq=False)
class DependencyGraph:
    """What `trace` returns: the groups of a model, and what is frozen and why.

    Attributes:
        groups: in the order in which the forward pass produces them.
        frozen: every position of every parameter dimension that is in no group.
        unknown: operators without a rule, with what they cost.
        layers: qualified name -> class name of the layers that produce channels.
        modules: qualified name -> class name of all modules.
        shapes: parameter (and member buffer) name -> shape.
        aliases: other names of tied parameters -> the name used here.
        scales: names of parameters that scale channels after a norm of each channel's own (gamma of a batch norm).
        edges: layer-level dataflow: (producer layer, consumer layer, operator that connects them last).
        seconds: wall time of "trace" and "groups".
        engine: the recorded program with its labels (private to the package).
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    unknown: tuple[Unknown, ...]
    layers: Mapping[str, str]
    modules: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    edges: tuple[tuple[str, str, str], ...]
    seconds: Mapping[str, float]
    engine: Any = field(repr=False, default=None)
    scales: frozenset[str] = frozenset()

    def __iter__(self) -> Iterator[Group]:
        """Iterates over the groups."""
        return iter(self.groups)

    def elements(self, name: str) -> int:
        """Returns how many numbers of parameters compute one channel of a group."""
        sizes = ((self.shapes[s.parameter], s) for s in self[name].producers)
        return sum(prod(shape) // shape[s.dim] * s.index.shape[1] for shape, s in sizes)

    def __getitem__(self, name: str) -> Group:
        """Returns the group of that name.

        Raises:
            ConfigError: no group has the name; the nearest is suggested.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise ConfigError(f"no group is called {name!r}", nearest(name, self._by_name) or "See graph.groups") from None

    @cached_property
    def _by_name(self) -> dict[str, Group]:
        return {g.name: g for g in self.groups}

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Returns group names in the order of the groups."""
        wanted = set(names)
        return [g.name for g in self.groups if g.name in wanted]

    @cached_property
    def fingerprint(self) -> str:
        """A digest of groups, slices and shapes: equal for two models that may exchange masks."""
        digest = hashlib.sha256()
        for name, shape in sorted(self.shapes.items()):
            digest.update(f"{name}{tuple(shape)}".encode())
        for group in self.groups:
            digest.update(f"{group.name}{group.channels}{group.role}".encode())
            for s in group.slices:
                digest.update(f"{s.parameter}{s.dim}{s.produces}".encode())
                digest.update(np.ascontiguousarray(s.index).tobytes())
        return digest.hexdigest()

    def groups_of(self, layer: str) -> tuple[Group, ...]:
        """Returns the groups that own something of a module's (or parameter's) tensors."""
        names = self._tensors_of(layer)
        return tuple(g for g in self.groups if any(s.parameter in names for s in g.slices))

    def _tensors_of(self, layer: str) -> set[str]:
        """Returns the tensors of a module, or the parameter of that name, tied ones under the name that the groups use."""
        known = {**{n: n for n in self.shapes}, **{n: c for n, c in self.aliases.items() if c in self.shapes}}
        return {c for n, c in known.items() if n == layer or n.startswith(layer + ".")}

    def reachable(self) -> float:
        """Returns the share of parameter elements that lie in some slice of some group."""
        total = covered = 0
        for name, shape in self.shapes.items():
            size = int(np.prod(shape))
            total += size
            free = 1.0
            for dim, length in enumerate(shape):
                owned = np.zeros(length, dtype=bool)
                for index in self._owned.get((name, dim), ()):
                    owned[index.ravel()] = True
                free *= 1.0 - owned.mean() if length else 1.0
            covered += round(size * (1.0 - free))
        return covered / total if total else 0.0

    @cached_property
    def _owned(self) -> dict[tuple[str, int], list[NDArray[np.int64]]]:
        owned: dict[tuple[str, int], list[NDArray[np.int64]]] = {}
        for group in self.groups:
            for s in group.slices:
                owned.setdefault((s.parameter, s.dim), []).append(s.index)
        return owned

    def explain(self, layer: str) -> str:
        """Returns which groups a layer's channels are in, with whom and why, or why they are frozen.

        Raises:
            ConfigError: the model has no such module or parameter; the nearest name is suggested.
        """
        if layer not in self.modules and layer not in self.shapes and layer not in self.aliases:
            known = [*self.layers, *self.modules, *self.shapes]
            raise ConfigError(f"the model has no layer called {layer!r}", nearest(layer, known) or "See graph.layers for the names")
        lines = [f"{layer} ({self.modules.get(layer, 'parameter')})"]
        tensors = self._tensors_of(layer)
        lines += [f"  {n} is tied to {c}" for n, c in self.aliases.items() if n == layer or n.startswith(layer + ".")]
        for group in self.groups_of(layer):
            lines += _describe(group, layer)
        for item in self.frozen:
            if item.parameter in tensors:
                size = self.shapes[item.parameter][item.dim]
                lines.append(f"  frozen: {item.parameter} dim {item.dim}, {item.index.size} of {size}: {item}")
                if item.remedy:
                    lines.append(f"    remedy: {item.remedy}")
        if len(lines) == 1:
            lines.append("  has no parameters of its own")
        return "\n".join(lines)

    def to_networkx(self) -> nx.DiGraph[str]:
        """Returns the layer-level dependency graph.

        Nodes are module names with `type` and `groups`; a directed edge says that the second layer consumes what the first produces.
        Layers that must keep the same channels share a group name.
        """
        graph: nx.DiGraph[str] = nx.DiGraph()
        for name in dict.fromkeys(n.rpartition(".")[0] for n in self.shapes):
            graph.add_node(name, type=self.modules.get(name, ""), groups=[])
        for group in self.groups:
            for layer in dict.fromkeys(s.module for s in group.slices):
                graph.nodes[layer]["groups"].append(group.name)
        for source, target, operator in self.edges:
            graph.add_edge(source, target, operator=operator)
        return graph


def _describe(group: Group, layer: str) -> list[str]:
    role = {"block": ", whole blocks", "within": ", positions inside every block", "": ""}[group.role]
    lines = [f"  group {group.name!r}: {group.channels} channels, {group.verdict}{role}"]
    others = [f"{s.parameter} dim {s.dim}" + (" (produces)" if s.produces else "") for s in group.slices if s.module != layer]
    if others:
        shown = ", ".join(others[:12]) + (f" and {len(others) - 12} more" if len(others) > 12 else "")
        lines.append(f"    together with {shown}")
    if group.why:
        lines.append(f"    statistic taken across the channels by {', '.join(group.why)}")
    return lines
