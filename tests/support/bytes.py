"""A small causal transformer over bytes, and text to train it on that every Python has: the source of its standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VALUES = 256


class Attention(nn.Module):
    """Causal self-attention of several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, length, width) to the same shape."""
        n, length, _ = x.shape
        q, k, v = (layer(x).view(n, length, self.heads, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.o(y.transpose(1, 2).reshape(n, length, self.heads * self.head_dim))
        return out


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm and added to what came in."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, length, width) to the same shape."""
        x = x + self.attention(self.before(x))
        out: Tensor = x + self.down(F.gelu(self.up(self.between(x))))
        return out


class ByteTransformer(nn.Module):
    """Predicts every next byte of a text.

    Args:
        layers: number of blocks.
        width: channels between blocks.
        heads: of attention, in every block.
        context: the longest text.
    """

    def __init__(self, layers: int = 3, width: int = 128, heads: int = 8, context: int = 128) -> None:
        super().__init__()
        self.token = nn.Embedding(VALUES, width)
        self.place = nn.Parameter(torch.randn(context, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, 4 * width) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VALUES)

    def forward(self, text: Tensor) -> Tensor:
        """Maps bytes of shape (n, length) to logits of shape (n, length, 256)."""
        x = self.token(text) + self.place[: text.shape[1]]
        out: Tensor = self.head(self.norm(self.blocks(x)))
        return out


def next_byte(logits: Tensor, target: Tensor) -> Tensor:
    """Returns the mean cross-entropy of bytes, in nats; (n, length, 256) and (n, length)."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes to measure on, from different files.

    Attributes:
        train: 1-D tensor of bytes, int64.
        held_out: likewise.
    """

    train: Tensor
    held_out: Tensor


def standard_library(every: int = 10) -> Text:
    """Returns the source text of this Python's standard library; every so-manieth file is held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, file in enumerate(files):
        parts[number % every == 0].append(file.read_bytes())
    train, held_out = (torch.tensor(list(b"".join(part))) for part in parts)
    return Text(train, held_out)


@dataclass(frozen=True)
class Batches:
    """Random pieces of a text with what follows each byte; the same ones in every iteration.

    Attributes:
        text: 1-D tensor of bytes.
        steps: number of batches.
        seed: of the pieces.
        size: pieces per batch.
        context: length of a piece.
    """

    text: Tensor
    steps: int
    seed: int
    size: int = 16
    context: int = 128

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (bytes, next bytes), each of shape (size, context)."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            begins = torch.randint(self.text.numel() - self.context, (self.size, 1), generator=generator)
            pieces = self.text[begins + torch.arange(self.context + 1)]
            yield pieces[:, :-1], pieces[:, 1:]


def held_out_loss(model: nn.Module, text: Tensor, batches: int = 40) -> float:
    """Returns the mean loss over fixed pieces of a text, in nats per byte."""
    training = model.training
    model.eval()
    with torch.no_grad():
        losses = [float(next_byte(model(x), y)) for x, y in Batches(text, batches, seed=99)]
    model.train(training)
    return sum(losses) / len(losses)
