"""Operators that put tensors side by side."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.support.operators import Case, check, conv, let, sequences, table

A, B = "a.bias/0 a.weight/0", "b.bias/0 b.weight/0"
TWO = {"a": conv(3, 6), "b": conv(3, 8), "c": conv(14, 4)}
TWINS = {"a": conv(3, 8), "b": conv(3, 8), "c": conv(8, 4)}
APART = [f"6 exact: {A} c.weight/1", f"8 exact: {B} c.weight/1"]
COUPLED = [f"8 exact: {A} {B} c.weight/1"]
ONE = {"a": conv(3, 8), "c": conv(8, 4)}


def dense(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Returns what three layers give, each of which sees all before it."""
    layers = list(m.children())
    seen = [layers[0](x)]
    for layer in layers[1:]:
        seen.append(layer(torch.relu(torch.cat(seen, 1))))
    out: torch.Tensor = seen[-1]
    return out


CASES = [
    Case("cat", lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], 1)), TWO, APART, kind="module"),
    Case("cat, negative dimension", lambda m, x: m.c(torch.cat([m.a(x), m.b(x)], -3)), TWO, APART, kind="module"),
    Case("concat and concatenate", lambda m, x: m.c(torch.concat([m.a(x), torch.concatenate([m.b(x)], dim=1)], 1)), TWO, APART,
         kind="module"),
    Case("cat with the input", lambda m, x: m.c(torch.cat([x, m.a(x), x], 1)), {"a": conv(3, 8), "c": conv(14, 4)},
         [f"8 exact: {A} c.weight/1"], {"c.weight/1": "made of nothing removable"}, kind="module"),
    Case("cat with a literal", lambda m, x: m.c(torch.cat([m.a(x), torch.ones_like(x)], 1)), {"a": conv(3, 8), "c": conv(11, 4)},
         [f"8 exact: {A} c.weight/1"], kind="module"),
    Case("cat of one tensor twice", lambda m, x: m.c(let(m.a(x), lambda y: torch.cat([y, y], 1))), {"a": conv(3, 8), "c": conv(16, 4)},
         [f"8 exact: {A} c.weight/1*2"], kind="module"),
    Case("cat of one tensor in two forms", lambda m, x: m.c(let(m.a(x), lambda y: torch.cat([torch.relu(y), y.flip(1)], 1))),
         {"a": conv(3, 8), "c": conv(16, 4)}, [f"8 exact: {A} c.weight/1*2"], kind="module"),
    Case("cat along the batch", lambda m, x: m.c(torch.cat([torch.relu(m.a(x)), m.b(x)], 0)), TWINS, COUPLED, kind="module"),
    Case("cat along space", lambda m, x: m.c(torch.cat([torch.relu(m.a(x)), m.b(x)], -1)), TWINS, COUPLED, kind="module"),
    Case("cat with an empty tensor", lambda m, x: m.c(torch.cat([m.a(x), torch.zeros(0, dtype=x.dtype)], 1)), ONE,
         [f"8 exact: {A} c.weight/1"], kind="module"),
    Case("cat with a class token", lambda m, x: m.c(torch.cat([m.t.expand(x.shape[0], -1, -1), m.a(x)], 1) + m.p).mean(1),
         {"a": nn.Linear(4, 8), "t": table(1, 1, 8), "p": table(1, 6, 8), "c": nn.Linear(8, 4)}, [f"8 exact: {A} c.weight/1 p/2 t/2"],
         inputs=sequences),
    Case("dense connections", dense, {"a": conv(3, 6), "b": conv(6, 4), "c": conv(10, 4), "d": conv(14, 2)},
         ["6 exact: a.bias/0 a.weight/0 b.weight/1 c.weight/1 d.weight/1", "4 exact: b.bias/0 b.weight/0 c.weight/1 d.weight/1",
          "4 exact: c.bias/0 c.weight/0 d.weight/1"], kind="module"),
    Case("stack", lambda m, x: m.c(torch.stack([torch.relu(m.a(x)), m.b(x)]).sum(0)), TWINS, COUPLED, kind="module"),
    Case("stack, then join", lambda m, x: m.c(torch.stack([torch.relu(m.a(x)), m.b(x)], 2).flatten(1, 2)), TWINS | {"c": conv(16, 4)},
         [f"8 exact: {A} {B} c.weight/1*2"], kind="module"),
    Case("stack, then cat", lambda m, x: m.c(torch.stack([torch.relu(m.a(x)), m.b(x)], 1).flatten(1, 2)), TWINS | {"c": conv(16, 4)},
         [f"8 exact: {A} {B} c.weight/1*2"], kind="module"),
    Case("stack with the input", lambda m, x: m.c(torch.stack([m.a(x), x], -1).mean(-1)), {"a": conv(3, 3), "c": conv(3, 4)}, [],
         {"a.weight/0": "cannot shrink (aten::stack)"}),
    Case("pad of space", lambda m, x: m.c(functional.pad(m.a(x), (1, 0, 2, 1))), ONE, [f"8 exact: {A} c.weight/1"], kind="module"),
    Case("pad of space with a value", lambda m, x: m.c(functional.pad(m.a(x), (1, 1), value=0.5)), ONE, [f"8 exact: {A} c.weight/1"],
         kind="module"),
    Case("crop of space", lambda m, x: m.c(functional.pad(m.a(x), (-1, -2))), ONE, [f"8 exact: {A} c.weight/1"], kind="module"),
    Case("pad of channels", lambda m, x: m.c(functional.pad(m.a(x), (0, 0, 0, 0, 2, 3))), ONE | {"c": conv(13, 4)},
         [f"8 exact: {A} c.weight/1"], {"c.weight/1": "made of nothing removable"}, kind="module"),
    Case("pad of channels with a value", lambda m, x: m.c(functional.pad(m.a(x), (0, 0, 0, 0, 1, 0), value=0.3)), ONE | {"c": conv(9, 4)},
         [f"8 exact: {A} c.weight/1"], kind="module"),
    Case("pad by a shortcut", lambda m, x: m.c(torch.relu(m.b(torch.relu(m.a(x))) + functional.pad(m.a(x), (0, 0, 0, 0, 1, 1)))),
         {"a": conv(3, 6), "b": conv(6, 8), "c": conv(8, 4)}, ["6 exact: a.bias/0 a.weight/0 b.bias/0 b.weight/0 b.weight/1 c.weight/1"],
         {"b.weight/0": "cannot shrink"}, kind="module"),
    Case("crop of channels", lambda m, x: m.c(functional.pad(torch.relu(m.a(x)), (0, 0, 0, 0, -2, 0))) + m.d(m.a(x)),
         ONE | {"c": conv(6, 4), "d": conv(8, 4)}, [f"6 exact: {A} c.weight/1 d.weight/1", f"2 exact: {A} d.weight/1"]),
    Case("crop of channels on both sides", lambda m, x: m.c(functional.pad(torch.relu(m.a(x)), (1, 0, 0, 0, -2, -3)))
         + m.d(m.a(x))[..., :1],
         ONE | {"c": conv(3, 4), "d": conv(8, 4)}, [f"3 exact: {A} c.weight/1 d.weight/1", f"5 exact: {A} d.weight/1"], kind="graph"),
    Case("crop of channels on one side, pad on the other", lambda m, x: m.c(functional.pad(m.a(x), (0, 0, 0, 0, -3, 2))) + m.d(m.a(x)),
         ONE | {"c": conv(7, 4), "d": conv(8, 4)}, [f"5 exact: {A} c.weight/1 d.weight/1", f"3 exact: {A} d.weight/1"]),
    Case("repeated channels at the end", lambda m, x: m.c(functional.pad(m.a(x), (1, 1), mode="replicate")),
         {"a": nn.Linear(4, 8), "c": nn.Linear(10, 4)}, [], {"a.weight/0": "padded with its own values"}, inputs=sequences),
    Case("hstack", lambda m, x: m.c(torch.hstack([m.a(x), m.b(x)])), TWO, APART, kind="module"),
    Case("vstack", lambda m, x: m.c(torch.vstack([torch.relu(m.a(x)), m.b(x)])), TWINS, COUPLED, kind="module"),
    Case("dstack", lambda m, x: m.c(torch.dstack([torch.relu(m.a(x)), m.b(x)])), TWINS, COUPLED, kind="module"),
    Case("column_stack", lambda m, x: m.c(torch.column_stack([m.a(x), m.b(x)])), TWO, APART, kind="module"),
    Case("block_diag", lambda m, x: x @ torch.block_diag(m.a.weight.t(), m.p) @ m.c.weight.t(),
         {"a": nn.Linear(2, 6, bias=False), "p": table(2, 4), "c": nn.Linear(10, 4, bias=False)},
         ["4 exact: c.weight/1 p/1", "6 exact: a.weight/0 c.weight/1"], {"p/0": "("}, inputs=sequences, kind="module"),
    Case("circular pad of space", lambda m, x: m.c(functional.pad(m.a(x), (1, 1, 1, 1), mode="circular")), ONE,
         [f"8 exact: {A} c.weight/1"], kind="module"),
    Case("constant_pad_nd", lambda m, x: m.c(torch.constant_pad_nd(m.a(x), (0, 1), 0.0)), ONE, [f"8 exact: {A} c.weight/1"]),
    Case("meshgrid", lambda m, x: m.c(m.a(x) + sum(torch.meshgrid(m.p, m.p, indexing="ij"))), ONE | {"p": table(6)},
         [f"8 exact: {A} c.weight/1"], {"p/0": "cannot shrink"}, kind="module"),
    Case("meshgrid of vectors", lambda m, x: m.c(m.a(x) + torch.meshgrid(m.p, m.q, indexing="xy")[0].sum(0)[:, None, None] ** 2),
         ONE | {"p": table(8), "q": table(5)}, [f"8 exact: {A} c.weight/1 p/0", "5 changed: q/0"], kind="module"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_joining(case: Case) -> None:
    """Groups are what the formula of the operator says, and removal is exact."""
    check(case)
