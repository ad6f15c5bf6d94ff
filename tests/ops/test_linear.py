"""Linear layers and matrix products, shared and tied weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.support.operators import Case, check, normal, sequences, table, vectors, words

A, B = "a.bias/0 a.weight/0", "b.bias/0 b.weight/0"
PLAIN = [f"8 exact: {A} b.weight/1"]
LAYERS = {"a": nn.Linear(4, 8), "b": nn.Linear(8, 4)}


def tied() -> dict[str, nn.Module | torch.Tensor]:
    """Returns an embedding, a layer, and a head whose weight is the embedding's."""
    embedding, head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
    head.weight = embedding.weight
    return {"e": embedding, "a": nn.Linear(8, 6), "b": nn.Linear(6, 8), "head": head}


def products(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Returns a product of two activations, over the channels of both."""
    scores = torch.bmm(m.a(x), m.b(x).transpose(1, 2))
    return torch.bmm(scores, x)


def with_(operator: Any, name: str, groups: list[str], *shape: int, **options: Any) -> Case:
    """Returns a case of a linear layer, then an operator with a parameter w of that shape."""
    return Case(name, lambda m, x: operator(torch.relu(m.a(x)), m.w), {"a": nn.Linear(4, 8), "w": table(*shape)}, groups,
                **{"inputs": sequences, "kind": "module", **options})  # fmt: skip


CASES = [
    Case("linear", lambda m, x: m.b(torch.relu(m.a(x))), LAYERS, PLAIN, {"a.weight/1": "input of the model",
         "b.bias/0": "reaches an output"},
         inputs=vectors, kind="module"),
    Case("linear without bias", lambda m, x: m.b(torch.relu(m.a(x))), {"a": nn.Linear(4, 8, bias=False), "b": nn.Linear(8, 4, bias=False)},
         ["8 exact: a.weight/0 b.weight/1"], inputs=sequences, kind="module"),
    Case("linear to one number", lambda m, x: m.b(torch.relu(m.a(x))), LAYERS | {"b": nn.Linear(8, 1)}, PLAIN, {"b.weight/0": "size 1"},
         inputs=vectors, kind="module"),
    Case("linear with a vector", lambda m, x: functional.linear(torch.relu(m.a(x)), m.w), {"a": nn.Linear(4, 8), "w": table(8)},
         [f"8 exact: {A} w/0"], inputs=vectors, kind="module"),
    Case("linear of another dimension", lambda m, x: m.b(torch.relu(m.t(m.a(x).transpose(1, 2))).transpose(1, 2)),
         LAYERS | {"t": nn.Linear(5, 6)}, PLAIN, {"t.bias/0": "reaches an output"},
         inputs=sequences, kind="module"),
    Case("linear of another dimension, then a sum", lambda m, x: m.b(m.t(m.a(x).transpose(1, 2)).sum(1)),
         LAYERS | {"t": nn.Linear(5, 8)}, [f"8 changed: {A}", "8 exact: b.weight/1 t.bias/0 t.weight/0"], inputs=sequences, kind="module"),
    Case("bilinear", lambda m, x: m.b(torch.tanh(m.d(m.a(x), torch.relu(m.c(x))))), LAYERS | {"c": nn.Linear(4, 6),
         "d": nn.Bilinear(8, 6, 8)}, [f"8 exact: {A} d.weight/1", "6 exact: c.bias/0 c.weight/0 d.weight/2",
         "8 exact: b.weight/1 d.bias/0 d.weight/0"], inputs=sequences, kind="module"),
    Case("tied embedding", lambda m, x: m.head(m.b(torch.relu(m.a(m.e(x))))), tied(), ["6 exact: a.bias/0 a.weight/0 b.weight/1",
         "8 exact: a.weight/1 b.bias/0 b.weight/0 e.weight/1"], {"e.weight/0": "("}, inputs=words, kind="module"),
    Case("shared layer", lambda m, x: m.b(m.s(torch.relu(m.s(torch.relu(m.a(x)))))), LAYERS | {"s": nn.Linear(8, 8)},
         [f"8 exact: {A} b.weight/1 s.bias/0 s.weight/0 s.weight/1"], inputs=sequences, kind="module"),
    Case("one layer for two widths", lambda m, x: m.b(torch.relu(m.a(x))) + m.b(torch.tanh(m.c(x))), LAYERS | {"c": nn.Linear(4, 8)},
         [f"8 exact: {A} b.weight/1 c.bias/0 c.weight/0"], inputs=sequences, kind="module"),
    with_(lambda x, w: x @ w, "matmul with a parameter", [f"8 exact: {A} w/0"], 8, 3),
    with_(lambda x, w: w @ x.transpose(1, 2), "matmul of a parameter", [f"8 exact: {A} w/1"], 3, 8),
    with_(torch.matmul, "matmul with a vector", [f"8 exact: {A} w/0"], 8),
    with_(torch.mm, "mm", [f"8 exact: {A} w/0"], 8, 3, inputs=vectors),
    with_(torch.mv, "mv", [f"8 exact: {A} w/0"], 8, inputs=vectors),
    with_(lambda x, w: torch.dot(x, w).expand(3), "dot", [f"8 exact: {A} w/0"], 8, inputs=lambda _: normal(4), any_batch=False),
    with_(lambda x, w: torch.vdot(x, w).expand(3), "vdot", [f"8 exact: {A} w/0"], 8, inputs=lambda _: normal(4), any_batch=False),
    Case("addmm", lambda m, x: m.b(torch.relu(torch.addmm(m.v, torch.relu(m.a(x)), m.w))), LAYERS | {"w": table(8, 8), "v": table(8)},
         [f"8 exact: {A} w/0", "8 exact: b.weight/1 v/0 w/1"], inputs=vectors, kind="module"),
    Case("addmv", lambda m, x: m.b(torch.relu(torch.addmv(m.v, m.w, torch.relu(m.a(x))))), LAYERS | {"w": table(8, 8), "v": table(8)},
         [f"8 exact: {A} w/1", "8 exact: b.weight/1 v/0 w/0"], inputs=lambda _: normal(4), any_batch=False, kind="module"),
    Case("baddbmm", lambda m, x: m.b(torch.relu(torch.baddbmm(m.v, torch.relu(m.a(x)), m.w.expand(x.shape[0], -1, -1)))),
         LAYERS | {"w": table(1, 8, 8), "v": table(8)}, [f"8 exact: {A} w/1", "8 exact: b.weight/1 v/0 w/2"], inputs=sequences,
         kind="module"),
    Case("bmm of activations", products, {"a": nn.Linear(4, 8), "b": nn.Linear(4, 8)}, [f"8 exact: {A} {B}"], inputs=sequences,
         kind="module"),
    Case("matmul of activations that are not zero", lambda m, x: torch.sigmoid(m.a(x)) @ torch.sigmoid(m.b(x)).transpose(1, 2),
         {"a": nn.Linear(4, 8), "b": nn.Linear(4, 8)}, [f"8 changed: {A} {B}"], inputs=sequences, kind="module"),
    Case("matmul with experts", lambda m, x: torch.relu(m.a(x).unsqueeze(1) @ m.w).sum(1), {"a": nn.Linear(4, 8), "w": table(3, 8, 6)},
         [f"8 exact: {A} w/1", "3 exact: w/0"], {"w/2": "reaches an output"}, inputs=sequences, kind="module"),
    Case("matmul with gated experts", lambda m, x: (torch.relu(m.a(x).unsqueeze(1) @ m.w) * m.g).sum(1), {"a": nn.Linear(4, 8),
         "w": table(3, 8, 6), "g": table(3, 1, 1)}, [f"8 exact: {A} w/1", "3 exact: g/0 w/0"], inputs=sequences, kind="module"),
    with_(lambda x, w: torch.einsum("btc,cd->btd", x, w), "einsum", [f"8 exact: {A} w/0"], 8, 3),
    with_(lambda x, w: torch.einsum("btc , dc -> dtb", x, w), "einsum with spaces", [f"8 exact: {A} w/1"], 3, 8),
    with_(lambda x, w: torch.einsum("...c,cd->...d", x, w), "einsum with an ellipsis", [f"8 exact: {A} w/0"], 8, 3),
    with_(lambda x, w: torch.einsum("...c,...c->...", x, w), "einsum with ellipses of unequal lengths", [f"8 exact: {A} w/1"], 5, 8),
    with_(lambda x, w: torch.einsum("...c,c", x, w), "einsum with an ellipsis and no output", [f"8 exact: {A} w/0"], 8),
    with_(lambda x, w: torch.einsum("btc,cd", x, w), "einsum without an output", [f"8 exact: {A} w/0"], 8, 3),
    with_(lambda x, w: torch.einsum("zyc,ac", x, w), "einsum without an output, in the order of the alphabet", [f"8 exact: {A} w/1"], 3, 8),
    with_(lambda x, w: torch.einsum("btc,cc->bt", x, w), "einsum over a diagonal", [f"8 exact: {A} w/0 w/1"], 8, 8),
    Case("einsum over a diagonal of time and channels", lambda m, x: torch.einsum("btt,t->bt", m.a(x), m.w), {"a": nn.Linear(4, 5),
         "w": table(5)}, [], {"a.weight/0": "cannot shrink (aten::einsum)"}, inputs=sequences),
    with_(lambda x, w: torch.addbmm(torch.zeros(5, 3, dtype=x.dtype), x, w.expand(x.shape[0], -1, -1)), "addbmm", [f"8 exact: {A} w/1"], 1,
          8, 3),
    with_(torch.cdist, "distances", [f"8 exact: {A} w/1"], 3, 8),
    with_(lambda x, w: torch.cdist(x, w, p=1.0), "distances in steps", [f"8 exact: {A} w/1"], 3, 8),
    with_(lambda x, w: torch.cdist(x, w.expand(30, -1)), "distances to many", [f"8 exact: {A} w/1"], 1, 8),
    with_(lambda x, w: torch.cdist(torch.sigmoid(x), w), "distances of values that are not zero", [f"8 changed: {A} w/1"], 3, 8),
    with_(lambda x, w: torch.cdist(x, torch.exp(w)), "distances to values that are not zero", [f"8 changed: {A} w/1"], 3, 8),
    with_(lambda x, w: torch.cdist(x, w) @ w[:, :3], "distances to places that shrink", [f"5 exact: {A} w/1", "6 exact: w/0"], 6, 8,
          kind=None, frozen={"w/1": "reaches an output"}),
    with_(lambda x, w: torch.tensordot(x, w, dims=([2], [1])), "tensordot", [f"8 exact: {A} w/1"], 3, 8),
    with_(lambda x, w: x @ torch.outer(w, torch.arange(3.0).double()), "outer product", [f"8 exact: {A} w/0"], 8),
    Case("product of activations of which one is not zero", lambda m, x: m.b((m.c(x) @ torch.sigmoid(m.a(x)).mT).mT.sum(1)),
         LAYERS | {"c": nn.Linear(4, 8)}, [f"8 exact: {A} c.bias/0 c.weight/0"], {"b.weight/1": "("}, inputs=lambda n: normal(n, 8, 4)),
    Case("einsum of activations", lambda m, x: torch.einsum("btc,bsc->bts", torch.relu(m.a(x)), m.b(x)), {"a": nn.Linear(4, 8),
         "b": nn.Linear(4, 8)}, [f"8 exact: {A} {B}"], inputs=sequences, kind="module"),
    Case("einsum of activations that are not zero", lambda m, x: torch.einsum("btc,bsc->bts", torch.sigmoid(m.a(x)), m.b(x).exp()),
         {"a": nn.Linear(4, 8), "b": nn.Linear(4, 8)}, [f"8 changed: {A} {B}"], inputs=sequences, kind="module"),
    Case("einsum that sums one operand", lambda m, x: torch.einsum("btc,bsd->bts", torch.relu(m.a(x)), x), {"a": nn.Linear(4, 8)},
         [f"8 exact: {A}"], inputs=sequences, kind="module"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_linear(case: Case) -> None:
    """Groups are what the formula of the operator says, and removal is exact."""
    check(case)
