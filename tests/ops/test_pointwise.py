"""Elementwise operators: broadcasting, gates, parameters per channel, writing in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.support.operators import Case, check, conv, let, sequences, table

A, B = "a.bias/0 a.weight/0", "b.bias/0 b.weight/0"
ONE = [f"8 exact: {A} c.weight/1"]
TWO = [f"8 exact: {A} {B} c.weight/1"]


def one(name: str, op: Any, groups: list[str] = ONE, *, inner: Any = torch.relu, **options: Any) -> Case:
    """Returns a case in which 8 channels pass `op(x, network)` on their way into the next convolution."""
    parts = {"a": conv(3, 8), "c": conv(8, 4), **options.pop("extra", {})}
    return Case(name, lambda m, x: m.c(op(inner(m.a(x)), m)), parts, groups, **{"kind": "module", **options})


def two(name: str, op: Any, groups: list[str] = TWO, **options: Any) -> Case:
    """Returns a case in which two convolutions of 8 channels meet."""
    parts = {"a": conv(3, 8), "b": conv(3, 8), "c": conv(8, 4)}
    return Case(name, lambda m, x: m.c(op(torch.relu(m.a(x)), m.b(x))), parts, groups, **{"kind": "module", **options})


def excite(x: torch.Tensor, m: Any) -> torch.Tensor:
    """Returns the channels weighted by what they are on average."""
    out: torch.Tensor = x * torch.sigmoid(m.up(torch.relu(m.down(x.mean((2, 3), keepdim=True)))))
    return out


def in_place(x: torch.Tensor, m: Any) -> torch.Tensor:
    """Returns what a chain of operators in place leaves."""
    x = x.clone()
    x += m.p
    x.mul_(2.0).sub_(0.1).clamp_(min=-1.0)
    return functional.relu(x, inplace=True)


def written(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns x with its first half written over."""
    x = x.clone()
    x[:, :4] = y[:, 4:]
    return x


def added(x: torch.Tensor, m: Any) -> torch.Tensor:
    """Returns x with something added to its second half."""
    x = x.clone()
    x[:, 4:] += m.p
    return x


def filled(x: torch.Tensor) -> torch.Tensor:
    """Returns x with a literal in its first half."""
    x = x.clone()
    x[:, :4] = 1.5
    return x


def masked(x: torch.Tensor, m: Any) -> torch.Tensor:
    """Returns x where a comparison holds."""
    out: torch.Tensor = x.masked_fill(x > 0.5, -1.0) * (x <= m.p).double()
    return out


PRELU = torch.ops.aten._prelu_kernel  # noqa: SLF001 (what prelu becomes on the way through autograd)
GATES = "down.bias/0 down.weight/0 up.weight/1"
HALVES = [f"4 exact: {A} {B} c.weight/1", f"4 exact: {A} c.weight/1", f"4 exact: {B}"]

