"""Statistics of activations: how often a channel is zero, and what it is on average.

Hu et al., Network Trimming, arXiv 1607.03250, equation 1: APoZ_c = sum over samples and positions of [activation = 0] / (samples x
positions). Molchanov et al., arXiv 1611.06440, section 2.2: the mean activation. Both are ratios of sums, which are streamed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphprune.criteria.statistics.following import follow, named
from graphprune.criteria.statistics.places import Places
from graphprune.data.distributed import all_reduce_sum
from graphprune.errors import InputError
from graphprune.torch_private import is_operator
from graphprune.trace.program import info

if TYPE_CHECKING:
    from torch import fx, nn

    from graphprune.data.sources import Source
    from graphprune.groups.footprints import Layout
    from graphprune.groups.graph import DependencyGraph, Group
    from graphprune.ops.labels import Ids
    from graphprune.trace.inputs import Inputs

_EXACT = 1 << 24  # float32 counts exactly up to here


@dataclass(frozen=True, eq=False)
class Observed:
    """What the activations of one group's channels were like, behind one or several of its producing weights.

    Attributes:
        place: the operators that made them, and where.
        zeros: (channels,) float64, how many elements were exactly zero.
        total: (channels,) float64, the sum of all elements.
        elements: (channels,) float64, how many there were, over all samples and positions.
    """

    place: str
    zeros: Tensor
    total: Tensor
    elements: Tensor


def observe_activations(model: nn.Module, graph: DependencyGraph, source: Source) -> dict[str, list[Observed]]:
    """Returns group name -> what its channels' activations were like, once per distinct place (see `places`).

    A position that several channels own counts for each of them. Under `torch.distributed` the batches of all processes count. The list is
    empty where the recorded pass does not compute a group.

    Args:
        model: the model of the graph, left as it was.
        graph: as `trace` returned it.
        source: the batches.

    Raises:
        InputError: there are no batches, or a batch takes another path through the model than the example inputs did.
    """
    places = Places(graph.engine)
    shown = {group.name: places.of(group) for group in graph.groups}
    sums: dict[tuple[fx.Node, int], _Sum] = {}
    for group in graph.groups:
        for node in shown[group.name]:
            dim, layout = places.carrier(node, group)
            sums.setdefault((node, dim), _Sum(node, dim, layout, graph.engine.table.roots(layout.labels)))
    wanted: dict[fx.Node, list[tuple[int | None, _Sum]]] = {}
    for (node, _), total in sums.items():
        operator, number = _made_by(node)
        wanted.setdefault(operator, []).append((number, total))

    def look(node: fx.Node, _args: tuple[Any, ...], _kwargs: dict[str, Any], result: Any) -> None:
        for number, total in wanted.get(node, ()):
            total.add(result if number is None else result[number])

    def visit(inputs: Inputs) -> None:
        follow(model, inputs, graph.engine.program, look)

    source.inputs(model, visit)
    totals = dict(zip(sums, (t.cpu() for t in all_reduce_sum([total.sums for total in sums.values()])), strict=True))
    return {g.name: [_observed(g, node, places, totals) for node in shown[g.name]] for g in graph.groups}


class _Sum:
    """Sums over everything but one dimension of one tensor, over all batches.

    Attributes:
        node: what makes the tensor.
        dim: the dimension that stays.
        layout: which of its positions each cause owns.
        roots: its labels, equal where they mean the same.
        sums: (3, positions) float64: zeros, sums, elements.
    """

    def __init__(self, node: fx.Node, dim: int, layout: Layout, roots: Ids) -> None:
        self.node = node
        self.dim = dim
        self.layout = layout
        self.roots = roots
        self.sums = torch.zeros(3, roots.size, dtype=torch.float64)
        self._rank = len(info(node).shapes[0])

    def add(self, tensor: Tensor) -> None:
        """Adds the tensor of one batch, which is read now: the memory may be written to later.

        Raises:
            InputError: its channels are laid out in another way than in the recording.
        """
        if tensor.ndim != self._rank:
            raise self._elsewhere(tensor)
        found = _sums_along(tensor, self.dim)
        if found.shape[1] != self.roots.size:
            found = self._folded(found, tensor)
        self.sums = self.sums.to(tensor.device)
        self.sums[:, : found.shape[1]] += found

    def _folded(self, found: Tensor, tensor: Tensor) -> Tensor:
        """Returns sums over the repetitions of a dimension that repeats the same channels, samples times over."""
        period = gcd(found.shape[1], self.roots.size)
        if period < 2 or not (self.roots.reshape(-1, period) == self.roots[:period]).all():
            raise self._elsewhere(tensor)
        return found.reshape(3, -1, period).sum(1)

    def _elsewhere(self, tensor: Tensor) -> InputError:
        shapes = f"{tuple(tensor.shape)} instead of {tuple(self.node.meta['shapes'][0])}"
        what = f"the channels of {named(self.node)} lie elsewhere in a batch than in the example inputs: shape {shapes}"
        return InputError(what, "Pass example inputs of the batches' own shape")


def _sums_along(tensor: Tensor, dim: int) -> Tensor:
    """Returns (3, positions) float64: zeros, sums and elements per position of one dimension."""
    others = [d for d in range(tensor.ndim) if d != dim]
    size = tensor.shape[dim]
    each = tensor.numel() // max(size, 1)
    count = torch.full((size,), float(each), dtype=torch.float64, device=tensor.device)
    if not others:
        return torch.stack([(tensor == 0).double(), tensor.double(), count])
    single = each < _EXACT and tensor.dtype is torch.float32  # several times as fast as summing truth values
    zero = torch.eq(tensor, 0, out=torch.empty_like(tensor)) if single else tensor == 0
    return torch.stack([zero.sum(others).double(), tensor.sum(others, dtype=torch.float64), count])


def _observed(group: Group, node: fx.Node, places: Places, totals: dict[tuple[fx.Node, int], Tensor]) -> Observed:
    """Gathers the sums per position into sums per channel."""
    dim, layout = places.carrier(node, group)
    owned = torch.from_numpy(layout.owned(group.causes))
    return Observed(named(node), *totals[node, dim][:, owned].sum(2).unbind())


def _made_by(node: fx.Node) -> tuple[fx.Node, int | None]:
    """Returns the operator that makes a node, and the node's number among several results."""
    if is_operator(node.target):
        return node, None
    operator: Any = node.args[0]
    number: Any = node.args[1]
    return operator, number
