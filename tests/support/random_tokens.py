"""Blocks of random networks on sequences (B, L, C): frozen dataclasses that build a module for the shape that arrives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tests.support.random_layers import Described, Layer, Shape, chain, table, token_activation, token_norm, weight


@dataclass(frozen=True)
class Linear:
    """A linear layer, a norm and an activation."""

    width: int
    norm: str = "none"
    act: str = "none"
    bare: bool = False

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block; a bare one has no layer but a weight."""
        layer: nn.Module = nn.Linear(shape[-1], self.width)
        if self.bare:
            layer = Layer(
                lambda m, x: functional.linear(x, m.weight) + m.bias, weight=weight(self.width, shape[-1]), bias=table(self.width)
            )
        return nn.Sequential(layer, token_norm(self.norm, self.width), token_activation(self.act))


@dataclass(frozen=True)
class Mlp:
    """Two linear layers with an activation or a gate between them."""

    hidden: int
    norm: str = "layer"
    gate: str = "none"  # none, fused, apart
    residual: bool = True

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        width = shape[-1]
        parts: dict[str, Any] = {"norm": token_norm(self.norm, width), "down": nn.Linear(self.hidden, width)}
        parts["up"] = nn.Linear(width, self.hidden * (2 if self.gate == "fused" else 1))
        if self.gate == "apart":
            parts["gated"] = nn.Linear(width, self.hidden, bias=False)
        return Layer(_mlp, gate=self.gate, residual=self.residual, **parts)


def _mlp(m: Any, x: torch.Tensor) -> Any:
    y = m.norm(x)
    if m.gate == "fused":
        gate, y = m.up(y).chunk(2, dim=-1)
        y = functional.silu(gate) * y
    elif m.gate == "apart":
        y = functional.gelu(m.gated(y)) * m.up(y)
    else:
        y = functional.gelu(m.up(y))
    return x + m.down(y) if m.residual else m.down(y)


@dataclass(frozen=True)
class Attention:
    """Multi-head attention.

    Attributes:
        heads: of the queries.
        width: of a head's queries and keys.
        shared: how many query heads share a head of keys and values (GQA; all of them: MQA).
        values: width of a head's values; None takes `width`.
        fused: whether one layer makes queries, keys and values.
        norm: before the attention.
        core: who computes it: the fused operator, matmul and softmax, or einsum.
        inner: norm of queries and keys per head.
        spell: how the views say their sizes.
        residual: whether the input is added.
        causal: whether places see only what is before them.
    """

    heads: int
    width: int
    shared: int = 1
    values: int | None = None
    fused: bool = False
    norm: str = "none"
    core: str = "fused"  # fused, matmul, einsum
    inner: str = "none"
    spell: str = "view"  # view, unflatten, chunk
    residual: bool = True
    causal: bool = False

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        value_width = self.values or self.width
        groups = self.heads // self.shared
        sizes = [self.heads * self.width, groups * self.width, groups * value_width]
        parts: dict[str, Any] = {"norm": token_norm(self.norm, shape[-1]), "out": nn.Linear(self.heads * value_width, shape[-1])}
        if self.fused:
            parts["qkv"] = nn.Linear(shape[-1], sum(sizes))
        else:
            parts |= {name: nn.Linear(shape[-1], size) for name, size in zip(("q", "k", "v"), sizes, strict=True)}
        if self.inner != "none":
            parts |= {"q_norm": token_norm(self.inner, self.width), "k_norm": token_norm(self.inner, self.width)}
        numbers = {"heads": self.heads, "groups": groups, "head_dim": self.width, "value_dim": value_width, "sizes": sizes}
        return Layer(_attention, fused=self.fused, how=self, **numbers, **parts)


def _attention(m: Any, x: torch.Tensor) -> Any:
    how: Attention = m.how
    y = m.norm(x)
    q, k, v = _projected(m, y)
    if how.inner != "none":
        q, k = m.q_norm(q), m.k_norm(k)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if how.shared > 1:
        k, v = _repeated(k, how), _repeated(v, how)
    y = _core(q, k, v, how).transpose(1, 2)
    y = y.flatten(2) if how.spell != "view" else y.reshape(*x.shape[:2], -1)
    y = m.out(y)
    return x + y if how.residual else y


def _projected(m: Any, y: torch.Tensor) -> list[torch.Tensor]:
    how: Attention = m.how
    b, length = y.shape[:2]
    if how.fused and how.shared == 1 and how.values is None and how.spell != "chunk":
        qkv = m.qkv(y).reshape(b, length, 3, m.heads, m.head_dim)
        return list(qkv.unbind(2))
    if how.fused:
        parts = list(m.qkv(y).chunk(3, -1)) if how.shared == 1 and how.values is None else list(m.qkv(y).split(m.sizes, dim=-1))
    else:
        parts = [m.q(y), m.k(y), m.v(y)]
    if how.spell == "unflatten":
        counts = (m.heads, m.groups, m.groups)
        return [part.unflatten(-1, (count, -1)) for part, count in zip(parts, counts, strict=True)]
    widths = (m.head_dim, m.head_dim, m.value_dim)
    return [part.view(b, length, -1, width) for part, width in zip(parts, widths, strict=True)]


