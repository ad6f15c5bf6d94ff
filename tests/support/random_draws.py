"""How random networks are drawn: hypothesis strategies over the descriptions in `random_networks`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from hypothesis import strategies as st

from tests.support import random_blocks as image
from tests.support import random_tokens as token
from tests.support.random_layers import ACTIVATIONS, NORMS, Described
from tests.support.random_networks import Drawn, Head, Images, Second, Sequences

WIDTHS: Final = (3, 5, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17)  # one width is drawn again only when all of these are taken
DEEPEST: Final = 2  # blocks within blocks within blocks
T = TypeVar("T")


class Pick:
    """Draws numbers and choices; widths of one network differ as long as there are enough of them."""

    def __init__(self, draw: Callable[[st.SearchStrategy[T]], T]) -> None:
        """Starts with all widths free."""
        self._draw = draw
        self._free = list(WIDTHS)

    def width(self) -> int:
        """Returns a width."""
        found: int = self.one(self._free or WIDTHS)
        if found in self._free:
            self._free.remove(found)
        return found

    def one(self, options: Sequence[T]) -> T:
        """Returns one of the options; failing examples shrink towards the first."""
        return self._draw(st.sampled_from(options))  # type: ignore[return-value]

    def flag(self) -> bool:
        """Returns a truth value."""
        return self.one((False, True))

    def norm(self) -> str:
        """Returns a kind of norm."""
        return self.one(NORMS)

    def some(self, make: Callable[[Pick, int], Described], least: int, most: int, depth: int) -> tuple[Described, ...]:
        """Returns some blocks."""
        return tuple(make(self, depth) for _ in range(self.one(range(least, most + 1))))


# -- blocks --------------------------------------------------------------------------------------------------------------------------


def _sizes(pick: Pick) -> tuple[int, ...]:
    return tuple(pick.one(((2, 5), (3, 4, 2), (1, 6), (4, 3, 5))))


def _attention(pick: Pick) -> Described:
    shared = pick.one((1, 1, 2, 3))
    return token.Attention(
        heads=shared * pick.one((1, 2, 3)),
        width=pick.one((2, 3, 4, 5)),
        shared=shared,
        values=pick.one((None, 3, 6)),
        fused=pick.flag(),
        norm=pick.norm(),
        core=pick.one(("fused", "matmul", "einsum")),
        inner=pick.one(("none", "none", "layer", "rms")),
        spell=pick.one(("view", "unflatten", "chunk")),
        residual=not pick.flag(),
        causal=pick.flag(),
    )


IMAGE_LEAVES: Final[tuple[Callable[[Pick], Described], ...]] = (
    lambda p: image.Conv(p.width(), p.one((1, 3)), p.one((1, 2)), p.norm(), p.one(ACTIVATIONS), not p.flag()),
    lambda p: image.Residual(p.width(), None, p.norm(), p.one(ACTIVATIONS), p.one(("add", "inplace", "scale", "subtract"))),
    lambda p: image.Residual(p.width(), p.width(), p.norm(), p.one(ACTIVATIONS), p.one(("add", "inplace", "scale", "subtract"))),
    lambda p: image.Dense(tuple(p.width() for _ in range(p.one((1, 2)))), p.norm(), p.flag()),
    lambda p: image.Split(_sizes(p), p.one(("split", "slices", "narrow", "tensor_split")), p.width()),
    lambda p: image.Chunks(p.width(), p.one((2, 3)), p.one(("add", "gate", "maximum", "glu", "view"))),
    lambda p: image.Shuffle(p.one((2, 3)), p.one((2, 3, 4, 5)), p.one(("view", "reshape", "function"))),
    lambda p: image.Excite(p.width(), p.one(("conv", "linear")), p.one(("sigmoid", "hardsigmoid"))),
    lambda p: image.Gate(p.one(("channel", "place", "pair")), p.width()),
    lambda p: image.Grouped(p.one((2, 3, 4)), p.one((1, 2, 3)), p.one((1, 2, 3)), p.norm()),
    lambda p: image.Depthwise(p.one((1, 2)), p.one(ACTIVATIONS), p.flag()),
    lambda p: image.Transposed(p.width(), p.one((1, 2)), p.norm()),
    lambda p: image.Pixels(p.width(), not p.flag(), p.flag()),
    lambda p: image.Mixed(p.width(), p.one(("einsum", "matmul", "linear", "scaled", "flat"))),
    lambda p: image.Bare(p.one(("scale", "position", "shift"))),
    lambda p: image.Moved(p.one(("roll", "flip", "index", "stride", "repeat", "interleave", "pad"))),
    lambda p: image.Written(p.width(), p.one((1, 2)), p.one(("slice", "view", "copy"))),
    lambda p: image.Fork(p.one((1, 4, 6)), p.one((1, 2))),
    lambda p: image.Pool(p.one(("max", "avg", "blur", "centre"))),
)
IMAGE_NESTS: Final[tuple[Callable[[Pick, int], Described], ...]] = (
    lambda p, d: image.Tokens(p.some(token_block, 1, 2, d), p.one(("flatten", "reshape")), p.flag()),
    lambda p, d: image.Branches(tuple(p.some(image_block, 0, 2, d) for _ in range(p.one((2, 3)))), p.width() if p.flag() else None),
    lambda p, d: image.Shared(p.some(image_block, 1, 2, d), p.one(("twice", "mirrored"))),
)
TOKEN_LEAVES: Final[tuple[Callable[[Pick], Described], ...]] = (
    lambda p: token.Linear(p.width(), p.norm(), p.one(ACTIVATIONS), p.flag()),
    lambda p: token.Mlp(p.width(), p.norm(), p.one(("none", "fused", "apart")), not p.flag()),
    _attention,
    _attention,
    lambda p: token.MultiHead(p.one((1, 2, 3)), p.one((2, 3, 4)), p.norm(), p.width() if p.flag() else None),
    lambda p: token.Mixer(p.width(), p.one(("linear", "conv", "depthwise"))),
    lambda p: token.Places(p.one(("position", "table", "scale"))),
    lambda p: token.Tied(p.width(), p.one(("transposed", "same"))),
    lambda p: token.Recurrent(p.width(), p.one(("gru", "lstm"))),
)
TOKEN_NESTS: Final[tuple[Callable[[Pick, int], Described], ...]] = (
    lambda p, d: token.Joined(p.some(token_block, 1, 2, d)),
    lambda p, d: token.Repeated(p.some(token_block, 1, 2, d)),
)


def image_block(pick: Pick, depth: int = 0) -> Described:
    """Returns a block on images."""
    return _block(pick, depth, IMAGE_LEAVES, IMAGE_NESTS)


def token_block(pick: Pick, depth: int = 0) -> Described:
    """Returns a block on sequences."""
    return _block(pick, depth, TOKEN_LEAVES, TOKEN_NESTS)


def _block(
    pick: Pick, depth: int, leaves: Sequence[Callable[[Pick], Described]], nests: Sequence[Callable[[Pick, int], Described]]
) -> Described:
    number = pick.one(range(len(leaves) + (len(nests) if depth < DEEPEST else 0)))
    return leaves[number](pick) if number < len(leaves) else nests[number - len(leaves)](pick, depth + 1)


# -- networks ------------------------------------------------------------------------------------------------------------------------


def _heads(pick: Pick) -> tuple[Head, ...]:
    kinds = ("pool", "flatten", "hidden", "map", "raw")
    return tuple(Head(pick.one((4, 2, 1)), pick.one(kinds), pick.width(), pick.one((0, 0, 1, 2))) for _ in range(pick.one((1, 1, 2))))


def _images(pick: Pick) -> Images:
    stem = (image.Conv(pick.width(), 3, 1, pick.norm(), pick.one(ACTIVATIONS)),)
    blocks = pick.some(image_block, 1, 4, 0)
    second = Second(pick.one(("siamese", "own", "vector")), pick.one(("add", "multiply", "cat"))) if pick.one((0, 0, 0, 1)) else None
    return Images(stem, blocks, _heads(pick), second, pick.one(("tuple", "dict", "list")))


def _sequences(pick: Pick) -> Sequences:
    words = pick.flag()
    blocks = pick.some(token_block, 1, 4, 0)
    return Sequences(pick.width(), words, blocks, _heads(pick), words and pick.flag(), pick.one(("tuple", "dict", "list")))


@st.composite
def draws(draw: st.DrawFn) -> Drawn:
    """Draws a network and a seed."""
    pick = Pick(draw)
    network = _images(pick) if pick.one((True, True, False)) else _sequences(pick)
    return Drawn(network, draw(st.integers(0, 999)))
