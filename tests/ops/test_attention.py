"""Attention: heads, widths, masks, grouped queries, and the modules of PyTorch that are made of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.support.operators import Case, check, normal, sequences, table

attend = functional.scaled_dot_product_attention
QK = "k.bias/0 k.weight/0 q.bias/0 q.weight/0"
V = "v.bias/0 v.weight/0"
PACKED = "att.in_proj_bias/0 att.in_proj_weight/0"
STREAM = (
    "t.linear1.weight/1 t.linear2.bias/0 t.linear2.weight/0 t.norm1.bias/0 t.norm1.weight/0 t.norm2.bias/0 t.norm2.weight/0 "
    "t.self_attn.in_proj_weight/1 t.self_attn.out_proj.bias/0 t.self_attn.out_proj.weight/0"
)
LAYER = "t.self_attn.in_proj_bias/0 t.self_attn.in_proj_weight/0"


def times(slices: str, rows: int) -> str:
    """Returns slices with that many rows per channel."""
    return " ".join(f"{s}*{rows}" for s in slices.split())


def parts(queries: int = 12, keys: int = 12, width: int = 4) -> dict[str, nn.Module | torch.Tensor]:
    """Returns the layers of an attention with so many rows."""
    return {"q": nn.Linear(width, queries), "k": nn.Linear(width, keys), "v": nn.Linear(width, keys), "o": nn.Linear(queries, 4)}


def split(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Returns (batch, heads, positions, width)."""
    out: torch.Tensor = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return out


def joined(x: torch.Tensor) -> torch.Tensor:
    """Returns (batch, positions, heads * width)."""
    return x.transpose(1, 2).flatten(2)


def multihead(m: Any, x: torch.Tensor, heads: int = 3, key_heads: int = 3, **options: Any) -> torch.Tensor:
    """Returns attention with projections before and after."""
    mask = m.mask if hasattr(m, "mask") else None
    y = attend(split(m.q(x), heads), split(m.k(x), key_heads), split(m.v(x), key_heads), mask, **options)
    out: torch.Tensor = m.o(joined(y))
    return out


