"""Blocks of random networks on images (B, C, H, W): frozen dataclasses that build a module for the shape that arrives.

A block fits behind any other, whatever the number of channels: so a failing network shrinks by leaving blocks out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tests.support.random_layers import (
    Described,
    Layer,
    Shape,
    activation,
    chain,
    conv,
    image_norm,
    resized,
    table,
    weight,
)


@dataclass(frozen=True)
class Conv:
    """A convolution, a norm and an activation."""

    width: int
    size: int = 1
    stride: int = 1
    norm: str = "none"
    act: str = "relu"
    bias: bool = True

    def build(self, shape: Shape) -> nn.Module:
        """Strides only while the map is large enough."""
        stride = self.stride if min(shape[1:]) >= 4 else 1
        layer = conv(shape[0], self.width, self.size, stride=stride, bias=self.bias)
        return nn.Sequential(layer, image_norm(self.norm, self.width), activation(self.act, self.width))


@dataclass(frozen=True)
class Mixed:
    """Channels mixed by a weight that is no layer's."""

    width: int
    how: str  # einsum, matmul, linear, scaled, flat

    def build(self, shape: Shape) -> nn.Module:
        """Returns one of five ways to write a 1 x 1 convolution."""
        width, inputs = self.width, shape[0]
        if self.how == "einsum":
            return Layer(lambda m, x: torch.einsum("bchw,oc->bohw", x, m.weight), weight=weight(width, inputs))
        if self.how == "matmul":
            return Layer(
                lambda m, x: (m.weight @ x.flatten(2)).view(x.shape[0], m.width, *x.shape[2:]), weight=weight(width, inputs), width=width
            )
        if self.how == "linear":
            return Layer(lambda m, x: m.layer(x.movedim(1, -1)).movedim(-1, 1), layer=nn.Linear(inputs, width))
        if self.how == "scaled":
            parts = {"weight": weight(width, inputs, 3, 3), "gain": table(width, 1, 1, 1), "bias": table(width)}
            return Layer(lambda m, x: functional.conv2d(x, m.weight * m.gain, m.bias, padding=1), **parts)
        return Layer(lambda m, x: m.layer(x.flatten(2)).unflatten(2, x.shape[2:]), layer=nn.Conv1d(inputs, width, 3, padding=1))


@dataclass(frozen=True)
class Residual:
    """x + f(x), or its projection + f(x) where a width is given."""

    inner: int
    width: int | None = None
    norm: str = "none"
    act: str = "relu"
    how: str = "add"  # add, inplace, scale, subtract

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        width = self.width or shape[0]
        skip: nn.Module = nn.Identity() if self.width is None else conv(shape[0], width)
        body = nn.Sequential(
            conv(shape[0], self.inner, 3, bias=self.norm == "none"),
            image_norm(self.norm, self.inner),
            activation(self.act, self.inner),
            conv(self.inner, width),
        )
        runs = {
            "add": lambda m, x: m.skip(x) + m.body(x),
            "inplace": lambda m, x: m.body(x).add_(m.skip(x)),
            "scale": lambda m, x: m.skip(x) + m.scale * m.body(x),
            "subtract": lambda m, x: torch.sub(m.body(x), m.skip(x), alpha=2),
        }
        return Layer(runs[self.how], skip=skip, body=body, **({"scale": table(width, 1, 1)} if self.how == "scale" else {}))


@dataclass(frozen=True)
class Dense:
    """Every layer sees all that came before it, joined."""

    growth: tuple[int, ...]
    norm: str = "none"
    lists: bool = False

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        layers, width = nn.ModuleList(), shape[0]
        for growth in self.growth:
            layers.append(nn.Sequential(image_norm(self.norm, width), nn.ReLU(), conv(width, growth, 3)))
            width += growth
        return Layer(_dense_lists if self.lists else _dense, layers=layers)


def _dense(m: Any, x: torch.Tensor) -> torch.Tensor:
    for layer in m.layers:
        x = torch.cat([x, layer(x)], 1)
    return x


def _dense_lists(m: Any, x: torch.Tensor) -> torch.Tensor:
    found = [x]
    for layer in m.layers:
        found.append(layer(torch.cat(found, 1)))
    return torch.cat(found[::-1], 1)