CASES = [
    *(one(f.__name__, lambda x, _, f=f: f(x), inner=lambda x: x) for f in (
        functional.relu, functional.gelu, functional.silu, functional.hardswish, functional.elu, functional.leaky_relu, functional.softplus,
        functional.mish, functional.hardsigmoid, functional.logsigmoid, torch.sigmoid, torch.tanh, torch.exp, torch.abs, torch.square,
        torch.sign, torch.erf, torch.sin, torch.neg, functional.relu6, functional.selu, functional.celu, functional.softsign)),
    one("clamp", lambda x, _: x.clamp(0.1, 0.7)), one("power", lambda x, _: x**3), one("reciprocal", lambda x, _: 1 / (x + 1)),
    one("square root", lambda x, _: (x + 0.1).sqrt().log1p()), one("remainder", lambda x, _: x % 0.3), one("whole quotient", lambda x,
         _: x // 0.1, trainable=False),
    one("rounding", lambda x, _: (x * 4).round() + x.floor()), one("threshold", lambda x, _: functional.threshold(x, 0.2, 0.1)),
    one("dropout", lambda x, _: functional.dropout(functional.dropout2d(functional.alpha_dropout(x), training=False), training=False),
        inner=functional.feature_alpha_dropout),
    one("copies", lambda x, _: x.clone().contiguous().to(torch.float32).to(torch.float64).detach().clone() + x.type_as(x)),
    one("one like it", lambda x, _: x + torch.ones_like(x) * torch.full_like(x, 0.3) + torch.zeros_like(x)),
    one("made like it in place", lambda x, _: x + torch.empty_like(x).fill_(0.3) + torch.empty_like(x).zero_().positive()),
    two("add", lambda x, y: x + y), two("mul", lambda x, y: x * y), two("sub with a factor", lambda x, y: torch.sub(x, y, alpha=0.3)),
    two("div", lambda x, y: x / (y.abs() + 1)), two("maximum and minimum", lambda x, y: torch.maximum(x, y) + torch.minimum(x, y)),
    two("max of two", lambda x, y: torch.max(x, y) * torch.min(x, y)), two("lerp", lambda x, y: torch.lerp(x, y, 0.3)),
    two("addcmul", lambda x, y: torch.addcmul(x, x, y, value=0.4) + torch.addcdiv(x, y, x + 1)),
    two("where", lambda x, y: torch.where(x > 0.3, x, y)), two("atan2", lambda x, y: torch.atan2(x, y + 3)),
    two("mean of one broadcast", lambda x, y: x * y.mean((2, 3), keepdim=True)), two("comparison", lambda x, y: x * (x > y)),
    two("copy", lambda x, y: x.clone().copy_(y) + x), two("added in place", lambda x, y: x.clone().add_(y).relu_()),
    two("written into a slice", written, HALVES, kind=None), two("chain of residuals", lambda x, y: (x + y) + (x * y + x)),
    one("add of one channel for all", lambda x, m: x + m.s(x)[:, :1], [ONE[0] + " s.weight/1"], extra={"s": conv(8, 1)}),
    Case("add of the input itself", lambda m, x: m.c(m.a(x) + x), {"a": conv(3, 3), "c": conv(3, 4)}, [],
         {"a.weight/0": "cannot shrink (aten::add)"}),
    Case("add of one input channel", lambda m, x: m.c(m.a(x) + x[:, :1]), {"a": conv(3, 8), "c": conv(8, 4)}, ONE, kind="module"),
    one("excitation", excite, [f"8 exact: {A} c.weight/1 down.weight/1 up.bias/0 up.weight/0", f"4 exact: {GATES}"],
        extra={"down": conv(8, 4, 1), "up": conv(4, 8, 1)}),
    one("parameter per channel", lambda x, m: x * m.p + m.q, [ONE[0] + " p/1 q/0"], extra={"p": table(1, 8, 1, 1), "q": table(8, 1, 1)}),
    one("parameter per pixel", lambda x, m: x + m.p, extra={"p": table(6, 6)}, frozen={"p/0": "("}),
    one("parameter per channel and pixel", lambda x, m: x + m.p, [ONE[0] + " p/1"], extra={"p": table(1, 8, 6, 6)}),
    one("one number", lambda x, m: x * m.p, extra={"p": table(1)}, frozen={"p/0": "size 1"}),
    one("buffer per channel", lambda x, m: x * m.p, [ONE[0] + " p/0"], extra={"p": torch.rand(8, 1, 1, dtype=torch.float64) + 0.5}),
    one("integer buffer per channel", lambda x, m: x * m.p, [], extra={"p": torch.arange(8).view(8, 1, 1)},
         frozen={"a.weight/0": "aten::mul"},
        kind=None),
    one("literal per channel", lambda x, _: x * torch.arange(8, dtype=x.dtype).view(8, 1, 1), [], frozen={"a.weight/0": "aten::mul"},
         kind=None),
    Case("layer scale", lambda m, x: m.c(torch.relu(m.a(x)) + m.p * m.b(torch.relu(m.a(x)))), {"a": nn.Linear(4, 8), "b": nn.Linear(8, 8),
         "p": table(8), "c": nn.Linear(8, 4)}, [f"8 exact: {A} {B} b.weight/1 c.weight/1 p/0"], inputs=sequences, kind="module"),
    one("prelu", lambda x, m: m.p(x), [ONE[0] + " p.weight/0"], inner=lambda x: x, extra={"p": nn.PReLU(8)}),
    one("prelu with one slope", lambda x, m: m.p(x), inner=lambda x: x, extra={"p": nn.PReLU()}),
    one("prelu kernel", lambda x, m: PRELU(x, m.p), [ONE[0] + " p/1"], inner=lambda x: x, extra={"p": table(1, 8, 1, 1)}),
    one("rrelu", lambda x, _: functional.rrelu(x), inner=lambda x: x),
    one("glu", lambda x, _: functional.glu(x, 1), ["4 exact: a.bias/0*2 a.weight/0*2 c.weight/1"], inner=lambda x: x, extra={"c": conv(4,
         4)}),
    Case("glu of the last dimension", lambda m, x: m.c(functional.glu(m.a(x))), {"a": nn.Linear(4, 8), "c": nn.Linear(4, 4)},
         ["4 exact: a.bias/0*2 a.weight/0*2 c.weight/1"], inputs=sequences, kind="module"),
    one("gate by halves", lambda x, _: let(x.chunk(2, 1), lambda y: y[0] * y[1].sigmoid()), ["4 exact: a.bias/0*2 a.weight/0*2 c.weight/1"],
        extra={"c": conv(4, 4)}),
    one("chain in place", in_place, [ONE[0] + " p/0"], extra={"p": table(8, 1, 1)}, inner=lambda x: x),
    one("added into a slice", added, [f"4 exact: {A} c.weight/1", f"4 exact: {A} c.weight/1 p/0"], extra={"p": table(4, 1, 1)}, kind=None),
    one("literal written into a slice", lambda x, _: filled(x), [f"4 exact: {A} c.weight/1", f"4 exact: {A} c.weight/1"], kind=None),
    one("complement", lambda x, _: 1 - x), two("complement of the other", torch.rsub),
    two("complex numbers", lambda x, y: torch.complex(x, y).abs() + torch.polar(x, y).real),
    one("masks", masked, [ONE[0] + " p/0"], extra={"p": table(8, 1, 1)}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pointwise(case: Case) -> None:
    """Groups are what the formula of the operator says, and removal is exact."""
    check(case)


def overwritten(name: str, where: slice, groups: list[str]) -> Case:
    """Returns a case in which some of 8 channels are written over by another layer's 4."""

    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(m.a(x)).clone()
        y[:, where] = m.b(x)
        out: torch.Tensor = m.c(y)
        return out

    return Case(name, run, {"a": conv(3, 8), "b": conv(3, 4), "c": conv(8, 4)}, groups)


WRITTEN = [
    overwritten("step", slice(None, None, 2), ["4 exact: a.bias/0*2 a.weight/0*2 b.bias/0 b.weight/0 c.weight/1*2"]),
    overwritten("from the end", slice(-4, None), [f"4 exact: {A} {B} c.weight/1", f"4 exact: {A} c.weight/1"]),
]


@pytest.mark.parametrize("case", WRITTEN, ids=str)
def test_written_into_a_slice_that_is_no_range_afterwards(case: Case) -> None:
    """Writing into a slice with a step, or counted from the end, reaches the tensor that was sliced."""
    check(case)


def test_sum_after_a_literal_was_written() -> None:
    """A literal written over channels does not vanish with them, so a sum across them is a statistic."""
    groups = ["4 changed: a.bias/0 a.weight/0", "4 changed: a.bias/0 a.weight/0"]
    check(one("literal, then sum", lambda x, _: filled(x).sum(1, keepdim=True), groups, extra={"c": conv(1, 4)}, kind=None))
