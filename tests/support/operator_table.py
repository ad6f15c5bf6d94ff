"""Forty operators that move or mix channels, each as a small module that fits between two convolutions.

An operator is a row of `OPERATORS`: a function of its module and an image batch (n, c, h, w), which gives an image batch with any number
of channels and any size. Layers and tables that it needs are built for the number of channels that reach it.

The reference of an operator that takes a statistic across channels (a mean, softmax, a norm) is the same operator over the channels that
are left; that of every other operator is the operator itself, given zeros in the place of what was removed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.operators import Network, conv, table

Parts: TypeAlias = Callable[[int], dict[str, nn.Module | Tensor]]
Reference: TypeAlias = Callable[[Any, Tensor, Tensor], Tensor]
Alive: TypeAlias = Callable[[Any, Tensor], Tensor]


def nothing(channels: int) -> dict[str, nn.Module | Tensor]:
    """Returns no layers: the operator has none of its own, whatever the number of channels."""
    del channels
    return {}


@dataclass(frozen=True, eq=False)
class Operator:
    """One row of the table.

    Attributes:
        name: as the table shows it.
        run: the operator, a function of the module that holds its layers, and of images.
        parts: its layers, parameters and buffers for a number of channels.
        multiple: what the number of channels must be a multiple of.
        even: whether height and width must be even.
        square: whether the number of its output channels grows with the square of their number.
        ordered: whether what it computes depends on the order of the channels (a running sum, a chain of channels that are added to each
            other), so that removing some is right and exchanging two is not.
        reference: what it computes of images whose channels are zero where a boolean tensor (c,) is False; None: the same as ever.
        alive: which output channels are left when those input channels are; None: those that are not zero everywhere.
    """

    name: str
    run: Callable[[Any, Tensor], Tensor]
    parts: Parts = nothing
    multiple: int = 1
    even: bool = False
    square: bool = False
    ordered: bool = False
    reference: Reference | None = None
    alive: Alive | None = None

    def __str__(self) -> str:
        """The name, for pytest."""
        return self.name

    def build(self, channels: int) -> Network:
        """Returns the module for that number of channels."""
        return Network(self.run, self.parts(channels))


# -- references ----------------------------------------------------------------------------------------------------------------------


def over_kept(run: Callable[[Any, Tensor], Tensor]) -> Reference:
    """Returns the reference of an operator that treats all channels alike: it sees those that are left, the others stay zero."""

    def reference(module: Any, x: Tensor, alive: Tensor) -> Tensor:
        kept = alive.nonzero().squeeze(1)
        return torch.zeros_like(x).index_copy(1, kept, run(module, x.index_select(1, kept)))

    return reference


def group_norm_reference(module: Any, x: Tensor, alive: Tensor) -> Tensor:
    """GroupNorm over the channels that are left in each group."""
    norm, out = module.norm, torch.zeros_like(x)
    for block in torch.arange(x.shape[1]).chunk(norm.num_groups):
        kept = block[alive[block]]
        if kept.numel():
            normed = F.group_norm(x.index_select(1, kept), 1, norm.weight[kept], norm.bias[kept], norm.eps)
            out = out.index_copy(1, kept, normed)
    return out


def maxout_reference(module: Any, x: Tensor, alive: Tensor) -> Tensor:
    """The larger one of the channels that are left of each pair, zero where none is."""
    out = maxout(module, x.masked_fill(~alive.view(1, -1, 1, 1), -torch.inf))
    return out.masked_fill(out == -torch.inf, 0.0)


def same_channels(module: Any, alive: Tensor) -> Tensor:
    """The output channels that are left are the input channels that are left."""
    del module
    return alive


# -- operators that take more than a line --------------------------------------------------------------------------------------------


def unbind_stack(m: Any, x: Tensor) -> Tensor:
    """Takes the channels apart and stacks them in reverse."""
    del m
    return torch.stack(x.unbind(1)[::-1], 1)


def shuffle(m: Any, x: Tensor) -> Tensor:
    """The channel shuffle of ShuffleNet with two groups."""
    del m
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def heads(m: Any, x: Tensor) -> Tensor:
    """Splits the channels into four blocks with a scale each, and merges them again."""
    n, c, h, w = x.shape
    scaled: Tensor = x.view(n, 4, c // 4, h * w) * m.scale
    return scaled.reshape(n, c, h, w)


def split_chunk(m: Any, x: Tensor) -> Tensor:
    """Cuts off a quarter, halves the rest, and joins them in another order."""
    del m
    quarter = x.shape[1] // 4
    a, b = x.split([quarter, 3 * quarter], 1)
    c, d = b.chunk(2, 1)
    return torch.cat([torch.tanh(d), a, c], 1)


def flatten(m: Any, x: Tensor) -> Tensor:
    """Flattens the pooled map into a linear layer, as a classifier does."""
    out: Tensor = m.linear(torch.flatten(F.adaptive_avg_pool2d(x, 2), 1))
    return out[:, :, None, None]


def gram(m: Any, x: Tensor) -> Tensor:
    """The Gram matrix across channels, applied to them."""
    del m
    flat = x.flatten(2)
    return (torch.matmul(flat, flat.transpose(1, 2)) @ flat / flat.shape[-1]).view_as(x)


def bilinear(m: Any, x: Tensor) -> Tensor:
    """Bilinear pooling: the products of all pairs of channels, at every position."""
    del m
    return (x.unsqueeze(2) * x.unsqueeze(1)).flatten(1, 2)


def columns(m: Any, x: Tensor) -> Tensor:
    """im2col, a map of the columns, and col2im."""
    del m
    unfolded = F.unfold(x, 3, padding=1)
    return F.fold(torch.tanh(unfolded), x.shape[2:], 3, padding=1)


def masked_write(m: Any, x: Tensor) -> Tensor:
    """Overwrites a run of channels in place."""
    del m
    out = x.clone()
    out[:, 2:6] = torch.tanh(x[:, 2:6])
    return out


def scatter(m: Any, x: Tensor) -> Tensor:
    """Adds the channels into others, by a constant table."""
    return x.index_add(1, m.order, torch.tanh(x))


def nhwc(m: Any, x: Tensor) -> Tensor:
    """A linear layer over channels that come last."""
    out: Tensor = m.linear(x.permute(0, 2, 3, 1))
    return out.permute(0, 3, 1, 2)


def normed(m: Any, x: Tensor) -> Tensor:
    """The functional layer norm across channels, without weights."""
    del m
    last = x.movedim(1, -1)
    return F.layer_norm(last, last.shape[-1:]).movedim(-1, 1)


def gathered(m: Any, x: Tensor) -> Tensor:
    """Gathers channels by a constant table that is expanded over the batch and space."""
    return x.gather(1, m.order.view(1, -1, 1, 1).expand(x.shape[0], -1, *x.shape[2:]))


def maxout(m: Any, x: Tensor) -> Tensor:
    """The larger one of each pair of channels."""
    del m
    pairs: Tensor = x.unflatten(1, (-1, 2))
    return pairs.amax(2)


def listed(m: Any, x: Tensor) -> Tensor:
    """Picks three quarters of the channels by a Python list, in a mixed order."""
    del m
    count = x.shape[1]
    return x[:, [(5 * i + 3) % count for i in range(3 * count // 4)]]


def largest(m: Any, x: Tensor) -> Tensor:
    """Sorts the values across channels and keeps the larger half."""
    del m
    return x.sort(1, descending=True).values[:, : x.shape[1] // 2]


# -- tables --------------------------------------------------------------------------------------------------------------------------


def order(channels: int, seed: int = 3) -> Tensor:
    """Returns a permutation of the channels, always the same one for a number of them."""
    return torch.randperm(channels, generator=torch.Generator().manual_seed(seed))


def permutation(channels: int) -> dict[str, nn.Module | Tensor]:
    """Returns a permutation as a buffer."""
    return {"order": order(channels)}


def every_third_missing(channels: int) -> dict[str, nn.Module | Tensor]:
    """Returns a boolean buffer that leaves out every third channel."""
    return {"chosen": torch.arange(channels) % 3 != 1}


# -- the table -----------------------------------------------------------------------------------------------------------------------

OPERATORS: Final = (
    # Joining and cutting.
    Operator("cat with itself", lambda _, x: torch.cat([x, x], 1)),
    Operator("split, chunk, swap, cat", split_chunk, multiple=8),
    Operator("stack and sum", lambda _, x: torch.stack([x, torch.tanh(x)]).sum(0)),
    Operator("unbind, reversed, stack", unbind_stack),
    Operator("slice x[:, 2:6]", lambda _, x: x[:, 2:6], multiple=8),
    Operator("slice with step x[:, ::2]", lambda _, x: x[:, ::2], multiple=2),
    # Reordering.
    Operator("flip", lambda _, x: x.flip(1)),
    Operator("roll", lambda _, x: x.roll(3, 1), multiple=4),
    Operator("add of a rolled copy", lambda _, x: x + torch.tanh(x.roll(x.shape[1] // 2, 1)), multiple=2),
    Operator("channel shuffle", shuffle, multiple=2),
    Operator("PixelShuffle", lambda _, x: F.pixel_shuffle(x, 2), multiple=4),
    Operator("PixelUnshuffle", lambda _, x: F.pixel_unshuffle(x, 2), even=True),
    Operator("permute to NHWC, Linear, back", nhwc, lambda c: {"linear": nn.Linear(c, c + 4)}),
    Operator("view as blocks, scale, merge", heads, lambda _: {"scale": table(4, 1, 1)}, multiple=4),
    Operator("flatten, Linear", flatten, lambda c: {"linear": nn.Linear(4 * c, 12)}),
    # Repeating and padding.
    Operator("repeat_interleave", lambda _, x: x.repeat_interleave(2, 1)),
    Operator(
        "pad on channels",
        lambda _, x: F.pad(x, (0, 0, 0, 0, 1, 2)),
        alive=lambda _, alive: F.pad(alive, (1, 2), value=True),
    ),
    # Indexing.
    Operator("index by a list", listed, multiple=4),
    Operator("index by a boolean mask", lambda m, x: x[:, m.chosen], every_third_missing),
    Operator("index_select", lambda m, x: x.index_select(1, m.order), permutation),
    Operator("gather by a constant table", gathered, permutation),
    Operator("index_add", scatter, permutation, ordered=True),
    Operator("write into a slice in place", masked_write, multiple=8),
    Operator("sort", largest, multiple=2),
    # Statistics and sums across channels.
    Operator("cumsum", lambda _, x: x.cumsum(1), ordered=True, alive=same_channels),
    Operator("x - mean", lambda _, x: x - x.mean(1, keepdim=True), reference=over_kept(lambda _, x: x - x.mean(1, keepdim=True))),
    Operator("x * max", lambda _, x: x * x.amax(1, keepdim=True), reference=over_kept(lambda _, x: x * x.amax(1, keepdim=True))),
    Operator("softmax", lambda _, x: x.softmax(1), reference=over_kept(lambda _, x: x.softmax(1))),
    Operator("F.layer_norm", normed, reference=over_kept(normed)),
    Operator(
        "GroupNorm",
        lambda m, x: m.norm(x),
        lambda c: {"norm": nn.GroupNorm(2, c)},
        multiple=4,
        reference=group_norm_reference,
    ),
    Operator("local response norm", lambda _, x: F.local_response_norm(x, 3, alpha=0.5), ordered=True, alive=same_channels),
    # Mixing.
    Operator("GLU", lambda _, x: F.glu(x, 1), multiple=2),
    Operator("maxout", maxout, multiple=2, reference=maxout_reference),
    Operator("Gram matrix (matmul)", gram),
    Operator("einsum", lambda m, x: torch.einsum("nchw,cd->ndhw", x, m.mix), lambda c: {"mix": table(c, 10)}),
    Operator("bilinear pooling (outer product)", bilinear, square=True),
    Operator("depthwise convolution, multiplier 2", lambda m, x: m.depth(x), lambda c: {"depth": conv(c, 2 * c, groups=c)}),
    Operator(
        "grouped transposed convolution",
        lambda m, x: m.up(x),
        lambda c: {"up": nn.ConvTranspose2d(c, c, 3, padding=1, groups=4)},
        multiple=8,
    ),
    Operator("unfold, fold", columns),
    Operator("weight-tied convolutions", lambda m, x: m.tied(torch.tanh(m.tied(x))), lambda c: {"tied": conv(c, c)}),
)
