"""What `cut` removes of attention: whole heads, widths of queries and keys, widths of values, or heads and widths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graphprune as gp
from graphprune.pruners.families import CUTS
from tests.support.invariants import evaluate, masked_outputs
from tests.support.networks import randomise
from tests.support.outputs import relative_error

WIDTH, LENGTH = 24, 7


class Grouped(nn.Module):
    """Attention whose keys and values serve several query heads each, with separate projections."""

    def __init__(self, heads: int = 8, kv_heads: int = 4, head_dim: int = 6) -> None:
        """Builds the projections."""
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.inner = nn.Linear(5, WIDTH)
        self.q, self.k = nn.Linear(WIDTH, heads * head_dim), nn.Linear(WIDTH, kv_heads * head_dim)
        self.v, self.o = nn.Linear(WIDTH, kv_heads * head_dim), nn.Linear(heads * head_dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, length, 5) to (n, length, 3)."""
        x = self.inner(x)
        n, length, _ = x.shape
        q = self.q(x).view(n, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(n, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(n, length, self.kv_heads, self.head_dim).transpose(1, 2)
        repeats = self.heads // self.kv_heads
        y = functional.scaled_dot_product_attention(q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1))
        out: Tensor = self.o(y.transpose(1, 2).reshape(n, length, -1))
        return out


class Fused(nn.Module):
    """Attention with one projection for queries, keys and values, and its scale written out."""

    def __init__(self, heads: int = 4, head_dim: int = 6) -> None:
        """Builds the projections."""
        super().__init__()
        self.heads = heads
        self.inner = nn.Linear(5, heads * head_dim)
        self.qkv, self.o = nn.Linear(heads * head_dim, 3 * heads * head_dim), nn.Linear(heads * head_dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, length, 5) to (n, length, 3)."""
        x = self.inner(x)
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5).softmax(-1)
        out: Tensor = self.o((weights @ v).transpose(1, 2).reshape(n, length, width))
        return out


def network(kind: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    """Returns a network in float64 and its inputs."""
    torch.manual_seed(0)
    model = kind().eval()
    randomise(model, 0)
    return model.double(), torch.randn(2, LENGTH, 5, dtype=torch.float64)


def widths(small: nn.Module) -> dict[str, int]:
    """Returns the rows of each projection, whichever kind of module the result is."""
    return {name.removesuffix(".weight"): tensor.shape[0] for name, tensor in small.named_parameters() if name.endswith("weight")}


# cut -> rows of q, k and v of `Grouped` at half of the channels: 8 query heads and 4 key heads of width 6.
ROWS: dict[str, tuple[int, int, int]] = {
    "blocks": (4 * 6, 2 * 6, 2 * 6),
    "within": (8 * 3, 4 * 3, 4 * 3),
    "both": (4 * 3, 2 * 3, 2 * 3),
    "query_key": (8 * 3, 4 * 3, 4 * 6),
    "value": (8 * 6, 4 * 6, 4 * 3),
}


def test_every_choice_has_its_numbers() -> None:
    """The table above covers all choices."""
    assert set(ROWS) == set(CUTS)


@pytest.mark.parametrize("cut", CUTS)
def test_choices_cut_what_they_say(cut: Any) -> None:
    """Rows of queries, keys and values follow the closed formula, the ratio of heads stays, and the result is exact."""
    model, x = network(Grouped)
    small, report = gp.prune(model, x, sparsity=0.5, cut=cut)
    found = widths(small)
    assert (found["q"], found["k"], found["v"]) == ROWS[cut]
    assert found["q"] == 2 * found["k"]
    assert report.error < 1e-12
    assert report.effect > 1e-2


@pytest.mark.parametrize("kind", [Grouped, Fused])
@pytest.mark.parametrize("cut", CUTS)
def test_choices_agree_with_the_independent_reference(kind: type[nn.Module], cut: Any) -> None:
    """The masks of every choice give a shrunk network that computes what plain zeroing computes."""
    model, x = network(kind)
    pruner = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], example_inputs=x, cut=cut)
    masks = pruner.masks()
    small, report = gp.speedup(model, masks)
    expected = masked_outputs(model, pruner.graph, masks, x)
    assert relative_error(expected, evaluate(small, x)) < 1e-12
    assert report.effect > 1e-2


def test_whole_heads_keep_the_class_and_its_numbers() -> None:
    """Without whole heads the module states the new number of heads; the width of a head, and with it the scale, stays."""
    model, x = network(Grouped)
    small, report = gp.prune(model, x, sparsity=0.5)
    assert report.kind == "module"
    assert isinstance(small, Grouped)
    assert (small.heads, small.kv_heads, small.head_dim) == (4, 2, 6)


def test_the_report_says_what_went_instead() -> None:
    """A group that stays whole because of the choice says so."""
    model, x = network(Grouped)
    pruner = gp.L1NormPruner(model, [{"sparsity": 0.5, "op_types": ["default"]}], example_inputs=x, cut="value")
    masks = pruner.masks()
    heads = next(g for g in pruner.graph.groups if g.role == "block")
    assert np.asarray(masks[heads.name]).all()
    assert "positions of values go instead (cut='value')" in pruner.plan.notes[heads.name]


def test_widths_in_one_tensor_are_one_width() -> None:
    """Queries, keys and values that lie in one tensor of shape (3, heads, width) have one width; asked for one of them, heads go."""
    model, x = network(Fused)
    expected: dict[Any, int] = {"within": 3 * 4 * 3, "value": 3 * 2 * 6}
    for cut, rows in expected.items():
        small, _ = gp.prune(model, x, sparsity=0.5, cut=cut)
        assert widths(small)["qkv"] == rows


def test_unknown_choice_is_refused() -> None:
    """A choice that does not exist is an error that lists those that do."""
    model, x = network(Fused)
    with pytest.raises(gp.ConfigError, match="'query_key'"):
        gp.prune(model, x, cut="heads")  # type: ignore[arg-type]
