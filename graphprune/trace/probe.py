"""What an operator without a rule does to channels, found out by running it on the tensors that it was recorded with.

Which positions of the output depend on which positions of an input is read from binary codes: once with the inputs changed at all
positions whose number has bit b set, once at all others, for every b. Where each output position answers to exactly one input position,
the dimension passes through, in whatever order. Then channels are removed from the inputs: only if the operator, with all its literal
arguments as they are, gives exactly the outputs that are left, on changed values as well, is the map accepted. Everything else freezes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from graphprune.ops.labels import Ids
from graphprune.ops.registry import Op, Value
from graphprune.torch_private import pytree, schema_of
from graphprune.trace.inputs import tensors_in
from graphprune.trace.threads import forked_generators

Place: TypeAlias = "tuple[int, int]"
"""Number of a tensor and a dimension of it."""

REMEDY = "Register a rule for the operator, see graphprune/ops/README.md"
TRIALS = 3
MOST_ELEMENTS = 2**24  # of all operands together: beyond that, a probe costs more than a rule
_TOLERANCE = {torch.float64: 1e-10, torch.complex128: 1e-10, torch.float32: 1e-4, torch.complex64: 1e-4}
_LOOSE = 3e-2  # of half precision


@dataclass(frozen=True, eq=False)
class Recorded:
    """One call of an operator with its tensors.

    Attributes:
        target: the operator.
        args: positional arguments, tensors as they were.
        kwargs: keyword arguments, likewise.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @staticmethod
    def of(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Recorded | None:
        """Returns the call with copies of its tensors; None where it cannot be repeated at will (it writes, or hands on views)."""
        schema = schema_of(target)
        if schema.is_mutable or any(a.alias_info is not None for a in (*schema.arguments, *schema.returns)):
            return None
        tensors = tensors_in((args, kwargs))
        if any(t.is_meta for t in tensors) or sum(t.numel() for t in tensors) > MOST_ELEMENTS:
            return None
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
        return Recorded(target, args, kwargs)


@dataclass(frozen=True, eq=False)
class _Link:
    """Output positions along one dimension answer to input positions along another: `source[j]` for output position j."""

    operand: Place
    output: Place
    source: Ids


class _Runner:
    """Runs a call again and again with other tensors in its operands' places."""

    def __init__(self, call: Recorded) -> None:
        self._target = call.target
        leaves, self._structure = pytree.tree_flatten((call.args, call.kwargs))
        self._leaves: list[Any] = leaves
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.operands: list[Tensor] = [leaves[i] for i in self._places]

    def __call__(self, operands: list[Tensor]) -> list[Tensor]:
        """Returns the output tensors."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, operands, strict=True):
            leaves[place] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        with torch.no_grad():
            return tensors_in(self._target(*args, **kwargs))


def probe(op: Op, call: Recorded | None) -> list[Any] | None:
    """Couples the labels of an operator's inputs as running it shows; what cannot be shown is frozen.

    Args:
        op: the call as rules see it.
        call: the call with its tensors; None where there is none to repeat.

    Returns:
        Labels per output tensor, or None where the operator cannot be probed at all (nothing was coupled or frozen then).
    """
    values = op.values()
    if call is None or not op.outputs:
        return None
    runner = _Runner(call)
    if len(values) != len(runner.operands) or any(v.shape != tuple(t.shape) for v, t in zip(values, runner.operands, strict=True)):
        return None
    generator = torch.Generator().manual_seed(0)
    try:
        with forked_generators():
            links = _proven(runner, _wanted(values, runner.operands), generator)
    except Exception:  # noqa: BLE001 (an operator may refuse other values in any way; then nothing is known)
        return None
    return _couple(op, values, links) if links is not None else None


def _wanted(values: list[Value], operands: list[Tensor]) -> list[Place]:
    """Returns the dimensions whose fate matters: those that may carry labels."""
    return [
        (k, d)
        for k, (value, tensor) in enumerate(zip(values, operands, strict=True))
        for d, labels in enumerate(value.labels)
        if labels is not None and tensor.shape[d] > 1 and (tensor.is_floating_point() or tensor.is_complex())
    ]


# -- what depends on what ----------------------------------------------------------------------------------------------------------


def _proven(runner: _Runner, wanted: list[Place], generator: torch.Generator) -> list[_Link] | None:
    """Returns the links that hold under removal; None where the operator gives other results every time."""
    base = runner(runner.operands)
    again = runner(runner.operands)
    if not base or any(not torch.equal(a, b) for a, b in zip(base, again, strict=True)):
        return None
    links: list[_Link] = []
    for place in wanted:
        links += _links(runner, place, len(base), generator)
    while links:
        failed = [part for part in _components(links) if not _survives(runner, part, generator)]
        if not failed:
            return links if _survives(runner, links, generator) else []
        lost = {id(link) for part in failed for link in part}
        links = [link for link in links if id(link) not in lost]
    return []


def _links(runner: _Runner, place: Place, outputs: int, generator: torch.Generator) -> list[_Link]:
    """Returns where one dimension of an operand goes; nothing unless every output that it reaches keeps its positions apart."""
    operand, dim = place
    size = runner.operands[operand].shape[dim]
    bits = max(1, (size - 1).bit_length())
    code = np.arange(size)
    reached: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(outputs)]
    for bit in range(bits):
        chosen = (code >> bit) & 1 == 1
        ones = _influence(runner, place, chosen, generator)
        zeros = _influence(runner, place, ~chosen, generator)
        for o in range(outputs):
            reached[o].append((ones[o], zeros[o]))
    found: list[_Link] = []
    for o, pairs in enumerate(reached):
        if not any(bool(a.any()) or bool(b.any()) for a, b in pairs):
            continue  # this output does not look at the operand
        own = [link for e in range(pairs[0][0].ndim) if (link := _link(place, (o, e), pairs, size)) is not None]
        if not own:
            return []
        found += own
    return found


def _influence(runner: _Runner, place: Place, chosen: NDArray[np.bool_], generator: torch.Generator) -> list[Tensor]:
    """Returns, per output, which elements change when the chosen positions of one operand's dimension do."""
    changed: list[Tensor] = []
    for trial in range(TRIALS):
        operands = runner.operands if trial == 0 else [_shaken(t, generator) for t in runner.operands]
        before = runner(operands)
        after = runner(_with(operands, place, chosen, generator, trial))
        marks = [_differs(a, b) for a, b in zip(before, after, strict=True)]
        changed = marks if not changed else [a | b for a, b in zip(changed, marks, strict=True)]
    return changed


def _differs(a: Tensor, b: Tensor) -> Tensor:
    if a.shape != b.shape:
        message = "the shape of the output depends on values"
        raise ValueError(message)
    return (a != b) & ~(a.isnan() & b.isnan())


def _with(operands: list[Tensor], place: Place, chosen: NDArray[np.bool_], generator: torch.Generator, trial: int) -> list[Tensor]:
    """Returns the operands with other values at the chosen positions: those of the same tensor, in another order and size."""
    operand, dim = place
    tensor = operands[operand]
    other = _mixed(tensor, generator) * (1.25 + 2 * trial) + 0.5 * tensor.abs().mean().clamp(min=0.1)
    where = torch.from_numpy(chosen).reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])
    return [torch.where(where, other, tensor).to(t.dtype) if k == operand else t for k, t in enumerate(operands)]


