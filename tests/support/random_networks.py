"""Random networks: what describes one, and how it is built.

A drawn network is a tree of frozen dataclasses. Its `repr` is an expression, so what a failing test prints can be built again: see
`random_properties.again`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from tests.support.networks import randomise
from tests.support.random_layers import Described, Layer, Shape, chain, conv, shape_after

SPACE: Final = (4, 6)  # height and width of the images
LENGTH: Final = 6  # of the sequences
VOCABULARY: Final = 19
DTYPE: Final = torch.float64


# -- descriptions --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What turns features into an output.

    Attributes:
        outputs: how many numbers per example (or per place).
        how: pooled, flattened, through a hidden layer, per place, or the features as they are.
        hidden: width of the hidden layer.
        after: number of the block behind which it stands, counted from the end (0: the last).
    """

    outputs: int = 4
    how: str = "pool"  # pool, flatten, hidden, map, raw
    hidden: int = 5
    after: int = 0

    def build(self, shape: Shape) -> nn.Module:
        """Returns the head; the last dimension of sequences, and the first one of images, is the channel."""
        image_like = len(shape) == 3
        width = shape[0] if image_like else shape[-1]
        if self.how == "raw":
            return nn.Identity()
        if self.how == "map":
            return conv(width, self.outputs) if image_like else nn.Linear(width, self.outputs)
        if self.how == "pool":
            pooled = Layer((lambda _, x: x.mean((2, 3))) if image_like else (lambda _, x: x.mean(1)))
            return nn.Sequential(pooled, nn.Linear(width, self.outputs))
        size = int(torch.Size(shape).numel())
        if self.how == "flatten":
            return nn.Sequential(nn.Flatten(), nn.Linear(size, self.outputs))
        layers = [nn.Linear(size, self.hidden), nn.ReLU(inplace=True), nn.Linear(self.hidden, self.outputs)]
        return nn.Sequential(Layer(lambda _, x: x.reshape(x.shape[0], -1)), *layers)


@dataclass(frozen=True)
class Second:
    """A second input.

    Attributes:
        how: through the first one's stem (siamese), a stem of its own, or a vector that scales and shifts every channel.
        join: added, multiplied, or side by side.
    """

    how: str = "siamese"  # siamese, own, vector
    join: str = "add"  # add, multiply, cat


@dataclass(frozen=True)
class Images:
    """A network on images."""

    stem: tuple[Described, ...] = ()
    blocks: tuple[Described, ...] = ()
    heads: tuple[Head, ...] = (Head(),)
    second: Second | None = None
    output: str = "tuple"  # tuple, dict, list; one head gives a plain tensor


@dataclass(frozen=True)
class Sequences:
    """A network on vectors in sequence, or on words."""

    width: int = 5
    words: bool = False
    blocks: tuple[Described, ...] = ()
    heads: tuple[Head, ...] = (Head(),)
    tied: bool = False  # whether the words' embedding gives the logits (besides the heads)
    output: str = "tuple"


@dataclass(frozen=True)
class Drawn:
    """One example of the property tests: a network, and the seed of its weights, inputs and masks."""

    network: Images | Sequences
    seed: int = 0


# -- building ------------------------------------------------------------------------------------------------------------------------


def build(drawn: Drawn, weights: int | None = None) -> nn.Module:
    """Returns the network in float64 and eval mode, all weights and statistics random; `weights` is another seed for them."""
    seed = drawn.seed if weights is None else weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = drawn.network
        model = _images(network) if isinstance(network, Images) else _sequences(network)
        return randomise(model.to(DTYPE).eval(), seed, inputs_of(drawn, 4))


def inputs_of(drawn: Drawn, batch: int) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Returns inputs of that batch size, the same ones for a draw."""
    network = drawn.network
    generator = torch.Generator().manual_seed(1000 * drawn.seed + batch)
    if isinstance(network, Sequences):
        if network.words:
            return torch.randint(0, VOCABULARY, (batch, LENGTH), generator=generator)
        return torch.randn(batch, LENGTH, 4, generator=generator, dtype=DTYPE)
    first = torch.randn(batch, 3, *SPACE, generator=generator, dtype=DTYPE)
    if network.second is None:
        return first
    shape = {"siamese": (3, *SPACE), "own": (2, *SPACE), "vector": (5,)}[network.second.how]
    return first, torch.randn(batch, *shape, generator=generator, dtype=DTYPE)


def _images(network: Images) -> nn.Module:
    stem, shape = chain(network.stem, (3, *SPACE))
    parts: dict[str, Any] = {"stem": stem}
    second = network.second
    if second is not None:
        if second.how == "own":
            own, other = chain(network.stem, (2, *SPACE))
            parts["own"] = own.append(conv(other[0], shape[0]))
        elif second.how == "vector":
            parts["film"] = nn.Linear(5, 2 * shape[0])
        if second.how != "vector" and second.join == "cat":
            shape = (2 * shape[0], *shape[1:])
    blocks, heads = _stacked(network.blocks, network.heads, shape)
    return Layer(_run_images, blocks=blocks, heads=heads, network=network, **parts)


def _run_images(m: Any, x: torch.Tensor, other: torch.Tensor | None = None) -> Any:
    x = m.stem(x)
    second = m.network.second
    if other is not None and second.how == "vector":
        scale, shift = m.film(other)[:, :, None, None].chunk(2, 1)
        x = x * (1 + scale) + shift
    elif other is not None:
        y = (m.stem if second.how == "siamese" else m.own)(other)
        x = torch.cat((x, y), 1) if second.join == "cat" else x + y if second.join == "add" else x * y
    return _heads_of(m, x)


def _sequences(network: Sequences) -> nn.Module:
    parts: dict[str, Any] = {"first": nn.Embedding(VOCABULARY, network.width) if network.words else nn.Linear(4, network.width)}
    blocks, heads = _stacked(network.blocks, network.heads, (LENGTH, network.width))
    if network.tied and network.words:
        parts["back"] = nn.Linear(_shapes(blocks, (LENGTH, network.width))[-1][-1], network.width)
        parts["logits"] = nn.Linear(network.width, VOCABULARY, bias=False)
        parts["logits"].weight = parts["first"].weight
    return Layer(_run_sequences, blocks=blocks, heads=heads, network=network, **parts)


def _run_sequences(m: Any, x: torch.Tensor) -> Any:
    return _heads_of(m, m.first(x), m.back if hasattr(m, "back") else None)


def _heads_of(m: Any, x: torch.Tensor, back: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Any:
    features = [x]
    for block in m.blocks:
        features.append(block(features[-1]))
    outputs = [head(features[max(len(features) - 1 - how.after, 0)]) for head, how in zip(m.heads, m.network.heads, strict=True)]
    if back is not None:
        outputs.append(m.logits(back(features[-1])))
    if len(outputs) == 1:
        return outputs[0]
    if m.network.output == "dict":
        return {f"head{i}": output for i, output in enumerate(outputs)}
    return outputs if m.network.output == "list" else tuple(outputs)


def _stacked(blocks: tuple[Described, ...], heads: tuple[Head, ...], shape: Shape) -> tuple[nn.Sequential, nn.ModuleList]:
    """Returns the blocks, and the heads on the features that they stand behind."""
    built, _ = chain(blocks, shape)
    shapes = _shapes(built, shape)
    return built, nn.ModuleList(head.build(shapes[max(len(shapes) - 1 - head.after, 0)]) for head in heads)


def _shapes(blocks: nn.Sequential, shape: Shape) -> list[Shape]:
    shapes = [shape]
    for block in blocks:
        shapes.append(shape_after(block, shapes[-1]))
    return shapes