@dataclass(frozen=True)
class Split:
    """Channels cut into unequal parts; the first goes through a convolution, then all are joined in reverse order."""

    sizes: tuple[int, ...]
    how: str = "split"  # split, slices, narrow, tensor_split
    inner: int = 3

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        first = self.sizes[0]
        parts = {"spread": conv(shape[0], sum(self.sizes)), "layer": nn.Sequential(conv(first, self.inner, 3), nn.Tanh())}
        return Layer(_split, sizes=list(self.sizes), how=self.how, **parts)


def _split(m: Any, x: torch.Tensor) -> torch.Tensor:
    x = m.spread(x)
    starts = [sum(m.sizes[:i]) for i in range(len(m.sizes) + 1)]
    if m.how == "split":
        parts = list(x.split(m.sizes, 1))
    elif m.how == "slices":
        parts = [x[:, a:b] for a, b in pairwise(starts)]
    elif m.how == "narrow":
        parts = [x.narrow(1, a, n) for a, n in zip(starts, m.sizes, strict=False)]
    else:
        parts = list(torch.tensor_split(x, starts[1:-1], 1))
    parts[0] = m.layer(parts[0])
    return torch.cat(parts[::-1], 1)


@dataclass(frozen=True)
class Chunks:
    """Channels cut into equal parts that meet again index by index."""

    width: int
    parts: int = 2
    how: str = "add"  # add, gate, maximum, glu, view

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        parts = 2 if self.how in {"gate", "glu"} else self.parts
        runs = {
            "add": lambda m, x: sum(m.spread(x).chunk(m.parts, 1)),
            "gate": lambda m, x: _gate(*m.spread(x).chunk(2, dim=1)),
            "maximum": lambda m, x: torch.maximum(*m.spread(x).chunk(m.parts, 1)[:2]),
            "glu": lambda m, x: functional.glu(m.spread(x), 1),
            "view": lambda m, x: m.spread(x).view(x.shape[0], m.parts, -1, *x.shape[2:]).sum(1),
        }
        return Layer(runs[self.how], spread=conv(shape[0], self.width * parts), parts=parts)