def by_hand(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Returns attention written out, with the width from the shape."""
    q, k, v = split(m.q(x), 3), split(m.k(x), 3), split(m.v(x), 3)
    out: torch.Tensor = m.o(joined((q @ k.transpose(-2, -1) / 2.0).softmax(-1) @ v))
    return out


def fused(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Returns attention whose projections are rows of one layer."""
    q, k, v = m.qkv(x).reshape(x.shape[0], x.shape[1], 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
    out: torch.Tensor = m.o(joined(attend(q, k, v)))
    return out


def repeated(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Returns attention with grouped queries, keys and values repeated."""
    q, k, v = split(m.q(x), 4), split(m.k(x), 2), split(m.v(x), 2)
    out: torch.Tensor = m.o(joined(attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))))
    return out


def own(m: Any, x: torch.Tensor) -> torch.Tensor:
    """Returns self attention of nn.MultiheadAttention, applied to a layer's output."""
    y = torch.tanh(m.a(x))
    out: torch.Tensor = m.b(m.att(y, y, y, need_weights=False)[0])
    return out


HEADS = [f"3 exact block: {times(QK, 4)} {times(V, 4)} o.weight/1*4", f"4 exact within: {times(QK, 3)}",
         f"4 exact within: {times(V, 3)} o.weight/1*3"]  # fmt: skip
GROUPED = [f"2 exact block: {times('k.bias/0 k.weight/0', 3)} o.weight/1*6 {times('q.bias/0 q.weight/0', 6)} {times(V, 3)}",
           f"3 exact within: {times('k.bias/0 k.weight/0', 2)} {times('q.bias/0 q.weight/0', 4)}",
           f"3 exact within: {times(V, 2)} o.weight/1*4"]  # fmt: skip

MULTIHEAD = Case(
    "nn.MultiheadAttention",
    own,
    {"a": nn.Linear(4, 12), "att": nn.MultiheadAttention(12, 3, batch_first=True), "b": nn.Linear(12, 4)},
    [
        "12 exact: a.bias/0 a.weight/0 att.in_proj_weight/1",
        "12 exact: att.out_proj.bias/0 att.out_proj.weight/0 b.weight/1",
        f"3 exact block: {times(PACKED, 12)} att.out_proj.weight/1*4",
        f"4 exact within: {times(PACKED, 9)} att.out_proj.weight/1*3",
    ],
    inputs=sequences,
)

CASES = [
    Case("heads", multihead, parts(), HEADS, inputs=sequences),
    Case("heads with a mask of positions", multihead, parts() | {"mask": torch.eye(5, dtype=torch.bool)}, HEADS, inputs=sequences),
    Case("heads with a learnt mask", multihead, parts() | {"mask": table(5, 5)}, HEADS, {"mask/0": "("}, inputs=sequences),
    Case("heads with a mask per head", multihead, parts() | {"mask": table(1, 3, 5, 5)},
         [HEADS[0] + " mask/1", *HEADS[1:]], inputs=sequences),
    Case("causal", lambda m, x: multihead(m, x, is_causal=True), parts(), HEADS, inputs=sequences),
    Case("explicit scale", lambda m, x: multihead(m, x, scale=0.3), parts(), HEADS, inputs=sequences),
    Case("grouped queries", lambda m, x: multihead(m, x, 4, 2, enable_gqa=True), parts(12, 6), GROUPED, inputs=sequences),
    Case("grouped queries, repeated", repeated, parts(12, 6), GROUPED, inputs=sequences),
    Case("one head", lambda m, x: m.o(attend(m.q(x), m.k(x), m.v(x))), parts(),
         [f"12 exact: {QK}", f"12 exact: {V} o.weight/1"], inputs=sequences, kind="graph"),
    Case("by hand", by_hand, parts(), HEADS, inputs=sequences),
    Case("fused projections", fused, {"qkv": nn.Linear(4, 36), "o": nn.Linear(12, 4)},
         ["3 exact block: o.weight/1*4 qkv.bias/0*12 qkv.weight/0*12", "4 exact within: o.weight/1*3 qkv.bias/0*9 qkv.weight/0*9"],
         inputs=sequences, kind="graph"),
    Case("cross attention", lambda m, x, y: m.o(joined(attend(split(m.q(x), 3), split(m.k(y), 3), split(m.v(y), 3)))), parts(), HEADS,
         inputs=lambda n: (normal(n, 5, 4), normal(n, 7, 4))),
    Case("learnt queries", lambda m, x: m.o(joined(attend(split(m.w, 3).expand(x.shape[0], -1, -1, -1), split(m.k(x), 3), split(m.v(x),
         3)))),
         {n: p for n, p in parts().items() if n != "q"} | {"w": table(1, 2, 12)},
         ["3 exact block: k.bias/0*4 k.weight/0*4 o.weight/1*4 v.bias/0*4 v.weight/0*4 w/2*4",
         "4 exact within: k.bias/0*3 k.weight/0*3 w/2*3",
          HEADS[2]], inputs=sequences),
    Case("learnt queries per head", lambda m, x: m.o(joined(m.g * attend(m.w, split(m.k(x), 3), split(m.v(x), 3)))),
         {n: p for n, p in parts().items() if n != "q"} | {"w": table(1, 3, 2, 4), "g": table(3, 1, 1)},
         ["3 exact block: g/0 k.bias/0*4 k.weight/0*4 o.weight/1*4 v.bias/0*4 v.weight/0*4 w/1",
         "4 exact within: k.bias/0*3 k.weight/0*3 w/3",
          HEADS[2]], inputs=sequences),
    Case("nn.TransformerEncoderLayer", lambda m, x: m.b(m.t(m.a(x))),
         {"a": nn.Linear(4, 8), "t": nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), "b": nn.Linear(8, 4)},
         ["12 exact: t.linear1.bias/0 t.linear1.weight/0 t.linear2.weight/1",
          f"2 exact block: {times(LAYER, 12)} t.self_attn.out_proj.weight/1*4",
          f"4 exact within: {times(LAYER, 6)} t.self_attn.out_proj.weight/1*2",
          f"8 changed: a.bias/0 a.weight/0 b.weight/1 {STREAM}"],
         inputs=sequences),
]  # fmt: skip


def kernel(name: str, operator: Any, **options: Any) -> Case:
    """Returns attention that calls one of PyTorch's kernels by its name."""
    return Case(name, lambda m, x: m.o(joined(operator(*(split(layer(x), 3) for layer in (m.q, m.k, m.v)))[0])), parts(), HEADS,
                inputs=sequences, **options)  # fmt: skip


atens = torch.ops.aten
CASES += [
    kernel("kernel for CPUs", atens._scaled_dot_product_flash_attention_for_cpu),  # noqa: SLF001 (no public name)
    kernel("kernel in formulas", atens._scaled_dot_product_attention_math),  # noqa: SLF001 (as above)
]


def test_multihead_attention() -> None:
    """Heads and widths of the packed projections; the embedding goes with the layer before it."""
    check(MULTIHEAD)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case: Case) -> None:
    """Groups are what the formula of the operator says, and removal is exact."""
    check(case)