def _repeated(x: torch.Tensor, how: Attention) -> torch.Tensor:
    if how.spell == "unflatten":
        return x.repeat_interleave(how.shared, dim=1)
    b, groups, length, width = x.shape
    return x[:, :, None].expand(b, groups, how.shared, length, width).reshape(b, groups * how.shared, length, width)


def _core(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: Attention) -> torch.Tensor:
    if how.core == "fused":
        return functional.scaled_dot_product_attention(q, k, v, is_causal=how.causal)
    if how.core == "einsum":
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
    else:
        scores = (q @ k.transpose(-2, -1)) / how.width**0.5
    if how.causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    weights = scores.softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v) if how.core == "einsum" else weights @ v


@dataclass(frozen=True)
class MultiHead:
    """`nn.MultiheadAttention`, of as many channels as its heads make, between two linear layers."""

    heads: int
    width: int
    norm: str = "none"
    cross: int | None = None  # the width of keys and values, where they have one of their own

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        inner = self.heads * self.width
        parts: dict[str, Any] = {
            "before": nn.Linear(shape[-1], inner),
            "norm": token_norm(self.norm, inner),
            "after": nn.Linear(inner, shape[-1]),
        }
        if self.cross is None:
            return Layer(_multihead, attention=nn.MultiheadAttention(inner, self.heads, batch_first=True), **parts)
        attention = nn.MultiheadAttention(inner, self.heads, kdim=self.cross, vdim=self.cross, batch_first=True)
        return Layer(_cross, attention=attention, memory=nn.Linear(shape[-1], self.cross), **parts)


def _multihead(m: Any, x: torch.Tensor) -> Any:
    y = m.norm(m.before(x))
    return x + m.after(y + m.attention(y, y, y, need_weights=False)[0])


def _cross(m: Any, x: torch.Tensor) -> Any:
    memory = m.memory(x)
    return x + m.after(m.attention(m.norm(m.before(x)), memory, memory)[0])


@dataclass(frozen=True)
class Mixer:
    """Channels are mixed along the sequence, by a linear layer or a convolution."""

    hidden: int = 5
    how: str = "linear"  # linear, conv, depthwise

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        length, width = shape
        if self.how == "linear":
            body: nn.Module = nn.Sequential(nn.Linear(length, self.hidden), nn.GELU(), nn.Linear(self.hidden, length))
        else:
            body = nn.Conv1d(width, width, 3, padding=1, groups=width if self.how == "depthwise" else 1)
        return Layer(lambda m, x: x + m.body(x.transpose(1, 2)).transpose(1, 2), body=body)


@dataclass(frozen=True)
class Places:
    """Parameters of the network's own meet every place or every channel."""

    how: str = "position"  # position, table, scale

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        if self.how == "table":
            return Layer(lambda m, x: x + m.table(torch.arange(x.shape[1])), table=nn.Embedding(shape[0] + 1, shape[1]))
        if self.how == "scale":
            return Layer(lambda m, x: x.mul(m.scale) + m.shift, scale=table(shape[1]), shift=table(1, 1, shape[1]))
        return Layer(lambda m, x: x + m.embedding[:, : x.shape[1]], embedding=table(1, shape[0] + 1, shape[1]))


@dataclass(frozen=True)
class Joined:
    """Channels of the block's input and output side by side."""

    blocks: tuple[Described, ...]

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        return Layer(lambda m, x: torch.cat((m.body(x), x), dim=-1), body=chain(self.blocks, shape)[0])


@dataclass(frozen=True)
class Repeated:
    """The same blocks twice, with one linear layer back to the width that arrives (ALBERT)."""

    blocks: tuple[Described, ...]

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        body, after = chain(self.blocks, shape)
        body.append(nn.Linear(after[-1], shape[-1]))
        return Layer(lambda m, x: m.body(m.body(x)), body=body)


@dataclass(frozen=True)
class Tied:
    """Two linear layers with one weight: a code and back by its transpose, or twice the same map."""

    hidden: int
    how: str = "transposed"  # transposed, same

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        if self.how == "transposed":
            parts = {"code": nn.Linear(shape[-1], self.hidden), "bias": table(shape[-1])}
            return Layer(lambda m, x: functional.linear(torch.tanh(m.code(x)), m.code.weight.t(), m.bias), **parts)
        one, two = nn.Linear(shape[-1], shape[-1]), nn.Linear(shape[-1], shape[-1])
        two.weight = one.weight
        return Layer(lambda m, x: m.two(torch.tanh(m.one(x))), one=one, two=two)


@dataclass(frozen=True)
class Recurrent:
    """A recurrent layer."""

    hidden: int
    kind: str = "gru"  # gru, lstm

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        kind = nn.GRU if self.kind == "gru" else nn.LSTM
        return Layer(lambda m, x: m.layer(x)[0], layer=kind(shape[-1], self.hidden, batch_first=True))