def _gate(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a * torch.sigmoid(b)


@dataclass(frozen=True)
class Shuffle:
    """Channels shuffled between groups."""

    groups: int
    per: int
    how: str = "view"  # view, reshape, function

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block, with a grouped convolution before and after the shuffle."""
        width = self.groups * self.per
        spread = conv(shape[0], width)
        last = conv(width, width, 3, groups=self.groups)
        return Layer(_shuffle, spread=spread, last=last, groups=self.groups, how=self.how)


def _shuffle(m: Any, x: torch.Tensor) -> Any:
    x = m.spread(x)
    b, c, h, w = x.shape
    if m.how == "view":
        x = x.view(b, m.groups, c // m.groups, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
    elif m.how == "reshape":
        x = x.reshape(b, m.groups, -1, h, w).permute(0, 2, 1, 3, 4).flatten(1, 2)
    else:
        x = functional.channel_shuffle(x, m.groups)
    return m.last(x)


@dataclass(frozen=True)
class Excite:
    """A gate from the mean of every channel."""

    hidden: int
    how: str = "conv"  # conv, linear
    gate: str = "sigmoid"  # sigmoid, hardsigmoid

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        gate = nn.Sigmoid() if self.gate == "sigmoid" else nn.Hardsigmoid()
        if self.how == "conv":
            body = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(shape[0], self.hidden), nn.ReLU(), conv(self.hidden, shape[0]), gate)
            return Layer(lambda m, x: x * m.body(x), body=body)
        body = nn.Sequential(nn.Linear(shape[0], self.hidden), nn.ReLU(), nn.Linear(self.hidden, shape[0]), gate)
        return Layer(lambda m, x: x * m.body(x.mean((2, 3))).view(x.shape[0], -1, 1, 1), body=body)


@dataclass(frozen=True)
class Gate:
    """A gate per channel or per place."""

    how: str = "channel"  # channel, place, pair
    inner: int = 3

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        if self.how == "pair":
            return Layer(lambda m, x: m.a(x) * torch.sigmoid(m.b(x)), a=conv(shape[0], self.inner), b=conv(shape[0], self.inner, 3))
        gate = conv(shape[0], shape[0] if self.how == "channel" else 1)
        return Layer(lambda m, x: x * m.gate(x).sigmoid(), gate=gate)


@dataclass(frozen=True)
class Grouped:
    """A grouped convolution; with one channel per group, a depthwise one with a multiplier."""

    groups: int
    inputs: int
    outputs: int
    norm: str = "none"

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        inner, width = self.groups * self.inputs, self.groups * self.outputs
        layers = [conv(shape[0], inner), nn.SiLU(), conv(inner, width, 3, groups=self.groups), image_norm(self.norm, width)]
        return nn.Sequential(*layers)


@dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution of whatever arrives."""

    multiplier: int = 1
    act: str = "relu"
    transposed: bool = False

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        width = shape[0] * self.multiplier
        kind = nn.ConvTranspose2d if self.transposed else nn.Conv2d
        return nn.Sequential(kind(shape[0], width, 3, padding=1, groups=shape[0]), activation(self.act, width))


@dataclass(frozen=True)
class Transposed:
    """A transposed convolution, that doubles small maps where told so."""

    width: int
    stride: int = 1
    norm: str = "none"

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        stride = self.stride if max(shape[1:]) <= 6 else 1
        layer = nn.ConvTranspose2d(shape[0], self.width, 3, stride, 1, output_padding=stride - 1)
        return nn.Sequential(layer, image_norm(self.norm, self.width), nn.GELU())


@dataclass(frozen=True)
class Pixels:
    """Channels become space, or space becomes channels."""

    width: int
    up: bool = True
    by_view: bool = False

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block; the map keeps its size."""
        if self.up:
            spread = conv(shape[0], self.width * 4)
            run = _shuffle_pixels if self.by_view else lambda m, x: functional.avg_pool2d(functional.pixel_shuffle(m.spread(x), 2), 2)
            return Layer(run, spread=spread, width=self.width)
        if shape[1] % 2 or shape[2] % 2:
            return Conv(self.width).build(shape)
        fold = Layer(_merge_patches) if self.by_view else nn.PixelUnshuffle(2)
        return nn.Sequential(fold, conv(4 * shape[0], self.width), nn.Upsample(scale_factor=2))


def _shuffle_pixels(m: Any, x: torch.Tensor) -> torch.Tensor:
    b, _, h, w = x.shape
    x = m.spread(x).view(b, m.width, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, m.width, 2 * h, 2 * w)
    return functional.max_pool2d(x, 2)


def _merge_patches(_: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:, :, i::2, j::2] for j in (0, 1) for i in (0, 1)], 1)


@dataclass(frozen=True)
class Branches:
    """Several ways side by side, joined or added."""

    ways: tuple[tuple[Described, ...], ...]
    width: int | None = None  # None joins; a number adds, after a 1 x 1 convolution each

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        ways = nn.ModuleList()
        for blocks in self.ways:
            way, after = chain(blocks, shape)
            if self.width is not None:
                way.append(conv(after[0], self.width))
            ways.append(way)
        joined = self.width is None
        return Layer(_branches, ways=ways, joined=joined)


def _branches(m: Any, x: torch.Tensor) -> Any:
    found = [resized(way(x), *x.shape[2:]) for way in m.ways]
    return torch.cat(found, 1) if m.joined else sum(found[1:], found[0])


@dataclass(frozen=True)
class Shared:
    """The same modules, run twice one after the other or on two views of the input."""

    blocks: tuple[Described, ...]
    how: str = "twice"  # twice, mirrored

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block, which ends with as many channels as arrive."""
        body, after = chain(self.blocks, shape)
        body.append(conv(after[0], shape[0]))
        runs = {
            "twice": lambda m, x: resized(m.body(resized(m.body(x), *x.shape[2:])), *x.shape[2:]),
            "mirrored": lambda m, x: torch.cat([m.body(x), m.body(x.flip(3)).tanh()], 1),
        }
        return Layer(runs[self.how], body=body)


@dataclass(frozen=True)
class Bare:
    """A parameter of the network's own meets every channel, or every position."""

    how: str = "scale"  # scale, position, shift

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        if self.how == "position":
            return Layer(lambda m, x: x + m.embedding, embedding=table(1, *shape))
        if self.how == "shift":
            return Layer(lambda m, x: torch.addcmul(m.shift, x, m.scale), shift=table(1, shape[0], 1, 1), scale=table(shape[0], 1, 1))
        return Layer(lambda m, x: x * m.scale.view(1, -1, 1, 1), scale=table(shape[0]))


@dataclass(frozen=True)
class Moved:
    """Channels change places without being computed."""

    how: str  # roll, flip, index, stride, repeat, interleave, pad

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        order = torch.arange(shape[0]).roll(2).view(-1)
        runs = {
            "roll": lambda _, x: x.roll(1, 1),
            "flip": lambda _, x: x.flip(1),
            "index": lambda m, x: x[:, m.order],
            "stride": lambda _, x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
            "repeat": lambda _, x: x.repeat(1, 2, 1, 1),
            "interleave": lambda _, x: x.repeat_interleave(2, 1),
            "pad": lambda _, x: functional.pad(x, (0, 0, 0, 0, 1, 2)),
        }
        return Layer(runs[self.how], order=nn.Buffer(order))


@dataclass(frozen=True)
class Written:
    """A part of the channels is changed where it stands."""

    width: int
    part: int
    how: str = "slice"  # slice, view, copy

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        return Layer(_written, spread=conv(shape[0], self.width), part=min(self.part, self.width - 1), how=self.how)


def _written(m: Any, x: torch.Tensor) -> Any:
    x = m.spread(x)
    if m.how == "slice":
        x[:, : m.part] = torch.tanh(x[:, : m.part])
    elif m.how == "view":
        x[:, : m.part].relu_()
    else:
        torch.narrow(x, 1, 0, m.part).copy_(x[:, : m.part].sigmoid())
    return x


@dataclass(frozen=True)
class Fork:
    """Python decides by a size what runs."""

    limit: int
    dim: int = 1

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        del shape
        return Layer(lambda m, x: torch.tanh(x) if x.shape[m.dim] > m.limit else functional.leaky_relu(x), limit=self.limit, dim=self.dim)


@dataclass(frozen=True)
class Pool:
    """Pooling that keeps the size of the map, or halves a large one."""

    how: str = "max"  # max, avg, blur, centre

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block."""
        halves = min(shape[1:]) >= 4
        runs = {
            "max": lambda _, x: functional.max_pool2d(x, 2) if halves else functional.max_pool2d(x, 3, 1, 1),
            "avg": lambda _, x: functional.avg_pool2d(x, 2) if halves else x,
            "blur": lambda _, x: functional.interpolate(functional.avg_pool2d(x, 2, ceil_mode=True), size=x.shape[2:], mode="bilinear"),
            "centre": lambda _, x: x - x.mean((2, 3), keepdim=True),
        }
        return Layer(runs[self.how])


@dataclass(frozen=True)
class Tokens:
    """Places become a sequence, blocks on tokens run, and the sequence becomes an image again."""

    blocks: tuple[Described, ...]
    how: str = "flatten"  # flatten, reshape
    start: bool = False  # whether a learnt token stands first in between

    def build(self, shape: Shape) -> nn.Module:
        """Returns the block; whatever the blocks make of the number of channels stays."""
        length = shape[1] * shape[2] + self.start
        body, after = chain(self.blocks, (length, shape[0]))
        if after[0] != length:
            body.append(Layer(lambda m, x: functional.interpolate(x.transpose(1, 2), size=m.length).transpose(1, 2), length=length))
        parts: dict[str, Any] = {"token": table(1, 1, shape[0])} if self.start else {}
        return Layer(_tokens, body=body, how=self.how, start=self.start, **parts)


def _tokens(m: Any, x: torch.Tensor) -> torch.Tensor:
    b, c, h, w = x.shape
    x = x.flatten(2).transpose(1, 2) if m.how == "flatten" else x.permute(0, 2, 3, 1).reshape(b, h * w, c)
    if m.start:
        x = torch.cat([m.token.expand(b, -1, -1), x], 1)
    x = m.body(x)[:, int(m.start) :]
    return x.transpose(1, 2).reshape(b, -1, h, w) if m.how == "flatten" else x.reshape(b, h, w, x.shape[-1]).permute(0, 3, 1, 2)
