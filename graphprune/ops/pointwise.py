"""Elementwise operators: what meets by broadcasting lives and dies together; a dimension of size 1 couples nothing.

out[i] = f(a[i], b[i], ...)        labels: a = b = out, per dimension, where sizes are not 1
"""

from __future__ import annotations

from typing import Any

import torch

from graphprune.ops.labels import Dim
from graphprune.ops.registry import UNBOUND, Labels, Op, Value, aten, rule
from graphprune.torch_private import schema_of


@rule("pointwise", aten.dropout, aten.alpha_dropout, aten.feature_dropout, aten.native_dropout, aten.masked_fill, aten.fill, aten.copy,
      aten.rrelu, aten.rrelu_with_noise, aten.bernoulli, aten.hardswish, aten.log_sigmoid_forward, aten.floor_divide, aten.rsub,
      aten.complex, aten.polar)  # fmt: skip
def pointwise(op: Op) -> Labels | list[Labels]:
    """Couples all tensor arguments by broadcasting; the rule of every operator that PyTorch tags as pointwise."""
    out = broadcast(op, op.values(), op.shape)
    op.zero = keeps_zero(op, out)
    return out if len(op.outputs) == 1 else [list(out) for _ in op.outputs]


@rule(aten.contiguous, aten.clone, aten.alias, aten.detach, aten.lift_fresh, aten.lift_fresh_copy, aten.to, aten._to_copy,
      aten.type_as, aten.float, aten.zero, aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like,
      aten.empty_like, aten.positive, aten.requires_grad_, aten.cpu)  # fmt: skip
def identity(op: Op) -> Labels:
    """The output has the labels of the first argument."""
    first = op.values()[0]
    if op.name in {"aten::ones_like", "aten::full_like", "aten::rand_like", "aten::randn_like", "aten::empty_like"}:
        op.zero = False
    return op.dims(first)


@rule(aten.prelu, aten._prelu_kernel)
def prelu(op: Op) -> Labels:
    """`prelu(x, w)`: one slope, or one per channel (dimension 1, or 0 for a vector)."""
    x, weight = op["self"], op["weight"]
    labels = op.dims(x)
    if weight.shape == x.shape or len(weight.shape) == len(x.shape) > 1:
        return broadcast(op, [x, weight], op.shape)
    if weight.shape[0] > 1:
        channel = 1 if len(x.shape) > 1 else 0
        labels[channel] = op.bind(weight, 0, labels[channel])
    return labels


@rule(aten.glu)
def glu(op: Op) -> Labels:
    """`glu(x, dim)`: the two halves of `dim` are multiplied, so they live and die together."""
    x: Value = op["self"]
    dim = op.get("dim", -1) % len(x.shape)
    labels = op.dims(x)
    halves = labels[dim]
    if halves is not None:
        size = x.shape[dim] // 2
        labels[dim] = op.equal(halves[:size], halves[size:])
    return labels


def broadcast(op: Op, values: list[Value], shape: tuple[int, ...]) -> Labels:
    """Returns the labels of `shape` after coupling the values that are broadcast to it."""
    out: Labels = []
    for d in range(len(shape)):
        back = d - len(shape)
        meeting = [(v, len(v.shape) + back) for v in values if len(v.shape) + back >= 0 and v.shape[back] == shape[d]]
        out.append(_meet(op, meeting) if shape[d] != 1 else None)
    return out


def _meet(op: Op, meeting: list[tuple[Value, int]]) -> Dim:
    """Couples one dimension of several values; unmet parameter dimensions take the labels of the others."""
    known = [(v, d) for v, d in meeting if v.labels[d] is not UNBOUND]
    first, dim = (known or meeting)[0]
    labels = op.dim(first, dim)
    for value, d in meeting:
        if value is not first or d != dim:
            labels = op.bind(value, d, labels, f"meets {value.name if labels is not None else first.name}, which cannot shrink")
    return labels


def covers(value: Value, labels: Labels) -> bool:
    """Returns whether a value has every dimension that may lose an index, so that it vanishes with it; a broadcast one does not."""
    lead = len(labels) - len(value.shape)
    return all(dim is None or (d >= lead and value.shape[d - lead] != 1) for d, dim in enumerate(labels))


def alone(labels: Labels, *dims: int) -> bool:
    """Returns whether no dimension but these may lose an index."""
    listed = {d % len(labels) for d in dims}
    return all(dim is None for d, dim in enumerate(labels) if d not in listed)


_ZERO: dict[Any, tuple[bool, bool]] = {}


def keeps_zero(op: Op, labels: Labels) -> bool:
    """Returns whether the output is zero on removed channels, given which arguments are (found by trying it).

    Where it is not even a number (zero divided by zero), the masked reference leaves the removed channels out, and has zeros there.
    """
    values = {k: v for k, v in op.arguments.items() if isinstance(v, Value)}
    lost = [d - len(labels) for d, dim in enumerate(labels) if dim is not None]
    if not lost:
        return _at_zero(op, {k: v.zero for k, v in values.items()})[0]
    out = True
    for back in lost:
        is_zero, defined = _at_zero(op, {k: v.zero and len(v.shape) >= -back and v.shape[back] != 1 for k, v in values.items()})
        if not defined:
            op.only_kept(labels[back])
        out = out and (is_zero or not defined)
    return out


def _at_zero(op: Op, zero: dict[str, bool]) -> tuple[bool, bool]:
    """Returns whether an operator gives zero, and whether it gives a finite number, where the arguments named are zero."""
    key = (op.target, tuple((k, zero[k] if k in zero else repr(v)) for k, v in op.arguments.items()))
    if key not in _ZERO:
        _ZERO[key] = _try_zero(op, zero) if any(zero.values()) else (False, True)
    return _ZERO[key]


_SCALING = frozenset({"aten::dropout", "aten::feature_dropout", "aten::rrelu"})  # draw what they multiply by


def _try_zero(op: Op, zero: dict[str, bool]) -> tuple[bool, bool]:
    """Returns whether the output is zero, and whether it is a finite number.

    What draws random numbers is not tried: the generators are everybody's.
    """
    if torch.Tag.nondeterministic_seeded in op.target.tags and op.get("train", op.get("training", True)):
        return op.name.removesuffix("_") in _SCALING and all(zero.values()), True
    arguments: dict[str, Any] = {
        k: (torch.zeros(1) if zero[k] else torch.full((1,), 0.7)) if k in zero else v for k, v in op.arguments.items()
    }
    for name in ("dtype", "layout", "device", "memory_format", "pin_memory"):
        arguments.pop(name, None)
    try:
        with torch.inference_mode():
            names = [a.name for a in schema_of(op.target).arguments if not a.kwarg_only]
            positional = [arguments.pop(n) for n in names if n in arguments]
            result = op.target(*positional, **arguments)
        return bool((result == 0).all()), bool(torch.isfinite(result).all())
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False, True