def _shaken(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Returns other values of the same kind: a floating-point tensor's own, in another order and a little changed."""
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    mixed = _mixed(tensor, generator)
    noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
    return mixed * (1 + 0.1 * noise)


def _mixed(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Returns a tensor's own values in another order."""
    return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].reshape(tensor.shape)


def _link(operand: Place, output: Place, pairs: list[tuple[Tensor, Tensor]], size: int) -> _Link | None:
    """Reads the source of each output position along one dimension off the codes; None where some position has none, or several."""
    e = output[1]
    source = np.zeros(pairs[0][0].shape[e], dtype=np.int64)
    for bit, (ones, zeros) in enumerate(pairs):
        others = [d for d in range(ones.ndim) if d != e]
        one = (ones.any(dim=others) if others else ones).numpy()
        zero = (zeros.any(dim=others) if others else zeros).numpy()
        if not (one ^ zero).all():
            return None
        source += one.astype(np.int64) << bit
    return _Link(operand, output, source) if source.size > 1 and int(source.max()) < size else None


# -- what removal shows ------------------------------------------------------------------------------------------------------------


def _components(links: list[_Link]) -> list[list[_Link]]:
    """Returns the links that share an operand's or an output's dimension, together."""
    names: dict[tuple[str, Place], int] = {}
    rows = [names.setdefault(("operand", link.operand), len(names)) for link in links]
    columns = [names.setdefault(("output", link.output), len(names)) for link in links]
    _, which = connected_components(coo_matrix((np.ones(len(links)), (rows, columns)), shape=(len(names),) * 2), directed=False)
    parts: dict[int, list[_Link]] = {}
    for link, row in zip(links, rows, strict=True):
        parts.setdefault(int(which[row]), []).append(link)
    return list(parts.values())


def _survives(runner: _Runner, links: list[_Link], generator: torch.Generator) -> bool:
    """Returns whether removing linked positions from the operands leaves exactly the outputs of those that stay."""
    operands, outputs = _classes(links, runner)
    count = 1 + max(int(c.max()) for c in operands.values())
    for trial in range(TRIALS + 1):
        tensors = runner.operands if trial == 0 else [_shaken(t, generator) for t in runner.operands]
        order = torch.randperm(count, generator=generator).numpy()
        gone = np.zeros(count, dtype=bool)
        gone[order[: 1 if trial == 0 else max(1, count // (1 + trial))]] = True
        if any(gone[c].all() for c in (*operands.values(), *outputs.values())):
            continue
        zeroed = list(tensors)
        kept = list(tensors)
        for (k, d), classes in operands.items():
            stay = torch.from_numpy(np.flatnonzero(~gone[classes]))
            kept[k] = kept[k].index_select(d, stay)
            zeroed[k] = zeroed[k].index_fill(d, torch.from_numpy(np.flatnonzero(gone[classes])), 0)
        if not _same(runner(kept), [_kept(t, o, outputs, gone) for o, t in enumerate(runner(tensors))]):
            return False
        if not _same(runner(kept), [_kept(t, o, outputs, gone) for o, t in enumerate(runner(zeroed))]):
            return False
    return True


def _classes(links: list[_Link], runner: _Runner) -> tuple[dict[Place, Ids], dict[Place, Ids]]:
    """Returns per operand dimension, and per output dimension, the number of the class that each position lives and dies with."""
    starts: dict[Place, int] = {}
    total = 0
    for place in dict.fromkeys(link.operand for link in links):
        starts[place] = total
        total += runner.operands[place[0]].shape[place[1]]
    pairs: list[NDArray[np.int64]] = []
    first: dict[Place, Ids] = {}
    for link in links:
        ids = starts[link.operand] + link.source
        if link.output in first:
            pairs.append(np.stack([first[link.output], ids]))
        else:
            first[link.output] = ids
    edges = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), dtype=np.int64)
    _, which = connected_components(coo_matrix((np.ones(edges.shape[1]), (edges[0], edges[1])), shape=(total, total)), directed=False)
    which = which.astype(np.int64)
    sizes = {place: runner.operands[place[0]].shape[place[1]] for place in starts}
    return {p: which[start : start + sizes[p]] for p, start in starts.items()}, {p: which[ids] for p, ids in first.items()}


def _kept(tensor: Tensor, output: int, outputs: dict[Place, Ids], gone: NDArray[np.bool_]) -> Tensor:
    for (o, e), classes in outputs.items():
        if o == output:
            tensor = tensor.index_select(e, torch.from_numpy(np.flatnonzero(~gone[classes])))
    return tensor


def _same(found: list[Tensor], expected: list[Tensor]) -> bool:
    for a, b in itertools.zip_longest(found, expected):
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not (a.is_floating_point() or a.is_complex()):
            if not torch.equal(a, b):
                return False
            continue
        scale = float(b.abs().nan_to_num(0, 0, 0).max()) if b.numel() else 0.0
        tolerance = _TOLERANCE.get(b.dtype, _LOOSE)
        if not torch.allclose(a, b, rtol=tolerance, atol=tolerance * max(scale, 1e-30), equal_nan=True):
            return False
    return True


# -- what it says about labels -----------------------------------------------------------------------------------------------------


def _couple(op: Op, values: list[Value], links: list[_Link]) -> list[Any]:
    """Gives the outputs their labels, makes those that meet equal, and freezes the rest."""
    labels: list[list[Any]] = [[None] * len(shape) for shape in op.outputs]
    behind: dict[Place, list[_Link]] = {}
    for link in links:
        behind.setdefault(link.output, []).append(link)
    for (o, e), group in behind.items():
        for link in group:
            incoming = op.dim(values[link.operand[0]], link.operand[1])
            passed = None if incoming is None else incoming[link.source]
            first = labels[o][e] is None and link is group[0]
            labels[o][e] = passed if first else op.equal(labels[o][e], passed, "meets channels that cannot shrink")
        if all(values[link.operand[0]].parameter for link in group):
            for link in group:
                op.produce(values[link.operand[0]], link.operand[1])
    done = {link.operand for link in links}
    for k, value in enumerate(values):
        keep = [d for d in range(len(value.shape)) if (k, d) in done]
        if value.shape:
            op.freeze_value(value, f"enters {op.name}, which has no rule and, as running it shows, does not keep these apart", REMEDY, keep)
    op.zero = False
    return labels
